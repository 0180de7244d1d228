#include "p2p/handle.hpp"

#include <cctype>
#include <cstddef>
#include <cstring>

#include "error.hpp"
#include "p2p/record.hpp"

namespace sidp {
namespace {

constexpr char kMagic[8] = {'S', 'I', 'D', 'P', 'H', 'N', 'D', 'L'};
constexpr std::uint32_t kVersion = 1;
constexpr std::size_t kNameBytes = 112;

struct Record {
  char magic[8];
  std::uint32_t version;
  std::uint32_t kind;
  std::int32_t rank;
  std::int32_t world_size;
  std::uint64_t token[2];
  std::uint64_t total_bytes;
  ArenaArea extents;
  ArenaArea mailboxes;
  std::int64_t pid;
  std::uint64_t start_time;
  std::uint64_t pid_namespace;
  std::uint32_t uid;
  std::int32_t fd;
  std::uint64_t device;
  std::uint64_t inode;
  char boot_id[kBootIdBytes];
  char name[kNameBytes];
  char reserved[40];
  std::uint64_t checksum;  // of everything before it
};
static_assert(sizeof(Record) == kHandleBytes, "the record's layout is shared between processes");

bool plain_name(const std::string& name) {
  for (unsigned char c : name)
    if (!std::isalnum(c) && c != '.' && c != '-' && c != '_') return false;
  return name.rfind("sidp.", 0) == 0;
}

bool inside(const ArenaArea& area, std::uint64_t total_bytes) {
  return area.offset <= total_bytes && area.bytes <= total_bytes - area.offset;
}

std::string text_of(const char* field, std::size_t capacity) { return std::string(field, ::strnlen(field, capacity)); }

}  // namespace

ShmKind shm_kind(const std::string& name) {
  SIDP_REQUIRE(name == "memfd" || name == "named", ConfigError, "shared memory kind must be 'memfd' or 'named', got '", name,
               "'");
  return name == "memfd" ? ShmKind::memfd : ShmKind::named;
}

const char* shm_kind_name(ShmKind kind) { return kind == ShmKind::memfd ? "memfd" : "named"; }

std::string encode_handle(const ArenaHandle& handle) {
  SIDP_ASSERT(handle.name.size() < kNameBytes && handle.owner.boot_id.size() == kBootIdBytes, "name '", handle.name, "'");
  Record record{};
  std::memcpy(record.magic, kMagic, sizeof(kMagic));
  record.version = kVersion;
  record.kind = static_cast<std::uint32_t>(handle.kind);
  record.rank = handle.rank;
  record.world_size = handle.world_size;
  record.token[0] = handle.token.high;
  record.token[1] = handle.token.low;
  record.total_bytes = handle.total_bytes;
  record.extents = handle.extents;
  record.mailboxes = handle.mailboxes;
  record.pid = handle.owner.pid;
  record.start_time = handle.owner.start_time;
  record.pid_namespace = handle.owner.pid_namespace;
  record.uid = handle.owner.uid;
  record.fd = handle.fd;
  record.device = handle.device;
  record.inode = handle.inode;
  std::memcpy(record.boot_id, handle.owner.boot_id.data(), kBootIdBytes);
  std::memcpy(record.name, handle.name.data(), handle.name.size());
  record.checksum = checksum_of(record);
  return std::string(reinterpret_cast<const char*>(&record), sizeof(record));
}

ArenaHandle decode_handle(const std::string& bytes) {
  SIDP_REQUIRE(bytes.size() == kHandleBytes, LayoutError, "arena handle has ", bytes.size(), " bytes, expected ", kHandleBytes,
               ": it was cut short or comes from another version of sidp");
  Record record;
  std::memcpy(&record, bytes.data(), sizeof(record));
  SIDP_REQUIRE(std::memcmp(record.magic, kMagic, sizeof(kMagic)) == 0, LayoutError,
               "arena handle does not begin with the magic of a sidp handle");
  SIDP_REQUIRE(record.version == kVersion, LayoutError, "arena handle has version ", record.version, ", expected ", kVersion,
               ": install the same sidp for every rank");
  SIDP_REQUIRE(record.checksum == checksum_of(record), LayoutError, "arena handle is damaged: its checksum does not match");
  ArenaHandle handle;
  handle.kind = static_cast<ShmKind>(record.kind);
  SIDP_REQUIRE(handle.kind == ShmKind::memfd || handle.kind == ShmKind::named, LayoutError, "arena handle has transport kind ",
               record.kind, ", expected 1 (memfd) or 2 (named)");
  handle.rank = record.rank;
  handle.world_size = record.world_size;
  handle.token = {record.token[0], record.token[1]};
  handle.total_bytes = record.total_bytes;
  handle.extents = record.extents;
  handle.mailboxes = record.mailboxes;
  SIDP_REQUIRE(inside(handle.extents, handle.total_bytes) && inside(handle.mailboxes, handle.total_bytes), LayoutError,
               "arena handle of rank ", record.rank, " has areas outside its ", handle.total_bytes, " bytes");
  handle.owner.pid = record.pid;
  handle.owner.start_time = record.start_time;
  handle.owner.pid_namespace = record.pid_namespace;
  handle.owner.uid = record.uid;
  handle.owner.boot_id = text_of(record.boot_id, kBootIdBytes);
  handle.fd = record.fd;
  handle.device = record.device;
  handle.inode = record.inode;
  handle.name = text_of(record.name, kNameBytes);
  SIDP_REQUIRE(record.pid > 0 && (handle.kind != ShmKind::memfd || record.fd >= 0), LayoutError, "arena handle of rank ",
               record.rank, " has pid ", record.pid, " and descriptor ", record.fd);
  SIDP_REQUIRE(handle.kind != ShmKind::named || plain_name(handle.name), LayoutError, "arena handle of rank ", record.rank,
               " has the name '", handle.name, "', expected 'sidp.' followed by letters, digits, '.', '-' or '_'");
  return handle;
}

void check_handle(const ArenaHandle& handle, const ArenaExpectation& expected) {
  const ProcessIdentity& self = ProcessIdentity::current();
  const auto wrong = [&](const char* field, auto got, auto wanted, const char* mend) {
    throw LayoutError(detail::concat("arena handle of rank ", expected.rank, ": ", field, " is ", got, ", expected ", wanted, mend));
  };
  if (handle.rank != expected.rank) wrong("rank", handle.rank, expected.rank, "");
  if (handle.world_size != expected.world_size) wrong("world size", handle.world_size, expected.world_size, "");
  if (handle.token != expected.token) wrong("job token", "another job's", "this job's", "");
  if (handle.extents.bytes != expected.extent_bytes)
    wrong("size of the extents", handle.extents.bytes, expected.extent_bytes, ": ranks disagree on the placement");
  if (handle.mailboxes.bytes != expected.mailbox_bytes)
    wrong("size of the mailboxes", handle.mailboxes.bytes, expected.mailbox_bytes, ": ranks disagree on the mailboxes");
  if (handle.owner.uid != self.uid)
    wrong("user id", handle.owner.uid, self.uid, ": run all ranks of a group as the same user");
  if (handle.owner.boot_id != self.boot_id)
    wrong("host", handle.owner.boot_id, self.boot_id, ": a pool spans one host; pass a group of ranks on this host");
}

}  // namespace sidp
