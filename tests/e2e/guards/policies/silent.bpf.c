// SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause
// Bad policy 5 of 6: never classifies.
#include <hypertier/policy.bpf.h>

SEC("struct_ops/silent_classify")
void BPF_PROG(silent_classify, struct tier_range *range, struct tier_scope *scope)
{
}

HYPERTIER_POLICY(silent, .classify = (void *)silent_classify, .epoch_ms = 100);
