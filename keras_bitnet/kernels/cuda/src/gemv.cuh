// One row of activations: quantization, dot products and scales in one kernel.
//
// KS warps share a row of tiles (16 outputs); a lane reads 16 bytes, four columns of a tile, and
// its accumulators stay apart by the bit position of the codes, so that masks need no shift:
// they are shifted once, at the end, which is exact.
#pragma once
#include "common.cuh"

// Quantizes the row into shared memory, in its own order, padded with zeros to a multiple of 32 inputs; four codes of
// each plane lie beside each other. Returns its scale; `row_sum` gets the sums of the codes. `meanwhile` is called when
// the row has been asked for.
template <class T, int WARPS, int PLANES, class Meanwhile>
DEVICE float quantize_row(const Activations& p, int row, u32* codes, int (&row_sum)[PLANES], Meanwhile meanwhile) {
  __shared__ u32 maxima[WARPS];
  __shared__ int sums[PLANES][WARPS];
  constexpr int THREADS = WARPS * 32, HELD = 8;
  const char* x = static_cast<const char*>(p.x) + (long long)row * p.k * T::SIZE;
  const int fours = (p.k + 31) / 32 * 8;
  Four<T> held[HELD];
  u32 largest = 0;
  load_fours<T, HELD>(held, x, p.k, p.x_aligned, [&](int i) { return 4 * (i * THREADS + threadIdx.x); });
  meanwhile();
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

// What a lane reads in one turn: a tile; in groups as many as make 32 inputs (16 of 8 bits), which share their scales.
template <bool GROUPED> constexpr int TILES = !GROUPED ? 1 : BITS < 4 ? BITS : 4;

// Weights and group scales as they come; GROUPED: the sums of a turn are scaled at once, and joined.
template <bool GROUPED, int PLANES> struct Sums;
template <int PLANES> struct Sums<false, PLANES> {
  using Number = int;
  static constexpr int KEPT = PLANES;
  // Of eight places, for which there are not enough registers, the upper four are shifted down first.
  static constexpr int PLACES = GROUPS < 4 ? GROUPS : 4;
  int by_place[4][PLACES][PLANES] = {};

  DEVICE void add(const Activations&, const uint4 (&w)[1], const u32 (&x)[GROUPS * PLANES], const int*, const float*) {
#pragma unroll
    for (int c = 0; c < 4; ++c)
#pragma unroll
      for (int i = 0; i < GROUPS; ++i) {
        const u32 codes = (word(w[0], c) >> (BITS * (i / PLACES * PLACES))) & (MASK << (BITS * (i % PLACES)));
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
  static constexpr int KEPT = 1, WORDS = TILES<true> * GROUPS;
  float columns[4] = {0.f, 0.f, 0.f, 0.f};

  // `x_sums`: of the codes of x, times the offset. `scales`: of the four columns.
  DEVICE void add(const Activations& p, const uint4 (&w)[TILES<true>], const u32 (&x)[WORDS * PLANES], const int* x_sums,
                  const float* scales) {
#pragma unroll
    for (int c = 0; c < 4; ++c) {
      int sum[PLANES] = {};
#pragma unroll
      for (int i = 0; i < WORDS; ++i)
#pragma unroll
        for (int plane = 0; plane < PLANES; ++plane)
          sum[plane] = dot_codes((word(w[i / GROUPS], c) >> (BITS * (i % GROUPS))) & MASK, x[i * PLANES + plane],
                                 sum[plane]);
      float exact[PLANES];
#pragma unroll
      for (int plane = 0; plane < PLANES; ++plane) exact[plane] = (float)(p.step * sum[plane] + x_sums[plane]);
      columns[c] += join(exact) * scales[c];
    }
  }
  DEVICE float total(int) const { return sum_columns(columns); }
};

// Where the loads of a lane stand: turns go on from a row of tiles to the next.
struct Cursor {
  const uint4* next;
  int column, tiles_left, turns_left, rows_left;
};

// WARPS: of the block. KS: warps that share a row of tiles. STAGES: turns of a lane on their way, to places in
// shared memory that are its own, so that they need no registers and no barrier. SOON: those that are asked for before
// the activations, which wait behind them.
template <class T, int WARPS, int STAGES, int KS, bool GROUPED, int PLANES = 1, int SOON = STAGES>
DEVICE void gemv(const Matmuls& all) {
  const Matmul p = own_product(all);
  using Number = typename Sums<GROUPED, PLANES>::Number;
  constexpr int KEPT = Sums<GROUPED, PLANES>::KEPT, EACH = TILES<GROUPED>, WORDS = EACH * GROUPS * PLANES;
  __shared__ Number partial[2][WARPS][32];
  constexpr int TEAMS = WARPS / KS, THREADS = WARPS * 32, STEP = KS * 8 * EACH;  // tiles of a turn of a team
  constexpr int PLACES = STAGES * (GROUPED ? EACH + 1 : 1);
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int team = warp / KS, member = warp % KS, quarter = lane % 4;
  const int tile_rows = (p.n + 15) / 16;
  const int first_row = (blockIdx.y - p.first_block) * TEAMS + team, row_step = p.blocks * TEAMS;
  const int first_tile = (member * 8 + lane / 4) * EACH;
  const int turns = max(p.k_tiles - member * 8 * EACH + STEP - 1, 0) / STEP;  // the same for all lanes of a warp
  uint4* ring = reinterpret_cast<uint4*>(block_memory) + threadIdx.x;
  float* scales = reinterpret_cast<float*>(block_memory + STAGES * EACH * THREADS * 16) + threadIdx.x;
  u32* x_codes = reinterpret_cast<u32*>(block_memory + PLACES * THREADS * 16);
  int* x_sums = reinterpret_cast<int*>(x_codes + (p.k + 255) / 256 * (64 * PLANES));

  const long long to_next_row = ((long long)row_step * p.k_tiles - turns * STEP) * 4;
  Cursor at = {static_cast<const uint4*>(p.tiles) + ((long long)first_row * p.k_tiles + first_tile) * 4 + quarter,
               16 * first_row + 4 * quarter, p.k_tiles - first_tile, turns, 0};
  int filled = 0;
  if (turns && first_row < tile_rows) at.rows_left = (tile_rows - first_row + row_step - 1) / row_step;
  auto advance = [&] {
    filled = filled + 1 == STAGES ? 0 : filled + 1;
    at.next += STEP * 4, at.tiles_left -= STEP;
    if (--at.turns_left == 0) {
      at.next += to_next_row, at.tiles_left = p.k_tiles - first_tile, at.turns_left = turns;
      at.column += 16 * row_step, --at.rows_left;
    }
  };
  auto copy_weights = [&] {
#pragma unroll
    for (int i = 0; i < EACH; ++i)
      copy_or_zero<16>(ring + (filled * EACH + i) * THREADS, at.next + 4 * i, at.rows_left > 0 && at.tiles_left > i);
  };
  auto copy_scales = [&] {
    const u32 input = (u32)((p.k_tiles - at.tiles_left) * TILE_INPUTS);
    const float* row = p.scale + (long long)(input / (u32)p.group_size) * p.scale_columns;
#pragma unroll
    for (int c = 0; c < 4; ++c)
      copy_or_zero<4>(scales + (filled * 4 + c) * THREADS, row + min(at.column + c, p.scale_columns - 1),
                    at.rows_left > 0 && at.tiles_left > 0);
  };
  const Cursor start = at;
  if (p.weights_ready) {
#pragma unroll
    for (int i = 0; i < SOON; ++i, advance()) copy_weights(), copy_commit();
  } else {
#pragma unroll
    for (int i = 0; i < STAGES; ++i, advance())
#pragma unroll
      for (int j = 0; j < EACH; ++j)
        if (at.rows_left > 0 && at.tiles_left > j) prefetch(at.next + 4 * j);
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
  if (GROUPED || !p.weights_ready) {
    at = start;
#pragma unroll
    for (int i = 0; i < SOON; ++i, advance()) {
      if (!p.weights_ready) copy_weights();
      if (GROUPED) copy_scales();
      copy_commit();
    }
  }
  int row_sum[PLANES];
  const float x_scale = quantize_row<T, WARPS>(p, blockIdx.x, x_codes, row_sum, [&] {
#pragma unroll
    for (int i = SOON; i < STAGES; ++i, advance()) copy_weights(), copy_commit();
  });
  if (GROUPED) {  // sums of the codes of every turn
    for (int i = threadIdx.x; i < (p.k + 31) / 32 * (8 / (EACH * GROUPS)) * PLANES; i += THREADS) {
      const int turn = i / PLANES;
      int sum = 0;
#pragma unroll
      for (int j = 0; j < EACH * GROUPS; ++j)  // in an order that spreads the banks
        sum = __dp4a((int)x_codes[turn * WORDS + (turn + j) % (EACH * GROUPS) * PLANES + i % PLANES], 0x01010101, sum);
      x_sums[i] = p.step_offset * sum;
    }
    __syncthreads();
  }

  int buffer = 0, taken = 0;
  for (int tile_row = first_row; tile_row < tile_rows; tile_row += row_step) {
    Sums<GROUPED, PLANES> sums;
#pragma unroll 2
    for (int turn = 0; turn < turns; ++turn) {
      const int place = member * 8 + lane / 4 + turn * KS * 8;
      u32 x[WORDS];
      load_tile_inputs(x_codes, place, x);  // past the end they are anything
      copy_wait<STAGES - 1>();
      uint4 w[EACH];  // past the end it is 0, as scales are
      float s[4];
#pragma unroll
      for (int i = 0; i < EACH; ++i) w[i] = ring[(taken * EACH + i) * THREADS];
#pragma unroll
      for (int c = 0; c < 4; ++c) s[c] = GROUPED ? scales[(taken * 4 + c) * THREADS] : 0.f;
      taken = taken + 1 == STAGES ? 0 : taken + 1;
      copy_weights();
      if (GROUPED) copy_scales();
      copy_commit();
      advance();
      sums.add(p, w, x, x_sums + place * PLANES, s);
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
    const int n = 16 * tile_row + 4 * quarter + (lane & 16 ? 2 : 0) + (lane & 8 ? 1 : 0);
    if (member == 0 && !(lane & 4) && n < p.n) {
      float y[KEPT];
#pragma unroll
      for (int plane = 0; plane < KEPT; ++plane) {
        if constexpr (GROUPED)
          y[plane] = __fmul_rn(__fmul_rn(total[plane], p.inverse_step), x_scale);
        else
          y[plane] = scaled(p, total[plane], row_sum[plane], column_scale(p, n), x_scale);
      }
      store(p.y, (long long)blockIdx.x * p.n + n, p.dtype, with_bias(p, join(y), n));
    }
  }
}
