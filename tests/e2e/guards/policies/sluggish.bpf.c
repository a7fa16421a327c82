// SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause
// Bad policy 2 of 6: no callback is slow, but all of an epoch's together are.
#include <hypertier/policy.bpf.h>

static long nothing(__u32 i, void *context)
{
	return 0;
}

SEC("struct_ops/sluggish_classify")
void BPF_PROG(sluggish_classify, struct tier_range *range, struct tier_scope *scope)
{
	bpf_loop(1 << 16, nothing, 0, 0);
	range->heat = range->count[0];
	range->action = TIER_SPLIT;
}

HYPERTIER_POLICY(sluggish, .classify = (void *)sluggish_classify, .epoch_ms = 50);
