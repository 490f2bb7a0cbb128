// Sums of many numbers in plain C++, for every table (portable.h).
#pragma once
#include "portable.h"

namespace kbn {
namespace {

// A register of floats, where the compiler knows such a type: a wider one it keeps in memory.
#if !defined(__GNUC__)
typedef float Register;
#elif defined(__AVX512F__)
typedef float Register __attribute__((vector_size(64)));
#elif defined(__AVX__)
typedef float Register __attribute__((vector_size(32)));
#else
typedef float Register __attribute__((vector_size(16)));
#endif

inline Register load(const float* from) {
  Register x;
  memcpy(&x, from, sizeof x);
  return x;
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
  void add_product(const float* a, const float* b) {
    KBN_UNROLL for (int i = 0; i < kParts; ++i) parts_[i] += load(a + i * kWidth) * load(b + i * kWidth);
  }
  void add(const float* a) {
    KBN_UNROLL for (int i = 0; i < kParts; ++i) parts_[i] += load(a + i * kWidth);
  }
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
