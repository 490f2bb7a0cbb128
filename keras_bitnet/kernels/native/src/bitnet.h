// The C ABI of the native kernels: plain pointers and sizes, no framework type.
#pragma once
#include <stdint.h>

#if defined(_WIN32)
#define KBN_API extern "C" __declspec(dllexport)
#else
#define KBN_API extern "C" __attribute__((visibility("default")))
#endif

enum kbn_dtype { KBN_F32 = 0, KBN_BF16 = 1, KBN_F16 = 2, KBN_I8 = 3 };
enum kbn_layout { KBN_TILES = 0, KBN_TRITS = 1 };

// The rows of x as patches of images: x is (images, lengths[0], lengths[1], lengths[2], channels), a
// row what a window of this size sees at one of the positions, zeros outside of the image, and
// in_features = size * channels. Images of fewer axes have first ones of 1.
typedef struct kbn_window {
  int64_t lengths[3];
  int64_t positions[3];    // rows = images * positions
  int64_t size[3];
  int64_t strides[3];
  int64_t dilation[3];
  int64_t before[3];       // zeros before the first element
} kbn_window;

// One packed matmul, y = dequantize(quantize(x)) @ dequantize(tiles) + bias. With a gain x is
// normalized first, row by row, as `kbn_norm` says, and rounded to its dtype. Activations that stay
// float are split into whole numbers of 8 bits each, three of float32 and two of the others: off by
// at most 2^-24 or 2^-16 of the largest in their row, and by the rounding of float32.
//
// Sums of a group, or of all inputs, are int32: `in_features` or `group_size` may be at most
// 2^31 / (128 * max |step * (code + offset)|), so 131,071 at 8 bits, 2,097,151 at 4 bits and
// 5 to 16 million below; more is an error. NaN or infinity in a row of x makes its outputs NaN or
// infinite. The mode of the float unit should round to nearest.
// Meaning: keras_bitnet/ops/reference.py; byte layout: keras_bitnet/ops/layout.py.
typedef struct kbn_matmul {
  int64_t rows;            // m
  int64_t in_features;     // k
  int64_t out_features;    // n
  int64_t group_size;      // inputs that share a row of `scale`, a multiple of 32; 0: all
  int32_t bits;            // 1, 2, 4 or 8
  int32_t dtype;           // kbn_dtype of x and y
  int32_t activation_bits; // 8 or 4: codes in [-127, 127] or [-7, 7]; 0: x stays float
  int32_t per_tensor;      // 1: one activation scale for all rows; not of float ones
  float offset;            // w = scale * (code + offset), a multiple of 1/2
  float epsilon;           // lower bound of the absolute maximum of a token
  int32_t scale_columns;   // 1: one scale for all outputs, else out_features
  int32_t layout;          // kbn_layout; trits: bits = 2, codes 0 to 2, no groups
  float norm_epsilon;      // of the norm
  const void* x;           // (m, k), rows contiguous; with a window the images
  const uint8_t* tiles;    // [ceil(n / 16), ceil(k * bits / 32), 16, 4]; trits: ceil(k / 20)
  const float* scale;      // (1 or groups, scale_columns)
  const float* x_scale;    // static activation scale (1), or null: dynamic absmax
  const kbn_window* window; // of the patches that are the rows, or null
  const float* gain;       // (k), `scale` of the norm, or null: no norm; not with per_tensor
  const float* bias;       // (n) or null
  void* y;                 // (m, n)
} kbn_matmul;

// Matmuls of the same activations, which are quantized once: they agree in all but out_features,
// scale_columns, tiles, scale, bias and y.
enum { KBN_MAX_JOINT = 8 };
typedef struct kbn_joint {
  int32_t count;           // 1 to KBN_MAX_JOINT
  const kbn_matmul* matmuls[KBN_MAX_JOINT];
} kbn_joint;

// Runs task(arg, i) for every i in [0, count), in any order, on any threads; returns when all
// are done. Null in place of a `kbn_parallel` means the library's own thread pool.
typedef struct kbn_parallel {
  void (*run)(void* context, int64_t count, void (*task)(void* arg, int64_t index), void* arg);
  void* context;
  int32_t threads;
} kbn_parallel;

// Attention of new tokens of each sequence to a cache, which their keys and values join.
//
// The cache is written from `index` on, nothing behind the new tokens is read. An int8 row is
// `scale * code`.
// Meaning: `attend_next` of keras_bitnet/layers/key_value_cache.py.
typedef struct kbn_attention {
  int64_t batch;
  int64_t tokens;          // new ones of each sequence
  int64_t length;          // tokens that the cache can hold
  int64_t heads;           // of queries, a multiple of
  int64_t key_heads;       // those of keys and values
  int64_t head_dim;        // even where there are tables
  int32_t dtype;           // kbn_dtype of query, key, value and y
  int32_t cache_dtype;     // kbn_dtype, KBN_I8 too
  int64_t tables;          // rows of cosines and sines: 1 or batch
  int64_t masks;           // rows of mask: 1 or batch
  float scale;             // of the scores
  const void* query;       // (batch, tokens, heads, head_dim)
  const void* key;         // (batch, tokens, key_heads, head_dim)
  const void* value;       // the same
  const float* cosines;    // (tables, tokens, head_dim), halves equal, or null: queries and keys are
  const float* sines;      // not turned
  const uint8_t* mask;     // (masks, tokens, length), 0: not seen; or null: all up to a token itself
  const int32_t* index;    // (1): tokens that the cache holds so far
  void* key_cache;         // (batch, key_heads, length, head_dim)
  void* value_cache;       // the same
  float* key_scale;        // (batch, key_heads, length) of an int8 cache, else null
  float* value_scale;      // the same
  void* y;                 // (batch, tokens, heads, head_dim)
} kbn_attention;

// Root mean square normalization, y = x / sqrt(mean(x^2) + epsilon) * scale, row by row.
typedef struct kbn_norm {
  int64_t rows;
  int64_t features;
  int32_t dtype;           // kbn_dtype of x and y
  float epsilon;
  const void* x;           // (rows, features)
  const float* scale;      // (features)
  void* y;                 // (rows, features)
} kbn_norm;

// What a feed-forward block does to the numbers between its projections: max(x, 0), the square of
// that, x * sigmoid(x).
enum kbn_activation { KBN_RELU = 0, KBN_RELU2 = 1, KBN_SILU = 2 };

// New tokens of each sequence through a block of a decoder:
//     a = x + output(attend(query(n), key(n), value(n))),   n = norm(x)
//     y = a + down(activation(gate(m)) * up(m)),            m = norm(a)
// The norms are the gains of the matmuls; query, key and value agree in theirs, gate and up too.
// Every result is rounded to the dtype. Meaning: keras_bitnet/layers/bit_transformer_decoder.py.
typedef struct kbn_block {
  const kbn_matmul* query; // matmuls without x and y, of one dtype, a row for each new token
  const kbn_matmul* key;
  const kbn_matmul* value;
  const kbn_matmul* output;
  const kbn_matmul* up;
  const kbn_matmul* down;
  const kbn_matmul* gate;  // or null: activation(up(m)) in place of the product
  const kbn_attention* attention; // without query, key, value and y
  int32_t activation;      // kbn_activation
  const void* x;           // (batch, tokens, hidden)
  void* y;                 // (batch, tokens, hidden), other memory
} kbn_block;

KBN_API int kbn_abi_version(void);

// Runs the matmul. Returns 0, or a code for `kbn_error`; on error y is untouched. The text belongs
// to the calling thread, until its next call.
KBN_API int kbn_run(const kbn_matmul* problem, const kbn_parallel* parallel);
KBN_API int kbn_run_joint(const kbn_joint* problem, const kbn_parallel* parallel);
KBN_API const char* kbn_error(int code);

// Runs the attention, the norm, or the block; as `kbn_run`.
KBN_API int kbn_attend(const kbn_attention* problem, const kbn_parallel* parallel);
KBN_API int kbn_normalize(const kbn_norm* problem, const kbn_parallel* parallel);
KBN_API int kbn_decode(const kbn_block* block, const kbn_parallel* parallel);

// The codes (m, k) and scales (m) that `kbn_run` makes of the activations, for tests.
KBN_API int kbn_quantize(const kbn_matmul* problem, int8_t* x_codes, float* x_scales);

// The exact integer sums of the reference, `step * (code + offset) * x_code`, for tests:
// x_codes (m, k) int8, sums (m, groups, n) int32. Only shape, bits, offset, group_size, tiles of
// `problem` are read.
KBN_API int kbn_accumulate(const kbn_matmul* problem, const int8_t* x_codes, int32_t* sums);

// Ternary codes as files keep them, five to a byte, (ceil(k / 5), n), first input times 1, the next
// times 3 and so on, as tiles of two bits, on the library's own threads. Returns as `kbn_run`; on error
// the tiles are not defined.
KBN_API int kbn_tiles_from_trits(const uint8_t* packed, int64_t in_features, int64_t out_features,
                                 uint8_t* tiles);

// Instruction set in use ("avx512vnni", "avx2", "neon", "generic", ...); a ','-separated list of
// those that this build and CPU can run; and forcing one, non-zero where it cannot ("auto": the
// best, whatever KERAS_BITNET_ISA says). `kbn_isa` is null where KERAS_BITNET_ISA names none.
KBN_API const char* kbn_isa(void);
KBN_API const char* kbn_isas(void);
KBN_API int kbn_set_isa(const char* name);

// Threads of the library's own pool, the calling one included.
KBN_API void kbn_set_threads(int count);
KBN_API int kbn_threads(void);
