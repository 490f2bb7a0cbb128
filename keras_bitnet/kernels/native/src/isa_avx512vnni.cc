// AVX-512 with VNNI: `vpdpbusd` multiplies 64 unsigned weight codes by 64 signed activation codes
// and adds them four by four to 16 int32 sums, one for each column of a tile.
#include "zmm.h"

namespace kbn {
namespace {

// Of so many rows four columns of tiles have their sums in registers, of more two.
constexpr int kFewRows = 6;

// Given the intrinsic, gcc 12 copies accumulators around the instruction and spills them, which
// halves the speed of the loops below; an operand of inline assembly stays in its register.
inline void dot(__m512i& sums, __m512i codes, __m512i x) {
#if defined(__GNUC__)
  __asm__("vpdpbusd %2, %1, %0" : "+v"(sums) : "v"(codes), "v"(x));
#else
  sums = _mm512_dpbusd_epi32(sums, codes, x);
#endif
}

inline __m512i broadcast(const int8_t* x) {
  int32_t word;
  memcpy(&word, x, 4);
  return _mm512_set1_epi32(word);
}

// Operand i of a tile, its codes where they stand: at bit `Bits * i` of each byte.
template <int Bits>
inline __m512i operand(__m512i raw, int i) {
  const int mask = ((1 << Bits) - 1) << (Bits * i);
  return Bits == 8 ? raw : _mm512_and_si512(raw, _mm512_set1_epi8(static_cast<char>(mask)));
}

// A tile of one of some streams, fetched ahead by hand at the best distance (decision note 7).
template <int Streams>
inline __m512i load(const uint8_t* tile) {
  constexpr int kAhead = Streams > 4 ? 640 : 3072;
  if (Streams != 4) _mm_prefetch(reinterpret_cast<const char*>(tile) + kAhead, _MM_HINT_T1);
  return _mm512_loadu_si512(tile);
}

// One row, bound by memory: columns of tiles side by side are streams. Codes are masked where they stand;
// as operand i of every tile has its own sums, these are shifted only once, at the end of the segment.
template <Format F, int Columns>
struct Row {
  static constexpr int kOperands = operands(F), kBits = 8 / kOperands;
  // Sums enough to hide how long an instruction takes; operands beyond them are shifted down first.
  static constexpr int kMost = Columns > 4 ? 2 : 4, kPlaces = kOperands < kMost ? kOperands : kMost;
  __m512i sums[Columns][kPlaces];

  void clear() {
    KBN_UNROLL for (int c = 0; c < Columns; ++c) {
      KBN_UNROLL for (int i = 0; i < kPlaces; ++i) sums[c][i] = _mm512_setzero_si512();
    }
  }
  void add(const uint8_t* tile, int64_t stride, const int8_t* x) {
    __m512i raw[Columns];
    KBN_UNROLL for (int c = 0; c < Columns; ++c) raw[c] = load<Columns>(tile + c * stride);
    KBN_UNROLL for (int i = 0; i < kOperands; ++i) {
      const __m512i word = broadcast(x + i * 4);
      KBN_UNROLL for (int c = 0; c < Columns; ++c) {
        if (i > 0 && i % kPlaces == 0) raw[c] = _mm512_srli_epi16(raw[c], kPlaces * kBits);
        dot(sums[c][i % kPlaces], operand<kBits>(raw[c], i % kPlaces), word);
      }
    }
  }
  __m512i total(int c) const {
    __m512i total = sums[c][0];
    KBN_UNROLL for (int i = 1; i < kPlaces; ++i) {
      total = _mm512_add_epi32(total, _mm512_srai_epi32(sums[c][i], kBits * i));
    }
    return total;
  }
};

// Trits are never taken out of their bytes: with v_i for what a byte is when its digit i comes first,
// 256 * digit_i = 3 * v_i - v_(i+1), so that
//     256 * sum digit_i * x_i = 3 * (sum v_i * x_i) - (sum v_(i+1) * x_i).
template <int Columns>
struct Row<kTrits, Columns> {
  static constexpr int kOperands = operands(kTrits), kParts = Columns > 4 ? 1 : 2;
  __m512i here[Columns][kParts], next[Columns][kParts];

  void clear() {
    KBN_UNROLL for (int c = 0; c < Columns; ++c) {
      KBN_UNROLL for (int p = 0; p < kParts; ++p) here[c][p] = next[c][p] = _mm512_setzero_si512();
    }
  }
  void add(const uint8_t* tile, int64_t stride, const int8_t* x) {
    __m512i v[Columns];
    KBN_UNROLL for (int c = 0; c < Columns; ++c) v[c] = load<Columns>(tile + c * stride);
    KBN_UNROLL for (int i = 0; i < kOperands; ++i) {
      const __m512i word = broadcast(x + i * 4);
      KBN_UNROLL for (int c = 0; c < Columns; ++c) {
        dot(here[c][i % kParts], v[c], word);
        v[c] = times_3(v[c]);
        dot(next[c][i % kParts], v[c], word);
      }
    }
  }
  __m512i total(int c) const {
    __m512i total = _mm512_setzero_si512();
    KBN_UNROLL for (int p = 0; p < kParts; ++p) {
      const __m512i thrice = _mm512_add_epi32(_mm512_slli_epi32(here[c][p], 1), here[c][p]);
      total = _mm512_add_epi32(total, _mm512_sub_epi32(thrice, next[c][p]));
    }
    return _mm512_srai_epi32(total, 8);
  }
};

// Some columns of a block of one row, from `first` on.
template <Format F, int Columns>
void multiply_row(const Block& block, int first) {
  const uint8_t* tile = block.tiles + first * block.tile_stride;
  const int8_t* x = block.x_codes;
  int32_t* sums = block.sums + first * kTileOutputs;
  for (int64_t segment = 0; segment < block.segments; ++segment) {
    KBN_UNROLL for (int c = 0; c < Columns; ++c) {
      prefetch_ahead(block, segment, first + c);
    }
    Row<F, Columns> row;
    row.clear();
    for (int64_t step = 0; step < block.segment_steps; ++step) {
      row.add(tile, block.tile_stride, x);
      tile += kTileBytes;
      x += operands(F) * 4;
    }
    KBN_UNROLL for (int c = 0; c < Columns; ++c) {
      _mm512_storeu_si512(sums + c * kTileOutputs, row.total(c));
    }
    sums += block.columns * kTileOutputs;
  }
}

template <Format F>
void multiply_row(const Block& block) {
  int first = 0;
  for (; first + 8 <= block.columns; first += 8) multiply_row<F, 8>(block, first);
  for (; first + 4 <= block.columns; first += 4) multiply_row<F, 4>(block, first);
  for (; first + 2 <= block.columns; first += 2) multiply_row<F, 2>(block, first);
  for (; first < block.columns; ++first) multiply_row<F, 1>(block, first);
}

// Some columns of a block, from `first` on, which share the activation codes.
template <Format F, int Rows, int Columns>
void multiply_rows(const Block& block, int first) {
  constexpr int kOperands = operands(F);
  const uint8_t* tile = block.tiles + first * block.tile_stride;
  const int8_t* x = block.x_codes;
  const int width = block.columns * kTileOutputs;
  int32_t* sums = block.sums + first * kTileOutputs;
  for (int64_t segment = 0; segment < block.segments; ++segment) {
    KBN_UNROLL for (int c = 0; c < Columns; ++c) {
      prefetch_ahead(block, segment, first + c);
    }
    __m512i acc[Rows][Columns];
    KBN_UNROLL for (int r = 0; r < Rows; ++r) {
      KBN_UNROLL for (int c = 0; c < Columns; ++c) acc[r][c] = _mm512_setzero_si512();
    }
    for (int64_t step = 0; step < block.segment_steps; ++step) {
      Operands<F> from[Columns];
      KBN_UNROLL for (int c = 0; c < Columns; ++c) {
        from[c].load(tile + c * block.tile_stride);
        prefetch_next<F>(tile + (Columns + c) * block.tile_stride);
      }
      KBN_UNROLL for (int i = 0; i < kOperands; ++i) {
        __m512i codes[Columns];
        KBN_UNROLL for (int c = 0; c < Columns; ++c) codes[c] = from[c].take(i);
        KBN_UNROLL for (int r = 0; r < Rows; ++r) {
          const __m512i word = broadcast(x + (i * Rows + r) * 4);
          KBN_UNROLL for (int c = 0; c < Columns; ++c) dot(acc[r][c], codes[c], word);
        }
      }
      tile += kTileBytes;
      x += kOperands * Rows * 4;
    }
    KBN_UNROLL for (int r = 0; r < Rows; ++r) {
      KBN_UNROLL for (int c = 0; c < Columns; ++c) {
        _mm512_storeu_si512(sums + r * width + c * kTileOutputs,
                            _mm512_srai_epi32(acc[r][c], Operands<F>::kShift));
      }
    }
    sums += Rows * width;
  }
}

template <Format F, int Rows>
void multiply_rows(const Block& block) {
  int first = 0;
  if constexpr (Rows <= kFewRows) {
    for (; first + 4 <= block.columns; first += 4) multiply_rows<F, Rows, 4>(block, first);
  }
  for (; first + 2 <= block.columns; first += 2) multiply_rows<F, Rows, 2>(block, first);
  if (first < block.columns) multiply_rows<F, Rows, 1>(block, first);
}

template <Format F>
void multiply(const Block& block) {
  switch (block.rows) {
    case 1: return multiply_row<F>(block);
    case 2: return multiply_rows<F, 2>(block);
    case 3: return multiply_rows<F, 3>(block);
    case 4: return multiply_rows<F, 4>(block);
    case 5: return multiply_rows<F, 5>(block);
    case 6: return multiply_rows<F, 6>(block);
    case 7: return multiply_rows<F, 7>(block);
    case 8: return multiply_rows<F, 8>(block);
    case 9: return multiply_rows<F, 9>(block);
    case 10: return multiply_rows<F, 10>(block);
    case 11: return multiply_rows<F, 11>(block);
    default: return multiply_rows<F, 12>(block);
  }
}

Shape shape(int rows) { return {rows > 1 && rows <= kFewRows ? 4 : 2, 4}; }

}  // namespace

extern const Kernels kAvx512Vnni = {
    "avx512vnni", 12, shape, absmax, quantize, split, sum, interleave,
    {multiply<kBits1>, multiply<kBits2>, multiply<kBits4>, multiply<kBits8>, multiply<kTrits>},
    add_scaled, finish, store, attend, remember, attend_block, normalize, add, activate, nullptr, nullptr,
};

}  // namespace kbn
