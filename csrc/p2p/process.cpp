#include "p2p/process.hpp"

#include <pthread.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cctype>
#include <cerrno>
#include <cstring>
#include <fstream>
#include <mutex>
#include <sstream>
#include <string>

#include "error.hpp"

namespace sidp {
namespace {

std::atomic<std::uint32_t> fork_generation{0};

void count_fork() { fork_generation.fetch_add(1, std::memory_order_relaxed); }

std::string read_boot_id() {
  std::ifstream file("/proc/sys/kernel/random/boot_id");
  std::string text;
  file >> text;
  text.erase(std::remove(text.begin(), text.end(), '-'), text.end());
  const bool valid = text.size() == 32 && std::all_of(text.begin(), text.end(), [](unsigned char c) { return std::isxdigit(c); });
  return valid ? text : std::string(32, '0');
}

ProcessIdentity read_identity() {
  ProcessIdentity self;
  self.pid = ::getpid();
  self.start_time = process_start_time(self.pid);
  self.boot_id = read_boot_id();
  struct stat info {};
  if (::stat("/proc/self/ns/pid", &info) == 0) self.pid_namespace = info.st_ino;
  self.uid = ::geteuid();
  return self;
}

}  // namespace

std::uint64_t process_start_time(std::int64_t pid) {
  const std::string path = detail::concat("/proc/", pid, "/stat");
  errno = 0;
  std::ifstream file(path);
  // Without a descriptor to look with, nothing is known of the process: it must not pass for a dead one.
  SIDP_REQUIRE(file.is_open() || (errno != EMFILE && errno != ENFILE), Error, "cannot read ", path, ": ", std::strerror(errno));
  std::string text;
  if (!std::getline(file, text, '\0')) return 0;
  // The name in field 2 may hold spaces and parentheses: fields are counted from the last ')'.
  const std::size_t end_of_name = text.rfind(')');
  if (end_of_name == std::string::npos) return 0;
  std::istringstream fields(text.substr(end_of_name + 1));
  std::string state, skipped;
  fields >> state;
  if (state == "Z" || state == "X") return 0;
  for (int field = 4; field < 22; ++field) fields >> skipped;
  std::uint64_t start_time = 0;
  fields >> start_time;
  return fields ? start_time : 0;
}

const ProcessIdentity& ProcessIdentity::current() {
  static std::mutex mutex;
  static ProcessIdentity identity;
  std::lock_guard<std::mutex> lock(mutex);
  if (identity.pid != ::getpid()) identity = read_identity();
  return identity;
}

ForkGuard::ForkGuard() {
  static std::once_flag registered;
  std::call_once(registered, [] { ::pthread_atfork(nullptr, nullptr, count_fork); });
  generation_ = fork_generation.load(std::memory_order_relaxed);
}

bool ForkGuard::in_child() const noexcept {
  return fork_generation.load(std::memory_order_relaxed) != generation_;
}

void ForkGuard::require(const char* what) const {
  SIDP_REQUIRE(!in_child(), PoolClosedError, what, " was called in a forked child (pid ", ::getpid(),
               "): a pool belongs to the process that made it; start workers with 'spawn', or fork before making the pool");
}

}  // namespace sidp
