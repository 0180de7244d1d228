#include "p2p/peer_watch.hpp"

#include <poll.h>
#include <pthread.h>
#include <signal.h>
#include <sys/eventfd.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <cerrno>
#include <chrono>
#include <cstring>

#include "atomics.hpp"
#include "error.hpp"

#ifndef SYS_pidfd_open
#define SYS_pidfd_open 434
#endif

namespace sidp {
namespace {

using Clock = std::chrono::steady_clock;

// A thread of ours takes no signals: handlers belong to the program's own threads.
class BlockSignals {
 public:
  BlockSignals() {
    sigset_t all;
    ::sigfillset(&all);
    ::pthread_sigmask(SIG_SETMASK, &all, &before_);
  }
  ~BlockSignals() { ::pthread_sigmask(SIG_SETMASK, &before_, nullptr); }

 private:
  sigset_t before_;
};

}  // namespace

const char* peer_state_name(PeerState state) {
  switch (state) {
    case PeerState::unknown: return "unknown";
    case PeerState::alive: return "alive";
    case PeerState::stalled: return "stalled";
    case PeerState::closed: return "closed";
    case PeerState::dead: return "dead";
  }
  return "unknown";
}

PeerWatch::PeerWatch(int rank, int world_size, const Options& options)
    : rank_(rank), options_(options), wake_(::eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK)) {
  SIDP_REQUIRE(world_size > 0 && rank >= 0 && rank < world_size, ConfigError, "rank ", rank, " is outside of world size ",
               world_size);
  SIDP_REQUIRE(options.beat_ms > 0 && options.stale_beats > 0, ConfigError, "beat_ms and stale_beats must be positive, got ",
               options.beat_ms, " and ", options.stale_beats);
  SIDP_REQUIRE(wake_.valid(), Error, "eventfd: ", std::strerror(errno));
  for (int peer = 0; peer < world_size; ++peer) peers_.push_back(std::make_unique<Peer>());
  const BlockSignals blocked;
  thread_ = std::make_unique<std::thread>([this] { run(); });
}

PeerWatch::~PeerWatch() { stop(); }

PeerWatch::Peer& PeerWatch::peer_at(int peer) const {
  SIDP_REQUIRE(peer >= 0 && peer < static_cast<int>(peers_.size()) && peer != rank_, ConfigError, "peer ", peer,
               " must be another rank below ", peers_.size());
  return *peers_[static_cast<std::size_t>(peer)];
}

void PeerWatch::watch(int rank, const ProcessIdentity& identity) {
  guard_.require("PeerWatch.watch");
  Peer& peer = peer_at(rank);
  const std::lock_guard<std::mutex> lock(mutex_);
  if (peer.known) return;
  peer.identity = identity;
  peer.known = true;
  peer.state.store(PeerState::alive);
  if (!options_.pidfd || !identity.same_pid_namespace(ProcessIdentity::current())) return;
  const long fd = ::syscall(SYS_pidfd_open, static_cast<pid_t>(identity.pid), 0);
  if (fd < 0) {
    if (errno == ESRCH) on_exit(rank, peer);
    return;  // refused (ENOSYS, EPERM, EMFILE): the heartbeat remains
  }
  peer.pidfd = Descriptor(static_cast<int>(fd));
  // The descriptor now pins the process; if that one began at another time, ours has ended before.
  if (process_start_time(identity.pid) != identity.start_time) on_exit(rank, peer);
  wake();
}

void PeerWatch::attach(int rank, std::shared_ptr<const ArenaHeader> header) {
  guard_.require("PeerWatch.attach");
  Peer& peer = peer_at(rank);
  const std::lock_guard<std::mutex> lock(mutex_);
  peer.header = std::move(header);
  peer.still_beats = 0;
}

void PeerWatch::attach_own(std::shared_ptr<ArenaHeader> header) {
  guard_.require("PeerWatch.attach_own");
  const std::lock_guard<std::mutex> lock(mutex_);
  own_ = std::move(header);
}

void PeerWatch::detach() {
  if (guard_.in_child()) return;
  const std::lock_guard<std::mutex> lock(mutex_);
  own_.reset();
  for (auto& peer : peers_) peer->header.reset();
}

PeerState PeerWatch::state(int peer) const { return peer_at(peer).state.load(std::memory_order_acquire); }

void PeerWatch::lose(int rank) {
  guard_.require("PeerWatch.lose");
  if (rank == rank_) {
    dead_.store(rank, std::memory_order_release);
    return;
  }
  Peer& peer = peer_at(rank);
  const std::lock_guard<std::mutex> lock(mutex_);
  if (!peer.dealt_with) declare_dead(rank, peer);
}

void PeerWatch::go_on_without(int peer) {
  guard_.require("PeerWatch.go_on_without");
  Peer& lost = peer_at(peer);
  const std::lock_guard<std::mutex> lock(mutex_);
  lost.dealt_with = true;
  if (dead_rank() == rank_) return;
  int next = -1;
  for (std::size_t i = 0; i < peers_.size(); ++i)
    if (next < 0 && peers_[i]->state.load() == PeerState::dead && !peers_[i]->dealt_with) next = static_cast<int>(i);
  dead_.store(next, std::memory_order_release);
}

void PeerWatch::check(const std::string& doing) const {
  guard_.require("PeerWatch.check");
  const int rank = dead_rank();
  if (rank < 0) return;
  if (rank == rank_) throw PeerError(rank, detail::concat("this rank (", rank, ") was given up by its group while ", doing));
  std::int64_t pid;
  {
    const std::lock_guard<std::mutex> lock(mutex_);
    pid = peer_at(rank).identity.pid;
  }
  throw PeerError(rank, detail::concat("rank ", rank, " (pid ", pid, ") died while ", doing,
                                       ": its share of the weights is gone; close the pool and start the group again"));
}

void PeerWatch::stop() {
  if (thread_ == nullptr) return;
  if (guard_.in_child()) {
    // The thread is not in this process; there is nothing to join, and joining would wait for ever.
    static_cast<void>(thread_.release());
    return;
  }
  stopping_.store(true, std::memory_order_release);
  wake();
  thread_->join();
  thread_.reset();
  detach();
}

void PeerWatch::wake() {
  const std::uint64_t one = 1;
  static_cast<void>(!::write(wake_.get(), &one, sizeof(one)));  // a full counter wakes as well
}

void PeerWatch::run() {
  ::pthread_setname_np(::pthread_self(), "sidp-watch");
  Clock::time_point next_beat = Clock::now();
  std::vector<pollfd> polled;
  std::vector<int> ranks;
  while (!stopping_.load(std::memory_order_acquire)) {
    polled.assign(1, {wake_.get(), POLLIN, 0});
    ranks.assign(1, rank_);
    {
      const std::lock_guard<std::mutex> lock(mutex_);
      for (std::size_t i = 0; i < peers_.size(); ++i) {
        if (!peers_[i]->pidfd.valid()) continue;
        polled.push_back({peers_[i]->pidfd.get(), POLLIN, 0});
        ranks.push_back(static_cast<int>(i));
      }
    }
    const auto until_beat = std::chrono::duration_cast<std::chrono::milliseconds>(next_beat - Clock::now()).count() + 1;
    ::poll(polled.data(), polled.size(), static_cast<int>(std::max<long long>(0, until_beat)));
    if (polled[0].revents != 0) {
      std::uint64_t count;
      static_cast<void>(!::read(wake_.get(), &count, sizeof(count)));
    }
    const std::lock_guard<std::mutex> lock(mutex_);
    for (std::size_t i = 1; i < polled.size(); ++i)
      if (polled[i].revents != 0) on_exit(ranks[i], *peers_[static_cast<std::size_t>(ranks[i])]);
    if (Clock::now() >= next_beat) {
      beat();
      next_beat = Clock::now() + std::chrono::milliseconds(options_.beat_ms);
    }
  }
}

// Under mutex_. Advances our own heartbeat and looks at everyone else's.
void PeerWatch::beat() {
  if (own_) store_relaxed(&own_->heartbeat, load_relaxed(&own_->heartbeat) + 1);
  for (std::size_t i = 0; i < peers_.size(); ++i)
    if (static_cast<int>(i) != rank_ && peers_[i]->header) look_at(static_cast<int>(i), *peers_[i]);
}

void PeerWatch::look_at(int rank, Peer& peer) {
  const PeerState state = peer.state.load();
  if (!peer.known || state == PeerState::closed || state == PeerState::dead) return;
  if (load_acquire(&peer.header->phase) == static_cast<std::uint32_t>(ArenaPhase::closed)) {
    peer.state.store(PeerState::closed, std::memory_order_release);
    return;
  }
  const std::uint64_t heartbeat = load_relaxed(&peer.header->heartbeat);
  peer.still_beats = heartbeat == peer.last_heartbeat ? peer.still_beats + 1 : 0;
  peer.last_heartbeat = heartbeat;
  const bool still = peer.still_beats >= options_.stale_beats;
  if (still && !peer.pidfd.valid()) return declare_dead(rank, peer);
  peer.state.store(still ? PeerState::stalled : PeerState::alive, std::memory_order_release);
}

// Under mutex_. The process has ended: in order if it has said so.
void PeerWatch::on_exit(int rank, Peer& peer) {
  peer.pidfd.reset();
  const bool said_so = peer.header && load_acquire(&peer.header->phase) == static_cast<std::uint32_t>(ArenaPhase::closed);
  if (said_so || peer.state.load() == PeerState::closed) {
    peer.state.store(PeerState::closed, std::memory_order_release);
  } else {
    declare_dead(rank, peer);
  }
}

void PeerWatch::declare_dead(int rank, Peer& peer) {
  peer.state.store(PeerState::dead, std::memory_order_release);
  int none = -1;
  dead_.compare_exchange_strong(none, rank, std::memory_order_acq_rel);
}

}  // namespace sidp
