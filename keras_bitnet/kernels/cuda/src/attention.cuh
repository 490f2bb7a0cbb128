// Attention of one new token to a cache of keys and values, in one kernel: rotary embedding, a row
// written to the cache, scores, softmax, weighted sum. How many tokens there are it reads on the GPU.
//
// A block takes up to four query heads of one key head; the blocks of a cluster share the tokens. A
// warp goes through 16 tokens at a time with a softmax of its own (maximum, sum and weighted sum so
// far, Milakov and Gimelshein 2018, https://arxiv.org/abs/1805.02867): nobody waits for anybody until
// the end. For scores, eight lanes share a key; for the weighted sum, all lanes share a value.
#pragma once
#include "common.cuh"

constexpr int ATTENTION_WARPS = 8;
constexpr int QUERY_HEADS = 4;      // of a block
constexpr int MOST_BLOCKS = 8;      // of a cluster
constexpr int TOKENS = 16;          // of a turn of a warp
constexpr float UNSEEN = -1e30f;    // score of what the mask hides

struct I8 { static constexpr int SIZE = 1; };
template <> struct Four<I8> {
  u32 raw;
};
template <class T> DEVICE auto load_raw(const char* from) { return *reinterpret_cast<const decltype(Four<T>::raw)*>(from); }
DEVICE float element(const Four<I8>& v, int i) { return (float)(signed char)(v.raw >> 8 * i); }

// ---- numbers of the new token ------------------------------------------------------------------

// Where the first new token goes.
DEVICE int first_token(const Attention& p) { return min(max(*p.index, 0), p.length - p.tokens); }

DEVICE float read(const void* from, long long i, int dtype) {
  if (dtype == 0) return static_cast<const float*>(from)[i];
  const u32 bits = static_cast<const u16*>(from)[i];
  return dtype == 1 ? __uint_as_float(bits << 16) : half_to_float(bits);
}

DEVICE float rounded(float value, int dtype) {
  if (dtype == 0) return value;
  const u32 bits = pack_pair(dtype, value, 0.f) & 0xffffu;
  return dtype == 1 ? __uint_as_float(bits << 16) : half_to_float(bits);
}

// Element d of a head, turned by its angle, a row of the tables that begins at `table`: (x[i], x[i + half]) is a pair.
// Rounded as the dtype is.
DEVICE float turned(const Attention& p, const void* from, long long head, int d, long long table) {
  const float x = read(from, head * p.head_dim + d, p.dtype);
  if (!p.cosines) return x;
  const int half = p.head_dim / 2;
  const long long at = table + d;
  const float other = read(from, head * p.head_dim + (d < half ? d + half : d - half), p.dtype);
  const float product = __fmul_rn(d < half ? -other : other, p.sines[at]);
  return rounded(__fadd_rn(__fmul_rn(x, p.cosines[at]), product), p.dtype);
}

// Dtype of a cache, as in shim.h.
template <class C> constexpr int DTYPE_OF = 3;
template <> constexpr int DTYPE_OF<F32> = 0;
template <> constexpr int DTYPE_OF<BF16> = 1;
template <> constexpr int DTYPE_OF<F16> = 2;

// What a cache keeps of a row, in place; lane l of a warp holds elements l + 32 * i. Returns the
// scale: 1 but for int8.
template <class C, int N> DEVICE float keep(float (&row)[N]) {
  if constexpr (DTYPE_OF<C> != 3) {
#pragma unroll
    for (int i = 0; i < N; ++i) row[i] = rounded(row[i], DTYPE_OF<C>);
    return 1.f;
  } else {
    u32 largest = 0;
#pragma unroll
    for (int i = 0; i < N; ++i) largest = max(largest, __float_as_uint(row[i]) & 0x7fffffffu);
    largest = __reduce_max_sync(~0u, largest);
    const float a = __uint_as_float(max(largest, __float_as_uint(1e-5f)));
    const float inverse = __fdiv_rn(127.f, a);
#pragma unroll
    for (int i = 0; i < N; ++i) row[i] = rintf(__fmul_rn(row[i], inverse));
    return largest < 0x7f800000u ? __fmul_rn(a, (float)(1. / 127)) : __uint_as_float(0x7fc00000u);
  }
}

template <class C> DEVICE void put(void* cache, long long i, float value) {
  if constexpr (DTYPE_OF<C> == 3)
    static_cast<signed char*>(cache)[i] = (signed char)(int)value;
  else
    store(cache, i, DTYPE_OF<C>, value);
}

// Writes a number to the shared memory of the first block of the cluster.
DEVICE void write_to_first(float* here, float value) {
#if __CUDA_ARCH__ >= 900
  asm volatile("st.shared::cluster.f32 [%0], %1;" ::"r"(address_in_block(here, 0)), "f"(value) : "memory");
#else
  *here = value;
#endif
}

// ---- attention ---------------------------------------------------------------------------------

// The softmax of a warp so far: of the tokens seen, over the query heads of the block.
template <int PARTS> struct Running {
  float largest[QUERY_HEADS];  // score
  float sum[QUERY_HEADS];      // of weights, each lane those of its own keys
  float values[QUERY_HEADS][4 * PARTS];  // weighted sum of elements 4 * lane + 128 * part + 0..3
};

// PARTS: times 128 values of a head.
template <class C, int PARTS>
DEVICE void take(const Attention& p, Running<PARTS>& run, const float (*query)[128 * PARTS],
                 float4* weights, long long row, int first, int end) {
  const int lane = threadIdx.x % 32, group = lane / 8, eighth = lane % 8;
  const char* keys = static_cast<const char*>(p.key_cache) + row * p.head_dim * C::SIZE;
  const char* values = static_cast<const char*>(p.value_cache) + row * p.head_dim * C::SIZE;
  const u8* mask = p.mask ? p.mask + (long long)blockIdx.z * p.mask_step : nullptr;
  float scores[4][QUERY_HEADS] = {}, key_scale[4], value_scale[4];
  bool seen[4];
  Four<C> value[TOKENS];
  auto load_values = [&](int part) {
    const int d = 4 * lane + 128 * part;
#pragma unroll
    for (int i = 0; i < TOKENS; ++i) {
      const long long token = min(first + i, end - 1);
      value[i] = {};
      if (d < p.head_dim) value[i].raw = load_raw<C>(values + (token * p.head_dim + d) * C::SIZE);
    }
  };
#pragma unroll
  for (int u = 0; u < 4; ++u) {
    const int token = min(first + 4 * u + group, end - 1);
    seen[u] = !mask || mask[token];
    key_scale[u] = DTYPE_OF<C> == 3 ? p.key_scale[row + token] : 1.f;
    value_scale[u] = DTYPE_OF<C> == 3 ? p.value_scale[row + token] : 1.f;
  }
#pragma unroll
  for (int part = 0; part < PARTS; ++part) {
    Four<C> key[4][4];
#pragma unroll
    for (int i = 0; i < 4; ++i)
#pragma unroll
      for (int u = 0; u < 4; ++u) {
        const int d = 128 * part + 32 * i + 4 * eighth;
        const long long token = min(first + 4 * u + group, end - 1);
        key[i][u] = {};
        if (d < p.head_dim) key[i][u].raw = load_raw<C>(keys + (token * p.head_dim + d) * C::SIZE);
      }
    if (part == 0) load_values(0);  // on their way while the scores are computed
#pragma unroll
    for (int i = 0; i < 4; ++i)
#pragma unroll
      for (int h = 0; h < QUERY_HEADS; ++h) {
        const float4 q = *reinterpret_cast<const float4*>(&query[h][128 * part + 32 * i + 4 * eighth]);
#pragma unroll
        for (int u = 0; u < 4; ++u) {
          float& score = scores[u][h];
          score = __fmaf_rn(q.x, element(key[i][u], 0), score);
          score = __fmaf_rn(q.y, element(key[i][u], 1), score);
          score = __fmaf_rn(q.z, element(key[i][u], 2), score);
          score = __fmaf_rn(q.w, element(key[i][u], 3), score);
        }
      }
  }
#pragma unroll
  for (int h = 0; h < QUERY_HEADS; ++h) {
    float largest = run.largest[h];
#pragma unroll
    for (int u = 0; u < 4; ++u) {
      float& score = scores[u][h];
#pragma unroll
      for (int step = 1; step < 8; step *= 2) score += __shfl_xor_sync(~0u, score, step);
      score = seen[u] ? score * key_scale[u] : UNSEEN;
      if (first + 4 * u + group >= end) score = __uint_as_float(0xff800000u);  // its weight is 0
      largest = fmaxf(largest, score);
    }
    largest = fmaxf(largest, __shfl_xor_sync(~0u, largest, 8));
    largest = fmaxf(largest, __shfl_xor_sync(~0u, largest, 16));
    const float shrink = __expf(run.largest[h] - largest);
    run.largest[h] = largest;
    run.sum[h] *= shrink;
#pragma unroll
    for (int i = 0; i < 4 * PARTS; ++i) run.values[h][i] *= shrink;
#pragma unroll
    for (int u = 0; u < 4; ++u) {
      const float weight = __expf(scores[u][h] - largest);
      run.sum[h] += weight;
      scores[u][h] = weight * value_scale[u];
    }
  }
#pragma unroll
  for (int u = 0; u < 4; ++u)
    if (eighth == u) weights[4 * u + group] = make_float4(scores[u][0], scores[u][1], scores[u][2], scores[u][3]);
  __syncwarp();
#pragma unroll
  for (int part = 0; part < PARTS; ++part) {
    if (part > 0) load_values(part);
#pragma unroll
    for (int i = 0; i < TOKENS; ++i) {
      const float4 w = weights[i];
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const float v = element(value[i], j);
        run.values[0][4 * part + j] = __fmaf_rn(w.x, v, run.values[0][4 * part + j]);
        run.values[1][4 * part + j] = __fmaf_rn(w.y, v, run.values[1][4 * part + j]);
        run.values[2][4 * part + j] = __fmaf_rn(w.z, v, run.values[2][4 * part + j]);
        run.values[3][4 * part + j] = __fmaf_rn(w.w, v, run.values[3][4 * part + j]);
      }
    }
  }
  __syncwarp();
}

template <class C, int PARTS> DEVICE void attention(const Attention& p) {
  constexpr int THREADS = ATTENTION_WARPS * 32, HEAD_DIM = 128 * PARTS;
  // Of a block, then of all blocks in the first one: largest scores, sums, weighted sums.
  __shared__ float warp_largest[ATTENTION_WARPS][QUERY_HEADS], warp_sum[ATTENTION_WARPS][QUERY_HEADS];
  __shared__ float block_largest[MOST_BLOCKS][QUERY_HEADS], block_sum[MOST_BLOCKS][QUERY_HEADS];
  __shared__ float4 weights[ATTENTION_WARPS][TOKENS];
  __shared__ float new_scale[2];
  using Row = float[HEAD_DIM];
  Row* const query = reinterpret_cast<Row*>(block_memory);  // of the query heads
  Row* const new_row = query + QUERY_HEADS;                 // key and value
  float* const warp_values = new_row[2];                                               // [warp][query head][HEAD_DIM]
  float* const block_values = warp_values + ATTENTION_WARPS * QUERY_HEADS * HEAD_DIM;  // [block][..][..]
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int groups = p.heads / p.key_heads, chunks = (groups + QUERY_HEADS - 1) / QUERY_HEADS;
  const int key_head = blockIdx.y / chunks, chunk = blockIdx.y % chunks;
  const long long first_head = (long long)blockIdx.z * p.heads + key_head * groups + chunk * QUERY_HEADS;
  const int heads = min(groups - chunk * QUERY_HEADS, QUERY_HEADS);  // of this block
  const long long cached = (long long)blockIdx.z * p.key_heads + key_head, row = cached * p.length;
  const u32 rank = cluster_rank(), blocks = cluster_size();
  cluster_arrive();
  let_next_start();
  wait_for_previous();

  const int index = first_token(p);
#pragma unroll
  for (int j = 0; j < QUERY_HEADS * HEAD_DIM / THREADS; ++j) {
    const int i = j * THREADS + threadIdx.x, h = i / HEAD_DIM, d = i % HEAD_DIM;
    float q = 0.f;
    if (h < heads && d < p.head_dim) q = __fmul_rn(turned(p, p.query, first_head + h, d, blockIdx.z * p.table_step), p.scale);
    query[h][d] = q;
  }
  if (rank == 0 && warp < 2) {
    float kept[HEAD_DIM / 32];
#pragma unroll
    for (int i = 0; i < HEAD_DIM / 32; ++i) {
      const int d = 32 * i + lane;
      kept[i] = 0.f;
      if (d < p.head_dim)
        kept[i] = warp == 0 ? turned(p, p.key, cached, d, blockIdx.z * p.table_step) : read(p.value, cached * p.head_dim + d, p.dtype);
    }
    const float scale = keep<C>(kept);
    if (lane == 0) new_scale[warp] = scale;
#pragma unroll
    for (int i = 0; i < HEAD_DIM / 32; ++i) {
      const int d = 32 * i + lane;
      new_row[warp][d] = kept[i];
      if (chunk == 0 && d < p.head_dim)
        put<C>(warp == 0 ? p.key_cache : p.value_cache, (row + index) * p.head_dim + d, kept[i]);
    }
    if (DTYPE_OF<C> == 3 && chunk == 0 && lane == 0) (warp == 0 ? p.key_scale : p.value_scale)[row + index] = scale;
  }
  __syncthreads();

  Running<PARTS> run;
#pragma unroll
  for (int h = 0; h < QUERY_HEADS; ++h) {
    run.largest[h] = UNSEEN;
    run.sum[h] = 0.f;
#pragma unroll
    for (int i = 0; i < 4 * PARTS; ++i) run.values[h][i] = 0.f;
  }
  const int share = (index + blocks * TOKENS - 1) / (blocks * TOKENS) * TOKENS;
  const int begin = rank * share, end = min(begin + share, index);
  for (int first = begin + warp * TOKENS; first < end; first += ATTENTION_WARPS * TOKENS)
    take<C, PARTS>(p, run, query, weights[warp], row, first, end);
  // The new token, which the cache may not show yet, by the warp that has least to do.
  if (rank == 0 && warp == ATTENTION_WARPS - 1) {
    const bool seen = !p.mask || p.mask[(long long)blockIdx.z * p.mask_step + index];
#pragma unroll
    for (int h = 0; h < QUERY_HEADS; ++h) {
      float score = 0.f;
#pragma unroll
      for (int i = 0; i < HEAD_DIM / 32; ++i)
        score = __fmaf_rn(query[h][32 * i + lane], new_row[0][32 * i + lane], score);
#pragma unroll
      for (int step = 1; step < 32; step *= 2) score += __shfl_xor_sync(~0u, score, step);
      score = seen ? score * new_scale[0] : UNSEEN;
      const float largest = fmaxf(score, run.largest[h]);
      const float shrink = __expf(run.largest[h] - largest), weight = __expf(score - largest);
      run.largest[h] = largest;
      run.sum[h] = run.sum[h] * shrink + (lane < 8 ? weight : 0.f);
#pragma unroll
      for (int i = 0; i < 4 * PARTS; ++i) {
        const float value = new_row[1][4 * lane + 128 * (i / 4) + i % 4] * new_scale[1];
        run.values[h][i] = __fmaf_rn(weight, value, run.values[h][i] * shrink);
      }
    }
  }

  // Those of the warps, then those of the blocks, are put together at the largest score of all.
#pragma unroll
  for (int h = 0; h < QUERY_HEADS; ++h) {
    float sum = run.sum[h];
    sum += __shfl_xor_sync(~0u, sum, 8);
    sum += __shfl_xor_sync(~0u, sum, 16);
    if (lane == 0) warp_largest[warp][h] = run.largest[h], warp_sum[warp][h] = sum;
#pragma unroll
    for (int part = 0; part < PARTS; ++part)
      *reinterpret_cast<float4*>(warp_values + (warp * QUERY_HEADS + h) * HEAD_DIM + 4 * lane + 128 * part) =
          make_float4(run.values[h][4 * part], run.values[h][4 * part + 1], run.values[h][4 * part + 2],
                      run.values[h][4 * part + 3]);
  }
  __syncthreads();
  cluster_wait();  // all blocks have begun
#pragma unroll
  for (int j = 0; j < QUERY_HEADS * HEAD_DIM / THREADS; ++j) {
    const int i = j * THREADS + threadIdx.x, h = i / HEAD_DIM;
    float largest = UNSEEN, sum = 0.f, value = 0.f;
#pragma unroll
    for (int w = 0; w < ATTENTION_WARPS; ++w) largest = fmaxf(largest, warp_largest[w][h]);
#pragma unroll
    for (int w = 0; w < ATTENTION_WARPS; ++w) {
      const float shrink = __expf(warp_largest[w][h] - largest);
      sum = __fmaf_rn(warp_sum[w][h], shrink, sum);
      value = __fmaf_rn(warp_values[w * QUERY_HEADS * HEAD_DIM + i], shrink, value);
    }
    write_to_first(block_values + rank * QUERY_HEADS * HEAD_DIM + i, value);
    if (i % HEAD_DIM == 0) {
      write_to_first(&block_largest[rank][h], largest);
      write_to_first(&block_sum[rank][h], sum);
    }
  }
  __syncthreads();
  cluster_arrive();
  cluster_wait();
  if (rank > 0) return;
#pragma unroll
  for (int j = 0; j < QUERY_HEADS * HEAD_DIM / THREADS; ++j) {
    const int i = j * THREADS + threadIdx.x, h = i / HEAD_DIM, d = i % HEAD_DIM;
    float largest = UNSEEN, sum = 0.f, value = 0.f;
    for (u32 b = 0; b < blocks; ++b) largest = fmaxf(largest, block_largest[b][h]);
    for (u32 b = 0; b < blocks; ++b) {
      const float shrink = __expf(block_largest[b][h] - largest);
      sum = __fmaf_rn(block_sum[b][h], shrink, sum);
      value = __fmaf_rn(block_values[b * QUERY_HEADS * HEAD_DIM + i], shrink, value);
    }
    if (h < heads && d < p.head_dim) store(p.y, (first_head + h) * p.head_dim + d, p.dtype, __fdiv_rn(value, sum));
  }
}
