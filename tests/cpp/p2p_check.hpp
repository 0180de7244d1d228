// The few lines of a test framework that the p2p tests need.
#pragma once

#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <string>
#include <thread>

#define CHECK(condition)                                                              \
  do {                                                                                \
    if (!(condition)) {                                                               \
      std::fprintf(stderr, "%s:%d: %s does not hold\n", __FILE__, __LINE__, #condition); \
      std::exit(1);                                                                   \
    }                                                                                 \
  } while (false)

// The statement must throw `Kind` with `text` in its message.
#define CHECK_THROWS(statement, Kind, text)                                                               \
  do {                                                                                                    \
    std::string message = "nothing was thrown";                                                           \
    bool right = false;                                                                                   \
    try {                                                                                                 \
      statement;                                                                                          \
    } catch (const Kind& error) {                                                                         \
      message = error.what();                                                                             \
      right = message.find(text) != std::string::npos;                                                    \
    } catch (const std::exception& error) {                                                               \
      message = std::string("another exception: ") + error.what();                                        \
    }                                                                                                     \
    if (!right) {                                                                                         \
      std::fprintf(stderr, "%s:%d: expected " #Kind " with '%s', got '%s'\n", __FILE__, __LINE__, text, message.c_str()); \
      std::exit(1);                                                                                       \
    }                                                                                                     \
  } while (false)

// Waits until the predicate holds; false after 20 s.
template <typename Predicate>
bool until(Predicate predicate) {
  const auto end = std::chrono::steady_clock::now() + std::chrono::seconds(20);
  while (!predicate()) {
    if (std::chrono::steady_clock::now() > end) return false;
    std::this_thread::sleep_for(std::chrono::milliseconds(1));
  }
  return true;
}
