// What follows the products: the ordered sum of parts, and the column sums that a bias adds to a triangle.
#pragma once

#include "epilogue.h"
#include "kernels.h"

namespace kfade::cuda {

// Block i adds up kStrip rows of one tile that came in parts, first part to last, and adds them to the result.
constexpr int kStrip = 16;

KFADE_DEVICE void ordered_sum(const Launch& launch, Shape shape) {
  const int strips = shape.rows / kStrip;
  const int number = block_index() / strips, strip = block_index() % strips * kStrip;
  const Problem* p = launch.problems;
  int64_t start = 0;
  while (p->split_end <= number) start = (p++)->split_end;
  const Item item = locate(*p, shape, number - start);
  const int row = item.row + strip, base = row / kTileRows * kTileRows;
  if (row >= p->m) return;
  const Target to = result_of(*p, launch, item, base);
  const int pieces = shape.columns / 4;
  for (int i = thread_index(); i < kStrip * pieces; i += kSumThreads) {
    const int r = row - base + i / pieces, c = i % pieces * 4;
    if (r >= to.rows || c >= to.columns) continue;
    Four sum{0.0f, 0.0f, 0.0f, 0.0f};
    for (int part = 0; part < p->splits; ++part) {
      const Target from = part_of(*p, launch, shape, item, part, base, false);
      const Four x = load_four(from.at + r * from.stride + c, true);
      sum = {sum.x + x.x, sum.y + x.y, sum.z + x.z, sum.w + x.w};
    }
    write_element(to, r, c, sum.x);
    write_element(to, r, c + 1, sum.y);
    write_element(to, r, c + 2, sum.z);
    write_element(to, r, c + 3, sum.w);
  }
}

// Column sums of 64 columns over one part of the rows, into the workspace [parts, order] of a problem. Column `m` is
// the ones themselves: its sum counts the rows.
constexpr int kSumLines = kSumThreads / (kSumColumns / 8);
constexpr int kSumShared = kSumLines * kSumColumns * 4;

template <class Element>
KFADE_DEVICE void column_sums(const Launch& launch) {
  const Problem* p = launch.problems;
  int64_t start = 0;
  while (p->end <= block_index()) start = (p++)->end;
  const int number = static_cast<int>(block_index() - start);
  const int part = number % p->splits, first = number / p->splits * kSumColumns;
  const int piece = thread_index() % (kSumColumns / 8), line = thread_index() / (kSumColumns / 8);
  const int column = first + 8 * piece;
  const int end = least((part + 1) * kSumRows, p->inner);
  float sum[8] = {};
  for (int row = part * kSumRows + line; row < end; row += kSumLines) {
    if (p->mask != nullptr && p->mask[row] == 0) continue;
    if (column < p->m) {
      struct alignas(16) Piece {
        Element x[8];
      };
      const Element* at = static_cast<const Element*>(p->left) + row * p->left_stride + column;
      const Piece piece = *reinterpret_cast<const Piece*>(at);
#pragma unroll
      for (int i = 0; i < 8; ++i) sum[i] += to_float(piece.x[i]);
    } else if (column == p->m) {
      sum[0] += 1.0f;
    }
  }
  const uint32_t memory = shared_base();
#pragma unroll
  for (int i = 0; i < 8; ++i) store_shared(memory + 4 * (line * kSumColumns + 8 * piece + i), sum[i]);
  block_sync();
  const int mine = thread_index();
  if (mine >= kSumColumns || first + mine >= p->order) return;
  float all = 0.0f;
  for (int i = 0; i < kSumLines; ++i) all += load_shared(memory + 4 * (i * kSumColumns + mine));
  launch.partials[p->partial + static_cast<int64_t>(part) * p->order + first + mine] = all;
}

// The same columns: parts in order, to the last row of the triangle.
KFADE_DEVICE void add_column_sums(const Launch& launch) {
  const Problem* p = launch.problems;
  int64_t start = 0;
  while (p->split_end <= block_index()) start = (p++)->split_end;
  const int column = static_cast<int>(block_index() - start) * kSumThreads + thread_index();
  if (column >= p->order) return;
  const Panel last = panel(p->order, panel_count(p->order) - 1);
  float sum = 0.0f;
  for (int part = 0; part < p->splits; ++part) {
    sum += launch.partials[p->partial + static_cast<int64_t>(part) * p->order + column];
  }
  p->out[last.offset + (p->order - 1 - last.start) * last.stop + column] += launch.alpha * sum;
}

}  // namespace kfade::cuda
