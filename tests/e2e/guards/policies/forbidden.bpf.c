// SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause
// Bad policy 4 of 6: writes a field that is not its own; the verifier refuses it.
#include <hypertier/policy.bpf.h>

SEC("struct_ops/forbidden_classify")
void BPF_PROG(forbidden_classify, struct tier_range *range, struct tier_scope *scope)
{
	range->heat = 1;
	range->tier_pages[HT_TIER_FAST] = 0;
}

HYPERTIER_POLICY(forbidden, .classify = (void *)forbidden_classify);
