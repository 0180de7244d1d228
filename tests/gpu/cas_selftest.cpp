// The CUDA CaS server and requester against a float64 reference on the CPU: `cas_selftest CASE...`, exit status 0 when all
// hold. Cases: staged (no two kernels need to run at once: for compute-sanitizer), basic, graph, relaunch, free, striped,
// faults, ipc2, ipc4, killed (several processes, cudaIpc; fast only under MPS).
#include <sys/mman.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cmath>
#include <csignal>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <random>
#include <string>
#include <thread>
#include <vector>

#include "../../csrc/cas_server/cuda_requester.hpp"
#include "../../csrc/cas_server/cuda_server.hpp"

using namespace sidp;
using namespace sidp::cas;

namespace {

constexpr std::uint32_t kHidden = 384, kInner = 832, kMaxRows = 16, kSlots = 2;
constexpr std::uint64_t kPool = 4711;
constexpr std::size_t kBellBytes = kMaxWorld * sizeof(BellLine);

double seconds() {
  return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

std::uint16_t to_bf16(float x) {
  std::uint32_t bits;
  std::memcpy(&bits, &x, 4);
  return std::uint16_t((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}
float from_bf16(std::uint16_t x) {
  const std::uint32_t bits = std::uint32_t(x) << 16;
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}

using Matrix = std::vector<std::uint16_t>;

Matrix random_matrix(std::size_t rows, std::size_t columns, float scale, std::mt19937& random) {
  std::normal_distribution<float> normal(0.0f, scale);
  Matrix result(rows * columns);
  for (auto& value : result) value = to_bf16(normal(random));
  return result;
}

// One layer's weights, the same in every process: drawn from the layer's number.
struct Layer {
  Matrix gate, up, down;
  explicit Layer(unsigned number) {
    std::mt19937 random(1000 + number);
    gate = random_matrix(kInner, kHidden, 0.05f, random);
    up = random_matrix(kInner, kHidden, 0.05f, random);
    down = random_matrix(kHidden, kInner, 0.04f, random);
  }

  // Relative Frobenius error of y against float64.
  double error(const Matrix& x, const Matrix& y) const {
    double difference = 0, norm = 0;
    for (std::size_t row = 0; row * kHidden < x.size(); ++row) {
      std::vector<double> inner(kInner);
      for (std::size_t i = 0; i < kInner; ++i) {
        double g = 0, u = 0;
        for (std::size_t k = 0; k < kHidden; ++k) {
          g += double(from_bf16(gate[i * kHidden + k])) * from_bf16(x[row * kHidden + k]);
          u += double(from_bf16(up[i * kHidden + k])) * from_bf16(x[row * kHidden + k]);
        }
        inner[i] = g / (1 + std::exp(-g)) * u;
      }
      for (std::size_t c = 0; c < kHidden; ++c) {
        double sum = 0;
        for (std::size_t i = 0; i < kInner; ++i) sum += inner[i] * from_bf16(down[c * kInner + i]);
        const double d = sum - from_bf16(y[row * kHidden + c]);
        difference += d * d;
        norm += sum * sum;
      }
    }
    const double result = std::sqrt(difference / norm);
    return std::isnan(result) ? 1e9 : result;
  }
};

const Layer& layer(unsigned number) {
  static std::vector<std::unique_ptr<Layer>> layers(16);
  if (!layers[number]) layers[number] = std::make_unique<Layer>(number);
  return *layers[number];
}

template <typename T>
DeviceMemory on_device(const std::vector<T>& values) {
  DeviceMemory memory(values.size() * sizeof(T));
  SIDP_CUDA_CHECK(cudaMemcpy(memory.as<void>(), values.data(), values.size() * sizeof(T), cudaMemcpyHostToDevice));
  return memory;
}

struct Stream {
  cudaStream_t stream = nullptr;
  Stream() { SIDP_CUDA_CHECK(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking)); }
  ~Stream() { cudaStreamDestroy(stream); }
};

// The weights an owner holds: whole layers, or its slice of every layer.
struct Weights {
  std::vector<DeviceMemory> memory;
  UnitPointers slice(const Layer& whole, unsigned part, unsigned parts) {
    const std::size_t inner = kInner / parts;
    Matrix down;
    for (std::size_t c = 0; c < kHidden; ++c)
      down.insert(down.end(), whole.down.begin() + c * kInner + part * inner,
                  whole.down.begin() + c * kInner + (part + 1) * inner);
    auto rows = [&](const Matrix& m) {
      return Matrix(m.begin() + part * inner * kHidden, m.begin() + (part + 1) * inner * kHidden);
    };
    const std::size_t first = memory.size();
    memory.push_back(on_device(rows(whole.gate)));
    memory.push_back(on_device(rows(whole.up)));
    memory.push_back(on_device(down));
    UnitPointers pointers;
    pointers.gate = memory[first].as<void>();
    pointers.up = memory[first + 1].as<void>();
    pointers.down = memory[first + 2].as<void>();
    return pointers;
  }
};

struct Options {
  unsigned world = 2, layers = 4, sms = 8;
  bool striped = false, plain = false, start = true;
  double idle_ms = 1, run_ms = 10, timeout_s = 5;
};

Geometry geometry_of(const Options& o) {
  return Geometry::make(o.world, kSlots, kMaxRows, kHidden, 2, o.striped ? 4 : 2);
}

// One rank: its server (owner of the layers rank mod world, or of a slice of all) and its requester.
struct Rank {
  Options options;
  unsigned rank;
  Weights weights;
  std::unique_ptr<CudaRequester> requester;
  std::unique_ptr<CudaServer> server;
  Stream stream;

  // `bells` by rank, as device and host see them.
  Rank(const Options& o, unsigned number, void* region, const std::vector<void*>& regions, const std::vector<void*>& bells)
      : options(o), rank(number) {
    CudaRequesterConfig asks;
    asks.pool_id = kPool;
    asks.rank = rank;
    asks.hidden = kHidden;
    asks.timeout_s = o.timeout_s;
    requester = std::make_unique<CudaRequester>(asks, geometry_of(o), region, regions, bells);
    CudaServerConfig config;
    config.sms = o.sms;
    config.layers = o.layers;
    config.hidden = kHidden;
    config.intermediate = o.striped ? kInner / o.world : kInner;
    config.reply_float32 = o.striped;
    config.pool_id = kPool;
    config.rank = rank;
    config.idle_ms = o.idle_ms;
    config.run_ms = o.run_ms;
    config.stall_s = 5;
    config.plain = o.plain;
    config.asks = requester.get();
    server = std::make_unique<CudaServer>(config, geometry_of(o), region, regions, bells[rank]);
    for (unsigned l = 0; l < o.layers; ++l) {
      if (!o.striped && l % o.world != rank) continue;
      server->register_unit(l, o.striped ? weights.slice(layer(l), rank, o.world) : weights.slice(layer(l), 0, 1),
                            UnitShape{kHidden, config.intermediate, Activation::kSilu});
    }
    if (o.start) server->start();
  }

  // Whole requests go to the layer's owner, in `striped` to all.
  RowsArgument target(unsigned l, const void* rows, unsigned count) const {
    return {const_cast<void*>(rows), kHidden * 2, count, l, options.striped ? 0 : l % options.world,
            options.striped ? options.world : 1};
  }
  void push(unsigned l, const void* x, unsigned rows, cudaStream_t s) {
    server->push(*requester, target(l, x, rows), options.striped, s);
  }
  void wait(unsigned l, void* y, unsigned rows, cudaStream_t s) {
    requester->wait(target(l, y, rows), options.striped, s);
  }
};

struct Group {
  std::vector<DeviceMemory> regions;
  std::vector<MappedHostMemory> bells;
  std::vector<std::unique_ptr<Rank>> ranks;
  explicit Group(const Options& o) {
    std::vector<void*> pointers, pages;
    for (unsigned r = 0; r < o.world; ++r) {
      regions.emplace_back(geometry_of(o).bytes());
      pointers.push_back(regions.back().as<void>());
      bells.emplace_back(kBellBytes);
      pages.push_back(bells.back().as<void>());
    }
    SIDP_CUDA_CHECK(cudaDeviceSynchronize());
    for (unsigned r = 0; r < o.world; ++r) ranks.push_back(std::make_unique<Rank>(o, r, pointers[r], pointers, pages));
  }
};

// One request with its buffers; y starts poisoned.
struct Request {
  unsigned l, rows;
  Matrix x;
  DeviceMemory x_device, y_device;
  Request(unsigned number, unsigned count, std::mt19937& random)
      : l(number), rows(count), x(random_matrix(count, kHidden, 1.0f, random)), x_device(on_device(x)),
        y_device(on_device(Matrix(std::size_t(count) * kHidden, 0x7fc0))) {}
  double error() const {
    Matrix y(x.size());
    SIDP_CUDA_CHECK(cudaMemcpy(y.data(), y_device.as<void>(), y.size() * 2, cudaMemcpyDeviceToHost));
    return layer(l).error(x, y);
  }
};

int failures = 0;

void expect(bool condition, const std::string& what) {
  if (condition) return;
  ++failures;
  std::printf("FAILED: %s\n", what.c_str());
}
void expect_error(double error, const std::string& where) {
  expect(error < 6e-3, where + ": relative error " + std::to_string(error));
}

void stop(Group& group) {
  for (auto& rank : group.ranks) rank->server->stop();
}

// --- cases ---

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

// --- several processes ---

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

}  // namespace

int main(int count, char** arguments) {
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
