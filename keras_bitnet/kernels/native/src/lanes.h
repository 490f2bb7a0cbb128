// Sums of many numbers in plain C++, for every table (portable.h).
#pragma once
#include "portable.h"

namespace kbn {
namespace {

// Sixteen sums side by side, whatever the registers are; a compiler may not reorder a single one.
class Lanes {
 public:
  void add_product(const float* a, const float* b) {
    Vector x, y;
    memcpy(&x, a, sizeof x);
    memcpy(&y, b, sizeof y);
    value_ += x * y;
  }
  void add(const float* a) {
    Vector x;
    memcpy(&x, a, sizeof x);
    value_ += x;
  }
  float total() const {
    float sums[kLanes];
    memcpy(sums, &value_, sizeof sums);
    for (int width = kLanes / 2; width > 0; width /= 2) {
      for (int i = 0; i < width; ++i) sums[i] += sums[i + width];
    }
    return sums[0];
  }

 private:
#if defined(__GNUC__)
  typedef float Vector __attribute__((vector_size(4 * kLanes)));
#else
  struct Vector {
    float lane[kLanes];
    Vector operator*(const Vector& other) const {
      Vector result;
      for (int i = 0; i < kLanes; ++i) result.lane[i] = lane[i] * other.lane[i];
      return result;
    }
    Vector& operator+=(const Vector& other) {
      for (int i = 0; i < kLanes; ++i) lane[i] += other.lane[i];
      return *this;
    }
  };
#endif

  Vector value_ = {};
};

}  // namespace
}  // namespace kbn
