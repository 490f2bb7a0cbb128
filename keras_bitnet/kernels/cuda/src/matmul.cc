// Chooses, sizes and launches the kernels of bitnet.cu: products.
#include <string>

#include "launch.h"

static_assert(MOST_PRODUCTS == KBC_MAX_JOINT, "a launch takes all products");

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
  int four_groups = 0;         // widths of weights, added up, for which it has 640 threads
};
constexpr MatrixKernel kMatrixKernels[] = {
    {"mma_8", 256, 8, 32, 4, 8, false, false, false, 135, 500},
    {"mma_16", 256, 16, 64, 4, 4, false, false, false, 0, 0},
    {"mma_32", 256, 32, 64, 3, 4, false, false, false, 0, 0},
    {"mma_64", 256, 64, 128, 3, 2, false, false, false, 0, 0},
    {"mma_grouped_8", 256, 8, 32, 4, 8, true, false, false, 160, 1200},
    {"mma_grouped_16", 256, 16, 32, 3, 8, true, false, false, 180, 1700},
    {"mma_grouped_32", 256, 32, 32, 2, 8, true, false, false, 255, 4000},
    {"wgmma_16", 384, 16, 256, 16, 1, false, true, false, 250, 2300, FOUR_GROUPS_16},
    {"wgmma_32", 384, 32, 256, 16, 1, false, true, false, 300, 2300, FOUR_GROUPS_32},
    {"wgmma_64", 384, 64, 256, 8, 1, false, true, false, 435, 2300, FOUR_GROUPS_64},
    {"wgmma_128", 384, 128, 256, 10, 1, false, true, false, 705, 3400, FOUR_GROUPS_128},
    {"wgmma16_64_", 640, 64, 256, 4, 1, false, true, true, 850, 1000},
    {"wgmma16_128_", 640, 128, 256, 4, 1, false, true, true, 1390, 2600},
    {"wgmma16_grouped_64_", 640, 64, 256, 4, 1, true, true, true, 1000, 2000},
    {"wgmma16_grouped_128_", 640, 128, 256, 4, 1, true, true, true, 1200, 3000},
};
enum { kMma8, kMma16, kMma32, kMma64, kGrouped8, kWgmma64 = 9, kCount = 15 };

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

// Blocks along y of a product that begins with the block `first`, where those from `wide` on are narrower.
int64_t column_blocks(const kbc_matmul& p, const MatrixKernel& k, int64_t first, int64_t wide) {
  const int64_t all = column_blocks(p, k), before = wide <= first ? 0 : wide - first;
  if (before >= all) return all;
  return before + (p.out_features - before * k.columns + NARROW_COLUMNS - 1) / NARROW_COLUMNS;
}

// The sum of what `of(product)` gives for each product.
template <class Of> int64_t sum(const kbc_joint& joint, Of of) {
  int64_t sum = 0;
  for (int i = 0; i < joint.count; ++i) sum += of(*joint.matmuls[i]);
  return sum;
}
int64_t out_features(const kbc_joint& joint) {
  return sum(joint, [](const kbc_matmul& p) { return p.out_features; });
}

// Blocks along y of all products.
int64_t column_blocks(const kbc_joint& joint, const MatrixKernel& k, int64_t wide = INT32_MAX) {
  int64_t first = 0;
  for (int i = 0; i < joint.count; ++i) first += column_blocks(*joint.matmuls[i], k, first, wide);
  return first;
}

// From which block along y on blocks have NARROW_COLUMNS, or INT32_MAX: where there are several waves, and the last one
// holds the narrower blocks too. They take four fifths of the time.
int wide_blocks(const kbc_joint& joint, const MatrixKernel& k, const Device& device) {
  const kbc_matmul& p = *joint.matmuls[0];
  if (!k.wgmma || k.wide || k.rows < 128 || !(k.four_groups & p.bits)) return INT32_MAX;
  const int64_t rows = row_blocks(p, k), in_wave = device.multiprocessors / rows;  // blocks along y
  const int64_t waves = (rows * column_blocks(joint, k) - 1) / device.multiprocessors;  // before the last one
  const int64_t before = waves * device.multiprocessors / rows;
  const int64_t free = in_wave - (column_blocks(joint, k, before) - before);
  if (!waves || free < 0) return INT32_MAX;
  return static_cast<int>(before - free * NARROW_COLUMNS / k.columns);
}

int64_t round_up(int64_t value, int64_t unit) { return (value + unit - 1) / unit * unit; }

struct Choice {
  int kernel;
  unsigned shares;  // blocks of a cluster, which share the inputs
};

// Nanoseconds that a choice takes, without the quantization. Blocks that do not fit come after the others.
int64_t estimate(const kbc_joint& joint, const Choice& c, const Device& device) {
  constexpr int kRound = 4;  // slices: the kernels make so many turns at once
  const kbc_matmul& p = *joint.matmuls[0];
  const MatrixKernel& k = kMatrixKernels[c.kernel];
  int64_t places = device.multiprocessors * (k.wgmma ? 1 : 2);
  if (c.shares > 2) places = places * 10 / 11;  // larger clusters leave multiprocessors idle
  const int64_t slices = (p.in_features + kSlice - 1) / kSlice;
  const int64_t turns = round_up((slices + c.shares - 1) / c.shares, kRound);
  int64_t sum = c.shares > 1 ? (k.wide ? 30 : 54) * k.rows : 0;  // to add what the blocks of a cluster have
  if (c.shares == 8 && !k.grouped) sum += 1100;
  const int64_t read = k.columns * p.bits * (k.wide ? 48 : 20) / 100;  // the weights of a slice, of every column
  const int64_t time = k.time > read ? k.time : read;
  const int64_t blocks = row_blocks(p, k) * column_blocks(joint, k) * c.shares;
  const int64_t narrower = wide_blocks(joint, k, device) < INT32_MAX ? turns * time / 5 : 0;
  // What all blocks read comes from the second cache where several read the same.
  const int64_t bytes = k.grouped ? 0 : row_blocks(p, k) * out_features(joint) * p.in_features * p.bits / 8;
  return (blocks + places - 1) / places * (turns * time + k.start + sum) - narrower + bytes * 18 / 1000000;
}

// Bytes of shared memory: stages, and a place for the sums of every block of a cluster.
int memory(const Choice& c) {
  const MatrixKernel& k = kMatrixKernels[c.kernel];
  const int shares = static_cast<int>(c.shares), parts = k.rows / 8 > shares ? k.rows / 8 : shares;
  return k.stages * k.slices * k.rows * kSlice + (shares > 1 ? parts * 32 * k.columns : 0);
}

// How many blocks share the inputs best. Those of 128 rows have no memory for the sums of others.
Choice shared(const kbc_joint& joint, int kernel, const Device& device) {
  Choice best{kernel, 1};
  if (!kMatrixKernels[kernel].wgmma || kMatrixKernels[kernel].rows > 64) return best;
  for (unsigned shares = 2; shares <= 8; shares *= 2) {
    const Choice other{kernel, shares};
    if (estimate(joint, other, device) < estimate(joint, best, device)) best = other;
  }
  return best;
}

Choice choose(const kbc_joint& joint, const Device& device) {
  const kbc_matmul& p = *joint.matmuls[0];
  const int64_t rows = image_rows(p);
  Choice best{rows <= 16 ? kMma16 : rows <= 32 ? kMma32 : kMma64, 1};
  const bool small = rows <= 8 || (rows <= 16 && out_features(joint) <= 32 * device.multiprocessors);
  if (small || device.capability == 90) best.kernel = kMma8;
  if (p.group_size) best.kernel = kGrouped8;
  for (int kernel = kGrouped8; kernel < kCount; ++kernel) {
    if (refuse(p, kMatrixKernels[kernel], device)) continue;
    const Choice other = shared(joint, kernel, device);
    if (estimate(joint, other, device) < estimate(joint, best, device)) best = other;
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

// Whether the first launch may start before the kernel before it ends.
bool starts_early(const kbc_joint& joint) {
  return !sum(joint, [](const kbc_matmul& p) { return p.weights == KBC_WEIGHTS_SETTLE; });
}

// What products of the same activations share.
Activations shared_parameters(const kbc_joint& joint) {
  const kbc_matmul& p = *joint.matmuls[0];
  const int64_t four = p.dtype == 0 ? 16 : 8;  // bytes of four elements
  const Workspace place(p);
  char* workspace = static_cast<char*>(p.workspace);
  const double highest = p.activation_bits == 4 ? 7 : 127;
  constexpr float kLeast = 1e-30f;  // largest number of a row of floats: its inverse is finite
  const int step = p.offset == static_cast<float>(static_cast<int>(p.offset)) ? 1 : 2;
  Activations m{};
  m.x = p.x;
  m.x_scale = static_cast<const float*>(p.x_scale);
  if (p.per_tensor && p.rows > 1) m.largest = reinterpret_cast<unsigned*>(workspace + place.largest);
  m.image = reinterpret_cast<unsigned char*>(workspace + place.image);
  m.row_scale = reinterpret_cast<float*>(workspace + place.row_scale);
  m.row_sum = reinterpret_cast<int*>(workspace + place.row_sum);
  m.rows = static_cast<int>(p.rows);
  m.k = static_cast<int>(p.in_features);
  m.k_tiles = static_cast<int>((p.in_features * p.bits + 31) / 32);
  m.group_size = static_cast<int>(p.group_size ? p.group_size : p.in_features);
  m.dtype = p.dtype;
  m.x_aligned = p.in_features % 4 == 0 && aligned(p.x, four);
  m.weights_ready = !sum(joint, [](const kbc_matmul& one) { return one.weights != KBC_WEIGHTS_READY; });
  m.step = step;
  m.step_offset = static_cast<int>(step * p.offset);
  m.planes = planes(p);
  m.epsilon = p.activation_bits ? p.epsilon : kLeast;
  m.highest = static_cast<float>(highest);
  m.inverse_highest = static_cast<float>(1 / highest);
  m.inverse_step = 1.0f / step;
  return m;
}

// What a product has of its own.
Product own_parameters(const kbc_matmul& p, int first_block, int blocks) {
  Product m{};
  m.tiles = p.tiles;
  m.scale = static_cast<const float*>(p.scale);
  m.bias = static_cast<const float*>(p.bias);
  m.y = p.y;
  m.n = static_cast<int>(p.out_features);
  m.scale_columns = p.scale_columns;
  m.y_aligned = p.out_features % 4 == 0 && aligned(p.y, p.dtype == 0 ? 16 : 8);
  m.first_block = first_block;
  m.blocks = blocks;
  return m;
}

// Launches a kernel whose blocks along y are those of one product after another: `blocks(p)` of each.
template <class Blocks>
const char* launch_products(Device& device, const kbc_joint& joint, const Activations& shared, Launch l,
                            Blocks blocks, void* stream) {
  Matmuls m{shared, {}};
  for (Product& none : m.of) none.first_block = INT32_MAX;
  l.grid_y = 0;
  for (int i = 0; i < joint.count; ++i) {
    const unsigned count = static_cast<unsigned>(blocks(*joint.matmuls[i]));
    m.of[i] = own_parameters(*joint.matmuls[i], static_cast<int>(l.grid_y), static_cast<int>(count));
    l.grid_y += count;
  }
  return launch(device, joint.matmuls[0]->bits, l, &m, stream);
}

constexpr int64_t kMostOutputs = 2000000;

const char* check(const kbc_matmul& p) {
  if (p.bits < 1 || library_of(p.bits) < 0) return "bits must be 1, 2, 4 or 8";
  if (p.dtype < 0 || p.dtype > 2) return "dtype must be 0, 1 or 2";
  if (p.activation_bits != 8 && p.activation_bits != 4 && p.activation_bits != 0)
    return "activation_bits must be 8, 4 or 0";
  if (!p.activation_bits && (p.per_tensor || p.x_scale)) return "activations that stay float have no scale";
  if (p.rows < 0 || p.in_features < 1 || p.out_features < 1 || p.group_size < 0)
    return "a size is out of range";
  if (image_rows(p) > INT32_MAX / 8 || p.in_features * planes(p) > 98304 || p.out_features > kMostOutputs)
    return "a size is too large";
  if (p.group_size % 32) return "group_size must be a multiple of 32";
  if (p.scale_columns != 1 && p.scale_columns != p.out_features)
    return "scale_columns must be 1 or out_features";
  if (!aligned(p.tiles, 16)) return "tiles must lie at a multiple of 16 bytes";
  if (Workspace(p).bytes && !aligned(p.workspace, 16))
    return "workspace must lie at a multiple of 16 bytes";
  return nullptr;
}

bool agree(const kbc_matmul& p, const kbc_matmul& q) {
  return p.rows == q.rows && p.in_features == q.in_features && p.group_size == q.group_size && p.bits == q.bits &&
         p.dtype == q.dtype && p.activation_bits == q.activation_bits && p.per_tensor == q.per_tensor &&
         p.offset == q.offset && p.epsilon == q.epsilon && p.x == q.x && p.x_scale == q.x_scale;
}

const char* check(const kbc_joint& joint) {
  if (joint.count < 1 || joint.count > KBC_MAX_JOINT) return "too many products, or none";
  for (int i = 0; i < joint.count; ++i) {
    if (const char* wrong = check(*joint.matmuls[i])) return wrong;
    if (!agree(*joint.matmuls[i], *joint.matmuls[0])) return "the products do not agree";
  }
  return out_features(joint) > kMostOutputs ? "a size is too large" : nullptr;
}

// One row of bitnet.cu that multiplies single rows of activations.
struct RowKernel {
  const char* name;
  int warps, places, teams;  // places: of 16 bytes, for what a thread has on its way
  int64_t most_tiles;   // of a row of tiles, for which it is the best
  int64_t most_inputs;  // likewise: how many its threads hold, quantizing them
};
constexpr RowKernel kRowKernels[] = {{"gemv_8_", 8, 8, 1, INT64_MAX, 8192},
                                     {"gemv_16_", 16, 6, 1, INT64_MAX, INT64_MAX}};
constexpr RowKernel kManyRows = {"gemv_4x2_", 8, 8, 2, INT64_MAX, INT64_MAX};  // of tiles
// Kernels for many turns: they ask for some of the weights after the activations, which else wait for all.
struct ManyTurns {
  const RowKernel* instead_of;
  RowKernel kernel;
};
constexpr ManyTurns kManyTurns[] = {{&kManyRows, {"gemv_many_4x2_", 8, 8, 2, INT64_MAX, 8192}},
                                    {&kRowKernels[1], {"gemv_many_16_", 16, 7, 1, INT64_MAX, 16384}}};
constexpr RowKernel kGroupedRows[] = {{"gemv_grouped_8_", 8, 10, 1, 1536, INT64_MAX},
                                      {"gemv_grouped_16_", 16, 10, 1, INT64_MAX, INT64_MAX}};
constexpr RowKernel kSplitRows[] = {{"gemv_split_8_", 8, 8, 1, INT64_MAX, 8192},
                                    {"gemv_split_16_", 16, 6, 1, INT64_MAX, INT64_MAX}};
constexpr RowKernel kSplitGroupedRows[] = {{"gemv_split_grouped_8_", 8, 10, 1, 1536, INT64_MAX},
                                           {"gemv_split_grouped_16_", 16, 10, 1, INT64_MAX, INT64_MAX}};

// Single rows: quantized and multiplied by one kernel.
const char* run_rows(Device& device, const kbc_joint& joint, const Activations& m, void* stream) {
  const kbc_matmul& p = *joint.matmuls[0];
  const bool split = m.planes > 1;
  const RowKernel* k = split ? (p.group_size ? kSplitGroupedRows : kSplitRows)
                             : (p.group_size ? kGroupedRows : kRowKernels);
  while (k->most_tiles < m.k_tiles || k->most_inputs < m.k) ++k;
  const int64_t tile_rows = sum(joint, [](const kbc_matmul& one) { return (one.out_features + 15) / 16; });
  const int64_t places = device.multiprocessors;
  if (k == kRowKernels && tile_rows >= 2 * places) k = &kManyRows;
  const int64_t codes = round_up(m.k, 256) * m.planes;
  const int64_t sums = p.group_size ? codes / (p.bits < 8 ? 8 : 4) : 0;
  auto bytes = [&](const RowKernel& kernel) { return kernel.places * kernel.warps * 32 * 16 + codes + sums; };
  constexpr int64_t kStatic = 6144;  // what a kernel has besides, at most
  if (p.group_size && k->warps == 16 && bytes(*k) + kStatic > device.shared_memory) --k;
  // A multiprocessor gets two blocks; or one, where nearly all would have two rows of tiles, and those of the next
  // launch lie beside it and fetch their weights already.
  const bool one = (k->warps == 16 && p.group_size) || (2 * tile_rows >= 3 * places && tile_rows < 2 * places);
  const int64_t slots = one ? places : 2 * places;
  // Turns of the warps that share a row of tiles, over all their rows.
  const int64_t tiles = 8 * k->warps / k->teams, teams = slots * k->teams;
  const int64_t turns = (tile_rows + teams - 1) / teams * ((m.k_tiles + tiles - 1) / tiles);
  constexpr int64_t kFewTurns = 12;
  if (p.rows == 1 && turns > kFewTurns)
    for (const ManyTurns& many : kManyTurns)
      if (k == many.instead_of && m.k <= many.kernel.most_inputs) {
        k = &many.kernel;
        break;
      }
  // Of a single row there is memory for two blocks, no more: what others fetch would delay these.
  const int64_t third = p.rows == 1 ? device.shared_memory / 3 : 0;
  const int64_t shared = bytes(*k) > third ? bytes(*k) : third;
  auto blocks = [&](const kbc_matmul& one) { return ((one.out_features + 15) / 16 + k->teams - 1) / k->teams; };
  const int64_t all = sum(joint, blocks);
  const std::string name = std::string(k->name) + kDtypes[p.dtype];
  const Launch l{name.c_str(), static_cast<unsigned>(p.rows), 1, static_cast<unsigned>(32 * k->warps),
                 static_cast<unsigned>(shared), starts_early(joint)};
  // Each product gets its part of the slots.
  auto part = [&](const kbc_matmul& one) {
    const int64_t most = slots * blocks(one) / all;
    return blocks(one) < most ? blocks(one) : most > 0 ? most : 1;
  };
  return launch_products(device, joint, m, l, part, stream);
}

// Several rows: quantized, or arranged, by one kernel, multiplied by the next.
const char* run_matrix(Device& device, const kbc_joint& joint, Activations m, void* stream) {
  const kbc_matmul& p = *joint.matmuls[0];
  if (p.kernel < 0 || p.kernel > kCount) return "kernel is out of range";
  const Choice choice = p.kernel ? shared(joint, p.kernel - 1, device) : choose(joint, device);
  const MatrixKernel& k = kMatrixKernels[choice.kernel];
  if (const char* wrong = refuse(p, k, device)) return wrong;
  const std::string dtype = kDtypes[p.dtype];
  // Blocks of more threads take less time where there is one for each row at once.
  const bool few = !k.wide && m.planes == 1 && p.rows <= 2 * device.multiprocessors;
  const char* const quantize = m.planes > 1 ? "split_" : few ? "quantize_few_" : "quantize_";
  const std::string prepare = (k.wide ? "arrange_" : quantize) + dtype;
  // Of 64 rows there is a kernel for blocks that share nothing and take many slices.
  const bool alone = choice.kernel == kWgmma64 && choice.shares == 1 && p.bits < 8 && p.in_features >= 32 * kSlice;
  const std::string multiply = alone ? "wgmma_long_64" : k.name + (k.wide ? dtype : "");
  if (k.wide) m.planes = 1;
  const Launch first{prepare.c_str(), static_cast<unsigned>(p.rows), 1, kQuantizeThreads * (few ? 2u : 1u), 0,
                     starts_early(joint)};
  const Matmuls only{m, {}};
  if (const char* wrong = launch(device, p.bits, first, &only, stream)) return wrong;
  const int threads = k.four_groups & p.bits ? 640 : k.threads;
  Launch second{multiply.c_str(), static_cast<unsigned>(row_blocks(p, k)) * choice.shares, 1,
                static_cast<unsigned>(threads), static_cast<unsigned>(memory(choice)), true};
  second.cluster = choice.shares;
  m.wide_blocks = wide_blocks(joint, k, device);
  int64_t first_block = 0;
  auto blocks = [&](const kbc_matmul& one) {
    const int64_t count = column_blocks(one, k, first_block, m.wide_blocks);
    first_block += count;
    return count;
  };
  return launch_products(device, joint, m, second, blocks, stream);
}

const char* run_here(Device& device, const kbc_joint& joint, void* stream) {
  const kbc_matmul& p = *joint.matmuls[0];
  const Activations m = shared_parameters(joint);
  if (m.largest) {
    if (const char* wrong = clear_word(m.largest, stream)) return wrong;
    const std::string name = std::string("largest_") + kDtypes[p.dtype];
    const Launch l{name.c_str(), static_cast<unsigned>(p.rows), 1, kQuantizeThreads, 0, false};
    const Matmuls only{m, {}};
    if (const char* wrong = launch(device, p.bits, l, &only, stream)) return wrong;
  }
  return row_by_row(p) ? run_rows(device, joint, m, stream) : run_matrix(device, joint, m, stream);
}

}  // namespace

int64_t kbc_workspace(const kbc_matmul* problem) { return Workspace(*problem).bytes; }

const char* kbc_run(const kbc_matmul* problem, int device, void* stream) {
  const kbc_joint only{1, {problem}};
  return kbc_run_joint(&only, device, stream);
}

const char* kbc_run_joint(const kbc_joint* problem, int device, void* stream) {
  if (const char* wrong = check(*problem)) return wrong;
  if (problem->matmuls[0]->rows == 0) return nullptr;
  return on_device(device, [&](Device& d) { return run_here(d, *problem, stream); });
}
