// The product, the norm, the attention and a block of a decoder as XLA FFI handlers, for JAX. An empty operand means
// none.
#include <string.h>

#include <string>

#include "../../native/src/xla_ffi.h"
#include "driver.h"
#include "shim.h"

namespace {

using namespace xla_ffi;

constexpr uint32_t kCommandBufferCompatible = 1;

struct StreamGet {
  size_t struct_size;
  Extension* extension;
  void* context;
  void* stream;
};

void* error(const CallFrame* frame, const char* text) {
  const std::string message = std::string("keras_bitnet: ") + text;
  ErrorCreate args{sizeof args, nullptr, message.c_str(), kInternal};
  return frame->api->error_create(&args);
}

// Asked once at registration. Nothing newer than 0.1 is used, so the answer is the runtime's own
// version, within what is known.
bool answer_metadata(const CallFrame* frame) {
  for (Extension* e = frame->extension; e; e = e->next) {
    if (e->type != kMetadataExtension) continue;
    Metadata* metadata = reinterpret_cast<MetadataExtension*>(e)->metadata;
    int minor = frame->api ? frame->api->version.minor_version : 1;
    minor = minor < 1 ? 1 : minor > 3 ? 3 : minor;
    metadata->version = ApiVersion{sizeof(ApiVersion), nullptr, 0, minor};
    metadata->traits = kCommandBufferCompatible;
    return true;
  }
  return false;
}

template <class T> bool read(const Attributes& attributes, const char* name, int32_t dtype, T* value) {
  for (int64_t i = 0; i < attributes.size; ++i) {
    const ByteSpan* span = attributes.names[i];
    if (span->size != strlen(name) || memcmp(span->data, name, span->size) != 0) continue;
    const Scalar* found = static_cast<Scalar*>(attributes.values[i]);
    if (attributes.types[i] != kScalarAttribute || found->dtype != dtype) return false;
    memcpy(value, found->value, sizeof *value);
    return true;
  }
  return false;
}

int64_t size(const Buffer* b) {
  int64_t product = 1;
  for (int64_t i = 0; i < b->rank; ++i) product *= b->dims[i];
  return product;
}

int32_t dtype_of(const Buffer* b) {
  return b->dtype == kF32 ? 0 : b->dtype == kBF16 ? 1 : b->dtype == kF16 ? 2 : b->dtype == kS8 ? 3 : -1;
}

// Each fills a problem from what XLA passes, and checks every shape that the kernels trust.

const char* check_weight(const Buffer* tiles, const Buffer* scale, const Buffer* bias, int64_t in_features,
                         int64_t out_features, int64_t bits, int64_t group_size) {
  const int64_t groups = group_size ? (in_features + group_size - 1) / group_size : 1;
  const int64_t bytes = (out_features + 15) / 16 * ((in_features * bits + 31) / 32) * 64;
  if (size(tiles) != bytes) return "tiles must be [ceil(out / 16), ceil(in * bits / 32), 16, 4]";
  if (scale->rank != 2 || scale->dims[0] != groups || (scale->dims[1] != 1 && scale->dims[1] != out_features))
    return "scale must be (1 or groups, 1 or out)";
  if (size(bias) && size(bias) != out_features) return "bias must be (out,), or (0,): none";
  if (tiles->dtype != kU8 || scale->dtype != kF32 || bias->dtype != kF32) return "wrong dtype of a weight";
  return nullptr;
}

// Product `i` of `count`.
const char* describe(const CallFrame* frame, int64_t i, int64_t count, kbc_matmul* p) {
  int64_t bits, activation_bits, per_tensor;
  double offset, epsilon;
  const Attributes& attributes = frame->attributes;
  if (!read(attributes, "group_size", kS64, &p->group_size) || !read(attributes, "bits", kS64, &bits) ||
      !read(attributes, "activation_bits", kS64, &activation_bits) ||
      !read(attributes, "per_tensor", kS64, &per_tensor) ||
      !read(attributes, "offset", kF64, &offset) || !read(attributes, "epsilon", kF64, &epsilon))
    return "an attribute is missing";
  Buffer **in = frame->arguments.buffers, **out = frame->results.buffers;
  const Buffer *x = in[0], *tiles = in[1 + 3 * i], *scale = in[2 + 3 * i], *bias = in[3 + 3 * i];
  const Buffer *x_scale = in[1 + 3 * count], *y = out[i], *workspace = out[count];
  if (x->rank < 1 || y->rank < 1) return "wrong rank of an operand";
  p->in_features = x->dims[x->rank - 1];
  p->out_features = y->dims[y->rank - 1];
  p->rows = 1;
  for (int64_t i = 0; i + 1 < x->rank; ++i) p->rows *= x->dims[i];
  p->bits = static_cast<int32_t>(bits);
  p->dtype = dtype_of(x);
  p->activation_bits = static_cast<int32_t>(activation_bits);
  p->per_tensor = static_cast<int32_t>(per_tensor);
  p->offset = static_cast<float>(offset);
  p->epsilon = static_cast<float>(epsilon);
  if (p->in_features < 1 || p->out_features < 1 || p->group_size < 0) return "a size is out of range";
  if (const char* wrong = check_weight(tiles, scale, bias, p->in_features, p->out_features, bits, p->group_size))
    return wrong;
  p->scale_columns = static_cast<int32_t>(scale->dims[1]);
  if (size(x_scale) > 1) return "x_scale must be (1,), or (0,): computed from x";
  if (y->dtype != x->dtype || x_scale->dtype != kF32) return "wrong dtype of an operand";
  if (size(y) != p->rows * p->out_features) return "wrong shape of the result";
  if (size(workspace) < kbc_workspace(p)) return "the workspace is too small";
  p->x = x->data;
  p->tiles = tiles->data;
  p->scale = scale->data;
  p->bias = size(bias) ? bias->data : nullptr;
  p->x_scale = size(x_scale) ? x_scale->data : nullptr;
  p->y = y->data;
  p->workspace = workspace->data;
  return nullptr;
}

struct Joint {
  kbc_joint problem;
  kbc_matmul matmuls[KBC_MAX_JOINT];
};
const char* run(const Joint* joint, int device, void* stream) {
  return kbc_run_joint(&joint->problem, device, stream);
}

// Operands x, then tiles, scale, bias of each weight, x_scale; results y of each weight, and a workspace of
// kbc_workspace() bytes.
const char* describe(const CallFrame* frame, Joint* joint) {
  const int64_t count = frame->results.size - 1;
  if (count < 1 || count > KBC_MAX_JOINT || frame->arguments.size != 2 + 3 * count)
    return "wrong number of operands";
  joint->problem.count = static_cast<int32_t>(count);
  for (int64_t i = 0; i < count; ++i) {
    joint->problem.matmuls[i] = &joint->matmuls[i];
    if (const char* wrong = describe(frame, i, count, &joint->matmuls[i])) return wrong;
  }
  return nullptr;
}

// Operands x and gain; result y.
const char* describe(const CallFrame* frame, kbc_norm* p) {
  if (frame->arguments.size != 2 || frame->results.size != 1) return "wrong number of operands";
  double epsilon;
  if (!read(frame->attributes, "epsilon", kF64, &epsilon)) return "an attribute is missing";
  const Buffer *x = frame->arguments.buffers[0], *gain = frame->arguments.buffers[1], *y = frame->results.buffers[0];
  if (x->rank < 1) return "wrong rank of an operand";
  p->features = x->dims[x->rank - 1];
  if (p->features < 1) return "a size is out of range";
  p->rows = size(x) / p->features;
  p->dtype = dtype_of(x);
  p->epsilon = static_cast<float>(epsilon);
  if (size(gain) != p->features || size(y) != size(x)) return "wrong shape of an operand";
  if (gain->dtype != kF32 || y->dtype != x->dtype) return "wrong dtype of an operand";
  p->x = x->data;
  p->gain = gain->data;
  p->y = y->data;
  return nullptr;
}

// What an attention and a block have alike. `in`: cosines, sines, mask, index and the two or, of int8, four tensors of
// the cache, which `out` has again, in the same memory. Batch, tokens and size of a head are known.
template <class Problem> const char* describe_cache(Buffer** in, Buffer** out, int64_t kept, Problem* p) {
  const Buffer *cosines = in[0], *sines = in[1], *mask = in[2], *index = in[3], *cache = in[4];
  if (cache->rank != 4) return "wrong rank of an operand";
  if (p->tokens < 1 || p->head_dim < 1 || cache->dims[1] < 1 || cache->dims[2] < 1)
    return "a size is out of range";
  p->key_heads = static_cast<int32_t>(cache->dims[1]);
  p->length = cache->dims[2];
  p->cache_dtype = dtype_of(cache);
  const int64_t row = p->head_dim, rows = p->batch * p->key_heads * p->length;
  const int64_t tables = size(cosines) / (p->tokens * row), masks = size(mask) / (p->tokens * p->length);
  p->tables = static_cast<int32_t>(tables ? tables : 1);
  p->masks = static_cast<int32_t>(masks ? masks : 1);
  if (size(cosines) != tables * p->tokens * row || size(sines) != size(cosines) ||
      size(mask) != masks * p->tokens * p->length || size(index) != 1)
    return "wrong shape of an operand";
  if (cosines->dtype != kF32 || sines->dtype != kF32 || mask->dtype != kPRED || index->dtype != kS32 ||
      (kept == 4) != (p->cache_dtype == 3))
    return "wrong dtype of an operand";
  for (int64_t i = 0; i < kept; ++i) {
    const Buffer* one = in[4 + i];
    if (size(one) != (i < 2 ? rows * row : rows)) return "wrong shape of the cache";
    if (i < 2 ? one->dtype != cache->dtype : one->dtype != kF32) return "wrong dtype of the cache";
    if (out[i]->data != one->data) return "the cache is not written in place";
  }
  p->cosines = tables ? cosines->data : nullptr;
  p->sines = tables ? sines->data : nullptr;
  p->mask = masks ? mask->data : nullptr;
  p->index = index->data;
  return nullptr;
}

// Operands query, key, value, cosines, sines, mask, index and the cache; results y and the cache.
const char* describe(const CallFrame* frame, kbc_attention* p) {
  const int64_t count = frame->arguments.size, kept = count - 7;
  if ((kept != 2 && kept != 4) || frame->results.size != 1 + kept) return "wrong number of operands";
  double scale;
  if (!read(frame->attributes, "scale", kF64, &scale)) return "an attribute is missing";
  Buffer **in = frame->arguments.buffers, **out = frame->results.buffers;
  const Buffer *query = in[0], *key = in[1], *value = in[2], *y = out[0];
  if (query->rank != 4) return "wrong rank of an operand";
  p->batch = query->dims[0];
  p->tokens = query->dims[1];
  p->heads = static_cast<int32_t>(query->dims[2]);
  p->head_dim = static_cast<int32_t>(query->dims[3]);
  p->dtype = dtype_of(query);
  p->scale = static_cast<float>(scale);
  if (const char* wrong = describe_cache(in + 3, out + 1, kept, p)) return wrong;
  if (size(key) != p->batch * p->tokens * p->key_heads * p->head_dim || size(value) != size(key) ||
      size(y) != size(query))
    return "wrong shape of an operand";
  if (dtype_of(key) != p->dtype || dtype_of(value) != p->dtype || dtype_of(y) != p->dtype)
    return "wrong dtype of an operand";
  p->query = query->data;
  p->key = key->data;
  p->value = value->data;
  p->key_cache = in[7]->data;
  p->value_cache = in[8]->data;
  p->key_scale = kept == 4 ? in[9]->data : nullptr;
  p->value_scale = kept == 4 ? in[10]->data : nullptr;
  p->y = y->data;
  return nullptr;
}

struct Block {
  kbc_decode problem;
  const void* tensors[KBC_BLOCK_TENSORS];
};
const char* run_block(const Block* block, int device, void* stream) {
  return kbc_run_decode(&block->problem, device, stream);
}

// Operands x, then tiles, scale and bias of each weight, the gains, cosines, sines, mask, index and the cache; results
// y, the cache, and a workspace of kbc_decode_workspace() bytes.
const char* describe(const CallFrame* frame, Block* block) {
  constexpr int64_t kGains = 4, kOwn = 3 * KBC_BLOCK_WEIGHTS + kGains;
  kbc_decode* p = &block->problem;
  const int64_t kept = frame->arguments.size - kOwn - 5;
  if ((kept != 2 && kept != 4) || frame->results.size != 2 + kept) return "wrong number of operands";
  int64_t heads, intermediate, activation, bits, group_size, activation_bits;
  double offset, epsilon, norm_epsilon, scale;
  const Attributes& attributes = frame->attributes;
  if (!read(attributes, "heads", kS64, &heads) || !read(attributes, "intermediate", kS64, &intermediate) ||
      !read(attributes, "activation", kS64, &activation) || !read(attributes, "bits", kS64, &bits) ||
      !read(attributes, "group_size", kS64, &group_size) ||
      !read(attributes, "activation_bits", kS64, &activation_bits) || !read(attributes, "offset", kF64, &offset) ||
      !read(attributes, "epsilon", kF64, &epsilon) || !read(attributes, "norm_epsilon", kF64, &norm_epsilon) ||
      !read(attributes, "scale", kF64, &scale))
    return "an attribute is missing";
  Buffer **in = frame->arguments.buffers, **own = in + 1, **shared = own + kOwn, **cache = shared + 4;
  Buffer** out = frame->results.buffers;
  const Buffer *x = in[0], *y = out[0], *workspace = out[1 + kept];
  if (x->rank != 3 || cache[0]->rank != 4) return "wrong rank of an operand";
  p->blocks = 1;
  p->batch = x->dims[0];
  p->tokens = x->dims[1];
  p->features = x->dims[2];
  p->intermediate = intermediate;
  p->group_size = group_size;
  p->heads = static_cast<int32_t>(heads);
  p->head_dim = static_cast<int32_t>(cache[0]->dims[3]);
  p->bits = static_cast<int32_t>(bits);
  p->dtype = dtype_of(x);
  p->activation_bits = static_cast<int32_t>(activation_bits);
  p->activation = static_cast<int32_t>(activation);
  p->weights = KBC_WEIGHTS_SETTLE;  // a kernel just before may be writing them
  p->offset = static_cast<float>(offset);
  p->epsilon = static_cast<float>(epsilon);
  p->norm_epsilon = static_cast<float>(norm_epsilon);
  p->scale = static_cast<float>(scale);
  if (p->features < 1 || p->heads < 1 || intermediate < 1 || group_size < 0) return "a size is out of range";
  if (const char* wrong = describe_cache(shared, out + 1, kept, p)) return wrong;
  const int64_t features = p->features, queries = heads * p->head_dim, keys = p->key_heads * int64_t{p->head_dim};
  const int64_t inputs[] = {features, features, features, queries, features, intermediate, features};
  const int64_t outputs[] = {queries, keys, keys, features, intermediate, features, intermediate};
  p->gated = size(own[3 * (KBC_BLOCK_WEIGHTS - 1)]) != 0;
  for (int i = 0; i < KBC_BLOCK_WEIGHTS - !p->gated; ++i) {
    Buffer** const weight = own + 3 * i;
    if (const char* wrong = check_weight(weight[0], weight[1], weight[2], inputs[i], outputs[i], bits, group_size))
      return wrong;
    p->scale_columns[i] = static_cast<int32_t>(weight[1]->dims[1]);
  }
  const int64_t normed[kGains] = {features, queries, features, intermediate};
  for (int64_t i = 0; i < kGains; ++i) {
    const Buffer* gain = own[3 * KBC_BLOCK_WEIGHTS + i];
    if (size(gain) && size(gain) != normed[i]) return "wrong shape of a gain";
    if (gain->dtype != kF32) return "wrong dtype of a gain";
  }
  if (y->dtype != x->dtype || size(y) != size(x)) return "wrong shape or dtype of the result";
  if (size(workspace) < kbc_decode_workspace(p)) return "the workspace is too small";
  for (int64_t i = 0; i < kOwn; ++i) block->tensors[i] = size(own[i]) ? own[i]->data : nullptr;
  for (int64_t i = 0; i < kept; ++i) block->tensors[kOwn + i] = cache[i]->data;
  p->x = x->data;
  p->tensors = block->tensors;
  p->y = y->data;
  p->workspace = workspace->data;
  return nullptr;
}

// The device of a stream of XLA's.
const char* device_of(void* stream, int* ordinal) {
  if (const char* wrong = kbc_open()) return wrong;
  cuda::Context context, popped;
  if (cuda::cuStreamGetCtx(stream, &context) || cuda::cuCtxPushCurrent(context))
    return "the stream has no context";
  const int code = cuda::cuCtxGetDevice(ordinal);
  cuda::cuCtxPopCurrent(&popped);
  return code ? "the stream has no device" : nullptr;
}

template <class Problem>
void* handle(CallFrame* frame, const char* (*run)(const Problem*, int, void*)) {
  if (answer_metadata(frame) || frame->stage != kExecuteStage) return nullptr;
  Problem problem{};
  if (const char* wrong = describe(frame, &problem)) return error(frame, wrong);
  StreamGet get{sizeof get, nullptr, frame->context, nullptr};
  auto stream_get = reinterpret_cast<void* (*)(StreamGet*)>(frame->api->stream_get);
  if (void* failed = stream_get(&get)) return failed;
  int device = 0;
  if (const char* wrong = device_of(get.stream, &device)) return error(frame, wrong);
  const char* wrong = run(&problem, device, get.stream);
  return wrong ? error(frame, wrong) : nullptr;
}

}  // namespace

KBC_API void* kbc_xla_matmul(CallFrame* frame) { return handle(frame, run); }
KBC_API void* kbc_xla_norm(CallFrame* frame) { return handle(frame, kbc_run_norm); }
KBC_API void* kbc_xla_attention(CallFrame* frame) { return handle(frame, kbc_run_attention); }
KBC_API void* kbc_xla_decode(CallFrame* frame) { return handle(frame, run_block); }
