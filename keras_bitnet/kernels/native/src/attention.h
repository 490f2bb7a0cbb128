// Attention of one key head in plain C++, for every table: each instruction set compiles it with its
// own flags. Everything here has internal linkage (kernels.h).
#pragma once
#include "lanes.h"

namespace kbn {
namespace {

struct Int8 {
  using Storage = int8_t;
  static float widen(int8_t x) { return x; }
};

// Copies a row of numbers as float32.
template <typename Element>
void widen_as(const void* data, int64_t row, int dim, float* to) {
  const auto* from = static_cast<const typename Element::Storage*>(data) + row * dim;
  for (int i = 0; i < dim; ++i) to[i] = Element::widen(from[i]);
}

void widen(const void* data, int dtype, int64_t row, int dim, float* to) {
  with_element(dtype, [&](auto element) { widen_as<decltype(element)>(data, row, dim, to); });
}

// Turns each pair (x[i], x[i + dim / 2]) by its angle, then rounds as the dtype is.
template <typename Element>
void turn_as(const float* cosines, const float* sines, int dim, float* x) {
  const int half = dim / 2;
  for (int i = 0; i < half; ++i) {
    const float first = x[i], second = x[i + half];
    const float turned = first * cosines[i] + -second * sines[i];
    const float other = second * cosines[i + half] + first * sines[i + half];
    x[i] = Element::widen(Element::narrow(turned));
    x[i + half] = Element::widen(Element::narrow(other));
  }
}

void turn(const Head& head, int64_t token, float* x) {
  if (head.cosines == nullptr) return;
  const int64_t at = token * head.dim;
  with_element(head.dtype, [&](auto element) {
    turn_as<decltype(element)>(head.cosines + at, head.sines + at, head.dim, x);
  });
}

// Where the numbers of a new token begin.
const void* token_at(const Head& head, const void* data, int64_t stride, int64_t token) {
  return static_cast<const char*>(data) + token * stride * size_of(head.dtype);
}

// The queries of a new token, [groups][width], turned and scaled.
void read_queries(const Head& head, int64_t token, float* queries) {
  const void* from = token_at(head, head.query, head.query_stride, token);
  const int64_t width = padded(head.dim);
  for (int g = 0; g < head.groups; ++g) {
    float* query = queries + g * width;
    widen(from, head.dtype, g, head.dim, query);
    turn(head, token, query);
    for (int i = 0; i < head.dim; ++i) query[i] *= head.factor;
  }
}

void write_results(const Head& head, int64_t token, const float* y) {
  const int64_t bytes = int64_t{head.dim} * size_of(head.dtype);
  auto* to = static_cast<char*>(const_cast<void*>(token_at(head, head.y, head.query_stride, token)));
  for (int g = 0; g < head.groups; ++g)
    store(y + g * padded(head.dim), 1.0f, nullptr, head.dtype, head.dim, to + g * bytes);
}

// Writes the row of a new token to a cache; an int8 row as `ActivationInt8` quantizes it.
void put(const Head& head, int64_t token, const float* row, void* cache, float* scales) {
  const int64_t place = head.index + token, at = place * head.dim;
  if (head.cache_dtype != KBN_I8) {
    const int size = size_of(head.cache_dtype);
    char* to = static_cast<char*>(cache) + at * size;
    return store(row, 1.0f, nullptr, head.cache_dtype, head.dim, to);
  }
  auto* codes = static_cast<int8_t*>(cache) + at;
  const float absmax = kbn::absmax(row, KBN_F32, head.dim);
  const bool finite = absmax < as_float(0x7f800000u);
  const Step step = step_of(absmax, 1e-5f, 127.0f);
  scales[place] = finite ? step.scale : as_float(0x7fc00000u);
  if (finite) return quantize(row, KBN_F32, head.dim, step.inverse, 127.0f, codes);
  memset(codes, 0, head.dim);
}

// Writes a new token to the caches; `row` is working space.
void write_token(const Head& head, int64_t token, float* row) {
  widen(token_at(head, head.key, head.key_stride, token), head.dtype, 0, head.dim, row);
  turn(head, token, row);
  put(head, token, row, head.keys, head.key_scales);
  widen(token_at(head, head.value, head.key_stride, token), head.dtype, 0, head.dim, row);
  put(head, token, row, head.values, head.value_scales);
}

// Fetches a row some tokens ahead: what is computed with one takes too long for the processor to look
// past it by itself.
constexpr int64_t kTokensAhead = 6;
template <typename Element>
void fetch(const void* data, int64_t row, int dim) {
#if defined(__GNUC__)
  const int64_t bytes = dim * sizeof(typename Element::Storage);
  const char* begin = static_cast<const char*>(data) + row * bytes;
  for (int64_t at = 0; at < bytes; at += 64) __builtin_prefetch(begin + at);
#endif
}

// Scores of all tokens for each query; the queries share the widened keys.
template <typename Element>
void score_as(const Head& head, const float* queries, float* token, float* scores) {
  const int64_t width = padded(head.dim), row = padded(head.index + 1);
  for (int64_t t = 0; t <= head.index; ++t) {
    if (head.mask != nullptr && head.mask[t] == 0) {
      for (int g = 0; g < head.groups; ++g) scores[g * row + t] = -1e30f;
      continue;
    }
    const int64_t next = t + kTokensAhead;
    next <= head.index ? fetch<Element>(head.keys, next, head.dim)
                       : fetch<Element>(head.values, next - head.index - 1, head.dim);
    widen_as<Element>(head.keys, t, head.dim, token);
    for (int g = 0; g < head.groups; ++g) {
      Lanes sums;
      for (int64_t i = 0; i < width; i += kLanes) sums.add_product(queries + g * width + i, token + i);
      scores[g * row + t] = sums.total() * (head.key_scales ? head.key_scales[t] : 1.0f);
    }
  }
}

// y += weight * value, over all tokens, for each query.
template <typename Element>
void sum_as(const Head& head, const float* weights, float* token, float* y) {
  const int64_t width = padded(head.dim), row = padded(head.index + 1);
  for (int64_t t = 0; t <= head.index; ++t) {
    if (t + kTokensAhead <= head.index) fetch<Element>(head.values, t + kTokensAhead, head.dim);
    widen_as<Element>(head.values, t, head.dim, token);
    const float scale = head.value_scales ? head.value_scales[t] : 1.0f;
    for (int g = 0; g < head.groups; ++g) {
      const float weight = weights[g * row + t] * scale;
      float* __restrict to = y + g * width;
      for (int64_t i = 0; i < width; ++i) to[i] += weight * token[i];
    }
  }
}

// Softmax in place; behind the last number there is room for whole lanes.
void softmax(float* scores, int64_t count) {
  for (int64_t t = count; t < padded(count); ++t) scores[t] = scores[0];
  Lanes highest(scores);
  for (int64_t t = kLanes; t < count; t += kLanes) highest.raise(scores + t);
  float numbers[kLanes], largest = scores[0];
  highest.store(numbers);
  for (float number : numbers) largest = number > largest ? number : largest;
  for (int64_t t = 0; t < count; ++t) scores[t] = exp_of(scores[t] - largest);
  for (int64_t t = count; t < padded(count); ++t) scores[t] = 0.0f;
  Lanes sums;
  for (int64_t t = 0; t < count; t += kLanes) sums.add(scores + t);
  const float inverse = 1.0f / sums.total();
  for (int64_t t = 0; t < count; ++t) scores[t] *= inverse;
}

// Does it with the type of what the cache holds.
template <typename Do>
void with_cached(const Head& head, const Do& with) {
  head.cache_dtype == KBN_I8 ? with(Int8{}) : with_element(head.cache_dtype, with);
}

void attend(const Head& head, float* scratch) {
  const int64_t width = padded(head.dim), row = padded(head.index + 1);
  float* queries = scratch;                         // [groups][width]
  float* y = queries + head.groups * width;         // [groups][width]
  float* scores = y + head.groups * width;          // [groups][row]
  float* token = scores + head.groups * row;        // [width]
  memset(scratch, 0, sizeof(float) * 2 * head.groups * width);
  memset(token, 0, sizeof(float) * width);
  read_queries(head, 0, queries);
  write_token(head, 0, token);
  with_cached(head, [&](auto element) {
    using Element = decltype(element);
    score_as<Element>(head, queries, token, scores);
    for (int g = 0; g < head.groups; ++g) softmax(scores + g * row, head.index + 1);
    sum_as<Element>(head, scores, token, y);
  });
  write_results(head, 0, y);
}

}  // namespace
}  // namespace kbn
