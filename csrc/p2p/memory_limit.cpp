#include "p2p/memory_limit.hpp"

#include <algorithm>
#include <fstream>
#include <limits>
#include <string>

namespace sidp {
namespace {

constexpr std::uint64_t kNoLimit = std::numeric_limits<std::uint64_t>::max();

// The number in a file that holds one ("max" and a missing file are `otherwise`).
std::uint64_t number_in(const std::string& path, std::uint64_t otherwise) {
  std::ifstream file(path);
  std::uint64_t value = 0;
  return file >> value ? value : otherwise;
}

// The number after `key` in a file of "key number" lines.
std::uint64_t keyed_number(const std::string& path, const std::string& key) {
  std::ifstream file(path);
  std::string word;
  while (file >> word) {
    std::uint64_t value = 0;
    if (word == key && file >> value) return value;
  }
  return 0;
}

// Clean file pages count as used, but give way.
std::uint64_t room_below(std::uint64_t limit, std::uint64_t used, std::uint64_t reclaimable) {
  if (limit == kNoLimit) return kNoLimit;
  const std::uint64_t held = used - std::min(used, reclaimable);
  return limit - std::min(limit, held);
}

// The group this process is in, and every group above it, may set a limit (control groups version 2).
std::uint64_t room_in_groups() {
  std::ifstream file("/proc/self/cgroup");
  std::string line;
  std::uint64_t room = kNoLimit;
  while (std::getline(file, line)) {
    if (line.rfind("0::", 0) != 0) continue;
    for (std::string group = line.substr(3);; group = group.substr(0, group.rfind('/'))) {
      const std::string folder = "/sys/fs/cgroup" + group;
      room = std::min(room, room_below(number_in(folder + "/memory.max", kNoLimit), number_in(folder + "/memory.current", 0),
                                       keyed_number(folder + "/memory.stat", "inactive_file")));
      if (group.empty() || group.rfind('/') == std::string::npos) break;
    }
  }
  // Version 1, as a container sees its own group.
  const std::string folder = "/sys/fs/cgroup/memory";
  return std::min(room, room_below(number_in(folder + "/memory.limit_in_bytes", kNoLimit),
                                   number_in(folder + "/memory.usage_in_bytes", 0),
                                   keyed_number(folder + "/memory.stat", "total_inactive_file")));
}

}  // namespace

std::uint64_t available_memory() {
  const std::uint64_t available = keyed_number("/proc/meminfo", "MemAvailable:");
  if (available == 0) return kNoLimit;  // no /proc: let the allocation itself fail
  const std::uint64_t swap = keyed_number("/proc/meminfo", "SwapFree:");
  return std::min((available + swap) * 1024, room_in_groups());
}

}  // namespace sidp
