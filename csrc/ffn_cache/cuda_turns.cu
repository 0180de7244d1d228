#include "cuda_turns.hpp"

#include "../cuda_check.hpp"

namespace sidp::cache {
namespace {

__device__ std::uint64_t add_at_system(std::uint64_t* word) {
  std::uint64_t before;
  asm volatile("atom.add.acq_rel.sys.global.u64 %0, [%1], 1;" : "=l"(before) : "l"(word) : "memory");
  return before;
}

__device__ std::uint64_t load_from_system(const std::uint64_t* word) {
  std::uint64_t value;
  asm volatile("ld.acquire.sys.global.u64 %0, [%1];" : "=l"(value) : "l"(word) : "memory");
  return value;
}

__device__ std::uint64_t now_ns() {
  std::uint64_t ns;
  asm volatile("mov.u64 %0, %globaltimer;" : "=l"(ns));
  return ns;
}

__device__ std::uint32_t host_word(const std::uint32_t* word) { return *reinterpret_cast<const volatile std::uint32_t*>(word); }

__global__ void begin_turn_kernel(Turn turn) {
  if (host_word(&turn.host->turns_off) != 0) return;
  const std::uint64_t ticket = add_at_system(&turn.words->taken), begin = now_ns();
  *turn.held = 1;
  for (unsigned spin = 1; load_from_system(&turn.words->ended) < ticket; ++spin) {
    if (spin % 64 != 0) continue;
    if (host_word(&turn.host->abort) != 0 || host_word(&turn.host->turns_off) != 0) return;
    if (now_ns() - begin > kTurnBoundNs) {
      *reinterpret_cast<volatile std::uint32_t*>(&turn.host->turns_off) = 1;
      return;
    }
  }
}

__global__ void end_turn_kernel(Turn turn) {
  if (*turn.held == 0) return;
  *turn.held = 0;
  add_at_system(&turn.words->ended);
}

}  // namespace

void launch_turn(TurnEdge edge, const Turn& turn, cudaStream_t stream) {
  if (edge == TurnEdge::begin)
    begin_turn_kernel<<<1, 1, 0, stream>>>(turn);
  else
    end_turn_kernel<<<1, 1, 0, stream>>>(turn);
  SIDP_CUDA_CHECK(cudaGetLastError());
}

cudaGraphNode_t add_turn_node(cudaGraph_t graph, const cudaGraphNode_t* after, std::size_t count, TurnEdge edge, Turn turn) {
  void* parameters[] = {&turn};
  cudaKernelNodeParams node{};
  node.func = edge == TurnEdge::begin ? reinterpret_cast<void*>(&begin_turn_kernel) : reinterpret_cast<void*>(&end_turn_kernel);
  node.gridDim = dim3(1);
  node.blockDim = dim3(1);
  node.kernelParams = parameters;
  cudaGraphNode_t added = nullptr;
  SIDP_CUDA_CHECK(cudaGraphAddKernelNode(&added, graph, after, count, &node));
  return added;
}

void preload_turn_kernels() {
  cudaFuncAttributes attributes;
  SIDP_CUDA_CHECK(cudaFuncGetAttributes(&attributes, begin_turn_kernel));
  SIDP_CUDA_CHECK(cudaFuncGetAttributes(&attributes, end_turn_kernel));
}

}  // namespace sidp::cache
