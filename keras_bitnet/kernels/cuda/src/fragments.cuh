// How a warp reads weights as the A operand of matrix instructions, and writes results.
//
// A warp owns 32 columns, two rows of tiles. Lane (g, t) = (lane / 4, lane % 4) reads 16 bytes:
// columns 4g .. 4g + 3 of tile t of a block of four. Columns 4g + 2s and 4g + 2s + 1 take the
// places of rows g and g + 8 of the instruction of set s: the order of rows is free. So is that
// of the inputs: the image of the activations (quantize.cuh) has the one used here.
#pragma once
#include "common.cuh"
#include "quantize.cuh"

constexpr int QUADS = BITS;          // blocks of four tiles in a slice
constexpr int SLABS = SLICE / 32;    // instructions' depths in a slice

// The weights of a lane: those of as many columns of a tile as a Unit holds, four (as above) or two. Of two, a warp
// owns one row of tiles, where columns 2g and 2g + 1 take the places of rows g and g + 8.
template <class Unit> struct Columns {
  static constexpr int UNITS = 64 / sizeof(Unit);  // of a tile
  const Unit* source;  // first tile of this lane
  int tiles;           // how many there are from there on; 0 or fewer: none, as where the columns do not exist

  // Slices are counted from `begin`; weights of the slice `end` and later ones read as zeros.
  DEVICE Columns(const Matmul& p, int first_column, int begin, int end) {
    const int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
    const int tile_row = first_column / 16 + g / UNITS;
    source = static_cast<const Unit*>(p.tiles) + ((long long)tile_row * p.k_tiles + t) * UNITS + g % UNITS;
    tiles = tile_row < (p.n + 15) / 16 ? min(p.k_tiles, 4 * QUADS * end) - t : 0;
    skip(begin);
  }
  // Counts from so many slices later. One address for all loads of a turn takes few instructions.
  DEVICE void skip(int slices) { source += 4 * UNITS * QUADS * slices, tiles -= 4 * QUADS * slices; }
  DEVICE bool has(int slice, int quad) const { return 4 * (slice * QUADS + quad) < tiles; }
  DEVICE const Unit* at(int slice, int quad) const { return source + 4 * UNITS * (slice * QUADS + quad); }
  DEVICE void load(int slice, Unit (&w)[QUADS], int begin = 0, int end = QUADS) const {
#pragma unroll
    for (int q = begin; q < end; ++q) w[q] = has(slice, q) ? load_stream(at(slice, q)) : Unit{};
  }
  // Into the registers of weights that are done with, which stay where there are no others.
  DEVICE void reload(int slice, Unit (&w)[QUADS]) const {
#pragma unroll
    for (int q = 0; q < QUADS; ++q) load_over(w[q], at(slice, q), has(slice, q));
  }
};

// The A operand of slab `s` of a slice for set `set`.
template <class Unit> DEVICE void unpack(const Unit (&w)[QUADS], int s, int set, u32 (&a)[4]) {
  if constexpr (BITS == 8) {
    a[0] = word(w[2 * s], 2 * set), a[1] = word(w[2 * s], 2 * set + 1);
    a[2] = word(w[2 * s + 1], 2 * set), a[3] = word(w[2 * s + 1], 2 * set + 1);
  } else {
    constexpr int PER_QUAD = BITS < 8 ? 4 / BITS : 1;
    const int group = 2 * (s % PER_QUAD);
    const u32 low = word(w[s / PER_QUAD], 2 * set), high = word(w[s / PER_QUAD], 2 * set + 1);
    a[0] = (low >> (BITS * group)) & MASK, a[1] = (high >> (BITS * group)) & MASK;
    a[2] = (low >> (BITS * (group + 1))) & MASK, a[3] = (high >> (BITS * (group + 1))) & MASK;
  }
}

// Sums [set][block of eight rows][register], as the instructions leave them; of a warp of 32 columns, or of 16 in one
// set.
template <class N, int MB, int SETS = 2> using Tile = N[SETS][MB][4];

DEVICE float result(const Activations& p, int sum, int x_sum, float weight_scale, float x_scale) {
  return scaled(p, sum, x_sum, weight_scale, x_scale);
}
// Sums of groups hold their scale and the offset already.
DEVICE float result(const Activations& p, float sum, int, float, float x_scale) {
  return __fmul_rn(__fmul_rn(sum, p.inverse_step), x_scale);
}

// Writes the four or two columns of every row that this lane holds, of the blocks of eight rows from `begin` to `end`. Of two
// planes it holds both, of four the lane beside it holds the others. The compiler knows the planes and the SIZE of
// an element; or they are ANY, and columns may be missing or not aligned.
constexpr int ANY = -1;
template <int SIZE, int PLANES, class N, int SETS, int MB>
DEVICE void write_rows(const Matmul& p, const N (&sums)[SETS][MB][4], int first_row, int first_column, int begin,
                       int end) {
  constexpr int COLUMNS = 2 * SETS;
  const int planes = PLANES == ANY ? p.planes : PLANES;
  const int lane = threadIdx.x % 32, t = lane % 4, n = first_column + COLUMNS * (lane / 4);
  // Of the rows each lane fetches every 32nd, all at once: no load waits for a store.
  constexpr int FETCHED = (MB + 3) / 4;
  float x_scales[FETCHED];
  int x_sums[FETCHED];
#pragma unroll
  for (int i = 0; i < FETCHED; ++i) {
    const int row = min(first_row + 32 * i + lane, rows(p) - 1);
    x_scales[i] = __ldg(p.row_scale + row);
    x_sums[i] = __ldg(p.row_sum + row);
  }
  float weight_scale[COLUMNS], bias[COLUMNS];
#pragma unroll
  for (int c = 0; c < COLUMNS; ++c) {
    const int column = min(n + c, p.n - 1);
    weight_scale[c] = column_scale(p, column);
    bias[c] = p.bias ? __ldg(p.bias + column) : -0.f;  // which changes no number
  }
#pragma unroll
  for (int b = 0; b < MB; ++b) {
    if (b < begin || b >= end) continue;
    const int first = first_row + 8 * b + 2 * t;
    float v[2][COLUMNS];
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const float x_scale = __shfl_sync(~0u, x_scales[b / 4], 8 * (b % 4) + 2 * t + r);
      const int x_sum = __shfl_sync(~0u, x_sums[b / 4], 8 * (b % 4) + 2 * t + r);
#pragma unroll
      for (int c = 0; c < COLUMNS; ++c)
        v[r][c] = result(p, sums[c / 2][b][2 * (c % 2) + r], x_sum, weight_scale[c], x_scale);
    }
    if (planes > 1)
#pragma unroll
      for (int c = 0; c < COLUMNS; ++c) {
        v[0][c] = __fadd_rn(v[0][c], v[1][c]);
        if (planes > 2) v[0][c] = __fadd_rn(v[0][c], __shfl_xor_sync(~0u, v[0][c], 1));
      }
#pragma unroll
    for (int r = 0; r < 2; ++r) {
#pragma unroll
      for (int c = 0; c < COLUMNS; ++c) v[r][c] = __fadd_rn(v[r][c], bias[c]);
      const int row = first + r;
      const bool there = row < rows(p) && !(row & (planes - 1));
      const long long place = (long long)(row >> planes / 2) * p.n + n;
      if constexpr (SIZE != ANY)
        store_if<SIZE>(there, p.y, place, p.dtype, v[r]);
      else
        for (int c = 0; c < COLUMNS && there && n + c < p.n; ++c) store(p.y, place + c, p.dtype, v[r][c]);
    }
  }
}

template <class N, int SETS, int MB>
DEVICE void write_tile(const Matmul& p, const N (&sums)[SETS][MB][4], int first_row, int first_column, int begin = 0,
                       int end = MB) {
  if (!p.y_aligned || first_column + 16 * SETS > p.n)
    write_rows<ANY, ANY>(p, sums, first_row, first_column, begin, end);
  else if (p.dtype == 0 && p.planes == 1)
    write_rows<4, 1>(p, sums, first_row, first_column, begin, end);
  else if (p.dtype == 0)
    write_rows<4, 4>(p, sums, first_row, first_column, begin, end);
  else if (p.planes == 1)
    write_rows<2, 1>(p, sums, first_row, first_column, begin, end);
  else
    write_rows<2, 2>(p, sums, first_row, first_column, begin, end);
}
