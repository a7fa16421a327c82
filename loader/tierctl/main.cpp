// SPDX-License-Identifier: GPL-2.0-or-later
// tierctl: the grammar. Exit codes: 0 done, 1 failed, 2 usage.
#include <CLI/CLI.hpp>
#include <functional>

#include <hypertier/abi.h>

#include "cli/vm.hpp"
#include "tierctl/commands.hpp"

int main(int argc, char** argv) {
  using namespace hypertier;
  Context context;
  LoadArguments load;
  std::string cgroup = "/", shown_cgroup, policy_file;
  BudgetArguments budget;
  std::uint32_t pid = 0;
  std::uint64_t after = 0;
  std::string address;
  bool follow = false;
  bool force = false, verbose = false;
  std::function<int()> run;

  CLI::App app{"tierctl " HT_VERSION " - seats memory-tiering policies and shows what they do.\n"
               "First steps: tierctl doctor, tierctl load heattree, tierctl status"};
  app.name("tierctl");
  app.require_subcommand(1);
  app.fallthrough();
  app.set_version_flag("--version", std::string("tierctl " HT_VERSION));
  app.add_flag("-j,--json", context.json, "JSON on stdout, messages on stderr");
  app.add_option("--socket", context.socket, "where tierd listens")->capture_default_str();

  const auto verb = [&](CLI::App& parent, const char* name, const char* text, std::function<int()> command) {
    CLI::App* sub = parent.add_subcommand(name, text);
    sub->fallthrough();
    sub->callback([&run, command] { run = command; });
    return sub;
  };
  const auto takes_policy = [&](CLI::App* sub) {
    sub->add_option("policy", load.file, "a compiled policy (FILE.bpf.o), or the name of an installed one")
        ->required()
        ->type_name("FILE|NAME");
    sub->add_option("--set", load.settings, "change a setting of the policy; repeat for more")
        ->type_name("KEY=VALUE")
        ->allow_extra_args(false);
  };

  auto* sub = verb(app, "load", "seat a policy; swaps it in without a gap if one is seated already",
                   [&] { return command_load(context, load); });
  takes_policy(sub);
  sub->add_option("--cgroup", load.cgroup, "the cgroup whose seat it takes")->capture_default_str();
  sub->add_option("--rate", load.rate, "most bytes a second that may change tiers, both ways together; 0: no limit (default: 200MB/s)");
  sub->add_flag("--dry-run", load.dry_run, "decide and show, but move nothing");
  sub->add_option("--wait", load.wait_epochs, "wait so many epochs; exit code 1 if the policy is ejected meanwhile")
      ->type_name("EPOCHS")
      ->check(CLI::Range(1U, 1000000U));
  sub = verb(app, "unload", "unseat the policy: sampling and moving end, the machine is as before",
             [&] { return command_unload(context, cgroup, force); });
  sub->add_option("--cgroup", cgroup, "the cgroup whose seat is emptied")->capture_default_str();
  sub->add_flag("--force", force, "also remove what a dead tierd left behind");
  sub = verb(app, "restore", "seat the default policy (heattree)", [&] { return command_restore(context, cgroup); });
  sub->add_option("--cgroup", cgroup, "the cgroup whose seat it takes")->capture_default_str();
  sub = verb(app, "status", "tiers, seated policies, counters", [&] { return command_status(context, shown_cgroup); });
  sub->add_option("--cgroup", shown_cgroup, "only the scope that manages this cgroup");
  sub = verb(app, "ranges", "address ranges as the policy sees them: heat, samples, pages per tier", [&] {
    return command_ranges(context, pid != 0 ? std::optional(pid) : std::nullopt, shown_cgroup);
  });
  sub->add_option("--cgroup", shown_cgroup, "only those of the scope that manages this cgroup");
  sub->add_option("--pid", pid, "of this process only")->check(CLI::Range(1U, 4194304U));
  sub = verb(app, "events", "what was decided, moved and thrown out, and why", [&] { return command_events(context, follow, after); });
  sub->add_flag("-f,--follow", follow, "go on as things happen; with --json, one object a line");
  sub->add_option("--after", after, "only what came after this record's number");
  sub = verb(app, "explain", "why a page is where it is: its range, its heat over time", [&] {
    char* end = nullptr;
    const std::uint64_t at = std::strtoull(address.c_str(), &end, 16);
    return command_explain(context, pid, *end == 0 && end != address.c_str() ? at : 0);
  });
  sub->add_option("--pid", pid, "the process")->required()->check(CLI::Range(1U, 4194304U));
  sub->add_option("--addr", address, "an address in it, hexadecimal")->required()->check([](const std::string& text) {
    const std::string digits = text.starts_with("0x") ? text.substr(2) : text;
    return !digits.empty() && digits.size() <= 16 && digits.find_first_not_of("0123456789abcdefABCDEF") == std::string::npos
               ? std::string()
               : "\"" + text.substr(0, 64) + "\" is no hexadecimal address";
  });

  CLI::App* group = app.add_subcommand("cgroup", "what a cgroup may use of the fast tier, and what is kept for it");
  group->require_subcommand(1);
  group->fallthrough();
  sub = verb(*group, "set", "give a cgroup a budget, or change it", [&] { return command_cgroup_set(context, budget); });
  sub->add_option("cgroup", budget.cgroup, "path below the cgroup root, such as /system.slice")->required()->type_name("PATH");
  sub->add_option("--fast-max", budget.fast_max, "most fast memory it may have: 2G, 512M or 40%");
  sub->add_option("--rate", budget.rate, "most bytes a second that may change tiers, such as 200MB/s; 0: no limit");
  sub->add_option("--dry-run", budget.dry_run, "on: decide and show, but move nothing")->check(CLI::IsMember({"on", "off"}));
  sub->add_option("--fast-min", budget.fast_min, "fast memory that its siblings do not take from it");
  sub = verb(*group, "reset", "take the budget away", [&] { return command_cgroup_reset(context, cgroup); });
  sub->add_option("cgroup", cgroup, "path below the cgroup root")->required()->type_name("PATH");
  sub = verb(*group, "show", "budgets, and what is used", [&] { return command_cgroup_show(context, shown_cgroup); });
  sub->add_option("cgroup", shown_cgroup, "only this one")->type_name("PATH");

  CLI::App* policy = app.add_subcommand("policy", "look at policies without seating them");
  policy->require_subcommand(1);
  policy->fallthrough();
  verb(*policy, "list", "installed and seated policies", [&] { return command_policy_list(context); });
  sub = verb(*policy, "show", "name, callbacks and settings of a policy; without one, of that which is seated",
             [&] { return command_policy_show(context, policy_file, shown_cgroup); });
  sub->add_option("policy", policy_file, "a compiled policy (FILE.bpf.o), or the name of an installed one")->type_name("FILE|NAME");
  sub->add_option("--cgroup", shown_cgroup, "what is seated in this cgroup, as the kernel runs it");
  sub = verb(*policy, "check", "give a policy to the verifier, without seating it",
             [&] { return command_policy_check(context, load, verbose); });
  takes_policy(sub);
  sub->add_flag("-v,--verbose", verbose, "print the verifier's log on stderr");

  add_vm_commands(app, context.json, run);

  verb(app, "doctor", "what tiering needs, what of it works here, and what to do about the rest",
       [&] { return command_doctor(context); });
  verb(app, "version", "versions of tierctl, tierd and hypertier.ko, and whether they fit",
       [&] { return command_version(context); });

  try {
    app.parse(argc, argv);
  } catch (const CLI::ParseError& error) {
    return app.exit(error) == 0 ? 0 : 2;
  }
  return run();
}
