#!/bin/bash
# SPDX-License-Identifier: GPL-2.0-or-later
# Six bad policies, each in a cgroup of its own beside a good one: each is
# refused or ejected with the right reason, the default takes over in the same
# epoch, the good one's epochs go on, the kernel has nothing to complain of.
# usage: bad_policies.sh BUILD   (in the lab, --no-tierd)
. "$(dirname "$0")/../tierd/lib.sh"
GUARDS=$BUILD/tests/e2e/guards/policies
insmod "$MODULE"
start_tierd --fresh
# The lab boots without it; here it is to see a CPU that is not given up for long.
echo 1 >/proc/sys/kernel/watchdog
check_equal "the detector of soft lockups is on" 1 "$(cat /proc/sys/kernel/soft_watchdog)"

mkdir -p /sys/fs/cgroup/bad /sys/fs/cgroup/good
in_cgroup() { # CGROUP COMMAND..., in the background: its process becomes the command
	local group=$1
	shift
	echo 0 >"/sys/fs/cgroup/$group/cgroup.procs" && exec "$@"
}
in_cgroup bad "$TOOLS/busy" 220 "$work/bad" 20 &
bad_pid=$!
in_cgroup good "$TOOLS/busy" 64 "$work/good" 20 &
good_pid=$!
ready() { [ -s "$work/bad" ] && [ "$(od -An -tu8 -N8 "$work/bad" | tr -d ' ')" -gt 0 ]; }
wait_until 120 ready || fail_check "the workload does not start"

of_scope() { tierctl status --cgroup "$1" --json | get "$2"; }
# Asked once, then looked at: each question is a process of its own.
look() { tierctl status --cgroup /bad --json >"$work/status"; }
of_bad() { get "/scopes/0/$1" <"$work/status" 2>/dev/null; }
exit_of_bad() { of_bad "last_exit/$1"; }
ejected() { look && [ "$(exit_of_bad policy)" = "$1" ] && [ "$(exit_of_bad kind)" = ejected ] && [ "$(of_bad policy)" = $DEFAULT ]; }
# It moves pages in every epoch, as long as what gets hot is in slow memory. First touch
# puts all of it into fast memory; a bound of two of its pieces of 2 MiB takes it out again, however
# much fast memory the kernel's image (in either node, by KASLR) and the other scope leave.
check "a bound, good" tierctl cgroup set /good --fast-max 4M
check "load, good" tierctl load "$GUARDS/tidal.bpf.o" --cgroup /good
good_moves() { [ "$(of_scope /good /scopes/0/counters/promoted_pages_total)" -ge $((8 * 512)) ]; }
check "the good one moves pages" wait_until 60 good_moves
last_event() { tierctl events --json | get /next; }

# CODE PATTERN POLICY [LOAD OPTIONS]
ejects() {
	local code=$1 pattern=$2 policy=$3
	shift 3
	note "$policy"
	local after before
	after=$(last_event)
	before=$(of_scope /good /scopes/0/counters/epochs_total)
	if ! check "load" tierctl load "$GUARDS/$policy.bpf.o" --cgroup /bad "$@"; then return; fi
	check "$policy is ejected, and the default takes over" wait_until 240 ejected $policy
	check_equal "$policy: code" "$code" "$(exit_of_bad code)"
	check "$policy: reason ($(exit_of_bad reason))" grep -Eq "$pattern" <(exit_of_bad reason)
	check_equal "$policy: no epoch was without a policy" 0 "$(of_bad counters/empty_epochs_total)"
	# The epoch that ejected it was carried out with the default's answer.
	check_equal "$policy: no epoch without an answer" 0 "$(of_bad counters/policy_failures_total)"
	tierctl events --after "$after" >"$work/events"
	check "$policy: events name the reason" grep -Eq " ejected +/bad $policy: " "$work/events"
	check "$policy: events name the successor" grep -Eq " seated +/bad $DEFAULT: the default takes over in the same epoch" "$work/events"
	check_equal "$policy: when" true "$([ "$(exit_of_bad unix_ms)" -gt 0 ] && [ "$(exit_of_bad epoch)" -gt 0 ] && echo true)"
	echo "ok: $(exit_of_bad reason) ($(exit_of_bad message)), $(($(of_scope /good /scopes/0/counters/epochs_total) - before)) epochs of the other scope meanwhile"
	check_equal "$policy: the other scope's policy" tidal "$(of_scope /good /scopes/0/policy)"
}

note "forbidden"
check_refused "forbidden: the verifier" 1 'the verifier rejects policy forbidden in forbidden_classify: .*(heat and action|may write)' \
	tierctl load "$GUARDS/forbidden.bpf.o" --cgroup /bad

ejects invalid_action 'action that does not exist' invalid
ejects timeout 'took [0-9]+ ms .* more than its 50 ms' sluggish
ejects never_classifies 'never classifies' silent
ejects budget 'more moves than an epoch may carry' restless

note "stuck: seconds in one callback"
# How many rounds are two seconds, on this machine?
check "load, to measure" tierctl load "$GUARDS/stuck.bpf.o" --cgroup /bad --set rounds=4
check "stuck is ejected" wait_until 240 ejected stuck
took_ms=$(exit_of_bad reason | sed -n 's/.*took \([0-9]*\) ms.*/\1/p')
rounds=$((4 * 2200 / (took_ms > 0 ? took_ms : 1) + 1))
echo "4 rounds took $took_ms ms: $rounds are two seconds"
tierctl load "$GUARDS/steady.bpf.o" --cgroup /bad >/dev/null
# From its third epoch on it stands still; the other scope's moves tell when that one had its epochs.
after=$(last_event)
check "load" tierctl load "$GUARDS/stuck.bpf.o" --cgroup /bad --set rounds=$rounds
check "stuck is ejected" wait_until 240 ejected stuck
sleep 1
took_ms=$(exit_of_bad reason | sed -n 's/.*took \([0-9]*\) ms.*/\1/p')
tierctl events --after "$after" --json >"$work/events"
# When, what and where, in whatever order they are written.
read -r moves longest during < <(awk -v took="${took_ms:-0}" '
	{ gsub(/[",]/, ""); value = $2 }
	$1 == "unix_ms:" { at = value } $1 == "kind:" { kind = value } $1 == "cgroup:" { cgroup = value }
	at != "" && kind != "" && cgroup != "" {
		if (cgroup == "/good" && kind == "moved") moved[++n] = at
		if (cgroup == "/bad" && kind == "ejected") ejected = at
		at = kind = cgroup = ""
	}
	END {
		for (i = 1; i <= n; i++) {
			if (i > 1 && moved[i] - moved[i - 1] > longest) longest = moved[i] - moved[i - 1]
			if (moved[i] > ejected - took && moved[i] <= ejected) during++
		}
		print n + 0, longest + 0, during + 0
	}' "$work/events")
echo "stuck: $took_ms ms in one callback; the other scope (epochs of 100 ms, each of which moves pages) moved some" \
	"$during times meanwhile, $moves in all, the longest pause between two was $longest ms"
check_at_least "stuck: in one callback, ms" 1500 "${took_ms:-0}"
check_equal "stuck: code" timeout "$(exit_of_bad code)"
check "stuck: the message names the callback" grep -q '^epoch_begin: ' <(exit_of_bad message)
check_equal "stuck: no epoch without an answer" 0 "$(of_bad counters/policy_failures_total)"
check_at_least "stuck: moves of the other scope meanwhile" $((took_ms / 250)) "$during"
check "stuck: the other scope never waits for it" [ "$longest" -lt 600 ]

note "exit codes"
check_refused "load --wait: the exit code says that it was ejected" 1 'policy invalid did not last 20 epochs: policy invalid answered with an action' \
	tierctl load "$GUARDS/invalid.bpf.o" --cgroup /bad --wait 20
check "load --wait: a good one" tierctl load "$GUARDS/steady.bpf.o" --cgroup /bad --wait 3
check "restore: one command" tierctl restore --cgroup /bad
check_equal "restore" $DEFAULT "$(of_scope /bad /scopes/0/policy)"

note "a loader that dies is no policy error"
check "load" tierctl load "$GUARDS/steady.bpf.o" --cgroup /bad --rate 100MB/s
kill_tierd
start_tierd
check_equal "the seat is restored" steady "$(of_scope /bad /scopes/0/policy)"
check_equal "with its rate" $((100 << 20)) "$(of_scope /bad /scopes/0/rate_bytes_per_s)"
check_equal "nobody was ejected" null "$(of_scope /bad /scopes/0/last_exit)"
again() { [ "$(of_scope /bad /scopes/0/counters/epochs_total)" -ge 1 ]; }
check "its epochs go on" wait_until 30 again
check_equal "no event of an ejection" 0 "$(tierctl events --json | grep -c '"kind": "ejected"')"

check "unload" tierctl unload --cgroup /bad
check "unload, good" tierctl unload --cgroup /good
kill "$bad_pid" "$good_pid"
wait "$bad_pid"
check_equal "the workload's memory is right, bad" 143 $?
wait "$good_pid"
check_equal "the workload's memory is right, good" 143 $?
stop_tierd
check "the module unloads" wait_until 20 module_unloads
check_equal "no lockup, no stall, no warning" 0 "$(dmesg | grep -Ec 'soft lockup|rcu.*stall|WARNING:|BUG:')"
finish
