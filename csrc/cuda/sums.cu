// The kernels that follow the products.
#include "sums.h"

#include "launch.h"

namespace kfade::cuda {

#ifdef __CUDACC__

__global__ void __launch_bounds__(kSumThreads) ordered_sum_kernel(const __grid_constant__ Launch launch, Shape shape) {
  ordered_sum(launch, shape);
}
template <class Element>
__global__ void __launch_bounds__(kSumThreads) column_sums_kernel(const __grid_constant__ Launch launch) {
  column_sums<Element>(launch);
}
__global__ void __launch_bounds__(kSumThreads) add_column_sums_kernel(const __grid_constant__ Launch launch) {
  add_column_sums(launch);
}

void launch_ordered_sum(const Launch& launch, Shape shape, int tiles, void* stream) {
  start(ordered_sum_kernel, "ordered_sum_kernel", tiles * (shape.rows / kStrip), 1, kSumThreads, 0, stream, launch,
        shape);
}

void launch_column_sums(Type type, const Launch& launch, int add_blocks, void* stream) {
  auto* sums = type == Type::bf16 ? column_sums_kernel<Bf16> : column_sums_kernel<Fp16>;
  start(sums, "column_sums_kernel", static_cast<int>(launch.items), 1, kSumThreads, kSumShared, stream, launch);
  start(add_column_sums_kernel, "add_column_sums_kernel", add_blocks, 1, kSumThreads, 0, stream, launch);
}

#else

void launch_ordered_sum(const Launch& launch, Shape shape, int tiles, void*) {
  emulation::launch(tiles * (shape.rows / kStrip), 1, kSumThreads, 0, [=] { ordered_sum(launch, shape); });
}

void launch_column_sums(Type type, const Launch& launch, int add_blocks, void*) {
  emulation::launch(static_cast<int>(launch.items), 1, kSumThreads, kSumShared, [=] {
    if (type == Type::bf16) {
      column_sums<Bf16>(launch);
    } else {
      column_sums<Fp16>(launch);
    }
  });
  emulation::launch(add_blocks, 1, kSumThreads, 0, [=] { add_column_sums(launch); });
}

#endif

}  // namespace kfade::cuda
