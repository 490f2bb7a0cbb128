// Cuts a packed matmul in blocks, an attention in heads or a norm in rows, and has a table of kernels
// run them; a block of a decoder is some of these.
#pragma once
#include "bitnet.h"
#include "kernels.h"

namespace kbn {

// What `run` does beside the float output; at most one is given.
struct Probe {
  const int8_t* x_codes = nullptr;  // codes to take instead of quantizing x, and
  int32_t* sums = nullptr;          // where to put the exact sums instead of y
  int8_t* quantized = nullptr;      // only quantize: where to put the codes and
  float* x_scales = nullptr;        // the scales
};

// The problem must have passed the checks of core.cc. Throws std::bad_alloc. A probe is of one
// matmul.
void run(const kbn_joint& problem, const Kernels& kernels, const kbn_parallel* parallel,
         const Probe& probe);

void run(const kbn_attention& problem, const Kernels& kernels, const kbn_parallel* parallel);
void run(const kbn_norm& problem, const Kernels& kernels, const kbn_parallel* parallel);
void run(const kbn_block& block, const Kernels& kernels, const kbn_parallel* parallel);

// As `kbn_tiles_from_trits`; false: a byte holds no five trits.
bool tiles_from_trits(const uint8_t* packed, int64_t in_features, int64_t out_features,
                      uint8_t* tiles);

}  // namespace kbn
