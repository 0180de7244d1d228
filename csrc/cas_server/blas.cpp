#include "blas.hpp"

#include <dlfcn.h>

#include <cmath>

#include "error.hpp"

namespace sidp::cas::cpu {

namespace {

// Plain LAPACK name (MKL, OpenBLAS, Arm's), then those of the OpenBLAS in the wheels of numpy and scipy-openblas32/64.
constexpr const char* kSymbols[] = {"sgemm_", "scipy_sgemm_64_", "scipy_sgemm_", "sgemm_64_"};

// OpenBLAS with its own threads: one number for the whole process.
constexpr const char* kThreadSymbols[] = {"openblas_set_num_threads", "scipy_openblas_set_num_threads64_",
                                          "scipy_openblas_set_num_threads", "openblas_set_num_threads64_"};

// Asymmetric in every dimension, so that a wrong interface cannot give the right answer.
bool multiplies_rightly(const Blas& blas) {
  const float x[6] = {1, 2, 3, 4, 5, 6};                          // [2, 3]
  const float w[12] = {1, 0, 2, 0, 3, 1, 4, 1, 0, 2, 2, 5};       // [4, 3]
  float c[8] = {};
  blas.multiply(2, 4, 3, x, 3, w, 3, false, false, c, 4);
  for (int i = 0; i < 2; ++i)
    for (int j = 0; j < 4; ++j) {
      float expected = 0;
      for (int k = 0; k < 3; ++k) expected += x[i * 3 + k] * w[j * 3 + k];
      if (std::fabs(c[i * 4 + j] - expected) > 1e-4f) return false;
    }
  return true;
}

}  // namespace

std::shared_ptr<const Blas> Blas::open(const std::vector<std::string>& libraries) {
  std::string tried;
  for (const std::string& path : libraries) {
    void* library = ::dlopen(path.c_str(), RTLD_NOW | RTLD_NOLOAD);
    const bool shared = library != nullptr;
    if (!shared) library = ::dlopen(path.c_str(), RTLD_NOW | RTLD_LOCAL);
    if (library == nullptr) {
      const char* why = ::dlerror();
      tried += "\n  " + path + ": " + (why == nullptr ? "cannot be loaded" : why);
      continue;
    }
    // Never closed: threads of it may run until the process ends.
    for (const char* symbol : kSymbols) {
      void* found = ::dlsym(library, symbol);
      if (found == nullptr) continue;
      auto blas = std::make_shared<Blas>(reinterpret_cast<SgemmFunction>(found));
      blas->name_ = path + ":" + symbol;
      blas->mkl_threads_ = reinterpret_cast<int (*)(int)>(::dlsym(library, "MKL_Set_Num_Threads_Local"));
      blas->omp_threads_ = reinterpret_cast<void (*)(int)>(::dlsym(library, "omp_set_num_threads"));
      for (const char* threads : kThreadSymbols)
        if (!shared && blas->all_threads_ == nullptr)
          blas->all_threads_ = reinterpret_cast<void (*)(int)>(::dlsym(library, threads));
      if (multiplies_rightly(*blas)) return blas;
      tried += "\n  " + blas->name_ + ": multiplies wrongly";
    }
    if (tried.find(path) == std::string::npos) tried += "\n  " + path + ": has no sgemm";
  }
  throw ConfigError("CaS on the CPU needs a BLAS, and none was found in torch or numpy: `pip install scipy-openblas32`, or "
                    "name a library that exports sgemm_ in SIDP_BLAS, or use mode='was'. Tried:" +
                    (tried.empty() ? std::string(" nothing") : tried));
}

void Blas::multiply(std::int64_t n, std::int64_t m, std::int64_t k, const float* x, std::int64_t x_pitch, const float* w,
                    std::int64_t w_pitch, bool transposed, bool accumulate, float* c, std::int64_t c_pitch) const {
  // Column-major sees every matrix transposed: c^T [m, n] = w [m, k] x^T [k, n].
  const float alpha = 1;
  const float beta = accumulate ? 1 : 0;
  sgemm_(transposed ? "N" : "T", "N", &m, &n, &k, &alpha, w, &w_pitch, x, &x_pitch, &beta, c, &c_pitch, 1, 1);
}

void Blas::use_threads(int count) const {
  if (mkl_threads_ != nullptr) {
    mkl_threads_(count);
  } else if (omp_threads_ != nullptr) {
    omp_threads_(count);
  } else if (all_threads_ != nullptr) {
    all_threads_(count);
  }
}

}  // namespace sidp::cas::cpu
