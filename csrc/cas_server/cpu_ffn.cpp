#include "cpu_ffn.hpp"

#include <algorithm>
#include <cmath>
#include <cstring>

#include "half.hpp"

namespace sidp::cas::cpu {

namespace {

// Converted weights of one block: they stay in the second-level cache until they are multiplied.
constexpr std::int64_t kBlockElements = 256 * 1024;

template <typename Function>
void apply(float* values, std::size_t count, Function function) {
  for (std::size_t i = 0; i < count; ++i) values[i] = function(values[i]);
}

void activate(Activation activation, float* values, std::size_t count) {
  switch (activation) {
    case Activation::kSilu:
      return apply(values, count, [](float v) { return v / (1.0f + std::exp(-v)); });
    case Activation::kGelu:
      return apply(values, count, [](float v) { return 0.5f * v * (1.0f + std::erf(v * 0.70710678118654752f)); });
    case Activation::kGeluTanh:
      return apply(values, count, [](float v) {
        return 0.5f * v * (1.0f + std::tanh(0.79788456080286536f * (v + 0.044715f * v * v * v)));
      });
    case Activation::kRelu:
      return apply(values, count, [](float v) { return v < 0.0f ? 0.0f : v; });  // a NaN stays
    case Activation::kRelu2:
      return apply(values, count, [](float v) { return v < 0.0f ? 0.0f : v * v; });
  }
}

float* sized(std::vector<float>& scratch, std::size_t count) {
  if (scratch.size() < count) scratch.resize(count);
  return scratch.data();
}

}  // namespace

std::size_t element_bytes(Dtype dtype) { return dtype == Dtype::kFloat32 ? 4 : 2; }

void to_float(const std::byte* source, Dtype dtype, std::size_t count, float* target) {
  if (dtype == Dtype::kFloat32) {
    std::memcpy(target, source, count * sizeof(float));
    return;
  }
  const auto* halves = reinterpret_cast<const std::uint16_t*>(source);
  if (dtype == Dtype::kBFloat16) {
    for (std::size_t i = 0; i < count; ++i) target[i] = float_from_bf16(halves[i]);
  } else {
    for (std::size_t i = 0; i < count; ++i) target[i] = float_from_fp16(halves[i]);
  }
}

void from_float(const float* source, Dtype dtype, std::size_t count, std::byte* target) {
  if (dtype == Dtype::kFloat32) {
    std::memcpy(target, source, count * sizeof(float));
    return;
  }
  auto* halves = reinterpret_cast<std::uint16_t*>(target);
  if (dtype == Dtype::kBFloat16) {
    for (std::size_t i = 0; i < count; ++i) halves[i] = bf16_from_float(source[i]);
  } else {
    for (std::size_t i = 0; i < count; ++i) halves[i] = fp16_from_float(source[i]);
  }
}

void CpuFfn::run(const FfnSlice& slice, const float* x, std::int64_t rows, float* y) {
  const std::int64_t hidden = slice.hidden;
  const std::int64_t inner = slice.inner;
  const auto count = static_cast<std::size_t>(rows * inner);
  float* up = sized(up_, count);
  linear(slice.up, slice.up_bias, slice.dtype, inner, hidden, x, rows, up);
  if (slice.gate.data != nullptr) {
    float* gate = sized(gate_, count);
    linear(slice.gate, slice.gate_bias, slice.dtype, inner, hidden, x, rows, gate);
    activate(slice.activation, gate, count);
    for (std::size_t i = 0; i < count; ++i) up[i] *= gate[i];
  } else {
    activate(slice.activation, up, count);
  }
  linear(slice.down, slice.down_bias, slice.dtype, hidden, inner, up, rows, y);
}

// y [rows, out] = x [rows, in] times w, plus the bias.
void CpuFfn::linear(const Matrix& w, const std::byte* bias, Dtype dtype, std::int64_t out, std::int64_t in, const float* x,
                    std::int64_t rows, float* y) {
  if (out == 0) return;
  if (in == 0) {
    std::fill_n(y, rows * out, 0.0f);
  } else if (dtype == Dtype::kFloat32) {
    const auto* data = reinterpret_cast<const float*>(w.data);
    blas_->multiply(rows, out, in, x, in, data, w.pitch, w.transposed, false, y, out);
  } else {
    linear_in_blocks(w, dtype, out, in, x, rows, y);
  }
  if (bias == nullptr) return;
  float* values = sized(bias_, static_cast<std::size_t>(out));
  to_float(bias, dtype, static_cast<std::size_t>(out), values);
  for (std::int64_t row = 0; row < rows; ++row)
    for (std::int64_t i = 0; i < out; ++i) y[row * out + i] += values[i];
}

// A block is a run of rows of w as it lies. In [out, in] they are outputs of their own; in [in, out] each adds to all.
void CpuFfn::linear_in_blocks(const Matrix& w, Dtype dtype, std::int64_t out, std::int64_t in, const float* x,
                              std::int64_t rows, float* y) {
  const std::int64_t height = w.transposed ? in : out;
  const std::int64_t width = w.transposed ? out : in;
  const std::int64_t step = std::max<std::int64_t>(1, kBlockElements / width);
  float* block = sized(block_, static_cast<std::size_t>(std::min(step, height) * width));
  for (std::int64_t begin = 0; begin < height; begin += step) {
    const std::int64_t count = std::min(step, height - begin);
    for (std::int64_t row = 0; row < count; ++row)
      to_float(w.data + (begin + row) * w.pitch * 2, dtype, static_cast<std::size_t>(width), block + row * width);
    if (w.transposed) {
      blas_->multiply(rows, out, count, x + begin, in, block, width, true, begin > 0, y, out);
    } else {
      blas_->multiply(rows, count, in, x, in, block, width, false, false, y + begin, out);
    }
  }
}

}  // namespace sidp::cas::cpu
