// Many rows of quantized activations: `wgmma` with 8-bit operands. A block has two warp groups of 128
// columns each, or four of 64.
#pragma once
#include "wgmma.cuh"

#if __CUDA_ARCH_FEAT_SM90_ALL

// What a lane reads of a tile: two columns in one set, or four in two.
template <bool FOUR_GROUPS> struct UnitOf { typedef uint4 Type; };
template <> struct UnitOf<true> { typedef uint2 Type; };

// The A operand of slab `s` of a slice for set `set`: codes times 2^(BITS * (s % FACTORS)), which saves
// shifts. The sums of each factor are kept apart; 98,304 inputs do not overflow them.
template <int FACTORS, class Unit>
DEVICE void unpack_scaled(const Unit (&w)[QUADS], int s, int set, u32 (&a)[4], u32 mask = MASK) {
  if constexpr (BITS == 8) {
    unpack(w, s, set, a);
  } else {
#pragma unroll
    for (int i = 0; i < 4; ++i) {  // two columns, in one unit of the image and in the next
      const int quad = BITS == 1 ? 0 : s / SHIFTS * 2 + i / 2;
      const int place = s % SHIFTS + (BITS == 1 ? i / 2 * SHIFTS : 0), kept = s % FACTORS;
      a[i] = (word(w[quad], 2 * set + i % 2) >> (BITS * (place - kept))) & (mask << (BITS * kept));
    }
  }
}

template <class Unit, int WARPS, int MB, int STAGES, int AHEAD, int FACTORS, bool NARROWING, bool LONG>
DEVICE void consume(const Matmuls& all, Share share, int first_row, Ring ring, bool sharing) {
  constexpr int STAGE = 8 * MB * LINE, SETS = 16 / WARPS;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const Matmul p = own_product(all);
  const int first_column = first_column_of_block<NARROWING>(p) + warp * (16 * SETS);
  Columns<Unit> columns(p, first_column, share.first, share.first + share.count);
  Unit weights[AHEAD + 1][QUADS];  // the last one where LONG
  load_first<AHEAD>(p, columns, weights);

  Tile<int, MB, SETS> apart[FACTORS] = {};
  // Multiplies slice i. `asking`: which half of a turn asks for the weights of the next one here, or -1.
  auto multiply = [&](int i, u32(&a)[SLABS][SETS][4], int asking) {
    const int stage = i % STAGES;
    barrier_wait(ring.full + 8 * stage, i / STAGES & 1);
    if (asking >= 0)
#pragma unroll
      for (int k = 0; k < AHEAD; ++k) columns.reload(k, weights[k + 1 < AHEAD ? k : AHEAD - asking]);
    const u64 b = describe(ring.shared + stage * STAGE);
    begin_products();
#pragma unroll
    for (int s = 0; s < SLABS; ++s)
#pragma unroll
      for (int set = 0; set < SETS; ++set) Wgmma<I8, MB>::multiply(apart[s % FACTORS][set], a[s][set], b + 2 * s);
    end_products(a);
    if (lane == 0) barrier_arrive(ring.empty + 8 * stage);
  };
  if constexpr (LONG) {
    // The weights of the next AHEAD slices are asked for all together: what waits for one of them may wait for all.
    // Those of the last one have two places by turns, as it is still to be multiplied then. (Else the compiler loads
    // its successor into other registers and moves it, which waits for the load.)
    for (int base = 0; base < share.count; base += 2 * AHEAD) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int begin = base + half * AHEAD;
        if (half && begin >= share.count) break;
        columns.skip(AHEAD);
#pragma unroll
        for (int j = 0; j < AHEAD; ++j) {
          const Unit(&own)[QUADS] = weights[j + 1 < AHEAD ? j : AHEAD - 1 + half];
          const u32 mask = begin + j < share.count ? MASK : 0;  // past the end weights are those of an earlier slice
          u32 a[SLABS][SETS][4];
#pragma unroll
          for (int s = 0; s < SLABS; ++s)
#pragma unroll
            for (int set = 0; set < SETS; ++set) unpack_scaled<FACTORS>(own, s, set, a[s][set], mask);
          multiply(begin + j, a, j == AHEAD - 2 ? half : -1);
        }
      }
    }
  } else {
    // Past the end the weights are zeros and the activations those of an earlier slice.
    for (int base = 0; base < share.count; base += AHEAD) {
      columns.skip(AHEAD);
#pragma unroll
      for (int j = 0; j < AHEAD; ++j) {
        u32 a[SLABS][SETS][4];
#pragma unroll
        for (int s = 0; s < SLABS; ++s)
#pragma unroll
          for (int set = 0; set < SETS; ++set) unpack_scaled<FACTORS>(weights[j], s, set, a[s][set]);
        columns.load(j, weights[j]);
        multiply(base + j, a, -1);
      }
    }
  }

  Tile<int, MB, SETS>& sums = apart[0];
#pragma unroll
  for (int f = 1; f < FACTORS; ++f)
#pragma unroll
    for (int i = 0; i < 4 * SETS * MB; ++i)
      sums[i / (4 * MB)][i / 4 % MB][i % 4] += apart[f][i / (4 * MB)][i / 4 % MB][i % 4] >> (BITS * f);
  int begin = 0, end = MB;
  if (sharing) add_shares<WARPS>(sums, block_memory + STAGES * STAGE, begin, end);
  const Matmul last = own_product(all);
  // Computed again where it would take a register through the loop.
  const int column = NARROWING ? first_column_of_block<NARROWING>(last) + warp * (16 * SETS) : first_column;
  write_tile(last, sums, first_row, column, begin, end);
}

// LONG: for many slices, by blocks that do not share them.
template <bool FOUR_GROUPS, int MB, int STAGES, int AHEAD, int FACTORS, bool LONG = false>
DEVICE void gemm_wgmma(const Matmuls& p) {
  constexpr int WARPS = FOUR_GROUPS ? 16 : 8;
  constexpr bool SHARING = MB < 16 && !LONG;  // blocks of 128 rows have no memory for the sums of others
  constexpr bool NARROWING = FOUR_GROUPS && MB == 16;
  const Share share(slices(p), AHEAD, SHARING);
  const int first_row = blockIdx.x / (SHARING ? cluster_size() : 1) * (8 * MB);
  auto consume_share = [&](Ring ring, bool sharing) {
    consume<typename UnitOf<FOUR_GROUPS>::Type, WARPS, MB, STAGES, AHEAD, FACTORS, NARROWING, LONG>(
        p, share, first_row, ring, sharing);
  };
  feed_and_consume<MB, 1, AHEAD, STAGES, WARPS, SHARING, NARROWING>(p, share, first_row, consume_share);
}

#endif
