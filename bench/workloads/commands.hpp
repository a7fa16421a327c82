// SPDX-License-Identifier: GPL-2.0-or-later
// The hand-shake between a workload and its driver: one command a line on
// stdin, one answer a line on stdout, so that nobody ever waits by sleeping.
#pragma once

#include <poll.h>
#include <time.h>
#include <unistd.h>

#include <cstdint>
#include <cstdio>
#include <optional>
#include <string>
#include <string_view>

#include <nlohmann/json.hpp>

namespace workload {

// splitmix64: a seed's stream, and a hash of a counter.
constexpr uint64_t mix(uint64_t x) {
  x += 0x9e3779b97f4a7c15ULL;
  x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9ULL;
  x = (x ^ (x >> 27)) * 0x94d049bb133111ebULL;
  return x ^ (x >> 31);
}

class Random {
 public:
  explicit Random(uint64_t seed) : state_(mix(seed) | 1) {}
  uint64_t next() {  // xorshift64*
    state_ ^= state_ >> 12;
    state_ ^= state_ << 25;
    state_ ^= state_ >> 27;
    return state_ * 0x2545f4914f6cdd1dULL;
  }
  uint64_t below(uint64_t n) { return (static_cast<unsigned __int128>(next()) * n) >> 64; }
  double unit() { return static_cast<double>(next() >> 11) * 0x1p-53; }

 private:
  uint64_t state_;
};

class Commands {
 public:
  // The next command. Blocks if `wait`, else returns nothing when none is
  // there. The end of stdin counts as "stop": a workload never outlives its driver.
  std::optional<std::string> next(bool wait) {
    for (;;) {
      if (auto end = buffer_.find('\n'); end != std::string::npos) {
        std::string line = buffer_.substr(0, end);
        buffer_.erase(0, end + 1);
        return line;
      }
      if (ended_) return "stop";
      pollfd fd{STDIN_FILENO, POLLIN, 0};
      if (poll(&fd, 1, wait ? -1 : 0) <= 0) return std::nullopt;
      char chunk[256];
      ssize_t got = read(STDIN_FILENO, chunk, sizeof chunk);
      if (got <= 0)
        ended_ = true;
      else
        buffer_.append(chunk, static_cast<size_t>(got));
    }
  }

 private:
  std::string buffer_;
  bool ended_ = false;
};

// Burns instructions without touching memory: the access rate under -icount is
// set by instructions, since sleeping would hide the task from everything that
// follows its run time.
inline void burn(uint64_t blocks_of_32) {
  while (blocks_of_32--) {
    uint64_t x = 0;
    asm volatile(".rept 30\n\tadd $1, %0\n\t.endr" : "+r"(x));
  }
}

inline uint64_t now_ns() {
  timespec now;
  clock_gettime(CLOCK_MONOTONIC, &now);
  return static_cast<uint64_t>(now.tv_sec) * 1000000000 + static_cast<uint64_t>(now.tv_nsec);
}

// Calls slice() until so many milliseconds of the guest's clock are over.
template <class F>
void for_ms(uint64_t ms, F&& slice) {
  for (const uint64_t until = now_ns() + ms * 1000000; now_ns() < until;) slice();
}

inline void answer(std::string_view word, const nlohmann::json& facts) {
  std::printf("%.*s %s\n", static_cast<int>(word.size()), word.data(), facts.dump().c_str());
  std::fflush(stdout);
}

// "run 1000" -> 1000; nothing if the line is not that command with a number.
inline std::optional<uint64_t> argument(const std::string& line, std::string_view word) {
  if (!line.starts_with(word) || line.size() <= word.size() + 1 || line[word.size()] != ' ') return std::nullopt;
  char* end = nullptr;
  uint64_t value = std::strtoull(line.c_str() + word.size() + 1, &end, 10);
  if (*end) return std::nullopt;
  return value;
}

}  // namespace workload
