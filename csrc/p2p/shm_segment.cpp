#include "p2p/shm_segment.hpp"

#include <dirent.h>
#include <fcntl.h>
#include <sys/mman.h>
#include <sys/random.h>
#include <sys/stat.h>
#include <sys/statvfs.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <cerrno>
#include <cstdio>
#include <cstring>
#include <fstream>
#include <utility>

#include "error.hpp"
#include "p2p/memory_limit.hpp"

#ifndef MFD_NOEXEC_SEAL
#define MFD_NOEXEC_SEAL 0x0008U
#endif

namespace sidp {
namespace {

constexpr int kSeals = F_SEAL_SHRINK | F_SEAL_GROW | F_SEAL_SEAL;

std::string reason(int error) { return std::strerror(error); }

// sidp.<uid>.<pid namespace>.<pid>.<start time>.<128 random bits>: unguessable, and a sweep can tell whose it is.
std::string random_name() {
  std::uint64_t random[2];
  SIDP_REQUIRE(::getrandom(random, sizeof(random), 0) == sizeof(random), Error, "getrandom: ", reason(errno));
  const ProcessIdentity& self = ProcessIdentity::current();
  char text[112];
  std::snprintf(text, sizeof(text), "sidp.%u.%llu.%lld.%llu.%016llx%016llx", self.uid,
                static_cast<unsigned long long>(self.pid_namespace), static_cast<long long>(self.pid),
                static_cast<unsigned long long>(self.start_time), static_cast<unsigned long long>(random[0]),
                static_cast<unsigned long long>(random[1]));
  return text;
}

// posix_fallocate backs every page now; it returns the error number.
int reserve(int fd, std::uint64_t bytes) {
  int error;
  do {
    error = ::posix_fallocate(fd, 0, static_cast<off_t>(bytes));
  } while (error == EINTR);
  return error;
}

bool strict_overcommit() {
  int mode = 0;
  std::ifstream("/proc/sys/vm/overcommit_memory") >> mode;
  return mode == 2;
}

void require_memory(std::uint64_t bytes) {
  const std::uint64_t available = available_memory();
  SIDP_REQUIRE(bytes <= available, ConfigError, "this rank's arena needs ", bytes, " bytes of shared memory, but ", available,
               " bytes are available (memory and swap, within the control group's limit): use more ranks, a smaller model, or "
               "raise the container's memory limit");
}

[[noreturn]] void no_space(const std::string& directory, std::uint64_t needed, std::uint64_t available) {
  throw ConfigError(detail::concat("this rank's arena needs ", needed, " bytes in ", directory, ", but ", available,
                                   " bytes are free there: start the container with a larger one (docker run --shm-size=",
                                   (needed >> 30) + 1, "g or more for each rank, or --ipc=host), or remount it with a larger size"));
}

std::uint64_t free_bytes(const std::string& directory) {
  struct statvfs info {};
  SIDP_REQUIRE(::statvfs(directory.c_str(), &info) == 0, ConfigError, "shared memory directory ", directory, ": ", reason(errno),
               ": mount a tmpfs there");
  return static_cast<std::uint64_t>(info.f_bavail) * info.f_frsize;
}

}  // namespace

Descriptor& Descriptor::operator=(Descriptor&& other) noexcept {
  if (this != &other) {
    reset();
    fd_ = other.release();
  }
  return *this;
}

void Descriptor::reset() {
  if (fd_ >= 0) ::close(fd_);
  fd_ = -1;
}

int Descriptor::release() { return std::exchange(fd_, -1); }

MappedRegion::MappedRegion(int fd, std::uint64_t bytes, bool writable) : bytes_(bytes) {
  void* address = ::mmap(nullptr, bytes, writable ? PROT_READ | PROT_WRITE : PROT_READ, MAP_SHARED, fd, 0);
  SIDP_REQUIRE(address != MAP_FAILED, Error, "cannot map ", bytes, " bytes of shared memory: ", reason(errno));
  data_ = static_cast<std::uint8_t*>(address);
}

MappedRegion::~MappedRegion() { ::munmap(data_, bytes_); }

void MappedRegion::allow_writing(const ArenaArea& area) {
  if (area.bytes == 0) return;
  SIDP_REQUIRE(::mprotect(data_ + area.offset, area.bytes, PROT_READ | PROT_WRITE) == 0, Error,
               "cannot make the mailboxes writable: ", reason(errno));
}

void MappedRegion::advise_huge_pages(const ArenaArea& area) {
  if (area.bytes != 0) ::madvise(data_ + area.offset, area.bytes, MADV_HUGEPAGE);
}

ShmSegment::ShmSegment(ShmKind kind, Descriptor fd, std::string name, std::string directory)
    : kind_(kind), fd_(std::move(fd)), name_(std::move(name)), directory_(std::move(directory)) {}

ShmSegment::ShmSegment(ShmSegment&& other) noexcept
    : kind_(other.kind_),
      fd_(std::move(other.fd_)),
      name_(std::exchange(other.name_, {})),
      directory_(std::move(other.directory_)),
      guard_(other.guard_) {}

ShmSegment ShmSegment::create(ShmKind kind, std::uint64_t bytes, const std::string& directory) {
  SIDP_ASSERT(bytes > 0, "an arena has at least its header");
  require_memory(bytes);
  return kind == ShmKind::memfd ? create_memfd(bytes) : create_named(bytes, directory);
}

ShmSegment ShmSegment::create_memfd(std::uint64_t bytes) {
  const unsigned flags = MFD_CLOEXEC | MFD_ALLOW_SEALING;
  int raw = ::memfd_create("sidp", flags | MFD_NOEXEC_SEAL);
  if (raw < 0 && errno == EINVAL) raw = ::memfd_create("sidp", flags);  // kernels before 6.3
  SIDP_REQUIRE(raw >= 0, Error, "memfd_create: ", reason(errno));
  Descriptor fd(raw);
  SIDP_REQUIRE(::fchmod(raw, 0600) == 0 && ::ftruncate(raw, static_cast<off_t>(bytes)) == 0, Error, "cannot size ", bytes,
               " bytes of shared memory: ", reason(errno));
  if (strict_overcommit()) {
    // Without overcommit a page may be refused at its first touch, as SIGBUS: take them all now.
    const int error = reserve(raw, bytes);
    SIDP_REQUIRE(error == 0, ConfigError, "this rank's arena needs ", bytes, " bytes of shared memory: ", reason(error),
                 " (vm.overcommit_memory is 2): use more ranks or a smaller model");
  }
  // Sealed in size: no one, the owner included, can make a reader run off the end.
  SIDP_REQUIRE(::fcntl(raw, F_ADD_SEALS, kSeals) == 0, Error, "cannot seal shared memory: ", reason(errno));
  return ShmSegment(ShmKind::memfd, std::move(fd), {}, {});
}

ShmSegment ShmSegment::create_named(std::uint64_t bytes, const std::string& directory) {
  sweep_names(directory);
  const std::uint64_t available = free_bytes(directory);
  if (bytes > available) no_space(directory, bytes, available);
  std::string name = random_name();
  const std::string path = directory + "/" + name;
  const int raw = ::open(path.c_str(), O_RDWR | O_CREAT | O_EXCL | O_CLOEXEC | O_NOFOLLOW, 0600);
  SIDP_REQUIRE(raw >= 0, ConfigError, "cannot create ", path, ": ", reason(errno), ": ", directory,
               " must be a tmpfs that this user may write");
  ShmSegment segment(ShmKind::named, Descriptor(raw), std::move(name), directory);
  SIDP_REQUIRE(::fchmod(raw, 0600) == 0, Error, "cannot restrict ", path, " to its user: ", reason(errno));
  const int error = reserve(raw, bytes);
  if (error == ENOSPC) no_space(directory, bytes, free_bytes(directory));
  SIDP_REQUIRE(error == 0, Error, "cannot reserve ", bytes, " bytes in ", directory, ": ", reason(error));
  return segment;
}

void ShmSegment::identify(ArenaHandle& handle) const {
  struct stat info {};
  SIDP_REQUIRE(fd_.valid() && ::fstat(fd_.get(), &info) == 0, PoolClosedError,
               "this arena is no longer published: peers have mapped it already");
  handle.kind = kind_;
  handle.fd = kind_ == ShmKind::memfd ? fd_.get() : -1;
  handle.device = info.st_dev;
  handle.inode = info.st_ino;
  handle.name = name_;
}

void ShmSegment::unpublish() {
  if (!name_.empty() && !guard_.in_child()) ::unlink((directory_ + "/" + name_).c_str());
  name_.clear();
  fd_.reset();
}

Descriptor open_segment(const ArenaHandle& handle, const std::string& directory) {
  const bool memfd = handle.kind == ShmKind::memfd;
  const std::string path =
      memfd ? detail::concat("/proc/", handle.owner.pid, "/fd/", handle.fd) : directory + "/" + handle.name;
  // The link in /proc must be followed; a name in /dev/shm must be the object itself.
  Descriptor fd(::open(path.c_str(), O_RDWR | O_CLOEXEC | O_NONBLOCK | (memfd ? 0 : O_NOFOLLOW)));
  if (!fd.valid())
    throw PeerError(handle.rank, detail::concat("cannot open the arena of rank ", handle.rank, " at ", path, ": ", reason(errno),
                                                memfd ? " (the rank has ended, or /proc does not show it to this process)"
                                                      : " (the rank has ended, or has another /dev/shm)"));
  const auto refuse = [&](const auto&... parts) {
    throw LayoutError(detail::concat("arena of rank ", handle.rank, " at ", path, ": ", parts...));
  };
  struct stat info {};
  if (::fstat(fd.get(), &info) != 0) refuse(reason(errno));
  if (!S_ISREG(info.st_mode)) refuse("is no shared memory");
  if (info.st_dev != handle.device || info.st_ino != handle.inode)
    refuse("is object ", info.st_dev, ":", info.st_ino, ", the handle names ", handle.device, ":", handle.inode);
  if (info.st_uid != ProcessIdentity::current().uid)
    refuse("belongs to user ", info.st_uid, ", expected ", ProcessIdentity::current().uid);
  if ((info.st_mode & 07777) != 0600) refuse("has mode ", info.st_mode & 07777, " (decimal), expected 0600");
  if (static_cast<std::uint64_t>(info.st_size) != handle.total_bytes)
    refuse("has ", info.st_size, " bytes, the handle says ", handle.total_bytes);
  if (memfd && (::fcntl(fd.get(), F_GET_SEALS) & kSeals) != kSeals) refuse("is not sealed in size");
  return fd;
}

int sweep_names(const std::string& directory) {
  DIR* entries = ::opendir(directory.c_str());
  if (entries == nullptr) return 0;
  const ProcessIdentity& self = ProcessIdentity::current();
  int removed = 0;
  while (const dirent* entry = ::readdir(entries)) {
    unsigned uid;
    unsigned long long pid_namespace, start_time;
    long long pid;
    if (std::sscanf(entry->d_name, "sidp.%u.%llu.%lld.%llu.", &uid, &pid_namespace, &pid, &start_time) != 4) continue;
    if (uid != self.uid || pid_namespace != self.pid_namespace) continue;
    try {
      if (process_start_time(pid) == start_time) continue;
    } catch (const Error&) {
      continue;  // not known: a later sweep will see
    }
    if (::unlinkat(::dirfd(entries), entry->d_name, 0) == 0) ++removed;
  }
  ::closedir(entries);
  return removed;
}

}  // namespace sidp
