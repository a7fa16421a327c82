// SPDX-License-Identifier: GPL-2.0-or-later
// What happened, and why: events, explain.
#include <time.h>
#include <unistd.h>

#include <cinttypes>
#include <cstdio>

#include "tierctl/commands.hpp"
#include "tierctl/output.hpp"

namespace hypertier {
namespace {

// A follower asks so often: an epoch is rarely shorter.
constexpr useconds_t kFollowUs = 250'000;

std::string hex(const Json& address) {
  char text[32];
  std::snprintf(text, sizeof(text), "%" PRIx64, address.get<std::uint64_t>());
  return text;
}

std::string time_text(std::uint64_t unix_ms) {
  const time_t seconds = static_cast<time_t>(unix_ms / 1000);
  tm local{};
  localtime_r(&seconds, &local);
  char text[32];
  std::strftime(text, sizeof(text), "%F %T", &local);
  return text;
}

void print_event(const Json& event) {
  const std::string policy = event["policy"];
  std::printf("%s  %-12s %s%s%s: %s\n", time_text(event["unix_ms"].get<std::uint64_t>()).c_str(),
              event["kind"].get<std::string>().c_str(), event["cgroup"].get<std::string>().c_str(), policy.empty() ? "" : " ",
              policy.c_str(), event["text"].get<std::string>().c_str());
  if (!event.contains("moves")) return;
  for (const auto& move : event["moves"])
    std::printf("    pid %s %s-%s: %s up, %s down: %s\n", number_text(move["pid"]).c_str(), hex(move["start"]).c_str(),
                hex(move["end"]).c_str(), number_text(move["promoted_pages"]).c_str(),
                number_text(move["demoted_pages"]).c_str(), move["why"].get<std::string>().c_str());
}

}  // namespace

int command_events(const Context& context, bool follow, std::uint64_t after) {
  Json all = Json::array();
  std::uint64_t lost = 0;
  for (;;) {
    auto reply = ask_tierd(context.socket, {{"command", "events"}, {"after", after}});
    if (!reply) return print_error(reply.error(), context.json);
    const auto last = (*reply)["last"].get<std::uint64_t>();
    if (after > last) {  // another tierd: its records start anew
      after = 0;
      continue;
    }
    if (const auto missed = (*reply)["lost"].get<std::uint64_t>(); missed != 0 && after != 0)
      std::fprintf(stderr, "tierctl: warning: %" PRIu64 " records were overwritten before they were read\n", missed);
    lost += (*reply)["lost"].get<std::uint64_t>();
    for (auto& event : (*reply)["events"]) {
      if (!context.json) {
        print_event(event);
      } else if (follow) {  // a line each
        event["schema"] = kSchema;
        std::puts(event.dump(-1, ' ', false, Json::error_handler_t::replace).c_str());
      }
      if (!follow) all.push_back(std::move(event));
    }
    after = (*reply)["next"].get<std::uint64_t>();
    if (after < last) continue;
    if (!follow) break;
    std::fflush(stdout);
    usleep(kFollowUs);
  }
  if (context.json) print_json({{"schema", kSchema}, {"events", std::move(all)}, {"next", after}, {"lost", lost}});
  else if (all.empty()) std::puts("nothing happened since tierd started");
  return 0;
}

int command_explain(const Context& context, std::uint32_t pid, std::uint64_t address) {
  auto reply = ask_tierd(context.socket, {{"command", "explain"}, {"pid", pid}, {"address", address}});
  if (!reply) return print_error(reply.error(), context.json);
  const Json& r = *reply;
  if (context.json) {
    print_json(r);
    return 0;
  }
  const Json& range = r["range"];
  const std::string tier = r["tier"];
  print_table({{"page", hex(r["address"]) + " of process " + number_text(r["pid"]) + " (" + range["comm"].get<std::string>() + ")"},
               {"is in", tier == "none" ? std::string("no tier") : tier + " memory"},
               {"because", r["reason"].get<std::string>()},
               {"range", hex(range["start"]) + "-" + hex(range["end"]) + ", " +
                             (range["scattered"].get<bool>() ? number_text(range["mapped_pages"]) + " pages of it, " : "") +
                             range["kind"].get<std::string>() + ", " +
                             number_text(range["age_epochs"]) + " epochs old, last sample " + number_text(range["idle_epochs"]) +
                             " epochs ago"},
               {"policy", r["policy"].get<std::string>() + " of " + r["cgroup"].get<std::string>() + ", epoch " + number_text(r["epoch"])}});
  std::puts("");
  std::vector<std::vector<std::string>> rows{{"EPOCH", "RANGE", "HEAT", "CUT", "SAMPLES", "FAST", "SLOW", "UP", "DOWN"}};
  for (const auto& past : r["history"])
    rows.push_back({number_text(past["epoch"]), hex(past["start"]) + "-" + hex(past["end"]), number_text(past["heat"]),
                    number_text(past["cut_heat"]), number_text(past["samples"]), number_text(past["fast_pages"]),
                    number_text(past["slow_pages"]), number_text(past["promoted_pages"]), number_text(past["demoted_pages"])});
  print_table(rows, {true, false, true, true, true, true, true, true, true});
  return 0;
}

}  // namespace hypertier
