// The ranks of one group in simulated time.
#pragma once

#include <deque>
#include <memory>
#include <vector>

#include "batch.hpp"
#include "device.hpp"
#include "jitter.hpp"
#include "links.hpp"
#include "model.hpp"
#include "ring_model.hpp"
#include "server_model.hpp"

namespace sidp::sim {

class Group {
 public:
  Group(const Placement& placement, const Job& job);
  Result run();

 private:
  enum class Phase { parked, at_barrier, at_layer, rest, stalled, ffn, served, once, whole };

  // One batch in flight; a pipeline has one for each of its stages, every other rank one.
  struct Lane {
    Lane(Batch b, int r) : batch(std::move(b)), rank(r) {}

    Batch batch;
    int rank;
    Phase phase = Phase::parked;
    Work work;
    bool idle = false;       // an iteration without requests, for the others' sake
    int layer = 0;
    int stage = 0;
    int awaited = 0;         // replies, and this rank's own slice
    bool cas = false;
    double rest_s = 0, ffn_s = 0, once_s = 0;
    double begin = 0, stalled_at = 0, stall_s = 0;
  };
  struct Member {
    std::unique_ptr<RingModel> ring;
    std::unique_ptr<ModePolicy> policy;
    bool cas = false;
    std::uint64_t looks = 0, seen_rows = 0, seen_fused = 0;
    std::vector<double> stage_free_at;
  };

  void check() const;
  void handle(const Event& event);
  void start(int rank, double now);

  // An iteration, from admission to its end.
  void next_iteration(int lane, double now);
  bool has_work(Lane& lane, double now);
  int fair_share(int queue) const;
  void park(int lane, double now);
  void open_barrier(double now);
  void set_out(int lane, double now);
  void end_iteration(int lane, double now);

  // Layer by layer: WaS and CaS.
  void compute(int rank, double seconds, double now);
  void reach_layer(int rank, double now);
  void begin_layer(int rank, double now);
  void own_done(int rank, double now);
  void enter_ffn(int rank, double now);
  void ffn_over(int rank, double now);
  bool pick_cas(int rank, double now);
  void look(int rank);
  void send(int rank, double now);
  void serve_done(int owner, double now);
  void one_part_less(int rank, double now);

  // Whole iterations at once: replicas, pipelines, gathers.
  void next_stage(int lane, double now);
  void gather_together(double now);

  bool walks() const { return job_.options.reach != Reach::local && job_.options.reach != Reach::gather; }
  bool together() const { return job_.options.step != Step::free || job_.options.reach == Reach::gather; }

  const Placement& placement_;
  const Job& job_;
  const int world_, layers_;
  EventQueue events_;
  Jitter jitter_;
  Links links_;
  std::vector<Lane> lanes_;
  std::vector<Member> members_;
  std::vector<Device> devices_;
  std::vector<ServerModel> servers_;
  std::vector<CasRequest> travelling_;
  std::vector<std::deque<int>> waiting_;  // by rank, then what any rank may take
  Result result_;
};

}  // namespace sidp::sim
