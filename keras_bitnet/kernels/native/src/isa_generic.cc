// Portable C++: correct on every machine, and the meaning that the other tables must match.
#include "attend_block.h"
#include "elementwise.h"
#include "normalize.h"
#include "scale.h"

namespace kbn {
namespace {

// Takes the code of the next operand out of a byte.
template <Format F>
int take(unsigned& byte) {
  constexpr int kBits = 8 / operands(F);
  const unsigned whole = F == kTrits ? byte * 3 : byte;
  byte = F == kTrits ? whole & 255 : byte >> kBits;
  return static_cast<int>(F == kTrits ? whole >> 8 : whole & ((1u << kBits) - 1));
}

template <Format F>
void multiply(const Block& block) {
  constexpr int kOperands = operands(F);
  const int columns = block.columns * kTileOutputs;
  int32_t* sums = block.sums;
  int64_t step = 0;
  for (int64_t segment = 0; segment < block.segments; ++segment) {
    memset(sums, 0, sizeof(int32_t) * block.rows * columns);
    for (const int64_t end = step + block.segment_steps; step < end; ++step) {
      const int8_t* x_step = block.x_codes + step * kOperands * 4 * block.rows;
      for (int column = 0; column < columns; ++column) {
        const uint8_t* word = block.tiles + column / kTileOutputs * block.tile_stride +
                              step * kTileBytes + column % kTileOutputs * 4;
        int codes[kOperands][4];
        for (int j = 0; j < 4; ++j) {
          unsigned byte = word[j];
          for (int i = 0; i < kOperands; ++i) codes[i][j] = take<F>(byte);
        }
        for (int row = 0; row < block.rows; ++row) {
          int32_t sum = 0;
          for (int i = 0; i < kOperands; ++i) {
            const int8_t* x = x_step + (i * block.rows + row) * 4;
            for (int j = 0; j < 4; ++j) sum += codes[i][j] * x[j];
          }
          int32_t& to = sums[row * columns + column];
          to = static_cast<int32_t>(static_cast<uint32_t>(to) + static_cast<uint32_t>(sum));
        }
      }
    }
    sums += block.rows * columns;
  }
}

}  // namespace

extern const Kernels kGeneric = {
    "generic", 4, one_column, absmax, quantize, split, sum, interleave,
    {multiply<kBits1>, multiply<kBits2>, multiply<kBits4>, multiply<kBits8>, multiply<kTrits>},
    add_scaled, finish, store, attend, remember, attend_block, normalize, add, activate, nullptr, nullptr,
};

}  // namespace kbn
