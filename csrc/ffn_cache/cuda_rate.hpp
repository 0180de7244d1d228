// What a link gives, measured at the moment a pool needs to know.
#pragma once

#include <cstdint>

namespace sidp::cache {

// Bytes per second at which `device` copies `bytes` from `source` (a peer's memory as mapped here) by its copy engine: the
// median of a few copies into memory that is freed again. Waits for them.
double cuda_copy_rate(std::uintptr_t source, std::uint64_t bytes, int device);

}  // namespace sidp::cache
