// Attention of several new tokens of one key head in plain C++, for every table: two products of
// matrices of floats, and what `attention.h` does of one token.
#pragma once
#include "attention.h"

#if defined(__FMA__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

namespace kbn {
namespace {

// a b + c, rounded once where the processor can: everywhere else compilers are told not to (CMakeLists.txt).
inline Register fused(float a, Register b, Register c) {
#if defined(__AVX512F__)
  return _mm512_fmadd_ps(_mm512_set1_ps(a), b, c);
#elif defined(__FMA__)
  return _mm256_fmadd_ps(_mm256_set1_ps(a), b, c);
#elif defined(__aarch64__)
  return vfmaq_n_f32(c, b, a);
#else
  return a * b + c;
#endif
}

constexpr int kWidth = sizeof(Register) / sizeof(float);
#if defined(__AVX512F__) || defined(__aarch64__)
constexpr int kParts = 4;  // registers side by side in a tile: there are 32,
#else
constexpr int kParts = 2;  // or 16
#endif

// c = a b, a tile of it that stays in registers.
template <int Parts>
void multiply_tile(const float* a, int64_t a_stride, const float* b, int64_t depth, float* c, int64_t c_stride) {
  Register sums[kQueriesAtOnce][Parts];
  KBN_UNROLL for (int r = 0; r < kQueriesAtOnce; ++r) {
    KBN_UNROLL for (int p = 0; p < Parts; ++p) sums[r][p] = Register{};
  }
  for (int64_t k = 0; k < depth; ++k, b += kPanel) {
    Register row[Parts];
    KBN_UNROLL for (int p = 0; p < Parts; ++p) row[p] = load(b + p * kWidth);
    KBN_UNROLL for (int r = 0; r < kQueriesAtOnce; ++r) {
      const float number = a[r * a_stride + k];
      KBN_UNROLL for (int p = 0; p < Parts; ++p) sums[r][p] = fused(number, row[p], sums[r][p]);
    }
  }
  KBN_UNROLL for (int r = 0; r < kQueriesAtOnce; ++r) {
    KBN_UNROLL for (int p = 0; p < Parts; ++p) memcpy(c + r * c_stride + p * kWidth, &sums[r][p], sizeof(Register));
  }
}

// c = a b: so many rows, a multiple of kQueriesAtOnce; the first `depth` rows and `columns` of b, whole
// registers of these.
void multiply_panels(const float* a, int64_t a_stride, const Panels& b, int64_t rows, int64_t depth,
                     int64_t columns, float* c, int64_t c_stride) {
  for (int64_t j = 0, step; j < columns; j += step) {
    step = columns - j < kParts * kWidth ? kWidth : kParts * kWidth;
    const auto tile = step == kWidth ? multiply_tile<1> : multiply_tile<kParts>;
    for (int64_t i = 0; i < rows; i += kQueriesAtOnce)
      tile(a + i * a_stride, a_stride, place_in(b, 0, j), depth, c + i * c_stride + j, c_stride);
  }
}

// A token of the cache as floats.
template <typename Element>
void recall(const Head& head, const void* cache, const float* scales, int64_t token, float* row) {
  widen_as<Element>(cache, token, head.dim, row);
  if (scales == nullptr) return;
  for (int k = 0; k < head.dim; ++k) row[k] *= scales[token];
}

// Eight keys at a time, which become columns.
template <typename Element>
void lay_out(const Head& head, const Memory& memory, float* rows) {
  constexpr int kAtOnce = 8;
  const int64_t seen = head.index + head.tokens, end = (seen + kPanel - 1) / kPanel * kPanel;
  for (int64_t t = 0; t < end; t += kAtOnce) {
    for (int64_t i = 0; i < kAtOnce; ++i) {
      float* row = rows + i * head.dim;
      if (t + i < seen) {
        recall<Element>(head, head.keys, head.key_scales, t + i, row);
      } else {
        memset(row, 0, sizeof(float) * head.dim);
      }
    }
    for (int k = 0; k < head.dim; ++k) {
      float* to = place_in(memory.keys, k, t);
      for (int i = 0; i < kAtOnce; ++i) to[i] = rows[i * head.dim + k];
    }
  }
  for (int64_t t = 0; t < seen; ++t) {
    recall<Element>(head, head.values, head.value_scales, t, rows);
    for (int64_t k = 0; k < head.dim; k += kPanel) {
      const int64_t count = head.dim - k < kPanel ? head.dim - k : kPanel;
      float* to = place_in(memory.values, t, k);
      for (int64_t i = 0; i < kPanel; ++i) to[i] = i < count ? rows[k + i] : 0.0f;
    }
  }
}

void remember(const Head& head, const Memory& memory, float* scratch) {
  for (int64_t t = 0; t < head.tokens; ++t) write_token(head, t, scratch);
  with_cached(head, [&](auto element) { lay_out<decltype(element)>(head, memory, scratch); });
}

// One more than the last token that some new ones see.
int64_t sight(const Head& head, int64_t first, int64_t count) {
  if (head.mask == nullptr) return head.index + first + count;
  int64_t end = 1;
  for (int64_t token = first; token < first + count; ++token) {
    const uint8_t* mask = head.mask + token * head.mask_stride;
    int64_t last = head.index + head.tokens - 1;
    while (last >= end && mask[last] == 0) --last;
    end = last >= end ? last + 1 : end;
  }
  return end;
}

// Takes the scores of what a new token does not see away; where it sees nothing all stay alike.
void hide(const Head& head, int64_t token, int64_t columns, float* scores) {
  if (head.mask == nullptr) {
    for (int64_t t = head.index + token + 1; t < columns; ++t) scores[t] = -1e30f;
  } else {
    const uint8_t* mask = head.mask + token * head.mask_stride;
    for (int64_t t = 0; t < columns; ++t) scores[t] = mask[t] ? scores[t] : -1e30f;
  }
}

void attend_block(const Head& head, const Memory& memory, int64_t first, int64_t count, float* scratch) {
  const int64_t columns = sight(head, first, count);
  const int64_t width = padded(head.dim), row = padded(columns), rows = whole_blocks(count * head.groups);
  float* queries = scratch;               // [rows][width]
  float* y = queries + rows * width;      // [rows][width]
  float* scores = y + rows * width;       // [rows][row]
  memset(queries, 0, sizeof(float) * rows * width);
  for (int64_t t = 0; t < count; ++t) read_queries(head, first + t, queries + t * head.groups * width);
  multiply_panels(queries, width, memory.keys, rows, head.dim, row, scores, row);
  for (int64_t i = 0; i < count * head.groups; ++i) {
    hide(head, first + i / head.groups, columns, scores + i * row);
    softmax(scores + i * row, columns);
  }
  multiply_panels(scores, row, memory.values, rows, columns, width, y, width);
  for (int64_t t = 0; t < count; ++t) write_results(head, first + t, y + t * head.groups * width);
}

}  // namespace
}  // namespace kbn
