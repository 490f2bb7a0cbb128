// AMX: `tdpbsud` multiplies 16 rows of 64 signed activation codes by 64 inputs of 16 columns of
// unsigned weight codes. Its register of weights holds 16 operands as a dot product of a vector takes
// them, one below the other: those of stored tiles, taken out and written to memory that stays in the
// first-level cache. Tiles of 8 bits are loaded as they lie.
#include "zmm.h"

namespace kbn {
namespace {

constexpr int kChunk = 64;               // inputs of a register, a row of activations or column of weights
constexpr int kRegisterRows = 16;
constexpr int kRegisterBytes = 1024;
constexpr int kLine = 64;                // bytes of a row of a register
constexpr int kSums = 0, kX = 4, kCodes = 6;  // four registers of sums, two of each operand

// What `ldtilecfg` reads: the shape of each register.
struct alignas(64) Shapes {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t row_bytes[16] = {};
  uint8_t rows[16] = {};

  void set(int index, int used_rows, int bytes) {
    rows[index] = static_cast<uint8_t>(used_rows);
    row_bytes[index] = static_cast<uint16_t>(bytes);
  }
};

// The rows that this thread has set shapes for; 0 between tasks.
thread_local int shaped = 0;

void set_shapes(int rows) {
  if (shaped == rows) return;
  shaped = rows;
  const int upper = rows < kRegisterRows ? rows : kRegisterRows, lower = rows - upper;
  Shapes shapes;
  for (int i = 0; i < 4; ++i) shapes.set(kSums + i, lower > 0 && i >= 2 ? lower : upper, kLine);
  shapes.set(kX, upper, kChunk);
  shapes.set(kX + 1, lower > 0 ? lower : upper, kChunk);
  for (int i = 0; i < 2; ++i) shapes.set(kCodes + i, kRegisterRows, kLine);
  __asm__ volatile("ldtilecfg %0" ::"m"(shapes));
}

void leave() {
  if (shaped != 0) __asm__ volatile("tilerelease");
  shaped = 0;
}

// The intrinsics of gcc 12 do not say that these read and write memory.
template <int Register>
inline void clear() {
  __asm__ volatile("tilezero %%tmm%c0" ::"i"(Register));
}
template <int Register>
inline void read(const void* from, int64_t stride) {
  __asm__ volatile("tileloadd (%0,%1,1), %%tmm%c2" ::"r"(from), "r"(stride), "i"(Register) : "memory");
}
template <int Register>
inline void write(void* to, int64_t stride) {
  __asm__ volatile("tilestored %%tmm%c2, (%0,%1,1)" ::"r"(to), "r"(stride), "i"(Register) : "memory");
}
template <int Sums, int X, int Codes>
inline void dot() {
  __asm__ volatile("tdpbsud %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(Sums), "i"(X), "i"(Codes));
}

// The fewest tiles whose operands fill whole registers, and how many of these they fill. A ring of
// such stages lets the next ones be taken apart while the registers of one are multiplied.
template <Format F>
struct Stage {
  static constexpr int kTiles = F == kTrits ? 16 : 16 / operands(F);
  static constexpr int kRegisters = kTiles * operands(F) / 16;
  static constexpr int kBytes = kRegisters * kRegisterBytes;
  static constexpr int kRing = F == kTrits ? 2 : 4;
};

// Writes the operands of a tile, one below the other.
template <Format F>
inline void take_apart(const uint8_t* tile, uint8_t* to) {
  Operands<F> from;
  from.load(tile);
  constexpr int kOperands = operands(F);
  KBN_UNROLL for (int i = 0; i < kOperands; ++i) _mm512_store_si512(to + i * kLine, from.code(i));
}

template <int N>
struct Number {
  constexpr operator int() const { return N; }
};

// The sums of a block: for each segment, `Height` times `Width` registers.
template <Format F, int Height, int Width>
class Product {
 public:
  explicit Product(const Block& block)
      : block_(block), tiles_(block.segments * block.segment_steps), left_(block.segment_steps) {}

  void run() {
    const int64_t inputs = block_.segment_steps * operands(F) * 4;
    set_shapes(block_.rows);
    for (int i = 0; i < S::kRing / 2; ++i) prepare(nullptr);
    for (int64_t segment = 0; segment < block_.segments; ++segment) {
      int32_t* sums = block_.sums + segment * block_.rows * Width * kTileOutputs;
      multiply(block_.x_codes + segment * inputs * block_.rows, sums);
      KBN_UNROLL for (int c = 0; c < Width; ++c) prefetch_ahead(block_, segment, c);
    }
  }

 private:
  using S = Stage<F>;

  // The sums of the next segment.
  inline void multiply(const int8_t* x, int32_t* sums) {
    clear<kSums>(), clear<kSums + 1>(), clear<kSums + 2>(), clear<kSums + 3>();
    for (int64_t step = 0; step < block_.segment_steps; step += S::kTiles) {
      prepare(sums);
      const uint8_t* const* codes = codes_[at_++ % S::kRing];
      KBN_UNROLL for (int i = 0; i < S::kRegisters; ++i) {
        read<kX>(x, kChunk);
        if (Height > 1) read<kX + 1>(x + kRegisterRows * kChunk, kChunk);
        each([&](auto column) {
          read<kCodes + column % 2>(codes[column] + i * kRegisterBytes, kLine);
          dot<kSums + column, kX, kCodes + column % 2>();
          if (Height > 1) dot<kSums + (2 + column) % 4, kX + 1, kCodes + column % 2>();
        });
        x += kChunk * block_.rows;
      }
    }
    constexpr int kStride = Width * kTileOutputs * sizeof(int32_t);
    each([&](auto column) {
      int32_t* to = sums + column * kTileOutputs;
      write<kSums + column>(to, kStride);
      if (Height > 1) write<kSums + (2 + column) % 4>(to + kRegisterRows * Width * kTileOutputs, kStride);
    });
  }

  // Calls `use` with the number of each column, as a constant.
  template <typename Use>
  static inline void each(const Use& use) {
    use(Number<0>{});
    if constexpr (Width > 1) use(Number<1>{});
    if constexpr (Width > 2) use(Number<2>{});
    if constexpr (Width > 3) use(Number<3>{});
  }

  // Takes the next stage apart, or where none is left, fetches some lines that the sums go to.
  inline void prepare(const int32_t* sums) {
    if (next_ == tiles_) return fetch(sums);
    const int64_t tiles = left_ < S::kTiles ? left_ : S::kTiles;
    const int slot = ready_++ % S::kRing;
    KBN_UNROLL for (int c = 0; c < Width; ++c) {
      const uint8_t* from = block_.tiles + c * block_.tile_stride + next_ * kTileBytes;
      uint8_t* to = ring_[slot][c];
      codes_[slot][c] = F == kBits8 && tiles == S::kTiles ? from : to;
      if (tiles == S::kTiles) {
        KBN_UNROLL for (int t = 0; t < S::kTiles; ++t) {
          prefetch_next<F>(from + t * kTileBytes + Width * block_.tile_stride);
          if (F != kBits8) take_apart<F>(from + t * kTileBytes, to + t * operands(F) * kLine);
        }
      } else {  // zeros stand for what is not there
        memset(to, 0, S::kBytes);
        for (int64_t t = 0; t < tiles; ++t) {
          take_apart<F>(from + t * kTileBytes, to + t * operands(F) * kLine);
        }
      }
    }
    next_ += tiles;
    left_ = left_ == tiles ? block_.segment_steps : left_ - tiles;
  }

  inline void fetch(const int32_t* sums) {
    constexpr int kLines = Height * kRegisterRows * Width * 2 / S::kRing;
    if (sums == nullptr) return;
    const char* line = reinterpret_cast<const char*>(sums) + fetched_ * kLines * kLine;
    KBN_UNROLL for (int i = 0; i < kLines; ++i) __builtin_prefetch(line + i * kLine, 1);
    ++fetched_;
  }

  const Block& block_;
  const int64_t tiles_;  // along k
  int64_t next_ = 0;     // the next one to be taken apart, and
  int64_t left_;         // how many there are from it to the end of its segment
  unsigned ready_ = 0;   // stages that were taken apart
  unsigned at_ = 0;      // and multiplied
  int fetched_ = 0;
  const uint8_t* codes_[S::kRing][Width];
  alignas(64) uint8_t ring_[S::kRing][Width][S::kBytes];
};

// Up to so many rows are bound by memory, or by taking codes apart.
constexpr int kFewRows = 4;

// The registers of sums bound a block: 32 rows and two columns of tiles, or 16 rows and four.
Shape shape(int rows) {
  if (rows == 1) return {8, 4};  // streams that these processors fetch ahead best (decision note 7)
  if (rows <= kFewRows) return kAvx512Vnni.shape(rows);
  return {rows > kRegisterRows ? 2 : 4, kChunk};
}

template <Format F>
void multiply(const Block& block) {
  if (block.rows <= kFewRows) return kAvx512Vnni.multiply[F](block);
  if (block.rows > kRegisterRows) {
    return block.columns == 1 ? Product<F, 2, 1>(block).run() : Product<F, 2, 2>(block).run();
  }
  switch (block.columns) {
    case 1: return Product<F, 1, 1>(block).run();
    case 2: return Product<F, 1, 2>(block).run();
    case 3: return Product<F, 1, 3>(block).run();
    default: return Product<F, 1, 4>(block).run();
  }
}

}  // namespace

extern const Kernels kAmx = {
    "amx", 2 * kRegisterRows, shape, absmax, quantize, split, sum, interleave,
    {multiply<kBits1>, multiply<kBits2>, multiply<kBits4>, multiply<kBits8>, multiply<kTrits>},
    add_scaled, finish, store, attend, remember, attend_block, normalize, add, activate, leave, &kAvx512Vnni,
};

}  // namespace kbn
