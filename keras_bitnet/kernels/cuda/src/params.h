// What a launch passes to a kernel, for the compilers of both sides. No header is included.
#pragma once

// What each of several products of the same activations has of its own.
struct Product {
  const void* tiles;         // [ceil(n / 16)][k_tiles][16][4] bytes
  const float* scale;        // (1 or groups, scale_columns)
  const float* bias;         // (n) or null
  void* y;                   // (rows, n)
  int n, scale_columns;
  int y_aligned;             // whether four neighbours of y can be written at once
  int first_block, blocks;   // along y of the grid: those that compute this product
};

// What they share.
struct Activations {
  const void* x;             // (rows, k)
  const float* x_scale;      // static activation scale or null
  unsigned* largest;         // bits of the largest |x| of all rows, or null: of each row
  unsigned char* image;      // quantized activations, see quantize.cuh
  float* row_scale;          // (rows * planes), their scales
  int* row_sum;              // (rows * planes), their sums
  int rows, k, k_tiles, group_size;
  int planes;                // rows of the image for one of x: 1; 2 or 4 where x stays float
  int dtype;                 // 0 float32, 1 bfloat16, 2 float16
  int x_aligned;             // whether four neighbours of x can be read at once
  int wide_blocks;           // of the grid along y, of kernels with narrower blocks behind them: see wgmma.cuh
  int weights_ready;         // whether no kernel of the stream that may still run writes the weights
  int step, step_offset;     // the integer sums are of step * (code + offset)
  float epsilon, highest, inverse_highest, inverse_step;
};

struct Matmul : Activations, Product {};

constexpr int MOST_PRODUCTS = 4;
struct Matmuls : Activations {
  Product of[MOST_PRODUCTS];  // those that are not there begin behind the last block
};

constexpr int WGMMA_COLUMNS = 256, NARROW_COLUMNS = 192;  // of a block of wgmma.cuh

// The widths of weights whose blocks of so many rows have four warp groups of 64 columns in gemm_wgmma.cuh, added up;
// those of others have two of 128 columns. What was faster.
constexpr int FOUR_GROUPS_16 = 2 + 4 + 8, FOUR_GROUPS_32 = 8, FOUR_GROUPS_64 = 1 + 2 + 8, FOUR_GROUPS_128 = 2 + 4;

// One root mean square norm of rows, see norm.cuh.
struct Norm {
  const void* x;      // (rows, k)
  const float* gain;  // (k), or null: no norm
  void* y;            // (rows, k)
  const void* other;  // (rows, k): added to x, or what its activation is multiplied with, or null
  void* combined;     // (rows, k): what is normed, or null
  int k, activation;
  int aligned;        // whether four neighbours of x, gain and y can be read and written at once
  float epsilon;
};

// One fake quantization of training: rounded to the grid and back, see fake_quantize.cuh.
struct Fake {
  const void* x;           // activations (rows, k), or a float32 weight (rows, k)
  const float* x_scale;    // of activations: static scale, or null: computed from them
  const float* scale;      // of a weight: (1 or groups, scale_columns)
  const float* strength;   // how much quantization acts, or null: 1
  void* y;                 // (rows, k)
  unsigned* largest;       // bits of the largest |x| of all rows, or null: of each row
  long long rows;
  int k, group_size, scale_columns;
  int dtype;               // of activations and of y, as in Matmul
  int x_aligned, y_aligned;
  float epsilon, lowest, highest, inverse_highest;
  float half;              // levels of a weight lie at half + integers
  int binary;              // levels are the sign: highest where the ratio is >= 0, else lowest
};

// Attention of new tokens to a cache, see attention.cuh and attention_many.cuh.
struct Attention {
  const void* query;         // (batch, tokens, heads, head_dim)
  const void* key;           // (batch, tokens, key_heads, head_dim), of the new tokens, as `value`
  const void* value;
  const float* cosines;      // (batch or 1, tokens, head_dim), or null: queries and keys are not turned
  const float* sines;
  const unsigned char* mask; // (batch or 1, tokens, length), 0: not seen; null: all tokens up to the query's own
  const int* index;          // (1), the place of the first new token
  void* key_cache;           // (batch, key_heads, length, head_dim), as `value_cache`
  void* value_cache;
  float* key_scale;          // (batch, key_heads, length), of a cache of int8, as `value_scale`
  float* value_scale;
  void* y;                   // as `query`
  int heads, key_heads, head_dim, length, tokens;
  int dtype;                 // of query, key, value and y, as in Matmul
  long long table_step, mask_step;  // from a sequence to the next, 0: one for all
  float scale;               // of the scores
};
