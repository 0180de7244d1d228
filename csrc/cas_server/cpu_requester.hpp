// The requester's side of CaS on the CPU: steps R1..R7 of mailbox.hpp.
//
// A channel is a set of owners that always get the same requests under the same numbers: in `layer` placement one
// owner each, in `striped` all owners together. Requests of a channel are answered, and consumed, in order.
#pragma once

#include <chrono>
#include <cstdint>
#include <deque>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include "cpu_ffn.hpp"
#include "deadline.hpp"
#include "mailbox.hpp"
#include "p2p/peer_watch.hpp"
#include "region.hpp"

namespace sidp::cas::cpu {

// What a requester must know of a layer. hidden 0: not reached by CaS.
struct RemoteLayer {
  std::uint32_t hidden = 0;
  Dtype dtype = Dtype::kFloat32;
  int owner = -1;  // `striped`: ignored
};

struct RequesterOptions {
  int rank = 0;
  Geometry geometry{};
  std::uint64_t pool_id = 0;
  bool striped = false;
  std::vector<std::byte*> regions;
  std::vector<RemoteLayer> layers;
  std::shared_ptr<PeerWatch> watch;
  std::vector<const std::uint32_t*> phases;  // ArenaHeader::phase of every rank; empty or null: not looked at
  std::uint64_t* activity = nullptr;  // counts requests, for peers that wait for this rank to finish
  double link_bytes_per_s = 0;        // cap that stands for a link's limit; 0: none
};

struct RequesterStats {
  std::uint64_t requests = 0;
  std::uint64_t rows = 0;
  std::uint64_t refused = 0;
  std::uint64_t fused_rows = 0;      // rows of the batches that this rank's requests were part of (of the first owner asked)
  double service_seconds = 0;        // of those batches, as the owners measured them
  double wait_seconds = 0;           // spent waiting for answers
};

class CpuRequester {
 public:
  // Names one submit() on its channel.
  struct Ticket {
    int channel = 0;
    std::uint64_t sequence = 0;
  };

  explicit CpuRequester(RequesterOptions options);
  CpuRequester(const CpuRequester&) = delete;
  CpuRequester& operator=(const CpuRequester&) = delete;

  // Sends x [rows, hidden], compact, to whoever holds `layer`. x may be changed afterwards; y [rows, hidden] must live
  // until finish(), which earlier tickets' answers may be written into before it is called. Zero rows send nothing.
  // PeerError naming the owner that died or did not answer in time; the channel is unusable from then on.
  Ticket submit(int layer, const std::byte* x, std::byte* y, std::uint64_t rows, double timeout_s);
  // Waits until the results of `ticket` are in its y. LayoutError where the owner refused.
  void finish(const Ticket& ticket, double timeout_s);

  RequesterStats stats() const;

 private:
  struct Piece {
    std::uint64_t sequence;
    std::uint64_t submit;  // which submit() it is part of
    std::uint32_t layer;
    std::uint32_t rows;
    std::byte* target;     // null: the results are not wanted any more
    bool woke;             // an owner slept: its answer is further away than it pays to look for
  };
  struct Channel {
    std::vector<int> owners;
    std::mutex mutex;
    std::uint64_t pushed = 0;
    std::uint64_t consumed = 0;
    std::uint64_t submits = 0;
    std::deque<Piece> pieces;
    std::string fault;      // why the channel is unusable
    int fault_rank = -1;
  };

  const RemoteLayer& layer_at(int layer) const;
  void push(Channel& channel, int layer, const std::byte* x, std::byte* y, std::uint32_t rows);
  void write_request(int owner, std::uint64_t sequence, int layer, const std::byte* x, std::uint32_t rows);
  void drain(Channel& channel, const Deadline& deadline, double timeout_s);
  void wait_for_reply(Channel& channel, int owner, const Piece& piece, const Deadline& deadline, double timeout_s);
  void check_owner(Channel& channel, int owner);
  [[noreturn]] void fail(Channel& channel, int owner, const std::string& why);
  void read_rows(const Channel& channel, const Piece& piece);
  void note(const ReplyRecord& reply, bool first);
  void take_turn(std::uint64_t bytes);

  RequesterOptions options_;
  std::vector<Region> regions_;
  std::vector<std::unique_ptr<Channel>> channels_;
  std::mutex link_mutex_;
  std::chrono::steady_clock::time_point link_free_at_{};
  mutable std::mutex stats_mutex_;
  RequesterStats stats_;
};

}  // namespace sidp::cas::cpu
