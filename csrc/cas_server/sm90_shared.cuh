// sm_90a serving kernel: shared memory, the split of the work, and the rings' waits, used by all of its roles.
#pragma once

#include "control.cuh"
#include "trace.cuh"
#include "wgmma.cuh"

namespace sidp {
namespace cas {

constexpr u32 kMaxStages = 6;
constexpr u32 kBoxBytes = kBoxRows * kBoxColumns * 2;
constexpr u32 kWeightBytes = 2 * kBoxBytes;               // of a stage
constexpr u32 kRingBytes = kMaxStages * (kWeightBytes + 32 * kBoxColumns * 2);
constexpr u32 kMultipliers = 2;                           // warpgroups that multiply
constexpr u32 kServeThreads = 128 * (1 + kMultipliers);
constexpr u32 kBatchReaders = 1 + kMultipliers;           // the weight loaders read its headline instead

// Each box of a stage changes hands by itself; the activations belong to the first box's filling and to the last one's emptying.
constexpr u32 kParts = 2;
SIDP_HOST_DEVICE constexpr u32 part_of(u32 stage, u32 box) { return stage * kParts + box; }

// Stages of weights and activations of `width` rows that fit into the ring.
SIDP_HOST_DEVICE constexpr u32 stages_of(u32 width) { return width <= 32 ? 6 : width == 64 ? 5 : 4; }
static_assert(stages_of(64) * (kWeightBytes + 64 * 128) <= kRingBytes, "ring");
static_assert(stages_of(128) * (kWeightBytes + 128 * 128) <= kRingBytes, "ring");

struct SharedState {
  u64 full[kMaxStages * kParts];   // one arrival per loader, and their bytes
  u64 empty[kMaxStages * kParts];  // one arrival per multiplying warp
  u64 batch_full[2];      // by parity of the batch number: all lanes of the herald
  u64 batch_empty[2];     // everybody who reads the batch (kBatchReaders)
  u64 issued;             // one arrival per batch: the copies of all its weights have been issued
  SharedBatch batch[2];
};

constexpr u32 kServeSharedBytes = 1024 + kRingBytes + sizeof(SharedState);

// A phase is `tiles` x `depth` stages of equal bytes: first gate/up, then down. Every CTA takes an equal, contiguous
// part of that sequence, so a tile may be split over CTAs along its depth.
struct Phase {
  u32 tiles;
  u32 depth;
};

SIDP_HOST_DEVICE constexpr u32 ceil_div(u32 a, u32 b) { return (a + b - 1) / b; }

__device__ inline Phase phase_of(const UnitRecord& unit, u32 phase) {
  if (phase == 1) return Phase{ceil_div(unit.hidden, kTileRows), ceil_div(unit.intermediate, kBoxColumns)};
  const u32 rows = unit.gate_weights != nullptr ? kBoxRows : kTileRows;  // intermediate columns of a tile
  return Phase{ceil_div(unit.intermediate, rows), ceil_div(unit.hidden, kBoxColumns)};
}

__device__ inline u32 share_begin(Phase phase, u32 cta) {
  const u32 all = phase.tiles * phase.depth;
  return all / gridDim.x * cta + all % gridDim.x * cta / gridDim.x;
}

#if defined(SIDP_SM90A)

// Position in a ring: the stage and, per stage, the parity of the next use.
struct RingPosition {
  u32 stage = 0;
  u32 parities = 0;

  __device__ u32 parity() const { return parities >> stage & 1; }
  __device__ void advance(u32 stages) {
    parities ^= 1u << stage;
    stage = stage + 1 == stages ? 0 : stage + 1;
  }
};

__device__ inline void wait_barrier(const ServerArguments& args, u64* barrier, u32 parity, ServerFault fault,
                                    u64 bound_ns) {
  if (barrier_try_wait(barrier, parity)) return;
  if (!spin_until([&] { return barrier_try_wait(barrier, parity); }, bound_ns)) fail(args, fault, parity);
}

// A batch comes when a requester wants it: bounded by the life of the launch. The batches of a launch are numbered from
// `first`, so the k-th of either parity is (id - first) / 2 = k, and its barriers are in parity k % 2.
__device__ inline const SharedBatch& wait_batch(const ServerArguments& args, SharedState& shared, u32 id, u32 first) {
  wait_barrier(args, &shared.batch_full[id % 2], ((id - first) / 2) & 1, ServerFault::kBoard,
               args.run_ns + 2 * args.stall_ns);
  return shared.batch[id % 2];
}

#endif

}  // namespace cas
}  // namespace sidp
