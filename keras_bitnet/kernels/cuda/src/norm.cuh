// Root mean square norms: y = x / sqrt(mean(x^2) + epsilon) * gain of a row, in float32, rounded to the
// dtype of the row; and with them what a block of a decoder computes between its products.
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

// What is normed: x itself; x + other; or activation(x) * other, of an activation alone without another. Each step is
// rounded to the dtype, as by operators one after another. ADD and GATE write it down where there is a place for it,
// and no norm where there is no gain.
enum Combine { PLAIN, ADD, GATE };

template <class T> DEVICE float rounded(float value) {
  if (T::DTYPE == 0) return value;
  const u32 bits = pack_pair(T::DTYPE, value, 0.f) & 0xffffu;
  return T::DTYPE == 1 ? __uint_as_float(bits << 16) : half_to_float(bits);
}

// As `kbn_activation` of native/src/bitnet.h numbers them; a NaN stays one.
template <class T> DEVICE float activated(float x, int activation) {
  if (activation == 2) return rounded<T>(__fdiv_rn(x, 1.f + expf(-x)));
  const float positive = x < 0.f ? 0.f : x;
  return activation == 1 ? rounded<T>(__fmul_rn(positive, positive)) : positive;
}

template <class T, int MODE> DEVICE float combined(const Norm& p, float x, float other) {
  if (MODE == PLAIN) return x;
  if (MODE == ADD) return rounded<T>(__fadd_rn(x, other));
  const float y = activated<T>(x, p.activation);
  return p.other ? rounded<T>(__fmul_rn(y, other)) : y;
}

// A block takes a row, which it reads once, but for what its registers cannot hold.
template <class T, int MODE> DEVICE void normalize(const Norm& p) {
  constexpr int HELD = 4;
  const long long place = (long long)blockIdx.x * p.k;
  const char* x = static_cast<const char*>(p.x) + place * T::SIZE;
  const char* other = MODE == PLAIN || !p.other ? x : static_cast<const char*>(p.other) + place * T::SIZE;
  const char* gain = reinterpret_cast<const char*>(p.gain);
  auto first = [](int i) { return 4 * (i * NORM_THREADS + threadIdx.x); };
  // Four numbers as they are normed.
  auto combine = [&](const Four<T>& v, const Four<T>& w, float (&to)[4]) {
#pragma unroll
    for (int i = 0; i < 4; ++i) to[i] = combined<T, MODE>(p, element(v, i), element(w, i));
  };
  auto load = [&](int i, float (&to)[4]) {
    const Four<T> v = load_four<T>(x, i, p.k, p.aligned);
    combine(v, MODE == PLAIN ? v : load_four<T>(other, i, p.k, p.aligned), to);
  };
  auto squares = [](const float (&v)[4]) {
    float sum = 0.f;
#pragma unroll
    for (int i = 0; i < 4; ++i) sum = __fmaf_rn(v[i], v[i], sum);
    return sum;
  };
  auto put = [&](void* to, int i, const float (&v)[4]) {
    if (p.aligned && i < p.k) store_four(to, place + i, T::DTYPE, v);
    if (!p.aligned)
      for (int j = 0; j < 4 && i + j < p.k; ++j) store(to, place + i + j, T::DTYPE, v[j]);
  };
  let_next_start();
  if (MODE == PLAIN || p.gain)
    for (int i = 32 * threadIdx.x; i < p.k; i += 32 * NORM_THREADS) prefetch(p.gain + i);
  wait_for_previous();
  Four<T> raw[HELD], others[HELD];
  Four<F32> gains[HELD];
  load_fours<T, HELD>(raw, x, p.k, p.aligned, first);
  if (MODE != PLAIN) load_fours<T, HELD>(others, other, p.k, p.aligned, first);
  if (MODE == PLAIN || p.gain) load_fours<F32, HELD>(gains, gain, p.k, p.aligned, first);
  float held[HELD][4], sum = 0.f;
#pragma unroll
  for (int i = 0; i < HELD; ++i) {
    combine(raw[i], MODE == PLAIN ? raw[i] : others[i], held[i]);
    sum += squares(held[i]);
    if (MODE != PLAIN && p.combined) put(p.combined, first(i), held[i]);
  }
  for (int i = first(HELD); i < p.k; i += 4 * NORM_THREADS) {
    float v[4];
    load(i, v);
    sum += squares(v);
    if (MODE != PLAIN && p.combined) put(p.combined, i, v);
  }
  if (MODE != PLAIN && !p.gain) return;
  const float mean = __fdiv_rn(block_sum(sum), (float)p.k);
  const float factor = __fdiv_rn(1.f, __fsqrt_rn(mean + p.epsilon));
  auto write = [&](int i, const float (&v)[4], const Four<F32>& g) {
    float y[4];
#pragma unroll
    for (int j = 0; j < 4; ++j) y[j] = v[j] * factor * element(g, j);
    put(p.y, i, y);
  };
#pragma unroll
  for (int i = 0; i < HELD; ++i) write(first(i), held[i], gains[i]);
  for (int i = first(HELD); i < p.k; i += 4 * NORM_THREADS) {
    float v[4];
    load(i, v);
    write(i, v, load_four<F32>(gain, i, p.k, p.aligned));
  }
}
