// The products of packed panels, for any instruction set.
//
// An instruction set `I` gives lanes, Vector, zero, load, broadcast, dot (acc + a · b on cells), load_part, store_part,
// store, multiply_add and cells (elements of a row as one line of a panel). A block of lanes / 2 rows and three vectors
// of columns is kept in registers: 24 of 32 with AVX-512, 12 of 16 with AVX2.
#pragma once

#include <cstring>

#include "kernels.h"

namespace {

using namespace kfade::cpu;

struct Add {
  template <class I>
  static typename I::Vector fold(typename I::Vector product, typename I::Vector c, typename I::Vector alpha) {
    return I::multiply_add(product, alpha, c);
  }
};

struct Square {
  template <class I>
  static typename I::Vector fold(typename I::Vector product, typename I::Vector c, typename I::Vector) {
    return I::multiply_add(product, product, c);
  }
};

// One block of registers: `rows` of at most lanes / 2 rows and `columns` of at most V vectors are written.
template <class I, class Fold, int V>
inline void block(const Tile& tile, const std::uint32_t* a, const std::uint32_t* b, float* c, std::int64_t rows,
                  std::int64_t columns) {
  constexpr int L = I::lanes, M = L / 2;
  const auto alpha = I::fill(tile.alpha);
  // Where the sums go comes from memory while they are made.
  for (std::int64_t i = 0; i < rows; ++i) {
    for (std::int64_t v = 0; v < columns; v += 16) __builtin_prefetch(c + i * tile.c_stride + v, 1);
  }
  for (std::int64_t s = 0; s < tile.segment_count; ++s) {
    const std::uint32_t* left = a + tile.segments[s].begin * L;
    const std::uint32_t* right = b + tile.segments[s].begin * L;
    const std::int64_t lines = tile.segments[s].lines, stride = tile.panel_stride;
    typename I::Vector sum[M][V];
#pragma GCC unroll 8
    for (int i = 0; i < M; ++i) {
#pragma GCC unroll 3
      for (int v = 0; v < V; ++v) sum[i][v] = I::zero();
    }
    for (std::int64_t k = 0; k < lines; ++k) {
      typename I::Cells y[V];
#pragma GCC unroll 3
      for (int v = 0; v < V; ++v) y[v] = I::load_cells(right + v * stride + k * L);
#pragma GCC unroll 8
      for (int i = 0; i < M; ++i) {
        const auto x = I::broadcast(left + k * L + i);
#pragma GCC unroll 3
        for (int v = 0; v < V; ++v) sum[i][v] = I::dot(sum[i][v], x, y[v]);
      }
    }
#pragma GCC unroll 8
    for (int i = 0; i < M; ++i) {
      if (i >= rows) break;
      float* line = c + i * tile.c_stride;
#pragma GCC unroll 3
      for (int v = 0; v < V; ++v) {
        const std::int64_t left_over = columns - v * L;
        if (left_over >= L) {
          I::store(line + v * L, Fold::template fold<I>(sum[i][v], I::load(line + v * L), alpha));
        } else {
          const auto part = I::part(left_over);
          const auto before = I::load_part(line + v * L, part);
          I::store_part(line + v * L, Fold::template fold<I>(sum[i][v], before, alpha), part);
        }
      }
    }
  }
}

template <class I, class Fold>
void multiply(const Tile& tile) {
  constexpr std::int64_t L = I::lanes, M = L / 2;
  for (std::int64_t j = tile.column; j < tile.column_stop; j += 3 * L) {
    const std::int64_t columns = tile.column_stop - j < 3 * L ? tile.column_stop - j : 3 * L;
    const std::uint32_t* b = tile.b + j / L * tile.panel_stride;
    for (std::int64_t i = tile.row; i < tile.row_stop; i += M) {
      if (tile.lower && j > i + M - 1) continue;
      const std::int64_t rows = tile.row_stop - i < M ? tile.row_stop - i : M;
      const std::uint32_t* a = tile.a + i / L * tile.panel_stride + i % L;
      float* c = tile.c + (i - tile.row) * tile.c_stride + j;
      if (columns > 2 * L) {
        block<I, Fold, 3>(tile, a, b, c, rows, columns);
      } else if (columns > L) {
        block<I, Fold, 2>(tile, a, b, c, rows, columns);
      } else {
        block<I, Fold, 1>(tile, a, b, c, rows, columns);
      }
    }
  }
}

// Elements `column … column + lanes` of a row, from the row itself or, at its end, from a copy filled up with the one
// and with zeros.
template <class T>
inline const T* whole(const Rows& rows, std::int64_t number, std::int64_t column, std::int64_t lanes, T one, T* copy) {
  const T* row = static_cast<const T*>(rows.data) + number * rows.stride;
  if (column + lanes <= rows.width) return row + column;
  std::memset(copy, 0, lanes * sizeof(T));
  if (column < rows.width) std::memcpy(copy, row + column, (rows.width - column) * sizeof(T));
  if (rows.ones && column <= rows.width) copy[rows.width - column] = one;
  return copy;
}

template <class I, class T>
void pack_elements(const Strip& strip, T one) {
  constexpr std::int64_t L = I::lanes, depth = I::rows_a_line;
  alignas(64) T copies[depth][L];
  for (std::int64_t r = 0; r < strip.count; r += depth) {
    std::uint32_t* line = strip.out + r / depth * L;
    for (std::int64_t p = 0; p < strip.panels; ++p) {
      const std::int64_t column = strip.column + p * L;
      if constexpr (depth == 1) {
        I::pack(line + p * strip.panel_stride, whole(*strip.rows, strip.numbers[r], column, L, one, copies[0]));
      } else {
        const T* first = whole(*strip.rows, strip.numbers[r], column, L, one, copies[0]);
        const T* second = nullptr;
        if (r + 1 < strip.count) second = whole(*strip.rows, strip.numbers[r + 1], column, L, one, copies[1]);
        I::pack(line + p * strip.panel_stride, first, second);
      }
    }
  }
}

struct Half {
  std::uint16_t bits;
};
struct Brain {
  std::uint16_t bits;
};

template <class I>
void pack_any(const Strip& strip) {
  switch (strip.rows->element) {
    case Element::f32:
      return pack_elements<I, float>(strip, 1.0f);
    case Element::bf16:
      return pack_elements<I, Brain>(strip, Brain{0x3f80});
    case Element::f16:
      return pack_elements<I, Half>(strip, Half{0x3c00});
  }
}

template <class I>
constexpr Products products_of_floats() {
  return {&pack_any<I>, &multiply<I, Add>, &multiply<I, Square>, 1};
}

}  // namespace
