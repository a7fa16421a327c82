// SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause
// Takes far longer for a range than an epoch lasts: ejected.
#include <hypertier/policy.bpf.h>

static long nothing(__u32 i, void *context)
{
	return 0;
}

SEC("struct_ops/slow_classify")
void BPF_PROG(slow_classify, struct tier_range *range, struct tier_scope *scope)
{
	bpf_loop(1 << 22, nothing, 0, 0);
}

HYPERTIER_POLICY(slow, .classify = (void *)slow_classify, .epoch_ms = 20);
