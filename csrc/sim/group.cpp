#include "group.hpp"

#include <algorithm>
#include <numeric>

#include "../error.hpp"

namespace sidp::sim {

Group::Group(const Placement& placement, const Job& job)
    : placement_(placement),
      job_(job),
      world_(placement.world_size()),
      layers_(placement.num_layers()),
      jitter_(job.options.jitter, job.options.seed),
      links_(job.fabric, world_, events_, jitter_),
      waiting_(world_ + 1) {
  check();
  const Options& options = job.options;
  const bool striped = placement.kind() == PlacementKind::striped;
  members_.resize(world_);
  for (int rank = 0; rank < world_; ++rank) {
    Member& member = members_[rank];
    member.stage_free_at.assign(options.stages, 0);
    for (int stage = 0; stage < options.stages; ++stage)
      lanes_.emplace_back(Batch(job.requests, options, job.kv_tokens[rank] / options.stages), rank);
    devices_.emplace_back(events_, rank);
    servers_.emplace_back(job.compute.serve, striped ? 1.0 / world_ : 1.0, options.fuse);
    member.cas = options.reach == Reach::cas;
    if (options.reach == Reach::automatic) member.policy = std::make_unique<ModePolicy>(job.policies[rank]);
    if (walks() && job.slots[rank] > 0)
      member.ring = std::make_unique<RingModel>(placement, rank, job.slots[rank], options.peak_shifting, links_);
  }
  std::vector<int> order(job.requests.size());
  std::iota(order.begin(), order.end(), 0);
  std::stable_sort(order.begin(), order.end(),
                   [&](int a, int b) { return job.requests[a].arrival < job.requests[b].arrival; });
  for (int request : order) {
    const int rank = job.requests[request].rank;
    waiting_[rank < 0 ? world_ : rank].push_back(request);
  }
  result_.ranks.resize(world_);
  result_.finished_s.assign(job.requests.size(), -1);
}

void Group::check() const {
  const Options& o = job_.options;
  const auto size = static_cast<std::size_t>(world_);
  SIDP_REQUIRE(job_.slots.size() == size && job_.kv_tokens.size() == size, ConfigError, "a job for ", world_,
               " ranks needs as many slots and kv_tokens, got ", job_.slots.size(), " and ", job_.kv_tokens.size());
  const auto negative = [](double value) { return !(value >= 0); };
  SIDP_REQUIRE(job_.starts.empty() || (job_.starts.size() == size &&
                                       std::none_of(job_.starts.begin(), job_.starts.end(), negative)),
               ConfigError, "starts must name ", world_, " times of 0 s or more, or none, got ", job_.starts.size());
  SIDP_REQUIRE(o.reach != Reach::automatic || job_.policies.size() == size, ConfigError, "mode auto needs ", world_,
               " policies, got ", job_.policies.size());
  SIDP_REQUIRE(o.stages >= 1 && (o.stages == 1 || o.reach == Reach::local), ConfigError,
               "stages must be 1, or more with mode local, got ", o.stages);
  SIDP_REQUIRE(o.batched_tokens >= 1 && o.most_requests >= 1, ConfigError, "batched_tokens and most_requests must be 1 or more, got ",
               o.batched_tokens, " and ", o.most_requests);
  SIDP_REQUIRE(o.jitter >= 0 && o.jitter < 1, ConfigError, "jitter must be 0 or more and less than 1, got ", o.jitter);
  SIDP_REQUIRE(job_.fabric.slice_bytes == 0 || job_.fabric.slice_bytes >= 1, ConfigError,
               "slice_bytes must be 0 or 1 byte and more, got ", job_.fabric.slice_bytes);
  SIDP_REQUIRE(!negative(o.wake_s) && std::none_of(o.compute_factors.begin(), o.compute_factors.end(), negative) &&
                   std::none_of(job_.fabric.slice_pauses.begin(), job_.fabric.slice_pauses.end(), negative),
               ConfigError, "wake_s, compute_factors and slice_pauses must be 0 or more");
  for (std::size_t i = 0; i < job_.requests.size(); ++i) {
    const Request& r = job_.requests[i];
    SIDP_REQUIRE(r.rank >= -1 && r.rank < world_ && r.answer >= 1 && r.cached >= 0 && r.prompt >= r.cached && r.prompt >= 1 &&
                     r.arrival >= 0,
                 ConfigError, "request ", i, " needs a rank of -1 ... ", world_ - 1,
                 ", an answer and a prompt of 1 token or more, and no more cached tokens than the prompt has");
    for (int rank = 0; rank < world_; ++rank)
      SIDP_REQUIRE((r.rank >= 0 && r.rank != rank) ||
                       static_cast<std::uint64_t>(r.prompt + r.answer) <= job_.kv_tokens[rank] / o.stages,
                   ConfigError, "request ", i, " of ", r.prompt + r.answer, " tokens never fits the ",
                   job_.kv_tokens[rank] / o.stages, " KV tokens of a batch on rank ", rank);
  }
}

Result Group::run() {
  for (int rank = 0; rank < world_; ++rank) events_.at(job_.starts.empty() ? 0 : job_.starts[rank], What::start, rank);
  while (!events_.empty()) handle(events_.next());
  for (std::size_t i = 0; i < result_.finished_s.size(); ++i)
    SIDP_ASSERT(result_.finished_s[i] >= 0, "request ", i, " was never finished");
  for (int rank = 0; rank < world_; ++rank) {
    RankResult& r = result_.ranks[rank];
    result_.end_s = std::max(result_.end_s, r.last_end);
    if (members_[rank].ring) {
      r.fetches = members_[rank].ring->fetches();
      r.fetch_s = members_[rank].ring->fetch_s();
    }
    if (members_[rank].policy) r.switches = members_[rank].policy->switches();
  }
  for (const Lane& lane : lanes_) result_.ranks[lane.rank].most_kv_tokens += lane.batch.most_reserved();
  result_.events = events_.scheduled();
  if (job_.options.reach != Reach::gather) result_.read = links_.read();
  result_.feeding_s = links_.feeding_s();
  result_.crowded_s = links_.crowded_s();
  return std::move(result_);
}

void Group::start(int rank, double now) {
  Member& member = members_[rank];
  if (member.ring && !member.cas) member.ring->pump(now);
  for (int lane = 0; lane < static_cast<int>(lanes_.size()); ++lane)
    if (lanes_[lane].rank == rank) next_iteration(lane, now);
}

void Group::handle(const Event& event) {
  const int who = event.who;
  switch (event.what) {
    case What::own_done:
      if (devices_[who].current(What::own_done, event.tag)) own_done(who, event.time);
      break;
    case What::serve_done:
      if (devices_[who].current(What::serve_done, event.tag)) serve_done(who, event.time);
      break;
    case What::copy_done:
      if (!links_.current(who, event.tag) || links_.goes_on(who, event.time)) break;
      if (members_[who].ring->copied(event.time) && lanes_[who].phase == Phase::stalled)
        events_.at(event.time + job_.options.wake_s, What::woken, who);
      break;
    case What::woken:
      lanes_[who].stall_s += event.time - lanes_[who].stalled_at;
      lanes_[who].phase = Phase::ffn;
      compute(who, lanes_[who].ffn_s, event.time);
      break;
    case What::arrives:
      servers_[who].arrives(travelling_[event.tag], devices_[who], event.time);
      break;
    case What::reply:
      one_part_less(who, event.time);
      break;
    case What::wake:
      if (lanes_[who].phase == Phase::parked) next_iteration(who, event.time);
      if (lanes_[who].phase == Phase::at_barrier) open_barrier(event.time);
      break;
    case What::start:
      start(who, event.time);
      break;
    case What::segment:
      next_stage(who, event.time);
      break;
  }
}

Result simulate(const Placement& placement, const Job& job) { return Group(placement, job).run(); }

}  // namespace sidp::sim
