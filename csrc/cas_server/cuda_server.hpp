// The owner's side of CaS on a GPU: owns the streams, the workspace, the units' records and the thread that launches the
// serving kernel when a bell has rung (life.hpp). Knows no torch; weights are pointers into the owner's arena.
#pragma once

#include <array>
#include <atomic>
#include <chrono>
#include <cstdint>
#include <functional>
#include <mutex>
#include <string>
#include <thread>
#include <vector>

#include "cuda_check.hpp"
#include "cuda_requester.hpp"
#include "serve_kernels.hpp"

namespace sidp {
namespace cas {

struct CudaServerConfig {
  int device = 0;
  unsigned sms = 40;           // CTAs of the serving kernel, one to an SM
  std::uint32_t layers = 0;    // of the model; units are registered for those this rank holds
  std::uint32_t hidden = 0;    // of every unit
  std::uint32_t intermediate = 0;  // largest of the slices this rank holds
  Dtype dtype = Dtype::kBFloat16;
  bool reply_float32 = false;  // `striped`: answer with partial sums
  std::uint64_t pool_id = 0;
  std::uint32_t rank = 0;
  double idle_ms = 1.0;  // a launch ends when nothing came for so long (or stay_ns) and this rank waits for nobody
  double run_ms = 20.0;  // ... and after so long even when there is work, unless this rank waits for others
  double late_ms = 5.0;  // a launch that has not begun after so long is repeated on another stream
  double stall_s = 20.0;   // a wait inside the kernel that takes longer is a fault
  bool plain = false;      // the path for sm_80 even where sm_90a would run
  const CudaRequester* asks = nullptr;  // this rank's requester, which outlives the server; null: it asks nobody
  std::function<void()> now_and_then;   // called by the launching thread, about every millisecond
};

// Weights in Linear layout, row-major and contiguous: gate, up [intermediate, hidden], down [hidden, intermediate], of the
// slice this rank holds; on the sm_90a path each on 16 bytes. In `striped` only owner 0 passes `down_bias`.
struct UnitPointers {
  const void* gate = nullptr;  // null: a plain FFN
  const void* up = nullptr;
  const void* down = nullptr;
  const void* gate_bias = nullptr;
  const void* up_bias = nullptr;
  const void* down_bias = nullptr;
};

struct UnitShape {
  std::uint32_t hidden;
  std::uint32_t intermediate;  // of the slice
  Activation activation;
};

class CudaServer {
 public:
  // `region`: this rank's mailbox region (zeroed, in its arena); `peer_regions[r]`: requester r's as mapped here, this
  // rank's own included, null for a rank that sends nothing; `bells`: this rank's page of BellLines, as the host reads it.
  // Throws ConfigError, sidp::Error.
  CudaServer(const CudaServerConfig& config, const Geometry& geometry, void* region, std::vector<void*> peer_regions,
             const void* bells);
  ~CudaServer();
  CudaServer(const CudaServer&) = delete;
  CudaServer& operator=(const CudaServer&) = delete;

  // Before start(). Throws LayoutError where the path in use cannot serve the shape.
  void register_unit(std::uint32_t layer, const UnitPointers& pointers, const UnitShape& shape);
  void start();
  // asks.push(), announced where it is not captured: from here to the answer this rank serves (H1-H3). `asks` is the
  // configuration's; where it cannot be enqueued, all its waits are aborted.
  void push(CudaRequester& asks, RowsArgument rows, bool striped, cudaStream_t stream);
  // Returns once no kernel of this server runs; what was elected is answered, what was not stays in its slot.
  void stop();
  void retire(std::uint32_t requester);  // a requester that died or left

  ServerCounters counters() const;  // of the launches that have ended
  void throw_if_failed() const;     // sidp::Error with the reason; cheap

  std::size_t workspace_bytes() const { return workspace_bytes_; }
  bool uses_sm90() const { return path_ == ServePath::kSm90; }

 private:
  void make_maps(UnitRecord& unit) const;
  void ensure_serving();
  void serve_until_stopped();
  bool running() const;
  bool wanted() const;     // whether a requester's bell is ahead of what has been served
  bool pending() const;    // whether the newest launch has not begun; under `launching_`, like the rest
  void launch();           // on the stream that the newest launch went to
  void launch_elsewhere();  // on the next one that does not stand still; on none where all do
  void relieve();           // behind the launch that asks for it (G2)

  CudaServerConfig config_;
  Geometry geometry_;
  ServePath path_ = ServePath::kPlain;
  std::vector<UnitRecord> units_;
  std::size_t workspace_bytes_ = 0;
  DeviceMemory unit_memory_, state_, gathered_, inner_, partials_, flags_;
  MappedHostMemory host_memory_;
  ServerArguments arguments_ = {};
  const BellLine* bells_;
  struct Stream {
    cudaStream_t stream = nullptr;
    std::uint64_t launch = 0;  // the newest one there; numbers go through all streams
  };
  std::array<Stream, kServerStreams> streams_ = {};
  std::size_t stream_ = 0;  // of the newest launch
  std::chrono::steady_clock::time_point launched_;  // when that was
  std::uint64_t launches_ = 0;
  std::mutex launching_;  // guards the four
  std::atomic<std::chrono::steady_clock::time_point> ran_{};  // when the launching thread last saw a server run
  std::thread thread_;
  std::atomic<bool> stopping_{true};
  std::atomic<bool> failed_{false};
  std::string failure_;  // written before failed_ is set
};

}  // namespace cas
}  // namespace sidp
