// What a simulation is given and what it returns. Seconds, bytes, rows and tokens; the arithmetic that makes rates out of a
// GPU's figures is in Python (sidp.simulate.machine).
#pragma once

#include <cstdint>
#include <vector>

#include "../placement.hpp"
#include "../policy.hpp"

namespace sidp::sim {

// `cached` of the prompt's tokens are in the KV cache when the request arrives. `rank` -1: whichever rank has room first.
struct Request {
  double arrival = 0;
  int prompt = 0;
  int answer = 1;
  int cached = 0;
  int rank = -1;
};

// How long a rank computes, by the rows of an iteration.
struct Compute {
  TimeTable ffn;              // one layer's FFN, whole
  TimeTable serve;            // the same by a CaS server, for a fused batch
  TimeTable rest;             // one layer's other weights, and what tensor parallelism adds
  TimeTable once;             // of an iteration, by the sequences that it samples: head and host
  double cached_token_s = 0;  // attention over one cached token, all layers
  double pair_s = 0;          // attention of one prompt token to one earlier token, all layers
};

struct Fabric {
  double egress_bytes_per_s = 0;   // of one owner, to all readers together
  double ingress_bytes_per_s = 0;  // of one reader
  double local_bytes_per_s = 0;    // copying a rank's own extent into its slot; 0: takes no time
  double copy_bytes = 0;           // what issuing a copy costs, as bytes at the full rate
  double incast = 0;               // of n readers of one owner the egress keeps 1 / (1 + incast (n - 1))
  bool turns = false;              // an owner feeds its readers one after another instead of all at once
  double slice_bytes = 0;          // copies go in slices, which an owner gives out in the order of asking; 0: as a fluid
  std::vector<double> slice_pauses;  // seconds after each slice of a copy, drawn once a copy; with slice_bytes only
  double round_trip_s = 0;         // of a CaS request besides bytes and computing
  double send_row_bytes = 0;       // activations of one row, to one owner
  double reply_row_bytes = 0;
};

enum class Reach {
  local,   // every rank holds all weights
  was,
  cas,
  automatic,  // ModePolicy picks, per rank and iteration
  gather,  // FSDP: each layer's weights all-gathered by all ranks together, one layer ahead of use
};

// What all ranks begin together. With any step, ranks without work run iterations of one row.
enum class Step { free, iteration, layer };

struct Options {
  Reach reach = Reach::local;
  int stages = 1;            // of a pipeline, with as many batches in flight; Reach::local only
  bool peak_shifting = true;
  bool fuse = true;
  Step step = Step::free;
  int look_every = 16;       // iterations between two looks of the policy at link and fusion
  int batched_tokens = 8192; // rows of an iteration
  int most_requests = 1024;  // running in one batch
  double jitter = 0;         // each copy and each piece of computing takes 1 +- jitter of its time, drawn evenly
  std::vector<double> compute_factors;  // measured: pieces of computing take one of these times their time instead
  double wake_s = 0;         // from a fetch's end until who waits for it goes on
  std::uint64_t seed = 0;    // of the jitter
  bool trace = false;
};

struct Job {
  Compute compute;
  Fabric fabric;
  Options options;
  std::vector<int> slots;                 // by rank
  std::vector<std::uint64_t> kv_tokens;   // by rank
  std::vector<double> starts;             // by rank: when it begins to fetch and to work; empty: all at 0
  std::vector<PolicyModel> policies;      // by rank, Reach::automatic only
  std::vector<Request> requests;
};

struct Iteration {
  int rank = 0;
  int mode = 0;  // 0 local, 1 was, 2 cas, 3 gather
  int rows = 0;
  int requests = 0;
  double begin = 0;
  double end = 0;
  double stall = 0;  // waiting for fetches
};

struct RankResult {
  std::uint64_t iterations = 0, idle_iterations = 0, cas_iterations = 0;
  std::uint64_t tokens = 0;         // answered
  std::uint64_t requests = 0;
  std::uint64_t most_kv_tokens = 0; // reserved at once
  double last_end = 0;              // of its last iteration with work
  double busy_s = 0;                // in iterations with work
  double stall_s = 0;
  std::uint64_t fetches = 0;
  double fetch_s = 0;
  std::uint64_t requested_rows = 0, fused_rows = 0;  // CaS: rows sent, and of the batches that they came into
  std::uint64_t requests_served = 0, batches_served = 0;
  std::uint64_t switches = 0;
};

struct Result {
  double end_s = 0;
  std::uint64_t events = 0;
  std::vector<RankResult> ranks;
  std::vector<double> finished_s;                  // by request
  std::vector<std::vector<std::uint64_t>> read;    // [reader][owner], bytes
  std::vector<double> feeding_s;                   // by owner: with a reader
  std::vector<double> crowded_s;                   // by owner: with more than one
  std::vector<Iteration> iterations;               // where asked for, in the order of their ends
};

// Runs `job` to its last token. `placement` gives the group's size and layers, for every kind of Reach.
// ConfigError where the parts do not fit each other, or a request can never be admitted.
Result simulate(const Placement& placement, const Job& job);

}  // namespace sidp::sim
