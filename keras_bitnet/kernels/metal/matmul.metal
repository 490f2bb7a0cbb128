// The packed matmul on Apple GPUs: `quantize` the activations, then multiply by the tiles as they
// lie. keras_bitnet/ops/layout.py says where every bit is, ops/reference.py what is computed.
//
// Codes meet activations as floats, since these GPUs have no 8-bit dot product and convert and
// multiply integers at a fraction of the rate of float operations. A code in the low mantissa
// bits of a half that is 1024 reads as 1024 + code, so an AND and an OR make two operands:
//
//     sum (1024 + code) x  -  1024 sum x  =  sum code x
//
// Each is a whole number below 2^24 over the at most 32 inputs of a word, so exact, whatever the
// order of additions and with or without fused multiply-adds.
//
// ASCII only: PyTorch hands this text to the compiler as such.

#include <metal_stdlib>
using namespace metal;

#ifndef SHARED  // tests that run this file as C++ say what is shared there
#define SHARED threadgroup
#endif

// What the host passes: keras_bitnet/kernels/metal/dispatch.py. A list of Python ints arrives as
// longs, one of Python floats as floats.
struct ActivationSizes {
  long rows, inputs, stride, dtype, granularity;  // stride: inputs with padding, a multiple of 4
};
struct ActivationRange {
  float highest, inverse_highest, epsilon;
};
struct MatmulSizes {
  long rows, outputs, stride, tiles, tiles_in_group, scale_columns, has_bias, dtype;
};
struct MatmulGrid {
  float step, shift, inverse_step;  // shift = step * (offset - 1024)
};

enum Dtype { FLOAT32, BFLOAT16, FLOAT16 };
enum Granularity { TOKEN, TENSOR, STATIC };

constant constexpr uint LANES = 32;  // of a SIMD group
constant constexpr uint QUANTIZE_THREADS = 256;
constant constexpr uint MATMUL_THREADS = 128;
constant constexpr uint INFINITE = 0x7f800000;  // float bits; those of a NaN are larger

// --- Activations -----------------------------------------------------------------------------

// bfloat16 goes by its bits: the type is missing before Metal 3.1.
inline float load(device const void* x, ulong index, long dtype) {
  if (dtype == FLOAT32) return ((device const float*)x)[index];
  const ushort bits = ((device const ushort*)x)[index];
  return dtype == BFLOAT16 ? as_type<float>(uint(bits) << 16) : float(as_type<half>(bits));
}

inline ushort bfloat16_bits(float value) {  // rounds halves to even
  const uint bits = as_type<uint>(value);
  if ((bits & 0x7fffffff) > INFINITE) return 0x7fc0;
  return ushort((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

inline void store(device void* y, ulong index, long dtype, float value) {
  if (dtype == FLOAT32) {
    ((device float*)y)[index] = value;
  } else {
    ((device ushort*)y)[index] =
        dtype == BFLOAT16 ? bfloat16_bits(value) : as_type<ushort>(half(value));
  }
}

// The largest magnitude as bits: these are ordered as the floats are, with NaN above all.
inline uint largest_of_row(device const void* x, constant ActivationSizes& sizes, uint row,
                           uint thread_index) {
  uint largest = 0;
  for (uint i = thread_index; i < uint(sizes.inputs); i += QUANTIZE_THREADS) {
    const float value = load(x, ulong(row) * ulong(sizes.inputs) + i, sizes.dtype);
    largest = max(largest, as_type<uint>(value) & 0x7fffffffu);
  }
  return largest;
}

inline uint largest_of_group(uint value, uint thread_index, threadgroup uint* partial) {
  value = simd_max(value);
  if (thread_index % LANES == 0) partial[thread_index / LANES] = value;
  threadgroup_barrier(mem_flags::mem_threadgroup);
  for (uint i = 0; i < QUANTIZE_THREADS / LANES; ++i) value = max(value, partial[i]);
  return value;
}

// One threadgroup a row. Only for a scale per tensor, where `quantize` needs all rows first.
kernel void find_largest(device const void* x [[buffer(0)]],
                         device uint* largest [[buffer(1)]],
                         constant ActivationSizes& sizes [[buffer(2)]],
                         uint row [[threadgroup_position_in_grid]],
                         uint thread_index [[thread_position_in_threadgroup]]) {
  SHARED uint partial[QUANTIZE_THREADS / LANES];
  const uint own = largest_of_row(x, sizes, row, thread_index);
  const uint all = largest_of_group(own, thread_index, partial);
  if (thread_index == 0) largest[row] = all;
}

// One threadgroup a row: codes as halves, which hold them exactly, and the scale of the row.
kernel void quantize(device const void* x [[buffer(0)]],
                     device half* codes [[buffer(1)]],
                     device float* scales [[buffer(2)]],
                     device const uint* largest_of_rows [[buffer(3)]],
                     device const float* static_scale [[buffer(4)]],
                     constant ActivationSizes& sizes [[buffer(5)]],
                     constant ActivationRange& range [[buffer(6)]],
                     uint row [[threadgroup_position_in_grid]],
                     uint thread_index [[thread_position_in_threadgroup]]) {
  SHARED uint partial[QUANTIZE_THREADS / LANES];
  uint largest = 0;
  if (sizes.granularity == TENSOR) {
    for (uint i = thread_index; i < uint(sizes.rows); i += QUANTIZE_THREADS) {
      largest = max(largest, largest_of_rows[i]);
    }
  } else {
    largest = largest_of_row(x, sizes, row, thread_index);
  }
  largest = largest_of_group(largest, thread_index, partial);

  float scale, inverse;
  if (sizes.granularity == STATIC) {
    scale = largest < INFINITE ? static_scale[0] : as_type<float>(largest);
    inverse = precise::divide(1.0f, scale);
  } else {
    const float bound = as_type<float>(max(largest, as_type<uint>(range.epsilon)));
    scale = bound * range.inverse_highest;
    inverse = precise::divide(range.highest, bound);
  }
  for (uint i = thread_index; i < uint(sizes.stride); i += QUANTIZE_THREADS) {
    float code = 0;
    if (i < uint(sizes.inputs)) {
      const float value = load(x, ulong(row) * ulong(sizes.inputs) + i, sizes.dtype);
      code = clamp(rint(value * inverse), -range.highest, range.highest);
    }
    codes[ulong(row) * ulong(sizes.stride) + i] = half(code);
  }
  if (thread_index == 0) scales[row] = scale;
}

// --- Matmul ----------------------------------------------------------------------------------

// Without groups the sums over a word add up as integers; with groups as scaled floats.
inline void add(thread int& sum, float word, device const float* scale) { sum += int(word); }
inline void add(thread float& sum, float word, device const float* scale) { sum += word * *scale; }

inline float column_scale(int sum, device const float* scale) { return *scale; }
inline float column_scale(float sum, device const float* scale) { return 1; }  // it is in the sum

// One lane: four columns of one tile column, every 32nd tile. The four lanes of a tile read its 64
// bytes, a SIMD group eight neighbours, and the words of x are read once for four columns.
template <uint BITS, uint ROWS, typename Sum>
inline void multiply(device const half4* codes, device const uint4* tiles,
                     device const float* scale, constant MatmulSizes& sizes,
                     constant MatmulGrid& grid, uint first_row, uint tile_column,
                     uint thread_index, thread Sum (&sums)[ROWS][4]) {
  constexpr uint DIGITS = 8 / BITS;  // groups of four inputs in a word
  constexpr uint MASK = ((1u << BITS) - 1) * 0x00010001u;
  const uint quarter = thread_index % 4;
  for (uint tile = thread_index / 4; tile < uint(sizes.tiles); tile += MATMUL_THREADS / 4) {
    const uint4 words = tiles[(ulong(tile_column) * ulong(sizes.tiles) + tile) * 4 + quarter];
    float products[ROWS][4] = {};
    float inputs[ROWS] = {};
    for (uint digit = 0; digit < DIGITS; ++digit) {
      float4 x[ROWS];
      for (uint r = 0; r < ROWS; ++r) {
        const ulong row = min(first_row + r, uint(sizes.rows) - 1);
        x[r] = float4(codes[row * ulong(sizes.stride / 4) + tile * DIGITS + digit]);
        inputs[r] += x[r].x + x[r].y + x[r].z + x[r].w;
      }
      for (uint c = 0; c < 4; ++c) {
        const uint word = words[c] >> (BITS * digit);
        const half2 even = as_type<half2>((word & MASK) | 0x64006400u);
        const half2 odd = as_type<half2>(((word >> 8) & MASK) | 0x64006400u);
        for (uint r = 0; r < ROWS; ++r) {
          products[r][c] += float(even.x) * x[r].x + float(odd.x) * x[r].y +
                            float(even.y) * x[r].z + float(odd.y) * x[r].w;
        }
      }
    }
    const uint group = sizes.tiles_in_group == 0 ? 0 : tile / uint(sizes.tiles_in_group);
    for (uint c = 0; c < 4; ++c) {
      const uint column = min(tile_column * 16 + quarter * 4 + c, uint(sizes.scale_columns) - 1);
      device const float* own = scale + ulong(group) * ulong(sizes.scale_columns) + column;
      for (uint r = 0; r < ROWS; ++r) {
        add(sums[r][c], grid.step * products[r][c] + grid.shift * inputs[r], own);
      }
    }
  }
}

// One threadgroup: 16 columns of ROWS rows.
template <uint BITS, uint ROWS, typename Sum>
inline void matmul(device const half4* codes, device const float* x_scale,
                   device const uint4* tiles, device const float* scale,
                   device const float* bias, device void* y, constant MatmulSizes& sizes,
                   constant MatmulGrid& grid, threadgroup Sum* partial, uint2 position,
                   uint thread_index) {
  constexpr uint CELLS = ROWS * 16;
  const uint first_row = position.y * ROWS;
  Sum sums[ROWS][4] = {};
  multiply<BITS, ROWS, Sum>(codes, tiles, scale, sizes, grid, first_row, position.x, thread_index,
                            sums);
  for (uint r = 0; r < ROWS; ++r) {
    for (uint c = 0; c < 4; ++c) {
      Sum sum = sums[r][c];
      for (ushort lane = 4; lane < LANES; lane *= 2) sum += simd_shuffle_xor(sum, lane);
      if (thread_index % LANES < 4) {
        partial[(thread_index / LANES) * CELLS + r * 16 + thread_index % 4 * 4 + c] = sum;
      }
    }
  }
  threadgroup_barrier(mem_flags::mem_threadgroup);
  for (uint cell = thread_index; cell < CELLS; cell += MATMUL_THREADS) {
    const uint row = first_row + cell / 16, column = position.x * 16 + cell % 16;
    if (row >= uint(sizes.rows) || column >= uint(sizes.outputs)) continue;
    Sum sum = 0;
    for (uint i = 0; i < MATMUL_THREADS / LANES; ++i) sum += partial[i * CELLS + cell];
    const float factor =
        column_scale(sum, scale + min(column, uint(sizes.scale_columns) - 1)) * grid.inverse_step;
    float value = float(sum) * factor * x_scale[row];
    if (sizes.has_bias) value += bias[column];
    store(y, ulong(row) * ulong(sizes.outputs) + column, sizes.dtype, value);
  }
}

#define MATMUL(name, BITS, ROWS, Sum)                                                           \
  kernel void name(                                                                             \
      device const half4* codes [[buffer(0)]], device const float* x_scale [[buffer(1)]],       \
      device const uint4* tiles [[buffer(2)]], device const float* scale [[buffer(3)]],         \
      device const float* bias [[buffer(4)]], device void* y [[buffer(5)]],                     \
      constant MatmulSizes& sizes [[buffer(6)]], constant MatmulGrid& grid [[buffer(7)]],       \
      uint2 position [[threadgroup_position_in_grid]],                                          \
      uint2 thread_index [[thread_position_in_threadgroup]]) {                                  \
    SHARED Sum partial[MATMUL_THREADS / LANES * ROWS * 16];                                     \
    matmul<BITS, ROWS, Sum>(codes, x_scale, tiles, scale, bias, y, sizes, grid, partial,        \
                            position, thread_index.x);                                          \
  }

// Decoding is one row. Four rows at a time decode each weight once for all of them.
#define MATMULS(BITS)                            \
  MATMUL(matmul_##BITS##_1, BITS, 1, int)        \
  MATMUL(matmul_##BITS##_4, BITS, 4, int)        \
  MATMUL(grouped_##BITS##_1, BITS, 1, float)     \
  MATMUL(grouped_##BITS##_4, BITS, 4, float)

MATMULS(1)
MATMULS(2)
MATMULS(4)
MATMULS(8)
