// NEON with dotprod: `sdot` multiplies signed bytes four by four and adds to int32.
#include <arm_neon.h>

#include "portable.h"

namespace kbn {
namespace {

constexpr int kQuarters = 4;  // a tile is four vectors of four columns

// Codes of operand i as signed bytes. Codes of 8 bits, 0 to 255, come out less 128.
template <int Bits>
inline int8x16_t operand(uint8x16_t raw, int i) {
  if constexpr (Bits == 8) {
    return vreinterpretq_s8_u8(veorq_u8(raw, vdupq_n_u8(0x80)));
  } else {
    // The operator, as the intrinsic wants a literal of 1 or more: it becomes `ushr`, or nothing.
    const uint8x16_t shifted = raw >> static_cast<uint8_t>(Bits * i);
    return vreinterpretq_s8_u8(vandq_u8(shifted, vdupq_n_u8((1 << Bits) - 1)));
  }
}

inline int8x16_t broadcast(const int8_t* x) {
  int32_t word;
  memcpy(&word, x, 4);
  return vreinterpretq_s8_s32(vdupq_n_s32(word));
}

template <int Bits, int Rows>
void multiply_rows(const Block& block) {
  constexpr int kOperands = 8 / Bits;
  const uint8_t* tile = block.tiles;
  const int8_t* x = block.x_codes;
  int32_t* to = block.sums;
  for (int64_t segment = 0; segment < block.segments; ++segment) {
    int32x4_t sums[Rows][kQuarters], x_sums[Rows];
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
        KBN_UNROLL for (int q = 0; q < kQuarters; ++q) codes[q] = operand<Bits>(raw[q], i);
        KBN_UNROLL for (int r = 0; r < Rows; ++r) {
          const int8x16_t word = broadcast(x + (i * Rows + r) * 4);
          // The 128 that were taken from each code are put back below.
          if (Bits == 8) x_sums[r] = vdotq_s32(x_sums[r], word, vdupq_n_s8(1));
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

template <int Bits>
void multiply(const Block& block) {
  switch (block.rows) {
    case 1: return multiply_rows<Bits, 1>(block);
    case 2: return multiply_rows<Bits, 2>(block);
    case 3: return multiply_rows<Bits, 3>(block);
    default: return multiply_rows<Bits, 4>(block);
  }
}

}  // namespace

extern const Kernels kNeon = {
    "neon", 4, 1, absmax, quantize, {multiply<1>, multiply<2>, multiply<4>, multiply<8>},
    add_scaled, store,
};

}  // namespace kbn
