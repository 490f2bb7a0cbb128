// The kernels of one width, KBC_BITS, or a part of them, which is compiled alone: KBC_ROWS_F32, .._BF16 or .._F16,
// KBC_MMA, KBC_WGMMA or KBC_WGMMA16. Names and shapes of blocks match the tables of matmul.cc.
#include "gemm_mma.cuh"
#include "gemm_wgmma.cuh"
#include "gemm_wgmma16.cuh"
#include "gemv.cuh"
#include "quantize.cuh"

#define KERNEL(name, threads, blocks, ...)                                           \
  extern "C" __global__ void __launch_bounds__(threads, blocks) name(const __grid_constant__ Matmuls p) { __VA_ARGS__; }

// Of the kernels of single rows a multiprocessor holds two blocks, of one launch or of two.
// A turn in groups takes TILES and their scales, ten places of 16 bytes in all.
constexpr int GROUP_STAGES = 10 / (TILES<true> + 1);

#define ROW(suffix, T)                                                               \
  KERNEL(gemv_4x2_##suffix, 256, 2, gemv<T, 8, 8, 4, false>(p))                      \
  KERNEL(gemv_8_##suffix, 256, 2, gemv<T, 8, 8, 8, false>(p))                        \
  KERNEL(gemv_16_##suffix, 512, 2, gemv<T, 16, 6, 16, false>(p))                     \
  KERNEL(gemv_many_4x2_##suffix, 256, 2, gemv<T, 8, 8, 4, false, 1, 4>(p))           \
  KERNEL(gemv_many_16_##suffix, 512, 2, gemv<T, 16, 7, 16, false, 1, 4>(p))          \
  KERNEL(gemv_grouped_8_##suffix, 256, 2, gemv<T, 8, GROUP_STAGES, 8, true>(p))      \
  KERNEL(gemv_grouped_16_##suffix, 512, 1, gemv<T, 16, GROUP_STAGES, 16, true>(p))   \
  KERNEL(gemv_split_8_##suffix, 256, 2, gemv<T, 8, 8, 8, false, T::PLANES>(p))       \
  KERNEL(gemv_split_16_##suffix, 512, 1, gemv<T, 16, 6, 16, false, T::PLANES>(p))    \
  KERNEL(gemv_split_grouped_8_##suffix, 256, 2, gemv<T, 8, GROUP_STAGES, 8, true, T::PLANES>(p))      \
  KERNEL(gemv_split_grouped_16_##suffix, 512, 1, gemv<T, 16, GROUP_STAGES, 16, true, T::PLANES>(p))   \
  KERNEL(quantize_##suffix, QUANTIZE_WARPS * 32, 4, quantize<T, 1>(p))               \
  KERNEL(quantize_few_##suffix, 2 * QUANTIZE_WARPS * 32, 2, quantize<T, 1, 2 * QUANTIZE_WARPS>(p))    \
  KERNEL(split_##suffix, QUANTIZE_WARPS * 32, 4, quantize<T, T::PLANES>(p))          \
  KERNEL(largest_##suffix, QUANTIZE_WARPS * 32, 4, largest_of_all<T>(p))
#ifdef KBC_ROWS_F32
ROW(f32, F32)
#endif
#ifdef KBC_ROWS_BF16
ROW(bf16, BF16)
#endif
#ifdef KBC_ROWS_F16
ROW(f16, F16)
#endif

// Slices of weights that a warp has on their way: as many as the registers hold.
constexpr int AHEAD = BITS == 8 ? 1 : 2;

#ifdef KBC_MMA
KERNEL(mma_8, 256, 2, gemm_mma<1, 1, 8, 4, AHEAD>(p))
KERNEL(mma_16, 256, 2, gemm_mma<2, 2, 4, 4, AHEAD>(p))
KERNEL(mma_32, 256, 2, gemm_mma<4, 2, 4, 3, AHEAD>(p))
KERNEL(mma_64, 256, 1, gemm_mma<8, 4, 2, 3, AHEAD>(p))
KERNEL(mma_grouped_8, 256, 2, gemm_mma_grouped<1, 1, 8, 4, AHEAD>(p))
KERNEL(mma_grouped_16, 256, 2, gemm_mma_grouped<2, 1, 8, 3, AHEAD>(p))
KERNEL(mma_grouped_32, 256, 2, gemm_mma_grouped<4, 1, 8, 2, 1>(p))
#endif

#if __CUDA_ARCH_FEAT_SM90_ALL
#ifdef KBC_WGMMA
constexpr int FAR_AHEAD = BITS == 8 ? 2 : 4;
#define MANY(rows, ...)                                                              \
  KERNEL(wgmma_##rows, FOUR_GROUPS_##rows & BITS ? 640 : 384, 1,                     \
         gemm_wgmma<(FOUR_GROUPS_##rows & BITS) != 0, rows / 8, __VA_ARGS__>(p))
MANY(16, 16, FAR_AHEAD, SHIFTS)
MANY(32, 16, FAR_AHEAD, SHIFTS)
MANY(64, 8, BITS <= 2 ? 4 : AHEAD, SHIFTS < 2 ? 1 : 2)
MANY(128, 10, AHEAD, 1)
#if KBC_BITS < 8
KERNEL(wgmma_long_64, FOUR_GROUPS_64 & BITS ? 640 : 384, 1,
       gemm_wgmma<(FOUR_GROUPS_64 & BITS) != 0, 8, 8, BITS <= 2 ? 4 : AHEAD, SHIFTS < 2 ? 1 : 2, true>(p))
#endif
#endif

#ifdef KBC_WGMMA16
// 17 warps; the last one feeds the others.
#define WIDE(suffix, T)                                                              \
  KERNEL(arrange_##suffix, QUANTIZE_WARPS * 32, 4, arrange<T>(p))                    \
  KERNEL(wgmma16_64_##suffix, 640, 1, gemm_wgmma16<T, 8, 16, 4, AHEAD, false>(p))        \
  KERNEL(wgmma16_128_##suffix, 640, 1, gemm_wgmma16<T, 16, 16, 4, 1, false>(p))          \
  KERNEL(wgmma16_grouped_64_##suffix, 640, 1, gemm_wgmma16<T, 8, 16, 4, 1, true>(p))     \
  KERNEL(wgmma16_grouped_128_##suffix, 640, 1, gemm_wgmma16<T, 16, 16, 4, 1, true>(p))
WIDE(bf16, BF16)
WIDE(f16, F16)
#endif
#endif
