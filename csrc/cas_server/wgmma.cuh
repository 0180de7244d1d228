// wgmma with 64 weight rows as A and N activation rows as B, both K-major in shared memory with the 128-byte swizzle.
//
// D[64, N] += A[64, 16] B[N, 16]^T; float32 accumulators. Thread t of the warpgroup (warp w = t / 32, lane l) holds
//   d[4 j + 2 r + e] = D[16 w + l / 4 + 8 r, 8 j + 2 (l % 4) + e],  j < N / 8, r < 2, e < 2.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "ptx.cuh"

#if defined(SIDP_SM90A)

namespace sidp {
namespace cas {

// Descriptor of a tile whose rows are 128 bytes (64 elements of 16 bits) and which starts on a 1024-byte boundary:
// 8-row groups 1024 bytes apart, swizzle mode 1 (128 bytes). 16 elements further along K: add 2.
__device__ inline u64 tile_descriptor(u32 shared_start) {
  return (u64(1) << 62) | (u64(1024 >> 4) << 32) | (u64(1) << 16) | ((shared_start & 0x3FFFF) >> 4);
}

__device__ inline void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ inline void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
template <int kPending>
__device__ inline void wgmma_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kPending) : "memory");
}

template <typename T, int N>
struct Wgmma;

// Placeholders and operands of 4, 8, 16, 32, 64 accumulators.
#define SIDP_P4 "%0,%1,%2,%3"
#define SIDP_P8 SIDP_P4 ",%4,%5,%6,%7"
#define SIDP_P16 SIDP_P8 ",%8,%9,%10,%11,%12,%13,%14,%15"
#define SIDP_P32 SIDP_P16 ",%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,%27,%28,%29,%30,%31"
#define SIDP_P64                                                                          \
  SIDP_P32 ",%32,%33,%34,%35,%36,%37,%38,%39,%40,%41,%42,%43,%44,%45,%46,%47,%48,%49,%50" \
           ",%51,%52,%53,%54,%55,%56,%57,%58,%59,%60,%61,%62,%63"
#define SIDP_D4(o) "+f"(d[o]), "+f"(d[o + 1]), "+f"(d[o + 2]), "+f"(d[o + 3])
#define SIDP_D8(o) SIDP_D4(o), SIDP_D4(o + 4)
#define SIDP_D16(o) SIDP_D8(o), SIDP_D8(o + 8)
#define SIDP_D32(o) SIDP_D16(o), SIDP_D16(o + 16)
#define SIDP_D64(o) SIDP_D32(o), SIDP_D32(o + 32)

#define SIDP_WGMMA(T, NAME, N, PLACES, OPERANDS, A, B)                                                        \
  template <>                                                                                                 \
  struct Wgmma<T, N> {                                                                                        \
    static __device__ inline void add(float* d, u64 a, u64 b) {                                               \
      asm volatile(                                                                                           \
          "{\n.reg .pred p;\nsetp.ne.b32 p, 1, 0;\n"                                                          \
          "wgmma.mma_async.sync.aligned.m64n" #N "k16.f32." NAME "." NAME " {" PLACES "}, %" #A ", %" #B      \
          ", p, 1, 1, 0, 0;\n}"                                                                               \
          : OPERANDS                                                                                          \
          : "l"(a), "l"(b));                                                                                  \
    }                                                                                                         \
  };
#define SIDP_WGMMA_SIZES(T, NAME)                         \
  SIDP_WGMMA(T, NAME, 8, SIDP_P4, SIDP_D4(0), 4, 5)       \
  SIDP_WGMMA(T, NAME, 16, SIDP_P8, SIDP_D8(0), 8, 9)      \
  SIDP_WGMMA(T, NAME, 32, SIDP_P16, SIDP_D16(0), 16, 17)  \
  SIDP_WGMMA(T, NAME, 64, SIDP_P32, SIDP_D32(0), 32, 33)  \
  SIDP_WGMMA(T, NAME, 128, SIDP_P64, SIDP_D64(0), 64, 65)

SIDP_WGMMA_SIZES(__nv_bfloat16, "bf16")
SIDP_WGMMA_SIZES(__half, "f16")

#undef SIDP_WGMMA_SIZES
#undef SIDP_WGMMA
#undef SIDP_D64
#undef SIDP_D32
#undef SIDP_D16
#undef SIDP_D8
#undef SIDP_D4
#undef SIDP_P64
#undef SIDP_P32
#undef SIDP_P16
#undef SIDP_P8
#undef SIDP_P4

}  // namespace cas
}  // namespace sidp

#endif
