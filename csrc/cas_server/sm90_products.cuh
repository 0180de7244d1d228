// sm_90a serving kernel: products. Warpgroup g multiplies rows 64 g .. 64 g + 63 of both boxes of a stage with the
// activations: in the first phase of a gated FFN these are the same rows of gate and up, so that the activation needs nobody
// else. All of it must be inlined: where ptxas sees a call it waits after every single wgmma.
#pragma once

#include "activation.cuh"
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

// Adds `stages` stages of the ring to the accumulators. A box is handed back while the next one is multiplied, so that the
// multiplications follow each other closely.
template <typename T, int N>
__device__ __forceinline__ void multiply(const ServerArguments& args, SharedState& shared, Multiplier& me, u32 stages,
                                         Accumulators<N>& sums) {
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
      wgmma_wait<1>();
      if (me.lane == 0 && i + box > 0) barrier_arrive(&shared.empty[previous]);
      previous = part_of(stage, box);
    }
    me.position.advance(stages_of(N));
  }
  wgmma_wait<0>();
  if (me.lane == 0) barrier_arrive(&shared.empty[previous]);
}

}  // namespace cas
}  // namespace sidp

#endif
