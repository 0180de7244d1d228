// The owner's side of CaS on a GPU: owns the streams, the workspace, the units' records and the thread that launches the
// serving kernel again and again. Knows no torch; weights are pointers into the owner's arena.
#pragma once

#include <array>
#include <atomic>
#include <cstdint>
#include <functional>
#include <mutex>
#include <string>
#include <thread>
#include <vector>

#include "cuda_check.hpp"
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
  double idle_ms = 1.0;    // the serving kernel ends when nothing came for so long
  double run_ms = 20.0;    // ... and after so long in any case
  double watch_ms = 5.0;   // life of the one-warp kernel that waits in between; whoever waits for the device waits for two of them
  double late_ms = 5.0;    // a launch that has not begun so long after its turn came is repeated on another stream
  double stall_s = 20.0;   // a wait inside the kernel that takes longer is a fault
  bool plain = false;      // the path for sm_80 even where sm_90a would run
  std::function<void()> each_turn;  // called by the launching thread, every few milliseconds
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
  // rank's own included, null for a rank that sends nothing. Throws ConfigError, sidp::Error.
  CudaServer(const CudaServerConfig& config, const Geometry& geometry, void* region, std::vector<void*> peer_regions);
  ~CudaServer();
  CudaServer(const CudaServer&) = delete;
  CudaServer& operator=(const CudaServer&) = delete;

  // Before start(). Throws LayoutError where the path in use cannot serve the shape.
  void register_unit(std::uint32_t layer, const UnitPointers& pointers, const UnitShape& shape);
  void start();
  // Makes sure that the next turns are queued. Called before a request is enqueued: the launching thread may be kept from it by
  // whoever holds the driver's locks.
  void keep_queued();
  // Returns once no kernel of this server runs; what was elected is answered, what was not stays in its slot.
  void stop();
  void retire(std::uint32_t requester);  // a requester that died or left

  ServerCounters counters() const;  // of the launches that have ended
  void throw_if_failed() const;     // sidp::Error with the reason; cheap

  std::size_t workspace_bytes() const { return workspace_bytes_; }
  bool uses_sm90() const { return path_ == ServePath::kSm90; }

 private:
  void make_maps(UnitRecord& unit) const;
  void serve_until_stopped();
  void launch_turn(std::uint64_t turn);

  CudaServerConfig config_;
  Geometry geometry_;
  ServePath path_ = ServePath::kPlain;
  std::vector<UnitRecord> units_;
  std::size_t workspace_bytes_ = 0;
  DeviceMemory unit_memory_, state_, gathered_, inner_, partials_, flags_;
  MappedHostMemory host_memory_;
  ServerArguments arguments_ = {};
  std::array<cudaStream_t, 8> streams_ = {};
  std::size_t stream_ = 0;      // the one that launches go to now
  std::uint64_t launches_ = 0;  // numbers of launches given away
  std::uint64_t queued_ = 0;    // the last turn that was launched
  std::uint64_t repeated_ = 0;  // the last turn that was launched twice and has not begun yet; 0: none
  std::mutex launching_;        // guards the four
  std::thread thread_;
  std::atomic<bool> stopping_{true};
  std::atomic<bool> failed_{false};
  std::string failure_;  // written before failed_ is set
};

}  // namespace cas
}  // namespace sidp
