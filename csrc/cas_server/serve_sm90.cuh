// The serving kernel for sm_90a: one loading warpgroup, two that multiply; one CTA to an SM.
#pragma once

#include "sm90_loaders.cuh"
#include "sm90_multiplier.cuh"

namespace sidp {
namespace cas {

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ == 900 && !defined(SIDP_SM90A)
#error "build for sm_90a: plain sm_90 has no wgmma, and this kernel would be empty"
#endif

#if defined(SIDP_SM90A)

__device__ inline void init_shared(SharedState& shared) {
  if (threadIdx.x == 0) {
    for (u32 i = 0; i < kMaxStages * kParts; ++i) {
      barrier_init(&shared.full[i], i % kParts == 0 ? 2 : 1);
      barrier_init(&shared.empty[i], kMultipliers * 4);
    }
    for (u32 i = 0; i < 2; ++i) {
      barrier_init(&shared.batch_full[i], 32);
      barrier_init(&shared.batch_empty[i], kBatchReaders);
    }
    barrier_init(&shared.issued, 1);
    barrier_init_fence();
  }
  __syncthreads();
}

#endif

template <typename T>
__global__ void __launch_bounds__(kServeThreads, 1) serve_sm90(const __grid_constant__ ServerArguments args) {
#if defined(SIDP_SM90A)
  if (!begin_launch(args)) return;
  extern __shared__ std::uint8_t raw[];
  std::uint8_t* ring = raw + (1024 - shared_address(raw) % 1024) % 1024;
  SharedState& shared = *reinterpret_cast<SharedState*>(ring + kRingBytes);
  // Stable until the last CTA of this launch leaves, and this one has not left yet.
  const u32 first = load_acquire_gpu(&args.state->base) + 1;
  init_shared(shared);
  if (threadIdx.x < 128) {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 72;");
    const u32 warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    if (warp < 2 && lane == 0) load_weights(args, shared, ring, first, warp);
    if (warp == 2 && lane == 0) load_activations(args, shared, ring, first);
    if (warp == 3) herald(args, shared, first);
  } else {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 216;");
    multiply_batches<T>(args, shared, ring, first);
  }
#endif
}

}  // namespace cas
}  // namespace sidp
