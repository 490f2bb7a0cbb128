// The kernels of a norm, which know no width: what norm.cc launches.
#include "norm.cuh"

#define ROW(suffix, T) \
  extern "C" __global__ void __launch_bounds__(NORM_THREADS, 2) normalize_##suffix(const Norm p) { normalize<T>(p); }
ROW(f32, F32) ROW(bf16, BF16) ROW(f16, F16)
