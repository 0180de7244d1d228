// The owner's side of CaS on the CPU: one native thread that serves this rank's mailboxes, steps O1..O7 of mailbox.hpp.
// It needs nothing of its rank's own loop, and goes on until stop().
#pragma once

#include <array>
#include <atomic>
#include <cstdint>
#include <memory>
#include <mutex>
#include <string>
#include <thread>
#include <vector>

#include "cpu_ffn.hpp"
#include "mailbox.hpp"
#include "p2p/peer_watch.hpp"
#include "region.hpp"

namespace sidp::cas::cpu {

struct ServerOptions {
  int rank = 0;
  Geometry geometry{};
  std::uint64_t pool_id = 0;
  bool striped = false;              // answer with float32 partial sums
  std::vector<std::byte*> regions;   // every rank's region, this rank's own included
  std::vector<FfnSlice> layers;      // hidden 0: this owner does not serve the layer
  std::shared_ptr<PeerWatch> watch;  // null: nobody is watched
  int blas_threads = 1;
  bool fuse = true;                  // false: one request a batch, for comparison
  double spin_s = 20e-6;             // how long an idle server looks around before it sleeps
};

struct ServerStats {
  std::uint64_t requests = 0;
  std::uint64_t rows = 0;
  std::uint64_t batches = 0;
  std::uint64_t fused_batches = 0;   // of more than one request
  std::uint64_t refused = 0;         // malformed records, answered with why
  std::uint64_t broken = 0;          // mailboxes whose tail made no sense; not read again
  std::uint64_t retired = 0;         // requesters that died
  std::uint64_t failures = 0;        // batches that could not be computed
  std::uint64_t sleeps = 0;
  double busy_seconds = 0;
  std::string last_failure;
};

class CpuServer {
 public:
  CpuServer(ServerOptions options, std::shared_ptr<const Blas> blas);
  ~CpuServer();
  CpuServer(const CpuServer&) = delete;
  CpuServer& operator=(const CpuServer&) = delete;

  // Ends the thread after the batch it is computing. Idempotent.
  void stop();

  ServerStats stats() const;

 private:
  struct Mailbox {
    std::uint64_t served = 0;
    std::uint64_t tail = 0;
    bool out = false;  // broken or retired: not read any more
  };
  struct Item {
    std::uint32_t requester;
    std::uint32_t slot;
    std::uint64_t sequence;
    std::uint32_t rows;
  };

  void loop();
  bool look();
  void look_at(std::uint32_t requester);
  void wait_for_work();
  bool elect();
  void gather(std::uint32_t requester);
  RequestRecord copy_record(std::uint32_t requester, std::uint32_t slot) const;
  Status check(const RequestRecord& record, std::uint64_t sequence) const;
  void refuse(std::uint32_t requester, std::uint64_t sequence, Status status);
  void serve();
  Status compute(const FfnSlice& slice);
  void answer(const Item& item, Status status, std::uint64_t service_ns);

  ServerOptions options_;
  std::vector<Region> regions_;
  CpuFfn ffn_;
  std::shared_ptr<const Blas> blas_;
  std::vector<Mailbox> mailboxes_;
  std::uint32_t first_ = 0;  // whose turn it is to choose the unit

  // The batch being served.
  std::uint32_t layer_ = 0;
  std::uint32_t rows_ = 0;
  std::vector<Item> batch_;
  std::vector<float> x_;
  std::vector<float> y_;

  std::atomic<bool> stopping_{false};
  struct Counters {
    std::atomic<std::uint64_t> requests{0}, rows{0}, batches{0}, fused{0}, refused{0}, broken{0}, retired{0}, failures{0},
        sleeps{0}, busy_ns{0};
  } counters_;
  mutable std::mutex failure_mutex_;
  std::string last_failure_;
  std::thread thread_;
};

}  // namespace sidp::cas::cpu
