// sm_90a serving kernel: products. Warpgroup g multiplies rows 64 g .. 64 g + 63 of both boxes of a stage with the
// activations: in the first phase of a gated FFN these are the same rows of gate and up, so that the activation needs nobody
// else. All of it must be inlined: where ptxas sees a call it waits after every single wgmma.
#pragma once

#include "activation.cuh"
#include "mma_sync.cuh"
#include "sm90_shared.cuh"

#if defined(SIDP_SM90A)

namespace sidp {
namespace cas {

template <int N>
using Accumulators = float[2][N / 2];  // per box; the layout of wgmma.cuh

// Who a thread is among the multipliers, and where its ring stands.
struct Multiplier {
  u32 group;   // warpgroup, 0 or 1
  u32 thread;  // within the warpgroup
  u32 lane;
  u32 ring;  // shared address
  RingPosition position;
  u32 width;

  __device__ void sync_group() const { asm volatile("bar.sync %0, 128;" ::"r"(1 + group) : "memory"); }
  // Row of the 64 that accumulators 4 j + 2 r + e belong to.
  __device__ u32 row(u32 r) const { return group * 64 + thread / 32 * 16 + lane / 4 + 8 * r; }
};

// Adds `stages` stages of the ring to the accumulators. Few rows: a stage is handed back while the next is multiplied, so
// that the multiplications follow each other closely. Many rows: it is handed back at once, since there the ring has fewer
// stages and the other warpgroup fills the gap. Both measured the other way round: slower.
template <typename T, int N>
__device__ __forceinline__ void multiply(const ServerArguments& args, SharedState& shared, Multiplier& me, u32 stages,
                                         Accumulators<N>& sums) {
#if defined(SIDP_CAS_HALVES)
  constexpr bool kOverlap = N <= 32 || SIDP_CAS_HALVES > 1;
  u32 previous = 0;
  for (u32 i = 0; i < stages; ++i) {
    const u32 stage = me.position.stage;
    const u64 rows = tile_descriptor(me.ring + stages_of(N) * kWeightBytes + stage * N * 128);
#pragma unroll
    for (u32 box = 0; box < 2; ++box) {
      wait_barrier(args, &shared.full[part_of(stage, box)], me.position.parity(), ServerFault::kRing, args.stall_ns);
      const u64 weights = tile_descriptor(me.ring + stage * kWeightBytes + box * kBoxBytes + me.group * 64 * 128);
      wgmma_fence();
#pragma unroll
      for (u32 k = 0; k < kBoxColumns / 16; ++k) Wgmma<T, N>::add(sums[box], weights + 2 * k, rows + 2 * k);
      wgmma_commit();
      wgmma_wait<kOverlap ? 1 : 0>();
      if (me.lane == 0 && (!kOverlap || i + box > 0))
        barrier_arrive(&shared.empty[kOverlap ? previous : part_of(stage, box)]);
      previous = part_of(stage, box);
    }
    me.position.advance(stages_of(N));
  }
#else
  constexpr bool kOverlap = N <= 32;
  u32 previous = 0;
  for (u32 i = 0; i < stages; ++i) {
    const u32 stage = me.position.stage;
    wait_barrier(args, &shared.full[stage], me.position.parity(), ServerFault::kRing, args.stall_ns);
    const u64 lower = tile_descriptor(me.ring + stage * kWeightBytes + me.group * 64 * 128);
    const u64 upper = lower + (kBoxBytes >> 4);
    const u64 rows = tile_descriptor(me.ring + stages_of(N) * kWeightBytes + stage * N * 128);
    wgmma_fence();
#pragma unroll
    for (u32 k = 0; k < kBoxColumns / 16; ++k) {
      Wgmma<T, N>::add(sums[0], lower + 2 * k, rows + 2 * k);
      Wgmma<T, N>::add(sums[1], upper + 2 * k, rows + 2 * k);
    }
    wgmma_commit();
    wgmma_wait<kOverlap ? 1 : 0>();
    if (me.lane == 0 && (!kOverlap || i > 0)) barrier_arrive(&shared.empty[kOverlap ? previous : stage]);
    previous = stage;
    me.position.advance(stages_of(N));
  }
#endif
  wgmma_wait<0>();
  if (kOverlap && me.lane == 0) barrier_arrive(&shared.empty[previous]);
}

#if defined(SIDP_CAS_LDMATRIX)
// What a warp multiplies of one stage: 16 rows of both boxes and all N rows of activations, 64 columns. kWide: see
// wide_down().
template <int N, bool kWide>
struct Fragments {
  u32 weights[2][kBoxColumns / 16][4];
  u32 rows[kWide ? 2 : 1][N / 8][kBoxColumns / 32][4];  // of each box, or of both
};

// The 16-byte unit `unit` of row `row` in a box with the 128-byte swizzle, as a byte offset.
__device__ inline u32 swizzled(u32 row, u32 unit) { return row * 128 + ((unit ^ row % 8) << 4); }

template <int N, bool kWide>
__device__ __forceinline__ void load_fragments(const ServerArguments& args, SharedState& shared, const Multiplier& me,
                                               Fragments<N, kWide>& to) {
  const u32 stage = me.position.stage;
  wait_barrier(args, &shared.full[part_of(stage, 0)], me.position.parity(), ServerFault::kRing, args.stall_ns);
  const u32 box = me.ring + stage * kWeightBytes, row = me.group * 64 + me.thread / 32 * 16 + me.lane % 16;
  const u32 activations = me.ring + stages_of(N) * kWeightBytes + stage * activation_bytes(N);
#pragma unroll
  for (u32 half = 0; half < kBoxColumns / 32; ++half)
#pragma unroll
    for (u32 j = 0; j < N / 8; ++j)
#pragma unroll
      for (u32 i = 0; i < (kWide ? 2 : 1); ++i)
        load_matrices(to.rows[i][j][half],
                      activations + i * N * 128 + swizzled(8 * j + me.lane % 8, 4 * half + me.lane / 8));
#pragma unroll
  for (u32 k = 0; k < kBoxColumns / 16; ++k) load_matrices(to.weights[0][k], box + swizzled(row, 2 * k + me.lane / 16));
  if (kParts > 1)
    wait_barrier(args, &shared.full[part_of(stage, 1)], me.position.parity(), ServerFault::kRing, args.stall_ns);
#pragma unroll
  for (u32 k = 0; k < kBoxColumns / 16; ++k)
    load_matrices(to.weights[1][k], box + kBoxBytes + swizzled(row, 2 * k + me.lane / 16));
  if (kParts > 1) {
    fence_async_proxy_shared();
    __syncwarp();
    if (me.lane == 0) barrier_arrive(&shared.empty[part_of(stage, 0)]);
  }
}

template <typename T, int N, bool kWide>
__device__ __forceinline__ void multiply_fragments(const Fragments<N, kWide>& f, Accumulators<N>& sums) {
#pragma unroll
  for (u32 k = 0; k < kBoxColumns / 16; ++k)
#pragma unroll
    for (u32 j = 0; j < N / 8; ++j)
#pragma unroll
      for (u32 box = 0; box < 2; ++box) {
        const u32(&rows)[4] = f.rows[kWide ? box : 0][j][k / 2];
        mma_16x8x16(T(), &sums[box][4 * j], f.weights[box][k], rows[k % 2 * 2], rows[k % 2 * 2 + 1]);
      }
}

// The same as multiply() for few rows. While a stage's fragments are on their way the previous ones are multiplied; then the
// stage, which nobody needs any more, is handed back. kWide: all is in sums[0] in the end.
template <typename T, int N, bool kWide>
__device__ __forceinline__ void multiply_registers(const ServerArguments& args, SharedState& shared, Multiplier& me,
                                                   u32 stages, Accumulators<N>& sums) {
  auto hand_back = [&] {
    fence_async_proxy_shared();
    __syncwarp();
    if (me.lane == 0) barrier_arrive(&shared.empty[part_of(me.position.stage, 1)]);
    me.position.advance(stages_of(N));
  };
  Fragments<N, kWide> even, odd;
  load_fragments<N, kWide>(args, shared, me, even);
  hand_back();
  for (u32 left = stages - 1;; left -= 2) {
    if (left == 0) {
      multiply_fragments<T, N, kWide>(even, sums);
      break;
    }
    load_fragments<N, kWide>(args, shared, me, odd);
    multiply_fragments<T, N, kWide>(even, sums);
    hand_back();
    if (left == 1) {
      multiply_fragments<T, N, kWide>(odd, sums);
      break;
    }
    load_fragments<N, kWide>(args, shared, me, even);
    multiply_fragments<T, N, kWide>(odd, sums);
    hand_back();
  }
  if constexpr (kWide) {
#pragma unroll
    for (u32 i = 0; i < N / 2; ++i) {
      sums[0][i] += sums[1][i];
      sums[1][i] = 0.0f;
    }
  }
}
#endif

}  // namespace cas
}  // namespace sidp

#endif
