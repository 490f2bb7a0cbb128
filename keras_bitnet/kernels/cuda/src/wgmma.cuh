// `wgmma`, the matrix instruction of compute capability 9.0, and what its kernels share.
//
// Weights are the A operand, from registers; activations the B operand, from a swizzled image,
// which one thread copies to shared memory, a line of 128 bytes a row at a time. Warp groups of 64
// or 128 columns overlap each other's unpacking: within one, no instruction is in flight while
// registers change. ptxas (13.0) reuses the A registers of an instruction in flight when there is a
// branch before its wait, so there is none; the tests look at the machine code.
//
// The blocks of a cluster share the inputs. In the end each gets the sums of its part of the rows from
// the others, always in the same order.
#pragma once
#include "fragments.cuh"

#if __CUDA_ARCH_FEAT_SM90_ALL

// Instructions of codes: unsigned weights, signed activations; of 16-bit numbers, see BF16 and F16.
struct I8 {};

// Adds the product of 64 columns and 8 * MB rows to `sum`.
template <class Kind, int MB> struct Wgmma;
#define REGISTERS_2 "%0, %1, %2, %3, %4, %5, %6, %7"
#define REGISTERS_4 REGISTERS_2 ", %8, %9, %10, %11, %12, %13, %14, %15"
#define REGISTERS_8                                                                                   \
  REGISTERS_4 ", %16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
#define REGISTERS_16                                                                                  \
  REGISTERS_8 ", %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, %48" \
              ", %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
#define ONE_SUM(c, b) c(sum[b][0]), c(sum[b][1]), c(sum[b][2]), c(sum[b][3])
#define SUMS_2(c) ONE_SUM(c, 0), ONE_SUM(c, 1)
#define SUMS_4(c) SUMS_2(c), ONE_SUM(c, 2), ONE_SUM(c, 3)
#define SUMS_8(c) SUMS_4(c), ONE_SUM(c, 4), ONE_SUM(c, 5), ONE_SUM(c, 6), ONE_SUM(c, 7)
#define SUMS_16(c)                                                                                    \
  SUMS_8(c), ONE_SUM(c, 8), ONE_SUM(c, 9), ONE_SUM(c, 10), ONE_SUM(c, 11), ONE_SUM(c, 12),             \
      ONE_SUM(c, 13), ONE_SUM(c, 14), ONE_SUM(c, 15)
#define WGMMA(KIND, NUMBER, LETTER, MB, ROWS, TYPES, A, B, SIGNS)                                     \
  template <> struct Wgmma<KIND, MB> {                                                                \
    DEVICE static void multiply(NUMBER (&sum)[MB][4], const u32 (&a)[4], u64 b) {                     \
      asm volatile("wgmma.mma_async.sync.aligned.m64n" ROWS TYPES                                     \
                   " {" REGISTERS_##MB "}, {" A "}, " B ", 1" SIGNS ";"                               \
                   : SUMS_##MB(LETTER)                                                                \
                   : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));                             \
    }                                                                                                 \
  };
#define WGMMA_2(...) WGMMA(__VA_ARGS__)
#define OPERANDS_2 "%8, %9, %10, %11", "%12"
#define OPERANDS_4 "%16, %17, %18, %19", "%20"
#define OPERANDS_8 "%32, %33, %34, %35", "%36"
#define OPERANDS_16 "%64, %65, %66, %67", "%68"
#define INTEGER(v) "+r"(v)
#define FLOAT(v) "+f"(v)
#define OF_CODES(MB, ROWS) WGMMA_2(I8, int, INTEGER, MB, ROWS, "k32.s32.u8.s8", OPERANDS_##MB, "")
#define OF_NUMBERS(MB, ROWS)                                                                          \
  WGMMA_2(BF16, float, FLOAT, MB, ROWS, "k16.f32.bf16.bf16", OPERANDS_##MB, ", 1, 1, 0")              \
  WGMMA_2(F16, float, FLOAT, MB, ROWS, "k16.f32.f16.f16", OPERANDS_##MB, ", 1, 1, 0")
OF_CODES(2, "16")
OF_CODES(4, "32")
OF_CODES(8, "64")
OF_CODES(16, "128")
OF_NUMBERS(8, "64")
OF_NUMBERS(16, "128")
#undef REGISTERS_2
#undef REGISTERS_4
#undef REGISTERS_8
#undef REGISTERS_16
#undef ONE_SUM
#undef SUMS_2
#undef SUMS_4
#undef SUMS_8
#undef SUMS_16
#undef WGMMA
#undef WGMMA_2
#undef OPERANDS_2
#undef OPERANDS_4
#undef OPERANDS_8
#undef OPERANDS_16
#undef INTEGER
#undef FLOAT
#undef OF_CODES
#undef OF_NUMBERS

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

// Says that registers are read and written here.
DEVICE void touch(u32& v) { asm volatile("" : "+r"(v)::"memory"); }
DEVICE void touch(float& v) { asm volatile("" : "+f"(v)::"memory"); }
template <class N, int SIZE> DEVICE void touch(N (&v)[SIZE]) {
#pragma unroll
  for (int i = 0; i < SIZE; ++i) touch(v[i]);
}

// The instructions between these two run side by side; no register of theirs may change before they are done.
DEVICE void begin_products() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
template <int SLABS_, int SETS> DEVICE void end_products(u32 (&a)[SLABS_][SETS][4]) {
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
  asm volatile("wgmma.wait_group.sync.aligned 0;" ::: "memory");
  touch(a);  // the A registers stay in use until here
}

// The slices of this block of a cluster: as many for each as it takes turns, `round` at a time.
struct Share {
  int first = 0, count;

  DEVICE Share(int slices, int round, bool sharing = true) : count(slices) {
    if (!sharing) return;
    const int all = count, together = cluster_size() * round;
    const int each = (all + together - 1) / together * round;
    first = cluster_rank() * each;
    count = max(min(all - first, each), 0);
  }
};

// Asks for the weights of the first slices, and waits until the kernel before has ended: first of the two, where that
// one does not write them.
template <int AHEAD, class Unit, int PLACES>
DEVICE void load_first(const Activations& p, const Columns<Unit>& columns, Unit (&weights)[PLACES][QUADS]) {
  if (p.weights_ready)
#pragma unroll
    for (int j = 0; j < AHEAD; ++j) columns.load(j, weights[j]);
  wait_for_previous();
  if (!p.weights_ready)
#pragma unroll
    for (int j = 0; j < AHEAD; ++j) columns.load(j, weights[j]);
}

// One thread copies the activations, a line at a time, of LINES a slice. Past the end there is nothing to
// copy, but where all groups make turns of ROUND, so does this.
template <int MB, int LINES, int ROUND, int STAGES>
DEVICE void feed(const Activations& p, Share share, int first_row, u32 shared, u32 full, u32 empty) {
  constexpr int BM = 8 * MB, STAGE = BM * LINE;
  const u32 bytes = min(BM, image_rows(p) - first_row) * LINE;
  const int count = LINES * share.count;
  for (int i = 0; i < (count + ROUND - 1) / ROUND * ROUND; ++i) {
    const int stage = i % STAGES;
    if (i >= STAGES) barrier_wait(empty + 8 * stage, (i / STAGES - 1) & 1);
    if (i >= count) {
      barrier_arrive(full + 8 * stage);
      continue;
    }
    barrier_expect(full + 8 * stage, bytes);
    const u8* from = p.image + ((long long)(LINES * share.first + i) * image_rows(p) + first_row) * LINE;
    copy_bulk(shared + stage * STAGE, from, bytes, full + 8 * stage);
  }
}

// Adds the sums of the blocks of a cluster: those of some blocks of eight rows, from `begin` to `end`.
// Behind the stages there is a place for every block and pair of it.
template <int WARPS, class N, int SETS, int MB>
DEVICE void add_shares(N (&sums)[SETS][MB][4], void* memory, int& begin, int& end) {
  const int blocks = cluster_size(), rank = cluster_rank();
  const int each = max(MB / blocks, 1), shift = 31 - __clz(each);  // a power of two
  struct __align__(16) Four { N of[4]; };
  Four* const places = static_cast<Four*>(memory) + threadIdx.x;
  auto place = [&](int source, int b, int set) {
    return places + ((source * each + (b & (each - 1))) * SETS + set) * (32 * WARPS);
  };
  cluster_wait();  // all blocks have begun
#pragma unroll
  for (int b = 0; b < MB; ++b) {
    if (b >> shift == rank) continue;
#pragma unroll
    for (int set = 0; set < SETS; ++set) {
      const N(&v)[4] = sums[set][b];
      const u32 there = address_in_block(place(rank, b, set), b >> shift);
      asm volatile("st.shared::cluster.v4.b32 [%0], {%1, %2, %3, %4};" ::"r"(there), "r"(bits_of(v[0])),
                   "r"(bits_of(v[1])), "r"(bits_of(v[2])), "r"(bits_of(v[3])) : "memory");
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
      for (int set = 0; set < SETS; ++set) {
        const Four v = *place(source, b, set);
#pragma unroll
        for (int i = 0; i < 4; ++i) sums[set][b][i] += v.of[i];
      }
    }
  }
}

// Where blocks of four groups make several waves, those of the last one may be NARROW_COLUMNS wide and leave a group
// idle: more multiprocessors have one, and each has less to do. They begin at `wide_blocks`.
template <bool NARROWING> DEVICE int columns_of_block(const Activations& p) {
  return !NARROWING || (int)blockIdx.y < p.wide_blocks ? WGMMA_COLUMNS : NARROW_COLUMNS;
}
template <bool NARROWING> DEVICE int first_column_of_block(const Matmul& p) {
  const int block = blockIdx.y - p.first_block, wide = max(p.wide_blocks - p.first_block, 0);
  return WGMMA_COLUMNS * block - (NARROWING ? (WGMMA_COLUMNS - NARROW_COLUMNS) * max(block - wide, 0) : 0);
}

// The stages in shared memory and the barriers that hand them over: addresses.
struct Ring {
  u32 shared, full, empty;
};

// A block: WARPS, or those that have columns, consume the lines of activations that one thread feeds, whose group
// leaves them its registers.
template <int MB, int LINES, int ROUND, int STAGES, int WARPS, bool SHARING, bool NARROWING, class Consume>
DEVICE void feed_and_consume(const Activations& p, Share share, int first_row, Consume consume) {
  const int warps = columns_of_block<NARROWING>(p) / (WGMMA_COLUMNS / WARPS);
  __shared__ __align__(8) u64 barriers[2 * STAGES];
  Ring ring = {shared_address(block_memory), shared_address(barriers)};
  ring.empty = ring.full + 8 * STAGES;
  const bool sharing = SHARING && cluster_size() > 1;
  if (threadIdx.x == 0) {
    for (int i = 0; i < STAGES; ++i) {
      barrier_init(ring.full + 8 * i, 1);
      barrier_init(ring.empty + 8 * i, warps);
    }
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
  }
  __syncthreads();
  if (sharing) cluster_arrive();
  if (threadIdx.x >= 32 * WARPS) {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 24;");
    wait_for_previous();
    if (threadIdx.x == 32 * WARPS)
      feed<MB, LINES, ROUND, STAGES>(p, share, first_row, ring.shared, ring.full, ring.empty);
    __syncwarp();
    if (sharing) {
      cluster_wait();
      cluster_arrive();
      cluster_wait();
    }
  } else if (warps == WARPS || __shfl_sync(~0u, threadIdx.x / 32, 0) < warps) {
    // A comparison of threadIdx.x with a variable would take the uniform registers from the loop.
    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(WARPS == 8 ? 240 : 112));
    consume(ring, sharing);
  }
}

#endif
