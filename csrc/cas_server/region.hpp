// A mailbox region in this process's address space: typed access to the words of mailbox.hpp.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>

#include "atomics.hpp"
#include "error.hpp"
#include "mailbox.hpp"

namespace sidp::cas::cpu {

class Region {
 public:
  Region(std::byte* base, const Geometry& geometry) : base_(base), geometry_(geometry) {}

  RegionHeader* header() const { return at<RegionHeader>(0); }
  DoorbellLine* doorbell() const { return at<DoorbellLine>(geometry_.doorbell()); }
  TailLine* tail(std::uint32_t requester) const { return at<TailLine>(geometry_.tail(requester)); }
  RequestRecord* request(std::uint32_t requester, std::uint32_t slot) const {
    return at<RequestRecord>(geometry_.request(requester, slot));
  }
  ReplyRecord* reply(std::uint32_t owner, std::uint32_t slot) const {
    return at<ReplyRecord>(geometry_.reply(owner, slot));
  }
  std::byte* request_row(std::uint32_t requester, std::uint32_t slot, std::uint64_t row) const {
    return base_ + geometry_.request_rows(requester, slot) + row * geometry_.row_bytes;
  }
  std::byte* reply_row(std::uint32_t owner, std::uint32_t slot, std::uint64_t row) const {
    return base_ + geometry_.reply_rows(owner, slot) + row * geometry_.reply_row_bytes;
  }

  // Before commit's barrier, by the region's own rank.
  void write_header(std::uint64_t pool_id) const {
    RegionHeader words{};
    words.magic = kMailboxMagic;
    words.version = kMailboxVersion;
    words.world = geometry_.world;
    words.slots = geometry_.slots;
    words.max_rows = geometry_.max_rows;
    words.row_bytes = geometry_.row_bytes;
    words.reply_row_bytes = geometry_.reply_row_bytes;
    words.pool_id = pool_id;
    std::memcpy(base_, &words, sizeof(words));
  }

  // After the barrier, by every peer. LayoutError where the other side laid its region out differently.
  void check_header(int rank, std::uint64_t pool_id) const {
    const RegionHeader& words = *header();
    const bool fits = words.magic == kMailboxMagic && words.version == kMailboxVersion && words.world == geometry_.world &&
                      words.slots == geometry_.slots && words.max_rows == geometry_.max_rows &&
                      words.row_bytes == geometry_.row_bytes && words.reply_row_bytes == geometry_.reply_row_bytes &&
                      words.pool_id == pool_id;
    SIDP_REQUIRE(fits, LayoutError, "the mailbox region of rank ", rank, " (version ", words.version, ", ", words.world,
                 " ranks, ", words.slots, " slots of ", words.max_rows, " rows) is not the one of this pool (version ",
                 kMailboxVersion, ", ", geometry_.world, " ranks, ", geometry_.slots, " slots of ", geometry_.max_rows,
                 " rows): run the same version of sidp on all ranks");
  }

 private:
  template <typename T>
  T* at(std::size_t offset) const {
    return reinterpret_cast<T*>(base_ + offset);
  }

  std::byte* base_;
  Geometry geometry_;
};

// ConfigError where no region can be laid out like this.
inline void check_geometry(const Geometry& geometry, int rank) {
  SIDP_REQUIRE(geometry.world >= 1 && geometry.world <= kMaxWorld, ConfigError, "CaS serves groups of 1 ... ", kMaxWorld,
               " ranks, got ", geometry.world);
  SIDP_REQUIRE(rank >= 0 && static_cast<std::uint32_t>(rank) < geometry.world, ConfigError, "rank ", rank, " of ",
               geometry.world, " does not exist");
  SIDP_REQUIRE(geometry.slots >= 1 && geometry.max_rows >= 1 && geometry.max_rows <= kMaxBatchRows, ConfigError,
               "a mailbox needs 1 or more slots of 1 ... ", kMaxBatchRows, " rows, got ", geometry.slots, " of ",
               geometry.max_rows);
}

// ConfigError where a layer's rows are wider than the region's.
inline void check_row(const Geometry& geometry, std::uint64_t hidden, std::uint64_t element_bytes, bool striped) {
  SIDP_REQUIRE(hidden * element_bytes <= geometry.row_bytes && hidden * (striped ? 4 : element_bytes) <= geometry.reply_row_bytes,
               ConfigError, "a layer of hidden size ", hidden, " does not fit mailbox rows of ", geometry.row_bytes, " and ",
               geometry.reply_row_bytes, " bytes");
}

}  // namespace sidp::cas::cpu
