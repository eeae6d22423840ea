// `packed += alpha · xᵀ diag(mask) x`.
#include <algorithm>

#include "operations.h"
#include "packed.h"
#include "panels.h"

namespace kfade::cpu {
void syrk(const Kernels& isa, const Blocks& blocks, float* packed, const Rows& x, std::int64_t count,
          const std::uint8_t* mask, float alpha, int threads) {
  const bool in_pairs = x.element == Element::bf16 && isa.pairs.add != nullptr;
  const Products& products = in_pairs ? isa.pairs : isa.floats;
  std::vector<std::int64_t> kept;
  kept.reserve(count);
  for (std::int64_t i = 0; i < count; ++i) {
    if (mask == nullptr || mask[i]) kept.push_back(i);
  }
  if (kept.empty()) return;

  const std::int64_t order = x.columns(), rows = static_cast<std::int64_t>(kept.size());
  const std::int64_t chunk = std::min(blocks.lines, ceil_div(rows, products.rows_a_line)) * products.rows_a_line;

  // Last block rows first: they are the longest, and short tiles are left for the end.
  std::vector<Tile> tiles;
  for (std::int64_t i = panel_count(order); i-- > 0;) {
    const Panel p = panel(order, i);
    for (std::int64_t column = 0; column < p.stop; column += blocks.columns) {
      tiles.push_back({nullptr, nullptr, 0, nullptr, 1, p.start, p.stop, column, std::min(column + blocks.columns, p.stop),
                       packed + p.offset, p.stop, alpha, true});
    }
  }

  const Panels panels(x, isa.lanes, chunk / products.rows_a_line);
  for (std::int64_t first = 0; first < rows; first += chunk) {
    const std::int64_t some = std::min(chunk, rows - first);
    const Segment segment{0, ceil_div(some, products.rows_a_line)};
    parallel_for(panels.strips(), threads,
                 [&](std::int64_t strip) { panels.pack(products, strip, kept.data() + first, some, 0); });
    parallel_for(static_cast<std::int64_t>(tiles.size()), threads, [&](std::int64_t i) {
      Tile tile = tiles[i];
      tile.a = tile.b = panels.data();
      tile.panel_stride = panels.stride();
      tile.segments = &segment;
      products.add(tile);
    });
  }
}

}  // namespace kfade::cpu
