// CaS under stress: four ranks of one process, each with a server and a requester, random rows, layers and delays, several
// layers in flight. Every element of every request carries its own number, and the layers' weights make an exact
// function of it, so that a torn, late or foreign result is seen. Meant for ThreadSanitizer and AddressSanitizer too.
//
//   cas_stress [requests of all ranks together]
#include <atomic>
#include <cstdio>
#include <cstdlib>
#include <deque>
#include <memory>
#include <random>
#include <string>
#include <thread>
#include <vector>

#include "cas_server/cpu_requester.hpp"
#include "cas_server/cpu_server.hpp"

using namespace sidp;
using namespace sidp::cas;
using namespace sidp::cas::cpu;

namespace {

constexpr int kWorld = 4;
constexpr int kLayers = 8;
constexpr std::uint32_t kHidden = 16;
constexpr std::uint64_t kPool = 77;
constexpr double kTimeout = 120;

// Column-major, only what Blas::multiply asks for.
void plain_sgemm(const char* trans, const char*, const std::int64_t* m, const std::int64_t* n, const std::int64_t* k,
                 const float*, const float* a, const std::int64_t* lda, const float* b, const std::int64_t* ldb,
                 const float* beta, float* c, const std::int64_t* ldc, std::size_t, std::size_t) {
  for (std::int64_t j = 0; j < *n; ++j)
    for (std::int64_t i = 0; i < *m; ++i) {
      float sum = *beta == 0 ? 0 : c[i + j * *ldc];
      for (std::int64_t t = 0; t < *k; ++t) sum += (*trans == 'T' ? a[t + i * *lda] : a[i + t * *lda]) * b[t + j * *ldb];
      c[i + j * *ldc] = sum;
    }
}

// up = (layer + 1) times the identity, down = the identity, relu: y = (layer + 1) x for x >= 0, exactly. In `striped`
// each owner holds a quarter of the intermediate dimension.
struct Weights {
  std::vector<float> up, down;
  FfnSlice slice;

  Weights(int layer, int owner, bool striped) {
    const std::uint32_t inner = striped ? kHidden / kWorld : kHidden;
    const std::uint32_t begin = striped ? inner * static_cast<std::uint32_t>(owner) : 0;
    up.assign(inner * kHidden, 0);
    down.assign(kHidden * inner, 0);
    for (std::uint32_t i = 0; i < inner; ++i) {
      up[i * kHidden + begin + i] = static_cast<float>(layer + 1);
      down[(begin + i) * inner + i] = 1;
    }
    slice.hidden = kHidden;
    slice.inner = inner;
    slice.activation = Activation::relu;
    slice.up = {reinterpret_cast<const std::byte*>(up.data()), kHidden, false};
    slice.down = {reinterpret_cast<const std::byte*>(down.data()), inner, false};
  }
};

struct Shared {
  bool striped;
  Geometry geometry;
  std::vector<std::unique_ptr<std::byte[]>> memory;
  std::vector<std::byte*> regions;

  explicit Shared(bool striped_) : striped(striped_), geometry(Geometry::make(kWorld, 2, 8, kHidden, 4, 4)) {
    for (int rank = 0; rank < kWorld; ++rank) {
      memory.push_back(std::make_unique<std::byte[]>(geometry.bytes() + kRegionAlignment));
      auto address = reinterpret_cast<std::uintptr_t>(memory.back().get());
      address = (address + kRegionAlignment - 1) / kRegionAlignment * kRegionAlignment;
      regions.push_back(reinterpret_cast<std::byte*>(address));
      Region(regions.back(), geometry).write_header(kPool);
    }
  }
};

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
    std::exit(1);
  }
}

void run_rank(const Shared& shared, int rank, int requests) {
  RequesterOptions options;
  options.rank = rank;
  options.geometry = shared.geometry;
  options.pool_id = kPool;
  options.striped = shared.striped;
  options.regions = shared.regions;
  for (int layer = 0; layer < kLayers; ++layer) options.layers.push_back({kHidden, Dtype::kFloat32, layer % kWorld});
  CpuRequester requester(options);
  std::mt19937 random(static_cast<unsigned>(rank) + 1);
  std::deque<Flight> flights;
  float number = 1;  // up to 2^20, so that times 8 it stays exact
  for (int sent = 0; sent < requests || !flights.empty();) {
    const bool finish = sent == requests || flights.size() == 5 || (!flights.empty() && random() % 3 == 0);
    if (finish) {
      requester.finish(flights.front().ticket, kTimeout);
      check(flights.front());
      flights.pop_front();
      continue;
    }
    Flight flight;
    flight.layer = static_cast<int>(random() % kLayers);
    flight.x.resize((random() % 20) * kHidden);
    for (float& value : flight.x) value = number = number < 1048576 ? number + 1 : 1;
    flight.y.assign(flight.x.size(), -1);
    flights.push_back(std::move(flight));
    Flight& kept = flights.back();
    kept.ticket = requester.submit(kept.layer, reinterpret_cast<const std::byte*>(kept.x.data()),
                                   reinterpret_cast<std::byte*>(kept.y.data()), kept.x.size() / kHidden, kTimeout);
    ++sent;
    if (random() % 64 == 0) std::this_thread::sleep_for(std::chrono::microseconds(random() % 300));
  }
}

// A requester that writes nonsense: the server must not stumble over it, nor the others.
void scribble(const Shared& shared, int victim, int requester, std::atomic<bool>& stop) {
  std::mt19937_64 random(99);
  const Region region(shared.regions[static_cast<std::size_t>(victim)], shared.geometry);
  auto* words = reinterpret_cast<std::uint64_t*>(region.request(static_cast<std::uint32_t>(requester), 0));
  std::uint64_t tail = 0;
  while (!stop.load()) {
    const std::size_t slot = random() % 2 * 16;
    for (std::size_t i = 0; i < 4; ++i) store_relaxed(words + slot + i, i == 0 ? tail + 1 : i == 1 ? kPool : random());
    if (tail < 1000) store_release(&region.tail(static_cast<std::uint32_t>(requester))->sequence, ++tail);
    std::this_thread::sleep_for(std::chrono::microseconds(random() % 100));
  }
}

void run(bool striped, int requests, bool scribbled) {
  const Shared shared(striped);
  const int honest = scribbled ? kWorld - 1 : kWorld;
  std::vector<std::unique_ptr<Weights>> weights;
  std::vector<std::unique_ptr<CpuServer>> servers;
  for (int rank = 0; rank < kWorld; ++rank) {
    ServerOptions options;
    options.rank = rank;
    options.geometry = shared.geometry;
    options.pool_id = kPool;
    options.striped = striped;
    options.regions = shared.regions;
    for (int layer = 0; layer < kLayers; ++layer) {
      weights.push_back(std::make_unique<Weights>(layer, rank, striped));
      options.layers.push_back(striped || layer % kWorld == rank ? weights.back()->slice : FfnSlice{});
    }
    servers.push_back(std::make_unique<CpuServer>(options, std::make_shared<Blas>(&plain_sgemm)));
  }
  std::atomic<bool> stop{false};
  std::vector<std::thread> ranks;
  std::vector<std::thread> scribblers;
  for (int rank = 0; rank < honest; ++rank) ranks.emplace_back(run_rank, std::cref(shared), rank, requests / honest);
  if (scribbled)
    for (int victim = 0; victim < kWorld; ++victim)
      scribblers.emplace_back(scribble, std::cref(shared), victim, kWorld - 1, std::ref(stop));
  for (std::thread& rank : ranks) rank.join();
  stop = true;
  for (std::thread& scribbler : scribblers) scribbler.join();
  std::uint64_t served = 0, fused = 0, refused = 0;
  for (auto& server : servers) {
    server->stop();
    const ServerStats stats = server->stats();
    served += stats.requests;
    fused += stats.fused_batches;
    refused += stats.refused + stats.broken;
  }
  std::printf("cas_stress: %s%s, %llu requests served, %llu batches fused, %llu refused\n", striped ? "striped" : "layer",
              scribbled ? " beside a scribbler" : "", static_cast<unsigned long long>(served),
              static_cast<unsigned long long>(fused), static_cast<unsigned long long>(refused));
  if (scribbled && refused == 0) {
    std::printf("cas_stress: nothing was refused\n");
    std::exit(1);
  }
}

}  // namespace

int main(int argc, char** argv) {
  const int requests = argc > 1 ? std::atoi(argv[1]) : 20000;
  run(false, requests / 2, false);
  run(true, requests / 4, false);
  run(false, requests / 4, true);
  std::printf("cas_stress: ok\n");
  return 0;
}
