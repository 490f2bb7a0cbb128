#include "driver.h"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstring>

#include "pool.h"
#include "scratch.h"

namespace kbn {
namespace {

constexpr int64_t kSmall = 3 << 19;             // multiply-adds not worth waking a thread for
constexpr int64_t kActivationBytes = 384 << 10; // activations kept in the L2 cache for a pass
constexpr int64_t kWeightBytes = 512 << 10;     // weights that stay in it beside a block of rows
constexpr int kSumsPerBlock = 4096;             // numbers in the buffer that a block fills
// Kernels may sum codes that are still shifted left, so int32 bounds the inputs of a segment.
constexpr int64_t kLongestSegment = 16320;  // whole tiles and whole chunks of every format
constexpr float kLeast = 1e-30f;  // absolute maximum of float activations: its inverse is finite

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
int64_t round_up(int64_t a, int64_t b) { return ceil_div(a, b) * b; }

// Remembers the weights at `tiles`, of which helpers begin with `own`, as what came after those of the
// call before. Returns what came after these the last time: a network reads its weights in one order.
// Where calls of several threads mix, or places collide, something else is fetched for nothing.
Ahead followed_by(const uint8_t* tiles, const Ahead& own) {
  struct Place {
    std::atomic<uintptr_t> end{0};
    std::atomic<int64_t> bytes{0};
  };
  constexpr int kLogPlaces = 12;
  static Place places[1 << kLogPlaces];
  static std::atomic<uint32_t> before{0};
  const uint64_t mixed = reinterpret_cast<uintptr_t>(tiles) / kTileBytes * 0x9E3779B97F4A7C15u;
  const auto place = static_cast<uint32_t>(mixed >> (64 - kLogPlaces));
  Place& last = places[before.exchange(place, std::memory_order_relaxed)];
  last.end.store(own.end, std::memory_order_relaxed);
  last.bytes.store(own.bytes, std::memory_order_relaxed);
  return {places[place].end.load(std::memory_order_relaxed),
          places[place].bytes.load(std::memory_order_relaxed)};
}

class Matmul {
 public:
  Matmul(const kbn_joint& problem, const Kernels& kernels, const kbn_parallel* parallel,
         const Probe& probe)
      : p_(*problem.matmuls[0]),
        count_(problem.count),
        kernels_(kernels),
        parallel_(parallel),
        probe_(probe),
        format_(format_of(p_)),
        planes_(planes_of(p_)),
        rows_(p_.rows * planes_),
        tile_inputs_(4 * operands(format_)),
        tiles_in_(ceil_div(p_.in_features, tile_inputs_)),
        groups_(p_.group_size ? ceil_div(p_.in_features, p_.group_size) : 1),
        row_blocks_(ceil_div(p_.rows, kernels.rows / planes_)),
        shape_(kernels.shape(static_cast<int>(ceil_div(p_.rows, row_blocks_) * planes_))),
        columns_(shape_.columns),
        packed_inputs_(round_up(tiles_in_ * tile_inputs_, shape_.chunk)),
        factor_(p_.offset == std::floor(p_.offset) ? 1 : 2),
        shift_(static_cast<int32_t>(factor_ * p_.offset)),
        unit_(1.0f / static_cast<float>(factor_)) {
    const int64_t segment = p_.group_size ? p_.group_size : kLongestSegment;
    segment_tiles_ = std::min(tiles_in_, segment / tile_inputs_);
    for (int i = 0; i < count_; ++i) {
      weights_[i].p = problem.matmuls[i];
      weights_[i].tiles = ceil_div(weights_[i].p->out_features, kTileOutputs);
      tiles_out_ += weights_[i].tiles;
    }
    slot_bytes_ = ceil_div(p_.rows, row_blocks_) * planes_ * packed_inputs_;
    row_bytes_ = p_.gain || p_.window ? p_.in_features * size_of(p_.dtype) : 0;
  }

  void run() {
    const int threads = parallel_ ? parallel_->threads : pool_threads();
    const bool small =
        threads < 2 || rows_ * packed_inputs_ < kSmall / (tiles_out_ * kTileOutputs);
    const bool few = small || rows_ * packed_inputs_ < kSmall / 16;
    const int64_t shares = threads * 8;  // small enough to share the work evenly
    shares_ = few ? 1 : std::min(row_blocks_, shares);
    by_rows_ = row_blocks_ >= 4 * shares_ && tiles_in_ * tiles_out_ * kTileBytes <= kWeightBytes;

    const int64_t codes = round_up((by_rows_ ? shares_ : row_blocks_) * slot_bytes_, 64);
    const int64_t scales = round_up(p_.rows * 4, 64);
    const int64_t sums = round_up(rows_ * groups_ * 4, 64);
    const int64_t work = round_up(shares_ * slot_bytes_, 64);
    // All memory comes from here: a task must not throw.
    Scratch scratch(codes + scales + sums + work + shares_ * row_bytes_);
    x_codes_ = reinterpret_cast<int8_t*>(scratch.data());
    x_scales_ = reinterpret_cast<float*>(scratch.data() + codes);
    x_sums_ = reinterpret_cast<int32_t*>(scratch.data() + codes + scales);
    codes_in_work_ = reinterpret_cast<int8_t*>(scratch.data() + codes + scales + sums);
    row_in_work_ = reinterpret_cast<char*>(codes_in_work_ + work);

    if (p_.per_tensor && !p_.x_scale) {
      tensor_absmax_ = p_.window ? absmax_of_images()
                                 : kernels_.absmax(p_.x, p_.dtype, p_.rows * p_.in_features);
    }
    run_tasks(parallel_, few, shares_, [this](int64_t i) { take_rows(i); });
    if (by_rows_ || probe_.quantized) return;

    plan_columns(small ? 1 : threads);
    run_tasks(parallel_, small, tasks_, [this](int64_t i) { multiply_columns(i); }, ahead());
  }

 private:
  static Format format_of(const kbn_matmul& p) {
    if (p.layout == KBN_TRITS) return kTrits;
    return p.bits == 1 ? kBits1 : p.bits == 2 ? kBits2 : p.bits == 4 ? kBits4 : kBits8;
  }

  // The weights of one matmul: blocks of columns, and the tasks that share them.
  struct Weights {
    const kbn_matmul* p = nullptr;
    int64_t tiles = 0;  // along the outputs
    int64_t blocks = 0;
    int64_t tasks = 0;
  };

  // Blocks and tasks: small enough to share the work evenly, large enough to stream. The columns of
  // a block of one row are streams, which go on in the next block of a task (decision note 7).
  void plan_columns(int threads) {
    while (columns_ > 1 && tiles_out_ < 4 * threads * columns_) columns_ /= 2;
    int64_t blocks = 0;
    for (int i = 0; i < count_; ++i) blocks += weights_[i].blocks = ceil_div(weights_[i].tiles, columns_);
    const int64_t streams = std::clamp<int64_t>(blocks / (5 * threads), 2, 8);
    const int64_t least = threads * (rows_ == 1 ? streams : 8);
    const int64_t tasks = std::min(blocks, std::max(least, ceil_div(blocks, 16)));
    for (int i = 0; i < count_; ++i) {
      weights_[i].tasks = std::max<int64_t>(1, (2 * tasks * weights_[i].blocks + blocks) / (2 * blocks));
      tasks_ += weights_[i].tasks;
    }
  }

  // What helpers fetch after this product, if memory bounds it: weights of the next.
  Ahead ahead() const {
    if (rows_ > 1) return {};
    const Weights& last = weights_[count_ - 1];
    const int64_t begin = last.blocks * (last.tasks - 1) / last.tasks * columns_;
    const int64_t column_bytes = tiles_in_ * kTileBytes;
    const auto tiles = reinterpret_cast<uintptr_t>(last.p->tiles);
    return followed_by(weights_[0].p->tiles,
                       {tiles + last.tiles * column_bytes, (last.tiles - begin) * column_bytes});
  }

  // Rows of codes that a row of x becomes.
  static int planes_of(const kbn_matmul& p) {
    return p.activation_bits ? 1 : p.dtype == KBN_F32 ? 3 : 2;
  }

  // Blocks of nearly equal size, in rows of codes; those of one row of x stay together.
  int64_t first_row(int64_t block) const { return p_.rows * block / row_blocks_ * planes_; }

  // A row of x. A patch is gathered, and a row normalized, in memory of the share.
  const char* x_row(int64_t row, int64_t share) const {
    char* own = row_in_work_ + share * row_bytes_;
    const char* x = own;
    if (p_.window) {
      gather(row, own);
    } else {
      x = static_cast<const char*>(p_.x) + row * p_.in_features * size_of(p_.dtype);
      if (!p_.gain) return x;
    }
    if (p_.gain) kernels_.normalize(x, p_.gain, p_.dtype, p_.in_features, p_.norm_epsilon, own);
    return own;
  }

  // What the window sees at the position of a row.
  void gather(int64_t row, char* to) const {
    const kbn_window& w = *p_.window;
    const char* x = static_cast<const char*>(p_.x);
    int64_t first[3];
    for (int axis = 2; axis >= 0; --axis) {
      first[axis] = row % w.positions[axis] * w.strides[axis] - w.before[axis];
      row /= w.positions[axis];
    }
    // Neighbours of the last axis lie side by side.
    const int64_t run = w.dilation[2] == 1 ? w.size[2] : 1;
    const int64_t pixel = p_.in_features / (w.size[0] * w.size[1] * w.size[2]) * size_of(p_.dtype);
    for (int64_t i = 0; i < w.size[0]; ++i) {
      const int64_t at_0 = first[0] + i * w.dilation[0];
      for (int64_t j = 0; j < w.size[1]; ++j) {
        const int64_t at_1 = first[1] + j * w.dilation[1];
        const bool inside =
            at_0 >= 0 && at_0 < w.lengths[0] && at_1 >= 0 && at_1 < w.lengths[1];
        const int64_t length = inside ? w.lengths[2] : 0;  // outside all is zero
        const int64_t line = ((row * w.lengths[0] + at_0) * w.lengths[1] + at_1) * w.lengths[2];
        for (int64_t k = 0; k < w.size[2]; k += run, to += run * pixel) {
          const int64_t at_2 = first[2] + k * w.dilation[2];
          const int64_t begin = std::clamp<int64_t>(-at_2, 0, run);
          const int64_t end = std::clamp<int64_t>(length - at_2, begin, run);
          std::memset(to, 0, begin * pixel);
          if (end > begin) {
            std::memcpy(to + begin * pixel, x + (line + at_2 + begin) * pixel, (end - begin) * pixel);
          }
          std::memset(to + end * pixel, 0, (run - end) * pixel);
        }
      }
    }
  }

  // The absolute maximum of the pixels that the window sees anywhere, NaN where one is NaN.
  float absmax_of_images() const {
    const kbn_window& w = *p_.window;
    const int64_t channels = p_.in_features / (w.size[0] * w.size[1] * w.size[2]);
    const int64_t images = p_.rows / (w.positions[0] * w.positions[1] * w.positions[2]);
    const char* pixel = static_cast<const char*>(p_.x);
    float largest = 0;
    for (int64_t i = 0; i < images * w.lengths[0]; ++i) {
      for (int64_t j = 0; j < w.lengths[1]; ++j) {
        const bool line = sees(0, i % w.lengths[0]) && sees(1, j);
        for (int64_t k = 0; k < w.lengths[2]; ++k, pixel += channels * size_of(p_.dtype)) {
          if (!line || !sees(2, k)) continue;
          const float absmax = kernels_.absmax(pixel, p_.dtype, channels);
          if (!(absmax <= largest)) largest = absmax;
          if (std::isnan(largest)) return largest;
        }
      }
    }
    return largest;
  }

  // Whether a tap at any position looks at this place of an axis.
  bool sees(int axis, int64_t place) const {
    const kbn_window& w = *p_.window;
    for (int64_t tap = 0; tap < w.size[axis]; ++tap) {
      const int64_t first = place + w.before[axis] - tap * w.dilation[axis];
      if (first >= 0 && first % w.strides[axis] == 0 && first / w.strides[axis] < w.positions[axis]) {
        return true;
      }
    }
    return false;
  }

  // One task: quantizes some blocks of rows. Where the weights stay in the cache it multiplies each
  // block right away, whose codes never leave the cache either.
  void take_rows(int64_t share) {
    const int64_t end = row_blocks_ * (share + 1) / shares_;
    for (int64_t block = row_blocks_ * share / shares_; block < end; ++block) {
      int8_t* packed = x_codes_ + (by_rows_ ? share : block) * slot_bytes_;
      quantize_block(block, share, packed);
      if (!by_rows_ || probe_.quantized) continue;
      for (int i = 0; i < count_; ++i) {
        for (int64_t tile = 0; tile < weights_[i].tiles; tile += columns_) {
          multiply_block(weights_[i], block, packed, tile);
        }
      }
    }
    leave();
  }

  // Quantizes the rows of a block and packs them as `Block::x_codes` wants them.
  void quantize_block(int64_t block, int64_t share, int8_t* packed) {
    const int64_t begin = first_row(block), rows = first_row(block + 1) - begin;
    int8_t* codes = rows == 1 ? packed : codes_in_work_ + share * slot_bytes_;
    for (int64_t row = 0; row < rows; row += planes_) {
      quantize_row((begin + row) / planes_, share, codes + row * packed_inputs_);
    }
    if (rows == 1) return;
    kernels_.interleave(codes, packed_inputs_, static_cast<int>(rows), packed_inputs_, shape_.chunk,
                        packed);
  }

  // The codes of a row of x, those of one plane after another.
  void quantize_row(int64_t row, int64_t share, int8_t* codes) {
    const int64_t k = p_.in_features;
    if (probe_.x_codes) {
      std::memcpy(codes, probe_.x_codes + row * k, k);
    } else {
      const float highest = p_.activation_bits == 4 ? 7.0f : 127.0f;
      const char* x = x_row(row, share);
      float absmax = tensor_absmax_;
      if (!p_.per_tensor || p_.x_scale) absmax = kernels_.absmax(x, p_.dtype, k);
      Step step = step_of(absmax, p_.activation_bits ? p_.epsilon : kLeast, highest);
      if (p_.x_scale) step = {*p_.x_scale, 1.0f / *p_.x_scale};
      if (!std::isfinite(absmax)) {
        // The scale carries NaN or infinity to every output, which no integer could.
        std::memset(codes, 0, planes_ * packed_inputs_);
        step.scale = absmax;
      } else if (p_.activation_bits) {
        kernels_.quantize(x, p_.dtype, k, step.inverse, highest, codes);
      } else {
        kernels_.split(x, p_.dtype, k, step.inverse, planes_, codes, packed_inputs_);
      }
      x_scales_[row] = step.scale * unit_;
      if (probe_.x_scales) probe_.x_scales[row] = step.scale;
    }
    if (probe_.quantized) std::memcpy(probe_.quantized + row * k, codes, k);
    for (int plane = 0; plane < planes_; ++plane, codes += packed_inputs_) {
      std::memset(codes + k, 0, packed_inputs_ - k);
      sum_codes(codes, x_sums_ + (row * planes_ + plane) * groups_);
    }
  }

  // The sum of the codes of each group of inputs.
  void sum_codes(const int8_t* codes, int32_t* sums) const {
    const int64_t k = p_.in_features;
    for (int64_t group = 0; group < groups_; ++group) {
      const int64_t begin = group * p_.group_size;
      const int64_t end = p_.group_size ? std::min(begin + p_.group_size, k) : k;
      sums[group] = kernels_.sum(codes + begin, end - begin);
    }
  }

  // One task: some columns of tiles, all rows. The columns are read again for each pass of rows
  // that fits in the cache.
  void multiply_columns(int64_t task) {
    const Weights* found = weights_;
    for (; task >= found->tasks; ++found) task -= found->tasks;
    const Weights& w = *found;
    const int64_t begin = w.blocks * task / w.tasks * columns_;
    const int64_t end = std::min(w.blocks * (task + 1) / w.tasks * columns_, w.tiles);
    const int64_t pass =
        std::max<int64_t>(1, kActivationBytes / (packed_inputs_ * kernels_.rows));
    for (int64_t first = 0; first < row_blocks_; first += pass) {
      const int64_t last = std::min(first + pass, row_blocks_);
      int64_t tile = begin;
      if (rows_ == 1) {  // an odd distance keeps the streams out of each other's cache sets
        const int64_t whole = (std::min(end, w.p->out_features / kTileOutputs) - begin) / columns_;
        const int64_t spread = whole > 1 && whole % 2 == 0 ? whole - 1 : whole;
        for (; tile < begin + spread; ++tile) multiply_block(w, 0, x_codes_, tile, spread);
        tile = begin + spread * columns_;
      }
      for (; tile < end; tile += columns_) {
        for (int64_t block = first; block < last; ++block) {
          multiply_block(w, block, x_codes_ + block * slot_bytes_, tile);
        }
      }
    }
    leave();
  }

  void leave() const {
    if (kernels_.leave) kernels_.leave();
  }

  // A block of columns from a tile on: the next ones, or each `spread`-th, all of which exist.
  void multiply_block(const Weights& weights, int64_t row_block, const int8_t* x_codes, int64_t tile,
                      int64_t spread = 1) {
    const kbn_matmul& w = *weights.p;
    const int64_t row = first_row(row_block);
    Block block;
    block.rows = static_cast<int>(first_row(row_block + 1) - row);
    block.columns = columns_;
    if (spread == 1) block.columns = static_cast<int>(std::min<int64_t>(columns_, weights.tiles - tile));
    block.spread = spread;
    block.tile_stride = spread * tiles_in_ * kTileBytes;
    p_.group_size ? multiply_groups(w, block, row, x_codes, tile)
                  : multiply_whole(w, block, row, x_codes, tile);
  }

  void multiply_whole(const kbn_matmul& w, Block& block, int64_t row, const int8_t* x_codes, int64_t tile) {
    const int size = block.rows * block.columns * kTileOutputs;
    alignas(64) int32_t total[kMaxRows * kMaxColumns];
    block.segments = 1;
    for (int64_t step = 0; step < tiles_in_; step += segment_tiles_) {
      alignas(64) int32_t sums[kMaxRows * kMaxColumns];
      block.segment_steps = std::min(segment_tiles_, tiles_in_ - step);
      block.sums = step == 0 ? total : sums;
      multiply_segments(w, block, x_codes, tile, step, 0);
      if (step > 0) add(sums, size, total);
    }
    block.sums = total;
    if (probe_.sums) return hand_out(w, block, row, tile, 0);
    const Scaling scaling = scaling_of(w, block, row, tile, 0);
    if (planes_ == 1) return kernels_.finish(block, scaling, outputs_of(w, row, tile));
    alignas(64) float y[kMaxRows * kMaxColumns];
    std::memset(y, 0, sizeof(float) * size);
    kernels_.add_scaled(block, scaling, y);
    store(w, block, row, tile, y);
  }

  // The sums of every group of inputs have scales of their own.
  void multiply_groups(const kbn_matmul& w, Block& block, int64_t row, const int8_t* x_codes, int64_t tile) {
    const int size = block.rows * block.columns * kTileOutputs;
    alignas(64) int32_t sums[kSumsPerBlock];
    alignas(64) float y[kMaxRows * kMaxColumns];
    std::memset(y, 0, sizeof(float) * size);
    block.sums = sums;
    const int64_t most = kSumsPerBlock / size;
    for (int64_t step = 0, segment = 0; step < tiles_in_; segment += block.segments) {
      // Whole segments, as many as the buffer holds; at the end the short one.
      const int64_t whole = (tiles_in_ - step) / segment_tiles_;
      block.segments = whole > 0 ? std::min(whole, most) : 1;
      block.segment_steps = whole > 0 ? segment_tiles_ : tiles_in_ - step;
      multiply_segments(w, block, x_codes, tile, step, segment);
      if (probe_.sums) {
        hand_out(w, block, row, tile, segment);
      } else {
        kernels_.add_scaled(block, scaling_of(w, block, row, tile, segment), y);
      }
      step += block.segments * block.segment_steps;
    }
    if (!probe_.sums) store(w, block, row, tile, y);
  }

  // The sums of some segments of a block, from a tile along k on.
  void multiply_segments(const kbn_matmul& w, Block& block, const int8_t* x_codes, int64_t tile,
                         int64_t step, int64_t segment) const {
    block.tiles = w.tiles + (tile * tiles_in_ + step) * kTileBytes;
    block.x_codes = x_codes + step * tile_inputs_ * block.rows;
    block.ahead_stride = w.scale_columns * int64_t{sizeof(float)};
    block.ahead = reinterpret_cast<uintptr_t>(w.scale) + segment * block.ahead_stride +
                  next_column(w, block, tile) * sizeof(float);
    kernels_.multiply[format_](block);
  }

  // Modulo 2^32: a part may leave int32 where the whole does not.
  static void add(const int32_t* sums, int size, int32_t* total) {
    for (int i = 0; i < size; ++i) {
      total[i] = static_cast<int32_t>(static_cast<uint32_t>(total[i]) +
                                      static_cast<uint32_t>(sums[i]));
    }
  }

  // Columns of the block that exist.
  int valid_columns(const kbn_matmul& w, const Block& block, int64_t tile) const {
    const int64_t left = w.out_features - tile * kTileOutputs;
    return static_cast<int>(std::min<int64_t>(block.columns * kTileOutputs, left));
  }

  // Where the scales of the columns after this block begin.
  int64_t next_column(const kbn_matmul& w, const Block& block, int64_t tile) const {
    return w.scale_columns == 1 ? 0 : (tile + (block.spread > 1 ? 1 : block.columns)) * kTileOutputs;
  }

  Scaling scaling_of(const kbn_matmul& w, const Block& block, int64_t row, int64_t tile,
                     int64_t group) const {
    const bool shared = w.scale_columns == 1;
    Scaling scaling;
    scaling.factor = factor_;
    scaling.shift = shift_;
    scaling.valid = valid_columns(w, block, tile);
    scaling.x_sums = x_sums_ + row * groups_ + group;
    scaling.x_sums_stride = groups_;
    scaling.scale = w.scale + group * w.scale_columns + (shared ? 0 : tile * kTileOutputs);
    scaling.scale_stride = w.scale_columns;
    scaling.shared = shared;
    return scaling;
  }

  // Of rows that are one plane each.
  Outputs outputs_of(const kbn_matmul& w, int64_t row, int64_t tile) const {
    const int64_t column = tile * kTileOutputs, size = size_of(p_.dtype);
    Outputs outputs;
    outputs.x_scales = x_scales_ + row;
    outputs.bias = w.bias ? w.bias + column : nullptr;
    outputs.dtype = p_.dtype;
    outputs.y = static_cast<char*>(w.y) + (row * w.out_features + column) * size;
    outputs.stride = w.out_features * size;
    return outputs;
  }

  void hand_out(const kbn_matmul& w, const Block& block, int64_t row, int64_t tile,
                int64_t group) const {
    const int width = block.columns * kTileOutputs, valid = valid_columns(w, block, tile);
    const int32_t* sums = block.sums;
    for (int64_t segment = 0; segment < block.segments; ++segment) {
      for (int r = 0; r < block.rows; ++r, sums += width) {
        const int64_t place = (row + r) * groups_ + group + segment;
        const auto shift = static_cast<uint32_t>(shift_) * static_cast<uint32_t>(x_sums_[place]);
        int32_t* to = probe_.sums + place * w.out_features + tile * kTileOutputs;
        for (int i = 0; i < valid; ++i) {
          const auto sum = static_cast<uint32_t>(factor_) * static_cast<uint32_t>(sums[i]);
          to[output(block, i / kTileOutputs) + i % kTileOutputs] = static_cast<int32_t>(sum + shift);
        }
      }
    }
  }

  // Joins the planes of each row of x and writes it.
  void store(const kbn_matmul& w, const Block& block, int64_t row, int64_t tile, float* y) const {
    const int width = block.columns * kTileOutputs, valid = valid_columns(w, block, tile);
    for (int r = 0; r < block.rows; r += planes_, y += planes_ * width) {
      for (int plane = planes_ - 1; plane > 0; --plane) {
        float* to = y + (plane - 1) * width;
        for (int i = 0; i < valid; ++i) to[i] += to[i + width] * (1 / kPlane);
      }
      const int64_t x_row = (row + r) / planes_;
      for (int i = 0, c = 0; i < valid; i += kTileOutputs, ++c) {
        const int64_t column = tile * kTileOutputs + output(block, c);
        const float* bias = w.bias ? w.bias + column : nullptr;
        char* out = static_cast<char*>(w.y) +
                    (x_row * w.out_features + column) * size_of(p_.dtype);
        kernels_.store(y + i, x_scales_[x_row], bias, p_.dtype, std::min(kTileOutputs, valid - i), out);
      }
    }
  }

  const kbn_matmul& p_;          // the first: what all agree in
  const int count_;
  const Kernels& kernels_;
  const kbn_parallel* parallel_;
  const Probe& probe_;
  const Format format_;
  const int planes_;             // rows of codes to a row of x
  const int64_t rows_;           // of codes
  const int64_t tile_inputs_;
  const int64_t tiles_in_;
  const int64_t groups_;
  const int64_t row_blocks_;
  const Shape shape_;            // of a block
  int columns_;                  // of tiles, of a block at most
  const int64_t packed_inputs_;  // in_features, rounded up to whole tiles
  const int32_t factor_;         // makes factor * (code + offset) whole
  const int32_t shift_;          // factor * offset
  const float unit_;             // 1 / factor
  Weights weights_[KBN_MAX_JOINT];
  int64_t tiles_out_ = 0;   // of all weights
  int64_t segment_tiles_ = 0;
  int64_t slot_bytes_ = 0;  // codes of a block of rows
  int64_t row_bytes_ = 0;   // a row of x that is gathered or normalized
  int64_t shares_ = 1;      // tasks of `take_rows`
  bool by_rows_ = false;    // whether they multiply too
  int64_t tasks_ = 0;       // of `multiply_columns`
  float tensor_absmax_ = 0.0f;
  int8_t* x_codes_ = nullptr;        // (row blocks, or shares; slot_bytes), as `Block::x_codes`
  float* x_scales_ = nullptr;        // (rows of x), of sums without the factor
  int32_t* x_sums_ = nullptr;        // (rows, groups)
  int8_t* codes_in_work_ = nullptr;  // (shares, slot_bytes), row after row
  char* row_in_work_ = nullptr;      // (shares, row_bytes)
};

}  // namespace

void run(const kbn_joint& problem, const Kernels& kernels, const kbn_parallel* parallel,
         const Probe& probe) {
  const bool odd = kernels.odd_groups && problem.matmuls[0]->group_size % 64 != 0;
  Matmul(problem, odd ? *kernels.odd_groups : kernels, parallel, probe).run();
}

}  // namespace kbn
