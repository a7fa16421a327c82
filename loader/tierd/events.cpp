// SPDX-License-Identifier: GPL-2.0-or-later
#include "tierd/events.hpp"

#include <time.h>

namespace hypertier {
namespace {

// Of the JSON text; far below what a message may have.
constexpr std::size_t kReplyBytes = kMessageMaxBytes / 2;
constexpr std::size_t kEventBytes = 512, kMoveBytes = 256;

std::string why(const MoveRecord& move) {
  std::string text;
  const auto part = [&](const std::string& more) { text += (text.empty() ? "" : "; ") + more; };
  const std::string heat = "heat " + std::to_string(move.heat);
  if (move.promoted_pages != 0) part(heat + " is above the cut at " + std::to_string(move.cut_heat));
  if (move.demoted_pages != 0)
    part(move.displaced_by_heat != 0 ? heat + " made room for heat " + std::to_string(move.displaced_by_heat)
                                     : heat + " was beyond what the scope may keep in fast memory");
  if (move.reversed_pages != 0) part("moves back what was moved lately: this range is left alone for a while");
  if (move.refused_pages != 0) part("the policy's admit refused some");
  if (move.failed_pages != 0) part("some could not be moved");
  return text;
}

Json move_json(const MoveRecord& move) {
  Json json;
  json["pid"] = move.pid;
  json["start"] = move.start;
  json["end"] = move.end;
  json["heat"] = move.heat;
  json["promoted_pages"] = move.promoted_pages;
  json["demoted_pages"] = move.demoted_pages;
  json["failed_pages"] = move.failed_pages;
  json["refused_pages"] = move.refused_pages;
  json["reversed_pages"] = move.reversed_pages;
  json["why"] = why(move);
  return json;
}

Json event_json(const EventRecord& record) {
  Json json;
  json["number"] = record.number;
  json["unix_ms"] = record.unix_ms;
  json["kind"] = record.kind;
  json["cgroup"] = record.cgroup;
  json["policy"] = record.policy;
  json["epoch"] = record.epoch;
  json["text"] = record.text;
  if (!record.detail.is_null()) json["detail"] = record.detail;
  if (!record.moves.empty()) {
    Json list = Json::array();
    for (const MoveRecord& move : record.moves) list.push_back(move_json(move));
    json["moves"] = std::move(list);
  }
  return json;
}

}  // namespace

std::string decision_text(const EpochReport& report) {
  const auto n = [](__u64 pages) { return std::to_string(pages); };
  std::string more;
  if (report.rate_limited_pages != 0) more += "; the rate limit held back " + n(report.rate_limited_pages);
  if (report.reversed_pages != 0) more += "; " + n(report.reversed_pages) + " were moved back";
  if (report.cooling_ranges != 0) more += "; " + n(report.cooling_ranges) + " hot ranges are left alone: moved to and fro lately";
  if (report.room_pages != 0) more += "; " + n(report.room_pages) + " of them make room for what the scope is about to allocate";
  if (report.over_pages != 0) more += "; " + n(report.over_pages) + " pages were beyond the budget";
  if (report.scope.trial_pages[HT_TIER_SLOW] != 0)
    more += "; " + n(report.scope.trial_pages[HT_TIER_SLOW]) + " pages on trial had " + n(report.scope.trial_hits[HT_TIER_SLOW]) +
            " samples, those they displace " + n(report.scope.trial_hits[HT_TIER_FAST]);
  switch (report.decision) {
    case Decision::kMoved:
    case Decision::kOverBudget:
      return n(report.moved.promoted_pages) + " pages promoted, " + n(report.moved.demoted_pages) + " demoted; the cut is at heat " +
             n(report.cut_heat) + more;
    case Decision::kDryRun:
      return "dry run: " + n(report.dry_run_pages) + " pages would be promoted; the cut is at heat " + n(report.cut_heat) + more;
    case Decision::kNoMoves: return "nothing is to be moved: the policy only classifies" + more;
    case Decision::kPolicyFailed: return "no policy answered";
    case Decision::kNoHeat: return "no range has heat" + more;
    case Decision::kAllHotFast: return "all that is hot is in fast memory" + more;
    case Decision::kNothingColder: return "hot pages are in slow memory, but nothing colder is in fast memory, and there is no room" + more;
    case Decision::kAllRefused: return "the policy's admit refuses every pair (" + n(report.refused_pages) + " pages)" + more;
    case Decision::kRateLimited: return "a plan was made, but the rate allows no page of it now" + more;
    case Decision::kCooling: return "nothing is moved" + more;
  }
  return decision_name(report.decision);
}

std::uint64_t unix_ms_now() {
  timespec now{};
  clock_gettime(CLOCK_REALTIME, &now);
  return static_cast<std::uint64_t>(now.tv_sec) * 1000 + static_cast<std::uint64_t>(now.tv_nsec) / 1'000'000;
}

void EventLog::add(EventRecord record) {
  record.unix_ms = unix_ms_now();
  std::lock_guard hold(lock_);
  record.number = ++last_number_;
  records_.push_back(std::move(record));
  if (records_.size() > max_records_) records_.pop_front();
}

Json EventLog::since(std::uint64_t after) const {
  std::lock_guard hold(lock_);
  Json list = Json::array();
  const std::uint64_t first = last_number_ - records_.size() + 1;  // of the oldest that is left
  std::uint64_t next = after;
  std::size_t bytes = 0;
  for (std::size_t i = after >= first ? after - first + 1 : 0; i < records_.size(); ++i) {
    bytes += kEventBytes + kMoveBytes * records_[i].moves.size();
    if (bytes > kReplyBytes && !list.empty()) break;
    list.push_back(event_json(records_[i]));
    next = records_[i].number;
  }
  Json reply;
  reply["schema"] = kSchema;
  reply["events"] = std::move(list);
  reply["next"] = next;
  reply["last"] = last_number_;
  reply["lost"] = after + 1 < first ? first - after - 1 : 0;
  return reply;
}

}  // namespace hypertier
