// What the bindings of both transports use.
#pragma once

#include <pybind11/pybind11.h>

#include <cstdint>
#include <cstring>
#include <string>

#include "error.hpp"
#include "p2p/arena_words.hpp"

namespace sidp {

using NoGil = pybind11::call_guard<pybind11::gil_scoped_release>;

inline JobToken token_from(const std::string& bytes) {
  SIDP_REQUIRE(bytes.size() == sizeof(JobToken), ConfigError, "a job token has ", sizeof(JobToken), " bytes, got ", bytes.size());
  JobToken token;
  std::memcpy(&token, bytes.data(), sizeof(token));
  return token;
}

inline std::uintptr_t address(const void* pointer) { return reinterpret_cast<std::uintptr_t>(pointer); }

}  // namespace sidp
