// Shared memory as RAII: making it without a risk of SIGBUS later, opening a peer's, and removing names.
#pragma once

#include <cstdint>
#include <string>

#include "p2p/handle.hpp"

namespace sidp {

constexpr const char* kShmDirectory = "/dev/shm";

// A file descriptor that closes itself.
class Descriptor {
 public:
  explicit Descriptor(int fd = -1) : fd_(fd) {}
  ~Descriptor() { reset(); }
  Descriptor(Descriptor&& other) noexcept : fd_(other.release()) {}
  Descriptor& operator=(Descriptor&& other) noexcept;
  Descriptor(const Descriptor&) = delete;
  Descriptor& operator=(const Descriptor&) = delete;

  int get() const { return fd_; }
  bool valid() const { return fd_ >= 0; }
  void reset();

 private:
  int release();
  int fd_;
};

// A shared mapping of a whole descriptor that unmaps itself.
class MappedRegion {
 public:
  MappedRegion(int fd, std::uint64_t bytes, bool writable);  // Error with the system's reason
  ~MappedRegion();
  MappedRegion(const MappedRegion&) = delete;
  MappedRegion& operator=(const MappedRegion&) = delete;

  std::uint8_t* data() const { return data_; }
  std::uint64_t bytes() const { return bytes_; }
  // Makes one area writable in a region that was mapped read-only.
  void allow_writing(const ArenaArea& area);
  // Advises huge pages where the kernel has them for shared memory; a hint, no error.
  void advise_huge_pages(const ArenaArea& area);

 private:
  std::uint8_t* data_ = nullptr;
  std::uint64_t bytes_ = 0;
};

// The owner's side. The memory is zero and lazily backed (memfd) or reserved at once (named: a full /dev/shm would
// otherwise show as SIGBUS at the first touch).
class ShmSegment {
 public:
  // ConfigError naming needed and available bytes and the mend where the memory is not there.
  static ShmSegment create(ShmKind kind, std::uint64_t bytes, const std::string& directory = kShmDirectory);
  ~ShmSegment() { unpublish(); }
  ShmSegment(ShmSegment&&) noexcept;
  ShmSegment& operator=(ShmSegment&&) = delete;

  ShmKind kind() const { return kind_; }
  int fd() const { return fd_.get(); }
  const std::string& name() const { return name_; }
  void identify(ArenaHandle& handle) const;  // fills kind, fd, device, inode, name

  // After this nobody can open the segment any more; who has mapped it keeps it. Idempotent. A forked child's copy
  // does nothing: the name is its parent's.
  void unpublish();

 private:
  ShmSegment(ShmKind kind, Descriptor fd, std::string name, std::string directory);
  static ShmSegment create_memfd(std::uint64_t bytes);
  static ShmSegment create_named(std::uint64_t bytes, const std::string& directory);

  ShmKind kind_;
  Descriptor fd_;
  std::string name_;
  std::string directory_;
  ForkGuard guard_;
};

// The peer's side: opens what a checked handle names and checks the object itself (owner, mode, size, identity, seals).
// LayoutError where it is not what the handle says; PeerError where it is gone or the kernel refuses to open it.
Descriptor open_segment(const ArenaHandle& handle, const std::string& directory = kShmDirectory);

// Removes the names that processes of this user left in `directory` when they were killed before they could; returns
// how many. Names of running processes, and of other pid namespaces (where pids mean something else), are left alone.
int sweep_names(const std::string& directory = kShmDirectory);

}  // namespace sidp
