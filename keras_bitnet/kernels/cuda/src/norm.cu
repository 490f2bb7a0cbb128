// The kernels of a norm, which know no width: what norm.cc launches.
#include "norm.cuh"

#define KERNEL(name, blocks, ...) \
  extern "C" __global__ void __launch_bounds__(NORM_THREADS, blocks) name(const Norm p) { __VA_ARGS__; }
#define ROW(suffix, T)                                       \
  KERNEL(normalize_##suffix, 2, normalize<T, PLAIN>(p))      \
  KERNEL(add_normalize_##suffix, 2, normalize<T, ADD>(p))    \
  KERNEL(gate_normalize_##suffix, 1, normalize<T, GATE>(p))
ROW(f32, F32) ROW(bf16, BF16) ROW(f16, F16)
