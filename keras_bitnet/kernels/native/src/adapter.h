// What the framework adapters share: an op's operands in, a checked `kbn_matmul` out.
#pragma once
#include <stdint.h>

#include <atomic>
#include <initializer_list>

#include "bitnet.h"

namespace kbn_adapter {

// A loop that several threads work at, each of which takes indices until none is left.
struct Loop {
  std::atomic<int64_t> next{0};
  int64_t count;
  void (*task)(void*, int64_t);
  void* argument;

  void work() {
    for (int64_t i; (i = next.fetch_add(1, std::memory_order_relaxed)) < count;) task(argument, i);
  }
};

struct Shape {
  const int64_t* dims;
  int64_t rank;

  int64_t operator[](int64_t axis) const { return dims[axis < 0 ? axis + rank : axis]; }
  int64_t rows() const {
    int64_t product = 1;
    for (int64_t i = 0; i + 1 < rank; ++i) product *= dims[i];
    return product;
  }
};

// How the patches of images, the last `axes` axes of x before its channels, are its rows; 0 axes: they
// are not, x has its rows as they are. Of fewer than three axes the first numbers are ones.
struct Window {
  int64_t axes, padding;  // kValid, kSame or kCausal
  int64_t size[3], strides[3], dilation[3];
};
enum { kValid = 0, kSame = 1, kCausal = 2 };
constexpr int kWindowNumbers = sizeof(Window) / sizeof(int64_t);

// The static facts of a call, attributes of the op in every framework.
struct Attributes {
  int64_t out_features = 0;
  int64_t bits = 0;
  int64_t trits = 0;  // 1: the layout of five trits a byte
  int64_t group_size = 0;
  int64_t activation_bits = 0;
  int64_t per_tensor = 0;
  double offset = 0;
  double epsilon = 0;
  double norm_epsilon = 0;
  Window window{};
};

constexpr int64_t kNone = 0;
constexpr Shape kNothing{&kNone, 1};  // of an operand that is not given

// Where the window stands on images of x. Returns what is wrong, or null.
inline const char* place(const Window& window, Shape x, kbn_window* out) {
  if (window.axes < 1 || window.axes > 3 || x.rank < window.axes + 1)
    return "x must be (..., images, channels), of one to three spatial axes";
  constexpr int64_t most = 1 << 20;
  int64_t taps = 1;
  for (int axis = 0; axis < 3; ++axis) {
    const int64_t size = window.size[axis], stride = window.strides[axis];
    const int64_t dilation = window.dilation[axis];
    if (size < 1 || stride < 1 || dilation < 1 || size > most || stride > most || dilation > most ||
        (taps *= size) > most)
      return "the size of a window, its strides and dilation must be in [1, 2^20]";
    const int64_t span = dilation * (size - 1) + 1;
    const int64_t length = axis < 3 - window.axes ? 1 : x[axis - 4];
    const int64_t ends = window.padding == kValid ? length - span + 1 : length;
    if (ends < 0 || (ends == 0 && length > 0)) return "the window is larger than the images";
    const int64_t positions = (ends + stride - 1) / stride;
    const int64_t padding = (positions - 1) * stride + span - length;
    out->lengths[axis] = length;
    out->positions[axis] = positions;
    out->size[axis] = size;
    out->strides[axis] = stride;
    out->dilation[axis] = dilation;
    out->before[axis] = window.padding == kCausal                ? span - 1
                        : window.padding == kSame && padding > 0 ? padding / 2
                                                                 : 0;
  }
  return nullptr;
}

// A packed matmul and what it points to.
struct Matmul : kbn_matmul {
  kbn_window placed;
  int64_t axes;

  // The sizes of y, which has as many axes as x.
  void shape_of_y(Shape x, int64_t* dims) const {
    for (int64_t i = 0; i + 1 < x.rank; ++i) dims[i] = x.dims[i];
    for (int64_t i = 0; i < axes; ++i) dims[x.rank - 2 - i] = placed.positions[2 - i];
    dims[x.rank - 1] = out_features;
  }
};

// Fills the sizes of `problem` and checks every shape that the kernel trusts: a graph that was
// traced, saved and loaded again may bring operands that Python never saw. Pointers and dtype
// are the caller's. Returns what is wrong, or null.
inline const char* describe(const Attributes& a, Shape x, Shape tiles, Shape scale, Shape bias,
                            Shape x_scale, Shape gain, Matmul* problem) {
  if (a.bits != 1 && a.bits != 2 && a.bits != 4 && a.bits != 8) return "bits must be 1, 2, 4 or 8";
  if (a.group_size < 0 || a.out_features < 1) return "group_size or out_features is out of range";
  if (x.rank < 1) return "x must have at least one axis";
  int64_t k = x[-1], rows = 1;
  const int64_t n = a.out_features;
  *problem = Matmul{};
  if (a.window.axes) {
    if (const char* wrong = place(a.window, x, &problem->placed)) return wrong;
    problem->window = &problem->placed;
    problem->axes = a.window.axes;
    for (int64_t size : problem->placed.size) k *= size;
    for (int64_t positions : problem->placed.positions) rows *= positions;
  }
  for (int64_t i = 0; i + 1 + a.window.axes < x.rank; ++i) rows *= x[i];
  const int64_t groups = a.group_size ? (k + a.group_size - 1) / a.group_size : 1;
  const int64_t tiles_in = a.trits ? (k + 19) / 20 : (k * a.bits + 31) / 32;
  if (tiles.rank != 4 || tiles[0] != (n + 15) / 16 || tiles[1] != tiles_in || tiles[2] != 16 ||
      tiles[3] != 4)
    return "tiles must be [ceil(out / 16), ceil(in * bits / 32), 16, 4], or ceil(in / 20) of trits";
  if (scale.rank != 2 || scale[0] != groups || (scale[1] != 1 && scale[1] != n))
    return "scale must be (1 or groups, 1 or out)";
  if (bias.rank != 1 || (bias[0] != 0 && bias[0] != n)) return "bias must be (out,), or (0,): none";
  if (x_scale.rank != 1 || (x_scale[0] != 0 && x_scale[0] != 1))
    return "x_scale must be (1,), or (0,): computed from x";
  if (gain.rank != 1 || (gain[0] != 0 && gain[0] != k)) return "gain must be (in,), or (0,): none";
  problem->rows = rows;
  problem->in_features = k;
  problem->out_features = n;
  problem->group_size = a.group_size;
  problem->bits = static_cast<int32_t>(a.bits);
  problem->layout = a.trits ? KBN_TRITS : KBN_TILES;
  problem->activation_bits = static_cast<int32_t>(a.activation_bits);
  problem->per_tensor = static_cast<int32_t>(a.per_tensor);
  problem->offset = static_cast<float>(a.offset);
  problem->epsilon = static_cast<float>(a.epsilon);
  problem->norm_epsilon = static_cast<float>(a.norm_epsilon);
  problem->scale_columns = static_cast<int32_t>(scale[1]);
  return nullptr;
}

// Runs what `describe` filled, without the empty cases. Returns what is wrong, or null.
inline const char* run(const kbn_joint& problem, const kbn_parallel* parallel) {
  if (problem.matmuls[0]->rows == 0) return nullptr;
  const int code = kbn_run_joint(&problem, parallel);
  return code ? kbn_error(code) : nullptr;
}

// ---- attention ----

// A tensor of a framework. Dtypes beside those of `kbn_dtype`: these, or -1.
enum { kBool = 4, kInt32 = 5, kUint8 = 6 };
struct Operand {
  Shape shape;
  int32_t dtype;
  void* data;
};

// The operands of an attention in the order of every framework. One that is missing has no elements
// and one axis, the scales of a cache that is not int8 may be left out.
enum {
  kQuery, kKey, kValue, kCosines, kSines, kMask, kIndex, kKeyCache, kValueCache, kKeyScale,
  kValueScale, kAttentionOperands
};

inline bool has_shape(const Shape& shape, int64_t a, int64_t b, int64_t c, int64_t d) {
  return shape.rank == 4 && shape[0] == a && shape[1] == b && shape[2] == c && shape[3] == d;
}

// As the other `describe`; fills all but y.
inline const char* describe(const Operand* in, double scale, kbn_attention* problem) {
  const Shape query = in[kQuery].shape, cache = in[kKeyCache].shape;
  if (query.rank != 4) return "query must be (batch, tokens, heads, head_dim)";
  if (cache.rank != 4) return "key_cache must be (batch, key_heads, length, head_dim)";
  const int64_t batch = query[0], tokens = query[1], dim = query[3], heads = cache[1], length = cache[2];
  const auto given = [&](int i) { return in[i].data && (in[i].shape.rank != 1 || in[i].shape[0]); };
  const auto same = [&](int i, int j) { return in[i].dtype == in[j].dtype; };
  for (int i : {kKey, kValue})
    if (!has_shape(in[i].shape, batch, tokens, heads, dim) || !same(i, kQuery))
      return "key and value must be (batch, tokens, key_heads, head_dim), of the dtype of query";
  for (int i : {kKeyCache, kValueCache})
    if (!has_shape(in[i].shape, batch, heads, length, dim) || !same(i, kKeyCache))
      return "the caches must be (batch, key_heads, length, head_dim), of one dtype";
  for (int i : {kKeyScale, kValueScale})
    if (given(i) && (!has_shape(in[i].shape, batch, heads, length, 1) || in[i].dtype != KBN_F32))
      return "the scales of a cache must be float32 (batch, key_heads, length, 1)";
  for (int i : {kCosines, kSines})
    if (given(i) && (!has_shape(in[i].shape, in[kCosines].shape[0], tokens, 1, dim) ||
                     in[i].dtype != KBN_F32))
      return "cosines and sines must be float32 (1 or batch, tokens, 1, head_dim)";
  const Shape mask = in[kMask].shape;
  if (given(kMask) &&
      (mask.rank != 3 || mask[1] != tokens || mask[2] != length || in[kMask].dtype != kBool))
    return "mask must be bool (1 or batch, tokens, length)";
  if (in[kIndex].shape.rank > 1 || in[kIndex].dtype != kInt32) return "index must be an int32";
  const auto numbers = [&](int i) { return static_cast<float*>(given(i) ? in[i].data : nullptr); };
  *problem = kbn_attention{};
  problem->batch = batch;
  problem->tokens = tokens;
  problem->length = length;
  problem->heads = query[2];
  problem->key_heads = heads;
  problem->head_dim = dim;
  problem->dtype = in[kQuery].dtype;
  problem->cache_dtype = in[kKeyCache].dtype;
  problem->tables = given(kCosines) ? in[kCosines].shape[0] : 1;
  problem->masks = given(kMask) ? mask[0] : 1;
  problem->scale = static_cast<float>(scale);
  problem->query = in[kQuery].data;
  problem->key = in[kKey].data;
  problem->value = in[kValue].data;
  problem->cosines = numbers(kCosines);
  problem->sines = numbers(kSines);
  problem->mask = static_cast<const uint8_t*>(given(kMask) ? in[kMask].data : nullptr);
  problem->index = static_cast<const int32_t*>(in[kIndex].data);
  problem->key_cache = in[kKeyCache].data;
  problem->value_cache = in[kValueCache].data;
  problem->key_scale = numbers(kKeyScale);
  problem->value_scale = numbers(kValueScale);
  return nullptr;
}

inline const char* run(const kbn_attention& problem, const kbn_parallel* parallel) {
  const int code = kbn_attend(&problem, parallel);
  return code ? kbn_error(code) : nullptr;
}

// ---- block of a decoder ----

enum { kQueryWeight, kKeyWeight, kValueWeight, kOutputWeight, kUpWeight, kDownWeight, kGateWeight, kBlockWeights };

// The operands of a block in the order of every framework: x; tiles, scale and bias of each weight; gains of
// the norms before query, output, up and down; then those of its attention from the cosines on.
enum {
  kBlockX, kBlockWeight, kBlockGain = kBlockWeight + 3 * kBlockWeights, kBlockAttention = kBlockGain + 4,
  kBlockCache = kBlockAttention + kKeyCache - kCosines,
  kBlockOperands = kBlockAttention + kAttentionOperands - kCosines
};

struct BlockAttributes : Attributes {
  int64_t heads = 0;         // of queries
  int64_t intermediate = 0;  // outputs of up and gate
  int64_t activation = 0;    // kbn_activation
  double scale = 0;          // of the scores
};

// A block and what it points to.
struct Block : kbn_block {
  Matmul matmuls[kBlockWeights];
  kbn_attention attended;
};

// As the other `describe`; fills all but y. A gate that is not given has tiles of one axis.
inline const char* describe(const BlockAttributes& a, const Operand* in, Block* block) {
  const Operand& x = in[kBlockX];
  const Shape cache = in[kBlockCache].shape;
  if (x.shape.rank != 3) return "x must be (batch, tokens, features)";
  if (cache.rank != 4) return "key_cache must be (batch, key_heads, length, head_dim)";
  const int64_t batch = x.shape[0], tokens = x.shape[1], hidden = x.shape[2];
  const int64_t key_heads = cache[1], dim = cache[3];
  const int64_t query_dims[] = {batch, tokens, a.heads, dim}, key_dims[] = {batch, tokens, key_heads, dim};
  Operand attention[kAttentionOperands];
  attention[kQuery] = {{query_dims, 4}, x.dtype, x.data};
  attention[kKey] = attention[kValue] = {{key_dims, 4}, x.dtype, x.data};
  for (int i = kCosines; i < kAttentionOperands; ++i) attention[i] = in[kBlockAttention + i - kCosines];
  if (const char* wrong = describe(attention, a.scale, &block->attended)) return wrong;
  const int64_t queries = a.heads * dim, keys = key_heads * dim, inner = a.intermediate;
  const struct { const kbn_matmul** place; int64_t in, out; int gain; } parts[kBlockWeights] = {
      {&block->query, hidden, queries, 0}, {&block->key, hidden, keys, 0},
      {&block->value, hidden, keys, 0},    {&block->output, queries, hidden, 1},
      {&block->up, hidden, inner, 2},      {&block->down, inner, hidden, 3},
      {&block->gate, hidden, inner, 2},
  };
  for (int i = 0; i < kBlockWeights; ++i) {
    const Operand *weight = in + kBlockWeight + 3 * i, &tiles = weight[0], &scale = weight[1];
    const Operand &bias = weight[2], &gain = in[kBlockGain + parts[i].gain];
    *parts[i].place = nullptr;
    if (i == kGateWeight && tiles.shape.rank == 1) continue;
    const int64_t rows[] = {batch, tokens, parts[i].in};
    Attributes attributes = a;
    attributes.out_features = parts[i].out;
    Matmul* matmul = &block->matmuls[i];
    const char* wrong = describe(attributes, {rows, 3}, tiles.shape, scale.shape, bias.shape, kNothing,
                                 gain.shape, matmul);
    if (wrong) return wrong;
    if (tiles.dtype != kUint8 || scale.dtype != KBN_F32 || bias.dtype != KBN_F32 || gain.dtype != KBN_F32)
      return "wrong dtype of a weight";
    matmul->dtype = x.dtype;
    matmul->tiles = static_cast<const uint8_t*>(tiles.data);
    matmul->scale = static_cast<const float*>(scale.data);
    matmul->bias = bias.shape[0] ? static_cast<const float*>(bias.data) : nullptr;
    matmul->gain = gain.shape[0] ? static_cast<const float*>(gain.data) : nullptr;
    *parts[i].place = matmul;
  }
  block->attention = &block->attended;
  block->activation = static_cast<int32_t>(a.activation);
  block->x = x.data;
  return nullptr;
}

inline const char* run(const kbn_block& block, const kbn_parallel* parallel) {
  if (block.attention->batch == 0) return nullptr;
  const int code = kbn_decode(&block, parallel);
  return code ? kbn_error(code) : nullptr;
}

// ---- norm ----

// As the other `describe`, of x (..., features) and a float32 scale; fills all but y.
inline const char* describe(const Operand& x, const Operand& scale, double epsilon,
                            kbn_norm* problem) {
  if (x.shape.rank < 1 || scale.shape.rank != 1 || scale.shape[0] != x.shape[-1] ||
      scale.dtype != KBN_F32)
    return "x must be (..., features) and scale float32 (features,)";
  *problem = kbn_norm{};
  problem->rows = x.shape.rows();
  problem->features = x.shape[-1];
  problem->dtype = x.dtype;
  problem->epsilon = static_cast<float>(epsilon);
  problem->x = x.data;
  problem->scale = static_cast<const float*>(scale.data);
  return nullptr;
}

inline const char* run(const kbn_norm& problem, const kbn_parallel* parallel) {
  if (problem.rows == 0) return nullptr;
  const int code = kbn_normalize(&problem, parallel);
  return code ? kbn_error(code) : nullptr;
}

}  // namespace kbn_adapter

// `kbn_adapter::run` on the library's own pool, on at most `threads` of its threads (0: on all).
KBN_API const char* kbn_run_limited(const kbn_joint* problem, int32_t threads);
KBN_API const char* kbn_attend_limited(const kbn_attention* problem, int32_t threads);
KBN_API const char* kbn_normalize_limited(const kbn_norm* problem, int32_t threads);
KBN_API const char* kbn_decode_limited(const kbn_block* block, int32_t threads);

// A chain: blocks that an operator runs after the one whose operands it is given. They have operands of the
// same shapes and dtypes, whose addresses are kept here, as the headers of so many tensors leave the
// caches between two tokens.

// Keeps the addresses of the operands of some blocks, kBlockOperands each; null is that of the first block.
// Returns the number of the chain, or 0: there are too many. All that they point to must stay where it
// is until the chain is dropped.
KBN_API int32_t kbn_chain_keep(void* const* operands, int64_t blocks);
KBN_API void kbn_chain_drop(int32_t number);
// The addresses and how many blocks they are of; null: there is no such chain.
KBN_API void* const* kbn_chain_find(int32_t number, int64_t* blocks);

namespace kbn_adapter {

// Decodes a token by the block of some operands and by those of the chain that `number` names, an int32, or
// has no elements. `run(block)` runs one and says what is wrong.
template <typename Run>
const char* decode(const BlockAttributes& attributes, Operand* operands, const Operand& number, void* y,
                   const Run& run) {
  void* const* following = nullptr;
  int64_t blocks = 0;
  if (number.dtype != kInt32 || number.shape.rank != 1 || number.shape[0] > 1)
    return "the number of a chain must be an int32 of one axis";
  if (number.shape[0] == 1) {
    following = kbn_chain_find(*static_cast<const int32_t*>(number.data), &blocks);
    if (!following) return "there is no such chain of blocks in this process";
  }
  for (int64_t i = 0;; ++i, following += kBlockOperands) {
    Block block;
    if (const char* wrong = describe(attributes, operands, &block)) return wrong;
    block.y = y;
    if (const char* wrong = run(block)) return wrong;
    if (i == blocks) return nullptr;
    for (int j = 0; j < kBlockOperands; ++j)
      if (following[j]) operands[j].data = following[j];
    operands[kBlockX].data = y;
  }
}

}  // namespace kbn_adapter
