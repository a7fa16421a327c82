#!/bin/bash
# SPDX-License-Identifier: GPL-2.0-or-later
# Bad input: one clear sentence, a hint, the exit code, and nothing changed.
# usage: bad_input.sh BUILD   (in the lab, --no-tierd)
. "$(dirname "$0")/lib.sh"
objects_before=$(bpf_objects)
echo 1 >$NUMA

note "without tierd"
check_refused "tierd is not running" 1 'tierd is not running' tierctl status
check_refused "load without tierd" 1 'tierd is not running' tierctl load static
check_refused "no command" 2 'subcommand is required' tierctl
check_refused "unknown command" 2 'not expected|subcommand' tierctl fly
check_refused "unknown option" 2 'not expected' tierctl load static --fast
check_refused "unknown option of tierd" 2 'not expected' tierd --slowly
check_refused "tierd without root" 1 'tierd needs root' setpriv --reuid 65534 --clear-groups tierd
check_equal "load without tierd leaves no trace" "$objects_before" "$(bpf_objects)"

note "without the module"
start_tierd --fresh
check_refused "second tierd" 1 "already running \(pid $tierd_pid\)" tierd
check_refused "load without the module" 1 'hypertier.ko is not loaded|/dev/hypertier' tierctl load static
check_refused "check without the module" 1 'hypertier.ko is not loaded' tierctl policy check static
check_equal "state" idle "$(status /scopes/0/state)"
stop_tierd

insmod "$MODULE"
start_tierd --fresh --fast-nodes 0-1
check_refused "no second node" 1 'node' tierctl load static
check_equal "no second node: state" idle "$(status /scopes/0/state)"
stop_tierd
start_tierd --fresh --source pebs
check_refused "no PMU of the kind that was asked for" 1 'pebs' tierctl load static
check "no PMU of that kind: nothing is left" no_trace
stop_tierd

what_is_seated() { tierctl status --json >"$work/status"; echo "$(get /scopes/0/policy <"$work/status")/$(get /scopes/0/generation <"$work/status")"; }

# Refused whatever the seat is.
bad_requests() {
	echo "this is no policy" >"$work/text"
	head -c 700 "$BUILD/policies/static.bpf.o" >"$work/truncated.bpf.o"
	check_refused "text file" 1 'is no policy: it is not an ELF' tierctl load "$work/text"
	check_refused "program file" 1 'not a BPF object' tierctl load /bin/ls
	check_refused "truncated object" 1 'is no policy' tierctl load "$work/truncated.bpf.o"
	check_refused "directory" 1 'not a regular file' tierctl load /tmp
	check_refused "BPF object that is no policy" 1 'no object of type hypertier_policy' tierctl load "$BUILD/bpf/guest.bpf.o"
	check_refused "program beside the policy" 1 'is not a callback' tierctl load "$POLICIES/intruder.bpf.o"
	check_refused "unknown name" 1 'no installed policy and no file called nonesuch' tierctl load nonesuch
	check_refused "unknown file" 1 'there is no policy file /nonesuch' tierctl load /nonesuch
	local settings=$POLICIES/settings.bpf.o
	check_refused "unknown setting" 1 'policy settings has no setting big' tierctl load "$settings" --set big=1
	check "unknown setting: the hint lists the known ones" grep -q 'HINT: its settings are small, signed_one, large, flag' "$work/err"
	check_refused "not a number" 1 'cannot be "many": it is a u8' tierctl load "$settings" --set small=many
	check_refused "too large" 1 'cannot be 256: it is outside of 0..255' tierctl load "$settings" --set small=256
	check_refused "negative" 1 'cannot be -1: it is outside of 0..255' tierctl load "$settings" --set small=-1
	check_refused "not a truth value" 1 'cannot be "maybe": it is a bool' tierctl load "$settings" --set flag=maybe
	check_refused "no value" 2 'is not a setting' tierctl load "$settings" --set small
	check_refused "cgroup" 1 'there is no cgroup /web' tierctl load static --cgroup /web
	check_refused "not root" 1 'only root may talk to tierd' setpriv --reuid 65534 --clear-groups tierctl status
	check_refused "not root: load" 1 'only root may talk to tierd' setpriv --reuid 65534 --clear-groups tierctl load static
	check "oversize message" grep -q 'larger than 1 MiB' <("$TOOLS/send_raw" $SOCKET 1048577 x)
	check "not JSON" grep -q 'not a JSON object' <("$TOOLS/send_raw" $SOCKET 5 hello)
	check "other protocol" grep -q 'protocol 0' <("$TOOLS/send_raw" $SOCKET 20 '{"command":"status"}')
	check "load without a file" grep -q 'without a file' <("$TOOLS/send_raw" $SOCKET 31 '{"protocol":1,"command":"load"}')
	check "wrong type" grep -q 'malformed' <("$TOOLS/send_raw" $SOCKET 28 '{"protocol":1,"command":[1]}')
}

# Refused by the seat or on the way to it.
bad_policies() {
	local before
	before=$(what_is_seated)
	check_refused "verifier" 1 'the verifier rejects policy rejected in rejected_classify: ' tierctl load "$POLICIES/rejected.bpf.o"
	check_refused "ABI" 1 'built for policy ABI 2.0, but this HyperTier speaks 1' tierctl load "$POLICIES/newer_abi.bpf.o"
	check_refused "init says no" 1 'policy refuses refuses its seat: Cannot allocate memory' tierctl load "$POLICIES/refuses.bpf.o"
	check_equal "nothing changed" "$before" "$(what_is_seated)"
}

start_tierd --fresh
check_equal "socket mode" 600 "$(stat -c %a $SOCKET)"
note "with an empty seat"
bad_requests
bad_policies
check_equal "state" idle "$(status /scopes/0/state)"
check "nothing is left in the kernel" no_trace
check_equal "numa_balancing as before" 1 "$(cat $NUMA)"

note "with a seated policy"
check "load static" tierctl load static
wait_until 20 at_least_epoch 1 || fail_check "no epoch ended"
bad_policies
check_equal "state" running "$(status /scopes/0/state)"
check_equal "numa_balancing is off" 0 "$(cat $NUMA)"

note "settings arrive"
check "load with settings" tierctl load "$POLICIES/settings.bpf.o" --set small=0x10 --set signed_one=-2147483648 --set large=1G --set flag=off
check_equal "small" 16 "$(status /scopes/0/settings/small)"
check_equal "signed_one" -2147483648 "$(status /scopes/0/settings/signed_one)"
check_equal "large" 1073741824 "$(status /scopes/0/settings/large)"
check_equal "flag" false "$(status /scopes/0/settings/flag)"

note "policies that break a rule are ejected, the default takes over"
for policy in wrong_action:invalid_action slow:timeout; do
	check "load ${policy%:*}" tierctl load "$POLICIES/${policy%:*}.bpf.o"
	ejected() { [ "$(status /scopes/0/last_exit/kind)" = ejected ] && [ "$(status /scopes/0/last_exit/policy)" = "${policy%:*}" ]; }
	check "${policy%:*} is ejected" wait_until 60 ejected
	check_equal "code" "${policy#*:}" "$(status /scopes/0/last_exit/code)"
	check_equal "the default took over" $DEFAULT "$(status /scopes/0/policy)"
	check_equal "no epoch was without a policy" 0 "$(counter empty_epochs_total)"
	echo "ok: $(status /scopes/0/last_exit/reason) ($(status /scopes/0/last_exit/message))"
done

note "commands"
check "status" tierctl status
check "ranges" tierctl ranges
check "events" tierctl events
check "policy list" tierctl policy list
check "policy show" tierctl policy show hyperplace
check "policy check" tierctl policy check hyperplace
check "version" tierctl version
check "doctor" tierctl doctor
for command in status ranges events "policy list" "policy show static" "policy check static" version doctor; do
	check_equal "schema of $command" 1 "$(tierctl $command --json 2>/dev/null | get /schema)"
done

note "unload"
check "unload" tierctl unload
check "unloading leaves no trace" wait_until 20 no_trace
check_equal "numa_balancing as before" 1 "$(cat $NUMA)"
check_equal "state" idle "$(status /scopes/0/state)"
check "unload again" tierctl unload

note "without a PMU"
rmmod vpebs
check "accessed bits take the place of a PMU" tierctl load static
check_equal "source without a PMU" abit "$(status /source)"
check "unload without a PMU" tierctl unload
check "no PMU: nothing is left" wait_until 20 no_trace
tierctl doctor >"$work/out"
check_equal "exit code of doctor without a PMU" 0 $?
check "doctor says what works" grep -q "^ok .*source abit " "$work/out"
insmod "$BUILD/tests/lab/kmod/vpebs.ko"
check "the module unloads under an idle tierd" wait_until 20 module_unloads
stop_tierd
finish
