// Chooses, sizes and launches the kernels of bitnet.cu through the CUDA driver, found at run time.
#include "shim.h"

#include <dlfcn.h>
#include <stdio.h>
#include <string.h>

#include <map>
#include <mutex>
#include <string>

#include "driver.h"
#include "params.h"

namespace {

thread_local std::string message;

const char* fail(const std::string& text) {
  message = text;
  return message.c_str();
}

const char* fail(const char* what, int code) {
  const char* name = nullptr;
  cuda::cuGetErrorName(code, &name);
  return fail(std::string(what) + ": " + (name ? name : "CUDA error ") + " (" + std::to_string(code) + ")");
}

// ---- devices ---------------------------------------------------------------------------------

constexpr int kMaxDevices = 64;

struct Device {
  int handle = 0, capability = 0, multiprocessors = 0;
  int shared_memory = 0;        // a block's, at most
  int shared_memory_total = 0;  // a multiprocessor's
  cuda::Context context = nullptr;
  cuda::Library libraries[5] = {};
  std::map<std::string, cuda::Kernel> kernels[5];
};

std::mutex mutex;  // guards what follows
int device_count = 0;
Device devices[kMaxDevices];

int attribute(int handle, int which) {
  int value = 0;
  cuda::cuDeviceGetAttribute(&value, which, handle);
  return value;
}

const char* open_once() {
  static const std::string wrong = [] {
    std::string reason = cuda::open();
    if (!reason.empty()) return reason;
    if (int code = cuda::cuInit(0)) {
      const char* name = nullptr;
      cuda::cuGetErrorName(code, &name);
      return std::string("the CUDA driver does not start: ") + (name ? name : "unknown error");
    }
    cuda::cuDeviceGetCount(&device_count);
    if (device_count > kMaxDevices) device_count = kMaxDevices;
    for (int i = 0; i < device_count; ++i) {
      Device& d = devices[i];
      cuda::cuDeviceGet(&d.handle, i);
      d.capability = 10 * attribute(d.handle, cuda::kCapabilityMajor) +
                     attribute(d.handle, cuda::kCapabilityMinor);
      d.multiprocessors = attribute(d.handle, cuda::kMultiprocessors);
      d.shared_memory = attribute(d.handle, cuda::kSharedMemoryOptin);
      d.shared_memory_total = attribute(d.handle, cuda::kSharedMemoryTotal);
    }
    return std::string(device_count ? "" : "there is no CUDA device");
  }();
  return wrong.empty() ? nullptr : wrong.c_str();
}

int width(int64_t bits) { return bits == 1 ? 0 : bits == 2 ? 1 : bits == 4 ? 2 : bits == 8 ? 3 : -1; }

// Which library holds the kernels of a width, or of training (0); -1: none.
int library_of(int64_t bits) { return bits == 0 ? 4 : width(bits); }

// ---- the kernels -----------------------------------------------------------------------------

// One row of bitnet.cu that multiplies several rows of activations.
struct MatrixKernel {
  const char* name;
  int threads, rows, columns;  // of a block
  int stages, slices;          // in shared memory: stages of so many slices of the image
  bool grouped, wgmma;
};
constexpr MatrixKernel kMatrixKernels[] = {
    {"mma_8", 256, 8, 32, 4, 8, false, false},
    {"mma_16", 256, 16, 64, 4, 4, false, false},
    {"mma_32", 256, 32, 64, 3, 4, false, false},
    {"mma_64", 256, 64, 128, 3, 2, false, false},
    {"mma_grouped_8", 256, 8, 32, 4, 8, true, false},
    {"mma_grouped_32", 256, 32, 64, 3, 4, true, false},
    {"wgmma_16", 384, 16, 256, 16, 1, false, true},
    {"wgmma_32", 384, 32, 256, 16, 1, false, true},
    {"wgmma_64", 384, 64, 256, 8, 1, false, true},
    {"wgmma_128", 384, 128, 256, 10, 1, false, true},
};
enum { kMma8, kMma16, kMma32, kMma64, kGrouped8, kGrouped32, kWgmma16, kWgmma128 = 9, kCount };

constexpr int kSlice = 128;
constexpr int kQuantizeThreads = 256;
constexpr const char* kDtypes[] = {"f32", "bf16", "f16"};

// Groups that end within a block of four tiles: only the kernel of single rows can tell them apart.
bool row_by_row(const kbc_matmul& p) {
  return p.rows == 1 || (p.group_size && p.bits < 4 && p.group_size % (128 / p.bits));
}

int64_t blocks(const kbc_matmul& p, const MatrixKernel& k) {
  return (p.rows + k.rows - 1) / k.rows * ((p.out_features + k.columns - 1) / k.columns);
}

// The fastest on an H100, measured at 1 to 2048 rows and 2560 to 28672 outputs.
int choose(const kbc_matmul& p, const Device& device) {
  if (p.group_size) return p.rows <= 8 ? kGrouped8 : kGrouped32;
  const int64_t enough = device.multiprocessors * 3 / 4;
  if (device.capability == 90) {
    // The largest block that the rows fill and of which there are enough for the whole GPU.
    int row = kWgmma16;
    while (row < kWgmma128 && kMatrixKernels[row].rows < p.rows) ++row;
    while (row > kWgmma16 && blocks(p, kMatrixKernels[row]) < enough) --row;
    if (p.rows > 16 || (p.bits < 8 && blocks(p, kMatrixKernels[row]) >= enough)) return row;
  }
  if (p.rows <= 8 || (p.rows <= 16 && p.out_features <= 32 * device.multiprocessors)) return kMma8;
  return p.rows <= 16 ? kMma16 : p.rows <= 32 ? kMma32 : kMma64;
}

struct Launch {
  const char* name;
  unsigned grid_x, grid_y, threads, shared;
  bool overlap;  // may start while the kernel before ends (programmatic dependent launch)
};

// The kernel of that name, with leave to use `shared` bytes of shared memory.
const char* find(Device& device, int row, const std::string& name, unsigned shared,
                 cuda::Kernel* kernel) {
  std::lock_guard<std::mutex> lock(mutex);
  const std::string key = name + "/" + std::to_string(shared > 44 * 1024 ? shared : 0);
  auto found = device.kernels[row].find(key);
  if (found != device.kernels[row].end()) {
    *kernel = found->second;
    return nullptr;
  }
  if (!device.libraries[row]) return fail("the kernels of this width are not loaded on this device");
  if (int code = cuda::cuLibraryGetKernel(kernel, device.libraries[row], name.c_str()))
    return fail(name.c_str(), code);
  if (shared > 44 * 1024) {
    constexpr int kMaxDynamicSharedMemory = 8;
    const int most = device.shared_memory - 6144;  // what is static lies beside it
    if (static_cast<int>(shared) > most)
      return fail(name + " needs more shared memory than this GPU has");
    if (int code = cuda::cuKernelSetAttribute(kMaxDynamicSharedMemory, most, *kernel, device.handle))
      return fail(name.c_str(), code);
  }
  device.kernels[row][key] = *kernel;
  return nullptr;
}

template <class Params>
const char* launch(Device& device, int bits, const Launch& l, const Params& params, void* stream) {
  cuda::Kernel kernel = nullptr;
  if (const char* wrong = find(device, library_of(bits), l.name, l.shared, &kernel)) return wrong;
  cuda::LaunchAttribute overlap{cuda::kProgrammaticStreamSerialization, {}, {1}};
  cuda::LaunchConfig config{l.grid_x, l.grid_y, 1, l.threads, 1, 1, l.shared, stream, &overlap,
                            l.overlap && device.capability >= 90 ? 1u : 0u};
  void* arguments[] = {const_cast<Params*>(&params)};
  const int code = cuda::cuLaunchKernelEx(&config, kernel, arguments, nullptr);
  return code ? fail(l.name, code) : nullptr;
}

// ---- a product -------------------------------------------------------------------------------

int64_t round_up(int64_t value, int64_t unit) { return (value + unit - 1) / unit * unit; }

// Where things lie in the workspace.
struct Workspace {
  int64_t image = 0, row_scale = 0, row_sum = 0, largest = 0, bytes = 0;

  explicit Workspace(const kbc_matmul& p) {
    if (!row_by_row(p)) {
      row_scale = round_up(p.in_features, kSlice) * round_up(p.rows, 8);
      row_sum = row_scale + round_up(4 * p.rows, 256);
      bytes = largest = row_sum + round_up(4 * p.rows, 256);
    }
    if (p.per_tensor && p.rows > 1) bytes += 256;
  }
};

bool aligned(const void* pointer, int64_t bytes) {
  return reinterpret_cast<uintptr_t>(pointer) % bytes == 0;
}

Matmul parameters(const kbc_matmul& p) {
  const int64_t four = p.dtype == 0 ? 16 : 8;  // bytes of four elements
  const Workspace place(p);
  char* workspace = static_cast<char*>(p.workspace);
  const double highest = p.activation_bits == 8 ? 127 : 7;
  const int step = p.offset == static_cast<float>(static_cast<int>(p.offset)) ? 1 : 2;
  Matmul m{};
  m.x = p.x;
  m.tiles = p.tiles;
  m.scale = static_cast<const float*>(p.scale);
  m.x_scale = static_cast<const float*>(p.x_scale);
  m.bias = static_cast<const float*>(p.bias);
  m.y = p.y;
  if (p.per_tensor && p.rows > 1) m.largest = reinterpret_cast<unsigned*>(workspace + place.largest);
  m.image = reinterpret_cast<unsigned char*>(workspace + place.image);
  m.row_scale = reinterpret_cast<float*>(workspace + place.row_scale);
  m.row_sum = reinterpret_cast<int*>(workspace + place.row_sum);
  m.rows = static_cast<int>(p.rows);
  m.n = static_cast<int>(p.out_features);
  m.k = static_cast<int>(p.in_features);
  m.k_tiles = static_cast<int>((p.in_features * p.bits + 31) / 32);
  m.group_size = static_cast<int>(p.group_size ? p.group_size : p.in_features);
  m.scale_columns = p.scale_columns;
  m.dtype = p.dtype;
  m.x_aligned = p.in_features % 4 == 0 && aligned(p.x, four);
  m.y_aligned = p.out_features % 4 == 0 && aligned(p.y, four);
  m.weights_ready = p.weights == KBC_WEIGHTS_READY;
  m.step = step;
  m.step_offset = static_cast<int>(step * p.offset);
  m.epsilon = p.epsilon;
  m.highest = static_cast<float>(highest);
  m.inverse_highest = static_cast<float>(1 / highest);
  m.inverse_step = 1.0f / step;
  return m;
}

const char* check(const kbc_matmul& p) {
  if (width(p.bits) < 0) return "bits must be 1, 2, 4 or 8";
  if (p.dtype < 0 || p.dtype > 2) return "dtype must be 0, 1 or 2";
  if (p.activation_bits != 8 && p.activation_bits != 4) return "activation_bits must be 8 or 4";
  if (p.rows < 0 || p.in_features < 1 || p.out_features < 1 || p.group_size < 0)
    return "a size is out of range";
  if (p.rows > INT32_MAX / 8 || p.in_features > 98304 || p.out_features > 2000000)
    return "a size is too large";
  if (p.group_size % 32) return "group_size must be a multiple of 32";
  if (p.scale_columns != 1 && p.scale_columns != p.out_features)
    return "scale_columns must be 1 or out_features";
  if (!aligned(p.tiles, 16)) return "tiles must lie at a multiple of 16 bytes";
  if (Workspace(p).bytes && !aligned(p.workspace, 16))
    return "workspace must lie at a multiple of 16 bytes";
  return nullptr;
}

// One row of bitnet.cu that multiplies single rows of activations.
struct RowKernel {
  const char* name;
  int warps, stages, teams;
  int64_t most_tiles;  // of a row of tiles, for which it is the best
};
constexpr RowKernel kRowKernels[] = {
    {"gemv_4_", 4, 8, 1, 384}, {"gemv_8_", 8, 8, 1, 704}, {"gemv_16_", 16, 6, 1, INT64_MAX}};
constexpr RowKernel kGroupedRows = {"gemv_grouped_", 8, 6, 2, INT64_MAX};

// Single rows: quantized and multiplied by one kernel.
const char* run_rows(Device& device, const kbc_matmul& p, Matmul m, void* stream) {
  const RowKernel* k = p.group_size ? &kGroupedRows : kRowKernels;
  while (k->most_tiles < m.k_tiles) ++k;
  const unsigned shared = static_cast<unsigned>(k->stages * k->warps * 32 * 16 + round_up(m.k_tiles, 8) * 32 / p.bits);
  // Few blocks leave room for those of the next launch, which fetch weights while these compute;
  // with much to do it is better to have many. Measured on an H100.
  const int64_t rows_each = (m.n + 15) / 16 / device.multiprocessors;
  const int64_t resident = rows_each < 2 ? 1 : 16 / k->warps * (rows_each < 8 ? 1 : 2);
  const int64_t blocks = ((m.n + 15) / 16 + k->teams - 1) / k->teams, slots = device.multiprocessors * resident;
  const std::string kind = k->name;
  const std::string name = kind + kDtypes[p.dtype];
  constexpr int64_t kMostRows = 65535;
  const int64_t x_row = p.in_features * (p.dtype ? 2 : 4), y_row = p.out_features * (p.dtype ? 2 : 4);
  for (int64_t first = 0; first < p.rows; first += kMostRows) {
    const int64_t rows = p.rows - first < kMostRows ? p.rows - first : kMostRows;
    m.x = static_cast<const char*>(p.x) + first * x_row;
    m.y = static_cast<char*>(p.y) + first * y_row;
    const Launch l{name.c_str(), static_cast<unsigned>(blocks < slots ? blocks : slots),
                   static_cast<unsigned>(rows), static_cast<unsigned>(32 * k->warps), shared,
                   p.weights != KBC_WEIGHTS_SETTLE};
    if (const char* wrong = launch(device, p.bits, l, m, stream)) return wrong;
  }
  return nullptr;
}

// Several rows: quantized by one kernel, multiplied by the next.
const char* run_matrix(Device& device, const kbc_matmul& p, const Matmul& m, void* stream) {
  const std::string quantize = std::string("quantize_") + kDtypes[p.dtype];
  const Launch first{quantize.c_str(), static_cast<unsigned>(p.rows), 1, kQuantizeThreads, 0,
                     p.weights != KBC_WEIGHTS_SETTLE};
  if (const char* wrong = launch(device, p.bits, first, m, stream)) return wrong;
  if (p.kernel < 0 || p.kernel > kCount) return "kernel is out of range";
  const MatrixKernel& k = kMatrixKernels[p.kernel ? p.kernel - 1 : choose(p, device)];
  if (k.grouped != (p.group_size != 0)) return "this kernel is for other scales";
  if (k.wgmma && device.capability != 90) return "this kernel is for compute capability 9.0";
  const Launch second{k.name, static_cast<unsigned>((p.rows + k.rows - 1) / k.rows),
                      static_cast<unsigned>((p.out_features + k.columns - 1) / k.columns),
                      static_cast<unsigned>(k.threads),
                      static_cast<unsigned>(k.stages * k.slices * k.rows * kSlice), true};
  return launch(device, p.bits, second, m, stream);
}

const char* run_here(Device& device, const kbc_matmul& p, void* stream) {
  const Matmul m = parameters(p);
  if (m.largest) {
    if (int code = cuda::cuMemsetD32Async(reinterpret_cast<uintptr_t>(m.largest), 0, 1, stream))
      return fail("cuMemsetD32Async", code);
    const std::string name = std::string("largest_") + kDtypes[p.dtype];
    const Launch l{name.c_str(), static_cast<unsigned>(p.rows), 1, kQuantizeThreads, 0, false};
    if (const char* wrong = launch(device, p.bits, l, m, stream)) return wrong;
  }
  return row_by_row(p) ? run_rows(device, p, m, stream) : run_matrix(device, p, m, stream);
}

// ---- fake quantization ---------------------------------------------------------------------

const char* check(const kbc_fake& p) {
  if (p.dtype < 0 || p.dtype > 2) return "dtype must be 0, 1 or 2";
  if (p.rows < 0 || p.columns < 1 || p.group_size < 0) return "a size is out of range";
  if (p.columns > INT32_MAX / 8 || (!p.weight && p.rows > INT32_MAX)) return "a size is too large";
  if (p.scale_columns != 1 && p.scale_columns != p.columns) return "scale_columns must be 1 or columns";
  if (p.per_tensor && !aligned(p.workspace, 4)) return "workspace must lie at a multiple of 4 bytes";
  return nullptr;
}

Fake parameters(const kbc_fake& p) {
  Fake f{};
  f.x = p.x;
  f.x_scale = static_cast<const float*>(p.x_scale);
  f.scale = static_cast<const float*>(p.scale);
  f.strength = static_cast<const float*>(p.strength);
  f.y = p.y;
  if (p.per_tensor) f.largest = static_cast<unsigned*>(p.workspace);
  f.rows = p.rows;
  f.k = static_cast<int>(p.columns);
  f.group_size = static_cast<int>(p.group_size ? p.group_size : p.rows);
  f.scale_columns = p.scale_columns;
  f.dtype = p.dtype;
  f.x_aligned = p.columns % 4 == 0 && aligned(p.x, p.weight || p.dtype == 0 ? 16 : 8);
  f.y_aligned = p.columns % 4 == 0 && aligned(p.y, p.dtype == 0 ? 16 : 8);
  f.epsilon = p.epsilon;
  f.lowest = p.lowest;
  f.highest = p.highest;
  f.inverse_highest = static_cast<float>(1.0 / p.highest);
  f.half = p.half;
  f.binary = p.binary;
  return f;
}

const char* run_here(Device& device, const kbc_fake& p, void* stream) {
  const Fake f = parameters(p);
  if (p.weight) {
    constexpr int64_t kColumns = 4 * kQuantizeThreads, kRows = 8, kMostBlocks = 65535;
    const int64_t blocks = (p.rows + kRows - 1) / kRows;
    const Launch l{"fake_weight", static_cast<unsigned>((p.columns + kColumns - 1) / kColumns),
                   static_cast<unsigned>(blocks < kMostBlocks ? blocks : kMostBlocks), kQuantizeThreads, 0, false};
    return launch(device, 0, l, f, stream);
  }
  const std::string dtype = kDtypes[p.dtype], largest = "fake_largest_" + dtype, name = "fake_quantize_" + dtype;
  const unsigned rows = static_cast<unsigned>(p.rows);
  if (f.largest) {
    if (int code = cuda::cuMemsetD32Async(reinterpret_cast<uintptr_t>(f.largest), 0, 1, stream))
      return fail("cuMemsetD32Async", code);
    const Launch l{largest.c_str(), rows, 1, kQuantizeThreads, 0, false};
    if (const char* wrong = launch(device, 0, l, f, stream)) return wrong;
  }
  return launch(device, 0, Launch{name.c_str(), rows, 1, kQuantizeThreads, 0, false}, f, stream);
}

// The context of a device while this lives; the default stream belongs to the one on top.
struct Pushed {
  const char* wrong = nullptr;
  bool pushed = false;

  explicit Pushed(Device& device) {
    std::unique_lock<std::mutex> lock(mutex);
    if (!device.context)
      if (int code = cuda::cuDevicePrimaryCtxRetain(&device.context, device.handle)) {
        wrong = fail("cuDevicePrimaryCtxRetain", code);
        return;
      }
    lock.unlock();
    if (int code = cuda::cuCtxPushCurrent(device.context))
      wrong = fail("cuCtxPushCurrent", code);
    else
      pushed = true;
  }
  ~Pushed() {
    cuda::Context popped;
    if (pushed) cuda::cuCtxPopCurrent(&popped);
  }
};

}  // namespace

int kbc_abi_version(void) { return 2; }

const char* kbc_open(void) { return open_once(); }

int kbc_device_count(void) { return open_once() ? 0 : device_count; }

int kbc_capability(int device) {
  return device >= 0 && device < kbc_device_count() ? devices[device].capability : 0;
}

int kbc_loaded(int device, int bits) {
  if (!kbc_capability(device) || library_of(bits) < 0) return 0;
  std::lock_guard<std::mutex> lock(mutex);
  return devices[device].libraries[library_of(bits)] != nullptr;
}

const char* kbc_load(int device, int bits, const void* cubin) {
  if (const char* wrong = open_once()) return wrong;
  if (!kbc_capability(device) || library_of(bits) < 0) return fail("no such device or width");
  Pushed current(devices[device]);
  if (current.wrong) return current.wrong;
  std::lock_guard<std::mutex> lock(mutex);
  cuda::Library& library = devices[device].libraries[library_of(bits)];
  if (library) return nullptr;
  const int code = cuda::cuLibraryLoadData(&library, cubin, nullptr, nullptr, 0, nullptr, nullptr, 0);
  return code ? fail("cuLibraryLoadData", code) : nullptr;
}

int64_t kbc_workspace(const kbc_matmul* problem) { return Workspace(*problem).bytes; }

const char* kbc_run(const kbc_matmul* problem, int device, void* stream) {
  if (const char* wrong = check(*problem)) return wrong;
  if (problem->rows == 0) return nullptr;
  if (!kbc_capability(device)) return fail("no such device");
  Pushed current(devices[device]);
  return current.wrong ? current.wrong : run_here(devices[device], *problem, stream);
}

const char* kbc_run_fake(const kbc_fake* problem, int device, void* stream) {
  if (const char* wrong = check(*problem)) return wrong;
  if (problem->rows == 0) return nullptr;
  if (!kbc_capability(device)) return fail("no such device");
  Pushed current(devices[device]);
  return current.wrong ? current.wrong : run_here(devices[device], *problem, stream);
}
