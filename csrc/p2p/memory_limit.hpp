// How much memory the kernel would still give this process.
#pragma once

#include <cstdint>

namespace sidp {

// Bytes that a new arena may take: what the kernel calls available, with swap, within the control group's limit.
std::uint64_t available_memory();

}  // namespace sidp
