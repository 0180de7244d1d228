#include "issue_plan.hpp"

#include "../error.hpp"

namespace sidp::cache {

IssuePlan::IssuePlan(const FetchSchedule& schedule)
    : schedule_(&schedule),
      queue_(schedule),
      holds_(schedule.num_remote()),
      user_of_slot_(schedule.slots(), -1),
      last_use_(schedule.slots(), kNever),
      released_(schedule.slots(), 0),
      issued_(schedule.slots(), 0) {}

std::optional<Fetch> IssuePlan::next() {
  if (!pending_) pending_ = queue_.next();
  if (pending_->after != kNever && released_[pending_->slot] <= pending_->after) return std::nullopt;
  const Fetch fetch = *pending_;
  pending_.reset();
  issued_[fetch.slot] = fetch.ticket + 1;
  return fetch;
}

bool IssuePlan::is_held(int index) {
  Hold& hold = holds_[index];
  if (hold.count > 0) {
    ++hold.count;
    return true;
  }
  const int slot = schedule_->slot(index);
  SIDP_REQUIRE(user_of_slot_[slot] < 0, ConfigError, "layer ", schedule_->layer(index), " shares slot ", slot,
               " with layer ", schedule_->layer(user_of_slot_[slot]),
               ", which is still in use: release it first, or use more than ", schedule_->slots(), " slots");
  return false;
}

// A layer may be the expected one and yet be blocked, behind a fetch that waits for a layer which is held longer.
bool IssuePlan::is_next_and_issued(int index) const {
  return queue_.expected_index(next_ticket_) == index && issued_[schedule_->slot(index)] == next_ticket_ + 1;
}

void IssuePlan::start_at(int index) {
  next_ticket_ = queue_.restart(index, last_use_);
  pending_.reset();
}

void IssuePlan::begin_use(int index) {
  const int slot = schedule_->slot(index);
  SIDP_ASSERT(issued_[slot] == next_ticket_ + 1, "slot ", slot, " ticket ", next_ticket_, " issued ", issued_[slot]);
  holds_[index] = {1, next_ticket_};
  last_use_[slot] = next_ticket_++;
  user_of_slot_[slot] = index;
  ++uses_;
}

bool IssuePlan::release(int index) {
  Hold& hold = holds_[index];
  SIDP_REQUIRE(hold.count > 0, ConfigError, "layer ", schedule_->layer(index), " was released without being acquired");
  if (--hold.count > 0) return false;
  const int slot = schedule_->slot(index);
  user_of_slot_[slot] = -1;
  released_[slot] = hold.ticket + 1;
  return true;
}

}  // namespace sidp::cache
