// SPDX-License-Identifier: GPL-2.0-only
/*
 * vpebs.ko: the perf PMU of the lab's virtual PEBS. The QEMU plugin writes
 * every period-th cache miss of user code to a ring of this CPU; here the
 * records become perf samples with an address.
 *
 * A ring belongs to one CPU, and user code and this module never run at the
 * same time on it. So a ring is drained before anything changes that decides
 * whom a record belongs to: at the context switch, and when an event comes or
 * goes; besides from a timer each millisecond. Records carry the cr3 they were
 * made under; one that is not the current task's is dropped and counted.
 */
#define pr_fmt(fmt) KBUILD_MODNAME ": " fmt

#include <linux/hrtimer.h>
#include <linux/io.h>
#include <linux/kprobes.h>
#include <linux/miscdevice.h>
#include <linux/module.h>
#include <linux/pci.h>
#include <linux/perf_event.h>
#include <linux/sched/mm.h>
#include <linux/sched/task.h>
#include <linux/sched/task_stack.h>
#include <linux/static_call.h>
#include <asm/apic.h>
#include <asm/nmi.h>

#include "vpebs_shared.h"

static bool large_pebs;
module_param(large_pebs, bool, 0644);
MODULE_PARM_DESC(large_pebs, "as a real PMU, pass only the last record of a batch to overflow handlers, unless wakeup_events or freq is set");
static bool nmi;
module_param(nmi, bool, 0644);
MODULE_PARM_DESC(nmi, "drain from an NMI instead of from the timer's interrupt");
static unsigned int period = 37;
module_param(period, uint, 0444);
MODULE_PARM_DESC(period, "the lab's default period, shown in sysfs for those who open events");

#define MAX_EVENTS 32	/* active at once on a CPU */
#define DRAIN_NS NSEC_PER_MSEC

struct cpu_state {
	struct perf_event *events[MAX_EVENTS];
	unsigned int nr;
	unsigned int period;	/* that the plugin was told; 0 off */
	bool busy;		/* events and ring are in use: an NMI keeps out */
	bool timer_runs;
	struct hrtimer timer;
	u64 delivered;		/* records that reached an event */
	u64 batch_hidden;	/* large_pebs: records that no overflow handler saw */
	u64 unmatched;		/* of an address space that is not current any more */
	u64 unused;		/* no event wanted them (throttled, or excluded) */
};

static DEFINE_PER_CPU(struct cpu_state, states);
static struct vpebs_shared *shared;
static struct pmu vpebs_pmu;

/* Not exported: found by kprobe, called directly (a call by pointer faults with IBT). */
DEFINE_STATIC_CALL_NULL(event_overflow, *perf_event_overflow);
DEFINE_STATIC_CALL_NULL(sched_cb_inc, *perf_sched_cb_inc);
DEFINE_STATIC_CALL_NULL(sched_cb_dec, *perf_sched_cb_dec);

/* ------------------------------------------------------------- records */

static struct vpebs_cpu *ring_control(void)
{
	return &shared->cpu[smp_processor_id()];
}

static struct vpebs_record *ring_record(u64 i)
{
	u64 offset = shared->ring_offset +
		     smp_processor_id() * (u64)shared->ring_entries * sizeof(struct vpebs_record);

	return (struct vpebs_record *)((char *)shared + offset) + (i & (shared->ring_entries - 1));
}

/* As in the kernel's own: what keeps an event out of large PEBS. */
static bool only_last_seen(struct perf_event *event)
{
	return large_pebs && !event->attr.freq && !(event->attr.wakeup_events && !event->attr.watermark);
}

static void deliver(struct perf_event *event, struct vpebs_record *r, unsigned int every, bool last)
{
	struct hw_perf_event *hwc = &event->hw;
	struct pt_regs *regs = task_pt_regs(current);
	struct perf_sample_data data;
	union perf_mem_data_src src = {
		.mem_op = r->is_store ? PERF_MEM_OP_STORE : PERF_MEM_OP_LOAD,
		.mem_lvl = PERF_MEM_LVL_HIT | (r->node ? PERF_MEM_LVL_REM_RAM1 : PERF_MEM_LVL_LOC_RAM),
		.mem_lvl_num = PERF_MEM_LVLNUM_RAM,
		.mem_remote = r->node,
		.mem_snoop = PERF_MEM_SNOOP_NA,
		.mem_lock = PERF_MEM_LOCK_NA,
		.mem_dtlb = PERF_MEM_TLB_NA,
	};
	s64 left;

	local64_add(every, &event->count);
	if (!is_sampling_event(event))
		return;
	left = local64_sub_return(every, &hwc->period_left);
	if (left > 0)
		return;
	left += hwc->sample_period;
	local64_set(&hwc->period_left, left > 0 ? left : hwc->sample_period);
	hwc->last_period = hwc->sample_period;

	perf_sample_data_init(&data, 0, hwc->last_period);
	data.addr = r->vaddr;
	data.data_src = src;
	data.weight.full = r->weight_ns;
	data.phys_addr = r->paddr;
	data.sample_flags |= PERF_SAMPLE_ADDR | PERF_SAMPLE_DATA_SRC | PERF_SAMPLE_WEIGHT_TYPE |
			     PERF_SAMPLE_PHYS_ADDR;
	this_cpu_inc(states.delivered);
	if (only_last_seen(event) && !last) {
		this_cpu_inc(states.batch_hidden);
		READ_ONCE(event->overflow_handler)(event, &data, regs);
		return;
	}
	if (static_call(event_overflow)(event, &data, regs))
		vpebs_pmu.stop(event, 0);
}

/* Interrupts are off. last_seen: a context switch's drain has no last record (large_pebs). */
static void drain(bool last_seen)
{
	struct cpu_state *s = this_cpu_ptr(&states);
	struct vpebs_cpu *c = ring_control();
	u64 head, tail = c->tail, cr3;

	s->busy = true;
	barrier();
	head = smp_load_acquire(&c->head);
	cr3 = current->mm ? __pa(current->mm->pgd) : 0;
	for (; tail != head; tail++) {
		struct vpebs_record *r = ring_record(tail);
		bool used = false;
		unsigned int i;

		if (r->cr3 != cr3) {
			s->unmatched++;
			continue;
		}
		for (i = 0; i < s->nr; i++) {
			struct perf_event *event = s->events[i];

			if ((event->hw.state & PERF_HES_STOPPED) || event->attr.exclude_user)
				continue;
			deliver(event, r, s->period, last_seen && tail + 1 == head);
			used = true;
		}
		if (!used)
			s->unused++;
	}
	smp_store_release(&c->tail, tail);
	barrier();
	s->busy = false;
}

/* One counter serves all events of the CPU: it runs at the shortest period. */
static void program(struct cpu_state *s)
{
	struct vpebs_cpu *c = ring_control();
	u64 shortest = 0;
	unsigned int i;

	for (i = 0; i < s->nr; i++) {
		struct hw_perf_event *hwc = &s->events[i]->hw;
		u64 p = is_sampling_event(s->events[i]) ? hwc->sample_period : 1000;

		if (!(hwc->state & PERF_HES_STOPPED) && (!shortest || p < shortest))
			shortest = p;
	}
	shortest = min_t(u64, shortest, U32_MAX);
	if (shortest == s->period)
		return;
	s->period = shortest;
	c->period = shortest;
	smp_store_release(&c->period_request, c->period_request + 1);
}

static enum hrtimer_restart timer_fired(struct hrtimer *timer)
{
	struct cpu_state *s = this_cpu_ptr(&states);

	if (!s->nr) {
		s->timer_runs = false;
		return HRTIMER_NORESTART;
	}
	if (nmi)
		__apic_send_IPI_mask(cpumask_of(smp_processor_id()), NMI_VECTOR);
	else
		drain(true);
	hrtimer_forward_now(timer, ns_to_ktime(DRAIN_NS));
	return HRTIMER_RESTART;
}

static int nmi_handler(unsigned int type, struct pt_regs *regs)
{
	struct cpu_state *s = this_cpu_ptr(&states);

	if (!nmi)
		return NMI_DONE;
	if (s->nr && !READ_ONCE(s->busy))
		drain(true);
	return NMI_HANDLED;
}

/* ----------------------------------------------------------------- PMU */

static int vpebs_event_init(struct perf_event *event)
{
	if (event->attr.type != vpebs_pmu.type)
		return -ENOENT;
	if (event->attr.config || has_branch_stack(event))
		return -EINVAL;
	if (event->cpu >= 0 && event->cpu >= (int)shared->cpus)
		return -ENODEV;
	event->attach_state |= PERF_ATTACH_SCHED_CB;
	return 0;
}

static void vpebs_start(struct perf_event *event, int flags)
{
	struct cpu_state *s = this_cpu_ptr(&states);

	drain(false);
	s->busy = true;
	barrier();
	event->hw.state = 0;
	if (local64_read(&event->hw.period_left) <= 0)
		local64_set(&event->hw.period_left, event->hw.sample_period);
	program(s);
	barrier();
	s->busy = false;
}

static void vpebs_stop(struct perf_event *event, int flags)
{
	struct cpu_state *s = this_cpu_ptr(&states);
	bool was_busy = s->busy;	/* from within deliver(): throttled */

	if (!was_busy)
		drain(false);
	s->busy = true;
	barrier();
	event->hw.state |= PERF_HES_STOPPED | PERF_HES_UPTODATE;
	if (!was_busy)
		program(s);
	barrier();
	s->busy = was_busy;
}

static int vpebs_add(struct perf_event *event, int flags)
{
	struct cpu_state *s = this_cpu_ptr(&states);

	if (s->nr == MAX_EVENTS)
		return -EAGAIN;
	drain(false);	/* what is there was before this event */
	s->busy = true;
	barrier();
	event->hw.state = PERF_HES_STOPPED | PERF_HES_UPTODATE;
	s->events[s->nr++] = event;
	static_call(sched_cb_inc)(&vpebs_pmu);
	barrier();
	s->busy = false;
	if (!s->timer_runs) {
		s->timer_runs = true;
		hrtimer_start(&s->timer, ns_to_ktime(DRAIN_NS), HRTIMER_MODE_REL_PINNED_HARD);
	}
	if (flags & PERF_EF_START)
		vpebs_start(event, PERF_EF_RELOAD);
	return 0;
}

static void vpebs_del(struct perf_event *event, int flags)
{
	struct cpu_state *s = this_cpu_ptr(&states);
	unsigned int i;

	drain(false);
	s->busy = true;
	barrier();
	event->hw.state |= PERF_HES_STOPPED | PERF_HES_UPTODATE;
	for (i = 0; i < s->nr && s->events[i] != event; i++)
		;
	if (i < s->nr) {
		s->events[i] = s->events[--s->nr];
		static_call(sched_cb_dec)(&vpebs_pmu);
	}
	program(s);
	barrier();
	s->busy = false;
}

static void vpebs_read(struct perf_event *event)
{
	drain(false);
}

static void vpebs_sched_task(struct perf_event_pmu_context *context, struct task_struct *task, bool in)
{
	if (!in)
		drain(false);
}

/* --------------------------------------------------------------- sysfs */

PMU_FORMAT_ATTR(event, "config:0-7");
static struct attribute *format_attrs[] = {&format_attr_event.attr, NULL};
static const struct attribute_group format_group = {.name = "format", .attrs = format_attrs};

PMU_EVENT_ATTR_STRING(mem, event_mem, "event=0x00");
static struct attribute *event_attrs[] = {&event_mem.attr.attr, NULL};
static const struct attribute_group event_group = {.name = "events", .attrs = event_attrs};

#define SUM(name, expr)                                                                            \
	static ssize_t name##_show(struct device *dev, struct device_attribute *attr, char *buf)  \
	{                                                                                          \
		u64 sum = 0;                                                                       \
		int cpu;                                                                           \
		for_each_online_cpu(cpu)                                                           \
			sum += (expr);                                                             \
		return sysfs_emit(buf, "%llu\n", sum);                                             \
	}                                                                                          \
	static DEVICE_ATTR_RO(name)
SUM(delivered, per_cpu(states.delivered, cpu));
SUM(batch_hidden, per_cpu(states.batch_hidden, cpu));
SUM(unmatched, per_cpu(states.unmatched, cpu));
SUM(unused, per_cpu(states.unused, cpu));
SUM(produced, shared->cpu[cpu].head);
SUM(drained, shared->cpu[cpu].tail);
SUM(lost, shared->cpu[cpu].lost);

static ssize_t default_period_show(struct device *dev, struct device_attribute *attr, char *buf)
{
	return sysfs_emit(buf, "%u\n", period);
}
static DEVICE_ATTR_RO(default_period);

static struct attribute *stats_attrs[] = {
	&dev_attr_delivered.attr, &dev_attr_batch_hidden.attr, &dev_attr_unmatched.attr,
	&dev_attr_unused.attr,	  &dev_attr_produced.attr,     &dev_attr_drained.attr,
	&dev_attr_lost.attr,	  NULL};
static const struct attribute_group stats_group = {.name = "stats", .attrs = stats_attrs};
static struct attribute *period_attrs[] = {&dev_attr_default_period.attr, NULL};
static const struct attribute_group period_group = {.attrs = period_attrs};
static const struct attribute_group *groups[] = {&format_group, &event_group, &stats_group, &period_group, NULL};

static struct pmu vpebs_pmu = {
	.module = THIS_MODULE,
	.task_ctx_nr = perf_hw_context,
	.attr_groups = groups,
	.event_init = vpebs_event_init,
	.add = vpebs_add,
	.del = vpebs_del,
	.start = vpebs_start,
	.stop = vpebs_stop,
	.read = vpebs_read,
	.sched_task = vpebs_sched_task,
};

/* -------------------------------------------------------------- device */

static long device_ioctl(struct file *file, unsigned int cmd, unsigned long arg)
{
	struct vpebs_space space;
	struct task_struct *task;
	struct mm_struct *mm = NULL;
	struct pid *pid;

	if (cmd != VPEBS_IOC_SPACE)
		return -ENOTTY;
	if (copy_from_user(&space, (void __user *)arg, sizeof(space)))
		return -EFAULT;
	pid = find_get_pid(space.pid);
	task = get_pid_task(pid, PIDTYPE_PID);
	put_pid(pid);
	if (task) {
		mm = get_task_mm(task);
		put_task_struct(task);
	}
	if (!mm)
		return -ESRCH;
	space.cr3 = __pa(mm->pgd);
	mmput(mm);
	return copy_to_user((void __user *)arg, &space, sizeof(space)) ? -EFAULT : 0;
}

static const struct file_operations device_ops = {
	.owner = THIS_MODULE,
	.unlocked_ioctl = device_ioctl,
};
static struct miscdevice device = {
	.minor = MISC_DYNAMIC_MINOR, .name = "vpebs", .fops = &device_ops, .mode = 0600};

static void *find_symbol(const char *name)
{
	struct kprobe kp = {.symbol_name = name};
	void *addr;

	if (register_kprobe(&kp) < 0) {
		pr_err("this kernel has no %s\n", name);
		return NULL;
	}
	addr = kp.addr;
	unregister_kprobe(&kp);
	return addr;
}

static int resolve(void)
{
	void *overflow = find_symbol("perf_event_overflow");
	void *inc = find_symbol("perf_sched_cb_inc");
	void *dec = find_symbol("perf_sched_cb_dec");

	if (!overflow || !inc || !dec)
		return -ENOENT;
	static_call_update(event_overflow, overflow);
	static_call_update(sched_cb_inc, inc);
	static_call_update(sched_cb_dec, dec);
	return 0;
}

/* The BAR is not claimed: labctl maps it through sysfs, which a busy resource forbids. */
static int map_shared(void)
{
	struct pci_dev *pci = pci_get_device(VPEBS_PCI_VENDOR, VPEBS_PCI_DEVICE, NULL);
	int err;

	if (!pci) {
		pr_err("no ivshmem device: this is no lab VM, or it has no plugin\n");
		return -ENODEV;
	}
	err = pci_enable_device(pci);
	if (!err) {
		shared = memremap(pci_resource_start(pci, 2), pci_resource_len(pci, 2), MEMREMAP_WB);
		if (!shared)
			err = -ENOMEM;
		else if (shared->magic != VPEBS_MAGIC || shared->cpus < num_possible_cpus()) {
			pr_err("the ivshmem device has no virtual PEBS in it\n");
			memunmap(shared);
			err = -ENODEV;
		}
	}
	pci_dev_put(pci);
	return err;
}

static void publish_cpu(void *unused)
{
	rdmsrl(MSR_GS_BASE, ring_control()->gs_base);
}

static int __init vpebs_init(void)
{
	int cpu, err = resolve();

	if (err)
		return err;
	err = map_shared();
	if (err)
		return err;
	for_each_possible_cpu(cpu) {
		struct cpu_state *s = per_cpu_ptr(&states, cpu);

		hrtimer_init(&s->timer, CLOCK_MONOTONIC, HRTIMER_MODE_REL_PINNED_HARD);
		s->timer.function = timer_fired;
	}
	err = register_nmi_handler(NMI_LOCAL, nmi_handler, 0, "vpebs");
	if (err)
		goto unmap;
	err = misc_register(&device);
	if (err)
		goto no_nmi;
	err = perf_pmu_register(&vpebs_pmu, "vpebs", -1);
	if (err)
		goto no_device;
	on_each_cpu(publish_cpu, NULL, 1);
	smp_store_release(&shared->enabled, 1);
	return 0;
no_device:
	misc_deregister(&device);
no_nmi:
	unregister_nmi_handler(NMI_LOCAL, "vpebs");
unmap:
	memunmap(shared);
	return err;
}

static void __exit vpebs_exit(void)
{
	int cpu;

	perf_pmu_unregister(&vpebs_pmu);
	for_each_possible_cpu(cpu)
		hrtimer_cancel(&per_cpu_ptr(&states, cpu)->timer);
	misc_deregister(&device);
	unregister_nmi_handler(NMI_LOCAL, "vpebs");
	memunmap(shared);
}

module_init(vpebs_init);
module_exit(vpebs_exit);
MODULE_LICENSE("GPL");
MODULE_DESCRIPTION("perf PMU of the HyperTier lab's virtual PEBS");
