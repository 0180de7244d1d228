// What a way of reading weights costs: copies of row-major matrices into shared memory by `sms` CTAs, nothing else. Each
// stage of the ring takes `down` x `across` boxes of `box_rows` x 64 columns (or `rows` pieces of rows without a map);
// a CTA walks along the rows of its tile, then to the next tile, like the serving kernel. Prints GB/s of each pattern.
#include <cudaTypedefs.h>

#include <algorithm>
#include <cstdio>
#include <initializer_list>
#include <vector>

#include "../csrc/cas_server/cuda_check.hpp"
#include "../csrc/cas_server/sm90_shared.cuh"

using namespace sidp;
using namespace sidp::cas;

namespace {

constexpr u32 kBytes = 192 * 1024;  // in flight per CTA

struct Pattern {
  u32 box_rows, down, across;
  bool pieces;  // cp.async.bulk of a row's `across` x 128 bytes instead of boxes
};

__global__ void __launch_bounds__(32) read_pattern(const __grid_constant__ CUtensorMap map, const std::uint8_t* start,
                                                   u64 pitch, Pattern p, u32 tiles, u32 depth) {
#if defined(SIDP_SM90A)
  extern __shared__ std::uint8_t raw[];
  __shared__ u64 full[48];
  std::uint8_t* ring = raw + (1024 - shared_address(raw) % 1024) % 1024;
  const u32 bytes = p.box_rows * p.down * p.across * 128, stages = kBytes / bytes;
  if (threadIdx.x == 0)
    for (u32 i = 0; i < stages; ++i) barrier_init(&full[i], 1);
  if (threadIdx.x == 0) barrier_init_fence();
  __syncwarp();
  const u32 all = tiles * depth;
  const u32 begin = u64(all) * blockIdx.x / gridDim.x, end = u64(all) * (blockIdx.x + 1) / gridDim.x;
  for (u32 at = begin; at < end + stages; ++at) {
    const u32 use = at - begin, stage = use % stages;
    if (use >= stages && at - stages < end)
      while (!barrier_try_wait(&full[stage], (use / stages - 1) & 1)) {
      }
    if (at >= end) continue;
    std::uint8_t* target = ring + stage * bytes;
    const u32 row = at / depth * p.box_rows * p.down, column = at % depth * p.across * 64;
    if (threadIdx.x == 0) barrier_arrive_expect(&full[stage], bytes);
    __syncwarp();
    if (p.pieces) {
      const u32 piece = p.across * 128;
      for (u32 r = threadIdx.x; r < p.box_rows * p.down; r += 32)
        asm volatile(
            "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint [%0], [%1], %2, [%3], %4;" ::"r"(
                shared_address(target + r * piece)),
            "l"(start + (row + r) * pitch + column * 2), "r"(piece), "r"(shared_address(&full[stage])), "l"(kEvictFirst)
            : "memory");
    } else if (threadIdx.x == 0) {
      for (u32 d = 0; d < p.down; ++d)
        for (u32 c = 0; c < p.across; ++c)
          copy_box(&map, &full[stage], target + (d * p.across + c) * p.box_rows * 128, column + c * 64,
                   row + d * p.box_rows, kEvictFirst);
    }
  }
#endif
}

CUtensorMap make_map(const void* start, u64 columns, u64 rows, u32 box_rows, CUtensorMapL2promotion promotion) {
  static PFN_cuTensorMapEncodeTiled_v12000 encode = nullptr;
  if (encode == nullptr) {
    cudaDriverEntryPointQueryResult result;
    SIDP_CUDA_CHECK(cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", reinterpret_cast<void**>(&encode), 12000,
                                                     cudaEnableDefault, &result));
  }
  CUtensorMap map;
  const cuuint64_t sizes[2] = {columns, rows}, pitches[1] = {columns * 2};
  const cuuint32_t box[2] = {64, box_rows}, steps[2] = {1, 1};
  const CUresult result = encode(&map, CU_TENSOR_MAP_DATA_TYPE_BFLOAT16, 2, const_cast<void*>(start), sizes, pitches, box,
                                 steps, CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B, promotion,
                                 CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  SIDP_REQUIRE(result == CUDA_SUCCESS, Error, "cuTensorMapEncodeTiled: ", int(result));
  return map;
}

float median_us(const std::vector<const void*>& matrices, u64 columns, u64 rows, Pattern p,
                CUtensorMapL2promotion promotion, u32 sms) {
  std::vector<float> times;
  cudaEvent_t begin, end;
  SIDP_CUDA_CHECK(cudaEventCreate(&begin));
  SIDP_CUDA_CHECK(cudaEventCreate(&end));
  for (int round = 0; round < 8; ++round) {
    const void* start = matrices[round % matrices.size()];
    const CUtensorMap map = make_map(start, columns, rows, p.box_rows, promotion);
    SIDP_CUDA_CHECK(cudaEventRecord(begin));
    read_pattern<<<sms, 32, kBytes + 1024>>>(map, static_cast<const std::uint8_t*>(start), columns * 2, p,
                                             u32(rows / (p.box_rows * p.down)), u32(columns / (64 * p.across)));
    SIDP_CUDA_CHECK(cudaGetLastError());
    SIDP_CUDA_CHECK(cudaEventRecord(end));
    SIDP_CUDA_CHECK(cudaEventSynchronize(end));
    float ms = 0;
    SIDP_CUDA_CHECK(cudaEventElapsedTime(&ms, begin, end));
    if (round >= 2) times.push_back(ms * 1e3f);
  }
  std::sort(times.begin(), times.end());
  return times[times.size() / 2];
}

void print_line(const std::vector<const void*>& matrices, u64 columns, u64 rows, const Pattern& p,
                CUtensorMapL2promotion promotion, const char* name, std::initializer_list<u32> sms_list) {
  std::printf("rows of %llu, %s %u rows x %u down, %u bytes across, promotion %s:", (unsigned long long)columns,
              p.pieces ? "pieces" : "boxes", p.box_rows, p.down, p.across * 128, name);
  for (u32 sms : sms_list)
    std::printf(" %u SMs %.0f", sms, columns * rows * 2 / median_us(matrices, columns, rows, p, promotion, sms) / 1e3);
  std::printf(" GB/s\n");
}

}  // namespace

// `cas_read short`: only what the serving kernel does or might do, for the row lengths of Qwen3-32B's two phases.
int main(int count, char**) {
  try {
    const u64 elements = 5120ull * 102400;  // 1 GiB
    std::vector<const void*> matrices;
    for (int i = 0; i < 2; ++i) {
      void* pointer = nullptr;
      SIDP_CUDA_CHECK(cudaMalloc(&pointer, elements * 2));
      SIDP_CUDA_CHECK(cudaMemset(pointer, 0x5a, elements * 2));
      matrices.push_back(pointer);
    }
    SIDP_CUDA_CHECK(cudaFuncSetAttribute(read_pattern, cudaFuncAttributeMaxDynamicSharedMemorySize, kBytes + 1024));
    if (count > 1) {
      const Pattern patterns[] = {{128, 2, 1, false}, {128, 1, 2, false}, {64, 2, 2, false}, {32, 2, 4, false},
                                  {16, 1, 16, true}};
      for (const u64 columns : {5120, 25600})
        for (const Pattern& p : patterns)
          print_line(matrices, columns, elements / columns, p, CU_TENSOR_MAP_L2_PROMOTION_L2_256B, "256B", {24, 32, 40, 48});
      return 0;
    }
    const Pattern patterns[] = {{256, 1, 1, false}, {128, 1, 1, false}, {128, 2, 1, false}, {32, 4, 1, false},
                                {128, 1, 2, false}, {64, 2, 2, false},  {32, 4, 2, false},  {64, 1, 4, false},
                                {32, 2, 4, false},  {32, 1, 8, false},  {16, 1, 16, false}, {128, 1, 2, true},
                                {64, 1, 4, true},   {32, 1, 8, true},   {16, 1, 16, true},  {8, 1, 40, true}};
    const CUtensorMapL2promotion promotions[] = {CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_L2_PROMOTION_NONE,
                                                 CU_TENSOR_MAP_L2_PROMOTION_L2_128B};
    const char* names[] = {"256B", "none", "128B"};
    for (int promotion = 0; promotion < 3; ++promotion)
      for (const Pattern& p : patterns) {
        if (p.pieces && promotion > 0) continue;
        print_line(matrices, 5120, elements / 5120, p, promotions[promotion], names[promotion], {16, 24, 32, 48, 132});
      }
  } catch (const std::exception& error) {
    std::fprintf(stderr, "%s\n", error.what());
    return 1;
  }
}
