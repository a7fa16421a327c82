// SPDX-License-Identifier: GPL-2.0-or-later
// What happened and why, for `tierctl events`: the last few thousand records in
// memory, each with a number, so that a reader can go on where it stopped and
// sees what it missed.
#pragma once

#include <cstddef>
#include <cstdint>
#include <deque>
#include <mutex>
#include <string>
#include <vector>

#include "engine/engine.hpp"
#include "tierd/protocol.hpp"

namespace hypertier {

struct EventRecord {
  std::string kind;    // "seated", "ejected", "moved", "decision", ...
  std::string cgroup;  // of the scope
  std::string policy;
  std::string text;    // one sentence: what, and why
  std::uint64_t epoch = 0;  // 0: between epochs
  Json detail = nullptr;    // of the kind's own
  std::vector<MoveRecord> moves;  // largest first
  // filled by add()
  std::uint64_t number = 0;
  std::uint64_t unix_ms = 0;
};

// Any thread may call; nobody waits for a reader.
class EventLog {
 public:
  explicit EventLog(std::size_t max_records) : max_records_(max_records) {}

  void add(EventRecord record);
  // {"events": [...], "next": N, "lost": N}: those after `after`, as many as a
  // message holds. `next` is what to ask for next; lost: overwritten since `after`.
  Json since(std::uint64_t after) const;

 private:
  const std::size_t max_records_;
  mutable std::mutex lock_;
  std::deque<EventRecord> records_;
  std::uint64_t last_number_ = 0;
};

// One sentence: what an epoch decided, and why.
std::string decision_text(const EpochReport& report);
std::uint64_t unix_ms_now();

}  // namespace hypertier
