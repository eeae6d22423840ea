// Threads: those that PyTorch has already.
#pragma once

#include <cstdint>

namespace kfade::cpu {

// Runs task(context, i) for i in 0 … count, on up to `threads` threads of the OpenMP runtime that PyTorch is linked
// with; one after the other where there is none. Tasks are taken in order, by whichever thread is free, and must not
// throw.
void parallel(std::int64_t count, int threads, void (*task)(void*, std::int64_t), void* context);

template <class F>
void parallel_for(std::int64_t count, int threads, F&& task) {
  parallel(count, threads, [](void* f, std::int64_t i) { (*static_cast<F*>(f))(i); }, &task);
}

// Where the runtime was found, or nullptr.
const char* parallel_runtime();

}  // namespace kfade::cpu
