#include "tensor_maps.hpp"

#include "cuda_check.hpp"

namespace sidp {
namespace cas {

namespace {

using Encode = decltype(&cuTensorMapEncodeTiled);

Encode encode_function() {
  static const Encode function = [] {
    void* pointer = nullptr;
    cudaDriverEntryPointQueryResult result;
    SIDP_CUDA_CHECK(
        cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &pointer, 12000, cudaEnableDefault, &result));
    SIDP_REQUIRE(result == cudaDriverEntryPointSuccess, Error,
                 "the driver has no cuTensorMapEncodeTiled; CUDA 12 or newer is needed for the sm_90a path");
    return reinterpret_cast<Encode>(pointer);
  }();
  return function;
}

CUtensorMap encode_map(Dtype dtype, const void* start, std::uint32_t rank, const cuuint64_t* sizes,
                       const cuuint64_t* pitches, const cuuint32_t* box) {
  CUtensorMap map;
  const cuuint32_t steps[3] = {1, 1, 1};
  const CUresult result = encode_function()(
      &map, dtype == Dtype::kFloat16 ? CU_TENSOR_MAP_DATA_TYPE_FLOAT16 : CU_TENSOR_MAP_DATA_TYPE_BFLOAT16, rank,
      const_cast<void*>(start), sizes, pitches, box, steps, CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
      CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  SIDP_REQUIRE(result == CUDA_SUCCESS, LayoutError, "no tensor map for a matrix of ", sizes[1], " x ", sizes[0], " at ",
               start, " with rows ", pitches[0], " bytes apart (driver error ", static_cast<int>(result),
               "); start and pitch must be multiples of 16 bytes");
  return map;
}

}  // namespace

CUtensorMap matrix_map(Dtype dtype, const void* start, std::uint64_t columns, std::uint64_t rows,
                       std::uint64_t pitch_bytes, std::uint32_t box_rows) {
  const cuuint64_t sizes[2] = {columns, rows};
  const cuuint64_t pitches[1] = {pitch_bytes};
  const cuuint32_t box[2] = {64, box_rows};
  return encode_map(dtype, start, 2, sizes, pitches, box);
}

CUtensorMap weight_map(Dtype dtype, const void* start, std::uint64_t columns, std::uint64_t rows,
                       std::uint32_t matrices, std::uint64_t distance_bytes) {
  const cuuint64_t sizes[3] = {columns, rows, matrices};
  const cuuint64_t pitches[2] = {columns * 2, distance_bytes};
  const cuuint32_t box[3] = {64, 128, 1};
  return encode_map(dtype, start, 3, sizes, pitches, box);
}

}  // namespace cas
}  // namespace sidp
