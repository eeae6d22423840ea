// What the module exposes of the kernels for processors: checks, and the border to Python.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cmath>

#include "bindings.h"
#include "check.h"
#include "isa.h"
#include "operations.h"
#include "packed.h"
#include "parallel.h"

namespace kfade {
namespace {

using std::int64_t;
using std::uintptr_t;
namespace py = pybind11;

cpu::Element element(const std::string& dtype) {
  if (dtype == "float32") return cpu::Element::f32;
  if (dtype == "bfloat16") return cpu::Element::bf16;
  if (dtype == "float16") return cpu::Element::f16;
  throw std::invalid_argument("dtype is '" + dtype + "'; it must be float32, bfloat16 or float16");
}

// Sizes beyond this are nobody's, and products of two of them still fit 64 bits.
constexpr int64_t MOST = int64_t{1} << 40;

void size(const char* name, int64_t value, int64_t least) {
  require(value >= least && value <= MOST, name, value, least == 0 ? "between 0 and 2^40" : "between 1 and 2^40");
}

// Rows of a tensor: (address, dtype, row stride in elements, columns, whether a column of ones is appended).
using Matrix = std::tuple<uintptr_t, std::string, int64_t, int64_t, bool>;

cpu::Rows rows(const char* name, const Matrix& given, int64_t count) {
  const auto& [data, dtype, stride, width, ones] = given;
  const cpu::Element kind = element(dtype);
  size((std::string(name) + " columns").c_str(), width, 0);
  size((std::string(name) + " row stride").c_str(), stride, 0);
  const uintptr_t alignment = kind == cpu::Element::f32 ? 4 : 2;
  return {address<char>(name, data, count > 0 && width > 0, alignment), kind, stride, width, ones};
}

// (lines, columns)
cpu::Blocks blocks(const cpu::Kernels& isa, const std::tuple<int64_t, int64_t>& given) {
  const auto [lines, columns] = given;
  size("lines", lines, 1);
  size("columns", columns, 1);
  require(columns % isa.lanes == 0, "columns", columns, ("a multiple of " + std::to_string(isa.lanes)).c_str());
  return {lines, columns};
}

void syrk(const std::string& isa, const std::tuple<int64_t, int64_t>& sizes, uintptr_t packed, int64_t order,
          const Matrix& x, int64_t count, uintptr_t mask, double alpha, int threads) {
  const cpu::Kernels& kernels = cpu::kernels(isa);
  const cpu::Blocks tiled = blocks(kernels, sizes);
  size("order", order, 1);
  size("count", count, 0);
  require(threads >= 1, "threads", threads, "at least 1");
  const cpu::Rows given = rows("x", x, count);
  require(given.columns() == order, "x columns", given.columns(), "order");
  if (!std::isfinite(alpha)) throw std::invalid_argument("alpha is " + std::to_string(alpha) + "; it must be finite");
  float* target = address<float>("packed", packed);
  const auto* keep = address<std::uint8_t>("mask", mask, false);
  py::gil_scoped_release release;
  cpu::syrk(kernels, tiled, target, given, count, keep, static_cast<float>(alpha), threads);
}

void squares(const std::string& isa, const std::tuple<int64_t, int64_t>& sizes, uintptr_t out, int64_t out_stride,
             const Matrix& left, const Matrix& right, const std::vector<int64_t>& offsets, uintptr_t mask,
             int threads) {
  const cpu::Kernels& kernels = cpu::kernels(isa);
  const cpu::Blocks tiled = blocks(kernels, sizes);
  require(!offsets.empty(), "offsets length", 0, "at least 1");
  require(offsets[0] == 0, "offsets[0]", offsets[0], "0");
  for (std::size_t s = 1; s < offsets.size(); ++s) {
    require(offsets[s] >= offsets[s - 1], "an entry of offsets", offsets[s], "at least the one before it");
  }
  size("the last of offsets", offsets.back(), 0);
  require(threads >= 1, "threads", threads, "at least 1");
  const cpu::Rows l = rows("left", left, offsets.back()), r = rows("right", right, offsets.back());
  size("out stride", out_stride, 1);
  require(out_stride >= r.columns(), "out stride", out_stride, "at least the columns of right");
  float* target = address<float>("out", out, l.columns() > 0 && r.columns() > 0);
  const auto* keep = address<std::uint8_t>("mask", mask, false);
  py::gil_scoped_release release;
  cpu::squares(kernels, tiled, target, out_stride, l, r, offsets, keep, threads);
}

std::vector<std::string> isas() {
  std::vector<std::string> names;
  for (const cpu::Kernels* one : cpu::supported()) names.emplace_back(one->name);
  return names;
}

}  // namespace

void bind_cpu(py::module_& m) {
  m.def("packed_elements", &packed_elements, py::arg("order"));
  m.def("isas", &isas);
  m.def("has_amx", &cpu::has_amx);
  m.def("parallel_runtime", &cpu::parallel_runtime);
  m.def("syrk", &syrk, py::arg("isa"), py::arg("blocks"), py::arg("packed"), py::arg("order"), py::arg("x"),
        py::arg("count"), py::arg("mask"), py::arg("alpha"), py::arg("threads"));
  m.def("squares", &squares, py::arg("isa"), py::arg("blocks"), py::arg("out"), py::arg("out_stride"),
        py::arg("left"), py::arg("right"), py::arg("offsets"), py::arg("mask"), py::arg("threads"));
}

}  // namespace kfade
