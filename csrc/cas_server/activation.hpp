// The activations both servers know, and what the bindings call them.
#pragma once

#include <cstdint>
#include <string>

#include "../error.hpp"
#include "mailbox.hpp"

namespace sidp {
namespace cas {

enum class Activation : std::uint32_t { kSilu = 0, kGelu = 1, kGeluTanh = 2, kRelu = 3, kRelu2 = 4 };

inline Activation activation_from(const std::string& name) {
  if (name == "silu") return Activation::kSilu;
  if (name == "gelu") return Activation::kGelu;
  if (name == "gelu_tanh" || name == "gelu_new") return Activation::kGeluTanh;
  if (name == "relu") return Activation::kRelu;
  if (name == "relu2") return Activation::kRelu2;
  throw ConfigError("CaS does not know the activation '" + name + "'");
}

inline Dtype dtype_from(const std::string& name) {
  if (name == "bfloat16") return Dtype::kBFloat16;
  if (name == "float16") return Dtype::kFloat16;
  if (name == "float32") return Dtype::kFloat32;
  throw ConfigError("CaS knows float32, bfloat16 and float16, got '" + name + "'");
}

}  // namespace cas
}  // namespace sidp
