// A rank's arena in shared memory, and its view from a peer: the shm transport.
#pragma once

#include <memory>
#include <string>

#include "p2p/arena_words.hpp"
#include "p2p/handle.hpp"
#include "p2p/shm_segment.hpp"

namespace sidp {

struct ArenaSpec {
  int rank = 0;
  int world_size = 1;
  JobToken token;
  std::uint64_t extent_bytes = 0;
  std::uint64_t mailbox_bytes = 0;
};

// Where the areas lie; every offset is a multiple of the page size, big extents of 2 MiB.
struct ArenaLayout {
  std::uint64_t header_bytes = 0;
  ArenaArea extents;
  ArenaArea mailboxes;
  std::uint64_t total_bytes = 0;
};
ArenaLayout arena_layout(std::uint64_t extent_bytes, std::uint64_t mailbox_bytes);

// The owner's arena. The constructor allocates, writes the identity block and publishes phase `created`; the memory is
// zero. Pointers stay valid until close(). Not thread-safe except set_phase, phase and the memory itself.
class ShmArena {
 public:
  explicit ShmArena(const ArenaSpec& spec, ShmKind kind = ShmKind::memfd, const std::string& directory = kShmDirectory);
  ~ShmArena();
  ShmArena(const ShmArena&) = delete;
  ShmArena& operator=(const ShmArena&) = delete;

  const ArenaLayout& layout() const { return layout_; }
  ShmKind kind() const { return segment_.kind(); }
  std::uint8_t* extents() const { return base() + layout_.extents.offset; }
  std::uint8_t* mailboxes() const { return base() + layout_.mailboxes.offset; }
  std::shared_ptr<ArenaHeader> header() const;

  // The record that invites peers; PoolClosedError after unlink().
  std::string handle() const;
  // To be called once every peer has mapped the arena: from then on nothing names it. Idempotent.
  void unlink() { segment_.unpublish(); }

  ArenaPhase phase() const;
  void set_phase(ArenaPhase phase);  // grows only: an earlier phase is ignored; refused in a forked child

  // Announces `closed`, unpublishes, and unmaps as soon as no header() is held. Idempotent. The destructor without
  // close() unmaps too, but announces nothing: the end of this process then counts as a death.
  void close();
  bool closed() const { return region_ == nullptr; }

 private:
  std::uint8_t* base() const;

  ArenaSpec spec_;
  ArenaLayout layout_;
  ForkGuard guard_;
  ShmSegment segment_;
  std::shared_ptr<MappedRegion> region_;
};

// A peer's arena seen here: header and extents read-only, mailboxes writable. Opened once, every field checked.
class PeerMapping {
 public:
  PeerMapping(const std::string& handle, const ArenaExpectation& expected, const std::string& directory = kShmDirectory);

  int rank() const { return handle_.rank; }
  const ProcessIdentity& owner() const { return handle_.owner; }
  std::uint64_t extent_bytes() const { return handle_.extents.bytes; }
  std::uint64_t mailbox_bytes() const { return handle_.mailboxes.bytes; }
  const std::uint8_t* extents() const { return base() + handle_.extents.offset; }
  std::uint8_t* mailboxes() const { return base() + handle_.mailboxes.offset; }
  std::shared_ptr<const ArenaHeader> header() const;
  ArenaPhase phase() const;

  void close();  // unmaps as soon as no header() is held; idempotent
  bool closed() const { return region_ == nullptr; }

 private:
  std::uint8_t* base() const;
  void check_header() const;

  ArenaHandle handle_;
  std::shared_ptr<MappedRegion> region_;
};

}  // namespace sidp
