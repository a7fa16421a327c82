// SPDX-License-Identifier: GPL-2.0-or-later
#include "tierd/state.hpp"

#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cerrno>

#include "policy/policy.hpp"
#include "tierd/protocol.hpp"

namespace hypertier {
namespace {

constexpr char kSeat[] = "root.json";

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

}  // namespace

Result<> State::save(const SavedSeat& seat) const {
  std::error_code error;
  std::filesystem::create_directories(directory_, error);
  if (error) return fail_errno("cannot make " + directory_.string(), error.value());
  chmod(directory_.c_str(), 0700);

  // Two names take turns: the seat's rename decides which of them counts.
  std::string object = "root-0.bpf.o";
  if (const auto text = read_whole(directory_ / kSeat)) {
    const Json old = Json::parse(*text, nullptr, false);
    if (old.is_object() && old.contains("object") && old["object"] == object) object = "root-1.bpf.o";
  }
  if (auto wrote = write_file(directory_ / object, seat.object); !wrote) return wrote;
  Json json;
  json["schema"] = kSchema;
  json["policy"] = seat.policy;
  json["file"] = seat.file;
  json["settings"] = seat.settings;
  json["object"] = object;
  const auto fresh = directory_ / (std::string(kSeat) + ".new");
  if (auto wrote = write_file(fresh, json.dump(1) + "\n"); !wrote) return wrote;
  std::filesystem::rename(fresh, directory_ / kSeat, error);
  if (error) return fail_errno("cannot write " + (directory_ / kSeat).string(), error.value());
  std::filesystem::remove(directory_ / (object == "root-0.bpf.o" ? "root-1.bpf.o" : "root-0.bpf.o"), error);
  return {};
}

Result<> State::clear() const {
  std::error_code error;
  for (const char* name : {kSeat, "root-0.bpf.o", "root-1.bpf.o"}) {
    std::filesystem::remove(directory_ / name, error);
    if (error) return fail_errno("cannot remove " + (directory_ / name).string(), error.value());
  }
  return {};
}

Result<std::optional<SavedSeat>> State::load() const {
  const auto path = directory_ / kSeat;
  std::error_code error;
  if (!std::filesystem::exists(path, error)) return std::nullopt;
  auto text = read_whole(path);
  if (!text) return std::unexpected(text.error());
  const Json json = Json::parse(*text, nullptr, false);
  const auto damaged = [&] {
    return fail(path.string() + " is damaged", "load a policy again, or start tierd with --fresh");
  };
  if (!json.is_object()) return damaged();
  SavedSeat seat;
  try {
    seat.policy = json.at("policy").get<std::string>();
    seat.file = json.at("file").get<std::string>();
    seat.settings = json.at("settings").get<std::map<std::string, std::string>>();
    const std::string object = json.at("object").get<std::string>();
    if (object != "root-0.bpf.o" && object != "root-1.bpf.o") return damaged();
    auto bytes = read_whole(directory_ / object);
    if (!bytes) return std::unexpected(bytes.error());
    seat.object = std::move(*bytes);
  } catch (const Json::exception&) {
    return damaged();
  }
  return seat;
}

}  // namespace hypertier
