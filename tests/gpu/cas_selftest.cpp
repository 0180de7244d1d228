// The CUDA CaS server and requester against a float64 reference on the CPU: `cas_selftest CASE...`, exit status 0 when all
// hold. Cases: staged (no two kernels need to run at once: for compute-sanitizer), basic, graph, relaunch, free, striped,
// faults, ipc2, ipc4, killed (several processes, cudaIpc; fast only under MPS).
#include <algorithm>
#include <thread>

#include "cas_processes.hpp"

namespace selftest {
namespace {

void run_staged() {
  for (int variant = 0; variant < 3; ++variant) {
    Options o;
    o.start = false;
    o.plain = variant == 1;
    o.striped = variant == 2;
    o.idle_ms = 0.2;
    o.sms = 4;
    Group group(o);
    std::mt19937 random(variant);
    for (int round = 0; round < 2; ++round) {
      std::vector<std::unique_ptr<Request>> requests;
      for (unsigned r = 0; r < o.world; ++r) requests.push_back(std::make_unique<Request>(1, round == 0 ? 3 + r : 16, random));
      for (unsigned r = 0; r < o.world; ++r)
        group.ranks[r]->push(1, requests[r]->x_device.as<void>(), requests[r]->rows, group.ranks[r]->stream.stream);
      SIDP_CUDA_CHECK(cudaDeviceSynchronize());
      for (auto& rank : group.ranks) {
        rank->server->start();
        std::this_thread::sleep_for(std::chrono::milliseconds(500));
        rank->server->stop();
      }
      for (unsigned r = 0; r < o.world; ++r)
        group.ranks[r]->wait(1, requests[r]->y_device.as<void>(), requests[r]->rows, group.ranks[r]->stream.stream);
      SIDP_CUDA_CHECK(cudaDeviceSynchronize());
      for (unsigned r = 0; r < o.world; ++r) {
        group.ranks[r]->requester->throw_if_failed();
        expect_error(requests[r]->error(), "staged, variant " + std::to_string(variant));
      }
    }
    std::printf("staged variant %d: %llu batches\n", variant,
                (unsigned long long)group.ranks[1 % o.world]->server->counters().batches);
  }
}

// Several layers in flight, several streams, random rows.
void run_basic(bool striped, bool relaunch) {
  Options o;
  o.world = striped ? 2 : 3;
  o.striped = striped;
  if (relaunch) o.idle_ms = 0.02, o.run_ms = 0.3;
  Group group(o);
  std::mt19937 random(7);
  for (int round = 0; round < 40; ++round) {
    std::vector<std::unique_ptr<Request>> requests;
    std::vector<unsigned> from;
    for (unsigned r = 0; r < o.world; ++r)
      for (int i = 0; i < 2; ++i) {  // two in flight, to one owner or to two
        requests.push_back(std::make_unique<Request>(random() % o.layers, 1 + random() % kMaxRows, random));
        from.push_back(r);
      }
    SIDP_CUDA_CHECK(cudaDeviceSynchronize());
    for (std::size_t i = 0; i < requests.size(); ++i) {
      if (relaunch) std::this_thread::sleep_for(std::chrono::microseconds(random() % 1500));
      Rank& rank = *group.ranks[from[i]];
      rank.push(requests[i]->l, requests[i]->x_device.as<void>(), requests[i]->rows, rank.stream.stream);
    }
    for (std::size_t i = 0; i < requests.size(); ++i) {
      Rank& rank = *group.ranks[from[i]];
      rank.wait(requests[i]->l, requests[i]->y_device.as<void>(), requests[i]->rows, rank.stream.stream);
    }
    SIDP_CUDA_CHECK(cudaDeviceSynchronize());
    for (std::size_t i = 0; i < requests.size(); ++i) {
      group.ranks[from[i]]->requester->throw_if_failed();
      expect_error(requests[i]->error(), "basic, round " + std::to_string(round) + " request " + std::to_string(i));
    }
  }
  stop(group);
  const ServerCounters c = group.ranks[0]->server->counters();
  std::printf("%s%s: rank 0 answered %llu requests in %llu batches over %llu launches\n", striped ? "striped" : "basic",
              relaunch ? " relaunch" : "", (unsigned long long)c.requests, (unsigned long long)c.batches,
              (unsigned long long)c.launches);
  if (relaunch) expect(c.launches > 20, "the server was relaunched often");
}

// 1000 replays of a captured call with changed inputs, a partner that comes and goes with other row counts.
void run_graph() {
  Options o;
  Group group(o);
  std::mt19937 random(5);
  Rank &rank = *group.ranks[0], &partner = *group.ranks[1];
  Request mine(1, 2, random), second(0, 2, random);
  cudaGraph_t graph;
  cudaGraphExec_t replay;
  SIDP_CUDA_CHECK(cudaStreamBeginCapture(rank.stream.stream, cudaStreamCaptureModeGlobal));
  rank.push(1, mine.x_device.as<void>(), 2, rank.stream.stream);
  rank.push(0, second.x_device.as<void>(), 2, rank.stream.stream);
  rank.wait(1, mine.y_device.as<void>(), 2, rank.stream.stream);
  rank.wait(0, second.y_device.as<void>(), 2, rank.stream.stream);
  SIDP_CUDA_CHECK(cudaStreamEndCapture(rank.stream.stream, &graph));
  SIDP_CUDA_CHECK(cudaGraphInstantiate(&replay, graph, 0));
  for (int i = 0; i < 1000; ++i) {
    mine.x = random_matrix(2, kHidden, 1.0f, random);
    SIDP_CUDA_CHECK(cudaMemcpyAsync(mine.x_device.as<void>(), mine.x.data(), mine.x.size() * 2, cudaMemcpyHostToDevice,
                                    rank.stream.stream));
    std::unique_ptr<Request> other;
    if (random() % 2) {
      other = std::make_unique<Request>(1, 1 + random() % kMaxRows, random);
      SIDP_CUDA_CHECK(cudaDeviceSynchronize());
      partner.push(1, other->x_device.as<void>(), other->rows, partner.stream.stream);
    }
    SIDP_CUDA_CHECK(cudaGraphLaunch(replay, rank.stream.stream));
    if (other) partner.wait(1, other->y_device.as<void>(), other->rows, partner.stream.stream);
    SIDP_CUDA_CHECK(cudaStreamSynchronize(rank.stream.stream));
    SIDP_CUDA_CHECK(cudaStreamSynchronize(partner.stream.stream));
    expect_error(mine.error(), "graph replay " + std::to_string(i));
    if (i % 100 == 0) expect_error(second.error(), "graph replay, second layer");
    if (other && i % 10 == 0) expect_error(other->error(), "graph, partner");
    if (failures > 5) break;
  }
  rank.requester->throw_if_failed();
  SIDP_CUDA_CHECK(cudaGraphExecDestroy(replay));
  SIDP_CUDA_CHECK(cudaGraphDestroy(graph));
  std::printf("graph: 1000 replays\n");
}

// cudaFree and a global-mode capture beside a server that is idle, and one that is kept busy.
void run_free() {
  Options o;
  o.idle_ms = 2;
  o.run_ms = 10;
  Group group(o);
  std::mt19937 random(3);
  std::atomic<bool> done{false};
  double worst[2] = {0, 0};
  for (int busy = 0; busy < 2; ++busy) {
    done = false;
    std::thread traffic([&] {
      Request request(1, 4, random);
      Rank& rank = *group.ranks[0];
      while (busy && !done) {
        for (int i = 0; i < 8; ++i) {
          rank.push(1, request.x_device.as<void>(), 4, rank.stream.stream);
          rank.wait(1, request.y_device.as<void>(), 4, rank.stream.stream);
        }
        cudaStreamSynchronize(rank.stream.stream);
      }
    });
    for (int i = 0; i < 20; ++i) {
      void* pointer;
      SIDP_CUDA_CHECK(cudaMalloc(&pointer, 32 << 20));
      const double start = seconds();
      SIDP_CUDA_CHECK(cudaFree(pointer));
      worst[busy] = std::max(worst[busy], (seconds() - start) * 1e3);
    }
    done = true;
    traffic.join();
  }
  std::printf("free: worst cudaFree %.2f ms beside an idle server, %.2f ms beside a busy one\n", worst[0], worst[1]);
  const double bound = 2 * o.run_ms + 50;
  expect(worst[0] < bound && worst[1] < 2 * bound, "cudaFree is held up for longer than the bound");
  group.ranks[0]->requester->throw_if_failed();
}

void run_faults() {
  Options o;
  o.timeout_s = 0.3;
  Group group(o);
  std::mt19937 random(1);
  Request bad(3, 2, random), late(0, 2, random);
  Rank& rank = *group.ranks[0];
  // Layer 3 belongs to rank 1; rank 0's server refuses it.
  rank.requester->push({bad.x_device.as<void>(), kHidden * 2, 2, 3, 0, 1}, false, rank.stream.stream);  // its bell alone wakes
  rank.requester->wait({bad.y_device.as<void>(), kHidden * 2, 2, 3, 0, 1}, false, rank.stream.stream);
  SIDP_CUDA_CHECK(cudaStreamSynchronize(rank.stream.stream));
  bool refused = false;
  try {
    rank.requester->throw_if_failed();
  } catch (const LayoutError& error) {
    refused = true;
    std::printf("faults: %s\n", error.what());
  }
  expect(refused && error_status(rank.requester->error()) == std::uint32_t(Status::kBadLayer), "a wrong layer is refused");
  // A stopped server answers nobody: the wait ends by its deadline.
  group.ranks[0]->server->stop();
  Rank& other = *group.ranks[1];
  const double start = seconds();
  other.push(0, late.x_device.as<void>(), 2, other.stream.stream);
  other.wait(0, late.y_device.as<void>(), 2, other.stream.stream);
  SIDP_CUDA_CHECK(cudaStreamSynchronize(other.stream.stream));
  const double waited = seconds() - start;
  bool timed_out = false;
  try {
    other.requester->throw_if_failed();
  } catch (const PeerError& error) {
    timed_out = error.rank() == 0;
    std::printf("faults: %s\n", error.what());
  }
  expect(timed_out && waited > 0.25 && waited < 2, "a silent owner is a PeerError after the timeout");
  // The request is still there when the server comes back: nothing is lost.
  group.ranks[0]->server->start();
  std::this_thread::sleep_for(std::chrono::milliseconds(100));
  group.ranks[0]->server->stop();
  expect(group.ranks[0]->server->counters().requests == 1, "the waiting request is served after a restart");
  expect(group.ranks[0]->server->counters().refused == 1, "the refused request is counted");
}

}  // namespace
}  // namespace selftest

int main(int count, char** arguments) {
  using namespace selftest;
  std::setvbuf(stdout, nullptr, _IOLBF, 0);
  for (int i = 1; i < count; ++i) {
    const std::string name = arguments[i];
    const double start = seconds();
    try {
      if (name == "staged") run_staged();
      else if (name == "basic") run_basic(false, false);
      else if (name == "relaunch") run_basic(false, true);
      else if (name == "striped") run_basic(true, false);
      else if (name == "graph") run_graph();
      else if (name == "free") run_free();
      else if (name == "faults") run_faults();
      else if (name == "ipc2") run_ipc(2, false);
      else if (name == "ipc4") run_ipc(4, false);
      else if (name == "killed") run_ipc(3, true);
      else expect(false, "unknown case " + name);
    } catch (const std::exception& error) {
      expect(false, name + ": " + error.what());
    }
    std::printf("case %s: %s, %.2f s\n", name.c_str(), failures == 0 ? "ok" : "FAILED", seconds() - start);
  }
  return failures == 0 ? 0 : 1;
}
