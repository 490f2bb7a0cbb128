// Sums and activations of numbers one by one in plain C++, for every table (portable.h).
#pragma once
#include "portable.h"

namespace kbn {
namespace {

template <typename Element>
float rounded(float x) {
  return Element::widen(Element::narrow(x));
}

template <typename Element>
void add_as(const void* a, const void* b, int64_t count, void* out) {
  const auto* x = static_cast<const typename Element::Storage*>(a);
  const auto* y = static_cast<const typename Element::Storage*>(b);
  auto* to = static_cast<typename Element::Storage*>(out);
  for (int64_t i = 0; i < count; ++i) to[i] = Element::narrow(Element::widen(x[i]) + Element::widen(y[i]));
}

void add(const void* a, const void* b, int dtype, int64_t count, void* out) {
  with_element(dtype, [=](auto element) { add_as<decltype(element)>(a, b, count, out); });
}

// NaN stays NaN in each.
struct Relu {
  static float of(float x) { return x < 0.0f ? 0.0f : x; }
};
struct Relu2 {
  static float of(float x) { return Relu::of(x) * Relu::of(x); }
};
struct Silu {
  static float of(float x) {
    const float power = exp_of(x < 0.0f ? x : -x);
    return x * ((x < 0.0f ? power : 1.0f) / (1.0f + power));
  }
};

template <typename Activation, typename Element>
void activate_as(const void* data, const void* factors, int64_t count, void* out) {
  const auto* x = static_cast<const typename Element::Storage*>(data);
  const auto* factor = static_cast<const typename Element::Storage*>(factors);
  auto* to = static_cast<typename Element::Storage*>(out);
  if (factor == nullptr) {
    for (int64_t i = 0; i < count; ++i) to[i] = Element::narrow(Activation::of(Element::widen(x[i])));
  } else {
    for (int64_t i = 0; i < count; ++i) {
      const float active = rounded<Element>(Activation::of(Element::widen(x[i])));
      to[i] = Element::narrow(active * Element::widen(factor[i]));
    }
  }
}

void activate(int activation, const void* x, const void* factor, int dtype, int64_t count, void* out) {
  with_element(dtype, [=](auto element) {
    using Element = decltype(element);
    switch (activation) {
      case KBN_RELU2: return activate_as<Relu2, Element>(x, factor, count, out);
      case KBN_SILU: return activate_as<Silu, Element>(x, factor, count, out);
      default: return activate_as<Relu, Element>(x, factor, count, out);
    }
  });
}

}  // namespace
}  // namespace kbn
