// What the module exposes of the CUDA kernels. It loads without a driver: nothing here is called on import.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <stdexcept>
#include <string>

#include "bindings.h"
#include "check.h"
#include "kernels.h"
#include "table.h"

namespace py = pybind11;

namespace kfade {
namespace {

using namespace cuda;

Kernel kernel_of(const std::string& name) {
  if (name == "hopper") return Kernel::hopper;
  if (name == "ampere") return Kernel::ampere;
  throw std::invalid_argument("kernel is '" + name + "'; it must be hopper or ampere");
}

Type type_of(const std::string& name) {
  if (name == "bfloat16") return Type::bf16;
  if (name == "float16") return Type::fp16;
  throw std::invalid_argument("dtype is '" + name + "'; it must be bfloat16 or float16");
}

py::tuple given(const Table& table) {
  const char* data = reinterpret_cast<const char*>(table.problems.data());
  return py::make_tuple(py::bytes(data, table.problems.size() * sizeof(Problem)), table.items, table.partial_tiles,
                        table.split_tiles);
}

py::dict described(const Facts& f) {
  py::dict d;
  d["rows"] = f.shape.rows;
  d["columns"] = f.shape.columns;
  d["depth"] = f.depth;
  d["stages"] = f.stages;
  d["cluster"] = f.cluster;
  d["threads"] = f.threads;
  d["shared"] = f.shared;
  d["programs"] = f.programs;
  return d;
}

std::vector<OuterProduct> outer_products(const std::vector<std::array<int64_t, 8>>& rows) {
  std::vector<OuterProduct> products;
  for (const auto& r : rows) {
    products.push_back({static_cast<uintptr_t>(r[0]), static_cast<uintptr_t>(r[1]), static_cast<uintptr_t>(r[2]), r[3],
                        r[4], r[5], r[6], r[7]});
  }
  return products;
}

Launch launch_of(uintptr_t table, int64_t items, uintptr_t partials, float alpha, int flush, bool masked, int group) {
  require(items >= 1, "items", items, "at least 1");
  require(group >= 1, "group", group, "at least 1");
  require(flush >= 64 && flush % 64 == 0, "flush", flush, "a multiple of 64");
  return {address<const Problem>("table", table), items, address<float>("partials", partials, false, 16), alpha,
          flush, masked, group};
}

using Products = void (*)(Kernel, Type, const Launch&, int, void*);

template <Products Run, Facts (*Of)(Kernel)>
void products(const std::string& kernel, const std::string& dtype, uintptr_t table, int64_t items, uintptr_t partials,
              float alpha, int flush, bool masked, int group, int blocks, uintptr_t stream) {
  const Facts facts = Of(kernel_of(kernel));
  require(blocks >= 1 && blocks % facts.cluster == 0, "blocks", blocks, "whole clusters");
  const Launch launch = launch_of(table, items, partials, alpha, flush, masked, group);
  Run(kernel_of(kernel), type_of(dtype), launch, blocks, reinterpret_cast<void*>(stream));
}

}  // namespace

void bind_cuda(py::module_& m) {
  m.def("cuda_refusal", [] { return std::string(refusal()); });
  m.def("cuda_outer_facts", [](const std::string& kernel) { return described(outer_facts(kernel_of(kernel))); });
  m.def("cuda_squares_facts", [](const std::string& kernel) { return described(squares_facts(kernel_of(kernel))); });
  m.def(
      "cuda_outer_table",
      [](const std::string& kernel, const std::string& dtype, const std::vector<std::array<int64_t, 8>>& rows) {
        return given(outer_table(outer_products(rows), type_of(dtype), kernel_of(kernel)));
      },
      "Rows of x, packed, mask, rows, width, order, stride, part; gives bytes, items, partial tiles, tiles in parts.");
  m.def("cuda_column_table", [](const std::vector<std::array<int64_t, 8>>& rows) {
    return given(column_table(outer_products(rows)));
  });
  m.def(
      "cuda_squares_table",
      [](const std::string& kernel, const std::string& dtype, uintptr_t left, uintptr_t right, uintptr_t out,
         uintptr_t mask, uintptr_t sequences, int64_t left_stride, int64_t right_stride, int64_t left_batch,
         int64_t right_batch, int64_t out_stride, int64_t rows, int64_t columns, int64_t tokens, int64_t batch,
         int64_t part) {
        return given(squares_table({left, right, out, mask, sequences, left_stride, right_stride, left_batch,
                                    right_batch, out_stride, rows, columns, tokens, batch, part},
                                   type_of(dtype), kernel_of(kernel)));
      },
      py::kw_only{}, py::arg("kernel"), py::arg("dtype"), py::arg("left"), py::arg("right"), py::arg("out"),
      py::arg("mask"), py::arg("sequences"), py::arg("left_stride"), py::arg("right_stride"), py::arg("left_batch"),
      py::arg("right_batch"), py::arg("out_stride"), py::arg("rows"), py::arg("columns"), py::arg("tokens"),
      py::arg("batch"), py::arg("part"));
  const auto define = [&m](const char* name, auto function) {
    m.def(name, function, py::arg("kernel"), py::arg("dtype"), py::arg("table"), py::arg("items"), py::arg("partials"),
          py::arg("alpha"), py::arg("flush"), py::arg("masked"), py::arg("group"), py::arg("blocks"),
          py::arg("stream"));
  };
  define("cuda_outer", &products<&launch_outer, &outer_facts>);
  define("cuda_squares", &products<&launch_squares, &squares_facts>);
  m.def("cuda_ordered_sum", [](const std::string& operation, const std::string& kernel, uintptr_t table, int tiles,
                               uintptr_t partials, float alpha, int group, uintptr_t stream) {
    if (operation != "outer" && operation != "squares") {
      throw std::invalid_argument("operation is '" + operation + "'; it must be outer or squares");
    }
    const Facts facts = operation == "outer" ? outer_facts(kernel_of(kernel)) : squares_facts(kernel_of(kernel));
    const Launch launch = launch_of(table, 1, partials, alpha, 64, false, group);
    require(tiles >= 1, "tiles", tiles, "at least 1");
    launch_ordered_sum(launch, {facts.shape.rows, facts.shape.columns, group}, tiles, reinterpret_cast<void*>(stream));
  });
  m.def("cuda_column_sums", [](const std::string& dtype, uintptr_t table, int64_t items, int blocks, uintptr_t sums,
                               float alpha, uintptr_t stream) {
    const Launch launch = launch_of(table, items, sums, alpha, 64, false, 1);
    require(blocks >= 1, "blocks", blocks, "at least 1");
    launch_column_sums(type_of(dtype), launch, blocks, reinterpret_cast<void*>(stream));
  });
}

}  // namespace kfade
