// AVX2: `vpmaddubsw` multiplies unsigned weight codes by signed activation codes and adds pairs in
// int16, where it saturates. Codes of up to 4 bits keep clear of that for some tiles: eight pairs of
// 4 bits reach at most 8 * 2 * 15 * 128 = 30720. Codes of 8 bits are widened to 16 bits first.
#include "ymm.h"

namespace kbn {
namespace {

// sum += pairs of products. One piece for gcc, which else moves the products together and the sums
// into memory.
inline void multiply_add(__m256i& sum, __m256i codes, __m256i x) {
#if defined(__GNUC__)
  __m256i products;
  asm("vpmaddubsw %2, %3, %1\n\tvpaddw %1, %0, %0" : "+x"(sum), "=&x"(products) : "x"(x), "x"(codes));
#else
  sum = _mm256_add_epi16(sum, _mm256_maddubs_epi16(codes, x));
#endif
}

// Codes of up to 4 bits: sums += `tiles` tiles of each column, so few that int16 holds the sums of pairs.
template <Format F, int Rows, int Columns>
inline void add_tiles(const uint8_t* tile, int64_t stride, const int8_t* x, int64_t tiles,
                      Sums<Rows> (&sums)[Columns]) {
  Sums<Rows> pairs[Columns];
  KBN_UNROLL for (int c = 0; c < Columns; ++c) pairs[c].clear();
  add_operands<F>(tile, stride, x, tiles, pairs, multiply_add);
  const __m256i ones = _mm256_set1_epi16(1);
  KBN_UNROLL for (int c = 0; c < Columns; ++c) {
    KBN_UNROLL for (int r = 0; r < Rows; ++r) {
      KBN_UNROLL for (int h = 0; h < kHalves; ++h) {
        sums[c].value[r][h] =
            _mm256_add_epi32(sums[c].value[r][h], _mm256_madd_epi16(pairs[c].value[r][h], ones));
      }
    }
  }
}

// 8 bits: even and odd codes as 16-bit numbers, exact in int32.
template <int Rows>
inline void add_tile_of_bytes(const uint8_t* tile, const int8_t* x, Sums<Rows>& sums) {
  __m256i even[kHalves], odd[kHalves];
  KBN_UNROLL for (int h = 0; h < kHalves; ++h) {
    const __m256i raw = load_half(tile, h);
    even[h] = _mm256_and_si256(raw, _mm256_set1_epi16(0xff));
    odd[h] = _mm256_srli_epi16(raw, 8);
  }
  KBN_UNROLL for (int r = 0; r < Rows; ++r) {
    const __m256i word = broadcast(x + r * 4);
    const __m256i x_even = _mm256_srai_epi16(_mm256_slli_epi16(word, 8), 8);
    const __m256i x_odd = _mm256_srai_epi16(word, 8);
    KBN_UNROLL for (int h = 0; h < kHalves; ++h) {
      const __m256i products = _mm256_add_epi32(_mm256_madd_epi16(even[h], x_even),
                                                _mm256_madd_epi16(odd[h], x_odd));
      sums.value[r][h] = _mm256_add_epi32(sums.value[r][h], products);
    }
  }
}

template <Format F, int Rows, int Columns>
void multiply_columns(const Block& block, int first) {
  constexpr int kMostCode = F == kTrits ? 2 : (1 << 8 / operands(F)) - 1;
  constexpr int64_t kAtOnce = F == kBits8 ? 1 : 32767 / (operands(F) * 2 * kMostCode * 128);  // tiles
  each_segment<F, Rows, Columns>(
      block, first, kAtOnce,
      [](const uint8_t* tile, int64_t stride, const int8_t* x, int64_t tiles, auto& sums) {
        if constexpr (F != kBits8) {
          add_tiles<F>(tile, stride, x, tiles, sums);
        } else {
          KBN_UNROLL for (int c = 0; c < Columns; ++c) {
            fetch_ahead<F, Columns>(tile + c * stride);
            add_tile_of_bytes(tile + c * stride, x, sums[c]);
          }
        }
      });
}

template <Format F>
void multiply(const Block& block) {
  switch (block.rows) {
    case 1: return multiply_row<F>(block);
    case 2: return multiply_columns<F, 2, 1>(block, 0);
    case 3: return multiply_columns<F, 3, 1>(block, 0);
    default: return multiply_columns<F, 4, 1>(block, 0);
  }
}

}  // namespace

extern const Kernels kAvx2 = {
    "avx2", 4, shape, absmax, quantize, split, sum, interleave,
    {multiply<kBits1>, multiply<kBits2>, multiply<kBits4>, multiply<kBits8>, multiply<kTrits>},
    add_scaled, finish, store, attend, remember, attend_block, normalize, add, activate, nullptr, nullptr,
};

}  // namespace kbn
