#!/bin/bash
# SPDX-License-Identifier: GPL-2.0-or-later
# An idle guest with a policy seated: no page is moved, no TLB is flushed by us,
# and tierd hardly runs.
# usage: idle.sh BUILD   (in the lab, --no-tierd --icount)
. "$(dirname "$0")/../tierd/lib.sh"
insmod "$MODULE"
start_tierd --fresh
check "load" tierctl load hyperplace
# What the loading touched is placed first.
wait_until 60 at_least_epoch 40 || fail_check "no epochs"

# Nanoseconds on a CPU, user and kernel, of all threads of tierd.
ran_ns() { cat /proc/$tierd_pid/task/*/schedstat | awk '{ sum += $1 } END { printf "%.0f\n", sum }'; }
now_ns() { awk '{ printf "%.0f\n", $1 * 1e9 }' /proc/uptime; }
before_ns=$(ran_ns) start_ns=$(now_ns)
epochs=$(counter epochs_total) flushes=$(counter flush_calls_total)
promoted=$(counter promoted_pages_total) demoted=$(counter demoted_pages_total)
# What tierctl itself costs tierd is the price of asking, not of idling.
idle_from=$(ran_ns) idle_start=$(now_ns)
sleep 20
idle_ns=$(($(ran_ns) - idle_from)) idle_span=$(($(now_ns) - idle_start))
check_equal "pages promoted" "$promoted" "$(counter promoted_pages_total)"
check_equal "pages demoted" "$demoted" "$(counter demoted_pages_total)"
check_equal "TLB flushes asked for" "$flushes" "$(counter flush_calls_total)"
epochs=$(($(counter epochs_total) - epochs))
check_at_least "epochs meanwhile" 30 $epochs
# icount: 2 ns of guest time an instruction; a CPU of the project's measure does 2e9 a second.
instructions=$((idle_ns / 2))
per_second=$((instructions * 1000 / (idle_span / 1000000)))
echo "idle: $epochs epochs, $instructions instructions of tierd in $((idle_span / 1000000)) ms: $((instructions / epochs)) an epoch," \
	"$(awk "BEGIN { printf \"%.4f %% of a CPU of 2e9 instructions/s; %.4f %% of the lab's CPU time\", $per_second / 2e7, $idle_ns * 100 / $idle_span }")"
check "below 0.1 % of a CPU of 2e9 instructions/s ($per_second a second)" [ "$per_second" -lt 2000000 ]
check "unload" tierctl unload
stop_tierd
check "the module unloads" wait_until 20 module_unloads
finish
