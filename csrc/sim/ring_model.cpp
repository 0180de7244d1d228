#include "ring_model.hpp"

#include <algorithm>

#include "../error.hpp"

namespace sidp::sim {

RingModel::RingModel(const Placement& placement, int rank, int slots, bool peak_shifting, Links& links)
    : rank_(rank),
      links_(links),
      schedule_(placement, rank, slots, peak_shifting),
      content_(slots, -1),
      ready_(slots, 0),
      released_(slots, 0),
      copy_(links.lanes(), 0) {
  for (int index = 0; index < schedule_.num_remote(); ++index) {
    auto& lists = copies_.emplace_back(links.lanes());
    std::vector<int> owners;  // others, in the order in which this rank comes to them: lanes are given out by owner
    for (const CopyOp& op : placement.copies(schedule_.layer(index), rank)) {
      const auto known = std::find(owners.begin(), owners.end(), op.owner);
      const std::size_t lane = op.owner == rank ? 0 : (known - owners.begin()) % lists.size();
      if (op.owner != rank && known == owners.end()) owners.push_back(op.owner);
      auto& copies = lists[lane];
      if (copies.empty() || copies.back().owner != op.owner) copies.push_back({op.owner, 0, 0});
      copies.back().bytes += op.bytes();
      ++copies.back().pieces;
    }
  }
  if (schedule_.num_remote() == 0) return;
  queue_ = std::make_unique<FetchQueue>(schedule_);
  pending_ = queue_->next();
}

bool RingModel::claim(int layer) {
  const int index = schedule_.remote_index(layer);
  SIDP_ASSERT(queue_ && queue_->expected_index(next_ticket_) == index, "layer ", layer, " is used out of turn");
  return ready_[schedule_.slot(index)] > next_ticket_++;
}

void RingModel::release(int layer, double now) {
  released_[schedule_.slot(schedule_.remote_index(layer))] = next_ticket_;
  pump(now);
}

bool RingModel::next_may_start() const {
  return queue_ && copying_ == 0 && !paused_ && (pending_.after == kNever || released_[pending_.slot] > pending_.after);
}

void RingModel::pump(double now) {
  while (next_may_start()) {
    if (content_[pending_.slot] == pending_.index) {
      filled();
      continue;
    }
    began_ = now;
    content_[pending_.slot] = -1;
    for (int lane = 0; lane < links_.lanes(); ++lane) {
      copy_[lane] = 0;
      if (next_copy(lane, now)) ++copying_;
    }
  }
}

// False where the lane has nothing left of this fetch.
bool RingModel::next_copy(int lane, double now) {
  const std::vector<Copy>& mine = copies_[pending_.index][lane];
  if (copy_[lane] == mine.size()) return false;
  const Copy& copy = mine[copy_[lane]++];
  links_.start(rank_ * links_.lanes() + lane, copy.owner, copy.bytes, copy.pieces, now);
  if (copy.owner != rank_) fetched_bytes_ += copy.bytes;
  return true;
}

bool RingModel::copied(int lane, double now) {
  links_.finish(lane, now);
  if (next_copy(lane - rank_ * links_.lanes(), now) || --copying_ > 0) return false;
  ++fetches_;
  fetch_s_ += now - began_;
  content_[pending_.slot] = pending_.index;
  const bool awaited = pending_.ticket + 1 == next_ticket_;
  filled();
  pump(now);
  return awaited;
}

void RingModel::filled() {
  ready_[pending_.slot] = pending_.ticket + 1;
  pending_ = queue_->next();
}

void RingModel::pause(bool paused, double now) {
  paused_ = paused;
  pump(now);
}

}  // namespace sidp::sim
