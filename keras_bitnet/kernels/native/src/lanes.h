// Sums of many numbers in plain C++, for every table (portable.h).
#pragma once
#include "portable.h"

namespace kbn {
namespace {

// A register of floats, where the compiler knows such a type: a wider one it keeps in memory.
#if !defined(__GNUC__)
#define KBN_REGISTER(number) number
#elif defined(__AVX512F__)
#define KBN_REGISTER(number) number __attribute__((vector_size(64)))
#elif defined(__AVX__)
#define KBN_REGISTER(number) number __attribute__((vector_size(32)))
#else
#define KBN_REGISTER(number) number __attribute__((vector_size(16)))
#endif
typedef KBN_REGISTER(float) Register;
typedef KBN_REGISTER(int32_t) Integers;
typedef KBN_REGISTER(uint32_t) Naturals;

inline Register load(const float* from) {
  Register x;
  memcpy(&x, from, sizeof x);
  return x;
}

inline Register as_floats(Naturals x) {
#if defined(__GNUC__)
  return __builtin_convertvector((Integers)x, Register);
#else
  return static_cast<float>(static_cast<int32_t>(x));
#endif
}

// The sum of `Count` numbers, the second half added to the first until one is left.
template <int Count, typename Number>
inline Number fold(Number* x) {
  KBN_UNROLL for (int i = 0; i < Count / 2; ++i) x[i] += x[i + Count / 2];
  if constexpr (Count > 2) return fold<Count / 2>(x);
  return x[0];
}

// Sixteen sums side by side, whatever the registers are; a compiler may not reorder a single one.
class Lanes {
 public:
  Lanes() = default;
  explicit Lanes(const float* from) { memcpy(parts_, from, sizeof parts_); }
  void add_product(const float* a, const float* b) {
    KBN_UNROLL for (int i = 0; i < kParts; ++i) parts_[i] += load(a + i * kWidth) * load(b + i * kWidth);
  }
  void add(const float* a) {
    KBN_UNROLL for (int i = 0; i < kParts; ++i) parts_[i] += load(a + i * kWidth);
  }
  void raise(const float* a) {
    KBN_UNROLL for (int i = 0; i < kParts; ++i) {
      const Register x = load(a + i * kWidth);
      parts_[i] = x > parts_[i] ? x : parts_[i];
    }
  }
  // Adds float(sums + added) * scale, or (2 * sums + added); `sums` and what is added wrap.
  template <bool Twice, bool Shared>
  void add_scaled(const int32_t* sums, uint32_t added, const float* scale) {
    KBN_UNROLL for (int i = 0; i < kParts; ++i) {
      Naturals x;
      memcpy(&x, sums + i * kWidth, sizeof x);
      const Register numbers = as_floats((Twice ? x + x : x) + added);
      parts_[i] += Shared ? numbers * *scale : numbers * load(scale + i * kWidth);
    }
  }
  void store(float* to) const { memcpy(to, parts_, sizeof parts_); }
  float total() const {
    Register parts[kParts];
    memcpy(parts, parts_, sizeof parts);
    const Register sums = fold<kParts>(parts);
    float numbers[kWidth];
    memcpy(numbers, &sums, sizeof sums);
    return fold<kWidth>(numbers);
  }

 private:
  static constexpr int kWidth = sizeof(Register) / sizeof(float), kParts = kLanes / kWidth;

  Register parts_[kParts] = {};
};

}  // namespace
}  // namespace kbn
