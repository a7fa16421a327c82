// SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause
// Bad policy 1 of 6: seconds of nested bpf_loop in one callback.
#include <hypertier/policy.bpf.h>

SETTING(__u32, rounds, 14);

static long nothing(__u32 i, void *context)
{
	return 0;
}

static long inner(__u32 i, void *context)
{
	bpf_loop(1 << 20, nothing, 0, 0);
	return 0;
}

/* In the third epoch, so that there is something to see before. */
SEC("struct_ops/stuck_epoch_begin")
void BPF_PROG(stuck_epoch_begin, struct tier_scope *scope)
{
	if (scope->epoch % 8 == 3)
		bpf_loop(rounds, inner, 0, 0);
}

SEC("struct_ops/stuck_classify")
void BPF_PROG(stuck_classify, struct tier_range *range, struct tier_scope *scope)
{
	range->heat = range->count[0];
}

HYPERTIER_POLICY(stuck, .epoch_begin = (void *)stuck_epoch_begin, .classify = (void *)stuck_classify, .epoch_ms = 100);
