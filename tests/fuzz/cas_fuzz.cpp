// Whatever a peer writes into a mailbox region: the server and the requester read and write nothing out of bounds, the
// server refuses what is malformed and goes on serving. Build with AddressSanitizer: every region, weight and result is
// an allocation of its own.
//
//   cas_fuzz [inputs] [seed]     random inputs, in any build
//   cas_fuzz_libfuzzer FOLDER    with clang: -DCMAKE_CXX_COMPILER=clang++ -DSIDP_SANITIZE=address -DSIDP_FUZZ=ON
//
// An input is a first byte, which says whom it attacks, and operations of 16 bytes each.
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <random>
#include <string>
#include <thread>

#include "cas_group.hpp"
#include "cas_server/futex.hpp"

using namespace sidp;
using namespace sidp::cas;
using namespace sidp::cas::cpu;
using namespace sidp::cas::cpu::testing;

namespace {

constexpr std::uint32_t kAttacker = 1;
constexpr std::uint32_t kHonest = 2;
constexpr std::size_t kOperation = 16;

struct Seen {
  std::uint64_t requests = 0, refused = 0, broken = 0, answered = 0, faults = 0;
} seen;

void require(bool holds, const char* what) {
  if (holds) return;
  std::fprintf(stderr, "cas_fuzz: %s\n", what);
  std::abort();
}

class Input {
 public:
  Input(const std::uint8_t* data, std::size_t size) : data_(data), left_(size) {}
  std::size_t left() const { return left_; }
  template <typename T>
  T take() {
    T value{};
    const std::size_t count = std::min(sizeof(T), left_);
    std::memcpy(&value, data_, count);
    data_ += count, left_ -= count;
    return value;
  }

 private:
  const std::uint8_t* data_;
  std::size_t left_;
};

// The words go in with atomic stores: what tears is the order between them, as with a real peer.
void store(const Regions& regions, int rank, std::size_t offset, std::uint64_t value) {
  const std::size_t at = offset % (regions.geometry().bytes() / 8) * 8;
  store_release(reinterpret_cast<std::uint64_t*>(regions.address(rank) + at), value);
}

// A record of which some fields are right, so that the checks behind the first are reached too.
void write_record(const Region& region, std::uint32_t requester, std::uint64_t sequence, std::uint64_t noise) {
  RequestRecord record{};
  record.sequence = sequence;
  record.pool_id = kPool;
  record.layer = (noise & 1) != 0 ? static_cast<std::uint32_t>(noise >> 32) : static_cast<std::uint32_t>(noise >> 8) % 8;
  record.rows = (noise & 2) != 0 ? static_cast<std::uint32_t>(noise >> 16) : 1 + static_cast<std::uint32_t>(noise >> 11) % 8;
  record.hidden = (noise & 4) != 0 ? static_cast<std::uint32_t>(noise >> 24) : kHidden;
  record.dtype = (noise & 8) != 0 ? static_cast<std::uint16_t>(noise >> 48) : static_cast<std::uint16_t>(Dtype::kFloat32);
  record.flags = (noise & 16) != 0 ? static_cast<std::uint16_t>(noise >> 40) : std::uint16_t{0};
  std::uint64_t words[sizeof(record) / 8];
  std::memcpy(words, &record, sizeof(record));
  auto* target = reinterpret_cast<std::uint64_t*>(region.request(requester, slot_of(sequence, 2)));
  for (std::size_t i = 0; i < sizeof(record) / 8; ++i) store_relaxed(target + i, words[i]);
}

// Right or refused, but within the deadline and never half.
void ask(CpuRequester& requester, bool must_be_right) {
  std::vector<float> x(11 * kHidden), y(x.size(), -1);
  for (std::size_t i = 0; i < x.size(); ++i) x[i] = static_cast<float>(i);
  try {
    const auto ticket = requester.submit(4, reinterpret_cast<const std::byte*>(x.data()), reinterpret_cast<std::byte*>(y.data()),
                                         11, must_be_right ? 20 : 0.05);
    requester.finish(ticket, must_be_right ? 20 : 0.05);
  } catch (const Error&) {
    require(!must_be_right, "an honest requester was refused or not answered");
    ++seen.faults;
    return;
  }
  for (std::size_t i = 0; must_be_right && i < x.size(); ++i)
    require(y[i] == x[i] * 5, "an honest requester got a wrong result");
  ++seen.answered;
}

// Rank 1 writes into its own lines of rank 0's region (`anywhere`: into all of the region), as tail, record or raw word.
void attack_server(Input& input, bool anywhere) {
  const Regions regions(false, Regions::Between::threads);
  Owner owner(regions, 0);
  CpuRequester honest(regions.requester_options(kHonest));
  const Region region = regions.region(0);
  const Geometry& geometry = regions.geometry();
  std::uint64_t tail = 0;
  while (input.left() >= kOperation) {
    const auto what = input.take<std::uint32_t>();
    const auto where = input.take<std::uint32_t>();
    const auto value = input.take<std::uint64_t>();
    if (what % 8 == 0) {  // mostly the next number, since the first impossible one is the last that is read
      tail = (where & 15) == 0 ? value : tail + 1;
      store_release(&region.tail(kAttacker)->sequence, tail);
      ring_bell(&region.doorbell()->bell, &region.doorbell()->sleeping);
    } else if (what % 8 < 5) {
      write_record(region, kAttacker, tail + 1 + (where & 1), value);
    } else if (anywhere) {
      store(regions, 0, where, value);
    } else {
      const std::size_t record = geometry.request(kAttacker, 0) + where % (2 * kLine / 8) * 8;
      const std::size_t row = geometry.request_rows(kAttacker, 0) + where % (2 * 8 * geometry.row_bytes / 8) * 8;
      store(regions, 0, (what % 8 == 5 ? record : row) / 8, value);
    }
    if ((what & 256) != 0) std::this_thread::yield();
  }
  ask(honest, !anywhere);
  owner.server().stop();
  const ServerStats stats = owner.server().stats();
  seen.requests += stats.requests, seen.refused += stats.refused, seen.broken += stats.broken;
}

// An owner that answers nonsense: rank 0 has no server, the input is what it writes into the requester's region.
void attack_requester(Input& input) {
  const Regions regions(false, Regions::Between::threads);
  CpuRequester requester(regions.requester_options(kHonest));
  const Region region = regions.region(kHonest);
  std::thread owner([&] {
    std::uint64_t sequence = 1;
    while (input.left() >= kOperation) {
      const auto what = input.take<std::uint32_t>();
      const auto where = input.take<std::uint32_t>();
      const auto value = input.take<std::uint64_t>();
      ReplyRecord* reply = region.reply(0, slot_of(sequence, 2));
      if (what % 4 == 0) {
        store(regions, kHonest, where, value);
      } else {
        store_relaxed(&reply->status, what % 4 == 1 ? 0 : static_cast<std::uint32_t>(value));
        store_relaxed(&reply->rows, what % 4 == 3 ? where : sequence == 1 ? 8 : 3);
        store_release(&reply->sequence, (where & 7) == 0 ? value : sequence);
        ring_bell(&region.doorbell()->reply_bell, &region.doorbell()->waiting);
        ++sequence;
      }
    }
  });
  ask(requester, false);
  owner.join();
}

// A header that says anything: the requester takes the one of its own pool and no other.
void attack_header(Input& input) {
  const Regions regions(false, Regions::Between::threads);
  bool changed = false;
  while (input.left() >= kOperation) {
    const auto where = input.take<std::uint64_t>() % 5;
    const auto value = input.take<std::uint64_t>();
    auto* word = reinterpret_cast<std::uint64_t*>(regions.address(0)) + where;
    changed = changed || value != *word;
    *word = value;
  }
  try {
    CpuRequester requester(regions.requester_options(kHonest));
    require(!changed, "a strange header was taken");
  } catch (const LayoutError&) {
    require(changed, "the pool's own header was refused");
    ++seen.faults;
  }
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  Input input(data, size);
  switch (input.take<std::uint8_t>() % 4) {
    case 0: attack_server(input, false); break;
    case 1: attack_server(input, true); break;
    case 2: attack_requester(input); break;
    default: attack_header(input);
  }
  return 0;
}

#ifndef SIDP_LIBFUZZER
int main(int argc, char** argv) {
  const int inputs = argc > 1 ? std::atoi(argv[1]) : 1000;
  std::mt19937_64 random(argc > 2 ? std::strtoull(argv[2], nullptr, 0) : std::random_device{}());
  std::vector<std::uint8_t> input;
  for (int i = 0; i < inputs; ++i) {
    input.resize(1 + random() % 64 * kOperation);
    for (std::uint8_t& byte : input) byte = static_cast<std::uint8_t>(random());
    input[0] = static_cast<std::uint8_t>(i % 8 == 3 ? 3 : i % 8 < 2 ? 2 : i % 2);
    LLVMFuzzerTestOneInput(input.data(), input.size());
  }
  std::printf("cas_fuzz: %d inputs: %llu requests computed, %llu refused, %llu mailboxes broken, %llu honest answers, "
              "%llu clean errors\n",
              inputs, static_cast<unsigned long long>(seen.requests), static_cast<unsigned long long>(seen.refused),
              static_cast<unsigned long long>(seen.broken), static_cast<unsigned long long>(seen.answered),
              static_cast<unsigned long long>(seen.faults));
  require(seen.refused > 0 && seen.broken > 0 && seen.answered > 0 && seen.faults > 0, "nothing was refused");
  std::printf("cas_fuzz: ok\n");
  return 0;
}
#endif
