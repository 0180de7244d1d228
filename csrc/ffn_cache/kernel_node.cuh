// A graph's node for a kernel of one thread.
#pragma once

#include <cuda_runtime_api.h>

#include <cstddef>

#include "../cuda_check.hpp"

namespace sidp::cache {

template <typename Arguments>
cudaGraphNode_t add_kernel_node(cudaGraph_t graph, const cudaGraphNode_t* after, std::size_t count, void (*kernel)(Arguments),
                                Arguments arguments) {
  void* parameters[] = {&arguments};
  cudaKernelNodeParams node{};
  node.func = reinterpret_cast<void*>(kernel);
  node.gridDim = dim3(1);
  node.blockDim = dim3(1);
  node.kernelParams = parameters;
  cudaGraphNode_t added = nullptr;
  SIDP_CUDA_CHECK(cudaGraphAddKernelNode(&added, graph, after, count, &node));
  return added;
}

}  // namespace sidp::cache
