// `out += Σ_s (left_sᵀ right_s)∘²`: a sequence's product is squared in registers.
#include <algorithm>

#include "operations.h"
#include "panels.h"

namespace kfade::cpu {
namespace {

constexpr std::int64_t TILE_ROWS = 128;

struct Sequence {
  std::int64_t first, count;  // among the rows that are kept
  Segment segment;            // in its chunk
};

}  // namespace

void squares(const Kernels& isa, const Blocks& blocks, float* out, std::int64_t out_stride, const Rows& left,
             const Rows& right, const std::vector<std::int64_t>& offsets, const std::uint8_t* mask, int threads) {
  const bool in_pairs = left.element == Element::bf16 && right.element == Element::bf16 && isa.pairs.square != nullptr;
  const Products& products = in_pairs ? isa.pairs : isa.floats;

  // A sequence without rows adds nothing, and is in no chunk.
  std::vector<std::int64_t> kept;
  std::vector<std::vector<Sequence>> chunks;
  std::int64_t lines = 0, most = 0;
  for (std::size_t s = 0; s + 1 < offsets.size(); ++s) {
    const std::int64_t first = static_cast<std::int64_t>(kept.size());
    for (std::int64_t i = offsets[s]; i < offsets[s + 1]; ++i) {
      if (mask == nullptr || mask[i]) kept.push_back(i);
    }
    const std::int64_t count = static_cast<std::int64_t>(kept.size()) - first;
    if (count == 0) continue;
    const std::int64_t needed = ceil_div(count, products.rows_a_line);
    if (chunks.empty() || lines + needed > blocks.lines) {
      chunks.emplace_back();
      lines = 0;
    }
    chunks.back().push_back({first, count, {lines, needed}});
    lines += needed;
    most = std::max(most, lines);
  }
  if (chunks.empty()) return;

  // A block of the result stays in L1 for all sequences of a chunk.
  const std::int64_t rows = left.columns(), columns = right.columns(), width = blocks.columns;
  const std::int64_t across = ceil_div(columns, width), tiles = ceil_div(rows, TILE_ROWS) * across;
  const Panels a(left, isa.lanes, most), b(right, isa.lanes, most);
  for (const std::vector<Sequence>& chunk : chunks) {
    std::vector<Segment> segments;
    for (const Sequence& sequence : chunk) segments.push_back(sequence.segment);
    parallel_for(a.strips() + b.strips(), threads, [&](std::int64_t i) {
      const bool is_left = i < a.strips();
      for (const Sequence& s : chunk) {
        (is_left ? a : b).pack(products, is_left ? i : i - a.strips(), kept.data() + s.first, s.count, s.segment.begin);
      }
    });
    parallel_for(tiles, threads, [&](std::int64_t i) {
      const std::int64_t row = i / across * TILE_ROWS, column = i % across * width;
      products.square({a.data(), b.data(), a.stride(), segments.data(), static_cast<std::int64_t>(segments.size()), row,
                       std::min(row + TILE_ROWS, rows), column, std::min(column + width, columns), out + row * out_stride,
                       out_stride, 1.0f, false});
    });
  }
}

}  // namespace kfade::cpu
