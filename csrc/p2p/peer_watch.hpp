// Sees a peer's death within milliseconds, without Python: a thread that sleeps on a pidfd for each peer. Where pids
// mean nothing (another pid namespace, no pidfd_open) it looks at the peer's heartbeat word instead.
//
// A peer has died when its process has ended without phase `closed` in its arena's header, or when (heartbeat only) its
// word has stood still for `stale_beats` of our own beats: counted in beats and not in seconds, so that a machine that
// was suspended kills nobody. A stopped process (SIGSTOP) with a pidfd is `stalled`, not dead; the timeout of whoever
// waits for it reports it.
#pragma once

#include <atomic>
#include <memory>
#include <mutex>
#include <string>
#include <thread>
#include <vector>

#include "p2p/arena_words.hpp"
#include "p2p/process.hpp"
#include "p2p/shm_segment.hpp"

namespace sidp {

enum class PeerState { unknown, alive, stalled, closed, dead };
const char* peer_state_name(PeerState state);

class PeerWatch {
 public:
  struct Options {
    int beat_ms = 100;
    int stale_beats = 30;
    bool pidfd = true;  // false: heartbeats only
  };

  PeerWatch(int rank, int world_size, const Options& options);
  PeerWatch(int rank, int world_size) : PeerWatch(rank, world_size, Options{}) {}
  ~PeerWatch();
  PeerWatch(const PeerWatch&) = delete;
  PeerWatch& operator=(const PeerWatch&) = delete;

  // Starts watching a peer's process. A process that is gone, or whose pid has been taken by another, is dead at once.
  void watch(int peer, const ProcessIdentity& identity);
  // Hands over a peer's header (phase and heartbeat), or this rank's own, whose heartbeat the thread then advances.
  // The watch keeps the memory mapped until detach() or stop().
  void attach(int peer, std::shared_ptr<const ArenaHeader> header);
  void attach_own(std::shared_ptr<ArenaHeader> header);
  void detach();

  // The first rank known to have died, -1 while none is. One load: made for wait loops.
  int dead_rank() const noexcept { return dead_.load(std::memory_order_acquire); }
  const std::atomic<int>& dead_word() const noexcept { return dead_; }
  PeerState state(int peer) const;
  // The group has given `rank` up, whatever its process does: dead from here on. This very rank may be meant.
  void lose(int rank);
  // The loss of this peer is dealt with: dead_rank() tells of the next one only.
  void go_on_without(int peer);
  // PeerError naming the dead rank, "rank 2 (pid 17) died while <doing>", if there is one.
  void check(const std::string& doing) const;

  // Ends the thread; what is known stays known. Idempotent, and harmless in a forked child.
  void stop();

 private:
  struct Peer {
    ProcessIdentity identity;
    bool known = false;
    Descriptor pidfd;
    std::shared_ptr<const ArenaHeader> header;
    std::uint64_t last_heartbeat = 0;
    int still_beats = 0;
    bool dealt_with = false;
    std::atomic<PeerState> state{PeerState::unknown};
  };

  Peer& peer_at(int peer) const;
  void wake();
  void run();
  void beat();
  void look_at(int rank, Peer& peer);
  void on_exit(int rank, Peer& peer);
  void declare_dead(int rank, Peer& peer);

  const int rank_;
  const Options options_;
  const ForkGuard guard_;
  std::atomic<int> dead_{-1};
  std::atomic<bool> stopping_{false};
  mutable std::mutex mutex_;  // guards peers_' members (except state) and own_
  std::vector<std::unique_ptr<Peer>> peers_;
  std::shared_ptr<ArenaHeader> own_;
  Descriptor wake_;
  std::unique_ptr<std::thread> thread_;
};

}  // namespace sidp
