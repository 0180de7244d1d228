// An iteration of a rank from admission to its end, and those that need no layers: replicas, pipelines, gathers.
#include <algorithm>

#include "group.hpp"

namespace sidp::sim {

bool Group::has_work(Lane& lane, double now) {
  for (int queue : {lane.rank, world_}) lane.batch.admit(waiting_[queue], now, fair_share(queue));
  return lane.batch.running() > 0;
}

// Of what waits and what runs, an even part for each batch that takes from this queue, so that the first does not take all.
int Group::fair_share(int queue) const {
  std::size_t requests = waiting_[queue].size(), batches = 0;
  for (const Lane& lane : lanes_) {
    if (queue != world_ && lane.rank != queue) continue;
    requests += lane.batch.running();
    ++batches;
  }
  return static_cast<int>((requests + batches - 1) / batches);
}

void Group::next_iteration(int number, double now) {
  Lane& lane = lanes_[number];
  const bool works = has_work(lane, now);
  if (together()) {
    lane.phase = Phase::at_barrier;
    lane.idle = !works;
    open_barrier(now);
  } else if (works) {
    set_out(number, now);
  } else {
    park(number, now);
  }
}

// Wakes when the next request arrives.
void Group::park(int number, double now) {
  Lane& lane = lanes_[number];
  if (!together()) lane.phase = Phase::parked;
  for (const auto* queue : {&waiting_[lane.rank], &waiting_[world_]})
    if (!queue->empty()) events_.at(std::max(now, job_.requests[queue->front()].arrival), What::wake, number);
}

void Group::open_barrier(double now) {
  bool any = false;
  for (Lane& lane : lanes_) {
    if (lane.phase != Phase::at_barrier) return;
    if (lane.idle) lane.idle = !has_work(lane, now);
    any |= !lane.idle;
  }
  if (!any) {
    for (int lane = 0; lane < static_cast<int>(lanes_.size()); ++lane) park(lane, now);
    return;
  }
  for (int lane = 0; lane < static_cast<int>(lanes_.size()); ++lane) set_out(lane, now);
  if (job_.options.reach == Reach::gather) gather_together(now);
}

void Group::set_out(int number, double now) {
  Lane& lane = lanes_[number];
  const Compute& compute = job_.compute;
  lane.work = lane.idle ? Work{1, 0, 0, 0} : lane.batch.compose();
  const double attention = lane.work.cached * compute.cached_token_s + lane.work.pairs * compute.pair_s;
  lane.rest_s = compute.rest.at(lane.work.rows) + attention / layers_;
  lane.ffn_s = compute.ffn.at(lane.work.rows);
  lane.once_s = compute.once.at(lane.work.samples);
  lane.begin = now;
  lane.stall_s = 0;
  lane.layer = 0;
  lane.stage = 0;
  lane.cas = false;
  if (walks()) {
    reach_layer(number, now);
  } else {
    lane.phase = Phase::whole;
    if (job_.options.reach == Reach::local) next_stage(number, now);
  }
}

void Group::end_iteration(int number, double now) {
  Lane& lane = lanes_[number];
  RankResult& rank = result_.ranks[lane.rank];
  if (lane.idle) {
    ++rank.idle_iterations;
    next_iteration(number, now);
    return;
  }
  std::vector<int> ended;
  const int running = lane.batch.running();
  rank.tokens += lane.batch.advance(ended);
  rank.requests += ended.size();
  for (int request : ended) result_.finished_s[request] = now;
  ++rank.iterations;
  rank.cas_iterations += lane.cas;
  rank.stall_s += lane.stall_s;
  rank.busy_s += now - lane.begin;
  rank.last_end = now;
  if (job_.options.trace) {
    const int mode = job_.options.reach == Reach::gather ? 3 : walks() ? 1 + lane.cas : 0;
    result_.iterations.push_back({lane.rank, mode, lane.work.rows, running, lane.begin, now, lane.stall_s});
  }
  next_iteration(number, now);
}

// A batch goes from stage to stage and waits where another one is.
void Group::next_stage(int number, double now) {
  Lane& lane = lanes_[number];
  if (lane.stage == job_.options.stages || job_.options.reach == Reach::gather) {
    end_iteration(number, now);
    return;
  }
  double& free_at = members_[lane.rank].stage_free_at[lane.stage++];
  double seconds = layers_ * (lane.rest_s + lane.ffn_s) / job_.options.stages;
  if (lane.stage == job_.options.stages) seconds += lane.once_s;
  free_at = std::max(now, free_at) + seconds;
  events_.at(free_at, What::segment, number);
}

// The slowest rank's computing of a layer beside the gather of the next; the first gather beside nothing.
void Group::gather_together(double now) {
  if (result_.read.empty()) result_.read.assign(world_, std::vector<std::uint64_t>(world_, 0));
  double layer_s = 0, once_s = 0;
  for (const Lane& lane : lanes_) {
    layer_s = std::max(layer_s, lane.rest_s + lane.ffn_s);
    once_s = std::max(once_s, lane.once_s);
  }
  double end = now, stall = 0, first = 0;
  for (int layer = 0; layer < layers_; ++layer) {
    const auto share = static_cast<double>(placement_.unit(layer).bytes()) / world_;
    const double rate = job_.fabric.ingress_bytes_per_s;
    const double gather = rate > 0 ? (world_ - 1) * (share + job_.fabric.copy_bytes) / rate : 0;
    for (int reader = 0; reader < world_; ++reader)
      for (int owner = 0; owner < world_; ++owner)
        if (owner != reader) result_.read[reader][owner] += static_cast<std::uint64_t>(share);
    if (layer == 0) first = gather;
    end += std::max(gather, layer_s);
    stall += std::max(0.0, gather - layer_s);
  }
  end += first + once_s;
  for (int lane = 0; lane < static_cast<int>(lanes_.size()); ++lane) {
    lanes_[lane].stall_s = stall + first;
    events_.at(end, What::segment, lane);
  }
}

}  // namespace sidp::sim
