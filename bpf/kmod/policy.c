// SPDX-License-Identifier: GPL-2.0-only
/*
 * Policies: the struct_ops type hypertier_policy, the seats (one policy a
 * scope), and the kfuncs that run a policy's callbacks.
 *
 * Locks. seats_mutex orders changes of seats. Who runs a policy is under two
 * SRCU domains (callbacks may sleep): seats_srcu while it looks its seat up,
 * so that the seat is not freed, and the srcu of that seat for as long as
 * callbacks run. Whoever takes a policy away waits for both before the BPF side
 * may free it, and for no other seat's callbacks, however slow they are.
 */
#include <linux/bpf_verifier.h>
#include <linux/btf_ids.h>
#include <linux/list.h>
#include <linux/module.h>
#include <linux/mutex.h>
#include <linux/sched.h>
#include <linux/slab.h>
#include <linux/srcu.h>

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

struct seat {
	struct list_head list;
	struct srcu_struct srcu; /* held by runs of this seat */
	struct hypertier_policy __rcu *policy;
	u64 cgroup_id;
	u64 generation;	/* of the policy in it; new with every change */
	struct tier_scope scope; /* as last seen; what init() and exit() get */
};

static DEFINE_MUTEX(seats_mutex);
DEFINE_STATIC_SRCU(seats_srcu);
static LIST_HEAD(seats);
static u64 nr_seats;
static u64 last_generation;

u64 ht_seats(void)
{
	return READ_ONCE(nr_seats);
}

/* Under seats_mutex or seats_srcu. */
static struct seat *find_seat(u64 cgroup_id)
{
	struct seat *seat;

	list_for_each_entry_srcu(seat, &seats, list,
				 srcu_read_lock_held(&seats_srcu) || lockdep_is_held(&seats_mutex))
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

static void call_exit(struct hypertier_policy *policy, struct tier_scope *scope, u32 kind,
		      const char *message)
{
	struct tier_exit_info info = { .kind = kind, .epoch = scope->epoch };

	strscpy(info.message, message, sizeof(info.message));
	if (policy->exit)
		policy->exit(scope, &info);
}

static void free_seat(struct seat *seat)
{
	cleanup_srcu_struct(&seat->srcu);
	kfree(seat);
}

/* kdata is pinned by the caller (link_create, link_update, link release). */
static int policy_reg(void *kdata, struct bpf_link *link)
{
	struct hypertier_policy *policy = kdata;
	struct seat *seat = kzalloc(sizeof(*seat), GFP_KERNEL);
	int err;

	if (!seat)
		return -ENOMEM;
	err = init_srcu_struct(&seat->srcu);
	if (err) {
		kfree(seat);
		return err;
	}
	err = -EBUSY;
	INIT_LIST_HEAD(&seat->list);
	seat->cgroup_id = policy->cgroup_id;
	seat->scope.cgroup_id = policy->cgroup_id;
	RCU_INIT_POINTER(seat->policy, policy);

	mutex_lock(&seats_mutex);
	if (find_seat(seat->cgroup_id))
		goto out;
	err = call_init(policy, &seat->scope);
	if (err)
		goto out;
	seat->generation = ++last_generation;
	list_add_tail_rcu(&seat->list, &seats);
	WRITE_ONCE(nr_seats, nr_seats + 1);
	seat = NULL;
out:
	mutex_unlock(&seats_mutex);
	if (seat)
		free_seat(seat);
	return err;
}

static void policy_unreg(void *kdata, struct bpf_link *link)
{
	struct hypertier_policy *policy = kdata;
	struct seat *seat;

	mutex_lock(&seats_mutex);
	seat = find_seat(policy->cgroup_id);
	if (WARN_ON_ONCE(!seat)) {
		mutex_unlock(&seats_mutex);
		return;
	}
	list_del_rcu(&seat->list);
	WRITE_ONCE(nr_seats, nr_seats - 1);
	last_generation++;
	/* Nobody finds the seat any more, then nobody is in a callback: both are freed when we return. */
	synchronize_srcu(&seats_srcu);
	synchronize_srcu(&seat->srcu);
	/* a killed loader closes its files in any order, the device among them */
	if (ht_device_is_open() && !(current->flags & PF_EXITING))
		call_exit(policy, &seat->scope, TIER_EXIT_UNLOADED, "unloaded");
	else
		call_exit(policy, &seat->scope, TIER_EXIT_LOADER_GONE, "tierd is gone");
	mutex_unlock(&seats_mutex);
	free_seat(seat);
}

static int policy_update(void *kdata, void *old_kdata, struct bpf_link *link)
{
	struct hypertier_policy *policy = kdata, *old = old_kdata;
	struct seat *seat;
	int err;

	/* The link stands for its seat: a policy for another scope needs its own. */
	if (policy->cgroup_id != old->cgroup_id)
		return -EINVAL;

	mutex_lock(&seats_mutex);
	seat = find_seat(policy->cgroup_id);
	if (WARN_ON_ONCE(!seat)) {
		err = -ENOENT;
		goto out;
	}
	err = call_init(policy, &seat->scope);
	if (err)
		goto out;	/* the old one never left */
	rcu_assign_pointer(seat->policy, policy);
	WRITE_ONCE(seat->generation, ++last_generation);
	/* As in policy_unreg(): the caller drops the old one's map. */
	synchronize_srcu(&seat->srcu);
	call_exit(old, &seat->scope, TIER_EXIT_REPLACED, "replaced by a hot swap");
out:
	mutex_unlock(&seats_mutex);
	return err;
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
	struct hypertier_policy *policy;
	struct seat *seat;
	int srcu;
	u32 nr;
	u32 done;
	u64 start_ns;
	u64 end_ns;	/* U64_MAX: no bound */
};

/*
 * The arguments lie in memory that tierd has mapped: what is checked is read
 * once, and the scope is shown to the policy as it is.
 */
static int enter(struct turn *turn, struct ht_run *run, u32 run__sz, u32 entries__sz,
		 size_t entry_size)
{
	u64 budget_ns, seat;
	int looking;

	if (run__sz < sizeof(*run))
		return -EINVAL;
	turn->nr = READ_ONCE(run->nr);
	turn->done = 0;
	run->done = 0;
	run->policy_ns = 0;
	run->generation = 0;
	if (turn->nr > entries__sz / entry_size)
		return run->status = -EINVAL;

	seat = READ_ONCE(run->seat);
	looking = srcu_read_lock(&seats_srcu);
	turn->seat = find_seat(seat ?: READ_ONCE(run->scope.cgroup_id));
	if (turn->seat)
		turn->srcu = srcu_read_lock(&turn->seat->srcu);
	srcu_read_unlock(&seats_srcu, looking);
	if (!turn->seat)
		return run->status = -ENOENT;
	/*
	 * generation before policy: update() writes them the other way round,
	 * so a run never claims a newer generation than it used.
	 */
	run->generation = READ_ONCE(turn->seat->generation);
	smp_rmb();
	turn->policy = srcu_dereference(turn->seat->policy, &turn->seat->srcu);
	run->status = 0;
	turn->start_ns = ktime_get_ns();
	budget_ns = READ_ONCE(run->budget_ns);
	turn->end_ns = budget_ns ? turn->start_ns + budget_ns : U64_MAX;
	return 0;
}

/* After each callback: is there time for the next one? */
static bool in_time(struct turn *turn, struct ht_run *run)
{
	/* No lock but SRCU is held; a long run must not delay RCU tasks. */
	if (!(turn->done & 255))
		cond_resched_tasks_rcu_qs();
	if (turn->end_ns == U64_MAX || ktime_get_ns() <= turn->end_ns)
		return true;
	run->status = -ETIME;
	return false;
}

static int leave(struct turn *turn, struct ht_run *run)
{
	run->done = turn->done;
	run->policy_ns = ktime_get_ns() - turn->start_ns;
	srcu_read_unlock(&turn->seat->srcu, turn->srcu);
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
		if (!in_time(&turn, run))
			return leave(&turn, run);
	}
	while (turn.policy->classify && turn.done < turn.nr) {
		struct tier_range *range = &ranges[turn.done];

		turn.policy->classify(range, &run->scope);
		if (READ_ONCE(range->action) >= TIER_ACTIONS) {
			range->action = TIER_KEEP;
			run->status = -EINVAL;
			break;
		}
		turn.done++;
		if (!in_time(&turn, run))
			break;
	}
	if (!turn.policy->classify)
		turn.done = turn.nr;
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
		if (!in_time(&turn, run))
			break;
	}
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
		if (!in_time(&turn, run))
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
