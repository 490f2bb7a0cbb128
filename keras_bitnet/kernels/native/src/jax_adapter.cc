// The packed matmul, the attention to a cache and a block of a decoder as XLA FFI handlers, for JAX.
#include <string.h>

#include <string>

#include "adapter.h"
#include "xla_ffi.h"

namespace {

using namespace xla_ffi;
using kbn_adapter::Shape;

void* error(const CallFrame* frame, int32_t code, const char* message) {
  const std::string text = std::string("keras_bitnet: ") + message;
  ErrorCreate args{sizeof args, nullptr, text.c_str(), code};
  return frame->api->error_create(&args);
}

bool failed(const CallFrame* frame, void* error) {
  if (!error) return false;
  ErrorDestroy args{sizeof args, nullptr, error};
  frame->api->error_destroy(&args);
  return true;
}

// Threads of XLA's pool, or 0 where this runtime has none to offer.
int64_t pool_threads(const CallFrame* frame) {
  if (frame->api->struct_size < offsetof(Api, num_threads) + sizeof(void*)) return 0;
  int64_t count = 0;
  NumThreads args{sizeof args, nullptr, frame->context, &count};
  return failed(frame, frame->api->num_threads(&args)) ? 0 : count;
}

void* attribute(const xla_ffi::Attributes& attributes, const char* name, int32_t type) {
  for (int64_t i = 0; i < attributes.size; ++i) {
    const ByteSpan* span = attributes.names[i];
    if (span->size != strlen(name) || memcmp(span->data, name, span->size) != 0) continue;
    return attributes.types[i] == type ? attributes.values[i] : nullptr;
  }
  return nullptr;
}

const void* scalar(const xla_ffi::Attributes& attributes, const char* name, int32_t dtype) {
  const Scalar* found = static_cast<Scalar*>(attribute(attributes, name, kScalarAttribute));
  return found && found->dtype == dtype ? found->value : nullptr;
}

bool read(const xla_ffi::Attributes& attributes, const char* name, int64_t* value) {
  const void* found = scalar(attributes, name, kS64);
  if (found) memcpy(value, found, sizeof *value);
  return found;
}

bool read(const xla_ffi::Attributes& attributes, const char* name, double* value) {
  const void* found = scalar(attributes, name, kF64);
  if (found) memcpy(value, found, sizeof *value);
  return found;
}

bool read(const xla_ffi::Attributes& attributes, kbn_adapter::Attributes* out) {
  if (!read(attributes, "bits", &out->bits) || !read(attributes, "trits", &out->trits) ||
      !read(attributes, "group_size", &out->group_size) ||
      !read(attributes, "activation_bits", &out->activation_bits) ||
      !read(attributes, "per_tensor", &out->per_tensor) ||
      !read(attributes, "offset", &out->offset) || !read(attributes, "epsilon", &out->epsilon))
    return false;
  const Array* window = static_cast<Array*>(attribute(attributes, "window", kArrayAttribute));
  if (!window) return true;  // a product of rows
  if (window->dtype != kS64 || window->size != kbn_adapter::kWindowNumbers) return false;
  memcpy(&out->window, window->data, sizeof out->window);
  return true;
}

int32_t dtype_of(int32_t dtype) {
  return dtype == kF32 ? KBN_F32 : dtype == kBF16 ? KBN_BF16 : dtype == kF16 ? KBN_F16 : -1;
}

Shape shape(const Buffer* buffer) { return {buffer->dims, buffer->rank}; }

// Asked once at registration: which version of the API this handler speaks. Nothing newer than
// 0.1 is used without asking `struct_size`, so it answers with the runtime's own, within what is
// known.
bool answer_metadata(const CallFrame* frame) {
  for (Extension* e = frame->extension; e; e = e->next) {
    if (e->type != kMetadataExtension) continue;
    Metadata* metadata = reinterpret_cast<MetadataExtension*>(e)->metadata;
    int minor = frame->api ? frame->api->version.minor_version : 1;
    minor = minor < 1 ? 1 : minor > 3 ? 3 : minor;
    metadata->version = ApiVersion{sizeof(ApiVersion), nullptr, 0, minor};
    metadata->traits = 0;
    return true;
  }
  return false;
}

int32_t operand_dtype_of(int32_t dtype) {
  return dtype == kS8     ? KBN_I8
         : dtype == kS32  ? kbn_adapter::kInt32
         : dtype == kPRED ? kbn_adapter::kBool
         : dtype == kU8   ? kbn_adapter::kUint8
                          : dtype_of(dtype);
}

// Operands as `kbn_adapter` numbers them, the cache last and without the scales that it does not have;
// results y and the cache again, in the same memory. Returns what is wrong, or null.
template <int kMost, int kCache>
const char* read(const CallFrame* frame, kbn_adapter::Operand* operands) {
  const int64_t count = frame->arguments.size, kept = count - kCache;
  if ((kept != 2 && kept != 4) || frame->results.size != 1 + kept) return "wrong number of operands";
  Buffer **in = frame->arguments.buffers, **out = frame->results.buffers;
  for (int i = 0; i < kMost; ++i) {
    if (i < count)
      operands[i] = {shape(in[i]), operand_dtype_of(in[i]->dtype), in[i]->data};
    else
      operands[i] = {kbn_adapter::kNothing, KBN_F32, nullptr};
  }
  for (int64_t i = 0; i < kept; ++i)
    if (out[1 + i]->data != in[kCache + i]->data) return "the cache must be aliased";
  return nullptr;
}

// Runs on the library's own threads, as many as XLA's: those take tens of microseconds to begin.
template <typename Problem>
void* run(const CallFrame* frame, const Problem& problem,
          const char* (*run_limited)(const Problem*, int32_t)) {
  const char* wrong = run_limited(&problem, static_cast<int32_t>(pool_threads(frame)));
  return wrong ? error(frame, kInternal, wrong) : nullptr;
}

}  // namespace

// Operands x, then tiles, scale, bias of each weight, x_scale; results y of each weight.
KBN_API void* kbn_xla_matmul(xla_ffi::CallFrame* frame) {
  if (answer_metadata(frame) || frame->stage != kExecuteStage) return nullptr;
  kbn_adapter::Attributes attributes;
  const int64_t count = frame->results.size;
  if (count < 1 || count > KBN_MAX_JOINT || frame->arguments.size != 2 + 3 * count ||
      !read(frame->attributes, &attributes))
    return error(frame, kInvalidArgument, "wrong number of operands or attributes");
  Buffer **in = frame->arguments.buffers, *x = in[0], *x_scale = in[1 + 3 * count];
  kbn_adapter::Matmul matmuls[KBN_MAX_JOINT];
  kbn_joint problem{static_cast<int32_t>(count), {}};
  for (int64_t i = 0; i < count; ++i) {
    Buffer *tiles = in[1 + 3 * i], *scale = in[2 + 3 * i], *bias = in[3 + 3 * i];
    Buffer* y = frame->results.buffers[i];
    kbn_adapter::Matmul& matmul = matmuls[i];
    attributes.out_features = y->rank ? shape(y)[-1] : 0;
    const char* wrong = kbn_adapter::describe(attributes, shape(x), shape(tiles), shape(scale),
                                              shape(bias), shape(x_scale), kbn_adapter::kNothing,
                                              &matmul);
    if (wrong) return error(frame, kInvalidArgument, wrong);
    matmul.dtype = dtype_of(x->dtype);
    if (matmul.dtype < 0 || y->dtype != x->dtype || tiles->dtype != kU8 || scale->dtype != kF32 ||
        bias->dtype != kF32 || x_scale->dtype != kF32 || shape(y).rows() != matmul.rows)
      return error(frame, kInvalidArgument, "wrong dtype of an operand, or shape of the result");
    matmul.x = x->data;
    matmul.tiles = static_cast<const uint8_t*>(tiles->data);
    matmul.scale = static_cast<const float*>(scale->data);
    matmul.bias = bias->dims[0] ? static_cast<const float*>(bias->data) : nullptr;
    matmul.x_scale = x_scale->dims[0] ? static_cast<const float*>(x_scale->data) : nullptr;
    matmul.y = y->data;
    problem.matmuls[i] = &matmul;
  }
  return run(frame, problem, kbn_run_limited);
}

KBN_API void* kbn_xla_attend(xla_ffi::CallFrame* frame) {
  if (answer_metadata(frame) || frame->stage != kExecuteStage) return nullptr;
  constexpr int kMost = kbn_adapter::kAttentionOperands;
  kbn_adapter::Operand operands[kMost];
  kbn_attention problem;
  double factor;
  const char* wrong = read<kMost, kbn_adapter::kKeyCache>(frame, operands);
  if (!wrong && !read(frame->attributes, "scale", &factor)) wrong = "an attribute is missing";
  if (!wrong) wrong = kbn_adapter::describe(operands, factor, &problem);
  if (wrong) return error(frame, kInvalidArgument, wrong);
  problem.y = frame->results.buffers[0]->data;
  return run(frame, problem, kbn_attend_limited);
}

KBN_API void* kbn_xla_decode(xla_ffi::CallFrame* frame) {
  if (answer_metadata(frame) || frame->stage != kExecuteStage) return nullptr;
  constexpr int kMost = kbn_adapter::kBlockOperands;
  const xla_ffi::Attributes& given = frame->attributes;
  kbn_adapter::Operand operands[kMost];
  kbn_adapter::BlockAttributes attributes;
  kbn_adapter::Block block;
  const char* wrong = read<kMost, kbn_adapter::kBlockCache>(frame, operands);
  if (!wrong && (!read(given, &attributes) || !read(given, "norm_epsilon", &attributes.norm_epsilon) ||
                 !read(given, "heads", &attributes.heads) || !read(given, "scale", &attributes.scale) ||
                 !read(given, "intermediate", &attributes.intermediate) ||
                 !read(given, "activation", &attributes.activation)))
    wrong = "an attribute is missing";
  if (!wrong) wrong = kbn_adapter::describe(attributes, operands, &block);
  const Buffer* y = frame->results.buffers[0];
  if (!wrong && (y->dtype != frame->arguments.buffers[0]->dtype || y->rank != 3 ||
                 memcmp(y->dims, frame->arguments.buffers[0]->dims, 3 * sizeof *y->dims) != 0))
    wrong = "the result must be like x";
  if (wrong) return error(frame, kInvalidArgument, wrong);
  block.y = y->data;
  return run<kbn_block>(frame, block, kbn_decode_limited);
}
