// AVX2: `vpmaddubsw` multiplies unsigned weight codes by signed activation codes and adds pairs in
// int16, where it saturates. Codes of up to 4 bits keep clear of that: eight such pairs reach at
// most 8 * 2 * 15 * 128 = 30720. Codes of 8 bits are widened to 16 bits first.
#include "ymm.h"

namespace kbn {
namespace {

// Codes of up to 4 bits: sums += `Tiles` tiles, of so few inputs that int16 holds them.
template <Format F, int Rows, int Tiles>
inline void add_tiles(const uint8_t* tile, const int8_t* x, Sums<Rows>& sums) {
  constexpr int kOperands = operands(F), kMostCode = F == kTrits ? 2 : (1 << 8 / kOperands) - 1;
  static_assert(Tiles * kOperands * 2 * kMostCode * 128 <= 32767, "int16 would saturate");
  Sums<Rows> pairs;
  pairs.clear();
  KBN_UNROLL for (int u = 0; u < Tiles; ++u) {
    Operands<F> from[kHalves];
    KBN_UNROLL for (int h = 0; h < kHalves; ++h) from[h].load(tile + u * kTileBytes, h);
    KBN_UNROLL for (int i = 0; i < kOperands; ++i) {
      __m256i codes[kHalves];
      KBN_UNROLL for (int h = 0; h < kHalves; ++h) codes[h] = from[h].take(i);
      KBN_UNROLL for (int r = 0; r < Rows; ++r) {
        const __m256i word = broadcast(x + ((u * kOperands + i) * Rows + r) * 4);
        KBN_UNROLL for (int h = 0; h < kHalves; ++h) {
          pairs.value[r][h] =
              _mm256_add_epi16(pairs.value[r][h], _mm256_maddubs_epi16(codes[h], word));
        }
      }
    }
  }
  const __m256i ones = _mm256_set1_epi16(1);
  KBN_UNROLL for (int r = 0; r < Rows; ++r) {
    KBN_UNROLL for (int h = 0; h < kHalves; ++h) {
      sums.value[r][h] =
          _mm256_add_epi32(sums.value[r][h], _mm256_madd_epi16(pairs.value[r][h], ones));
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

template <Format F, int Rows>
void multiply_rows(const Block& block) {
  constexpr int kOperands = operands(F);
  constexpr int kAtOnce = F == kTrits ? 2 : 8 / kOperands;  // tiles
  const uint8_t* tile = block.tiles;
  const int8_t* x = block.x_codes;
  int32_t* to = block.sums;
  for (int64_t segment = 0; segment < block.segments; ++segment) {
    Sums<Rows> sums;
    sums.clear();
    int64_t left = block.segment_steps;
    if constexpr (F != kBits8) {
      for (; left >= kAtOnce; left -= kAtOnce) {
        add_tiles<F, Rows, kAtOnce>(tile, x, sums);
        tile += kAtOnce * kTileBytes;
        x += kAtOnce * kOperands * 4 * Rows;
      }
    }
    for (; left > 0; --left) {
      if constexpr (F != kBits8) {
        add_tiles<F, Rows, 1>(tile, x, sums);
      } else {
        add_tile_of_bytes<Rows>(tile, x, sums);
      }
      tile += kTileBytes;
      x += kOperands * 4 * Rows;
    }
    sums.store(to);
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
    default: return multiply_rows<F, 4>(block);
  }
}

}  // namespace

extern const Kernels kAvx2 = {
    "avx2", 4, 1, absmax, quantize, split, sum, interleave,
    {multiply<kBits1>, multiply<kBits2>, multiply<kBits4>, multiply<kBits8>, multiply<kTrits>},
    add_scaled, store, attend, normalize,
};

}  // namespace kbn
