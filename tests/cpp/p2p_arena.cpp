// Arenas and mappings: sizes, lifetimes, and words and bytes published between two processes.
#include <sys/wait.h>
#include <unistd.h>

#include <cstring>
#include <memory>
#include <vector>

#include "atomics.hpp"
#include "deadline.hpp"
#include "error.hpp"
#include "p2p/shm_arena.hpp"
#include "p2p_check.hpp"

using namespace sidp;

namespace {

const JobToken kToken{0x0123456789abcdef, 42};

ArenaSpec spec(std::uint64_t extent_bytes, std::uint64_t mailbox_bytes) {
  return {1, 4, kToken, extent_bytes, mailbox_bytes};
}

ArenaExpectation expected(std::uint64_t extent_bytes, std::uint64_t mailbox_bytes) {
  return {1, 4, kToken, extent_bytes, mailbox_bytes};
}

void areas_lie_on_pages_and_do_not_overlap() {
  const std::uint64_t page = static_cast<std::uint64_t>(::sysconf(_SC_PAGESIZE));
  const std::uint64_t sizes[] = {0, 1, page - 1, page, page + 1, (2 << 20) - 1, 2 << 20, (2 << 20) + 1, 1ull << 40};
  for (std::uint64_t extents : sizes) {
    for (std::uint64_t mailboxes : sizes) {
      const ArenaLayout layout = arena_layout(extents, mailboxes);
      CHECK(layout.header_bytes >= sizeof(ArenaHeader));
      CHECK(layout.mailboxes.bytes == mailboxes && layout.extents.bytes == extents);
      CHECK(layout.mailboxes.offset % page == 0 && layout.mailboxes.offset >= layout.header_bytes);
      CHECK(layout.extents.offset % (extents >= (2 << 20) ? 2 << 20 : page) == 0);
      CHECK(layout.extents.offset >= layout.mailboxes.offset + mailboxes);
      // The writable area ends on a page border before the read-only one begins.
      CHECK(layout.extents.offset / page >= (layout.mailboxes.offset + mailboxes + page - 1) / page);
      CHECK(layout.total_bytes >= layout.extents.offset + extents && layout.total_bytes % page == 0);
    }
  }
}

void every_single_bit_of_a_handle_counts() {
  ShmArena arena(spec(5000, 100));
  const std::string good = arena.handle();
  CHECK(good.size() == kHandleBytes);
  PeerMapping(good, expected(5000, 100));
  for (std::size_t byte = 0; byte < good.size(); ++byte) {
    for (int bit = 0; bit < 8; bit += 3) {
      std::string bad = good;
      bad[byte] = static_cast<char>(bad[byte] ^ (1 << bit));
      CHECK_THROWS(PeerMapping(bad, expected(5000, 100)), LayoutError, "arena handle");
    }
  }
}

void memory_lives_as_long_as_its_last_user() {
  auto arena = std::make_unique<ShmArena>(spec(1 << 20, 4096));
  auto first = std::make_unique<PeerMapping>(arena->handle(), expected(1 << 20, 4096));
  auto second = std::make_unique<PeerMapping>(arena->handle(), expected(1 << 20, 4096));
  std::memset(arena->extents(), 7, 1 << 20);
  arena->set_phase(ArenaPhase::committed);
  const std::shared_ptr<const ArenaHeader> header = second->header();
  arena->close();
  arena.reset();
  CHECK(first->extents()[(1 << 20) - 1] == 7 && second->phase() == ArenaPhase::closed);
  second->close();
  second.reset();
  first.reset();
  CHECK(load_acquire(&header->phase) == static_cast<std::uint32_t>(ArenaPhase::closed));
}

// The child is a requester: it waits for `committed`, checks every byte, and answers through its mailbox.
[[noreturn]] void requester(const std::string& handle, std::uint64_t bytes) {
  PeerMapping mapping(handle, expected(bytes, 64));
  const Deadline deadline = Deadline::after(20);
  while (mapping.phase() != ArenaPhase::committed)
    if (deadline.expired()) ::_exit(2);
  for (std::uint64_t i = 0; i < bytes; ++i)
    if (mapping.extents()[i] != static_cast<std::uint8_t>(i * 31)) ::_exit(3);
  store_release(reinterpret_cast<std::uint64_t*>(mapping.mailboxes()), 99);
  ::_exit(0);
}

void another_process_reads_what_was_published(ShmKind kind) {
  constexpr std::uint64_t kBytes = (3 << 20) + 17;
  ShmArena arena(spec(kBytes, 64), kind);
  const std::string handle = arena.handle();
  const pid_t child = ::fork();
  if (child == 0) requester(handle, kBytes);
  for (std::uint64_t i = 0; i < kBytes; ++i) arena.extents()[i] = static_cast<std::uint8_t>(i * 31);
  arena.set_phase(ArenaPhase::committed);
  const auto* answer = reinterpret_cast<const std::uint64_t*>(arena.mailboxes());
  CHECK(until([&] { return load_acquire(answer) == 99; }));
  int status = -1;
  CHECK(::waitpid(child, &status, 0) == child && WIFEXITED(status) && WEXITSTATUS(status) == 0);
  CHECK(arena.phase() == ArenaPhase::committed);  // the child's end has closed nothing of its parent's
  PeerMapping(handle, expected(kBytes, 64));
}

}  // namespace

int main() {
  areas_lie_on_pages_and_do_not_overlap();
  every_single_bit_of_a_handle_counts();
  memory_lives_as_long_as_its_last_user();
  another_process_reads_what_was_published(ShmKind::memfd);
  another_process_reads_what_was_published(ShmKind::named);
  std::puts("p2p_arena: ok");
  return 0;
}
