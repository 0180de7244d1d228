// The FFN of one unit, or of a slice of its intermediate dimension, on the CPU: weights as they lie, float32 inside.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <vector>

#include "activation.hpp"
#include "blas.hpp"
#include "mailbox.hpp"

namespace sidp::cas::cpu {

std::size_t element_bytes(Dtype dtype);

// A weight matrix: [out, in], or [in, out] where `transposed`; row-major, `pitch` in elements.
struct Matrix {
  const std::byte* data = nullptr;
  std::int64_t pitch = 0;
  bool transposed = false;
};

// What one owner holds of a layer. `inner` may be 0 (a striped owner that got nothing); null pointers: not there.
struct FfnSlice {
  std::uint32_t hidden = 0;
  std::uint32_t inner = 0;
  Activation activation = Activation::kSilu;
  Dtype dtype = Dtype::kFloat32;
  Matrix gate, up, down;
  const std::byte* gate_bias = nullptr;
  const std::byte* up_bias = nullptr;
  const std::byte* down_bias = nullptr;
};

// Elements of `dtype` to float32 and back; `count` of them.
void to_float(const std::byte* source, Dtype dtype, std::size_t count, float* target);
void from_float(const float* source, Dtype dtype, std::size_t count, std::byte* target);

// Owns the scratch memory of one thread.
class CpuFfn {
 public:
  explicit CpuFfn(std::shared_ptr<const Blas> blas) : blas_(std::move(blas)) {}

  // y [rows, hidden] = down(act(gate(x)) * up(x)), x [rows, hidden], all float32 and compact.
  void run(const FfnSlice& slice, const float* x, std::int64_t rows, float* y);

 private:
  void linear(const Matrix& w, const std::byte* bias, Dtype dtype, std::int64_t out, std::int64_t in, const float* x,
              std::int64_t rows, float* y);
  void linear_in_blocks(const Matrix& w, Dtype dtype, std::int64_t out, std::int64_t in, const float* x, std::int64_t rows,
                        float* y);

  std::shared_ptr<const Blas> blas_;
  std::vector<float> block_;  // weights converted to float32
  std::vector<float> bias_;
  std::vector<float> up_;
  std::vector<float> gate_;
};

}  // namespace sidp::cas::cpu
