// AVX-VNNI: `vpdpbusd` of AVX-512 VNNI on vectors of 256 bits, for processors without AVX-512.
#include "ymm.h"

namespace kbn {
namespace {

// As in isa_avx512vnni.cc, assembly keeps gcc 12 from moving the sums about.
inline void dot(__m256i& sums, __m256i codes, __m256i x) {
#if defined(__GNUC__)
  __asm__("%{vex%} vpdpbusd %2, %1, %0" : "+x"(sums) : "x"(codes), "x"(x));
#else
  sums = _mm256_dpbusd_avx_epi32(sums, codes, x);
#endif
}

template <Format F, int Rows>
void multiply_rows(const Block& block) {
  constexpr int kOperands = operands(F);
  // A single row has registers to spare: sums apart hide how long an instruction takes.
  constexpr int kParts = Rows == 1 ? 2 : 1;
  const uint8_t* tile = block.tiles;
  const int8_t* x = block.x_codes;
  int32_t* to = block.sums;
  for (int64_t segment = 0; segment < block.segments; ++segment) {
    Sums<Rows> sums[kParts];
    KBN_UNROLL for (int p = 0; p < kParts; ++p) sums[p].clear();
    for (int64_t step = 0; step < block.segment_steps; ++step) {
      Operands<F> from[kHalves];
      KBN_UNROLL for (int h = 0; h < kHalves; ++h) from[h].load(tile, h);
      KBN_UNROLL for (int i = 0; i < kOperands; ++i) {
        __m256i codes[kHalves];
        KBN_UNROLL for (int h = 0; h < kHalves; ++h) codes[h] = from[h].take(i);
        KBN_UNROLL for (int r = 0; r < Rows; ++r) {
          const __m256i word = broadcast(x + (i * Rows + r) * 4);
          KBN_UNROLL for (int h = 0; h < kHalves; ++h) {
            dot(sums[i % kParts].value[r][h], codes[h], word);
          }
        }
      }
      tile += kTileBytes;
      x += kOperands * 4 * Rows;
    }
    KBN_UNROLL for (int p = 1; p < kParts; ++p) {
      KBN_UNROLL for (int h = 0; h < kHalves; ++h) {
        sums[0].value[0][h] = _mm256_add_epi32(sums[0].value[0][h], sums[p].value[0][h]);
      }
    }
    sums[0].store(to);
    prefetch_ahead(block, segment);
    to += Rows * kTileOutputs;
  }
}

template <Format F>
void multiply(const Block& block) {
  switch (block.rows) {
    case 1: return multiply_rows<F, 1>(block);
    case 2: return multiply_rows<F, 2>(block);
    case 3: return multiply_rows<F, 3>(block);
    case 4: return multiply_rows<F, 4>(block);
    default: return multiply_rows<F, 5>(block);
  }
}

}  // namespace

extern const Kernels kAvxVnni = {
    "avxvnni", 5, one_column, absmax, quantize, split, sum, interleave,
    {multiply<kBits1>, multiply<kBits2>, multiply<kBits4>, multiply<kBits8>, multiply<kTrits>},
    add_scaled, finish, store, attend, normalize, nullptr, nullptr,
};

}  // namespace kbn
