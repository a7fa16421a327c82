// SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause
// A good one, with short epochs: the neighbour of the bad ones.
#include <hypertier/policy.bpf.h>

SEC("struct_ops/steady_classify")
void BPF_PROG(steady_classify, struct tier_range *range, struct tier_scope *scope)
{
	range->heat = range->count[1];
	range->action = range->uneven >= 64 ? TIER_SPLIT : TIER_KEEP;
}

HYPERTIER_POLICY(steady, .classify = (void *)steady_classify, .epoch_ms = 100);
