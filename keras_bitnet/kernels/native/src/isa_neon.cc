// NEON with dotprod: `sdot` multiplies signed bytes four by four and adds to int32.
#include <arm_neon.h>

#include "attend_block.h"
#include "elementwise.h"
#include "normalize.h"
#include "scale.h"

namespace kbn {
namespace {

constexpr int kQuarters = 4;  // a tile is four vectors of four columns

// Codes of operand i as signed bytes, taken in order. Codes of 8 bits come out less 128.
template <Format F>
inline int8x16_t take(uint8x16_t& raw, int i) {
  if constexpr (F == kBits8) {
    return vreinterpretq_s8_u8(veorq_u8(raw, vdupq_n_u8(0x80)));
  } else if constexpr (F == kTrits) {
    // The whole part of 3 * v / 256: of (v + v / 2) / 2, the two highest bits.
    const uint8x16_t digit = vshrq_n_u8(vhaddq_u8(raw, vshrq_n_u8(raw, 1)), 6);
    raw = vmulq_u8(raw, vdupq_n_u8(3));
    return vreinterpretq_s8_u8(digit);
  } else {
    constexpr int kBits = 8 / operands(F);
    // The operator, as the intrinsic wants a literal of 1 or more: it becomes `ushr`, or nothing.
    const uint8x16_t shifted = raw >> static_cast<uint8_t>(kBits * i);
    return vreinterpretq_s8_u8(vandq_u8(shifted, vdupq_n_u8((1 << kBits) - 1)));
  }
}

inline int8x16_t broadcast(const int8_t* x) {
  int32_t word;
  memcpy(&word, x, 4);
  return vreinterpretq_s8_s32(vdupq_n_s32(word));
}

template <Format F, int Rows>
void multiply_rows(const Block& block) {
  constexpr int kOperands = operands(F);
  const uint8_t* tile = block.tiles;
  const int8_t* x = block.x_codes;
  int32_t* to = block.sums;
  for (int64_t segment = 0; segment < block.segments; ++segment) {
    int32x4_t sums[Rows][kQuarters], x_sums[Rows];
    prefetch_ahead(block, segment);
    KBN_UNROLL for (int r = 0; r < Rows; ++r) {
      x_sums[r] = vdupq_n_s32(0);
      KBN_UNROLL for (int q = 0; q < kQuarters; ++q) sums[r][q] = vdupq_n_s32(0);
    }
    for (int64_t step = 0; step < block.segment_steps; ++step) {
      uint8x16_t raw[kQuarters];
      __builtin_prefetch(tile + 2048);
      KBN_UNROLL for (int q = 0; q < kQuarters; ++q) raw[q] = vld1q_u8(tile + 16 * q);
      KBN_UNROLL for (int i = 0; i < kOperands; ++i) {
        int8x16_t codes[kQuarters];
        KBN_UNROLL for (int q = 0; q < kQuarters; ++q) codes[q] = take<F>(raw[q], i);
        KBN_UNROLL for (int r = 0; r < Rows; ++r) {
          const int8x16_t word = broadcast(x + (i * Rows + r) * 4);
          // The 128 that were taken from each code are put back below.
          if (F == kBits8) x_sums[r] = vdotq_s32(x_sums[r], word, vdupq_n_s8(1));
          KBN_UNROLL for (int q = 0; q < kQuarters; ++q) {
            sums[r][q] = vdotq_s32(sums[r][q], codes[q], word);
          }
        }
      }
      tile += kTileBytes;
      x += kOperands * 4 * Rows;
    }
    KBN_UNROLL for (int r = 0; r < Rows; ++r) {
      KBN_UNROLL for (int q = 0; q < kQuarters; ++q) {
        const int32x4_t sum = vaddq_s32(sums[r][q], vshlq_n_s32(x_sums[r], 7));
        vst1q_s32(to + r * kTileOutputs + 4 * q, sum);
      }
    }
    to += Rows * kTileOutputs;
  }
}

template <Format F>
void multiply(const Block& block) {
  switch (block.rows) {
    case 1: return multiply_rows<F, 1>(block);
    case 2: return multiply_rows<F, 2>(block);
    case 3: return multiply_rows<F, 3>(block);
    default: return multiply_rows<F, 4>(block);
  }
}

}  // namespace

extern const Kernels kNeon = {
    "neon", 4, one_column, absmax, quantize, split, sum, interleave,
    {multiply<kBits1>, multiply<kBits2>, multiply<kBits4>, multiply<kBits8>, multiply<kTrits>},
    add_scaled, finish, store, attend, remember, attend_block, normalize, add, activate, nullptr, nullptr,
};

}  // namespace kbn
