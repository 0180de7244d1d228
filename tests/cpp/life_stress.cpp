// The life of the CUDA servers (life.hpp) with threads in the place of the device: ranks that ask each other and themselves, launches
// that come late and twice, and launching threads that are locked out until every rank has its answer: then a rank without a
// server is a deadlock. Now and then a barrier stands between what was launched and what comes later, the engine's request among it, as
// when CUDA loads a kernel: then the server must give way. Every request must be answered, in order and once, and never may two launches of one rank serve;
// ThreadSanitizer sees to the latter too, since what they share is plain memory.
//
//   life_stress [requests of each rank]
#include <array>
#include <atomic>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <mutex>
#include <random>
#include <thread>
#include <vector>

#include "cas_server/life.hpp"

using namespace sidp::cas;
using Clock = std::chrono::steady_clock;

namespace {

constexpr int kRanks = 3, kStreams = 3;
constexpr std::chrono::seconds kTimeout(20);
constexpr std::uint64_t kNoBarrier = ~std::uint64_t(0);
constexpr int kPatience = 20;  // looks at announced requests that do not come

std::mt19937& noise() {
  thread_local std::mt19937 random(std::random_device{}());
  return random;
}

void now_and_then_sleep() {
  if (noise()() % 8 == 0) std::this_thread::sleep_for(std::chrono::microseconds(noise()() % 100));
}

[[noreturn]] void fail(const char* what, int rank) {
  std::printf("life_stress: %s, rank %d\n", what, rank);
  std::fflush(stdout);
  std::_Exit(1);
}

struct Rank {
  // Mailboxes and bells, by requester; replies, by owner.
  std::array<std::atomic<std::uint64_t>, kRanks> tail{}, bell{}, reply{};
  // ServerState: shared by launches one after the other, so nothing here is atomic but `life`.
  std::atomic<std::uint32_t> life{0};
  std::atomic<int> servers{0};  // for the check alone
  std::array<std::uint64_t, kRanks> served{};
  std::uint64_t launches_that_served = 0;
  // Host words.
  std::atomic<bool> running{false}, stop{false};
  std::array<std::atomic<std::uint64_t>, kRanks> served_by_the_host{};
  std::atomic<std::uint64_t> announced{0}, pushed{0}, consumed{0}, relief_wanted{0}, relief_given{0};
  std::array<std::atomic<std::uint64_t>, kStreams> begun{}, queued{}, finished{};
  std::atomic<std::uint64_t> barrier{kNoBarrier};  // later launches than this one do not begin
  // Under `launching`.
  std::mutex launching, driver;
  std::array<std::uint64_t, kStreams> newest{};
  int stream = 0;
  std::uint64_t launches = 0;
};

std::array<Rank, kRanks> ranks;
std::atomic<std::uint64_t> answered{0};

struct Access {
  Rank& rank;
  int stream;
  std::uint64_t launch;

  void begun() const { rank.begun[stream] = launch; }
  void fence() const {}  // all words here are sequentially consistent
  Life life() const { return static_cast<Life>(rank.life.load()); }
  bool swap_life(Life from, Life to) const {
    now_and_then_sleep();
    auto expected = static_cast<std::uint32_t>(from);
    return rank.life.compare_exchange_strong(expected, static_cast<std::uint32_t>(to));
  }
  void set_life(Life life) const {
    now_and_then_sleep();
    rank.life = static_cast<std::uint32_t>(life);
  }
  void running(bool running) const {
    if (!running)
      for (int r = 0; r < kRanks; ++r) rank.served_by_the_host[r] = rank.served[r];
    now_and_then_sleep();
    rank.running = running;
  }
  void pause() const { std::this_thread::yield(); }
};

// The serving kernel. Answers one request of each requester at most; whether there was any.
bool serve_once(int own) {
  Rank& rank = ranks[own];
  bool any = false;
  for (int r = 0; r < kRanks; ++r) {
    if (rank.tail[r] == rank.served[r]) continue;
    ranks[r].reply[own] = ++rank.served[r];
    any = true;
  }
  return any;
}

void run_launch(int own, int stream, std::uint64_t launch) {
  Rank& rank = ranks[own];
  Access access{rank, stream, launch};
  if (!takes_over(access)) return;
  if (++rank.servers != 1) fail("two launches serve", own);
  ++rank.launches_that_served;
  int looks = 0;
  auto waits = [&] {
    const bool coming = rank.announced != rank.pushed;  // first: what arrives meanwhile is seen as pushed
    const std::uint64_t consumed = rank.consumed;
    if (rank.pushed != consumed) return true;
    if (!coming) {
      looks = 0;
      return false;
    }
    if (++looks > kPatience) rank.relief_wanted = launch;
    return rank.relief_given != launch;
  };
  while (true) {
    now_and_then_sleep();
    if (serve_once(own)) continue;
    if (!rank.stop && waits()) {
      std::this_thread::yield();
      continue;
    }
    bool more = false;
    if (leaves(access, [&] { return !rank.stop && ((more = serve_once(own)) || waits()); })) break;
  }
  --rank.servers;
  access.set_life(Life::kFree);
}

void stream_thread(int own, int stream) {
  Rank& rank = ranks[own];
  for (std::uint64_t done = 0; !(rank.stop && rank.queued[stream] == done); std::this_thread::yield()) {
    const std::uint64_t launch = rank.queued[stream];
    if (launch == done || launch > rank.barrier) continue;
    now_and_then_sleep();
    run_launch(own, stream, launch);
    rank.finished[stream] = done = launch;
  }
}

// --- the host ---

bool pending(const Rank& rank) { return rank.begun[rank.stream] < rank.newest[rank.stream]; }

void launch(Rank& rank) {
  const std::lock_guard<std::mutex> lock(rank.driver);
  rank.newest[rank.stream] = ++rank.launches;
  rank.queued[rank.stream] = rank.launches;
}

void ensure_serving(Rank& rank) {
  if (rank.running) return;
  const std::lock_guard<std::mutex> lock(rank.launching);
  if (!rank.running && !pending(rank)) launch(rank);
}

void relieve(Rank& rank) {
  const std::uint64_t wanted = rank.relief_wanted;
  if (wanted == rank.relief_given) return;
  const std::lock_guard<std::mutex> lock(rank.launching);
  for (int s = 0; s < kStreams; ++s) {
    if (rank.begun[s] != wanted || rank.newest[s] != wanted) continue;
    rank.stream = s;
    launch(rank);
  }
  rank.relief_given = wanted;
}

// What is enqueued behind it begins when all launches so far have ended.
std::array<std::uint64_t, kStreams> raise_barrier(Rank& rank) {
  const std::lock_guard<std::mutex> lock(rank.launching);
  rank.barrier = rank.launches;
  return rank.newest;
}

bool all_reached(const std::array<std::atomic<std::uint64_t>, kStreams>& finished, const std::array<std::uint64_t, kStreams>& goal) {
  for (int s = 0; s < kStreams; ++s)
    if (finished[s] < goal[s]) return false;
  return true;
}

void launching_thread(int own) {
  Rank& rank = ranks[own];
  auto wanted = [&] {
    for (int r = 0; r < kRanks; ++r)
      if (rank.bell[r] > rank.served_by_the_host[r]) return true;
    return false;
  };
  while (!rank.stop) {
    now_and_then_sleep();
    std::this_thread::yield();
    relieve(rank);
    if (rank.running) continue;
    const std::lock_guard<std::mutex> lock(rank.launching);
    if (!pending(rank)) {
      if (wanted() && !rank.running) launch(rank);
    } else if (noise()() % 4 == 0) {  // as if it had taken too long
      const int next = (rank.stream + 1) % kStreams;
      if (rank.begun[next] < rank.newest[next]) continue;
      rank.stream = next;
      launch(rank);
    }
  }
}

void engine_thread(int own, std::uint64_t requests) {
  Rank& rank = ranks[own];
  std::array<std::uint64_t, kRanks> sent{};
  for (std::uint64_t i = 0; i < requests; ++i) {
    now_and_then_sleep();
    const int owner = static_cast<int>(noise()() % kRanks);
    const bool fenced = noise()() % 8 == 0;
    std::array<std::uint64_t, kStreams> before{};
    if (fenced) before = raise_barrier(rank);
    ++rank.announced;
    ensure_serving(rank);
    for (const auto raised = Clock::now(); fenced && !all_reached(rank.finished, before); std::this_thread::yield())
      if (Clock::now() - raised > kTimeout) fail("the server never gave way", own);
    rank.barrier = kNoBarrier;
    const std::lock_guard<std::mutex> inside(rank.driver);  // until all have their answers
    now_and_then_sleep();
    ++rank.pushed;
    ranks[owner].tail[own] = ++sent[owner];
    ranks[owner].bell[own] = sent[owner];
    const auto start = Clock::now();
    auto wait_for = [&](auto arrived) {
      for (; !arrived(); std::this_thread::yield())
        if (Clock::now() - start > kTimeout) fail("a request was not answered", own);
    };
    wait_for([&] { return rank.reply[owner] >= sent[owner]; });
    if (rank.reply[owner] != sent[owner]) fail("an answer too many", own);
    ++answered;  // as if the owner had held its answer back until it had its own
    wait_for([&] { return answered >= kRanks * (i + 1); });
    ++rank.consumed;
  }
}

void check_stay() {
  const std::uint64_t idle = 1'000'000;
  if (stay_ns(450'000, idle) != kLongestStay * idle) fail("a server ends between the requests of a step", -1);
  if (stay_ns(kLongestStay * idle, idle) != idle || stay_ns(~std::uint64_t(0), idle) != idle) fail("a server stays for a rare request", -1);
}

}  // namespace

int main(int count, char** arguments) {
  const std::uint64_t requests = count > 1 ? std::strtoull(arguments[1], nullptr, 10) : 5000;
  check_stay();
  std::vector<std::thread> threads, asking;
  for (int rank = 0; rank < kRanks; ++rank) {
    for (int stream = 0; stream < kStreams; ++stream) threads.emplace_back(stream_thread, rank, stream);
    threads.emplace_back(launching_thread, rank);
    asking.emplace_back(engine_thread, rank, requests);
  }
  for (std::thread& thread : asking) thread.join();
  for (Rank& rank : ranks) rank.stop = true;
  for (std::thread& thread : threads) thread.join();
  std::uint64_t served = 0, launches = 0;
  for (const Rank& rank : ranks) {
    for (const std::uint64_t of_one : rank.served) served += of_one;
    launches += rank.launches_that_served;
    if (rank.life != 0) fail("a launch never left", static_cast<int>(&rank - ranks.data()));
  }
  if (served != kRanks * requests) fail("the answers do not add up", -1);
  std::printf("life_stress: ok, %llu requests, %llu launches served\n", static_cast<unsigned long long>(served),
              static_cast<unsigned long long>(launches));
  return 0;
}
