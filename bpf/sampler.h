/* SPDX-License-Identifier: GPL-2.0-only */
/*
 * The range maps and the way of one sample into them. A header, so that the
 * perf_event program and the logic tests' SYSCALL program run the same code.
 *
 * A sample of a known granule costs a hash lookup and two atomic adds, three
 * for a store, and touches these cache lines: ht_control (read-mostly), this
 * CPU's statistics, hash bucket and element (read-mostly), the granule's header
 * and the page's word. Nothing here depends on the footprint.
 *
 * Who may be interrupted by whom. Samples come from NMI, from interrupts or from
 * the scheduler; perf runs no BPF program on a CPU where another tracing
 * program is running or where a bpf(2) map operation holds a lock
 * (bpf_prog_active), so on one CPU this code never nests in itself nor in
 * tierd's deletes, and per-CPU data needs no atomics.
 *
 * Life of a slot. It is in exactly one place: the free ring, a CPU's spare
 * (below), the index, or with tierd, which has deleted its key and returns it
 * to the ring only when no sampler can hold it any more. Slots from the ring
 * are taken by one cmpxchg of a cursor that only grows, so there is no ABA.
 * When the insert of the key fails (another CPU was first, or the hash is
 * busy), the slot becomes this CPU's spare, and the CPU's next new granule
 * uses the spare instead of the ring: a CPU has at most one, and none leaks.
 *
 * A preallocated hash hands a deleted element out again at once, so a lookup
 * that races a delete may return the slot of another granule. The slot's own
 * key, in the line that is counted in anyway, tells: such a sample is dropped
 * as BUSY rather than counted for somebody else.
 */
#ifndef HYPERTIER_SAMPLER_H
#define HYPERTIER_SAMPLER_H

#include "vmlinux.h"
#include <bpf/bpf_helpers.h>
#include <hypertier/abi.h>

#define HT_EEXIST 17

/* tierd sets the real size of all of them before it loads the object. */
#define HT_GRANULES_DEFAULT 8192

struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(map_flags, BPF_F_MMAPABLE);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, struct ht_control);
} ht_control SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(max_entries, HT_GRANULES_DEFAULT);
	__type(key, struct ht_granule_key);
	__type(value, __u32);
} ht_index SEC(".maps");

struct granules {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(map_flags, BPF_F_MMAPABLE);
	__uint(max_entries, HT_GRANULES_DEFAULT);
	__type(key, __u32);
	__type(value, struct ht_granule);
};
struct granules ht_granules0 SEC(".maps");
struct granules ht_granules1 SEC(".maps");

/* Slot numbers, 8 bytes each: an ARRAY's stride in memory, whatever its value. */
struct slots {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(map_flags, BPF_F_MMAPABLE);
	__uint(max_entries, HT_GRANULES_DEFAULT);
	__type(key, __u32);
	__type(value, __u64);
};
struct slots ht_changed0 SEC(".maps");
struct slots ht_changed1 SEC(".maps");
struct slots ht_free SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_PERCPU_ARRAY);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, struct ht_sampler_stats);
} ht_stats SEC(".maps");

/* Slot + 1 that this CPU took but could not insert; 0: none. */
struct {
	__uint(type, BPF_MAP_TYPE_PERCPU_ARRAY);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, __u32);
} ht_spare SEC(".maps");

static const __u32 ht_zero;

/* A free slot, or -HT_DROP_*. */
static __always_inline long ht_take_slot(struct ht_control *control, __u32 *spare)
{
	__u64 head;
	__u64 *slot;
	__u32 index;

	if (*spare)
		return *spare - 1;
	head = control->free_head;
	/* x86 keeps loads in order: entries below free_tail are written */
	if (head >= *(volatile __u64 *)&control->free_tail)
		return -HT_DROP_FULL;
	index = head & (control->capacity - 1);
	slot = bpf_map_lookup_elem(&ht_free, &index);
	if (!slot)
		return -HT_DROP_FULL;
	/* the entry may be reused as soon as the cursor has passed it: read first */
	index = *(volatile __u64 *)slot;
	if (__sync_val_compare_and_swap(&control->free_head, head, head + 1) != head)
		return -HT_DROP_BUSY;
	return index;
}

/* The first sample of a granule. Its slot, or -HT_DROP_*. */
static __noinline long ht_new_granule(struct ht_granule_key *key)
{
	struct ht_control *control = bpf_map_lookup_elem(&ht_control, &ht_zero);
	__u32 *spare = bpf_map_lookup_elem(&ht_spare, &ht_zero);
	struct ht_granule *granule;
	__u32 slot, *found;
	long taken, err;

	if (!control || !spare || !key)
		return -HT_DROP_BUSY;
	taken = ht_take_slot(control, spare);
	if (taken < 0)
		return taken;
	slot = taken;

	/* the key is in place before the index shows the slot to anybody */
	granule = bpf_map_lookup_elem(&ht_granules0, &slot);
	if (!granule)
		return -HT_DROP_FULL;
	granule->space = key->space;
	granule->granule = key->granule;
	granule = bpf_map_lookup_elem(&ht_granules1, &slot);
	if (!granule)
		return -HT_DROP_FULL;
	granule->space = key->space;
	granule->granule = key->granule;

	err = bpf_map_update_elem(&ht_index, key, &slot, BPF_NOEXIST);
	if (!err) {
		*spare = 0;
		return slot;
	}
	*spare = slot + 1;
	if (err == -HT_EEXIST) {
		found = bpf_map_lookup_elem(&ht_index, key);
		if (found)
			return *found;
	}
	return -HT_DROP_BUSY;
}

static __always_inline int ht_drop(struct ht_sampler_stats *stats, enum ht_drop reason)
{
	stats->dropped_total[reason]++;
	return 0;
}

/* Counts one sample; the return value says whether it was (tests). */
static __always_inline int ht_count(__u64 space, __u64 address, bool store)
{
	struct ht_control *control = bpf_map_lookup_elem(&ht_control, &ht_zero);
	struct ht_sampler_stats *stats;
	struct ht_granule_key key;
	struct ht_granule *granule;
	__u32 slot, page, set, index, *found;
	__u64 *entry;

	if (!control || !control->enabled)
		return 0;
	stats = bpf_map_lookup_elem(&ht_stats, &ht_zero);
	if (!stats)
		return 0;
	stats->samples_total++;
	if (!address)
		return ht_drop(stats, HT_DROP_NO_ADDRESS);
	if ((__s64)address < 0)
		return ht_drop(stats, HT_DROP_KERNEL_ADDRESS);
	if (!space)
		return ht_drop(stats, HT_DROP_NO_SPACE);

	key.space = space;
	key.granule = address >> HT_GRANULE_SHIFT;
	found = bpf_map_lookup_elem(&ht_index, &key);
	if (found) {
		slot = *found;
	} else {
		long made = ht_new_granule(&key);

		if (made < 0) {
			/* -HT_DROP_BUSY or -HT_DROP_FULL */
			return ht_drop(stats, made == -HT_DROP_FULL ? HT_DROP_FULL : HT_DROP_BUSY);
		}
		slot = made;
	}

	set = *(volatile __u32 *)&control->active & 1;
	if (set)
		granule = bpf_map_lookup_elem(&ht_granules1, &slot);
	else
		granule = bpf_map_lookup_elem(&ht_granules0, &slot);
	if (!granule || granule->space != key.space || granule->granule != key.granule)
		return ht_drop(stats, HT_DROP_BUSY);

	page = (address >> HT_PAGE_SHIFT) & (HT_GRANULE_PAGES - 1);
	__sync_fetch_and_add(&granule->pages[page / 2], page & 1 ? 1 << 16 : 1);
	if (store)
		__sync_fetch_and_add(&granule->stores, 1);
	if (__sync_fetch_and_add(&granule->samples, 1))
		return 1;

	/* the first one of this epoch: nobody else saw 0, so it is listed once */
	index = __sync_fetch_and_add(&control->changed[set], 1);
	entry = set ? bpf_map_lookup_elem(&ht_changed1, &index) : bpf_map_lookup_elem(&ht_changed0, &index);
	if (entry)
		*entry = slot;
	return 1;
}

#endif /* HYPERTIER_SAMPLER_H */
