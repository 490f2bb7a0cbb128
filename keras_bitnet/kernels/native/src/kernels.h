// What an instruction set provides: a small table of functions. The driver knows nothing else.
//
// Every isa_*.cc is compiled with its own flags and exports one constant table. Such a file must
// not instantiate templates or inline functions with external linkage (not even std::max): the
// linker keeps one copy of those, and the one it keeps may need an instruction that this CPU lacks.
#pragma once
#include <stdint.h>

#include "bitnet.h"

// Before a loop over registers: it must vanish, or they become an array in memory.
#if defined(__clang__)
#define KBN_UNROLL _Pragma("clang loop unroll(full)")
#elif defined(__GNUC__)
#define KBN_UNROLL _Pragma("GCC unroll 16")
#else
#define KBN_UNROLL
#endif
// Before a loop of known length: one that gcc has unrolled it makes no vectors of.
#if defined(__GNUC__) && !defined(__clang__)
#define KBN_KEEP_LOOP _Pragma("GCC unroll 1")
#else
#define KBN_KEEP_LOOP
#endif

namespace kbn {

// How codes lie in a tile of 64 bytes (keras_bitnet/ops/layout.py). A byte holds `operands(format)`
// codes, one for each operand of a dot product: fields of bits, or the digits of a number to the
// base 3. That one is a fraction v of 256: digit i is the whole part of 3 * v / 256, and the rest,
// 3 * v modulo 256, holds the digits after it.
enum Format { kBits1, kBits2, kBits4, kBits8, kTrits, kFormats };

constexpr int operands(int format) { return format == kTrits ? 5 : 8 >> format; }

constexpr int kTileOutputs = 16;
constexpr int kTileBytes = 64;
constexpr int kMaxRows = 32;   // most rows of a block in any table
constexpr int kMaxTiles = 8;   // most column tiles of a block in any table
constexpr float kPlane = 254;  // of a rest in [-1/2, 1/2], the largest code is 127 again
constexpr int kMaxColumns = kMaxTiles * kTileOutputs;

// A block of the product: a few rows of activations times a few columns of tiles.
//
// Activation codes come packed as int8 [k / chunk][rows][chunk]: where a chunk is the four bytes that
// a dot product broadcasts, they lie next to those of the other rows. The sums of
// `sum_k code * x_code` are stored every `segment_steps` tiles: for each group of inputs, or once.
// A segment begins with a chunk.
struct Block {
  const uint8_t* tiles;
  int64_t spread;         // columns of tiles from one to the next that is in the block, 1 or more,
  int64_t tile_stride;    // and bytes
  const int8_t* x_codes;
  int64_t segment_steps;  // tiles along k in a segment
  int64_t segments;
  int32_t* sums;          // [segments][rows][columns * 16]
  int rows;
  int columns;            // columns of tiles
  uintptr_t ahead;        // address of what is needed next from memory, one place a segment with
  int64_t ahead_stride;   // so many bytes between: the scales of the columns after these
};

// What blocks of some number of rows are like.
struct Shape {
  int columns;  // columns of tiles, at most
  int chunk;    // inputs of a row side by side in `Block::x_codes`, 4 or 64
};

// How sums become numbers: y += float(factor * sum + shift * x_sum) * scale, where the bracket is
// exact int32 arithmetic and `x_sum` the sum of the activation codes of the segment.
struct Scaling {
  int32_t factor, shift; // the factor is 1 or 2
  int valid;             // columns of the block that exist
  const int32_t* x_sums; // [rows][x_sums_stride], from the first segment on
  int64_t x_sums_stride;
  const float* scale;    // [segments][scale_stride], from the first segment and column on
  int64_t scale_stride;
  bool shared;           // one scale for all columns
};

// Where the outputs of a block go: y * x_scale + bias as a `kbn_dtype`.
struct Outputs {
  const float* x_scales;  // of each row
  const float* bias;      // of each column, or null
  int dtype;
  char* y;
  int64_t stride;         // bytes from a row to the next
};

// One key head of one sequence: the numbers of its new tokens, and its part of the cache. Those of a
// token lie side by side, and so many numbers behind them those of the next.
struct Head {
  int groups;              // query heads
  int dim;
  int dtype;               // kbn_dtype of query, key, value and y
  int cache_dtype;         // kbn_dtype of keys and values, which may be int8
  float factor;            // of the scores
  int64_t index;           // tokens before the new ones
  int64_t tokens;          // new ones
  const void* query;       // [tokens][groups][dim]
  void* y;                 // the same
  int64_t query_stride;
  const void* key;         // [tokens][dim]
  const void* value;       // the same
  int64_t key_stride;
  const float* cosines;    // [tokens][dim], or null
  const float* sines;
  const uint8_t* mask;     // [tokens][index + tokens], or null
  int64_t mask_stride;
  void* keys;              // [index + tokens][dim]
  void* values;
  float* key_scales;       // [index + tokens], of int8
  float* value_scales;
};

// A matrix of floats in panels of kPanel columns, each [rows][kPanel].
constexpr int kPanel = 64;
struct Panels {
  float* data;
  int64_t rows;
};

// What several new tokens of a head attend to: everything that the cache holds then, as floats.
struct Memory {
  Panels keys;    // dim rows, a column for each token
  Panels values;  // a row for each token
};
constexpr int kQueriesAtOnce = 6;  // a block of queries has a multiple of these
constexpr int kMostQueries = 96;    // that attend together, if one token has no more

constexpr int kLanes = 16;

namespace {  // one copy for each file, as said above

// Bytes of a number of a `kbn_dtype`.
inline int size_of(int dtype) { return dtype == KBN_F32 ? 4 : dtype == KBN_I8 ? 1 : 2; }

// Where the outputs of a column of tiles are, from those of the first.
inline int64_t output(const Block& block, int column) { return column * block.spread * kTileOutputs; }

inline int64_t padded(int64_t count) { return (count + kLanes - 1) / kLanes * kLanes; }

inline float* place_in(const Panels& matrix, int64_t row, int64_t column) {
  return matrix.data + (column / kPanel * matrix.rows + row) * kPanel + column % kPanel;
}

inline int64_t whole_blocks(int64_t queries) {
  return (queries + kQueriesAtOnce - 1) / kQueriesAtOnce * kQueriesAtOnce;
}

// Numbers of the working space of so many queries that attend to so many tokens, and of a matrix.
inline int64_t attention_scratch(int64_t queries, int64_t dim, int64_t seen) {
  return queries * (2 * padded(dim) + padded(seen)) + padded(dim);
}
inline int64_t panels_size(int64_t rows, int64_t columns) {
  return rows * ((columns + kPanel - 1) / kPanel * kPanel);
}

// What numbers of this absolute maximum are quantized with: x = scale * code, code = x * inverse.
struct Step {
  float scale, inverse;
};
inline Step step_of(float absmax, float epsilon, float highest) {
  const float bound = absmax < epsilon ? epsilon : absmax;
  return {bound * (1.0f / highest), highest / bound};
}

}  // namespace

struct Kernels {
  const char* name;
  int rows;                  // a block has at most so many rows,
  Shape (*shape)(int rows);  // and with so many is like this

  // max |x| of `count` numbers of a `kbn_dtype`; NaN where one is NaN.
  float (*absmax)(const void* x, int dtype, int64_t count);

  // codes = clip(rint(x * inverse), -highest, highest), halves to even.
  void (*quantize)(const void* x, int dtype, int64_t count, float inverse, float highest,
                   int8_t* codes);

  // The first `count` numbers as sums of `planes` codes: x * inverse = code_0 + code_1 / kPlane +
  // code_2 / kPlane^2 and so on, up to a half of the last one. |x * inverse| must be at most 127.
  // The codes of a plane begin `stride` behind those of the one before.
  void (*split)(const void* x, int dtype, int64_t count, float inverse, int planes, int8_t* codes,
                int64_t stride);

  // The sum of `count` codes.
  int32_t (*sum)(const int8_t* codes, int64_t count);

  // Packs rows of codes, `stride` apart, as `Block::x_codes`; `count` is a multiple of `chunk`.
  void (*interleave)(const int8_t* codes, int64_t stride, int rows, int64_t count, int chunk,
                     int8_t* packed);

  // Computes a block. A segment may be 16320 inputs long.
  void (*multiply[kFormats])(const Block& block);

  // Adds the sums of every segment of a block, scaled, to y.
  void (*add_scaled)(const Block& block, const Scaling& scaling, float* y);

  // Scales the sums of a block of one segment and writes them.
  void (*finish)(const Block& block, const Scaling& scaling, const Outputs& outputs);

  // out = y * x_scale + bias as a `kbn_dtype`; `bias` may be null.
  void (*store)(const float* y, float x_scale, const float* bias, int dtype, int count, void* out);

  // Writes the one new token to the cache and attends to all up to it.
  void (*attend)(const Head& head, float* scratch);

  // Writes several new tokens to the cache, and all that it holds then to the memory; and attends to
  // that with the queries of some of them. The working space of both is that of `whole_blocks`.
  void (*remember)(const Head& head, const Memory& memory, float* scratch);
  void (*attend_block)(const Head& head, const Memory& memory, int64_t first, int64_t count,
                       float* scratch);

  // One row: y = x / sqrt(mean(x^2) + epsilon) * scale.
  void (*normalize)(const void* x, const float* scale, int dtype, int64_t count, float epsilon,
                    void* y);

  // y = a + b, and y = activation(x) * factor, without a factor activation(x); of a `kbn_activation`.
  void (*add)(const void* a, const void* b, int dtype, int64_t count, void* y);
  void (*activate)(int activation, const void* x, const void* factor, int dtype, int64_t count,
                   void* y);

  // The thread has computed all its blocks for now; may be null.
  void (*leave)();

  // The table for groups that are not whole chunks of 64 inputs; null where this one takes all.
  const Kernels* odd_groups;
};

extern const Kernels kGeneric;
extern const Kernels kAvx2;
extern const Kernels kAvxVnni;
extern const Kernels kAvx512Vnni;
extern const Kernels kAmx;
extern const Kernels kNeon;

}  // namespace kbn
