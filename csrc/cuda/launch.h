// Launches, and the instantiations of a kernel template: what outer.cu and squares.cu have in common.
#pragma once

#include "ampere.h"
#include "hopper.h"
#include "kernels.h"

#ifdef __CUDACC__
#include <cuda_runtime_api.h>

#include <stdexcept>
#include <string>
#endif

namespace kfade::cuda {

#ifdef __CUDACC__

inline void require_success(cudaError_t error, const char* what) {
  if (error == cudaSuccess) return;
  cudaGetLastError();
  throw std::runtime_error(std::string(what) + ": " + cudaGetErrorString(error));
}

template <class... Arguments>
void start(void (*kernel)(Arguments...), const char* name, int blocks, int cluster, int threads, int shared,
           void* stream, const Arguments&... arguments) {
  require_success(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared), name);
  cudaLaunchAttribute attribute{};
  attribute.id = cudaLaunchAttributeClusterDimension;
  attribute.val.clusterDim.x = static_cast<unsigned>(cluster);
  attribute.val.clusterDim.y = attribute.val.clusterDim.z = 1;
  cudaLaunchConfig_t configuration{};
  configuration.gridDim = dim3(static_cast<unsigned>(blocks));
  configuration.blockDim = dim3(static_cast<unsigned>(threads));
  configuration.dynamicSmemBytes = static_cast<size_t>(shared);
  configuration.stream = static_cast<cudaStream_t>(stream);
  configuration.attrs = &attribute;
  configuration.numAttrs = cluster > 1 ? 1 : 0;
  require_success(cudaLaunchKernelEx(&configuration, kernel, arguments...), name);
}

template <class Op, class Element>
__global__ void __launch_bounds__(Hopper<Op>::kThreads, 1) hopper_kernel(const __grid_constant__ Launch launch) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  hopper<Op, Element>(launch);
#endif
}

template <class Op, class Element>
__global__ void __launch_bounds__(Ampere<Op>::kThreads, Ampere<Op>::kPrograms)
    ampere_kernel(const __grid_constant__ Launch launch) {
  ampere<Op, Element>(launch);
}

template <class Op, class Element>
void start_products(Kernel kernel, const Launch& launch, int blocks, void* stream) {
  using H = Hopper<Op>;
  using A = Ampere<Op>;
  if (kernel == Kernel::hopper) {
    start(hopper_kernel<Op, Element>, "hopper_kernel", blocks, H::kCluster, H::kThreads, H::kShared, stream, launch);
  } else {
    start(ampere_kernel<Op, Element>, "ampere_kernel", blocks, A::kCluster, A::kThreads, A::kShared, stream, launch);
  }
}

#else

template <class Op, class Element>
void start_products(Kernel kernel, const Launch& launch, int blocks, void*) {
  using H = Hopper<Op>;
  using A = Ampere<Op>;
  if (kernel == Kernel::hopper) {
    emulation::launch(blocks, H::kCluster, H::kThreads, H::kShared, [launch] { hopper<Op, Element>(launch); });
  } else {
    emulation::launch(blocks, A::kCluster, A::kThreads, A::kShared, [launch] { ampere<Op, Element>(launch); });
  }
}

#endif

template <class Op>
void start_products(Kernel kernel, Type type, const Launch& launch, int blocks, void* stream) {
  if (type == Type::bf16) {
    start_products<Op, Bf16>(kernel, launch, blocks, stream);
  } else {
    start_products<Op, Fp16>(kernel, launch, blocks, stream);
  }
}

template <class Op>
Facts facts(Kernel kernel) {
  using H = Hopper<Op>;
  using A = Ampere<Op>;
  if (kernel == Kernel::hopper) {
    return {H::shape(1), kBoxDepth, H::kStages, H::kCluster, H::kThreads, H::kShared, H::kPrograms};
  }
  return {A::shape(1), A::kDepth, A::kStages, A::kCluster, A::kThreads, A::kShared, A::kPrograms};
}

}  // namespace kfade::cuda
