// The C ABI of the CUDA launcher: plain pointers and sizes; nothing of CUDA is linked or included.
#pragma once
#include <stdint.h>

#define KBC_API extern "C" __attribute__((visibility("default")))

// A kernel may start before the one before it on the stream ends. What it may then read of the tiles:
enum {
  KBC_WEIGHTS_UNKNOWN = 0,  // nothing: an earlier kernel may be writing them
  KBC_WEIGHTS_READY = 1,    // all: nothing wrote them since a launch that said SETTLE on this stream
  KBC_WEIGHTS_SETTLE = 2,   // it does not start early, so that later launches may say READY
};

// One product on the GPU. Every pointer is a device address. Meaning: keras_bitnet/ops/reference.py;
// byte layout: keras_bitnet/ops/layout.py.
typedef struct kbc_matmul {
  int64_t rows;             // m
  int64_t in_features;      // k
  int64_t out_features;     // n
  int64_t group_size;       // inputs that share a row of `scale`, a multiple of 32; 0: all
  int32_t bits;             // 1, 2, 4 or 8
  int32_t dtype;            // of x and y: 0 float32, 1 bfloat16, 2 float16
  int32_t activation_bits;  // 8 or 4; 0: they stay float
  int32_t per_tensor;       // 1: one activation scale for all rows
  float offset;             // w = scale * (code + offset), a multiple of 1/2
  float epsilon;            // lower bound of the absolute maximum
  int32_t scale_columns;    // 1: one scale for all outputs, else out_features
  int32_t kernel;           // 0: the best one; 1 + i: row i of the table of matrix kernels (tests)
  int32_t weights;          // KBC_WEIGHTS_...: who may still be writing the tiles
  const void* x;            // (m, k)
  const void* tiles;        // [ceil(n / 16), ceil(k * bits / 32), 16, 4], at a multiple of 16
  const void* scale;        // float32 (1 or groups, scale_columns)
  const void* x_scale;      // float32 (1), static activation scale, or null: dynamic
  const void* bias;         // float32 (n) or null
  void* y;                  // (m, n)
  void* workspace;          // kbc_workspace() bytes, at a multiple of 256
} kbc_matmul;

// Products of the same activations, which are quantized once: they agree in all but out_features, scale_columns,
// weights, tiles, scale, bias and y. The workspace is the first one's.
enum { KBC_MAX_JOINT = 4 };
typedef struct kbc_joint {
  int32_t count;  // 1 to KBC_MAX_JOINT
  const kbc_matmul* matmuls[KBC_MAX_JOINT];
} kbc_joint;

// One root mean square norm of rows: x / sqrt(mean(x^2) + epsilon) * gain in float32, rounded to the dtype of x. In the
// place of x it may take what is made of x and `other` first, rounded too.
enum {
  KBC_COMBINE_NOTHING = 0,
  KBC_COMBINE_ADD = 1,   // x + other
  KBC_COMBINE_GATE = 2,  // activation(x) * other, without another activation(x)
};
typedef struct kbc_norm {
  int64_t rows;
  int64_t features;    // of a row
  int32_t dtype;       // of all but gain: 0 float32, 1 bfloat16, 2 float16
  int32_t combine;     // KBC_COMBINE_...
  int32_t activation;  // as `kbn_activation` of native/src/bitnet.h: 0 relu, 1 its square, 2 silu
  float epsilon;
  const void* x;       // (rows, features)
  const void* other;   // as x, or null
  const void* gain;    // float32 (features), or null: no norm
  void* combined;      // as x: what is normed, elsewhere than x and other; or null
  void* y;             // as x, where there is a gain
} kbc_norm;

// One fake quantization of training. Meaning: `fake_quantize` in keras_bitnet/quantizers.
typedef struct kbc_fake {
  int64_t rows;           // of x
  int64_t columns;        // of x, the values that a row of activations has
  int64_t group_size;     // of a weight: rows that share a row of `scale`, 0: all
  int32_t weight;         // 0: activations, 1: a weight
  int32_t dtype;          // of x and y; of a weight, which is float32, that of y alone
  int32_t per_tensor;     // of activations: 1: one scale for all rows
  int32_t binary;         // of a weight: levels are the sign, else lowest .. highest
  int32_t scale_columns;  // of a weight: 1, or columns
  float epsilon;          // of activations: lower bound of the absolute maximum
  float lowest, highest;  // levels
  float half;             // of a weight: 1/2 where its levels lie between the integers, else 0
  const void* x;
  const void* x_scale;    // of activations: float32 (1), static scale, or null: dynamic
  const void* scale;      // of a weight: float32 (1 or groups, scale_columns)
  const void* strength;   // float32 (1), or null: 1
  void* y;
  void* workspace;        // 256 bytes where `per_tensor`, else null
} kbc_fake;

// Attention of new tokens of each sequence to the tokens before them and themselves, which they are written
// to a cache for. Meaning: `attend_next` in keras_bitnet/layers/key_value_cache.py.
typedef struct kbc_attention {
  int64_t batch;
  int64_t tokens;         // new ones of each sequence
  int64_t length;         // tokens that a cache can hold
  int32_t heads, key_heads, head_dim;
  int32_t dtype;          // of query, key, value and y: 0 float32, 1 bfloat16, 2 float16
  int32_t cache_dtype;    // of the caches: the same, or 3: int8 with scales
  int32_t tables, masks;  // how many there are: 1 or batch
  float scale;            // of the scores
  const void* query;      // (batch, tokens, heads, head_dim)
  const void* key;        // (batch, tokens, key_heads, head_dim)
  const void* value;      // as key
  const void* cosines;    // float32 (tables, tokens, head_dim) of a rotary embedding, or null: none
  const void* sines;      // as cosines
  const void* mask;       // bytes (masks, tokens, length), 0: not seen; null: all up to a query's own
  const void* index;      // int32 (1), where the first new token goes
  void* key_cache;        // (batch, key_heads, length, head_dim), at a multiple of 16
  void* value_cache;      // as key_cache
  void* key_scale;        // float32 (batch, key_heads, length) of an int8 cache, else null
  void* value_scale;      // as key_scale
  void* y;                // (batch, tokens, heads, head_dim), at a multiple of 8
} kbc_attention;

// New tokens of each sequence through blocks of a decoder, one after another. Meaning: `reference` in
// keras_bitnet/kernels/decoder_block.py. The blocks differ in nothing but the tensors of their own.
enum {
  KBC_BLOCK_WEIGHTS = 7,  // query, key, value, output, up, down, gate
  // Tiles, scale and bias of each weight; the gains of the norms before query, output, up and down; key and value cache
  // and their scales.
  KBC_BLOCK_TENSORS = 3 * KBC_BLOCK_WEIGHTS + 4 + 4,
};
typedef struct kbc_decode {
  int64_t blocks, batch, tokens;
  int64_t length;                              // tokens that a cache can hold
  int64_t features, intermediate;              // of the stream, and inside the feed-forward blocks
  int64_t group_size;                          // as kbc_matmul has it, like what follows
  int32_t heads, key_heads, head_dim;
  int32_t bits, dtype, activation_bits;
  int32_t weights;
  int32_t cache_dtype, tables, masks;          // as kbc_attention has them
  int32_t activation;                          // as kbc_norm has it
  int32_t gated;                               // whether there is a gate
  int32_t scale_columns[KBC_BLOCK_WEIGHTS];
  float offset, epsilon, norm_epsilon;
  float scale;                                 // of the scores
  const void* x;                               // (batch, tokens, features)
  const void *cosines, *sines, *mask, *index;  // as kbc_attention has them
  const void* const* tensors;                  // [blocks][KBC_BLOCK_TENSORS] addresses, null where there is none
  void* y;                                     // as x
  void* workspace;                             // kbc_decode_workspace() bytes, at a multiple of 256
} kbc_decode;

KBC_API int kbc_abi_version(void);

// Opens the driver. Returns null, or why there is none (the same text every time).
KBC_API const char* kbc_open(void);
KBC_API int kbc_device_count(void);
// Ten times the compute capability of a device (90 for 9.0), 0 where there is no such device.
KBC_API int kbc_capability(int device);

// Gives a device the kernels of one width, 0: those of training, -1: of attention, -2: of norms, all the cubins
// that hold them. Later calls for the same width do nothing. Returns null, or what is wrong; texts belong to the calling
// thread, until its next call.
KBC_API const char* kbc_load(int device, int bits, const void* const* cubins, int count);
KBC_API int kbc_loaded(int device, int bits);

// Bytes of workspace, the same on every device.
KBC_API int64_t kbc_workspace(const kbc_matmul* problem);
// Queues the product on a stream of a device. Returns null, or what is wrong.
KBC_API const char* kbc_run(const kbc_matmul* problem, int device, void* stream);
// Queues products of the same activations.
KBC_API const char* kbc_run_joint(const kbc_joint* problem, int device, void* stream);
// Queues a norm on a stream of a device. Returns null, or what is wrong.
KBC_API const char* kbc_run_norm(const kbc_norm* problem, int device, void* stream);
// Queues a fake quantization on a stream of a device. Returns null, or what is wrong.
KBC_API const char* kbc_run_fake(const kbc_fake* problem, int device, void* stream);
// Queues the attention on a stream of a device. Returns null, or what is wrong.
KBC_API const char* kbc_run_attention(const kbc_attention* problem, int device, void* stream);
// Bytes of workspace of blocks of a decoder, the same on every device.
KBC_API int64_t kbc_decode_workspace(const kbc_decode* problem);
// Queues blocks of a decoder on a stream of a device. Returns null, or what is wrong.
KBC_API const char* kbc_run_decode(const kbc_decode* problem, int device, void* stream);
