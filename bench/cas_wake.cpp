// How soon an idle CaS server on the CPU computes after a request was pushed, and what idling costs it.
//
//   cas_wake [rounds] [pinned]     built with -DSIDP_BUILD_TESTS=ON
//
// Two processes, as two ranks: the parent pushes one row, the child's server computes it. The multiplication notes when it
// is first entered; both processes read the same monotonic clock. Before each push the server has been idle for 0, 1, 10
// or 100 ms, during which the requester computes, as a rank does: with 0 the server still looks around, with the others it
// sleeps. "bare futex" is the same with nothing but the system's wake-up in it, what no sleeper can be faster than; its
// rounds take turns with the server's, so that both see the same machine. "beyond the futex" is what a push adds to it, round by round.
// "pinned": each rank stays on a core of its own; else the scheduler may put the server on the requester's, where it waits for it.
#include <sched.h>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <csignal>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <new>
#include <thread>

#include "cas_group.hpp"
#include "cas_server/futex.hpp"

using namespace sidp;
using namespace sidp::cas;
using namespace sidp::cas::cpu;
using namespace sidp::cas::cpu::testing;

namespace {

struct Shared {
  std::atomic<std::int64_t> entered_ns{0};
  std::uint32_t bell = 0;  // of the bare futex
};
Shared* shared = nullptr;

std::int64_t now_ns() {
  return std::chrono::duration_cast<std::chrono::nanoseconds>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

void noting_sgemm(const char* trans, const char* same, const std::int64_t* m, const std::int64_t* n, const std::int64_t* k,
                  const float* alpha, const float* a, const std::int64_t* lda, const float* b, const std::int64_t* ldb,
                  const float* beta, float* c, const std::int64_t* ldc, std::size_t one, std::size_t other) {
  std::int64_t none = 0;
  shared->entered_ns.compare_exchange_strong(none, now_ns());
  plain_sgemm(trans, same, m, n, k, alpha, a, lda, b, ldb, beta, c, ldc, one, other);
}

double processor_seconds() {
  rusage used{};
  getrusage(RUSAGE_SELF, &used);
  const auto seconds = [](const timeval& t) { return static_cast<double>(t.tv_sec) + static_cast<double>(t.tv_usec) * 1e-6; };
  return seconds(used.ru_utime) + seconds(used.ru_stime);
}

// The floor: sleeps on a word and notes when it was woken.
void sleep_and_note() {
  prctl(PR_SET_PDEATHSIG, SIGKILL);
  for (std::uint32_t seen = 0;; seen = __atomic_load_n(&shared->bell, __ATOMIC_SEQ_CST)) {
    while (__atomic_load_n(&shared->bell, __ATOMIC_SEQ_CST) == seen) futex_wait(&shared->bell, seen, 10);
    shared->entered_ns = now_ns();
  }
}

// Answers each byte with the processor time used so far, until the other end is closed. In between nothing but the server runs.
int serve(const Regions& regions, int socket) {
  prctl(PR_SET_PDEATHSIG, SIGKILL);
  Owner owner(regions, 0, &noting_sgemm);
  for (char asked; read(socket, &asked, 1) == 1;) {
    const double used = processor_seconds();
    if (write(socket, &used, sizeof(used)) != sizeof(used)) return 1;
  }
  return 0;
}

double processor_seconds_of(int socket) {
  double used = -1;
  if (write(socket, "?", 1) != 1 || read(socket, &used, sizeof(used)) != sizeof(used)) std::exit(1);
  return used;
}

void stay_on(int core) {
  cpu_set_t cores;
  CPU_ZERO(&cores);
  CPU_SET(core, &cores);
  if (sched_setaffinity(0, sizeof(cores), &cores) != 0) std::exit(1);
}

void compute_for(double seconds) {
  for (const auto end = now_ns() + static_cast<std::int64_t>(seconds * 1e9); now_ns() < end;) relax();
}

double part(std::vector<double>& values, double share) {
  std::sort(values.begin(), values.end());
  return values[std::min(values.size() - 1, static_cast<std::size_t>(share * static_cast<double>(values.size())))];
}

void print(const char* what, double idle_s, std::vector<double>& values) {
  std::printf("%-17s after %5.0f ms idle: median %6.1f us, 90 %% %6.1f, 99 %% %6.1f\n", what, idle_s * 1e3, part(values, 0.5),
              part(values, 0.9), part(values, 0.99));
}

double wake_bare(double idle_s) {
  compute_for(idle_s);
  shared->entered_ns = 0;
  const std::int64_t begin = now_ns();
  __atomic_fetch_add(&shared->bell, 1, __ATOMIC_SEQ_CST);
  futex_wake_all(&shared->bell);
  while (shared->entered_ns == 0) relax();
  return static_cast<double>(shared->entered_ns - begin) * 1e-3;
}

struct Woken {
  double computing, answered;  // us after the push began
};

Woken wake_server(CpuRequester& requester, double idle_s) {
  const std::vector<float> x(kHidden, 1);
  std::vector<float> y(kHidden);
  compute_for(idle_s);
  shared->entered_ns = 0;
  const std::int64_t begin = now_ns();
  const auto ticket = requester.submit(0, reinterpret_cast<const std::byte*>(x.data()), reinterpret_cast<std::byte*>(y.data()), 1, 10);
  requester.finish(ticket, 10);
  const std::int64_t end = now_ns();
  return {static_cast<double>(shared->entered_ns - begin) * 1e-3, static_cast<double>(end - begin) * 1e-3};
}

void wake_in_turns(CpuRequester& requester, double idle_s, int rounds) {
  std::vector<double> bare, computing, answered, beyond;
  for (int round = 0; round < rounds; ++round) {
    if (idle_s > 0) bare.push_back(wake_bare(idle_s));
    const Woken woken = wake_server(requester, idle_s);
    computing.push_back(woken.computing);
    answered.push_back(woken.answered);
    if (idle_s > 0) beyond.push_back(computing.back() - bare.back());
  }
  if (idle_s > 0) print("bare futex", idle_s, bare);
  print("push to computing", idle_s, computing);
  if (idle_s > 0) print("beyond the futex", idle_s, beyond);
  print("push to answer", idle_s, answered);
}

}  // namespace

int main(int argc, char** argv) {
  const int rounds = argc > 1 ? std::atoi(argv[1]) : 1000;
  const Regions regions(false, Regions::Between::processes);
  void* memory = mmap(nullptr, sizeof(Shared), PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
  if (memory == MAP_FAILED) return 1;
  shared = new (memory) Shared;
  std::printf("%u processors\n", std::thread::hardware_concurrency());
  const bool pinned = argc > 2 && std::strcmp(argv[2], "pinned") == 0;
  if (pinned) stay_on(1);  // both children
  const pid_t sleeper = fork();
  if (sleeper == 0) sleep_and_note();
  int ends[2];
  if (socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, ends) != 0) return 1;
  const pid_t server = fork();
  if (server == 0) {
    close(ends[0]);
    std::_Exit(serve(regions, ends[1]));
  }
  close(ends[1]);
  if (pinned) stay_on(0);
  CpuRequester requester(regions.requester_options(1));
  wake_in_turns(requester, 0, rounds);
  for (const double idle_s : {0.001, 0.01, 0.1}) wake_in_turns(requester, idle_s, std::min(rounds, static_cast<int>(10 / idle_s)));
  const double before = processor_seconds_of(ends[0]);
  const auto begin = std::chrono::steady_clock::now();
  std::this_thread::sleep_for(std::chrono::seconds(10));
  const double used = processor_seconds_of(ends[0]) - before;
  const double passed = std::chrono::duration<double>(std::chrono::steady_clock::now() - begin).count();
  std::printf("idle server: %.1f ms of processor time in %.1f s (%.3f %% of a core)\n", used * 1e3, passed, 100 * used / passed);
  close(ends[0]);
  waitpid(server, nullptr, 0);
  kill(sleeper, SIGKILL);
  waitpid(sleeper, nullptr, 0);
  return 0;
}
