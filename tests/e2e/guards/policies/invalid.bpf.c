// SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause
// Bad policy 3 of 6: an action that does not exist.
#include <hypertier/policy.bpf.h>

SEC("struct_ops/invalid_classify")
void BPF_PROG(invalid_classify, struct tier_range *range, struct tier_scope *scope)
{
	range->heat = range->count[0];
	if (scope->epoch % 4 == 3)
		range->action = 77;
}

HYPERTIER_POLICY(invalid, .classify = (void *)invalid_classify, .epoch_ms = 100);
