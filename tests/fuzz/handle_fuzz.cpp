// What a peer says of its memory: arena handles, device handles and arena headers. Whatever their bytes are, they are
// refused with a LayoutError or they are what was expected; nothing else is thrown, read or mapped.
//
//   handle_fuzz [inputs] [seed] [corpus folder]          random inputs, in any build; writes the corpus where one is named
//   handle_fuzz_libfuzzer tests/fuzz/corpus/handles      with clang: -DSIDP_SANITIZE=address -DSIDP_FUZZ=ON
//
// The first byte of an input says what the others are: 0 an arena handle, 1 a device handle, 2 the header of an arena. In
// handles the checksum is mended, since it keeps nobody out: what counts is the check of every field.
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <random>
#include <string>
#include <vector>

#include "error.hpp"
#include "p2p/cuda_handle.hpp"
#include "p2p/shm_arena.hpp"

using namespace sidp;

namespace {

constexpr std::uint64_t kExtents = 5000, kMailboxes = 100;
const ArenaExpectation kExpected{1, 4, {0x0123456789abcdef, 42}, kExtents, kMailboxes};

struct Seen {
  std::uint64_t refused = 0, accepted = 0;
} seen;

void require(bool holds, const char* what) {
  if (holds) return;
  std::fprintf(stderr, "handle_fuzz: %s\n", what);
  std::abort();
}

template <typename Function>
void may_refuse(Function function) {
  try {
    function();
    ++seen.accepted;
  } catch (const LayoutError& error) {
    require(std::strlen(error.what()) > 20, "a refusal without a reason");
    ++seen.refused;
  }
}

// FNV-1a of all but the last eight bytes, which hold it.
void mend_checksum(std::string& record) {
  if (record.size() < 8) return;
  std::uint64_t hash = 0xcbf29ce484222325ull;
  for (std::size_t i = 0; i + 8 < record.size(); ++i) hash = (hash ^ static_cast<unsigned char>(record[i])) * 0x100000001b3ull;
  std::memcpy(&record[record.size() - 8], &hash, 8);
}

void try_arena_handle(std::string record) {
  mend_checksum(record);
  may_refuse([&] {
    const ArenaHandle handle = decode_handle(record);
    require(handle.extents.offset + handle.extents.bytes <= handle.total_bytes, "extents outside of the arena");
    require(handle.mailboxes.offset + handle.mailboxes.bytes <= handle.total_bytes, "mailboxes outside of the arena");
    require(handle.kind != ShmKind::named || handle.name.find('/') == std::string::npos, "a name that leads elsewhere");
    check_handle(handle, kExpected);
    require(handle.rank == kExpected.rank && handle.token == kExpected.token, "another rank's handle was taken");
    require(handle.extents.bytes == kExtents && handle.mailboxes.bytes == kMailboxes, "other sizes were taken");
  });
}

void try_device_handle(std::string record) {
  mend_checksum(record);
  may_refuse([&] {
    const CudaHandle handle = decode_cuda_handle(record, kExpected, DeviceMemoryKind::ipc);
    require(handle.total_bytes == cuda_total_bytes(kExtents) && handle.extent_bytes == kExtents, "other sizes were taken");
    require(handle.rank == kExpected.rank && handle.token == kExpected.token, "another rank's handle was taken");
  });
}

ShmArena& own_arena() {
  static ShmArena arena({kExpected.rank, kExpected.world_size, kExpected.token, kExtents, kMailboxes});
  return arena;
}

void try_header(const std::string& bytes) {
  static const std::string good(reinterpret_cast<const char*>(own_arena().header().get()), sizeof(ArenaHeader));
  static const std::string handle = own_arena().handle();
  const auto header = own_arena().header();
  std::memcpy(header.get(), bytes.data(), std::min(bytes.size(), sizeof(ArenaHeader)));
  may_refuse([&] {
    PeerMapping mapping(handle, kExpected);
    require(mapping.extent_bytes() == kExtents, "other sizes were taken");
    require(mapping.phase() >= ArenaPhase::created && mapping.phase() <= ArenaPhase::failed, "a phase that does not exist");
    require(mapping.extents()[kExtents - 1] == 0, "the extents are elsewhere");
  });
  std::memcpy(header.get(), good.data(), good.size());
}

void run(const std::uint8_t* data, std::size_t size) {
  if (size == 0) return;
  const std::string rest(reinterpret_cast<const char*>(data + 1), size - 1);
  switch (data[0] % 3) {
    case 0: return try_arena_handle(rest);
    case 1: return try_device_handle(rest);
    default: return try_header(rest);
  }
}

std::string good_device_handle() {
  CudaHandle handle;
  handle.rank = kExpected.rank;
  handle.world_size = kExpected.world_size;
  handle.token = kExpected.token;
  handle.total_bytes = cuda_total_bytes(kExtents);
  handle.mapped_bytes = handle.total_bytes;
  handle.extent_bytes = kExtents;
  handle.probe_offset = cuda_probe_offset(kExtents);
  handle.owner = ProcessIdentity::current();
  handle.owner.pid += 1;
  return encode_cuda_handle(handle);
}

std::vector<std::string> good_inputs() {
  std::vector<std::string> inputs{std::string(1, '\0') + own_arena().handle(), std::string(1, '\1') + good_device_handle()};
  inputs.push_back(std::string(1, '\2') +
                   std::string(reinterpret_cast<const char*>(own_arena().header().get()), sizeof(ArenaHeader)));
  return inputs;
}

}  // namespace

#ifdef SIDP_LIBFUZZER

// The corpus on disk names another boot and another process; what is good here and now is mixed in.
extern "C" std::size_t LLVMFuzzerMutate(std::uint8_t*, std::size_t, std::size_t);
extern "C" std::size_t LLVMFuzzerCustomMutator(std::uint8_t* data, std::size_t size, std::size_t most, unsigned seed) {
  static const std::vector<std::string> good = good_inputs();
  if (seed % 16 == 0) {
    const std::string& fresh = good[seed / 16 % good.size()];
    size = std::min(most, fresh.size());
    std::memcpy(data, fresh.data(), size);
  }
  return LLVMFuzzerMutate(data, size, most);
}

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  run(data, size);
  return 0;
}

#else

int main(int argc, char** argv) {
  const long inputs = argc > 1 ? std::atol(argv[1]) : 20000;
  std::mt19937_64 random(argc > 2 ? std::strtoull(argv[2], nullptr, 10) : 1);
  const std::vector<std::string> good = good_inputs();
  for (std::size_t i = 0; i < good.size(); ++i) {
    run(reinterpret_cast<const std::uint8_t*>(good[i].data()), good[i].size());
    if (argc > 3) std::ofstream(std::string(argv[3]) + "/good-" + std::to_string(i), std::ios::binary) << good[i];
  }
  require(seen.accepted == good.size(), "a good record was refused");
  for (long n = 0; n < inputs; ++n) {
    std::string input = good[random() % good.size()];
    for (std::uint64_t changes = 1 + random() % 4; changes > 0; --changes) {
      const std::size_t at = 1 + random() % (input.size() - 1);
      static const std::uint64_t telling[] = {0, 1, 0x7f, 0x80, 0xff, 0xffffffff, ~0ull, 1ull << 63};
      const std::uint64_t value = random() % 2 ? random() : telling[random() % 8];
      std::memcpy(&input[at], &value, std::min<std::size_t>(1ull << random() % 4, input.size() - at));
    }
    if (random() % 16 == 0) input.resize(random() % input.size());
    run(reinterpret_cast<const std::uint8_t*>(input.data()), input.size());
  }
  require(seen.refused > static_cast<std::uint64_t>(inputs) / 2, "hardly anything was refused");
  std::printf("handle_fuzz: ok (%llu refused, %llu accepted)\n", static_cast<unsigned long long>(seen.refused),
              static_cast<unsigned long long>(seen.accepted));
  return 0;
}

#endif
