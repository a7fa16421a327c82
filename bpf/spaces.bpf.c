// SPDX-License-Identifier: GPL-2.0-only
/*
 * Which processes there are, and which address space each one uses: events
 * for what changes, an iterator for what already runs. Threads and kernel
 * threads are left out.
 *
 * The last thread of a group is told from signal->live, which do_exit()
 * decrements before it reaches the tracepoint: when two threads exit at once
 * both may see 0, so user space takes a second EXIT of a pid it does not know
 * for nothing. The pid cannot be reused in between, since the group's leader
 * is released last. exit_mm() has run by then, so that the space is not known
 * here any more.
 */
#include "vmlinux.h"
#include <bpf/bpf_core_read.h>
#include <bpf/bpf_helpers.h>
#include <bpf/bpf_tracing.h>
#include <hypertier/abi.h>

char LICENSE[] SEC("license") = "GPL";

#define PF_KTHREAD 0x00200000

struct {
	__uint(type, BPF_MAP_TYPE_RINGBUF);
	__uint(max_entries, 4096); /* tierd sets it */
} ht_space_events SEC(".maps");

/* Events that did not fit. When it has grown, user space looks at all tasks again. */
__u64 ht_space_events_lost;

static __always_inline bool is_process(struct task_struct *task)
{
	return task->pid == task->tgid && !(task->flags & PF_KTHREAD);
}

/*
 * By probe reads: for each pointer that is followed directly, the verifier of 6.12
 * looks through all types of the kernel three times, which was a third of what
 * loading a policy took. An mm of NULL reads as 0.
 */
static __always_inline void describe(struct ht_space_event *event, struct task_struct *task, __u32 kind)
{
	event->space = BPF_CORE_READ(task, mm, context.ctx_id);
	event->cgroup_id = BPF_CORE_READ(task, cgroups, dfl_cgrp, kn, id);
	event->pid = task->tgid;
	event->kind = kind;
	__builtin_memcpy(event->comm, task->comm, sizeof(event->comm));
}

static __always_inline int report(struct task_struct *task, __u32 kind)
{
	struct ht_space_event *event = bpf_ringbuf_reserve(&ht_space_events, sizeof(*event), 0);

	if (!event) {
		__sync_fetch_and_add(&ht_space_events_lost, 1);
		return 0;
	}
	describe(event, task, kind);
	bpf_ringbuf_submit(event, 0);
	return 0;
}

SEC("tp_btf/sched_process_fork")
int BPF_PROG(ht_fork, struct task_struct *parent, struct task_struct *child)
{
	if (is_process(child))
		report(child, HT_SPACE_FORK);
	return 0;
}

/* The thread that calls exec has taken over the leader's pid by then. */
SEC("tp_btf/sched_process_exec")
int BPF_PROG(ht_exec, struct task_struct *task, pid_t old_pid, struct linux_binprm *bprm)
{
	report(task, HT_SPACE_EXEC);
	return 0;
}

SEC("tp_btf/sched_process_exit")
int BPF_PROG(ht_exit, struct task_struct *task)
{
	if (!(task->flags & PF_KTHREAD) && BPF_CORE_READ(task, signal, live.counter) == 0)
		report(task, HT_SPACE_EXIT);
	return 0;
}

/*
 * Told with the group's leader, after the move. The pages stay where they are,
 * and stay charged to the old cgroup.
 */
SEC("tp_btf/cgroup_attach_task")
int BPF_PROG(ht_attach, struct cgroup *to, const char *path, struct task_struct *task, bool group)
{
	if (is_process(task))
		report(task, HT_SPACE_MOVED);
	return 0;
}

SEC("tp_btf/cgroup_rmdir")
int BPF_PROG(ht_cgroup_gone, struct cgroup *cgroup, const char *path)
{
	struct ht_space_event *event = bpf_ringbuf_reserve(&ht_space_events, sizeof(*event), 0);

	if (!event) {
		__sync_fetch_and_add(&ht_space_events_lost, 1);
		return 0;
	}
	__builtin_memset(event, 0, sizeof(*event));
	event->kind = HT_SPACE_CGROUP_GONE;
	event->cgroup_id = BPF_CORE_READ(cgroup, kn, id);
	bpf_ringbuf_submit(event, 0);
	return 0;
}

/*
 * One event per process. A group whose leader has exited is named by its other
 * threads, more than once perhaps: the same news twice is no harm.
 */
SEC("iter/task")
int ht_tasks(struct bpf_iter__task *ctx)
{
	struct task_struct *task = ctx->task;
	struct ht_space_event event = {};

	if (!task || (task->flags & PF_KTHREAD) || !BPF_CORE_READ(task, mm))
		return 0;
	if (task->pid != task->tgid && BPF_CORE_READ(task, group_leader, mm))
		return 0;
	describe(&event, task, HT_SPACE_TASK);
	bpf_seq_write(ctx->meta->seq, &event, sizeof(event));
	return 0;
}
