// What each part of the library adds to the module.
#pragma once

#include <pybind11/pybind11.h>

namespace kfade {

void bind_cpu(pybind11::module_& m);
void bind_cuda(pybind11::module_& m);

}  // namespace kfade
