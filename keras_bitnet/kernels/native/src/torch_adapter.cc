// The packed matmul as an operator of PyTorch's dispatcher, through the stable C functions of
// libtorch (complete from 2.8), found at run time: one binary for every version of PyTorch.
// Where they are missing, kernels/torch.py defines the same operator over ctypes.
#if !defined(_WIN32)
#include <pthread.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <strings.h>

#include <atomic>
#include <stdexcept>
#include <string>

#include "adapter.h"
#include "symbols.h"

namespace {

using kbn_adapter::Shape;
using Handle = void*;      // a tensor or a library
using Slot = uint64_t;     // one value on the dispatcher's stack, bits of an int, double or Handle

// The functions that are needed: X(result, name, arguments).
#define KBN_TORCH_FUNCTIONS(X)                                                                 \
  X(int32_t, aoti_torch_library_init_fragment, (const char*, const char*, uint32_t, Handle*))  \
  X(int32_t, aoti_torch_library_init_impl,                                                     \
    (const char*, const char*, const char*, uint32_t, Handle*))                                \
  X(int32_t, aoti_torch_library_def, (Handle, const char*))                                    \
  X(int32_t, aoti_torch_library_impl, (Handle, const char*, void (*)(Slot*, uint64_t, uint64_t))) \
  X(int32_t, aoti_torch_get_data_ptr, (Handle, void**))                                        \
  X(int32_t, aoti_torch_get_dim, (Handle, int64_t*))                                           \
  X(int32_t, aoti_torch_get_sizes, (Handle, int64_t**))                                        \
  X(int32_t, aoti_torch_get_dtype, (Handle, int32_t*))                                         \
  X(int32_t, aoti_torch_is_contiguous, (Handle, bool*))                                        \
  X(int32_t, aoti_torch_empty_strided,                                                         \
    (int64_t, const int64_t*, const int64_t*, int32_t, int32_t, int32_t, Handle*))             \
  X(int32_t, aoti_torch_delete_tensor_object, (Handle))                                        \
  X(int32_t, aoti_torch_dtype_uint8, (void))                                                   \
  X(int32_t, aoti_torch_dtype_int8, (void))                                                    \
  X(int32_t, aoti_torch_dtype_int32, (void))                                                   \
  X(int32_t, aoti_torch_dtype_bool, (void))                                                    \
  X(int32_t, aoti_torch_dtype_float32, (void))                                                 \
  X(int32_t, aoti_torch_dtype_bfloat16, (void))                                                \
  X(int32_t, aoti_torch_dtype_float16, (void))

#define X(result, name, arguments) result(*name) arguments;
KBN_TORCH_FUNCTIONS(X)
#undef X
int (*get_num_threads)();
void (*openmp_parallel)(void (*)(void*), void*, unsigned, unsigned);
std::atomic<bool> forked{false};  // a child process has none of the threads of OpenMP

// Of a product with one weight, or of a joint product with several.
#define KBN_WEIGHT(i) "Tensor tiles" i ", Tensor scale" i ", Tensor bias" i ", "
#define KBN_OUT(i) "int out_features" i ", "
#define KBN_OPERANDS(weights, outs)                                                           \
  "(Tensor x, " weights "Tensor x_scale, Tensor gain, " outs "int bits, int trits, "          \
  "int group_size, int activation_bits, bool per_tensor, float offset, float epsilon, "       \
  "float norm_epsilon"
constexpr char kSchema[] = "bit_matmul" KBN_OPERANDS(KBN_WEIGHT(""), KBN_OUT("")) ") -> Tensor";
constexpr char kSchema2[] = "bit_matmul_2" KBN_OPERANDS(
    KBN_WEIGHT("_0") KBN_WEIGHT("_1"), KBN_OUT("_0") KBN_OUT("_1")) ") -> (Tensor, Tensor)";
constexpr char kSchema3[] = "bit_matmul_3" KBN_OPERANDS(
    KBN_WEIGHT("_0") KBN_WEIGHT("_1") KBN_WEIGHT("_2"), KBN_OUT("_0") KBN_OUT("_1") KBN_OUT("_2"))
    ") -> (Tensor, Tensor, Tensor)";
constexpr char kConvSchema[] =
    "bit_conv" KBN_OPERANDS(KBN_WEIGHT(""), KBN_OUT("")) ", int axes, int padding, int size_0, "
    "int size_1, int size_2, int stride_0, int stride_1, int stride_2, int dilation_0, "
    "int dilation_1, int dilation_2) -> Tensor";
constexpr char kAttentionSchema[] =
    "attend_next(Tensor query, Tensor key, Tensor value, Tensor cosines, Tensor sines, Tensor mask, "
    "Tensor index, Tensor(a!) key_cache, Tensor(b!) value_cache, Tensor(c!) key_scale, "
    "Tensor(d!) value_scale, float scale) -> Tensor";
constexpr char kBlockSchema[] =
    "decode_block(Tensor x, " KBN_WEIGHT("_query") KBN_WEIGHT("_key") KBN_WEIGHT("_value")
    KBN_WEIGHT("_output") KBN_WEIGHT("_up") KBN_WEIGHT("_down") KBN_WEIGHT("_gate")
    "Tensor gain_query, Tensor gain_output, Tensor gain_up, Tensor gain_down, Tensor cosines, "
    "Tensor sines, Tensor mask, Tensor index, Tensor(a!) key_cache, Tensor(b!) value_cache, "
    "Tensor(c!) key_scale, Tensor(d!) value_scale, Tensor chain, int heads, int intermediate, "
    "int activation, int bits, int trits, int group_size, int activation_bits, float offset, float epsilon, "
    "float norm_epsilon, float scale) -> Tensor";
constexpr char kNormSchema[] = "rms_norm(Tensor x, Tensor scale, float epsilon) -> Tensor";
constexpr int64_t kMaxRank = 32;

// A tensor of the stack; the kernel owns it.
struct Tensor {
  Handle handle = nullptr;
  void* data = nullptr;
  int64_t rank = 0;
  int64_t* dims = nullptr;
  int32_t dtype = -1;
  bool contiguous = false;

  bool read() {
    return !aoti_torch_get_data_ptr(handle, &data) && !aoti_torch_get_dim(handle, &rank) &&
           !aoti_torch_get_sizes(handle, &dims) && !aoti_torch_get_dtype(handle, &dtype) &&
           !aoti_torch_is_contiguous(handle, &contiguous);
  }
  Shape shape() const { return {dims, rank}; }
  ~Tensor() {
    if (handle) aoti_torch_delete_tensor_object(handle);
  }
};

Handle tensor_of(Slot slot) { return reinterpret_cast<Handle>(static_cast<uintptr_t>(slot)); }

double float_of(Slot slot) {
  double value;
  memcpy(&value, &slot, sizeof value);
  return value;
}

int32_t kbn_dtype_of(int32_t dtype) {
  return dtype == aoti_torch_dtype_float32()    ? KBN_F32
         : dtype == aoti_torch_dtype_bfloat16() ? KBN_BF16
         : dtype == aoti_torch_dtype_float16()  ? KBN_F16
                                                : -1;
}

int32_t operand_dtype_of(int32_t dtype) {
  return dtype == aoti_torch_dtype_int8()    ? KBN_I8
         : dtype == aoti_torch_dtype_int32() ? kbn_adapter::kInt32
         : dtype == aoti_torch_dtype_bool()  ? kbn_adapter::kBool
         : dtype == aoti_torch_dtype_uint8() ? kbn_adapter::kUint8
                                             : kbn_dtype_of(dtype);
}

kbn_adapter::Operand operand_of(const Tensor& tensor) {
  return {tensor.shape(), operand_dtype_of(tensor.dtype), tensor.data};
}

const char* read_all(Tensor* tensors, int count) {
  for (int i = 0; i < count; ++i) {
    if (!tensors[i].read()) return "an operand cannot be read";
    if (!tensors[i].contiguous) return "the operands must be contiguous";
  }
  return nullptr;
}

// Allocates y like x with these sizes, as many as x has.
bool allocate(const Tensor& x, const int64_t* sizes, Tensor* y) {
  int64_t strides[kMaxRank], stride = 1;
  for (int64_t i = x.rank - 1; i >= 0; --i) {
    strides[i] = stride;
    stride *= sizes[i] > 0 ? sizes[i] : 1;
  }
  const int32_t cpu = 0;
  return !aoti_torch_empty_strided(x.rank, sizes, strides, x.dtype, cpu, 0, &y->handle) &&
         !aoti_torch_get_data_ptr(y->handle, &y->data);
}

// The threads of PyTorch's own operators: after each they wait for the next in a loop, for so long
// that threads beside them would share their cores.
void run_on_team(void* threads, int64_t count, void (*task)(void*, int64_t), void* argument) {
  kbn_adapter::Loop loop{{0}, count, task, argument};
  openmp_parallel([](void* loop) { static_cast<kbn_adapter::Loop*>(loop)->work(); }, &loop,
                  static_cast<unsigned>(*static_cast<int32_t*>(threads)), 0);
}

template <typename Problem>
const char* run(const Problem& problem, const char* (*otherwise)(const Problem*, int32_t)) {
  int32_t threads = get_num_threads ? get_num_threads() : 0;
  if (!openmp_parallel || threads < 1 || forked) return otherwise(&problem, threads);
  kbn_parallel team{run_on_team, &threads, threads};
  return kbn_adapter::run(problem, &team);
}

// Tensors of an operator of so many weights: x, three for each weight, x_scale and gain.
constexpr int tensors_of(int weights) { return 3 * weights + 3; }

template <int kWeights, bool kConvolves>
const char* compute(Slot* stack, Tensor* tensors, Tensor* y) {
  constexpr int kTensors = tensors_of(kWeights);
  const Tensor &x = tensors[0], &x_scale = tensors[kTensors - 2], &gain = tensors[kTensors - 1];
  if (const char* wrong = read_all(tensors, kTensors)) return wrong;
  const Slot *outs = stack + kTensors, *others = outs + kWeights;
  kbn_adapter::Attributes attributes;
  int64_t* integers[] = {&attributes.bits, &attributes.trits, &attributes.group_size,
                         &attributes.activation_bits, &attributes.per_tensor};
  for (int i = 0; i < 5; ++i) *integers[i] = static_cast<int64_t>(others[i]);
  attributes.per_tensor &= 1;  // of a bool only the lowest byte is defined
  attributes.offset = float_of(others[5]);
  attributes.epsilon = float_of(others[6]);
  attributes.norm_epsilon = float_of(others[7]);
  if (kConvolves) memcpy(&attributes.window, others + 8, sizeof attributes.window);
  if (x.rank > kMaxRank) return "x has too many axes";
  kbn_adapter::Matmul matmuls[kWeights];
  kbn_joint problem{kWeights, {}};
  for (int i = 0; i < kWeights; ++i) {
    const Tensor *weight = tensors + 1 + 3 * i, &tiles = weight[0], &scale = weight[1], &bias = weight[2];
    kbn_adapter::Matmul& matmul = matmuls[i];
    attributes.out_features = static_cast<int64_t>(outs[i]);
    const char* wrong = kbn_adapter::describe(attributes, x.shape(), tiles.shape(), scale.shape(),
                                              bias.shape(), x_scale.shape(), gain.shape(), &matmul);
    if (wrong) return wrong;
    matmul.dtype = kbn_dtype_of(x.dtype);
    if (matmul.dtype < 0 || tiles.dtype != aoti_torch_dtype_uint8() ||
        scale.dtype != aoti_torch_dtype_float32() || bias.dtype != scale.dtype ||
        x_scale.dtype != scale.dtype || gain.dtype != scale.dtype)
      return "wrong dtype of an operand";
    int64_t sizes[kMaxRank];
    matmul.shape_of_y(x.shape(), sizes);
    if (!allocate(x, sizes, y + i)) return "no memory for the result";
    matmul.x = x.data;
    matmul.tiles = static_cast<const uint8_t*>(tiles.data);
    matmul.scale = static_cast<const float*>(scale.data);
    matmul.bias = bias.dims[0] ? static_cast<const float*>(bias.data) : nullptr;
    matmul.x_scale = x_scale.dims[0] ? static_cast<const float*>(x_scale.data) : nullptr;
    matmul.gain = gain.dims[0] ? static_cast<const float*>(gain.data) : nullptr;
    matmul.y = y[i].data;
    problem.matmuls[i] = &matmul;
  }
  return run<kbn_joint>(problem, kbn_run_limited);
}

const char* attend(Slot* stack, Tensor* tensors, Tensor* y) {
  constexpr int kCount = kbn_adapter::kAttentionOperands;
  if (const char* wrong = read_all(tensors, kCount)) return wrong;
  kbn_adapter::Operand operands[kCount];
  for (int i = 0; i < kCount; ++i) operands[i] = operand_of(tensors[i]);
  kbn_attention problem;
  const char* wrong = kbn_adapter::describe(operands, float_of(stack[kCount]), &problem);
  if (wrong) return wrong;
  if (!allocate(tensors[0], tensors[0].dims, y)) return "no memory for the result";
  problem.y = y->data;
  return run(problem, kbn_attend_limited);
}

const char* decode(Slot* stack, Tensor* tensors, Tensor* y) {
  constexpr int kCount = kbn_adapter::kBlockOperands + 1;  // the number of a chain is the last
  if (const char* wrong = read_all(tensors, kCount)) return wrong;
  kbn_adapter::Operand operands[kCount];
  for (int i = 0; i < kCount; ++i) operands[i] = operand_of(tensors[i]);
  kbn_adapter::BlockAttributes attributes;
  int64_t* integers[] = {&attributes.heads, &attributes.intermediate, &attributes.activation,
                         &attributes.bits, &attributes.trits, &attributes.group_size,
                         &attributes.activation_bits};
  double* floats[] = {&attributes.offset, &attributes.epsilon, &attributes.norm_epsilon, &attributes.scale};
  for (int i = 0; i < 7; ++i) *integers[i] = static_cast<int64_t>(stack[kCount + i]);
  for (int i = 0; i < 4; ++i) *floats[i] = float_of(stack[kCount + 7 + i]);
  if (!allocate(tensors[0], tensors[0].dims, y)) return "no memory for the result";
  return kbn_adapter::decode(attributes, operands, operands[kCount - 1], y->data, [](const kbn_block& block) {
    return run(block, kbn_decode_limited);
  });
}

const char* normalize(Slot* stack, Tensor* tensors, Tensor* y) {
  if (const char* wrong = read_all(tensors, 2)) return wrong;
  kbn_norm problem;
  const char* wrong = kbn_adapter::describe(operand_of(tensors[0]), operand_of(tensors[1]),
                                            float_of(stack[2]), &problem);
  if (wrong) return wrong;
  if (tensors[0].rank > kMaxRank) return "x has too many axes";
  if (!allocate(tensors[0], tensors[0].dims, y)) return "no memory for the result";
  problem.y = y->data;
  return run(problem, kbn_normalize_limited);
}

// One operator: `run(stack, tensors, y)` says what is wrong. Errors leave as an exception, the way in
// which PyTorch's own stable headers report them.
template <int kCount, int kResults, const char* (*run)(Slot*, Tensor*, Tensor*)>
void kernel(Slot* stack, uint64_t, uint64_t) {
  Tensor tensors[kCount], y[kResults];
  for (int i = 0; i < kCount; ++i) tensors[i].handle = tensor_of(stack[i]);
  if (const char* wrong = run(stack, tensors, y))
    throw std::runtime_error(std::string("keras_bitnet: ") + wrong);
  for (int i = 0; i < kResults; ++i) {
    stack[i] = static_cast<Slot>(reinterpret_cast<uintptr_t>(y[i].handle));
    y[i].handle = nullptr;  // the stack owns it now
  }
}

template <int kWeights, bool kConvolves = false>
constexpr auto matmul_kernel = kernel<tensors_of(kWeights), kWeights, compute<kWeights, kConvolves>>;

bool resolve() {
  void* library = kbn_symbols::loaded("libtorch_cpu.");
  if (!library) return false;
#define X(result, name, arguments)                                           \
  name = reinterpret_cast<result(*) arguments>(dlsym(library, #name)); \
  if (!name) return false;
  KBN_TORCH_FUNCTIONS(X)
#undef X
  // at::get_num_threads(); its C name exists from PyTorch 2.10 only.
  get_num_threads = reinterpret_cast<int (*)()>(dlsym(library, "_ZN2at15get_num_threadsEv"));
  // Of the OpenMP library that libtorch was linked with. Its threads sleep where they are told to wait
  // passively: then they are in nobody's way, and slow to start.
  const char* policy = getenv("OMP_WAIT_POLICY");
  if (!policy || strcasecmp(policy, "passive") != 0) {
    openmp_parallel = reinterpret_cast<decltype(openmp_parallel)>(dlsym(library, "GOMP_parallel"));
    pthread_atfork(nullptr, nullptr, [] { forked = true; });
  }
  return true;
}

bool register_operator() {
  Handle definition, implementation;
  return resolve() &&
         !aoti_torch_library_init_fragment("keras_bitnet", "torch_adapter.cc", __LINE__, &definition) &&
         !aoti_torch_library_def(definition, kSchema) &&
         !aoti_torch_library_def(definition, kSchema2) &&
         !aoti_torch_library_def(definition, kSchema3) &&
         !aoti_torch_library_def(definition, kConvSchema) &&
         !aoti_torch_library_def(definition, kAttentionSchema) &&
         !aoti_torch_library_def(definition, kNormSchema) &&
         !aoti_torch_library_def(definition, kBlockSchema) &&
         !aoti_torch_library_init_impl("keras_bitnet", "CPU", "torch_adapter.cc", __LINE__,
                                       &implementation) &&
         !aoti_torch_library_impl(implementation, "bit_matmul", matmul_kernel<1>) &&
         !aoti_torch_library_impl(implementation, "bit_matmul_2", matmul_kernel<2>) &&
         !aoti_torch_library_impl(implementation, "bit_matmul_3", matmul_kernel<3>) &&
         !aoti_torch_library_impl(implementation, "bit_conv", matmul_kernel<1, true>) &&
         !aoti_torch_library_impl(implementation, "attend_next",
                                  kernel<kbn_adapter::kAttentionOperands, 1, attend>) &&
         !aoti_torch_library_impl(implementation, "rms_norm", kernel<2, 1, normalize>) &&
         !aoti_torch_library_impl(implementation, "decode_block",
                                  kernel<kbn_adapter::kBlockOperands + 1, 1, decode>);
}

}  // namespace

// Defines `keras_bitnet::bit_matmul` and those beside it. Returns 0, or 1: this PyTorch lacks the stable
// functions.
KBN_API int kbn_torch_register(void) {
  static const bool registered = register_operator();
  return registered ? 0 : 1;
}
#endif
