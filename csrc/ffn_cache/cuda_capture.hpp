// The ring's part in one captured graph: fetches become copy nodes beside the captured stream, joined to it by edges.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>
#include <vector>

#include "cuda_words.hpp"
#include "issue_plan.hpp"

namespace sidp::cache {

class CudaRing;
struct OwnerCopies;

// The graph a stream is being captured into, and the nodes that its next work will depend on.
struct CaptureView {
  unsigned long long id = 0;
  cudaGraph_t graph = nullptr;
  std::vector<cudaGraphNode_t> nodes;
};
CaptureView view_capture(cudaStream_t stream);

class CudaCapture {
 public:
  // Adds the graph's first node: it waits for eager fetches that are under way, and makes sure that the slots hold what
  // the end of a replay leaves in them.
  CudaCapture(CudaRing& ring, unsigned long long id, int first_index, cudaStream_t stream);

  unsigned long long id() const { return id_; }
  void acquire(int index, cudaStream_t stream);
  void release(int index, cudaStream_t stream);

 private:
  std::vector<Fetch> assumed_fetches(int first_index) const;
  void issue(std::uint64_t forwards);
  void add_fetch(const Fetch& fetch);
  void count(int index, cudaGraphNode_t arrived);
  cudaGraphNode_t add_copies(const std::vector<OwnerCopies>& list, int slot, std::vector<cudaGraphNode_t> after);
  cudaGraphNode_t add_copy(const DeviceCopy& copy, int slot, const std::vector<cudaGraphNode_t>& after);

  CudaRing& ring_;
  unsigned long long id_;
  IssuePlan plan_;
  cudaGraph_t graph_ = nullptr;
  cudaGraphNode_t last_ = nullptr;                         // end of the chain of fetches
  cudaGraphNode_t counted_ = nullptr;                      // end of the chain of counting kernels
  std::vector<cudaGraphNode_t> ready_;                     // by slot: the node that a use depends on
  std::vector<std::vector<cudaGraphNode_t>> readers_;      // by slot: the nodes that the next fetch depends on
  std::vector<int> content_;                               // by slot, as the graph goes
  std::uint64_t assumed_ = 0;
  std::uint64_t given_ = 0;                                // fetches, the assumed ones counted in
  std::uint64_t restarts_ = 0;
  std::uint64_t uses_before_ = 0;                          // of this graph, when the plan was last made anew
};

}  // namespace sidp::cache
