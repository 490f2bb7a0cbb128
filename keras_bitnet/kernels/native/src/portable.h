// The parts of a table that plain C++ serves well: each instruction set compiles them with its own
// flags, and the compiler vectorizes the loops. Everything here has internal linkage (kernels.h).
#pragma once
#include <stdint.h>
#include <string.h>

#include "bitnet.h"
#include "kernels.h"

namespace kbn {
namespace {

inline float as_float(uint32_t bits) {
  float value;
  memcpy(&value, &bits, 4);
  return value;
}

inline uint32_t as_bits(float value) {
  uint32_t bits;
  memcpy(&bits, &value, 4);
  return bits;
}

// e^x for x <= 0: 2^n times a polynomial of what is left (Moshier 1989, Cephes).
inline float exp_of(float x) {
  const float magic = 12582912.0f;  // rounds to a whole number in the low bits
  const float n = x * 1.44269504f + magic;
  const float whole = n - magic;
  const float r = (x - whole * 0.693359375f) - whole * -2.12194440e-4f;
  float p = 1.9875691500e-4f;
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * (r * r) + r + 1.0f;
  const float power = as_float(as_bits(p) + (as_bits(n) << 23));
  return x < -87.0f ? 0.0f : power;
}

// Fetches the scales that follow a column: a stride that no hardware prefetcher follows.
inline void prefetch_ahead(const Block& block, int64_t segment, int column = 0) {
#if defined(__GNUC__)
  const uintptr_t place =
      block.ahead + segment * block.ahead_stride + output(block, column) * sizeof(float);
  __builtin_prefetch(reinterpret_cast<const void*>(place));
#else
  (void)block, (void)segment, (void)column;
#endif
}

// The element types: widening is exact, narrowing rounds to nearest, halves to even.
struct Float32 {
  using Storage = float;
  static float widen(float x) { return x; }
  static float narrow(float x) { return x; }
  static uint32_t magnitude(float x) { return as_bits(x) & 0x7fffffffu; }
  static float from_magnitude(uint32_t bits) { return as_float(bits); }
};

struct BFloat16 {
  using Storage = uint16_t;
  static float widen(uint16_t x) { return as_float(static_cast<uint32_t>(x) << 16); }
  static uint16_t narrow(float x) {
    const uint32_t bits = as_bits(x);
    const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1)) >> 16;
    const uint32_t nan = (bits >> 16) | 0x40u;  // rounding could carry a NaN into infinity
    return static_cast<uint16_t>((bits & 0x7fffffffu) > 0x7f800000u ? nan : rounded);
  }
  static uint32_t magnitude(uint16_t x) { return x & 0x7fffu; }
  static float from_magnitude(uint32_t bits) { return as_float(bits << 16); }
};

struct Float16 {
  using Storage = uint16_t;
  // No step meets a float32 subnormal, so flush-to-zero modes of the caller change nothing.
  static float widen(uint16_t x) {
    const uint32_t magnitude = (x & 0x7fffu) << 13;
    const uint32_t rebias = 112u << 23;
    const uint32_t normal = magnitude + rebias;
    const uint32_t subnormal =
        as_bits(as_float(magnitude + rebias + (1u << 23)) - as_float(rebias + (1u << 23)));
    const uint32_t infinite = magnitude + 2 * rebias;
    uint32_t bits = magnitude < (1u << 23) ? subnormal : normal;
    bits = magnitude >= (31u << 23) ? infinite : bits;
    return as_float(bits | (static_cast<uint32_t>(x & 0x8000u) << 16));
  }
  static uint16_t narrow(float x) {
    const uint32_t magnitude = as_bits(x) & 0x7fffffffu;
    const uint32_t sign = (as_bits(x) >> 16) & 0x8000u;
    const uint32_t normal = (magnitude - (112u << 23) + 0xfffu + ((magnitude >> 13) & 1)) >> 13;
    // Adding 1/2 makes the adder round at the place of the last bit of a float16 subnormal.
    const uint32_t subnormal = as_bits(as_float(magnitude) + 0.5f) - as_bits(0.5f);
    uint32_t bits = magnitude < (113u << 23) ? subnormal : normal;
    bits = magnitude >= 0x477ff000u ? 0x7c00u : bits;  // 65520 and above round to infinity
    bits = magnitude > 0x7f800000u ? 0x7e00u : bits;
    return static_cast<uint16_t>(bits | sign);
  }
  static uint32_t magnitude(uint16_t x) { return x & 0x7fffu; }
  static float from_magnitude(uint32_t bits) { return widen(static_cast<uint16_t>(bits)); }
};

// Calls `use` with the element type of a `kbn_dtype` other than int8.
template <typename Use>
[[gnu::always_inline]] inline auto with_element(int dtype, const Use& use) {
  switch (dtype) {
    case KBN_BF16: return use(BFloat16{});
    case KBN_F16: return use(Float16{});
    default: return use(Float32{});
  }
}

template <typename Element>
float absmax_of(const void* data, int64_t count) {
  const auto* x = static_cast<const typename Element::Storage*>(data);
  uint32_t largest = 0;  // as integers, magnitudes sort as floats do, NaN above infinity
  for (int64_t i = 0; i < count; ++i) {
    const uint32_t magnitude = Element::magnitude(x[i]);
    largest = magnitude > largest ? magnitude : largest;
  }
  return Element::from_magnitude(largest);
}

template <typename Element>
void quantize_as(const void* data, int64_t count, float inverse, float highest, int8_t* codes) {
  const auto* x = static_cast<const typename Element::Storage*>(data);
  // Below 2^22, adding 1.5 * 2^23 rounds to a whole number in the low bits: rint without a call.
  const float magic = 12582912.0f;
  for (int64_t i = 0; i < count; ++i) {
    float ratio = Element::widen(x[i]) * inverse;
    ratio = ratio < highest ? ratio : highest;  // before rounding: the bounds are whole
    ratio = ratio > -highest ? ratio : -highest;
    codes[i] = static_cast<int8_t>(as_bits(ratio + magic));
  }
}

template <typename Element>
void split_as(const void* data, int64_t count, float inverse, int planes, int8_t* codes,
              int64_t stride) {
  constexpr int64_t kPart = 256;
  const float magic = 12582912.0f;  // as above
  const auto* x = static_cast<const typename Element::Storage*>(data);
  for (int64_t begin = 0; begin < count; begin += kPart) {
    const int64_t size = count - begin < kPart ? count - begin : kPart;
    float rest[kPart];
    for (int64_t i = 0; i < size; ++i) rest[i] = Element::widen(x[begin + i]) * inverse;
    for (int plane = 0; plane < planes; ++plane) {
      int8_t* to = codes + plane * stride + begin;
      for (int64_t i = 0; i < size; ++i) {
        const float shifted = rest[i] + magic;
        to[i] = static_cast<int8_t>(as_bits(shifted));
        rest[i] = (rest[i] - (shifted - magic)) * kPlane;  // the difference is exact
      }
    }
  }
}

[[maybe_unused]] Shape one_column(int) { return {1, 4}; }

inline int32_t sum(const int8_t* codes, int64_t count) {
  int32_t total = 0;
  for (int64_t i = 0; i < count; ++i) total += codes[i];
  return total;
}

#if defined(__has_builtin)
#if __has_builtin(__builtin_shufflevector)
#define KBN_SHUFFLES 1
#endif
#endif

// Packs up to four words of each row; four rows at a time where the compiler can shuffle registers.
inline void interleave_words(const int8_t* codes, int64_t stride, int rows, int words,
                             int8_t* packed) {
  int row = 0;
#if defined(KBN_SHUFFLES)
  typedef int32_t Words __attribute__((vector_size(16)));
  for (; words == 4 && row + 4 <= rows; row += 4) {
    Words r[4], columns[4];
    for (int i = 0; i < 4; ++i) memcpy(&r[i], codes + (row + i) * stride, sizeof(Words));
    const Words a = __builtin_shufflevector(r[0], r[1], 0, 4, 1, 5);
    const Words b = __builtin_shufflevector(r[2], r[3], 0, 4, 1, 5);
    const Words c = __builtin_shufflevector(r[0], r[1], 2, 6, 3, 7);
    const Words d = __builtin_shufflevector(r[2], r[3], 2, 6, 3, 7);
    columns[0] = __builtin_shufflevector(a, b, 0, 1, 4, 5);
    columns[1] = __builtin_shufflevector(a, b, 2, 3, 6, 7);
    columns[2] = __builtin_shufflevector(c, d, 0, 1, 4, 5);
    columns[3] = __builtin_shufflevector(c, d, 2, 3, 6, 7);
    for (int i = 0; i < 4; ++i) memcpy(packed + (i * rows + row) * 4, &columns[i], sizeof(Words));
  }
#endif
  for (; row < rows; ++row) {
    for (int i = 0; i < words; ++i) memcpy(packed + (i * rows + row) * 4, codes + row * stride + i * 4, 4);
  }
}

void interleave(const int8_t* codes, int64_t stride, int rows, int64_t count, int chunk,
                int8_t* packed) {
  if (chunk != 4) {
    for (int64_t k = 0; k < count; k += chunk) {
      for (int row = 0; row < rows; ++row, packed += chunk) memcpy(packed, codes + row * stride + k, chunk);
    }
    return;
  }
  for (int64_t k = 0; k < count; k += 16) {
    const int64_t left = (count - k) / 4;
    interleave_words(codes + k, stride, rows, static_cast<int>(left < 4 ? left : 4), packed + k * rows);
  }
}

template <typename Element>
void store_as(const float* y, float x_scale, const float* bias, int count, void* out) {
  auto* to = static_cast<typename Element::Storage*>(out);
  if (bias != nullptr) {
    for (int i = 0; i < count; ++i) to[i] = Element::narrow(y[i] * x_scale + bias[i]);
  } else {
    for (int i = 0; i < count; ++i) to[i] = Element::narrow(y[i] * x_scale);
  }
}

float absmax(const void* x, int dtype, int64_t count) {
  return with_element(dtype, [=](auto element) { return absmax_of<decltype(element)>(x, count); });
}

void quantize(const void* x, int dtype, int64_t count, float inverse, float highest,
              int8_t* codes) {
  with_element(dtype, [=](auto element) {
    quantize_as<decltype(element)>(x, count, inverse, highest, codes);
  });
}

void split(const void* x, int dtype, int64_t count, float inverse, int planes, int8_t* codes,
           int64_t stride) {
  with_element(dtype, [=](auto element) {
    split_as<decltype(element)>(x, count, inverse, planes, codes, stride);
  });
}

void store(const float* y, float x_scale, const float* bias, int dtype, int count, void* out) {
  with_element(dtype, [=](auto element) {
    store_as<decltype(element)>(y, x_scale, bias, count, out);
  });
}

}  // namespace
}  // namespace kbn
