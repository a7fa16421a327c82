// SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause
/*
 * static: everything stays where it is.
 *
 * It classifies every range (as heat 0) and asks for no moves, so what it costs
 * is what sampling, folding and calling a policy cost: the baseline for every
 * other policy. Works badly wherever placement matters.
 */
#include <hypertier/policy.bpf.h>

SEC("struct_ops/static_classify")
void BPF_PROG(static_classify, struct tier_range *range, struct tier_scope *scope)
{
	range->heat = 0;
	range->action = TIER_KEEP;
}

HYPERTIER_POLICY(static,
	.classify = (void *)static_classify,
	.flags = HT_POLICY_NO_MOVES);
