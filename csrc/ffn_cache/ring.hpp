// The ring of slots on the CPU: one copy thread fills, the replica's thread uses.
//
// Slot life: free -> fetching -> ready -> in use -> free. Two words a slot tell it, each with one writer; both hold
// "ticket + 1" of a use, so they only grow (docs/protocol.md, "Slots"):
//   ready     written by the copy thread after the bytes (release); the user reads it before the bytes (acquire): RAW.
//   released  written by the user after its last read (release); the copy thread reads it before it overwrites: WAR.
#pragma once

#include <atomic>
#include <chrono>
#include <cstddef>
#include <cstdint>
#include <mutex>
#include <thread>
#include <vector>

#include "../p2p/process.hpp"
#include "../schedule.hpp"
#include "copy_engine.hpp"
#include "moved_extent.hpp"
#include "signal.hpp"
#include "trace.hpp"

namespace sidp::cache {

struct RingOptions {
  int slots = 1;
  bool peak_shifting = true;
  bool poison = false;  // fill a slot with NaN before it is fetched into again
  bool paused = false;  // until the first use: a rank that reaches its layers in another way touches no slot
  CopyLimits limits;
  std::uint64_t* activity = nullptr;  // counts uses, for peers that wait for this rank to finish
};

struct RingStats {
  std::uint64_t fetches = 0;
  std::uint64_t fetched_bytes = 0;  // that came from other ranks
  std::uint64_t stalls = 0;         // uses that found their slot not ready
  double stall_seconds = 0;
  std::uint64_t restarts = 0;       // uses out of the expected order
  double fetch_seconds = 0;         // the copy thread spent copying
  std::uint64_t pauses = 0;
};

class Ring {
 public:
  // `sources[rank]` tells where each owner's extents lie; `dead_rank` is -1 until a peer's death is known.
  Ring(const Placement& placement, int rank, std::vector<Source> sources, const std::atomic<int>* dead_rank,
       RingOptions options);
  ~Ring();
  Ring(const Ring&) = delete;
  Ring& operator=(const Ring&) = delete;

  const FetchSchedule& schedule() const { return schedule_; }
  std::byte* slot_address(int slot) const { return memory_ + slot_stride_ * static_cast<std::uint64_t>(slot); }
  std::uint64_t bytes() const { return slot_stride_ * static_cast<std::uint64_t>(schedule_.slots()); }

  // Waits until `layer` may be read; a layer that is local returns at once. Layers may come in any order; the expected
  // order is the fast one. Nested uses of one layer count.
  void acquire(int layer, double timeout_s);
  // Hands the layer's slot back for the next fetch.
  void release(int layer);

  // No fetch begins from here on, what the slots hold stays; the next acquire of a remote layer resumes. For a rank that
  // reaches its layers in another way for a while. Both idempotent.
  void pause();
  void resume();

  // Nothing is read from owner `from` any more: its extents are fetched from where `moved` says. What the slots hold
  // stays; a fetch that is under way begins anew. LayoutError where `moved` leaves one out.
  void move_extents(int from, const std::vector<MovedExtent>& moved);
  // The ranks whose memory a fetch of `layer` reads.
  std::vector<int> owners(int layer) const;

  // Ends the copy thread; waiting and later uses throw PoolClosedError. Idempotent.
  void stop();

  RingStats stats() const;
  Trace& trace() { return trace_; }

 private:
  struct alignas(64) SlotWords {
    std::atomic<std::uint64_t> ready{0};
    alignas(64) std::atomic<std::uint64_t> released{0};
  };
  struct Hold {
    int count = 0;
    std::uint64_t ticket = 0;
    Trace::Clock::time_point since{};
  };

  void check_open() const;
  void check_usable() const;
  bool claim(int index, std::uint64_t& ticket);
  void wait_ready(int layer, int slot, std::uint64_t ticket, double timeout_s);
  void release_slot(int index);
  std::uint64_t remote_bytes(int index) const;

  void copy_loop();
  void wait_resumed();
  bool wait_released(const Fetch& fetch, std::uint64_t epoch);
  bool fill(const Fetch& fetch, std::uint64_t epoch);

  FetchSchedule schedule_;
  mutable std::mutex copies_mutex_;          // held by the copy thread while it copies
  std::vector<std::vector<CopyOp>> copies_;  // by remote index
  std::vector<std::uint64_t> remote_bytes_;  // by remote index
  CopyEngine engine_;
  int rank_;
  const std::atomic<int>* dead_rank_;
  ForkGuard guard_;
  bool poison_;
  std::uint64_t* activity_;
  std::uint64_t slot_stride_;
  std::byte* memory_ = nullptr;
  std::vector<SlotWords> words_;

  // The plan: shared by both threads, held for one step of the queue at a time.
  std::mutex plan_mutex_;
  FetchQueue queue_;
  std::vector<std::uint64_t> last_use_;  // by slot
  std::vector<Hold> holds_;              // by layer
  std::vector<int> user_of_slot_;        // layer in use, -1 for none
  std::uint64_t next_ticket_ = 0;
  std::atomic<std::uint64_t> epoch_{0};  // grows when the plan is made anew, and at the stop

  std::vector<int> content_;  // remote index a slot holds whole; the copy thread's own
  std::atomic<bool> stopped_{false};
  std::atomic<bool> paused_{false};
  Signal filled_;
  Signal emptied_;

  std::atomic<std::uint64_t> fetches_{0};
  std::atomic<std::uint64_t> fetched_bytes_{0};
  std::atomic<std::uint64_t> stalls_{0};
  std::atomic<std::uint64_t> stall_ns_{0};
  std::atomic<std::uint64_t> restarts_{0};
  std::atomic<std::uint64_t> fetch_ns_{0};
  std::atomic<std::uint64_t> pauses_{0};
  Trace trace_;
  std::thread copy_thread_;
};

}  // namespace sidp::cache
