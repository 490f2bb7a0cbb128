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
void turn_as(const Head& head, float* x) {
  const int half = head.dim / 2;
  for (int i = 0; i < half; ++i) {
    const float first = x[i], second = x[i + half];
    const float turned = first * head.cosines[i] + -second * head.sines[i];
    const float other = second * head.cosines[i + half] + first * head.sines[i + half];
    x[i] = Element::widen(Element::narrow(turned));
    x[i + half] = Element::widen(Element::narrow(other));
  }
}

void turn(const Head& head, float* x) {
  if (head.cosines == nullptr) return;
  with_element(head.dtype, [&](auto element) { turn_as<decltype(element)>(head, x); });
}

// Writes the row of the new token to a cache; an int8 row as `ActivationInt8` quantizes it.
void put(const Head& head, const float* row, void* cache, float* scales) {
  const int64_t at = head.index * head.dim;
  if (head.cache_dtype != KBN_I8) {
    const int size = size_of(head.cache_dtype);
    char* to = static_cast<char*>(cache) + at * size;
    return store(row, 1.0f, nullptr, head.cache_dtype, head.dim, to);
  }
  auto* codes = static_cast<int8_t*>(cache) + at;
  const float absmax = kbn::absmax(row, KBN_F32, head.dim);
  const bool finite = absmax < as_float(0x7f800000u);
  const Step step = step_of(absmax, 1e-5f, 127.0f);
  scales[head.index] = finite ? step.scale : as_float(0x7fc00000u);
  if (finite) return quantize(row, KBN_F32, head.dim, step.inverse, 127.0f, codes);
  memset(codes, 0, head.dim);
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
  float largest = scores[0];
  for (int64_t t = 1; t < count; ++t) largest = scores[t] > largest ? scores[t] : largest;
  for (int64_t t = 0; t < count; ++t) scores[t] = exp_of(scores[t] - largest);
  for (int64_t t = count; t < padded(count); ++t) scores[t] = 0.0f;
  Lanes sums;
  for (int64_t t = 0; t < count; t += kLanes) sums.add(scores + t);
  const float inverse = 1.0f / sums.total();
  for (int64_t t = 0; t < count; ++t) scores[t] *= inverse;
}

void attend(const Head& head) {
  const int64_t width = padded(head.dim), row = padded(head.index + 1);
  float* queries = head.scratch;                    // [groups][width]
  float* y = queries + head.groups * width;         // [groups][width]
  float* scores = y + head.groups * width;          // [groups][row]
  float* token = scores + head.groups * row;        // [width]
  memset(head.scratch, 0, sizeof(float) * 2 * head.groups * width);
  memset(token, 0, sizeof(float) * width);
  for (int g = 0; g < head.groups; ++g) {
    float* query = queries + g * width;
    widen(head.query, head.dtype, g, head.dim, query);
    turn(head, query);
    for (int i = 0; i < head.dim; ++i) query[i] *= head.factor;
  }
  widen(head.key, head.dtype, 0, head.dim, token);
  turn(head, token);
  put(head, token, head.keys, head.key_scales);
  widen(head.value, head.dtype, 0, head.dim, token);
  put(head, token, head.values, head.value_scales);

  const auto each = [&](auto element) {
    using Element = decltype(element);
    score_as<Element>(head, queries, token, scores);
    for (int g = 0; g < head.groups; ++g) softmax(scores + g * row, head.index + 1);
    sum_as<Element>(head, scores, token, y);
  };
  head.cache_dtype == KBN_I8 ? each(Int8{}) : with_element(head.cache_dtype, each);
  const int size = size_of(head.dtype);
  for (int g = 0; g < head.groups; ++g) {
    store(y + g * width, 1.0f, nullptr, head.dtype, head.dim,
          static_cast<char*>(head.y) + int64_t{g} * head.dim * size);
  }
}

}  // namespace
}  // namespace kbn
