#include "table.h"

#include <climits>

#include "check.h"

namespace kfade::cuda {
namespace {

constexpr uintptr_t kPiece = 16;  // bytes that are copied at once

int size(const char* name, int64_t value, int64_t least = 1) {
  require(value >= least && value <= INT_MAX / 2, name, value, "a size that fits 30 bits, and at least 1");
  return static_cast<int>(value);
}

void check_rows(const char* stride_name, int64_t stride, const char* width_name, int64_t width) {
  require(width % 8 == 0, width_name, width, "a multiple of 8: rows end on 16 bytes");
  require(stride >= width && stride % 8 == 0 && stride < int64_t{1} << 39, stride_name, stride,
          "a multiple of 8 that is not less than the row's length");
}

void check_sequences(const char* name, int64_t batch, int64_t row, int64_t tokens) {
  require(batch % row == 0 && batch >= tokens * row && batch < int64_t{1} << 39, name, batch,
          "whole rows, and not less than one sequence");
}

Problem outer(const OuterProduct& o) {
  Problem p{};
  p.left = p.right = address<char>("x", o.x, true, kPiece);
  p.out = address<float>("packed", o.packed);
  p.mask = address<uint8_t>("mask", o.mask, false);
  p.m = p.n = size("width", o.width);
  p.inner = size("rows", o.rows);
  p.order = size("order", o.order);
  p.batch = 1;
  require(o.order == o.width || o.order == o.width + 1, "order", o.order, "the width, or one more");
  check_rows("stride", o.stride, "width", o.width);
  p.left_stride = p.right_stride = o.stride;
  p.left_batch = p.right_batch = o.stride * o.rows;
  return p;
}

// Numbers of work items and of tiles in parts, which a table counts on.
void append(Table& table, Problem& p, Shape shape) {
  const int64_t tiles = tiles_of(p, shape);
  table.items += tiles * p.splits;
  p.end = table.items;
  p.partial = table.partial_tiles;
  if (p.splits > 1) {
    table.partial_tiles += tiles * p.splits;
    table.split_tiles += tiles;
  }
  p.split_end = table.split_tiles;
  require(table.items <= INT_MAX / 2, "work items", table.items, "fewer");
  table.problems.push_back(p);
}

void encode(Problem& p, Type type, Kernel kernel) {
  if (kernel != Kernel::hopper) return;
  const int sequences = p.sequences ? 1 : p.batch;
  // The driver also checks the stride of a dimension of size one.
  const auto apart = [&](int64_t batch, int64_t row) { return sequences > 1 ? batch : row * p.inner; };
  encode_map(p.left_map, type, p.left, p.m, p.inner, sequences, p.left_stride, apart(p.left_batch, p.left_stride));
  encode_map(p.right_map, type, p.right, p.n, p.inner, sequences, p.right_stride,
             apart(p.right_batch, p.right_stride));
}

}  // namespace

Table outer_table(const std::vector<OuterProduct>& products, Type type, Kernel kernel) {
  const Facts facts = outer_facts(kernel);
  Table table;
  for (const OuterProduct& o : products) {
    Problem p = outer(o);
    p.part = size("part", o.part);
    require(p.part % facts.depth == 0, "part", o.part, "whole steps of the kernel");
    p.splits = ceil_div(p.inner, p.part);
    encode(p, type, kernel);
    append(table, p, facts.shape);
  }
  return table;
}

Table squares_table(const SquaredProducts& s, Type type, Kernel kernel) {
  Problem p{};
  p.left = address<char>("left", s.left, true, kPiece);
  p.right = address<char>("right", s.right, true, kPiece);
  p.out = address<float>("out", s.out);
  p.mask = address<uint8_t>("mask", s.mask, false);
  p.sequences = address<int64_t>("sequences", s.sequences, false);
  p.m = size("m", s.m);
  p.n = size("n", s.n);
  p.inner = size("tokens", s.tokens);
  p.batch = size("batch", s.batch);
  p.part = size("part", s.part);
  check_rows("left_stride", s.left_stride, "m", s.m);
  check_rows("right_stride", s.right_stride, "n", s.n);
  require(s.out_stride >= s.n, "out_stride", s.out_stride, "at least the number of columns");
  if (s.batch > 1 && s.sequences == 0) {
    check_sequences("left_batch", s.left_batch, s.left_stride, s.tokens);
    check_sequences("right_batch", s.right_batch, s.right_stride, s.tokens);
  }
  p.left_stride = s.left_stride;
  p.right_stride = s.right_stride;
  p.left_batch = s.left_batch;
  p.right_batch = s.right_batch;
  p.out_stride = s.out_stride;
  p.splits = ceil_div(p.batch, p.part);
  encode(p, type, kernel);
  Table table;
  append(table, p, squares_facts(kernel).shape);
  return table;
}

Table column_table(const std::vector<OuterProduct>& products) {
  Table table;
  for (const OuterProduct& o : products) {
    Problem p = outer(o);
    require(o.order == o.width + 1, "order", o.order, "one more than the width");
    p.splits = ceil_div(p.inner, kSumRows);
    table.items += static_cast<int64_t>(p.splits) * ceil_div(p.order, kSumColumns);
    p.end = table.items;
    p.partial = table.partial_tiles;
    table.partial_tiles += static_cast<int64_t>(p.splits) * p.order;
    table.split_tiles += ceil_div(p.order, kSumThreads);
    p.split_end = table.split_tiles;
    require(table.items <= INT_MAX / 2, "work items", table.items, "fewer");
    table.problems.push_back(p);
  }
  return table;
}

}  // namespace kfade::cuda
