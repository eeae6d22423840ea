// The operations on checked arguments: rows are packed chunk by chunk, then tiles of the result are dealt to threads.
// A tile is one thread's from first to last, and its sums go in the order of the rows: threads change no bit.
#pragma once

#include <cstdint>
#include <vector>

#include "kernels.h"

namespace kfade::cpu {

// Sizes that change the speed, and by the order of the sums the last bits.
struct Blocks {
  std::int64_t lines;    // of packed rows at a time (a sequence that is longer is one chunk)
  std::int64_t columns;  // of a tile, a multiple of the lanes; it has 128 rows
};

// `packed += alpha · xᵀ diag(mask) x`, into the packed lower triangle of order x.columns().
void syrk(const Kernels& isa, const Blocks& blocks, float* packed, const Rows& x, std::int64_t count,
          const std::uint8_t* mask, float alpha, int threads);

// `out += Σ_s (left_sᵀ right_s)∘²` over the sequences s, rows offsets[s] … offsets[s + 1] of both.
void squares(const Kernels& isa, const Blocks& blocks, float* out, std::int64_t out_stride, const Rows& left,
             const Rows& right, const std::vector<std::int64_t>& offsets, const std::uint8_t* mask, int threads);

}  // namespace kfade::cpu
