# SPDX-License-Identifier: GPL-2.0-or-later
# For the tests of tierd, inside the lab VM. A failed check is told and
# counted; finish() turns the count into the exit status.
BUILD=$1
POLICIES=$BUILD/tests/e2e/tierd/policies
TOOLS=$BUILD/tests/e2e/tierd
MODULE=$BUILD/bpf/kmod/hypertier.ko
SOCKET=/run/hypertier/tierd.sock
PINS=/sys/fs/bpf/hypertier
DEFAULT=heattree # the policy that takes an ejected one's seat
NUMA=/proc/sys/kernel/numa_balancing
COMPACTION=/proc/sys/vm/compaction_proactiveness
BOOST=/proc/sys/vm/watermark_boost_factor
checks=0 failures=0 tierd_pid=
work=$(mktemp -d /tmp/tierd-test.XXXXXX)

note() { echo "--- $*"; }
fail_check() { failures=$((failures + 1)); echo "FAILED: $*"; }
check() { # description, command...
	local what=$1
	shift
	checks=$((checks + 1))
	"$@" || fail_check "$what"
}
check_equal() { # description, expected, got
	checks=$((checks + 1))
	[ "$2" = "$3" ] || fail_check "$1: expected '$2', got '$3'"
}
check_at_least() { # description, least, got
	checks=$((checks + 1))
	[ "$3" -ge "$2" ] || fail_check "$1: expected at least $2, got '$3'"
}

# description, exit code, pattern of the message, command...: it fails with one
# sentence on stderr and, where the code is 1, a hint.
check_refused() {
	local what=$1 code=$2 pattern=$3 got
	shift 3
	checks=$((checks + 1))
	"$@" >"$work/out" 2>"$work/err"
	got=$?
	[ $got = "$code" ] || { fail_check "$what: exit code $got, expected $code"; cat "$work/err"; return; }
	grep -Eq -- "$pattern" "$work/err" || { fail_check "$what: no message matches '$pattern':"; cat "$work/err"; return; }
	if [ "$code" = 1 ]; then
		[ "$(grep -vc '^HINT: ' "$work/err")" = 1 ] || { fail_check "$what: not one sentence:"; cat "$work/err"; return; }
		grep -q '^HINT: ' "$work/err" || { fail_check "$what: no hint:"; cat "$work/err"; return; }
	fi
	echo "ok: $what: $(head -1 "$work/err")"
}

# How many samples the sampler may have lost since there were so many: none,
# but for one in 100,000 to a hash bucket that a host's pause kept busy.
check_few_dropped() { # samples before
	local all busy samples
	tierctl status --json >"$work/status"
	all=$(get /dropped+ <"$work/status") busy=$(get /dropped/busy <"$work/status")
	samples=$(($(get /sampler_samples_total <"$work/status") - $1))
	echo "of $samples samples $all were dropped, $busy of them at a busy bucket"
	check_equal "samples dropped, but for a busy bucket" 0 $((all - busy))
	check "at most one in 100,000 at a busy bucket" test "$busy" -le $((1 + samples / 100000))
}

get() { "$TOOLS/jsonget" "$1"; }
status() { tierctl status --json | get "$1"; }
counter() { status "/scopes/0/counters/$1"; }

# wait_until SECONDS COMMAND...: for what the kernel finishes by itself.
wait_until() {
	local i tries=$(($1 * 10))
	shift
	for ((i = 0; i < tries; i++)); do
		"$@" && return
		sleep 0.1
	done
	return 1
}

start_tierd() { # options
	tierd "$@" >>"$work/tierd.log" 2>&1 &
	tierd_pid=$!
	wait_until 20 tierd_answers || { fail_check "tierd does not answer"; cat "$work/tierd.log"; return 1; }
}
tierd_answers() { tierctl status --json >/dev/null 2>&1; }
stop_tierd() {
	[ -n "$tierd_pid" ] || return
	kill -TERM "$tierd_pid"
	wait "$tierd_pid"
	check_equal "exit code of tierd at SIGTERM" 0 $?
	tierd_pid=
}
kill_tierd() {
	kill -KILL "$tierd_pid"
	wait "$tierd_pid" 2>/dev/null
	tierd_pid=
}

# What of ours is in the kernel: all of it must be gone when nothing is seated.
bpf_objects() {
	{ bpftool prog list; bpftool link list; bpftool map list; } 2>/dev/null | grep -c '^[0-9]'
}
no_trace() { [ "$(bpf_objects)" = "$objects_before" ] && [ ! -e $PINS ]; }
at_least_epoch() { [ "$(counter epochs_total)" -ge "$1" ]; }
module_unloads() { rmmod hypertier 2>/dev/null; }

start_busy() { # MIB PAUSE_MS
	"$TOOLS/busy" "$1" "$work/passes" "$2" &
	busy_pid=$!
	wait_until 60 busy_ready
}
passes() { od -An -tu8 -N8 "$work/passes" | tr -d ' '; }
busy_ready() { [ -s "$work/passes" ] && [ "$(passes)" -gt 0 ]; }
busy_goes_on() { # two more passes are made
	local before
	before=$(passes)
	kill -0 "$busy_pid" 2>/dev/null && wait_until 30 busy_beyond $((before + 2))
}
busy_beyond() { [ "$(passes)" -ge "$1" ]; }
stop_busy() {
	kill "$busy_pid" 2>/dev/null
	wait "$busy_pid" 2>/dev/null
	local code=$?
	check_equal "busy ended by our signal, its memory right" 143 $code
}

finish() {
	if [ $failures != 0 ] && [ -e "$work/tierd.log" ]; then
		echo "--- tierd's log:"
		tail -40 "$work/tierd.log"
	fi
	echo "$checks checks, $failures failed"
	rm -rf "$work"
	[ $failures = 0 ]
	exit
}
