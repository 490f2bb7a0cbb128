// A block of a decoder for new tokens of each sequence: its products, its attention and what lies
// between them, one after another.
#include <initializer_list>

#include "driver.h"
#include "pool.h"
#include "scratch.h"

namespace kbn {
namespace {

constexpr int64_t kSmall = 1 << 16;       // numbers not worth waking a thread for
constexpr int64_t kRowsAtOnce = 512;      // of the feed-forward block, which needs the most memory

class DecoderBlock {
 public:
  DecoderBlock(const kbn_block& block, const Kernels& kernels, const kbn_parallel* parallel)
      : b_(block),
        kernels_(kernels),
        parallel_(parallel),
        dtype_(block.query->dtype),
        rows_(block.query->rows),
        hidden_(block.query->in_features),
        queries_(block.query->out_features),
        keys_(block.key->out_features),
        inner_(block.up->out_features) {}

  void run() {
    const int64_t at_once = rows_ < kRowsAtOnce ? rows_ : kRowsAtOnce;
    const int64_t attention = 2 * size(rows_ * queries_) + 2 * size(rows_ * keys_);
    const int64_t feed_forward = 2 * size(at_once * inner_);
    Scratch scratch(size(rows_ * hidden_) + (attention > feed_forward ? attention : feed_forward));
    char *stream = scratch.data(), *rest = stream + size(rows_ * hidden_);
    attend(rest, stream);
    for (int64_t row = 0; row < rows_; row += at_once) {
      const int64_t begin = bytes(row * hidden_), left = rows_ - row;
      feed_forward_from(stream + begin, left < at_once ? left : at_once, rest, static_cast<char*>(b_.y) + begin);
    }
  }

 private:
  int64_t bytes(int64_t numbers) const { return numbers * size_of(dtype_); }
  // In whole cache lines.
  int64_t size(int64_t numbers) const { return (bytes(numbers) + 63) / 64 * 64; }

  void attend(char* memory, char* stream) {
    char *query = memory, *y = query + size(rows_ * queries_);
    char *key = y + size(rows_ * queries_), *value = key + size(rows_ * keys_);
    multiply(b_.x, rows_, {{b_.query, query}, {b_.key, key}, {b_.value, value}});
    kbn_attention attention = *b_.attention;
    attention.query = query, attention.key = key, attention.value = value, attention.y = y;
    kbn::run(attention, kernels_, parallel_);
    multiply(y, rows_, {{b_.output, stream}});
    add(static_cast<const char*>(b_.x), stream, rows_);
  }

  void feed_forward_from(const char* stream, int64_t rows, char* memory, char* y) {
    char *up = memory, *gate = b_.gate ? up + size(rows * inner_) : nullptr;
    if (gate) {
      multiply(stream, rows, {{b_.gate, gate}, {b_.up, up}});
    } else {
      multiply(stream, rows, {{b_.up, up}});
    }
    activate(gate ? gate : up, gate ? up : nullptr, rows, up);
    multiply(up, rows, {{b_.down, y}});
    add(stream, y, rows);
  }

  struct Product {
    const kbn_matmul* weights;
    void* y;
  };

  void multiply(const void* x, int64_t rows, std::initializer_list<Product> products) {
    kbn_matmul matmuls[KBN_MAX_JOINT];
    kbn_joint joint{0, {}};
    for (const Product& product : products) {
      kbn_matmul& matmul = matmuls[joint.count];
      matmul = *product.weights;
      matmul.rows = rows, matmul.x = x, matmul.y = product.y;
      joint.matmuls[joint.count++] = &matmul;
    }
    kbn::run(joint, kernels_, parallel_, {});
  }

  // y += x.
  void add(const char* x, char* y, int64_t rows) {
    each_row(rows, hidden_, [=](int64_t at) { kernels_.add(x + at, y + at, dtype_, hidden_, y + at); });
  }

  void activate(const char* x, const char* factor, int64_t rows, char* y) {
    each_row(rows, inner_, [=](int64_t at) {
      kernels_.activate(b_.activation, x + at, factor ? factor + at : nullptr, dtype_, inner_, y + at);
    });
  }

  // Does it where each row of so many numbers begins, on several threads where it is enough.
  template <typename Do>
  void each_row(int64_t rows, int64_t numbers, const Do& with) {
    const int64_t stride = bytes(numbers);
    run_tasks(parallel_, rows * numbers < kSmall, rows, [&](int64_t row) { with(row * stride); });
  }

  const kbn_block& b_;
  const Kernels& kernels_;
  const kbn_parallel* parallel_;
  const int dtype_;
  const int64_t rows_;                             // new tokens of all sequences
  const int64_t hidden_, queries_, keys_, inner_;  // numbers of a row
};

}  // namespace

void run(const kbn_block& block, const Kernels& kernels, const kbn_parallel* parallel) {
  DecoderBlock(block, kernels, parallel).run();
}

}  // namespace kbn
