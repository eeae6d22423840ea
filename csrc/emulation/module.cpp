// The CUDA kernels on a CPU, as a module for tests that answers like the CUDA part of kfade_kernels._C: the sources of
// csrc/cuda as they are, compiled as one unit of C++ whose instructions come from machine.h.
#include <pybind11/pybind11.h>

#include "bindings.h"
#include "cuda/bind.cpp"
#include "cuda/outer.cu"
#include "cuda/squares.cu"
#include "cuda/sums.cu"
#include "cuda/table.cpp"

namespace kfade::cuda {

const char* refusal() { return ""; }

void encode_map(TensorMap& map, Type, const void* at, int columns, int rows, int sequences, int64_t row_stride,
                int64_t sequence_stride) {
  const auto unsigned_of = [](int64_t x) { return static_cast<uint64_t>(x); };
  const emulation::Map m{static_cast<const unsigned char*>(at), unsigned_of(columns), unsigned_of(rows),
                         unsigned_of(sequences), unsigned_of(2 * row_stride), unsigned_of(2 * sequence_stride),
                         emulation::kMagic};
  static_assert(sizeof m <= sizeof map);
  std::memcpy(&map, &m, sizeof m);
}

// How often each element of a packed triangle is written by the tiles of one outer product.
std::vector<int> writes(const std::string& kernel, int width, int order, int group) {
  const Facts facts = outer_facts(kernel_of(kernel));
  const Shape shape{facts.shape.rows, facts.shape.columns, group};
  std::vector<float> out(static_cast<size_t>(packed_elements(order)));
  std::vector<int> counts(out.size());
  Problem p{};
  p.m = p.n = width;
  p.order = order;
  p.splits = 1;
  p.out = out.data();
  const Launch launch{&p, tiles_of(p, shape), nullptr, 1.0f, 64, 0, group};
  for (int64_t number = 0; number < launch.items; ++number) {
    const Item item = locate(p, shape, number);
    for (int rank = 0; rank < facts.cluster; ++rank) {
      const int row = item.row + rank * kTileRows;
      if (row >= p.m) continue;
      const Target to = target_of(p, launch, shape, item, row, false);
      for (int r = 0; r < least(kTileRows, to.rows); ++r) {
        for (int c = 0; c < least(shape.columns, to.columns); ++c) ++counts.at(to.at + r * to.stride + c - out.data());
      }
    }
  }
  return counts;
}

std::pair<int, int> pair_of(Place at) { return {at.row, at.column}; }

}  // namespace kfade::cuda

PYBIND11_MODULE(emulated, m) {
  using namespace kfade::cuda;
  kfade::bind_cuda(m);
  m.attr("cuda_version") = "emulated";
  // Another order in which threads and copies take turns.
  m.def("seed", [](unsigned seed) { emulation::seed = seed; });
  m.def("writes", &writes);
  m.def("triangular_tile", [](int t, int side, int group) { return pair_of(triangular_tile(t, side, group)); });
  m.def("rectangular_tile", [](int t, int m, int n, int group) { return pair_of(rectangular_tile(t, m, n, group)); });
  m.def("fragment", [](int lane) { return pair_of(fragment(lane)); });
  m.def("swizzle", &swizzle_128);
  m.def("descriptor", [](uint32_t address, int step) { return descriptor(address) + step * kDescriptorStep; });
  m.def("piece_offset", &piece_offset);
}
