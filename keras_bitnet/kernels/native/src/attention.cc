// Cuts the attention of new tokens in key heads and blocks of queries and has a table of kernels run them.
#include "driver.h"
#include "pool.h"
#include "scratch.h"

namespace kbn {
namespace {

constexpr int64_t kSmall = 1 << 18;         // multiply-adds not worth waking a thread for
constexpr int64_t kMostMemory = 16 << 20;   // bytes, unless one sequence needs more
constexpr int64_t kTasks = 2;               // of a thread: the fewer, the more of their working space is cached

class Attention {
 public:
  Attention(const kbn_attention& problem, const Kernels& kernels, const kbn_parallel* parallel)
      : p_(problem),
        kernels_(kernels),
        parallel_(parallel),
        seen_(*problem.index + problem.tokens),
        groups_(problem.heads / problem.key_heads),
        alone_(2 * problem.batch * problem.heads * problem.head_dim * problem.tokens * seen_ < kSmall) {}

  void run() {
    if (p_.tokens == 1) {
      run_token();
    } else {
      run_blocks();
    }
  }

 private:
  // One new token: each head writes it and attends.
  void run_token() {
    const int64_t count = p_.batch * p_.key_heads;
    space_ = attention_scratch(groups_, p_.head_dim, seen_);
    Scratch scratch(count * space_ * sizeof(float));
    scratch_ = reinterpret_cast<float*>(scratch.data());
    run_tasks(parallel_, alone_, count, [this](int64_t i) { kernels_.attend(head(i), scratch_ + i * space_); });
  }

  // Several: some sequences at a time, first each head writes its tokens and lays out all that it has
  // then, after that blocks of queries attend to it.
  void run_blocks() {
    const int64_t keys = panels_size(p_.head_dim, seen_), values = panels_size(seen_, p_.head_dim);
    const int64_t most = groups_ < kMostQueries ? kMostQueries / groups_ : 1;
    block_ = p_.tokens < most ? p_.tokens : most;
    blocks_ = (p_.tokens + block_ - 1) / block_;
    space_ = attention_scratch(whole_blocks(block_ * groups_), p_.head_dim, seen_);
    memory_ = keys + values;
    const int64_t fit = kMostMemory / (p_.key_heads * memory_ * int64_t{sizeof(float)});
    const int64_t at_once = fit < 1 ? 1 : fit < p_.batch ? fit : p_.batch;
    heads_ = at_once * p_.key_heads;
    const int64_t most_tasks = kTasks * (parallel_ ? parallel_->threads : pool_threads());
    const int64_t tasks = heads_ * blocks_ < most_tasks ? heads_ * blocks_ : most_tasks;
    Scratch scratch((heads_ * memory_ + tasks * space_) * sizeof(float));
    memories_ = reinterpret_cast<float*>(scratch.data());
    scratch_ = memories_ + heads_ * memory_;
    for (first_ = 0; first_ < p_.batch * p_.key_heads; first_ += heads_) {
      const int64_t left = p_.batch * p_.key_heads - first_;
      heads_ = left < heads_ ? left : heads_;
      each(heads_, tasks, &Attention::remember);
      each(heads_ * blocks_, tasks, &Attention::attend_block);
    }
  }

  // Runs `part(i, scratch)` for every i in [0, count), the last first: those of most work.
  using Part = void (Attention::*)(int64_t i, float* scratch);
  void each(int64_t count, int64_t most, Part part) {
    const int64_t tasks = count < most ? count : most;
    run_tasks(parallel_, alone_, tasks, [=](int64_t task) {
      for (int64_t i = count - 1 - task; i >= 0; i -= tasks) (this->*part)(i, scratch_ + task * space_);
    });
  }

  void remember(int64_t i, float* scratch) { kernels_.remember(head(first_ + i), memory(i), scratch); }

  void attend_block(int64_t i, float* scratch) {
    const int64_t begin = i / heads_ * block_, left = p_.tokens - begin;
    kernels_.attend_block(head(first_ + i % heads_), memory(i % heads_), begin, left < block_ ? left : block_,
                          scratch);
  }

  Memory memory(int64_t i) const {
    float* keys = memories_ + i * memory_;
    return {{keys, p_.head_dim}, {keys + panels_size(p_.head_dim, seen_), seen_}};
  }

  static const void* at(const void* memory, int dtype, int64_t place) {
    return static_cast<const char*>(memory) + place * size_of(dtype);
  }
  static void* at(void* memory, int dtype, int64_t place) {
    return static_cast<char*>(memory) + place * size_of(dtype);
  }

  Head head(int64_t i) const {
    const int64_t sequence = i / p_.key_heads, of_sequence = i % p_.key_heads, first = sequence * p_.tokens;
    const int64_t table = p_.tables == 1 ? 0 : first * p_.head_dim;
    const int64_t mask = p_.masks == 1 ? 0 : first * p_.length;
    const int64_t place = i * p_.length;
    Head head;
    head.groups = static_cast<int>(groups_);
    head.dim = static_cast<int>(p_.head_dim);
    head.dtype = p_.dtype;
    head.cache_dtype = p_.cache_dtype;
    head.factor = p_.scale;
    head.index = *p_.index;
    head.tokens = p_.tokens;
    head.query_stride = p_.heads * p_.head_dim;
    head.key_stride = p_.key_heads * p_.head_dim;
    const int64_t query = first * head.query_stride + of_sequence * groups_ * p_.head_dim;
    const int64_t key = first * head.key_stride + of_sequence * p_.head_dim;
    head.query = at(p_.query, p_.dtype, query);
    head.y = at(p_.y, p_.dtype, query);
    head.key = at(p_.key, p_.dtype, key);
    head.value = at(p_.value, p_.dtype, key);
    head.cosines = p_.cosines ? p_.cosines + table : nullptr;
    head.sines = p_.sines ? p_.sines + table : nullptr;
    head.mask = p_.mask ? p_.mask + mask : nullptr;
    head.mask_stride = p_.length;
    head.keys = at(p_.key_cache, p_.cache_dtype, place * p_.head_dim);
    head.values = at(p_.value_cache, p_.cache_dtype, place * p_.head_dim);
    head.key_scales = p_.key_scale ? p_.key_scale + place : nullptr;
    head.value_scales = p_.value_scale ? p_.value_scale + place : nullptr;
    return head;
  }

  const kbn_attention& p_;
  const Kernels& kernels_;
  const kbn_parallel* parallel_;
  const int64_t seen_;    // tokens before the new ones and those
  const int64_t groups_;  // query heads of a key head
  const bool alone_;
  // Numbers of the working space of a task and of the memory of a head, tokens of a block, blocks of a
  // head, heads at a time and the first of these.
  int64_t space_ = 0, memory_ = 0, block_ = 0, blocks_ = 0, heads_ = 0, first_ = 0;
  float *scratch_ = nullptr, *memories_ = nullptr;
};

}  // namespace

void run(const kbn_attention& problem, const Kernels& kernels, const kbn_parallel* parallel) {
  Attention(problem, kernels, parallel).run();
}

}  // namespace kbn
