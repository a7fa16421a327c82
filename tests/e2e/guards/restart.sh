#!/bin/bash
# SPDX-License-Identifier: GPL-2.0-or-later
# tierd stopped and started, and killed and started: no page moves back, what was
# loaded answers the first epoch from its saved state, with its budget, rate and
# settings; what cannot be restored is reported.
# usage: restart.sh BUILD   (in the lab, --no-tierd --icount)
. "$(dirname "$0")/../tierd/lib.sh"
GUARDS=$BUILD/tests/e2e/guards/policies
insmod "$MODULE"
echo 0 >$NUMA # the kernel's own tiering would move pages while tierd is away
start_tierd --fresh
mkdir -p /sys/fs/cgroup/svc /sys/fs/cgroup/batch /sys/fs/cgroup/brief
in_cgroup() { # CGROUP COMMAND..., in the background: its process becomes the command
	local group=$1
	shift
	echo 0 >"/sys/fs/cgroup/$group/cgroup.procs" && exec "$@"
}
in_cgroup batch "$TOOLS/busy" 160 "$work/batch" 50 &
batch_pid=$!
ready() { [ -s "$work/$1" ] && [ "$(od -An -tu8 -N8 "$work/$1" | tr -d ' ')" -gt 0 ]; }
wait_until 120 ready batch || fail_check "the workload does not start"
in_cgroup svc "$TOOLS/busy" 120 "$work/svc" 20 &
svc_pid=$!
wait_until 120 ready svc || fail_check "the workload does not start"

of_scope() { tierctl status --cgroup "$1" --json | get "$2"; }
epochs_of() { of_scope "$1" /scopes/0/counters/epochs_total; }
reached() { [ "$(epochs_of "$1")" -ge "$2" ]; }
fast_pages() { labctl place "$1" --json | get /fast_pages; }
hit_ratio() { # of svc, over 4 s
	labctl truth --reset >/dev/null
	sleep 4
	labctl truth --pid $svc_pid --json | get /fast_hit_ratio
}
check "load, root" tierctl load hyperplace --set admit_sigmas=6
check "load, with a rate" tierctl load "$GUARDS/steady.bpf.o" --cgroup /svc --rate 100MB/s
check "budget of the same" tierctl cgroup set /svc --fast-max 64M --fast-min 16M
check "budget without a policy" tierctl cgroup set /batch --fast-max 96M
check "load, of a cgroup that will be gone" tierctl load "$GUARDS/steady.bpf.o" --cgroup /brief
check "the scope settles" wait_until 90 reached /svc 120

# What is seated, as status says it: one line a scope.
seats() {
	local path
	for path in / /svc /batch; do
		tierctl status --cgroup $path --json >"$work/seat"
		echo "$path $(for field in seat policy state fast_max_bytes fast_min_bytes rate_bytes_per_s dry_run settings; do
			get /scopes/0/$field <"$work/seat" | tr '\n' ' '
		done)"
	done
}

# HOW, a command that ends tierd
restarts() {
	local how=$1
	note "$how"
	local seats_before hits_before svc batch
	seats_before=$(seats)
	hits_before=$(hit_ratio)
	"$2"
	svc=$(fast_pages $svc_pid) batch=$(fast_pages $batch_pid)
	sleep 2
	check_equal "$how: while tierd is away nothing moves, svc" "$svc" "$(fast_pages $svc_pid)"
	check_equal "$how: nor of batch" "$batch" "$(fast_pages $batch_pid)"
	[ "$how" = "clean stop" ] && rmdir /sys/fs/cgroup/brief
	start_tierd
	check_equal "$how: the same seats, budgets, rates and settings" "$seats_before" "$(seats)"
	check "$how: epochs" wait_until 60 reached /svc 1
	check "$how: epochs of the root" wait_until 60 reached / 1
	for path in / /svc; do
		check_equal "$how: $path: no epoch without an answer" 0 "$(of_scope $path /scopes/0/counters/policy_failures_total)"
		check_equal "$how: $path: nobody was ejected" null "$(of_scope $path /scopes/0/last_exit)"
	done
	wait_until 60 reached /svc 20
	local hits demoted=0 promoted=0 path
	for path in /svc /batch; do
		demoted=$((demoted + $(of_scope $path /scopes/0/counters/demoted_pages_total)))
		promoted=$((promoted + $(of_scope $path /scopes/0/counters/promoted_pages_total)))
	done
	hits=$(hit_ratio)
	echo "$how: fast pages before and after: svc $svc and $(fast_pages $svc_pid), batch $batch and $(fast_pages $batch_pid);" \
		"in the first 20 epochs $promoted pages promoted, $demoted demoted; hit ratio of svc $hits_before before, $hits after"
	check "$how: no page moves back: what is in fast memory stays, but for a twentieth" \
		[ $((20 * $(fast_pages $svc_pid))) -ge $((19 * svc)) -a $((20 * $(fast_pages $batch_pid))) -ge $((19 * batch)) ]
	check "$how: the hit ratio stays" awk "BEGIN { exit !($hits >= $hits_before - 0.02) }"
}
restarts "clean stop" stop_tierd
check_equal "the cgroup that is gone: reported" reseat_failed "$(of_scope /brief /scopes/0/state)"
check "with the reason" grep -q 'brief' <(of_scope /brief /scopes/0/error/message)
restarts "kill -9" kill_tierd

note "without the module"
stop_tierd
check "the module unloads" wait_until 20 module_unloads
start_tierd
for path in / /svc; do
	check_equal "$path: reported" reseat_failed "$(of_scope $path /scopes/0/state)"
done
stop_tierd
insmod "$MODULE"
start_tierd
check_equal "it was kept" steady "$(of_scope /svc /scopes/0/policy)"

for path in /svc /; do check "unload $path" tierctl unload --cgroup $path; done
kill $svc_pid $batch_pid
wait $svc_pid
check_equal "the workload's memory is right, svc" 143 $?
wait $batch_pid
check_equal "the workload's memory is right, batch" 143 $?
stop_tierd
check "the module unloads" wait_until 20 module_unloads
finish
