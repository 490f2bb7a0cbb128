#include "dispatch.h"

#include <atomic>
#include <cstdlib>
#include <cstring>
#include <string>

#if defined(__x86_64__) || defined(_M_X64)
#define KBN_X86 1
#if defined(_MSC_VER)
#include <intrin.h>
#else
#include <cpuid.h>
#endif
#if defined(KBN_HAVE_AMX)
#include <sys/syscall.h>
#include <unistd.h>
#endif
#elif defined(__aarch64__) && defined(__linux__)
#include <sys/auxv.h>
#endif

namespace kbn {
namespace {

bool always() { return true; }

#if defined(KBN_X86)
struct Registers {
  uint32_t eax, ebx, ecx, edx;
};

Registers cpuid(uint32_t leaf, uint32_t subleaf = 0) {
  Registers r{};
#if defined(_MSC_VER)
  int out[4];
  __cpuidex(out, static_cast<int>(leaf), static_cast<int>(subleaf));
  r = {uint32_t(out[0]), uint32_t(out[1]), uint32_t(out[2]), uint32_t(out[3])};
#else
  if (!__get_cpuid_count(leaf, subleaf, &r.eax, &r.ebx, &r.ecx, &r.edx)) return {};
#endif
  return r;
}

// Register states that the operating system saves (XCR0).
uint64_t saved_states() {
  constexpr uint32_t kOsxsave = 1u << 27;
  if (!(cpuid(1).ecx & kOsxsave)) return 0;
#if defined(_MSC_VER)
  return _xgetbv(0);
#else
  uint32_t low, high;
  __asm__("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
  return (static_cast<uint64_t>(high) << 32) | low;
#endif
}

bool has_all(uint32_t value, uint32_t bits) { return (value & bits) == bits; }

[[maybe_unused]] bool has_avx2() {
  constexpr uint32_t kFma = 1u << 12, kF16c = 1u << 29, kAvx2 = 1u << 5;
  return has_all(static_cast<uint32_t>(saved_states()), 0x06) &&  // xmm, ymm
         has_all(cpuid(1).ecx, kFma | kF16c) && has_all(cpuid(7).ebx, kAvx2);
}

[[maybe_unused]] bool has_avxvnni() {
  constexpr uint32_t kAvxVnni = 1u << 4;
  return has_avx2() && has_all(cpuid(7, 1).eax, kAvxVnni);
}

[[maybe_unused]] bool has_avx512vnni() {
  constexpr uint32_t kF = 1u << 16, kDq = 1u << 17, kBw = 1u << 30, kVl = 1u << 31;
  constexpr uint32_t kVnni = 1u << 11;
  return has_avx2() && has_all(static_cast<uint32_t>(saved_states()), 0xe6) &&  // opmask, zmm
         has_all(cpuid(7).ebx, kF | kDq | kBw | kVl) && has_all(cpuid(7).ecx, kVnni);
}

#if defined(KBN_HAVE_AMX)
bool has_amx() {
  constexpr uint32_t kTile = 1u << 24, kInt8 = 1u << 25;
  constexpr long kRequestPermission = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM
  return has_avx512vnni() && has_all(static_cast<uint32_t>(saved_states()), 0x60000) &&
         has_all(cpuid(7).edx, kTile | kInt8) &&
         syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
}
#endif
#endif

#if defined(__aarch64__)
[[maybe_unused]] bool has_dotprod() {
#if defined(__linux__)
  constexpr unsigned long kAsimdDp = 1ul << 20;  // HWCAP_ASIMDDP
  return (getauxval(AT_HWCAP) & kAsimdDp) != 0;
#else
  return true;  // every Apple and Windows machine of this architecture that we build for
#endif
}
#endif

struct Row {
  const Kernels* kernels;
  bool (*supported)();
};

// Best first. The build defines KBN_HAVE_* for the files that its compiler could make.
constexpr Row kRows[] = {
#if defined(KBN_HAVE_AMX)
    {&kAmx, has_amx},
#endif
#if defined(KBN_HAVE_AVX512VNNI)
    {&kAvx512Vnni, has_avx512vnni},
#endif
#if defined(KBN_HAVE_AVXVNNI)
    {&kAvxVnni, has_avxvnni},
#endif
#if defined(KBN_HAVE_AVX2)
    {&kAvx2, has_avx2},
#endif
#if defined(KBN_HAVE_NEON)
    {&kNeon, has_dotprod},
#endif
    {&kGeneric, always},
};

// Null where no row of that name can run. A name of null, "" or "auto" is the best one.
const Kernels* find(const char* name) {
  const bool best = name == nullptr || *name == '\0' || std::strcmp(name, "auto") == 0;
  for (const Row& row : kRows) {
    if ((best || std::strcmp(name, row.kernels->name) == 0) && row.supported()) return row.kernels;
  }
  return nullptr;
}

std::atomic<const Kernels*>& selected() {
  static std::atomic<const Kernels*> kernels{find(isa_of_environment())};
  return kernels;
}

}  // namespace

const char* isa_of_environment() {
  const char* name = std::getenv("KERAS_BITNET_ISA");
  return name != nullptr ? name : "";
}

const Kernels* current_kernels() { return selected().load(std::memory_order_acquire); }

bool select_kernels(const char* name) {
  const Kernels* kernels = find(name);
  if (kernels == nullptr) return false;
  selected().store(kernels, std::memory_order_release);
  return true;
}

const char* available_isas() {
  static const std::string* names = [] {
    auto* list = new std::string;
    for (const Row& row : kRows) {
      if (!row.supported()) continue;
      if (!list->empty()) *list += ',';
      *list += row.kernels->name;
    }
    return list;
  }();
  return names->c_str();
}

}  // namespace kbn
