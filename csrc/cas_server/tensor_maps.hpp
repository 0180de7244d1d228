// Tensor maps of the bulk copy engine, without linking against libcuda.
#pragma once

#include <cuda.h>

#include <cstdint>

#include "mailbox.hpp"

namespace sidp {
namespace cas {

// A row-major matrix of 16-bit numbers read in boxes of `box_rows` x 64 columns, 128-byte swizzle; what lies outside
// reads as zero. Throws LayoutError where the engine cannot address it (start or pitch not a multiple of 16 bytes).
CUtensorMap matrix_map(Dtype dtype, const void* start, std::uint64_t columns, std::uint64_t rows,
                       std::uint64_t pitch_bytes, std::uint32_t box_rows);

// `matrices` of them, `distance_bytes` apart, in boxes of 128 rows x 64 columns of one.
CUtensorMap weight_map(Dtype dtype, const void* start, std::uint64_t columns, std::uint64_t rows,
                       std::uint32_t matrices, std::uint64_t distance_bytes);

}  // namespace cas
}  // namespace sidp
