// A BLAS that is already there (torch's or numpy's), found at run time: this library links none.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>
#include <vector>

namespace sidp::cas::cpu {

// The Fortran interface. The lengths of the two character arguments come last. Integers are passed as pointers to 64-bit
// values: on a little-endian machine these serve libraries built with 32-bit integers as well.
using SgemmFunction = void (*)(const char*, const char*, const std::int64_t*, const std::int64_t*, const std::int64_t*,
                               const float*, const float*, const std::int64_t*, const float*, const std::int64_t*,
                               const float*, float*, const std::int64_t*, std::size_t, std::size_t);

class Blas {
 public:
  explicit Blas(SgemmFunction sgemm) : sgemm_(sgemm) {}

  // The first of the libraries that has an sgemm which multiplies rightly; one that this process has loaded already is
  // used as it is. ConfigError naming what was tried where none has.
  static std::shared_ptr<const Blas> open(const std::vector<std::string>& libraries);

  // c [n, m] = x [n, k] times w [m, k] transposed (or w [k, m] where `transposed`), row-major, plus what c holds where
  // `accumulate`. Thread-safe.
  void multiply(std::int64_t n, std::int64_t m, std::int64_t k, const float* x, std::int64_t x_pitch, const float* w,
                std::int64_t w_pitch, bool transposed, bool accumulate, float* c, std::int64_t c_pitch) const;

  // Threads that calls from the calling thread may use; other threads' calls keep theirs. A library that cannot tell
  // threads apart is left alone where the process had loaded it before, since others compute with it too.
  void use_threads(int count) const;

  const std::string& name() const { return name_; }

 private:
  SgemmFunction sgemm_;
  int (*mkl_threads_)(int) = nullptr;
  void (*omp_threads_)(int) = nullptr;
  void (*all_threads_)(int) = nullptr;  // of the whole library, where it is this one's alone
  std::string name_ = "given";
};

}  // namespace sidp::cas::cpu
