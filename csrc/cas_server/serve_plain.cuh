// The serving kernel for any GPU from sm_80 on: the same board, batches and steps, but every warp takes whole weight
// rows and multiplies them with 8 activation rows at a time. Correct, not fast.
#pragma once

#include "activation.cuh"
#include "control.cuh"

namespace sidp {
namespace cas {

constexpr u32 kPlainThreads = 256;
constexpr u32 kPlainRows = 8;  // activation rows a warp holds sums for

// All CTAs have added `1`; everything they wrote before is visible.
__device__ inline void meet_all(const ServerArguments& args, u32* counter, ServerFault fault) {
  __threadfence();
  __syncthreads();
  if (threadIdx.x == 0) {
    add_acq_rel_gpu(counter, 1);
    if (!spin_until([&] { return load_acquire_gpu(counter) == gridDim.x; }, args.stall_ns)) fail(args, fault, *counter);
  }
  __syncthreads();
}

// sums[m] = <weights, row(m)> over `size` elements, for `rows` <= kPlainRows rows; in every lane.
template <typename T, typename Row>
__device__ inline void dot_rows(const T* weights, u32 size, u32 rows, Row row, float (&sums)[kPlainRows]) {
  const u32 lane = threadIdx.x % 32;
#pragma unroll
  for (u32 m = 0; m < kPlainRows; ++m) sums[m] = 0.0f;
  if (size % 8 == 0) {  // rows start on 16 bytes
    for (u32 k = lane * 8; k < size; k += 256) {
      const uint4 eight = __ldcs(reinterpret_cast<const uint4*>(weights + k));
      const T* w = reinterpret_cast<const T*>(&eight);
#pragma unroll
      for (u32 m = 0; m < kPlainRows; ++m) {
        if (m >= rows) break;
        const uint4 other = __ldcg(reinterpret_cast<const uint4*>(row(m) + k));
        const T* x = reinterpret_cast<const T*>(&other);
#pragma unroll
        for (u32 i = 0; i < 8; ++i) sums[m] += to_float(w[i]) * to_float(x[i]);
      }
    }
  } else {
    for (u32 k = lane; k < size; k += 32) {
      const float w = to_float(weights[k]);
#pragma unroll
      for (u32 m = 0; m < kPlainRows; ++m)
        if (m < rows) sums[m] += w * to_float(*const_cast<const volatile T*>(row(m) + k));
    }
  }
#pragma unroll
  for (u32 m = 0; m < kPlainRows; ++m)
    for (int distance = 16; distance > 0; distance /= 2) sums[m] += __shfl_xor_sync(kAllLanes, sums[m], distance);
}

template <typename T>
__device__ inline void plain_batch(const ServerArguments& args, const SharedBatch& here) {
  const UnitRecord& unit = args.units[here.batch.layer];
  const u32 parity = here.batch.id % 2, rows = here.batch.rows, hidden = unit.hidden, size = unit.intermediate;
  ServerState::Progress& progress = args.state->progress[parity];
  T* x = reinterpret_cast<T*>(args.gathered[parity]);
  const u32 thread = blockIdx.x * kPlainThreads + threadIdx.x, threads = gridDim.x * kPlainThreads;
  for (u32 i = thread; i < rows * hidden; i += threads)  // O4
    x[i] = *const_cast<const volatile T*>(reinterpret_cast<const T*>(here.source[i / hidden]) + i % hidden);
  meet_all(args, &progress.gathered, ServerFault::kGather);

  const u32 lane = threadIdx.x % 32;
  float gate[kPlainRows], sums[kPlainRows];
  for (u32 i = thread / 32; i < size; i += threads / 32) {
    for (u32 m = 0; m < rows; m += kPlainRows) {
      const u32 count = min(kPlainRows, rows - m);
      auto row = [&](u32 k) { return x + std::size_t(m + k) * hidden; };
      const auto* up = static_cast<const T*>(unit.up_weights) + std::size_t(i) * hidden;
      dot_rows(up, hidden, count, row, sums);
      const bool gated = unit.gate_weights != nullptr;
      if (gated) dot_rows(static_cast<const T*>(unit.gate_weights) + std::size_t(i) * hidden, hidden, count, row, gate);
      const float gate_bias = bias_at<T>(unit.gate_bias, i, size), up_bias = bias_at<T>(unit.up_bias, i, size);
#pragma unroll
      for (u32 k = 0; k < kPlainRows; ++k) {
        if (k >= count || lane != k) continue;
        const float u = sums[k] + up_bias;
        const float value = gated ? activate(unit.activation, gate[k] + gate_bias) * u : activate(unit.activation, u);
        reinterpret_cast<T*>(args.inner[parity] + (m + k) * args.inner_stride)[i] = from_float<T>(value);
      }
    }
  }
  meet_all(args, &progress.inner, ServerFault::kInner);

  for (u32 i = thread / 32; i < hidden; i += threads / 32) {
    for (u32 m = 0; m < rows; m += kPlainRows) {
      const u32 count = min(kPlainRows, rows - m);
      auto row = [&](u32 k) { return reinterpret_cast<const T*>(args.inner[parity] + (m + k) * args.inner_stride); };
      dot_rows(static_cast<const T*>(unit.down_weights) + std::size_t(i) * size, size, count, row, sums);
      const float bias = bias_at<T>(unit.down_bias, i, hidden);
#pragma unroll
      for (u32 k = 0; k < kPlainRows; ++k) {  // O5
        if (k >= count || lane != k) continue;
        if ((unit.reply_flags & kReplyFloat32) != 0)
          reinterpret_cast<float*>(here.target[m + k])[i] = sums[k] + bias;
        else
          reinterpret_cast<T*>(here.target[m + k])[i] = from_float<T>(sums[k] + bias);
      }
    }
  }
}

template <typename T>
__global__ void __launch_bounds__(kPlainThreads) serve_plain(const __grid_constant__ ServerArguments args) {
  if (!begin_launch(args)) return;
  __shared__ SharedBatch here;
  const u32 first = load_acquire_gpu(&args.state->base) + 1;
  const bool herald = threadIdx.x < 32;
  Control control = {};
  if (herald && blockIdx.x == 0) control = begin_control(args);
  for (u32 id = first;; ++id) {
    if (herald) {
      if (blockIdx.x == 0) publish_batch(args, control, id, [] { return true; });
      receive_batch(args, id, here);
    }
    __syncthreads();
    if (here.batch.kind == BatchKind::kExit) {
      if (threadIdx.x == 0) end_launch(args, id);
      break;
    }
    plain_batch<T>(args, here);
    __threadfence_system();
    __syncthreads();
    if (herald) {
      u32 before = 0;
      if (threadIdx.x == 0) before = add_acq_rel_gpu(&args.state->progress[id % 2].finished, 1);
      if (__shfl_sync(kAllLanes, before, 0) == gridDim.x - 1) complete_batch(args, here.batch);
    }
    __syncthreads();
  }
}

}  // namespace cas
}  // namespace sidp
