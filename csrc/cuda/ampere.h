// The kernel of sm_80: leftᵀ right by warp products, for `syrk_` and `eigenvalue_correction_`.
//
// A block takes a tile of 128 × 128, each of its eight warps 64 × 32 of it. Both operands are copied as they are, by
// summed rows, and come to registers transposed. Rows that are left out are filled with zeros on the way.
#pragma once

#include "epilogue.h"

namespace kfade::cuda {

template <class Op>
struct Ampere {
  static constexpr int kColumns = 128;
  static constexpr int kDepth = 32;
  static constexpr int kStages = 4;
  static constexpr int kThreads = 256;
  static constexpr int kCluster = 1;
  // Two would leave 128 registers a thread, and the copies' addresses would spill.
  static constexpr int kPrograms = 1;
  static constexpr int kOperand = kDepth * kRowPieces * 16;
  static constexpr int kShared = kStages * 2 * kOperand;
  static constexpr KFADE_HD Shape shape(int group) { return {kTileRows, kColumns, group}; }
};

// One operand, as one thread copies it: a piece of 8 columns of every kLines-th row.
template <class A>
struct Operand {
  static constexpr int kLines = A::kThreads / kRowPieces;
  const char* at;
  int64_t stride;  // bytes
  bool inside;

  KFADE_DEVICE void open(const void* from, int64_t elements, int64_t first, int column, int columns) {
    const int own = column + 8 * (thread_index() % kRowPieces);
    inside = own < columns;
    stride = 2 * elements;
    // What is not read still has an address.
    at = static_cast<const char*>(from) + (first + thread_index() / kRowPieces) * stride + (inside ? 2 * own : 0);
  }
  // Rows of the step that `keep` has a bit for.
  KFADE_DEVICE void copy(uint32_t to, int keep) {
#pragma unroll
    for (int i = 0; i < A::kDepth / kLines; ++i) {
      const bool wanted = inside && (keep >> i & 1);
      copy_async(to + piece_offset(thread_index() / kRowPieces + i * kLines, thread_index() % kRowPieces), at, wanted);
      at += kLines * stride;
    }
  }
};

// The steps of a block, on their way to shared memory.
template <class Op, class A>
struct Copier {
  Steps<Op, A::kDepth> steps;
  Operand<A> left{}, right{};
  const uint8_t* mask = nullptr;

  KFADE_DEVICE Copier(const Launch& launch, Shape shape) : steps(launch, shape, block_index(), block_count()) {}

  KFADE_DEVICE void copy(uint32_t to) {
    const int line = thread_index() / kRowPieces;
    if (steps.fresh) {
      const Problem& p = *steps.walk.problem;
      const Item item = steps.walk.item();
      const int64_t sequence = steps.span.sequence;
      left.open(static_cast<const char*>(p.left) + 2 * sequence * p.left_batch, p.left_stride, steps.k, item.row, p.m);
      right.open(static_cast<const char*>(p.right) + 2 * sequence * p.right_batch, p.right_stride, steps.k,
                 item.column, p.n);
      mask = p.mask == nullptr ? nullptr : p.mask + sequence * p.inner;
    }
    int keep = 0;
#pragma unroll
    for (int i = 0; i < A::kDepth / Operand<A>::kLines; ++i) {
      const int row = steps.k + line + i * Operand<A>::kLines;
      if (row < steps.span.end && (mask == nullptr || mask[row] != 0)) keep |= 1 << i;
    }
    left.copy(to, keep);
    right.copy(to + A::kOperand, keep);
    steps.next();
  }
};

template <class Element, class A>
KFADE_DEVICE void multiply_step(float (&acc)[4][16], uint32_t left, uint32_t right) {
  const int lane = thread_index() % 32, warp = thread_index() / 32;
  const int row = warp / 4 * 64, column = warp % 4 * 32;
  const int matrix = lane / 8, line = lane % 8;
#pragma unroll
  for (int k = 0; k < A::kDepth; k += 16) {
    uint32_t a[4][4], b[2][4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      load_matrices(a[i], left + piece_offset(k + line + matrix / 2 * 8, (row + 16 * i) / 8 + matrix % 2));
    }
#pragma unroll
    for (int j = 0; j < 2; ++j) {
      load_matrices(b[j], right + piece_offset(k + line + matrix % 2 * 8, (column + 16 * j) / 8 + matrix / 2));
    }
#pragma unroll
    for (int i = 0; i < 4; ++i) {
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        multiply<Element>(acc[i] + 4 * j, a[i], b[j / 2][2 * (j % 2)], b[j / 2][2 * (j % 2) + 1]);
      }
    }
  }
}

template <class Op, class Element>
KFADE_DEVICE void ampere(const Launch& launch) {
  using A = Ampere<Op>;
  const Shape shape = A::shape(launch.group);
  const uint32_t memory = shared_base();
  const int warp = thread_index() / 32;
  const int warp_row = warp / 4 * 64, warp_column = warp % 4 * 32;
  Copier<Op, A> ahead(launch, shape);
  int filled = 0, read = 0;
  const auto copy_next = [&] {
    if (ahead.steps.valid) ahead.copy(memory + filled * 2 * A::kOperand);
    // Empty groups keep the count of what is waited for.
    copy_commit();
    filled = filled + 1 == A::kStages ? 0 : filled + 1;
  };
  for (int i = 0; i < A::kStages - 1; ++i) copy_next();
  for (Walk walk(launch, shape, block_index(), block_count()); walk.valid(); walk.next()) {
    const Problem& p = *walk.problem;
    const int chunks = Op::chunks(p, launch, walk.item().part);
    float total[4][Op::kSquares ? 16 : 1] = {};
    for (int chunk = 0; chunk < chunks; ++chunk) {
      const Span span = Op::chunk(p, launch, walk.item().part, chunk);
      const int steps = ceil_div(span.end - span.begin, A::kDepth);
      float acc[4][16] = {};
      for (int step = 0; step < steps; ++step) {
        copy_wait<A::kStages - 2>();
        // Everybody's copies have come, and everybody has read the stage that is filled next.
        block_sync();
        copy_next();
        const uint32_t at = memory + read * 2 * A::kOperand;
        multiply_step<Element, A>(acc, at, at + A::kOperand);
        read = read + 1 == A::kStages ? 0 : read + 1;
      }
      if constexpr (Op::kSquares) {
#pragma unroll
        for (int i = 0; i < 64; ++i) total[i / 16][i % 16] += acc[i / 16][i % 16] * acc[i / 16][i % 16];
      } else if (steps > 0) {
        const Item item = walk.item();
        const Target to = target_of(p, launch, shape, item, item.row, chunk == 0);
#pragma unroll
        for (int i = 0; i < 4; ++i) write_tile<32>(acc[i], to, warp_row + 16 * i, warp_column);
      }
    }
    if constexpr (Op::kSquares) {
      const Item item = walk.item();
      const Target to = target_of(p, launch, shape, item, item.row, true);
#pragma unroll
      for (int i = 0; i < 4; ++i) write_tile<32>(total[i], to, warp_row + 16 * i, warp_column);
    }
  }
}

}  // namespace kfade::cuda
