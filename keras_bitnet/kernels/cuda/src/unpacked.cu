// The kernels that read no packed weights, and so know no width: of training and of attention.
#include "attention.cuh"
#include "fake_quantize.cuh"

#define KERNEL(name, threads, blocks, Params, ...) \
  extern "C" __global__ void __launch_bounds__(threads, blocks) name(const Params p) { __VA_ARGS__; }
#define ROW(suffix, T)                                                            \
  KERNEL(fake_quantize_##suffix, FAKE_THREADS, 4, Fake, fake_quantize_rows<T>(p)) \
  KERNEL(fake_largest_##suffix, FAKE_THREADS, 4, Fake, largest_of_all<T>(p))
ROW(f32, F32) ROW(bf16, BF16) ROW(f16, F16)
KERNEL(fake_weight, FAKE_THREADS, 4, Fake, fake_quantize_weight(p))
#undef ROW

#define ROW(suffix, T)                                                                        \
  KERNEL(attention_128_##suffix, ATTENTION_WARPS * 32, 1, Attention, attention<T, 1>(p))      \
  KERNEL(attention_256_##suffix, ATTENTION_WARPS * 32, 1, Attention, attention<T, 2>(p))
ROW(f32, F32) ROW(bf16, BF16) ROW(f16, F16) ROW(i8, I8)
