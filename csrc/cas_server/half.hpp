// bfloat16 and float16 to and from float32, in loops that compilers vectorise for any CPU.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>

namespace sidp::cas::cpu {

inline float float_from_bits(std::uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof(value));
  return value;
}

inline std::uint32_t bits_of(float value) {
  std::uint32_t bits;
  std::memcpy(&bits, &value, sizeof(bits));
  return bits;
}

inline float float_from_bf16(std::uint16_t half) { return float_from_bits(std::uint32_t{half} << 16); }

// Round to nearest, ties to even; a NaN stays a NaN.
inline std::uint16_t bf16_from_float(float value) {
  const std::uint32_t bits = bits_of(value);
  const std::uint32_t rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  return static_cast<std::uint16_t>((bits & 0x7fffffff) > 0x7f800000 ? (bits >> 16) | 0x40 : rounded);
}

inline float float_from_fp16(std::uint16_t half) {
  const std::uint32_t sign = std::uint32_t{half & 0x8000u} << 16;
  const std::uint32_t exponent = half & 0x7c00u;
  const std::uint32_t normal = (std::uint32_t{half & 0x7fffu} << 13) + (112u << 23);
  const std::uint32_t special = normal + (112u << 23);  // infinity, NaN
  // A subnormal as the mantissa of a number in [0.5, 1), whose step is 2^-24 too: no subnormal float is ever touched.
  const std::uint32_t subnormal = bits_of(float_from_bits((126u << 23) | std::uint32_t{half & 0x3ffu}) - 0.5f);
  const std::uint32_t magnitude = exponent == 0 ? subnormal : exponent == 0x7c00u ? special : normal;
  return float_from_bits(sign | magnitude);
}

// Round to nearest, ties to even; beyond 65504 to infinity; a NaN stays a NaN.
inline std::uint16_t fp16_from_float(float value) {
  const std::uint32_t bits = bits_of(value);
  const std::uint32_t sign = (bits >> 16) & 0x8000u;
  const std::uint32_t magnitude = bits & 0x7fffffffu;
  if (magnitude > 0x7f800000u) return static_cast<std::uint16_t>(sign | 0x7e00u);
  if (magnitude >= 0x47800000u) return static_cast<std::uint16_t>(sign | 0x7c00u);  // 65536 and more
  if (magnitude < 0x38800000u) {                                                    // below 2^-14: a subnormal
    // Adding 0.5 shifts the mantissa to where a step is 2^-24, and rounds in doing so.
    return static_cast<std::uint16_t>(sign | (bits_of(float_from_bits(magnitude) + 0.5f) - 0x3f000000u));
  }
  const std::uint32_t rounded = magnitude - (112u << 23) + 0xfffu + ((magnitude >> 13) & 1);
  return static_cast<std::uint16_t>(sign | (rounded >> 13));
}

}  // namespace sidp::cas::cpu
