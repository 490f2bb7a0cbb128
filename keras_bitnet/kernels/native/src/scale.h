// Sums that become numbers, in plain C++ for every table (portable.h).
#pragma once
#include "lanes.h"

namespace kbn {
namespace {

// The exact sum as a float. Unsigned, since a term may wrap where the whole does not.
inline float whole_sum(const Scaling& scaling, int32_t sum, int32_t x_sum) {
  const uint32_t added = static_cast<uint32_t>(scaling.shift) * static_cast<uint32_t>(x_sum);
  return static_cast<float>(
      static_cast<int32_t>(static_cast<uint32_t>(scaling.factor) * static_cast<uint32_t>(sum) + added));
}

// Adds the scaled sums of all segments of a block to y, whole tiles of columns.
template <int Columns, bool Twice, bool Shared>
void add_tiles(const Block& block, const Scaling& scaling, float* y) {
  constexpr int kWidth = Columns * kTileOutputs;
  for (int row = 0; row < block.rows; ++row, y += kWidth) {
    const int32_t* sums = block.sums + row * kWidth;
    const int32_t* x_sums = scaling.x_sums + row * scaling.x_sums_stride;
    const float* scale = scaling.scale;
    Lanes total[Columns];
    KBN_UNROLL for (int c = 0; c < Columns; ++c) total[c] = Lanes(y + c * kTileOutputs);
    for (int64_t segment = 0; segment < block.segments; ++segment) {
      const uint32_t added = static_cast<uint32_t>(scaling.shift) * static_cast<uint32_t>(x_sums[segment]);
      KBN_UNROLL for (int c = 0; c < Columns; ++c) {
        const float* its = scale + (Shared ? 0 : output(block, c));
        total[c].template add_scaled<Twice, Shared>(sums + c * kTileOutputs, added, its);
      }
      sums += block.rows * kWidth;
      scale += scaling.scale_stride;
    }
    KBN_UNROLL for (int c = 0; c < Columns; ++c) total[c].store(y + c * kTileOutputs);
  }
}

template <int Columns>
void add_columns(const Block& block, const Scaling& scaling, float* y) {
  if (scaling.factor == 2) {
    scaling.shared ? add_tiles<Columns, true, true>(block, scaling, y)
                   : add_tiles<Columns, true, false>(block, scaling, y);
  } else {
    scaling.shared ? add_tiles<Columns, false, true>(block, scaling, y)
                   : add_tiles<Columns, false, false>(block, scaling, y);
  }
}

// The same where columns lie side by side, but the last ones do not exist and have no scales.
void add_some(const Block& block, const Scaling& scaling, float* y) {
  const int width = block.columns * kTileOutputs;
  const int32_t* sums = block.sums;
  for (int64_t segment = 0; segment < block.segments; ++segment) {
    const float* scale = scaling.scale + segment * scaling.scale_stride;
    for (int row = 0; row < block.rows; ++row, sums += width) {
      const int32_t x_sum = scaling.x_sums[row * scaling.x_sums_stride + segment];
      for (int i = 0; i < scaling.valid; ++i) {
        y[row * width + i] += whole_sum(scaling, sums[i], x_sum) * scale[scaling.shared ? 0 : i];
      }
    }
  }
}

void add_scaled(const Block& block, const Scaling& scaling, float* y) {
  if (scaling.valid < block.columns * kTileOutputs) return add_some(block, scaling, y);
  switch (block.columns) {
    case 1: return add_columns<1>(block, scaling, y);
    case 2: return add_columns<2>(block, scaling, y);
    case 4: return add_columns<4>(block, scaling, y);
    case 8: return add_columns<8>(block, scaling, y);
    default: return add_some(block, scaling, y);
  }
}

// Writes the scaled sums of the one segment of a block.
template <typename Element>
void finish_as(const Block& block, const Scaling& scaling, const Outputs& outputs) {
  for (int column = 0; column < block.columns; ++column) {
    const int64_t at = output(block, column);
    const int left = scaling.valid - column * kTileOutputs;
    const int valid = left < kTileOutputs ? left : kTileOutputs;
    float scale[kTileOutputs], bias[kTileOutputs];
    for (int i = 0; i < valid; ++i) {
      scale[i] = scaling.scale[scaling.shared ? 0 : at + i];
      bias[i] = outputs.bias ? outputs.bias[at + i] : 0.0f;
    }
    for (int row = 0; row < block.rows; ++row) {
      const int32_t* sums = block.sums + (row * block.columns + column) * kTileOutputs;
      const int32_t x_sum = scaling.x_sums[row * scaling.x_sums_stride];
      const float x_scale = outputs.x_scales[row];
      auto* to = reinterpret_cast<typename Element::Storage*>(outputs.y + row * outputs.stride) + at;
      const auto put = [&](int i) {
        to[i] = Element::narrow(whole_sum(scaling, sums[i], x_sum) * scale[i] * x_scale + bias[i]);
      };
      if (valid == kTileOutputs) {
        KBN_KEEP_LOOP for (int i = 0; i < kTileOutputs; ++i) put(i);
      } else {
        for (int i = 0; i < valid; ++i) put(i);
      }
    }
  }
}

void finish(const Block& block, const Scaling& scaling, const Outputs& outputs) {
  with_element(outputs.dtype, [&](auto element) {
    finish_as<decltype(element)>(block, scaling, outputs);
  });
}

}  // namespace
}  // namespace kbn
