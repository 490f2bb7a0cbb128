// AVX-512 with VNNI: `vpdpbusd` multiplies 64 unsigned weight codes by 64 signed activation codes
// and adds them four by four to 16 int32 sums, one for each column of a tile.
#include "zmm.h"

namespace kbn {
namespace {

// Bytes between the prefetched and the used weights of one row, measured (decision note 7).
constexpr int kAhead = 6144, kTritsAhead = 8192;

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

// One row, one column of tiles: bound by memory. An iteration takes 32 inputs, that is `Bits`
// tiles and eight operands. Codes are masked where they stand; as operand i of every tile has its
// own sums, these are shifted only once, at the end of the segment.
template <Format F>
void multiply_row(const uint8_t* tile, const int8_t* x, const Block& block, int32_t* sums,
                  int sums_stride) {
  constexpr int kOperands = operands(F), Bits = 8 / kOperands;
  for (int64_t segment = 0; segment < block.segments; ++segment) {
    __m512i acc[Bits][kOperands];
    KBN_UNROLL for (int u = 0; u < Bits; ++u) {
      KBN_UNROLL for (int i = 0; i < kOperands; ++i) acc[u][i] = _mm512_setzero_si512();
    }
    int64_t step = 0;
    for (; step + Bits <= block.segment_steps; step += Bits) {
      KBN_UNROLL for (int u = 0; u < Bits; ++u) {
        const __m512i raw = _mm512_loadu_si512(tile + u * kTileBytes);
        _mm_prefetch(reinterpret_cast<const char*>(tile) + u * kTileBytes + kAhead, _MM_HINT_T1);
        KBN_UNROLL for (int i = 0; i < kOperands; ++i) {
          dot(acc[u][i], operand<Bits>(raw, i), broadcast(x + (u * kOperands + i) * 4));
        }
      }
      tile += Bits * kTileBytes;
      x += 32;
    }
    for (; step < block.segment_steps; ++step) {
      const __m512i raw = _mm512_loadu_si512(tile);
      KBN_UNROLL for (int i = 0; i < kOperands; ++i) {
        dot(acc[0][i], operand<Bits>(raw, i), broadcast(x + i * 4));
      }
      tile += kTileBytes;
      x += kOperands * 4;
    }
    prefetch_ahead(block, segment, sums - block.sums);
    __m512i total = _mm512_setzero_si512();
    KBN_UNROLL for (int i = 0; i < kOperands; ++i) {
      __m512i sum = acc[0][i];
      KBN_UNROLL for (int u = 1; u < Bits; ++u) sum = _mm512_add_epi32(sum, acc[u][i]);
      total = _mm512_add_epi32(total, _mm512_srai_epi32(sum, Bits * i));
    }
    _mm512_storeu_si512(sums + segment * sums_stride, total);
  }
}

// One row of trits, which are never taken out of their bytes: with v_i for what a byte is when its
// digit i comes first, 256 * digit_i = 3 * v_i - v_(i+1), so that
//     256 * sum digit_i * x_i = 3 * (sum v_i * x_i) - (sum v_(i+1) * x_i).
template <>
void multiply_row<kTrits>(const uint8_t* tile, const int8_t* x, const Block& block, int32_t* sums,
                          int sums_stride) {
  constexpr int kOperands = operands(kTrits);
  for (int64_t segment = 0; segment < block.segments; ++segment) {
    __m512i here[kOperands], next[kOperands];
    KBN_UNROLL for (int i = 0; i < kOperands; ++i) here[i] = next[i] = _mm512_setzero_si512();
    for (int64_t step = 0; step < block.segment_steps; ++step) {
      __m512i v = _mm512_loadu_si512(tile);
      _mm_prefetch(reinterpret_cast<const char*>(tile) + kTritsAhead, _MM_HINT_T1);
      KBN_UNROLL for (int i = 0; i < kOperands; ++i) {
        const __m512i word = broadcast(x + i * 4);
        dot(here[i], v, word);
        v = times_3(v);
        dot(next[i], v, word);
      }
      tile += kTileBytes;
      x += kOperands * 4;
    }
    KBN_UNROLL for (int i = 1; i < kOperands; ++i) {
      here[0] = _mm512_add_epi32(here[0], here[i]);
      next[0] = _mm512_add_epi32(next[0], next[i]);
    }
    const __m512i thrice = _mm512_add_epi32(_mm512_slli_epi32(here[0], 1), here[0]);
    const __m512i total = _mm512_srai_epi32(_mm512_sub_epi32(thrice, next[0]), 8);
    _mm512_storeu_si512(sums + segment * sums_stride, total);
  }
}

template <Format F, int Rows, int Columns>
void multiply_rows(const Block& block) {
  constexpr int kOperands = operands(F);
  const uint8_t* tile = block.tiles;
  const int8_t* x = block.x_codes;
  int32_t* sums = block.sums;
  for (int64_t segment = 0; segment < block.segments; ++segment) {
    KBN_UNROLL for (int c = 0; c < Columns; ++c) {
      prefetch_ahead(block, segment, c * kTileOutputs);
    }
    __m512i acc[Rows][Columns];
    KBN_UNROLL for (int r = 0; r < Rows; ++r) {
      KBN_UNROLL for (int c = 0; c < Columns; ++c) acc[r][c] = _mm512_setzero_si512();
    }
    for (int64_t step = 0; step < block.segment_steps; ++step) {
      Operands<F> from[Columns];
      KBN_UNROLL for (int c = 0; c < Columns; ++c) {
        from[c].load(tile + c * block.tile_stride);
        // The columns that come next: two streams at once, so a fixed distance would miss heads.
        _mm_prefetch(reinterpret_cast<const char*>(tile) + (Columns + c) * block.tile_stride,
                     _MM_HINT_T1);
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
        _mm512_storeu_si512(sums + (r * Columns + c) * kTileOutputs,
                            _mm512_srai_epi32(acc[r][c], Operands<F>::kShift));
      }
    }
    sums += Rows * Columns * kTileOutputs;
  }
}

template <Format F, int Columns>
void multiply_columns(const Block& block) {
  switch (block.rows) {
    case 1:
      for (int c = 0; c < Columns; ++c) {
        multiply_row<F>(block.tiles + c * block.tile_stride, block.x_codes, block,
                           block.sums + c * kTileOutputs, Columns * kTileOutputs);
      }
      return;
    case 2: return multiply_rows<F, 2, Columns>(block);
    case 3: return multiply_rows<F, 3, Columns>(block);
    case 4: return multiply_rows<F, 4, Columns>(block);
    case 5: return multiply_rows<F, 5, Columns>(block);
    case 6: return multiply_rows<F, 6, Columns>(block);
    case 7: return multiply_rows<F, 7, Columns>(block);
    case 8: return multiply_rows<F, 8, Columns>(block);
    case 9: return multiply_rows<F, 9, Columns>(block);
    case 10: return multiply_rows<F, 10, Columns>(block);
    case 11: return multiply_rows<F, 11, Columns>(block);
    default: return multiply_rows<F, 12, Columns>(block);
  }
}

template <Format F>
void multiply(const Block& block) {
  block.columns == 1 ? multiply_columns<F, 1>(block) : multiply_columns<F, 2>(block);
}

}  // namespace

extern const Kernels kAvx512Vnni = {
    "avx512vnni", 12, 2, 4, absmax, quantize, split, sum, interleave,
    {multiply<kBits1>, multiply<kBits2>, multiply<kBits4>, multiply<kBits8>, multiply<kTrits>},
    add_scaled, finish, store, attend, normalize, nullptr,
};

}  // namespace kbn
