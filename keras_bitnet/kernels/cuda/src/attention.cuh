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
constexpr int MOST_HEAD_DIM = 256;
constexpr int TOKENS = 16;          // of a turn of a warp
constexpr float UNSEEN = -1e30f;    // score of what the mask hides

struct I8 { static constexpr int SIZE = 1; };
template <> struct Four<I8> {
  u32 raw;
};
DEVICE float element(const Four<I8>& v, int i) { return (float)(signed char)(v.raw >> 8 * i); }

// ---- numbers of the new token ------------------------------------------------------------------

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

// Element d of a head, turned by its angle: (x[i], x[i + half]) is a pair. Rounded as the dtype is.
DEVICE float turned(const Attention& p, const void* from, long long head, int d) {
  const float x = read(from, head * p.head_dim + d, p.dtype);
  if (!p.cosines) return x;
  const int half = p.head_dim / 2, at = blockIdx.z * p.table_step + d;
  const float other = read(from, head * p.head_dim + (d < half ? d + half : d - half), p.dtype);
  const float product = __fmul_rn(d < half ? -other : other, p.sines[at]);
  return rounded(__fadd_rn(__fmul_rn(x, p.cosines[at]), product), p.dtype);
}

// What a cache keeps of a row, in place, as numbers; a warp. Returns its scale: 1 but for int8.
template <class C> struct Kept;
template <> struct Kept<F32> {
  static constexpr int DTYPE = 0;
};
template <> struct Kept<BF16> {
  static constexpr int DTYPE = 1;
};
template <> struct Kept<F16> {
  static constexpr int DTYPE = 2;
};
template <> struct Kept<I8> {
  static constexpr int DTYPE = 3;
};

template <class C> DEVICE float keep(float* row, int head_dim) {
  const int lane = threadIdx.x % 32;
  if constexpr (Kept<C>::DTYPE != 3) {
    for (int d = lane; d < head_dim; d += 32) row[d] = rounded(row[d], Kept<C>::DTYPE);
    return 1.f;
  } else {
    u32 largest = 0;
    for (int d = lane; d < head_dim; d += 32) largest = max(largest, __float_as_uint(row[d]) & 0x7fffffffu);
    largest = __reduce_max_sync(~0u, largest);
    const float a = __uint_as_float(max(largest, __float_as_uint(1e-5f)));
    const float inverse = __fdiv_rn(127.f, a);
    for (int d = lane; d < head_dim; d += 32) row[d] = rintf(__fmul_rn(row[d], inverse));
    return largest < 0x7f800000u ? __fmul_rn(a, (float)(1. / 127)) : __uint_as_float(0x7fc00000u);
  }
}

template <class C> DEVICE void put(void* cache, long long i, float value) {
  if constexpr (Kept<C>::DTYPE == 3)
    static_cast<signed char*>(cache)[i] = (signed char)(int)value;
  else
    store(cache, i, Kept<C>::DTYPE, value);
}

// ---- the blocks of a cluster -------------------------------------------------------------------

DEVICE u32 cluster_rank() {
  u32 rank = 0;
#if __CUDA_ARCH__ >= 900
  asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
#endif
  return rank;
}
DEVICE u32 cluster_size() {
  u32 size = 1;
#if __CUDA_ARCH__ >= 900
  asm("mov.u32 %0, %%cluster_nctarank;" : "=r"(size));
#endif
  return size;
}
DEVICE void cluster_wait() {
#if __CUDA_ARCH__ >= 900
  asm volatile("barrier.cluster.arrive.aligned;\nbarrier.cluster.wait.aligned;" ::: "memory");
#else
  __syncthreads();
#endif
}
// A number in the shared memory of another block of the cluster.
DEVICE float cluster_read(const float* here, u32 rank) {
#if __CUDA_ARCH__ >= 900
  u32 there;
  float value;
  asm volatile("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(there) : "r"(shared_address(here)), "r"(rank));
  asm volatile("ld.shared::cluster.f32 %0, [%1];" : "=f"(value) : "r"(there) : "memory");
  return value;
#else
  return *here;
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
DEVICE void take(const Attention& p, Running<PARTS>& run, const float (*query)[MOST_HEAD_DIM], float4* weights,
                 long long row, int first, int end) {
  const int lane = threadIdx.x % 32, group = lane / 8, eighth = lane % 8;
  const char* keys = static_cast<const char*>(p.key_cache) + row * p.head_dim * C::SIZE;
  const char* values = static_cast<const char*>(p.value_cache) + row * p.head_dim * C::SIZE;
  const u8* mask = p.mask ? p.mask + (long long)blockIdx.z * p.mask_step : nullptr;
  float scores[4][QUERY_HEADS] = {}, key_scale[4], value_scale[4];
  bool seen[4];
#pragma unroll
  for (int u = 0; u < 4; ++u) {
    const int token = min(first + 4 * u + group, end - 1);
    seen[u] = !mask || mask[token];
    key_scale[u] = Kept<C>::DTYPE == 3 ? p.key_scale[row + token] : 1.f;
    value_scale[u] = Kept<C>::DTYPE == 3 ? p.value_scale[row + token] : 1.f;
  }
#pragma unroll
  for (int part = 0; part < 4 * PARTS; ++part) {
    const int d = 4 * eighth + 32 * part;
    if (d >= p.head_dim) break;
    Four<C> key[4];
#pragma unroll
    for (int u = 0; u < 4; ++u) {
      const long long token = min(first + 4 * u + group, end - 1);
      key[u].raw = *reinterpret_cast<const decltype(key[u].raw)*>(keys + (token * p.head_dim + d) * C::SIZE);
    }
#pragma unroll
    for (int h = 0; h < QUERY_HEADS; ++h) {
      const float4 q = *reinterpret_cast<const float4*>(&query[h][d]);
#pragma unroll
      for (int u = 0; u < 4; ++u) {
        float& score = scores[u][h];
        score = __fmaf_rn(q.x, element(key[u], 0), score);
        score = __fmaf_rn(q.y, element(key[u], 1), score);
        score = __fmaf_rn(q.z, element(key[u], 2), score);
        score = __fmaf_rn(q.w, element(key[u], 3), score);
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
    const int d = 4 * lane + 128 * part;
    if (d >= p.head_dim) break;
#pragma unroll
    for (int i = 0; i < TOKENS; ++i) {
      const long long token = min(first + i, end - 1);
      Four<C> value;
      value.raw = *reinterpret_cast<const decltype(value.raw)*>(values + (token * p.head_dim + d) * C::SIZE);
      const float4 w = weights[i];
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const float v = element(value, j);
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
  __shared__ __align__(16) float query[QUERY_HEADS][MOST_HEAD_DIM];
  __shared__ float new_key[MOST_HEAD_DIM], new_value[MOST_HEAD_DIM], new_scale[2];
  __shared__ float4 weights[ATTENTION_WARPS][TOKENS];
  __shared__ float warp_largest[ATTENTION_WARPS][QUERY_HEADS], warp_sum[ATTENTION_WARPS][QUERY_HEADS];
  __shared__ float block_largest[QUERY_HEADS], block_sum[QUERY_HEADS];
  float* const sums = reinterpret_cast<float*>(block_memory);  // [warp][query head][head_dim]
  constexpr int THREADS = ATTENTION_WARPS * 32;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int groups = p.heads / p.key_heads, chunks = (groups + QUERY_HEADS - 1) / QUERY_HEADS;
  const int key_head = blockIdx.y / chunks, chunk = blockIdx.y % chunks;
  const long long first_head = (long long)blockIdx.z * p.heads + key_head * groups + chunk * QUERY_HEADS;
  const int heads = min(groups - chunk * QUERY_HEADS, QUERY_HEADS);  // of this block
  const long long cached = (long long)blockIdx.z * p.key_heads + key_head, row = cached * p.length;
  const u32 rank = cluster_rank(), blocks = cluster_size();
  let_next_start();
  wait_for_previous();

  const int index = min(max(*p.index, 0), p.length - 1);
  for (int i = threadIdx.x; i < QUERY_HEADS * p.head_dim; i += THREADS) {
    const int h = i / p.head_dim, d = i % p.head_dim;
    query[h][d] = h < heads ? __fmul_rn(turned(p, p.query, first_head + h, d), p.scale) : 0.f;
  }
  if (rank == 0 && warp < 2) {
    float* const kept = warp == 0 ? new_key : new_value;
    for (int d = lane; d < p.head_dim; d += 32)
      kept[d] = warp == 0 ? turned(p, p.key, cached, d) : read(p.value, cached * p.head_dim + d, p.dtype);
    __syncwarp();
    const float scale = keep<C>(kept, p.head_dim);
    if (lane == 0) new_scale[warp] = scale;
    __syncwarp();
    if (chunk == 0) {
      void* const cache = warp == 0 ? p.key_cache : p.value_cache;
      for (int d = lane; d < p.head_dim; d += 32) put<C>(cache, (row + index) * p.head_dim + d, kept[d]);
      if (Kept<C>::DTYPE == 3 && lane == 0) (warp == 0 ? p.key_scale : p.value_scale)[row + index] = scale;
    }
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
  if (rank == 0 && warp == 0) {  // the new token, which the cache may not show yet
    const bool seen = !p.mask || p.mask[(long long)blockIdx.z * p.mask_step + index];
#pragma unroll
    for (int h = 0; h < QUERY_HEADS; ++h) {
      float score = 0.f;
      for (int d = lane; d < p.head_dim; d += 32) score = __fmaf_rn(query[h][d], new_key[d], score);
#pragma unroll
      for (int step = 1; step < 32; step *= 2) score += __shfl_xor_sync(~0u, score, step);
      run.largest[h] = seen ? score * new_scale[0] : UNSEEN;
      run.sum[h] = lane < 8 ? 1.f : 0.f;
#pragma unroll
      for (int i = 0; i < 4 * PARTS; ++i) {
        const int d = 4 * lane + 128 * (i / 4) + i % 4;
        run.values[h][i] = d < p.head_dim ? new_value[d] * new_scale[1] : 0.f;
      }
    }
  }
  const int share = (index + blocks * TOKENS - 1) / (blocks * TOKENS) * TOKENS;
  const int begin = rank * share, end = min(begin + share, index);
  for (int first = begin + warp * TOKENS; first < end; first += ATTENTION_WARPS * TOKENS)
    take<C, PARTS>(p, run, query, weights[warp], row, first, end);

  // Those of the warps, then those of the blocks, are put together at the largest score of all.
#pragma unroll
  for (int h = 0; h < QUERY_HEADS; ++h) {
    float sum = run.sum[h];
    sum += __shfl_xor_sync(~0u, sum, 8);
    sum += __shfl_xor_sync(~0u, sum, 16);
    if (lane == 0) warp_largest[warp][h] = run.largest[h], warp_sum[warp][h] = sum;
#pragma unroll
    for (int part = 0; part < PARTS; ++part) {
      const int d = 4 * lane + 128 * part;
      if (d < p.head_dim)
        *reinterpret_cast<float4*>(sums + (warp * QUERY_HEADS + h) * p.head_dim + d) =
            make_float4(run.values[h][4 * part], run.values[h][4 * part + 1], run.values[h][4 * part + 2],
                        run.values[h][4 * part + 3]);
    }
  }
  __syncthreads();
  for (int i = threadIdx.x; i < QUERY_HEADS * p.head_dim; i += THREADS) {
    const int h = i / p.head_dim;
    float largest = warp_largest[0][h], sum = 0.f, value = 0.f;
#pragma unroll
    for (int w = 1; w < ATTENTION_WARPS; ++w) largest = fmaxf(largest, warp_largest[w][h]);
#pragma unroll
    for (int w = 0; w < ATTENTION_WARPS; ++w) {
      const float shrink = __expf(warp_largest[w][h] - largest);
      sum = __fmaf_rn(warp_sum[w][h], shrink, sum);
      value = __fmaf_rn(sums[w * QUERY_HEADS * p.head_dim + i], shrink, value);
    }
    sums[i] = value;  // of the first warp; nobody else reads this element
    if (i % p.head_dim == 0) block_largest[h] = largest, block_sum[h] = sum;
  }
  cluster_wait();
  if (rank == 0)
    for (int i = threadIdx.x; i < heads * p.head_dim; i += THREADS) {
      const int h = i / p.head_dim;
      float largest = UNSEEN, sum = 0.f, value = 0.f;
      for (u32 b = 0; b < blocks; ++b) largest = fmaxf(largest, cluster_read(&block_largest[h], b));
      for (u32 b = 0; b < blocks; ++b) {
        const float shrink = __expf(cluster_read(&block_largest[h], b) - largest);
        sum = __fmaf_rn(cluster_read(&block_sum[h], b), shrink, sum);
        value = __fmaf_rn(cluster_read(&sums[i], b), shrink, value);
      }
      store(p.y, first_head * p.head_dim + i, p.dtype, __fdiv_rn(value, sum));
    }
  cluster_wait();  // a block stays while others read its memory
}
