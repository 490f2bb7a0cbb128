// Cuts the attention of new tokens in key heads and has a table of kernels run them.
#include "driver.h"
#include "pool.h"
#include "scratch.h"

namespace kbn {
namespace {

constexpr int64_t kSmall = 1 << 18;  // multiply-adds not worth waking a thread for

class Attention {
 public:
  Attention(const kbn_attention& problem, const Kernels& kernels)
      : p_(problem),
        kernels_(kernels),
        tokens_(int64_t{*problem.index} + 1),
        groups_(problem.heads / problem.key_heads),
        scratch_(head_scratch(groups_, problem.head_dim, tokens_)) {}

  void run(const kbn_parallel* parallel) {
    const int64_t count = p_.batch * p_.key_heads;
    Scratch scratch(count * scratch_ * sizeof(float));
    memory_ = reinterpret_cast<float*>(scratch.data());
    const bool alone = 2 * p_.batch * p_.heads * p_.head_dim * tokens_ < kSmall;
    run_tasks(parallel, alone, count, [](void* self, int64_t i) {
      static_cast<Attention*>(self)->attend(i);
    }, this);
  }

 private:
  static const void* at(const void* memory, int dtype, int64_t place) {
    return static_cast<const char*>(memory) + place * size_of(dtype);
  }
  static void* at(void* memory, int dtype, int64_t place) {
    return static_cast<char*>(memory) + place * size_of(dtype);
  }

  void attend(int64_t i) {
    const int64_t sequence = i / p_.key_heads, queries = i * groups_ * p_.head_dim;
    const int64_t table = p_.tables == 1 ? 0 : sequence * p_.head_dim;
    const int64_t mask = p_.masks == 1 ? 0 : sequence * p_.length;
    const int64_t row = i * p_.head_dim, place = i * p_.length;
    Head head;
    head.groups = static_cast<int>(groups_);
    head.dim = static_cast<int>(p_.head_dim);
    head.dtype = p_.dtype;
    head.cache_dtype = p_.cache_dtype;
    head.factor = p_.scale;
    head.index = tokens_ - 1;
    head.query = at(p_.query, p_.dtype, queries);
    head.key = at(p_.key, p_.dtype, row);
    head.value = at(p_.value, p_.dtype, row);
    head.cosines = p_.cosines ? p_.cosines + table : nullptr;
    head.sines = p_.sines ? p_.sines + table : nullptr;
    head.mask = p_.mask ? p_.mask + mask : nullptr;
    head.keys = at(p_.key_cache, p_.cache_dtype, place * p_.head_dim);
    head.values = at(p_.value_cache, p_.cache_dtype, place * p_.head_dim);
    head.key_scales = p_.key_scale ? p_.key_scale + place : nullptr;
    head.value_scales = p_.value_scale ? p_.value_scale + place : nullptr;
    head.y = at(p_.y, p_.dtype, queries);
    head.scratch = memory_ + i * scratch_;
    kernels_.attend(head);
  }

  const kbn_attention& p_;
  const Kernels& kernels_;
  const int64_t tokens_;   // those before and the new one
  const int64_t groups_;   // query heads of a key head
  const int64_t scratch_;  // numbers of a task
  float* memory_ = nullptr;
};

}  // namespace

void run(const kbn_attention& problem, const Kernels& kernels, const kbn_parallel* parallel) {
  Attention(problem, kernels).run(parallel);
}

}  // namespace kbn
