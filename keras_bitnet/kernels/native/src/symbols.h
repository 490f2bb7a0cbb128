// Finds a framework's C functions in the process that loaded it: no link, no headers.
#pragma once
#include <dlfcn.h>
#include <string.h>

#include <string>
#if defined(__linux__)
#include <link.h>
#elif defined(__APPLE__)
#include <mach-o/dyld.h>
#endif

namespace kbn_symbols {

// Path of the loaded library whose file name starts with `stem`, or empty.
inline std::string loaded_path(const char* stem) {
  struct Search {
    const char* stem;
    std::string path;

    bool take(const char* candidate) {
      if (!candidate) return false;
      const char* slash = strrchr(candidate, '/');
      if (strncmp(slash ? slash + 1 : candidate, stem, strlen(stem)) != 0) return false;
      path = candidate;
      return true;
    }
  } search{stem, {}};
#if defined(__linux__)
  auto visit = [](dl_phdr_info* info, size_t, void* data) -> int {
    return static_cast<Search*>(data)->take(info->dlpi_name);
  };
  dl_iterate_phdr(visit, &search);
#elif defined(__APPLE__)
  for (uint32_t i = 0; i < _dyld_image_count() && !search.take(_dyld_get_image_name(i)); ++i) {
  }
#endif
  return search.path;
}

// A handle for `dlsym` on that library, or null. It is never loaded anew: a second copy of a
// framework in one process would be a disaster.
inline void* loaded(const char* stem) {
  const std::string path = loaded_path(stem);
  return path.empty() ? nullptr : dlopen(path.c_str(), RTLD_LAZY | RTLD_NOLOAD);
}

}  // namespace kbn_symbols
