// The kernels of attention to a cache, by its dtype and the size of a head: what attention.cc launches. Those of a
// dtype are compiled alone: KBC_F32, KBC_BF16, KBC_F16 or KBC_I8.
#include "attention_many.cuh"

#define KERNEL(name, threads, blocks, ...) \
  extern "C" __global__ void __launch_bounds__(threads, blocks) name(const Attention p) { __VA_ARGS__; }
#define MANY(head, suffix, T) \
  KERNEL(attend_many_##head##_##suffix, 32 * MANY_WARPS<head>, MANY_BLOCKS<head>, attend_many<T, head>(p))
#define ROW(suffix, T)                                                      \
  KERNEL(attention_128_##suffix, ATTENTION_WARPS * 32, 1, attention<T, 1>(p)) \
  KERNEL(attention_256_##suffix, ATTENTION_WARPS * 32, 1, attention<T, 2>(p)) \
  KERNEL(write_rows_##suffix, 64, 1, write_rows<T>(p))                         \
  MANY(64, suffix, T) MANY(128, suffix, T) MANY(256, suffix, T)
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
