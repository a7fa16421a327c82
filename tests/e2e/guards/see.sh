#!/bin/bash
# SPDX-License-Identifier: GPL-2.0-or-later
# Rate, dry run, events, explain, policy list and show, pinned maps: each by its
# message and its JSON.
# usage: see.sh BUILD   (in the lab, --no-tierd)
. "$(dirname "$0")/../tierd/lib.sh"
GUARDS=$BUILD/tests/e2e/guards/policies
insmod "$MODULE"
start_tierd --fresh --granules 1024

note "refused"
check_refused "no policy to explain by" 1 'no policy is seated' tierctl explain --pid 1 --addr 1000
check_refused "no address" 2 'no hexadecimal address' tierctl explain --pid 1 --addr pear
check_refused "bad rate" 1 '--rate cannot be "fast"' tierctl load hyperplace --rate fast
check_refused "bad rate for a cgroup" 1 '--rate cannot be "40%"' tierctl cgroup set / --rate 40%
check_refused "nothing is seated" 1 'no policy is seated in /' tierctl policy show
check_equal "what was refused seats nothing" idle "$(status /scopes/0/state)"

# 300 MiB on a machine with 192 MiB of fast memory: a fifth is hot. Mostly asleep:
# the guest's time costs the host's only while it works.
start_busy 300 20
one_of_busy() { # an address of its memory: the largest range
	tierctl ranges --pid "$busy_pid" --json |
		awk '$1 == "\"end\":" { end = $2 + 0 } $1 == "\"start\":" { start = $2 + 0 }
			start && end { if (end - start > size) { size = end - start; at = start } start = end = 0 }
			END { printf "%.0f\n", at }' | xargs printf '%x\n'
}

note "dry run: decides and shows, moves nothing"
check "load --dry-run" tierctl load "$GUARDS/steady.bpf.o" --dry-run
wait_until 60 at_least_epoch 30 || fail_check "no epochs"
check_equal "status says it" true "$(status /scopes/0/dry_run)"
check_equal "promoted" 0 "$(counter promoted_pages_total)"
check_equal "demoted" 0 "$(counter demoted_pages_total)"
check_at_least "pages that would have been promoted" 1000 "$(counter dry_run_pages_total)"
check "status in words" grep -q 'none, a dry run: .* would have been promoted' <(tierctl status)
check "events in words" grep -q 'planned .*dry run: [0-9]* pages would be promoted' <(tierctl events)

note "rate: half a MiB a second"
check "load --rate" tierctl load "$GUARDS/steady.bpf.o" --rate 512K/s
check_equal "status says it" 524288 "$(status /scopes/0/rate_bytes_per_s)"
before=$(($(counter promoted_pages_total) + $(counter demoted_pages_total)))
epochs=$(counter epochs_total) started=$(awk '{ printf "%d", $1 * 1000 }' /proc/uptime)
wait_until 60 at_least_epoch $((epochs + 60))
moved=$(($(counter promoted_pages_total) + $(counter demoted_pages_total) - before))
ms=$(($(awk '{ printf "%d", $1 * 1000 }' /proc/uptime) - started))
echo "rate: $moved pages in $ms ms, $((moved * 4096 * 1000 / ms / 1024)) KiB/s of 512"
check "the rate holds, but for the one pair of huge pages that fits the bucket" [ $((moved * 4096)) -le $((524288 * ms / 1000 + (4 << 20))) ]
check_at_least "pages moved" 100 $moved
check_at_least "pages held back" 1000 "$(counter rate_limited_pages_total)"
check "events say so" grep -q 'the rate limit held back' <(tierctl events)
check "cgroup set --rate" tierctl cgroup set / --rate 0
check_equal "the cgroup's rate counts" 0 "$(status /scopes/0/rate_bytes_per_s)"
promoted_some() { [ "$(counter promoted_pages_total)" -ge 5000 ]; }
check "without a limit it is done soon" wait_until 60 promoted_some
check "cgroup reset" tierctl cgroup reset /
check_equal "the seat's rate counts again" 524288 "$(status /scopes/0/rate_bytes_per_s)"
check "restore: one command" tierctl restore
check_equal "the default" $DEFAULT "$(status /scopes/0/policy)"
check_equal "at the default's rate" $((200 << 20)) "$(status /scopes/0/rate_bytes_per_s)"

note "events"
tierctl events --json >"$work/events"
check_equal "schema" 1 "$(get /schema <"$work/events")"
check_at_least "records" 10 "$(get /events# <"$work/events")"
last=$(get /next <"$work/events")
tierctl events --json --follow --after "$last" >"$work/followed" &
follower=$!
check "load" tierctl load "$GUARDS/steady.bpf.o"
followed() { grep -q '"kind":"swapped"' "$work/followed"; }
check "a follower sees it" wait_until 30 followed
kill $follower
check "one object a line" [ "$(head -1 "$work/followed" | get /schema)" = 1 ]
check_equal "a number each, without a gap" $((last + 1)) "$(head -1 "$work/followed" | get /number)"
check "moves have their reason" grep -q '"why": "heat [0-9]* is above the cut at' "$work/events"
check "and their cause" grep -Eq '"why": "heat [0-9]* made room for heat' "$work/events"

note "explain"
epochs=$(counter epochs_total)
wait_until 60 at_least_epoch $((epochs + 5))
address=$(one_of_busy)
check "explain" tierctl explain --pid "$busy_pid" --addr "$address"
tierctl explain --pid "$busy_pid" --addr "0x$address" --json >"$work/explain"
check_equal "schema" 1 "$(get /schema <"$work/explain")"
check "tier" grep -Eq '"tier": "(fast|slow)"' "$work/explain"
check "reason" grep -Eq '"reason": "heat [0-9]+, rank [0-9]+ of [0-9]+ ranges, is (above|below) the cut' "$work/explain"
check_at_least "history" 3 "$(get /history# <"$work/explain")"
check_equal "the range holds it" "$(printf '%d' "0x$address")" "$(get /address <"$work/explain")"
check_refused "an address that is not mapped" 1 'no range of process' tierctl explain --pid "$busy_pid" --addr 10
check_refused "no such process" 1 'process 4194303 is not known' tierctl explain --pid 4194303 --addr 1000

note "policy list and show, what bpftool would show"
check "list" grep -q '^/  *steady ' <(tierctl policy list)
tierctl policy list --json >"$work/list"
check_equal "seat" steady "$(get /seats/0/policy <"$work/list")"
check_equal "generation" "$(status /scopes/0/generation)" "$(get /seats/0/generation <"$work/list")"
map=$(get /seats/0/struct_ops_map_id <"$work/list")
check "the struct_ops map is the kernel's" grep -q "^$map: struct_ops " <(bpftool map list)
program=$(get /seats/0/programs/0/id <"$work/list")
check "the program is the kernel's" grep -q "^$program: struct_ops " <(bpftool prog list)
check "show, seated" grep -q '^struct_ops map' <(tierctl policy show)
check_equal "show, seated, JSON" "$program" "$(tierctl policy show --cgroup / --json | get /programs/0/id)"
check "show, installed" grep -q '^callbacks .*classify, admit' <(tierctl policy show hyperplace)

note "pinned maps"
documented() { # all but what another source fills
	sed -n 's|^. `\(ht_[a-z_]*\)`.*|\1|p' "$(dirname "$0")/../../../docs/maps.md" | grep -v "$1" | sort
}
# A scope's map is named after its cgroup's id.
pinned() { ls $PINS/v1 | sed 's/_[0-9]*$/_id/' | sort; }
dump() { # NAME FIELD: it can be dumped, and its BTF names that field
	checks=$((checks + 1))
	bpftool map dump pinned $PINS/v1/$1 >"$work/dump" 2>"$work/err" || { fail_check "$1 cannot be dumped"; cat "$work/err"; }
	check "$1 has BTF" grep -q 'btf_id' <(bpftool map show pinned $PINS/v1/$1)
	[ -z "$2" ] || check "$1 shows $2" grep -q "\"$2\"" "$work/dump"
	echo "$1: $(wc -c <"$work/dump") bytes of text"
}
check_equal "docs/maps.md has each, and no other" "$(documented ht_checks)" "$(pinned)"
for map in ht_control:active ht_index:granule ht_granules:samples ht_changed: ht_hints:ht_hints ht_free: ht_drops:values \
	ht_spaces:tier_rss_pages ht_mappings:start ht_walks:list_tier ht_pages:page ht_pairs:hot_space ht_exchange:promoted_pages \
	ht_call_1:generation ht_events_lost:ht_space_events_lost; do
	dump ${map%:*} ${map#*:}
done

note "a policy with estimated ranges"
check "load" tierctl load heattree
epochs=$(counter epochs_total)
wait_until 60 at_least_epoch $((epochs + 5)) || fail_check "no epochs"
check_equal "it runs" heattree "$(status /scopes/0/policy)"
check "unload" tierctl unload
check_equal "no pins are left" no "$([ -e $PINS ] && echo yes || echo no)"
stop_tierd

note "pinned maps of the source abit"
start_tierd --fresh --source abit
check "load" tierctl load hyperplace
wait_until 60 at_least_epoch 3 || fail_check "no epochs"
check_equal "docs/maps.md has each, and no other" "$(documented nothing)" "$(pinned)"
dump ht_checks interval_ns
check "unload" tierctl unload
stop_busy
stop_tierd
check "the module unloads" wait_until 20 module_unloads
finish
