// The order in which a rank fetches its remote units, and the slot each one lands in. Pure arithmetic.
//
// Remote layers are numbered 0 ... N-1 in the order of use; remote index i always lands in slot i mod S, so addresses
// are stable. Layers are used in ascending order, for ever: forward after forward.
//
// Peak shifting. A window is a run of at most S remote layers of one cycle of D layers. Inside a window rank r fetches in
// the order of owners r+1, r+2, ..., so that ranks in step read from different owners at every moment. Two layers of one
// window never share a slot; hence, slot by slot, fetches happen in the order of use, and waiting for a slot's last
// reader can never wait for a fetch that comes later in the queue.
#pragma once

#include <cstdint>
#include <vector>

#include "placement.hpp"

namespace sidp {

// Slots of a ring begin at multiples of this.
constexpr std::uint64_t kSlotAlignment = 4096;

class FetchSchedule {
 public:
  // `local[layer]` says which layers need no fetch; where it is empty, the layers that `rank` holds whole.
  FetchSchedule(const Placement& placement, int rank, int slots, bool peak_shifting,
                const std::vector<bool>& local = {});

  int rank() const { return rank_; }
  int slots() const { return slots_; }
  int num_remote() const { return static_cast<int>(layers_.size()); }

  int layer(int index) const { return layers_.at(index); }
  // -1 for a layer that is local.
  int remote_index(int layer) const { return remote_index_.at(layer); }
  int slot(int index) const { return index % slots_; }

  // Remote indices in the order of fetching; every window of it is a permutation of the same window in order of use.
  const std::vector<int>& order() const { return order_; }
  // First index of the window that `index` belongs to, and one past its last.
  int window_begin(int index) const { return window_begin_.at(index); }
  int window_end(int index) const { return window_end_.at(index); }

 private:
  void rotate_window(const Placement& placement, int begin, int end);

  int rank_;
  int slots_;
  std::vector<int> layers_;
  std::vector<int> remote_index_;
  std::vector<int> order_;
  std::vector<int> window_begin_;
  std::vector<int> window_end_;
};

// The number of slots that hides fetches at little memory. `striped` needs one slot in use, one ready and one filling.
// `layer` with peak shifting takes a cycle and a half: most ranks fetch the last layers of a cycle before its first ones,
// so a plain cycle stalls even when the link is fast enough, and a second whole cycle buys little
// (tests/core/test_schedule.py simulates it). Where the slots do not divide the remote layers, the last ones of a forward
// share slots with the first ones of the next, only N mod S uses apart; slots are added until that is far enough too.
// Never more than half of the remote layers (or one). `local` as in FetchSchedule.
int default_slots(const Placement& placement, int rank, bool peak_shifting, const std::vector<bool>& local = {});

// One entry of the fetch queue: bring remote `index` into `slot` for use number `ticket`, once the slot's previous use,
// number `after`, has been released (kNever: the slot has had no use).
struct Fetch {
  std::uint64_t ticket = 0;
  std::uint64_t after = 0;
  int index = 0;
  int slot = 0;
};

constexpr std::uint64_t kNever = ~std::uint64_t{0};

// Turns the schedule into an endless queue of fetches. Uses of remote layers are numbered by tickets that only grow.
class FetchQueue {
 public:
  explicit FetchQueue(const FetchSchedule& schedule);

  // The next fetch in order. The caller waits for `after` itself.
  Fetch next();

  // The remote index that use number `ticket` is expected to be.
  int expected_index(std::uint64_t ticket) const;

  // The user asks for `index` where another was expected: plans again from there. `last_use[slot]` is the ticket of the last
  // use of each slot that was handed out (kNever for none). Returns the ticket of this use; tickets already planned are
  // never used again, so that a late "ready" for one of them cannot be mistaken.
  std::uint64_t restart(int index, const std::vector<std::uint64_t>& last_use);

 private:
  std::uint64_t ticket_of(int index) const;

  const FetchSchedule* schedule_;
  std::uint64_t base_ticket_ = 0;   // ticket of `base_index_`
  int base_index_ = 0;
  int forward_ = 0;                 // forwards between the base and the queue's head
  int position_ = 0;                // of the head in order()
  std::uint64_t largest_planned_ = 0;
  std::vector<std::uint64_t> planned_use_;  // per slot, the last ticket planned
  std::vector<int> restart_window_;         // what is left of the window that a restart cut into, in fetch order
};

}  // namespace sidp
