// The cases of cas_selftest with several processes over cudaIpc.
#include <sys/mman.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <csignal>
#include <cstdlib>

#include "cas_processes.hpp"

namespace selftest {
namespace {

struct Board {  // shared by the forked ranks
  alignas(4096) char bells[4][kBellBytes];
  std::atomic<int> arrived[8];
  cudaIpcMemHandle_t handle[8];
  std::atomic<int> failed;
};

bool meet(Board* board, int step, int count) {
  board->arrived[step].fetch_add(1);
  const double start = seconds();
  while (board->arrived[step].load() < count) {
    if (seconds() - start > 30) return false;
    usleep(200);
  }
  return true;
}

void run_process(Board* board, unsigned rank, unsigned world, bool killed) {
  Options o;
  o.world = world;
  o.layers = world * 2;
  o.timeout_s = killed ? 1.5 : 10;
  DeviceMemory region(std::max<std::size_t>(geometry_of(o).bytes(), 2 << 20));
  SIDP_CUDA_CHECK(cudaIpcGetMemHandle(&board->handle[rank], region.as<void>()));
  SIDP_CUDA_CHECK(cudaDeviceSynchronize());
  expect(meet(board, 0, world), "handles");
  std::vector<void*> regions(world);
  for (unsigned r = 0; r < world; ++r) {
    regions[r] = region.as<void>();
    if (r != rank)
      SIDP_CUDA_CHECK(cudaIpcOpenMemHandle(&regions[r], board->handle[r], cudaIpcMemLazyEnablePeerAccess));
  }
  SIDP_CUDA_CHECK(cudaHostRegister(board->bells, sizeof(board->bells), cudaHostRegisterMapped | cudaHostRegisterPortable));
  std::vector<void*> bells(world);
  for (unsigned r = 0; r < world; ++r) bells[r] = board->bells[r];
  {
    Rank me(o, rank, region.as<void>(), regions, bells);
    expect(meet(board, 1, world), "start");
    std::mt19937 random(100 + rank);
    const double start = seconds();
    int rounds = 0;
    bool saw_death = false;
    for (; rounds < 60; ++rounds) {
      if (killed && rank == world - 1 && rounds == 20) raise(SIGKILL);
      unsigned l = random() % o.layers;
      if (saw_death) l = l / world * world + l % world % (world - 1);  // no layer of the dead rank
      Request request(l, 1 + random() % kMaxRows, random);
      usleep(random() % 2000);
      me.push(l, request.x_device.as<void>(), request.rows, me.stream.stream);
      me.wait(l, request.y_device.as<void>(), request.rows, me.stream.stream);
      SIDP_CUDA_CHECK(cudaStreamSynchronize(me.stream.stream));
      try {
        me.requester->throw_if_failed();
        expect_error(request.error(), "process " + std::to_string(rank) + " round " + std::to_string(rounds));
      } catch (const PeerError& error) {
        expect(killed && unsigned(error.rank()) == world - 1, error.what());
        std::printf("rank %u round %d: %s\n", rank, rounds, error.what());
        saw_death = true;
        break;
      }
    }
    const double time = seconds() - start;
    if (killed) expect(saw_death, "the death of the last rank was seen");
    expect(meet(board, 2, killed ? world - 1 : world), "end");  // goes on serving until all are through
    me.server->stop();
    const ServerCounters c = me.server->counters();
    std::printf("rank %u of %u: %d rounds in %.2f s, answered %llu requests in %llu batches, %llu launches\n", rank, world,
                rounds, time, (unsigned long long)c.requests, (unsigned long long)c.batches, (unsigned long long)c.launches);
  }
  for (unsigned r = 0; r < world; ++r)
    if (r != rank) cudaIpcCloseMemHandle(regions[r]);
  cudaHostUnregister(board->bells);
  meet(board, 3, killed ? world - 1 : world);
}

}  // namespace

void run_ipc(unsigned world, bool killed) {
  auto* board = static_cast<Board*>(
      mmap(nullptr, sizeof(Board), PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0));
  std::vector<pid_t> children;
  for (unsigned r = 0; r < world; ++r) {
    const pid_t child = fork();  // this process has not touched CUDA
    if (child == 0) {
      try {
        run_process(board, r, world, killed);
      } catch (const std::exception& error) {
        std::printf("rank %u: %s\n", r, error.what());
        ++failures;
      }
      std::fflush(stdout);
      _exit(failures == 0 ? 0 : 1);
    }
    children.push_back(child);
  }
  for (unsigned r = 0; r < world; ++r) {
    int status = 0;
    waitpid(children[r], &status, 0);
    const bool meant = killed && r == world - 1;
    expect(meant ? WIFSIGNALED(status) : status == 0, "rank " + std::to_string(r) + " ended with " + std::to_string(status));
  }
  munmap(board, sizeof(Board));
  std::printf("%u processes%s done\n", world, killed ? ", one killed," : "");
}

}  // namespace selftest
