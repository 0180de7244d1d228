#include "p2p/cuda_arena.hpp"

namespace sidp {
namespace {

__global__ void read_kernel(const std::uint64_t* source, std::uint64_t* target, std::uint64_t words) {
  for (std::uint64_t i = threadIdx.x; i < words; i += blockDim.x) target[i] = source[i];
}

}  // namespace

void read_by_kernel(const std::uint64_t* source, std::uint64_t* target, std::uint64_t words) {
  read_kernel<<<1, 256>>>(source, target, words);
  SIDP_CUDA_CHECK(cudaGetLastError());
  SIDP_CUDA_CHECK(cudaDeviceSynchronize());
}

}  // namespace sidp
