// SPDX-License-Identifier: GPL-2.0-or-later
#include "tierctl/commands.hpp"

#include <fcntl.h>
#include <time.h>
#include <unistd.h>

#include <cerrno>
#include <chrono>
#include <cstdio>
#include <fstream>

#include <hypertier/abi.h>

#include "adapter/adapter.hpp"
#include "adapter/cgroups.hpp"
#include "policy/policy.hpp"
#include "tierctl/output.hpp"

namespace hypertier {
namespace {

Json request(const char* command) { return Json{{"command", command}}; }

struct OpenPolicy {
  Fd fd;
  std::string file;  // as given: what messages call it
};

Result<OpenPolicy> open_policy_file(const std::string& file_or_name) {
  auto path = resolve_policy(file_or_name);
  if (!path) return std::unexpected(path.error());
  Fd fd(open(path->c_str(), O_RDONLY | O_CLOEXEC));
  if (!fd) return fail_errno("cannot open " + path->string(), errno);
  return OpenPolicy{std::move(fd), file_or_name};
}

Result<PolicyObject> read_policy(const std::string& file_or_name) {
  auto opened = open_policy_file(file_or_name);
  if (!opened) return std::unexpected(opened.error());
  auto bytes = read_policy_file(opened->fd.get(), opened->file);
  if (!bytes) return std::unexpected(bytes.error());
  return PolicyObject::open(std::move(*bytes), opened->file);
}

Result<Json> settings_json(const std::vector<std::string>& settings) {
  Json json = Json::object();
  for (const auto& setting : settings) {
    const auto equals = setting.find('=');
    if (equals == std::string::npos || equals == 0 || equals + 1 == setting.size())
      return fail("\"" + setting + "\" is not a setting", "write --set key=value");
    json[setting.substr(0, equals)] = setting.substr(equals + 1);
  }
  return json;
}

std::string joined(const Json& list) {
  std::string text;
  for (const auto& item : list) text += (text.empty() ? "" : ",") + item.dump();
  return text;
}

std::string hex(const Json& address) {
  char text[32];
  std::snprintf(text, sizeof(text), "%llx", static_cast<unsigned long long>(address.get<std::uint64_t>()));
  return text;
}

std::string pages_text(const Json& pages) {
  return pages.is_number() ? size_text(pages.get<std::uint64_t>() * HT_PAGE_SIZE) : "?";
}

// "pinned 12, busy 3"; empty if all are 0.
std::string nonzero(const Json& counts) {
  std::string text;
  for (const auto& [key, value] : counts.items())
    if (value != 0) text += (text.empty() ? "" : ", ") + key + " " + value.dump();
  return text;
}

std::string names_of(const Json& list) {
  std::string text;
  for (const auto& item : list) text += (text.empty() ? "" : ", ") + item.get<std::string>();
  return text;
}

std::string rate_words(const Json& bytes_per_s) {
  return bytes_per_s == 0 ? "at any rate" : "at most " + size_text(bytes_per_s) + "/s";
}

Json policy_json(const PolicyObject& policy) {
  const PolicyInfo& info = policy.info();
  Json json;
  json["schema"] = kSchema;
  json["policy"] = info.name;
  json["file"] = policy.file();
  json["abi"] = std::to_string(info.abi_major) + "." + std::to_string(info.abi_minor);
  json["epoch_ms"] = info.epoch_ms;
  json["moves"] = (info.flags & HT_POLICY_NO_MOVES) == 0;
  json["callbacks"] = info.callbacks;
  Json settings = Json::array();
  for (const auto& setting : info.settings)
    settings.push_back({{"key", setting.key},
                        {"type", setting.type},
                        {"value", setting.value},
                        {"minimum", setting.minimum},
                        {"maximum", setting.maximum}});
  json["settings"] = std::move(settings);
  return json;
}

void print_policy(const PolicyObject& policy) {
  const PolicyInfo& info = policy.info();
  std::string callbacks;
  for (const auto& callback : info.callbacks) callbacks += (callbacks.empty() ? "" : ", ") + callback;
  print_table({{"policy", info.name},
               {"abi", std::to_string(info.abi_major) + "." + std::to_string(info.abi_minor)},
               {"epoch", std::to_string(info.epoch_ms) + " ms"},
               {"moves pages", (info.flags & HT_POLICY_NO_MOVES) == 0 ? "yes" : "no"},
               {"callbacks", callbacks.empty() ? "none: the defaults" : callbacks}});
  if (info.settings.empty()) return;
  std::puts("");
  std::vector<std::vector<std::string>> rows{{"SETTING", "TYPE", "VALUE"}};
  for (const auto& setting : info.settings) rows.push_back({setting.key, setting.type, setting.value});
  print_table(rows, {false, false, true});
}

std::string first_line(const std::filesystem::path& path) {
  std::ifstream file(path);
  std::string line;
  std::getline(file, line);
  return line;
}

}  // namespace

// The policy is seated; is it still, some epochs later? The exit code says so.
static int wait_and_see(const Context& context, const LoadArguments& arguments, const Json& loaded, std::int64_t asked_ms) {
  Json message = request("status");
  message["cgroup"] = arguments.cgroup;
  std::optional<std::uint64_t> first;
  constexpr int kReasonTries = 100;
  int tries = 0;
  for (;;) {
    auto reply = ask_tierd(context.socket, message);
    if (!reply) return print_error(reply.error(), context.json);
    const Json& scope = (*reply)["scopes"][0];
    if (scope["generation"] != loaded["generation"]) {
      // The reason follows when the epoch has ended; until then it is that of an earlier policy.
      const Json& last = scope["last_exit"];
      const bool ours = !last.is_null() && last["unix_ms"] >= asked_ms && last["generation"] >= loaded["generation"];
      if (!ours && tries++ < kReasonTries) {
        usleep(50'000);
        continue;
      }
      const Json& exit = scope["last_exit"];
      const std::string reason = exit.is_null() ? "it left its seat" : exit["reason"].get<std::string>();
      const std::string said = exit.is_null() ? "" : exit["message"].get<std::string>();
      return print_error({"policy " + loaded["policy"].get<std::string>() + " did not last " + std::to_string(arguments.wait_epochs) +
                              " epochs: " + reason,
                          said.empty() ? "`tierctl events` says more" : "it said: " + said, 0},
                         context.json);
    }
    const auto epochs = scope["counters"]["epochs_total"].get<std::uint64_t>();
    if (!first) first = epochs;
    if (epochs >= *first + arguments.wait_epochs) return 0;
    usleep(50'000);
  }
}

// ------------------------------------------------------------------- seats

int command_load(const Context& context, const LoadArguments& arguments) {
  auto settings = settings_json(arguments.settings);
  if (!settings) {
    print_error(settings.error(), context.json);
    return 2;
  }
  auto file = open_policy_file(arguments.file);
  if (!file) return print_error(file.error(), context.json);
  Json message = request("load");
  message["file"] = file->file;
  message["cgroup"] = arguments.cgroup;
  message["settings"] = std::move(*settings);
  if (!arguments.rate.empty()) message["rate"] = arguments.rate;
  message["dry_run"] = arguments.dry_run;
  const auto asked_ms =
      std::chrono::duration_cast<std::chrono::milliseconds>(std::chrono::system_clock::now().time_since_epoch()).count();
  auto reply = ask_tierd(context.socket, std::move(message), file->fd.get());
  if (!reply) return print_error(reply.error(), context.json);
  if (context.json) {
    print_json(*reply);
  } else {
    const Json& r = *reply;
    std::printf("policy %s is seated%s, samples come from %s%s\n", r["policy"].get<std::string>().c_str(),
                r["replaced"].is_null() ? "" : (" in place of " + r["replaced"].get<std::string>()).c_str(),
                r["source"].get<std::string>().c_str(), arguments.dry_run ? "; a dry run: nothing is moved" : "");
  }
  for (const auto& warning : (*reply)["warnings"])
    std::fprintf(stderr, "tierctl: warning: %s\n", warning.get<std::string>().c_str());
  return arguments.wait_epochs != 0 ? wait_and_see(context, arguments, *reply, asked_ms) : 0;
}

int command_restore(const Context& context, const std::string& cgroup) {
  Json message = request("restore");
  message["cgroup"] = cgroup;
  auto reply = ask_tierd(context.socket, std::move(message));
  if (!reply) return print_error(reply.error(), context.json);
  if (context.json) print_json(*reply);
  else std::printf("the default policy %s is seated\n", (*reply)["policy"].get<std::string>().c_str());
  return 0;
}

int command_unload(const Context& context, const std::string& cgroup, bool force) {
  Json message = request("unload");
  message["cgroup"] = cgroup;
  message["force"] = force;
  auto reply = ask_tierd(context.socket, std::move(message));
  if (!reply && force && reply.error().err == ECONNREFUSED) {
    if (geteuid() != 0)
      return print_error({"only root may remove what a dead tierd left", "run it again as root, for example with sudo", 0},
                         context.json);
    // The lock proves that tierd is dead and does not start meanwhile.
    auto lock = take_lock();
    if (!lock) return print_error(lock.error(), context.json);
    auto removed = remove_stale_pins();
    if (!removed) return print_error(removed.error(), context.json);
    if (context.json) print_json({{"schema", kSchema}, {"cgroup", "/"}, {"policy", nullptr}, {"stale_pins_removed", *removed}});
    else std::puts(*removed ? "removed what a dead tierd left pinned" : "nothing was left: tierd is not running, nothing is pinned");
    return 0;
  }
  if (!reply) return print_error(reply.error(), context.json);
  if (context.json) {
    print_json(*reply);
  } else if ((*reply)["policy"].is_null()) {
    std::puts("no policy was seated");
  } else {
    std::printf("policy %s is unloaded, %s\n", (*reply)["policy"].get<std::string>().c_str(),
                (*reply)["seats_left"] == 0 ? "the machine is as it was before" : "the policy above it takes its processes");
  }
  return 0;
}

// ------------------------------------------------------------------ status

namespace {

void print_scope(const Json& status, const Json& scope) {
  const Json& counters = scope["counters"];
  const std::string state = scope["state"], cgroup = scope["cgroup"];
  if (scope["policy"].is_null()) {
    std::printf("%s: no policy is seated (%s); `tierctl load %s%s` seats the default\n", cgroup.c_str(), state.c_str(),
                status["default_policy"].get<std::string>().c_str(), cgroup == "/" ? "" : (" --cgroup " + cgroup).c_str());
    if (!scope["error"].is_null())
      std::printf("the saved policy could not be seated: %s\nHINT: %s\n", scope["error"]["message"].get<std::string>().c_str(),
                  scope["error"]["hint"].get<std::string>().c_str());
  } else {
    const auto pages = [&](const char* name) { return counters[name].get<std::uint64_t>() * HT_PAGE_SIZE; };
    const auto epochs = counters["epochs_total"].get<std::uint64_t>();
    const auto runs = counters["sampler_runs_total"].get<std::uint64_t>();
    const std::string seat = scope["seat"];
    std::vector<std::vector<std::string>> rows = {
        {"cgroup", cgroup},
        {"policy", scope["policy"].get<std::string>() + " (" + state + ", " +
                       (seat == cgroup ? "number " + number_text(scope["generation"]) + " in this seat" : "that of " + seat) + ")"},
        {"epoch", number_text(scope["epoch"]) + ", " + number_text(scope["epoch_ms"]) + " ms each"},
        {"managed", number_text(scope["processes"]) + " processes, " + number_text(scope["ranges"]) + " ranges"},
        {"used", size_text(scope["fast_bytes"]) + " fast, " + size_text(scope["slow_bytes"]) + " slow"},
        {"samples", number_text(counters["samples_total"])},
        {"promoted", size_text(pages("promoted_pages_total"))},
        {"demoted", size_text(pages("demoted_pages_total"))},
        {"mover", status["mover"].get<std::string>() + ", " + number_text(counters["exchanged_pairs_total"]) +
                      " pairs exchanged, " + number_text(counters["flush_calls_total"]) + " flushes"},
        {"cost", "policy " + duration_text(epochs != 0 ? counters["policy_ns_total"].get<std::uint64_t>() / epochs : 0) +
                     " an epoch, sampler " +
                     (runs != 0 ? duration_text(counters["sampler_ns_total"].get<std::uint64_t>() / runs) + " a sample"
                                : std::string("not measured"))}};
    std::string budget;
    if (!scope["fast_max_bytes"].is_null()) budget += "at most " + size_text(scope["fast_max_bytes"]) + " fast";
    if (!scope["fast_min_bytes"].is_null()) budget += (budget.empty() ? "" : ", ") + size_text(scope["fast_min_bytes"]) + " fast kept for it";
    if (!budget.empty()) rows.push_back({"budget", budget});
    rows.push_back({"moves", scope["dry_run"] == true ? "none, a dry run: " + size_text(pages("dry_run_pages_total")) + " would have been promoted"
                                                       : rate_words(scope["rate_bytes_per_s"]) + ", " +
                                                             size_text(pages("rate_limited_pages_total")) + " held back, " +
                                                             size_text(pages("reversed_pages_total")) + " moved back"});
    if (!scope["last_epoch"].is_null()) rows.push_back({"last epoch", scope["last_epoch"]["text"].get<std::string>()});
    if (!scope["error"].is_null()) rows.push_back({"error", scope["error"]["message"].get<std::string>()});
    print_table(rows);
  }
  if (!scope["last_exit"].is_null()) {
    const Json& exit = scope["last_exit"];
    std::printf("last exit: %s %s at epoch %s: %s\n", exit["policy"].get<std::string>().c_str(),
                exit["kind"].get<std::string>().c_str(), number_text(exit["epoch"]).c_str(),
                exit["reason"].get<std::string>().c_str());
    if (!exit["message"].get<std::string>().empty())
      std::printf("           %s (%s)\n", exit["code"].get<std::string>().c_str(), exit["message"].get<std::string>().c_str());
  }
  std::puts("");
}

}  // namespace

int command_status(const Context& context, const std::string& cgroup) {
  Json message = request("status");
  message["cgroup"] = cgroup;
  auto reply = ask_tierd(context.socket, std::move(message));
  if (!reply) return print_error(reply.error(), context.json);
  const Json& status = *reply;
  if (context.json) {
    print_json(status);
    return 0;
  }
  std::vector<std::vector<std::string>> rows{{"TIER", "NODES", "SIZE", "FREE"}};
  for (const auto& tier : status["tiers"])
    rows.push_back({tier["role"].get<std::string>(), joined(tier["nodes"]), size_text(tier["capacity_bytes"]),
                    size_text(tier["free_bytes"])});
  if (rows.size() > 1) print_table(rows, {false, false, true, true});
  else std::printf("no tiers: %s\n", status.value("tiers_error", "").c_str());
  std::puts("");

  const Json& scopes = status["scopes"];
  bool seated = false;
  for (const auto& scope : scopes) seated |= !scope["policy"].is_null();
  for (const auto& scope : scopes)
    // Of a root without a policy there is nothing to say where others have one.
    if (!(seated && scopes.size() > 1 && scope["policy"].is_null() && scope["last_exit"].is_null() && scope["error"].is_null()))
      print_scope(status, scope);
  if (!seated) return 0;
  rows.clear();
  std::string source = status["source"].get<std::string>();
  const Json& sampling = status["sampling"];
  const bool samples = sampling.contains("period"), reads_bits = sampling.contains("interval_ns");
  if (samples) source += ", one sample in " + number_text(status["period"]) + " misses, on " + number_text(status["sampling_cpus"]) + " CPUs";
  if (samples && sampling["burst"].get<double>() > 1) source += " (more than later: the estimate is new, or heat has shifted)";
  if (reads_bits) {
    char bits[96];
    std::snprintf(bits, sizeof(bits), "%s accessed bits after %.1f ms, pass %llu", samples ? ";" : ",", sampling["interval_ns"].get<double>() * 1e-6,
                  sampling["passes_total"].get<unsigned long long>());
    source += bits;
  }
  rows.push_back({"source", source});
  // Up to there bits tell much that samples do not (docs/heattree.md).
  constexpr double kFewSamples = 0.05;
  constexpr double kIdle = 0.0005;
  if (samples) {
    const double s = status["s"].get<double>();
    char density[64];
    std::snprintf(density, sizeof(density), "%.3f samples per fast-tier page and epoch", s);
    const bool few = !reads_bits && s >= kIdle && s < kFewSamples;
    rows.push_back({"density", density + (few ? "; few: accessed bits beside them tell more (tierd --source " + status["source"].get<std::string>() + "+abit)" : std::string())});
  }
  // What is fine is not shown.
  const std::string dropped = nonzero(status["dropped"]), failed = nonzero(status["move_failures"]),
                    stray = nonzero(status["stray_samples"]);
  if (!dropped.empty()) rows.push_back({"dropped", dropped + " samples"});
  if (!stray.empty()) rows.push_back({"stray", stray + " samples"});
  if (!failed.empty()) rows.push_back({"not moved", failed + " pages"});
  print_table(rows);
  return 0;
}

int command_ranges(const Context& context, std::optional<std::uint32_t> pid, const std::string& cgroup) {
  Json all;
  Json message = request("ranges");
  message["cgroup"] = cgroup;
  if (pid) message["pid"] = *pid;
  for (;;) {
    auto reply = ask_tierd(context.socket, message);
    if (!reply) return print_error(reply.error(), context.json);
    const Json next = (*reply)["next"];
    if (all.is_null()) {
      all = std::move(*reply);
      all.erase("next");
    } else {
      for (auto& range : (*reply)["ranges"]) all["ranges"].push_back(std::move(range));
    }
    if (next.is_null()) break;
    message["first"] = next;
  }
  if (context.json) {
    print_json(all);
    return 0;
  }
  if (all["ranges"].empty()) {
    std::puts(pid ? "no ranges of that process" : "no ranges: no policy is seated, or no epoch has ended yet");
    return 0;
  }
  // Of one whose pages lie among others': how much it is, of how long a stretch.
  const auto size = [](const Json& range) {
    const std::string stretch = size_text(range["end"].get<std::uint64_t>() - range["start"].get<std::uint64_t>());
    return range["scattered"].get<bool>() ? size_text(range["mapped_pages"].get<std::uint64_t>() << HT_PAGE_SHIFT) + " of " + stretch : stretch;
  };
  std::vector<std::vector<std::string>> rows{
      {"PID", "COMMAND", "START", "SIZE", "KIND", "HEAT", "SAMPLES", "FAST", "SLOW", "AGE", "IDLE", "ACTION"}};
  for (const auto& range : all["ranges"])
    rows.push_back({number_text(range["pid"]), range["comm"].get<std::string>(), hex(range["start"]),
                    size(range),
                    range["kind"].get<std::string>(), number_text(range["heat"]), number_text(range["samples"]),
                    pages_text(range["fast_pages"]), pages_text(range["slow_pages"]), number_text(range["age_epochs"]),
                    number_text(range["idle_epochs"]), range["action"].get<std::string>()});
  print_table(rows, {true, false, true, true, false, true, true, true, true, true, true, false});
  return 0;
}

// ----------------------------------------------------------------- budgets

namespace {

int print_budgets(const Context& context, Json reply, const std::string& cgroup) {
  if (!cgroup.empty()) {
    Json kept = Json::array();
    for (auto& entry : reply["budgets"])
      if (entry["cgroup"] == cgroup) kept.push_back(std::move(entry));
    reply["budgets"] = std::move(kept);
  }
  if (context.json) {
    print_json(reply);
    return 0;
  }
  if (reply["budgets"].empty()) {
    std::puts(cgroup.empty() ? "no cgroup has a budget" : "this cgroup has no budget");
    return 0;
  }
  const auto amount = [](const Json& entry, const std::string& name) {
    if (entry[name].is_null()) return std::string("-");
    const std::string given = entry[name], size = size_text(entry[name + "_bytes"]);
    return given.ends_with('%') ? given + " = " + size : size;
  };
  std::vector<std::vector<std::string>> rows{{"CGROUP", "FAST-MAX", "FAST-MIN", "FAST", "SLOW", "IN FORCE"}};
  for (const auto& entry : reply["budgets"])
    rows.push_back({entry["cgroup"].get<std::string>(), amount(entry, "fast_max"), amount(entry, "fast_min"),
                    size_text(entry["fast_bytes"]), size_text(entry["slow_bytes"]),
                    entry["in_force"].get<bool>() ? "yes" : "no: no policy answers for it, or there is no such cgroup"});
  print_table(rows, {false, true, true, true, true, false});
  return 0;
}

}  // namespace

int command_cgroup_set(const Context& context, const BudgetArguments& arguments) {
  Json message = request("cgroup_set");
  message["cgroup"] = arguments.cgroup;
  if (!arguments.fast_max.empty()) message["fast_max"] = arguments.fast_max;
  if (!arguments.fast_min.empty()) message["fast_min"] = arguments.fast_min;
  if (!arguments.rate.empty()) message["rate"] = arguments.rate;
  if (!arguments.dry_run.empty()) message["dry_run"] = arguments.dry_run == "on";
  auto reply = ask_tierd(context.socket, std::move(message));
  if (!reply) return print_error(reply.error(), context.json);
  return print_budgets(context, std::move(*reply), {});
}

int command_cgroup_reset(const Context& context, const std::string& cgroup) {
  Json message = request("cgroup_reset");
  message["cgroup"] = cgroup;
  auto reply = ask_tierd(context.socket, std::move(message));
  if (!reply) return print_error(reply.error(), context.json);
  return print_budgets(context, std::move(*reply), {});
}

int command_cgroup_show(const Context& context, const std::string& cgroup) {
  auto reply = ask_tierd(context.socket, request("cgroup_show"));
  if (!reply) return print_error(reply.error(), context.json);
  std::string path;
  if (!cgroup.empty()) {
    auto normal = Cgroups().normalize(cgroup);
    if (!normal) return print_error(normal.error(), context.json);
    path = *normal;
  }
  return print_budgets(context, std::move(*reply), path);
}

// ---------------------------------------------------------------- policies

int command_policy_list(const Context& context) {
  std::vector<std::vector<std::string>> rows{{"INSTALLED", "EPOCH", "SETTINGS"}};
  Json list = Json::array();
  for (const auto& name : installed_policy_names()) {
    auto policy = read_policy(name);
    if (!policy) {
      std::fprintf(stderr, "tierctl: warning: %s\n", policy.error().message.c_str());
      continue;
    }
    list.push_back({{"policy", name}, {"epoch_ms", policy->info().epoch_ms}, {"settings", policy->info().settings.size()}});
    rows.push_back({name, std::to_string(policy->info().epoch_ms) + " ms", std::to_string(policy->info().settings.size())});
  }
  // Without tierd, or without the right to ask it, the installed ones are all there is to tell.
  Json seats = Json::array();
  if (auto reply = ask_tierd(context.socket, request("policies"))) seats = (*reply)["seats"];
  if (context.json) {
    print_json({{"schema", kSchema}, {"default_policy", kDefaultPolicy}, {"policies", std::move(list)}, {"seats", std::move(seats)}});
    return 0;
  }
  if (rows.size() == 1) std::puts("no policy is installed beside this tierctl");
  else print_table(rows, {false, true, true});
  if (seats.empty()) return 0;
  std::puts("");
  rows = {{"SEATED IN", "POLICY", "NUMBER", "EPOCH", "CALLBACKS", "STRUCT_OPS MAP", "PROGRAMS"}};
  for (const auto& seat : seats) {
    std::string programs;
    for (const auto& program : seat["programs"]) programs += (programs.empty() ? "" : ",") + program["id"].dump();
    rows.push_back({seat["cgroup"].get<std::string>(), seat["policy"].get<std::string>(), number_text(seat["generation"]),
                    number_text(seat["epoch_ms"]) + " ms", names_of(seat["callbacks"]), number_text(seat["struct_ops_map_id"]), programs});
  }
  print_table(rows, {false, false, true, true, false, true, false});
  return 0;
}

namespace {

int show_seated(const Context& context, const std::string& cgroup) {
  auto reply = ask_tierd(context.socket, request("policies"));
  if (!reply) return print_error(reply.error(), context.json);
  auto path = Cgroups().normalize(cgroup);
  if (!path) return print_error(path.error(), context.json);
  for (const auto& seat : (*reply)["seats"]) {
    if (seat["cgroup"] != *path) continue;
    if (context.json) {
      Json json = seat;
      json["schema"] = kSchema;
      print_json(json);
      return 0;
    }
    print_table({{"policy", seat["policy"].get<std::string>() + ", number " + number_text(seat["generation"]) + " in the seat of " + *path},
                 {"file", seat["file"].get<std::string>()},
                 {"epoch", number_text(seat["epoch_ms"]) + " ms"},
                 {"moves", (seat["dry_run"] == true ? std::string("none: dry run") : rate_words(seat["rate_bytes_per_s"]))},
                 {"callbacks", seat["callbacks"].empty() ? "none: the defaults" : names_of(seat["callbacks"])},
                 {"struct_ops map", number_text(seat["struct_ops_map_id"])}});
    std::vector<std::vector<std::string>> rows{{"PROGRAM", "ID", "RUNS", "TIME EACH"}};
    for (const auto& program : seat["programs"]) {
      const auto runs = program["runs_total"].get<std::uint64_t>();
      rows.push_back({program["name"].get<std::string>(), number_text(program["id"]), number_text(program["runs_total"]),
                      runs != 0 ? duration_text(program["ns_total"].get<std::uint64_t>() / runs) : "-"});
    }
    std::puts("");
    print_table(rows, {false, true, true, true});
    rows = {{"MAP", "TYPE", "ID"}};
    for (const auto& map : seat["maps"]) rows.push_back({map["name"].get<std::string>(), map["type"].get<std::string>(), number_text(map["id"])});
    if (rows.size() > 1) {
      std::puts("");
      print_table(rows, {false, false, true});
    }
    rows = {{"SETTING", "VALUE"}};
    for (const auto& [key, value] : seat["settings"].items()) rows.push_back({key, value.get<std::string>()});
    if (rows.size() > 1) {
      std::puts("");
      print_table(rows, {false, true});
    }
    return 0;
  }
  return print_error({"no policy is seated in " + *path, "`tierctl policy list` shows the seats", 0}, context.json);
}

}  // namespace

int command_policy_show(const Context& context, const std::string& file, const std::string& cgroup) {
  if (!cgroup.empty() || file.empty()) return show_seated(context, cgroup.empty() ? "/" : cgroup);
  auto policy = read_policy(file);
  if (!policy) return print_error(policy.error(), context.json);
  if (context.json) print_json(policy_json(*policy));
  else print_policy(*policy);
  return 0;
}

int command_policy_check(const Context& context, const LoadArguments& arguments, bool verbose) {
  auto settings = settings_json(arguments.settings);
  if (!settings) {
    print_error(settings.error(), context.json);
    return 2;
  }
  auto policy = read_policy(arguments.file);
  if (!policy) return print_error(policy.error(), context.json);
  for (const auto& [key, value] : settings->items())
    if (auto set = policy->set(key, value.get<std::string>()); !set) return print_error(set.error(), context.json);
  if (geteuid() != 0)
    return print_error({"only root may ask the verifier", "run it again as root; `tierctl policy show` needs no root", 0},
                       context.json);
  const auto loaded = policy->load(kRootCgroupId);
  if (verbose) std::fputs(policy->load_log().c_str(), stderr);
  if (!loaded) return print_error(loaded.error(), context.json);
  if (context.json) {
    Json json = policy_json(*policy);
    json["verified"] = true;
    print_json(json);
  } else {
    print_policy(*policy);
    std::puts("\nthe verifier accepts it");
  }
  return 0;
}

// ----------------------------------------------------------------- version

int command_version(const Context& context) {
  const std::string module = first_line("/sys/module/hypertier/version");
  auto tierd = ask_tierd(context.socket, request("version"));
  Json json;
  json["schema"] = kSchema;
  json["tierctl"] = HT_VERSION;
  json["abi"] = std::to_string(HT_ABI_MAJOR) + "." + std::to_string(HT_ABI_MINOR);
  json["protocol"] = kProtocol;
  json["tierd"] = tierd ? (*tierd)["tierd"] : Json(nullptr);
  json["module"] = module.empty() ? Json(nullptr) : Json(module);

  std::optional<Error> mismatch;
  if (!module.empty() && module != HT_VERSION)
    mismatch = Error{"hypertier.ko is version " + module + ", but tierctl is " HT_VERSION,
                     "load this release's module: tierctl unload, rmmod hypertier, modprobe hypertier", 0};
  if (tierd && (*tierd)["tierd"] != HT_VERSION)
    mismatch = Error{"tierd is version " + (*tierd)["tierd"].get<std::string>() + ", but tierctl is " HT_VERSION,
                     "restart tierd after an upgrade", 0};
  // A tierd of another protocol answers with an error; one that is not there is no mismatch.
  if (!tierd && tierd.error().message.find("protocol") != std::string::npos) mismatch = tierd.error();
  json["match"] = !mismatch.has_value();
  if (context.json) {
    print_json(json);
  } else {
    print_table({{"tierctl", HT_VERSION},
                 {"tierd", tierd ? json["tierd"].get<std::string>() : "- (" + tierd.error().message + ")"},
                 {"hypertier.ko", module.empty() ? "- (not loaded)" : module},
                 {"policy abi", json["abi"].get<std::string>()},
                 {"protocol", std::to_string(kProtocol)}});
  }
  if (!mismatch) return 0;
  return print_error(*mismatch, false);
}

}  // namespace hypertier
