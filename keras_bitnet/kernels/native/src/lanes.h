// Sums of many numbers in plain C++, for every table (portable.h).
#pragma once
#include "portable.h"

namespace kbn {
namespace {

// Sixteen sums side by side, whatever the registers are; a compiler may not reorder a single one.
class Lanes {
 public:
  void add_product(const float* a, const float* b) { add(load(a) * load(b)); }
  void add(const float* a) { add(load(a)); }
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
  struct Loaded {
    Vector value;
    Loaded operator*(const Loaded& other) const { return {value * other.value}; }
  };
  static Loaded load(const float* from) {
    Loaded loaded;
    memcpy(&loaded, from, sizeof loaded);
    return loaded;
  }
  void add(const Loaded& loaded) { value_ += loaded.value; }

  Vector value_ = {};
};

}  // namespace
}  // namespace kbn
