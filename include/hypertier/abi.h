/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/*
 * The one definition of every struct that crosses a border: sampler (BPF),
 * policies (BPF), hypertier.ko and tierd (C++). Plain C, fixed layout, 8-byte
 * aligned members first. Units are in the names: *_pages are 4 KiB pages,
 * *_bytes bytes, *_ns nanoseconds, counts are samples.
 *
 * Rules: structs grow at their end only; a change that is not of that kind
 * raises HT_ABI_MAJOR. Policies read tier_* structs through CO-RE, everything
 * else is read by the exact layout and guarded by HT_ABI.
 */
#ifndef HYPERTIER_ABI_H
#define HYPERTIER_ABI_H

#if defined(__KERNEL__)
#include <linux/types.h>
#include <linux/ioctl.h>
#elif !defined(__bpf__) /* BPF: types come from vmlinux.h or policy.bpf.h */
#include <linux/types.h>
#include <linux/ioctl.h>
#endif

#define HT_ABI_MAJOR 1
#define HT_ABI_MINOR 0
#define HT_ABI ((HT_ABI_MAJOR << 16) | HT_ABI_MINOR)
#define HT_VERSION "0.1.0"

#define HT_PAGE_SHIFT 12
#define HT_PAGE_SIZE (1UL << HT_PAGE_SHIFT)
#define HT_GRANULE_SHIFT 21
#define HT_GRANULE_SIZE (1UL << HT_GRANULE_SHIFT)
#define HT_GRANULE_PAGES 512

/* "not known" in 64-bit and 32-bit fields */
#define HT_UNKNOWN64 (~0ULL)
#define HT_UNKNOWN32 (~0U)

/* ------------------------------------------------------------------ tiers */

enum ht_tier {
	HT_TIER_FAST = 0,
	HT_TIER_SLOW = 1,
	HT_TIERS = 2,
	HT_TIER_NONE = 255,
};

/* --------------------------------------------------------------- sampling */

/*
 * A granule: 2 MiB of one address space, counted as a whole and by page.
 * BPF atomics are 4 or 8 bytes, so two 16-bit page counts share a word: page
 * 2i in the low half of pages[i], page 2i+1 in the high half. Safe below
 * 65,536 samples a page and epoch.
 */
struct ht_granule {
	__u64 space;	/* address space id, see below */
	__u64 granule;	/* virtual address >> HT_GRANULE_SHIFT */
	__u32 samples;
	__u32 stores;
	__u32 pages[HT_GRANULE_PAGES / 2];
	__u32 entry;	/* its own place in ht_granules, by set and slot */
	__u32 _pad[9];	/* whole cache lines: a header never straddles two */
};

/*
 * A space is one mm for its whole life: mm->context.ctx_id, which x86 never
 * reuses. CLONE_VM and vfork share it, fork and exec get a new one.
 */
struct ht_granule_key {
	__u64 space;
	__u64 granule;
};

/* Why a sample was not counted. */
enum ht_drop {
	HT_DROP_NO_ADDRESS,	/* the PMU delivered address 0 */
	HT_DROP_KERNEL_ADDRESS,	/* not a user address */
	HT_DROP_NO_SPACE,	/* a task without an mm */
	HT_DROP_BUSY,		/* new granule, but its hash bucket was locked */
	HT_DROP_FULL,		/* no free granule: raise tierd --granules */
	HT_DROPS,
};

/* The sampler in numbers, all CPUs together; monotonic. */
struct ht_sampler_stats {
	__u64 samples_total;	/* counted (as drained) and dropped */
	__u64 dropped_total[HT_DROPS];
};

/*
 * Shared by sampler and tierd (mmap). Granule slots stay with their key while
 * the granule lives; counts exist twice (set 0 and 1), so that tierd folds one
 * set while the sampler fills the other. ht_changed lists the slots touched in
 * this epoch. Free slots come from a ring that only tierd fills.
 */
struct ht_control {
	/* read by every sample */
	__u32 enabled;
	__u32 active;		/* set that the sampler fills: 0 or 1 */
	__u32 capacity;		/* slots, = size of every ring and set */
	__u32 _pad0[13];
	/* written on the first touch of a granule only */
	__u32 changed[2];	/* entries used in ht_changed, by set */
	__u32 _pad1[14];
	__u64 free_head;	/* next free-ring entry to take (sampler) */
	__u64 free_tail;	/* one past the last filled (tierd) */
};

/*
 * What reading the accessed bits of a granule told: the bits were cleared, and
 * tested interval_ns later. Bit i of checked and set is page i; a page that is
 * not checked was not mapped both times.
 */
struct ht_bits {
	__u64 space;
	__u64 granule;
	__u64 interval_ns;
	__u64 checked[HT_GRANULE_PAGES / 64];
	__u64 set[HT_GRANULE_PAGES / 64];
	__u32 huge;	/* 1: a PMD maps it, its one bit stands for all pages */
	__u32 _pad;
};

/* ---------------------------------------------------- processes (sampler) */

enum ht_space_event_kind {
	HT_SPACE_TASK,	/* found by the iterator: it already ran */
	HT_SPACE_FORK,
	HT_SPACE_EXEC,
	HT_SPACE_EXIT,	/* the last thread of the group is gone */
	HT_SPACE_MOVED,	/* to another cgroup */
	HT_SPACE_CGROUP_GONE,	/* a cgroup was removed: cgroup_id only */
};

struct ht_space_event {
	__u64 space;		/* after the event; EXIT: the one left behind, 0 if unknown */
	__u64 cgroup_id;	/* cgroup v2 id */
	__u32 pid;		/* thread group id, initial pid namespace */
	__u32 kind;		/* enum ht_space_event_kind */
	char comm[16];
};

/* ----------------------------------------------------------------- policy */

#define HT_SCALES 4	/* half-lives of count[]: 1, 8, 48, 256 epochs */
#define HT_COUNT_SHIFT 8	/* count[] is in 1/256 samples */

enum tier_action {
	TIER_KEEP = 0,
	TIER_SPLIT = 1,	/* at the midpoint, from the next epoch on */
	TIER_MERGE = 2,	/* with a neighbour that says TIER_MERGE too */
	TIER_ACTIONS,
	/*
	 * In admit only, as hot->action with the answer false: not now, but watch
	 * both sides for some epochs and say what the swap would have brought
	 * (trial_* of the scope). Admitted pairs are watched as well.
	 */
	TIER_TRY = 16,
};

enum tier_range_flags {
	TIER_RANGE_ROOT = 1 << 0,	/* the whole of its mapping: no neighbours */
	TIER_RANGE_ANON = 1 << 1,	/* private anonymous memory */
	TIER_RANGE_SHMEM = 1 << 2,
	TIER_RANGE_FILE = 1 << 3,
	TIER_RANGE_HUGE = 1 << 4,	/* mostly mapped by huge pages, if residency is known */
	TIER_RANGE_MIN = 1 << 5,	/* at the minimum size: a split is not carried out */
	TIER_RANGE_COMING = 1 << 6,	/* hot side of a pair: stands for memory that is yet to be allocated,
					 * and for which the cold side makes room */
	TIER_RANGE_SPLIT = 1 << 7,	/* pair in admit: would it pay to take a huge page apart, so that its hot part
					 * is placed by itself? hot: mapped_pages and rate of that part, seen in
					 * epochs after it was chosen; cold: what they bring if it stays whole,
					 * for each page of the part */
	TIER_RANGE_SCATTERED = 1 << 8,	/* not all of [start, end), but mapped_pages of it that are alike: others of
					 * the same stretch are ranges of their own */
	TIER_RANGE_BACK = 1 << 9,	/* hot side of a pair: a page of either side was moved here in one of the last
					 * twelve epochs, and would go back */
};

/*
 * One range of one address space, as a policy sees it. heat and action are the
 * only fields a policy may write.
 */
struct tier_range {
	__u64 start;		/* bytes, first address, page aligned */
	__u64 end;		/* bytes, one past the last */
	__u64 space;		/* address space id */
	__u64 mapped_pages;	/* (end - start) / 4 KiB; flag SCATTERED: pages that belong to it */
	__u64 tier_pages[HT_TIERS]; /* resident, per tier; HT_UNKNOWN64 before the first walk */
	__u32 pid;		/* a thread group that owns the space */
	__u32 flags;		/* enum tier_range_flags */
	__u32 samples;		/* this epoch, raw */
	__u32 stores;		/* those of samples that are stores */
	__u32 count[HT_SCALES];	/* decayed: count = count * 2^(-1/h) + samples, in 1/256 samples */
	__u32 left_count;	/* count[0] of the range before it in the same mapping; HT_UNKNOWN32: none */
	__u32 right_count;	/* the same, after it */
	__u32 age_epochs;	/* since it was made (by mapping, split or merge); flag ESTIMATED: since its
				 * oldest memory was first seen */
	__u32 idle_epochs;	/* since its last sample */
	__u32 walk_epochs;	/* age of tier_pages; HT_UNKNOWN32 before the first walk */
	__u32 mapping;		/* engine's id of the mapping it belongs to */
	/* written by the policy */
	__u32 heat;		/* the only ranking key: higher is hotter */
	__u32 action;		/* enum tier_action */
	/* estimates of the engine */
	__u32 rate;		/* flag ESTIMATED: what may be expected, from what pages with the same
				 * estimate had lately: 1/64 samples (at the scope's period) per epoch
				 * and GiB; else 0 */
	__u32 uneven;		/* relative variance of heat inside, beyond chance, in 1/256: a lower bound.
				 * 0: even, or too few samples to tell. Units: granules; pages if
				 * the range is no larger than one. */
};

/* One scope: the whole guest (cgroup_id 1), or a cgroup with its own seat. */
struct tier_scope {
	__u64 cgroup_id;
	__u64 epoch;		/* number of the epoch that ended, from 1 */
	__u64 epoch_ns;		/* its length, measured */
	__u64 fast_capacity_pages; /* what the scope may use of the fast tier */
	__u64 tier_pages[HT_TIERS]; /* used by its processes, anonymous and file */
	__u64 samples;		/* this epoch */
	__u64 fast_tier_pages;	/* size of the whole fast tier */
	__u32 ranges;
	__u32 processes;
	__u32 cpus;		/* online */
	__u32 period;		/* misses per sample in this epoch: a CPU budget and bursts change it;
				 * 0: the source counts none (abit) */
	/* pairs on trial that count in this epoch: 4 KiB pages, by the tier they were in,
	 * and the samples they had in this one */
	__u64 trial_pages[HT_TIERS];
	__u64 trial_hits[HT_TIERS];
	__u64 swap_ns;		/* measured cost of a pair of 4 KiB moves, CPU time; 0: none was made yet */
	/* since the policy was asked last: pages that were moved, and those of them that
	 * came back into the tier which they had left some epochs before */
	__u64 moved_pages;
	__u64 moved_back_pages;
};

/* Result of what was moved for one range in an epoch (callback moved). */
struct tier_result {
	struct tier_range range;
	__u32 promoted_pages;
	__u32 demoted_pages;
	__u32 failed_pages;
	__u32 refused_pages;	/* by admit */
};

enum tier_exit_kind {
	TIER_EXIT_NONE = 0,
	TIER_EXIT_UNLOADED,	/* asked for: unload, restore, clean stop */
	TIER_EXIT_REPLACED,	/* hot swap */
	TIER_EXIT_EJECTED,	/* broke a rule; see code */
	TIER_EXIT_CGROUP_REMOVED,
	TIER_EXIT_LOADER_GONE,	/* tierd died */
};

enum tier_exit_code {
	TIER_CODE_OK = 0,
	TIER_CODE_TIMEOUT = 1,
	TIER_CODE_INVALID_ACTION = 2,
	TIER_CODE_BUDGET = 3,	/* asks, epoch after epoch, for more moves than it may and takes them back */
	TIER_CODE_NEVER_CLASSIFIES = 4, /* gives neither heat nor action, though there are samples */
	TIER_CODES,
};

struct tier_exit_info {
	__u32 kind;	/* enum tier_exit_kind */
	__u32 code;	/* enum tier_exit_code */
	__u64 epoch;
	char message[128];
};

enum hypertier_policy_flags {
	HT_POLICY_ESTIMATED = 1 << 0,	/* wants estimated ranges, which it neither splits nor merges */
	HT_POLICY_NO_MOVES = 1 << 1,	/* classifies only; nothing is planned */
	HT_POLICY_FLAGS = HT_POLICY_ESTIMATED | HT_POLICY_NO_MOVES,
};

/* ------------------------------------- kfunc arguments (SYSCALL programs) */

/*
 * Every kfunc below is called by one SYSCALL program of bpf/mover.bpf.c, its
 * arguments are the values of mmapable one-entry ARRAY maps: one call, no copy.
 */
#define HT_RANGES_MAX 65536
#define HT_CALLS_MAX 256		/* scopes at once */
#define HT_CALL_RANGES 2048	/* entries a call of the policy takes; more go in several calls */
#define HT_CALL_PAIRS 1024
#define HT_CALL_RESULTS 1024
#define HT_WALKS_MAX 8192
#define HT_PAGES_MAX 262144
#define HT_PAIRS_MAX 65536
#define HT_SPACES_MAX 4096
#define HT_MAPPINGS_MAX 65536

/* hypertier_classify, hypertier_admit, hypertier_moved: header of the run */
struct ht_run {
	struct tier_scope scope; /* in */
	__u64 budget_ns;	/* in: time for all callbacks together; 0: no bound */
	__u32 nr;		/* in: entries used of the array beside it */
	__s32 status;		/* out: 0; -ENOENT: empty seat; -ETIME: over budget;
				 * -EINVAL: invalid action or header; -ECANCELED: ejected
				 * before, the seat waits for another policy */
	__u32 done;		/* out: entries handled by the policy */
	__u32 first;		/* in: entries of this epoch in calls before; epoch_begin is called at 0 */
	__u64 policy_ns;	/* out: time spent in callbacks */
	__u64 generation;	/* out: of the policy that answered */
	__u64 seat;		/* in: cgroup id of the seat that answers; 0: scope.cgroup_id */
	/*
	 * out: kind TIER_EXIT_EJECTED when the policy broke a rule, in this run or,
	 * status -ECANCELED, before; else TIER_EXIT_NONE
	 */
	struct tier_exit_info exit;
};

/* hypertier_admit: may the policy's scope swap pages of these ranges? */
struct tier_pair {
	struct tier_range hot;	/* in the slow tier */
	struct tier_range cold;	/* in the fast tier; start == end: free room, no partner */
	__u32 pages;		/* 4 KiB pages each way */
	__u32 admitted;		/* out: 0 or 1; 1 where the policy has no admit */
};

/*
 * The buffer between one scope and its policy: each scope has its own, so that
 * a slow policy holds up nobody else. A SYSCALL program gets its number.
 */
struct ht_call {
	struct ht_run run;
	union {
		struct tier_range ranges[HT_CALL_RANGES];
		struct tier_pair pairs[HT_CALL_PAIRS];
		struct tier_result results[HT_CALL_RESULTS];
	};
};

struct ht_call_number {
	__u32 number;
};

/* hypertier_mappings: what a space maps, read only where it changed */
struct ht_space_req {
	__u64 space;	/* in; 0: take what pid has and return it */
	__u64 seq;	/* in/out: change stamp; an equal one lists nothing (0 lists always) */
	__u64 tier_rss_pages; /* out: anonymous + shmem resident pages, both tiers */
	__u32 pid;	/* in */
	__s32 error;	/* out: 0, -ESRCH (gone, or another space by now), -ENOSPC (list full) */
	__u32 first;	/* out: slice of the mappings array; count 0 and seq equal: unchanged */
	__u32 count;
};

struct ht_spaces_run {
	__u32 nr;	/* in */
	__u32 used;	/* out: mappings used */
	struct ht_space_req req[HT_SPACES_MAX];
};

struct ht_mapping {
	__u64 start;
	__u64 end;
	__u32 flags;	/* TIER_RANGE_ANON, _SHMEM or _FILE */
	__u32 _pad;
};

/*
 * hypertier_walk: bounded page-table walk. Counts resident pages per tier in
 * [start, end) and lists those of one tier.
 */
struct ht_walk {
	__u64 space;		/* in */
	__u64 start;		/* in */
	__u64 end;		/* in */
	__u32 pid;		/* in */
	__u32 list_tier;	/* in: enum ht_tier; HT_TIER_NONE: count only; HT_TIERS: list both */
	__u32 list_max_pages;	/* in: stop when pages of so many 4 KiB are listed; 0: no bound */
	__u32 _pad;
	__u64 next;		/* out: where it stopped; == end when complete */
	__u64 tier_pages[HT_TIERS]; /* out */
	__u64 huge_pages;	/* out: those of tier_pages that a PMD maps, in 4 KiB */
	__u32 list_first;	/* out: slice of the pages array */
	__u32 list_count;	/* out */
	__s32 error;		/* out: 0, -ESRCH, -ENOSPC (pages array full: go on from next) */
	__u32 _pad2;
};

struct ht_walks_run {
	__u32 nr;	/* in */
	__u32 pages_used; /* out */
	__u64 ns;	/* out */
	struct ht_walk walk[HT_WALKS_MAX];
};

/* A page in a walk's list: page aligned address, folio order in the low bits. */
typedef __u64 ht_page_t;
#define HT_PAGE_ORDER_MASK 0x1fULL
#define HT_PAGE_FILE 0x20ULL	/* shmem or page cache: exchange cannot take it */
#define HT_PAGE_FAST 0x40ULL	/* in the fast tier; told where both tiers are listed */
#define HT_PAGE_ADDR(p) ((p) & ~(HT_PAGE_SIZE - 1))
#define HT_PAGE_ORDER(p) ((__u32)((p) & HT_PAGE_ORDER_MASK))

/* hypertier_exchange */
enum ht_move_result {
	HT_MOVE_NONE = 0,	/* not tried: no page asked for on this side */
	HT_MOVE_DONE,
	HT_MOVE_GONE,		/* nothing mapped there any more, or the space is gone */
	HT_MOVE_ALREADY,	/* is in the wanted tier already */
	HT_MOVE_PINNED,		/* extra references: pinned, or in use by the kernel */
	HT_MOVE_BUSY,		/* locked, isolated or under writeback */
	HT_MOVE_SPECIAL,	/* KSM, hugetlb, mlocked device or zero page, a file that others map too */
	HT_MOVE_MISMATCH,	/* partner of another size, and migrate not allowed */
	HT_MOVE_NO_MEMORY,	/* migrate found no room in the target tier */
	HT_MOVE_PARTNER,	/* the other half of the pair could not move */
	HT_MOVE_OTHER,
	HT_MOVE_RESULTS,
};

enum ht_mover {
	HT_MOVER_NONE = 0,
	HT_MOVER_EXCHANGE,
	HT_MOVER_MIGRATE,
	HT_MOVER_SYSCALL,
	HT_MOVERS,
};

/*
 * hot goes from slow to fast, cold from fast to slow. An address of 0 means
 * that side is empty: the other one goes by migrate (hot_pid of an empty hot side
 * is who the room is for; 0: nobody). Sides may be of different spaces. The
 * folio's order is found under the lock, not trusted.
 */
struct ht_pair {
	__u64 hot_space;
	__u64 hot_addr;
	__u64 cold_space;
	__u64 cold_addr;
	__u32 hot_pid;
	__u32 cold_pid;
	__u8 hot_result;	/* out: enum ht_move_result */
	__u8 cold_result;	/* out */
	__u8 mover;		/* out: enum ht_mover */
	__u8 _pad;
	__u32 user;		/* caller's tag, untouched (tierd: plan entry) */
};

enum ht_exchange_flags {
	HT_EXCHANGE_NO_SWAP = 1 << 0,	/* do not swap in place, migrate only */
	HT_EXCHANGE_NO_MIGRATE = 1 << 1,
	HT_EXCHANGE_SPLIT = 1 << 2,	/* hot sides are taken apart into single pages where they are; nothing moves */
};

struct ht_exchange_run {
	__u32 nr;		/* in: pairs */
	__u32 flags;		/* in: enum ht_exchange_flags */
	/* out, this call; pages are 4 KiB pages, one per direction */
	__u64 promoted_pages;
	__u64 demoted_pages;
	__u64 exchanged_pairs;	/* folio pairs swapped in place */
	__u64 mover_pages[HT_MOVERS];
	__u64 failed_pages[HT_MOVE_RESULTS];
	__u64 batches;
	__u64 flush_calls;	/* TLB flushes of a whole batch asked for by this call */
	__u64 ns;		/* CPU time of the thread that called, set by itself */
	__u64 split_pages;	/* of huge pages that were taken apart */
};

/*
 * hypertier_bits: reads accessed bits in two steps, each a run over the same
 * entries. Clearing says in bits.checked and bits.set what was mapped and had
 * been touched before; testing narrows checked to what was mapped both times
 * and says in set what was touched in between.
 */
#define HT_CHECKS_MAX 4096

enum ht_check_phase {
	HT_CHECK_CLEAR,
	HT_CHECK_TEST,
};

struct ht_check {
	struct ht_bits bits;	/* in: space, granule; the rest zero before clearing */
	__u64 cleared_ns;	/* out: CLOCK_MONOTONIC */
	__u32 pid;		/* in */
	__s32 error;		/* out: 0, -ESRCH (the space is gone), -EINVAL */
};

struct ht_bits_run {
	__u32 nr;		/* in */
	__u32 phase;		/* in: enum ht_check_phase */
	__u64 visits;		/* out: page-table entries read in this step */
	__u64 flush_calls;	/* out: TLB flushes, one for each process of which a bit was cleared */
	__u64 ns;		/* out: of this step */
	struct ht_check check[HT_CHECKS_MAX];
};

/* ------------------------------------------------------- /dev/hypertier */

/*
 * Opened by tierd, once (a second open: EBUSY). Closing it, by exit or by
 * kill -9, carries out what HT_IOC_RESTORE left behind.
 */
#define HT_DEVICE "/dev/hypertier"

struct ht_tiers {
	__u64 nodes[HT_TIERS];	/* node masks */
};

/* At close, write value to the open file fd (a sysctl or sysfs file). */
struct ht_restore {
	__s32 fd;
	__u32 length;
	char value[24];
};

struct ht_module_info {
	__u32 abi;
	__u32 movers;		/* 1 << enum ht_mover */
	__u64 seats;		/* policies attached now */
	char missing[112];	/* symbols that were not found, if any */
};

#define HT_IOC_INFO _IOR('H', 1, struct ht_module_info)
#define HT_IOC_TIERS _IOW('H', 2, struct ht_tiers)
#define HT_IOC_RESTORE _IOW('H', 3, struct ht_restore)
#define HT_IOC_FORGET _IO('H', 4)	/* drop what HT_IOC_RESTORE left behind */
/* Returns when no interrupt handler that ran before is running any more. */
#define HT_IOC_SETTLE _IO('H', 5)

/* What a seat holds, and why its policy was ejected, if it was. -ENOENT: empty. */
struct ht_seat {
	__u64 cgroup_id;	/* in */
	__u64 generation;	/* of the policy in it; HT_IOC_EJECT: in, -ESTALE if it has left */
	struct tier_exit_info exit; /* kind NONE: it runs; HT_IOC_EJECT: in, code and message */
	char name[32];
};
#define HT_IOC_SEAT _IOWR('H', 6, struct ht_seat)
#define HT_IOC_EJECT _IOW('H', 7, struct ht_seat) /* for rules that the engine watches */

#endif /* HYPERTIER_ABI_H */
