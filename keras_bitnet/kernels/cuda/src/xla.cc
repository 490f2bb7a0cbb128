// The product, the norm and the attention as XLA FFI handlers, for JAX. An empty operand means none.
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
  if (x->rank < 1 || y->rank < 1 || scale->rank != 2) return "wrong rank of an operand";
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
  p->scale_columns = static_cast<int32_t>(scale->dims[1]);
  if (p->in_features < 1 || p->out_features < 1 || p->group_size < 0) return "a size is out of range";
  const int64_t groups =
      p->group_size ? (p->in_features + p->group_size - 1) / p->group_size : 1;
  const int64_t bytes = (p->out_features + 15) / 16 * ((p->in_features * bits + 31) / 32) * 64;
  if (size(tiles) != bytes) return "tiles must be [ceil(out / 16), ceil(in * bits / 32), 16, 4]";
  if (scale->dims[0] != groups) return "scale must be (1 or groups, 1 or out)";
  if (size(bias) && size(bias) != p->out_features) return "bias must be (out,), or (0,): none";
  if (size(x_scale) > 1) return "x_scale must be (1,), or (0,): computed from x";
  if (y->dtype != x->dtype || tiles->dtype != kU8 || scale->dtype != kF32 ||
      bias->dtype != kF32 || x_scale->dtype != kF32)
    return "wrong dtype of an operand";
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

// Operands query, key, value, cosines, sines, mask, index and the two or, of int8, four tensors of the
// cache; results y and those tensors again, in the same memory.
const char* describe(const CallFrame* frame, kbc_attention* p) {
  const int64_t count = frame->arguments.size, kept = count - 7;
  if ((kept != 2 && kept != 4) || frame->results.size != 1 + kept) return "wrong number of operands";
  double scale;
  if (!read(frame->attributes, "scale", kF64, &scale)) return "an attribute is missing";
  Buffer **in = frame->arguments.buffers, **out = frame->results.buffers;
  const Buffer *query = in[0], *key = in[1], *cosines = in[3], *mask = in[5], *cache = in[7];
  if (query->rank != 4 || key->rank != 4 || cache->rank != 4) return "wrong rank of an operand";
  if (query->dims[1] < 1 || query->dims[3] < 1 || cache->dims[2] < 1) return "a size is out of range";
  p->batch = query->dims[0];
  p->tokens = query->dims[1];
  p->heads = static_cast<int32_t>(query->dims[2]);
  p->head_dim = static_cast<int32_t>(query->dims[3]);
  p->key_heads = static_cast<int32_t>(cache->dims[1]);
  p->length = cache->dims[2];
  p->dtype = dtype_of(query);
  p->cache_dtype = dtype_of(cache);
  p->scale = static_cast<float>(scale);
  const int64_t row = p->head_dim, rows = p->batch * p->key_heads, tables = size(cosines) / (p->tokens * row);
  const int64_t masks = size(mask) / (p->tokens * p->length);
  p->tables = static_cast<int32_t>(tables ? tables : 1);
  p->masks = static_cast<int32_t>(masks ? masks : 1);
  if (size(key) != rows * p->tokens * row || size(in[2]) != size(key) || size(cache) != rows * p->length * row ||
      size(in[8]) != size(cache) || size(in[4]) != size(cosines) || size(cosines) != tables * p->tokens * row ||
      size(mask) != masks * p->tokens * p->length || size(in[6]) != 1 || size(out[0]) != size(query))
    return "wrong shape of an operand";
  if (dtype_of(key) != p->dtype || dtype_of(in[2]) != p->dtype || dtype_of(out[0]) != p->dtype ||
      dtype_of(in[8]) != p->cache_dtype || cosines->dtype != kF32 || in[4]->dtype != kF32 ||
      mask->dtype != kPRED || in[6]->dtype != kS32 || (kept == 4) != (p->cache_dtype == 3))
    return "wrong dtype of an operand";
  for (int64_t i = 0; i < kept; ++i)
    if (out[1 + i]->data != in[7 + i]->data) return "the cache is not written in place";
  p->query = query->data;
  p->key = key->data;
  p->value = in[2]->data;
  p->cosines = tables ? cosines->data : nullptr;
  p->sines = tables ? in[4]->data : nullptr;
  p->mask = masks ? mask->data : nullptr;
  p->index = in[6]->data;
  p->key_cache = cache->data;
  p->value_cache = in[8]->data;
  if (kept == 4) {
    if (in[9]->dtype != kF32 || in[10]->dtype != kF32 || size(in[9]) != rows * p->length ||
        size(in[10]) != rows * p->length)
      return "the scales of the cache must be float32 (batch, heads, length, 1)";
    p->key_scale = in[9]->data;
    p->value_scale = in[10]->data;
  }
  p->y = out[0]->data;
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
