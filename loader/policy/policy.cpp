// SPDX-License-Identifier: GPL-2.0-or-later
#include "policy/policy.hpp"

#include <bpf/bpf.h>
#include <bpf/btf.h>
#include <bpf/libbpf.h>
#include <elf.h>
#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <cerrno>
#include <cstdarg>
#include <cstdio>
#include <cstring>
#include <optional>

#include <hypertier/abi.h>

namespace hypertier {
namespace {

constexpr char kSection[] = ".struct_ops.link";
constexpr char kType[] = "hypertier_policy";

// libbpf explains itself through one global callback only, in the thread that
// called it. Scopes load their default policies beside the main thread's loads.
thread_local std::string* g_libbpf_log = nullptr;

int keep_libbpf_log(libbpf_print_level level, const char* format, va_list arguments) {
  if (g_libbpf_log == nullptr || level == LIBBPF_DEBUG) return 0;
  va_list again;
  va_copy(again, arguments);
  const int length = std::vsnprintf(nullptr, 0, format, again);
  va_end(again);
  if (length <= 0) return 0;
  std::string line(static_cast<std::size_t>(length) + 1, '\0');
  std::vsnprintf(line.data(), line.size(), format, arguments);
  line.pop_back();
  g_libbpf_log->append(line);
  return length;
}

class LibbpfLog {
 public:
  // The callback stays: another thread may be in need of it.
  LibbpfLog() {
    libbpf_set_print(keep_libbpf_log);
    g_libbpf_log = &text_;
  }
  ~LibbpfLog() { g_libbpf_log = nullptr; }
  LibbpfLog(const LibbpfLog&) = delete;
  LibbpfLog& operator=(const LibbpfLog&) = delete;
  const std::string& text() const { return text_; }

 private:
  std::string text_;
};

std::vector<std::string> lines_of(const std::string& text) {
  std::vector<std::string> lines;
  for (std::size_t start = 0; start < text.size();) {
    auto end = text.find('\n', start);
    if (end == std::string::npos) end = text.size();
    if (end > start) lines.push_back(text.substr(start, end - start));
    start = end + 1;
  }
  return lines;
}

// The verifier's reason is its last line before the statistics.
struct Rejection {
  std::string program, reason;
};

std::optional<Rejection> rejection(const std::string& log) {
  bool inside = false;
  Rejection found;
  for (const auto& line : lines_of(log)) {
    if (line.find("-- BEGIN PROG LOAD LOG --") != std::string::npos) {
      inside = true;
      const auto open = line.find("prog '");
      if (open != std::string::npos) {
        const auto close = line.find('\'', open + 6);
        if (close != std::string::npos) found.program = line.substr(open + 6, close - open - 6);
      }
      continue;
    }
    if (line.find("-- END PROG LOAD LOG --") != std::string::npos) break;
    if (!inside || line.starts_with("processed ") || line.starts_with("verification time") ||
        line.starts_with("stack depth") || line.starts_with("max_states"))
      continue;
    found.reason = line;
  }
  if (found.reason.empty()) return std::nullopt;
  return found;
}

std::string last_line(const std::string& log) {
  auto lines = lines_of(log);
  for (auto line = lines.rbegin(); line != lines.rend(); ++line) {
    // What follows the first failure only repeats that loading failed.
    if (line->find("failed to load object") != std::string::npos) continue;
    return line->starts_with("libbpf: ") ? line->substr(8) : *line;
  }
  return {};
}

// Through typedefs and qualifiers; what it passed is or'ed into the flags.
struct Resolved {
  const btf_type* type = nullptr;
  bool is_const = false, is_volatile = false, is_bool = false;
};

Resolved resolve(const btf* types, std::uint32_t id) {
  Resolved found;
  for (;;) {
    const btf_type* type = btf__type_by_id(types, id);
    if (type == nullptr) return found;
    if (btf_is_const(type)) found.is_const = true;
    else if (btf_is_volatile(type)) found.is_volatile = true;
    else if (!btf_is_typedef(type) && !btf_is_type_tag(type)) {
      found.type = type;
      found.is_bool = btf_is_int(type) && (btf_int_encoding(type) & BTF_INT_BOOL) != 0;
      return found;
    }
    id = type->type;
  }
}

std::string type_name(bool is_bool, bool is_signed, std::uint32_t size) {
  if (is_bool) return "bool";
  return (is_signed ? "s" : "u") + std::to_string(size * 8);
}

__int128 lowest(bool is_signed, std::uint32_t size) { return is_signed ? -(static_cast<__int128>(1) << (size * 8 - 1)) : 0; }
__int128 highest(bool is_bool, bool is_signed, std::uint32_t size) {
  if (is_bool) return 1;
  return (static_cast<__int128>(1) << (size * 8 - (is_signed ? 1 : 0))) - 1;
}

std::string to_text(__int128 value) {
  if (value < 0) return "-" + std::to_string(static_cast<unsigned long long>(-value));
  return std::to_string(static_cast<unsigned long long>(value));
}

// "12", "-3", "0x10", "true", "2M" (binary, as all sizes).
std::optional<__int128> parse_value(const std::string& text, bool is_bool) {
  if (is_bool) {
    if (text == "true" || text == "on" || text == "yes" || text == "1") return 1;
    if (text == "false" || text == "off" || text == "no" || text == "0") return 0;
    return std::nullopt;
  }
  std::size_t at = 0;
  const bool negative = text.starts_with('-');
  if (negative) at = 1;
  int base = 10;
  if (text.compare(at, 2, "0x") == 0) {
    base = 16;
    at += 2;
  }
  __int128 value = 0;
  std::size_t digits = 0;
  for (; at < text.size(); ++at, ++digits) {
    const char c = text[at];
    int digit;
    if (c >= '0' && c <= '9') digit = c - '0';
    else if (base == 16 && c >= 'a' && c <= 'f') digit = c - 'a' + 10;
    else if (base == 16 && c >= 'A' && c <= 'F') digit = c - 'A' + 10;
    else break;
    if (digits > 20) return std::nullopt;
    value = value * base + digit;
  }
  if (digits == 0) return std::nullopt;
  if (at < text.size()) {
    if (text.size() - at != 1) return std::nullopt;
    switch (text[at]) {
      case 'K': value <<= 10; break;
      case 'M': value <<= 20; break;
      case 'G': value <<= 30; break;
      default: return std::nullopt;
    }
  }
  return negative ? -value : value;
}

bool printable_name(const char* name, std::size_t size) {
  const std::size_t length = strnlen(name, size);
  if (length == 0 || length == size) return false;
  return std::all_of(name, name + length, [](char c) {
    return (c >= 'a' && c <= 'z') || (c >= 'A' && c <= 'Z') || (c >= '0' && c <= '9') || c == '_' || c == '-' || c == '.';
  });
}

constexpr char kHowToBuild[] =
    "a policy is one C file that includes <hypertier/policy.bpf.h> and declares HYPERTIER_POLICY(name, ...); "
    "docs/policies.md has a first one in ten lines";

std::filesystem::path executable_directory() {
  std::error_code ignored;
  return std::filesystem::read_symlink("/proc/self/exe", ignored).parent_path();
}

}  // namespace

PolicyObject::PolicyObject(PolicyObject&& other) noexcept
    : bytes_(std::move(other.bytes_)),
      file_(std::move(other.file_)),
      load_log_(std::move(other.load_log_)),
      info_(std::move(other.info_)),
      changed_(std::move(other.changed_)),
      variables_(std::move(other.variables_)),
      object_(std::exchange(other.object_, nullptr)),
      map_(std::exchange(other.map_, nullptr)),
      cgroup_id_offset_(other.cgroup_id_offset_) {}

PolicyObject& PolicyObject::operator=(PolicyObject&& other) noexcept {
  if (this != &other) {
    this->~PolicyObject();
    new (this) PolicyObject(std::move(other));
  }
  return *this;
}

PolicyObject::~PolicyObject() { bpf_object__close(object_); }

Result<PolicyObject> PolicyObject::open(std::string bytes, std::string file) {
  if (bytes.size() < sizeof(Elf64_Ehdr) || std::memcmp(bytes.data(), ELFMAG, SELFMAG) != 0)
    return fail(file + " is no policy: it is not an ELF object file", kHowToBuild);
  Elf64_Ehdr header;
  std::memcpy(&header, bytes.data(), sizeof(header));
  if (header.e_machine != EM_BPF || header.e_type != ET_REL)
    return fail(file + " is no policy: it is an ELF file, but not a BPF object", kHowToBuild);

  PolicyObject policy;
  policy.bytes_ = std::move(bytes);
  policy.file_ = std::move(file);
  {
    LibbpfLog log;
    LIBBPF_OPTS(bpf_object_open_opts, options, .object_name = kType);
    policy.object_ = bpf_object__open_mem(policy.bytes_.data(), policy.bytes_.size(), &options);
    if (policy.object_ == nullptr) {
      const auto why = last_line(log.text());
      return fail(policy.file_ + " is no policy: libbpf cannot read it" + (why.empty() ? "" : ": " + why), kHowToBuild);
    }
  }
  if (auto read = policy.read_policy_struct(); !read) return std::unexpected(read.error());
  policy.read_settings();
  return policy;
}

Result<> PolicyObject::read_policy_struct() {
  const btf* types = bpf_object__btf(object_);
  if (types == nullptr) return fail(file_ + " is no policy: it has no BTF", "compile it with clang -g");

  // The map of a struct_ops variable has the variable's name; only the section
  // tells its type and whether it can be swapped.
  std::string variable;
  const btf_type* type = nullptr;
  unsigned found = 0;
  for (std::uint32_t id = 1; id < btf__type_cnt(types); ++id) {
    const btf_type* section = btf__type_by_id(types, id);
    if (!btf_is_datasec(section)) continue;
    const std::string name = btf__name_by_offset(types, section->name_off);
    if (!name.starts_with(".struct_ops") && !name.starts_with("?.struct_ops")) continue;
    const btf_var_secinfo* info = btf_var_secinfos(section);
    for (int i = 0; i < btf_vlen(section); ++i, ++info) {
      const btf_type* var = btf__type_by_id(types, info->type);
      const Resolved resolved = resolve(types, var->type);
      const std::string kind = resolved.type != nullptr ? btf__name_by_offset(types, resolved.type->name_off) : "";
      const std::string var_name = btf__name_by_offset(types, var->name_off);
      if (kind != kType)
        return fail(file_ + " is no policy: its object " + var_name + " is of type " + kind + ", not " + kType,
                    kHowToBuild);
      if (name != kSection)
        return fail(file_ + " cannot be seated: its policy " + var_name + " is in section " + name + ", not " + kSection,
                    "declare it with HYPERTIER_POLICY");
      variable = var_name;
      type = resolved.type;
      ++found;
    }
  }
  if (found == 0) return fail(file_ + " is no policy: it has no object of type " + kType, kHowToBuild);
  if (found > 1)
    return fail(file_ + " has " + std::to_string(found) + " policies, but one file is one policy",
                "put each HYPERTIER_POLICY in a file of its own");

  // Another program would be loaded with the policy and another type attached
  // by it: a policy is nothing but its callbacks.
  bpf_program* program;
  bpf_object__for_each_program(program, object_) {
    if (bpf_program__type(program) != BPF_PROG_TYPE_STRUCT_OPS)
      return fail(file_ + " is no policy: its program " + bpf_program__name(program) + " (section " +
                      bpf_program__section_name(program) + ") is not a callback",
                  "a policy has SEC(\"struct_ops/...\") programs only");
  }
  bpf_map* map;
  bpf_object__for_each_map(map, object_) {
    if (bpf_map__pin_path(map) != nullptr)
      return fail(file_ + " cannot be seated: its map " + bpf_map__name(map) +
                      " asks to be pinned, which would outlive the policy",
                  "remove LIBBPF_PIN_BY_NAME from the map");
  }

  map_ = bpf_object__find_map_by_name(object_, variable.c_str());
  std::size_t size = 0;
  auto* data = map_ != nullptr ? static_cast<char*>(bpf_map__initial_value(map_, &size)) : nullptr;
  if (data == nullptr) return fail(file_ + " is no policy: libbpf shows no data for its object " + variable, kHowToBuild);

  bool has_abi = false, has_cgroup = false;
  const btf_member* member = btf_members(type);
  for (int i = 0; i < btf_vlen(type); ++i, ++member) {
    const std::string name = btf__name_by_offset(types, member->name_off);
    const std::uint32_t offset = btf_member_bit_offset(type, static_cast<std::uint32_t>(i)) / 8;
    const Resolved resolved = resolve(types, member->type);
    const auto read = [&](auto& value) {
      if (offset + sizeof(value) > size) return false;
      std::memcpy(&value, data + offset, sizeof(value));
      return true;
    };
    if (resolved.type != nullptr && btf_is_ptr(resolved.type)) {
      // libbpf keeps a pointer to the program here for each callback that is set.
      void* callback = nullptr;
      if (read(callback) && callback != nullptr) info_.callbacks.push_back(name);
    } else if (name == "abi") {
      std::uint32_t abi = 0;
      has_abi = read(abi);
      info_.abi_major = abi >> 16;
      info_.abi_minor = abi & 0xffff;
    } else if (name == "epoch_ms") {
      read(info_.epoch_ms);
    } else if (name == "flags") {
      read(info_.flags);
    } else if (name == "cgroup_id") {
      has_cgroup = offset + sizeof(std::uint64_t) <= size;
      cgroup_id_offset_ = offset;
    } else if (name == "name") {
      std::array<char, sizeof(tier_exit_info::message)> text{};
      const auto room = std::min<std::size_t>({text.size() - 1, offset < size ? size - offset : 0, 32});
      std::memcpy(text.data(), data + offset, room);
      if (!printable_name(text.data(), room))
        return fail(file_ + " is no policy: its name is empty, longer than 31 characters, or not made of a-z, 0-9, _ . and -",
                    "declare it with HYPERTIER_POLICY");
      info_.name = text.data();
    }
  }
  if (!has_abi || !has_cgroup || info_.name.empty())
    return fail(file_ + " is no policy: its struct " + kType + " lacks abi, cgroup_id or name", kHowToBuild);
  if (info_.abi_major != HT_ABI_MAJOR)
    return fail("policy " + info_.name + " is built for policy ABI " + std::to_string(info_.abi_major) + "." +
                    std::to_string(info_.abi_minor) + ", but this HyperTier speaks " + std::to_string(HT_ABI_MAJOR) + "." +
                    std::to_string(HT_ABI_MINOR),
                "compile it again with this release's include/hypertier");
  if (info_.epoch_ms == 0) info_.epoch_ms = 500;
  if (info_.epoch_ms < 10 || info_.epoch_ms > 60000)
    return fail("policy " + info_.name + " asks for an epoch of " + std::to_string(info_.epoch_ms) +
                    " ms, outside of 10..60000 ms",
                "set .epoch_ms, or leave it out: 500 ms");
  if ((info_.flags & ~static_cast<std::uint64_t>(HT_POLICY_FLAGS)) != 0)
    return fail("policy " + info_.name + " sets flags that this HyperTier does not know", "see enum hypertier_policy_flags");
  return {};
}

void PolicyObject::read_settings() {
  const btf* types = bpf_object__btf(object_);
  bpf_map* map = bpf_object__find_map_by_name(object_, ".rodata");
  const int id = btf__find_by_name_kind(types, ".rodata", BTF_KIND_DATASEC);
  if (map == nullptr || id < 0) return;
  std::size_t size = 0;
  const auto* data = static_cast<const char*>(bpf_map__initial_value(map, &size));
  if (data == nullptr) return;
  const btf_type* section = btf__type_by_id(types, static_cast<std::uint32_t>(id));
  const btf_var_secinfo* info = btf_var_secinfos(section);
  for (int i = 0; i < btf_vlen(section); ++i, ++info) {
    const btf_type* var = btf__type_by_id(types, info->type);
    const Resolved resolved = resolve(types, var->type);
    if (resolved.type == nullptr || !resolved.is_const || !resolved.is_volatile || !btf_is_int(resolved.type)) continue;
    Variable variable{info->offset, info->size, (btf_int_encoding(resolved.type) & BTF_INT_SIGNED) != 0, resolved.is_bool};
    if (variable.size == 0 || variable.size > 8 || variable.offset + variable.size > size) continue;

    std::uint64_t raw = 0;
    std::memcpy(&raw, data + variable.offset, variable.size);
    __int128 value = raw;
    if (variable.is_signed && ((raw >> (variable.size * 8 - 1)) & 1) != 0)
      value -= static_cast<__int128>(1) << (variable.size * 8);
    PolicySetting setting;
    setting.key = btf__name_by_offset(types, var->name_off);
    setting.type = type_name(variable.is_bool, variable.is_signed, variable.size);
    setting.value = variable.is_bool ? (raw != 0 ? "true" : "false") : to_text(value);
    setting.minimum = variable.is_bool ? "false" : to_text(lowest(variable.is_signed, variable.size));
    setting.maximum = variable.is_bool ? "true" : to_text(highest(false, variable.is_signed, variable.size));
    variables_[setting.key] = variable;
    info_.settings.push_back(std::move(setting));
  }
}

Result<> PolicyObject::set(const std::string& key, const std::string& value) {
  const auto found = variables_.find(key);
  if (found == variables_.end()) {
    std::string known;
    for (const auto& setting : info_.settings) known += (known.empty() ? "" : ", ") + setting.key;
    return fail("policy " + info_.name + " has no setting " + key,
                known.empty() ? "this policy has no settings" : "its settings are " + known);
  }
  const Variable& variable = found->second;
  auto setting = std::find_if(info_.settings.begin(), info_.settings.end(), [&](const auto& s) { return s.key == key; });
  const auto parsed = parse_value(value, variable.is_bool);
  if (!parsed)
    return fail("setting " + key + " of policy " + info_.name + " cannot be \"" + value + "\": it is a " + setting->type,
                variable.is_bool ? "give true or false" : "give a whole number, such as 12, 0x0c or 2M");
  if (*parsed < lowest(variable.is_signed, variable.size) ||
      *parsed > highest(variable.is_bool, variable.is_signed, variable.size))
    return fail("setting " + key + " of policy " + info_.name + " cannot be " + value + ": it is outside of " +
                    setting->minimum + ".." + setting->maximum,
                "it is a " + setting->type + ", now " + setting->value);
  std::size_t size = 0;
  auto* data = static_cast<char*>(bpf_map__initial_value(bpf_object__find_map_by_name(object_, ".rodata"), &size));
  const auto raw = static_cast<std::uint64_t>(*parsed);
  std::memcpy(data + variable.offset, &raw, variable.size);
  setting->value = variable.is_bool ? (raw != 0 ? "true" : "false") : to_text(*parsed);
  changed_[key] = value;
  return {};
}

Result<> PolicyObject::load(std::uint64_t cgroup_id) {
  std::size_t size = 0;
  auto* data = static_cast<char*>(bpf_map__initial_value(map_, &size));
  std::memcpy(data + cgroup_id_offset_, &cgroup_id, sizeof(cgroup_id));

  LibbpfLog log;
  const int error = bpf_object__load(object_);
  load_log_ = log.text();
  if (error == 0) return {};
  if (const auto rejected = rejection(log.text()))
    return fail("the verifier rejects policy " + info_.name + " in " + rejected->program + ": " + rejected->reason,
                "`tierctl policy check FILE --verbose` prints the verifier's whole log");
  const auto why = last_line(log.text());
  if (log.text().find("is not found in kernel BTF") != std::string::npos)
    return fail("the kernel does not know policies: hypertier.ko is not loaded", "modprobe hypertier");
  return fail("the kernel does not take policy " + info_.name + ": " +
                  (why.empty() ? std::string(std::strerror(-error)) : why),
              "`tierctl doctor` says what is missing here");
}

PolicyIds PolicyObject::ids() const {
  PolicyIds ids;
  if (object_ == nullptr) return ids;
  bpf_program* program = nullptr;
  bpf_object__for_each_program(program, object_) {
    const int fd = bpf_program__fd(program);
    bpf_prog_info info{};
    __u32 length = sizeof(info);
    if (fd >= 0 && bpf_prog_get_info_by_fd(fd, &info, &length) == 0)
      ids.programs.push_back({bpf_program__name(program), info.id, info.run_cnt, info.run_time_ns});
  }
  bpf_map* map = nullptr;
  bpf_object__for_each_map(map, object_) {
    const int fd = bpf_map__fd(map);
    bpf_map_info info{};
    __u32 length = sizeof(info);
    if (fd < 0 || bpf_map_get_info_by_fd(fd, &info, &length) != 0) continue;
    if (map == map_) ids.map = info.id;
    else ids.maps.push_back({bpf_map__name(map), libbpf_bpf_map_type_str(bpf_map__type(map)), info.id});
  }
  return ids;
}

Result<Seat> Seat::take(PolicyObject& policy) {
  LibbpfLog log;
  bpf_link* link = bpf_map__attach_struct_ops(policy.map_);
  if (link == nullptr) {
    const int error = errno;
    if (error == EBUSY)
      return fail("policy " + policy.info().name + " finds its seat taken by another loader",
                  "end the other loader; `bpftool link list` shows it");
    return fail_errno("policy " + policy.info().name + " refuses its seat", error,
                      "its init callback, or hypertier.ko, said no: `dmesg | tail` has the reason");
  }
  return Seat(link);
}

Result<> Seat::replace(PolicyObject& policy) {
  LibbpfLog log;
  const int error = bpf_link__update_map(link_, policy.map_);
  if (error != 0)
    return fail_errno("policy " + policy.info().name + " refuses its seat", -error,
                      "the old policy stays; `dmesg | tail` has the reason");
  return {};
}

Seat::Seat(Seat&& other) noexcept : link_(std::exchange(other.link_, nullptr)) {}
Seat& Seat::operator=(Seat&& other) noexcept {
  std::swap(link_, other.link_);
  return *this;
}
Seat::~Seat() {
  if (link_ != nullptr) bpf_link__destroy(link_);
}

std::filesystem::path installed_policies() {
  const auto directory = executable_directory();
  for (const auto& candidate : {directory / "../lib/hypertier/policies", directory / "../policies"}) {
    std::error_code ignored;
    if (std::filesystem::is_directory(candidate, ignored)) return std::filesystem::canonical(candidate, ignored);
  }
  return {};
}

std::vector<std::string> installed_policy_names() {
  std::vector<std::string> names;
  std::error_code ignored;
  constexpr std::string_view suffix = ".bpf.o";
  for (const auto& entry : std::filesystem::directory_iterator(installed_policies(), ignored)) {
    const auto name = entry.path().filename().string();
    if (name.ends_with(suffix)) names.push_back(name.substr(0, name.size() - suffix.size()));
  }
  std::sort(names.begin(), names.end());
  return names;
}

Result<std::filesystem::path> resolve_policy(const std::string& file_or_name) {
  std::error_code ignored;
  const bool is_name = file_or_name.find('/') == std::string::npos;
  if (is_name) {
    const auto installed = installed_policies() / (file_or_name + ".bpf.o");
    if (std::filesystem::is_regular_file(installed, ignored)) return installed;
  }
  if (std::filesystem::exists(file_or_name, ignored)) return std::filesystem::path(file_or_name);
  std::string known;
  for (const auto& name : installed_policy_names()) known += (known.empty() ? "" : ", ") + name;
  return fail(is_name ? "there is no installed policy and no file called " + file_or_name
                      : "there is no policy file " + file_or_name,
              known.empty() ? "no policy is installed beside this program: give a file"
                            : "installed policies: " + known);
}

Result<std::string> read_policy_file(int fd, const std::string& file) {
  struct stat status {};
  if (fstat(fd, &status) != 0) return fail_errno("cannot read " + file, errno);
  if (!S_ISREG(status.st_mode)) return fail(file + " is no policy: it is not a regular file", kHowToBuild);
  if (static_cast<std::uint64_t>(status.st_size) > kPolicyMaxBytes)
    return fail(file + " is no policy: it has " + std::to_string(status.st_size) + " bytes, more than " +
                    std::to_string(kPolicyMaxBytes >> 20) + " MiB",
                kHowToBuild);
  std::string bytes(static_cast<std::size_t>(status.st_size), '\0');
  std::size_t have = 0;
  while (have < bytes.size()) {
    const ssize_t got = pread(fd, bytes.data() + have, bytes.size() - have, static_cast<off_t>(have));
    if (got < 0 && errno == EINTR) continue;
    if (got < 0) return fail_errno("cannot read " + file, errno);
    if (got == 0) break;
    have += static_cast<std::size_t>(got);
  }
  bytes.resize(have);
  return bytes;
}

}  // namespace hypertier
