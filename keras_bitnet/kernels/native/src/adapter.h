// What the framework adapters share: an op's operands in, a checked `kbn_matmul` out.
#pragma once
#include <stdint.h>

#include "bitnet.h"

namespace kbn_adapter {

struct Shape {
  const int64_t* dims;
  int64_t rank;

  int64_t operator[](int64_t axis) const { return dims[axis < 0 ? axis + rank : axis]; }
  int64_t rows() const {
    int64_t product = 1;
    for (int64_t i = 0; i + 1 < rank; ++i) product *= dims[i];
    return product;
  }
};

// The static facts of a call, attributes of the op in every framework.
struct Attributes {
  int64_t out_features = 0;
  int64_t bits = 0;
  int64_t trits = 0;  // 1: the layout of five trits a byte
  int64_t group_size = 0;
  int64_t activation_bits = 0;
  int64_t per_tensor = 0;
  double offset = 0;
  double epsilon = 0;
};

// Fills the sizes of `problem` and checks every shape that the kernel trusts: a graph that was
// traced, saved and loaded again may bring operands that Python never saw. Pointers and dtype
// are the caller's. Returns what is wrong, or null.
inline const char* describe(const Attributes& a, Shape x, Shape tiles, Shape scale, Shape bias,
                            Shape x_scale, kbn_matmul* problem) {
  if (a.bits != 1 && a.bits != 2 && a.bits != 4 && a.bits != 8) return "bits must be 1, 2, 4 or 8";
  if (a.group_size < 0 || a.out_features < 1) return "group_size or out_features is out of range";
  if (x.rank < 1) return "x must have at least one axis";
  const int64_t k = x[-1], n = a.out_features;
  const int64_t groups = a.group_size ? (k + a.group_size - 1) / a.group_size : 1;
  const int64_t tiles_in = a.trits ? (k + 19) / 20 : (k * a.bits + 31) / 32;
  if (tiles.rank != 4 || tiles[0] != (n + 15) / 16 || tiles[1] != tiles_in || tiles[2] != 16 ||
      tiles[3] != 4)
    return "tiles must be [ceil(out / 16), ceil(in * bits / 32), 16, 4], or ceil(in / 20) of trits";
  if (scale.rank != 2 || scale[0] != groups || (scale[1] != 1 && scale[1] != n))
    return "scale must be (1 or groups, 1 or out)";
  if (bias.rank != 1 || (bias[0] != 0 && bias[0] != n)) return "bias must be (out,), or (0,): none";
  if (x_scale.rank != 1 || (x_scale[0] != 0 && x_scale[0] != 1))
    return "x_scale must be (1,), or (0,): computed from x";
  *problem = kbn_matmul{};
  problem->rows = x.rows();
  problem->in_features = k;
  problem->out_features = n;
  problem->group_size = a.group_size;
  problem->bits = static_cast<int32_t>(a.bits);
  problem->layout = a.trits ? KBN_TRITS : KBN_TILES;
  problem->activation_bits = static_cast<int32_t>(a.activation_bits);
  problem->per_tensor = static_cast<int32_t>(a.per_tensor);
  problem->offset = static_cast<float>(a.offset);
  problem->epsilon = static_cast<float>(a.epsilon);
  problem->scale_columns = static_cast<int32_t>(scale[1]);
  return nullptr;
}

// Runs what `describe` filled, without the empty cases. Returns what is wrong, or null.
inline const char* run(const kbn_matmul& problem, const kbn_parallel* parallel) {
  if (problem.rows == 0) return nullptr;
  const int code = kbn_run(&problem, parallel);
  return code ? kbn_error(code) : nullptr;
}

}  // namespace kbn_adapter

// `kbn_adapter::run` on the library's own pool, on at most `threads` of its threads (0: on all).
KBN_API const char* kbn_run_limited(const kbn_matmul* problem, int32_t threads);
