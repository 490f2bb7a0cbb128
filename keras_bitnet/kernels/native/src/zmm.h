// What the instruction sets with vectors of 512 bits share: a tile is one vector.
#pragma once
#include <immintrin.h>

#include "attend_block.h"
#include "elementwise.h"
#include "normalize.h"
#include "scale.h"

namespace kbn {
namespace {

inline __m512i times_3(__m512i v) { return _mm512_add_epi8(_mm512_add_epi8(v, v), v); }

// Fetches a tile of the columns that come next: a fixed distance would miss where each of several
// begins. Wider codes are read in longer streams, which the processor fetches ahead better by itself
// (decision note 7).
template <Format F>
inline void prefetch_next(const uint8_t* tile) {
  if (operands(F) > 2) _mm_prefetch(reinterpret_cast<const char*>(tile), _MM_HINT_T1);
}

// What several rows share: the operands of a tile, taken out of it one after another. Sums of
// their codes are to be divided by 2^kShift.
template <Format F>
struct Operands {
  static constexpr int kShift = 0;
  __m512i raw;

  void load(const uint8_t* tile) { raw = _mm512_loadu_si512(tile); }
  __m512i take(int i) const {
    constexpr int kBits = 8 / operands(F);
    if (F == kBits8) return raw;
    const __m512i shifted = i == 0 ? raw : _mm512_srli_epi16(raw, kBits * i);
    return _mm512_and_si512(shifted, _mm512_set1_epi8(static_cast<char>((1 << kBits) - 1)));
  }
  __m512i code(int i) const { return take(i); }
};

// With u = v - 1, averages that round up give (v + v / 2) / 2, rounded down: the digit, the whole
// part of 3 * v / 256, is in its two highest bits.
template <>
struct Operands<kTrits> {
  static constexpr int kShift = 6;
  __m512i u;

  void load(const uint8_t* tile) {
    u = _mm512_sub_epi8(_mm512_loadu_si512(tile), _mm512_set1_epi8(1));
  }
  __m512i take(int) {
    const __m512i half = _mm512_avg_epu8(u, _mm512_setzero_si512());
    const __m512i digit = _mm512_and_si512(_mm512_avg_epu8(u, half), _mm512_set1_epi8(char(0xc0)));
    u = _mm512_add_epi8(times_3(u), _mm512_set1_epi8(2));
    return digit;
  }
  __m512i code(int i) { return _mm512_srli_epi16(take(i), kShift); }  // as a whole number
};

}  // namespace
}  // namespace kbn
