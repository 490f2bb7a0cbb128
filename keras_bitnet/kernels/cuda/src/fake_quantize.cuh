// Fake quantization: what training multiplies with. Values are rounded to the grid and back, blended
// with themselves by a strength. The arithmetic, operation for operation, is that of `fake_quantize` in
// keras_bitnet/quantizers, so that the results are the same bits.
#pragma once
#include "quantize.cuh"

constexpr int FAKE_THREADS = QUANTIZE_WARPS * 32;
constexpr int FAKE_ROWS = 8;  // rows of a weight that a thread has on their way

DEVICE float strength_of(const Fake& p) { return p.strength ? __ldg(p.strength) : 1.f; }

// Of a value and its quantized twin. The last term is 0, or NaN where the value is not finite.
DEVICE float blended(float value, float quantized, float strength) {
  const float mixed = __fadd_rn(__fmul_rn(__fsub_rn(1.f, strength), value), __fmul_rn(strength, quantized));
  return __fadd_rn(strength >= 1.f ? quantized : mixed, __fsub_rn(value, value));
}

// Within lowest .. highest; unlike that of fminf and fmaxf, a NaN stays one.
DEVICE float clipped(const Fake& p, float value) {
  return value < p.lowest ? p.lowest : value > p.highest ? p.highest : value;
}

template <class T>
DEVICE void fake_four(const Fake& p, const Four<T>& v, const Ratio& ratio, float strength, long long row,
                      int first) {
  float y[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const float x = element(v, i);
    const float level = clipped(p, rintf(__fmul_rn(x, ratio.inverse)));
    y[i] = blended(x, __fmul_rn(level, ratio.scale), strength);
  }
  const long long place = row * p.k + first;
  if (p.y_aligned && first + 4 <= p.k)
    store_four(p.y, place, p.dtype, y);
  else
    for (int i = 0; i < 4 && first + i < p.k; ++i) store(p.y, place + i, p.dtype, y[i]);
}

// Activations: a block takes one row, which it reads once, but for what its registers cannot hold.
template <class T> DEVICE void fake_quantize_rows(const Fake& p) {
  __shared__ u32 maxima[QUANTIZE_WARPS];
  constexpr int HELD = T::SIZE == 4 ? 4 : 8, STEP = 4 * FAKE_THREADS;
  const long long row = blockIdx.x;
  const char* x = static_cast<const char*>(p.x) + row * p.k * T::SIZE;
  const float strength = strength_of(p);
  Four<T> held[HELD];
  u32 largest = 0;
  load_fours<T, HELD>(held, x, p.k, p.x_aligned, [&](int i) { return i * STEP + 4 * threadIdx.x; });
#pragma unroll
  for (int i = 0; i < HELD; ++i) largest = largest_of(held[i], largest);
  for (int first = HELD * STEP + 4 * threadIdx.x; first < p.k; first += STEP)
    largest = largest_of(load_four<T>(x, first, p.k, p.x_aligned), largest);
  largest = block_max<QUANTIZE_WARPS>(largest, maxima);
  const Ratio ratio = ratio_of(p, p.largest ? __ldg(p.largest) : largest, largest);
#pragma unroll
  for (int i = 0; i < HELD; ++i) {
    const int first = i * STEP + 4 * threadIdx.x;
    if (first < p.k) fake_four(p, held[i], ratio, strength, row, first);
  }
  for (int first = HELD * STEP + 4 * threadIdx.x; first < p.k; first += STEP)
    fake_four(p, load_four<T>(x, first, p.k, p.x_aligned), ratio, strength, row, first);
}

// A weight: a thread takes four columns of some rows. `scale` holds what the quantizer computed.
DEVICE void fake_quantize_weight(const Fake& p) {
  const int first = 4 * (blockIdx.x * FAKE_THREADS + threadIdx.x);
  if (first >= p.k) return;
  const float strength = strength_of(p);
  for (long long base = (long long)blockIdx.y * FAKE_ROWS; base < p.rows; base += (long long)gridDim.y * FAKE_ROWS) {
    Four<F32> held[FAKE_ROWS];
#pragma unroll
    for (int r = 0; r < FAKE_ROWS; ++r)
      if (base + r < p.rows)
        held[r] = load_four<F32>(static_cast<const char*>(p.x) + (base + r) * p.k * 4, first, p.k, p.x_aligned);
#pragma unroll
    for (int r = 0; r < FAKE_ROWS; ++r) {
      if (base + r >= p.rows) break;
      const float* scale = p.scale + (base + r) / p.group_size * p.scale_columns;
      float y[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const float step = __ldg(scale + min(first + i, p.scale_columns - 1));
        const float w = element(held[r], i), ratio = __fdiv_rn(w, step);
        const float level = p.binary ? (ratio >= 0.f ? p.highest : p.lowest)
                                     : clipped(p, __fadd_rn(rintf(__fsub_rn(ratio, p.half)), p.half));
        y[i] = blended(w, __fmul_rn(level, step), strength);
      }
      const long long place = (base + r) * p.k + first;
      if (p.y_aligned && first + 4 <= p.k)
        store_four(p.y, place, p.dtype, y);
      else
        for (int i = 0; i < 4 && first + i < p.k; ++i) store(p.y, place + i, p.dtype, y[i]);
    }
  }
}
