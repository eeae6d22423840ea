// The device's own instructions, one function each; names of instructions are the PTX ISA's. Compiled without CUDA
// these functions come from emulation/machine.h, where they run on a CPU.
#pragma once

#ifndef __CUDACC__
#include "emulation/machine.h"
#else

#include <cstdint>

#include "layout.h"

#define KFADE_DEVICE __device__ __forceinline__

namespace kfade::cuda {

// 16-bit elements as the matrix units tell them apart.
struct Bf16 {
  static constexpr bool kBf16 = true;
  uint16_t bits;
};
struct Fp16 {
  static constexpr bool kBf16 = false;
  uint16_t bits;
};

KFADE_DEVICE float to_float(Bf16 x) { return __uint_as_float(static_cast<uint32_t>(x.bits) << 16); }
KFADE_DEVICE float to_float(Fp16 x) {
  float y;
  asm("cvt.f32.f16 %0, %1;" : "=f"(y) : "h"(x.bits));
  return y;
}

// ---- programs and threads

KFADE_DEVICE int thread_index() { return static_cast<int>(threadIdx.x); }
KFADE_DEVICE int block_index() { return static_cast<int>(blockIdx.x); }
KFADE_DEVICE int block_count() { return static_cast<int>(gridDim.x); }
KFADE_DEVICE void block_sync() { __syncthreads(); }
KFADE_DEVICE void warp_sync() { __syncwarp(); }
// Volatile, so that the compiler does not move it, and with it accumulators, into the products.
KFADE_DEVICE float exchange(float x, int distance) {
  float y;
  asm volatile("shfl.sync.bfly.b32 %0, %1, %2, 31, 0xFFFFFFFF;" : "=f"(y) : "f"(x), "r"(distance));
  return y;
}
// 16 bytes of global memory; zeros, or nothing, where they are not wanted.
KFADE_DEVICE Four load_four(const float* at, bool wanted) {
  Four f;
  asm volatile(
      "{\n.reg .pred wanted;\nsetp.ne.b32 wanted, %5, 0;\n"
      "mov.f32 %0, 0f00000000;\nmov.f32 %1, 0f00000000;\nmov.f32 %2, 0f00000000;\nmov.f32 %3, 0f00000000;\n"
      "@wanted ld.global.v4.f32 {%0, %1, %2, %3}, [%4];\n}"
      : "=&f"(f.x), "=&f"(f.y), "=&f"(f.z), "=&f"(f.w)
      : "l"(at), "r"(static_cast<int>(wanted))
      : "memory");
  return f;
}
KFADE_DEVICE void store_four(float* at, bool wanted, Four f) {
  asm volatile(
      "{\n.reg .pred wanted;\nsetp.ne.b32 wanted, %5, 0;\n"
      "@wanted st.global.v4.f32 [%4], {%0, %1, %2, %3};\n}" ::"f"(f.x),
      "f"(f.y), "f"(f.z), "f"(f.w), "l"(at), "r"(static_cast<int>(wanted))
      : "memory");
}
KFADE_DEVICE uint32_t shared_base() {
  extern __shared__ __align__(1024) unsigned char memory[];
  return static_cast<uint32_t>(__cvta_generic_to_shared(memory));
}
KFADE_DEVICE void clear_shared(uint32_t address) {
  asm volatile("st.shared.v4.b32 [%0], {%1, %1, %1, %1};" ::"r"(address), "r"(0) : "memory");
}
KFADE_DEVICE float load_shared(uint32_t address) {
  float x;
  asm volatile("ld.shared.f32 %0, [%1];" : "=f"(x) : "r"(address) : "memory");
  return x;
}
KFADE_DEVICE void store_shared(uint32_t address, float x) {
  asm volatile("st.shared.f32 [%0], %1;" ::"r"(address), "f"(x) : "memory");
}

// ---- Ampere

// 16 bytes from global to shared memory, or zeros.
KFADE_DEVICE void copy_async(uint32_t to, const void* from, bool keep) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(__cvta_generic_to_global(from)),
               "r"(keep ? 16 : 0)
               : "memory");
}
KFADE_DEVICE void copy_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int Pending>
KFADE_DEVICE void copy_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(Pending) : "memory");
}
KFADE_DEVICE void load_matrices(uint32_t (&to)[4], uint32_t address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
               : "r"(address)
               : "memory");
}

#define KFADE_MMA(TYPE)                                                                                \
  asm volatile("mma.sync.aligned.m16n8k16.row.col.f32." TYPE "." TYPE                                  \
               ".f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"                  \
               : "+f"(acc[0]), "+f"(acc[1]), "+f"(acc[2]), "+f"(acc[3])                                \
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1))
template <class Element>
KFADE_DEVICE void multiply(float* acc, const uint32_t (&a)[4], uint32_t b0, uint32_t b1);
template <>
KFADE_DEVICE void multiply<Bf16>(float* acc, const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  KFADE_MMA("bf16");
}
template <>
KFADE_DEVICE void multiply<Fp16>(float* acc, const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  KFADE_MMA("f16");
}
#undef KFADE_MMA

// ---- Hopper (sm_90a)

template <int Registers>
KFADE_DEVICE void more_registers() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(Registers));
}
template <int Registers>
KFADE_DEVICE void fewer_registers() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(Registers));
}

KFADE_DEVICE int cluster_rank() {
  uint32_t rank;
  asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return static_cast<int>(rank);
}
// Every thread of both blocks has come here.
KFADE_DEVICE void cluster_sync() {
  asm volatile("barrier.cluster.arrive.release;\nbarrier.cluster.wait.acquire;" ::: "memory");
}

KFADE_DEVICE void barrier_init(uint32_t barrier, int arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(arrivals) : "memory");
}
// After initialisation, before other blocks and the copy engine see the barriers.
KFADE_DEVICE void barrier_publish() { asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory"); }
KFADE_DEVICE void barrier_arrive(uint32_t barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory");
}
// The barrier at the same address in block `rank` of the cluster. Says that products have read their operands, and
// publishes no ordinary writes: with the scope of the cluster it would wait for every store of the last tile.
KFADE_DEVICE void barrier_arrive_at(uint32_t barrier, int rank) {
  asm volatile(
      "{\n.reg .b32 remote;\n"
      "mapa.shared::cluster.u32 remote, %0, %1;\n"
      "mbarrier.arrive.shared::cluster.b64 _, [remote];\n}" ::"r"(barrier),
      "r"(rank)
      : "memory");
}
KFADE_DEVICE void barrier_expect(uint32_t barrier, int bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes) : "memory");
}
// Until the round of this parity is complete.
KFADE_DEVICE void barrier_wait(uint32_t barrier, uint32_t parity) {
  asm volatile(
      "{\n.reg .pred done;\n"
      "again:\n"
      "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
      "@!done bra again;\n}" ::"r"(barrier),
      "r"(parity)
      : "memory");
}

// Ordinary writes of this thread to shared memory, before the copy engine or the matrix units touch it.
KFADE_DEVICE void fence_async() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

// A tensor map that the host has copied to global memory, before this thread's first use of it.
KFADE_DEVICE void acquire_map(const TensorMap* map) {
  asm volatile("fence.proxy.tensormap::generic.acquire.sys [%0], 128;" ::"l"(map) : "memory");
}
KFADE_DEVICE void load_box(uint32_t to, const TensorMap* map, uint32_t barrier, int column, int row, int sequence) {
  asm volatile(
      "cp.async.bulk.tensor.3d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4, %5}], "
      "[%2];" ::"r"(to),
      "l"(map), "r"(barrier), "r"(column), "r"(row), "r"(sequence)
      : "memory");
}
// To the same address in both blocks of the cluster, and counted at the same barrier of each.
KFADE_DEVICE void load_box_for_both(uint32_t to, const TensorMap* map, uint32_t barrier, int column, int row,
                                    int sequence) {
  asm volatile(
      "cp.async.bulk.tensor.3d.shared::cluster.global.tile.mbarrier::complete_tx::bytes.multicast::cluster [%0], "
      "[%1, {%3, %4, %5}], [%2], %6;" ::"r"(to),
      "l"(map), "r"(barrier), "r"(column), "r"(row), "r"(sequence), "h"(static_cast<uint16_t>(3))
      : "memory");
}

// Before the first product, and where accumulators were touched otherwise.
KFADE_DEVICE void products_begin() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
KFADE_DEVICE void products_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
template <int Pending>
KFADE_DEVICE void products_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(Pending) : "memory");
}
// Keeps the compiler from reading accumulators before the wait that it stands behind.
template <int Count>
KFADE_DEVICE void products_done(float (&acc)[Count]) {
#pragma unroll
  for (int i = 0; i < Count; ++i) asm volatile("" : "+f"(acc[i])::"memory");
}

#define KFADE_8(a, i)                                                                                     \
  "+f"(a[i]), "+f"(a[i + 1]), "+f"(a[i + 2]), "+f"(a[i + 3]), "+f"(a[i + 4]), "+f"(a[i + 5]), "+f"(a[i + 6]), \
      "+f"(a[i + 7])
#define KFADE_32(a, i) KFADE_8(a, i), KFADE_8(a, i + 8), KFADE_8(a, i + 16), KFADE_8(a, i + 24)
// Both operands from shared memory by descriptors, both with the summed rows as the strided dimension.
#define KFADE_WGMMA_256(TYPE)                                                             \
  asm volatile(                                                                           \
      "{\n.reg .pred keep;\nsetp.ne.b32 keep, %130, 0;\n"                                \
      "wgmma.mma_async.sync.aligned.m64n256k16.f32." TYPE "." TYPE " "                     \
      "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "   \
      "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, "   \
      "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, "   \
      "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63, "   \
      "%64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79, "   \
      "%80, %81, %82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95, "   \
      "%96, %97, %98, %99, %100, %101, %102, %103, %104, %105, %106, %107, %108, %109, %110, %111, "   \
      "%112, %113, %114, %115, %116, %117, %118, %119, %120, %121, %122, %123, %124, %125, %126, %127}, "   \
      "%128, %129, keep, 1, 1, 1, 1;\n}"                                                   \
      : KFADE_32(acc, 0), KFADE_32(acc, 32), KFADE_32(acc, 64), KFADE_32(acc, 96)         \
      : "l"(left), "l"(right), "r"(keep))
#define KFADE_WGMMA_128(TYPE)                                                             \
  asm volatile(                                                                           \
      "{\n.reg .pred keep;\nsetp.ne.b32 keep, %66, 0;\n"                                 \
      "wgmma.mma_async.sync.aligned.m64n128k16.f32." TYPE "." TYPE " "                     \
      "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "   \
      "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, "   \
      "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, "   \
      "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63}, "   \
      "%64, %65, keep, 1, 1, 1, 1;\n}"                                                     \
      : KFADE_32(acc, 0), KFADE_32(acc, 32)                                               \
      : "l"(left), "l"(right), "r"(keep))

// acc = leftᵀ right, or with `keep` acc += leftᵀ right: 64 rows, and twice as many columns as there are accumulators.
template <class Element, int Count>
KFADE_DEVICE void multiply(float (&acc)[Count], uint64_t left, uint64_t right, int keep) {
  constexpr bool bf16 = Element::kBf16;
  static_assert(Count == 128 || Count == 64);
  if constexpr (Count == 128 && bf16) {
    KFADE_WGMMA_256("bf16");
  } else if constexpr (Count == 128) {
    KFADE_WGMMA_256("f16");
  } else if constexpr (bf16) {
    KFADE_WGMMA_128("bf16");
  } else {
    KFADE_WGMMA_128("f16");
  }
}
#undef KFADE_WGMMA_256
#undef KFADE_WGMMA_128
#undef KFADE_32
#undef KFADE_8

}  // namespace kfade::cuda

#endif  // __CUDACC__
