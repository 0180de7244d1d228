// What a host that only enqueues work has to know: which fetches may be enqueued now, and which ticket a use has.
// Pure bookkeeping, no CUDA: the eager ring and every captured graph keep one each.
//
// A fetch may be enqueued once the use before it in its slot has been released by the host; that its reader has really
// finished is then a matter of order on the device (an event, a word, or an edge of a graph).
#pragma once

#include <cstdint>
#include <optional>
#include <vector>

#include "../schedule.hpp"

namespace sidp::cache {

class IssuePlan {
 public:
  explicit IssuePlan(const FetchSchedule& schedule);

  // The next fetch in order, if its slot is free; to be called again until there is none.
  std::optional<Fetch> next();

  // Begins a use of remote `index`. False where the layer is in use already: then nothing is to be waited for. `issue()`
  // is called where the plan was made anew, or not begun: it must enqueue all that next() gives.
  template <typename Issue>
  bool claim(int index, Issue&& issue) {
    if (is_held(index)) return false;
    issue();
    if (!is_next_and_issued(index)) {
      start_at(index);
      ++restarts_;
      issue();
    }
    begin_use(index);
    return true;
  }

  // Makes the plan begin at `index`: its fetch is the next one, whatever was planned.
  void start_at(int index);

  // Ends a use; true where it was the last one of a nest, so that the slot is free.
  bool release(int index);

  std::uint64_t uses() const { return uses_; }
  std::uint64_t restarts() const { return restarts_; }

 private:
  struct Hold {
    int count = 0;
    std::uint64_t ticket = 0;
  };

  bool is_held(int index);
  bool is_next_and_issued(int index) const;
  void begin_use(int index);

  const FetchSchedule* schedule_;
  FetchQueue queue_;
  std::optional<Fetch> pending_;         // taken from the queue, its slot not free yet
  std::vector<Hold> holds_;              // by remote index
  std::vector<int> user_of_slot_;        // remote index in use, -1 for none
  std::vector<std::uint64_t> last_use_;  // by slot: ticket handed out
  std::vector<std::uint64_t> released_;  // by slot: ticket + 1 of the last use that has ended
  std::vector<std::uint64_t> issued_;    // by slot: ticket + 1 of the last fetch that was given out
  std::uint64_t next_ticket_ = 0;
  std::uint64_t uses_ = 0;
  std::uint64_t restarts_ = 0;
};

}  // namespace sidp::cache
