// The library's exceptions. The bindings turn each into the Python class of the same name.
#pragma once

#include <sstream>
#include <stdexcept>
#include <string>
#include <utility>

namespace sidp {

class Error : public std::runtime_error {
 public:
  using std::runtime_error::runtime_error;
};

// A bad argument: the message names the value, what was expected and the mend.
class ConfigError : public Error {
 public:
  using Error::Error;
};

// A tensor, arena or record whose shape, type or size is not what was agreed.
class LayoutError : public Error {
 public:
  using Error::Error;
};

// A rank that died or does not answer within the timeout.
class PeerError : public Error {
 public:
  PeerError(int rank, const std::string& what) : Error(what), rank_(rank) {}
  int rank() const noexcept { return rank_; }

 private:
  int rank_;
};

class PoolClosedError : public Error {
 public:
  using Error::Error;
};

namespace detail {

template <typename... Parts>
std::string concat(Parts&&... parts) {
  std::ostringstream out;
  (out << ... << std::forward<Parts>(parts));
  return out.str();
}

}  // namespace detail
}  // namespace sidp

// Throws `Kind` with the message built from the remaining arguments when `condition` does not hold.
#define SIDP_REQUIRE(condition, Kind, ...)                     \
  do {                                                         \
    if (!(condition)) throw Kind(::sidp::detail::concat(__VA_ARGS__)); \
  } while (false)

// For what can only be a bug of ours: the message carries the expression and the place.
#define SIDP_ASSERT(condition, ...)                                                                       \
  do {                                                                                                    \
    if (!(condition))                                                                                     \
      throw ::sidp::Error(::sidp::detail::concat("internal error at ", __FILE__, ":", __LINE__, ": ", #condition, \
                                                 " does not hold; ", __VA_ARGS__));                       \
  } while (false)
