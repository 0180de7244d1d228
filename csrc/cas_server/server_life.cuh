// life.hpp in the kernel: which launch serves, when it ends, and what the host is told of it.
#pragma once

#include "ptx.cuh"
#include "serve_types.hpp"

namespace sidp {
namespace cas {

constexpr u32 kAllLanes = 0xffffffffu;

// Only bugs and CTAs that were never scheduled get here: say what, then end the kernel with an error, not a hang.
__device__ inline void fail(const ServerArguments& args, ServerFault fault, u32 detail) {
  volatile ServerHostWords* host = args.host;
  if (host->fault == 0) {
    host->fault_detail = detail;
    host->fault = static_cast<u32>(fault);
  }
  __threadfence_system();
  __trap();
}

__device__ inline bool reached(u32 counter, u32 target) { return static_cast<int>(counter - target) >= 0; }

// This rank's own requests. By a whole warp, lane o standing for owner o.
struct OwnRequests {
  bool open;    // some are pushed and not answered
  bool coming;  // some are announced by the host and not pushed yet
  u64 arrived;  // of those announced
};

__device__ inline OwnRequests own_requests(const ServerArguments& args) {
  if (args.asks == nullptr) return {};
  const volatile RequesterHostWords* host = args.asks_host;
  if (host->abort != 0) return {};  // nobody waits any more
  const u32 lane = threadIdx.x % 32;
  const u64 wished = host->announced;
  u64 arrived = 0;
  bool open = false;
  if (lane < args.geometry.world) {
    const RequesterState& state = args.asks[lane];
    arrived = load_acquire_gpu(&state.announced);
    const u64 consumed = load_acquire_gpu(&state.consumed);
    open = *const_cast<const volatile u64*>(&state.pushed) != consumed;
  }
  for (int distance = 16; distance > 0; distance /= 2) arrived += __shfl_xor_sync(kAllLanes, arrived, distance);
  return {__any_sync(kAllLanes, open) != 0, __any_sync(kAllLanes, arrived != wished) != 0, arrived};
}

constexpr u32 kUnrelieved = 50;  // times run_ns, after which a server gives way without relief (G3)

// G1, G3: whether a server whose own rank's requests are announced and do not come, none since `since_ns`, gives way. By a warp.
__device__ inline bool gives_way(const ServerArguments& args, u64 since_ns, u64 now) {
  if (now - since_ns <= args.run_ns) return false;
  volatile ServerHostWords* host = args.host;
  if (threadIdx.x % 32 == 0) host->relief_wanted = args.launch;
  return __any_sync(kAllLanes, host->relief_given == args.launch) || now - since_ns > kUnrelieved * args.run_ns;
}

// What life.hpp asks for. L1-L3 are done by one thread, L4 and L5 by the control warp, of which lane 0 writes.
struct LifeAccess {
  const ServerArguments& args;
  u64 served;  // of this lane's requester; for running(false)

  __device__ void begun() const { *const_cast<volatile u64*>(&args.host->begun[args.stream]) = args.launch; }
  __device__ void fence() const { __threadfence_system(); }
  __device__ Life life() const { return static_cast<Life>(load_acquire_gpu(&args.state->life)); }
  __device__ bool swap_life(Life from, Life to) const {
    return compare_swap_gpu(&args.state->life, static_cast<u32>(from), static_cast<u32>(to)) == static_cast<u32>(from);
  }
  __device__ void set_life(Life life) const {
    if (threadIdx.x % 32 == 0) store_release_gpu(&args.state->life, static_cast<u32>(life));
  }
  __device__ void running(bool running) const {
    volatile ServerHostWords* host = args.host;
    if (!running) {  // by these words the host knows what is left to do
      host->served[threadIdx.x % 32] = served;
      if (threadIdx.x % 32 == 0) host->broken = args.state->broken;
      __threadfence_system();
      __syncwarp();
    }
    if (threadIdx.x % 32 == 0) host->running = running;
  }
  __device__ void pause() {
    __nanosleep(100);
    if (now_ns() - started > args.stall_ns) fail(args, ServerFault::kLife, args.stream);
  }

  u64 started = now_ns();
};

// By all threads of a CTA before anything else: whether this launch serves. The first CTA of a launch decides for all.
__device__ inline bool begin_launch(const ServerArguments& args) {
  __shared__ bool ours;
  if (threadIdx.x == 0) {
    Decision& decision = args.state->decision[args.stream];
    const u64 ticket = atomicAdd(reinterpret_cast<unsigned long long*>(&decision.arrivals), 1ull);
    const u64 number = ticket / gridDim.x + 1;
    if (ticket % gridDim.x == 0) {
      LifeAccess life{args, 0};
      ours = takes_over(life);
      store_release_gpu(&decision.decided, 2 * number + ours);
    } else {
      u64 decided = 0;
      if (!spin_until([&] { return (decided = load_acquire_gpu(&decision.decided)) / 2 == number; }, 2 * args.stall_ns))
        fail(args, ServerFault::kLife, args.stream);
      ours = decided % 2 != 0;
    }
  }
  __syncthreads();
  return ours;
}

// The last CTA to leave hands the batch numbers on to the next server (L6).
__device__ inline void end_launch(const ServerArguments& args, u32 last_id) {
  if (add_acq_rel_gpu(&args.state->exited, 1) == gridDim.x - 1) {
    args.state->exited = 0;
    args.state->base = last_id;
    store_release_gpu(&args.state->life, static_cast<u32>(Life::kFree));
  }
}

}  // namespace cas
}  // namespace sidp
