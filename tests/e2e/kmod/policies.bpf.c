// SPDX-License-Identifier: GPL-2.0-only
/* Policies of policy_test.cpp, one map each; what they saw is in .bss. */
#include <hypertier/policy.bpf.h>

char LICENSE[] SEC("license") = "GPL";

struct seen {
	__u32 inits;
	__u32 exits;
	__u32 epochs;
	__u32 classified;
	__u32 moved_pages;
	__u32 exit_kind;
	__u32 last_samples;
};
struct seen first, second;

#define COUNTING(name, factor)                                                           \
	SEC("struct_ops/init") int BPF_PROG(name##_init, struct tier_scope *scope)       \
	{                                                                                \
		__sync_fetch_and_add(&name.inits, 1);                                    \
		return 0;                                                                \
	}                                                                                \
	SEC("struct_ops/exit") void BPF_PROG(name##_exit, struct tier_scope *scope,      \
					     struct tier_exit_info *info)                \
	{                                                                                \
		__sync_fetch_and_add(&name.exits, 1);                                    \
		name.exit_kind = info->kind;                                             \
	}                                                                                \
	SEC("struct_ops/epoch_begin") void BPF_PROG(name##_epoch, struct tier_scope *scope) \
	{                                                                                \
		name.epochs++;                                                           \
	}                                                                                \
	SEC("struct_ops/classify") void BPF_PROG(name##_classify, struct tier_range *range, \
						 struct tier_scope *scope)               \
	{                                                                                \
		name.classified++;                                                       \
		range->heat = range->samples * factor;                                   \
		range->action = TIER_KEEP;                                               \
	}                                                                                \
	SEC("struct_ops/moved") void BPF_PROG(name##_moved, struct tier_result *result,  \
					      struct tier_scope *scope)                  \
	{                                                                                \
		name.moved_pages += result->promoted_pages;                              \
		name.last_samples = result->range.samples;                               \
	}
COUNTING(first, 1)
COUNTING(second, 1000)

SEC("struct_ops/admit")
bool BPF_PROG(hotter_only, struct tier_range *hot, struct tier_range *cold, struct tier_scope *scope)
{
	return hot->heat > cold->heat;
}

SEC("struct_ops/classify")
void BPF_PROG(invalid_classify, struct tier_range *range, struct tier_scope *scope)
{
	range->action = range->samples == 5 ? 77 : TIER_SPLIT;
}

SEC("struct_ops/init")
int BPF_PROG(refusing_init, struct tier_scope *scope)
{
	return -25;
}

static long spin(__u32 index, void *context)
{
	return 0;
}

SEC("struct_ops/classify")
void BPF_PROG(slow_classify, struct tier_range *range, struct tier_scope *scope)
{
	bpf_loop(20000, spin, NULL, 0);
	range->heat = 1;
}

SEC("struct_ops/admit")
bool BPF_PROG(dawdling_admit, struct tier_range *hot, struct tier_range *cold, struct tier_scope *scope)
{
	bpf_loop(20000, spin, NULL, 0);
	return true;
}

SEC("struct_ops/moved")
void BPF_PROG(dawdling_moved, struct tier_result *result, struct tier_scope *scope)
{
	bpf_loop(20000, spin, NULL, 0);
}

static long spin_long(__u32 index, void *context)
{
	bpf_loop(1 << 20, spin, NULL, 0);
	return 0;
}

/* seconds in one callback, and as an RCU reader all the while */
SEC("struct_ops/classify")
void BPF_PROG(endless_classify, struct tier_range *range, struct tier_scope *scope)
{
	bpf_loop(50, spin_long, NULL, 0);
}

/* may sleep as well */
SEC("struct_ops.s/classify")
void BPF_PROG(sleepable_classify, struct tier_range *range, struct tier_scope *scope)
{
	range->heat = 42;
}

#define POLICY(policy_name, cgroup, ...)                                    \
	SEC(".struct_ops.link")                                             \
	struct hypertier_policy policy_name = {                             \
		.abi = HT_ABI, .name = #policy_name, .cgroup_id = cgroup, __VA_ARGS__ \
	}
#define COUNTS(name)                                                                     \
	.init = (void *)name##_init, .exit = (void *)name##_exit,                        \
	.epoch_begin = (void *)name##_epoch, .classify = (void *)name##_classify,        \
	.moved = (void *)name##_moved

POLICY(policy_first, 1, COUNTS(first), .admit = (void *)hotter_only);
POLICY(policy_second, 1, COUNTS(second));
POLICY(policy_empty, 1);
POLICY(policy_invalid, 1, .classify = (void *)invalid_classify);
POLICY(policy_refusing, 1, .init = (void *)refusing_init);
POLICY(policy_slow, 1, .classify = (void *)slow_classify);
POLICY(policy_dawdling, 1, .admit = (void *)dawdling_admit, .moved = (void *)dawdling_moved);
POLICY(policy_endless, 2, .classify = (void *)endless_classify);
POLICY(policy_sleepable, 1, .classify = (void *)sleepable_classify);
POLICY(policy_elsewhere, 4711, .classify = (void *)sleepable_classify);
POLICY(policy_nowhere, 0, .classify = (void *)sleepable_classify);
POLICY(policy_flags, 1, .flags = 1 << 9);

SEC(".struct_ops.link")
struct hypertier_policy policy_abi = { .abi = (HT_ABI_MAJOR + 1) << 16, .name = "policy_abi", .cgroup_id = 1 };
