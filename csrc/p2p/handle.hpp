// The record by which a rank invites its peers to map its arena. It travels over the control plane as plain bytes.
#pragma once

#include <cstdint>
#include <string>

#include "p2p/arena_words.hpp"
#include "p2p/process.hpp"

namespace sidp {

// How the memory is found. `memfd` has no name anywhere: a peer opens /proc/<pid>/fd/<fd>, which the kernel allows to
// the same user only, and nothing can be left behind. `named` is a file in /dev/shm, for where that is refused.
enum class ShmKind : std::uint32_t { memfd = 1, named = 2 };

ShmKind shm_kind(const std::string& name);  // "memfd" or "named"; ConfigError otherwise
const char* shm_kind_name(ShmKind kind);

struct ArenaHandle {
  ShmKind kind = ShmKind::memfd;
  std::int32_t rank = 0;
  std::int32_t world_size = 0;
  JobToken token;
  std::uint64_t total_bytes = 0;
  ArenaArea extents;
  ArenaArea mailboxes;
  ProcessIdentity owner;
  std::int32_t fd = -1;      // memfd: the owner's descriptor
  std::uint64_t device = 0;  // st_dev and st_ino: the very object, whatever the descriptor means by now
  std::uint64_t inode = 0;
  std::string name;          // named: file name without directory
};

// What a peer knows about a handle before it has read it.
struct ArenaExpectation {
  int rank = 0;
  int world_size = 0;
  JobToken token;
  std::uint64_t extent_bytes = 0;
  std::uint64_t mailbox_bytes = 0;
};

constexpr std::size_t kHandleBytes = 320;

// Exactly kHandleBytes, fixed layout, with a checksum.
std::string encode_handle(const ArenaHandle& handle);

// LayoutError saying what is wrong with the record: length, magic, version, checksum, kind, name, numbers out of bounds.
ArenaHandle decode_handle(const std::string& record);

// LayoutError naming the first field that is not as expected; also another user, another host.
void check_handle(const ArenaHandle& handle, const ArenaExpectation& expected);

}  // namespace sidp
