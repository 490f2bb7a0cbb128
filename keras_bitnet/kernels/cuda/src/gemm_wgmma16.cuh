// Many rows of activations that stay float, of 16 bits: `wgmma` with 16-bit operands. A block has four warp groups
// of 64 columns each.
//
// Weights become code + offset, which 16 bits hold, so every product is exact; what is rounded are their sums, in
// float32, and these get the scales. (What splits the numbers into codes of 8 bits loses 2^-16 of the largest one.)
#pragma once
#include "wgmma.cuh"

#if __CUDA_ARCH_FEAT_SM90_ALL

// The bits of a number: 2^MANTISSA, to which a code of so many bits can be added by setting bits.
template <class T> constexpr int MANTISSA = T::DTYPE == 1 ? 7 : 10;
template <class T> constexpr u32 MAGIC = T::DTYPE == 1 ? 0x43004300 : 0x64006400;
// A code may lie at PLACES places from LOWEST on, so that one shift serves them all. Half an offset needs LOWEST 1.
template <class T> constexpr int PLACES = BITS == 1 ? 4 : BITS == 2 || (BITS == 4 && T::DTYPE == 2) ? 2 : 1;
constexpr int LOWEST = BITS <= 2 ? 1 : 0;

DEVICE u32 multiply_add(BF16, u32 a, u32 b, u32 c) {
  asm("fma.rn.bf16x2 %0, %0, %1, %2;" : "+r"(a) : "r"(b), "r"(c));
  return a;
}
DEVICE u32 multiply_add(F16, u32 a, u32 b, u32 c) {
  asm("fma.rn.f16x2 %0, %0, %1, %2;" : "+r"(a) : "r"(b), "r"(c));
  return a;
}
DEVICE u32 add(BF16, u32 a, u32 b) {
  asm("add.rn.bf16x2 %0, %0, %1;" : "+r"(a) : "r"(b));
  return a;
}
DEVICE u32 add(F16, u32 a, u32 b) {
  asm("add.rn.f16x2 %0, %0, %1;" : "+r"(a) : "r"(b));
  return a;
}
// (a & mask) | b in one instruction; the compiler makes two where both are constants.
DEVICE u32 and_or(u32 a, u32 mask, u32 b) {
  asm("lop3.b32 %0, %0, %1, %2, 0xea;" : "+r"(a) : "r"(mask), "r"(b));
  return a;
}
DEVICE u32 twice(u32 half) { return half * 0x00010001u; }

// Turns a pair of codes, one in each half of a word, into a pair of numbers, code + offset. A word has 16 / BITS.
template <class T> struct Decoder {
  u32 addends[PLACES<T>];

  DEVICE Decoder(const Activations& p) {
    const float offset = (float)p.step_offset * p.inverse_step;
#pragma unroll
    for (int i = 0; i < PLACES<T>; ++i) {
      const float v = offset - (float)(1 << (MANTISSA<T> - LOWEST - BITS * i));
      addends[i] = pack_pair(T::DTYPE, v, v);
    }
  }
  DEVICE u32 operator()(u32 codes, int pair) const {
    if constexpr (BITS > MANTISSA<T>) {  // the highest bit stands for 128: the offset is -128
      codes >>= 8 * pair;
      return add(T{}, and_or(codes, 0x007f007f, MAGIC<T>), and_or(~codes, 0x00800080, 0xc300c300));
    } else {
      constexpr int SPAN = PLACES<T> * BITS;
      const int place = pair % PLACES<T>, shift = pair / PLACES<T> * SPAN - LOWEST, at = LOWEST + BITS * place;
      codes = shift < 0 ? codes << -shift : codes >> shift;
      codes = and_or(codes, twice(((1u << BITS) - 1) << at), MAGIC<T>);
      if (at == 0) return add(T{}, codes, addends[place]);
      const u32 inverse = twice(T::DTYPE == 1 ? (127 - at) << 7 : (15 - at) << 10);  // 2^-at
      return multiply_add(T{}, codes, inverse, addends[place]);
    }
  }
};

// Slab `s` of the eight of a slice.
template <class T> DEVICE void decode(const Decoder<T>& decoder, const uint2 (&w)[QUADS], int s, u32 (&a)[4]) {
  const uint2 v = w[s * BITS / 8];
  const int pair = 2 * (s % (8 / BITS));
  a[0] = decoder(v.x, pair), a[1] = decoder(v.y, pair);
  a[2] = decoder(v.x, pair + 1), a[3] = decoder(v.y, pair + 1);
}

// Writes two columns of every row that this lane holds, of the blocks of eight rows from `begin` to `end`.
template <class T, bool GROUPED, bool WHOLE, int MB>
DEVICE void write_pairs(const Matmul& p, const float (&sums)[MB][4], int first_row, int first_column, int begin,
                        int end) {
  const int lane = threadIdx.x % 32, n = first_column + 2 * (lane / 4);
  float weight_scale[2], bias[2];
#pragma unroll
  for (int c = 0; c < 2; ++c) {
    const int column = min(n + c, p.n - 1);
    weight_scale[c] = GROUPED ? 1.f : column_scale(p, column);
    bias[c] = p.bias ? __ldg(p.bias + column) : -0.f;  // which changes no number
  }
#pragma unroll
  for (int b = 0; b < MB; ++b) {
    if (b < begin || b >= end) continue;
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const int row = first_row + 8 * b + 2 * (lane % 4) + r;
      const long long place = (long long)row * p.n + n;
      float v[2];
#pragma unroll
      for (int c = 0; c < 2; ++c) v[c] = __fadd_rn(__fmul_rn(sums[b][2 * c + r], weight_scale[c]), bias[c]);
      if (WHOLE)
        store_pair_if(row < p.rows, static_cast<u16*>(p.y) + place, pack_pair(T::DTYPE, v[0], v[1]));
      else
        for (int c = 0; c < 2 && row < p.rows && n + c < p.n; ++c) store(p.y, place + c, T::DTYPE, v[c]);
    }
  }
}

// Float sums; GROUPED: divided by `scales`, those of the open group. As it opens, what the groups before gave is
// scaled anew, so one set of registers holds all.
template <bool GROUPED, int MB> struct FloatSums;
template <int MB> struct FloatSums<false, MB> {
  float sums[1][MB][4] = {};

  DEVICE FloatSums(const Matmul&, int, int) {}
  template <int PART> DEVICE void multiply_next(const Matmul&, u32 (&)[PART][1][4]) {}
  DEVICE void finish() {}
};
template <int MB> struct FloatSums<true, MB> {
  float sums[1][MB][4] = {};
  float scales[2] = {}, next[2];  // of this lane's columns
  bool without[2];                // whether a column has no weights in this group: its scale is 0 or next to it
  int column, group, left = 0;    // the group of `next`; inputs left of the open one

  DEVICE FloatSums(const Matmul& p, int column, int input) : column(column), group(min(input, p.k - 1) / p.group_size) {
    fetch(p);
    open(p);
    left -= input % p.group_size;
  }
  DEVICE void fetch(const Matmul& p) {
    const float* const row = p.scale + (long long)group * p.scale_columns;
#pragma unroll
    for (int c = 0; c < 2; ++c) next[c] = load_after(row + min(column + c, p.scale_columns - 1));
  }
  DEVICE void open(const Matmul& p) {
    constexpr float LEAST = 0x1p-60f;  // of the scale before
    float ratio[2];
#pragma unroll
    for (int c = 0; c < 2; ++c) {
      without[c] = !(fabsf(next[c]) > LEAST * fabsf(scales[c]));
      ratio[c] = without[c] ? 1.f : __fdividef(scales[c], next[c]);
      scales[c] = without[c] ? scales[c] : next[c];
    }
#pragma unroll
    for (int b = 0; b < MB; ++b)
#pragma unroll
      for (int i = 0; i < 4; ++i) sums[0][b][i] = __fmul_rn(sums[0][b][i], ratio[i / 2]);
    left = p.group_size;
    if ((group + 1) * p.group_size < p.k) ++group;  // the last one goes on to the end of the slices
    fetch(p);
  }
  // Before the inputs of a part are multiplied.
  template <int PART> DEVICE void multiply_next(const Matmul& p, u32 (&a)[PART][1][4]) {
    if (left == 0) open(p);
    left -= 16 * PART;
    if (__any_sync(~0u, without[0] || without[1]))
#pragma unroll
      for (int s = 0; s < PART; ++s)
#pragma unroll
        for (int r = 0; r < 4; ++r)
          if (without[r % 2]) a[s][0][r] = 0;
  }
  DEVICE void finish() {
#pragma unroll
    for (int b = 0; b < MB; ++b)
#pragma unroll
      for (int i = 0; i < 4; ++i) sums[0][b][i] = __fmul_rn(sums[0][b][i], scales[i / 2]);
  }
};

// Two warp groups multiply in turn, so that one unpacks its weights meanwhile. Each has a barrier, where it waits for
// the other. Of one group: nothing.
template <int GROUPS_> struct Turns {
  int group;

  DEVICE Turns(int group) : group(group) {
    if (late()) pass();
  }
  DEVICE bool late() const { return group >= GROUPS_ / 2; }
  DEVICE void wait() const { asm volatile("bar.sync %0, 256;" ::"r"(1 + group) : "memory"); }
  DEVICE void pass() const { asm volatile("bar.arrive %0, 256;" ::"r"(1 + (group ^ GROUPS_ / 2)) : "memory"); }
  DEVICE void finish() const {
    if (!late()) wait();
  }
};
template <> struct Turns<1> {
  DEVICE Turns(int) {}
  DEVICE void wait() const {}
  DEVICE void pass() const {}
  DEVICE void finish() const {}
};

// Multiplies all slices of a share. PART: slabs that are multiplied together; a group ends with one.
template <class T, int MB, int STAGES, int AHEAD, bool GROUPED, int PART, class Turns>
DEVICE void multiply_share(const Matmul& p, const Share& share, const Ring& ring, const Turns& turns,
                           Columns<uint2>& columns, uint2 (&weights)[AHEAD][QUADS], FloatSums<GROUPED, MB>& sums) {
  constexpr int STAGE = 8 * MB * LINE, LINE_SLABS = LINE / 32, HALVES = 2 * SLICE / LINE;
  const Decoder<T> decoder(p);
  const u64 first_operand = describe(ring.shared);
  for (int base = 0, slot = 0, phase = 0; base < share.count; base += AHEAD) {
#pragma unroll
    for (int j = 0; j < AHEAD; ++j)
#pragma unroll
      for (int half = 0; half < HALVES; ++half) {
        const int stage = slot + HALVES * j + half;
#pragma unroll
        for (int part = 0; part < LINE_SLABS; part += PART) {
          u32 a[PART][1][4];
#pragma unroll
          for (int s = 0; s < PART; ++s) decode(decoder, weights[j], half * LINE_SLABS + part + s, a[s][0]);
          if (part == LINE_SLABS - PART)
            columns.load(j + AHEAD, weights[j], half * QUADS / HALVES, (half + 1) * QUADS / HALVES);
          sums.multiply_next(p, a);
          touch(a);  // unpacked before the group waits
          if (part == 0) barrier_wait(ring.full + 8 * stage, phase);
          turns.wait();
          begin_products();
#pragma unroll
          for (int s = 0; s < PART; ++s)
            Wgmma<T, MB>::multiply(sums.sums[0], a[s][0], first_operand + (stage * STAGE / 16 + 2 * (part + s)));
          end_products(a);
          touch(sums.sums);
          turns.pass();
          if (threadIdx.x % 32 == 0 && part == LINE_SLABS - PART) barrier_arrive(ring.empty + 8 * stage);
        }
      }
    columns.skip(AHEAD);
    slot += HALVES * AHEAD;
    if (slot == STAGES) slot = 0, phase ^= 1;
  }
}

template <class T, int MB, int WARPS, int STAGES, int AHEAD, bool GROUPED>
DEVICE void consume16(const Matmuls& all, const Share& share, int first_row, const Ring& ring, bool sharing) {
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const Matmul p = own_product(all);
  const int first_column = ((blockIdx.y - p.first_block) * WARPS + warp) * 16;
  const Turns<(MB < 16 ? 1 : WARPS / 4)> turns(__shfl_sync(~0u, warp / 4, 0));
  Columns<uint2> columns(p, first_column, share.first, share.first + share.count);
  uint2 weights[AHEAD][QUADS];
  load_first<AHEAD>(p, columns, weights);

  FloatSums<GROUPED, MB> sums(p, first_column + 2 * (lane / 4), share.first * SLICE);
  if (GROUPED && BITS >= 4 && p.group_size % 64)
    multiply_share<T, MB, STAGES, AHEAD, GROUPED, 2>(p, share, ring, turns, columns, weights, sums);
  else
    multiply_share<T, MB, STAGES, AHEAD, GROUPED, 4>(p, share, ring, turns, columns, weights, sums);
  turns.finish();
  sums.finish();
  int begin = 0, end = MB;
  if (sharing) add_shares<WARPS>(sums.sums, block_memory + STAGES * 8 * MB * LINE, begin, end);
  const Matmul last = own_product(all);
  if (last.y_aligned && first_column + 16 <= last.n)
    write_pairs<T, GROUPED, true>(last, sums.sums[0], first_row, first_column, begin, end);
  else
    write_pairs<T, GROUPED, false>(last, sums.sums[0], first_row, first_column, begin, end);
}

template <class T, int MB, int WARPS, int STAGES, int AHEAD, bool GROUPED>
DEVICE void gemm_wgmma16(const Matmuls& p) {
  constexpr bool SHARING = MB < 16;  // blocks of 128 rows have no memory for the sums of others
  const Share share(wide_slices(p), AHEAD, SHARING);
  const int first_row = blockIdx.x / (SHARING ? cluster_size() : 1) * (8 * MB);
  feed_and_consume<MB, 2 * SLICE / LINE, 1, STAGES, WARPS, SHARING, false>(p, share, first_row, [&](Ring ring,
                                                                                             bool sharing) {
    consume16<T, MB, WARPS, STAGES, AHEAD, GROUPED>(p, share, first_row, ring, sharing);
  });
}

#endif
