// SPDX-License-Identifier: GPL-2.0-only
/*
 * The sampler: the one program on every PMU event that tierd opens. It is
 * fixed (a perf_event link cannot be updated in place); what can be swapped
 * sits behind the policy. See sampler.h.
 */
#include "sampler.h"
#include <bpf/bpf_core_read.h>

char LICENSE[] SEC("license") = "GPL";

extern void *bpf_cast_to_kern_ctx(void *obj) __ksym;

SEC("perf_event")
int ht_sample(struct bpf_perf_event_data *ctx)
{
	struct bpf_perf_event_data_kern *event = bpf_cast_to_kern_ctx(ctx);
	struct task_struct *task = bpf_get_current_task_btf();

	/* an mm of NULL reads as 0: a kernel thread has no space */
	ht_count(task->mm->context.ctx_id, ctx->addr,
		 &event->data->data_src.val);
	return 0;
}
