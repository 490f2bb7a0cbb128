// Ternary codes as files keep them, five to a byte, into tiles of two bits (keras_bitnet/ops/layout.py).
#include <algorithm>
#include <array>
#include <atomic>

#include "driver.h"
#include "kernels.h"
#include "pool.h"

namespace kbn {
namespace {

constexpr int kTritsInByte = 5, kTileInputs = 16, kMostByte = 242;
constexpr uint16_t kNoTrits = 0xffff;

// The codes of a byte, the first in the lowest two bits.
const std::array<uint16_t, 256>& codes_of_bytes() {
  static const auto table = [] {
    std::array<uint16_t, 256> codes;
    for (int byte = 0; byte < 256; ++byte) {
      uint16_t fields = 0;
      for (int i = 0, rest = byte; i < kTritsInByte; ++i, rest /= 3) fields |= rest % 3 << 2 * i;
      codes[byte] = byte > kMostByte ? kNoTrits : fields;
    }
    return codes;
  }();
  return table;
}

// Sixteen codes in their order into a word of a tile, where byte j holds codes 4 * i + j: both bits of i
// change places with those of j.
uint32_t word_of(uint32_t codes) {
  uint32_t other = (codes >> 12 ^ codes) & 0xf0f0u;
  codes ^= other ^ other << 12;
  other = (codes >> 6 ^ codes) & 0x00cc00ccu;
  return codes ^ other ^ other << 6;
}

// One column of tiles. Returns whether all of its bytes hold five trits.
bool fill_column(const uint8_t* packed, int64_t in_features, int64_t out_features, int64_t column,
                 uint8_t* tiles) {
  const auto& table = codes_of_bytes();
  const int64_t first = column * kTileOutputs;
  const int width = static_cast<int>(std::min<int64_t>(kTileOutputs, out_features - first));
  const int64_t tiles_in = (in_features + kTileInputs - 1) / kTileInputs;
  uint64_t waiting[kTileOutputs] = {};  // codes that no tile has yet
  int bits = 0;
  uint32_t worst = 0;
  uint8_t* to = tiles + column * tiles_in * kTileBytes;
  const auto put = [&](uint32_t mask) {
    for (int i = 0; i < kTileOutputs; ++i, to += 4) {
      const uint32_t word = word_of(static_cast<uint32_t>(waiting[i]) & mask);
      for (int j = 0; j < 4; ++j) to[j] = static_cast<uint8_t>(word >> 8 * j);
      waiting[i] >>= 32;
    }
  };
  int64_t left = in_features;
  for (int64_t row = 0; left > 0; ++row) {
    const uint8_t* bytes = packed + row * out_features + first;
    for (int i = 0; i < width; ++i) {
      const uint32_t codes = table[bytes[i]];
      worst = std::max(worst, codes);
      waiting[i] |= static_cast<uint64_t>(codes) << bits;
    }
    bits += 2 * kTritsInByte;
    for (; bits >= 32 && left >= kTileInputs; bits -= 32, left -= kTileInputs) put(~0u);
    if (bits >= 2 * left) break;
  }
  if (left > 0) put((1u << 2 * left) - 1);  // behind the last input a tile is zero
  return worst != kNoTrits;
}

}  // namespace

bool tiles_from_trits(const uint8_t* packed, int64_t in_features, int64_t out_features,
                      uint8_t* tiles) {
  std::atomic<bool> right{true};
  auto fill = [&](int64_t column) {
    if (!fill_column(packed, in_features, out_features, column, tiles)) right = false;
  };
  using Fill = decltype(fill);
  pool_run((out_features + kTileOutputs - 1) / kTileOutputs,
           [](void* fill, int64_t column) { (*static_cast<Fill*>(fill))(column); }, &fill);
  return right;
}

}  // namespace kbn
