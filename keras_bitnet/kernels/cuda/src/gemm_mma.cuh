// Several rows of activations with `mma.sync`: every GPU from compute capability 8.0 on.
//
// A block has WN x WK warps: WN times 32 columns, and WK slices of the inputs at a time. Weights
// go from memory to registers, AHEAD stages early; activations through shared memory.
#pragma once
#include "fragments.cuh"

DEVICE void copy_async(u32 to, const void* from) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(to), "l"(from) : "memory");
}

DEVICE void load_matrices(u32 address, u32 (&r)[4]) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(address) : "memory");
}

DEVICE void multiply(int (&sum)[4], const u32 (&a)[4], u32 b0, u32 b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k32.row.col.s32.u8.s8.s32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
      "{%8, %9}, {%0, %1, %2, %3};"
      : "+r"(sum[0]), "+r"(sum[1]), "+r"(sum[2]), "+r"(sum[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// Integer sums; of groups float sums, to which the integers of every SPAN slabs, which lie in one group, are added.
// Their scales, of this lane's columns, are asked for a turn ahead.
constexpr int ALL = 0;  // a SPAN: one scale for all inputs
template <int SPAN, int MB> struct Accumulator {
  using Number = float;
  const Matmul& p;
  const int column;
  Tile<float, MB> sums = {};
  Tile<int, MB> open = {};
  float scales[SLABS / SPAN][4];
  int x_sums[MB][4] = {};  // by a matrix of ones: element r is that of row 2t + r % 2

  DEVICE Accumulator(const Matmul& p, int column) : p(p), column(column) {}
  DEVICE void load(int slice) {
#pragma unroll
    for (int i = 0; i < SLABS / SPAN; ++i) {
      const u32 input = min(slice * SLICE + 32 * SPAN * i, p.k - 1);
      const float* const row = p.scale + (long long)(input / (u32)p.group_size) * p.scale_columns;
#pragma unroll
      for (int c = 0; c < 4; ++c) scales[i][c] = load_after(row + min(column + c, p.scale_columns - 1));
    }
  }
  DEVICE void slab(const u32 (&a)[2][4], const u32 (&b)[MB][2]) {
    const u32 ones[4] = {0x01010101u, 0x01010101u, 0x01010101u, 0x01010101u};
#pragma unroll
    for (int m = 0; m < MB; ++m) {
#pragma unroll
      for (int set = 0; set < 2; ++set) multiply(open[set][m], a[set], b[m][0], b[m][1]);
      multiply(x_sums[m], ones, b[m][0], b[m][1]);
    }
  }
  DEVICE void end_of_slab(int s) {
    if ((s + 1) % SPAN) return;
#pragma unroll
    for (int m = 0; m < MB; ++m) {
#pragma unroll
      for (int c = 0; c < 4; ++c)
#pragma unroll
        for (int r = 0; r < 2; ++r) {
          int& sum = open[c / 2][m][2 * (c % 2) + r];
          sums[c / 2][m][2 * (c % 2) + r] +=
              (float)(p.step * sum + p.step_offset * x_sums[m][r]) * scales[s / SPAN][c];
          sum = 0;
        }
#pragma unroll
      for (int r = 0; r < 4; ++r) x_sums[m][r] = 0;
    }
  }
};
template <int MB> struct Accumulator<ALL, MB> {
  using Number = int;
  Tile<int, MB> sums = {};

  DEVICE Accumulator(const Matmul&, int) {}
  DEVICE void load(int) {}
  DEVICE void slab(const u32 (&a)[2][4], const u32 (&b)[MB][2]) {
#pragma unroll
    for (int m = 0; m < MB; ++m)
#pragma unroll
      for (int set = 0; set < 2; ++set) multiply(sums[set][m], a[set], b[m][0], b[m][1]);
  }
  DEVICE void end_of_slab(int) {}
};

template <int MB, int WN, int WK, int STAGES, int AHEAD, int SPAN = ALL>
DEVICE void gemm_mma(const Matmuls& all) {
  const Matmul p = own_product(all);
  using Number = typename Accumulator<SPAN, MB>::Number;
  constexpr int BM = 8 * MB, THREADS = 32 * WN * WK, STAGE = WK * BM * SLICE;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, wn = warp % WN, wk = warp / WN;
  const int first_row = blockIdx.x * BM, first_column = ((blockIdx.y - p.first_block) * WN + wn) * 32;
  const int all_slices = slices(p), turns = (all_slices + WK - 1) / WK;
  const int rows = min(BM, image_rows(p) - first_row);
  const Columns<uint4> columns(p, first_column, 0, all_slices);

#pragma unroll
  for (int j = 0; j < AHEAD; ++j)
#pragma unroll
    for (int q = 0; q < QUADS; ++q)
      if (columns.has(j * WK + wk, q)) prefetch(columns.at(j * WK + wk, q));
  let_next_start();
  wait_for_previous();

  Accumulator<SPAN, MB> accumulator(p, first_column + 4 * (lane / 4));
  uint4 weights[AHEAD][QUADS];
#pragma unroll
  for (int j = 0; j < AHEAD; ++j) columns.load(j * WK + wk, weights[j]);
  accumulator.load(wk);
  const u32 shared = shared_address(block_memory);
  auto fetch = [&](int turn) {
    if (turn < turns)
#pragma unroll
      for (int j = 0; j < STAGE / 16 / THREADS; ++j) {
        const int i = j * THREADS + threadIdx.x, slice = turn * WK + i / (BM * 8), at = i % (BM * 8) * 16;
        const u8* from = p.image + ((long long)slice * image_rows(p) + first_row) * SLICE + at;
        if (slice < all_slices && at < rows * SLICE) copy_async(shared + turn % STAGES * STAGE + i * 16, from);
      }
    asm volatile("cp.async.commit_group;" ::: "memory");
  };
#pragma unroll
  for (int i = 0; i < STAGES - 1; ++i) fetch(i);

  for (int base = 0; base < turns; base += AHEAD)
#pragma unroll
    for (int j = 0; j < AHEAD; ++j) {
      const int turn = base + j;
      if (turn >= turns) break;
      asm volatile("cp.async.wait_group %0;" ::"n"(STAGES - 2) : "memory");
      __syncthreads();
      fetch(turn + STAGES - 1);
      const int slice = turn * WK + wk;
      if (slice >= all_slices) continue;
      const u32 stage = shared + turn % STAGES * STAGE + wk * BM * SLICE + lane % 8 * SLICE;
#pragma unroll
      for (int pair = 0; pair < SLABS / 2; ++pair) {
        u32 b[MB][4];  // two slabs, two registers each
        const int unit = place_of(4 * pair + lane / 8) ^ (lane % 8);
#pragma unroll
        for (int m = 0; m < MB; ++m) load_matrices(stage + m * 8 * SLICE + unit * 16, b[m]);
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          u32 a[2][4], operand[MB][2];
          unpack(weights[j], 2 * pair + half, 0, a[0]);
          unpack(weights[j], 2 * pair + half, 1, a[1]);
#pragma unroll
          for (int m = 0; m < MB; ++m)
            operand[m][0] = b[m][2 * half], operand[m][1] = b[m][2 * half + 1];
          accumulator.slab(a, operand);
          accumulator.end_of_slab(2 * pair + half);
        }
      }
      columns.load((turn + AHEAD) * WK + wk, weights[j]);
      accumulator.load(slice + WK);
    }

  auto& sums = accumulator.sums;
  if (WK > 1) {
    asm volatile("cp.async.wait_group 0;" ::: "memory");
    __syncthreads();
    Number* shared_sums = reinterpret_cast<Number*>(block_memory);
    auto place = [&](int k, int i) { return ((k - 1) * WN + wn) * 8 * MB * 32 + i * 32 + lane; };
#pragma unroll
    for (int i = 0; i < 8 * MB; ++i)
      if (wk > 0) shared_sums[place(wk, i)] = sums[i / (4 * MB)][i / 4 % MB][i % 4];
    __syncthreads();
    if (wk > 0) return;
#pragma unroll
    for (int i = 0; i < 8 * MB; ++i)
#pragma unroll
      for (int k = 1; k < WK; ++k) sums[i / (4 * MB)][i / 4 % MB][i % 4] += shared_sums[place(k, i)];
  }
  write_tile(own_product(all), sums, first_row, first_column);
}

// The same for groups. They must not end within a block of four tiles, whose slabs mix their inputs.
template <int MB, int WN, int WK, int STAGES, int AHEAD> DEVICE void gemm_mma_grouped(const Matmuls& p) {
  constexpr int LEAST = BITS < 4 ? 4 / BITS : 1;
  if (p.group_size % SLICE == 0)
    gemm_mma<MB, WN, WK, STAGES, AHEAD, SLABS>(p);
  else
    gemm_mma<MB, WN, WK, STAGES, AHEAD, LEAST>(p);
}
