// The kernel of sm_90a: leftᵀ right by warpgroup products, for `syrk_` and `eigenvalue_correction_`.
//
// A pair of blocks (a cluster) takes a tile of 256 rows, each block 128 of them. Both need the same columns of the
// right operand: each loads half, and the copy engine writes it to both. In a block one thread loads, two warpgroups
// multiply 64 rows each, and where rows are left out two warps clear them in shared memory between the two:
//
//     loader ──full──▶ (clearing warps ──ready──▶) two warpgroups ──empty──▶ loaders of both blocks
//
// Nothing else joins the two warpgroups, so that one is still multiplying while the other writes its result.
#pragma once

#include "epilogue.h"

namespace kfade::cuda {

template <class Op>
struct Hopper {
  // Squares keep two tiles in registers.
  static constexpr int kColumns = Op::kSquares ? 128 : 256;
  static constexpr int kStages = Op::kSquares ? 6 : 4;
  static constexpr int kThreads = 384;
  static constexpr int kCluster = 2;
  static constexpr int kPrograms = 1;  // clusters, for each two multiprocessors
  using Stage = cuda::Stage<kColumns>;
  using Ring = cuda::Ring<kStages>;
  static constexpr int kBarriers = kStages * Stage::kBytes;
  static constexpr int kShared = kBarriers + 3 * 8 * kStages;
  static constexpr KFADE_HD Shape shape(int group) { return {kCluster * kTileRows, kColumns, group}; }
};

constexpr int kClearing = kBoxDepth;  // threads that clear, one for each summed row of a stage

template <class H>
struct Barriers {
  uint32_t base;
  KFADE_DEVICE uint32_t full(int stage) const { return base + 8 * stage; }
  KFADE_DEVICE uint32_t empty(int stage) const { return base + 8 * (H::kStages + stage); }
  KFADE_DEVICE uint32_t ready(int stage) const { return base + 8 * (2 * H::kStages + stage); }
};

template <class Op, class H>
KFADE_DEVICE void load(const Launch& launch, uint32_t memory, Barriers<H> barriers, int rank) {
  using Stage = typename H::Stage;
  typename H::Ring ring;
  const Problem* known = nullptr;
  Item item{};
  for (Steps<Op, kBoxDepth> s(launch, H::shape(launch.group), block_index() / 2, block_count() / 2); s.valid;
       s.next(), ring.next()) {
    const Problem* p = s.walk.problem;
    if (p != known) {
      acquire_map(&p->left_map);
      acquire_map(&p->right_map);
      known = p;
    }
    if (s.fresh) item = s.walk.item();
    const uint32_t to = memory + ring.stage * Stage::kBytes, full = barriers.full(ring.stage);
    barrier_wait(barriers.empty(ring.stage), ring.parity ^ 1);
    barrier_expect(full, Stage::kBytes);
#pragma unroll
    for (int i = 0; i < Stage::kLeftBoxes; ++i) {
      const int column = item.row + rank * kTileRows + i * kBoxColumns;
      load_box(to + i * kBoxBytes, &p->left_map, full, column, s.k, s.span.sequence);
    }
#pragma unroll
    for (int i = 0; i < Stage::kOwnBoxes; ++i) {
      const int box = rank * Stage::kOwnBoxes + i;
      load_box_for_both(to + Stage::kRight + box * kBoxBytes, &p->right_map, full,
                        item.column + box * kBoxColumns, s.k, s.span.sequence);
    }
  }
}

// Rows that are masked, or belong to the next sequence, count for nothing whatever they hold.
template <class Op, class H>
KFADE_DEVICE void clear(const Launch& launch, uint32_t memory, Barriers<H> barriers, int row) {
  using Stage = typename H::Stage;
  typename H::Ring ring;
  for (Steps<Op, kBoxDepth> s(launch, H::shape(launch.group), block_index() / 2, block_count() / 2); s.valid;
       s.next(), ring.next()) {
    const Problem& p = *s.walk.problem;
    const int k = s.k + row;
    const int64_t entry = static_cast<int64_t>(s.span.sequence) * p.inner + k;
    const bool keep = k < s.span.end && (p.mask == nullptr || p.mask[entry] != 0);
    barrier_wait(barriers.full(ring.stage), ring.parity);
    if (!keep) {
      const uint32_t line = memory + ring.stage * Stage::kBytes + row * kBoxRowBytes;
      for (int box = 0; box < Stage::kLeftBoxes + Stage::kRightBoxes; ++box) {
#pragma unroll
        for (int piece = 0; piece < kBoxRowBytes / 16; ++piece) {
          // Neighbouring rows begin at different banks.
          clear_shared(line + box * kBoxBytes + ((piece + row) % 8) * 16);
        }
      }
      fence_async();
    }
    barrier_arrive(barriers.ready(ring.stage));
  }
}

template <class Op, class Element, class H>
KFADE_DEVICE void consume(const Launch& launch, uint32_t memory, Barriers<H> barriers, int rank, int group) {
  using Stage = typename H::Stage;
  constexpr int kCount = H::kColumns / 2;
  typename H::Ring ring;
  const int thread = thread_index() % 128;
  float acc[kCount] = {};
  for (Walk walk(launch, H::shape(launch.group), block_index() / 2, block_count() / 2); walk.valid(); walk.next()) {
    const Problem& p = *walk.problem;
    const Item item = walk.item();
    const int row = item.row + rank * kTileRows;
    const int chunks = Op::chunks(p, launch, item.part);
    float total[Op::kSquares ? kCount : 1] = {};
    for (int chunk = 0; chunk < chunks; ++chunk) {
      const Span span = Op::chunk(p, launch, item.part, chunk);
      const int steps = ceil_div(span.end - span.begin, kBoxDepth);
      if (steps == 0) continue;
      int held = 0;
      for (int step = 0; step < steps; ++step) {
        const int stage = ring.stage;
        barrier_wait(launch.masked ? barriers.ready(stage) : barriers.full(stage), ring.parity);
        const uint32_t at = memory + stage * Stage::kBytes;
        const uint64_t left = descriptor(at + group * kBoxBytes), right = descriptor(at + Stage::kRight);
        products_begin();
#pragma unroll
        for (int i = 0; i < kBoxDepth / kProductDepth; ++i) {
          multiply<Element>(acc, left + i * kDescriptorStep, right + i * kDescriptorStep, step + i);
        }
        products_commit();
        // All products but these are done: what they read is free, in this block and in the other.
        products_wait<1>();
        if (step > 0 && thread < H::kCluster) barrier_arrive_at(barriers.empty(held), thread);
        held = stage;
        ring.next();
      }
      products_wait<0>();
      products_done(acc);
      if (thread < H::kCluster) barrier_arrive_at(barriers.empty(held), thread);
      if constexpr (Op::kSquares) {
#pragma unroll
        for (int i = 0; i < kCount; ++i) total[i] += acc[i] * acc[i];
      } else if (row < p.m) {
        const Target to = target_of(p, launch, H::shape(launch.group), item, row, chunk == 0);
        write_tile<H::kColumns>(acc, to, group * 64 + thread / 32 * 16, 0);
      }
    }
    if constexpr (Op::kSquares) {
      if (row < p.m) {
        const Target to = target_of(p, launch, H::shape(launch.group), item, row, true);
        write_tile<H::kColumns>(total, to, group * 64 + thread / 32 * 16, 0);
      }
    }
  }
}

template <class Op, class Element>
KFADE_DEVICE void hopper(const Launch& launch) {
  using H = Hopper<Op>;
  const uint32_t memory = shared_base();
  const Barriers<H> barriers{memory + H::kBarriers};
  const int rank = cluster_rank();
  if (thread_index() == 0) {
    for (int stage = 0; stage < H::kStages; ++stage) {
      barrier_init(barriers.full(stage), 1);
      barrier_init(barriers.empty(stage), 2 * H::kCluster);  // the warpgroups of both blocks
      barrier_init(barriers.ready(stage), kClearing);
    }
    barrier_publish();
  }
  cluster_sync();
  const int warpgroup = thread_index() / 128;
  if (warpgroup == 0) {
    // 128 · 56 + 256 · 224 are the registers that 384 threads begin with, 168 each.
    fewer_registers<56>();
    if (thread_index() == 0) {
      load<Op, H>(launch, memory, barriers, rank);
    } else if (launch.masked && thread_index() >= 128 - kClearing) {
      clear<Op, H>(launch, memory, barriers, thread_index() - (128 - kClearing));
    }
    warp_sync();
  } else {
    more_registers<224>();
    consume<Op, Element, H>(launch, memory, barriers, rank, warpgroup - 1);
  }
  // A block that has ended cannot be written to, or arrived at, by the other one.
  cluster_sync();
}

}  // namespace kfade::cuda
