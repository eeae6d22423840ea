// What the module exposes of the CUDA kernels. It loads without a driver: nothing here is called on import.
#include <cuda_runtime_api.h>
#include <pybind11/pybind11.h>

#include <string>

#include "bindings.h"

namespace kfade {
namespace {

// Why no CUDA function can run in this process, or an empty text.
std::string cuda_refusal() {
  int count = 0;
  const cudaError_t error = cudaGetDeviceCount(&count);
  if (error != cudaSuccess) {
    cudaGetLastError();
    return cudaGetErrorString(error);
  }
  return count == 0 ? "there is no CUDA device" : "";
}

}  // namespace

void bind_cuda(pybind11::module_& m) { m.def("cuda_refusal", &cuda_refusal); }

}  // namespace kfade
