// SPDX-License-Identifier: GPL-2.0-or-later
#include "tierd/explain.hpp"

#include <string>

namespace hypertier {
namespace {

std::string moved_text(const PastRange& past, bool promoted) {
  if (promoted)
    return std::to_string(past.promoted_pages) + " pages of its range were promoted in epoch " + std::to_string(past.epoch) +
           ", when heat " + std::to_string(past.heat) + " was above the cut at " + std::to_string(past.cut_heat);
  return std::to_string(past.demoted_pages) + " pages of its range were demoted in epoch " + std::to_string(past.epoch) +
         ", when heat " + std::to_string(past.heat) + " was below the cut at " + std::to_string(past.cut_heat);
}

std::string reason_of(const Explanation& found, const char* tier, __u32 cut_heat, const std::optional<EpochReport>& report) {
  const tier_range& range = found.view.range;
  const bool hot = (found.notes & kRangeHot) != 0, fast = std::string(tier) == "fast";
  if (std::string(tier) == "none") return "no page is mapped there now";
  std::string reason = "heat " + std::to_string(range.heat) + ", rank " + std::to_string(found.rank + 1) + " of " +
                       std::to_string(found.ranges) + " ranges, is " + (hot ? "above" : "below") + " the cut at heat " +
                       std::to_string(cut_heat);
  const PastRange* last = nullptr;  // the last move its way
  for (const PastRange& past : found.history)
    if ((fast ? past.promoted_pages : past.demoted_pages) != 0) {
      last = &past;
      break;
    }
  if (last) reason += "; " + moved_text(*last, fast);
  if (fast && !last) reason += hot ? "; it was in fast memory already" : "; nothing hotter needed its place";
  if (!fast && hot) {
    if (found.notes & kRangeCooling) reason += "; it was moved to and fro lately and is left alone for a while";
    else if (found.notes & kRangeHeld) reason += "; the policy's admit refused to promote it lately";
    else if (report && report->decision == Decision::kDryRun) reason += "; a dry run moves nothing";
    else if (report && report->rate_limited_pages) reason += "; it waits for the rate limit";
    else if (report && report->decision == Decision::kNothingColder) reason += "; nothing colder is in fast memory";
    else reason += "; it waits its turn";
  } else if (!fast && !last) {
    reason += range.heat ? "; hotter memory fills the fast tier" : "; no sample says that it is used";
  }
  return reason;
}

}  // namespace

void explain_into(Json& reply, const Explanation& found, const std::optional<EpochReport>& report) {
  const char* tier = found.page_tier_pages[HT_TIER_FAST] ? "fast" : found.page_tier_pages[HT_TIER_SLOW] ? "slow" : "none";
  const __u32 cut_heat = report ? report->cut_heat : 0;
  reply["tier"] = tier;
  reply["reason"] = reason_of(found, tier, cut_heat, report);
  reply["cut_heat"] = cut_heat;
  reply["rank"] = found.rank + 1;
  reply["ranges"] = found.ranges;
  reply["hot"] = (found.notes & kRangeHot) != 0;
  reply["cooling"] = (found.notes & kRangeCooling) != 0;
  reply["refused"] = (found.notes & kRangeHeld) != 0;
  Json history = Json::array();
  for (const PastRange& past : found.history) {
    Json entry;
    entry["epoch"] = past.epoch;
    entry["start"] = past.start;
    entry["end"] = past.end;
    entry["heat"] = past.heat;
    entry["cut_heat"] = past.cut_heat;
    entry["samples"] = past.samples;
    entry["fast_pages"] = past.fast_pages == HT_UNKNOWN64 ? Json(nullptr) : Json(past.fast_pages);
    entry["slow_pages"] = past.slow_pages == HT_UNKNOWN64 ? Json(nullptr) : Json(past.slow_pages);
    entry["promoted_pages"] = past.promoted_pages;
    entry["demoted_pages"] = past.demoted_pages;
    history.push_back(std::move(entry));
  }
  reply["history"] = std::move(history);
}

}  // namespace hypertier
