// The kernels of training, which know no width: what training.cc launches.
#include "fake_quantize.cuh"

#define KERNEL(name, threads, blocks, ...) \
  extern "C" __global__ void __launch_bounds__(threads, blocks) name(const Fake p) { __VA_ARGS__; }
#define ROW(suffix, T)                                                            \
  KERNEL(fake_quantize_##suffix, FAKE_THREADS, 4, fake_quantize_rows<T>(p))       \
  KERNEL(fake_largest_##suffix, FAKE_THREADS, 4, largest_of_all<T>(p))
ROW(f32, F32) ROW(bf16, BF16) ROW(f16, F16)
KERNEL(fake_weight, FAKE_THREADS, 4, fake_quantize_weight(p))
