// Round trip of a flag between two GPUs over NVLink, or between two kernels on one: each looks at a word in its own memory and
// answers into the other's. About 2 s; every wait is bounded.
//   nvcc -std=c++17 -O2 -arch=native -o flag_round_trip bench/flag_round_trip.cu && ./flag_round_trip
#include <cuda_runtime.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <vector>

namespace {

constexpr unsigned kTrips = 2000, kRounds = 7;
constexpr unsigned long long kBoundNs = 2'000'000'000;

#define CHECK(call)                                                                  \
  do {                                                                               \
    const cudaError_t error = (call);                                                \
    if (error != cudaSuccess) {                                                      \
      std::printf("%s: %s (line %d)\n", #call, cudaGetErrorString(error), __LINE__); \
      std::exit(1);                                                                  \
    }                                                                                \
  } while (false)

__device__ unsigned long long now_ns() {
  unsigned long long now;
  asm volatile("mov.u64 %0, %globaltimer;" : "=l"(now));
  return now;
}

__device__ void store_release(unsigned* word, unsigned value) {
  asm volatile("st.release.sys.u32 [%0], %1;" ::"l"(word), "r"(value) : "memory");
}

__device__ unsigned load_acquire(const unsigned* word) {
  unsigned value;
  asm volatile("ld.acquire.sys.u32 %0, [%1];" : "=r"(value) : "l"(word) : "memory");
  return value;
}

// `begins` sends trip i before it waits for the answer i, the other after it has seen i. took_ns: 0 where time ran out.
__global__ void exchange(unsigned* mine, unsigned* theirs, unsigned first, bool begins, unsigned long long* took_ns) {
  const unsigned long long start = now_ns();
  for (unsigned i = first; i < first + kTrips; ++i) {
    if (begins) store_release(theirs, i);
    while (load_acquire(mine) != i)
      if (now_ns() - start > kBoundNs) return;
    if (!begins) store_release(theirs, i);
  }
  *took_ns = now_ns() - start;
}

struct Side {
  int device;
  unsigned* word;
  unsigned long long* took;
  cudaStream_t stream;
};

Side make(int device) {
  Side side{device, nullptr, nullptr, nullptr};
  CHECK(cudaSetDevice(device));
  CHECK(cudaMalloc(&side.word, 256));
  CHECK(cudaMemset(side.word, 0, 256));
  CHECK(cudaHostAlloc(&side.took, sizeof(*side.took), cudaHostAllocPortable));
  CHECK(cudaStreamCreateWithFlags(&side.stream, cudaStreamNonBlocking));
  CHECK(cudaDeviceSynchronize());
  return side;
}

void measure(const char* name, Side a, Side b) {
  std::vector<double> microseconds;
  for (unsigned round = 0; round < kRounds; ++round) {
    *a.took = *b.took = 0;
    for (Side* side : {&b, &a}) {
      const Side& other = side == &a ? b : a;
      CHECK(cudaSetDevice(side->device));
      exchange<<<1, 1, 0, side->stream>>>(side->word, other.word, 1 + round * kTrips, side == &a, side->took);
      CHECK(cudaGetLastError());
    }
    CHECK(cudaSetDevice(a.device));
    CHECK(cudaStreamSynchronize(a.stream));
    CHECK(cudaSetDevice(b.device));
    CHECK(cudaStreamSynchronize(b.stream));
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
  CHECK(cudaGetDeviceCount(&count));
  measure("two kernels on GPU 0", make(0), make(0));
  if (count < 2) {
    std::printf("GPU 0 and GPU 1: waived, there is one GPU\n");
    return 0;
  }
  for (int device = 0; device < 2; ++device) {
    int can = 0;
    CHECK(cudaDeviceCanAccessPeer(&can, device, 1 - device));
    if (!can) {
      std::printf("GPU 0 and GPU 1: waived, no peer access\n");
      return 0;
    }
    CHECK(cudaSetDevice(device));
    CHECK(cudaDeviceEnablePeerAccess(1 - device, 0));
  }
  measure("GPU 0 and GPU 1", make(0), make(1));
  return 0;
}
