// SPDX-License-Identifier: GPL-2.0-or-later
#include "tierd/daemon.hpp"

#include <poll.h>
#include <signal.h>
#include <sys/signalfd.h>
#include <sys/timerfd.h>
#include <unistd.h>

#include <array>
#include <cerrno>
#include <cstdio>
#include <fstream>

#include "tierd/agent.hpp"

namespace hypertier {
namespace {

constexpr std::size_t kEventsMax = 256;
// A reply stays far below the size of a message; tierctl asks for the rest.
constexpr std::size_t kRangesPerReply = 1500;
constexpr std::size_t kTextMax = 4096;

void say(const std::string& text) { std::fprintf(stderr, "tierd: %s\n", text.c_str()); }

void say_error(const std::string& what, const Error& error) {
  say(what + ": " + error.message);
  if (!error.hint.empty()) std::fprintf(stderr, "HINT: %s\n", error.hint.c_str());
}

Json pages_or_null(__u64 pages) { return pages == HT_UNKNOWN64 ? Json(nullptr) : Json(pages); }
Json u32_or_null(__u32 value) { return value == HT_UNKNOWN32 ? Json(nullptr) : Json(value); }

// Text from outside goes to logs and terminals.
std::string printable(std::string text) {
  if (text.size() > kTextMax) text.resize(kTextMax);
  for (char& c : text)
    if (static_cast<unsigned char>(c) < 0x20 || c == 0x7f) c = '?';
  return text;
}

const char* action_name(__u32 action) {
  switch (action) {
    case TIER_KEEP: return "keep";
    case TIER_SPLIT: return "split";
    case TIER_MERGE: return "merge";
    default: return "invalid";
  }
}

const char* best_mover(__u32 movers) {
  for (const auto mover : {HT_MOVER_EXCHANGE, HT_MOVER_MIGRATE, HT_MOVER_SYSCALL})
    if ((movers & (1U << mover)) != 0) return mover_name(mover);
  return "none";
}

Json exit_json(const std::optional<PolicyExit>& exit) {
  if (!exit) return nullptr;
  Json json;
  json["kind"] = exit->kind;
  json["code"] = exit->code;
  json["reason"] = exit->reason;
  json["message"] = exit->message;
  json["policy"] = exit->policy;
  json["epoch"] = exit->epoch;
  return json;
}

Json range_json(const RangeView& view) {
  const tier_range& range = view.range;
  Json json;
  json["pid"] = range.pid;
  json["comm"] = view.comm;
  json["space"] = range.space;
  json["start"] = range.start;
  json["end"] = range.end;
  json["heat"] = range.heat;
  json["action"] = action_name(range.action);
  json["samples"] = range.samples;
  json["stores"] = range.stores;
  Json counts = Json::array();
  for (const __u32 count : range.count) counts.push_back(static_cast<double>(count) / (1 << HT_COUNT_SHIFT));
  json["counts"] = std::move(counts);
  json["mapped_pages"] = range.mapped_pages;
  json["fast_pages"] = pages_or_null(range.tier_pages[HT_TIER_FAST]);
  json["slow_pages"] = pages_or_null(range.tier_pages[HT_TIER_SLOW]);
  json["age_epochs"] = range.age_epochs;
  json["idle_epochs"] = range.idle_epochs;
  json["walk_epochs"] = u32_or_null(range.walk_epochs);
  json["kind"] = (range.flags & TIER_RANGE_ANON) != 0    ? "anon"
                 : (range.flags & TIER_RANGE_SHMEM) != 0 ? "shmem"
                                                         : "file";
  json["huge"] = (range.flags & TIER_RANGE_HUGE) != 0;
  json["mapping"] = range.mapping;
  return json;
}

std::string abi_text(std::uint32_t abi) { return std::to_string(abi >> 16) + "." + std::to_string(abi & 0xffff); }

}  // namespace

Daemon::Daemon(DaemonOptions options) : options_(std::move(options)), state_(options_.state) {}

Result<> Daemon::run() {
  auto lock = take_lock();
  if (!lock) return std::unexpected(lock.error());
  lock_ = std::move(*lock);

  // Blocked before anything starts, so that a stop in between is not lost.
  sigset_t mask;
  sigemptyset(&mask);
  sigaddset(&mask, SIGTERM);
  sigaddset(&mask, SIGINT);
  sigprocmask(SIG_BLOCK, &mask, nullptr);
  signals_ = Fd(signalfd(-1, &mask, SFD_CLOEXEC | SFD_NONBLOCK));
  timer_ = Fd(timerfd_create(CLOCK_MONOTONIC, TFD_CLOEXEC | TFD_NONBLOCK));
  if (!signals_ || !timer_) return fail_errno("cannot make a signal or timer descriptor", errno);
  const FlexAgent agent;  // after the signals are blocked: its thread is not to take them

  if (auto stale = remove_stale_pins(); !stale) say_error("stale pins stay", stale.error());
  else if (*stale) say("removed what a dead tierd left pinned");

  auto server = Server::listen(options_.socket, [this](const Json& request, Fd file) {
    return handle(request, std::move(file));
  });
  if (!server) return std::unexpected(server.error());
  server_ = std::move(*server);
  if (!options_.fresh) reseat();
  say("version " HT_VERSION " listens on " + options_.socket.string());

  for (;;) {
    std::array<pollfd, 4> waits{{{server_->fd(), POLLIN, 0}, {signals_.get(), POLLIN, 0}, {-1, POLLIN, 0}, {-1, POLLIN, 0}}};
    if (tiering_) {
      waits[2].fd = timer_.get();
      waits[3].fd = tiering_->events_fd();
    }
    if (poll(waits.data(), waits.size(), -1) < 0 && errno != EINTR) return fail_errno("poll failed", errno);
    if (waits[1].revents != 0) break;
    if (waits[3].revents != 0)
      if (auto taken = tiering_->take_events(); !taken) say_error("process events are lost", taken.error());
    if (waits[2].revents != 0) {
      std::uint64_t expirations = 0;
      if (read(timer_.get(), &expirations, sizeof(expirations)) == sizeof(expirations)) end_epoch();
    }
    // Last: a command may end the tiering that the others speak of.
    if (waits[0].revents != 0) server_->serve();
  }
  say("stops; what is seated is seated again at the next start");
  tiering_.reset();
  return {};
}

// ------------------------------------------------------------------- seats

Result<Json> Daemon::seat(PolicyObject policy) {
  const std::string name = policy.info().name;
  SavedSeat saved{name, policy.file(), policy.changed(), policy.bytes()};
  const bool swapped = tiering_ != nullptr && tiering_->seated();
  const std::string before = swapped ? tiering_->policy().info().name : "";
  if (tiering_) {
    if (auto done = tiering_->swap(std::move(policy)); !done) return std::unexpected(done.error());
  } else {
    auto started = Tiering::start(options_.tiering, std::move(policy));
    if (!started) return std::unexpected(started.error());
    tiering_ = std::move(*started);
  }
  if (swapped) last_exit_ = PolicyExit{"replaced", "ok", "policy " + name + " was loaded in its place", "", before,
                                       tiering_->epoch_number()};
  reseat_error_.reset();
  epoch_error_.reset();
  arm_timer(tiering_->epoch_ms());
  note(swapped ? "swapped" : "seated", name, swapped ? "in place of " + before : "source " + tiering_->source().name);

  Json reply;
  reply["schema"] = kSchema;
  reply["cgroup"] = "/";
  reply["policy"] = name;
  reply["generation"] = tiering_->generation();
  reply["replaced"] = swapped ? Json(before) : Json(nullptr);
  reply["source"] = tiering_->source().name;
  Json warnings = Json::array();
  if (auto kept = state_.save(saved); !kept)
    warnings.push_back("the seat is not saved and will be empty after a restart: " + kept.error().message);
  if (!tiering_->has_default() && name != kDefaultPolicy)
    warnings.push_back(std::string("the default policy ") + kDefaultPolicy +
                       " cannot be loaded: if this policy is ejected, tiering ends");
  reply["warnings"] = std::move(warnings);
  return reply;
}

void Daemon::reseat() {
  const auto failed = [this](const Error& error) {
    reseat_error_ = error;
    say_error("the saved policy is not seated", error);
    note("reseat_failed", "", error.message);
  };
  auto saved = state_.load();
  if (!saved) return failed(saved.error());
  if (!*saved) return;
  auto policy = PolicyObject::open((*saved)->object, (*saved)->file);
  if (!policy) return failed(policy.error());
  for (const auto& [key, value] : (*saved)->settings)
    if (auto set = policy->set(key, value); !set) return failed(set.error());
  if (auto seated = seat(std::move(*policy)); !seated) failed(seated.error());
  else say("policy " + (*saved)->policy + " is seated again");
}

void Daemon::end_epoch() {
  std::optional<PolicyExit> ejected;
  auto done = tiering_->epoch(ejected);
  if (ejected) {
    last_exit_ = *ejected;
    note("ejected", ejected->policy, ejected->reason);
    say("ejected: " + ejected->reason + " (" + ejected->message + ")");
    if (tiering_->seated()) {
      const PolicyObject& policy = tiering_->policy();
      note("seated", policy.info().name, "the default takes over");
      arm_timer(tiering_->epoch_ms());
      // Or the next start would seat what was ejected.
      if (auto kept = state_.save({policy.info().name, policy.file(), policy.changed(), policy.bytes()}); !kept)
        say_error("the seat is not saved", kept.error());
    } else {
      say("no default policy can take over: tiering ends");
      note("stopped", "", "no default policy could take over");
      arm_timer(0);
      tiering_.reset();
      if (auto cleared = state_.clear(); !cleared) say_error("the saved seat stays", cleared.error());
      return;
    }
  }
  if (done) {
    epoch_error_.reset();
    return;
  }
  ++epoch_errors_total_;
  if (!epoch_error_ || epoch_error_->message != done.error().message) {
    say_error("an epoch failed", done.error());
    note("epoch_failed", tiering_->policy().info().name, done.error().message);
  }
  epoch_error_ = done.error();
}

void Daemon::arm_timer(std::uint32_t epoch_ms) {
  itimerspec spec{};
  if (epoch_ms != 0) {
    // From the end of the last epoch, not from now: swaps in quick succession
    // would put the next epoch off again and again.
    constexpr std::uint64_t kSecond = 1'000'000'000;
    const std::uint64_t first = tiering_->last_epoch_ns() + epoch_ms * 1'000'000ULL;
    spec.it_value.tv_sec = static_cast<time_t>(first / kSecond);
    spec.it_value.tv_nsec = static_cast<long>(first % kSecond);
    spec.it_interval.tv_sec = epoch_ms / 1000;
    spec.it_interval.tv_nsec = static_cast<long>(epoch_ms % 1000) * 1'000'000;
  }
  timerfd_settime(timer_.get(), TFD_TIMER_ABSTIME, &spec, nullptr);
}

void Daemon::note(std::string kind, std::string policy, std::string text) {
  timespec now{};
  clock_gettime(CLOCK_REALTIME, &now);
  events_.push_back({static_cast<std::uint64_t>(now.tv_sec) * 1000 + static_cast<std::uint64_t>(now.tv_nsec) / 1'000'000,
                     std::move(kind), std::move(policy), std::move(text)});
  if (events_.size() > kEventsMax) events_.pop_front();
}

// ---------------------------------------------------------------- commands

Json Daemon::handle(const Json& request, Fd file) {
  // nlohmann throws where a field has another type than asked for.
  try {
    auto reply = dispatch(request, std::move(file));
    return reply ? *reply : error_json(reply.error());
  } catch (const Json::exception& error) {
    return error_json({std::string("the request is malformed: ") + error.what(), "tierctl version", 0});
  }
}

Result<Json> Daemon::dispatch(const Json& request, Fd file) {
  const int protocol = request.value("protocol", 0);
  if (protocol != kProtocol)
    return fail("the request is of protocol " + std::to_string(protocol) + ", but this tierd speaks " +
                    std::to_string(kProtocol),
                "use the tierctl and the tierd of one release");
  const std::string command = request.value("command", "");
  const std::string cgroup = request.value("cgroup", "/");
  if (cgroup != "/")
    return fail("per-cgroup seats are not available yet: " + printable(cgroup) + " cannot have a policy of its own",
                "leave out --cgroup to seat the policy for the whole machine");
  if (command == "load") return load(request, std::move(file));
  if (command == "unload") return unload(request.value("force", false));
  if (command == "restore") return restore();
  if (command == "status") return status();
  if (command == "ranges") return ranges(request);
  if (command == "events") return events();
  if (command == "version") return version();
  return fail("tierd knows no command \"" + printable(command) + "\"", "use the tierctl and the tierd of one release");
}

Result<Json> Daemon::load(const Json& request, Fd file) {
  const std::string name = printable(request.value("file", "the file"));
  if (!file) return fail("a load came without a file", "the other end may not be tierctl");
  auto bytes = read_policy_file(file.get(), name);
  if (!bytes) return std::unexpected(bytes.error());
  auto policy = PolicyObject::open(std::move(*bytes), name);
  if (!policy) return std::unexpected(policy.error());
  if (request.contains("settings"))
    for (const auto& [key, value] : request["settings"].items())
      if (auto set = policy->set(key, value.get<std::string>()); !set) return std::unexpected(set.error());
  return seat(std::move(*policy));
}

Result<Json> Daemon::restore() {
  auto policy = open_default_policy();
  if (!policy) return std::unexpected(policy.error());
  return seat(std::move(*policy));
}

Result<Json> Daemon::unload(bool force) {
  Json reply;
  reply["schema"] = kSchema;
  reply["cgroup"] = "/";
  if (tiering_) {
    const std::string name = tiering_->policy().info().name;
    last_exit_ = PolicyExit{"unloaded", "ok", "asked for by tierctl unload", "", name, tiering_->epoch_number()};
    arm_timer(0);
    tiering_.reset();
    note("unloaded", name, "");
    reply["policy"] = name;
  } else {
    reply["policy"] = nullptr;
  }
  reseat_error_.reset();
  epoch_error_.reset();
  if (auto cleared = state_.clear(); !cleared) return std::unexpected(cleared.error());
  if (force) {
    auto removed = remove_stale_pins();
    if (!removed) return std::unexpected(removed.error());
    reply["stale_pins_removed"] = *removed;
  }
  return reply;
}

Json Daemon::scope_json() const {
  Json scope;
  scope["cgroup"] = "/";
  const bool running = tiering_ != nullptr;
  scope["policy"] = running ? Json(tiering_->policy().info().name) : Json(nullptr);
  scope["file"] = running ? Json(tiering_->policy().file()) : Json(nullptr);
  Json settings = Json::object();
  if (running)
    for (const auto& setting : tiering_->policy().info().settings) settings[setting.key] = setting.value;
  scope["settings"] = std::move(settings);
  scope["generation"] = running ? tiering_->generation() : 0;
  scope["state"] = running ? (epoch_error_ ? "failing" : "running") : (reseat_error_ ? "reseat_failed" : "idle");
  const auto& error = running ? epoch_error_ : reseat_error_;
  scope["error"] = error ? Json{{"message", error->message}, {"hint", error->hint}} : Json(nullptr);
  scope["last_exit"] = exit_json(last_exit_);
  scope["epoch"] = running ? tiering_->epoch_number() : 0;
  scope["fast_max_bytes"] = nullptr;
  const auto& report = running ? tiering_->report() : std::nullopt;
  const EngineTotals totals = running ? tiering_->engine().totals() : EngineTotals{};
  const auto bytes = [](__u64 pages) { return pages == HT_UNKNOWN64 ? Json(nullptr) : Json(pages * HT_PAGE_SIZE); };
  scope["fast_bytes"] = report ? bytes(report->scope.tier_pages[HT_TIER_FAST]) : Json(nullptr);
  scope["slow_bytes"] = report ? bytes(report->scope.tier_pages[HT_TIER_SLOW]) : Json(nullptr);
  scope["processes"] = report ? report->scope.processes : 0;
  scope["ranges"] = report ? report->scope.ranges : 0;
  Json& counters = scope["counters"];
  counters["epochs_total"] = totals.epochs_total;
  counters["epoch_errors_total"] = epoch_errors_total_;
  counters["empty_epochs_total"] = running ? tiering_->empty_epochs_total() : 0;
  counters["samples_total"] = totals.samples_total;
  counters["promoted_pages_total"] = totals.promoted_pages_total;
  counters["demoted_pages_total"] = totals.demoted_pages_total;
  counters["exchanged_pairs_total"] = totals.exchanged_pairs_total;
  counters["move_failed_pages_total"] = totals.move_failed_pages_total;
  counters["refused_pages_total"] = totals.refused_pages_total;
  counters["flush_calls_total"] = totals.flush_calls_total;
  counters["batches_total"] = totals.batches_total;
  counters["splits_total"] = totals.splits_total;
  counters["merges_total"] = totals.merges_total;
  counters["policy_failures_total"] = totals.policy_failures_total;
  counters["policy_ns_total"] = totals.policy_ns_total;
  counters["walk_ns_total"] = totals.walk_ns_total;
  counters["exchange_ns_total"] = totals.exchange_ns_total;
  counters["sampler_ns_total"] = running ? tiering_->sampler_cost().ns_total : 0;
  counters["sampler_runs_total"] = running ? tiering_->sampler_cost().runs_total : 0;
  if (report) {
    Json& last = scope["last_epoch"];
    last["decision"] = decision_name(report->decision);
    last["epoch_ns"] = report->scope.epoch_ns;
    last["samples"] = report->scope.samples;
    last["granules"] = report->granules;
    last["hot_ranges"] = report->hot_ranges;
    last["hot_pages"] = report->hot_pages;
    last["hot_slow_pages"] = report->hot_slow_pages;
    last["cut_heat"] = report->cut_heat;
    last["planned_pages"] = report->planned_pages;
    last["promoted_pages"] = report->moved.promoted_pages;
    last["demoted_pages"] = report->moved.demoted_pages;
  } else {
    scope["last_epoch"] = nullptr;
  }
  return scope;
}

Json Daemon::status() const {
  const bool running = tiering_ != nullptr;
  Json json;
  json["schema"] = kSchema;
  json["version"] = HT_VERSION;
  json["pid"] = getpid();
  json["source"] = running ? Json(tiering_->source().name) : Json(nullptr);
  json["source_description"] = running ? Json(tiering_->source().description) : Json(nullptr);
  json["mover"] = running ? Json(best_mover(tiering_->module().movers)) : Json(nullptr);
  json["period"] = running ? Json(tiering_->source().period) : Json(nullptr);
  json["epoch_ms"] = running ? Json(tiering_->epoch_ms()) : Json(nullptr);
  json["s"] = running ? Json(tiering_->density()) : Json(nullptr);
  if (running) {
    Json& sampling = json["sampling"];
    const double budget = tiering_->cpu_share_max();
    sampling["cpu_share_max"] = budget > 0 ? Json(budget) : Json(nullptr);
    sampling["cpu_share"] = std::max(0.0, tiering_->cpu_share());
    if (tiering_->source().events.empty()) {
      const BitsStats bits = tiering_->bits();
      sampling["interval_ns"] = bits.interval_ns;
      sampling["passes_total"] = bits.passes_total;
      sampling["granules_total"] = bits.granules_total;
      sampling["visits_total"] = bits.visits_total;
      sampling["pages_total"] = bits.pages_total;
      sampling["pages_set_total"] = bits.pages_set_total;
      sampling["cpu_ns_total"] = bits.cpu_ns_total;
      sampling["read_ns_total"] = bits.read_ns_total;
      sampling["cycles_total"] = bits.cycles_total;
    } else {
      sampling["period"] = tiering_->source().period;
      sampling["period_min"] = tiering_->rate_control().period_min();
      sampling["period_max"] = tiering_->rate_control().period_max();
      sampling["sample_ns"] = tiering_->source().probe.sample_ns;
    }
  } else {
    json["sampling"] = nullptr;
  }
  json["sampling_cpus"] = running ? tiering_->sampling_cpus() : 0;
  json["default_policy"] = kDefaultPolicy;

  Json tiers = Json::array();
  auto found = running ? Result<Tiers>(tiering_->tiers()) : discover_tiers(options_.tiering.tiers);
  if (found) {
    const auto use = tier_use(*found);
    for (const auto tier : {HT_TIER_FAST, HT_TIER_SLOW}) {
      Json entry;
      entry["role"] = tier == HT_TIER_FAST ? "fast" : "slow";
      entry["nodes"] = found->nodes[tier];
      entry["capacity_bytes"] = use ? Json((*use)[tier].capacity_bytes) : Json(nullptr);
      entry["free_bytes"] = use ? Json((*use)[tier].free_bytes) : Json(nullptr);
      tiers.push_back(std::move(entry));
    }
  } else {
    json["tiers_error"] = found.error().message;
  }
  json["tiers"] = std::move(tiers);
  json["scopes"] = Json::array({scope_json()});

  Json dropped = Json::object(), strays = Json::object(), failures = Json::object(), movers = Json::object();
  const ht_sampler_stats stats = running ? tiering_->sampler_stats() : ht_sampler_stats{};
  const EngineTotals totals = running ? tiering_->engine().totals() : EngineTotals{};
  for (int reason = 0; reason < HT_DROPS; ++reason)
    dropped[drop_name(static_cast<ht_drop>(reason))] = stats.dropped_total[reason];
  for (int reason = 0; reason < kStrays; ++reason)
    strays[stray_name(static_cast<Stray>(reason))] = totals.stray_samples_total[static_cast<std::size_t>(reason)];
  for (int reason = HT_MOVE_DONE + 1; reason < HT_MOVE_RESULTS; ++reason)
    failures[move_result_name(static_cast<ht_move_result>(reason))] =
        totals.failed_pages_total[static_cast<std::size_t>(reason)];
  for (int mover = HT_MOVER_NONE + 1; mover < HT_MOVERS; ++mover)
    movers[mover_name(static_cast<ht_mover>(mover))] = totals.mover_pages_total[static_cast<std::size_t>(mover)];
  json["sampler_samples_total"] = stats.samples_total;
  json["dropped"] = std::move(dropped);
  json["stray_samples"] = std::move(strays);
  json["move_failures"] = std::move(failures);
  json["mover_pages"] = std::move(movers);
  const GranuleUse granules = running ? tiering_->granules() : GranuleUse{};
  json["granules"] = {{"used", granules.used}, {"capacity", granules.capacity}};
  return json;
}

Result<Json> Daemon::ranges(const Json& request) const {
  std::optional<__u32> pid;
  if (request.contains("pid")) pid = request["pid"].get<__u32>();
  const std::size_t first = request.value("first", std::size_t{0});
  Json reply;
  reply["schema"] = kSchema;
  reply["epoch"] = tiering_ ? tiering_->epoch_number() : 0;
  Json list = Json::array();
  reply["next"] = nullptr;
  if (tiering_) {
    const auto views = tiering_->engine().ranges(pid);
    std::size_t i = first;
    for (; i < views.size() && list.size() < kRangesPerReply; ++i) list.push_back(range_json(views[i]));
    if (i < views.size()) reply["next"] = i;
  }
  reply["ranges"] = std::move(list);
  return reply;
}

Json Daemon::events() const {
  Json list = Json::array();
  for (const auto& event : events_)
    list.push_back({{"unix_ms", event.unix_ms}, {"kind", event.kind}, {"policy", event.policy}, {"text", event.text}});
  return {{"schema", kSchema}, {"events", std::move(list)}};
}

Json Daemon::version() const {
  Json reply;
  reply["schema"] = kSchema;
  reply["tierd"] = HT_VERSION;
  reply["abi"] = abi_text(HT_ABI);
  reply["protocol"] = kProtocol;
  reply["module_abi"] = tiering_ ? Json(abi_text(tiering_->module().abi)) : Json(nullptr);
  reply["pid"] = getpid();
  return reply;
}

}  // namespace hypertier
