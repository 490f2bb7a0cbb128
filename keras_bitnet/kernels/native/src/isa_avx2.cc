// AVX2: `vpmaddubsw` multiplies unsigned weight codes by signed activation codes and adds pairs in
// int16, where it saturates. Codes of up to 4 bits keep clear of that: eight such pairs reach at
// most 8 * 2 * 15 * 128 = 30720. Codes of 8 bits are widened to 16 bits first.
#include <immintrin.h>

#include "portable.h"

namespace kbn {
namespace {

constexpr int kHalves = 2;  // a tile is two vectors of eight columns
constexpr int kAhead = 4096;

inline __m256i broadcast(const int8_t* x) {
  int32_t word;
  memcpy(&word, x, 4);
  return _mm256_set1_epi32(word);
}

inline __m256i load_half(const uint8_t* tile, int half) {
  _mm_prefetch(reinterpret_cast<const char*>(tile) + kAhead, _MM_HINT_T0);
  return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(tile) + half);
}

template <int Rows>
struct Sums {
  __m256i value[Rows][kHalves];

  void clear() {
    KBN_UNROLL for (int r = 0; r < Rows; ++r) {
      KBN_UNROLL for (int h = 0; h < kHalves; ++h) value[r][h] = _mm256_setzero_si256();
    }
  }
  void store(int32_t* to) const {
    KBN_UNROLL for (int r = 0; r < Rows; ++r) {
      KBN_UNROLL for (int h = 0; h < kHalves; ++h) {
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(to + r * kTileOutputs) + h, value[r][h]);
      }
    }
  }
};

// 1, 2 and 4 bits: sums += `Tiles` tiles, of at most 32 inputs so that int16 holds them.
template <int Bits, int Rows, int Tiles>
inline void add_tiles(const uint8_t* tile, const int8_t* x, Sums<Rows>& sums) {
  constexpr int kOperands = 8 / Bits;
  static_assert(Tiles * kOperands <= 8, "more would saturate int16");
  const __m256i mask = _mm256_set1_epi8(static_cast<char>((1 << Bits) - 1));
  Sums<Rows> pairs;
  pairs.clear();
  KBN_UNROLL for (int u = 0; u < Tiles; ++u) {
    __m256i raw[kHalves];
    KBN_UNROLL for (int h = 0; h < kHalves; ++h) raw[h] = load_half(tile + u * kTileBytes, h);
    KBN_UNROLL for (int i = 0; i < kOperands; ++i) {
      __m256i codes[kHalves];
      KBN_UNROLL for (int h = 0; h < kHalves; ++h) {
        codes[h] = _mm256_and_si256(_mm256_srli_epi16(raw[h], Bits * i), mask);
      }
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

template <int Bits, int Rows>
void multiply_rows(const Block& block) {
  constexpr int kOperands = 8 / Bits;
  const uint8_t* tile = block.tiles;
  const int8_t* x = block.x_codes;
  int32_t* to = block.sums;
  for (int64_t segment = 0; segment < block.segments; ++segment) {
    Sums<Rows> sums;
    sums.clear();
    int64_t left = block.segment_steps;
    if constexpr (Bits < 8) {
      for (; left >= Bits; left -= Bits) {
        add_tiles<Bits, Rows, Bits>(tile, x, sums);
        tile += Bits * kTileBytes;
        x += 32 * Rows;
      }
    }
    for (; left > 0; --left) {
      if constexpr (Bits < 8) {
        add_tiles<Bits, Rows, 1>(tile, x, sums);
      } else {
        add_tile_of_bytes<Rows>(tile, x, sums);
      }
      tile += kTileBytes;
      x += kOperands * 4 * Rows;
    }
    sums.store(to);
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

extern const Kernels kAvx2 = {
    "avx2", 4, 1, absmax, quantize, {multiply<1>, multiply<2>, multiply<4>, multiply<8>},
    add_scaled, store,
};

}  // namespace kbn
