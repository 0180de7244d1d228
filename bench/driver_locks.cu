// What keeps one thread's launch waiting while another thread waits inside the driver, and which streams share a hardware queue:
// CaS' launching thread depends on both (docs/protocol_cas.md). About 15 s.
//   nvcc -std=c++17 -O2 -arch=native -o driver_locks bench/driver_locks.cu && ./driver_locks
// Kernels are loaded at their first use only: the case "load" needs it, so run it without CUDA_MODULE_LOADING=EAGER.
#include <cuda_runtime.h>

#include <atomic>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <functional>
#include <string>
#include <thread>
#include <vector>

#include "../csrc/cas_server/ptx.cuh"
#include "../csrc/cuda_check.hpp"

namespace {

using Clock = std::chrono::steady_clock;

constexpr double kSpinMs = 40;  // of the kernel that somebody waits for; every kernel here ends by itself

double milliseconds(Clock::time_point since) {
  return std::chrono::duration<double, std::milli>(Clock::now() - since).count();
}

__global__ void spin(unsigned long long ns) {
  const unsigned long long start = sidp::cas::now_ns();
  while (sidp::cas::now_ns() - start < ns) {
  }
}

__global__ void raise(volatile unsigned* flag) { *flag = 1; }

template <int kWhich>
__global__ void never_used(int* out) {
  *out = kWhich;
}

unsigned* flag = nullptr;

// Launches raise() on `stream`; what the call took and when the flag was seen, in ms.
std::pair<double, double> launch(cudaStream_t stream) {
  *const_cast<volatile unsigned*>(flag) = 0;
  const auto start = Clock::now();
  raise<<<1, 1, 0, stream>>>(flag);
  const double call = milliseconds(start);
  while (*const_cast<volatile unsigned*>(flag) == 0 && milliseconds(start) < 10 * kSpinMs) {
  }
  return {call, milliseconds(start)};
}

void beside(const char* name, cudaStream_t busy, cudaStream_t other, const std::function<void()>& wait) {
  SIDP_CUDA_CHECK(cudaDeviceSynchronize());
  spin<<<1, 1, 0, busy>>>(static_cast<unsigned long long>(kSpinMs * 1e6));
  double waited = 0;
  std::thread waiting([&] {
    const auto start = Clock::now();
    wait();
    waited = milliseconds(start);
  });
  std::this_thread::sleep_for(std::chrono::milliseconds(4));
  const auto [call, seen] = launch(other);
  waiting.join();
  SIDP_CUDA_CHECK(cudaDeviceSynchronize());
  std::printf("%-44s waits %6.2f ms; a launch beside it: call %7.3f ms, runs after %7.3f ms%s\n", name, waited, call, seen,
              call > 1 ? "  KEPT WAITING" : seen > 1 ? "  QUEUED BEHIND" : "");
}

// For a stream that waits and has one more kernel behind: which other streams stand still with it.
void share_queues(int priority_of_others, int count, const char* what) {
  cudaStream_t first;
  SIDP_CUDA_CHECK(cudaStreamCreateWithFlags(&first, cudaStreamNonBlocking));
  std::vector<cudaStream_t> others(count);
  for (cudaStream_t& stream : others)
    SIDP_CUDA_CHECK(cudaStreamCreateWithPriority(&stream, cudaStreamNonBlocking, priority_of_others));
  std::string stuck;
  int number = 0;
  for (int i = 0; i < count; ++i) {
    SIDP_CUDA_CHECK(cudaDeviceSynchronize());
    spin<<<1, 1, 0, first>>>(static_cast<unsigned long long>(10e6));
    spin<<<1, 1, 0, first>>>(1000);
    if (launch(others[i]).second < 5) continue;
    stuck += " " + std::to_string(i);
    ++number;
  }
  SIDP_CUDA_CHECK(cudaDeviceSynchronize());
  std::printf("%d of %d %s streams stand still with a stream that waits:%s\n", number, count, what, stuck.c_str());
  for (cudaStream_t stream : others) cudaStreamDestroy(stream);
  cudaStreamDestroy(first);
}

}  // namespace

int main() {
  SIDP_CUDA_CHECK(cudaSetDevice(0));
  int least = 0, greatest = 0;
  SIDP_CUDA_CHECK(cudaHostAlloc(&flag, sizeof(*flag), cudaHostAllocMapped));
  SIDP_CUDA_CHECK(cudaDeviceGetStreamPriorityRange(&least, &greatest));
  std::printf("priorities %d to %d, CUDA_DEVICE_MAX_CONNECTIONS %s, under MPS: %s\n", least, greatest,
              std::getenv("CUDA_DEVICE_MAX_CONNECTIONS") ? std::getenv("CUDA_DEVICE_MAX_CONNECTIONS") : "unset",
              std::getenv("CUDA_MPS_PIPE_DIRECTORY") ? "yes" : "no");
  cudaStream_t busy, server;
  SIDP_CUDA_CHECK(cudaStreamCreateWithFlags(&busy, cudaStreamNonBlocking));
  SIDP_CUDA_CHECK(cudaStreamCreateWithPriority(&server, cudaStreamNonBlocking, greatest));
  void *device, *pinned;
  std::vector<char> pageable(64 << 20);
  SIDP_CUDA_CHECK(cudaMalloc(&device, 64 << 20));
  SIDP_CUDA_CHECK(cudaHostAlloc(&pinned, 64 << 20, cudaHostAllocDefault));
  launch(server);
  launch(busy);

  beside("nobody", busy, server, [] {});
  beside("cudaStreamSynchronize", busy, server, [&] { SIDP_CUDA_CHECK(cudaStreamSynchronize(busy)); });
  beside("cudaDeviceSynchronize", busy, server, [] { SIDP_CUDA_CHECK(cudaDeviceSynchronize()); });
  for (const std::size_t bytes : {std::size_t(4), std::size_t(64) << 10, std::size_t(64) << 20}) {
    const std::string size = std::to_string(bytes) + " B";
    beside(("cudaMemcpyAsync to pageable, " + size).c_str(), busy, server,
           [&] { SIDP_CUDA_CHECK(cudaMemcpyAsync(pageable.data(), device, bytes, cudaMemcpyDeviceToHost, busy)); });
    beside(("cudaMemcpyAsync from pageable, " + size).c_str(), busy, server,
           [&] { SIDP_CUDA_CHECK(cudaMemcpyAsync(device, pageable.data(), bytes, cudaMemcpyHostToDevice, busy)); });
    beside(("cudaMemcpyAsync to pinned, sync, " + size).c_str(), busy, server, [&] {
      SIDP_CUDA_CHECK(cudaMemcpyAsync(pinned, device, bytes, cudaMemcpyDeviceToHost, busy));
      SIDP_CUDA_CHECK(cudaStreamSynchronize(busy));
    });
  }
  beside("cudaMalloc", busy, server, [] {
    void* memory;
    SIDP_CUDA_CHECK(cudaMalloc(&memory, 256 << 20));
  });
  void* memory;
  SIDP_CUDA_CHECK(cudaMalloc(&memory, 256 << 20));
  beside("cudaFree", busy, server, [&] { SIDP_CUDA_CHECK(cudaFree(memory)); });
  beside("cudaHostAlloc", busy, server, [] {
    void* more;
    SIDP_CUDA_CHECK(cudaHostAlloc(&more, 16 << 20, cudaHostAllocDefault));
  });
  beside("load of a kernel (first launch)", busy, server, [&] {
    cudaStream_t own;
    SIDP_CUDA_CHECK(cudaStreamCreateWithFlags(&own, cudaStreamNonBlocking));
    never_used<1><<<1, 1, 0, own>>>(static_cast<int*>(device));
  });
  beside("cudaFuncGetAttributes of a kernel not loaded", busy, server, [] {
    cudaFuncAttributes attributes;
    SIDP_CUDA_CHECK(cudaFuncGetAttributes(&attributes, never_used<2>));
  });
  beside("cudaStreamCreate", busy, server, [] {
    cudaStream_t more;
    SIDP_CUDA_CHECK(cudaStreamCreate(&more));
  });
  beside("cudaMemset of the default stream", busy, server, [&] { SIDP_CUDA_CHECK(cudaMemset(device, 0, 1 << 20)); });

  share_queues(least, 40, "ordinary");
  share_queues(greatest, 40, "high-priority");
  return 0;
}
