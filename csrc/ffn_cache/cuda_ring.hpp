// The ring of slots on a GPU. The host only enqueues: fetches on a copy stream of its own, uses on the caller's stream.
// docs/protocol_cuda_ring.md explains the orders that make this right, and the graphs.
#pragma once

#include <cuda_runtime_api.h>

#include <atomic>
#include <cstdint>
#include <deque>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include "../cuda_check.hpp"
#include "../placement.hpp"
#include "../schedule.hpp"
#include "cuda_objects.hpp"
#include "cuda_trace.hpp"
#include "cuda_turns.hpp"
#include "cuda_words.hpp"
#include "issue_plan.hpp"
#include "moved_extent.hpp"

namespace sidp::cache {

class CudaCapture;

// How a slot passes between the copy stream and the computing one.
enum class HandOver { events, words };

struct CudaRingOptions {
  int device = 0;
  int slots = 1;
  bool peak_shifting = true;
  std::vector<bool> local;  // by layer; empty: what the placement says
  HandOver hand_over = HandOver::events;
  std::uint64_t slice_bytes = 0;  // 0: a copy is not cut
  double timeout_s = 60;
  bool poison = false;
  std::vector<const std::uint8_t*> host_sources;  // by owner: the part of its extents that lies in host memory, or empty
  std::vector<std::uint64_t> cuts;                // by owner: where that part begins
  std::vector<TurnWords*> turns;                  // by owner, null or left out: its readers take no turns there
  bool own_is_remote = false;                // fetches from this rank's own arena count too (host tier)
  std::uint64_t* activity = nullptr;         // counts uses, for peers that wait for this rank to finish
  std::uint64_t* device_activity = nullptr;  // the same word as kernels see it, or null
};

// Copies from one owner, sliced. `turn.words` is null where readers take no turns.
struct OwnerCopies {
  int owner = -1;
  Turn turn{};
  std::vector<DeviceCopy> copies;
};

// A unit's copies. Both lists run beside each other: the copy engines that bring the own stripe from this device's
// memory would else keep the link idle meanwhile, at D = 2 for a quarter of the time.
struct UnitCopies {
  std::vector<OwnerCopies> remote;
  std::vector<OwnerCopies> own;
};

struct CudaRingStats {
  std::uint64_t fetches = 0;
  std::uint64_t fetched_bytes = 0;
  std::uint64_t stalls = 0;  // by words only: with events the host cannot know
  double stall_seconds = 0;
  std::uint64_t restarts = 0;
  std::uint64_t repairs = 0;
};

class CudaRing {
 public:
  // `sources`: where each rank's extents lie, by rank, device memory or pinned host memory; behind them any further areas that
  // move_extents() may name. `dead_rank`: -1 until a death.
  CudaRing(const Placement& placement, int rank, const std::vector<const std::uint8_t*>& sources,
           const std::atomic<int>* dead_rank, const CudaRingOptions& options);
  ~CudaRing();
  CudaRing(const CudaRing&) = delete;
  CudaRing& operator=(const CudaRing&) = delete;

  const FetchSchedule& schedule() const { return schedule_; }
  std::uint8_t* slot_address(int slot) const { return slots_.as<std::uint8_t>() + slot_stride_ * static_cast<std::uint64_t>(slot); }
  std::uint64_t bytes() const { return slot_stride_ * static_cast<std::uint64_t>(schedule_.slots()); }

  // What `stream` does afterwards may read `layer`. Enqueues only; while `stream` is captured, builds the graph instead.
  void acquire(int layer, cudaStream_t stream);
  // What `stream` has done until now was the last reading.
  void release(int layer, cudaStream_t stream);

  // Nothing is fetched from owner `from` any more, but from where `moved` says; what the slots hold stays. Copies that are
  // enqueued already, and graphs that were captured before, go on reading that owner's memory, which must stay mapped.
  // LayoutError where `moved` leaves an extent out.
  void move_extents(int from, const std::vector<MovedExtent>& moved);
  // The areas whose memory a fetch of `layer` reads.
  std::vector<int> owners(int layer) const;

  // Waits for the device and refuses later uses. Idempotent. Graphs that were captured here must not be replayed after it.
  void stop();

  CudaRingStats stats() const;
  void start_trace(std::size_t capacity);
  std::vector<TraceEvent> trace_events() const { return trace_.events(); }

 private:
  friend class CudaCapture;

  void check_open() const;
  void check_usable() const;
  void lay_out(const Placement& placement);
  std::vector<DeviceCopy> resolve();
  Turn turn_at(int owner) const;
  void issue(cudaStream_t stream);
  void enqueue(const Fetch& fetch);
  void enqueue_copy(int index, int slot);
  void await_used(int slot);
  void publish_ready(int slot, int index, bool filled);
  const std::int32_t* index_word(int index) const { return index_words_.as<std::int32_t>() + index; }
  void await_ready(int layer, int slot, int index, cudaStream_t stream);
  void mark_use(int layer, int slot, cudaStream_t stream);
  void mark_end(int layer, cudaStream_t stream);

  CudaCapture* capture_of(cudaStream_t stream, int index);
  void prepare_for_graphs();
  EnsureArguments ensure_arguments() const;
  std::uint64_t* ready_word(int slot) const { return words_.as<std::uint64_t>() + 2 + slot; }
  std::uint64_t* used_word(int slot) const { return words_.as<std::uint64_t>() + 2 + schedule_.slots() + slot; }
  std::uint64_t* issued_word() const { return words_.as<std::uint64_t>(); }
  std::uint64_t* done_word() const { return words_.as<std::uint64_t>() + 1; }
  std::uint32_t* held_word(int owner) const { return held_words_.as<std::uint32_t>() + owner; }
  std::int32_t* content_word(int slot) const { return content_words_.as<std::int32_t>() + slot; }

  FetchSchedule schedule_;
  CudaRingOptions options_;
  const std::atomic<int>* dead_rank_;
  std::vector<const std::uint8_t*> sources_;
  std::vector<std::vector<CopyOp>> ops_;         // by remote index; what the next two say by address
  std::vector<UnitCopies> copies_;               // by remote index
  std::vector<std::uint64_t> remote_bytes_;      // by remote index
  std::uint64_t slot_stride_ = 0;

  DeviceMemory slots_;
  DeviceMemory words_;
  DeviceMemory content_words_;
  DeviceMemory held_words_;  // by owner
  DeviceMemory arrivals_;
  DeviceMemory copy_table_;
  DeviceMemory unit_table_;
  MappedHostMemory host_;
  MappedHostMemory index_words_;  // the number i at place i: what a copy engine writes into `content`
  Stream copy_stream_;
  Stream own_stream_;  // for UnitCopies::own, between begun_ and own_done_ of copy_stream_
  Event begun_;
  Event own_done_;
  std::vector<Event> ready_;
  std::vector<Event> used_;
  Event enter_;      // the caller's stream, as the copy stream sees it once graphs exist
  Event copy_tail_;  // the copy stream, as a graph sees it

  mutable std::mutex mutex_;
  IssuePlan plan_;
  std::vector<int> content_;                  // by slot: what the eager fetches put there, -1 for nothing
  std::vector<std::uint64_t> ready_generation_;
  std::vector<std::uint64_t> used_generation_;
  std::uint64_t batches_ = 0;
  bool graphs_exist_ = false;                 // a replay may have changed any slot behind the host's back
  std::deque<std::unique_ptr<CudaCapture>> captures_;
  bool stopped_ = false;

  std::uint64_t fetches_ = 0;
  std::uint64_t fetched_bytes_ = 0;
  CudaTrace trace_;
  std::vector<std::ptrdiff_t> open_mark_;  // by layer: its entry in the trace, -1 for none
};

}  // namespace sidp::cache
