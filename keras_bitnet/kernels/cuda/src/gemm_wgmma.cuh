// Many rows of activations with `wgmma`, the matrix instruction of compute capability 9.0.
//
// Weights are the A operand, from registers; activations the B operand, from the swizzled image,
// which one thread copies slice by slice to shared memory. A block has two warp groups of 128
// columns each, which overlap each other's unpacking: within one, no instruction is in flight while
// registers change. ptxas (13.0) reuses the A registers of an instruction in flight when there is a
// branch before its wait, so there is none; the tests look at the machine code.
//
// The blocks of a cluster share the inputs. In the end each gets the sums of its part of the rows from
// the others, which are integers: their order is free.
#pragma once
#include "fragments.cuh"

#if __CUDA_ARCH_FEAT_SM90_ALL

constexpr int CONSUMER_WARPS = 8;  // two groups; a thread of a third one feeds them

template <int MB> struct Wgmma;
#define SUM(b) "+r"(sum[b][0]), "+r"(sum[b][1]), "+r"(sum[b][2]), "+r"(sum[b][3])
template <> struct Wgmma<2> {
  DEVICE static void multiply(int (&sum)[2][4], const u32 (&a)[4], u64 b) {
    asm volatile(
        "wgmma.mma_async.sync.aligned.m64n16k32.s32.u8.s8 {"
        "%0, %1, %2, %3, %4, %5, %6, %7"
        "}, {%8, %9, %10, %11}, %12, 1;"
        :SUM(0), SUM(1)
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));
  }
};
template <> struct Wgmma<4> {
  DEVICE static void multiply(int (&sum)[4][4], const u32 (&a)[4], u64 b) {
    asm volatile(
        "wgmma.mma_async.sync.aligned.m64n32k32.s32.u8.s8 {"
        "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15"
        "}, {%16, %17, %18, %19}, %20, 1;"
        :SUM(0), SUM(1), SUM(2), SUM(3)
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));
  }
};
template <> struct Wgmma<8> {
  DEVICE static void multiply(int (&sum)[8][4], const u32 (&a)[4], u64 b) {
    asm volatile(
        "wgmma.mma_async.sync.aligned.m64n64k32.s32.u8.s8 {"
        "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, "
        "%18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
        "}, {%32, %33, %34, %35}, %36, 1;"
        :SUM(0), SUM(1), SUM(2), SUM(3), SUM(4), SUM(5), SUM(6), SUM(7)
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));
  }
};
template <> struct Wgmma<16> {
  DEVICE static void multiply(int (&sum)[16][4], const u32 (&a)[4], u64 b) {
    asm volatile(
        "wgmma.mma_async.sync.aligned.m64n128k32.s32.u8.s8 {"
        "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, "
        "%18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, %32, %33, "
        "%34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, %48, %49, "
        "%50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
        "}, {%64, %65, %66, %67}, %68, 1;"
        :SUM(0), SUM(1), SUM(2), SUM(3), SUM(4), SUM(5), SUM(6), SUM(7), SUM(8), SUM(9),
          SUM(10), SUM(11), SUM(12), SUM(13), SUM(14), SUM(15)
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));
  }
};
#undef SUM

DEVICE void barrier_init(u32 barrier, int arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(arrivals) : "memory");
}
DEVICE void barrier_wait(u32 barrier, u32 phase) {
  asm volatile(
      "{\n.reg .pred done;\nagain:\n"
      "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n@!done bra again;\n}" ::"r"(barrier),
      "r"(phase) : "memory");
}
DEVICE void barrier_arrive(u32 barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory");
}
DEVICE void barrier_expect(u32 barrier, u32 bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes)
               : "memory");
}
DEVICE void copy_bulk(u32 to, const void* from, u32 bytes, u32 barrier) {
  asm volatile(
      "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(to),
      "l"(from), "r"(bytes), "r"(barrier) : "memory");
}

// Rows of 128 bytes, swizzled, eight of them 1024 bytes apart from the next eight.
DEVICE u64 describe(u32 address) {
  return (u64)((address & 0x3ffff) >> 4) | (u64)1 << 16 | (u64)(1024 >> 4) << 32 | (u64)1 << 62;
}

// The A operand of slab `s` of a slice for set `set`: codes times 2^(BITS * (s % FACTORS)), which saves
// shifts. The sums of each factor are kept apart; 98,304 inputs do not overflow them.
template <int FACTORS> DEVICE void unpack_scaled(const uint4 (&w)[QUADS], int s, int set, u32 (&a)[4]) {
  if constexpr (BITS == 8) {
    unpack(w, s, set, a);
  } else {
#pragma unroll
    for (int i = 0; i < 4; ++i) {  // two columns, in one unit of the image and in the next
      const int quad = BITS == 1 ? 0 : s / SHIFTS * 2 + i / 2;
      const int place = s % SHIFTS + (BITS == 1 ? i / 2 * SHIFTS : 0), kept = s % FACTORS;
      a[i] = (word(w[quad], 2 * set + i % 2) >> (BITS * (place - kept))) & (MASK << (BITS * kept));
    }
  }
}

// Blocks of 128 rows share nothing: there is no memory for the sums of others.
template <int MB> constexpr bool ALONE = MB == 16;
template <int MB> DEVICE bool sharing() { return !ALONE<MB> && cluster_size() > 1; }

// The slices of this block of a cluster: as many for each as it takes turns, `round` at a time.
struct Share {
  int first = 0, count;

  DEVICE Share(const Matmul& p, int round, bool alone) : count(slices(p)) {
    if (alone) return;
    const int all = count, together = cluster_size() * round;
    const int each = (all + together - 1) / together * round;
    first = cluster_rank() * each;
    count = max(min(all - first, each), 0);
  }
};

// One thread copies the activations, a slice at a time. Past the end there is nothing to copy, but
// all groups make the same number of turns, without a branch.
template <int MB, int ROUND, int STAGES>
DEVICE void feed(const Matmul& p, Share share, int first_row, u32 shared, u32 full, u32 empty) {
  constexpr int BM = 8 * MB, STAGE = BM * SLICE;
  const u32 bytes = min(BM, image_rows(p) - first_row) * SLICE;
  for (int i = 0; i < (share.count + ROUND - 1) / ROUND * ROUND; ++i) {
    const int stage = i % STAGES;
    if (i >= STAGES) barrier_wait(empty + 8 * stage, (i / STAGES - 1) & 1);
    if (i >= share.count) {
      barrier_arrive(full + 8 * stage);
      continue;
    }
    barrier_expect(full + 8 * stage, bytes);
    const u8* from = p.image + ((long long)(share.first + i) * image_rows(p) + first_row) * SLICE;
    copy_bulk(shared + stage * STAGE, from, bytes, full + 8 * stage);
  }
}

// Adds the sums of the blocks of a cluster: those of some blocks of eight rows, from `begin` to `end`.
// Behind the stages there is a place for every block and pair of it.
template <int MB> DEVICE void add_shares(Tile<int, MB>& sums, void* memory, int& begin, int& end) {
  const int blocks = cluster_size(), rank = cluster_rank();
  const int each = max(MB / blocks, 1), shift = 31 - __clz(each);  // a power of two
  int4* const places = static_cast<int4*>(memory) + threadIdx.x;
  auto place = [&](int source, int b, int set) {
    return places + ((source * each + (b & (each - 1))) * 2 + set) * (32 * CONSUMER_WARPS);
  };
  cluster_wait();  // all blocks have begun
#pragma unroll
  for (int b = 0; b < MB; ++b) {
    if (b >> shift == rank) continue;
#pragma unroll
    for (int set = 0; set < 2; ++set) {
      const int(&v)[4] = sums[set][b];
      const u32 there = address_in_block(place(rank, b, set), b >> shift);
      asm volatile("st.shared::cluster.v4.s32 [%0], {%1, %2, %3, %4};" ::"r"(there), "r"(v[0]), "r"(v[1]), "r"(v[2]),
                   "r"(v[3]) : "memory");
    }
  }
  cluster_arrive();
  cluster_wait();
  begin = min(rank * each, MB), end = min(begin + each, MB);
#pragma unroll
  for (int b = 0; b < MB; ++b) {
    if (b < begin || b >= end) continue;
    for (int source = 0; source < blocks; ++source) {
      if (source == rank) continue;
#pragma unroll
      for (int set = 0; set < 2; ++set) {
        const int4 v = *place(source, b, set);
        int(&sum)[4] = sums[set][b];
        sum[0] += v.x, sum[1] += v.y, sum[2] += v.z, sum[3] += v.w;
      }
    }
  }
}

template <int MB, int STAGES, int AHEAD, int FACTORS>
DEVICE void consume(const Matmul& p, Share share, int first_row, u32 shared, u32 full, u32 empty) {
  constexpr int BM = 8 * MB, STAGE = BM * SLICE;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int first_column = (blockIdx.y * CONSUMER_WARPS + warp) * 32;
  Columns columns(p, first_column, share.first, share.first + share.count);
  uint4 weights[AHEAD][QUADS];
  if (p.weights_ready)
#pragma unroll
    for (int j = 0; j < AHEAD; ++j) columns.load(j, weights[j]);
  wait_for_previous();
  if (!p.weights_ready)
#pragma unroll
    for (int j = 0; j < AHEAD; ++j) columns.load(j, weights[j]);

  Tile<int, MB> apart[FACTORS] = {};
  // Past the end the weights are zeros and the activations those of an earlier slice.
  for (int base = 0; base < share.count; base += AHEAD) {
    columns.skip(AHEAD);
#pragma unroll
    for (int j = 0; j < AHEAD; ++j) {
      const int i = base + j, stage = i % STAGES;
      u32 a[SLABS][2][4];
#pragma unroll
      for (int s = 0; s < SLABS; ++s)
#pragma unroll
        for (int set = 0; set < 2; ++set) unpack_scaled<FACTORS>(weights[j], s, set, a[s][set]);
      columns.load(j, weights[j]);
      barrier_wait(full + 8 * stage, i / STAGES & 1);
      const u64 b = describe(shared + stage * STAGE);
      asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
#pragma unroll
      for (int s = 0; s < SLABS; ++s)
#pragma unroll
        for (int set = 0; set < 2; ++set) Wgmma<MB>::multiply(apart[s % FACTORS][set], a[s][set], b + 2 * s);
      asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
      asm volatile("wgmma.wait_group.sync.aligned 0;" ::: "memory");
#pragma unroll
      for (int s = 0; s < SLABS; ++s)  // the A registers stay in use until here
#pragma unroll
        for (int set = 0; set < 2; ++set)
#pragma unroll
          for (int r = 0; r < 4; ++r) asm volatile("" : "+r"(a[s][set][r])::"memory");
      if (lane == 0) barrier_arrive(empty + 8 * stage);
    }
  }

  Tile<int, MB>& sums = apart[0];
#pragma unroll
  for (int f = 1; f < FACTORS; ++f)
#pragma unroll
    for (int i = 0; i < 8 * MB; ++i)
      sums[i / (4 * MB)][i / 4 % MB][i % 4] += apart[f][i / (4 * MB)][i / 4 % MB][i % 4] >> (BITS * f);
  int begin = 0, end = MB;
  if (sharing<MB>()) add_shares<MB>(sums, block_memory + STAGES * STAGE, begin, end);
  write_tile<int, MB>(p, sums, first_row, first_column, begin, end);
}

template <int MB, int STAGES, int AHEAD, int FACTORS>
DEVICE void gemm_wgmma(const Matmul& p) {
  __shared__ __align__(8) u64 barriers[2 * STAGES];
  const u32 shared = shared_address(block_memory), full = shared_address(barriers);
  const u32 empty = full + 8 * STAGES;
  const Share share(p, AHEAD, ALONE<MB>);
  const int first_row = blockIdx.x / (ALONE<MB> ? 1 : cluster_size()) * (8 * MB);
  if (threadIdx.x == 0) {
    for (int i = 0; i < STAGES; ++i) {
      barrier_init(full + 8 * i, 1);
      barrier_init(empty + 8 * i, CONSUMER_WARPS);
    }
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
  }
  __syncthreads();
  if (sharing<MB>()) cluster_arrive();
  if (threadIdx.x >= 32 * CONSUMER_WARPS) {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 24;");
    wait_for_previous();
    if (threadIdx.x == 32 * CONSUMER_WARPS) feed<MB, AHEAD, STAGES>(p, share, first_row, shared, full, empty);
    __syncwarp();
    if (sharing<MB>()) {
      cluster_wait();
      cluster_arrive();
      cluster_wait();
    }
  } else {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 240;");
    consume<MB, STAGES, AHEAD, FACTORS>(p, share, first_row, shared, full, empty);
  }
}

#endif
