// The module kfade_kernels._C: plain functions on addresses (integers), sizes, strides and a stream.
#include <pybind11/pybind11.h>

#include "bindings.h"

PYBIND11_MODULE(_C, m) {
  m.doc() = "Native kernels of kfade_kernels; called by its backends alone.";
  kfade::bind_cpu(m);
#ifdef KFADE_CUDA_VERSION
  m.attr("cuda_version") = KFADE_CUDA_VERSION;
  kfade::bind_cuda(m);
#else
  m.attr("cuda_version") = pybind11::none();
#endif
}
