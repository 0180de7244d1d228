// An iteration layer by layer: the ring's fetches in WaS, requests to owners and their servers in CaS.
#include "group.hpp"

namespace sidp::sim {

void Group::compute(int rank, double seconds, double now) {
  const auto& measured = job_.options.compute_factors;
  devices_[rank].begin(What::own_done, seconds * (measured.empty() ? jitter_.factor() : jitter_.one_of(measured)), now);
}

// With a step of layers the last rank to reach one lets all begin it.
void Group::reach_layer(int rank, double now) {
  if (job_.options.step != Step::layer) {
    begin_layer(rank, now);
    return;
  }
  lanes_[rank].phase = Phase::at_layer;
  for (const Lane& lane : lanes_)
    if (lane.phase != Phase::at_layer || lane.layer != lanes_[rank].layer) return;
  for (int other = 0; other < world_; ++other) begin_layer(other, now);
}

void Group::begin_layer(int rank, double now) {
  lanes_[rank].phase = Phase::rest;
  compute(rank, lanes_[rank].rest_s, now);
}

void Group::own_done(int rank, double now) {
  devices_[rank].end(What::own_done, now);
  switch (lanes_[rank].phase) {
    case Phase::rest:
      enter_ffn(rank, now);
      break;
    case Phase::served:
      one_part_less(rank, now);
      break;
    case Phase::ffn:
      ffn_over(rank, now);
      break;
    default:
      end_iteration(rank, now);
  }
}

bool Group::pick_cas(int rank, double now) {
  Member& member = members_[rank];
  const Lane& lane = lanes_[rank];
  if (!member.policy) return member.cas;
  const bool cas = member.policy->enter(lane.layer, lane.work.rows, now) == Mode::cas;
  if (cas != member.cas && member.ring) member.ring->pause(cas, now);
  member.cas = cas;
  if (lane.layer == 0) look(rank);
  return cas;
}

// As sidp.policy.AutoPolicy does: the link as the ring sees it, and how many rows owners fuse with this rank's.
void Group::look(int rank) {
  Member& member = members_[rank];
  if (++member.looks % job_.options.look_every != 0) return;
  if (member.ring && member.ring->fetch_s() > 0.01)
    member.policy->set_link(static_cast<double>(member.ring->fetched_bytes()) / member.ring->fetch_s());
  const RankResult& seen = result_.ranks[rank];
  if (seen.requested_rows > member.seen_rows)
    member.policy->set_fused_factor(static_cast<double>(seen.fused_rows - member.seen_fused) /
                                    static_cast<double>(seen.requested_rows - member.seen_rows));
  member.seen_rows = seen.requested_rows;
  member.seen_fused = seen.fused_rows;
}

void Group::enter_ffn(int rank, double now) {
  Lane& lane = lanes_[rank];
  const bool cas = pick_cas(rank, now);
  lane.cas |= cas;
  if (placement_.local(lane.layer, rank)) {
    lane.phase = Phase::ffn;
  } else if (cas) {
    lane.phase = Phase::served;
    send(rank, now);
    return;
  } else if (members_[rank].ring->claim(lane.layer)) {
    lane.phase = Phase::ffn;
  } else {
    lane.phase = Phase::stalled;
    lane.stalled_at = now;
    return;
  }
  compute(rank, lane.ffn_s, now);
}

void Group::ffn_over(int rank, double now) {
  Lane& lane = lanes_[rank];
  Member& member = members_[rank];
  if (member.policy) member.policy->leave(now);
  if (!member.cas && !placement_.local(lane.layer, rank)) member.ring->release(lane.layer, now);
  if (++lane.layer < layers_) {
    reach_layer(rank, now);
    return;
  }
  lane.phase = Phase::once;
  compute(rank, lane.once_s, now);
}

void Group::send(int rank, double now) {
  Lane& lane = lanes_[rank];
  const Fabric& fabric = job_.fabric;
  const int owner = placement_.owner(lane.layer);
  const double rate = fabric.ingress_bytes_per_s;
  const double travel = fabric.round_trip_s / 2 + (rate > 0 ? lane.work.rows * fabric.send_row_bytes / rate : 0);
  lane.awaited = 0;
  for (int target = 0; target < world_; ++target) {
    if (target == rank || (owner >= 0 && owner != target)) continue;
    ++lane.awaited;
    events_.at(now + travel, What::arrives, target, travelling_.size());
  }
  travelling_.push_back({rank, lane.layer, lane.work.rows});
  result_.ranks[rank].requested_rows += static_cast<std::uint64_t>(lane.work.rows) * lane.awaited;
  if (owner >= 0) return;
  ++lane.awaited;  // this rank's own slice
  compute(rank, lane.ffn_s / world_, now);
}

void Group::serve_done(int owner, double now) {
  const auto batch = servers_[owner].ended(devices_[owner], now);
  int rows = 0;
  for (const CasRequest& request : batch) rows += request.rows;
  const Fabric& fabric = job_.fabric;
  const double rate = fabric.egress_bytes_per_s;
  result_.ranks[owner].batches_served += 1;
  result_.ranks[owner].requests_served += batch.size();
  for (const CasRequest& request : batch) {
    result_.ranks[request.requester].fused_rows += rows;
    const double bytes = request.rows * fabric.reply_row_bytes;
    events_.at(now + fabric.round_trip_s / 2 + (rate > 0 ? bytes / rate : 0), What::reply, request.requester);
  }
}

void Group::one_part_less(int rank, double now) {
  if (--lanes_[rank].awaited == 0) ffn_over(rank, now);
}

}  // namespace sidp::sim
