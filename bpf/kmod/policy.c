// SPDX-License-Identifier: GPL-2.0-only
/*
 * Policies: the struct_ops type hypertier_policy, the seats (one policy a
 * scope), and the kfuncs that run a policy's callbacks.
 *
 * Locks. seats_mutex orders the coming and going of seats; a seat's own mutex
 * orders what becomes of its policy, so that a slow exit() of one scope holds
 * up no other. seats_lock is held for moments only, never over a callback: it
 * keeps the list of seats, who is in each, and how many runs use that policy.
 * Whoever takes a policy away waits for the runs of that policy alone before
 * the BPF side may free it. They are counted, and not left to SRCU: its grace
 * periods end in a work item of one CPU, and a callback that does not give up
 * that CPU would hold up every other seat.
 *
 * Ejection. A running callback cannot be aborted, so the deadline is checked
 * between callbacks. Ejecting is one store, seat->ejected := the generation
 * that broke the rule; nobody is waited for. From then on the seat refuses
 * runs, with the reason, until another policy takes it (its generation is a
 * new one); that is also what unregisters the ejected one.
 */
#include <linux/bpf_verifier.h>
#include <linux/btf_ids.h>
#include <linux/list.h>
#include <linux/module.h>
#include <linux/mutex.h>
#include <linux/sched.h>
#include <linux/slab.h>
#include <linux/spinlock.h>
#include <linux/uaccess.h>
#include <linux/wait.h>

#include "module.h"

/* As in include/hypertier/policy.bpf.h, which says what each is for. */
struct hypertier_policy {
	int (*init)(struct tier_scope *scope);
	void (*exit)(struct tier_scope *scope, struct tier_exit_info *info);
	void (*epoch_begin)(struct tier_scope *scope);
	void (*classify)(struct tier_range *range, struct tier_scope *scope);
	bool (*admit)(struct tier_range *hot, struct tier_range *cold, struct tier_scope *scope);
	void (*moved)(struct tier_result *result, struct tier_scope *scope);
	u32 abi;
	u32 epoch_ms;
	u64 flags;
	u64 cgroup_id;
	char name[32];
};

/* One policy in a seat, from its init() until nobody runs it any more. */
struct stay {
	struct hypertier_policy *policy; /* pinned by the link that brought it */
	u64 generation;	/* new with every change of any seat */
	u32 runs;	/* that use it now */
};

struct seat {
	struct list_head list;
	struct stay *stay;
	u64 cgroup_id;
	struct tier_scope scope; /* as last seen; what init() and exit() get */
	struct mutex change;	/* one change of the policy at a time */
	wait_queue_head_t unused; /* woken when a stay has no runs left */
	u64 ejected;		/* generation that broke a rule; 0: none */
	struct tier_exit_info exit; /* of that one */
};

static DEFINE_MUTEX(seats_mutex);
/* Keeps seats, nr_seats, last_generation and all of a seat but scope and change. */
static DEFINE_SPINLOCK(seats_lock);
static LIST_HEAD(seats);
static u64 nr_seats;
static u64 last_generation;

u64 ht_seats(void)
{
	return READ_ONCE(nr_seats);
}

/* Under seats_lock. */
static struct seat *find_seat(u64 cgroup_id)
{
	struct seat *seat;

	lockdep_assert_held(&seats_lock);
	list_for_each_entry(seat, &seats, list)
		if (seat->cgroup_id == cgroup_id)
			return seat;
	return NULL;
}

/* ----------------------------------------------------------- seats change */

static int call_init(struct hypertier_policy *policy, struct tier_scope *scope)
{
	int err = policy->init ? policy->init(scope) : 0;

	if (!err)
		return 0;
	pr_info("policy %s: init returned %d, not seated\n", policy->name, err);
	/* A policy may return anything; link_create must not take it for success. */
	return err < 0 && err >= -MAX_ERRNO ? err : -EINVAL;
}

/* An ejected policy is told so, however it leaves in the end. */
static void call_exit(struct seat *seat, struct hypertier_policy *policy, u64 generation, u32 kind,
		      const char *message)
{
	struct tier_exit_info info = { .kind = kind, .epoch = seat->scope.epoch };

	strscpy(info.message, message, sizeof(info.message));
	spin_lock(&seats_lock);
	if (seat->ejected == generation)
		info = seat->exit;
	spin_unlock(&seats_lock);
	if (policy->exit)
		policy->exit(&seat->scope, &info);
}

/* Under seats_lock. code: enum tier_exit_code. The first reason counts; it comes back in *info. */
static void eject(struct seat *seat, u64 generation, u32 code, u64 epoch, const char *message,
		  struct tier_exit_info *info)
{
	lockdep_assert_held(&seats_lock);
	if (seat->ejected != generation) {
		memset(&seat->exit, 0, sizeof(seat->exit));
		seat->exit.kind = TIER_EXIT_EJECTED;
		seat->exit.code = code;
		seat->exit.epoch = epoch;
		strscpy(seat->exit.message, message, sizeof(seat->exit.message));
		seat->ejected = generation;
	}
	*info = seat->exit;
}

/* Waits for the runs of a stay that ended: nobody finds it any more. */
static void wait_for_runs(struct seat *seat, struct stay *ended)
{
	wait_event(seat->unused, !READ_ONCE(ended->runs));
	/* the last one wakes us under the lock: let it be done with the seat */
	spin_lock(&seats_lock);
	spin_unlock(&seats_lock);
}

/* kdata is pinned by the caller (link_create, link_update, link release). */
static int policy_reg(void *kdata, struct bpf_link *link)
{
	struct hypertier_policy *policy = kdata;
	struct seat *seat = kzalloc(sizeof(*seat), GFP_KERNEL);
	struct stay *stay = kzalloc(sizeof(*stay), GFP_KERNEL);
	bool taken;
	int err;

	err = -ENOMEM;
	if (!seat || !stay)
		goto free;
	mutex_init(&seat->change);
	init_waitqueue_head(&seat->unused);
	seat->cgroup_id = policy->cgroup_id;
	seat->scope.cgroup_id = policy->cgroup_id;
	seat->stay = stay;
	stay->policy = policy;

	/* Seats come one at a time, so that one which is free stays free over init(). */
	mutex_lock(&seats_mutex);
	spin_lock(&seats_lock);
	taken = find_seat(seat->cgroup_id);
	spin_unlock(&seats_lock);
	err = taken ? -EBUSY : call_init(policy, &seat->scope);
	if (!err) {
		spin_lock(&seats_lock);
		stay->generation = ++last_generation;
		list_add_tail(&seat->list, &seats);
		WRITE_ONCE(nr_seats, nr_seats + 1);
		spin_unlock(&seats_lock);
	}
	mutex_unlock(&seats_mutex);
	if (!err)
		return 0;
free:
	kfree(stay);
	kfree(seat);
	return err;
}

static void policy_unreg(void *kdata, struct bpf_link *link)
{
	struct hypertier_policy *policy = kdata;
	struct seat *seat;

	spin_lock(&seats_lock);
	seat = find_seat(policy->cgroup_id);
	if (seat) {
		list_del(&seat->list);
		WRITE_ONCE(nr_seats, nr_seats - 1);
		last_generation++;
	}
	spin_unlock(&seats_lock);
	if (WARN_ON_ONCE(!seat))
		return;
	wait_for_runs(seat, seat->stay);
	/* a killed loader closes its files in any order, the device among them */
	if (ht_device_is_open() && !(current->flags & PF_EXITING))
		call_exit(seat, policy, seat->stay->generation, TIER_EXIT_UNLOADED, "unloaded");
	else
		call_exit(seat, policy, seat->stay->generation, TIER_EXIT_LOADER_GONE, "tierd is gone");
	kfree(seat->stay);
	kfree(seat);
}

static int policy_update(void *kdata, void *old_kdata, struct bpf_link *link)
{
	struct hypertier_policy *policy = kdata, *old = old_kdata;
	struct stay *fresh, *ended;
	struct seat *seat;
	int err;

	/* The link stands for its seat: a policy for another scope needs its own. */
	if (policy->cgroup_id != old->cgroup_id)
		return -EINVAL;
	fresh = kzalloc(sizeof(*fresh), GFP_KERNEL);
	if (!fresh)
		return -ENOMEM;
	fresh->policy = policy;

	/* A link that is updated has a user, so its unreg() cannot run: the seat stays. */
	spin_lock(&seats_lock);
	seat = find_seat(policy->cgroup_id);
	spin_unlock(&seats_lock);
	if (WARN_ON_ONCE(!seat)) {
		kfree(fresh);
		return -ENOENT;
	}

	mutex_lock(&seat->change);
	err = call_init(policy, &seat->scope);
	if (err) {
		kfree(fresh);	/* the old one never left */
	} else {
		spin_lock(&seats_lock);
		fresh->generation = ++last_generation;
		ended = seat->stay;
		seat->stay = fresh;
		spin_unlock(&seats_lock);
		/* As in policy_unreg(): the caller drops the old one's map. */
		wait_for_runs(seat, ended);
		call_exit(seat, old, ended->generation, TIER_EXIT_REPLACED, "replaced by a hot swap");
		kfree(ended);
	}
	mutex_unlock(&seat->change);
	return err;
}

/* ----------------------------------------------------- seats, from outside */

/* HT_IOC_SEAT and HT_IOC_EJECT. Under seats_lock no seat goes, nor gets another policy. */
static int ask_seat(struct ht_seat *asked, bool ejects)
{
	struct seat *seat = find_seat(asked->cgroup_id);

	if (!seat)
		return -ENOENT;
	if (ejects) {
		if (asked->exit.code == TIER_CODE_OK || asked->exit.code >= TIER_CODES)
			return -EINVAL;
		if (asked->generation != seat->stay->generation)
			return -ESTALE;
		asked->exit.message[sizeof(asked->exit.message) - 1] = 0;
		eject(seat, asked->generation, asked->exit.code, asked->exit.epoch, asked->exit.message,
		      &asked->exit);
		return 0;
	}
	asked->generation = seat->stay->generation;
	strscpy(asked->name, seat->stay->policy->name, sizeof(asked->name));
	memset(&asked->exit, 0, sizeof(asked->exit));
	if (seat->ejected == asked->generation)
		asked->exit = seat->exit;
	return 0;
}

int ht_ask_seat(struct ht_seat __user *user, bool ejects)
{
	struct ht_seat asked;
	int err;

	if (copy_from_user(&asked, user, sizeof(asked)))
		return -EFAULT;
	spin_lock(&seats_lock);
	err = ask_seat(&asked, ejects);
	spin_unlock(&seats_lock);
	return err ?: !ejects && copy_to_user(user, &asked, sizeof(asked)) ? -EFAULT : 0;
}

/* -------------------------------------------------------- struct_ops type */

/* The verifier takes signatures from these; they are never called. */
static int stub_init(struct tier_scope *scope)
{
	return 0;
}

static void stub_exit(struct tier_scope *scope, struct tier_exit_info *info)
{
}

static void stub_epoch_begin(struct tier_scope *scope)
{
}

static void stub_classify(struct tier_range *range, struct tier_scope *scope)
{
}

static bool stub_admit(struct tier_range *hot, struct tier_range *cold, struct tier_scope *scope)
{
	return true;
}

static void stub_moved(struct tier_result *result, struct tier_scope *scope)
{
}

static struct hypertier_policy stubs = {
	.init = stub_init,
	.exit = stub_exit,
	.epoch_begin = stub_epoch_begin,
	.classify = stub_classify,
	.admit = stub_admit,
	.moved = stub_moved,
};

BTF_ID_LIST_SINGLE(tier_range_id, struct, tier_range)
static struct btf *module_btf;

static int policy_type_init(struct btf *btf)
{
	module_btf = btf;
	return 0;
}

/* Called for writes only: heat and action, which lie side by side. */
static int policy_write_access(struct bpf_verifier_log *log, const struct bpf_reg_state *reg,
			     int offset, int size)
{
	if (reg->btf == module_btf && reg->btf_id == tier_range_id[0] &&
	    offset >= offsetof(struct tier_range, heat) &&
	    offset + size <= offsetofend(struct tier_range, action))
		return NOT_INIT;
	bpf_log(log, "a policy may write only heat and action of struct tier_range\n");
	return -EACCES;
}

static const struct bpf_verifier_ops policy_verifier_ops = {
	.get_func_proto = bpf_base_func_proto,
	.is_valid_access = bpf_tracing_btf_ctx_access,
	.btf_struct_access = policy_write_access,
};

/* Data members: checked and copied here (1: done); callbacks are the core's (0). */
static int init_member(const struct btf_type *type, const struct btf_member *member, void *kdata,
		       const void *udata)
{
	const struct hypertier_policy *user = udata;
	struct hypertier_policy *policy = kdata;

	switch (__btf_member_bit_offset(type, member) / 8) {
	case offsetof(struct hypertier_policy, abi):
		if (user->abi >> 16 != HT_ABI_MAJOR) {
			pr_err("policy %.*s is built for ABI %u.%u, this module has %u.%u; build it again with this version's headers\n",
			       (int)sizeof(user->name), user->name, user->abi >> 16,
			       user->abi & 0xffff, HT_ABI_MAJOR, HT_ABI_MINOR);
			return -EPROTONOSUPPORT;
		}
		policy->abi = user->abi;
		return 1;
	case offsetof(struct hypertier_policy, epoch_ms):
		policy->epoch_ms = user->epoch_ms;
		return 1;
	case offsetof(struct hypertier_policy, flags):
		if (user->flags & ~(u64)HT_POLICY_FLAGS)
			return -EOPNOTSUPP;
		policy->flags = user->flags;
		return 1;
	case offsetof(struct hypertier_policy, cgroup_id):
		if (!user->cgroup_id)
			return -EINVAL;
		policy->cgroup_id = user->cgroup_id;
		return 1;
	case offsetof(struct hypertier_policy, name):
		if (strnlen(user->name, sizeof(user->name)) == sizeof(user->name))
			return -ENAMETOOLONG;
		strscpy(policy->name, user->name, sizeof(policy->name));
		return 1;
	}
	return 0;
}

static struct bpf_struct_ops policy_type = {
	.verifier_ops = &policy_verifier_ops,
	.init = policy_type_init,
	.init_member = init_member,
	.reg = policy_reg,
	.unreg = policy_unreg,
	.update = policy_update,
	.cfi_stubs = &stubs,
	.owner = THIS_MODULE,
	.name = "hypertier_policy",
};

/* ----------------------------------------------------- running a policy */

/* One kfunc's use of one seat: from enter() to leave() the policy stays. */
struct turn {
	struct seat *seat;
	struct stay *stay;
	struct hypertier_policy *policy;
	u32 nr;
	u32 done;
	u64 start_ns;
	u64 budget_ns;	/* 0: no bound */
};

/*
 * The arguments lie in memory that tierd has mapped: what is checked is read
 * once, and the scope is shown to the policy as it is.
 */
static int enter(struct turn *turn, struct ht_run *run, u32 run__sz, u32 entries__sz,
		 size_t entry_size)
{
	u64 id;
	int err = 0;

	if (run__sz < sizeof(*run))
		return -EINVAL;
	turn->nr = READ_ONCE(run->nr);
	turn->done = 0;
	run->done = 0;
	run->policy_ns = 0;
	run->generation = 0;
	memset(&run->exit, 0, sizeof(run->exit));
	if (turn->nr > entries__sz / entry_size)
		return run->status = -EINVAL;

	id = READ_ONCE(run->seat) ?: READ_ONCE(run->scope.cgroup_id);
	spin_lock(&seats_lock);
	turn->seat = find_seat(id);
	turn->stay = turn->seat ? turn->seat->stay : NULL;
	if (!turn->seat) {
		err = -ENOENT;
	} else if (turn->seat->ejected == turn->stay->generation) {
		run->generation = turn->stay->generation;
		run->exit = turn->seat->exit;
		err = -ECANCELED;
	} else {
		run->generation = turn->stay->generation;
		turn->stay->runs++;
	}
	spin_unlock(&seats_lock);
	run->status = err;
	if (err)
		return err;
	turn->policy = turn->stay->policy;
	turn->start_ns = ktime_get_ns();
	turn->budget_ns = READ_ONCE(run->budget_ns);
	return 0;
}

/* The seat's state flips here; whoever else uses it is not waited for. */
static void break_rule(struct turn *turn, struct ht_run *run, int status, u32 code,
		       const char *message)
{
	run->status = status;
	spin_lock(&seats_lock);
	eject(turn->seat, turn->stay->generation, code, READ_ONCE(run->scope.epoch), message, &run->exit);
	spin_unlock(&seats_lock);
}

/* Apart from in_time(), which would pay for the message with each callback. */
static noinline bool out_of_time(struct turn *turn, struct ht_run *run, const char *callback, u64 used_ns)
{
	char message[sizeof(run->exit.message)];

	scnprintf(message, sizeof(message), "%s: %llu us used, %llu us allowed, after %u of %u entries",
		  callback, used_ns / 1000, turn->budget_ns / 1000, turn->done, turn->nr);
	break_rule(turn, run, -ETIME, TIER_CODE_TIMEOUT, message);
	return false;
}

/* After each callback: is there time for the next one? */
static bool in_time(struct turn *turn, struct ht_run *run, const char *callback)
{
	u64 used_ns;

	/* No lock is held; a long run must not delay RCU tasks. */
	if (!(turn->done & 255))
		cond_resched_tasks_rcu_qs();
	if (!turn->budget_ns)
		return true;
	used_ns = ktime_get_ns() - turn->start_ns;
	return used_ns <= turn->budget_ns || out_of_time(turn, run, callback, used_ns);
}

static int leave(struct turn *turn, struct ht_run *run)
{
	run->done = turn->done;
	run->policy_ns = ktime_get_ns() - turn->start_ns;
	spin_lock(&seats_lock);
	if (!--turn->stay->runs)
		wake_up(&turn->seat->unused);
	spin_unlock(&seats_lock);
	return run->status;
}

__bpf_kfunc_start_defs();

__bpf_kfunc int hypertier_classify(struct ht_run *run, u32 run__sz, struct tier_range *ranges,
				   u32 ranges__sz)
{
	struct turn turn;
	int err = enter(&turn, run, run__sz, ranges__sz, sizeof(*ranges));

	if (err)
		return err;
	/* For init() and exit() of this seat; a scope runs on one thread, and only its own writes here. */
	if (READ_ONCE(run->scope.cgroup_id) == turn.seat->cgroup_id)
		turn.seat->scope = run->scope;
	if (turn.policy->epoch_begin && !READ_ONCE(run->first)) {
		turn.policy->epoch_begin(&run->scope);
		if (!in_time(&turn, run, "epoch_begin"))
			goto ejected;
	}
	while (turn.policy->classify && turn.done < turn.nr) {
		struct tier_range *range = &ranges[turn.done];
		u32 action;

		turn.policy->classify(range, &run->scope);
		action = READ_ONCE(range->action);
		if (action >= TIER_ACTIONS) {
			char message[sizeof(run->exit.message)];

			scnprintf(message, sizeof(message),
				  "classify: action %u for the range at %llx, but there are 0 to %u only",
				  action, READ_ONCE(range->start), TIER_ACTIONS - 1);
			break_rule(&turn, run, -EINVAL, TIER_CODE_INVALID_ACTION, message);
			goto ejected;
		}
		turn.done++;
		if (!in_time(&turn, run, "classify"))
			goto ejected;
	}
	turn.done = turn.nr;
	return leave(&turn, run);
ejected:
	/* What it did not come to stays as it is. */
	for (u32 i = turn.done; i < turn.nr; i++) {
		ranges[i].action = TIER_KEEP;
		ranges[i].heat = 0;
	}
	return leave(&turn, run);
}

__bpf_kfunc int hypertier_admit(struct ht_run *run, u32 run__sz, struct tier_pair *pairs,
				u32 pairs__sz)
{
	struct turn turn;
	int err = enter(&turn, run, run__sz, pairs__sz, sizeof(*pairs));

	if (err)
		return err;
	while (turn.done < turn.nr) {
		struct tier_pair *pair = &pairs[turn.done];

		pair->admitted = !turn.policy->admit ||
				 turn.policy->admit(&pair->hot, &pair->cold, &run->scope);
		turn.done++;
		if (!in_time(&turn, run, "admit"))
			break;
	}
	for (u32 i = turn.done; i < turn.nr; i++)
		pairs[i].admitted = 0;
	return leave(&turn, run);
}

__bpf_kfunc int hypertier_moved(struct ht_run *run, u32 run__sz, struct tier_result *results,
				u32 results__sz)
{
	struct turn turn;
	int err = enter(&turn, run, run__sz, results__sz, sizeof(*results));

	if (err)
		return err;
	while (turn.policy->moved && turn.done < turn.nr) {
		turn.policy->moved(&results[turn.done], &run->scope);
		turn.done++;
		if (!in_time(&turn, run, "moved"))
			break;
	}
	if (!turn.policy->moved)
		turn.done = turn.nr;
	return leave(&turn, run);
}

__bpf_kfunc_end_defs();

BTF_KFUNCS_START(kfunc_ids)
BTF_ID_FLAGS(func, hypertier_classify, KF_SLEEPABLE)
BTF_ID_FLAGS(func, hypertier_admit, KF_SLEEPABLE)
BTF_ID_FLAGS(func, hypertier_moved, KF_SLEEPABLE)
BTF_ID_FLAGS(func, hypertier_spaces, KF_SLEEPABLE)
BTF_ID_FLAGS(func, hypertier_walk, KF_SLEEPABLE)
BTF_ID_FLAGS(func, hypertier_exchange, KF_SLEEPABLE)
BTF_ID_FLAGS(func, hypertier_bits, KF_SLEEPABLE)
BTF_KFUNCS_END(kfunc_ids)

static const struct btf_kfunc_id_set kfuncs = {
	.owner = THIS_MODULE,
	.set = &kfunc_ids,
};

int ht_policy_init(void)
{
	int err = register_btf_kfunc_id_set(BPF_PROG_TYPE_SYSCALL, &kfuncs);

	return err ?: register_bpf_struct_ops(&policy_type, hypertier_policy);
}
