// SPDX-License-Identifier: GPL-2.0-or-later
#include "vm/discovery.hpp"

#include <sys/stat.h>
#include <sys/sysmacros.h>

#include <algorithm>
#include <charconv>
#include <cstdio>
#include <fstream>
#include <map>
#include <nlohmann/json.hpp>
#include <optional>
#include <sstream>

#include <hypertier/flex.h>

namespace hypertier {
namespace {

using Options = std::map<std::string, std::string>;

// "driver,id=a,path=x,,y" -> {"": driver, id: a, path: "x,y"}; or a JSON object.
Options options_of(const std::string& text, const std::string& first_key) {
  Options options;
  if (text.starts_with('{')) {
    const auto json = nlohmann::json::parse(text, nullptr, false);
    if (json.is_object())
      for (const auto& [key, value] : json.items())
        options[key] = value.is_string() ? value.get<std::string>() : value.is_boolean() ? (value.get<bool>() ? "on" : "off") : value.dump();
    return options;
  }
  std::vector<std::string> parts(1);
  for (size_t i = 0; i < text.size(); i++) {
    if (text[i] != ',') parts.back() += text[i];
    else if (i + 1 < text.size() && text[i + 1] == ',') parts.back() += text[++i];
    else parts.emplace_back();
  }
  for (size_t i = 0; i < parts.size(); i++) {
    const auto equals = parts[i].find('=');
    if (equals != std::string::npos) options[parts[i].substr(0, equals)] = parts[i].substr(equals + 1);
    else if (i == 0) options[first_key] = parts[i];
    else options[parts[i]] = "on";
  }
  return options;
}

std::string get(const Options& options, const std::string& key) {
  const auto it = options.find(key);
  return it == options.end() ? "" : it->second;
}

bool on(const std::string& value) { return value == "on" || value == "yes" || value == "true" || value == "y"; }

// QEMU's sizes: bytes, or a number with K, M, G or T.
uint64_t size_of(const std::string& text) {
  uint64_t value = 0;
  const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), value);
  if (error != std::errc()) return 0;
  if (end == text.data() + text.size()) return value;
  switch (*end) {
    case 'k': case 'K': return value << 10;
    case 'm': case 'M': return value << 20;
    case 'g': case 'G': return value << 30;
    case 't': case 'T': return value << 40;
    case 'b': case 'B': return value;
  }
  return 0;
}

std::string read_all(const std::filesystem::path& path) {
  std::stringstream text;
  text << std::ifstream(path).rdbuf();
  return text.str();
}

bool lies_below(const std::filesystem::path& path, const std::filesystem::path& directory) {
  std::error_code error;
  const auto inner = std::filesystem::weakly_canonical(path, error), outer = std::filesystem::weakly_canonical(directory, error);
  return !path.empty() && path.is_absolute() && std::mismatch(outer.begin(), outer.end(), inner.begin(), inner.end()).first == outer.end();
}

}  // namespace

Vm parse_qemu(const std::vector<std::string>& arguments) {
  struct Node { int id; bool cpus; std::string memdev; };
  Vm vm;
  std::map<std::string, TierFile> backends;
  std::map<std::string, Options> chardevs;
  std::vector<Node> nodes;
  std::vector<Options> plugs;
  std::string agent_chardev;
  bool monitor_held = false;

  for (size_t i = 1; i + 1 < arguments.size(); i++) {
    std::string flag = arguments[i];
    if (flag.starts_with("--")) flag.erase(0, 1);
    if (!flag.starts_with('-')) continue;
    const std::string& value = arguments[i + 1];
    if (flag == "-name") {
      const auto o = options_of(value, "guest");
      vm.name = get(o, "guest");
    } else if (flag == "-qmp") {
      const auto o = options_of(value, "address");
      if (get(o, "address").starts_with("unix:")) vm.qmp_path = get(o, "address").substr(5);
    } else if (flag == "-chardev") {
      const auto o = options_of(value, "backend");
      chardevs[get(o, "id")] = o;
    } else if (flag == "-mon") {
      const auto o = options_of(value, "chardev");
      if (get(o, "mode") != "control") continue;
      const auto& chardev = chardevs[get(o, "chardev")];
      // libvirt's own monitor serves one client, and that is libvirt.
      if (get(o, "chardev") == "charmonitor") monitor_held = true;
      else if (!get(chardev, "path").empty() && vm.qmp_path.empty()) vm.qmp_path = get(chardev, "path");
    } else if (flag == "-object") {
      const auto o = options_of(value, "qom-type");
      const auto type = get(o, "qom-type");
      if (!type.starts_with("memory-backend-")) continue;
      TierFile file;
      file.id = get(o, "id");
      file.size_bytes = size_of(get(o, "size"));
      file.shared = on(get(o, "share"));
      file.memfd = type == "memory-backend-memfd";
      if (type == "memory-backend-file") {
        file.path = get(o, "mem-path");
        // A directory means an unlinked file in it.
        if (file.path.ends_with('/')) file.path.clear();
      }
      backends[file.id] = file;
    } else if (flag == "-numa") {
      const auto o = options_of(value, "type");
      if (get(o, "type") != "node" || get(o, "memdev").empty()) continue;
      const bool cpus = std::any_of(o.begin(), o.end(), [](auto& e) { return e.first == "cpus"; });
      const auto id = get(o, "nodeid");
      nodes.push_back({id.empty() ? static_cast<int>(nodes.size()) : atoi(id.c_str()), cpus, get(o, "memdev")});
    } else if (flag == "-device") {
      const auto o = options_of(value, "driver");
      if (get(o, "driver") == "virtserialport" && get(o, "name") == HF_AGENT_PORT) agent_chardev = get(o, "chardev");
      if (get(o, "driver").starts_with("virtio-mem")) plugs.push_back(o);
      if (!get(o, "driver").starts_with("virtio-balloon")) continue;
      vm.has_balloon = true;
      vm.reporting = on(get(o, "free-page-reporting"));
      if (!get(o, "id").empty()) vm.balloon_path = "/machine/peripheral/" + get(o, "id");
    }
  }

  if (!agent_chardev.empty() && get(chardevs[agent_chardev], "backend") == "socket") vm.agent_path = get(chardevs[agent_chardev], "path");

  auto problem = [&](std::string text, std::string hint) {
    if (!vm.problem.empty()) return;
    vm.problem = std::move(text);
    vm.hint = std::move(hint);
  };
  std::array<const Node*, HT_TIERS> found{};
  for (const auto& node : nodes) {
    auto& slot = found[node.cpus ? HT_TIER_FAST : HT_TIER_SLOW];
    if (slot) problem("has more than one memory node " + std::string(node.cpus ? "with" : "without") + " CPUs", "Two tiers are two nodes: one with CPUs (fast), one without (slow).");
    slot = &node;
  }
  for (int t = 0; t < HT_TIERS; t++) {
    if (!found[t]) {
      problem(std::string("has no ") + (t == HT_TIER_FAST ? "fast tier: a node with CPUs and a memdev" : "slow tier: a node without CPUs, with a memdev"),
              "tierctl vm qemu-args prints the options a VM needs.");
      continue;
    }
    vm.tier[t] = backends[found[t]->memdev];
    vm.tier[t].node = found[t]->id;
    if ((vm.tier[t].path.empty() && !vm.tier[t].memfd) || !vm.tier[t].shared)
      problem("does not keep its memory " + found[t]->memdev + " in a named file or a memfd, with share=on", "tierctl vm qemu-args prints the options a VM needs.");
  }
  for (const auto& o : plugs)
    for (size_t t = 0; t < HT_TIERS; t++) {
      if (!found[t] || atoi(get(o, "node").c_str()) != found[t]->id) continue;
      if (!vm.plug[t].device.empty()) problem("has more than one virtio-mem device for a tier", "Give every tier one.");
      vm.plug[t].device = "/machine/peripheral/" + get(o, "id");
      vm.plug[t].file = backends[get(o, "memdev")];
      vm.plug[t].file.node = found[t]->id;
      if (get(o, "id").empty()) problem("has a virtio-mem device without an id", "Add id=NAME to it.");
      if (vm.tier[t].path.empty() || vm.plug[t].file.path.empty() || !vm.plug[t].file.shared)
        problem("does not keep the memory of a tier with a virtio-mem device in named files with share=on", "tierctl vm qemu-args --virtio-mem prints the options a VM needs.");
    }
  if (vm.plug[0].device.empty() != vm.plug[1].device.empty())
    problem("has a virtio-mem device for one tier only", "Give every tier one, or none.");
  if (!vm.has_balloon && !vm.plugs()) problem("has no virtio-balloon-pci device", "Add -device virtio-balloon-pci,id=balloon0,free-page-reporting=on.");
  if (vm.qmp_path.empty())
    problem(monitor_held ? "has no QMP monitor but that of libvirt" : "has no QMP socket",
            "Add -qmp unix:PATH,server=on,wait=off (libvirt: <qemu:commandline>).");
  return vm;
}

std::vector<Vm> find_qemus(const std::filesystem::path& root, const std::vector<std::filesystem::path>& qmp_below) {
  std::vector<Vm> vms;
  std::error_code error;
  for (const auto& entry : std::filesystem::directory_iterator(root / "proc", error)) {
    const std::string base = entry.path().filename();
    int pid = 0;
    if (std::from_chars(base.data(), base.data() + base.size(), pid).ptr != base.data() + base.size()) continue;
    std::vector<std::string> arguments;
    std::istringstream words(read_all(entry.path() / "cmdline"));
    for (std::string word; std::getline(words, word, '\0');) arguments.push_back(word);
    if (arguments.empty()) continue;
    const auto program = std::filesystem::path(arguments[0]).filename().string();
    if (!program.starts_with("qemu-system-") && program != "qemu-kvm" && program != "kvm") continue;
    Vm vm = parse_qemu(arguments);
    // Before names are told apart: one that is not ours takes no name from ours.
    if (!qmp_below.empty() && std::none_of(qmp_below.begin(), qmp_below.end(), [&](auto& d) { return lies_below(vm.qmp_path, d); })) continue;
    vm.pid = pid;
    // Field 22 of stat, counted behind the name, which may hold anything.
    const std::string stat = read_all(entry.path() / "stat");
    std::istringstream fields(stat.substr(std::min(stat.size(), stat.rfind(')') + 1)));
    std::string skip;
    for (int i = 3; i < 22; i++) fields >> skip;
    fields >> vm.start_time;
    if (vm.name.empty()) vm.name = "pid-" + base;
    vms.push_back(std::move(vm));
  }
  std::sort(vms.begin(), vms.end(), [](const Vm& a, const Vm& b) { return a.pid < b.pid; });
  // Two of one name: the second is called by its pid, so that a name is one VM.
  for (size_t i = 0; i < vms.size(); i++)
    for (size_t k = 0; k < i; k++)
      if (vms[k].name == vms[i].name) vms[i].name += "-" + std::to_string(vms[i].pid);
  return vms;
}

Result<std::string> descriptor_of(int pid, uint64_t address) {
  const auto process = std::filesystem::path("/proc") / std::to_string(pid);
  std::ifstream maps(process / "maps");
  struct stat file{};
  // "7f00-7f80 rw-s 00000000 00:01 1025 /memfd:name (deleted)"
  for (std::string line; std::getline(maps, line);) {
    unsigned long long start = 0, end = 0, inode = 0;
    unsigned device_major = 0, device_minor = 0;
    if (sscanf(line.c_str(), "%llx-%llx %*s %*x %x:%x %llu", &start, &end, &device_major, &device_minor, &inode) != 5) continue;
    if (address < start || address >= end || inode == 0) continue;
    std::error_code error;
    for (const auto& entry : std::filesystem::directory_iterator(process / "fd", error))
      if (stat(entry.path().c_str(), &file) == 0 && file.st_ino == inode && file.st_dev == makedev(device_major, device_minor))
        return entry.path().string();
  }
  return fail("process " + std::to_string(pid) + " has no descriptor of the memory at the address that QEMU says");
}

}  // namespace hypertier
