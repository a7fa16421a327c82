// SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause
// Writes a field that no policy may write: the verifier refuses it.
#include <hypertier/policy.bpf.h>

SEC("struct_ops/rejected_classify")
void BPF_PROG(rejected_classify, struct tier_range *range, struct tier_scope *scope)
{
	range->start = 0;
}

HYPERTIER_POLICY(rejected, .classify = (void *)rejected_classify);
