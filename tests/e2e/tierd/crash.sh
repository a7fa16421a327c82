#!/bin/bash
# SPDX-License-Identifier: GPL-2.0-or-later
# kill -9 of tierd at any moment: the machine is as it was, the workload runs
# on, the next tierd seats what was seated.
# usage: crash.sh BUILD KILLS   (in the lab, --no-tierd)
. "$(dirname "$0")/lib.sh"
kills=$2
RANDOM=${3:-1}
objects_before=$(bpf_objects)
start_busy 64 200

numa_is() { [ "$(cat $NUMA)" = "$1" ]; }
only_pins() { # nothing but pinned maps of ours is left in the kernel
	[ "$(bpftool link list | grep -c '^[0-9]')" = "$links_before" ] &&
		[ "$(bpftool prog list | grep -c '^[0-9]')" = "$programs_before" ]
}
links_before=$(bpftool link list | grep -c '^[0-9]')
programs_before=$(bpftool prog list | grep -c '^[0-9]')

compaction=$(cat $COMPACTION)
boost=$(cat $BOOST)

insmod "$MODULE"
seated=0
for ((i = 0; i < kills; i++)); do
	# Both a value that the kernel uses by default and one for tiering.
	balancing=$((1 + i % 2))
	echo $balancing >$NUMA
	fresh=
	[ $i = 0 ] && fresh=--fresh
	start_tierd $fresh
	if [ $seated = 1 ]; then
		check_equal "kill $i: what was seated is seated again" running "$(status /scopes/0/state)"
	fi
	case $((i % 3)) in
	0) # while an epoch may run
		check "kill $i: load" tierctl load hyperplace
		seated=1
		sleep "0.$((RANDOM % 10))"
		check_equal "kill $i: numa_balancing is off" 0 "$(cat $NUMA)"
		check_equal "kill $i: compaction ahead of demand is off" 0 "$(cat $COMPACTION)"
		check_equal "kill $i: watermarks are not boosted" 0 "$(cat $BOOST)"
		;;
	1) # while policies are swapped
		(while tierctl load static && tierctl load hyperplace; do :; done) >/dev/null 2>&1 &
		swapper=$!
		sleep "1.$((RANDOM % 10))"
		;;
	2) # while it is unloaded and loaded
		(while tierctl unload && tierctl load hyperplace; do :; done) >/dev/null 2>&1 &
		swapper=$!
		seated=0
		sleep "1.$((RANDOM % 10))"
		;;
	esac
	kill_tierd
	[ $((i % 3)) = 0 ] || wait $swapper
	check "kill $i: numa_balancing is $balancing again" wait_until 20 numa_is $balancing
	check "kill $i: compaction ahead of demand is on again" wait_until 20 grep -qx "$compaction" $COMPACTION
	check "kill $i: watermarks are boosted again" wait_until 20 grep -qx "$boost" $BOOST
	check "kill $i: programs and links are gone" wait_until 20 only_pins
	check "kill $i: the workload runs on" busy_goes_on
	if [ $((i % 2)) = 0 ]; then
		check "kill $i: unload --force" tierctl unload --force
		check "kill $i: no trace" wait_until 20 no_trace
		check "kill $i: the module unloads" wait_until 30 module_unloads
		insmod "$MODULE"
	fi
	echo "ok: kill $i at stage $((i % 3))"
done

note "after a clean stop, too"
start_tierd
check "load with a setting" tierctl load "$POLICIES/settings.bpf.o" --set small=9
rm -f "$work/settings.bpf.o"
stop_tierd
check "a clean stop leaves no trace" wait_until 20 no_trace
start_tierd
check_equal "policy" settings "$(status /scopes/0/policy)"
check_equal "its setting" 9 "$(status /scopes/0/settings/small)"
stop_tierd

note "a seat that cannot be taken is reported"
check "the module unloads" wait_until 20 module_unloads
start_tierd
check_equal "state" reseat_failed "$(status /scopes/0/state)"
check "status says why" grep -q 'could not be seated: .*hypertier' <(tierctl status)
stop_tierd
insmod "$MODULE"
start_tierd
check_equal "the saved seat is still there" settings "$(status /scopes/0/policy)"
stop_tierd
start_tierd --fresh
check_equal "--fresh starts idle" idle "$(status /scopes/0/state)"
check "restore" tierctl restore
check_equal "restore seats the default" $DEFAULT "$(status /scopes/0/policy)"
check "unload" tierctl unload
stop_tierd
start_tierd
check_equal "what was unloaded stays unloaded" idle "$(status /scopes/0/state)"
stop_tierd
stop_busy
check "the module unloads" wait_until 20 module_unloads
finish
