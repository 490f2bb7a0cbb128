// Root mean square normalization of a row in plain C++, for every table (portable.h).
#pragma once
#include <math.h>

#include "lanes.h"

namespace kbn {
namespace {

template <typename Element>
void normalize_as(const void* data, const float* scale, int64_t count, float epsilon, void* out) {
  const auto* x = static_cast<const typename Element::Storage*>(data);
  auto* y = static_cast<typename Element::Storage*>(out);
  Lanes squares;
  float numbers[kLanes] = {};
  const int64_t whole = count / kLanes * kLanes;
  for (int64_t first = 0; first < whole; first += kLanes) {
    for (int i = 0; i < kLanes; ++i) numbers[i] = Element::widen(x[first + i]);
    squares.add_product(numbers, numbers);
  }
  for (int i = 0; i < kLanes; ++i) numbers[i] = whole + i < count ? Element::widen(x[whole + i]) : 0.0f;
  squares.add_product(numbers, numbers);
  const float factor = 1.0f / sqrtf(squares.total() / static_cast<float>(count) + epsilon);
  for (int64_t i = 0; i < count; ++i) y[i] = Element::narrow(Element::widen(x[i]) * factor * scale[i]);
}

void normalize(const void* x, const float* scale, int dtype, int64_t count, float epsilon, void* y) {
  with_element(dtype, [=](auto element) {
    normalize_as<decltype(element)>(x, scale, count, epsilon, y);
  });
}

}  // namespace
}  // namespace kbn
