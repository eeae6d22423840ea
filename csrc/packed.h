// Packed storage of a symmetric matrix of order n, as kfade_kernels/packed.py defines it: block rows of
// PANEL_ROWS rows, each a dense row-major panel [rows, stop] that ends at its last row's diagonal element.
#pragma once

#include <cstdint>

#ifdef __CUDACC__
#define KFADE_HOST_DEVICE __host__ __device__
#else
#define KFADE_HOST_DEVICE
#endif

namespace kfade {

constexpr std::int64_t PANEL_ROWS = 128;

struct Panel {
  std::int64_t start;   // first row
  std::int64_t stop;    // one past its last row, and the number of columns: the stride of its rows
  std::int64_t offset;  // elements before it in the flat buffer
};

KFADE_HOST_DEVICE constexpr std::int64_t panel_count(std::int64_t order) {
  return (order + PANEL_ROWS - 1) / PANEL_ROWS;
}

KFADE_HOST_DEVICE constexpr Panel panel(std::int64_t order, std::int64_t number) {
  const std::int64_t start = number * PANEL_ROWS;
  const std::int64_t stop = start + PANEL_ROWS < order ? start + PANEL_ROWS : order;
  return {start, stop, PANEL_ROWS * PANEL_ROWS * number * (number + 1) / 2};
}

KFADE_HOST_DEVICE constexpr std::int64_t packed_elements(std::int64_t order) {
  const std::int64_t full = order / PANEL_ROWS, rest = order % PANEL_ROWS;
  return PANEL_ROWS * PANEL_ROWS * full * (full + 1) / 2 + rest * order;
}

}  // namespace kfade
