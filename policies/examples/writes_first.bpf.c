// SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause
/*
 * writes_first: what is written belongs into fast memory.
 *
 * A policy of the guide's size: heat is samples per page, stores counted
 * `weight` times. It splits what is uneven inside and never merges. Works badly
 * where heat moves (only the current epoch counts) and where the source has no
 * stores.
 */
#include <hypertier/policy.bpf.h>

/* How many loads a store is worth. */
SETTING(__u32, weight, 4);

SEC("struct_ops/writes_first_classify")
void BPF_PROG(writes_first_classify, struct tier_range *range, struct tier_scope *scope)
{
	__u64 score = range->samples + (__u64)range->stores * (weight - 1);

	range->heat = (score << 16) / range->mapped_pages;
	range->action = range->uneven ? TIER_SPLIT : TIER_KEEP;
}

HYPERTIER_POLICY(writes_first, .classify = (void *)writes_first_classify);
