// What the instruction sets with vectors of 256 bits share: a tile is two halves of eight columns.
#pragma once
#include <immintrin.h>

#include "attention.h"
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

inline __m256i load_half(const uint8_t* tile, int half) {
  constexpr int kAhead = 6144;
  if (half == 0) _mm_prefetch(reinterpret_cast<const char*>(tile) + kAhead, _MM_HINT_T1);
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
  void store(int32_t* to, int width = kTileOutputs) const {  // of a row of sums there
    KBN_UNROLL for (int r = 0; r < Rows; ++r) {
      KBN_UNROLL for (int h = 0; h < kHalves; ++h) {
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(to + r * width) + h, value[r][h]);
      }
    }
  }
};

}  // namespace
}  // namespace kbn
