// Root mean square norms: y = x / sqrt(mean(x^2) + epsilon) * gain of a row, in float32, rounded to the
// dtype of the row.
#pragma once
#include "common.cuh"

constexpr int NORM_WARPS = 16, NORM_THREADS = 32 * NORM_WARPS;

// The sum over the block. Every thread gets it.
DEVICE float block_sum(float value) {
  __shared__ float sums[NORM_WARPS];
#pragma unroll
  for (int lanes = 16; lanes; lanes /= 2) value += __shfl_xor_sync(~0u, value, lanes);
  if (threadIdx.x % 32 == 0) sums[threadIdx.x / 32] = value;
  __syncthreads();
  value = sums[threadIdx.x % NORM_WARPS];
#pragma unroll
  for (int lanes = NORM_WARPS / 2; lanes; lanes /= 2) value += __shfl_xor_sync(~0u, value, lanes);
  return value;
}

// A block takes a row, which it reads once, but for what its registers cannot hold.
template <class T> DEVICE void normalize(const Norm& p) {
  constexpr int HELD = 4;
  const long long place = (long long)blockIdx.x * p.k;
  const char* x = static_cast<const char*>(p.x) + place * T::SIZE;
  const char* gain = reinterpret_cast<const char*>(p.gain);
  auto first = [](int i) { return 4 * (i * NORM_THREADS + threadIdx.x); };
  auto squares = [](const Four<T>& v) {
    float sum = 0.f;
#pragma unroll
    for (int i = 0; i < 4; ++i) sum = __fmaf_rn(element(v, i), element(v, i), sum);
    return sum;
  };
  let_next_start();
  for (int i = 32 * threadIdx.x; i < p.k; i += 32 * NORM_THREADS) prefetch(p.gain + i);
  wait_for_previous();
  Four<T> held[HELD];
  Four<F32> gains[HELD];
  load_fours<T, HELD>(held, x, p.k, p.aligned, first);
  load_fours<F32, HELD>(gains, gain, p.k, p.aligned, first);
  float sum = 0.f;
#pragma unroll
  for (int i = 0; i < HELD; ++i) sum += squares(held[i]);
  for (int i = first(HELD); i < p.k; i += 4 * NORM_THREADS) sum += squares(load_four<T>(x, i, p.k, p.aligned));
  const float mean = __fdiv_rn(block_sum(sum), (float)p.k);
  const float factor = __fdiv_rn(1.f, __fsqrt_rn(mean + p.epsilon));
  auto write = [&](int i, const Four<T>& v, const Four<F32>& g) {
    float y[4];
#pragma unroll
    for (int j = 0; j < 4; ++j) y[j] = element(v, j) * factor * element(g, j);
    if (p.aligned && i < p.k) store_four(p.y, place + i, T::DTYPE, y);
    if (!p.aligned)
      for (int j = 0; j < 4 && i + j < p.k; ++j) store(p.y, place + i + j, T::DTYPE, y[j]);
  };
#pragma unroll
  for (int i = 0; i < HELD; ++i) write(first(i), held[i], gains[i]);
  for (int i = first(HELD); i < p.k; i += 4 * NORM_THREADS)
    write(i, load_four<T>(x, i, p.k, p.aligned), load_four<F32>(gain, i, p.k, p.aligned));
}
