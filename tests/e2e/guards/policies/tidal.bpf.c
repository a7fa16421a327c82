// SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause
// A good one that moves pages in every epoch: one piece of 2 MiB in 32 is hot, the
// next lower one in the next epoch.
#include <hypertier/policy.bpf.h>

SEC("struct_ops/tidal_classify")
void BPF_PROG(tidal_classify, struct tier_range *range, struct tier_scope *scope)
{
	__u64 piece = range->start >> HT_GRANULE_SHIFT;

	range->heat = (piece + scope->epoch) % 32 ? 0 : 1000;
	range->action = range->flags & TIER_RANGE_MIN ? TIER_KEEP : TIER_SPLIT;
}

HYPERTIER_POLICY(tidal, .classify = (void *)tidal_classify, .epoch_ms = 100);
