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

template <Format F, int Rows, int Columns>
void multiply_columns(const Block& block, int first) {
  each_segment<F, Rows, Columns>(
      block, first, block.segment_steps,
      [](const uint8_t* tile, int64_t stride, const int8_t* x, int64_t tiles, auto& sums) {
        add_operands<F>(tile, stride, x, tiles, sums, dot);
      });
}

template <Format F>
void multiply(const Block& block) {
  switch (block.rows) {
    case 1: return multiply_row<F>(block);
    case 2: return multiply_columns<F, 2, 1>(block, 0);
    case 3: return multiply_columns<F, 3, 1>(block, 0);
    case 4: return multiply_columns<F, 4, 1>(block, 0);
    default: return multiply_columns<F, 5, 1>(block, 0);
  }
}

}  // namespace

extern const Kernels kAvxVnni = {
    "avxvnni", 5, shape, absmax, quantize, split, sum, interleave,
    {multiply<kBits1>, multiply<kBits2>, multiply<kBits4>, multiply<kBits8>, multiply<kTrits>},
    add_scaled, finish, store, attend, remember, attend_block, normalize, add, activate, nullptr, nullptr,
};

}  // namespace kbn
