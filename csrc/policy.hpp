// Which mode a rank takes, WaS or CaS: a model of both and a switch with hysteresis. Pure arithmetic: times come in as
// numbers, nothing is measured here, nothing is shared with other ranks.
#pragma once

#include <cstdint>
#include <deque>
#include <optional>
#include <string>
#include <utility>
#include <vector>

namespace sidp {

enum class Mode { was, cas };
const char* mode_name(Mode mode);

// Seconds that one layer's FFN takes, by rows: measured points, straight lines between them.
class TimeTable {
 public:
  TimeTable() = default;
  // (rows, seconds), ascending in rows; ConfigError where they are not, or a time is not positive.
  explicit TimeTable(std::vector<std::pair<double, double>> points);

  bool empty() const { return points_.empty(); }
  // Below the first point its time; beyond the last one in proportion to the rows.
  double at(double rows) const;

 private:
  std::vector<std::pair<double, double>> points_;
};

// What an iteration of a rank is made of.
struct PolicyModel {
  int layers = 1;               // FFN calls of an iteration
  int remote_layers = 0;        // of them, not held by this rank
  double fetch_bytes = 0;       // that WaS brings in for one iteration
  double link_bytes_per_s = 0;  // 0: not limited
  double round_trip_s = 0;      // of a CaS request besides the computing
  double row_bytes = 0;         // that CaS moves, both ways, for a row and a layer
  double owner_share = 1;       // of a layer that one owner computes: 1/D in `striped`
  double fused_factor = 1;      // rows of the batches that this rank's requests are fused into, by its own rows
  TimeTable compute;
  TimeTable served;             // of a request by rows, as its owner answers it; empty: `compute` times `owner_share`
};

struct Prediction {
  double fetch_s = 0;
  double was_s = 0;
  double cas_s = 0;
};

// Seconds of an iteration of `rows` rows with `outside_s` spent outside the FFNs, in both modes.
Prediction predict(const PolicyModel& model, double rows, double outside_s);

// The fewest rows from which on WaS is at least as fast as CaS: 1 where it always is, `limit` + 1 where it never is.
std::int64_t crossover_rows(const PolicyModel& model, double outside_s, std::int64_t limit);

struct PolicyOptions {
  double margin = 0.15;      // the other mode must promise this much less
  int confirm = 2;           // in so many iterations in a row
  int dwell = 4;             // iterations before the next switch
  int longest_dwell = 1024;  // a switch that was taken back doubles the dwell, up to this
};

// Why an iteration runs in its mode.
enum class Verdict {
  stays,      // the other mode does not promise enough
  dwells,     // a switch was too short a time ago
  confirms,   // the other mode promises enough, not yet often enough in a row
  switched,
  pinned,
};

// What was decided for a run of iterations that came to the same verdict in the same mode; figures are the last one's.
struct Decision {
  std::uint64_t first = 0;  // iterations, from 0
  std::uint64_t last = 0;
  Mode mode = Mode::was;
  Verdict verdict = Verdict::stays;
  double rows = 0;
  Prediction expected;      // corrected by what was measured

  std::string text() const;
};

// Feeds on the calls of one rank: enter() before each FFN call, leave() after it. An iteration ends where the layer numbers
// stop ascending. What is predicted is corrected by what iterations in that mode really took: by the times of these calls, or
// (`timed` false, where calls only enqueue work) by what learn() is told later.
class ModePolicy {
 public:
  ModePolicy(PolicyModel model, PolicyOptions options, bool timed = true)
      : model_(std::move(model)), options_(options), timed_(timed), dwell_(options.dwell) {}
  explicit ModePolicy(PolicyModel model) : ModePolicy(std::move(model), PolicyOptions{}) {}

  // `now` in seconds of any steady clock. The mode holds until the iteration ends.
  Mode enter(int layer, double rows, double now);
  void leave(double now);
  // An iteration through all layers in `mode` took `took` seconds, `inside` of them in FFN calls.
  void learn(Mode mode, double rows, double took, double inside);

  void set_link(double bytes_per_s) { model_.link_bytes_per_s = bytes_per_s; }
  void set_fused_factor(double factor) { model_.fused_factor = factor < 1 ? 1 : factor; }

  // From the next iteration on `mode`, whatever is expected; none: the policy decides again.
  void pin(std::optional<Mode> mode) { pinned_ = mode; }

  // What is expected to be faster, without hysteresis: for a graph that is captured once for so many rows.
  Mode best(double rows) const;
  Mode mode() const { return mode_; }
  std::uint64_t iterations() const { return iterations_; }
  std::uint64_t switches() const { return switches_; }
  const PolicyModel& model() const { return model_; }
  // Why the mode is what it is, with the figures of the last decision; empty before the first.
  std::string reason() const { return decisions_.empty() ? "" : decisions_.back().text(); }
  // The newest kDecisionsKept, oldest first.
  const std::deque<Decision>& decisions() const { return decisions_; }
  static constexpr std::size_t kDecisionsKept = 32;

 private:
  struct Iteration {
    int calls = 0;
    int last_layer = -1;
    double rows = 0;
    double begin = 0;
    double end = 0;
    double inside = 0;  // seconds in FFN calls
  };

  void close_iteration();
  Prediction corrected(double rows) const;
  void decide(double rows);
  Verdict choose(const Prediction& expected);
  void switch_to(Mode mode);
  void note(Verdict verdict, double rows, const Prediction& expected);

  PolicyModel model_;
  PolicyOptions options_;
  bool timed_;
  Mode mode_ = Mode::was;
  Iteration current_;
  double entered_ = 0;
  double outside_s_ = 0;
  double correction_[2] = {1, 1};  // measured over predicted, by mode
  std::optional<Mode> pinned_;
  std::deque<Decision> decisions_;
  int confirmed_ = 0;
  int since_switch_ = 0;
  int dwell_;
  std::uint64_t iterations_ = 0;
  std::uint64_t switches_ = 0;
};

}  // namespace sidp
