// Multiplication of few rows by mma.sync: weights and activations go from the ring into registers, so that a stage is
// handed back as soon as it has been read and not when the tensor cores are through with it.
//
// Fragments of D[16, 8] += A[16, 16] B[16, 8]: the layout of the accumulators is that of wgmma.cuh with a warp's 16 rows.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "ptx.cuh"

namespace sidp {
namespace cas {

// Four 8 x 8 matrices of 16-bit numbers; lane l names row l % 8 of matrix l / 8.
__device__ inline void load_matrices(u32 (&to)[4], u32 shared_row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
               : "r"(shared_row)
               : "memory");
}

#define SIDP_MMA(T, NAME)                                                                                           \
  __device__ inline void mma_16x8x16(T, float* d, const u32 (&a)[4], u32 b0, u32 b1) {                              \
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32." NAME "." NAME                                             \
                 ".f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"                                       \
                 : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])                                                   \
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));                                   \
  }
SIDP_MMA(__nv_bfloat16, "bf16")
SIDP_MMA(__half, "f16")
#undef SIDP_MMA

}  // namespace cas
}  // namespace sidp
