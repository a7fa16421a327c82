#!/bin/bash
# SPDX-License-Identifier: GPL-2.0-or-later
# Scopes and budgets through tierctl: nearest ancestor, processes that move,
# removed cgroups, refusals, restart.
# usage: scopes.sh BUILD   (in the lab, --no-tierd)
. "$(dirname "$0")/../tierd/lib.sh"
CGROUPS=/sys/fs/cgroup
objects_before=$(bpf_objects)

scope_of() { # of a process
	tierctl ranges --pid "$1" --json | get /ranges/0/cgroup
}
in_scope() { [ "$(scope_of "$1")" = "$2" ]; }
scope_epochs() { tierctl status --cgroup "$1" --json | get /scopes/0/counters/epochs_total; }
epochs_beyond() { [ "$(scope_epochs "$1")" -gt "$2" ]; }
exit_kind() { tierctl status --cgroup "$1" --json | get /scopes/0/last_exit/kind; }
exit_is() { [ "$(exit_kind "$1")" = "$2" ]; }

insmod "$MODULE"
mkdir -p $CGROUPS/a/b/c $CGROUPS/d
start_busy 32 50
start_tierd --fresh

note "nearest ancestor"
check_refused "no such cgroup" 1 'there is no cgroup /nowhere' tierctl load hyperplace --cgroup /nowhere
check_refused "no path" 1 'no path of a cgroup' tierctl load hyperplace --cgroup ../etc
check "a seat in /a alone" tierctl load static --cgroup a
check_equal "the root has none" null "$(tierctl status --json | get /scopes/0/policy)"
check "epochs end" wait_until 30 epochs_beyond /a 1
check_equal "busy is nobody's" "" "$(scope_of $busy_pid 2>/dev/null)"
check "a seat in the root" tierctl load hyperplace
check "a seat in /a/b" tierctl load hyperplace --cgroup /sys/fs/cgroup/a/b/
check "busy is the root's" wait_until 30 in_scope $busy_pid /
for at in a/b/c:/a/b a:/a d:/; do
	echo $busy_pid >$CGROUPS/${at%:*}/cgroup.procs
	before=$(scope_epochs ${at#*:})
	check "in /${at%:*} it is that of ${at#*:}" wait_until 30 in_scope $busy_pid ${at#*:}
	echo "in /${at%:*}: after $(($(scope_epochs ${at#*:}) - before)) epochs"
done
check_equal "status of /a/b/c is its nearest" /a/b "$(tierctl status --cgroup a/b/c --json | get /scopes/0/cgroup)"
check_few_dropped 0

note "a seat that is emptied, a cgroup that is removed"
echo $busy_pid >$CGROUPS/a/b/c/cgroup.procs
check "it is that of /a/b" wait_until 30 in_scope $busy_pid /a/b
check "unload /a/b" tierctl unload --cgroup /a/b
check "it falls to /a" wait_until 30 in_scope $busy_pid /a
check "swap in /a" tierctl load hyperplace --cgroup /a
check_equal "generation" 2 "$(tierctl status --cgroup a --json | get /scopes/0/generation)"
echo $busy_pid >$CGROUPS/cgroup.procs
rmdir $CGROUPS/a/b/c $CGROUPS/a/b $CGROUPS/a
check "the scope of /a ends" wait_until 30 exit_is /a cgroup_removed
check "it is told" grep -q 'cgroup_removed.*/a\|cgroup /a was removed' <(tierctl events)
check "busy is the root's" wait_until 30 in_scope $busy_pid /

note "budgets"
tier=$(status /tiers/0/capacity_bytes)
check_refused "minima" 1 'cannot hold all minima' tierctl cgroup set /d --fast-min $((tier + 4096))
check_refused "min above max" 1 'is above its fast-max' tierctl cgroup set /d --fast-min 20% --fast-max 10%
check_refused "no size" 1 'fast-max cannot be' tierctl cgroup set /d --fast-max much
check_refused "no budget" 1 'has no budget' tierctl cgroup reset /d
check_refused "nothing given" 1 'no budget is given' tierctl cgroup set /d
check_equal "nothing was changed" '[]' "$(tierctl cgroup show --json | get /budgets)"
check "set" tierctl cgroup set /d --fast-max 16M --fast-min 4M
check_equal "in force" true "$(tierctl cgroup show --json | get /budgets/0/in_force)"
check_equal "the root's policy answers for it" / "$(tierctl status --cgroup /d --json | get /scopes/0/seat)"
check "its own epochs" wait_until 30 epochs_beyond /d 1
echo $busy_pid >$CGROUPS/d/cgroup.procs
check "busy is that of /d" wait_until 30 in_scope $busy_pid /d
fast_at_most() { [ "$(tierctl cgroup show --json | get /budgets/0/fast_bytes)" -le "$1" ]; }
known() { [ "$(tierctl cgroup show --json | get /budgets/0/slow_bytes)" -gt 0 ]; }
check "what is beyond 16 MiB is demoted" wait_until 30 known
check "at most 16 MiB" fast_at_most $((16 << 20))
tierctl cgroup show
labctl place $busy_pid

note "a restart"
before=$(status /scopes/0/policy)
check "a seat in /d" tierctl load static --cgroup /d
mkdir $CGROUPS/gone
check "a seat in /gone" tierctl load static --cgroup /gone
check "the workload runs on" busy_goes_on
stop_tierd
rmdir $CGROUPS/gone
start_tierd
check_equal "root" "$before" "$(tierctl status --cgroup / --json | get /scopes/0/policy)"
check_equal "/d" static "$(tierctl status --cgroup /d --json | get /scopes/0/policy)"
check_equal "its budget" $((16 << 20)) "$(tierctl cgroup show /d --json | get /budgets/0/fast_max_bytes)"
check_equal "/gone cannot be restored, and it is told" reseat_failed "$(tierctl status --cgroup /gone --json | get /scopes/0/state)"
check_equal "/d runs from its first epoch" 0 "$(tierctl status --cgroup /d --json | get /scopes/0/counters/policy_failures_total)"

stop_busy
check "unload /d" tierctl unload --cgroup /d
check "reset" tierctl cgroup reset /d
check "unload" tierctl unload
check "no trace" wait_until 20 no_trace
stop_tierd
check "the module unloads" wait_until 20 module_unloads
finish
