// sm_90a serving kernel: the roles of the first warpgroup. The weight loader streams gate/up and down through the ring
// without ever waiting for results; the activation loader fills the other half of each stage when its rows are there;
// the herald brings the batches.
#pragma once

#include "sm90_shared.cuh"

#if defined(SIDP_SM90A)

namespace sidp {
namespace cas {

// Before stages change their size every stage must have been emptied; `position` then starts again at stage 0.
__device__ inline void change_width(const ServerArguments& args, SharedState& shared, RingPosition& position) {
  for (position.stage = 0; position.stage < kMaxStages; ++position.stage)
    for (u32 box = 0; box < kParts; ++box)
      wait_barrier(args, &shared.empty[part_of(position.stage, box)], position.parity() ^ 1, ServerFault::kRing,
                   args.stall_ns);
  position.stage = 0;
}

// Calls use(stage, tile, depth) for each stage of this CTA's share of a phase, once the part of `box` is empty.
template <typename Use>
__device__ inline void for_each_stage(const ServerArguments& args, SharedState& shared, RingPosition& position,
                                      u32 stages, Phase phase, u32 box, Use use) {
  const u32 begin = share_begin(phase, blockIdx.x), end = share_begin(phase, blockIdx.x + 1);
  u32 tile = begin / phase.depth, depth = begin % phase.depth;
  for (u32 at = begin; at < end; ++at) {
    wait_barrier(args, &shared.empty[part_of(position.stage, box)], position.parity() ^ 1, ServerFault::kRing,
                 args.stall_ns);
    use(position.stage, tile, depth);
    position.advance(stages);
    if (++depth == phase.depth) {
      depth = 0;
      ++tile;
    }
  }
}

// One thread for each of the two boxes of a stage; two threads measured 2 % faster than one, and than one copy of 256 rows.
__device__ inline void load_weights(const ServerArguments& args, SharedState& shared, std::uint8_t* ring, u32 first,
                                    u32 box) {
  RingPosition position;
  u32 width = 0;
  for (u32 id = first;; ++id) {
    const Headline batch = wait_headline(args, id);
    if (batch.kind == BatchKind::kExit) break;
    const UnitRecord& unit = args.units[batch.layer];
    const u32 new_width = width_of(width_index(batch.rows));
    if (new_width != width) change_width(args, shared, position);
    width = new_width;
    for (u32 phase = 0; phase < 2; ++phase) {
      const CUtensorMap* map = &unit.weights[phase];
      prefetch_map(map);
      const bool pair = phase == 0 && unit.gate_weights != nullptr;  // the boxes are of two matrices
      const u32 tile_rows = pair ? kBoxRows : kTileRows;
      const u32 first_row = pair ? 0 : box * kBoxRows;
      const Phase shape = phase_of(unit, phase);
      for_each_stage(args, shared, position, stages_of(width), shape, box, [&](u32 stage, u32 tile, u32 depth) {
        u64* full = &shared.full[part_of(stage, box)];
        barrier_arrive_expect(full, kBoxBytes);
        copy_box(map, full, ring + stage * kWeightBytes + box * kBoxBytes,
                 depth * kBoxColumns, tile * tile_rows + first_row, pair ? box : 0, kEvictFirst);
        if (phase == 0 && box == 0 && tile * shape.depth + depth == share_begin(shape, blockIdx.x)) trace(Mark::kIssued);
      });
    }
    if (box == 0) barrier_arrive(&shared.issued);
  }
}

// One thread. O4 for a batch of one request: its rows are read straight from the mailbox.
__device__ inline void load_activations(const ServerArguments& args, SharedState& shared, std::uint8_t* ring,
                                        u32 first) {
  RingPosition position;
  u32 width = 0;
  for (u32 id = first;; ++id) {
    const Batch& batch = wait_batch(args, shared, id, first).batch;
    if (batch.kind == BatchKind::kExit) break;
    const UnitRecord& unit = args.units[batch.layer];
    const u32 index = width_index(batch.rows), parity = id % 2;
    if (width_of(index) != width) change_width(args, shared, position);
    width = width_of(index);
    const u32 stages = stages_of(width), box_bytes = width * kBoxColumns * 2;
    std::uint8_t* targets = ring + stages * kWeightBytes;
    ServerState::Progress& progress = args.state->progress[parity];
    for (u32 phase = 0; phase < 2; ++phase) {
      const CUtensorMap* map = phase == 1 ? &unit.inner[parity][index] : &unit.gathered[parity][index];
      u32 row = 0;
      if (phase == 0 && batch.requests == 1) {
        map = &unit.mailbox[index];
        row = (batch.request[0].requester * args.geometry.slots + batch.request[0].slot) * args.geometry.max_rows;
      }
      prefetch_map(map);
      if (phase == 1) {
        if (!spin_until([&] { return load_acquire_gpu(&progress.inner) == kMultipliers * gridDim.x; }, args.stall_ns))
          fail(args, ServerFault::kInner, progress.inner);
        trace(Mark::kInnerSeen);
      } else if (batch.requests > 1) {
        if (!spin_until([&] { return load_acquire_gpu(&progress.gathered) == kMultipliers * gridDim.x; }, args.stall_ns))
          fail(args, ServerFault::kGather, progress.gathered);
      }
      fence_async_proxy();
      for_each_stage(args, shared, position, stages, phase_of(unit, phase), 1, [&](u32 stage, u32, u32 depth) {
        u64* full = &shared.full[part_of(stage, 0)];
        barrier_arrive_expect(full, box_bytes);
        copy_box(map, full, targets + stage * box_bytes, depth * kBoxColumns, row, kEvictLast);
      });
    }
    barrier_arrive(&shared.batch_empty[parity]);
  }
}

// One warp of every CTA; in CTA 0 it is the control role too.
__device__ inline void herald(const ServerArguments& args, SharedState& shared, u32 first) {
  const u32 lane = threadIdx.x % 32;
  Control control = {};
  if (blockIdx.x == 0) control = begin_control(args);
  for (u32 id = first;; ++id) {
    const u32 parity = id % 2;
    wait_barrier(args, &shared.batch_empty[parity], (((id - first) / 2) & 1) ^ 1, ServerFault::kBoard, args.stall_ns);
    if (blockIdx.x == 0) {
      publish_batch(args, control, id,
                    [&] { return id == first || barrier_try_wait(&shared.issued, (id - 1 - first) & 1); });
    }
    receive_batch(args, id, shared.batch[parity]);
    if (lane == 0 && shared.batch[parity].batch.kind == BatchKind::kWork) {
      trace(Mark::kReceived);
      trace_clock(Mark::kClockFirst);
    }
    const bool exits = shared.batch[parity].batch.kind == BatchKind::kExit;
    barrier_arrive(&shared.batch_full[parity]);
    if (exits) {
      if (lane == 0) end_launch(args, id);
      break;
    }
  }
}

}  // namespace cas
}  // namespace sidp

#endif
