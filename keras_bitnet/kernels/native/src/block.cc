// A block of a decoder for one new token of each sequence: its products, its attention and what lies
// between them, one after another.
#include <initializer_list>

#include "driver.h"
#include "pool.h"
#include "scratch.h"

namespace kbn {
namespace {

class DecoderBlock {
 public:
  DecoderBlock(const kbn_block& block, const Kernels& kernels, const kbn_parallel* parallel)
      : b_(block),
        kernels_(kernels),
        parallel_(parallel),
        dtype_(block.query->dtype),
        rows_(block.query->rows),
        hidden_(rows_ * block.query->in_features),
        queries_(rows_ * block.query->out_features),
        keys_(rows_ * block.key->out_features),
        inner_(rows_ * block.up->out_features) {}

  void run() {
    const int64_t attention = 2 * size(queries_) + 2 * size(keys_), feed_forward = 2 * size(inner_);
    Scratch scratch(size(hidden_) + (attention > feed_forward ? attention : feed_forward));
    char* stream = scratch.data();
    attend(stream + size(hidden_), stream);
    feed_forward_from(stream, stream + size(hidden_));
  }

 private:
  // Bytes of so many numbers, in whole cache lines.
  int64_t size(int64_t numbers) const { return (numbers * size_of(dtype_) + 63) / 64 * 64; }

  void attend(char* memory, char* stream) {
    char *query = memory, *y = query + size(queries_);
    char *key = y + size(queries_), *value = key + size(keys_);
    multiply(b_.x, {{b_.query, query}, {b_.key, key}, {b_.value, value}});
    kbn_attention attention = *b_.attention;
    attention.query = query, attention.key = key, attention.value = value, attention.y = y;
    kbn::run(attention, kernels_, parallel_);
    multiply(y, {{b_.output, stream}});
    kernels_.add(b_.x, stream, dtype_, hidden_, stream);
  }

  void feed_forward_from(const char* stream, char* memory) {
    char *up = memory, *gate = b_.gate ? up + size(inner_) : nullptr;
    if (gate) {
      multiply(stream, {{b_.gate, gate}, {b_.up, up}});
    } else {
      multiply(stream, {{b_.up, up}});
    }
    activate(gate ? gate : up, gate ? up : nullptr, up);
    multiply(up, {{b_.down, b_.y}});
    kernels_.add(stream, b_.y, dtype_, hidden_, b_.y);
  }

  struct Product {
    const kbn_matmul* weights;
    void* y;
  };

  void multiply(const void* x, std::initializer_list<Product> products) {
    kbn_matmul matmuls[KBN_MAX_JOINT];
    kbn_joint joint{0, {}};
    for (const Product& product : products) {
      kbn_matmul& matmul = matmuls[joint.count];
      matmul = *product.weights;
      matmul.x = x, matmul.y = product.y;
      joint.matmuls[joint.count++] = &matmul;
    }
    kbn::run(joint, kernels_, parallel_, {});
  }

  // Row by row, for several threads where it is enough.
  void activate(const char* x, const char* factor, char* y) {
    constexpr int64_t kSmall = 1 << 16;  // numbers not worth waking a thread for
    struct Rows {
      const DecoderBlock& block;
      const char *x, *factor;
      char* y;

      static void run(void* self, int64_t row) {
        const auto& [block, x, factor, y] = *static_cast<Rows*>(self);
        const int64_t count = block.inner_ / block.rows_, at = row * count * size_of(block.dtype_);
        block.kernels_.activate(block.b_.activation, x + at, factor ? factor + at : nullptr, block.dtype_,
                                count, y + at);
      }
    } rows{*this, x, factor, y};
    run_tasks(parallel_, inner_ < kSmall, rows_, Rows::run, &rows);
  }

  const kbn_block& b_;
  const Kernels& kernels_;
  const kbn_parallel* parallel_;
  const int dtype_;
  const int64_t rows_;
  const int64_t hidden_, queries_, keys_, inner_;  // numbers of all rows
};

}  // namespace

void run(const kbn_block& block, const Kernels& kernels, const kbn_parallel* parallel) {
  DecoderBlock(block, kernels, parallel).run();
}

}  // namespace kbn
