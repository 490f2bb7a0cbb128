// Activations of several rows, quantized once for the matrix kernels.
//
// The image is [ceil(k / 128)][rows rounded up to 8][128] bytes, where a row of activations that stay
// float is a row for each plane, all with their own scales: their results are added. Inputs are permuted as the
// matrix kernels read weights: in a block of four tiles, group i of the tiles 0 .. 3 (four codes
// each) is a unit of 16 bytes. Of the eight units of a row of the image, unit u lies at place
// place_of(u) ^ (row % 8): the order that `wgmma` wants, and its 128-byte swizzle.
#pragma once
#include "common.cuh"

constexpr int QUANTIZE_WARPS = 8;
constexpr int SLICE = 128;  // inputs of a row in one slice of the image
constexpr int LINE = 128;   // bytes of a row in one line of it: a slice of codes, half a slice of 16-bit numbers

// Codes in the same bits of two blocks of four tiles lie beside each other; of one bit, where there is
// one block, those four groups apart.
constexpr int SHIFTS = GROUPS < 4 ? GROUPS : 4;
DEVICE int place_of(int unit) {
  return unit / (2 * SHIFTS) * (2 * SHIFTS) + 2 * (unit % SHIFTS) + unit / SHIFTS % 2;
}

DEVICE int rows(const Activations& p) { return p.rows * p.planes; }
DEVICE int image_rows(const Activations& p) { return (rows(p) + 7) & ~7; }
DEVICE int slices(const Activations& p) { return (p.k + SLICE - 1) / SLICE; }
// Of 16-bit numbers: kernels make two turns at once, and where there are no inputs they are zeros, as weights are not.
DEVICE int wide_slices(const Activations& p) { return (slices(p) + 1) & ~1; }

// The largest |x| of all rows, for activations that share one scale. `p.largest` starts as 0.
template <class T, class P> DEVICE void largest_of_all(const P& p) {
  __shared__ u32 maxima[QUANTIZE_WARPS];
  wait_for_previous();
  const char* x = static_cast<const char*>(p.x) + (long long)blockIdx.x * p.k * T::SIZE;
  u32 largest = 0;
  for (int i = 4 * threadIdx.x; i < p.k; i += 4 * QUANTIZE_WARPS * 32)
    largest = largest_of(load_four<T>(x, i, p.k, p.x_aligned), largest);
  largest = block_max<QUANTIZE_WARPS>(largest, maxima);
  if (threadIdx.x == 0) atomicMax(p.largest, largest);
}

// Group `part` of one unit: the inputs from there on.
DEVICE int first_of(int unit, int part) {
  return 4 * (unit / GROUPS * (4 * GROUPS) + part * GROUPS + unit % GROUPS);
}

// A block quantizes one row.
template <class T, int PLANES, int WARPS = QUANTIZE_WARPS> DEVICE void quantize(const Activations& p) {
  __shared__ u32 maxima[WARPS];
  __shared__ int sums[PLANES][WARPS];
  constexpr int THREADS = WARPS * 32, HELD = (T::SIZE == 4 ? 16 : 32) / WARPS;
  const int row = blockIdx.x, units = slices(p) * (SLICE / 16);
  const char* x = static_cast<const char*>(p.x) + (long long)row * p.k * T::SIZE;
  auto load = [&](Four<T>(&v)[4], int unit) {
    load_fours<T, 4>(v, x, p.k, p.x_aligned, [&](int part) { return first_of(unit, part); });
  };
  let_next_start();
  wait_for_previous();
  Four<T> held[HELD * 4];
  u32 largest = 0;
  load_fours<T, HELD * 4>(held, x, p.k, p.x_aligned,
                          [&](int i) { return first_of(i / 4 * THREADS + threadIdx.x, i % 4); });
#pragma unroll
  for (int i = 0; i < HELD * 4; ++i) largest = largest_of(held[i], largest);
  for (int unit = HELD * THREADS + threadIdx.x; unit < units; unit += THREADS) {
    Four<T> v[4];
    load(v, unit);
#pragma unroll
    for (int part = 0; part < 4; ++part) largest = largest_of(v[part], largest);
  }
  largest = block_max<WARPS>(largest, maxima);
  const Ratio ratio = ratio_of(p, p.largest ? __ldg(p.largest) : largest, largest);

  int sum[PLANES] = {};
  auto write = [&](int unit, const Four<T>* v) {
    u32 codes[4][PLANES];
#pragma unroll
    for (int part = 0; part < 4; ++part) quantize_four(p, v[part], ratio.inverse, codes[part]);
#pragma unroll
    for (int plane = 0; plane < PLANES; ++plane) {
      const int image_row = row * PLANES + plane;
      const long long line = (long long)(unit / 8) * image_rows(p) + image_row;
      const int place = place_of(unit % 8) ^ (image_row % 8);
      *reinterpret_cast<uint4*>(p.image + line * LINE + place * 16) =
          make_uint4(codes[0][plane], codes[1][plane], codes[2][plane], codes[3][plane]);
#pragma unroll
      for (int part = 0; part < 4; ++part) sum[plane] = __dp4a((int)codes[part][plane], 0x01010101, sum[plane]);
    }
  };
#pragma unroll
  for (int i = 0; i < HELD; ++i) {
    const int unit = i * THREADS + threadIdx.x;
    if (unit < units) write(unit, held + 4 * i);
  }
  for (int unit = HELD * THREADS + threadIdx.x; unit < units; unit += THREADS) {
    Four<T> v[4];
    load(v, unit);
    write(unit, v);
  }
  float scale = ratio.scale;
#pragma unroll
  for (int plane = 0; plane < PLANES; ++plane, scale = __fmul_rn(scale, 1 / PLANE)) {
    const int all = block_sum<WARPS>(sum[plane], sums[plane]);
    if (threadIdx.x == 0) {
      p.row_scale[row * PLANES + plane] = scale;
      p.row_sum[row * PLANES + plane] = all;
    }
  }
}

// A block arranges one row of 16-bit numbers, which stay as they are, for the kernels of gemm_wgmma16.cuh. Its image
// is [4 * ceil(k / 256)][rows rounded up to 8][128] bytes. The four numbers of a group go to two units of 16 bytes,
// the first and third of each tile of a block to one, the others to another: the halves of a word of weights.
template <class T> DEVICE void arrange(const Activations& p) {
  constexpr int THREADS = QUANTIZE_WARPS * 32, HELD = 2;
  const int row = blockIdx.x, groups = wide_slices(p) * (SLICE / 16);
  const char* x = static_cast<const char*>(p.x) + (long long)row * p.k * T::SIZE;
  let_next_start();
  wait_for_previous();
  for (int begin = threadIdx.x; begin < groups; begin += HELD * THREADS) {
    Four<T> held[HELD * 4];
    load_fours<T, HELD * 4>(held, x, p.k, p.x_aligned, [&](int i) { return first_of(begin + i / 4 * THREADS, i % 4); });
#pragma unroll
    for (int i = 0; i < HELD; ++i) {
      const int group = begin + i * THREADS;
      if (group >= groups) break;
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int unit = group / GROUPS * (2 * GROUPS) + half * GROUPS + group % GROUPS;
        u32 pairs[4];
#pragma unroll
        for (int part = 0; part < 4; ++part)
          pairs[part] = __byte_perm(held[4 * i + part].raw.x, held[4 * i + part].raw.y, half ? 0x7632 : 0x5410);
        const long long line = (long long)(unit / 8) * image_rows(p) + row;
        *reinterpret_cast<uint4*>(p.image + line * LINE + (unit % 8 ^ row % 8) * 16) =
            make_uint4(pairs[0], pairs[1], pairs[2], pairs[3]);
      }
    }
  }
}
