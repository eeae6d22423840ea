// A tile on its way from accumulators to float32 memory.
#pragma once

#include "ptx.h"

namespace kfade::cuda {

KFADE_DEVICE void write_element(const Target& to, int row, int column, float x) {
  if (row >= to.rows || column >= to.columns) return;
  float* at = to.at + row * to.stride + column;
  x *= to.scale;
  *at = to.add ? *at + x : x;
}

// A warp's 16 rows from `row` on, and `Columns` columns from `column` on. Lanes exchange half of what they hold, so
// that each then has four neighbours in a row: 16 bytes an access, and all of every 32-byte sector that is touched. The
// old values of 64 columns are loaded before the first store, since the compiler may not move loads over stores.
template <int Columns>
KFADE_DEVICE void write_wide(const float (&acc)[Columns / 2], const Target& to, int row, int column) {
  constexpr int kTogether = Columns < 64 ? Columns / 16 : 4;
  const int lane = thread_index() % 32;
  const bool odd = lane % 2;
  const int first = column + (odd ? 8 : 0) + (lane % 4 / 2) * 4;
  float* at = to.at + (row + lane / 4) * to.stride + first;
#pragma unroll
  for (int begin = 0; begin < Columns / 16; begin += kTogether) {
    Four old[kTogether][2];
#pragma unroll
    for (int j = 0; j < kTogether; ++j) {
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const bool inside = row + lane / 4 + 8 * h < to.rows && first + 16 * (begin + j) < to.columns;
        old[j][h] = load_four(at + 8 * h * to.stride + 16 * (begin + j), to.add && inside);
      }
    }
#pragma unroll
    for (int j = 0; j < kTogether; ++j) {
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        // Columns 0 … 7 and 8 … 15 of a group of 16.
        const float* low = acc + 8 * (begin + j) + 2 * h;
        const float* high = low + 4;
        const float x = exchange(odd ? low[0] : high[0], 1), y = exchange(odd ? low[1] : high[1], 1);
        const Four mine = odd ? Four{x, y, high[0], high[1]} : Four{low[0], low[1], x, y};
        const bool inside = row + lane / 4 + 8 * h < to.rows && first + 16 * (begin + j) < to.columns;
        const Four& o = old[j][h];
        const Four sum{o.x + to.scale * mine.x, o.y + to.scale * mine.y, o.z + to.scale * mine.z,
                       o.w + to.scale * mine.w};
        store_four(at + 8 * h * to.stride + 16 * (begin + j), inside, sum);
      }
    }
  }
}

// `acc` as `fragment` says it is held: rows row … row + 15 of the target, columns from `column` on.
template <int Columns>
KFADE_DEVICE void write_tile(const float (&acc)[Columns / 2], const Target& to, int row, int column) {
  if (to.wide) {
    write_wide<Columns>(acc, to, row, column);
    return;
  }
  const Place mine = fragment(thread_index() % 32);
#pragma unroll
  for (int i = 0; i < Columns / 2; ++i) {
    write_element(to, row + mine.row + 8 * (i / 2 % 2), column + mine.column + 8 * (i / 4) + i % 2, acc[i]);
  }
}

}  // namespace kfade::cuda
