// sm_90a serving kernel: the multiplying warpgroups, batch after batch.
#pragma once

#include "sm90_results.cuh"

#if defined(SIDP_SM90A)

namespace sidp {
namespace cas {

template <typename T, int N>
__device__ __forceinline__ void serve_batch(const ServerArguments& args, SharedState& shared, Multiplier& me,
                                            const SharedBatch& here) {
  const UnitRecord& unit = args.units[here.batch.layer];
  const u32 id = here.batch.id;
  if (me.width != N) {
    me.width = N;
    me.position.stage = 0;
  }
  Accumulators<N> sums;
  for (u32 phase = 0; phase < 2; ++phase) {
    const Phase shape = phase_of(unit, phase);
    const u32 end = share_begin(shape, blockIdx.x + 1);
    u32 at = share_begin(shape, blockIdx.x);
    while (at < end) {
      const u32 tile = at / shape.depth, depth = at % shape.depth;
      const u32 stages = min(shape.depth - depth, end - at);
#pragma unroll
      for (u32 i = 0; i < N; ++i) sums[i / (N / 2)][i % (N / 2)] = 0.0f;
#if defined(SIDP_CAS_TRACE)
      if (me.group == 0 && me.thread == 0 && at == share_begin(shape, blockIdx.x)) {
        wait_barrier(args, &shared.full[part_of(me.position.stage, 0)], me.position.parity(), ServerFault::kRing,
                     args.stall_ns);
        trace(phase == 0 ? Mark::kFirstStage : Mark::kDownStage);
      }
      __syncwarp();
#endif
      multiply<T, N>(args, shared, me, stages, sums);
      at += stages;
      if (me.group == 0 && me.thread == 0 && at == end) trace(phase == 0 ? Mark::kGateUp : Mark::kDown);
      if (depth != 0) {
        store_partial<N>(args, me, id, phase, sums);
        continue;
      }
      if (stages < shape.depth) add_partials<N>(args, me, id, phase, shape, tile, sums);
      if constexpr (N >= kRolledWidth) {
        if (phase == 0)
          write_inner_rolled<T, N>(args, me, here.batch, unit, tile, sums);
        else
          write_results_rolled<T, N>(args, me, here, unit, tile, sums);
        continue;
      }
      if (phase == 0)
        write_inner<T, N>(args, me, here.batch, unit, tile, sums);
      else
        write_results<T, N>(me, here, unit, tile, sums);
    }
    if (phase == 0) {  // this warpgroup's part of the intermediate is written; the bulk copy engine reads it next
      fence_async_proxy();
      me.sync_group();
      if (me.thread == 0) add_acq_rel_gpu(&args.state->progress[id % 2].inner, 1);
      if (me.group == 0 && me.thread == 0) trace(Mark::kInnerWritten);
    }
  }
  me.sync_group();
  if (me.group == 0 && me.thread == 0) trace(Mark::kResultsWritten);
  if (me.thread < 32) {
    u32 before = 0;
    if (me.lane == 0) {
      fence_sys();  // the whole warpgroup's results: fences are cumulative
      before = add_acquire_gpu(&args.state->progress[id % 2].finished, 1);
    }
    if (me.group == 0 && me.lane == 0) {
      trace(Mark::kFinished);
      trace_clock(Mark::kClockLast);
    }
    __syncwarp();  // what lane 0 has acquired, the others may release
    if (__shfl_sync(kAllLanes, before, 0) == kMultipliers * gridDim.x - 1) {
      complete_batch(args, here.batch);
      if (me.lane == 0) trace(Mark::kReplied);
    }
  }
}

// O4 for a fused batch: this warpgroup's part of the rows, into one matrix that the bulk copy engine can read.
__device__ __forceinline__ void gather_rows(const ServerArguments& args, const Multiplier& me, const SharedBatch& here) {
  const u32 row_units = args.units[here.batch.layer].hidden / 8;  // of 16 bytes
  const u32 parity = here.batch.id % 2;
  auto* target = reinterpret_cast<uint4*>(args.gathered[parity]);
  const u32 all = kMultipliers * gridDim.x * 128;
  for (u32 i = (blockIdx.x * kMultipliers + me.group) * 128 + me.thread; i < here.batch.rows * row_units; i += all) {
    const u32 row = i / row_units;
    __stcg(target + i, __ldcg(reinterpret_cast<const uint4*>(here.source[row]) + (i - row * row_units)));
  }
  fence_async_proxy();
  me.sync_group();
  if (me.thread == 0) add_acq_rel_gpu(&args.state->progress[parity].gathered, 1);
}

template <typename T>
__device__ __forceinline__ void multiply_batches(const ServerArguments& args, SharedState& shared, std::uint8_t* ring,
                                                 u32 first) {
  Multiplier me = {};
  me.group = __shfl_sync(kAllLanes, threadIdx.x / 128, 0) - 1;  // known to be uniform: descriptors stay in uniform registers
  me.thread = threadIdx.x % 128;
  me.lane = threadIdx.x % 32;
  me.ring = shared_address(ring);
  for (u32 id = first;; ++id) {
    const SharedBatch& here = wait_batch(args, shared, id, first);
    if (here.batch.kind == BatchKind::kExit) break;
    if (here.batch.requests > 1) gather_rows(args, me, here);
    switch (width_index(here.batch.rows)) {
      case 0: serve_batch<T, 8>(args, shared, me, here); break;
      case 1: serve_batch<T, 16>(args, shared, me, here); break;
      case 2: serve_batch<T, 32>(args, shared, me, here); break;
      case 3: serve_batch<T, 64>(args, shared, me, here); break;
      default: serve_batch<T, 128>(args, shared, me, here); break;
    }
    me.sync_group();
    if (me.thread == 0) barrier_arrive(&shared.batch_empty[id % 2]);
  }
}

}  // namespace cas
}  // namespace sidp

#endif
