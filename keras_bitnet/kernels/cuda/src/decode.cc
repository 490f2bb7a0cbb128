// Queues the blocks of a decoder: products, norms and attention one after another.
#include <algorithm>

#include "launch.h"

namespace {

using namespace launcher;

enum Weight { kQuery, kKey, kValue, kOutput, kUp, kDown, kGate };
enum Gain { kBeforeQuery, kBeforeOutput, kBeforeUp, kBeforeDown };  // norms

int64_t out_features(const kbc_decode& p, int weight) {
  switch (weight) {
    case kQuery: return static_cast<int64_t>(p.heads) * p.head_dim;
    case kKey:
    case kValue: return static_cast<int64_t>(p.key_heads) * p.head_dim;
    case kUp:
    case kGate: return p.intermediate;
    default: return p.features;
  }
}

int64_t in_features(const kbc_decode& p, int weight) {
  return weight == kOutput ? out_features(p, kQuery) : weight == kDown ? p.intermediate : p.features;
}

kbc_matmul matmul(const kbc_decode& p, int weight) {
  kbc_matmul m{};
  m.rows = p.batch * p.tokens;
  m.in_features = in_features(p, weight);
  m.out_features = out_features(p, weight);
  m.group_size = p.group_size;
  m.bits = p.bits;
  m.dtype = p.dtype;
  m.activation_bits = p.activation_bits;
  m.offset = p.offset;
  m.epsilon = p.epsilon;
  m.scale_columns = p.scale_columns[weight];
  // The first norm waits for all before it, and so what comes after.
  m.weights = p.weights == KBC_WEIGHTS_SETTLE ? KBC_WEIGHTS_READY : p.weights;
  return m;
}

// What lies in the workspace, and how many bytes it takes.
struct Workspace {
  static constexpr int64_t kUnit = 256;
  void *stream[2], *normed, *query, *key, *value, *attended, *added, *up, *gate, *products;
  int64_t bytes = 0;

  explicit Workspace(const kbc_decode& p) : base(static_cast<char*>(p.workspace)) {
    const int64_t row = p.batch * p.tokens * (p.dtype == 0 ? 4 : 2);
    const int64_t heads = out_features(p, kQuery), key_heads = out_features(p, kKey);
    for (void*& one : stream) one = take(row * p.features);
    normed = take(row * std::max({p.features, heads, p.intermediate}));
    query = take(row * heads);
    key = take(row * key_heads);
    value = take(row * key_heads);
    attended = take(row * heads);
    added = take(row * p.features);
    up = take(row * p.intermediate);
    gate = p.gated ? take(row * p.intermediate) : nullptr;
    int64_t most = 0;
    for (int weight = 0; weight < KBC_BLOCK_WEIGHTS; ++weight) {
      const kbc_matmul m = matmul(p, weight);
      most = std::max(most, kbc_workspace(&m));
    }
    products = take(most);
  }

 private:
  char* base;

  void* take(int64_t size) {
    char* const at = base + bytes;
    bytes += (size + kUnit - 1) / kUnit * kUnit;
    return at;
  }
};

const char* check(const kbc_decode& p) {
  if (p.blocks < 1 || p.batch < 0 || p.tokens < 0 || p.features < 1 || p.intermediate < 1 || p.heads < 1 ||
      p.key_heads < 1 || p.head_dim < 1)
    return "a size is out of range";
  if (p.batch * p.tokens > INT32_MAX) return "a size is too large";
  if (!aligned(p.workspace, Workspace::kUnit)) return "workspace must lie at a multiple of 256 bytes";
  return nullptr;
}

// The operations of one block.
struct Block {
  const kbc_decode& p;
  const void* const* tensors;
  void* products;
  int device;
  void* stream;

  // Products of the same x, each with the place of its results.
  struct Result {
    int weight;
    void* y;
  };
  const char* multiply(const void* x, std::initializer_list<Result> results) const {
    kbc_matmul matmuls[KBC_MAX_JOINT];
    kbc_joint joint{};
    for (const Result& result : results) {
      kbc_matmul& m = matmuls[joint.count] = matmul(p, result.weight);
      const void* const* own = tensors + 3 * result.weight;
      m.x = x;
      m.tiles = own[0];
      m.scale = own[1];
      m.bias = own[2];
      m.y = result.y;
      m.workspace = products;
      joint.matmuls[joint.count++] = &m;
    }
    return kbc_run_joint(&joint, device, stream);
  }

  const void* gain(Gain which) const { return tensors[3 * KBC_BLOCK_WEIGHTS + which]; }

  kbc_norm norm(int64_t features, const void* x, Gain which, void* y) const {
    kbc_norm n{};
    n.rows = p.batch * p.tokens;
    n.features = features;
    n.dtype = p.dtype;
    n.activation = p.activation;
    n.epsilon = p.norm_epsilon;
    n.x = x;
    n.gain = gain(which);
    n.y = y;
    return n;
  }

  const char* run(const kbc_norm& n, bool overlap = true) const { return run_norm(n, overlap, device, stream); }

  // y = norm(x), of x + other where there is another, which `combined` then keeps.
  const char* add_and_norm(const void* x, const void* other, Gain which, void* combined, void* y) const {
    kbc_norm n = norm(p.features, x, which, y);
    n.combine = other ? KBC_COMBINE_ADD : KBC_COMBINE_NOTHING;
    n.other = other;
    n.combined = other ? combined : nullptr;
    return run(n, other || p.weights != KBC_WEIGHTS_SETTLE);
  }

  const char* attend(const Workspace& w) const {
    const void* const* cache = tensors + 3 * KBC_BLOCK_WEIGHTS + 4;
    auto written = [&](int i) { return const_cast<void*>(cache[i]); };
    kbc_attention a{};
    a.batch = p.batch;
    a.tokens = p.tokens;
    a.length = p.length;
    a.heads = p.heads;
    a.key_heads = p.key_heads;
    a.head_dim = p.head_dim;
    a.dtype = p.dtype;
    a.cache_dtype = p.cache_dtype;
    a.tables = p.tables;
    a.masks = p.masks;
    a.scale = p.scale;
    a.query = w.query;
    a.key = w.key;
    a.value = w.value;
    a.cosines = p.cosines;
    a.sines = p.sines;
    a.mask = p.mask;
    a.index = p.index;
    a.key_cache = written(0);
    a.value_cache = written(1);
    a.key_scale = written(2);
    a.value_scale = written(3);
    a.y = w.attended;
    return kbc_run_attention(&a, device, stream);
  }

  // The output projection, of the attention's results after their norm, if there is one.
  const char* project(const Workspace& w) const {
    const void* x = w.attended;
    if (gain(kBeforeOutput)) {
      if (const char* wrong = run(norm(out_features(p, kQuery), x, kBeforeOutput, w.normed))) return wrong;
      x = w.normed;
    }
    return multiply(x, {{kOutput, w.added}});
  }

  // What lies between the first and the last projections of the feed-forward block, and the last.
  const char* feed(const Workspace& w) const {
    kbc_norm n = norm(p.intermediate, p.gated ? w.gate : w.up, kBeforeDown, w.normed);
    n.combine = KBC_COMBINE_GATE;
    n.other = p.gated ? w.up : nullptr;
    if (!n.gain) n.combined = w.normed;
    if (const char* wrong = run(n)) return wrong;
    return multiply(w.normed, {{kDown, w.added}});
  }
};

const char* run(const kbc_decode& p, int device, void* stream) {
  const Workspace w(p);
  const void *x = p.x, *added = nullptr;  // the stream is their sum
  int next = 0;                           // place for the next stream
  const char* wrong = nullptr;
  auto add_and_norm = [&](const Block& block, Gain gain) {
    const char* failed = block.add_and_norm(x, added, gain, w.stream[next], w.normed);
    if (added) {
      x = w.stream[next];
      next = 1 - next;
    }
    return failed;
  };
  for (int64_t i = 0; i < p.blocks; ++i) {
    const Block block{p, p.tensors + i * KBC_BLOCK_TENSORS, w.products, device, stream};
    if ((wrong = add_and_norm(block, kBeforeQuery))) return wrong;
    if ((wrong = block.multiply(w.normed, {{kQuery, w.query}, {kKey, w.key}, {kValue, w.value}}))) return wrong;
    if ((wrong = block.attend(w))) return wrong;
    if ((wrong = block.project(w))) return wrong;
    added = w.added;
    if ((wrong = add_and_norm(block, kBeforeUp))) return wrong;
    wrong = p.gated ? block.multiply(w.normed, {{kUp, w.up}, {kGate, w.gate}}) : block.multiply(w.normed, {{kUp, w.up}});
    if (wrong || (wrong = block.feed(w))) return wrong;
  }
  kbc_norm last{};
  last.rows = p.batch * p.tokens;
  last.features = p.features;
  last.dtype = p.dtype;
  last.combine = KBC_COMBINE_ADD;
  last.x = x;
  last.other = added;
  last.combined = p.y;
  return kbc_run_norm(&last, device, stream);
}

}  // namespace

int64_t kbc_decode_workspace(const kbc_decode* problem) { return Workspace(*problem).bytes; }

const char* kbc_run_decode(const kbc_decode* problem, int device, void* stream) {
  if (const char* wrong = check(*problem)) return wrong;
  if (problem->batch == 0 || problem->tokens == 0) return nullptr;
  return run(*problem, device, stream);
}
