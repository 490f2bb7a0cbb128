// The packed matmul, the attention to a cache, the norm and a block of a decoder as TensorFlow ops, through
// TensorFlow's stable C API for ops and kernels.
// The functions are declared here and found in the process that loads this library with
// `tf.load_op_library`, so that one binary serves every version and builds without TensorFlow.
#include <stdint.h>
#include <stdio.h>

#include <algorithm>
#include <atomic>
#include <memory>
#include <string>
#include <vector>

#include "adapter.h"
#include "symbols.h"

namespace {

using kbn_adapter::Attributes;
using kbn_adapter::Shape;

struct TF_OpDefinitionBuilder;
struct TF_Status;
struct TF_ShapeInferenceContext;
struct TF_ShapeHandle;
struct TF_KernelBuilder;
struct TF_OpKernelConstruction;
struct TF_OpKernelContext;
struct TF_Tensor;

enum { kFloat = 1, kInt32 = 3, kUint8 = 4, kInt8 = 6, kBool = 10, kBfloat16 = 14, kHalf = 19 };  // TF_DataType
enum { kInvalidArgument = 3, kInternal = 13 };    // TF_Code

using ShapeFunction = void (*)(TF_ShapeInferenceContext*, TF_Status*);
using Create = void* (*)(TF_OpKernelConstruction*);
using Compute = void (*)(void*, TF_OpKernelContext*);
using Delete = void (*)(void*);

// The functions that are needed: X(result, name, arguments).
#define KBN_TF_FUNCTIONS(X)                                                                      \
  X(TF_Status*, TF_NewStatus, (void))                                                            \
  X(void, TF_DeleteStatus, (TF_Status*))                                                         \
  X(int, TF_GetCode, (const TF_Status*))                                                         \
  X(const char*, TF_Message, (const TF_Status*))                                                 \
  X(void, TF_SetStatus, (TF_Status*, int, const char*))                                          \
  X(TF_OpDefinitionBuilder*, TF_NewOpDefinitionBuilder, (const char*))                           \
  X(void, TF_OpDefinitionBuilderAddAttr, (TF_OpDefinitionBuilder*, const char*))                 \
  X(void, TF_OpDefinitionBuilderAddInput, (TF_OpDefinitionBuilder*, const char*))                \
  X(void, TF_OpDefinitionBuilderAddOutput, (TF_OpDefinitionBuilder*, const char*))               \
  X(void, TF_OpDefinitionBuilderSetIsStateful, (TF_OpDefinitionBuilder*, bool))                  \
  X(void, TF_OpDefinitionBuilderSetShapeInferenceFunction,                                       \
    (TF_OpDefinitionBuilder*, ShapeFunction))                                                    \
  X(void, TF_RegisterOpDefinition, (TF_OpDefinitionBuilder*, TF_Status*))                        \
  X(TF_ShapeHandle*, TF_NewShapeHandle, (void))                                                  \
  X(void, TF_DeleteShapeHandle, (TF_ShapeHandle*))                                               \
  X(void, TF_ShapeInferenceContextGetInput,                                                      \
    (TF_ShapeInferenceContext*, int, TF_ShapeHandle*, TF_Status*))                               \
  X(void, TF_ShapeInferenceContextSetOutput,                                                     \
    (TF_ShapeInferenceContext*, int, TF_ShapeHandle*, TF_Status*))                               \
  X(void, TF_ShapeInferenceContextSetUnknownShape, (TF_ShapeInferenceContext*, TF_Status*))      \
  X(int64_t, TF_ShapeInferenceContextNumInputs, (TF_ShapeInferenceContext*))                     \
  X(void, TF_ShapeInferenceContextWithRank,                                                      \
    (TF_ShapeInferenceContext*, TF_ShapeHandle*, int64_t, TF_ShapeHandle*, TF_Status*))          \
  X(void, TF_ShapeInferenceContextWithRankAtLeast,                                               \
    (TF_ShapeInferenceContext*, TF_ShapeHandle*, int64_t, TF_ShapeHandle*, TF_Status*))          \
  X(int, TF_ShapeInferenceContextRankKnown, (TF_ShapeInferenceContext*, TF_ShapeHandle*))        \
  X(void, TF_ShapeInferenceContextSubshape,                                                      \
    (TF_ShapeInferenceContext*, TF_ShapeHandle*, int64_t, int64_t, TF_ShapeHandle*, TF_Status*)) \
  X(void, TF_ShapeInferenceContextConcatenateShapes,                                             \
    (TF_ShapeInferenceContext*, TF_ShapeHandle*, TF_ShapeHandle*, TF_ShapeHandle*, TF_Status*))  \
  X(TF_KernelBuilder*, TF_NewKernelBuilder,                                                      \
    (const char*, const char*, Create, Compute, Delete))                                         \
  X(void, TF_RegisterKernelBuilder, (const char*, TF_KernelBuilder*, TF_Status*))                \
  X(void, TF_OpKernelConstruction_GetAttrInt64,                                                  \
    (TF_OpKernelConstruction*, const char*, int64_t*, TF_Status*))                               \
  X(void, TF_OpKernelConstruction_GetAttrInt64List,                                              \
    (TF_OpKernelConstruction*, const char*, int64_t*, int, TF_Status*))                          \
  X(void, TF_OpKernelConstruction_GetAttrFloat,                                                  \
    (TF_OpKernelConstruction*, const char*, float*, TF_Status*))                                 \
  X(void, TF_OpKernelConstruction_Failure, (TF_OpKernelConstruction*, TF_Status*))               \
  X(int, TF_NumInputs, (TF_OpKernelContext*))                                                    \
  X(void, TF_GetInput, (TF_OpKernelContext*, int, TF_Tensor**, TF_Status*))                      \
  X(TF_Tensor*, TF_AllocateOutput,                                                               \
    (TF_OpKernelContext*, int, int, const int64_t*, int, size_t, TF_Status*))                    \
  X(void, TF_SetOutput, (TF_OpKernelContext*, int, const TF_Tensor*, TF_Status*))                \
  X(void, TF_OpKernelContext_Failure, (TF_OpKernelContext*, TF_Status*))                         \
  X(size_t, TF_DataTypeSize, (int))                                                              \
  X(int, TF_TensorType, (const TF_Tensor*))                                                      \
  X(int, TF_NumDims, (const TF_Tensor*))                                                         \
  X(int64_t, TF_Dim, (const TF_Tensor*, int))                                                    \
  X(void*, TF_TensorData, (const TF_Tensor*))                                                    \
  X(void, TF_DeleteTensor, (TF_Tensor*))

#define X(result, name, arguments) result(*name) arguments;
KBN_TF_FUNCTIONS(X)
#undef X

constexpr char kOp[] = "KerasBitnetMatmul", kJointOp[] = "KerasBitnetJointMatmul",
               kConvOp[] = "KerasBitnetConv", kAttentionOp[] = "KerasBitnetAttendNext",
               kNormOp[] = "KerasBitnetRmsNorm", kBlockOp[] = "KerasBitnetDecodeBlock";
std::atomic<int32_t> max_threads{0};

struct StatusDeleter {
  void operator()(TF_Status* status) const { TF_DeleteStatus(status); }
};
struct ShapeDeleter {
  void operator()(TF_ShapeHandle* shape) const { TF_DeleteShapeHandle(shape); }
};
struct TensorDeleter {
  void operator()(TF_Tensor* tensor) const { TF_DeleteTensor(tensor); }
};
using Status = std::unique_ptr<TF_Status, StatusDeleter>;
using ShapeOwner = std::unique_ptr<TF_ShapeHandle, ShapeDeleter>;
using TensorOwner = std::unique_ptr<TF_Tensor, TensorDeleter>;

// The inputs of a product: x, the tiles of each weight, their scales, their biases, x_scale and gain.
int weights_of(int64_t inputs) { return static_cast<int>(inputs - 3) / 3; }

// (..., in), tiles, scale, (out,), x_scale, gain -> (..., out). The stable API shows a shape function no
// integer attribute, so `out` is read off the bias, which is therefore always there.
void infer_shape(TF_ShapeInferenceContext* context, TF_Status* status) {
  const int inputs = static_cast<int>(TF_ShapeInferenceContextNumInputs(context));
  const int weights = weights_of(inputs);
  const int64_t ranks[] = {4, 2, 1, 1};  // of tiles, scales, biases; x_scale and gain
  std::vector<ShapeOwner> in(inputs);
  for (int i = 0; i < inputs; ++i) {
    in[i].reset(TF_NewShapeHandle());
    TF_ShapeInferenceContextGetInput(context, i, in[i].get(), status);
    if (TF_GetCode(status)) return;
    if (i == 0)
      TF_ShapeInferenceContextWithRankAtLeast(context, in[i].get(), 1, in[i].get(), status);
    else
      TF_ShapeInferenceContextWithRank(context, in[i].get(), ranks[std::min((i - 1) / weights, 3)],
                                       in[i].get(), status);
    if (TF_GetCode(status)) return;
  }
  if (!TF_ShapeInferenceContextRankKnown(context, in[0].get())) {
    TF_ShapeInferenceContextSetUnknownShape(context, status);
    return;
  }
  for (int i = 0; i < weights; ++i) {
    ShapeOwner out(TF_NewShapeHandle());
    TF_ShapeInferenceContextSubshape(context, in[0].get(), 0, -1, out.get(), status);
    if (TF_GetCode(status)) return;
    TF_ShapeInferenceContextConcatenateShapes(context, out.get(), in[1 + 2 * weights + i].get(),
                                              out.get(), status);
    if (TF_GetCode(status)) return;
    TF_ShapeInferenceContextSetOutput(context, i, out.get(), status);
    if (TF_GetCode(status)) return;
  }
}

// Where the window stands is known once images are: Python says it while it traces.
void infer_no_shape(TF_ShapeInferenceContext* context, TF_Status* status) {
  TF_ShapeInferenceContextSetUnknownShape(context, status);
}

void read(TF_OpKernelConstruction* context, const char* name, int64_t* value, TF_Status* status) {
  if (!TF_GetCode(status)) TF_OpKernelConstruction_GetAttrInt64(context, name, value, status);
}

void read(TF_OpKernelConstruction* context, const char* name, double* value, TF_Status* status) {
  float found = 0;
  if (!TF_GetCode(status)) TF_OpKernelConstruction_GetAttrFloat(context, name, &found, status);
  *value = found;
}

void read(TF_OpKernelConstruction* context, const char* name, kbn_adapter::Window* window,
          TF_Status* status) {
  if (TF_GetCode(status)) return;
  TF_OpKernelConstruction_GetAttrInt64List(context, name, reinterpret_cast<int64_t*>(window),
                                           kbn_adapter::kWindowNumbers, status);
}

// The attributes that all products have.
void read_shared(TF_OpKernelConstruction* context, Attributes* attributes, TF_Status* status) {
  read(context, "bits", &attributes->bits, status);
  read(context, "trits", &attributes->trits, status);
  read(context, "group_size", &attributes->group_size, status);
  read(context, "activation_bits", &attributes->activation_bits, status);
  read(context, "offset", &attributes->offset, status);
  read(context, "epsilon", &attributes->epsilon, status);
  read(context, "norm_epsilon", &attributes->norm_epsilon, status);
}

template <bool kConvolves>
void read_all(TF_OpKernelConstruction* context, Attributes* attributes, TF_Status* status) {
  read_shared(context, attributes, status);
  read(context, "per_tensor", &attributes->per_tensor, status);
  if (kConvolves) read(context, "window", &attributes->window, status);
}

// A kernel that is its attributes, and is deleted as them.
template <typename Kernel, void (*read)(TF_OpKernelConstruction*, Kernel*, TF_Status*)>
void* create(TF_OpKernelConstruction* context) {
  Status status(TF_NewStatus());
  auto kernel = std::make_unique<Kernel>();
  read(context, kernel.get(), status.get());
  if (!TF_GetCode(status.get())) return kernel.release();
  TF_OpKernelConstruction_Failure(context, status.get());
  return nullptr;
}

template <typename Kernel>
void destroy(void* kernel) {
  delete static_cast<Kernel*>(kernel);
}

// Its computation: `run` says in the status what is wrong.
template <typename Kernel, void (*run)(const Kernel&, TF_OpKernelContext*, TF_Status*)>
void compute(void* kernel, TF_OpKernelContext* context) {
  Status status(TF_NewStatus());
  run(*static_cast<Kernel*>(kernel), context, status.get());
  if (TF_GetCode(status.get())) TF_OpKernelContext_Failure(context, status.get());
}

int32_t kbn_dtype_of(int dtype) {
  return dtype == kFloat ? KBN_F32 : dtype == kBfloat16 ? KBN_BF16 : dtype == kHalf ? KBN_F16 : -1;
}

int32_t operand_dtype_of(int dtype) {
  return dtype == kInt8    ? KBN_I8
         : dtype == kInt32 ? kbn_adapter::kInt32
         : dtype == kBool  ? kbn_adapter::kBool
         : dtype == kUint8 ? kbn_adapter::kUint8
                           : kbn_dtype_of(dtype);
}

constexpr int kMaxRank = 32;

// An input of an op, as long as its kernel runs.
struct Input {
  TensorOwner tensor;
  int64_t sizes[kMaxRank];
  kbn_adapter::Operand operand;

  void read(TF_OpKernelContext* context, int i, TF_Status* status) {
    TF_Tensor* found = nullptr;
    TF_GetInput(context, i, &found, status);
    if (TF_GetCode(status)) return;
    tensor.reset(found);
    const int rank = TF_NumDims(found);
    if (rank > kMaxRank) return TF_SetStatus(status, kInvalidArgument, "an operand has too many axes");
    for (int axis = 0; axis < rank; ++axis) sizes[axis] = TF_Dim(found, axis);
    operand = {{sizes, rank}, operand_dtype_of(TF_TensorType(found)), TF_TensorData(found)};
  }
};

void read_inputs(Input* inputs, int count, TF_OpKernelContext* context, TF_Status* status) {
  for (int i = 0; i < count && !TF_GetCode(status); ++i) inputs[i].read(context, i, status);
}

// An output of an op: of the dtype and rank of an input, and these sizes.
TensorOwner allocate_like(const Input& input, const int64_t* sizes, TF_OpKernelContext* context,
                          TF_Status* status, int output = 0) {
  const int type = TF_TensorType(input.tensor.get()), rank = static_cast<int>(input.operand.shape.rank);
  size_t bytes = TF_DataTypeSize(type);
  for (int axis = 0; axis < rank; ++axis) bytes *= static_cast<size_t>(sizes[axis]);
  return TensorOwner(TF_AllocateOutput(context, output, type, sizes, rank, bytes, status));
}

void multiply(const Attributes& given, TF_OpKernelContext* context, TF_Status* status) {
  Attributes attributes = given;
  const int inputs = TF_NumInputs(context), weights = weights_of(inputs);
  if (weights > KBN_MAX_JOINT) return TF_SetStatus(status, kInvalidArgument, "too many weights");
  Input in[3 * KBN_MAX_JOINT + 3];
  read_inputs(in, inputs, context, status);
  if (TF_GetCode(status)) return;
  const kbn_adapter::Operand &x = in[0].operand, &x_scale = in[inputs - 2].operand,
                             &gain = in[inputs - 1].operand;
  kbn_adapter::Matmul matmuls[KBN_MAX_JOINT];
  TensorOwner results[KBN_MAX_JOINT];
  kbn_joint problem{weights, {}};
  for (int i = 0; i < weights; ++i) {
    const kbn_adapter::Operand &tiles = in[1 + i].operand, &scale = in[1 + weights + i].operand,
                               &bias = in[1 + 2 * weights + i].operand;
    kbn_adapter::Matmul& matmul = matmuls[i];
    attributes.out_features = bias.shape.rank == 1 ? bias.shape[0] : 0;
    const char* wrong = kbn_adapter::describe(attributes, x.shape, tiles.shape, scale.shape, bias.shape,
                                              x_scale.shape, gain.shape, &matmul);
    if (wrong) return TF_SetStatus(status, kInvalidArgument, wrong);
    matmul.dtype = x.dtype;
    int64_t sizes[kMaxRank];
    matmul.shape_of_y(x.shape, sizes);
    results[i] = allocate_like(in[0], sizes, context, status, i);
    if (TF_GetCode(status)) return;
    matmul.x = x.data;
    matmul.tiles = static_cast<const uint8_t*>(tiles.data);
    matmul.scale = static_cast<const float*>(scale.data);
    matmul.bias = static_cast<const float*>(bias.data);
    if (x_scale.shape[0]) matmul.x_scale = static_cast<const float*>(x_scale.data);
    if (gain.shape[0]) matmul.gain = static_cast<const float*>(gain.data);
    matmul.y = TF_TensorData(results[i].get());
    problem.matmuls[i] = &matmul;
  }
  const char* wrong = kbn_run_limited(&problem, max_threads.load(std::memory_order_relaxed));
  if (wrong) TF_SetStatus(status, kInternal, wrong);
}

// ---- attention ----

constexpr int kOperands = kbn_adapter::kAttentionOperands, kCaches = 4;

// y is like the first operand, the caches that come out are those that came in.
template <int kCache>
void infer_cached_shapes(TF_ShapeInferenceContext* context, TF_Status* status) {
  for (int i = 0; i <= kCaches; ++i) {
    ShapeOwner shape(TF_NewShapeHandle());
    const int input = i ? kCache + i - 1 : 0;
    TF_ShapeInferenceContextGetInput(context, input, shape.get(), status);
    if (TF_GetCode(status)) return;
    TF_ShapeInferenceContextSetOutput(context, i, shape.get(), status);
    if (TF_GetCode(status)) return;
  }
}

// A kernel whose one attribute is a number of this name.
constexpr char kScale[] = "scale", kEpsilon[] = "epsilon";

template <const char* name>
void read_number(TF_OpKernelConstruction* context, double* number, TF_Status* status) {
  read(context, name, number, status);
}

// The operands of an op that writes into caches, and its outputs: y, like the first, and the caches that
// came in, handed out as TensorFlow's InplaceUpdate does.
template <int kCount, int kCache>
struct Cached {
  Input in[kCount];
  kbn_adapter::Operand operands[kCount];
  TensorOwner y;

  Cached(TF_OpKernelContext* context, TF_Status* status) {
    read_inputs(in, kCount, context, status);
    for (int i = 0; i < kCount && !TF_GetCode(status); ++i) operands[i] = in[i].operand;
  }
  void* allocate(TF_OpKernelContext* context, TF_Status* status) {
    y = allocate_like(in[0], in[0].sizes, context, status);
    for (int i = 0; i < kCaches && !TF_GetCode(status); ++i)
      TF_SetOutput(context, 1 + i, in[kCache + i].tensor.get(), status);
    return TF_GetCode(status) ? nullptr : TF_TensorData(y.get());
  }
};

void attend(const double& scale, TF_OpKernelContext* context, TF_Status* status) {
  Cached<kOperands, kbn_adapter::kKeyCache> cached(context, status);
  if (TF_GetCode(status)) return;
  kbn_attention problem;
  const char* wrong = kbn_adapter::describe(cached.operands, scale, &problem);
  if (wrong) return TF_SetStatus(status, kInvalidArgument, wrong);
  problem.y = cached.allocate(context, status);
  if (TF_GetCode(status)) return;
  wrong = kbn_attend_limited(&problem, max_threads.load(std::memory_order_relaxed));
  if (wrong) TF_SetStatus(status, kInternal, wrong);
}

// Returns the name of a function that is missing, or null.
const char* resolve() {
  void* library = kbn_symbols::loaded("libtensorflow_framework.");
  if (!library) return "libtensorflow_framework";
#define X(result, name, arguments)                                     \
  name = reinterpret_cast<result(*) arguments>(dlsym(library, #name)); \
  if (!name) return #name;
  KBN_TF_FUNCTIONS(X)
#undef X
  return nullptr;
}

// ---- norm ----

void infer_norm_shape(TF_ShapeInferenceContext* context, TF_Status* status) {
  ShapeOwner shape(TF_NewShapeHandle());
  TF_ShapeInferenceContextGetInput(context, 0, shape.get(), status);
  if (!TF_GetCode(status)) TF_ShapeInferenceContextSetOutput(context, 0, shape.get(), status);
}

void normalize(const double& epsilon, TF_OpKernelContext* context, TF_Status* status) {
  Input in[2];
  read_inputs(in, 2, context, status);
  if (TF_GetCode(status)) return;
  kbn_norm problem;
  const char* wrong = kbn_adapter::describe(in[0].operand, in[1].operand, epsilon, &problem);
  if (wrong) return TF_SetStatus(status, kInvalidArgument, wrong);
  TensorOwner y = allocate_like(in[0], in[0].sizes, context, status);
  if (TF_GetCode(status)) return;
  problem.y = TF_TensorData(y.get());
  wrong = kbn_normalize_limited(&problem, max_threads.load(std::memory_order_relaxed));
  if (wrong) TF_SetStatus(status, kInternal, wrong);
}

// ---- block of a decoder ----

void read_block(TF_OpKernelConstruction* context, kbn_adapter::BlockAttributes* attributes,
                TF_Status* status) {
  read_shared(context, attributes, status);
  read(context, "heads", &attributes->heads, status);
  read(context, "intermediate", &attributes->intermediate, status);
  read(context, "activation", &attributes->activation, status);
  read(context, "scale", &attributes->scale, status);
}

void decode(const kbn_adapter::BlockAttributes& attributes, TF_OpKernelContext* context,
            TF_Status* status) {
  constexpr int kChain = kbn_adapter::kBlockOperands;  // the number of a chain is the last operand
  Cached<kChain + 1, kbn_adapter::kBlockCache> cached(context, status);
  if (TF_GetCode(status)) return;
  void* y = cached.allocate(context, status);
  if (TF_GetCode(status)) return;
  const auto run = [](const kbn_block& block) {
    return kbn_decode_limited(&block, max_threads.load(std::memory_order_relaxed));
  };
  const char* wrong = kbn_adapter::decode(attributes, cached.operands, cached.operands[kChain], y, run);
  if (wrong) TF_SetStatus(status, kInvalidArgument, wrong);
}

// An op as its definition and its kernel on the CPU.
struct Op {
  const char* name;
  const char* kernel;
  std::vector<std::string> attributes, inputs, outputs;
  bool stateful;
  ShapeFunction infer_shapes;
  Create create;
  Compute compute;
  Delete destroy;
};

template <bool kConvolves>
Op matmul_op(const char* name, const char* kernel, ShapeFunction infer_shapes,
             const char* more_attributes = nullptr) {
  Op op{name, kernel,
        {"T: {float, bfloat16, half}", "bits: int", "trits: int", "group_size: int",
         "activation_bits: int", "per_tensor: int", "offset: float", "epsilon: float",
         "norm_epsilon: float"},
        {"x: T", "tiles: uint8", "scale: float", "bias: float", "x_scale: float", "gain: float"},
        {"y: T"}, false, infer_shapes, create<Attributes, read_all<kConvolves>>,
        compute<Attributes, multiply>, destroy<Attributes>};
  if (more_attributes) op.attributes.push_back(more_attributes);
  return op;
}

Op joint_op() {
  Op op = matmul_op<false>(kJointOp, "KerasBitnetJointMatmulCPU", infer_shape, "N: int >= 1");
  op.inputs = {"x: T", "tiles: N * uint8", "scale: N * float", "bias: N * float", "x_scale: float",
               "gain: float"};
  op.outputs = {"y: N * T"};
  return op;
}

Op attention_op() {
  return {kAttentionOp, "KerasBitnetAttendNextCPU",
          {"T: {float, bfloat16, half}", "C: {float, bfloat16, half, int8}", "scale: float"},
          {"query: T", "key: T", "value: T", "cosines: float", "sines: float", "mask: bool",
           "index: int32", "key_cache: C", "value_cache: C", "key_scale: float", "value_scale: float"},
          {"y: T", "new_key_cache: C", "new_value_cache: C", "new_key_scale: float",
           "new_value_scale: float"},
          true, infer_cached_shapes<kbn_adapter::kKeyCache>, create<double, read_number<kScale>>,
          compute<double, attend>, destroy<double>};
}

// Takes an attention after its queries, keys and values.
Op block_op() {
  using kbn_adapter::BlockAttributes;
  Op op = attention_op();
  const std::vector<std::string> of_attention(op.inputs.begin() + 3, op.inputs.end());
  op.name = kBlockOp, op.kernel = "KerasBitnetDecodeBlockCPU";
  for (const char* text : {"heads: int", "intermediate: int", "activation: int", "bits: int", "trits: int",
                           "group_size: int", "activation_bits: int", "offset: float", "epsilon: float",
                           "norm_epsilon: float"})
    op.attributes.push_back(text);
  op.inputs = {"x: T"};
  for (const std::string weight : {"query", "key", "value", "output", "up", "down", "gate"})
    for (const std::string part : {"tiles", "scale", "bias"})
      op.inputs.push_back(part + "_" + weight + (part == "tiles" ? ": uint8" : ": float"));
  for (const std::string norm : {"query", "output", "up", "down"})
    op.inputs.push_back("gain_" + norm + ": float");
  op.inputs.insert(op.inputs.end(), of_attention.begin(), of_attention.end());
  op.inputs.push_back("chain: int32");
  op.infer_shapes = infer_cached_shapes<kbn_adapter::kBlockCache>;
  op.create = create<BlockAttributes, read_block>;
  op.compute = compute<BlockAttributes, decode>;
  op.destroy = destroy<BlockAttributes>;
  return op;
}

const Op kOps[] = {
    matmul_op<false>(kOp, "KerasBitnetMatmulCPU", infer_shape),
    joint_op(),
    matmul_op<true>(kConvOp, "KerasBitnetConvCPU", infer_no_shape, "window: list(int)"),
    attention_op(),
    {kNormOp, "KerasBitnetRmsNormCPU", {"T: {float, bfloat16, half}", "epsilon: float"},
     {"x: T", "scale: float"}, {"y: T"}, false, infer_norm_shape,
     create<double, read_number<kEpsilon>>, compute<double, normalize>, destroy<double>},
    block_op(),
};

std::string register_op(const Op& op) {
  Status status(TF_NewStatus());
  TF_OpDefinitionBuilder* definition = TF_NewOpDefinitionBuilder(op.name);
  for (const std::string& text : op.attributes) TF_OpDefinitionBuilderAddAttr(definition, text.c_str());
  for (const std::string& text : op.inputs) TF_OpDefinitionBuilderAddInput(definition, text.c_str());
  for (const std::string& text : op.outputs) TF_OpDefinitionBuilderAddOutput(definition, text.c_str());
  TF_OpDefinitionBuilderSetIsStateful(definition, op.stateful);
  TF_OpDefinitionBuilderSetShapeInferenceFunction(definition, op.infer_shapes);
  TF_RegisterOpDefinition(definition, status.get());
  if (TF_GetCode(status.get())) return TF_Message(status.get());
  TF_KernelBuilder* kernel =
      TF_NewKernelBuilder(op.name, "CPU", op.create, op.compute, op.destroy);
  TF_RegisterKernelBuilder(op.kernel, kernel, status.get());
  return TF_GetCode(status.get()) ? TF_Message(status.get()) : "";
}

std::string register_ops() {
  if (const char* missing = resolve()) return std::string("TensorFlow lacks ") + missing;
  for (const Op& op : kOps) {
    const std::string wrong = register_op(op);
    if (!wrong.empty()) return wrong;
  }
  return "";
}

// TensorFlow collects the ops that a library registers while it is being loaded; it offers
// kernel libraries no other entry point here.
const std::string registration_error = register_ops();

}  // namespace

// Why the ops could not be registered when this library was loaded; empty where it was.
KBN_API const char* kbn_tensorflow_error(void) { return registration_error.c_str(); }

// Threads that one op may use, the calling one included; 0: as many as the library's pool has.
KBN_API void kbn_tensorflow_set_threads(int count) { max_threads = count; }
