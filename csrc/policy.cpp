#include "policy.hpp"

#include <algorithm>
#include <cstdio>

#include "error.hpp"

namespace sidp {

const char* mode_name(Mode mode) { return mode == Mode::was ? "was" : "cas"; }

TimeTable::TimeTable(std::vector<std::pair<double, double>> points) : points_(std::move(points)) {
  SIDP_REQUIRE(!points_.empty(), ConfigError, "a time table needs at least one (rows, seconds)");
  double before = 0;
  for (const auto& [rows, seconds] : points_) {
    SIDP_REQUIRE(rows > before && seconds > 0, ConfigError, "a time table takes ascending rows and positive seconds, got (",
                 rows, ", ", seconds, ") after ", before, " rows");
    before = rows;
  }
}

double TimeTable::at(double rows) const {
  if (points_.empty()) return 0;
  if (rows <= points_.front().first) return points_.front().second;
  if (rows >= points_.back().first) return points_.back().second * rows / points_.back().first;
  const auto right = std::lower_bound(points_.begin(), points_.end(), rows,
                                      [](const auto& point, double value) { return point.first < value; });
  const auto left = right - 1;
  const double part = (rows - left->first) / (right->first - left->first);
  return left->second + part * (right->second - left->second);
}

Prediction predict(const PolicyModel& model, double rows, double outside_s) {
  Prediction p;
  const double link = model.link_bytes_per_s;
  p.fetch_s = link > 0 ? model.fetch_bytes / link : 0;
  p.was_s = std::max(p.fetch_s, outside_s + model.layers * model.compute.at(rows));
  const double fused = rows * model.fused_factor;
  const double served = model.served.empty() ? model.compute.at(fused) * model.owner_share : model.served.at(fused);
  const double travel = model.round_trip_s + (link > 0 ? rows * model.row_bytes / link : 0);
  p.cas_s = outside_s + (model.layers - model.remote_layers) * model.compute.at(rows) +
            model.remote_layers * (served + travel);
  return p;
}

// WaS beyond the crossing, CaS below it: while the fetch is the longer of the two, WaS costs the same whatever the rows.
std::int64_t crossover_rows(const PolicyModel& model, double outside_s, std::int64_t limit) {
  const auto was_wins = [&](std::int64_t rows) {
    const Prediction p = predict(model, static_cast<double>(rows), outside_s);
    return p.was_s <= p.cas_s;
  };
  std::int64_t low = 1;
  std::int64_t high = limit + 1;
  while (low < high) {
    const std::int64_t middle = low + (high - low) / 2;
    if (was_wins(middle)) {
      high = middle;
    } else {
      low = middle + 1;
    }
  }
  return low;
}

Mode ModePolicy::enter(int layer, double rows, double now) {
  if (layer <= current_.last_layer || current_.calls == 0) {
    if (current_.calls > 0) close_iteration();
    current_ = {};
    current_.begin = now;
    current_.rows = rows;
    decide(rows);
  }
  ++current_.calls;
  current_.last_layer = layer;
  entered_ = now;
  return mode_;
}

void ModePolicy::leave(double now) {
  current_.end = now;
  current_.inside += now - entered_;
}

void ModePolicy::close_iteration() {
  ++iterations_;
  ++since_switch_;
  // The first iteration in a mode pays for the switch: the ring is cold, the servers asleep.
  if (timed_ && current_.calls == model_.layers && since_switch_ >= 2)
    learn(mode_, current_.rows, current_.end - current_.begin, current_.inside);
}

void ModePolicy::learn(Mode mode, double rows, double took, double inside) {
  const double outside = std::max(0.0, took - inside);
  outside_s_ = outside_s_ == 0 ? outside : 0.75 * outside_s_ + 0.25 * outside;
  const Prediction p = predict(model_, rows, outside_s_);
  const double predicted = mode == Mode::was ? p.was_s : p.cas_s;
  if (predicted <= 0) return;
  double& correction = correction_[static_cast<int>(mode)];
  correction = 0.75 * correction + 0.25 * std::clamp(took / predicted, 0.1, 10.0);
}

Prediction ModePolicy::corrected(double rows) const {
  Prediction p = predict(model_, rows, outside_s_);
  p.was_s *= correction_[static_cast<int>(Mode::was)];
  p.cas_s *= correction_[static_cast<int>(Mode::cas)];
  return p;
}

Mode ModePolicy::best(double rows) const {
  if (pinned_) return *pinned_;
  const Prediction p = corrected(rows);
  return p.cas_s < p.was_s ? Mode::cas : Mode::was;
}

void ModePolicy::decide(double rows) {
  const Prediction expected = corrected(rows);
  note(choose(expected), rows, expected);
}

Verdict ModePolicy::choose(const Prediction& expected) {
  if (pinned_) {
    if (mode_ != *pinned_) switch_to(*pinned_);
    return Verdict::pinned;
  }
  if (since_switch_ < dwell_) return Verdict::dwells;
  const double here = mode_ == Mode::was ? expected.was_s : expected.cas_s;
  const double there = mode_ == Mode::was ? expected.cas_s : expected.was_s;
  confirmed_ = there < (1 - options_.margin) * here ? confirmed_ + 1 : 0;
  if (confirmed_ < options_.confirm) return confirmed_ == 0 ? Verdict::stays : Verdict::confirms;
  switch_to(mode_ == Mode::was ? Mode::cas : Mode::was);
  return Verdict::switched;
}

void ModePolicy::switch_to(Mode mode) {
  // Taken back as soon as that was possible: it was a wrong guess, so the next one waits longer.
  const bool taken_back = switches_ > 0 && since_switch_ <= dwell_ + 2 * options_.confirm;
  dwell_ = taken_back ? std::min(2 * dwell_, options_.longest_dwell) : options_.dwell;
  mode_ = mode;
  confirmed_ = 0;
  since_switch_ = 0;
  ++switches_;
}

void ModePolicy::note(Verdict verdict, double rows, const Prediction& expected) {
  const bool goes_on = !decisions_.empty() && decisions_.back().mode == mode_ && decisions_.back().verdict == verdict;
  if (!goes_on) {
    if (decisions_.size() == kDecisionsKept) decisions_.pop_front();
    decisions_.push_back({iterations_, iterations_, mode_, verdict, rows, expected});
    return;
  }
  Decision& run = decisions_.back();
  run.last = iterations_;
  run.rows = rows;
  run.expected = expected;
}

std::string Decision::text() const {
  const char* why[] = {"the other mode does not promise enough", "it dwells after a switch",
                       "the other mode promises more, to be confirmed", "switched", "pinned"};
  char text[240];
  std::snprintf(text, sizeof(text),
                "%s at %.0f rows, %s: an iteration is expected to take %.3g ms by WaS (fetch %.3g ms) and %.3g ms by CaS",
                mode_name(mode), rows, why[static_cast<int>(verdict)], expected.was_s * 1e3, expected.fetch_s * 1e3,
                expected.cas_s * 1e3);
  return text;
}

}  // namespace sidp
