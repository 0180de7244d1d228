// Sleeping on a 32-bit word that other processes map too.
#pragma once

#include <linux/futex.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#include <algorithm>
#include <climits>
#include <cstdint>

namespace sidp::cas::cpu {

// Sleeps while `*word` is `seen`, at most `seconds`. May wake early: the caller looks again.
inline void futex_wait(std::uint32_t* word, std::uint32_t seen, double seconds) {
  const double bounded = std::clamp(seconds, 0.0, 1e6);
  timespec limit{};
  limit.tv_sec = static_cast<time_t>(bounded);
  limit.tv_nsec = static_cast<long>((bounded - static_cast<double>(limit.tv_sec)) * 1e9);
  ::syscall(SYS_futex, word, FUTEX_WAIT, seen, &limit, nullptr, 0);
}

inline void futex_wake_all(std::uint32_t* word) { ::syscall(SYS_futex, word, FUTEX_WAKE, INT_MAX, nullptr, nullptr, 0); }

// Whoever rings adds to the bell before it looks for sleepers, whoever sleeps says so before it reads the bell, all of it
// sequentially consistent: one of the two sees the other, so no wake-up is lost. Whether somebody slept.
inline bool ring_bell(std::uint32_t* bell, const std::uint32_t* sleepers) {
  __atomic_fetch_add(bell, 1, __ATOMIC_SEQ_CST);
  const bool slept = __atomic_load_n(sleepers, __ATOMIC_SEQ_CST) != 0;
  if (slept) futex_wake_all(bell);
  return slept;
}

// Ahead of work that is still being written: whoever sleeps now wakes meanwhile. It does not stand for `ring_bell`, which
// is due when the work is there. Whether somebody slept.
inline bool wake_ahead(std::uint32_t* bell, const std::uint32_t* sleepers) {
  return __atomic_load_n(sleepers, __ATOMIC_RELAXED) != 0 && ring_bell(bell, sleepers);
}

// Sleeps on `bell` unless `ready()` holds; `sleepers` counts in whoever sleeps.
template <typename Ready>
void sleep_on_bell(std::uint32_t* bell, std::uint32_t* sleepers, double seconds, Ready ready) {
  __atomic_fetch_add(sleepers, 1, __ATOMIC_SEQ_CST);
  const std::uint32_t seen = __atomic_load_n(bell, __ATOMIC_SEQ_CST);
  if (!ready()) futex_wait(bell, seen, seconds);
  __atomic_fetch_sub(sleepers, 1, __ATOMIC_SEQ_CST);
}

inline void relax() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

}  // namespace sidp::cas::cpu
