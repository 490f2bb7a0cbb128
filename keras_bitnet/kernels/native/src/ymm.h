// What the instruction sets with vectors of 256 bits share: a tile is two halves of eight columns.
#pragma once
#include <immintrin.h>

#include "attend_block.h"
#include "elementwise.h"
#include "normalize.h"
#include "scale.h"

namespace kbn {
namespace {

constexpr int kHalves = 2;

inline __m256i broadcast(const int8_t* x) {
  int32_t word;
  memcpy(&word, x, 4);
  return _mm256_set1_epi32(word);
}

// Fetches what one of some streams needs soon; those of 8 bits are long, and the processor fetches them
// ahead better by itself (decision note 7).
template <Format F, int Streams>
inline void fetch_ahead(const uint8_t* tile) {
  if (F == kBits8 && Streams > 1) return;
  constexpr int kAhead = Streams == 1 ? 6144 : 2048;
  _mm_prefetch(reinterpret_cast<const char*>(tile) + kAhead, _MM_HINT_T1);
}

inline __m256i load_half(const uint8_t* tile, int half) {
  return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(tile) + half);
}

// The operands of half a tile, taken out of it one after another.
template <Format F>
struct Operands {
  __m256i raw;

  void load(const uint8_t* tile, int half) { raw = load_half(tile, half); }
  __m256i take(int i) const {
    constexpr int kBits = 8 / operands(F);
    if (F == kBits8) return raw;
    const __m256i mask = _mm256_set1_epi8(static_cast<char>((1 << kBits) - 1));
    return _mm256_and_si256(_mm256_srli_epi16(raw, kBits * i), mask);
  }
};

// With u = v - 1, averages that round up give (v + v / 2) / 2, rounded down: the digit, the whole
// part of 3 * v / 256, is in its two highest bits.
template <>
struct Operands<kTrits> {
  __m256i u;

  void load(const uint8_t* tile, int half) {
    u = _mm256_sub_epi8(load_half(tile, half), _mm256_set1_epi8(1));
  }
  __m256i take(int) {
    const __m256i average = _mm256_avg_epu8(u, _mm256_avg_epu8(u, _mm256_setzero_si256()));
    u = _mm256_add_epi8(_mm256_add_epi8(u, u), _mm256_add_epi8(u, _mm256_set1_epi8(2)));
    return _mm256_and_si256(_mm256_srli_epi16(average, 6), _mm256_set1_epi8(3));
  }
};

template <int Rows>
struct Sums {
  __m256i value[Rows][kHalves];

  void clear() {
    KBN_UNROLL for (int r = 0; r < Rows; ++r) {
      KBN_UNROLL for (int h = 0; h < kHalves; ++h) value[r][h] = _mm256_setzero_si256();
    }
  }
  void store(int32_t* to, int width) const {  // of a row of sums there
    KBN_UNROLL for (int r = 0; r < Rows; ++r) {
      KBN_UNROLL for (int h = 0; h < kHalves; ++h) {
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(to + r * width) + h, value[r][h]);
      }
    }
  }
};

// sums += `tiles` tiles of each column, one operand after another: `dot(sum, codes, word)`.
template <Format F, int Rows, int Columns, class Dot>
inline void add_operands(const uint8_t* tile, int64_t stride, const int8_t* x, int64_t tiles,
                         Sums<Rows> (&sums)[Columns], Dot dot) {
  for (int64_t t = 0; t < tiles; ++t) {
    KBN_UNROLL for (int c = 0; c < Columns; ++c) {
      fetch_ahead<F, Columns>(tile + c * stride);
      Operands<F> from[kHalves];
      KBN_UNROLL for (int h = 0; h < kHalves; ++h) from[h].load(tile + c * stride, h);
      KBN_UNROLL for (int i = 0; i < operands(F); ++i) {
        __m256i codes[kHalves];
        KBN_UNROLL for (int h = 0; h < kHalves; ++h) codes[h] = from[h].take(i);
        KBN_UNROLL for (int r = 0; r < Rows; ++r) {
          const __m256i word = broadcast(x + (i * Rows + r) * 4);
          KBN_UNROLL for (int h = 0; h < kHalves; ++h) dot(sums[c].value[r][h], codes[h], word);
        }
      }
    }
    tile += kTileBytes;
    x += operands(F) * 4 * Rows;
  }
}

// Some columns of a block, from `first` on: `add(tile, stride, x, tiles, sums)` for at most `at_once`
// tiles at a time.
template <Format F, int Rows, int Columns, class Add>
inline void each_segment(const Block& block, int first, int64_t at_once, Add add) {
  const uint8_t* tile = block.tiles + first * block.tile_stride;
  const int8_t* x = block.x_codes;
  const int width = block.columns * kTileOutputs;
  int32_t* to = block.sums + first * kTileOutputs;
  for (int64_t segment = 0; segment < block.segments; ++segment) {
    Sums<Rows> sums[Columns];
    KBN_UNROLL for (int c = 0; c < Columns; ++c) {
      prefetch_ahead(block, segment, first + c);
      sums[c].clear();
    }
    for (int64_t left = block.segment_steps; left > 0; left -= at_once) {
      const int64_t tiles = left < at_once ? left : at_once;
      add(tile, block.tile_stride, x, tiles, sums);
      tile += tiles * kTileBytes;
      x += tiles * operands(F) * 4 * Rows;
    }
    KBN_UNROLL for (int c = 0; c < Columns; ++c) sums[c].store(to + c * kTileOutputs, width);
    to += Rows * width;
  }
}

// Each instruction set's: the sums of some columns of a block, from `first` on.
template <Format F, int Rows, int Columns>
void multiply_columns(const Block& block, int first);

// One row, bound by memory: columns side by side are streams, fetched ahead better than one (decision
// note 7), and sums enough to hide how long an instruction takes.
template <Format F>
void multiply_row(const Block& block) {
  int first = 0;
  for (; first + 4 <= block.columns; first += 4) multiply_columns<F, 1, 4>(block, first);
  for (; first < block.columns; ++first) multiply_columns<F, 1, 1>(block, first);
}

Shape shape(int rows) { return {rows == 1 ? 4 : 1, 4}; }

}  // namespace
}  // namespace kbn
