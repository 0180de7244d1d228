// The few PTX instructions the CaS kernels are made of: shared words, clocks, mbarriers, bulk tensor copies.
#pragma once

#include <cuda.h>

#include <cstdint>

#include "../device_words.cuh"

namespace sidp {
namespace cas {

using u16 = std::uint16_t;
using u32 = std::uint32_t;
using u64 = std::uint64_t;

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900 && defined(__CUDA_ARCH_FEAT_SM90_ALL)
#define SIDP_SM90A 1
#endif

// --- words shared with a peer (system scope) or with other CTAs (gpu scope); more of them: device_words.cuh ---

using sidp::load_acquire_gpu;
using sidp::load_acquire_sys;
using sidp::now_ns;
using sidp::store_release_gpu;

__device__ inline u32 load_acquire_sys(const u32* word) {
  u32 value;
  asm volatile("ld.acquire.sys.global.u32 %0, [%1];" : "=r"(value) : "l"(word) : "memory");
  return value;
}
__device__ inline void store_release_sys(u64* word, u64 value) {
  asm volatile("st.release.sys.global.u64 [%0], %1;" ::"l"(word), "l"(value) : "memory");
}
__device__ inline u32 load_acquire_gpu(const u32* word) {
  u32 value;
  asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(value) : "l"(word) : "memory");
  return value;
}
// Returns what was there before.
__device__ inline u32 compare_swap_gpu(u32* word, u32 expected, u32 desired) {
  u32 before;
  asm volatile("atom.acq_rel.gpu.global.cas.b32 %0, [%1], %2, %3;"
               : "=r"(before)
               : "l"(word), "r"(expected), "r"(desired)
               : "memory");
  return before;
}
__device__ inline void store_release_gpu(u32* word, u32 value) {
  asm volatile("st.release.gpu.global.u32 [%0], %1;" ::"l"(word), "r"(value) : "memory");
}
// Returns the value before the addition.
__device__ inline u32 add_acq_rel_gpu(u32* word, u32 value) {
  u32 before;
  asm volatile("atom.acq_rel.gpu.global.add.u32 %0, [%1], %2;" : "=r"(before) : "l"(word), "r"(value) : "memory");
  return before;
}

// Orders this thread's accesses, and what it has observed, before its later ones, for all of the system; less than
// __threadfence_system(), which is sequentially consistent.
__device__ inline void fence_sys() { asm volatile("fence.acq_rel.sys;" ::: "memory"); }
__device__ inline u32 add_acquire_gpu(u32* word, u32 value) {
  u32 before;
  asm volatile("atom.acquire.gpu.global.add.u32 %0, [%1], %2;" : "=r"(before) : "l"(word), "r"(value) : "memory");
  return before;
}
__device__ inline u32 add_relaxed_gpu(u32* word, u32 value) {
  u32 before;
  asm volatile("atom.relaxed.gpu.global.add.u32 %0, [%1], %2;" : "=r"(before) : "l"(word), "r"(value) : "memory");
  return before;
}

// 16 bytes that are read and written as one.
struct alignas(16) Pair {
  u64 first;
  u64 second;
};
#define SIDP_PAIR_LOAD(NAME, ORDER)                                                                            \
  __device__ inline Pair NAME(const void* at) {                                                                \
    Pair value;                                                                                                \
    asm volatile("{\n.reg .b128 pair;\nld." ORDER ".global.b128 pair, [%2];\nmov.b128 {%0, %1}, pair;\n}"      \
                 : "=l"(value.first), "=l"(value.second)                                                       \
                 : "l"(at)                                                                                     \
                 : "memory");                                                                                  \
    return value;                                                                                              \
  }
#define SIDP_PAIR_STORE(NAME, ORDER)                                                                           \
  __device__ inline void NAME(void* at, Pair value) {                                                          \
    asm volatile("{\n.reg .b128 pair;\nmov.b128 pair, {%1, %2};\nst." ORDER ".global.b128 [%0], pair;\n}" ::"l"( \
                     at),                                                                                      \
                 "l"(value.first), "l"(value.second)                                                           \
                 : "memory");                                                                                  \
  }
SIDP_PAIR_LOAD(load_pair_acquire_sys, "acquire.sys")
SIDP_PAIR_LOAD(load_pair_relaxed_gpu, "relaxed.gpu")
SIDP_PAIR_STORE(store_pair_release_sys, "release.sys")
SIDP_PAIR_STORE(store_pair_relaxed_gpu, "relaxed.gpu")
#undef SIDP_PAIR_LOAD
#undef SIDP_PAIR_STORE

// `condition()` until true; false when `bound_ns` have passed. Reads the clock every 64 tries.
template <typename Condition>
__device__ inline bool spin_until(Condition condition, u64 bound_ns) {
  if (condition()) return true;
  const u64 start = now_ns();
  while (true) {
#pragma unroll 1
    for (int i = 0; i < 64; ++i)
      if (condition()) return true;
    if (now_ns() - start > bound_ns) return false;
  }
}

#if defined(SIDP_SM90A)
// --- mbarriers (shared memory) ---

__device__ inline u32 shared_address(const void* pointer) {
  return static_cast<u32>(__cvta_generic_to_shared(pointer));
}
__device__ inline void barrier_init(u64* barrier, u32 arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(barrier)), "r"(arrivals) : "memory");
}
__device__ inline void barrier_init_fence() { asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory"); }
__device__ inline void barrier_arrive(u64* barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(barrier)) : "memory");
}
__device__ inline void barrier_arrive_expect(u64* barrier, u32 bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(barrier)), "r"(bytes)
               : "memory");
}
__device__ inline bool barrier_try_wait(u64* barrier, u32 parity) {
  u32 done;
  asm volatile(
      "{\n.reg .pred p;\n"
      "mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2;\n"
      "selp.u32 %0, 1, 0, p;\n}"
      : "=r"(done)
      : "r"(shared_address(barrier)), "r"(parity)
      : "memory");
  return done != 0;
}

// --- the async proxy ---

// Between generic accesses (ours or, after an acquire, a peer's) and those of the bulk copy engine or wgmma.
__device__ inline void fence_async_proxy() { asm volatile("fence.proxy.async;" ::: "memory"); }

__device__ inline void prefetch_map(const CUtensorMap* map) {
  asm volatile("prefetch.tensormap [%0];" ::"l"(map) : "memory");
}

constexpr u64 kEvictFirst = 0x12F0000000000000ull;  // L2 policies as createpolicy.fractional makes them
constexpr u64 kEvictLast = 0x14F0000000000000ull;

// Box at (column, row) of a 2-D map into shared memory; its bytes are counted on `barrier`.
__device__ inline void copy_box(const CUtensorMap* map, u64* barrier, void* target, u32 column, u32 row, u64 policy) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint"
      " [%0], [%1, {%3, %4}], [%2], %5;" ::"r"(shared_address(target)),
      "l"(map), "r"(shared_address(barrier)), "r"(column), "r"(row), "l"(policy)
      : "memory");
}
// The same for a 3-D map (column, row, matrix).
__device__ inline void copy_box(const CUtensorMap* map, u64* barrier, void* target, u32 column, u32 row, u32 matrix,
                                u64 policy) {
  asm volatile(
      "cp.async.bulk.tensor.3d.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint"
      " [%0], [%1, {%3, %4, %5}], [%2], %6;" ::"r"(shared_address(target)),
      "l"(map), "r"(shared_address(barrier)), "r"(column), "r"(row), "r"(matrix), "l"(policy)
      : "memory");
}
#endif

}  // namespace cas
}  // namespace sidp
