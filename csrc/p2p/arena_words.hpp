// The header of every arena: the words by which ranks recognise each other's memory and see each other's state.
// This file is the contract between processes (and, later, kernels): plain words at fixed offsets, no behaviour.
//
// One word, one writer. The owner of an arena writes its header; peers only read it (they map the page read-only).
//   identity block   written once, before the handle is published; never changes
//   phase            the owner's pool; only grows (store_release after what it announces, load_acquire before)
//   activity         the owner's ring: counts uses of remote layers, so that a peer that has finished sees work going on
//   heartbeat        the owner's watcher thread, about every 100 ms; a change means "runs", nothing else
// After the header page come the areas, each starting on a page of its own:
//   extents          the owner writes them while loading, before phase committed; peers read them after it
//   mailboxes        requesters write their own mailbox, the owner writes the answers' words (see cas_server)
#pragma once

#include <cstddef>
#include <cstdint>

namespace sidp {

constexpr std::uint64_t kArenaMagic = 0x414e455241504453ull;  // "SDPARENA" in memory
constexpr std::uint32_t kArenaVersion = 1;

// A number drawn at random once for each pool; what does not carry it belongs to another job.
struct JobToken {
  std::uint64_t high = 0;
  std::uint64_t low = 0;
};

inline bool operator==(const JobToken& a, const JobToken& b) { return a.high == b.high && a.low == b.low; }
inline bool operator!=(const JobToken& a, const JobToken& b) { return !(a == b); }

// The life of a rank's pool, in this order; a rank that fails goes to `failed` from anywhere.
enum class ArenaPhase : std::uint32_t {
  created = 1,    // the header is valid, the extents are not
  committed = 2,  // the extents are complete; they change no more
  finished = 3,   // this rank needs nobody any more and serves the others
  closed = 4,     // this rank takes no further part; that its process ends is no death
  failed = 5,     // this rank raised an error and takes no further part
};

struct ArenaArea {
  std::uint64_t offset = 0;  // bytes from the start of the arena
  std::uint64_t bytes = 0;
};

struct ArenaHeader {
  // Identity block.
  std::uint64_t magic;
  std::uint32_t version;
  std::uint32_t header_bytes;
  std::uint64_t total_bytes;
  std::int32_t rank;
  std::int32_t world_size;
  JobToken token;
  std::int64_t pid;
  std::uint64_t start_time;
  ArenaArea extents;
  ArenaArea mailboxes;
  // Live words, each on a cache line of its own.
  alignas(128) std::uint32_t phase;
  alignas(128) std::uint64_t heartbeat;
  alignas(128) std::uint64_t activity;
};

static_assert(offsetof(ArenaHeader, token) == 32, "layout is shared between processes");
static_assert(offsetof(ArenaHeader, extents) == 64, "layout is shared between processes");
static_assert(offsetof(ArenaHeader, phase) == 128, "layout is shared between processes");
static_assert(offsetof(ArenaHeader, heartbeat) == 256, "layout is shared between processes");
static_assert(offsetof(ArenaHeader, activity) == 384, "layout is shared between processes");
static_assert(sizeof(ArenaHeader) <= 4096, "the header is one page");

}  // namespace sidp
