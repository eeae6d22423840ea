// The functions of cuda/ptx.h on a CPU: every thread of a cluster is a fibre, and waits give way in random order.
// Copies by the engine come late, products read their operands when they are waited for, barriers count as the PTX ISA
// says, and what hardware would leave undefined is an error. For tests: it runs the kernels as they are.
#pragma once

#include <setjmp.h>
#include <ucontext.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <functional>
#include <map>
#include <memory>
#include <random>
#include <stdexcept>
#include <string>
#include <vector>

#include "cuda/layout.h"

#define KFADE_DEVICE inline

namespace kfade::cuda {

struct Bf16 {
  static constexpr bool kBf16 = true;
  uint16_t bits;
};
struct Fp16 {
  static constexpr bool kBf16 = false;
  uint16_t bits;
};

inline float to_float(Bf16 x) {
  const uint32_t bits = static_cast<uint32_t>(x.bits) << 16;
  float y;
  std::memcpy(&y, &bits, 4);
  return y;
}
inline float to_float(Fp16 x) {
  const int exponent = x.bits >> 10 & 31, fraction = x.bits & 1023;
  const float sign = x.bits >> 15 ? -1.0f : 1.0f;
  if (exponent == 31) return fraction ? NAN : sign * INFINITY;
  return sign * (exponent ? std::ldexp(1024.0f + fraction, exponent - 25) : std::ldexp(float(fraction), -24));
}

namespace emulation {

struct Gate {
  int here = 0, round = 0;
};

struct Barrier {
  int arrivals = 0, pending = 0, bytes = 0;
  unsigned round = 0;
  // A round is over when all have arrived and all announced bytes have come.
  void settle() {
    if (pending == 0 && bytes == 0) {
      ++round;
      pending = arrivals;
    }
  }
};

struct Product {
  float* acc;
  int count;
  uint64_t left, right;
  bool keep, bf16;
};

struct Block;

struct Fibre {
  ucontext_t context;  // where it begins; then it is left and entered by jumps, which call no system
  jmp_buf left;
  bool begun = false;
  std::unique_ptr<char[]> stack;
  Block* block;
  int thread;
  bool done = false;
  bool unfenced = false;                 // wrote to shared memory and did not fence
  std::deque<std::vector<Product>> groups;  // of products, the last one open
  std::deque<std::vector<std::function<void()>>> copying;
  float slot = 0.0f;
  uint32_t address = 0;
  uint32_t a[4] = {}, b[2] = {};
};

struct Block {
  int index, rank;
  std::vector<unsigned char> shared;
  std::map<uint32_t, Barrier> barriers;
  std::vector<std::unique_ptr<Fibre>> fibres;
  std::vector<Gate> warps, warpgroups;
  Gate all;
  int registers = 0;
};

struct Machine {
  std::vector<std::unique_ptr<Block>> cluster;
  std::deque<std::function<void()>> engine;  // copies under way, which end in any order
  Gate all;
  Fibre* now = nullptr;
  jmp_buf scheduler;
  int blocks = 0;
  std::mt19937 random;
  std::function<void()> body;
  std::string failure;
  long progress = 0;
};

inline Machine machine;
inline unsigned seed = 0;

constexpr uint32_t kBase = 1024;  // of dynamic shared memory

inline void check(bool holds, const char* what) {
  if (!holds) {
    std::fprintf(stderr, "emulation: %s (block %d, thread %d)\n", what, machine.now ? machine.now->block->index : -1,
                 machine.now ? machine.now->thread : -1);
    std::abort();
  }
}
inline bool aligned(const void* at) { return reinterpret_cast<uintptr_t>(at) % 16 == 0; }
inline Block& block() { return *machine.now->block; }
[[gnu::noinline]] inline void yield() {
  if (_setjmp(machine.now->left) == 0) _longjmp(machine.scheduler, 1);
}
[[gnu::noinline]] inline void resume(Fibre& fibre) {
  machine.now = &fibre;
  if (_setjmp(machine.scheduler) == 0) {
    if (machine.now->begun) _longjmp(machine.now->left, 1);
    machine.now->begun = true;
    setcontext(&machine.now->context);
  }
  machine.now = nullptr;
}

inline void pass(Gate& gate, int count) {
  ++machine.progress;
  const int round = gate.round;
  if (++gate.here == count) {
    gate.here = 0;
    ++gate.round;
    return;
  }
  while (gate.round == round) yield();
}
inline Gate& warp_gate() { return block().warps[machine.now->thread / 32]; }
inline Fibre& lane(int number) { return *block().fibres[machine.now->thread / 32 * 32 + number]; }

inline unsigned char* shared(Block& b, uint32_t address, int bytes, int alignment) {
  check(address % alignment == 0, "an address in shared memory is not aligned");
  check(address >= kBase && address + bytes <= kBase + b.shared.size(), "an address is outside of shared memory");
  return b.shared.data() + address - kBase;
}
inline Barrier& barrier(Block& b, uint32_t address) {
  check(b.barriers.count(address), "a barrier was not initialised");
  return b.barriers[address];
}
inline void arrive(Block& b, uint32_t address) {
  Barrier& x = barrier(b, address);
  check(x.pending > 0, "a barrier had more arrivals than it was made for");
  --x.pending;
  x.settle();
  ++machine.progress;
}

inline void entry() {
  machine.body();
  machine.now->done = true;
  ++machine.progress;
  yield();
}

// One cluster, until all of its threads have ended.
inline void run_cluster(int first, int cluster, int threads, int shared_bytes) {
  machine.cluster.clear();
  machine.all = Gate{};
  for (int rank = 0; rank < cluster; ++rank) {
    auto b = std::make_unique<Block>();
    b->index = first + rank;
    b->rank = rank;
    b->shared.assign(shared_bytes, 0xFF);  // NaN
    b->warps.resize(threads / 32);
    b->warpgroups.resize((threads + 127) / 128);
    for (int thread = 0; thread < threads; ++thread) {
      auto f = std::make_unique<Fibre>();
      f->block = b.get();
      f->thread = thread;
      f->groups.emplace_back();
      f->copying.emplace_back();
      constexpr size_t kStack = 64 << 10;
      f->stack.reset(new char[kStack]);
      getcontext(&f->context);
      f->context.uc_stack.ss_sp = f->stack.get();
      f->context.uc_stack.ss_size = kStack;
      f->context.uc_link = nullptr;
      makecontext(&f->context, entry, 0);
      b->fibres.push_back(std::move(f));
    }
    machine.cluster.push_back(std::move(b));
  }
  struct Warp {
    Block* block;
    int first;
  };
  std::vector<Warp> warps;
  for (auto& b : machine.cluster) {
    for (int thread = 0; thread < threads; thread += 32) warps.push_back({b.get(), thread});
  }
  int idle = 0;
  for (bool running = true; running;) {
    const long before = machine.progress;
    running = false;
    std::shuffle(warps.begin(), warps.end(), machine.random);
    for (const Warp& w : warps) {
      const bool behind = machine.random() % 4 == 0;
      for (int i = 0; i < std::min(32, threads - w.first); ++i) {
        Fibre& f = *w.block->fibres[w.first + i];
        if (f.done) continue;
        running = true;
        if (behind) continue;
        resume(f);
      }
      while (!machine.engine.empty() && machine.random() % 2) {
        const size_t which = machine.random() % machine.engine.size();
        std::swap(machine.engine[which], machine.engine.front());
        machine.engine.front()();
        machine.engine.pop_front();
        ++machine.progress;
      }
    }
    idle = machine.progress == before ? idle + 1 : 0;
    check(idle < 1000, "all threads wait, and for ever");
  }
  check(machine.engine.empty(), "a block has ended with copies under way");
  for (auto& b : machine.cluster) {
    for (auto& [address, x] : b->barriers) check(x.bytes == 0, "a block has ended with bytes under way");
  }
}

template <class Body>
void launch(int blocks, int cluster, int threads, int shared_bytes, Body body) {
  check(blocks % cluster == 0, "blocks are not whole clusters");
  machine.random.seed(++seed);
  machine.body = body;
  machine.blocks = blocks;
  for (int first = 0; first < blocks; first += cluster) run_cluster(first, cluster, threads, shared_bytes);
  machine.cluster.clear();
}

inline float element(bool bf16, uint16_t bits) { return bf16 ? to_float(Bf16{bits}) : to_float(Fp16{bits}); }

// What a matrix descriptor says of element (x, k) of an operand whose x dimension is contiguous; PTX ISA, "Strides" and
// "Canonical layouts" of asynchronous warpgroup products.
inline uint32_t described(uint64_t d, int x, int k) {
  check(d >> 62 == 1, "a descriptor is not of the 128-byte swizzle");
  check((d >> 49 & 7) == 0, "a descriptor has a base offset");
  const uint32_t start = (d & 0x3FFF) << 4, leading = (d >> 16 & 0x3FFF) << 4, stride = (d >> 32 & 0x3FFF) << 4;
  check(start % 1024 == 0, "a described operand does not begin on 1024 bytes");
  const uint32_t at = start + x / 64 * leading + x % 64 * 2 + k / 8 * stride + k % 8 * 128;
  return at ^ (at >> 3 & 0x70);
}

// Products of 16 summed rows are added up before they go to the accumulator, as matrix units do.
inline void multiply_now(const Product& p) {
  const int thread = machine.now->thread % 128;
  const int columns = 2 * p.count;
  const Place mine = fragment(thread % 32);
  const auto operand = [&](uint64_t described_by, int x, int k) {
    uint16_t bits;
    std::memcpy(&bits, shared(block(), described(described_by, x, k), 2, 2), 2);
    return element(p.bf16, bits);
  };
  float left[2][kProductDepth], right[kProductDepth];
  for (int k = 0; k < kProductDepth; ++k) {
    for (int h = 0; h < 2; ++h) left[h][k] = operand(p.left, thread / 32 * 16 + mine.row + 8 * h, k);
  }
  for (int column = 0; column < columns / 4; ++column) {
    const int j = column / 2, i = column % 2;
    for (int k = 0; k < kProductDepth; ++k) right[k] = operand(p.right, 8 * j + mine.column + i, k);
    for (int h = 0; h < 2; ++h) {
      float sum = 0.0f;
      for (int k = 0; k < kProductDepth; ++k) sum += left[h][k] * right[k];
      float& x = p.acc[4 * j + 2 * h + i];
      x = p.keep ? x + sum : sum;
    }
  }
}

// A tensor map: rank 3, the first dimension contiguous.
struct Map {
  const unsigned char* at;
  uint64_t columns, rows, sequences, row_bytes, sequence_bytes, magic;
};
constexpr uint64_t kMagic = 0x6b66616465;

inline void load_box(Block& b, uint32_t to, const TensorMap* map, int column, int row, int sequence) {
  Map m;
  std::memcpy(&m, map, sizeof m);
  check(m.magic == kMagic, "a tensor map was not encoded");
  check(to % 1024 == 0, "a box does not begin on 1024 bytes");
  for (int r = 0; r < kBoxDepth; ++r) {
    for (int c = 0; c < kBoxColumns; ++c) {
      const uint64_t x = column + c, y = row + r, z = sequence;
      uint16_t bits = 0;
      if (x < m.columns && y < m.rows && z < m.sequences) {
        std::memcpy(&bits, m.at + z * m.sequence_bytes + y * m.row_bytes + 2 * x, 2);
      }
      const uint32_t at = to + r * 128 + c * 2;
      std::memcpy(shared(b, at ^ (at >> 3 & 0x70), 2, 2), &bits, 2);
    }
  }
}
inline void start_box(uint32_t to, const TensorMap* map, uint32_t bar, int column, int row, int sequence, int blocks) {
  for (auto& b : machine.cluster) {
    if (!(blocks >> b->rank & 1)) continue;
    Block* where = b.get();
    machine.engine.push_back([=] {
      load_box(*where, to, map, column, row, sequence);
      Barrier& x = barrier(*where, bar);
      x.bytes -= kBoxBytes;
      x.settle();
    });
  }
}

}  // namespace emulation

inline int thread_index() { return emulation::machine.now->thread; }
inline int block_index() { return emulation::block().index; }
inline int block_count() { return emulation::machine.blocks; }
inline void block_sync() {
  emulation::Block& b = emulation::block();
  emulation::pass(b.all, static_cast<int>(b.fibres.size()));
}
inline void warp_sync() { emulation::pass(emulation::warp_gate(), 32); }
inline float exchange(float x, int distance) {
  emulation::machine.now->slot = x;
  warp_sync();
  const float y = emulation::lane(thread_index() % 32 ^ distance).slot;
  warp_sync();
  return y;
}
inline Four load_four(const float* at, bool wanted) {
  emulation::check(!wanted || emulation::aligned(at), "16 bytes are read from an address that is not aligned");
  return wanted ? Four{at[0], at[1], at[2], at[3]} : Four{0.0f, 0.0f, 0.0f, 0.0f};
}
inline void store_four(float* at, bool wanted, Four f) {
  emulation::check(!wanted || emulation::aligned(at), "16 bytes are written to an address that is not aligned");
  if (wanted) std::memcpy(at, &f, 16);
}
inline uint32_t shared_base() { return emulation::kBase; }
inline void clear_shared(uint32_t address) {
  std::memset(emulation::shared(emulation::block(), address, 16, 16), 0, 16);
  emulation::machine.now->unfenced = true;
}
inline float load_shared(uint32_t address) {
  float x;
  std::memcpy(&x, emulation::shared(emulation::block(), address, 4, 4), 4);
  return x;
}
inline void store_shared(uint32_t address, float x) {
  std::memcpy(emulation::shared(emulation::block(), address, 4, 4), &x, 4);
}

inline void copy_async(uint32_t to, const void* from, bool keep) {
  emulation::Block* b = &emulation::block();
  emulation::check(emulation::aligned(from), "16 bytes are copied from an address that is not aligned");
  emulation::machine.now->copying.back().push_back([=] {
    unsigned char* at = emulation::shared(*b, to, 16, 16);
    if (keep) {
      std::memcpy(at, from, 16);
    } else {
      std::memset(at, 0, 16);
    }
  });
}
inline void copy_commit() { emulation::machine.now->copying.emplace_back(); }
template <int Pending>
void copy_wait() {
  auto& groups = emulation::machine.now->copying;
  while (static_cast<int>(groups.size()) > Pending + 1) {
    for (auto& one : groups.front()) one();
    groups.pop_front();
  }
}
inline void load_matrices(uint32_t (&to)[4], uint32_t address) {
  emulation::machine.now->address = address;
  warp_sync();
  const int lane = thread_index() % 32;
  for (int matrix = 0; matrix < 4; ++matrix) {
    for (int i = 0; i < 2; ++i) {
      const uint32_t line = emulation::lane(8 * matrix + 2 * (lane % 4) + i).address;
      uint16_t bits;
      std::memcpy(&bits, emulation::shared(emulation::block(), line, 16, 16) + 2 * (lane / 4), 2);
      to[matrix] = i ? to[matrix] | static_cast<uint32_t>(bits) << 16 : bits;
    }
  }
  warp_sync();
}
template <class Element>
void multiply(float* acc, const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  emulation::Fibre& me = *emulation::machine.now;
  std::memcpy(me.a, a, sizeof me.a);
  me.b[0] = b0;
  me.b[1] = b1;
  warp_sync();
  const int lane = thread_index() % 32;
  for (int h = 0; h < 2; ++h) {
    for (int i = 0; i < 2; ++i) {
      float sum = 0.0f;
      for (int k = 0; k < 16; ++k) {
        // Register 2 · (k / 8) + h of the lane that holds row lane / 4 + 8 h.
        const uint32_t left = emulation::lane(lane / 4 * 4 + k % 8 / 2).a[k / 8 * 2 + h];
        const uint32_t right = emulation::lane((2 * (lane % 4) + i) * 4 + k % 8 / 2).b[k / 8];
        const int shift = k % 2 * 16;
        sum += emulation::element(Element::kBf16, static_cast<uint16_t>(left >> shift)) *
               emulation::element(Element::kBf16, static_cast<uint16_t>(right >> shift));
      }
      acc[2 * h + i] += sum;
    }
  }
  warp_sync();
}

template <int Registers>
void more_registers() {
  emulation::pass(emulation::block().warpgroups[thread_index() / 128], 128);
}
template <int Registers>
void fewer_registers() {
  emulation::pass(emulation::block().warpgroups[thread_index() / 128], 128);
}
inline int cluster_rank() { return emulation::block().rank; }
inline void cluster_sync() {
  auto& m = emulation::machine;
  emulation::pass(m.all, static_cast<int>(m.cluster.size() * emulation::block().fibres.size()));
}
inline void barrier_init(uint32_t barrier, int arrivals) {
  emulation::shared(emulation::block(), barrier, 8, 8);
  emulation::Barrier& x = emulation::block().barriers[barrier];
  x.arrivals = x.pending = arrivals;
}
inline void barrier_publish() {}
inline void barrier_arrive(uint32_t barrier) {
  emulation::check(!emulation::machine.now->unfenced, "shared memory was written and not fenced");
  emulation::arrive(emulation::block(), barrier);
}
inline void barrier_arrive_at(uint32_t barrier, int rank) {
  emulation::check(!emulation::machine.now->unfenced, "shared memory was written and not fenced");
  emulation::Block& b = *emulation::machine.cluster.at(rank);
  emulation::check(!b.fibres[0]->done, "an arrival at a block that has ended");
  emulation::arrive(b, barrier);
}
inline void barrier_expect(uint32_t barrier, int bytes) {
  emulation::barrier(emulation::block(), barrier).bytes += bytes;
  emulation::arrive(emulation::block(), barrier);
}
inline void barrier_wait(uint32_t barrier, uint32_t parity) {
  while ((emulation::barrier(emulation::block(), barrier).round & 1) == parity) emulation::yield();
}
inline void fence_async() { emulation::machine.now->unfenced = false; }
inline void acquire_map(const TensorMap*) {}
inline void load_box(uint32_t to, const TensorMap* map, uint32_t barrier, int column, int row, int sequence) {
  emulation::start_box(to, map, barrier, column, row, sequence, 1 << cluster_rank());
}
inline void load_box_for_both(uint32_t to, const TensorMap* map, uint32_t barrier, int column, int row, int sequence) {
  emulation::start_box(to, map, barrier, column, row, sequence, 3);
}

inline void products_begin() {}
template <class Element, int Count>
void multiply(float (&acc)[Count], uint64_t left, uint64_t right, int keep) {
  emulation::machine.now->groups.back().push_back({acc, Count, left, right, keep != 0, Element::kBf16});
}
inline void products_commit() { emulation::machine.now->groups.emplace_back(); }
template <int Pending>
void products_wait() {
  auto& groups = emulation::machine.now->groups;
  while (static_cast<int>(groups.size()) > Pending + 1) {
    for (const emulation::Product& one : groups.front()) emulation::multiply_now(one);
    groups.pop_front();
  }
  // Products are the warpgroup's: they are done for all of its threads or for none.
  emulation::pass(emulation::block().warpgroups[thread_index() / 128], 128);
}
template <int Count>
void products_done(float (&)[Count]) {}

}  // namespace kfade::cuda
