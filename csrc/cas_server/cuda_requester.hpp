// The requester's side of CaS on a GPU: two kernels that can be captured, one pushes rows (R1-R4), one waits for the
// results and copies them out (R5-R7). The expected numbers live in device memory and advance there, so that a graph
// replays with the right ones. Never synchronises with the host.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>
#include <vector>

#include "cuda_check.hpp"
#include "mailbox.hpp"

namespace sidp {
namespace cas {

// What a requester has had answered.
struct RequesterCounters {
  std::uint64_t requests;
  std::uint64_t rows;
  std::uint64_t batch_rows;  // rows of the batches that its requests were fused into
  std::uint64_t service_ns;  // from election to reply
};

// Device memory, one per owner. `pushed` is written by push kernels, `consumed` by wait kernels, in stream order.
struct alignas(128) RequesterState {
  std::uint64_t pushed;
  std::uint32_t push_arrivals;  // CTAs of the running push; 0 in between
  alignas(64) std::uint64_t consumed;
  std::uint32_t wait_arrivals;
  RequesterCounters counters;  // of the requests whose first owner this is
};

// Pinned host memory, mapped.
struct RequesterHostWords {
  alignas(128) std::uint64_t error;  // error_word() of the first fault, 0: none
  alignas(128) std::uint32_t abort;  // not 0: every wait gives up
};

// Kernel argument.
struct RequesterArguments {
  Geometry geometry;
  std::uint64_t pool_id;
  std::uint64_t deadline_ns;
  std::uint8_t* region;                  // this rank's
  std::uint8_t* owner_region[kMaxWorld];  // as mapped here
  RequesterState* states;
  RequesterHostWords* host;
  std::uint32_t rank;
  std::uint32_t hidden;
  Dtype dtype;
};

// Rows [count, hidden] `pitch_bytes` apart, 1 <= count <= max_rows: those of a request, or those of its result.
struct RowsArgument {
  void* rows;
  std::uint64_t pitch_bytes;
  std::uint32_t count;
  std::uint32_t layer;
  std::uint32_t first_owner;
  std::uint32_t owners;  // 1: `layer`; more: `striped`
};

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
  // where nothing will be sent.
  CudaRequester(const CudaRequesterConfig& config, const Geometry& geometry, void* region,
                std::vector<void*> owner_regions);
  ~CudaRequester();
  CudaRequester(const CudaRequester&) = delete;
  CudaRequester& operator=(const CudaRequester&) = delete;

  // Enqueues on `stream` and returns at once. Pushes of one requester to one owner must be ordered by their streams, waits
  // likewise. `striped`: to several owners, the result is the float32 sum of their partial results in the order of the owners.
  void push(const RowsArgument& rows, bool striped, cudaStream_t stream);
  // The results of the oldest request to these owners that was not waited for. Where the wait fails, rows of NaN.
  void wait(const RowsArgument& rows, bool striped, cudaStream_t stream);

  std::uint32_t world() const { return geometry_.world; }
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
