#include "links.hpp"

#include <algorithm>
#include <limits>

namespace sidp::sim {
namespace {

double or_unlimited(double rate) { return rate > 0 ? rate : std::numeric_limits<double>::infinity(); }

}  // namespace

Links::Links(const Fabric& fabric, int world, EventQueue& events, Jitter& jitter)
    : fabric_(fabric),
      events_(events),
      jitter_(jitter),
      flows_(static_cast<std::size_t>(world) * std::max(1, fabric.lanes)),
      readers_(world),
      busy_(world, 0),
      egress_free_at_(world, 0),
      counted_to_(world, 0),
      read_(world, std::vector<std::uint64_t>(world, 0)),
      feeding_s_(world, 0),
      crowded_s_(world, 0) {}

void Links::start(int lane, int owner, std::uint64_t bytes, int copies, double now) {
  Flow& flow = flows_[lane];
  flow.owner = owner;
  flow.since = now;
  flow.left = static_cast<double>(bytes);
  read_[reader(lane)][owner] += bytes;
  if (reader(lane) == owner) {
    flow.rate = or_unlimited(fabric_.local_bytes_per_s);
    events_.at(now + flow.left / flow.rate, What::copy_done, lane, ++flow.version);
    return;
  }
  flow.left = (flow.left + copies * fabric_.copy_bytes) * jitter_.factor();
  flow.rate = 0;
  count(owner, now);
  readers_[owner].push_back(lane);
  ++busy_[reader(lane)];
  if (fabric_.slice_bytes == 0) {
    share_again(lane, now);
    return;
  }
  flow.piece = flow.of_piece_left = flow.left / copies;
  flow.pause = fabric_.slice_pauses.empty() ? 0 : jitter_.one_of(fabric_.slice_pauses);
  next_slice(lane, now);
}

bool Links::goes_on(int lane, double now) {
  constexpr double kRounding = 0.5;  // of a byte
  const Flow& flow = flows_[lane];
  if (fabric_.slice_bytes == 0 || flow.owner == reader(lane) || flow.left < kRounding) return false;
  next_slice(lane, now);
  return true;
}

void Links::next_slice(int lane, double now) {
  Flow& flow = flows_[lane];
  const double bytes = std::min(fabric_.slice_bytes, flow.of_piece_left);
  flow.left -= bytes;
  flow.of_piece_left -= bytes;
  if (flow.of_piece_left < 1) flow.of_piece_left = flow.piece;
  double& free_at = egress_free_at_[flow.owner];
  free_at = std::max(now, free_at) + bytes / or_unlimited(fabric_.egress_bytes_per_s);
  const double taken_in = now + bytes / or_unlimited(fabric_.ingress_bytes_per_s);
  events_.at(std::max(free_at, taken_in) + flow.pause, What::copy_done, lane, ++flow.version);
}

void Links::finish(int lane, double now) {
  const int owner = flows_[lane].owner;
  if (reader(lane) == owner) return;
  count(owner, now);
  auto& readers = readers_[owner];
  readers.erase(std::find(readers.begin(), readers.end(), lane));
  --busy_[reader(lane)];
  flows_[lane].rate = 0;
  if (fabric_.slice_bytes == 0) share_again(lane, now);
}

void Links::count(int owner, double now) {
  const double passed = now - counted_to_[owner];
  counted_to_[owner] = now;
  if (!readers_[owner].empty()) feeding_s_[owner] += passed;
  if (readers_[owner].size() > 1) crowded_s_[owner] += passed;
}

// What begins or ends on `lane` changes what its owner gives to the others and what its reader takes from others.
void Links::share_again(int lane, double now) {
  for (int other : readers_[flows_[lane].owner]) rate_again(other, now);
  const int first = reader(lane) * fabric_.lanes;
  for (int other = first; other < first + fabric_.lanes; ++other) {
    const auto& beside = readers_[std::max(0, flows_[other].owner)];
    if (other != lane && std::find(beside.begin(), beside.end(), other) != beside.end()) rate_again(other, now);
  }
}

void Links::rate_again(int lane, double now) {
  Flow& flow = flows_[lane];
  const auto& readers = readers_[flow.owner];
  const auto n = static_cast<double>(readers.size());
  const double egress = or_unlimited(fabric_.egress_bytes_per_s);
  const double ingress = or_unlimited(fabric_.ingress_bytes_per_s) / busy_[reader(lane)];
  const double crowded = egress / (1 + fabric_.incast * (n - 1)) / n;
  const double rate = fabric_.turns ? (lane == readers.front() ? std::min(ingress, egress) : 0) : std::min(ingress, crowded);
  if (flow.rate == rate) return;
  if (flow.rate > 0) flow.left = std::max(0.0, flow.left - (now - flow.since) * flow.rate);
  flow.since = now;
  flow.rate = rate;
  events_.at(now + flow.left / rate, What::copy_done, lane, ++flow.version);
}

}  // namespace sidp::sim
