// Tables of problems, checked and laid out as the kernels read them.
#pragma once

#include <string>
#include <vector>

#include "kernels.h"

namespace kfade::cuda {

// One outer product: packed += alpha · xᵀ diag(mask) x, x [rows, width] with unit column stride.
struct OuterProduct {
  uintptr_t x, packed, mask;
  int64_t rows, width, order, stride;  // stride in elements
  int64_t part;                        // rows of one part
};

// Squares of products of sequences: out += Σ_b (left_bᵀ right_b)∘².
struct SquaredProducts {
  uintptr_t left, right, out, mask, sequences;  // sequences: [batch + 1] int64 of packed ones, or 0
  int64_t left_stride, right_stride, left_batch, right_batch, out_stride;
  int64_t m, n, tokens, batch;  // tokens of one sequence, or of all packed ones
  int64_t part;                 // sequences of one part
};

// What is copied to the device, and what a launch of it needs.
struct Table {
  std::vector<Problem> problems;
  int64_t items = 0;
  int64_t partial_tiles = 0;
  int64_t split_tiles = 0;
};

Table outer_table(const std::vector<OuterProduct>& products, Type type, Kernel kernel);
Table squares_table(const SquaredProducts& products, Type type, Kernel kernel);
// Of the column sums of the same outer products, whose accumulators have one more row for them; `partial_tiles` are
// floats of the workspace, `split_tiles` blocks of the second kernel.
Table column_table(const std::vector<OuterProduct>& products);

}  // namespace kfade::cuda
