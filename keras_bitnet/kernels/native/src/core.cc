// The C ABI: checks its arguments, picks a table of kernels, and has the driver run it.
#include <cmath>
#include <cstdarg>
#include <cstdio>
#include <initializer_list>
#include <new>

#include "bitnet.h"
#include "dispatch.h"
#include "driver.h"
#include "pool.h"

namespace kbn {
namespace {

enum Error { kOk = 0, kInvalid = 1, kTooLong = 2, kNoIsa = 3, kNoMemory = 4 };

thread_local char message[256];

int fail(Error code, const char* format, ...) {
  va_list arguments;
  va_start(arguments, format);
  std::vsnprintf(message, sizeof(message), format, arguments);
  va_end(arguments);
  return code;
}

long long printable(int64_t value) { return value; }

// Largest |factor * (code + offset)|.
double largest_weight(const kbn_matmul& p) {
  const double top = (1 << p.bits) - 1 + p.offset;
  const double factor = std::floor(p.offset) == p.offset ? 1 : 2;
  return factor * std::fmax(std::fabs(p.offset), std::fabs(top));
}

int check_weights(const kbn_matmul& p) {
  if (p.rows < 0 || p.in_features < 1 || p.out_features < 1) {
    return fail(kInvalid,
                "rows must be at least 0, in_features and out_features at least 1. "
                "Received: rows=%lld, in_features=%lld, out_features=%lld",
                printable(p.rows), printable(p.in_features), printable(p.out_features));
  }
  if (p.bits != 1 && p.bits != 2 && p.bits != 4 && p.bits != 8) {
    return fail(kInvalid, "bits must be 1, 2, 4 or 8. Received: bits=%d", p.bits);
  }
  if (p.layout != KBN_TILES && !(p.layout == KBN_TRITS && p.bits == 2 && p.group_size == 0)) {
    return fail(kInvalid, "layout must be 0 (tiles), or 1 (trits) with bits=2 and group_size=0. "
                "Received: layout=%d, bits=%d, group_size=%lld",
                p.layout, p.bits, printable(p.group_size));
  }
  if (p.group_size < 0 || p.group_size % 32 != 0) {
    return fail(kInvalid, "group_size must be a multiple of 32, or 0. Received: group_size=%lld",
                printable(p.group_size));
  }
  if (!(std::fabs(p.offset) <= 1024.0f) || std::floor(2 * p.offset) != 2 * p.offset) {
    return fail(kInvalid, "offset must be a multiple of 1/2 in [-1024, 1024]. Received: offset=%g",
                static_cast<double>(p.offset));
  }
  // The sums of a group, or of all inputs, must fit in int32 whatever the codes are.
  const int64_t summed =
      p.group_size && p.group_size < p.in_features ? p.group_size : p.in_features;
  const double longest = std::floor(2147483647.0 / (128 * std::fmax(largest_weight(p), 1.0)));
  if (static_cast<double>(summed) > longest) {
    return fail(kTooLong,
                "%lld inputs can leave the range of int32 sums. Accepted: at most %.0f inputs (or "
                "a group_size up to that) for bits=%d, offset=%g",
                printable(summed), longest, p.bits, static_cast<double>(p.offset));
  }
  if (p.tiles == nullptr) return fail(kInvalid, "tiles must be given. Received: null");
  return kOk;
}

bool fits(const kbn_window& w, const kbn_matmul& p) {
  int64_t positions = 1, size = 1;
  for (int axis = 0; axis < 3; ++axis) {
    if (w.lengths[axis] < 1 || w.positions[axis] < 1 || w.size[axis] < 1 || w.strides[axis] < 1 ||
        w.dilation[axis] < 1 || w.before[axis] < 0) {
      return false;
    }
    positions *= w.positions[axis];
    size *= w.size[axis];
  }
  return p.rows % positions == 0 && p.in_features % size == 0;
}

int check_activations(const kbn_matmul& p) {
  if (p.dtype != KBN_F32 && p.dtype != KBN_BF16 && p.dtype != KBN_F16) {
    return fail(kInvalid, "dtype must be 0 (float32), 1 (bfloat16) or 2 (float16). Received: %d",
                p.dtype);
  }
  if (p.activation_bits == 0) {
    if (p.per_tensor || p.x_scale) {
      return fail(kInvalid, "float activations (activation_bits=0) have no scale. Received: "
                  "per_tensor=%d, x_scale %s", p.per_tensor, p.x_scale ? "given" : "null");
    }
  } else if (p.activation_bits != 8 && p.activation_bits != 4) {
    return fail(kInvalid, "activation_bits must be 8, 4 or 0 (float). Received: activation_bits=%d",
                p.activation_bits);
  } else if (p.x_scale != nullptr ? !(*p.x_scale > 0 && std::isfinite(*p.x_scale)) : !(p.epsilon > 0)) {
    return fail(kInvalid,
                "epsilon, and a static x_scale, must be positive and finite. "
                "Received: epsilon=%g, x_scale=%g",
                static_cast<double>(p.epsilon), p.x_scale ? static_cast<double>(*p.x_scale) : 0.0);
  }
  if (p.gain != nullptr && p.per_tensor) {
    return fail(kInvalid, "a norm needs an activation scale for each row. Received: per_tensor=1");
  }
  if (p.window != nullptr && !fits(*p.window, p)) {
    return fail(kInvalid, "a window needs positive sizes, rows that are a multiple of its positions and "
                "in_features a multiple of its size. Received: rows=%lld, in_features=%lld",
                printable(p.rows), printable(p.in_features));
  }
  if (p.rows > 0 && p.x == nullptr) return fail(kInvalid, "x must be given. Received: null");
  return kOk;
}

int check_output(const kbn_matmul& p) {
  if (p.scale_columns != 1 && p.scale_columns != p.out_features) {
    return fail(kInvalid, "scale_columns must be 1 or out_features=%lld. Received: %d",
                printable(p.out_features), p.scale_columns);
  }
  if (p.scale == nullptr || (p.rows > 0 && p.y == nullptr)) {
    return fail(kInvalid, "scale and y must be given. Received: null");
  }
  return kOk;
}

// Whether two matmuls are of the same activations, and of weights of one kind.
bool agree(const kbn_matmul& a, const kbn_matmul& b) {
  return a.rows == b.rows && a.in_features == b.in_features && a.group_size == b.group_size &&
         a.bits == b.bits && a.dtype == b.dtype && a.activation_bits == b.activation_bits &&
         a.per_tensor == b.per_tensor && a.offset == b.offset && a.epsilon == b.epsilon &&
         a.layout == b.layout && a.norm_epsilon == b.norm_epsilon && a.x == b.x &&
         a.x_scale == b.x_scale && a.window == b.window && a.gain == b.gain;
}

int check_joint(const kbn_joint& p) {
  if (p.count < 1 || p.count > KBN_MAX_JOINT) {
    return fail(kInvalid, "count must be in [1, %d]. Received: count=%d", KBN_MAX_JOINT, p.count);
  }
  int error = kOk;
  for (int i = 0; i < p.count && !error; ++i) {
    error = check_weights(*p.matmuls[i]);
    if (!error && i == 0) error = check_activations(*p.matmuls[i]);
    if (!error) error = check_output(*p.matmuls[i]);
    if (!error && i > 0 && !agree(*p.matmuls[0], *p.matmuls[i])) {
      error = fail(kInvalid, "joint matmuls must agree in all but out_features, scale_columns, "
                   "tiles, scale, bias and y. Received: another one in place %d", i);
    }
  }
  return error;
}

int check_attention(const kbn_attention& p) {
  const bool sizes = p.batch >= 0 && p.tokens > 0 && p.length > 0 && p.heads > 0 && p.key_heads > 0 &&
                     p.head_dim > 0 && p.head_dim < (1 << 24) && p.heads % p.key_heads == 0;
  if (!sizes || (p.cosines && p.head_dim % 2)) {
    return fail(kInvalid, "sizes must be positive, heads a multiple of key_heads, head_dim even "
                "where there are tables. Received: batch=%lld, tokens=%lld, length=%lld, heads=%lld, "
                "key_heads=%lld, head_dim=%lld", printable(p.batch), printable(p.tokens),
                printable(p.length), printable(p.heads), printable(p.key_heads), printable(p.head_dim));
  }
  if (p.dtype < KBN_F32 || p.dtype > KBN_F16 || p.cache_dtype < KBN_F32 || p.cache_dtype > KBN_I8) {
    return fail(kInvalid, "dtype must be 0 to 2, cache_dtype 0 to 3. Received: dtype=%d, "
                "cache_dtype=%d", p.dtype, p.cache_dtype);
  }
  const bool rows = (p.tables == 1 || p.tables == p.batch) && (p.masks == 1 || p.masks == p.batch);
  const bool scales = (p.cache_dtype == KBN_I8) == (p.key_scale && p.value_scale);
  if (!rows || !scales || !p.cosines != !p.sines) {
    return fail(kInvalid, "tables and masks must be 1 or batch=%lld; an int8 cache has scales, no "
                "other has; cosines and sines come together", printable(p.batch));
  }
  const bool given = p.query && p.key && p.value && p.index && p.key_cache && p.value_cache && p.y;
  if (p.batch > 0 && !given) return fail(kInvalid, "an operand is missing. Received: null");
  if (p.batch > 0 && (*p.index < 0 || *p.index > p.length - p.tokens)) {
    return fail(kInvalid, "index must be in [0, %lld], as the cache can hold %lld tokens. "
                "Received: index=%d, tokens=%lld", printable(p.length - p.tokens), printable(p.length),
                *p.index, printable(p.tokens));
  }
  return kOk;
}

int check_norm(const kbn_norm& p) {
  if (p.rows < 0 || p.features < 1 || p.dtype < KBN_F32 || p.dtype > KBN_F16) {
    return fail(kInvalid, "rows must be at least 0, features at least 1, dtype 0 to 2. Received: "
                "rows=%lld, features=%lld, dtype=%d", printable(p.rows), printable(p.features),
                p.dtype);
  }
  const bool given = p.x && p.scale && p.y;
  return p.rows == 0 || given ? kOk : fail(kInvalid, "an operand is missing. Received: null");
}

// Joint matmuls of x, whose results are of no account here.
int check_products(const void* x, void* y, std::initializer_list<const kbn_matmul*> weights) {
  kbn_matmul matmuls[KBN_MAX_JOINT];
  kbn_joint joint{0, {}};
  for (const kbn_matmul* given : weights) {
    if (given == nullptr) continue;
    kbn_matmul& matmul = matmuls[joint.count];
    matmul = *given;
    matmul.x = x, matmul.y = y;
    joint.matmuls[joint.count++] = &matmul;
  }
  return check_joint(joint);
}

int check_block(const kbn_block& b) {
  if (!(b.query && b.key && b.value && b.output && b.up && b.down && b.attention) ||
      (b.attention->batch > 0 && !(b.x && b.y))) {
    return fail(kInvalid, "an operand is missing. Received: null");
  }
  kbn_attention attention = *b.attention;
  attention.query = attention.key = attention.value = b.x, attention.y = b.y;
  int error = check_attention(attention);
  if (!error) error = check_products(b.x, b.y, {b.query, b.key, b.value});
  if (!error) error = check_products(b.x, b.y, {b.output});
  if (!error) error = check_products(b.x, b.y, {b.up, b.gate});
  if (!error) error = check_products(b.x, b.y, {b.down});
  if (error) return error;
  const int64_t hidden = b.query->in_features, inner = b.up->out_features;
  const int64_t queries = attention.heads * attention.head_dim;
  const int64_t keys = attention.key_heads * attention.head_dim;
  bool fit = b.query->out_features == queries && b.output->in_features == queries &&
             b.key->out_features == keys && b.value->out_features == keys &&
             b.output->out_features == hidden && b.up->in_features == hidden &&
             b.down->out_features == hidden && b.down->in_features == inner &&
             (!b.gate || b.gate->out_features == inner);
  for (const kbn_matmul* p : {b.query, b.output, b.up, b.down}) {
    fit = fit && p->rows == attention.batch * attention.tokens && p->dtype == attention.dtype && !p->window;
  }
  if (!fit || b.activation < KBN_RELU || b.activation > KBN_SILU) {
    return fail(kInvalid, "the parts of a block must fit each other, activation be 0 to 2. Received: "
                "hidden=%lld, queries=%lld, keys=%lld, inner=%lld, activation=%d", printable(hidden),
                printable(queries), printable(keys), printable(inner), b.activation);
  }
  return kOk;
}

// Has `run` use the present table of kernels, unless there is nothing to do.
template <typename Run>
int run_checked(bool nothing, const Run& run) {
  const Kernels* kernels = current_kernels();
  if (kernels == nullptr) {
    return fail(kNoIsa, "KERAS_BITNET_ISA must be 'auto' or one of '%s' on this machine. "
                "Received: '%s'", available_isas(), isa_of_environment());
  }
  if (nothing) return kOk;
  try {
    run(*kernels);
  } catch (const std::bad_alloc&) {
    return fail(kNoMemory, "No memory for the working space of a call");
  }
  return kOk;
}

int run_checked(const kbn_matmul& problem, const Probe& probe) {
  return run_checked(problem.rows == 0, [&](const Kernels& kernels) {
    run({1, {&problem}}, kernels, nullptr, probe);
  });
}

}  // namespace
}  // namespace kbn

int kbn_abi_version(void) { return 11; }

int kbn_run(const kbn_matmul* problem, const kbn_parallel* parallel) {
  const kbn_joint one{1, {problem}};
  return kbn_run_joint(&one, parallel);
}

int kbn_run_joint(const kbn_joint* problem, const kbn_parallel* parallel) {
  const int error = kbn::check_joint(*problem);
  if (error) return error;
  return kbn::run_checked(problem->matmuls[0]->rows == 0, [&](const kbn::Kernels& kernels) {
    kbn::run(*problem, kernels, parallel, {});
  });
}

int kbn_attend(const kbn_attention* problem, const kbn_parallel* parallel) {
  const int error = kbn::check_attention(*problem);
  if (error) return error;
  return kbn::run_checked(problem->batch == 0, [&](const kbn::Kernels& kernels) {
    kbn::run(*problem, kernels, parallel);
  });
}

int kbn_normalize(const kbn_norm* problem, const kbn_parallel* parallel) {
  const int error = kbn::check_norm(*problem);
  if (error) return error;
  return kbn::run_checked(problem->rows == 0, [&](const kbn::Kernels& kernels) {
    kbn::run(*problem, kernels, parallel);
  });
}

int kbn_decode(const kbn_block* block, const kbn_parallel* parallel) {
  const int error = kbn::check_block(*block);
  if (error) return error;
  return kbn::run_checked(block->attention->batch == 0, [&](const kbn::Kernels& kernels) {
    kbn::run(*block, kernels, parallel);
  });
}

int kbn_quantize(const kbn_matmul* problem, int8_t* x_codes, float* x_scales) {
  kbn_matmul p = *problem;
  const uint8_t no_tiles = 0;  // only the activations count
  p.bits = 8, p.offset = 0, p.out_features = 1, p.group_size = 0, p.tiles = &no_tiles;
  p.layout = KBN_TILES;
  int error = kbn::check_weights(p);
  if (!error) error = kbn::check_activations(p);
  kbn::Probe probe;
  probe.quantized = x_codes;
  probe.x_scales = x_scales;
  return error ? error : kbn::run_checked(p, probe);
}

int kbn_accumulate(const kbn_matmul* problem, const int8_t* x_codes, int32_t* sums) {
  kbn::Probe probe;
  probe.x_codes = x_codes;
  probe.sums = sums;
  kbn_matmul p = *problem;
  p.per_tensor = 0, p.activation_bits = 8;
  const int error = kbn::check_weights(p);
  return error ? error : kbn::run_checked(p, probe);
}

int kbn_tiles_from_trits(const uint8_t* packed, int64_t in_features, int64_t out_features,
                         uint8_t* tiles) {
  if (kbn::tiles_from_trits(packed, in_features, out_features, tiles)) return kbn::kOk;
  return kbn::fail(kbn::kInvalid, "A byte of five trits is at most 242, and one is more. The data is "
                   "corrupt or in another format.");
}

const char* kbn_error(int code) { return code == 0 ? "" : kbn::message; }

const char* kbn_isa(void) {
  const kbn::Kernels* kernels = kbn::current_kernels();
  return kernels ? kernels->name : nullptr;
}

const char* kbn_isas(void) { return kbn::available_isas(); }

int kbn_set_isa(const char* name) {
  if (kbn::select_kernels(name)) return 0;
  return kbn::fail(kbn::kNoIsa, "The instruction set must be 'auto' or one of '%s' on this "
                   "machine. Received: '%s'", kbn::available_isas(), name ? name : "");
}

void kbn_set_threads(int count) { kbn::pool_set_threads(count); }
int kbn_threads(void) { return kbn::pool_threads(); }
