#!/bin/bash
# SPDX-License-Identifier: GPL-2.0-or-later
# What an epoch costs tierd, in instructions: with 1,000 processes of 20 mappings,
# and with one process of 2,048 mappings over 1 TiB of address space; and how it
# grows.
# usage: cost.sh BUILD   (in the lab, --no-tierd --icount --cpus 1: on one CPU, a
# thread's time is its instructions)
. "$(dirname "$0")/../tierd/lib.sh"
MANY=$BUILD/tests/e2e/guards/many
BOUND=20000000
insmod "$MODULE"
# Few samples: tierd's own cache misses would be sampled too, at the lab's density,
# and what the sampler costs is not what an epoch costs (it has a budget of its own).
start_tierd --fresh --period 5000
check "load" tierctl load hyperplace
wait_until 60 at_least_epoch 4 || fail_check "no epochs"
epoch_ms=$(status /epoch_ms)
own_ranges=$(status /scopes/0/ranges)

# Nanoseconds on a CPU, user and kernel, of all threads of tierd.
ran_ns() { cat /proc/$tierd_pid/task/*/schedstat | awk '{ sum += $1 } END { printf "%.0f\n", sum }'; }
now_ms() { awk '{ printf "%d\n", $1 * 1000 }' /proc/uptime; }
EPOCHS=16

# WHAT PROCESSES MAPPINGS STRIDE PAUSE_MS: sets per_epoch. Each process has four ranges
# besides: its stack, its heap, and what its libraries write to.
measure() {
	local what=$1 processes=$2 mappings=$3 wanted
	rm -f "$work/ready"
	"$MANY" "$processes" "$mappings" "$4" "$work/ready" "$5" &
	local many=$!
	ready() { [ -e "$work/ready" ]; }
	wait_until 300 ready || { fail_check "$what: the processes do not start"; return; }
	wanted=$((processes * (processes > 1 ? 20 : mappings)))
	known() { [ "$(status /scopes/0/ranges)" -ge $wanted ] && [ "$(status /scopes/0/processes)" -ge "$processes" ]; }
	check "$what: all of them are known" wait_until 60 known
	# Past the first walks: what is measured is every other epoch, not the first.
	sleep $((12 * epoch_ms / 1000))
	local ran start ms policy epochs
	policy=$(counter policy_ns_total) epochs=$(counter epochs_total)
	# What tierctl costs tierd is the price of asking.
	ran=$(ran_ns) start=$(now_ms)
	sleep $((EPOCHS * epoch_ms / 1000))
	ran=$(($(ran_ns) - ran)) ms=$(($(now_ms) - start))
	epochs=$(($(counter epochs_total) - epochs))
	policy=$((($(counter policy_ns_total) - policy) / epochs / 2))
	# icount: 2 ns of guest time an instruction.
	per_epoch=$((ran / 2 * epoch_ms / ms))
	local json
	json=$(tierctl status --json)
	echo "cost: $what: $(get /scopes/0/processes <<<"$json") processes, $(get /scopes/0/ranges <<<"$json") ranges:" \
		"$per_epoch instructions an epoch, of them $policy in the policy;" \
		"$(get /scopes/0/last_epoch/samples <<<"$json") samples and $(get /scopes/0/last_epoch/granules <<<"$json") granules in the last one"
	kill $many
	wait $many 2>/dev/null
	forgotten() { [ "$(status /scopes/0/ranges)" -lt $((own_ranges + 100)) ]; }
	check "$what: they are forgotten when they are gone" wait_until 60 forgotten
}

# Twice the ranges cost at most what n log n allows: ln 2n / ln n is below 1.12 here;
# the rest is what the measurement may be off.
grows() { # WHAT INSTRUCTIONS... of 4n, 2n, n
	check "$1: $4, $3, $2 instructions grow no worse than n log n" \
		awk "BEGIN { exit !($3 <= 2 * 1.15 * $4 && $2 <= 2 * 1.15 * $3) }"
}
bounded() { check "$1: $2 instructions an epoch, at most $BOUND" [ "$2" -le $BOUND ]; }

cost=()
for processes in 1000 500 250; do
	measure "processes asleep" $processes 16 65536 0
	cost+=("$per_epoch")
done
bounded "1,000 processes asleep" "${cost[0]}"
grows "processes asleep" "${cost[@]}"
cost=()
for mappings in 2048 1024 512; do
	measure "mappings over 1 TiB" 1 $mappings $(((1 << 40) / mappings)) 0
	cost+=("$per_epoch")
done
bounded "2,048 mappings" "${cost[0]}"
grows "mappings" "${cost[@]}"

# With samples, walks and splits: each touches all it has every 2 s.
measure "processes awake every 2 s" 1000 16 65536 2000
bounded "1,000 processes awake" "$per_epoch"
measure "mappings over 1 TiB, touched every 2 s" 1 2048 $((1 << 29)) 2000
bounded "2,048 mappings touched" "$per_epoch"
check_equal "epochs that failed" 0 "$(counter epoch_errors_total)"
check "unload" tierctl unload
stop_tierd
check "the module unloads" wait_until 20 module_unloads
finish
