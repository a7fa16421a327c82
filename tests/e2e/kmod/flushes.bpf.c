// SPDX-License-Identifier: GPL-2.0-only
/* Counts TLB flushes of one task (watched), or of all (0). */
#include "vmlinux.h"
#include <bpf/bpf_helpers.h>

char LICENSE[] SEC("license") = "GPL";

/* one struct: the order of globals in .bss is the compiler's choice */
struct {
	__u32 watched;
	__u32 pad;
	__u64 batch;	/* of try_to_unmap_flush() */
	__u64 range;	/* of an address range of one mm */
	__u64 remote;	/* either of them, when it interrupts other CPUs */
} flushes;

static void count(__u64 *counter)
{
	if (!flushes.watched || flushes.watched == (__u32)bpf_get_current_pid_tgid())
		__sync_fetch_and_add(counter, 1);
}

SEC("kprobe/arch_tlbbatch_flush")
int on_batch_flush(void *context)
{
	count(&flushes.batch);
	return 0;
}

SEC("kprobe/flush_tlb_mm_range")
int on_range_flush(void *context)
{
	count(&flushes.range);
	return 0;
}

SEC("kprobe/native_flush_tlb_multi")
int on_remote_flush(void *context)
{
	count(&flushes.remote);
	return 0;
}
