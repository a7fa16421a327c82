// SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause
// Bad policy 6 of 6: wants everything moved, and the other way round in the next
// epoch. Cuts its ranges to 2 MiB first, every second of which is hot in turn.
#include <hypertier/policy.bpf.h>

SEC("struct_ops/restless_classify")
void BPF_PROG(restless_classify, struct tier_range *range, struct tier_scope *scope)
{
	__u64 piece = range->start >> HT_GRANULE_SHIFT;

	range->heat = (piece + scope->epoch) & 1 ? 1000 : 1;
	range->action = range->flags & TIER_RANGE_MIN ? TIER_KEEP : TIER_SPLIT;
}

HYPERTIER_POLICY(restless, .classify = (void *)restless_classify, .epoch_ms = 100);
