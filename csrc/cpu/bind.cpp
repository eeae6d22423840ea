// What the module exposes of the kernels for processors.
#include <pybind11/pybind11.h>

#include "bindings.h"
#include "packed.h"

namespace kfade {

void bind_cpu(pybind11::module_& m) { m.def("packed_elements", &packed_elements, pybind11::arg("order")); }

}  // namespace kfade
