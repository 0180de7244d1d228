// Atomic access to plain words in memory that two processes share (C++17 has no std::atomic_ref).
// A word is published with store_release after the data it stands for, and read with load_acquire before it.
#pragma once

#include <cstdint>
#include <type_traits>

namespace sidp {

template <typename T>
constexpr bool is_lock_free_word = std::is_trivially_copyable_v<T> && (sizeof(T) == 4 || sizeof(T) == 8);

template <typename T>
T load_acquire(const T* word) {
  static_assert(is_lock_free_word<T>);
  T value;
  __atomic_load(word, &value, __ATOMIC_ACQUIRE);
  return value;
}

template <typename T>
T load_relaxed(const T* word) {
  static_assert(is_lock_free_word<T>);
  T value;
  __atomic_load(word, &value, __ATOMIC_RELAXED);
  return value;
}

template <typename T>
void store_release(T* word, std::common_type_t<T> value) {
  static_assert(is_lock_free_word<T>);
  __atomic_store(word, &value, __ATOMIC_RELEASE);
}

template <typename T>
void store_relaxed(T* word, std::common_type_t<T> value) {
  static_assert(is_lock_free_word<T>);
  __atomic_store(word, &value, __ATOMIC_RELAXED);
}

// Both return the value before the operation.
template <typename T>
T fetch_add(T* word, std::common_type_t<T> value) {
  static_assert(is_lock_free_word<T>);
  return __atomic_fetch_add(word, value, __ATOMIC_ACQ_REL);
}

template <typename T>
T exchange(T* word, std::common_type_t<T> value) {
  static_assert(is_lock_free_word<T>);
  return __atomic_exchange_n(word, value, __ATOMIC_ACQ_REL);
}

template <typename T>
bool compare_exchange(T* word, T& expected, std::common_type_t<T> desired) {
  static_assert(is_lock_free_word<T>);
  return __atomic_compare_exchange(word, &expected, &desired, false, __ATOMIC_ACQ_REL, __ATOMIC_ACQUIRE);
}

}  // namespace sidp
