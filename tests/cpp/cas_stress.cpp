// CaS under stress: four ranks, each with a server and a requester, random rows, layers and delays on both sides, several
// layers in flight. Every element of every request is random, and the layers' weights make an exact function of it, so
// that a torn, late or foreign result is seen. The ranks are threads, for ThreadSanitizer and AddressSanitizer too,
// or processes that share nothing but the regions.
//
//   cas_stress [requests of all ranks together] [threads|processes]
#include <sys/wait.h>
#include <unistd.h>

#include <atomic>
#include <chrono>
#include <cstdio>
#include <cstring>
#include <deque>
#include <new>
#include <random>
#include <string>
#include <thread>

#include "cas_group.hpp"

using namespace sidp;
using namespace sidp::cas;
using namespace sidp::cas::cpu;
using namespace sidp::cas::cpu::testing;

namespace {

constexpr double kTimeout = 120;

std::mt19937& noise() {
  thread_local std::mt19937 random(std::random_device{}());
  return random;
}

void now_and_then_sleep() {
  if (noise()() % 64 == 0) std::this_thread::sleep_for(std::chrono::microseconds(noise()() % 300));
}

void slow_sgemm(const char* trans, const char* same, const std::int64_t* m, const std::int64_t* n, const std::int64_t* k,
                const float* alpha, const float* a, const std::int64_t* lda, const float* b, const std::int64_t* ldb,
                const float* beta, float* c, const std::int64_t* ldc, std::size_t one, std::size_t other) {
  now_and_then_sleep();
  plain_sgemm(trans, same, m, n, k, alpha, a, lda, b, ldb, beta, c, ldc, one, other);
}

struct Flight {
  CpuRequester::Ticket ticket;
  int layer;
  std::vector<float> x, y;
};

void check(const Flight& flight) {
  for (std::size_t i = 0; i < flight.x.size(); ++i) {
    const float expected = flight.x[i] * static_cast<float>(flight.layer + 1);
    if (flight.y[i] == expected) continue;
    std::printf("cas_stress: element %zu of layer %d is %g, expected %g\n", i, flight.layer, flight.y[i], expected);
    std::fflush(stdout);
    std::_Exit(1);
  }
}

// Elements compared.
std::uint64_t run_rank(const Regions& regions, int rank, int requests) {
  CpuRequester requester(regions.requester_options(rank));
  std::deque<Flight> flights;
  std::uint64_t compared = 0;
  for (int sent = 0; sent < requests || !flights.empty();) {
    const bool finish = sent == requests || flights.size() == 5 || (!flights.empty() && noise()() % 3 == 0);
    if (finish) {
      requester.finish(flights.front().ticket, kTimeout);
      check(flights.front());
      compared += flights.front().x.size();
      flights.pop_front();
      continue;
    }
    Flight flight;
    flight.layer = static_cast<int>(noise()() % kLayers);
    flight.x.resize((noise()() % 20) * kHidden);
    for (float& value : flight.x) value = static_cast<float>(noise()() & 0xfffff);  // times 8 it is still exact
    flight.y.assign(flight.x.size(), -1);
    flights.push_back(std::move(flight));
    Flight& kept = flights.back();
    kept.ticket = requester.submit(kept.layer, reinterpret_cast<const std::byte*>(kept.x.data()),
                                   reinterpret_cast<std::byte*>(kept.y.data()), kept.x.size() / kHidden, kTimeout);
    ++sent;
    now_and_then_sleep();
  }
  return compared;
}

// What the ranks of one run did, in memory that all of them see.
struct Totals {
  std::atomic<std::uint64_t> served{0}, batches{0}, fused{0}, refused{0}, sleeps{0}, compared{0};
  std::atomic<int> finished{0};

  void add(const ServerStats& stats) {
    served += stats.requests;
    batches += stats.batches;
    fused += stats.fused_batches;
    refused += stats.refused + stats.broken;
    sleeps += stats.sleeps;
  }
  void print(const char* what, std::chrono::steady_clock::time_point begin) const {
    const double seconds = std::chrono::duration<double>(std::chrono::steady_clock::now() - begin).count();
    std::printf("cas_stress: %s: %llu requests served in %llu batches, %llu of them fused; %llu elements compared, "
                "%llu refused, servers slept %llu times, %.1f s\n",
                what, static_cast<unsigned long long>(served), static_cast<unsigned long long>(batches),
                static_cast<unsigned long long>(fused), static_cast<unsigned long long>(compared),
                static_cast<unsigned long long>(refused), static_cast<unsigned long long>(sleeps), seconds);
    std::fflush(stdout);
  }
};

// A requester that writes nonsense: the server must not stumble over it, nor the others.
void scribble(const Regions& regions, int victim, int requester, std::atomic<bool>& stop) {
  std::mt19937_64 random(99);
  const Region region = regions.region(victim);
  auto* words = reinterpret_cast<std::uint64_t*>(region.request(static_cast<std::uint32_t>(requester), 0));
  std::uint64_t tail = 0;
  while (!stop.load()) {
    const std::size_t slot = random() % 2 * 16;
    for (std::size_t i = 0; i < 4; ++i) store_relaxed(words + slot + i, i == 0 ? tail + 1 : i == 1 ? kPool : random());
    if (tail < 1000) store_release(&region.tail(static_cast<std::uint32_t>(requester))->sequence, ++tail);
    std::this_thread::sleep_for(std::chrono::microseconds(random() % 100));
  }
}

void run_threads(bool striped, int requests, bool scribbled) {
  const auto begin = std::chrono::steady_clock::now();
  const Regions regions(striped, Regions::Between::threads);
  const int honest = scribbled ? kWorld - 1 : kWorld;
  Totals totals;
  std::vector<std::unique_ptr<Owner>> owners;
  for (int rank = 0; rank < kWorld; ++rank) owners.push_back(std::make_unique<Owner>(regions, rank, &slow_sgemm));
  std::atomic<bool> stop{false};
  std::vector<std::thread> ranks;
  std::vector<std::thread> scribblers;
  for (int rank = 0; rank < honest; ++rank)
    ranks.emplace_back([&, rank] { totals.compared += run_rank(regions, rank, requests / honest); });
  if (scribbled)
    for (int victim = 0; victim < kWorld; ++victim)
      scribblers.emplace_back(scribble, std::cref(regions), victim, kWorld - 1, std::ref(stop));
  for (std::thread& rank : ranks) rank.join();
  stop = true;
  for (std::thread& scribbler : scribblers) scribbler.join();
  for (auto& owner : owners) {
    owner->server().stop();
    totals.add(owner->server().stats());
  }
  totals.print(scribbled ? "threads, layer, beside a scribbler" : striped ? "threads, striped" : "threads, layer", begin);
  if (scribbled && totals.refused == 0) {
    std::printf("cas_stress: nothing was refused\n");
    std::exit(1);
  }
}

// A rank's own process: it asks, then serves until the others have their answers too.
int rank_process(const Regions& regions, int rank, int requests, Totals& totals) {
  Owner owner(regions, rank, &slow_sgemm);
  totals.compared += run_rank(regions, rank, requests);
  ++totals.finished;
  const Deadline deadline = Deadline::after(kTimeout);
  while (totals.finished < kWorld && !deadline.expired()) std::this_thread::sleep_for(std::chrono::milliseconds(1));
  owner.server().stop();
  totals.add(owner.server().stats());
  return totals.finished == kWorld ? 0 : 1;
}

void run_processes(bool striped, int requests) {
  const auto begin = std::chrono::steady_clock::now();
  const Regions regions(striped, Regions::Between::processes);
  void* memory = mmap(nullptr, sizeof(Totals), PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
  if (memory == MAP_FAILED) throw std::runtime_error("no memory for the totals");
  Totals& totals = *new (memory) Totals;
  std::vector<pid_t> ranks;
  for (int rank = 0; rank < kWorld; ++rank) {
    const pid_t pid = fork();
    if (pid < 0) throw std::runtime_error("cannot fork");
    if (pid == 0) std::_Exit(rank_process(regions, rank, requests / kWorld, totals));
    ranks.push_back(pid);
  }
  bool failed = false;
  for (const pid_t pid : ranks) {
    int status = 0;
    waitpid(pid, &status, 0);
    failed = failed || !WIFEXITED(status) || WEXITSTATUS(status) != 0;
  }
  totals.print(striped ? "processes, striped" : "processes, layer", begin);
  munmap(memory, sizeof(Totals));
  if (failed) {
    std::printf("cas_stress: a rank failed\n");
    std::exit(1);
  }
}

}  // namespace

int main(int argc, char** argv) {
  const int requests = argc > 1 ? std::atoi(argv[1]) : 20000;
  const std::string between = argc > 2 ? argv[2] : "threads";
  if (between == "processes") {
    run_processes(false, requests / 2);
    run_processes(true, requests / 2);
  } else {
    run_threads(false, requests / 2, false);
    run_threads(true, requests / 4, false);
    run_threads(false, requests / 4, true);
  }
  std::printf("cas_stress: ok\n");
  return 0;
}
