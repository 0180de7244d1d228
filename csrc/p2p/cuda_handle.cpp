#include "p2p/cuda_handle.hpp"

#include <algorithm>
#include <cstddef>
#include <cstdio>
#include <cstring>

#include "error.hpp"
#include "p2p/record.hpp"

namespace sidp {
namespace {

constexpr char kMagic[8] = {'S', 'I', 'D', 'P', 'C', 'U', 'D', 'A'};
constexpr std::uint32_t kVersion = 3;
constexpr std::uint64_t kPage = 2ull << 20;
constexpr std::uint64_t kMostPadding = 1ull << 30;  // of a driver's pages, far above any that exists

struct Record {
  char magic[8];
  std::uint32_t version;
  std::uint32_t uid;
  std::int32_t rank;
  std::int32_t world_size;
  std::uint64_t token[2];
  std::uint64_t total_bytes;
  std::uint64_t extent_bytes;
  std::uint64_t probe_offset;
  std::uint64_t probe_seed;
  std::int64_t pid;
  std::uint64_t start_time;
  std::uint64_t pid_namespace;
  char boot_id[kBootIdBytes];
  std::uint8_t device[16];
  std::uint8_t ipc[kIpcHandleBytes];
  std::uint64_t mapped_bytes;
  std::uint32_t kind;
  char reserved[44];
  std::uint64_t checksum;  // of everything before it
};
static_assert(sizeof(Record) == kCudaHandleBytes, "the record's layout is shared between processes");

}  // namespace

DeviceMemoryKind device_memory_kind(const std::string& name) {
  SIDP_REQUIRE(name == "ipc" || name == "vmm", ConfigError, "device memory kind must be 'ipc' or 'vmm', got '", name, "'");
  return name == "ipc" ? DeviceMemoryKind::ipc : DeviceMemoryKind::vmm;
}

std::string uuid_text(const DeviceUuid& uuid) {
  std::string text = "GPU-";
  char digits[3];
  for (std::size_t i = 0; i < uuid.size(); ++i) {
    if (i == 4 || i == 6 || i == 8 || i == 10) text += '-';
    std::snprintf(digits, sizeof(digits), "%02x", uuid[i]);
    text += digits;
  }
  return text;
}

// splitmix64
std::uint64_t probe_word(std::uint64_t seed, std::uint64_t i) {
  std::uint64_t z = seed + (i + 1) * 0x9e3779b97f4a7c15ull;
  z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9ull;
  z = (z ^ (z >> 27)) * 0x94d049bb133111ebull;
  return z ^ (z >> 31);
}

std::uint64_t cuda_probe_offset(std::uint64_t extent_bytes) { return (extent_bytes + kProbeBytes - 1) / kProbeBytes * kProbeBytes; }

std::uint64_t cuda_turns_offset(std::uint64_t extent_bytes) { return cuda_probe_offset(extent_bytes) + kProbeBytes; }

std::uint64_t cuda_total_bytes(std::uint64_t extent_bytes) {
  return (cuda_turns_offset(extent_bytes) + kTurnBytes + kPage - 1) / kPage * kPage;
}

std::string encode_cuda_handle(const CudaHandle& handle) {
  Record record{};
  std::memcpy(record.magic, kMagic, sizeof(kMagic));
  record.version = kVersion;
  record.kind = static_cast<std::uint32_t>(handle.kind);
  record.mapped_bytes = handle.mapped_bytes;
  record.uid = handle.owner.uid;
  record.rank = handle.rank;
  record.world_size = handle.world_size;
  record.token[0] = handle.token.high;
  record.token[1] = handle.token.low;
  record.total_bytes = handle.total_bytes;
  record.extent_bytes = handle.extent_bytes;
  record.probe_offset = handle.probe_offset;
  record.probe_seed = handle.probe_seed;
  record.pid = handle.owner.pid;
  record.start_time = handle.owner.start_time;
  record.pid_namespace = handle.owner.pid_namespace;
  std::memcpy(record.boot_id, handle.owner.boot_id.data(), std::min(kBootIdBytes, handle.owner.boot_id.size()));
  std::memcpy(record.device, handle.device.data(), handle.device.size());
  std::memcpy(record.ipc, handle.ipc.data(), handle.ipc.size());
  record.checksum = checksum_of(record);
  return std::string(reinterpret_cast<const char*>(&record), sizeof(record));
}

CudaHandle decode_cuda_handle(const std::string& bytes, const ArenaExpectation& expected, DeviceMemoryKind kind) {
  SIDP_REQUIRE(bytes.size() == kCudaHandleBytes, LayoutError, "device arena handle has ", bytes.size(), " bytes, expected ",
               kCudaHandleBytes, ": it was cut short or comes from another version of sidp");
  Record record;
  std::memcpy(&record, bytes.data(), sizeof(record));
  const auto require = [&](bool holds, const char* field, auto got, auto wanted) {
    SIDP_REQUIRE(holds, LayoutError, "device arena handle of rank ", expected.rank, ": ", field, " is ", got, ", expected ", wanted);
  };
  SIDP_REQUIRE(std::memcmp(record.magic, kMagic, sizeof(kMagic)) == 0, LayoutError,
               "device arena handle of rank ", expected.rank, " does not begin with its magic");
  require(record.version == kVersion, "version", record.version, kVersion);
  require(record.checksum == checksum_of(record), "checksum", record.checksum, checksum_of(record));
  require(record.kind == static_cast<std::uint32_t>(kind), "kind", record.kind, static_cast<std::uint32_t>(kind));
  require(record.rank == expected.rank, "rank", record.rank, expected.rank);
  require(record.world_size == expected.world_size, "world size", record.world_size, expected.world_size);
  const JobToken token{record.token[0], record.token[1]};
  require(token == expected.token, "job token", "another job's", "this job's");
  require(record.extent_bytes == expected.extent_bytes, "size of the extents", record.extent_bytes, expected.extent_bytes);
  require(record.probe_offset == cuda_probe_offset(record.extent_bytes), "offset of the probe page", record.probe_offset,
          cuda_probe_offset(record.extent_bytes));
  require(record.total_bytes == cuda_total_bytes(record.extent_bytes), "size", record.total_bytes,
          cuda_total_bytes(record.extent_bytes));
  require(record.mapped_bytes >= record.total_bytes && record.mapped_bytes - record.total_bytes < kMostPadding, "size of the allocation",
          record.mapped_bytes, record.total_bytes);
  const ProcessIdentity& self = ProcessIdentity::current();
  require(record.uid == self.uid, "user id", record.uid, self.uid);
  const std::string boot_id(record.boot_id, ::strnlen(record.boot_id, kBootIdBytes));
  require(boot_id == self.boot_id, "host", boot_id, self.boot_id);
  const bool own = record.pid == self.pid && record.pid_namespace == self.pid_namespace;
  require(record.pid > 0 && !(own && kind == DeviceMemoryKind::ipc), "process", record.pid,
          "another one: a process cannot map its own device memory");
  CudaHandle handle;
  handle.kind = kind;
  handle.mapped_bytes = record.mapped_bytes;
  handle.rank = record.rank;
  handle.world_size = record.world_size;
  handle.token = token;
  handle.total_bytes = record.total_bytes;
  handle.extent_bytes = record.extent_bytes;
  handle.probe_offset = record.probe_offset;
  handle.probe_seed = record.probe_seed;
  handle.owner = {record.pid, record.start_time, boot_id, record.pid_namespace, record.uid};
  std::memcpy(handle.device.data(), record.device, handle.device.size());
  std::memcpy(handle.ipc.data(), record.ipc, handle.ipc.size());
  return handle;
}

}  // namespace sidp
