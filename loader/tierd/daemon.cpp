// SPDX-License-Identifier: GPL-2.0-or-later
#include "tierd/daemon.hpp"

#include <poll.h>
#include <signal.h>
#include <sys/signalfd.h>
#include <time.h>
#include <unistd.h>

#include <array>
#include <cerrno>
#include <cstdio>
#include <fstream>
#include <set>

#include "engine/scope.hpp"
#include "tierd/agent.hpp"
#include "tierd/explain.hpp"

namespace hypertier {
namespace {

// Cgroups whose last exit is remembered.
constexpr std::size_t kExitsMax = 256;
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

Json exit_json(const PolicyExit* exit) {
  if (!exit) return nullptr;
  Json json;
  json["kind"] = exit->kind;
  json["code"] = exit->code;
  json["reason"] = exit->reason;
  json["message"] = exit->message;
  json["policy"] = exit->policy;
  json["epoch"] = exit->epoch;
  json["unix_ms"] = exit->unix_ms;
  json["generation"] = exit->generation;
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
  json["scattered"] = (range.flags & TIER_RANGE_SCATTERED) != 0;
  json["mapping"] = range.mapping;
  return json;
}

std::string abi_text(std::uint32_t abi) { return std::to_string(abi >> 16) + "." + std::to_string(abi & 0xffff); }

}  // namespace

Daemon::Daemon(DaemonOptions options) : options_(std::move(options)), state_(options_.state) {
  options_.tiering.events = &events_;
}

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
  if (!signals_) return fail_errno("cannot make a signal descriptor", errno);
  const FlexAgent agent;  // after the signals are blocked: its thread is not to take them

  if (auto stale = remove_stale_pins(); !stale) say_error("stale pins stay", stale.error());
  else if (*stale) say("removed what a dead tierd left pinned");

  warm_events();  // while there is room: a policy may be seated when there is none
  auto server = Server::listen(options_.socket, [this](const Json& request, Fd file) {
    return handle(request, std::move(file));
  });
  if (!server) return std::unexpected(server.error());
  server_ = std::move(*server);
  if (!options_.fresh) reseat();
  say("version " HT_VERSION " listens on " + options_.socket.string());

  for (;;) {
    std::array<pollfd, 5> waits{{{server_->fd(), POLLIN, 0},
                                 {signals_.get(), POLLIN, 0},
                                 {-1, POLLIN, 0},
                                 {-1, POLLIN, 0},
                                 {-1, POLLIN, 0}}};
    if (tiering_) {
      waits[2].fd = tiering_->news_fd();
      waits[3].fd = tiering_->events_fd();
      waits[4].fd = tiering_->judge_fd();
    }
    if (poll(waits.data(), waits.size(), -1) < 0 && errno != EINTR) return fail_errno("poll failed", errno);
    if (waits[1].revents != 0) break;
    if (waits[3].revents != 0)
      if (auto taken = tiering_->take_events(); !taken) say_error("process events are lost", taken.error());
    if (waits[4].revents != 0) tiering_->hold_cpu_share();
    if (waits[2].revents != 0)
      for (const News& news : tiering_->take_news()) {
        hear(news);
        if (!tiering_) break;
      }
    // Last: a command may end the tiering that the others speak of.
    if (waits[0].revents != 0) server_->serve();
  }
  say("stops; what is seated is seated again at the next start");
  tiering_.reset();
  return {};
}

// ------------------------------------------------------------------- seats

Result<Json> Daemon::seat(const std::string& cgroup, PolicyObject policy, const MoveTerms& moves) {
  auto id = cgroups_.id_of(cgroup);
  if (!id) return std::unexpected(id.error());
  const std::string name = policy.info().name;
  std::string before;
  std::uint64_t generation = 0;
  if (tiering_) {
    if (auto old = tiering_->seats().find(cgroup); old != tiering_->seats().end()) {
      const PolicySeat::Terms terms = old->second->terms();
      before = terms.policy;
      generation = terms.generation;
    }
    // The cgroup may be another one of that name by now.
    end_removed();
  }
  if (tiering_) {
    if (auto done = tiering_->seat(*id, cgroup, std::move(policy), moves); !done) return std::unexpected(done.error());
  } else {
    auto started = Tiering::start(options_.tiering, budgets_, *id, cgroup, std::move(policy), moves);
    if (!started) return std::unexpected(started.error());
    tiering_ = std::move(*started);
  }
  if (!before.empty())
    last_exits_[cgroup] =
        PolicyExit{"replaced", "ok", "policy " + name + " was loaded in its place", "", before, epoch_of(cgroup), unix_ms_now(), generation};
  reseat_errors_.erase(cgroup);
  note(before.empty() ? "seated" : "swapped", cgroup, name,
       before.empty() ? "source " + tiering_->source().name : "in place of " + before);

  const PolicySeat& seat = *tiering_->seats().at(cgroup);
  Json reply;
  reply["schema"] = kSchema;
  reply["cgroup"] = cgroup;
  reply["policy"] = name;
  reply["generation"] = seat.terms().generation;
  reply["replaced"] = before.empty() ? Json(nullptr) : Json(before);
  reply["source"] = tiering_->source().name;
  reply["rate_bytes_per_s"] = moves.rate_bytes_per_s;
  reply["dry_run"] = moves.dry_run;
  Json warnings = Json::array();
  if (auto kept = state_.save(seat.saved()); !kept)
    warnings.push_back("the seat is not saved and will be empty after a restart: " + kept.error().message);
  if (name != kDefaultPolicy && !open_default_policy())
    warnings.push_back(std::string("the default policy ") + kDefaultPolicy +
                       " cannot be loaded: if this policy is ejected, tiering ends");
  reply["warnings"] = std::move(warnings);
  return reply;
}

void Daemon::unseat(const std::string& cgroup, PolicyExit exit) {
  const std::string policy = exit.policy, kind = exit.kind, reason = exit.reason;
  exit.generation = tiering_->seats().at(cgroup)->terms().generation;
  if (last_exits_.size() >= kExitsMax && !last_exits_.contains(cgroup)) last_exits_.erase(last_exits_.begin());
  last_exits_[cgroup] = std::move(exit);
  tiering_->unseat(cgroup);
  note(kind, cgroup, policy, reason);
  end_if_empty();
}

void Daemon::end_if_empty() {
  if (tiering_ && tiering_->seats().empty()) tiering_.reset();
}

void Daemon::reseat() {
  const auto failed = [&](const std::string& cgroup, const Error& error) {
    reseat_errors_[cgroup] = error;
    say_error("the saved policy of " + cgroup + " is not seated", error);
    note("reseat_failed", cgroup, "", error.message);
  };
  if (auto budgets = state_.load_budgets()) budgets_ = std::move(*budgets);
  else say_error("the saved budgets are not in force", budgets.error());
  for (auto& saved : state_.load()) {
    const std::string cgroup = saved.cgroup.empty() ? "?" : saved.cgroup;
    const auto again = [&]() -> Result<> {
      if (!saved.seat) return std::unexpected(saved.seat.error());
      auto policy = PolicyObject::open(std::move(saved.seat->object), saved.seat->file);
      if (!policy) return std::unexpected(policy.error());
      for (const auto& [key, value] : saved.seat->settings)
        if (auto set = policy->set(key, value); !set) return set;
      if (auto seated = seat(cgroup, std::move(*policy), saved.seat->moves); !seated) return std::unexpected(seated.error());
      say("policy " + saved.seat->policy + " is seated again in " + cgroup);
      return {};
    };
    if (auto done = again(); !done) failed(cgroup, done.error());
  }
}

std::uint64_t Daemon::epoch_of(const std::string& cgroup) const {
  auto scope = tiering_->scopes().find(cgroup);
  return scope == tiering_->scopes().end() ? 0 : tiering_->engine().totals(scope->second->scope()).epochs_total;
}

// What the threads of the scopes and the kernel tell.
void Daemon::hear(const News& news) {
  const auto seat = tiering_->seats().find(news.cgroup);
  switch (news.kind) {
    case News::kEjected:
    case News::kSeatEmpty: {
      if (seat == tiering_->seats().end()) return;
      last_exits_[news.cgroup] = *news.exit;
      say("ejected: " + news.exit->reason + " (" + news.exit->message + ")");
      if (news.kind == News::kEjected) {
        // Or the next start would seat what was ejected.
        if (auto kept = state_.save(seat->second->saved()); !kept) say_error("the seat is not saved", kept.error());
        return;
      }
      say("no default policy can take over in " + news.cgroup);
      note("stopped", news.cgroup, "", "no default policy could take over");
      tiering_->unseat(news.cgroup);
      if (auto cleared = state_.clear(news.cgroup); !cleared) say_error("the saved seat stays", cleared.error());
      end_if_empty();
      return;
    }
    case News::kEpochFailed:
      say("an epoch of " + news.cgroup + " failed: " + news.text);
      note("epoch_failed", news.cgroup, "", news.text);
      return;
    case News::kCgroupGone:
    case News::kEventsLost:
      end_removed();
      return;
  }
}

// Ends the scopes whose cgroup is not there any more. Their processes, if there
// are any left, fall to the nearest scope above.
void Daemon::end_removed() {
  std::vector<std::pair<std::string, std::uint64_t>> all;
  for (const auto& [path, scope] : tiering_->scopes()) all.emplace_back(path, scope->scope().cgroup_id());
  for (const auto& [path, id] : all) {
    if (const auto now = cgroups_.id_of(path); now && *now == id) continue;
    if (budgets_.erase(path) != 0) {
      note("budget_ended", path, "", "the cgroup was removed");
      if (auto kept = state_.save(budgets_); !kept) say_error("the budgets are not saved", kept.error());
      (void)tiering_->set_budgets(budgets_);  // takes away only
    }
    if (auto seat = tiering_->seats().find(path); seat != tiering_->seats().end()) {
      if (auto cleared = state_.clear(path); !cleared) say_error("the saved seat stays", cleared.error());
      unseat(path, {"cgroup_removed", "ok", "cgroup " + path + " was removed", "", seat->second->terms().policy, epoch_of(path), unix_ms_now()});
      if (!tiering_) return;
    }
  }
}

void Daemon::note(std::string kind, std::string cgroup, std::string policy, std::string text) {
  EventRecord record;
  record.kind = std::move(kind);
  record.cgroup = std::move(cgroup);
  record.policy = std::move(policy);
  record.text = std::move(text);
  events_.add(std::move(record));
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
  std::string cgroup;  // "": not given
  if (const std::string given = request.value("cgroup", ""); !given.empty()) {
    auto path = cgroups_.normalize(given);
    if (!path) return std::unexpected(path.error());
    cgroup = std::move(*path);
  }
  const std::string seat = cgroup.empty() ? "/" : cgroup;
  if (command == "load") return load(request, seat, std::move(file));
  if (command == "unload") return unload(seat, request.value("force", false));
  if (command == "restore") return restore(seat);
  if (command == "status") return status(cgroup);
  if (command == "ranges") return ranges(request, cgroup);
  if (command == "cgroup_set") return set_budget(request, seat);
  if (command == "cgroup_reset") return reset_budget(seat);
  if (command == "cgroup_show") return show_budgets();
  if (command == "events") return events_.since(request.value("after", std::uint64_t{0}));
  if (command == "explain") return explain(request);
  if (command == "policies") return policies();
  if (command == "version") return version();
  return fail("tierd knows no command \"" + printable(command) + "\"", "use the tierctl and the tierd of one release");
}

Result<Json> Daemon::load(const Json& request, const std::string& cgroup, Fd file) {
  const std::string name = printable(request.value("file", "the file"));
  if (!file) return fail("a load came without a file", "the other end may not be tierctl");
  auto bytes = read_policy_file(file.get(), name);
  if (!bytes) return std::unexpected(bytes.error());
  auto policy = PolicyObject::open(std::move(*bytes), name);
  if (!policy) return std::unexpected(policy.error());
  if (request.contains("settings"))
    for (const auto& [key, value] : request["settings"].items())
      if (auto set = policy->set(key, value.get<std::string>()); !set) return std::unexpected(set.error());
  MoveTerms moves;
  if (request.contains("rate")) {
    auto rate = parse_rate(request["rate"].get<std::string>());
    if (!rate) return std::unexpected(rate.error());
    moves.rate_bytes_per_s = *rate;
  }
  moves.dry_run = request.value("dry_run", false);
  return seat(cgroup, std::move(*policy), moves);
}

Result<Json> Daemon::restore(const std::string& cgroup) {
  auto policy = open_default_policy();
  if (!policy) return std::unexpected(policy.error());
  return seat(cgroup, std::move(*policy), {});
}

Result<Json> Daemon::unload(const std::string& cgroup, bool force) {
  Json reply;
  reply["schema"] = kSchema;
  reply["cgroup"] = cgroup;
  reply["policy"] = nullptr;
  if (tiering_) {
    if (auto seat = tiering_->seats().find(cgroup); seat != tiering_->seats().end()) {
      const std::string name = seat->second->terms().policy;
      unseat(cgroup, {"unloaded", "ok", "asked for by tierctl unload", "", name, epoch_of(cgroup), unix_ms_now()});
      reply["policy"] = name;
    }
  }
  reply["seats_left"] = tiering_ ? tiering_->seats().size() : 0;
  reseat_errors_.erase(cgroup);
  if (auto cleared = state_.clear(cgroup); !cleared) return std::unexpected(cleared.error());
  if (force && !tiering_) {
    auto removed = remove_stale_pins();
    if (!removed) return std::unexpected(removed.error());
    reply["stale_pins_removed"] = *removed;
  }
  return reply;
}

// ----------------------------------------------------------------- budgets

Result<> Daemon::take_budgets(Budgets budgets) {
  if (tiering_)
    if (auto taken = tiering_->set_budgets(budgets); !taken) return taken;
  budgets_ = std::move(budgets);
  return state_.save(budgets_);
}

Result<Json> Daemon::set_budget(const Json& request, const std::string& cgroup) {
  if (auto id = cgroups_.id_of(cgroup); !id) return std::unexpected(id.error());
  Budgets budgets = budgets_;
  Budget& budget = budgets[cgroup];
  for (auto [name, option, amount] : {std::tuple("fast_max", "--fast-max", &budget.fast_max),
                                      std::tuple("fast_min", "--fast-min", &budget.fast_min)}) {
    if (!request.contains(name)) continue;
    auto parsed = parse_amount(option, request[name].get<std::string>());
    if (!parsed) return std::unexpected(parsed.error());
    *amount = *parsed;
  }
  if (request.contains("rate")) {
    auto rate = parse_rate(request["rate"].get<std::string>());
    if (!rate) return std::unexpected(rate.error());
    budget.rate_bytes_per_s = *rate;
  }
  if (request.contains("dry_run")) budget.dry_run = request["dry_run"].get<bool>();
  if (!budget.fast_max && !budget.fast_min && !budget.rate_bytes_per_s && !budget.dry_run)
    return fail("no budget is given for " + cgroup, "give --fast-max, --fast-min, --rate or --dry-run");
  auto tiers = discover_tiers(options_.tiering.tiers);
  if (!tiers) return std::unexpected(tiers.error());
  auto use = tier_use(*tiers);
  if (!use) return std::unexpected(use.error());
  if (auto possible = check_budgets(budgets, (*use)[HT_TIER_FAST].capacity_bytes); !possible)
    return std::unexpected(possible.error());
  if (auto taken = take_budgets(std::move(budgets)); !taken) return std::unexpected(taken.error());
  note("budget_set", cgroup, "", "");
  return show_budgets();
}

Result<Json> Daemon::reset_budget(const std::string& cgroup) {
  Budgets budgets = budgets_;
  if (budgets.erase(cgroup) == 0)
    return fail("cgroup " + cgroup + " has no budget", "`tierctl cgroup show` lists those that have one");
  if (auto taken = take_budgets(std::move(budgets)); !taken) return std::unexpected(taken.error());
  note("budget_reset", cgroup, "", "");
  return show_budgets();
}

Json Daemon::show_budgets() const {
  Json list = Json::array();
  std::uint64_t tier_bytes = 0;
  if (const auto tiers = discover_tiers(options_.tiering.tiers))
    if (const auto use = tier_use(*tiers)) tier_bytes = (*use)[HT_TIER_FAST].capacity_bytes;
  for (const auto& [path, budget] : budgets_) {
    Json entry;
    entry["cgroup"] = path;
    for (const auto& [name, amount] : {std::pair("fast_max", &budget.fast_max), std::pair("fast_min", &budget.fast_min)}) {
      entry[name] = *amount ? Json((*amount)->text()) : Json(nullptr);
      entry[std::string(name) + "_bytes"] = *amount ? Json((*amount)->of(tier_bytes)) : Json(nullptr);
    }
    entry["rate_bytes_per_s"] = budget.rate_bytes_per_s ? Json(*budget.rate_bytes_per_s) : Json(nullptr);
    entry["dry_run"] = budget.dry_run ? Json(*budget.dry_run) : Json(nullptr);
    entry["fast_bytes"] = nullptr;
    entry["slow_bytes"] = nullptr;
    // In force: there is such a cgroup, and a policy answers for it.
    const bool in_force = tiering_ && tiering_->scopes().contains(path);
    entry["in_force"] = in_force;
    if (in_force) {
      if (const auto report = tiering_->engine().report(tiering_->scopes().at(path)->scope())) {
        entry["fast_bytes"] = report->demand.fast_pages * HT_PAGE_SIZE;
        entry["slow_bytes"] = report->demand.slow_pages * HT_PAGE_SIZE;
      }
    }
    list.push_back(std::move(entry));
  }
  return {{"schema", kSchema}, {"fast_tier_bytes", tier_bytes}, {"budgets", std::move(list)}};
}

// ------------------------------------------------------------------ status

Json Daemon::scope_json(const std::string& path) const {
  ScopeThread* thread = nullptr;
  if (tiering_)
    if (auto found = tiering_->scopes().find(path); found != tiering_->scopes().end()) thread = found->second.get();
  const bool running = thread != nullptr;
  const auto seat = running ? thread->seat() : nullptr;
  const PolicySeat::Terms terms = running ? seat->terms() : PolicySeat::Terms{};
  const ScopeThread::Shown shown = running ? thread->shown() : ScopeThread::Shown{};
  const auto reseat_error = reseat_errors_.find(path);
  const bool reseat_failed = reseat_error != reseat_errors_.end();
  const auto last_exit = last_exits_.find(path);

  Json scope;
  scope["cgroup"] = path;
  scope["seat"] = running ? Json(seat->cgroup()) : Json(nullptr);
  scope["policy"] = running ? Json(terms.policy) : Json(nullptr);
  scope["file"] = running ? Json(terms.file) : Json(nullptr);
  scope["settings"] = terms.settings;
  scope["generation"] = terms.generation;
  scope["state"] = running ? (shown.error ? "failing" : "running") : (reseat_failed ? "reseat_failed" : "idle");
  const Error* error = running ? (shown.error ? &*shown.error : nullptr) : (reseat_failed ? &reseat_error->second : nullptr);
  scope["error"] = error ? Json{{"message", error->message}, {"hint", error->hint}} : Json(nullptr);
  scope["last_exit"] = exit_json(last_exit == last_exits_.end() ? nullptr : &last_exit->second);
  const auto report = running ? tiering_->engine().report(thread->scope()) : std::nullopt;
  const EngineTotals totals = running ? tiering_->engine().totals(thread->scope()) : EngineTotals{};
  scope["epoch"] = report ? report->scope.epoch : 0;
  scope["epoch_ms"] = running ? Json(terms.epoch_ms) : Json(nullptr);
  const auto budget = budgets_.find(path);
  const std::uint64_t tier_bytes = report ? report->scope.fast_tier_pages * HT_PAGE_SIZE : 0;
  for (const auto& [name, amount] : {std::pair("fast_max_bytes", &Budget::fast_max), std::pair("fast_min_bytes", &Budget::fast_min)}) {
    scope[name] = nullptr;
    if (budget == budgets_.end()) continue;
    if (const auto& given = budget->second.*amount; given && (given->percent == 0 || tier_bytes != 0)) scope[name] = given->of(tier_bytes);
  }
  scope["fast_capacity_bytes"] = report ? Json(report->scope.fast_capacity_pages * HT_PAGE_SIZE) : Json(nullptr);
  const auto bytes = [](__u64 pages) { return pages == HT_UNKNOWN64 ? Json(nullptr) : Json(pages * HT_PAGE_SIZE); };
  scope["fast_bytes"] = report ? bytes(report->scope.tier_pages[HT_TIER_FAST]) : Json(nullptr);
  scope["slow_bytes"] = report ? bytes(report->scope.tier_pages[HT_TIER_SLOW]) : Json(nullptr);
  const MoveTerms moves = running ? tiering_->move_terms(path, terms) : MoveTerms{};
  scope["rate_bytes_per_s"] = running ? Json(moves.rate_bytes_per_s) : Json(nullptr);
  scope["dry_run"] = running ? Json(moves.dry_run) : Json(nullptr);
  scope["processes"] = report ? report->scope.processes : 0;
  scope["ranges"] = report ? report->scope.ranges : 0;
  scope["estimate_bytes"] = report ? report->estimate_bytes : 0;
  Json& counters = scope["counters"];
  counters["epochs_total"] = totals.epochs_total;
  counters["epoch_errors_total"] = shown.epoch_errors_total;
  counters["empty_epochs_total"] = shown.empty_epochs_total;
  counters["samples_total"] = totals.samples_total;
  counters["promoted_pages_total"] = totals.promoted_pages_total;
  counters["demoted_pages_total"] = totals.demoted_pages_total;
  counters["exchanged_pairs_total"] = totals.exchanged_pairs_total;
  counters["move_failed_pages_total"] = totals.move_failed_pages_total;
  counters["refused_pages_total"] = totals.refused_pages_total;
  counters["flush_calls_total"] = totals.flush_calls_total;
  counters["batches_total"] = totals.batches_total;
  counters["split_pages_total"] = totals.split_pages_total;
  counters["splits_total"] = totals.splits_total;
  counters["merges_total"] = totals.merges_total;
  counters["policy_failures_total"] = totals.policy_failures_total;
  counters["reversed_pages_total"] = totals.reversed_pages_total;
  counters["rate_limited_pages_total"] = totals.rate_limited_pages_total;
  counters["dry_run_pages_total"] = totals.dry_run_pages_total;
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
    last["over_pages"] = report->over_pages;
    last["coming_pages"] = report->coming_pages;
    last["room_pages"] = report->room_pages;
    last["promoted_pages"] = report->moved.promoted_pages;
    last["demoted_pages"] = report->moved.demoted_pages;
    last["dry_run_pages"] = report->dry_run_pages;
    last["rate_limited_pages"] = report->rate_limited_pages;
    last["reversed_pages"] = report->reversed_pages;
    last["cooling_ranges"] = report->cooling_ranges;
    last["text"] = decision_text(*report);
  } else {
    scope["last_epoch"] = nullptr;
  }
  return scope;
}

Json Daemon::status(const std::string& cgroup) const {
  const bool running = tiering_ != nullptr;
  Json json;
  json["schema"] = kSchema;
  json["version"] = HT_VERSION;
  json["pid"] = getpid();
  json["source"] = running ? Json(tiering_->source().name) : Json(nullptr);
  json["source_description"] = running ? Json(tiering_->source().description) : Json(nullptr);
  json["mover"] = running ? Json(best_mover(tiering_->module().movers)) : Json(nullptr);
  json["period"] = running ? Json(tiering_->period()) : Json(nullptr);
  const ScopeThread* root = running ? tiering_->scope_of("/") : nullptr;
  json["epoch_ms"] = root ? Json(root->seat()->terms().epoch_ms) : Json(nullptr);
  json["s"] = running ? Json(tiering_->density()) : Json(nullptr);
  if (running) {
    Json& sampling = json["sampling"];
    const double budget = tiering_->cpu_share_max();
    sampling["cpu_share_max"] = budget > 0 ? Json(budget) : Json(nullptr);
    sampling["cpu_share"] = tiering_->cpu_share();
    if (tiering_->source().bits) {
      const BitsStats bits = tiering_->bits();
      sampling["interval_ns"] = bits.interval_ns;
      sampling["passes_total"] = bits.passes_total;
      sampling["granules_total"] = bits.granules_total;
      sampling["visits_total"] = bits.visits_total;
      sampling["flush_calls_total"] = bits.flush_calls_total;
      sampling["pages_total"] = bits.pages_total;
      sampling["pages_set_total"] = bits.pages_set_total;
      sampling["cpu_ns_total"] = bits.cpu_ns_total;
      sampling["read_ns_total"] = bits.read_ns_total;
      sampling["cycles_total"] = bits.cycles_total;
    }
    if (tiering_->source().samples()) {
      sampling["period"] = tiering_->period();
      sampling["burst"] = tiering_->burst();
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
  // The root's entry is always there, and first.
  std::set<std::string> paths{"/"};
  if (running)
    for (const auto& [path, scope] : tiering_->scopes()) paths.insert(path);
  for (const auto& [path, error] : reseat_errors_) paths.insert(path);
  for (const auto& [path, exit] : last_exits_) paths.insert(path);
  if (!cgroup.empty()) {
    ScopeThread* nearest = running ? tiering_->scope_of(cgroup) : nullptr;
    paths = {nearest && !paths.contains(cgroup) ? nearest->scope().path() : cgroup};
  }
  Json scopes = Json::array();
  for (const auto& path : paths) scopes.push_back(scope_json(path));
  json["scopes"] = std::move(scopes);

  Json dropped = Json::object(), strays = Json::object(), failures = Json::object(), movers = Json::object();
  const ht_sampler_stats stats = running ? tiering_->engine().sampler_stats() : ht_sampler_stats{};
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

Result<Json> Daemon::ranges(const Json& request, const std::string& cgroup) const {
  std::optional<__u32> pid;
  if (request.contains("pid")) pid = request["pid"].get<__u32>();
  const std::size_t first = request.value("first", std::size_t{0});
  Json reply;
  reply["schema"] = kSchema;
  std::vector<ScopeThread*> scopes;
  if (tiering_) {
    if (!cgroup.empty()) {
      if (ScopeThread* scope = tiering_->scope_of(cgroup)) scopes.push_back(scope);
    } else {
      for (const auto& [path, scope] : tiering_->scopes()) scopes.push_back(scope.get());
    }
  }
  reply["epoch"] = scopes.empty() ? 0 : tiering_->engine().totals(scopes.front()->scope()).epochs_total;
  Json list = Json::array();
  reply["next"] = nullptr;
  std::size_t i = 0;
  for (ScopeThread* scope : scopes) {
    for (const RangeView& view : tiering_->engine().ranges(scope->scope(), pid)) {
      if (i++ < first) continue;
      if (list.size() == kRangesPerReply) {
        reply["next"] = i - 1;
        break;
      }
      Json json = range_json(view);
      json["cgroup"] = scope->scope().path();
      list.push_back(std::move(json));
    }
    if (!reply["next"].is_null()) break;
  }
  reply["ranges"] = std::move(list);
  return reply;
}

// Which page of which process: its range, its heat over time, and why it is
// where it is.
Result<Json> Daemon::explain(const Json& request) const {
  const auto pid = request.at("pid").get<__u32>();
  const auto address = request.at("address").get<__u64>();
  if (!tiering_)
    return fail("no policy is seated, so nothing is known of any process", "`tierctl load heattree` seats the default policy");
  Json reply;
  reply["schema"] = kSchema;
  reply["pid"] = pid;
  reply["address"] = address;
  bool known = false;
  for (const auto& process : tiering_->engine().processes()) known |= process.pid == pid;
  if (!known)
    return fail("process " + std::to_string(pid) + " is not known", "give the pid of a process, not of a thread, as /proc lists it");
  for (const auto& [path, thread] : tiering_->scopes()) {
    auto found = tiering_->engine().explain(thread->scope(), pid, address);
    if (!found) return std::unexpected(found.error());
    if (!*found) continue;
    const auto report = tiering_->engine().report(thread->scope());
    reply["cgroup"] = path;
    reply["policy"] = thread->seat()->terms().policy;
    reply["epoch"] = report ? report->scope.epoch : 0;
    explain_into(reply, **found, report);
    reply["range"] = range_json((*found)->view);
    return reply;
  }
  char hex[32];
  std::snprintf(hex, sizeof(hex), "%llx", static_cast<unsigned long long>(address));
  return fail("no range of process " + std::to_string(pid) + " holds address " + hex,
              "it is not mapped, too small to manage, or mapped since the last epoch; `tierctl ranges --pid " +
                  std::to_string(pid) + "` lists what is managed");
}

// What sits in the seats, as the kernel calls it.
Json Daemon::policies() const {
  Json list = Json::array();
  if (tiering_)
    for (const auto& [path, seat] : tiering_->seats()) {
      const PolicySeat::Terms terms = seat->terms();
      Json entry;
      entry["cgroup"] = path;
      entry["cgroup_id"] = seat->cgroup_id();
      entry["policy"] = terms.policy;
      entry["file"] = terms.file;
      entry["generation"] = terms.generation;
      entry["epoch_ms"] = terms.epoch_ms;
      entry["callbacks"] = terms.callbacks;
      entry["settings"] = terms.settings;
      entry["rate_bytes_per_s"] = terms.moves.rate_bytes_per_s;
      entry["dry_run"] = terms.moves.dry_run;
      entry["struct_ops_map_id"] = terms.ids.map;
      Json programs = Json::array(), maps = Json::array();
      for (const auto& program : terms.ids.programs)
        programs.push_back({{"name", program.name}, {"id", program.id}, {"runs_total", program.runs_total}, {"ns_total", program.ns_total}});
      for (const auto& map : terms.ids.maps) maps.push_back({{"name", map.name}, {"type", map.type}, {"id", map.id}});
      entry["programs"] = std::move(programs);
      entry["maps"] = std::move(maps);
      list.push_back(std::move(entry));
    }
  return {{"schema", kSchema}, {"default_policy", kDefaultPolicy}, {"seats", std::move(list)}};
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
