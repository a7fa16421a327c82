// SPDX-License-Identifier: GPL-2.0-or-later
// A policy object: the .bpf.o of a user, checked before the kernel sees it,
// configured, given to the verifier and seated.
//
//   auto policy = PolicyObject::open(bytes, "my.bpf.o");
//   policy->set("alpha", "3");
//   policy->load(1);                  // verified, not seated
//   auto seat = Seat::take(*policy);  // or seat.replace(*policy): hot swap
#pragma once

#include <cstdint>
#include <filesystem>
#include <map>
#include <memory>
#include <string>
#include <vector>

#include "result.hpp"

struct bpf_link;
struct bpf_map;
struct bpf_object;

namespace hypertier {

inline constexpr std::uint64_t kRootCgroupId = 1;
inline constexpr std::uint64_t kPolicyMaxBytes = 16ULL << 20;

struct PolicySetting {
  std::string key;
  std::string type;   // "u32", "bool", ...
  std::string value;  // as it is now: the default, or what set() made of it
  std::string minimum, maximum;
};

struct PolicyInfo {
  std::string name;
  std::uint32_t abi_major = 0, abi_minor = 0;
  std::uint32_t epoch_ms = 0;  // never 0: the default is filled in
  std::uint64_t flags = 0;     // enum hypertier_policy_flags
  std::vector<std::string> callbacks;
  std::vector<PolicySetting> settings;
};

// How the kernel calls a loaded policy.
struct PolicyIds {
  std::uint32_t map = 0;  // of its struct_ops object
  struct Program {
    std::string name;
    std::uint32_t id = 0;
    std::uint64_t runs_total = 0, ns_total = 0;  // while BPF statistics are on
  };
  std::vector<Program> programs;
  struct Map {
    std::string name, type;
    std::uint32_t id = 0;
  };
  std::vector<Map> maps;  // its own
};

class PolicyObject {
 public:
  // bytes: the whole file. file: how to call it in messages. Everything that
  // can be known without the kernel is checked here.
  static Result<PolicyObject> open(std::string bytes, std::string file);

  PolicyObject() = default;  // empty: to be assigned to
  PolicyObject(PolicyObject&&) noexcept;
  PolicyObject& operator=(PolicyObject&&) noexcept;
  ~PolicyObject();

  const PolicyInfo& info() const { return info_; }
  const std::string& bytes() const { return bytes_; }
  const std::string& file() const { return file_; }
  // What set() changed, key to value as given.
  const std::map<std::string, std::string>& changed() const { return changed_; }

  // Before load().
  Result<> set(const std::string& key, const std::string& value);
  // Gives it to the verifier for the seat of that cgroup; it is not seated yet.
  Result<> load(std::uint64_t cgroup_id);
  // After load().
  PolicyIds ids() const;
  // What libbpf and the verifier said in load().
  const std::string& load_log() const { return load_log_; }

 private:
  friend class Seat;
  Result<> read_policy_struct();
  void read_settings();

  std::string bytes_, file_, load_log_;
  PolicyInfo info_;
  std::map<std::string, std::string> changed_;
  struct Variable {
    std::uint32_t offset = 0, size = 0;
    bool is_signed = false, is_bool = false;
  };
  std::map<std::string, Variable> variables_;
  bpf_object* object_ = nullptr;
  bpf_map* map_ = nullptr;
  std::uint32_t cgroup_id_offset_ = 0;
};

// A taken seat: an unpinned link, so that the policy leaves when tierd dies.
class Seat {
 public:
  static Result<Seat> take(PolicyObject& policy);
  // No epoch is without a policy; on error the old one stays.
  Result<> replace(PolicyObject& policy);

  Seat(Seat&&) noexcept;
  Seat& operator=(Seat&&) noexcept;
  ~Seat();

 private:
  explicit Seat(bpf_link* link) : link_(link) {}
  bpf_link* link_ = nullptr;
};

// Where NAME.bpf.o of installed policies are, seen from this executable;
// empty if there is no such directory.
std::filesystem::path installed_policies();
std::vector<std::string> installed_policy_names();
// path: "hyperplace" is an installed policy, anything else a file.
Result<std::filesystem::path> resolve_policy(const std::string& file_or_name);
// Reads a regular file of at most kPolicyMaxBytes.
Result<std::string> read_policy_file(int fd, const std::string& file);

}  // namespace hypertier
