// The ring under stress, for ThreadSanitizer and AddressSanitizer: ranks as threads of one process, each with a copy
// thread, random delays, uses in and out of order, nested uses; every byte of every use is checked.
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <random>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>

#include "error.hpp"
#include "ffn_cache/ring.hpp"

namespace {

using sidp::Placement;
using sidp::PlacementKind;
using sidp::cache::Ring;
using sidp::cache::RingOptions;
using sidp::cache::Source;

constexpr int kLayers = 11;

void expect(bool condition, const std::string& what) {
  if (!condition) throw std::runtime_error(what);
}

Placement make_placement(PlacementKind kind, int world) {
  std::vector<sidp::UnitLayout> units;
  for (std::uint64_t layer = 0; layer < kLayers; ++layer) {
    const std::uint64_t inner = 16 + 3 * layer;
    units.push_back(sidp::UnitLayout({{"up", inner, 12, 4, sidp::Split::rows}, {"down", 12, inner, 4, sidp::Split::cols}}));
  }
  return Placement(kind, units, world, 0);
}

// The value that element (row, col) of a tensor must have wherever it lies.
std::uint32_t mark(int layer, std::size_t tensor, std::uint64_t row, std::uint64_t col) {
  return static_cast<std::uint32_t>(((layer * 2 + tensor + 1) * 1000003u) ^ (row * 7919u + col));
}

std::vector<std::byte> make_arena(const Placement& placement, int rank) {
  std::vector<std::byte> arena(placement.arena_bytes(rank));
  for (int layer = 0; layer < kLayers; ++layer) {
    const sidp::Extent& extent = placement.share(layer, rank);
    for (const sidp::Piece& piece : extent.pieces) {
      std::byte* at = arena.data() + extent.offset + piece.offset;
      for (std::uint64_t r = 0; r < piece.rows; ++r)
        for (std::uint64_t c = 0; c < piece.cols; ++c, at += 4) {
          const std::uint32_t value = mark(layer, piece.tensor, piece.row + r, piece.col + c);
          std::memcpy(at, &value, 4);
        }
    }
  }
  return arena;
}

void check_slot(const Placement& placement, int layer, const std::byte* slot) {
  const sidp::UnitLayout& unit = placement.unit(layer);
  for (std::size_t t = 0; t < unit.tensors().size(); ++t) {
    const sidp::TensorLayout& tensor = unit.tensor(t);
    const std::byte* at = slot + tensor.offset;
    for (std::uint64_t r = 0; r < tensor.rows; ++r)
      for (std::uint64_t c = 0; c < tensor.cols; ++c, at += 4) {
        std::uint32_t value;
        std::memcpy(&value, at, 4);
        expect(value == mark(layer, t, r, c), "wrong bytes in layer " + std::to_string(layer));
      }
  }
}

void use(Ring& ring, const Placement& placement, int layer, std::mt19937& random) {
  ring.acquire(layer, 20.0);
  const int index = ring.schedule().remote_index(layer);
  if (index >= 0) check_slot(placement, layer, ring.slot_address(ring.schedule().slot(index)));
  if (random() % 64 == 0) std::this_thread::sleep_for(std::chrono::microseconds(random() % 200));
  ring.release(layer);
}

void run_rank(const Placement& placement, int rank, const std::vector<Source>& sources, int slots, int uses) {
  std::mt19937 random(rank * 977 + slots);
  RingOptions options;
  options.slots = slots;
  options.poison = true;
  Ring ring(placement, rank, sources, nullptr, options);
  int layer = 0;
  for (int i = 0; i < uses; ++i) {
    use(ring, placement, layer, random);
    layer = random() % 16 == 0 ? static_cast<int>(random() % kLayers) : (layer + 1) % kLayers;
  }
  expect(ring.stats().fetches > 0, "nothing was fetched");
}

void stress(PlacementKind kind, int world, int slots, int uses) {
  const Placement placement = make_placement(kind, world);
  std::vector<std::vector<std::byte>> arenas;
  std::vector<Source> sources;
  for (int rank = 0; rank < world; ++rank) arenas.push_back(make_arena(placement, rank));
  for (int rank = 0; rank < world; ++rank) sources.push_back({arenas[rank].data(), nullptr});
  std::vector<std::thread> ranks;
  std::vector<std::string> errors(world);
  for (int rank = 0; rank < world; ++rank)
    ranks.emplace_back([&, rank] {
      try {
        run_rank(placement, rank, sources, slots, uses);
      } catch (const std::exception& error) {
        errors[rank] = error.what();
      }
    });
  for (std::thread& rank : ranks) rank.join();
  for (const std::string& error : errors) expect(error.empty(), error);
}

// A ring that is stopped, or whose peer dies, while a use waits: the wait ends with the right error, nothing hangs.
void end_while_waiting(bool by_death) {
  const Placement placement = make_placement(PlacementKind::layer, 2);
  std::vector<std::vector<std::byte>> arenas = {make_arena(placement, 0), make_arena(placement, 1)};
  std::atomic<int> dead{-1};
  RingOptions options;
  options.limits.link = 100.0;  // bytes a second: nothing ever arrives
  Ring ring(placement, 0, {{arenas[0].data(), nullptr}, {arenas[1].data(), nullptr}}, &dead, options);
  std::string seen = "nothing";
  std::thread user([&] {
    try {
      ring.acquire(ring.schedule().layer(0), 20.0);
    } catch (const sidp::PeerError& error) {
      seen = "peer " + std::to_string(error.rank());
    } catch (const sidp::PoolClosedError&) {
      seen = "closed";
    }
  });
  std::this_thread::sleep_for(std::chrono::milliseconds(50));
  if (by_death) {
    dead.store(1);
    user.join();
    ring.stop();
  } else {
    ring.stop();
    user.join();
  }
  expect(seen == (by_death ? "peer 1" : "closed"), "a waiting use saw: " + seen);
}

}  // namespace

int main(int argc, char** argv) {
  const int uses = argc > 1 ? std::atoi(argv[1]) : 2000;
  try {
    for (int world : {2, 3, 4})
      for (int slots : {1, 2, 3, 5})
        for (PlacementKind kind : {PlacementKind::layer, PlacementKind::striped}) stress(kind, world, slots, uses);
    end_while_waiting(true);
    end_while_waiting(false);
  } catch (const std::exception& error) {
    std::fprintf(stderr, "ring_stress: %s\n", error.what());
    return 1;
  }
  std::puts("ring_stress: ok");
  return 0;
}
