// One row of activations: quantization, dot products and scales in one kernel.
//
// KS warps share a row of tiles (16 outputs); a lane reads 16 bytes, four columns of a tile, and
// its accumulators stay apart by the bit position of the codes, so that masks need no shift:
// they are shifted once, at the end, which is exact.
#pragma once
#include "common.cuh"

// Quantizes the row into shared memory, in its own order, padded with zeros; four codes of each plane
// lie beside each other. Returns its scale; `row_sum` gets the sums of the codes.
template <class T, int WARPS, int PLANES>
DEVICE float quantize_row(const Matmul& p, int row, u32* codes, int (&row_sum)[PLANES]) {
  __shared__ u32 maxima[WARPS];
  __shared__ int sums[PLANES][WARPS];
  constexpr int THREADS = WARPS * 32, HELD = 8;
  const char* x = static_cast<const char*>(p.x) + (long long)row * p.k * T::SIZE;
  const int fours = p.k_tiles * TILE_INPUTS / 4;
  Four<T> held[HELD];
  u32 largest = 0;
  load_fours<T, HELD>(held, x, p.k, p.x_aligned, [&](int i) { return 4 * (i * THREADS + threadIdx.x); });
#pragma unroll
  for (int i = 0; i < HELD; ++i) largest = largest_of(held[i], largest);
  for (int i = HELD * THREADS + threadIdx.x; i < fours; i += THREADS)
    largest = largest_of(load_four<T>(x, 4 * i, p.k, p.x_aligned), largest);
  largest = block_max<WARPS>(largest, maxima);
  const Ratio ratio = ratio_of(p, p.largest ? __ldg(p.largest) : largest, largest);
  int sum[PLANES] = {};
  auto write = [&](int place, const Four<T>& v) {
    u32 four[PLANES];
    quantize_four(p, v, ratio.inverse, four);
#pragma unroll
    for (int plane = 0; plane < PLANES; ++plane) {
      if (place < fours) codes[place * PLANES + plane] = four[plane];
      sum[plane] = __dp4a((int)four[plane], 0x01010101, sum[plane]);
    }
  };
#pragma unroll
  for (int i = 0; i < HELD; ++i) write(i * THREADS + threadIdx.x, held[i]);
  for (int i = HELD * THREADS + threadIdx.x; i < fours; i += THREADS)
    write(i, load_four<T>(x, 4 * i, p.k, p.x_aligned));
#pragma unroll
  for (int plane = 0; plane < PLANES; ++plane)  // its barrier is the one that `codes` needs
    row_sum[plane] = block_sum<WARPS>(sum[plane], sums[plane]);
  return ratio.scale;
}

// The codes of x for one tile.
template <int WORDS> DEVICE void load_tile_inputs(const u32* codes, int tile, u32 (&x)[WORDS]) {
  if constexpr (WORDS >= 4) {
#pragma unroll
    for (int i = 0; i < WORDS / 4; ++i) {
      const uint4 v = reinterpret_cast<const uint4*>(codes)[tile * (WORDS / 4) + i];
      x[4 * i] = v.x, x[4 * i + 1] = v.y, x[4 * i + 2] = v.z, x[4 * i + 3] = v.w;
    }
  } else if constexpr (WORDS == 2) {
    const uint2 v = reinterpret_cast<const uint2*>(codes)[tile];
    x[0] = v.x, x[1] = v.y;
  } else {
    x[0] = codes[tile];
  }
}

// Sums over the lanes of a warp that hold the same columns (equal lane % 4). On return lane
// holds column 4 * (lane % 4) + 2 * (bit 4 of the lane) + (bit 3 of the lane).
template <class N> DEVICE N sum_columns(const N (&v)[4]) {
  const bool high = threadIdx.x & 16, low = threadIdx.x & 8;
  N pair[2];
#pragma unroll
  for (int c = 0; c < 2; ++c)
    pair[c] = (high ? v[2 + c] : v[c]) + __shfl_xor_sync(~0u, high ? v[c] : v[2 + c], 16);
  N sum = (low ? pair[1] : pair[0]) + __shfl_xor_sync(~0u, low ? pair[0] : pair[1], 8);
  return sum + __shfl_xor_sync(~0u, sum, 4);
}

// Weights and group scales as they come; GROUPED: the sums of a tile are scaled at once, and joined.
template <bool GROUPED, int PLANES> struct Sums;
template <int PLANES> struct Sums<false, PLANES> {
  using Number = int;
  static constexpr int KEPT = PLANES;
  // Of eight places, for which there are not enough registers, the upper four are shifted down first.
  static constexpr int PLACES = GROUPS < 4 ? GROUPS : 4;
  int by_place[4][PLACES][PLANES] = {};

  DEVICE void add(const Matmul&, const uint4& w, const u32 (&x)[GROUPS * PLANES], int, int) {
#pragma unroll
    for (int c = 0; c < 4; ++c)
#pragma unroll
      for (int i = 0; i < GROUPS; ++i) {
        const u32 codes = (word(w, c) >> (BITS * (i / PLACES * PLACES))) & (MASK << (BITS * (i % PLACES)));
#pragma unroll
        for (int plane = 0; plane < PLANES; ++plane) {
          int& sum = by_place[c][i % PLACES][plane];
          sum = dot_codes(codes, x[i * PLANES + plane], sum);
        }
      }
  }
  DEVICE int total(int plane) const {
    int sums[4] = {0, 0, 0, 0};
#pragma unroll
    for (int c = 0; c < 4; ++c)
#pragma unroll
      for (int i = 0; i < PLACES; ++i) sums[c] += by_place[c][i][plane] >> (BITS * i);
    return sum_columns(sums);
  }
};
template <int PLANES> struct Sums<true, PLANES> {
  using Number = float;
  static constexpr int KEPT = 1;
  float columns[4] = {0.f, 0.f, 0.f, 0.f};

  DEVICE void add(const Matmul& p, const uint4& w, const u32 (&x)[GROUPS * PLANES], int tile, int column) {
    const float* scale = p.scale + (long long)(tile * TILE_INPUTS / p.group_size) * p.scale_columns;
    int x_sum[PLANES] = {};
#pragma unroll
    for (int i = 0; i < GROUPS * PLANES; ++i)
      x_sum[i % PLANES] = __dp4a((int)x[i], 0x01010101, x_sum[i % PLANES]);
#pragma unroll
    for (int c = 0; c < 4; ++c) {
      int sum[PLANES] = {};
#pragma unroll
      for (int i = 0; i < GROUPS * PLANES; ++i)
        sum[i % PLANES] = dot_codes((word(w, c) >> (BITS * (i / PLANES))) & MASK, x[i], sum[i % PLANES]);
      float exact[PLANES];
#pragma unroll
      for (int plane = 0; plane < PLANES; ++plane)
        exact[plane] = (float)(p.step * sum[plane] + p.step_offset * x_sum[plane]);
      columns[c] += join(exact) * __ldg(scale + min(column + c, p.scale_columns - 1));
    }
  }
  DEVICE float total(int) const { return sum_columns(columns); }
};

// WARPS: of the block. KS: warps that share a row of tiles. STAGES: loads of a lane on their way, to
// a place in shared memory that is its own, so that they need no registers and no barrier.
template <class T, int WARPS, int STAGES, int KS, bool GROUPED, int PLANES = 1>
DEVICE void gemv(const Matmul& p) {
  using Number = typename Sums<GROUPED, PLANES>::Number;
  constexpr int KEPT = Sums<GROUPED, PLANES>::KEPT;
  __shared__ Number partial[2][WARPS][32];
  constexpr int TEAMS = WARPS / KS, THREADS = WARPS * 32, STEP = KS * 8;  // tiles of a turn of a team
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int team = warp / KS, member = warp % KS, quarter = lane % 4;
  const int tile_rows = (p.n + 15) / 16;
  const int first_row = blockIdx.x * TEAMS + team, row_step = gridDim.x * TEAMS;
  const int first_tile = member * 8 + lane / 4;
  const int turns = max(p.k_tiles - member * 8 + STEP - 1, 0) / STEP;  // the same for all lanes of a warp
  uint4* ring = reinterpret_cast<uint4*>(block_memory) + threadIdx.x;
  u32* x_codes = reinterpret_cast<u32*>(block_memory + STAGES * THREADS * 16);

  // Where the loads stand: turns go on from a row of tiles to the next.
  const uint4* next = static_cast<const uint4*>(p.tiles) + ((long long)first_row * p.k_tiles + first_tile) * 4 + quarter;
  const long long to_next_row = ((long long)row_step * p.k_tiles - turns * STEP) * 4;
  int tiles_left = p.k_tiles - first_tile, turns_left = turns, rows_left = 0, filled = 0;
  if (turns && first_row < tile_rows) rows_left = (tile_rows - first_row + row_step - 1) / row_step;
  auto advance = [&] {
    next += STEP * 4, tiles_left -= STEP;
    if (--turns_left == 0)
      next += to_next_row, tiles_left = p.k_tiles - first_tile, turns_left = turns, --rows_left;
  };
  auto fill = [&] {
    copy_stream(ring + filled * THREADS, next, rows_left > 0 && tiles_left > 0);
    filled = filled + 1 == STAGES ? 0 : filled + 1;
    advance();
  };
  if (p.weights_ready) {
#pragma unroll
    for (int i = 0; i < STAGES; ++i) fill();
  } else {
    const uint4* const start = next;
    const int rows = rows_left;
#pragma unroll
    for (int i = 0; i < STAGES; ++i, advance())
      if (rows_left > 0 && tiles_left > 0) prefetch(next);
    next = start, tiles_left = p.k_tiles - first_tile, turns_left = turns, rows_left = rows;
  }
  if (!GROUPED && member == 0) {  // what the ends of the rows of tiles need
    const int row = first_row + lane * row_step;
    if (row < tile_rows) {
      prefetch(p.scale + (p.scale_columns > 1 ? 16 * row : 0));
      if (p.bias) prefetch(p.bias + 16 * row);
    }
  }
  let_next_start();
  wait_for_previous();
  if (!p.weights_ready)
#pragma unroll
    for (int i = 0; i < STAGES; ++i) fill();
  int row_sum[PLANES];
  const float x_scale = quantize_row<T, WARPS>(p, blockIdx.y, x_codes, row_sum);

  int buffer = 0, taken = 0;
  for (int tile_row = first_row; tile_row < tile_rows; tile_row += row_step) {
    Sums<GROUPED, PLANES> sums;
    const int column = tile_row * 16 + 4 * quarter;
#pragma unroll 2
    for (int turn = 0; turn < turns; ++turn) {
      const int tile = first_tile + turn * STEP;
      u32 x[GROUPS * PLANES];
      load_tile_inputs(x_codes, tile, x);  // past the end they are anything
      copy_wait<STAGES - 1>();
      const uint4 w = ring[taken * THREADS];  // past the end it is 0
      taken = taken + 1 == STAGES ? 0 : taken + 1;
      fill();
      if (!GROUPED || tile < p.k_tiles) sums.add(p, w, x, tile, column);
    }
    Number total[KEPT];
#pragma unroll
    for (int plane = 0; plane < KEPT; ++plane) {
      total[plane] = sums.total(plane);
      if (KS == 1) continue;
      partial[buffer][warp][lane] = total[plane];
      asm volatile("bar.sync %0, %1;" ::"r"(team + 1), "n"(KS * 32) : "memory");
      if (member == 0)
#pragma unroll
        for (int i = 1; i < KS; ++i) total[plane] += partial[buffer][warp + i][lane];
      buffer ^= 1;
    }
    const int n = column + (lane & 16 ? 2 : 0) + (lane & 8 ? 1 : 0);
    if (member == 0 && !(lane & 4) && n < p.n) {
      float y[KEPT];
#pragma unroll
      for (int plane = 0; plane < KEPT; ++plane) {
        if constexpr (GROUPED)
          y[plane] = __fmul_rn(__fmul_rn(total[plane], p.inverse_step), x_scale);
        else
          y[plane] = scaled(p, total[plane], row_sum[plane], column_scale(p, n), x_scale);
      }
      store(p.y, (long long)blockIdx.y * p.n + n, p.dtype, with_bias(p, join(y), n));
    }
  }
}
