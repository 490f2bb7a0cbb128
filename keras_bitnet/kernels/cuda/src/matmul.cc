// Chooses, sizes and launches the kernels of bitnet.cu: products.
#include <string>

#include "launch.h"

namespace {

using namespace launcher;

// One row of bitnet.cu that multiplies several rows of activations.
struct MatrixKernel {
  const char* name;
  int threads, rows, columns;  // of a block
  int stages, slices;          // in shared memory: stages of so many slices of the image
  bool grouped, wgmma;
  bool wide;                   // of 16-bit numbers, whose dtype ends its name; else of codes
  int time, start;             // nanoseconds for a slice, and besides, on an H200; where compared
};
constexpr MatrixKernel kMatrixKernels[] = {
    {"mma_8", 256, 8, 32, 4, 8, false, false, false, 190, 1250},
    {"mma_16", 256, 16, 64, 4, 4, false, false, false, 0, 0},
    {"mma_32", 256, 32, 64, 3, 4, false, false, false, 0, 0},
    {"mma_64", 256, 64, 128, 3, 2, false, false, false, 0, 0},
    {"mma_grouped_8", 256, 8, 32, 4, 8, true, false, false, 160, 1200},
    {"mma_grouped_16", 256, 16, 32, 3, 8, true, false, false, 200, 1700},
    {"mma_grouped_32", 256, 32, 32, 2, 8, true, false, false, 320, 4000},
    {"wgmma_16", 384, 16, 256, 16, 1, false, true, false, 250, 2000},
    {"wgmma_32", 384, 32, 256, 16, 1, false, true, false, 260, 2000},
    {"wgmma_64", 384, 64, 256, 8, 1, false, true, false, 390, 2000},
    {"wgmma_128", 384, 128, 256, 10, 1, false, true, false, 740, 2000},
    {"wgmma16_64_", 640, 64, 256, 4, 1, false, true, true, 750, 2500},
    {"wgmma16_128_", 640, 128, 256, 4, 1, false, true, true, 1200, 2000},
    {"wgmma16_grouped_64_", 640, 64, 256, 4, 1, true, true, true, 1000, 2000},
    {"wgmma16_grouped_128_", 640, 128, 256, 4, 1, true, true, true, 1500, 3000},
};
enum { kMma8, kMma16, kMma32, kMma64, kGrouped8, kWgmma16 = 7, kCount = 15 };

constexpr int kSlice = 128;

// Rows of codes for a row of activations: those that stay float are split into planes of 8 bits.
int planes(const kbc_matmul& p) { return p.activation_bits ? 1 : p.dtype == 0 ? 4 : 2; }
int64_t image_rows(const kbc_matmul& p) { return p.rows * planes(p); }

// Single rows whose codes fit into the memory of every GPU, beside the weights on their way, and groups that end
// within a block of four tiles: only the kernel of single rows can tell them apart.
bool row_by_row(const kbc_matmul& p) {
  const int64_t most_codes = p.group_size && p.bits == 8 ? 40960 : 45056;  // in groups there are sums of them too
  if (p.rows == 1 && image_rows(p) * p.in_features <= most_codes) return true;
  return p.group_size && p.bits < 4 && p.group_size % (128 / p.bits);
}

// Why a kernel cannot multiply, or null.
const char* refuse(const kbc_matmul& p, const MatrixKernel& k, const Device& device) {
  if (k.grouped != (p.group_size != 0)) return "this kernel is for other scales";
  if (k.wgmma && device.capability != 90) return "this kernel is for compute capability 9.0";
  if (!k.wide) return nullptr;
  if (p.activation_bits || !p.dtype) return "this kernel is for activations of 16 bits that stay float";
  const float middle = static_cast<float>(1 << (p.bits - 1));
  const bool exact = p.bits <= 2 ? p.offset <= 0 && p.offset >= -4 : p.offset == -middle;
  return exact ? nullptr : "16 bits do not hold these weights";
}

int64_t row_blocks(const kbc_matmul& p, const MatrixKernel& k) {
  return ((k.wide ? p.rows : image_rows(p)) + k.rows - 1) / k.rows;
}
int64_t column_blocks(const kbc_matmul& p, const MatrixKernel& k) {
  return (p.out_features + k.columns - 1) / k.columns;
}

int64_t round_up(int64_t value, int64_t unit) { return (value + unit - 1) / unit * unit; }

struct Choice {
  int kernel;
  unsigned shares;  // blocks of a cluster, which share the inputs
};

// Nanoseconds that a choice takes, without the quantization. Blocks that do not fit come after the others.
int64_t estimate(const kbc_matmul& p, const Choice& c, const Device& device) {
  constexpr int kRound = 4;  // slices: the kernels make so many turns at once
  const MatrixKernel& k = kMatrixKernels[c.kernel];
  int64_t places = device.multiprocessors * (k.wgmma ? 1 : 2);
  if (c.shares > 2) places = places * 10 / 11;  // larger clusters leave multiprocessors idle
  const int64_t slices = (p.in_features + kSlice - 1) / kSlice;
  const int64_t turns = round_up((slices + c.shares - 1) / c.shares, kRound);
  const int64_t sum = c.shares > 1 && !k.wide ? 60 * k.rows : 0;  // to add what the blocks of a cluster have
  const int64_t read = k.columns * p.bits * 33 / 100;  // the weights of a slice: 128 inputs of every column
  const int64_t time = k.time > read ? k.time : read;
  return (row_blocks(p, k) * column_blocks(p, k) * c.shares + places - 1) / places * (turns * time + k.start + sum);
}

// Bytes of shared memory: stages, and a place for the sums of every block of a cluster.
int memory(const Choice& c) {
  const MatrixKernel& k = kMatrixKernels[c.kernel];
  const int shares = static_cast<int>(c.shares), parts = k.rows / 8 > shares ? k.rows / 8 : shares;
  return k.stages * k.slices * k.rows * kSlice + (shares > 1 ? parts * 32 * k.columns : 0);
}

// How many blocks share the inputs best. Those of 128 rows have no memory for the sums of others.
Choice shared(const kbc_matmul& p, int kernel, const Device& device) {
  Choice best{kernel, 1};
  if (!kMatrixKernels[kernel].wgmma || kMatrixKernels[kernel].rows > 64) return best;
  for (unsigned shares = 2; shares <= 8; shares *= 2) {
    const Choice other{kernel, shares};
    if (estimate(p, other, device) < estimate(p, best, device)) best = other;
  }
  return best;
}

Choice choose(const kbc_matmul& p, const Device& device) {
  const int64_t rows = image_rows(p);
  Choice best{rows <= 16 ? kMma16 : rows <= 32 ? kMma32 : kMma64, 1};
  if (rows <= 8 || (rows <= 16 && p.out_features <= 32 * device.multiprocessors)) best.kernel = kMma8;
  if (device.capability == 90) best.kernel = rows > 16 ? kWgmma16 : kMma8;
  if (p.group_size) best.kernel = kGrouped8;
  for (int kernel = kGrouped8; kernel < kCount; ++kernel) {
    if (refuse(p, kMatrixKernels[kernel], device)) continue;
    const Choice other = shared(p, kernel, device);
    if (estimate(p, other, device) < estimate(p, best, device)) best = other;
  }
  return best;
}

// Where things lie in the workspace.
struct Workspace {
  int64_t image = 0, row_scale = 0, row_sum = 0, largest = 0, bytes = 0;

  explicit Workspace(const kbc_matmul& p) {
    if (!row_by_row(p)) {
      row_scale = round_up(p.in_features, kSlice) * round_up(image_rows(p), 8);
      const int64_t wide = 2 * round_up(p.in_features, 2 * kSlice) * round_up(p.rows, 8);
      if (!p.activation_bits && wide > row_scale) row_scale = wide;
      row_sum = row_scale + round_up(4 * image_rows(p), 256);
      bytes = largest = row_sum + round_up(4 * image_rows(p), 256);
    }
    if (p.per_tensor && p.rows > 1) bytes += 256;
  }
};

Matmul parameters(const kbc_matmul& p) {
  const int64_t four = p.dtype == 0 ? 16 : 8;  // bytes of four elements
  const Workspace place(p);
  char* workspace = static_cast<char*>(p.workspace);
  const double highest = p.activation_bits == 4 ? 7 : 127;
  constexpr float kLeast = 1e-30f;  // largest number of a row of floats: its inverse is finite
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
  m.planes = planes(p);
  m.epsilon = p.activation_bits ? p.epsilon : kLeast;
  m.highest = static_cast<float>(highest);
  m.inverse_highest = static_cast<float>(1 / highest);
  m.inverse_step = 1.0f / step;
  return m;
}

const char* check(const kbc_matmul& p) {
  if (p.bits < 1 || library_of(p.bits) < 0) return "bits must be 1, 2, 4 or 8";
  if (p.dtype < 0 || p.dtype > 2) return "dtype must be 0, 1 or 2";
  if (p.activation_bits != 8 && p.activation_bits != 4 && p.activation_bits != 0)
    return "activation_bits must be 8, 4 or 0";
  if (!p.activation_bits && (p.per_tensor || p.x_scale)) return "activations that stay float have no scale";
  if (p.rows < 0 || p.in_features < 1 || p.out_features < 1 || p.group_size < 0)
    return "a size is out of range";
  if (image_rows(p) > INT32_MAX / 8 || p.in_features * planes(p) > 98304 || p.out_features > 2000000)
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
  int warps, places, teams;  // places: of 16 bytes, for what a thread has on its way
  int64_t most_tiles;   // of a row of tiles, for which it is the best
  int64_t most_inputs;  // likewise: how many its threads hold, quantizing them
};
constexpr RowKernel kRowKernels[] = {{"gemv_4_", 4, 8, 1, 384, 6144},
                                     {"gemv_4x2_", 8, 8, 2, 384, INT64_MAX},
                                     {"gemv_8_", 8, 8, 1, 704, INT64_MAX},
                                     {"gemv_16_", 16, 6, 1, INT64_MAX, INT64_MAX}};
constexpr RowKernel kGroupedRows[] = {{"gemv_grouped_8_", 8, 10, 1, 1536, INT64_MAX},
                                      {"gemv_grouped_16_", 16, 10, 1, INT64_MAX, INT64_MAX}};
constexpr RowKernel kSplitRows[] = {{"gemv_split_8_", 8, 8, 1, 704, INT64_MAX},
                                    {"gemv_split_16_", 16, 6, 1, INT64_MAX, INT64_MAX}};
constexpr RowKernel kSplitGroupedRows[] = {{"gemv_split_grouped_8_", 8, 10, 1, 1536, INT64_MAX},
                                           {"gemv_split_grouped_16_", 16, 10, 1, INT64_MAX, INT64_MAX}};

// Single rows: quantized and multiplied by one kernel.
const char* run_rows(Device& device, const kbc_matmul& p, Matmul m, void* stream) {
  const bool split = m.planes > 1;
  const RowKernel* k = split ? (p.group_size ? kSplitGroupedRows : kSplitRows)
                             : (p.group_size ? kGroupedRows : kRowKernels);
  while (k->most_tiles < m.k_tiles || k->most_inputs < m.k) ++k;
  const int64_t codes = round_up(m.k, 256) * m.planes;
  const int64_t sums = p.group_size ? codes / (p.bits < 8 ? 8 : 4) : 0;
  auto bytes = [&](const RowKernel& kernel) { return kernel.places * kernel.warps * 32 * 16 + codes + sums; };
  constexpr int64_t kStatic = 6144;  // what a kernel has besides, at most
  if (p.group_size && k->warps == 16 && bytes(*k) + kStatic > device.shared_memory) --k;
  const unsigned shared = static_cast<unsigned>(bytes(*k));
  // Few blocks leave room for those of the next launch, which fetch weights while these compute;
  // with much to do it is better to have many. Measured on an H100.
  const int64_t rows_each = (m.n + 15) / 16 / device.multiprocessors;
  const int64_t resident = rows_each < 2 ? 1 : 16 / k->warps * (rows_each < 8 || split || p.group_size ? 1 : 2);
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
    if (const char* wrong = launch(device, p.bits, l, &m, stream)) return wrong;
  }
  return nullptr;
}

// Several rows: quantized, or arranged, by one kernel, multiplied by the next.
const char* run_matrix(Device& device, const kbc_matmul& p, Matmul m, void* stream) {
  if (p.kernel < 0 || p.kernel > kCount) return "kernel is out of range";
  const Choice choice = p.kernel ? shared(p, p.kernel - 1, device) : choose(p, device);
  const MatrixKernel& k = kMatrixKernels[choice.kernel];
  if (const char* wrong = refuse(p, k, device)) return wrong;
  const std::string dtype = kDtypes[p.dtype];
  const std::string prepare = (k.wide ? "arrange_" : m.planes > 1 ? "split_" : "quantize_") + dtype;
  const std::string multiply = k.name + (k.wide ? dtype : "");
  if (k.wide) m.planes = 1;
  const Launch first{prepare.c_str(), static_cast<unsigned>(p.rows), 1, kQuantizeThreads, 0,
                     p.weights != KBC_WEIGHTS_SETTLE};
  if (const char* wrong = launch(device, p.bits, first, &m, stream)) return wrong;
  Launch second{multiply.c_str(), static_cast<unsigned>(row_blocks(p, k)) * choice.shares,
                static_cast<unsigned>(column_blocks(p, k)), static_cast<unsigned>(k.threads),
                static_cast<unsigned>(memory(choice)), true};
  second.cluster = choice.shares;
  return launch(device, p.bits, second, &m, stream);
}

const char* run_here(Device& device, const kbc_matmul& p, void* stream) {
  const Matmul m = parameters(p);
  if (m.largest) {
    if (const char* wrong = clear_word(m.largest, stream)) return wrong;
    const std::string name = std::string("largest_") + kDtypes[p.dtype];
    const Launch l{name.c_str(), static_cast<unsigned>(p.rows), 1, kQuantizeThreads, 0, false};
    if (const char* wrong = launch(device, p.bits, l, &m, stream)) return wrong;
  }
  return row_by_row(p) ? run_rows(device, p, m, stream) : run_matrix(device, p, m, stream);
}

}  // namespace

int64_t kbc_workspace(const kbc_matmul* problem) { return Workspace(*problem).bytes; }

const char* kbc_run(const kbc_matmul* problem, int device, void* stream) {
  if (const char* wrong = check(*problem)) return wrong;
  if (problem->rows == 0) return nullptr;
  return on_device(device, [&](Device& d) { return run_here(d, *problem, stream); });
}
