// Number formats and activations of the serving kernels; everything is computed in float32.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "ptx.cuh"
#include "serve_types.hpp"

namespace sidp {
namespace cas {

// One instruction each, relative error under 2^-22.
__device__ inline float power_of_2(float x) {
  float result;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(x));
  return result;
}
__device__ inline float reciprocal(float x) {
  float result;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(x));
  return result;
}

__device__ inline float activate(Activation activation, float x) {
  switch (activation) {
    case Activation::kSilu: return x * reciprocal(1.0f + power_of_2(-1.4426950408889634f * x));
    case Activation::kGelu: return 0.5f * x * (1.0f + erff(x * 0.70710678118654752f));
    case Activation::kGeluTanh: {
      const float inner = 0.79788456080286536f * (x + 0.044715f * x * x * x);
      return 0.5f * x * (1.0f + tanhf(inner));
    }
    case Activation::kRelu: return fmaxf(x, 0.0f);
    case Activation::kRelu2: {
      const float positive = fmaxf(x, 0.0f);
      return positive * positive;
    }
  }
  return x;
}

// Calls use(function) with the activation as a function of one number. The switch is out here so that an unrolled loop
// inside `use` holds one activation's code only: with all five it does not fit the instruction cache.
template <typename Use>
__device__ inline void with_activation(Activation activation, Use use) {
  switch (activation) {
    case Activation::kSilu: return use([](float x) { return activate(Activation::kSilu, x); });
    case Activation::kGelu: return use([](float x) { return activate(Activation::kGelu, x); });
    case Activation::kGeluTanh: return use([](float x) { return activate(Activation::kGeluTanh, x); });
    case Activation::kRelu: return use([](float x) { return activate(Activation::kRelu, x); });
    case Activation::kRelu2: return use([](float x) { return activate(Activation::kRelu2, x); });
  }
}

__device__ inline float to_float(__nv_bfloat16 x) { return __bfloat162float(x); }
__device__ inline float to_float(__half x) { return __half2float(x); }

template <typename T>
__device__ inline T from_float(float x);
template <>
__device__ inline __nv_bfloat16 from_float<__nv_bfloat16>(float x) {
  return __float2bfloat16_rn(x);
}
template <>
__device__ inline __half from_float<__half>(float x) {
  return __float2half_rn(x);
}

// Two neighbours in one word, `low` at the lower address.
template <typename T>
__device__ inline u32 pack(float low, float high) {
  const T pair[2] = {from_float<T>(low), from_float<T>(high)};
  u32 word;
  memcpy(&word, pair, sizeof(word));
  return word;
}

template <typename T>
__device__ inline float bias_at(const void* bias, u32 index, u32 size) {
  return bias != nullptr && index < size ? to_float(static_cast<const T*>(bias)[index]) : 0.0f;
}

}  // namespace cas
}  // namespace sidp
