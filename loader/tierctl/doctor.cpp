// SPDX-License-Identifier: GPL-2.0-or-later
// `tierctl doctor`: what tiering needs, what of it is here, and what to do
// about the rest. Works without tierd.
#include <dirent.h>
#include <sys/utsname.h>
#include <unistd.h>

#include <cctype>
#include <cstdio>
#include <filesystem>
#include <fstream>
#include <map>
#include <set>

#include <hypertier/abi.h>

#include "adapter/tiers.hpp"
#include "sources/source.hpp"
#include "tierctl/commands.hpp"
#include "tierctl/output.hpp"

namespace hypertier {
namespace {

enum class Grade { kOk, kWarning, kFailed };

struct Finding {
  std::string name;
  Grade grade;
  std::string text, hint;
};

const char* grade_name(Grade grade) {
  switch (grade) {
    case Grade::kOk: return "ok";
    case Grade::kWarning: return "warning";
    case Grade::kFailed: return "failed";
  }
  return "";
}

std::string read_line(const std::filesystem::path& path) {
  std::ifstream file(path);
  std::string line;
  std::getline(file, line);
  return line;
}

Finding check_kernel() {
  utsname name{};
  uname(&name);
  const std::string release = name.release;
  if (!std::filesystem::exists("/sys/kernel/btf/vmlinux"))
    return {"kernel", Grade::kFailed, release + " has no BTF", "boot a kernel with CONFIG_DEBUG_INFO_BTF, such as Debian's"};
  if (!release.starts_with("6.12."))
    return {"kernel", Grade::kFailed, release + " is not supported: hypertier.ko is made for 6.12", "boot Debian's kernel 6.12"};
  return {"kernel", Grade::kOk, release, ""};
}

Finding check_module() {
  if (!std::filesystem::exists("/sys/module/hypertier"))
    return {"module", Grade::kFailed, "hypertier.ko is not loaded", "modprobe hypertier"};
  const std::string version = read_line("/sys/module/hypertier/version");
  if (version != HT_VERSION)
    return {"module", Grade::kFailed, "hypertier.ko is version " + version + ", this release is " HT_VERSION,
            "rmmod hypertier, then load this release's"};
  return {"module", Grade::kOk, "hypertier.ko " + version, ""};
}

Finding check_tiers() {
  const auto tiers = discover_tiers();
  if (!tiers) return {"tiers", Grade::kFailed, tiers.error().message, tiers.error().hint};
  const auto use = tier_use(*tiers);
  std::string text;
  for (const auto tier : {HT_TIER_FAST, HT_TIER_SLOW}) {
    std::string nodes;
    for (const int node : tiers->nodes[tier]) nodes += (nodes.empty() ? "" : ",") + std::to_string(node);
    text += std::string(tier == HT_TIER_FAST ? "fast" : "; slow") + " node " + nodes;
    if (use) text += " (" + size_text((*use)[tier].capacity_bytes) + ")";
  }
  return {"tiers", Grade::kOk, text + ", by " + tiers->origin, ""};
}

// What tierd keeps off while a policy is seated (adapter/kernel_settings.hpp).
Finding check_kernel_setting(const std::string& group, const std::string& name, bool seated) {
  const std::string value = read_line("/proc/sys/" + group + "/" + name);
  if (value.empty()) return {name, Grade::kOk, "not in this kernel", ""};
  if (seated && value != "0")
    return {name, Grade::kWarning, "is " + value + " while a policy is seated: the kernel moves pages too",
            "somebody set it after the policy was seated: sysctl " + group + "." + name + "=0"};
  return {name, Grade::kOk,
          seated ? "off while a policy is seated" : value + (value == "0" ? "" : "; goes off while a policy is seated"), ""};
}

std::set<std::string> running_commands() {
  std::set<std::string> names;
  std::error_code ignored;
  for (const auto& entry : std::filesystem::directory_iterator("/proc", ignored)) {
    const auto name = entry.path().filename().string();
    if (std::isdigit(static_cast<unsigned char>(name[0])) != 0) names.insert(read_line(entry.path() / "comm"));
  }
  return names;
}

Finding check_other_movers() {
  std::string found;
  const auto add = [&](const std::string& what) { found += (found.empty() ? "" : ", ") + what; };
  const auto commands = running_commands();
  for (const auto& command : commands)
    if (command.starts_with("kdamond")) {
      add("DAMON (" + command + ")");
      break;
    }
  for (const char* daemon : {"memtierd", "numad", "damo"})
    if (commands.contains(daemon)) add(daemon);
  if (found.empty()) return {"other movers", Grade::kOk, "none: no DAMON, memtierd or numad runs", ""};
  return {"other movers", Grade::kWarning, found + " may move pages against the policy", "stop it while a policy is seated"};
}

Finding check_demotion() {
  const std::string value = read_line("/sys/kernel/mm/numa/demotion_enabled");
  if (value.empty()) return {"demotion", Grade::kOk, "not in this kernel", ""};
  return {"demotion", Grade::kOk, "kernel demotion under pressure is " + std::string(value == "true" || value == "1" ? "on" : "off"), ""};
}

Finding check_perf() {
  const std::string rate = read_line("/proc/sys/kernel/perf_event_max_sample_rate");
  const std::string percent = read_line("/proc/sys/kernel/perf_cpu_time_max_percent");
  if (rate.empty()) return {"perf", Grade::kFailed, "this kernel has no perf events", "boot a kernel with CONFIG_PERF_EVENTS"};
  const std::string text = "at most " + rate + " samples/s a CPU, " + percent + " % of CPU time";
  if (std::stoul(rate) < 10000)
    return {"perf", Grade::kWarning, text + ": the kernel will throttle sampling", "sysctl kernel.perf_event_max_sample_rate=100000"};
  return {"perf", Grade::kOk, text, ""};
}

}  // namespace

int command_doctor(const Context& context) {
  if (geteuid() != 0)
    return print_error({"doctor needs root: it opens perf events to see whether they deliver",
                        "run it again as root, for example with sudo", 0},
                       context.json);
  std::vector<Finding> findings{check_kernel(), check_module(), check_tiers()};

  bool seated = false;
  Finding tierd{"tierd", Grade::kWarning, "", ""};
  if (auto status = ask_tierd(context.socket, {{"command", "status"}})) {
    const Json& scope = (*status)["scopes"][0];
    seated = !scope["policy"].is_null();
    tierd.grade = scope["error"].is_null() ? Grade::kOk : Grade::kFailed;
    tierd.text = "runs (pid " + (*status)["pid"].dump() + "), " +
                 (seated ? "policy " + scope["policy"].get<std::string>() : "no policy is seated");
    if (!scope["error"].is_null()) {
      tierd.text += ": " + scope["error"]["message"].get<std::string>();
      tierd.hint = scope["error"]["hint"].get<std::string>();
    }
  } else {
    tierd.text = status.error().message;
    tierd.hint = status.error().hint;
  }
  findings.push_back(std::move(tierd));

  bool any_source = false;
  for (auto& report : diagnose_sources()) {
    any_source = any_source || report.works;
    findings.push_back({"source " + report.name, report.works ? Grade::kOk : Grade::kWarning, std::move(report.text),
                        std::move(report.hint)});
  }
  if (!any_source) findings.push_back({"sources", Grade::kFailed, "no source delivers samples here", "see the hints of each source"});
  findings.push_back(check_perf());
  findings.push_back(check_kernel_setting("kernel", "numa_balancing", seated));
  findings.push_back(check_kernel_setting("vm", "compaction_proactiveness", seated));
  findings.push_back(check_kernel_setting("vm", "watermark_boost_factor", seated));
  findings.push_back(check_demotion());
  findings.push_back(check_other_movers());

  bool failed = false;
  Json list = Json::array();
  std::vector<std::vector<std::string>> rows;
  for (const auto& finding : findings) {
    failed = failed || finding.grade == Grade::kFailed;
    list.push_back({{"name", finding.name}, {"grade", grade_name(finding.grade)}, {"text", finding.text}, {"hint", finding.hint}});
    rows.push_back({grade_name(finding.grade), finding.name, finding.text});
    if (!finding.hint.empty() && finding.grade != Grade::kOk) rows.push_back({"", "", "HINT: " + finding.hint});
  }
  if (context.json) {
    print_json({{"schema", kSchema}, {"ready", !failed}, {"findings", std::move(list)}});
  } else {
    print_table(rows);
    std::puts(failed ? "\ntiering cannot work here until what failed is fixed" : "\ntiering can work here");
  }
  return failed ? 1 : 0;
}

}  // namespace hypertier
