// What the kernels share: numbers, the quantization of activations, memory instructions.
// No header of CUDA or C++ is included, so that NVRTC needs no search path.
#pragma once
#include "params.h"

typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;

#ifndef KBC_BITS
#error "KBC_BITS, the bits of a weight (1, 2, 4 or 8), must be defined"
#endif
constexpr int BITS = KBC_BITS;
constexpr int GROUPS = 8 / BITS;        // groups of four codes in a word
constexpr int TILE_INPUTS = 32 / BITS;  // inputs of a tile
constexpr u32 MASK = 0x01010101u * ((1u << BITS) - 1);

#define DEVICE __device__ __forceinline__

extern __shared__ __align__(1024) u8 block_memory[];

// ---- elements ------------------------------------------------------------------------------

// PLANES: of codes that a number is split into, where it stays float.
struct F32 { static constexpr int SIZE = 4, DTYPE = 0, PLANES = 4; };
struct BF16 { static constexpr int SIZE = 2, DTYPE = 1, PLANES = 2; };
struct F16 { static constexpr int SIZE = 2, DTYPE = 2, PLANES = 2; };

DEVICE float half_to_float(u32 bits) {
  float value;
  asm("cvt.f32.f16 %0, %1;" : "=f"(value) : "h"((u16)bits));
  return value;
}

// Four elements as they lie in memory.
template <class T> struct Four {
  uint2 raw;
};
template <> struct Four<F32> {
  uint4 raw;
};

DEVICE float element(const Four<F32>& v, int i) {
  return __uint_as_float(i == 0 ? v.raw.x : i == 1 ? v.raw.y : i == 2 ? v.raw.z : v.raw.w);
}
DEVICE float element(const Four<BF16>& v, int i) {
  const u32 pair = i < 2 ? v.raw.x : v.raw.y;
  return __uint_as_float(i & 1 ? pair & 0xffff0000u : pair << 16);
}
DEVICE float element(const Four<F16>& v, int i) {
  const u32 pair = i < 2 ? v.raw.x : v.raw.y;
  return half_to_float(i & 1 ? pair >> 16 : pair & 0xffffu);
}

// Elements first .. first + 3 of a row of k; those past the end are zeros.
template <class T> DEVICE Four<T> load_four(const char* row, int first, int k, bool aligned) {
  Four<T> v = {};
  if (aligned && first + 4 <= k) {
    v.raw = __ldg(reinterpret_cast<const decltype(v.raw)*>(row + first * T::SIZE));
    return v;
  }
  u32 words[4] = {0, 0, 0, 0};
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    if (first + i >= k) break;
    if (T::SIZE == 4)
      words[i] = __ldg(reinterpret_cast<const u32*>(row) + first + i);
    else
      words[i / 2] |= (u32)__ldg(reinterpret_cast<const u16*>(row) + first + i) << 16 * (i % 2);
  }
  if constexpr (T::SIZE == 4)
    v.raw = make_uint4(words[0], words[1], words[2], words[3]);
  else
    v.raw = make_uint2(words[0], words[1]);
  return v;
}

// Several of them; `first(i)` says where. The loads are all on their way before the first is used,
// for which there must be no branch between them: rows are aligned, or not, as a whole.
template <class T, int N, class First>
DEVICE void load_fours(Four<T> (&v)[N], const char* row, int k, bool aligned, First first) {
  if (aligned) {
#pragma unroll
    for (int i = 0; i < N; ++i) {
      v[i] = {};
      if (first(i) < k) v[i].raw = __ldg(reinterpret_cast<const decltype(v[i].raw)*>(row + first(i) * T::SIZE));
    }
  } else {
#pragma unroll
    for (int i = 0; i < N; ++i) v[i] = load_four<T>(row, first(i), k, false);
  }
}

// Bits of the larger |element| as float. As integers, magnitudes sort as floats do, in 16 bits as in
// 32, and a NaN is largest.
DEVICE u32 largest_of(const Four<F32>& v, u32 largest) {
#pragma unroll
  for (int i = 0; i < 4; ++i) largest = max(largest, __float_as_uint(element(v, i)) & 0x7fffffffu);
  return largest;
}
template <class T> DEVICE u32 largest_of(const Four<T>& v, u32 largest) {
  const u32 pair = __vmaxu2(v.raw.x & 0x7fff7fffu, v.raw.y & 0x7fff7fffu);
  const Four<T> both = {make_uint2(max(pair & 0xffffu, pair >> 16), 0)};
  return max(largest, __float_as_uint(element(both, 0)));
}

DEVICE void store(void* y, long long i, int dtype, float value) {
  if (dtype == 0) {
    static_cast<float*>(y)[i] = value;
    return;
  }
  u16 bits;
  if (dtype == 1)
    asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(bits) : "f"(value));
  else
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(bits) : "f"(value));
  static_cast<u16*>(y)[i] = bits;
}

DEVICE u32 pack_pair(int dtype, float low, float high) {
  u32 pair;
  if (dtype == 1)
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
  else
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
  return pair;
}

// Four neighbours of a row at once; `i` is a multiple of four and the row is aligned.
DEVICE void store_four(void* y, long long i, int dtype, const float (&v)[4]) {
  if (dtype == 0)
    *reinterpret_cast<float4*>(static_cast<float*>(y) + i) = make_float4(v[0], v[1], v[2], v[3]);
  else
    *reinterpret_cast<uint2*>(static_cast<u16*>(y) + i) =
        make_uint2(pack_pair(dtype, v[0], v[1]), pack_pair(dtype, v[2], v[3]));
}

// Four or two neighbours where `there`, of elements of SIZE bytes. It has no branch, so the compiler may mix what comes
// before several of them.
template <int SIZE> DEVICE void store_if(bool there, void* y, long long i, int dtype, const float (&v)[4]) {
  char* const to = static_cast<char*>(y) + i * SIZE;
  if (SIZE == 4) {
    asm volatile("{\n.reg .pred p;\nsetp.ne.u32 p, %0, 0;\n@p st.global.v4.f32 [%1], {%2, %3, %4, %5};\n}" ::
                 "r"((u32)there), "l"(to), "f"(v[0]), "f"(v[1]), "f"(v[2]), "f"(v[3]) : "memory");
  } else {
    const u32 bf16[2] = {pack_pair(1, v[0], v[1]), pack_pair(1, v[2], v[3])};
    const u32 f16[2] = {pack_pair(2, v[0], v[1]), pack_pair(2, v[2], v[3])};
    asm volatile("{\n.reg .pred p;\nsetp.ne.u32 p, %0, 0;\n@p st.global.v2.b32 [%1], {%2, %3};\n}" ::
                 "r"((u32)there), "l"(to), "r"(dtype == 1 ? bf16[0] : f16[0]), "r"(dtype == 1 ? bf16[1] : f16[1])
                 : "memory");
  }
}

DEVICE void store_pair_if(bool there, void* to, u32 pair) {
  asm volatile("{\n.reg .pred p;\nsetp.ne.u32 p, %0, 0;\n@p st.global.b32 [%1], %2;\n}" ::"r"((u32)there), "l"(to),
               "r"(pair) : "memory");
}

template <int SIZE> DEVICE void store_if(bool there, void* y, long long i, int dtype, const float (&v)[2]) {
  char* const to = static_cast<char*>(y) + i * SIZE;
  if (SIZE == 4) {
    asm volatile("{\n.reg .pred p;\nsetp.ne.u32 p, %0, 0;\n@p st.global.v2.f32 [%1], {%2, %3};\n}" ::
                 "r"((u32)there), "l"(to), "f"(v[0]), "f"(v[1]) : "memory");
  } else {
    const u32 bf16 = pack_pair(1, v[0], v[1]), f16 = pack_pair(2, v[0], v[1]);
    store_pair_if(there, to, dtype == 1 ? bf16 : f16);
  }
}

// ---- quantization of activations -------------------------------------------------------------

struct Ratio {
  float inverse;  // codes are rint(x * inverse)
  float scale;
};

// `largest`: bits of the largest |x| that shares the scale, `of_row`: of the row.
template <class P> DEVICE Ratio ratio_of(const P& p, u32 largest, u32 of_row) {
  if (p.x_scale) {
    const float scale = of_row < 0x7f800000u ? __ldg(p.x_scale) : __uint_as_float(of_row);
    return {__fdiv_rn(1.f, scale), scale};
  }
  const float a = __uint_as_float(max(largest, __float_as_uint(p.epsilon)));
  return {__fdiv_rn(p.highest, a), __fmul_rn(a, p.inverse_highest)};
}

// Four int8 codes in a word: x * inverse, rounded. Activations that stay float are the sum of more
// PLANES of codes, each of what the one before left: c0 + c1 / PLANE + c2 / PLANE^2 and so on.
//
// Adding 1.5 * 2^23 rounds halves to even and leaves the integer in the low byte. Only a static scale
// may clip: the largest ratio of a scale from the values rounds to `highest`.
constexpr float PLANE = 254;  // what is left lies in [-1/2, 1/2]: the largest code is 127 again
template <int PLANES, class T>
DEVICE void quantize_four(const Activations& p, const Four<T>& v, float inverse, u32 (&codes)[PLANES]) {
  constexpr float MAGIC = 12582912.f;
  u32 shifted[PLANES][4];
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    float ratio = __fmul_rn(element(v, i), inverse);
    if (PLANES == 1 && p.x_scale) ratio = fminf(fmaxf(ratio, -p.highest), p.highest);
#pragma unroll
    for (int plane = 0; plane < PLANES; ++plane) {
      const float rounded = __fadd_rn(ratio, MAGIC);
      shifted[plane][i] = __float_as_uint(rounded);
      ratio = __fmul_rn(__fsub_rn(ratio, __fsub_rn(rounded, MAGIC)), PLANE);  // the difference is exact
    }
  }
#pragma unroll
  for (int plane = 0; plane < PLANES; ++plane) {
    const u32(&s)[4] = shifted[plane];
    codes[plane] = __byte_perm(__byte_perm(s[0], s[1], 0x0040), __byte_perm(s[2], s[3], 0x0040), 0x5410);
  }
}

// The sum of what the planes gave.
template <int PLANES> DEVICE float join(const float (&planes)[PLANES]) {
  float sum = planes[PLANES - 1];
#pragma unroll
  for (int plane = PLANES - 2; plane >= 0; --plane) sum = __fadd_rn(__fmul_rn(sum, 1 / PLANE), planes[plane]);
  return sum;
}

// The maximum over the block. Every thread gets it; `shared` has a place for every warp.
template <int WARPS> DEVICE u32 block_max(u32 value, u32* shared) {
  value = __reduce_max_sync(~0u, value);
  if (threadIdx.x % 32 == 0) shared[threadIdx.x / 32] = value;
  __syncthreads();
  value = shared[0];
#pragma unroll
  for (int i = 1; i < WARPS; ++i) value = max(value, shared[i]);
  return value;
}

template <int WARPS> DEVICE int block_sum(int value, int* shared) {
  value = __reduce_add_sync(~0u, value);
  if (threadIdx.x % 32 == 0) shared[threadIdx.x / 32] = value;
  __syncthreads();
  value = shared[0];
#pragma unroll
  for (int i = 1; i < WARPS; ++i) value += shared[i];
  return value;
}

// ---- products of the same activations ------------------------------------------------------------

// The one that this block computes. It is looked up at every call, so a kernel that needs the place of the results
// in the end asks again, and has the registers meanwhile.
DEVICE Matmul own_product(const Matmuls& all) {
  int block, i = 0;
  asm volatile("mov.u32 %0, %%ctaid.y;" : "=r"(block));
#pragma unroll
  for (int next = 1; next < MOST_PRODUCTS; ++next) i += block >= all.of[next].first_block;
  return {all, all.of[i]};
}

// ---- integer products ------------------------------------------------------------------------

DEVICE int dot_codes(u32 codes, u32 x, int sum) {
  asm("dp4a.u32.s32 %0, %1, %2, %0;" : "+r"(sum) : "r"(codes), "r"(x));
  return sum;
}

DEVICE u32 bits_of(int value) { return (u32)value; }
DEVICE u32 bits_of(float value) { return __float_as_uint(value); }

DEVICE u32 word(const uint2& v, int i) { return i == 0 ? v.x : v.y; }
DEVICE u32 word(const uint4& v, int i) { return i == 0 ? v.x : i == 1 ? v.y : i == 2 ? v.z : v.w; }

// The result of a sum of codes: (step * codes + step_offset * sum of x) as float, scaled.
DEVICE float scaled(const Activations& p, int codes, int row_sum, float weight_scale, float x_scale) {
  const float exact = (float)(p.step * codes + p.step_offset * row_sum);
  return __fmul_rn(__fmul_rn(exact, __fmul_rn(weight_scale, p.inverse_step)), x_scale);
}

DEVICE float with_bias(const Product& p, float value, int column) {
  return p.bias ? __fadd_rn(value, __ldg(p.bias + column)) : value;
}

DEVICE float column_scale(const Product& p, int column) {
  return __ldg(p.scale + (p.scale_columns > 1 ? column : 0));
}

// ---- memory ----------------------------------------------------------------------------------

DEVICE u32 shared_address(const void* p) { return (u32)__cvta_generic_to_shared(p); }

// 16 bytes of weights, read once: they pass by the first cache.
DEVICE uint4 load_stream(const uint4* p) {
  uint4 v;
  asm volatile("ld.global.nc.L1::no_allocate.L2::128B.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "l"(p));
  return v;
}

DEVICE uint2 load_stream(const uint2* p) {
  uint2 v;
  asm volatile("ld.global.nc.L1::no_allocate.L2::128B.v2.u32 {%0, %1}, [%2];" : "=r"(v.x), "=r"(v.y) : "l"(p));
  return v;
}

// Weights in the place of others, if there are any: in the same registers.
DEVICE void load_over(uint4& v, const uint4* p, bool there) {
  asm volatile("{\n.reg .pred p;\nsetp.ne.u32 p, %4, 0;\n"
               "@p ld.global.nc.L1::no_allocate.L2::128B.v4.u32 {%0, %1, %2, %3}, [%5];\n}"
               : "+r"(v.x), "+r"(v.y), "+r"(v.z), "+r"(v.w) : "r"((u32)there), "l"(p));
}
DEVICE void load_over(uint2& v, const uint2* p, bool there) {
  asm volatile("{\n.reg .pred p;\nsetp.ne.u32 p, %2, 0;\n"
               "@p ld.global.nc.L1::no_allocate.L2::128B.v2.u32 {%0, %1}, [%3];\n}"
               : "+r"(v.x), "+r"(v.y) : "r"((u32)there), "l"(p));
}

DEVICE void prefetch(const void* p) { asm volatile("prefetch.global.L2 [%0];" ::"l"(p)); }

// Copies BYTES of weights or scales to shared memory, or zeros.
template <int BYTES> DEVICE void copy_or_zero(void* to, const void* from, bool there) {
  if (BYTES == 16)
    asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16, %2;" ::"r"(shared_address(to)), "l"(from),
                 "r"(there ? 16 : 0) : "memory");
  else
    asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;" ::"r"(shared_address(to)), "l"(from),
                 "r"(there ? 4 : 0) : "memory");
}
// Ends a group of copies.
DEVICE void copy_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
// Waits for all but the last LEFT groups of this thread.
template <int LEFT> DEVICE void copy_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(LEFT) : "memory");
}

// Programmatic dependent launch. Before `wait_for_previous` a kernel may only prefetch: the kernel
// before may still be writing what this one reads, weights included, but for `weights_ready`.
DEVICE void wait_for_previous() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}
DEVICE void let_next_start() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

// A load that stays behind `wait_for_previous`, for which `__ldg` need not wait.
DEVICE float load_after(const float* p) {
  float v;
  asm volatile("ld.global.f32 %0, [%1];" : "=f"(v) : "l"(p) : "memory");
  return v;
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
DEVICE void cluster_arrive() {
#if __CUDA_ARCH__ >= 900
  asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory");
#endif
}
DEVICE void cluster_wait() {
#if __CUDA_ARCH__ >= 900
  asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory");
#endif
}
#if __CUDA_ARCH__ >= 900
// Where the same place lies in the shared memory of another block of the cluster.
DEVICE u32 address_in_block(const void* here, u32 rank) {
  u32 there;
  asm volatile("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(there) : "r"(shared_address(here)), "r"(rank));
  return there;
}
#endif
