#include "schedule.hpp"

#include <algorithm>
#include <numeric>

#include "error.hpp"

namespace sidp {
namespace {

bool needs_no_fetch(const Placement& placement, int rank, const std::vector<bool>& local, int layer) {
  return local.empty() ? placement.local(layer, rank) : local.at(layer);
}

}  // namespace

FetchSchedule::FetchSchedule(const Placement& placement, int rank, int slots, bool peak_shifting,
                             const std::vector<bool>& local)
    : rank_(rank), slots_(slots), remote_index_(placement.num_layers(), -1) {
  SIDP_REQUIRE(slots >= 1, ConfigError, "slots must be 1 or more, got ", slots);
  SIDP_REQUIRE(rank >= 0 && rank < placement.world_size(), ConfigError, "rank ", rank, " is not in 0 ... ",
               placement.world_size() - 1);
  for (int layer = 0; layer < placement.num_layers(); ++layer) {
    if (needs_no_fetch(placement, rank, local, layer)) continue;
    remote_index_[layer] = num_remote();
    layers_.push_back(layer);
  }
  order_.resize(layers_.size());
  std::iota(order_.begin(), order_.end(), 0);
  window_begin_.resize(layers_.size());
  window_end_.resize(layers_.size());
  for (int begin = 0; begin < num_remote();) {
    int end = begin + 1;
    while (end < num_remote() && end - begin < slots_ &&
           placement.cycle(layers_[end]) == placement.cycle(layers_[begin]))
      ++end;
    for (int index = begin; index < end; ++index) {
      window_begin_[index] = begin;
      window_end_[index] = end;
    }
    if (peak_shifting && placement.kind() == PlacementKind::layer) rotate_window(placement, begin, end);
    begin = end;
  }
}

void FetchSchedule::rotate_window(const Placement& placement, int begin, int end) {
  const int world = placement.world_size();
  const auto distance = [&](int index) { return (placement.owner(layers_[index]) - rank_ - 1 + world) % world; };
  std::sort(order_.begin() + begin, order_.begin() + end, [&](int a, int b) { return distance(a) < distance(b); });
}

int default_slots(const Placement& placement, int rank, bool peak_shifting, const std::vector<bool>& local) {
  int remote = 0;
  for (int layer = 0; layer < placement.num_layers(); ++layer)
    remote += needs_no_fetch(placement, rank, local, layer) ? 0 : 1;
  const int most = std::max(1, remote / 2);
  const bool rotated = placement.kind() == PlacementKind::layer && peak_shifting;
  const int wanted = rotated ? std::max(3, placement.world_size() * 3 / 2) : 3;
  for (int slots = wanted; slots <= std::min(most, 2 * wanted); ++slots)
    if (remote % slots == 0 || remote % slots >= wanted) return slots;
  return std::min(wanted, most);
}

FetchQueue::FetchQueue(const FetchSchedule& schedule)
    : schedule_(&schedule), planned_use_(schedule.slots(), kNever) {
  SIDP_ASSERT(schedule.num_remote() > 0, "a fetch queue needs a remote layer");
}

std::uint64_t FetchQueue::ticket_of(int index) const {
  const std::int64_t uses = std::int64_t{forward_} * schedule_->num_remote() + index - base_index_;
  return base_ticket_ + static_cast<std::uint64_t>(uses);
}

Fetch FetchQueue::next() {
  Fetch fetch;
  if (!restart_window_.empty()) {
    fetch.index = restart_window_.front();
    restart_window_.erase(restart_window_.begin());
  } else {
    if (position_ == schedule_->num_remote()) {
      position_ = 0;
      ++forward_;
    }
    fetch.index = schedule_->order()[position_++];
  }
  fetch.ticket = ticket_of(fetch.index);
  fetch.slot = schedule_->slot(fetch.index);
  fetch.after = planned_use_[fetch.slot];
  planned_use_[fetch.slot] = fetch.ticket;
  largest_planned_ = std::max(largest_planned_, fetch.ticket);
  return fetch;
}

int FetchQueue::expected_index(std::uint64_t ticket) const {
  return static_cast<int>((base_index_ + (ticket - base_ticket_)) % schedule_->num_remote());
}

std::uint64_t FetchQueue::restart(int index, const std::vector<std::uint64_t>& last_use) {
  base_index_ = index;
  base_ticket_ = largest_planned_ + 1;
  for (std::uint64_t ticket : last_use)
    if (ticket != kNever) base_ticket_ = std::max(base_ticket_, ticket + 1);
  largest_planned_ = base_ticket_;
  forward_ = 0;
  planned_use_ = last_use;
  restart_window_.assign(1, index);
  for (int position = schedule_->window_begin(index); position < schedule_->window_end(index); ++position)
    if (schedule_->order()[position] > index) restart_window_.push_back(schedule_->order()[position]);
  position_ = schedule_->window_end(index);
  return base_ticket_;
}

}  // namespace sidp
