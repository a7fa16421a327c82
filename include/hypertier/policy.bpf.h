/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/*
 * The policy SDK: all that a policy includes. Compile with
 *
 *   clang -O2 -g -target bpf -mcpu=v3 -I include -c my.bpf.c -o my.bpf.o
 *
 * and seat it with: tierctl load my.bpf.o --set key=value
 *
 * A policy is one object of type struct hypertier_policy. Every callback is
 * optional. heat and action of a range are the only fields it may write; it
 * keeps its own state in its own maps, and its settings in
 * `const volatile` globals.
 */
#ifndef HYPERTIER_POLICY_BPF_H
#define HYPERTIER_POLICY_BPF_H

#ifndef __VMLINUX_H__
/*
 * The types of <linux/types.h>, which needs a directory of the distribution's
 * own that clang does not search for the target bpf. The same typedef twice is
 * fine, so a policy may include it all the same.
 */
typedef signed char __s8;
typedef unsigned char __u8;
typedef short __s16;
typedef unsigned short __u16;
typedef int __s32;
typedef unsigned int __u32;
typedef long long __s64;
typedef unsigned long long __u64;
typedef __u16 __be16;
typedef __u32 __be32;
typedef __u32 __wsum;
#include <stdbool.h>
#endif

/* Layouts of kernel types may grow: every access to them is relocated. */
#pragma clang attribute push(__attribute__((preserve_access_index)), apply_to = record)
#include <hypertier/abi.h>

struct hypertier_policy {
	/* Before it is seated; not 0 refuses the seat (a negative errno). */
	int (*init)(struct tier_scope *scope);
	/* When it leaves, for whatever reason. */
	void (*exit)(struct tier_scope *scope, struct tier_exit_info *info);
	/* Once an epoch, before the ranges. */
	void (*epoch_begin)(struct tier_scope *scope);
	/* Once an epoch and range: set range->heat, and range->action if you split or merge. */
	void (*classify)(struct tier_range *range, struct tier_scope *scope);
	/* May pages of hot (in slow memory) change places with those of cold (in fast memory)? */
	bool (*admit)(struct tier_range *hot, struct tier_range *cold, struct tier_scope *scope);
	/* What was moved for a range. */
	void (*moved)(struct tier_result *result, struct tier_scope *scope);
	__u32 abi;	/* HT_ABI; filled by HYPERTIER_POLICY */
	__u32 epoch_ms;	/* length of an epoch; 0: 500 */
	__u64 flags;	/* enum hypertier_policy_flags */
	__u64 cgroup_id; /* filled by tierd */
	char name[32];
};
#pragma clang attribute pop

#include <bpf/bpf_helpers.h>
#include <bpf/bpf_tracing.h>

/* Declares the policy object: HYPERTIER_POLICY(name, .classify = (void *)my_classify, ...) */
#define HYPERTIER_POLICY(policy_name, ...)                            \
	char LICENSE[] SEC("license") = "GPL";                        \
	SEC(".struct_ops.link")                                       \
	struct hypertier_policy policy_name##_policy = {             \
		.abi = HT_ABI, .name = #policy_name, __VA_ARGS__      \
	}

/* A setting, changed with --set; the comment above it says what it does. */
#define SETTING(type, key, value) const volatile type key = value

/* Decayed samples of a range (whole samples) at scale s. */
#define TIER_COUNT(range, s) ((range)->count[s] >> HT_COUNT_SHIFT)

#endif /* HYPERTIER_POLICY_BPF_H */
