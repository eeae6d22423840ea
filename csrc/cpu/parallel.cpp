#include "parallel.h"

#include <dlfcn.h>

#include <algorithm>
#include <atomic>

namespace kfade::cpu {
namespace {

using GompParallel = void (*)(void (*)(void*), void*, unsigned, unsigned);

// A second OpenMP runtime would bring threads that spin against the first one's, so this module is linked with none.
// GCC's entry point is in the runtimes of GCC, Intel and LLVM; asked of the library that PyTorch's operators are in, it
// is that of the runtime which this library is linked with.
GompParallel find_runtime() {
  void* torch = dlopen("libtorch_cpu.so", RTLD_NOLOAD | RTLD_LAZY);
  if (torch == nullptr) return nullptr;
  auto found = reinterpret_cast<GompParallel>(dlsym(torch, "GOMP_parallel"));
  dlclose(torch);
  return found;
}

GompParallel runtime() {
  static const GompParallel found = find_runtime();
  return found;
}

struct Work {
  std::atomic<std::int64_t> next;
  std::int64_t count;
  void (*task)(void*, std::int64_t);
  void* context;
};

void take(void* data) {
  Work& work = *static_cast<Work*>(data);
  for (std::int64_t i = work.next++; i < work.count; i = work.next++) work.task(work.context, i);
}

}  // namespace

void parallel(std::int64_t count, int threads, void (*task)(void*, std::int64_t), void* context) {
  Work work{{0}, count, task, context};
  const std::int64_t used = std::min<std::int64_t>(threads, count);
  if (used > 1 && runtime() != nullptr) {
    runtime()(&take, &work, static_cast<unsigned>(used), 0);
  } else {
    take(&work);
  }
}

const char* parallel_runtime() {
  Dl_info info;
  if (runtime() == nullptr || dladdr(reinterpret_cast<void*>(runtime()), &info) == 0) return nullptr;
  return info.dli_fname;
}

}  // namespace kfade::cpu
