// The kernels of attention to a cache, by its dtype and the size of a head: what attention.cc launches. Those of a
// dtype are compiled alone: KBC_F32, KBC_BF16, KBC_F16 or KBC_I8.
#include "attention.cuh"

#define KERNEL(name, ...)                                                             \
  extern "C" __global__ void __launch_bounds__(ATTENTION_WARPS * 32, 1) name(const Attention p) { \
    __VA_ARGS__;                                                                      \
  }
#define ROW(suffix, T)                               \
  KERNEL(attention_128_##suffix, attention<T, 1>(p)) \
  KERNEL(attention_256_##suffix, attention<T, 2>(p))
#ifdef KBC_F32
ROW(f32, F32)
#endif
#ifdef KBC_BF16
ROW(bf16, BF16)
#endif
#ifdef KBC_F16
ROW(f16, F16)
#endif
#ifdef KBC_I8
ROW(i8, I8)
#endif
