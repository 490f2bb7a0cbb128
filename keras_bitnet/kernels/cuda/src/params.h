// What a launch passes to a kernel, for the compilers of both sides. No header is included.
#pragma once

struct Matmul {
  const void* x;             // (rows, k)
  const void* tiles;         // [ceil(n / 16)][k_tiles][16][4] bytes
  const float* scale;        // (1 or groups, scale_columns)
  const float* x_scale;      // static activation scale or null
  const float* bias;         // (n) or null
  void* y;                   // (rows, n)
  unsigned* largest;         // bits of the largest |x| of all rows, or null: of each row
  unsigned char* image;      // quantized activations, see quantize.cuh
  float* row_scale;          // (rows), their scales
  int* row_sum;              // (rows), their sums
  int rows, n, k, k_tiles, group_size, scale_columns;
  int dtype;                 // 0 float32, 1 bfloat16, 2 float16
  int x_aligned, y_aligned;  // whether four neighbours of x, of y can be read and written at once
  int step, step_offset;     // the integer sums are of step * (code + offset)
  float epsilon, highest, inverse_highest, inverse_step;
};
