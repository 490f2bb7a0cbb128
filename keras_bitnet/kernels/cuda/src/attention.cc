// Sizes and launches the kernels of attention.cuh and attention_many.cuh.
#include <string>

#include "launch.h"

namespace {

using namespace launcher;

constexpr int kWarps = 8, kQueryHeads = 4, kMostHeadDim = 256;  // as in attention.cuh
constexpr int64_t kTokensOfBlock = 64;  // for fewer, another block does not pay
constexpr unsigned kMostBlocks = 8;     // of a cluster, on every GPU that has them

const char* check(const kbc_attention& p) {
  if (p.dtype < 0 || p.dtype > 2 || p.cache_dtype < 0 || p.cache_dtype > 3) return "a dtype is out of range";
  if (p.batch < 0 || p.length < 1 || p.heads < 1 || p.key_heads < 1) return "a size is out of range";
  if (p.tokens < 0 || p.tokens > p.length) return "tokens must be at most length";
  if (p.batch > 65535 || p.heads > 65535 || p.length > INT32_MAX / kMostHeadDim) return "a size is too large";
  if (p.heads % p.key_heads) return "heads must be a multiple of key_heads";
  if (p.head_dim < 4 || p.head_dim % 4 || p.head_dim > kMostHeadDim)
    return "head_dim must be a multiple of 4, at most 256";
  if ((p.tables != 1 && p.tables != p.batch) || (p.masks != 1 && p.masks != p.batch))
    return "tables and masks must be 1 or batch";
  if ((p.cosines == nullptr) != (p.sines == nullptr)) return "cosines and sines come together";
  if ((p.cache_dtype == 3) != (p.key_scale && p.value_scale)) return "scales are those of an int8 cache";
  if (!aligned(p.key_cache, 16) || !aligned(p.value_cache, 16)) return "a cache must lie at a multiple of 16 bytes";
  if (!aligned(p.y, 8)) return "y must lie at a multiple of 8 bytes";
  return nullptr;
}

Attention parameters(const kbc_attention& p) {
  Attention a{};
  a.query = p.query;
  a.key = p.key;
  a.value = p.value;
  a.cosines = static_cast<const float*>(p.cosines);
  a.sines = static_cast<const float*>(p.sines);
  a.mask = static_cast<const unsigned char*>(p.mask);
  a.index = static_cast<const int*>(p.index);
  a.key_cache = p.key_cache;
  a.value_cache = p.value_cache;
  a.key_scale = static_cast<float*>(p.key_scale);
  a.value_scale = static_cast<float*>(p.value_scale);
  a.y = p.y;
  a.heads = p.heads;
  a.key_heads = p.key_heads;
  a.head_dim = p.head_dim;
  a.length = static_cast<int>(p.length);
  a.tokens = static_cast<int>(p.tokens);
  a.dtype = p.dtype;
  a.table_step = p.tables > 1 ? a.tokens * p.head_dim : 0;
  a.mask_step = p.masks > 1 ? static_cast<int64_t>(a.tokens) * a.length : 0;
  a.scale = p.scale;
  return a;
}

constexpr const char* kCacheDtypes[] = {"f32", "bf16", "f16", "i8"};

// One new token.
const char* run_next(Device& device, const kbc_attention& p, void* stream) {
  const Attention a = parameters(p);
  const int groups = p.heads / p.key_heads;
  const unsigned rows = static_cast<unsigned>(p.key_heads * ((groups + kQueryHeads - 1) / kQueryHeads));
  // How many tokens there are only the GPU knows. Share them among blocks while there are idle ones.
  unsigned cluster = 1;
  if (device.capability >= 90)
    while (cluster < kMostBlocks && cluster * rows * p.batch < static_cast<unsigned>(device.multiprocessors) &&
           cluster * kTokensOfBlock < p.length)
      cluster *= 2;
  const std::string name =
      std::string(p.head_dim <= 128 ? "attention_128_" : "attention_256_") + kCacheDtypes[p.cache_dtype];
  // Rows of a head: queries, the new key and value, sums of the warps and of the blocks.
  const unsigned shared_rows = kQueryHeads + 2 + (kWarps + cluster) * kQueryHeads;
  const unsigned shared = shared_rows * (p.head_dim <= 128 ? 128 : 256) * sizeof(float);
  Launch l{name.c_str(), cluster, rows, 32 * kWarps, shared, true};
  l.grid_z = static_cast<unsigned>(p.batch);
  l.cluster = cluster;
  return launch(device, -1, l, &a, stream);
}

// Several: the rows of the cache are written before they are read.
const char* run_many(Device& device, const kbc_attention& p, void* stream) {
  const Attention a = parameters(p);
  const std::string dtype = kCacheDtypes[p.cache_dtype];
  const std::string write = "write_rows_" + dtype;
  Launch first{write.c_str(), static_cast<unsigned>(p.tokens), static_cast<unsigned>(p.key_heads), 64, 0, true};
  first.grid_z = static_cast<unsigned>(p.batch);
  if (const char* wrong = launch(device, -1, first, &a, stream)) return wrong;
  // As in attention_many.cuh.
  const int head = p.head_dim <= 64 ? 64 : p.head_dim <= 128 ? 128 : 256;
  const unsigned warps = head <= 128 ? 4 : 2, keys = head <= 128 ? 32 : 16, queries = 16 * warps;
  const unsigned shared = (queries + 2 * keys) * 2 * (head + 8) * 2;  // large and small parts of float16
  const std::string attend = "attend_many_" + std::to_string(head) + "_" + dtype;
  Launch second{attend.c_str(), static_cast<unsigned>(p.heads), static_cast<unsigned>((p.tokens + queries - 1) / queries),
                32 * warps, shared, true};
  second.grid_z = static_cast<unsigned>(p.batch);
  return launch(device, -1, second, &a, stream);
}

}  // namespace

const char* kbc_run_attention(const kbc_attention* problem, int device, void* stream) {
  if (const char* wrong = check(*problem)) return wrong;
  if (problem->batch == 0 || problem->tokens == 0) return nullptr;
  return on_device(device, [&](Device& d) {
    return problem->tokens == 1 ? run_next(d, *problem, stream) : run_many(d, *problem, stream);
  });
}
