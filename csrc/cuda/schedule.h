// Which work a program does, in which order: tables of problems, tiles, parts and chunks. Host and device.
#pragma once

#include <cmath>
#include <cstdint>

#include "packed.h"

#ifdef __CUDACC__
#define KFADE_HD __host__ __device__ __forceinline__
#else
#define KFADE_HD inline
#endif

namespace kfade::cuda {

constexpr int kTileRows = PANEL_ROWS;  // rows of the result that one block computes: a tile lies in one panel

KFADE_HD int ceil_div(int a, int b) { return (a + b - 1) / b; }
KFADE_HD int least(int a, int b) { return a < b ? a : b; }

// CUtensorMap, which cuda.h alone declares.
struct alignas(128) TensorMap {
  uint64_t words[16];
};

// One sum of products of transposed rows, leftᵀ right, and where it goes.
struct Problem {
  TensorMap left_map, right_map;  // of [batch, inner, m] and [batch, inner, n], for Hopper
  const void *left, *right;       // the same as addresses
  float* out;
  const uint8_t* mask;            // [batch · inner] bytes, or null
  const int64_t* sequences;       // [batch + 1] first rows of packed sequences, or null
  int64_t left_stride, right_stride, left_batch, right_batch;  // in elements
  int64_t out_stride;             // of a plain matrix
  int64_t end;                    // work items of this problem and those before it
  int64_t partial;                // number of its first partial tile in the workspace
  int64_t split_end;              // tiles, of this problem and those before it, that come in parts
  int32_t m, n;                   // rows and columns of the result
  int32_t inner, batch;           // summed rows of one sequence (packed: of all), sequences
  int32_t order;                  // of the packed triangle that `out` is; 0: a plain matrix
  int32_t splits, part;           // parts of a tile, and what one has: summed rows of a triangle, else sequences
};

// What a launch is given beside the problems.
struct Launch {
  const Problem* problems;
  int64_t items;
  float* partials;
  float alpha;
  int32_t flush;   // summed rows of a triangle between two additions to float32 memory
  int32_t masked;  // some problem has a mask or packed sequences
  int32_t group;   // block rows of tiles that are walked together, see below
};

struct Place {
  int row, column;
};

// The largest r with r (r + 1) / 2 ≤ t, for t below 2³⁰; the square root may be off by one.
KFADE_HD int triangular_root(int t) {
  int r = static_cast<int>((sqrtf(8.0f * static_cast<float>(t) + 1.0f) - 1.0f) * 0.5f);
  if (r * (r + 1) / 2 > t) --r;
  if ((r + 1) * (r + 2) / 2 <= t) ++r;
  return r;
}

// Block row and column of tile t of a lower triangle, in groups of block rows that share operands in L2: a group
// is a rectangle, walked column by column, and then a small triangle.
KFADE_HD Place triangular_tile(int t, int side, int group) {
  const int first = triangular_root(t) / group * group;
  const int inside = t - first * (first + 1) / 2;
  const int rows = least(group, side - first);
  const int corner = inside - first * rows;
  if (corner < 0) return {first + inside % rows, inside / rows};
  const int row = triangular_root(corner);
  return {first + row, first + corner - row * (row + 1) / 2};
}

// The same of a rectangle.
KFADE_HD Place rectangular_tile(int t, int tiles_m, int tiles_n, int group) {
  const int first = t / (group * tiles_n) * group;
  const int rows = least(group, tiles_m - first);
  const int inside = t - first * tiles_n;
  return {first + inside % rows, inside / rows};
}

// A program's tile and how tiles are walked: what one work item computes. A triangle has square tiles.
struct Shape {
  int rows, columns, group;
};

KFADE_HD int tiles_of(const Problem& p, Shape s) {
  const int tiles_n = ceil_div(p.n, s.columns);
  return p.order ? tiles_n * (tiles_n + 1) / 2 : ceil_div(p.m, s.rows) * tiles_n;
}

// One work item: the tile at (row, column) of the result, and the part of the sum.
struct Item {
  int row, column, tile, part, tiles;
};

KFADE_HD Item locate(const Problem& p, Shape s, int64_t number) {
  const int tiles = tiles_of(p, s);
  const int tile = static_cast<int>(number % tiles);
  const int tiles_n = ceil_div(p.n, s.columns);
  const Place at = p.order ? triangular_tile(tile, tiles_n, s.group)
                           : rectangular_tile(tile, ceil_div(p.m, s.rows), tiles_n, s.group);
  return {at.row * s.rows, at.column * s.columns, tile, static_cast<int>(number / tiles), tiles};
}

// Summed rows begin … end of one sequence: what an accumulator takes before it is folded away.
struct Span {
  int sequence, begin, end;
};

// `syrk_`: chunks of at most `flush` rows of a part, each added to memory.
struct Outer {
  static constexpr bool kSquares = false;
  static KFADE_HD int chunks(const Problem& p, const Launch& l, int part) {
    const int begin = part * p.part;
    return ceil_div(least(p.part, p.inner - begin), l.flush);
  }
  static KFADE_HD Span chunk(const Problem& p, const Launch& l, int part, int number) {
    const int begin = part * p.part + number * l.flush;
    return {0, begin, least(least(begin + l.flush, (part + 1) * p.part), p.inner)};
  }
};

// `eigenvalue_correction_`: the sequences of a part, the product of each squared and summed.
struct Squares {
  static constexpr bool kSquares = true;
  static KFADE_HD int chunks(const Problem& p, const Launch&, int part) {
    return least(p.part, p.batch - part * p.part);
  }
  static KFADE_HD Span chunk(const Problem& p, const Launch&, int part, int number) {
    const int sequence = part * p.part + number;
    if (p.sequences == nullptr) return {sequence, 0, p.inner};
    return {0, static_cast<int>(p.sequences[sequence]), static_cast<int>(p.sequences[sequence + 1])};
  }
};

// The work items of one of many programs: every `stride`-th.
struct Walk {
  const Launch& launch;
  Shape shape;
  int64_t number, stride;
  const Problem* problem;
  int64_t start = 0;

  KFADE_HD Walk(const Launch& launch, Shape shape, int64_t program, int64_t programs)
      : launch(launch), shape(shape), number(program), stride(programs), problem(launch.problems) {
    settle();
  }
  KFADE_HD bool valid() const { return number < launch.items; }
  KFADE_HD void next() {
    number += stride;
    settle();
  }
  KFADE_HD Item item() const { return locate(*problem, shape, number - start); }

 private:
  KFADE_HD void settle() {
    if (!valid()) return;
    while (problem->end <= number) start = (problem++)->end;
  }
};

// The steps of `Depth` summed rows that a program's work items come down to, one after the other. What can be computed
// again from the number of the work item is not kept: kernels hold this through their products.
template <class Op, int Depth>
struct Steps {
  Walk walk;
  Span span{};
  int chunk = 0, k = 0;
  bool valid, fresh = true;  // fresh: the first step of its span

  KFADE_HD Steps(const Launch& launch, Shape shape, int64_t program, int64_t programs)
      : walk(launch, shape, program, programs), valid(walk.valid()) {
    if (!valid) return;
    open();
    settle();
  }
  KFADE_HD void next() {
    k += Depth;
    fresh = false;
    settle();
  }

 private:
  KFADE_HD void open() {
    span = Op::chunk(*walk.problem, walk.launch, walk.item().part, chunk);
    k = span.begin;
    fresh = true;
  }
  KFADE_HD void settle() {
    while (k >= span.end) {
      if (++chunk == Op::chunks(*walk.problem, walk.launch, walk.item().part)) {
        walk.next();
        valid = walk.valid();
        if (!valid) return;
        chunk = 0;
      }
      open();
    }
  }
};

// Where a block's tile is written: element (r, c) at `at + r · stride + c`, inside rows × columns.
struct Target {
  float* at;
  int64_t stride;
  int rows, columns;
  float scale;
  bool add;
  bool wide;  // four elements that begin at a multiple of four columns are 16 aligned bytes, all inside or outside
};

// Of rows row … row + kTileRows, the rows of a panel where the result is a triangle.
KFADE_HD Target result_of(const Problem& p, const Launch& l, const Item& item, int row) {
  const bool whole = p.n % 4 == 0 && reinterpret_cast<uintptr_t>(p.out) % 16 == 0;
  if (p.order) {
    const Panel to = panel(p.order, row / PANEL_ROWS);
    const int stop = static_cast<int>(to.stop);
    return {p.out + to.offset + item.column, stop, p.m - row, least(p.n, stop) - item.column, l.alpha, true,
            whole && p.order % 4 == 0};
  }
  return {p.out + row * p.out_stride + item.column, p.out_stride, p.m - row, p.n - item.column, l.alpha, true,
          whole && p.out_stride % 4 == 0};
}

// Of the same rows of an item's part in the workspace; `first`: nothing has been added to it yet.
KFADE_HD Target part_of(const Problem& p, const Launch& l, Shape s, const Item& item, int part, int row, bool first) {
  const int64_t tile = p.partial + static_cast<int64_t>(part) * item.tiles + item.tile;
  float* at = l.partials + (tile * s.rows + row - item.row) * s.columns;
  return {at, s.columns, least(kTileRows, p.m - row), s.columns, 1.0f, !first, true};
}

KFADE_HD Target target_of(const Problem& p, const Launch& l, Shape s, const Item& item, int row, bool first) {
  return p.splits > 1 ? part_of(p, l, s, item, item.part, row, first) : result_of(p, l, item, row);
}

}  // namespace kfade::cuda
