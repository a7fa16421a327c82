#!/bin/bash
# SPDX-License-Identifier: GPL-2.0-or-later
# Hot swaps under load: every one succeeds, no epoch is without a policy, no
# sample is lost.
# usage: swap.sh BUILD SWAPS   (in the lab, --no-tierd)
. "$(dirname "$0")/lib.sh"
swaps=$2
objects_before=$(bpf_objects)

insmod "$MODULE"
start_tierd --fresh
check "load" tierctl load hyperplace
start_busy 128 20
wait_until 30 at_least_epoch 2 || fail_check "no epoch ended"
# The default policy is loaded beside the first one when its first epoch has ended.
objects_seated=$(bpf_objects)
epochs_before=$(counter epochs_total)
samples_before=$(status /sampler_samples_total)

failed=0
for ((i = 0; i < swaps; i++)); do
	policy=static
	[ $((i % 2)) = 1 ] && policy=hyperplace
	tierctl load $policy >/dev/null || failed=$((failed + 1))
done
check_equal "swaps that failed" 0 $failed
check_equal "generation" $((swaps + 1)) "$(status /scopes/0/generation)"
check_equal "epochs without a policy" 0 "$(counter empty_epochs_total)"
check_equal "epochs whose policy failed" 0 "$(counter policy_failures_total)"
check_equal "epochs that failed" 0 "$(counter epoch_errors_total)"
check_few_dropped $samples_before # and leaves the status
check_equal "samples that reached the engine" $(($(get /sampler_samples_total <"$work/status") - $(get /dropped+ <"$work/status"))) "$(get /scopes/0/counters/samples_total <"$work/status")"
check_equal "samples lost before the sampler" 0 "$(labctl vpebs --json | get /lost_total)"
epochs=$(($(counter epochs_total) - epochs_before))
samples=$(($(status /sampler_samples_total) - samples_before))
check_at_least "epochs that ended meanwhile: swaps do not put them off" $((swaps / 3)) $epochs
check_at_least "samples taken meanwhile" 1000 $samples
echo "$swaps swaps, $epochs epochs, $samples samples"

# What the swaps replaced is freed: the seat holds as much as at first.
settled() { [ "$(bpf_objects)" -le $((objects_seated + 2)) ]; }
check "old policies are freed (now $(bpf_objects) objects, $objects_seated at first)" wait_until 20 settled

note "an estimate that is new gets more samples for 8 s, another policy on it does not"
period=$(status /sampling/period)
period_is() { [ "$(status /sampling/period)" = "$1" ]; }
check "load heattree" tierctl load heattree
check_equal "a quarter of the misses a sample" $((period / 4)) "$(status /sampling/period)"
check "it ends" wait_until 30 period_is $period
check "load heattree again" tierctl load heattree --set margin_percent=140
check_equal "misses a sample" $period "$(status /sampling/period)"
check "load hyperplace" tierctl load hyperplace

note "a policy that fails leaves the old one running"
before=$(status /scopes/0/policy)/$(status /scopes/0/generation)
check_refused "verifier" 1 'the verifier rejects policy rejected' tierctl load "$POLICIES/rejected.bpf.o"
check_refused "init" 1 'refuses its seat' tierctl load "$POLICIES/refuses.bpf.o"
check_equal "policy/generation" "$before" "$(status /scopes/0/policy)/$(status /scopes/0/generation)"
epochs=$(counter epochs_total)
check "it runs on" wait_until 20 at_least_epoch $((epochs + 2))
check_equal "epochs without a policy" 0 "$(counter empty_epochs_total)"
check "the workload runs on" busy_goes_on
stop_busy
check "unload" tierctl unload
check "no trace" wait_until 20 no_trace
stop_tierd
check "the module unloads" wait_until 20 module_unloads
finish
