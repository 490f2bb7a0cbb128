// Attention of several new tokens to a cache, in two kernels: one turns the new keys and writes the new
// rows of the cache, the other turns the queries and attends to it.
//
// A warp has 16 queries of a head, and the warps of a block go through the same tiles of keys with a
// softmax so far each (maximum, sum and weighted sum, Dao et al. 2022, https://arxiv.org/abs/2205.14135).
// Products are those of tensor cores with float16 (`mma`). A number of float32 is a large part of 11 bits and a small
// one of what that leaves; of a product only that of two small parts is left out. So that both are float16, numbers are
// multiplied by a power of two: a query by its own, eight keys of a tile (or four) by theirs, and some elements of all
// values of a tile by theirs. Keys and values of 16 or 8 bits are a large part alone.
#pragma once
#include "attention.cuh"

// HEAD: elements of a head, at most. Blocks of large heads are smaller, as their rows lie in shared memory.
template <int HEAD> constexpr int MANY_WARPS = HEAD <= 128 ? 4 : 2;
template <int HEAD> constexpr int MANY_KEYS = HEAD <= 128 ? 32 : 16;   // of a tile
template <int HEAD> constexpr int MANY_BLOCKS = HEAD <= 64 ? 3 : 2;    // of a multiprocessor
template <int HEAD> constexpr int MANY_CHUNKS = HEAD <= 128 ? 1 : 2;   // of a warp's part of a tile
template <int HEAD> constexpr int ROW_STEP = HEAD + 8;                 // halves from a row to the next: no two in a bank

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

// Two numbers as float16: their first 11 bits, and what is left.
struct Split {
  u32 large, small;

  DEVICE Split(float low, float high) {
    large = pack_pair(2, low, high);
    small = pack_pair(2, __fsub_rn(low, half_to_float(large & 0xffffu)), __fsub_rn(high, half_to_float(large >> 16)));
  }
};

// The power of two that brings a number to 2^14 or more and less than 2^15, and one over it.
struct Power {
  float up, down;

  // largest: bits of the magnitude.
  DEVICE explicit Power(u32 largest) {
    const u32 exponent = min(268u - (largest >> 23), 253u);
    up = __uint_as_float(exponent << 23);
    down = __uint_as_float((254u - exponent) << 23);
  }
};

// Bits of the largest magnitude of a warp's numbers, but for those that are none: they shall not change others.
template <int N> DEVICE u32 largest_in_warp(const float (&x)[N]) {
  float largest = 0.f;
#pragma unroll
  for (int i = 0; i < N; ++i) largest = fmaxf(largest, fabsf(x[i]));
  u32 bits = __reduce_max_sync(~0u, __float_as_uint(largest));
  if (bits >= 0x7f800000u) {
    bits = 0;
#pragma unroll
    for (int i = 0; i < N; ++i) {
      const u32 own = __float_as_uint(x[i]) & 0x7fffffffu;
      if (own < 0x7f800000u) bits = max(bits, own);
    }
    bits = __reduce_max_sync(~0u, bits);
  }
  return bits;
}

DEVICE void load_matrices(u32 (&r)[4], u32 address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(address) : "memory");
}
DEVICE void load_transposed(u32 (&r)[4], u32 address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(address) : "memory");
}

DEVICE void multiply(float (&sum)[4], const u32 (&a)[4], u32 b0, u32 b1) {
  asm(
      "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// Rows of float16 in shared memory, large parts and behind all of them the small ones.
template <int ROWS, int HEAD> struct Halves {
  static constexpr int STEP = ROW_STEP<HEAD>, SIZE = 2 * ROWS * STEP;
  u16* at;

  // Where lane `lane` finds its row for four matrices of 8x8 that lie side by side (`across`) or below each other first.
  DEVICE u32 matrices(int lane, bool across) const {
    const int row = across ? lane / 16 * 8 + lane % 8 : lane % 16, column = across ? lane / 8 % 2 * 8 : lane / 16 * 8;
    return shared_address(at + row * STEP + column);
  }
  static DEVICE u32 offset(int row, int column, bool small) { return 2 * ((row + (small ? ROWS : 0)) * STEP + column); }

  // Four neighbours, times a power of two.
  template <class C> DEVICE void put(int row, int column, const Four<C>& v, float up) const {
    u16* const to = at + row * STEP + column;
    if constexpr (DTYPE_OF<C> == 2) {
      *reinterpret_cast<uint2*>(to) = v.raw;
    } else {
      const float x[4] = {element(v, 0) * up, element(v, 1) * up, element(v, 2) * up, element(v, 3) * up};
      put<DTYPE_OF<C> == 0>(to, x);
    }
  }
  template <bool SMALL> static DEVICE void put(u16* to, const float (&x)[4]) {
    const Split low(x[0], x[1]), high(x[2], x[3]);
    *reinterpret_cast<uint2*>(to) = make_uint2(low.large, high.large);
    if (SMALL) *reinterpret_cast<uint2*>(to + ROWS * STEP) = make_uint2(low.small, high.small);
  }
};

// A part of a tile on its way through the registers of a warp: FOURS of each of some neighbouring rows of the cache.
template <class C, int COUNT, int FOURS> struct Part {
  Four<C> v[COUNT];
  int row, column;  // where this thread's first are

  DEVICE void start_at(int first_row, int first_column) {
    const int lane = threadIdx.x % 32;
    row = first_row + (FOURS < 32 ? lane / FOURS : 0);
    column = first_column + 4 * (FOURS < 32 ? lane % FOURS : lane);
  }
  // The others, from there.
  static constexpr DEVICE int down(int i) { return 32 * i / FOURS; }
  static constexpr DEVICE int right(int i) { return 32 * i % FOURS * 4; }

  // Rows from `end` on, which nobody wrote, become zeros. `head`: the rows of this head.
  DEVICE void load(const char* head, int first, int end, int head_dim) {
    const int left = end - first - row;
    const char* const from = head + ((long long)(first + row) * head_dim + column) * C::SIZE;
#pragma unroll
    for (int i = 0; i < COUNT; ++i) {
      v[i] = {};
      if (down(i) < left && column + right(i) < head_dim)
        v[i].raw = load_raw<C>(from + (down(i) * head_dim + right(i)) * C::SIZE);
    }
  }

  // Stores it. Returns what its numbers are to be multiplied by then.
  template <int ROWS, int HEAD> DEVICE float keep(const Halves<ROWS, HEAD>& to) const {
    float up = 1.f, back = 1.f;
    if constexpr (DTYPE_OF<C> < 2) {
      float x[4 * COUNT];
#pragma unroll
      for (int i = 0; i < 4 * COUNT; ++i) x[i] = element(v[i / 4], i % 4);
      const Power power(largest_in_warp(x));
      up = power.up;
      back = power.down;
    }
#pragma unroll
    for (int i = 0; i < COUNT; ++i) to.put(row + down(i), column + right(i), v[i], up);
    return back;
  }
};

// The parts of a warp of a tile of keys or values, in CHUNKS of as many neighbouring rows (DOWN) or elements (RIGHT), each
// with a power of two of its own. Those of float32 that are more than one have no room to be on their way.
template <class C, int COUNT, int FOURS, int DOWN, int RIGHT, int CHUNKS> struct Parts {
  static constexpr bool AHEAD = CHUNKS == 1 || C::SIZE < 4;
  const char* rows;  // of this head
  int end, head_dim, number;
  Part<C, COUNT, FOURS> kept[AHEAD ? CHUNKS : 1];

  DEVICE Parts(const Attention& p, const void* cache, long long row, int end)
      : rows(static_cast<const char*>(cache) + row * p.head_dim * C::SIZE), end(end), head_dim(p.head_dim),
        number((int)threadIdx.x / 32 * CHUNKS) {}

  DEVICE void load(int first, int chunk) {
    auto& part = kept[AHEAD ? chunk : 0];
    part.start_at((number + chunk) * DOWN, (number + chunk) * RIGHT);
    part.load(rows, first, end, head_dim);
  }
  // Asks for those of the tile at `first`, if they can be on their way.
  DEVICE void ask(int first) {
#pragma unroll
    for (int chunk = 0; AHEAD && chunk < CHUNKS; ++chunk) load(first, chunk);
  }
  // Stores them, and what they are to be multiplied by.
  template <int ROWS, int HEAD> DEVICE void keep(int first, const Halves<ROWS, HEAD>& to, float* powers) {
#pragma unroll
    for (int chunk = 0; chunk < CHUNKS; ++chunk) {
      if (!AHEAD) load(first, chunk);
      const float back = kept[AHEAD ? chunk : 0].keep(to);
      if (threadIdx.x % 32 == 0) powers[number + chunk] = back;
    }
  }
};

// Four elements of a query from `d` on, turned, and zeros behind its end. T: its numbers, or Any, read one by one.
struct Any {};
template <class T> constexpr bool IS_READ_WHOLE = true;
template <> constexpr bool IS_READ_WHOLE<Any> = false;

template <class T> DEVICE void load_query(const Attention& p, int token, int head, int d, float (&x)[4]) {
  const bool there = token < p.tokens && d < p.head_dim;
  // Without a branch, so that loads leave together.
  token = min(token, p.tokens - 1);
  d = min(d, p.head_dim - 4);
  const long long row = ((long long)blockIdx.z * p.tokens + token) * p.heads + head, table = table_place(p, token);
  if constexpr (!IS_READ_WHOLE<T>) {
    for (int i = 0; i < 4; ++i) x[i] = turned(p, p.query, row, d + i, table);
  } else {
    const char* const from = static_cast<const char*>(p.query) + row * p.head_dim * T::SIZE;
    const int half = p.head_dim / 2;
    Four<T> own, other;
    Four<F32> cosines = {}, sines = {};
    own.raw = load_raw<T>(from + d * T::SIZE);
    other.raw = load_raw<T>(from + (d < half ? d + half : d - half) * T::SIZE);
    if (p.cosines) {
      cosines.raw = load_raw<F32>(reinterpret_cast<const char*>(p.cosines + table + d));
      sines.raw = load_raw<F32>(reinterpret_cast<const char*>(p.sines + table + d));
    }
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float one = element(own, i), two = element(other, i);
      const float product = __fmul_rn(d < half ? -two : two, element(sines, i));
      x[i] = p.cosines ? rounded(__fadd_rn(__fmul_rn(one, element(cosines, i)), product), T::DTYPE) : one;
    }
  }
#pragma unroll
  for (int i = 0; i < 4; ++i) x[i] = there ? x[i] : 0.f;
}

// Whether four elements of a query, those that they are turned with and their angles lie as `load_query` reads them.
DEVICE bool queries_aligned(const Attention& p) {
  const u64 places = reinterpret_cast<u64>(p.query) | reinterpret_cast<u64>(p.cosines) | reinterpret_cast<u64>(p.sines);
  return p.head_dim % 8 == 0 && places % 16 == 0;
}

// Turns the 16 queries of a warp from `first` on and stores them, each times a power of two. `factor`: of the scores of
// queries `lane / 4` and 8 more.
template <class T, int HEAD>
DEVICE void keep_queries(const Attention& p, int first, int head, const Halves<16, HEAD>& to, float (&factor)[2]) {
  constexpr int PIECES = HEAD / 64;  // of a row: a half warp has it
  const int lane = threadIdx.x % 32, half = lane / 16;
#pragma unroll 4
  for (int q = 0; q < 16; q += 2) {
    float x[PIECES][4], most = 0.f;
#pragma unroll
    for (int i = 0; i < PIECES; ++i) {
      load_query<T>(p, first + q + half, head, 64 * i + lane % 16 * 4, x[i]);
#pragma unroll
      for (int j = 0; j < 4; ++j) most = fmaxf(most, fabsf(x[i][j]));
    }
#pragma unroll
    for (int lanes = 8; lanes; lanes /= 2) most = fmaxf(most, __shfl_xor_sync(~0u, most, lanes));
    const Power power(__float_as_uint(most));
#pragma unroll
    for (int i = 0; i < PIECES; ++i) {
      const float scaled[4] = {x[i][0] * power.up, x[i][1] * power.up, x[i][2] * power.up, x[i][3] * power.up};
      to.template put<true>(to.at + (q + half) * ROW_STEP<HEAD> + 64 * i + lane % 16 * 4, scaled);
    }
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const int of = lane / 4 + 8 * r - q;  // which of these two rows
      const float down = __shfl_sync(~0u, power.down, 16 * (of & 1));
      if (of == 0 || of == 1) factor[r] = __fmul_rn(down, p.scale);
    }
  }
}

// Two neighbours; `i` is even and y lies at a multiple of their size.
DEVICE void store_pair(void* y, long long i, int dtype, float low, float high) {
  if (dtype == 0)
    reinterpret_cast<float2*>(y)[i / 2] = make_float2(low, high);
  else
    reinterpret_cast<u32*>(y)[i / 2] = pack_pair(dtype, low, high);
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
  constexpr int WARPS = MANY_WARPS<HEAD>, THREADS = 32 * WARPS, QUERIES = 16 * WARPS, CHUNKS = MANY_CHUNKS<HEAD>;
  constexpr int KEYS = MANY_KEYS<HEAD>, COUNT = QUERIES * KEYS / THREADS;
  constexpr int GROUP = KEYS / WARPS / CHUNKS, RANGE = HEAD / WARPS / CHUNKS;  // keys, elements of values, of a power
  constexpr int FOURS = GROUP * HEAD / 128;                                    // of a thread
  constexpr bool SMALL = DTYPE_OF<C> == 0;
  static_assert(2 * COUNT == KEYS, "two threads have the mask of a query");
  __shared__ u32 seen[2][QUERIES];      // bits of keys, of this tile and the next
  __shared__ float scales[2][2][KEYS];  // likewise, of keys and values
  __shared__ float key_power[WARPS * CHUNKS], value_power[WARPS * CHUNKS];
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, group = lane / 4, four = lane % 4;
  const Halves<16, HEAD> query{reinterpret_cast<u16*>(block_memory) + warp * Halves<16, HEAD>::SIZE};  // of the warp
  const Halves<KEYS, HEAD> keys{reinterpret_cast<u16*>(block_memory) + WARPS * Halves<16, HEAD>::SIZE};
  const Halves<KEYS, HEAD> values{keys.at + Halves<KEYS, HEAD>::SIZE};
  const int head = blockIdx.x, key_head = head / (p.heads / p.key_heads);
  // Those that see most come first.
  const int first_query = (gridDim.y - 1 - blockIdx.y) * QUERIES;
  const long long row = ((long long)blockIdx.z * p.key_heads + key_head) * p.length;
  wait_for_previous();

  const int index = first_token(p), end = index + p.tokens;
  const int last = p.mask ? end : min(end, index + first_query + QUERIES);
  const int own = first_query + (int)threadIdx.x / 2, part = threadIdx.x % 2 * COUNT;  // of the mask
  Seen<COUNT> mask;
  // The first tile from `first` on of which a query sees a key, or behind the last. What they see is kept at `place`.
  // The mask of `first` was asked for.
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
  float factor[2];  // of the scores of queries `group` and `group + 8`
  if (!queries_aligned(p))
    keep_queries<Any>(p, first_query + 16 * warp, head, query, factor);
  else if (p.dtype == 0)
    keep_queries<F32>(p, first_query + 16 * warp, head, query, factor);
  else if (p.dtype == 1)
    keep_queries<BF16>(p, first_query + 16 * warp, head, query, factor);
  else
    keep_queries<F16>(p, first_query + 16 * warp, head, query, factor);
  Parts<C, FOURS, HEAD / 4, GROUP, 0, CHUNKS> key_parts(p, p.key_cache, row, end);
  Parts<C, FOURS, RANGE / 4, 0, RANGE, CHUNKS> value_parts(p, p.value_cache, row, end);

  int first = find(0, 0), place = 0;
  if (first < last) {
    mask.load(p, own, first + KEYS + part, end);
    key_parts.ask(first);
    value_parts.ask(first);
    key_parts.keep(first, keys, key_power);
    value_parts.keep(first, values, value_power);
  }
  __syncthreads();

  // Of rows `group` and `group + 8` of the warp.
  float largest[2] = {UNSEEN, UNSEEN}, sum[2] = {0.f, 0.f}, y[HEAD / 8][4];
#pragma unroll
  for (int n = 0; n < HEAD / 8; ++n)
#pragma unroll
    for (int i = 0; i < 4; ++i) y[n][i] = 0.f;
  const u32 query_at = query.matrices(lane, false), key_at = keys.matrices(lane, true);
  const u32 value_at = values.matrices(lane, false);
  const bool small_queries = p.dtype == 0, small_weights = p.dtype != 1;

  while (first < last) {
    const int next = find(first + KEYS, 1 - place);
    const bool more = next < last;
    if (more) {
      mask.load(p, own, next + KEYS + part, end);
      key_parts.ask(next);  // on their way while these are multiplied
    }
    // The tensor cores cut off what they add, so large products, few, and small ones have sums of their own.
    float scores[KEYS / 8][4] = {}, rest[KEYS / 8][4] = {};
#pragma unroll 4
    for (int d = 0; d < HEAD; d += 16) {
      u32 a[4], a_small[4];
      load_matrices(a, query_at + query.offset(0, d, false));
      if (small_queries) load_matrices(a_small, query_at + query.offset(0, d, true));
#pragma unroll
      for (int n = 0; n < KEYS / 8; n += 2) {
        u32 b[4], b_small[4];
        load_matrices(b, key_at + keys.offset(8 * n, d, false));
        if (SMALL) load_matrices(b_small, key_at + keys.offset(8 * n, d, true));
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          multiply(scores[n + i], a, b[2 * i], b[2 * i + 1]);
          if (SMALL) multiply(rest[n + i], a, b_small[2 * i], b_small[2 * i + 1]);
          if (small_queries) multiply(rest[n + i], a_small, b[2 * i], b[2 * i + 1]);
        }
      }
    }
    const u32 sees[2] = {seen[place][16 * warp + group], seen[place][16 * warp + group + 8]};
    float most[2] = {largest[0], largest[1]};
#pragma unroll
    for (int n = 0; n < KEYS / 8; ++n)
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int key = 8 * n + 2 * four + i % 2;
        const float of_key = DTYPE_OF<C> == 3 ? scales[place][0][key] : key_power[key / GROUP];
        float score = __fmul_rn(__fmul_rn(__fadd_rn(scores[n][i], rest[n][i]), factor[i / 2]), of_key);
        score = sees[i / 2] >> key & 1 ? score : __uint_as_float(0xff800000u);  // its weight is 0
        scores[n][i] = score;
        most[i / 2] = fmaxf(most[i / 2], score);
      }
    float shrink[2];
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      most[r] = fmaxf(most[r], __shfl_xor_sync(~0u, most[r], 1));
      most[r] = fmaxf(most[r], __shfl_xor_sync(~0u, most[r], 2));
      shrink[r] = __expf(largest[r] - most[r]);
      largest[r] = most[r];
      sum[r] *= shrink[r];
    }
    if (__any_sync(~0u, shrink[0] != 1.f || shrink[1] != 1.f)) {
#pragma unroll
      for (int n = 0; n < HEAD / 8; ++n)
#pragma unroll
        for (int i = 0; i < 4; ++i) y[n][i] *= shrink[i / 2];
    }
    // Weights are multiplied by a power too; scales of values are multiplied by one and they by these.
    Power of_scales(127u << 23);
    if (DTYPE_OF<C> == 3) {
      const float own_scale[1] = {scales[place][1][lane % KEYS]};
      of_scales = Power(largest_in_warp(own_scale));
    }
#pragma unroll
    for (int n = 0; n < KEYS / 8; ++n)
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const float weight = __expf(scores[n][i] - largest[i / 2]);
        sum[i / 2] += weight;
        const float of_value = DTYPE_OF<C> == 3 ? __fmul_rn(scales[place][1][8 * n + 2 * four + i % 2], of_scales.up)
                                                : of_scales.up;
        scores[n][i] = __fmul_rn(weight, of_value);
      }
    __syncthreads();  // the keys have been read
    if (more) {
      key_parts.keep(next, keys, key_power);
      value_parts.ask(next);
    }
    // A lane has the weights of keys 2 * four and 2 * four + 1 of every eight, as those of a row of `mma` lie.
    u32 weights[KEYS / 16][4], small[KEYS / 16][4];
#pragma unroll
    for (int k = 0; k < KEYS / 16; ++k)
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const float* const pair = &scores[2 * k + i / 2][2 * (i % 2)];
        const Split parts(pair[0], pair[1]);
        weights[k][i] = parts.large;
        small[k][i] = parts.small;
      }
#pragma unroll
    for (int m = 0; m < HEAD / 8; m += 2) {
      float large[2][4] = {}, others[2][4] = {};
#pragma unroll
      for (int k = 0; k < KEYS / 16; ++k) {
        u32 b[4], b_small[4];
        load_transposed(b, value_at + values.offset(16 * k, 8 * m, false));
        if (SMALL) load_transposed(b_small, value_at + values.offset(16 * k, 8 * m, true));
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          multiply(large[i], weights[k], b[2 * i], b[2 * i + 1]);
          if (SMALL) multiply(others[i], weights[k], b_small[2 * i], b_small[2 * i + 1]);
          if (small_weights) multiply(others[i], small[k], b[2 * i], b[2 * i + 1]);
        }
      }
      const float down = __fmul_rn(value_power[8 * m / RANGE], of_scales.down);
#pragma unroll
      for (int i = 0; i < 2; ++i)
#pragma unroll
        for (int j = 0; j < 4; ++j) y[m + i][j] = __fmaf_rn(__fadd_rn(large[i][j], others[i][j]), down, y[m + i][j]);
    }
    __syncthreads();  // the values have been read
    if (more) value_parts.keep(next, values, value_power);
    __syncthreads();
    first = next;
    place = 1 - place;
  }
  let_next_start();  // not before: what then waits would take room from other blocks

#pragma unroll
  for (int r = 0; r < 2; ++r) {
    sum[r] += __shfl_xor_sync(~0u, sum[r], 1);
    sum[r] += __shfl_xor_sync(~0u, sum[r], 2);
    const float inverse = __fdiv_rn(1.f, sum[r]);
    const int token = first_query + 16 * warp + group + 8 * r;
    if (token >= p.tokens) continue;
    const long long to = (((long long)blockIdx.z * p.tokens + token) * p.heads + head) * p.head_dim + 2 * four;
#pragma unroll
    for (int n = 0; n < HEAD / 8; ++n)
      if (8 * n + 2 * four < p.head_dim)
        store_pair(p.y, to + 8 * n, p.dtype, __fmul_rn(y[n][2 * r], inverse), __fmul_rn(y[n][2 * r + 1], inverse));
  }
}
