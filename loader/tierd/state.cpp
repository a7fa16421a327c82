// SPDX-License-Identifier: GPL-2.0-or-later
#include "tierd/state.hpp"

#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <cerrno>
#include <cstdio>

#include "policy/policy.hpp"
#include "tierd/protocol.hpp"

namespace hypertier {
namespace {

constexpr char kBudgets[] = "budgets.json";

// Names of a seat's files: a cgroup's path may be longer than a file's name.
std::string stem_of(const std::string& cgroup) {
  if (cgroup == "/") return "root";
  std::uint64_t hash = 0xcbf29ce484222325;  // FNV-1a
  for (const unsigned char c : cgroup) hash = (hash ^ c) * 0x100000001b3;
  char text[32];
  std::snprintf(text, sizeof(text), "cgroup-%016llx", static_cast<unsigned long long>(hash));
  return text;
}

std::array<std::string, 2> objects_of(const std::string& stem) { return {stem + "-0.bpf.o", stem + "-1.bpf.o"}; }

Result<> write_file(const std::filesystem::path& path, const std::string& bytes) {
  Fd file(open(path.c_str(), O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC | O_NOFOLLOW, 0600));
  if (!file) return fail_errno("cannot write " + path.string(), errno);
  std::size_t done = 0;
  while (done < bytes.size()) {
    const ssize_t wrote = write(file.get(), bytes.data() + done, bytes.size() - done);
    if (wrote < 0 && errno == EINTR) continue;
    if (wrote < 0) return fail_errno("cannot write " + path.string(), errno);
    done += static_cast<std::size_t>(wrote);
  }
  if (fsync(file.get()) != 0) return fail_errno("cannot write " + path.string(), errno);
  return {};
}

Result<std::string> read_whole(const std::filesystem::path& path) {
  Fd file(open(path.c_str(), O_RDONLY | O_CLOEXEC | O_NOFOLLOW));
  if (!file) return fail_errno("cannot open " + path.string(), errno);
  return read_policy_file(file.get(), path.string());
}

Result<> make_directory(const std::filesystem::path& directory) {
  std::error_code error;
  std::filesystem::create_directories(directory, error);
  if (error) return fail_errno("cannot make " + directory.string(), error.value());
  chmod(directory.c_str(), 0700);
  return {};
}

}  // namespace

Result<> State::write_json(const std::string& name, const std::string& text) const {
  const auto fresh = directory_ / (name + ".new");
  if (auto wrote = write_file(fresh, text + "\n"); !wrote) return wrote;
  std::error_code error;
  std::filesystem::rename(fresh, directory_ / name, error);
  if (error) return fail_errno("cannot write " + (directory_ / name).string(), error.value());
  return {};
}

Result<> State::save(const SavedSeat& seat) const {
  if (auto made = make_directory(directory_); !made) return made;
  const std::string stem = stem_of(seat.cgroup), name = stem + ".json";
  // Two names take turns: the seat's rename decides which of them counts.
  auto [object, other] = objects_of(stem);
  if (const auto text = read_whole(directory_ / name)) {
    const Json old = Json::parse(*text, nullptr, false);
    if (old.is_object() && old.contains("object") && old["object"] == object) std::swap(object, other);
  }
  if (auto wrote = write_file(directory_ / object, seat.object); !wrote) return wrote;
  Json json;
  json["schema"] = kSchema;
  json["cgroup"] = seat.cgroup;
  json["policy"] = seat.policy;
  json["file"] = seat.file;
  json["settings"] = seat.settings;
  json["object"] = object;
  json["rate_bytes_per_s"] = seat.moves.rate_bytes_per_s;
  json["dry_run"] = seat.moves.dry_run;
  if (auto wrote = write_json(name, json.dump(1, ' ', false, Json::error_handler_t::replace)); !wrote) return wrote;
  std::error_code ignored;
  std::filesystem::remove(directory_ / other, ignored);
  return {};
}

Result<> State::clear(const std::string& cgroup) const {
  const std::string stem = stem_of(cgroup);
  const auto objects = objects_of(stem);
  std::error_code error;
  for (const auto& name : {stem + ".json", objects[0], objects[1]}) {
    std::filesystem::remove(directory_ / name, error);
    if (error) return fail_errno("cannot remove " + (directory_ / name).string(), error.value());
  }
  return {};
}

std::vector<State::Loaded> State::load() const {
  std::vector<Loaded> all;
  std::error_code ignored;
  for (const auto& entry : std::filesystem::directory_iterator(directory_, ignored)) {
    const std::string name = entry.path().filename();
    const std::string stem = entry.path().stem();
    if (!name.ends_with(".json") || (stem != "root" && !stem.starts_with("cgroup-"))) continue;
    std::string cgroup = stem == "root" ? "/" : "";
    const auto read = [&]() -> Result<SavedSeat> {
      auto text = read_whole(entry.path());
      if (!text) return std::unexpected(text.error());
      const Json json = Json::parse(*text, nullptr, false);
      const auto damaged = [&] {
        return fail(entry.path().string() + " is damaged", "load a policy again, or start tierd with --fresh");
      };
      if (!json.is_object()) return damaged();
      SavedSeat seat;
      try {
        seat.cgroup = json.value("cgroup", "/");
        cgroup = seat.cgroup;
        seat.policy = json.at("policy").get<std::string>();
        seat.file = json.at("file").get<std::string>();
        seat.settings = json.at("settings").get<std::map<std::string, std::string>>();
        seat.moves.rate_bytes_per_s = json.value("rate_bytes_per_s", kDefaultRate);
        seat.moves.dry_run = json.value("dry_run", false);
        const std::string object = json.at("object").get<std::string>();
        const auto objects = objects_of(stem);
        if (stem != stem_of(seat.cgroup) || std::find(objects.begin(), objects.end(), object) == objects.end())
          return damaged();
        auto bytes = read_whole(directory_ / object);
        if (!bytes) return std::unexpected(bytes.error());
        seat.object = std::move(*bytes);
      } catch (const Json::exception&) {
        return damaged();
      }
      return seat;
    };
    auto seat = read();
    all.push_back({cgroup, std::move(seat)});
  }
  std::sort(all.begin(), all.end(), [](const Loaded& a, const Loaded& b) { return a.cgroup < b.cgroup; });
  return all;
}

Result<> State::save(const Budgets& budgets) const {
  if (auto made = make_directory(directory_); !made) return made;
  Json json;
  json["schema"] = kSchema;
  Json& list = json["budgets"] = Json::object();
  for (const auto& [cgroup, budget] : budgets) {
    Json& entry = list[cgroup] = Json::object();
    if (budget.fast_max) entry["fast_max"] = budget.fast_max->text();
    if (budget.fast_min) entry["fast_min"] = budget.fast_min->text();
    if (budget.rate_bytes_per_s) entry["rate"] = rate_text(*budget.rate_bytes_per_s);
    if (budget.dry_run) entry["dry_run"] = *budget.dry_run;
  }
  return write_json(kBudgets, json.dump(1, ' ', false, Json::error_handler_t::replace));
}

Result<Budgets> State::load_budgets() const {
  const auto path = directory_ / kBudgets;
  std::error_code ignored;
  Budgets budgets;
  if (!std::filesystem::exists(path, ignored)) return budgets;
  auto text = read_whole(path);
  if (!text) return std::unexpected(text.error());
  try {
    const Json json = Json::parse(*text);
    for (const auto& [cgroup, entry] : json.at("budgets").items()) {
      Budget& budget = budgets[cgroup];
      for (auto [name, amount] : {std::pair("fast_max", &budget.fast_max), std::pair("fast_min", &budget.fast_min)}) {
        if (!entry.contains(name)) continue;
        auto parsed = parse_amount(name, entry.at(name).get<std::string>());
        if (!parsed) return std::unexpected(parsed.error());
        *amount = *parsed;
      }
      if (entry.contains("rate")) {
        auto parsed = parse_rate(entry.at("rate").get<std::string>());
        if (!parsed) return std::unexpected(parsed.error());
        budget.rate_bytes_per_s = *parsed;
      }
      if (entry.contains("dry_run")) budget.dry_run = entry.at("dry_run").get<bool>();
    }
  } catch (const Json::exception&) {
    return fail(path.string() + " is damaged", "set the budgets again with `tierctl cgroup set`, or start tierd with --fresh");
  }
  return budgets;
}

}  // namespace hypertier
