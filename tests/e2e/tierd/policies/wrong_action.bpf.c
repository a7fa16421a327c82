// SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause
// Answers with an action that does not exist: ejected.
#include <hypertier/policy.bpf.h>

SEC("struct_ops/wrong_action_classify")
void BPF_PROG(wrong_action_classify, struct tier_range *range, struct tier_scope *scope)
{
	range->action = TIER_ACTIONS + 4;
}

HYPERTIER_POLICY(wrong_action, .classify = (void *)wrong_action_classify, .epoch_ms = 100);
