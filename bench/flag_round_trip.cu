// Round trip of a flag between two GPUs over NVLink, or between two kernels on one: each looks at a word in its own memory and
// answers into the other's. About 2 s; every wait is bounded.
//   nvcc -std=c++17 -O2 -arch=native -o flag_round_trip bench/flag_round_trip.cu && ./flag_round_trip
#include <cuda_runtime.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <vector>

#include "../csrc/cas_server/ptx.cuh"
#include "../csrc/cuda_check.hpp"

using namespace sidp::cas;

namespace {

constexpr unsigned kTrips = 2000, kRounds = 7;
constexpr u64 kBoundNs = 2'000'000'000;

// `begins` sends trip i before it waits for the answer i, the other after it has seen i. took_ns: 0 where time ran out.
__global__ void exchange(u64* mine, u64* theirs, u64 first, bool begins, u64* took_ns) {
  const u64 start = now_ns();
  for (u64 i = first; i < first + kTrips; ++i) {
    if (begins) store_release_sys(theirs, i);
    while (load_acquire_sys(mine) != i)
      if (now_ns() - start > kBoundNs) return;
    if (!begins) store_release_sys(theirs, i);
  }
  *took_ns = now_ns() - start;
}

struct Side {
  int device;
  u64* word;
  u64* took;
  cudaStream_t stream;
};

Side make(int device) {
  Side side{device, nullptr, nullptr, nullptr};
  SIDP_CUDA_CHECK(cudaSetDevice(device));
  SIDP_CUDA_CHECK(cudaMalloc(&side.word, 256));
  SIDP_CUDA_CHECK(cudaMemset(side.word, 0, 256));
  SIDP_CUDA_CHECK(cudaHostAlloc(&side.took, sizeof(*side.took), cudaHostAllocPortable));
  SIDP_CUDA_CHECK(cudaStreamCreateWithFlags(&side.stream, cudaStreamNonBlocking));
  SIDP_CUDA_CHECK(cudaDeviceSynchronize());
  return side;
}

void measure(const char* name, Side a, Side b) {
  std::vector<double> microseconds;
  for (unsigned round = 0; round < kRounds; ++round) {
    *a.took = *b.took = 0;
    for (Side* side : {&b, &a}) {
      const Side& other = side == &a ? b : a;
      SIDP_CUDA_CHECK(cudaSetDevice(side->device));
      exchange<<<1, 1, 0, side->stream>>>(side->word, other.word, 1 + u64(round) * kTrips, side == &a, side->took);
      SIDP_CUDA_CHECK(cudaGetLastError());
    }
    SIDP_CUDA_CHECK(cudaSetDevice(a.device));
    SIDP_CUDA_CHECK(cudaStreamSynchronize(a.stream));
    SIDP_CUDA_CHECK(cudaSetDevice(b.device));
    SIDP_CUDA_CHECK(cudaStreamSynchronize(b.stream));
    if (*a.took == 0) {
      std::printf("%s: an answer did not come within 2 s\n", name);
      std::exit(1);
    }
    if (round > 0) microseconds.push_back(*a.took * 1e-3 / kTrips);
  }
  std::sort(microseconds.begin(), microseconds.end());
  std::printf("%s: %.2f us a round trip (median of %zu rounds of %u)\n", name, microseconds[microseconds.size() / 2],
              microseconds.size(), kTrips);
}

}  // namespace

int main() {
  int count = 0;
  SIDP_CUDA_CHECK(cudaGetDeviceCount(&count));
  measure("two kernels on GPU 0", make(0), make(0));
  if (count < 2) {
    std::printf("GPU 0 and GPU 1: waived, there is one GPU\n");
    return 0;
  }
  for (int device = 0; device < 2; ++device) {
    int can = 0;
    SIDP_CUDA_CHECK(cudaDeviceCanAccessPeer(&can, device, 1 - device));
    if (!can) {
      std::printf("GPU 0 and GPU 1: waived, no peer access\n");
      return 0;
    }
    SIDP_CUDA_CHECK(cudaSetDevice(device));
    SIDP_CUDA_CHECK(cudaDeviceEnablePeerAccess(1 - device, 0));
  }
  measure("GPU 0 and GPU 1", make(0), make(1));
  return 0;
}
