// The kernels of one width, KBC_BITS: what shim.cc launches. Names and shapes of blocks match its table.
#include "gemm_mma.cuh"
#include "gemm_wgmma.cuh"
#include "gemv.cuh"
#include "quantize.cuh"

#define KERNEL(name, threads, blocks, ...) \
  extern "C" __global__ void __launch_bounds__(threads, blocks) name(const Matmul p) { __VA_ARGS__; }

#define EVERY_DTYPE(row) row(f32, F32) row(bf16, BF16) row(f16, F16)

#define ROW(suffix, T)                                                        \
  KERNEL(gemv_wide_##suffix, 256, 3, gemv<T, 8, 4, 4, false>(p))              \
  KERNEL(gemv_deep_##suffix, 256, 3, gemv<T, 8, 4, 8, false>(p))              \
  KERNEL(gemv_grouped_##suffix, 256, 2, gemv<T, 8, 4, 4, true>(p))            \
  KERNEL(quantize_##suffix, QUANTIZE_WARPS * 32, 2, quantize<T>(p))           \
  KERNEL(largest_##suffix, QUANTIZE_WARPS * 32, 4, largest_of_all<T>(p))
EVERY_DTYPE(ROW)
#undef ROW

constexpr int AHEAD = BITS <= 2 ? 4 : BITS == 4 ? 2 : 1;

KERNEL(mma_8, 256, 2, gemm_mma<1, 1, 8, 4, AHEAD, false>(p))
KERNEL(mma_16, 256, 2, gemm_mma<2, 1, 8, 4, AHEAD, false>(p))
KERNEL(mma_32, 256, 2, gemm_mma<4, 2, 4, 3, AHEAD, false>(p))
KERNEL(mma_64, 256, 1, gemm_mma<8, 4, 2, 3, AHEAD, false>(p))
KERNEL(mma_grouped_8, 256, 2, gemm_mma<1, 1, 8, 4, AHEAD, true>(p))
KERNEL(mma_grouped_32, 256, 1, gemm_mma<4, 2, 4, 3, AHEAD, true>(p))

#if __CUDA_ARCH_FEAT_SM90_ALL || !defined(__CUDA_ARCH__)
#if __CUDA_ARCH_FEAT_SM90_ALL
#define WGMMA(name, threads, ...) KERNEL(name, threads, 1, gemm_wgmma<__VA_ARGS__, 1>(p))
#else
#define WGMMA(name, threads, ...) KERNEL(name, threads, 1, )
#endif
constexpr int WGMMA_AHEAD = BITS <= 2 ? 2 : 1;
WGMMA(wgmma_64, 384, 8, 1, 2, 8, WGMMA_AHEAD)
WGMMA(wgmma_128, 384, 16, 2, 1, 6, WGMMA_AHEAD)
#endif
