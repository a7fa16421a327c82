// SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause
// One setting of each kind.
#include <hypertier/policy.bpf.h>

SETTING(__u8, small, 7);
SETTING(__s32, signed_one, -5);
SETTING(__u64, large, 1ULL << 40);
SETTING(bool, flag, true);

SEC("struct_ops/settings_classify")
void BPF_PROG(settings_classify, struct tier_range *range, struct tier_scope *scope)
{
	range->heat = small + (flag ? (__u32)large + signed_one : 0);
}

HYPERTIER_POLICY(settings, .classify = (void *)settings_classify, .epoch_ms = 50);
