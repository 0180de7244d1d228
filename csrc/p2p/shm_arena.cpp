#include "p2p/shm_arena.hpp"

#include <unistd.h>

#include <limits>

#include "atomics.hpp"
#include "error.hpp"

namespace sidp {
namespace {

constexpr std::uint64_t kHugePage = 2ull << 20;
constexpr std::uint64_t kLargestArena = 1ull << 46;  // far above any host; keeps sums of sizes from wrapping

std::uint64_t round_up(std::uint64_t value, std::uint64_t step) { return (value + step - 1) / step * step; }

ArenaHandle make_handle(const ArenaSpec& spec, const ArenaLayout& layout) {
  ArenaHandle handle;
  handle.rank = spec.rank;
  handle.world_size = spec.world_size;
  handle.token = spec.token;
  handle.total_bytes = layout.total_bytes;
  handle.extents = layout.extents;
  handle.mailboxes = layout.mailboxes;
  handle.owner = ProcessIdentity::current();
  return handle;
}

void write_identity(ArenaHeader& header, const ArenaSpec& spec, const ArenaLayout& layout) {
  const ProcessIdentity& self = ProcessIdentity::current();
  header.version = kArenaVersion;
  header.header_bytes = static_cast<std::uint32_t>(layout.header_bytes);
  header.total_bytes = layout.total_bytes;
  header.rank = spec.rank;
  header.world_size = spec.world_size;
  header.token = spec.token;
  header.pid = self.pid;
  header.start_time = self.start_time;
  header.extents = layout.extents;
  header.mailboxes = layout.mailboxes;
  header.magic = kArenaMagic;
  store_release(&header.phase, static_cast<std::uint32_t>(ArenaPhase::created));
}

ArenaPhase phase_of(const ArenaHeader& header) { return static_cast<ArenaPhase>(load_acquire(&header.phase)); }

}  // namespace

ArenaLayout arena_layout(std::uint64_t extent_bytes, std::uint64_t mailbox_bytes) {
  SIDP_REQUIRE(extent_bytes <= kLargestArena && mailbox_bytes <= kLargestArena, ConfigError, "an arena of ", extent_bytes,
               " bytes of extents and ", mailbox_bytes, " bytes of mailboxes: each must be at most ", kLargestArena);
  const auto page = static_cast<std::uint64_t>(::sysconf(_SC_PAGESIZE));
  ArenaLayout layout;
  layout.header_bytes = round_up(sizeof(ArenaHeader), page);
  layout.mailboxes = {layout.header_bytes, round_up(mailbox_bytes, page)};
  const std::uint64_t small_end = layout.mailboxes.offset + layout.mailboxes.bytes;
  layout.extents = {round_up(small_end, extent_bytes >= kHugePage ? kHugePage : page), extent_bytes};
  layout.mailboxes.bytes = mailbox_bytes;
  layout.total_bytes = round_up(layout.extents.offset + extent_bytes, page);
  return layout;
}

ShmArena::ShmArena(const ArenaSpec& spec, ShmKind kind, const std::string& directory)
    : spec_(spec),
      layout_(arena_layout(spec.extent_bytes, spec.mailbox_bytes)),
      segment_(ShmSegment::create(kind, layout_.total_bytes, directory)),
      region_(std::make_shared<MappedRegion>(segment_.fd(), layout_.total_bytes, true)) {
  SIDP_REQUIRE(spec.world_size > 0 && spec.rank >= 0 && spec.rank < spec.world_size, ConfigError, "rank ", spec.rank,
               " is outside of world size ", spec.world_size);
  region_->advise_huge_pages(layout_.extents);
  write_identity(*header(), spec_, layout_);
}

ShmArena::~ShmArena() { segment_.unpublish(); }

std::uint8_t* ShmArena::base() const {
  SIDP_REQUIRE(region_ != nullptr, PoolClosedError, "the arena of rank ", spec_.rank, " (this rank) is closed");
  return region_->data();
}

std::shared_ptr<ArenaHeader> ShmArena::header() const {
  return {region_, reinterpret_cast<ArenaHeader*>(base())};
}

std::string ShmArena::handle() const {
  ArenaHandle handle = make_handle(spec_, layout_);
  segment_.identify(handle);
  return encode_handle(handle);
}

ArenaPhase ShmArena::phase() const { return region_ ? phase_of(*header()) : ArenaPhase::closed; }

void ShmArena::set_phase(ArenaPhase phase) {
  guard_.require("ShmArena.set_phase");
  std::uint32_t* word = &header()->phase;
  if (static_cast<std::uint32_t>(phase) > load_relaxed(word)) store_release(word, static_cast<std::uint32_t>(phase));
}

void ShmArena::close() {
  if (region_ == nullptr) return;
  if (!guard_.in_child()) set_phase(ArenaPhase::closed);
  segment_.unpublish();
  region_.reset();
}

PeerMapping::PeerMapping(const std::string& handle, const ArenaExpectation& expected, const std::string& directory)
    : handle_(decode_handle(handle)) {
  check_handle(handle_, expected);
  const ArenaLayout layout = arena_layout(expected.extent_bytes, expected.mailbox_bytes);
  SIDP_REQUIRE(handle_.extents.offset == layout.extents.offset && handle_.mailboxes.offset == layout.mailboxes.offset &&
                   handle_.total_bytes == layout.total_bytes,
               LayoutError, "arena handle of rank ", expected.rank, ": extents at ", handle_.extents.offset, ", mailboxes at ",
               handle_.mailboxes.offset, " in ", handle_.total_bytes, " bytes, expected ", layout.extents.offset, ", ",
               layout.mailboxes.offset, " and ", layout.total_bytes);
  const Descriptor fd = open_segment(handle_, directory);
  region_ = std::make_shared<MappedRegion>(fd.get(), handle_.total_bytes, false);
  region_->allow_writing(handle_.mailboxes);
  check_header();
}

void PeerMapping::check_header() const {
  const ArenaHeader& header = *this->header();
  const auto refuse = [&](const char* what) {
    throw LayoutError(detail::concat("arena of rank ", handle_.rank, ": its header ", what));
  };
  if (phase_of(header) < ArenaPhase::created || phase_of(header) > ArenaPhase::failed) refuse("is not written");
  if (header.magic != kArenaMagic) refuse("does not begin with the magic of an arena");
  if (header.version != kArenaVersion) refuse("is of another version of sidp");
  if (header.token != handle_.token) refuse("carries another job's token");
  if (header.rank != handle_.rank || header.world_size != handle_.world_size) refuse("names another rank or world size");
  if (header.total_bytes != handle_.total_bytes || header.extents.offset != handle_.extents.offset ||
      header.extents.bytes != handle_.extents.bytes || header.mailboxes.offset != handle_.mailboxes.offset ||
      header.mailboxes.bytes != handle_.mailboxes.bytes)
    refuse("has other sizes than its handle");
  if (header.pid != handle_.owner.pid || header.start_time != handle_.owner.start_time) refuse("names another process");
}

std::uint8_t* PeerMapping::base() const {
  SIDP_REQUIRE(region_ != nullptr, PoolClosedError, "the mapping of rank ", handle_.rank, "'s arena is closed");
  return region_->data();
}

std::shared_ptr<const ArenaHeader> PeerMapping::header() const {
  return {region_, reinterpret_cast<const ArenaHeader*>(base())};
}

ArenaPhase PeerMapping::phase() const { return phase_of(*header()); }

void PeerMapping::close() { region_.reset(); }

}  // namespace sidp
