// SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause
// A good one, with short epochs: the neighbour of the bad ones.
#include <hypertier/policy.bpf.h>

SEC("struct_ops/steady_classify")
void BPF_PROG(steady_classify, struct tier_range *range, struct tier_scope *scope)
{
	range->heat = range->count[1];
	range->action = range->uneven >= 64 ? TIER_SPLIT : TIER_KEEP;
}

/* Chance alone moves nothing to and fro. */
SEC("struct_ops/steady_admit")
bool BPF_PROG(steady_admit, struct tier_range *hot, struct tier_range *cold, struct tier_scope *scope)
{
	return hot->heat > 2 * cold->heat;
}

HYPERTIER_POLICY(steady, .classify = (void *)steady_classify, .admit = (void *)steady_admit, .epoch_ms = 100);
