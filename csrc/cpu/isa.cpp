#include "isa.h"

#include <stdexcept>

#if defined(__x86_64__)
#include <cpuid.h>
#endif

namespace kfade::cpu {

std::vector<const Kernels*> supported() {
  std::vector<const Kernels*> found;
#ifdef KFADE_AVX2
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c")) {
    found.push_back(&avx2_kernels);
  }
#endif
#ifdef KFADE_AVX512
  const bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  if (avx512) found.push_back(&avx512_kernels);
#ifdef KFADE_AVX512_BF16
  if (avx512 && __builtin_cpu_supports("avx512bf16")) found.push_back(&avx512_bf16_kernels);
#endif
#endif
  return found;
}

const Kernels& kernels(const std::string& isa) {
  std::string names;
  for (const Kernels* one : supported()) {
    if (isa == one->name) return *one;
    names += (names.empty() ? "" : ", ") + std::string(one->name);
  }
  throw std::invalid_argument("isa is '" + isa + "'; it must be one of [" + names + "] here");
}

bool has_amx() {
#if defined(__x86_64__)
  unsigned a = 0, b = 0, c = 0, d = 0;
  // Leaf 7 names amx_bf16 in bit 22.
  if (__get_cpuid_count(7, 0, &a, &b, &c, &d)) return (d >> 22 & 1) != 0;
#endif
  return false;
}

}  // namespace kfade::cpu
