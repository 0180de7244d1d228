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
      flows_(world),
      readers_(world),
      egress_free_at_(world, 0),
      counted_to_(world, 0),
      read_(world, std::vector<std::uint64_t>(world, 0)),
      feeding_s_(world, 0),
      crowded_s_(world, 0) {}

void Links::start(int reader, int owner, std::uint64_t bytes, int copies, double now) {
  Flow& flow = flows_[reader];
  flow.owner = owner;
  flow.since = now;
  flow.left = static_cast<double>(bytes);
  read_[reader][owner] += bytes;
  if (reader == owner) {
    flow.rate = or_unlimited(fabric_.local_bytes_per_s);
    events_.at(now + flow.left / flow.rate, What::copy_done, reader, ++flow.version);
    return;
  }
  flow.left = (flow.left + copies * fabric_.copy_bytes) * jitter_.factor();
  flow.rate = 0;
  count(owner, now);
  readers_[owner].push_back(reader);
  if (fabric_.slice_bytes == 0) {
    share_again(owner, now);
    return;
  }
  flow.piece = flow.of_piece_left = flow.left / copies;
  flow.pause = fabric_.slice_pauses.empty() ? 0 : jitter_.one_of(fabric_.slice_pauses);
  next_slice(reader, now);
}

bool Links::goes_on(int reader, double now) {
  constexpr double kRounding = 0.5;  // of a byte
  const Flow& flow = flows_[reader];
  if (fabric_.slice_bytes == 0 || flow.owner == reader || flow.left < kRounding) return false;
  next_slice(reader, now);
  return true;
}

void Links::next_slice(int reader, double now) {
  Flow& flow = flows_[reader];
  const double bytes = std::min(fabric_.slice_bytes, flow.of_piece_left);
  flow.left -= bytes;
  flow.of_piece_left -= bytes;
  if (flow.of_piece_left < 1) flow.of_piece_left = flow.piece;
  double& free_at = egress_free_at_[flow.owner];
  free_at = std::max(now, free_at) + bytes / or_unlimited(fabric_.egress_bytes_per_s);
  const double taken_in = now + bytes / or_unlimited(fabric_.ingress_bytes_per_s);
  events_.at(std::max(free_at, taken_in) + flow.pause, What::copy_done, reader, ++flow.version);
}

void Links::finish(int reader, double now) {
  const int owner = flows_[reader].owner;
  if (reader == owner) return;
  count(owner, now);
  auto& readers = readers_[owner];
  readers.erase(std::find(readers.begin(), readers.end(), reader));
  if (fabric_.slice_bytes == 0) share_again(owner, now);
}

void Links::count(int owner, double now) {
  const double passed = now - counted_to_[owner];
  counted_to_[owner] = now;
  if (!readers_[owner].empty()) feeding_s_[owner] += passed;
  if (readers_[owner].size() > 1) crowded_s_[owner] += passed;
}

void Links::share_again(int owner, double now) {
  const auto n = static_cast<double>(readers_[owner].size());
  if (n == 0) return;
  const double egress = or_unlimited(fabric_.egress_bytes_per_s);
  const double ingress = or_unlimited(fabric_.ingress_bytes_per_s);
  const double crowded = egress / (1 + fabric_.incast * (n - 1)) / n;
  for (int reader : readers_[owner]) {
    Flow& flow = flows_[reader];
    const bool first = reader == readers_[owner].front();
    const double rate = fabric_.turns ? (first ? std::min(ingress, egress) : 0) : std::min(ingress, crowded);
    if (flow.rate == rate) continue;
    if (flow.rate > 0) flow.left = std::max(0.0, flow.left - (now - flow.since) * flow.rate);
    flow.since = now;
    flow.rate = rate;
    events_.at(now + flow.left / rate, What::copy_done, reader, ++flow.version);
  }
}

}  // namespace sidp::sim
