// sm_90a serving kernel: what becomes of a tile's sums. Tiles that are split over CTAs are added up, then they go through the
// activation into the intermediate or, the second time, into the requesters' slots.
#pragma once

#include "sm90_products.cuh"

#if defined(SIDP_SM90A)

namespace sidp {
namespace cas {

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
__device__ __forceinline__ void add_partials(const ServerArguments& args, const Multiplier& me, u32 id, u32 phase,
                                             Phase shape, u32 tile, Accumulators<N>& sums) {
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
__device__ __forceinline__ void write_pair(const Multiplier& me, u32 first, u32 limit, u32 rows, u32 r, u32 j,
                                           float v0, float v1, Address address) {
  const bool odd = me.lane / 4 % 2 != 0;
  const u32 column = first + me.row(r) - (odd ? 1 : 0);
  const float other = __shfl_xor_sync(kAllLanes, odd ? v0 : v1, 4);
  const u32 row = 8 * j + me.lane % 4 * 2 + (odd ? 1 : 0);
  if (row < rows && column < limit)
    *reinterpret_cast<u32*>(address(row) + std::size_t(column) * 2) = odd ? pack<T>(other, v1) : pack<T>(v0, other);
}

// The same for all values(r, j, e) of a box.
template <typename T, int N, typename Value, typename Address>
__device__ __forceinline__ void write_pairs(const Multiplier& me, u32 first, u32 limit, u32 rows, Value value,
                                            Address address) {
#pragma unroll
  for (u32 r = 0; r < 2; ++r)
#pragma unroll
    for (u32 j = 0; j < N / 8; ++j)
      write_pair<T>(me, first, limit, rows, r, j, value(r, j, 0), value(r, j, 1), address);
}

constexpr int kRolledWidth = 64;  // from here on the results are written in a loop

// Calls use(j, lower, upper) with the sums 4 j ... 4 j + 3 of both boxes, in a loop of few instructions: unrolled, N >= 64 is
// 10,000 of them, which come from memory in every batch. The sums move up in their registers; through memory (tried) each
// step takes 0.7 us, as long as a read of the L2 takes beside the weights.
template <int N, typename Use>
__device__ __forceinline__ void for_each_four(Accumulators<N>& sums, Use use) {
#pragma unroll 1
  for (u32 j = 0; j < N / 8; ++j) {
    use(j, make_float4(sums[0][0], sums[0][1], sums[0][2], sums[0][3]),
        make_float4(sums[1][0], sums[1][1], sums[1][2], sums[1][3]));
#pragma unroll
    for (u32 i = 0; i + 4 < N / 2; ++i) {
      sums[0][i] = sums[0][i + 4];
      sums[1][i] = sums[1][i + 4];
    }
  }
}

template <typename T, int N>
__device__ __forceinline__ void write_inner_rolled(const ServerArguments& args, const Multiplier& me, const Batch& batch,
                                                   const UnitRecord& unit, u32 tile, Accumulators<N>& sums) {
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
    for_each_four<N>(sums, [&](u32 j, float4 a, float4 b) {
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
                                                     const UnitRecord& unit, u32 tile, Accumulators<N>& sums) {
  const u32 size = unit.hidden, rows = here.batch.rows, first = tile * kTileRows;
  const bool float32 = (unit.reply_flags & kReplyFloat32) != 0;
  float bias[2][2];
#pragma unroll
  for (u32 box = 0; box < 2; ++box)
#pragma unroll
    for (u32 r = 0; r < 2; ++r) bias[box][r] = bias_at<T>(unit.down_bias, first + box * kBoxRows + me.row(r), size);
  auto address = [&](u32 row) { return here.target[row]; };
  for_each_four<N>(sums, [&](u32 j, float4 a, float4 b) {
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

}  // namespace cas
}  // namespace sidp

#endif
