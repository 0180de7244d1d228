#include "ring_model.hpp"

#include "../error.hpp"

namespace sidp::sim {

RingModel::RingModel(const Placement& placement, int rank, int slots, bool peak_shifting, Links& links)
    : rank_(rank),
      links_(links),
      schedule_(placement, rank, slots, peak_shifting),
      content_(slots, -1),
      ready_(slots, 0),
      released_(slots, 0) {
  for (int index = 0; index < schedule_.num_remote(); ++index) {
    auto& copies = copies_.emplace_back();
    for (const CopyOp& op : placement.copies(schedule_.layer(index), rank)) {
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
  return queue_ && !copying_ && !paused_ && (pending_.after == kNever || released_[pending_.slot] > pending_.after);
}

void RingModel::pump(double now) {
  while (next_may_start()) {
    if (content_[pending_.slot] == pending_.index) {
      filled();
      continue;
    }
    copying_ = true;
    copy_ = 0;
    began_ = now;
    content_[pending_.slot] = -1;
    next_copy(now);
  }
}

void RingModel::next_copy(double now) {
  const Copy& copy = copies_[pending_.index][copy_];
  links_.start(rank_, copy.owner, copy.bytes, copy.pieces, now);
  if (copy.owner != rank_) fetched_bytes_ += copy.bytes;
}

bool RingModel::copied(double now) {
  links_.finish(rank_, now);
  if (++copy_ < copies_[pending_.index].size()) {
    next_copy(now);
    return false;
  }
  copying_ = false;
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
