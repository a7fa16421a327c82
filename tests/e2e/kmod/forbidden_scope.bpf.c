// SPDX-License-Identifier: GPL-2.0-only
/* Writes what a policy may only read: the verifier must refuse it. */
#include <hypertier/policy.bpf.h>

SEC("struct_ops/classify")
void BPF_PROG(classify, struct tier_range *range, struct tier_scope *scope)
{
	scope->ranges = 1;
}

HYPERTIER_POLICY(forbidden, .cgroup_id = 1, .classify = (void *)classify);
