// What one instruction set brings: packing of rows, and products of packed panels.
//
// A panel holds `lanes` columns of a matrix of rows, one summed row after the other, as 32-bit cells:
//
//   rows  [N, n]        panel of columns c … c + lanes
//   row 0  ▯▯▯▯▯▯▯▯      cell line 0   x[0, c] … x[0, c + lanes]              float cells, or
//   row 1  ▯▯▯▯▯▯▯▯      cell line 1   x[1, c] … x[1, c + lanes]              pairs: rows 0 and 1 in one line
//
// This header and micro.h are compiled for several instruction sets: they use nothing of the standard library whose
// inline functions the linker could take from the wrong one.
#pragma once

#include <cstdint>

namespace kfade::cpu {

enum class Element { f32, bf16, f16 };

// A matrix of rows; with `ones` it has one last column of ones that is not stored.
struct Rows {
  const void* data;
  Element element;
  std::int64_t stride;  // elements from one row to the next
  std::int64_t width;   // stored columns
  bool ones;

  std::int64_t columns() const { return width + (ones ? 1 : 0); }
};

// Packing of some panels beside each other.
struct Strip {
  const Rows* rows;
  const std::int64_t* numbers;  // the rows that are taken
  std::int64_t count;           // how many
  std::int64_t column;          // first column
  std::int64_t panels;
  std::uint32_t* out;         // first line of the first panel
  std::int64_t panel_stride;  // cells from one panel to the next
};

// Summed rows whose product is folded into the result at once.
struct Segment {
  std::int64_t begin;  // first line
  std::int64_t lines;
};

// A block of the result, `C += alpha · AᵀB` or `C += (AᵀB)∘²` for each segment.
struct Tile {
  const std::uint32_t* a;  // panels of the columns that become rows of C
  const std::uint32_t* b;  // panels of the columns that become columns of C
  std::int64_t panel_stride;
  const Segment* segments;
  std::int64_t segment_count;
  std::int64_t row, row_stop;        // of C; `row` is a multiple of lanes / 2
  std::int64_t column, column_stop;  // `column` is a multiple of lanes
  float* c;                          // where row `row`, column 0 lies
  std::int64_t c_stride;
  float alpha;
  bool lower;  // what lies wholly above the diagonal is left out
};

// What multiplies one kind of cell.
struct Products {
  void (*pack)(const Strip&);
  void (*add)(const Tile&);
  void (*square)(const Tile&);
  std::int64_t rows_a_line;
};

struct Kernels {
  const char* name;
  std::int64_t lanes;
  Products floats;
  Products pairs;  // bfloat16; null where they are widened instead
};

extern const Kernels avx2_kernels;
extern const Kernels avx512_kernels;
extern const Kernels avx512_bf16_kernels;

}  // namespace kfade::cpu
