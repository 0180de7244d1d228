#include "cuda_turns.hpp"

#include "../cuda_check.hpp"
#include "../device_words.cuh"
#include "kernel_node.cuh"

namespace sidp::cache {
namespace {

__device__ std::uint64_t add_at_system(std::uint64_t* word) {
  std::uint64_t before;
  asm volatile("atom.add.acq_rel.sys.global.u64 %0, [%1], 1;" : "=l"(before) : "l"(word) : "memory");
  return before;
}

__device__ std::uint32_t host_word(const std::uint32_t* word) { return *reinterpret_cast<const volatile std::uint32_t*>(word); }

__global__ void begin_turn_kernel(Turn turn) {
  if (host_word(&turn.host->turns_off) != 0) return;
  const std::uint64_t ticket = add_at_system(&turn.words->taken), begin = now_ns();
  *turn.held = 1;
  for (unsigned spin = 1; load_acquire_sys(&turn.words->ended) < ticket; ++spin) {
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

auto kernel_of(TurnEdge edge) { return edge == TurnEdge::begin ? begin_turn_kernel : end_turn_kernel; }

}  // namespace

void launch_turn(TurnEdge edge, const Turn& turn, cudaStream_t stream) {
  kernel_of(edge)<<<1, 1, 0, stream>>>(turn);
  SIDP_CUDA_CHECK(cudaGetLastError());
}

cudaGraphNode_t add_turn_node(cudaGraph_t graph, const cudaGraphNode_t* after, std::size_t count, TurnEdge edge, Turn turn) {
  return add_kernel_node(graph, after, count, kernel_of(edge), turn);
}

void preload_turn_kernels() {
  cudaFuncAttributes attributes;
  SIDP_CUDA_CHECK(cudaFuncGetAttributes(&attributes, begin_turn_kernel));
  SIDP_CUDA_CHECK(cudaFuncGetAttributes(&attributes, end_turn_kernel));
}

}  // namespace sidp::cache
