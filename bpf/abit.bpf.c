// SPDX-License-Identifier: GPL-2.0-only
/*
 * The way of the accessed-bit source into hypertier.ko: one SYSCALL program and
 * one map, apart from mover.bpf.c's, because a thread of its own uses it.
 */
#include "vmlinux.h"
#include <bpf/bpf_helpers.h>
#include <hypertier/abi.h>

char LICENSE[] SEC("license") = "GPL";

extern int hypertier_bits(void *run, u32 run__sz) __ksym __weak;

struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(map_flags, BPF_F_MMAPABLE);
	__uint(max_entries, 1);
	__type(key, u32);
	__type(value, struct ht_bits_run);
} checks SEC(".maps");

static const u32 zero;

SEC("syscall")
int bits(void *ctx)
{
	struct ht_bits_run *run = bpf_map_lookup_elem(&checks, &zero);

	return run ? hypertier_bits(run, sizeof(*run)) : -22;
}
