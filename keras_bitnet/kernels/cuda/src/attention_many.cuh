// Attention of several new tokens to a cache, in two kernels: one turns the new keys and writes the new
// rows of the cache, the other turns the queries and attends to it.
//
// A warp has 16 queries of a head, and the warps of a block go through the same tiles of keys with a
// softmax so far each (maximum, sum and weighted sum, Dao et al. 2022, https://arxiv.org/abs/2205.14135).
// Products of float32 are three of tensor cores (`mma`, TF32): a number is a large part of 11 bits and
// what that leaves, and of the products only that of two small parts is left out. Keys and values of 16
// or 8 bits are a large part alone.
#pragma once
#include "attention.cuh"

// HEAD: elements of a head, at most. Blocks of large heads are smaller, as their rows lie in shared memory.
template <int HEAD> constexpr int MANY_WARPS = HEAD <= 128 ? 4 : 2;
template <int HEAD> constexpr int MANY_KEYS = HEAD <= 128 ? 32 : 16;  // of a tile
template <int HEAD> constexpr int MANY_BLOCKS = HEAD <= 64 ? 3 : 2;  // of a multiprocessor
template <int HEAD> constexpr int ROW_STEP = HEAD + 4;                // floats from a row to the next: no two in a bank

// The place of a new token in tables of angles, or 0.
DEVICE long long table_place(const Attention& p, int token) {
  return blockIdx.z * (long long)p.table_step + (long long)token * p.head_dim;
}

// Writes the new keys and values of a head to the cache: a warp for each.
template <class C> DEVICE void write_rows(const Attention& p) {
  constexpr int PARTS = 8;  // of 32 elements
  const int token = blockIdx.x, lane = threadIdx.x % 32;
  const bool is_key = threadIdx.x < 32;
  let_next_start();
  wait_for_previous();
  const long long from = ((long long)blockIdx.z * p.tokens + token) * p.key_heads + blockIdx.y;
  const long long row = ((long long)blockIdx.z * p.key_heads + blockIdx.y) * p.length + first_token(p) + token;
  float kept[PARTS];
#pragma unroll
  for (int i = 0; i < PARTS; ++i) {
    const int d = 32 * i + lane;
    kept[i] = 0.f;
    if (d < p.head_dim)
      kept[i] = is_key ? turned(p, p.key, from, d, table_place(p, token)) : read(p.value, from * p.head_dim + d, p.dtype);
  }
  const float scale = keep<C>(kept);
#pragma unroll
  for (int i = 0; i < PARTS; ++i) {
    const int d = 32 * i + lane;
    if (d < p.head_dim) put<C>(is_key ? p.key_cache : p.value_cache, row * p.head_dim + d, kept[i]);
  }
  if (DTYPE_OF<C> == 3 && lane == 0) (is_key ? p.key_scale : p.value_scale)[row] = scale;
}

// A number as operands of TF32, of which the tensor cores read 19 bits: its first 11, and what is left.
struct Split {
  u32 large, small;
};
DEVICE Split split(float x) {
  const u32 large = __float_as_uint(x) & 0xffffe000u;
  return {large, __float_as_uint(__fsub_rn(x, __uint_as_float(large)))};
}

DEVICE void multiply(float (&sum)[4], const u32 (&a)[4], u32 b0, u32 b1) {
  asm(
      "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// 16 rows of eight numbers each, as a warp holds them.
struct Rows {
  u32 large[4], small[4];

  DEVICE Rows(float a0, float a1, float a2, float a3) {
    const Split parts[4] = {split(a0), split(a1), split(a2), split(a3)};
#pragma unroll
    for (int i = 0; i < 4; ++i) large[i] = parts[i].large, small[i] = parts[i].small;
  }
};

// large += the product of the large parts, small += the others. The tensor cores cut off what they add, so a sum should
// be of few products, and small ones among themselves. EXACT: b is a large part alone.
template <bool EXACT> DEVICE void multiply(float (&large)[4], float (&small)[4], const Rows& a, float b0, float b1) {
  const Split x = split(b0), y = split(b1);
  multiply(small, a.small, x.large, y.large);
  if (!EXACT) multiply(small, a.large, x.small, y.small);
  multiply(large, a.large, x.large, y.large);
}

// Copies a tile of keys or values as floats; rows from `end` on, which nobody wrote, become zeros. Those of float32 are
// on their way until `copy_wait`.
template <class C, int HEAD>
DEVICE void load_tile(float* to, const void* cache, long long row, int first, int end, int head_dim) {
  constexpr int THREADS = 32 * MANY_WARPS<HEAD>, FOURS = HEAD / 4, COUNT = MANY_KEYS<HEAD> * FOURS / THREADS;
  const char* from = static_cast<const char*>(cache) + row * head_dim * C::SIZE;
#pragma unroll
  for (int i = 0; i < COUNT; ++i) {
    const int at = i * THREADS + threadIdx.x, token = first + at / FOURS, d = 4 * (at % FOURS);
    float* const place = to + at / FOURS * ROW_STEP<HEAD> + d;
    const bool there = token < end && d < head_dim;
    const char* const four = from + ((long long)token * head_dim + d) * C::SIZE;
    if constexpr (DTYPE_OF<C> == 0) {
      copy_or_zero<16>(place, there ? four : from, there);
    } else {
      Four<C> v = {};
      if (there) v.raw = load_raw<C>(four);
      *reinterpret_cast<float4*>(place) = make_float4(element(v, 0), element(v, 1), element(v, 2), element(v, 3));
    }
  }
  copy_commit();
}

// What a query sees of a tile: a bit for each of COUNT keys from the token `first` on. Bytes of the mask are 0 or 1.
template <int COUNT> struct Seen {
  u32 words[COUNT / 4];

  // Asks for them. `own`: the query, `at`: the first of these keys.
  DEVICE void load(const Attention& p, int own, int at, int end) {
#pragma unroll
    for (int i = 0; i < COUNT / 4; ++i) words[i] = 0;
    if (!p.mask || own >= p.tokens) return;
    const u8* const mask = p.mask + blockIdx.z * p.mask_step + (long long)own * p.length;
    if (p.length % COUNT == 0 && at + COUNT <= p.length && reinterpret_cast<u64>(p.mask) % COUNT == 0) {
#pragma unroll
      for (int i = 0; i < COUNT / 4; i += 2) {
        const uint2 pair = *reinterpret_cast<const uint2*>(mask + at + 4 * i);
        words[i] = pair.x;
        words[i + 1] = pair.y;
      }
    } else {
#pragma unroll
      for (int i = 0; i < COUNT; ++i)
        if (at + i < end) words[i / 4] |= (u32)(mask[at + i] != 0) << 8 * (i % 4);
    }
  }

  DEVICE u32 bits(const Attention& p, int own, int at, int index, int end) const {
    u32 seen = 0;
#pragma unroll
    for (int i = 0; i < COUNT / 4; ++i) seen |= ((words[i] & 0x01010101u) * 0x10204080u >> 28) << 4 * i;
    const int most = min(p.mask ? end : min(end, index + own + 1), at + COUNT) - at;
    const u32 written = most <= 0 || own >= p.tokens ? 0 : (1u << most) - 1;
    return p.mask ? seen & written : written;
  }
};

template <class C, int HEAD> DEVICE void attend_many(const Attention& p) {
  constexpr int WARPS = MANY_WARPS<HEAD>, THREADS = 32 * WARPS, QUERIES = 16 * WARPS;
  constexpr int KEYS = MANY_KEYS<HEAD>, STEP = ROW_STEP<HEAD>, COUNT = QUERIES * KEYS / THREADS;
  constexpr bool EXACT = DTYPE_OF<C> != 0;
  static_assert(2 * COUNT == KEYS, "two threads have the mask of a query");
  __shared__ u32 seen[2][QUERIES];      // bits of keys, of this tile and the next
  __shared__ float scales[2][2][KEYS];  // likewise, of keys and values
  float* const query = reinterpret_cast<float*>(block_memory);
  float* const keys = query + QUERIES * STEP;
  float* const values = keys + KEYS * STEP;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, group = lane / 4, four = lane % 4;
  const int head = blockIdx.y, key_head = head / (p.heads / p.key_heads);
  // Those that see most come first.
  const int first_query = (gridDim.x - 1 - blockIdx.x) * QUERIES;
  const long long row = ((long long)blockIdx.z * p.key_heads + key_head) * p.length;
  wait_for_previous();

  const int index = first_token(p), end = index + p.tokens;
  const int last = p.mask ? end : min(end, index + first_query + QUERIES);
  const int own = first_query + (int)threadIdx.x / 2, part = threadIdx.x % 2 * COUNT;  // of the mask
  Seen<COUNT> mask;
  // The first tile from `first` on of which a query sees a key, or behind the last. What they see is kept at `place`.
  // All threads have passed a barrier then, but behind the last. The mask of `first` was asked for.
  auto find = [&](int first, int place) {
    for (; first < last; first += KEYS) {
      const u32 bits = mask.bits(p, own, first + part, index, end);
      const bool any = __syncthreads_or(bits != 0);
      if (any) {
        const u32 others = __shfl_xor_sync(~0u, bits, 1);
        if (part == 0) seen[place][threadIdx.x / 2] = bits | others << COUNT;
        if (DTYPE_OF<C> == 3 && threadIdx.x < KEYS) {
          const int token = min(first + (int)threadIdx.x, end - 1);
          scales[place][0][threadIdx.x] = p.key_scale[row + token];
          scales[place][1][threadIdx.x] = p.value_scale[row + token];
        }
        break;
      }
      mask.load(p, own, first + KEYS + part, end);
    }
    return first;
  };
  mask.load(p, own, part, end);
#pragma unroll 16
  for (int at = threadIdx.x; at < QUERIES * HEAD; at += THREADS) {
    const int q = at / HEAD, d = at % HEAD, token = first_query + q;
    float value = 0.f;
    if (token < p.tokens && d < p.head_dim)
      value = turned(p, p.query, ((long long)blockIdx.z * p.tokens + token) * p.heads + head, d, table_place(p, token));
    query[q * STEP + d] = value;
  }
  // Of rows `group` and `group + 8` of the warp.
  float largest[2] = {UNSEEN, UNSEEN}, sum[2] = {0.f, 0.f}, y[HEAD / 8][4];
#pragma unroll
  for (int n = 0; n < HEAD / 8; ++n)
#pragma unroll
    for (int i = 0; i < 4; ++i) y[n][i] = 0.f;

  int first = find(0, 0), place = 0;
  if (first < last) {
    load_tile<C, HEAD>(keys, p.key_cache, row, first, end, p.head_dim);
    load_tile<C, HEAD>(values, p.value_cache, row, first, end, p.head_dim);
  }
  while (first < last) {
    mask.load(p, own, first + KEYS + part, end);
    copy_wait<1>();  // the keys
    __syncthreads();
    float scores[KEYS / 8][4] = {}, rest[KEYS / 8][4] = {};
    const float* const from = query + (16 * warp + group) * STEP + four;
#pragma unroll 4
    for (int d = 0; d < HEAD; d += 8) {
      const Rows a(from[d], from[8 * STEP + d], from[d + 4], from[8 * STEP + d + 4]);
#pragma unroll
      for (int n = 0; n < KEYS / 8; ++n) {
        const float* const key = keys + (8 * n + group) * STEP + four + d;
        multiply<EXACT>(scores[n], rest[n], a, key[0], key[4]);
      }
    }
    const int next = find(first + KEYS, 1 - place);
    // The next keys are on their way while these values are multiplied, and the next values with the next keys.
    if (next < last) load_tile<C, HEAD>(keys, p.key_cache, row, next, end, p.head_dim);
    const u32 sees[2] = {seen[place][16 * warp + group], seen[place][16 * warp + group + 8]};
    float most[2] = {largest[0], largest[1]};
#pragma unroll
    for (int n = 0; n < KEYS / 8; ++n)
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int key = 8 * n + 2 * four + i % 2;
        float score = __fmul_rn(__fadd_rn(scores[n][i], rest[n][i]), p.scale);
        if (DTYPE_OF<C> == 3) score = __fmul_rn(score, scales[place][0][key]);
        score = sees[i / 2] >> key & 1 ? score : __uint_as_float(0xff800000u);  // its weight is 0
        scores[n][i] = score;
        most[i / 2] = fmaxf(most[i / 2], score);
      }
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      most[r] = fmaxf(most[r], __shfl_xor_sync(~0u, most[r], 1));
      most[r] = fmaxf(most[r], __shfl_xor_sync(~0u, most[r], 2));
      const float shrink = __expf(largest[r] - most[r]);
      largest[r] = most[r];
      sum[r] *= shrink;
#pragma unroll
      for (int n = 0; n < HEAD / 8; ++n) {
        y[n][2 * r] *= shrink;
        y[n][2 * r + 1] *= shrink;
      }
    }
#pragma unroll
    for (int n = 0; n < KEYS / 8; ++n)
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const float weight = __expf(scores[n][i] - largest[i / 2]);
        sum[i / 2] += weight;
        scores[n][i] = DTYPE_OF<C> == 3 ? __fmul_rn(weight, scales[place][1][8 * n + 2 * four + i % 2]) : weight;
      }
    if (next < last)
      copy_wait<1>();  // the values
    else
      copy_wait<0>();
    __syncthreads();
    const float* const value = values + 2 * four * STEP + group;
#pragma unroll
    for (int n = 0; n < KEYS / 8; n += 2) {
      // A lane has the weights of keys 2 * four and 2 * four + 1, so these are its columns four and four + 4.
      const Rows a[2] = {{scores[n][0], scores[n][2], scores[n][1], scores[n][3]},
                         {scores[n + 1][0], scores[n + 1][2], scores[n + 1][1], scores[n + 1][3]}};
#pragma unroll
      for (int m = 0; m < HEAD / 8; ++m) {
        float large[4] = {}, small[4] = {};
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          const float* const of = value + 8 * (n + i) * STEP + 8 * m;
          multiply<EXACT>(large, small, a[i], of[0], of[STEP]);
        }
#pragma unroll
        for (int i = 0; i < 4; ++i) y[m][i] = __fadd_rn(y[m][i], __fadd_rn(large[i], small[i]));
      }
    }
    if (next < last) {
      __syncthreads();  // the values have been read
      load_tile<C, HEAD>(values, p.value_cache, row, next, end, p.head_dim);
    }
    first = next;
    place = 1 - place;
  }
  let_next_start();  // not before: what then waits would take room from other blocks

#pragma unroll
  for (int r = 0; r < 2; ++r) {
    sum[r] += __shfl_xor_sync(~0u, sum[r], 1);
    sum[r] += __shfl_xor_sync(~0u, sum[r], 2);
    const float factor = __fdiv_rn(1.f, sum[r]);
    const int token = first_query + 16 * warp + group + 8 * r;
    if (token >= p.tokens) continue;
    const long long to = (((long long)blockIdx.z * p.tokens + token) * p.heads + head) * p.head_dim;
#pragma unroll
    for (int n = 0; n < HEAD / 8; ++n)
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const int d = 8 * n + 2 * four + i;
        if (d < p.head_dim) store(p.y, to + d, p.dtype, __fmul_rn(y[n][2 * r + i], factor));
      }
  }
}
