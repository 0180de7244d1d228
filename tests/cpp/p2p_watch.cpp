// Liveness under load: peers that come, close, stop beating and die while other threads look.
#include <signal.h>
#include <sys/wait.h>
#include <unistd.h>

#include <atomic>
#include <memory>
#include <thread>
#include <vector>

#include "atomics.hpp"
#include "error.hpp"
#include "p2p/peer_watch.hpp"
#include "p2p_check.hpp"

using namespace sidp;

namespace {

const PeerWatch::Options kFast{2, 25, true};
const PeerWatch::Options kHeartbeat{2, 25, false};

// A process that does nothing until it is killed; reaped by the destructor.
class Sleeper {
 public:
  Sleeper() : pid_(::fork()) {
    if (pid_ == 0)
      for (;;) ::pause();
    identity_ = ProcessIdentity::current();
    identity_.pid = pid_;
    identity_.start_time = process_start_time(pid_);
  }
  ~Sleeper() {
    ::kill(pid_, SIGKILL);
    ::waitpid(pid_, nullptr, 0);
  }
  void kill() { ::kill(pid_, SIGKILL); }
  const ProcessIdentity& identity() const { return identity_; }

 private:
  pid_t pid_;
  ProcessIdentity identity_;
};

std::shared_ptr<ArenaHeader> header(ArenaPhase phase) {
  auto made = std::make_shared<ArenaHeader>();
  store_release(&made->phase, static_cast<std::uint32_t>(phase));
  return made;
}

void a_kill_is_seen_by_all_threads() {
  std::vector<std::unique_ptr<Sleeper>> peers;
  for (int i = 0; i < 4; ++i) peers.push_back(std::make_unique<Sleeper>());
  PeerWatch watch(0, 5, kFast);
  std::atomic<int> agreed{0};
  std::vector<std::thread> waiters;
  for (int i = 0; i < 3; ++i)
    waiters.emplace_back([&] {
      const std::atomic<int>& word = watch.dead_word();
      if (until([&] { return word.load(std::memory_order_acquire) >= 0; }) && watch.dead_rank() == 3 &&
          watch.state(3) == PeerState::dead)
        agreed.fetch_add(1);
    });
  for (int rank = 1; rank < 5; ++rank) {
    watch.watch(rank, peers[static_cast<std::size_t>(rank - 1)]->identity());
    watch.attach(rank, header(ArenaPhase::committed));
  }
  watch.attach_own(header(ArenaPhase::committed));
  peers[2]->kill();
  for (std::thread& waiter : waiters) waiter.join();
  CHECK(agreed == 3);
  CHECK_THROWS(watch.check("serving"), PeerError, "rank 3 (pid ");
  CHECK(watch.state(1) != PeerState::dead && watch.state(2) != PeerState::dead);
}

void closed_before_the_end_is_no_death() {
  Sleeper closed, finished;
  PeerWatch watch(2, 3, kFast);
  watch.watch(0, closed.identity());
  watch.watch(1, finished.identity());
  const auto first = header(ArenaPhase::finished), second = header(ArenaPhase::finished);
  watch.attach(0, first);
  watch.attach(1, second);
  store_release(&first->phase, static_cast<std::uint32_t>(ArenaPhase::closed));
  closed.kill();
  CHECK(until([&] { return watch.state(0) == PeerState::closed; }));
  CHECK(watch.dead_rank() == -1);
  finished.kill();
  CHECK(until([&] { return watch.dead_rank() == 1; }));
}

// Two watches over one header, as two ranks have: one beats, the other looks.
void a_heartbeat_that_stops_is_a_death_only_without_a_pidfd() {
  Sleeper process;
  const auto shared = header(ArenaPhase::committed);
  PeerWatch owner(1, 2, kHeartbeat);
  PeerWatch by_beat(0, 2, kHeartbeat), by_pidfd(0, 2, kFast);
  owner.attach_own(shared);
  for (PeerWatch* watch : {&by_beat, &by_pidfd}) {
    watch->watch(1, process.identity());
    watch->attach(1, shared);
  }
  const std::uint64_t before = load_relaxed(&shared->heartbeat);
  CHECK(until([&] { return load_relaxed(&shared->heartbeat) > before + 20; }));
  owner.stop();
  CHECK(until([&] { return by_beat.dead_rank() == 1; }));
  CHECK(until([&] { return by_pidfd.state(1) == PeerState::stalled; }));
  CHECK(by_pidfd.dead_rank() == -1);
  owner.stop();
}

// Headers come and go, states are read and the watch ends while its thread looks at them.
void nothing_races_with_the_thread() {
  Sleeper process;
  for (int round = 0; round < 50; ++round) {
    auto watch = std::make_unique<PeerWatch>(0, 2, PeerWatch::Options{1, 1000, true});
    std::atomic<bool> stop{false};
    std::thread reader([&] {
      while (!stop) {
        CHECK(watch->dead_rank() == -1);
        CHECK(watch->state(1) != PeerState::dead);
        watch->check("racing");
      }
    });
    std::thread attacher([&] {
      for (int i = 0; i < 20; ++i) {
        watch->attach(1, header(ArenaPhase::committed));
        watch->attach_own(header(ArenaPhase::committed));
        if (i % 7 == 6) watch->detach();
      }
    });
    watch->watch(1, process.identity());
    attacher.join();
    stop = true;
    reader.join();
    if (round % 2) watch->stop();
    watch.reset();
  }
}

void a_forked_child_can_drop_it() {
  Sleeper process;
  auto watch = std::make_unique<PeerWatch>(0, 2, kFast);
  watch->watch(1, process.identity());
  const pid_t child = ::fork();
  if (child == 0) {
    int code = 1;
    try {
      watch->check("working");
    } catch (const PoolClosedError&) {
      code = 0;
    }
    watch.reset();  // must not wait for a thread that is not here
    ::_exit(code);
  }
  int status = -1;
  CHECK(::waitpid(child, &status, 0) == child && WIFEXITED(status) && WEXITSTATUS(status) == 0);
  process.kill();
  CHECK(until([&] { return watch->dead_rank() == 1; }));
}

}  // namespace

int main() {
  a_kill_is_seen_by_all_threads();
  closed_before_the_end_is_no_death();
  a_heartbeat_that_stops_is_a_death_only_without_a_pidfd();
  nothing_races_with_the_thread();
  a_forked_child_can_drop_it();
  std::puts("p2p_watch: ok");
  return 0;
}
