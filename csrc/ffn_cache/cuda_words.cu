#include "cuda_words.hpp"

#include "../cuda_check.hpp"
#include "../device_words.cuh"
#include "kernel_node.cuh"

namespace sidp::cache {
namespace {

constexpr int kEnsureBlocks = 64;
constexpr int kEnsureThreads = 512;

// A wait as every kernel here makes it: a deadline by the clock, an abort word, a fault where it gives up.
__device__ void await(const std::uint64_t* word, std::uint64_t value, HostWords* host, std::uint64_t timeout_ns,
                      bool counted) {
  if (load_acquire_gpu(word) >= value) return;
  const std::uint64_t begin = now_ns();
  for (unsigned spin = 1; load_acquire_gpu(word) < value; ++spin) {
    if (spin % 256 != 0) continue;
    // Far apart, because the abort word lies in host memory.
    const bool aborted = *reinterpret_cast<volatile std::uint32_t*>(&host->abort) != 0;
    if (aborted) return;
    if (now_ns() - begin > timeout_ns) {
      *reinterpret_cast<volatile std::uint32_t*>(&host->fault) = static_cast<std::uint32_t>(RingFault::wait_timed_out);
      return;
    }
  }
  if (!counted) return;
  volatile HostWords* words = host;  // only the computing stream counts, so plain additions do
  words->stalls = words->stalls + 1;
  words->stall_ns = words->stall_ns + (now_ns() - begin);
}

__global__ void wait_kernel(WaitArguments a) { await(a.word, a.value, a.host, a.timeout_ns, a.counted); }

__global__ void post_kernel(PostArguments a) {
  if (a.content != nullptr) *a.content = a.index;
  if (a.host != nullptr) {  // these kernels of a graph form one chain, so plain additions do
    volatile HostWords* host = a.host;
    host->graph_fetches = host->graph_fetches + 1;
    host->graph_bytes = host->graph_bytes + a.bytes;
    if (a.activity != nullptr) *reinterpret_cast<volatile std::uint64_t*>(a.activity) = host->graph_bytes;
  }
  if (a.word != nullptr) store_release_gpu(a.word, a.value);
}

template <typename Word>
__device__ void copy_rows(const DeviceCopy& copy, std::uint8_t* slot) {
  const std::uint64_t per_row = copy.width / sizeof(Word);
  const std::uint64_t total = per_row * copy.height;
  const std::uint64_t step = std::uint64_t{gridDim.x} * blockDim.x;
  for (std::uint64_t i = std::uint64_t{blockIdx.x} * blockDim.x + threadIdx.x; i < total; i += step) {
    const std::uint64_t row = i / per_row;
    const std::uint64_t column = (i - row * per_row) * sizeof(Word);
    *reinterpret_cast<Word*>(slot + copy.target + row * copy.target_pitch + column) =
        *reinterpret_cast<const Word*>(copy.source + row * copy.source_pitch + column);
  }
}

__device__ bool aligned16(const DeviceCopy& copy) {
  const std::uint64_t bits = reinterpret_cast<std::uint64_t>(copy.source) | copy.target | copy.width |
                             (copy.height > 1 ? copy.source_pitch | copy.target_pitch : 0);
  return bits % 16 == 0;
}

// The grid works on one slot after the other. All blocks read `content` before they count themselves in, and only the last
// one to do so writes it: no block can see it change.
__global__ void __launch_bounds__(kEnsureThreads) ensure_kernel(const __grid_constant__ EnsureArguments a) {
  if (a.done != nullptr) {
    if (threadIdx.x == 0) {
      const std::uint64_t issued = load_acquire_gpu(a.issued);
      await(a.done, issued > a.issued_before ? issued : a.issued_before, a.host, a.timeout_ns, false);
    }
    __syncthreads();
  }
  for (int item = 0; item < a.count; ++item) {
    std::int32_t* content = a.content + a.slot[item];
    const bool wrong = *reinterpret_cast<volatile std::int32_t*>(content) != a.index[item];
    if (wrong) {
      const DeviceUnit unit = a.units[a.index[item]];
      std::uint8_t* slot = a.slots + a.slot_stride * static_cast<std::uint64_t>(a.slot[item]);
      for (std::uint32_t c = unit.first_copy; c < unit.first_copy + unit.copies; ++c) {
        if (aligned16(a.copies[c]))
          copy_rows<uint4>(a.copies[c], slot);
        else
          copy_rows<std::uint8_t>(a.copies[c], slot);
      }
    }
    __syncthreads();  // every thread of the block has read `content`
    if (threadIdx.x == 0) {
      __threadfence();
      if (atomicAdd(a.arrivals + item, 1u) == gridDim.x - 1) {
        a.arrivals[item] = 0;
        if (wrong) {
          *reinterpret_cast<volatile std::int32_t*>(content) = a.index[item];
          volatile HostWords* host = a.host;
          host->repairs = host->repairs + 1;
        }
      }
    }
  }
}

}  // namespace

void launch_wait(const WaitArguments& arguments, cudaStream_t stream) {
  wait_kernel<<<1, 1, 0, stream>>>(arguments);
  SIDP_CUDA_CHECK(cudaGetLastError());
}

void launch_post(const PostArguments& arguments, cudaStream_t stream) {
  post_kernel<<<1, 1, 0, stream>>>(arguments);
  SIDP_CUDA_CHECK(cudaGetLastError());
}

cudaGraphNode_t add_post_node(cudaGraph_t graph, const cudaGraphNode_t* after, std::size_t count,
                              PostArguments arguments) {
  return add_kernel_node(graph, after, count, post_kernel, arguments);
}

void launch_ensure(const EnsureArguments& arguments, cudaStream_t stream) {
  ensure_kernel<<<kEnsureBlocks, kEnsureThreads, 0, stream>>>(arguments);
  SIDP_CUDA_CHECK(cudaGetLastError());
}

void preload_ring_kernels() {
  cudaFuncAttributes attributes;
  SIDP_CUDA_CHECK(cudaFuncGetAttributes(&attributes, wait_kernel));
  SIDP_CUDA_CHECK(cudaFuncGetAttributes(&attributes, post_kernel));
  SIDP_CUDA_CHECK(cudaFuncGetAttributes(&attributes, ensure_kernel));
}

}  // namespace sidp::cache
