// What the records have in common by which ranks invite their peers to map memory.
#pragma once

#include <cstddef>
#include <cstdint>

namespace sidp {

constexpr std::size_t kBootIdBytes = 32;

// FNV-1a of everything before `checksum`, which is last. It finds damage, not malice; a forged record fails on its fields.
template <typename Record>
std::uint64_t checksum_of(const Record& record) {
  static_assert(offsetof(Record, checksum) + sizeof(record.checksum) == sizeof(Record), "the checksum is last");
  std::uint64_t hash = 0xcbf29ce484222325ull;
  const auto* bytes = reinterpret_cast<const unsigned char*>(&record);
  for (std::size_t i = 0; i < offsetof(Record, checksum); ++i) hash = (hash ^ bytes[i]) * 0x100000001b3ull;
  return hash;
}

}  // namespace sidp
