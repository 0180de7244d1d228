// The requester's side of CaS on a GPU: two kernels that can be captured, one pushes rows (R1-R4), one waits for the
// results and copies them out (R5-R7). The expected numbers live in device memory and advance there, so that a graph
// replays with the right ones. Never synchronises with the host.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>
#include <vector>

#include "cuda_check.hpp"
#include "mailbox.hpp"
#include "requester_types.hpp"

namespace sidp {
namespace cas {

struct CudaRequesterConfig {
  int device = 0;
  std::uint64_t pool_id = 0;
  std::uint32_t rank = 0;
  std::uint32_t hidden = 0;
  Dtype dtype = Dtype::kBFloat16;
  double timeout_s = 60.0;
};

class CudaRequester {
 public:
  // `region`: this rank's mailbox region; `owner_regions[o]`: owner o's as mapped here (this rank's own included), null
  // where nothing will be sent; `owner_bells[o]`: its page of BellLines, as this device writes it.
  CudaRequester(const CudaRequesterConfig& config, const Geometry& geometry, void* region,
                std::vector<void*> owner_regions, const std::vector<void*>& owner_bells);
  ~CudaRequester();
  CudaRequester(const CudaRequester&) = delete;
  CudaRequester& operator=(const CudaRequester&) = delete;

  // Before a push that is enqueued with `announced`, so that this rank's server knows of it at once (life.hpp). A push that is
  // captured into a graph is not announced: it runs any number of times.
  void announce();
  // Enqueues on `stream` and returns at once. Pushes of one requester to one owner must be ordered by their streams, waits
  // likewise. `striped`: to several owners, the result is the float32 sum of their partial results in the order of the owners.
  void push(const RowsArgument& rows, bool striped, cudaStream_t stream);
  // The results of the oldest request to these owners that was not waited for. Where the wait fails, rows of NaN.
  void wait(const RowsArgument& rows, bool striped, cudaStream_t stream);

  std::uint32_t world() const { return geometry_.world; }
  const RequesterState* states() const { return arguments_.states; }
  const RequesterHostWords* host_words() const { return arguments_.host; }
  void abort();                // every wait gives up, with Fault::kAborted
  std::uint64_t error() const;  // error_word() of the first fault, 0: none; cheap, may be asked at any time
  void throw_if_failed() const;  // PeerError or LayoutError
  RequesterCounters counters() const;  // waits for a small copy, never for the engine's streams

 private:
  void check(const RowsArgument& rows) const;

  CudaRequesterConfig config_;
  Geometry geometry_;
  DeviceMemory states_;
  MappedHostMemory host_memory_;
  RequesterArguments arguments_ = {};
  cudaStream_t counter_stream_ = nullptr;
};

// The kernels' launchers (cuda_requester.cu).
cudaError_t preload_requester_kernels();
cudaError_t launch_push(const RequesterArguments& arguments, const RowsArgument& rows, bool striped, cudaStream_t stream);
cudaError_t launch_wait(const RequesterArguments& arguments, const RowsArgument& rows, bool striped, cudaStream_t stream);

}  // namespace cas
}  // namespace sidp
