// Which process a rank is, in a way that a recycled pid cannot imitate, and what a fork does to our objects.
#pragma once

#include <cstdint>
#include <string>

namespace sidp {

struct ProcessIdentity {
  std::int64_t pid = 0;
  std::uint64_t start_time = 0;  // clock ticks after boot, field 22 of /proc/<pid>/stat
  std::string boot_id;           // 32 hexadecimal digits: which kernel, so which host
  std::uint64_t pid_namespace = 0;
  std::uint32_t uid = 0;

  static const ProcessIdentity& current();  // of the calling process, also after a fork

  // Pids of the other process mean the same here.
  bool same_pid_namespace(const ProcessIdentity& other) const {
    return boot_id == other.boot_id && pid_namespace == other.pid_namespace;
  }
};

// Start time of a process of this pid namespace; 0 if there is none, or only one that is dead and not yet reaped.
// Throws Error where no descriptor is left to look with.
std::uint64_t process_start_time(std::int64_t pid);

// Remembers the process that made an object. Threads do not survive a fork, and a child must not write words that
// peers take for its parent's.
class ForkGuard {
 public:
  ForkGuard();
  bool in_child() const noexcept;           // cheap: one relaxed load
  void require(const char* what) const;     // PoolClosedError in a forked child

 private:
  std::uint32_t generation_;
};

}  // namespace sidp
