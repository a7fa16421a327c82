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
  bool force = false, verbose = false;
  std::function<int()> run;

  CLI::App app{"tierctl " HT_VERSION " - seats memory-tiering policies and shows what they do.\n"
               "First steps: tierctl doctor, tierctl load hyperplace, tierctl status"};
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
  sub = verb(app, "unload", "unseat the policy: sampling and moving end, the machine is as before",
             [&] { return command_unload(context, cgroup, force); });
  sub->add_option("--cgroup", cgroup, "the cgroup whose seat is emptied")->capture_default_str();
  sub->add_flag("--force", force, "also remove what a dead tierd left behind");
  sub = verb(app, "restore", "seat the default policy (hyperplace)", [&] { return command_restore(context, cgroup); });
  sub->add_option("--cgroup", cgroup, "the cgroup whose seat it takes")->capture_default_str();
  sub = verb(app, "status", "tiers, seated policies, counters", [&] { return command_status(context, shown_cgroup); });
  sub->add_option("--cgroup", shown_cgroup, "only the scope that manages this cgroup");
  sub = verb(app, "ranges", "address ranges as the policy sees them: heat, samples, pages per tier", [&] {
    return command_ranges(context, pid != 0 ? std::optional(pid) : std::nullopt, shown_cgroup);
  });
  sub->add_option("--cgroup", shown_cgroup, "only those of the scope that manages this cgroup");
  sub->add_option("--pid", pid, "of this process only")->check(CLI::Range(1U, 4194304U));
  verb(app, "events", "what happened to seats since tierd started", [&] { return command_events(context); });

  CLI::App* group = app.add_subcommand("cgroup", "what a cgroup may use of the fast tier, and what is kept for it");
  group->require_subcommand(1);
  group->fallthrough();
  sub = verb(*group, "set", "give a cgroup a budget, or change it", [&] { return command_cgroup_set(context, budget); });
  sub->add_option("cgroup", budget.cgroup, "path below the cgroup root, such as /system.slice")->required()->type_name("PATH");
  sub->add_option("--fast-max", budget.fast_max, "most fast memory it may have: 2G, 512M or 40%");
  sub->add_option("--fast-min", budget.fast_min, "fast memory that its siblings do not take from it");
  sub = verb(*group, "reset", "take the budget away", [&] { return command_cgroup_reset(context, cgroup); });
  sub->add_option("cgroup", cgroup, "path below the cgroup root")->required()->type_name("PATH");
  sub = verb(*group, "show", "budgets, and what is used", [&] { return command_cgroup_show(context, shown_cgroup); });
  sub->add_option("cgroup", shown_cgroup, "only this one")->type_name("PATH");

  CLI::App* policy = app.add_subcommand("policy", "look at policies without seating them");
  policy->require_subcommand(1);
  policy->fallthrough();
  verb(*policy, "list", "installed policies", [&] { return command_policy_list(context); });
  sub = verb(*policy, "show", "name, callbacks and settings of a policy",
             [&] { return command_policy_show(context, policy_file); });
  sub->add_option("policy", policy_file, "a compiled policy (FILE.bpf.o), or the name of an installed one")
      ->required()
      ->type_name("FILE|NAME");
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
