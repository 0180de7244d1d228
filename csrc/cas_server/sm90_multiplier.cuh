// sm_90a serving kernel: the multiplying warpgroups. Warpgroup g multiplies rows 64 g .. 64 g + 63 of both boxes of a
// stage with the activations: in the first phase of a gated FFN these are the same rows of gate and up, so that the
// activation needs nobody else. All of it must be inlined: where ptxas sees a call it waits after every single wgmma.
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
// What a warp multiplies of one stage: 16 rows of both boxes and all N rows of activations, 64 columns.
template <int N>
struct Fragments {
  u32 weights[2][kBoxColumns / 16][4];
  u32 rows[N / 8][kBoxColumns / 32][4];
};

// The 16-byte unit `unit` of row `row` in a box with the 128-byte swizzle, as a byte offset.
__device__ inline u32 swizzled(u32 row, u32 unit) { return row * 128 + ((unit ^ row % 8) << 4); }

template <int N>
__device__ __forceinline__ void load_fragments(const ServerArguments& args, SharedState& shared, const Multiplier& me,
                                      Fragments<N>& to) {
  const u32 stage = me.position.stage;
  wait_barrier(args, &shared.full[part_of(stage, 0)], me.position.parity(), ServerFault::kRing, args.stall_ns);
  const u32 box = me.ring + stage * kWeightBytes, row = me.group * 64 + me.thread / 32 * 16 + me.lane % 16;
  const u32 activations = me.ring + stages_of(N) * kWeightBytes + stage * N * 128;
#pragma unroll
  for (u32 half = 0; half < kBoxColumns / 32; ++half)
#pragma unroll
    for (u32 j = 0; j < N / 8; ++j)
      load_matrices(to.rows[j][half], activations + swizzled(8 * j + me.lane % 8, 4 * half + me.lane / 8));
#pragma unroll
  for (u32 k = 0; k < kBoxColumns / 16; ++k) load_matrices(to.weights[0][k], box + swizzled(row, 2 * k + me.lane / 16));
  if (kParts > 1)
    wait_barrier(args, &shared.full[part_of(stage, 1)], me.position.parity(), ServerFault::kRing, args.stall_ns);
#pragma unroll
  for (u32 k = 0; k < kBoxColumns / 16; ++k)
    load_matrices(to.weights[1][k], box + kBoxBytes + swizzled(row, 2 * k + me.lane / 16));
  if (kParts > 1) {
    __syncwarp();
    if (me.lane == 0) barrier_arrive(&shared.empty[part_of(stage, 0)]);
  }
}

template <typename T, int N>
__device__ __forceinline__ void multiply_fragments(const Fragments<N>& f, Accumulators<N>& sums) {
#pragma unroll
  for (u32 k = 0; k < kBoxColumns / 16; ++k)
#pragma unroll
    for (u32 j = 0; j < N / 8; ++j)
#pragma unroll
      for (u32 box = 0; box < 2; ++box)
        mma_16x8x16(T(), &sums[box][4 * j], f.weights[box][k], f.rows[j][k / 2][k % 2 * 2], f.rows[j][k / 2][k % 2 * 2 + 1]);
}

// The same as multiply() for few rows. While a stage's fragments are on their way the previous ones are multiplied; then the
// stage, which nobody needs any more, is handed back.
template <typename T, int N>
__device__ __forceinline__ void multiply_registers(const ServerArguments& args, SharedState& shared, Multiplier& me, u32 stages,
                                          Accumulators<N>& sums) {
  auto hand_back = [&] {
    __syncwarp();
    if (me.lane == 0) barrier_arrive(&shared.empty[part_of(me.position.stage, 1)]);
    me.position.advance(stages_of(N));
  };
  Fragments<N> even, odd;
  load_fragments<N>(args, shared, me, even);
  hand_back();
  for (u32 left = stages - 1;; left -= 2) {
    if (left == 0) return multiply_fragments<T, N>(even, sums);
    load_fragments<N>(args, shared, me, odd);
    multiply_fragments<T, N>(even, sums);
    hand_back();
    if (left == 1) return multiply_fragments<T, N>(odd, sums);
    load_fragments<N>(args, shared, me, even);
    multiply_fragments<T, N>(odd, sums);
    hand_back();
  }
}
#endif

// --- tiles that are split over CTAs ---

__device__ inline float4* partial_of(const ServerArguments& args, u32 parity, u32 phase, u32 cta) {
  return reinterpret_cast<float4*>(args.partials + ((u64(parity) * 2 + phase) * gridDim.x + cta) * kTileRows *
                                                       kMaxBatchRows);
}
__device__ inline u32* partial_flag_of(const ServerArguments& args, u32 parity, u32 phase, u32 cta, u32 group) {
  return args.partial_flags + ((parity * 2 + phase) * gridDim.x + cta) * kMultipliers + group;
}

// The end of a tile, whose beginning another CTA sums up.
template <int N>
__device__ __forceinline__ void store_partial(const ServerArguments& args, const Multiplier& me, u32 id, u32 phase,
                                     const Accumulators<N>& sums) {
  float4* target = partial_of(args, id % 2, phase, blockIdx.x) + me.group * 128 + me.thread;
#pragma unroll
  for (u32 i = 0; i < N / 4; ++i) {
    const float* four = &sums[i / (N / 8)][i % (N / 8) * 4];
    __stcg(target + i * 256, make_float4(four[0], four[1], four[2], four[3]));
  }
  me.sync_group();
  if (me.thread == 0) store_release_gpu(partial_flag_of(args, id % 2, phase, blockIdx.x, me.group), id);
}

// Adds what the following CTAs computed of this tile, in their order, until its depth is covered.
template <int N>
__device__ __forceinline__ void add_partials(const ServerArguments& args, const Multiplier& me, u32 id, u32 phase, Phase shape,
                                    u32 tile, Accumulators<N>& sums) {
  const u32 tile_end = (tile + 1) * shape.depth;
  for (u32 cta = blockIdx.x + 1; share_begin(shape, cta) < tile_end; ++cta) {
    if (share_begin(shape, cta) == share_begin(shape, cta + 1)) continue;  // more CTAs than stages
    if (me.thread == 0) {
      const u32* flag = partial_flag_of(args, id % 2, phase, cta, me.group);
      if (!spin_until([&] { return load_acquire_gpu(flag) == id; }, args.stall_ns))
        fail(args, ServerFault::kPartial, cta);
    }
    me.sync_group();
    const float4* source = partial_of(args, id % 2, phase, cta) + me.group * 128 + me.thread;
#pragma unroll
    for (u32 i = 0; i < N / 4; ++i) {
      const float4 more = __ldcg(source + i * 256);
      float* four = &sums[i / (N / 8)][i % (N / 8) * 4];
      four[0] += more.x;
      four[1] += more.y;
      four[2] += more.z;
      four[3] += more.w;
    }
  }
}

// --- results ---

// Writes v0 and v1, which belong to weight row first + row(r) and activation rows 8 j + 2 (lane % 4) + 0 and 1, as 16-bit
// numbers, two neighbouring weight rows in one store: the neighbour's is 4 lanes away, even lanes take the first row and odd
// ones the second.
template <typename T, typename Address>
__device__ __forceinline__ void write_pair(const Multiplier& me, u32 first, u32 limit, u32 rows, u32 r, u32 j, float v0, float v1,
                                  Address address) {
  const bool odd = me.lane / 4 % 2 != 0;
  const u32 column = first + me.row(r) - (odd ? 1 : 0);
  const float other = __shfl_xor_sync(kAllLanes, odd ? v0 : v1, 4);
  const u32 row = 8 * j + me.lane % 4 * 2 + (odd ? 1 : 0);
  if (row < rows && column < limit)
    *reinterpret_cast<u32*>(address(row) + std::size_t(column) * 2) = odd ? pack<T>(other, v1) : pack<T>(v0, other);
}

// The same for all values(r, j, e) of a box.
template <typename T, int N, typename Value, typename Address>
__device__ __forceinline__ void write_pairs(const Multiplier& me, u32 first, u32 limit, u32 rows, Value value, Address address) {
#pragma unroll
  for (u32 r = 0; r < 2; ++r)
#pragma unroll
    for (u32 j = 0; j < N / 8; ++j)
      write_pair<T>(me, first, limit, rows, r, j, value(r, j, 0), value(r, j, 1), address);
}

#if defined(SIDP_CAS_ROLLED)
// Many rows: the sums of a tile pass through memory of this thread's own (it stays in the L2), so that a loop of few
// instructions can finish them four at a time: unrolled over registers the code is 100 KB and more, and comes from memory.
template <int N>
__device__ __forceinline__ const float4* set_down(const ServerArguments& args, const Multiplier& me, const Accumulators<N>& sums) {
  float4* own = partial_of(args, 2, 0, blockIdx.x) + me.group * 128 + me.thread;
#pragma unroll
  for (u32 i = 0; i < N / 4; ++i) {
    const float* four = &sums[i / (N / 8)][i % (N / 8) * 4];
    __stcg(own + i * 256, make_float4(four[0], four[1], four[2], four[3]));
  }
  return own;
}

// Calls use(j, lower, upper) with the sums 4 j ... 4 j + 3 of both boxes; the next ones are on their way meanwhile.
template <typename Use>
__device__ __forceinline__ void for_each_four(const float4* own, u32 fours, Use use) {
  const float4* other = own + fours * 256;
  float4 lower = __ldcg(own), upper = __ldcg(other);
#pragma unroll 1
  for (u32 j = 0; j < fours; ++j) {
    const float4 a = lower, b = upper;
    if (j + 1 < fours) {
      lower = __ldcg(own + (j + 1) * 256);
      upper = __ldcg(other + (j + 1) * 256);
    }
    use(j, a, b);
  }
}

template <typename T, int N>
__device__ __forceinline__ void write_inner_rolled(const ServerArguments& args, const Multiplier& me, const Batch& batch,
                                          const UnitRecord& unit, u32 tile, const Accumulators<N>& sums) {
  const float4* own = set_down<N>(args, me, sums);
  const u32 size = unit.intermediate, rows = batch.rows;
  const bool gated = unit.gate_weights != nullptr, gate_first = unit.gate_box == 0;
  const u32 first = tile * (gated ? kBoxRows : kTileRows);
  float bias[2][2];  // of each box, of each of this thread's rows
#pragma unroll
  for (u32 r = 0; r < 2; ++r) {
    const u32 row = first + me.row(r);
    bias[0][r] = bias_at<T>(gated && gate_first ? unit.gate_bias : unit.up_bias, row, size);
    bias[1][r] = gated ? bias_at<T>(gate_first ? unit.up_bias : unit.gate_bias, row, size)
                       : bias_at<T>(unit.up_bias, row + kBoxRows, size);
  }
  auto address = [&](u32 row) { return args.inner[batch.id % 2] + row * args.inner_stride; };
  with_activation(unit.activation, [&](auto function) {
    for_each_four(own, N / 8, [&](u32 j, float4 a, float4 b) {
      const float lower[2][2] = {{a.x, a.y}, {a.z, a.w}}, upper[2][2] = {{b.x, b.y}, {b.z, b.w}};
#pragma unroll
      for (u32 r = 0; r < 2; ++r) {
        float value[2][2];
#pragma unroll
        for (u32 e = 0; e < 2; ++e) {
          const float low = lower[r][e] + bias[0][r], high = upper[r][e] + bias[1][r];
          value[0][e] = function(gated && !gate_first ? high : low);
          if (gated)
            value[0][e] *= gate_first ? high : low;
          else
            value[1][e] = function(high);
        }
        write_pair<T>(me, first, size, rows, r, j, value[0][0], value[0][1], address);
        if (!gated) write_pair<T>(me, first + kBoxRows, size, rows, r, j, value[1][0], value[1][1], address);
      }
    });
  });
}

template <typename T, int N>
__device__ __forceinline__ void write_results_rolled(const ServerArguments& args, const Multiplier& me, const SharedBatch& here,
                                            const UnitRecord& unit, u32 tile, const Accumulators<N>& sums) {
  const float4* own = set_down<N>(args, me, sums);
  const u32 size = unit.hidden, rows = here.batch.rows, first = tile * kTileRows;
  const bool float32 = (unit.reply_flags & kReplyFloat32) != 0;
  float bias[2][2];
#pragma unroll
  for (u32 box = 0; box < 2; ++box)
#pragma unroll
    for (u32 r = 0; r < 2; ++r) bias[box][r] = bias_at<T>(unit.down_bias, first + box * kBoxRows + me.row(r), size);
  auto address = [&](u32 row) { return here.target[row]; };
  for_each_four(own, N / 8, [&](u32 j, float4 a, float4 b) {
    const float value[2][2][2] = {{{a.x, a.y}, {a.z, a.w}}, {{b.x, b.y}, {b.z, b.w}}};
#pragma unroll
    for (u32 box = 0; box < 2; ++box)
#pragma unroll
      for (u32 r = 0; r < 2; ++r) {
        const u32 start = first + box * kBoxRows;
        const float v0 = value[box][r][0] + bias[box][r], v1 = value[box][r][1] + bias[box][r];
        if (!float32) {
          write_pair<T>(me, start, size, rows, r, j, v0, v1, address);
          continue;
        }
        const u32 row = 8 * j + me.lane % 4 * 2, column = start + me.row(r);
        if (column < size && row < rows) reinterpret_cast<float*>(here.target[row])[column] = v0;
        if (column < size && row + 1 < rows) reinterpret_cast<float*>(here.target[row + 1])[column] = v1;
      }
  });
}
#endif

// gate/up -> activation -> the intermediate, for the loaders of all CTAs.
template <typename T, int N>
__device__ __forceinline__ void write_inner(const ServerArguments& args, const Multiplier& me, const Batch& batch,
                                   const UnitRecord& unit, u32 tile, Accumulators<N>& sums) {
  const u32 size = unit.intermediate;
  const bool gated = unit.gate_weights != nullptr, gate_first = unit.gate_box == 0;
  const u32 first = tile * (gated ? kBoxRows : kTileRows);
  float bias[2][2];  // of each box, of each of this thread's rows
#pragma unroll
  for (u32 r = 0; r < 2; ++r) {
    const u32 row = first + me.row(r);
    bias[0][r] = bias_at<T>(gated && gate_first ? unit.gate_bias : unit.up_bias, row, size);
    bias[1][r] = gated ? bias_at<T>(gate_first ? unit.up_bias : unit.gate_bias, row, size)
                       : bias_at<T>(unit.up_bias, row + kBoxRows, size);
  }
  with_activation(unit.activation, [&](auto function) {
#pragma unroll
    for (u32 i = 0; i < N / 2; ++i) {
      const float lower = sums[0][i] + bias[0][i / 2 % 2], upper = sums[1][i] + bias[1][i / 2 % 2];
      if (gated) {
        sums[0][i] = function(gate_first ? lower : upper) * (gate_first ? upper : lower);
      } else {
        sums[0][i] = function(lower);
        sums[1][i] = function(upper);
      }
    }
  });
  auto address = [&](u32 row) { return args.inner[batch.id % 2] + row * args.inner_stride; };
  write_pairs<T, N>(me, first, size, batch.rows, [&](u32 r, u32 j, u32 e) { return sums[0][4 * j + 2 * r + e]; }, address);
  if (!gated)
    write_pairs<T, N>(me, first + kBoxRows, size, batch.rows,
                      [&](u32 r, u32 j, u32 e) { return sums[1][4 * j + 2 * r + e]; }, address);
}

// O5: into the requesters' slots.
template <typename T, int N>
__device__ __forceinline__ void write_results(const Multiplier& me, const SharedBatch& here, const UnitRecord& unit, u32 tile,
                                     const Accumulators<N>& sums) {
  const u32 size = unit.hidden;
  const u32 rows = here.batch.rows;
  auto address = [&](u32 row) { return here.target[row]; };
#pragma unroll
  for (u32 box = 0; box < 2; ++box) {
    const u32 first = tile * kTileRows + box * kBoxRows;
    const float bias[2] = {bias_at<T>(unit.down_bias, first + me.row(0), size),
                           bias_at<T>(unit.down_bias, first + me.row(1), size)};
    if ((unit.reply_flags & kReplyFloat32) == 0) {
      write_pairs<T, N>(me, first, size, rows, [&](u32 r, u32 j, u32 e) { return sums[box][4 * j + 2 * r + e] + bias[r]; },
                        address);
    } else {
#pragma unroll
      for (u32 i = 0; i < N / 2; ++i) {
        const u32 r = i / 2 % 2, row = i / 4 * 8 + me.lane % 4 * 2 + i % 2, column = first + me.row(r);
        if (row < rows && column < size)
          reinterpret_cast<float*>(here.target[row])[column] = sums[box][i] + bias[r];
      }
    }
  }
}

// --- a batch ---

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
#if defined(SIDP_CAS_LDMATRIX)
      if constexpr (N <= SIDP_CAS_LDMATRIX)
        multiply_registers<T, N>(args, shared, me, stages, sums);
      else
#endif
        multiply<T, N>(args, shared, me, stages, sums);
      at += stages;
      if (me.group == 0 && me.thread == 0 && at == end) trace(phase == 0 ? Mark::kGateUp : Mark::kDown);
      if (depth != 0) {
        store_partial<N>(args, me, id, phase, sums);
        continue;
      }
      if (stages < shape.depth) add_partials<N>(args, me, id, phase, shape, tile, sums);
#if defined(SIDP_CAS_ROLLED)
      if constexpr (N >= SIDP_CAS_ROLLED) {
        if (phase == 0)
          write_inner_rolled<T, N>(args, me, here.batch, unit, tile, sums);
        else
          write_results_rolled<T, N>(args, me, here, unit, tile, sums);
        continue;
      }
#endif
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
#if defined(SIDP_CAS_FAST)
      fence_sys();  // the whole warpgroup's results: fences are cumulative
      before = add_relaxed_gpu(&args.state->progress[id % 2].finished, 1);  // what follows begins with a fence
#else
      __threadfence_system();  // the whole warpgroup's results: fences are cumulative
      before = atomicAdd(&args.state->progress[id % 2].finished, 1);
      __threadfence();
#endif
    }
    if (me.group == 0 && me.lane == 0) {
      trace(Mark::kFinished);
      trace_clock(Mark::kClockLast);
    }
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
  me.group = __shfl_sync(kAllLanes, threadIdx.x / 128, 0) - 1;  // uniform for the compiler too: descriptors stay in uniform registers
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
