/* SPDX-License-Identifier: GPL-2.0-only */
/*
 * The range maps and the way of one sample into them. A header, so that the
 * perf_event program and the logic tests' SYSCALL program run the same code.
 *
 * Finding a granule. ht_index, a hash, is the truth: (space, granule) -> slot.
 * Its lookup costs more than everything else together, so ht_hints stands
 * before it: a table of slots by a cheap function of the key, in which
 * neighbouring granules are neighbours. A hint is never trusted: the slot's own
 * key, in the line that is counted in anyway, must match, else the hash is asked
 * and the hint replaced. Hints are 0 at first and when cleared: slot 0 is never
 * given to a granule, so that such a hint never matches.
 *
 * A sample of a known granule costs two atomic adds, three for a store, and
 * touches these cache lines: ht_control and the hint (read-mostly), the granule's
 * header and the page's word. Nothing here depends on the footprint. What is
 * counted is not counted again as a total: that is the sum of the granules.
 *
 * Who may be interrupted by whom. Samples come from NMI, from interrupts or from
 * the scheduler; perf runs no BPF program on a CPU where another tracing
 * program is running or where a bpf(2) map operation holds a lock
 * (bpf_prog_active), so on one CPU this code never nests in itself nor in
 * tierd's deletes, and per-CPU data needs no atomics.
 *
 * Life of a slot. It is in exactly one place: the free ring, a CPU's spare
 * (below), the index, or with tierd, which has deleted key and hint and returns
 * it to the ring only when no sampler can hold it any more (slots.hpp). Slots
 * from the ring are taken by one cmpxchg of a cursor that only grows, so there
 * is no ABA. When the insert of the key fails (another CPU was first, or the
 * hash is busy), the slot becomes this CPU's spare, and the CPU's next new
 * granule uses the spare instead of the ring: a CPU has at most one, and none
 * leaks.
 */
#ifndef HYPERTIER_SAMPLER_H
#define HYPERTIER_SAMPLER_H

#include "vmlinux.h"
#include <bpf/bpf_helpers.h>
#include <hypertier/abi.h>

#define HT_EEXIST 17
#define HT_MEM_OP_STORE 0x04 /* PERF_MEM_OP_STORE, of data_src */

/* tierd sets the real size of all of them before it loads the object. */
#define HT_GRANULES_DEFAULT 8192

/* A global, not a map of its own: its address is a constant of the program. */
struct ht_control ht_control SEC(".data.control") __attribute__((aligned(64)));

/* Slots by HT_HINT(), a power of two of them. Resized together with the mask. */
__u32 ht_hints[HT_GRANULES_DEFAULT] SEC(".data.hints") __attribute__((aligned(64)));
const volatile __u32 ht_hint_mask = HT_GRANULES_DEFAULT - 1;

/* Neighbours of one space never meet, spaces start at scattered places. */
#define HT_HINT(space, granule) ((__u32)(granule) + (__u32)(space) * 0x9e3779b1U)

struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(max_entries, HT_GRANULES_DEFAULT);
	__type(key, struct ht_granule_key);
	__type(value, __u32);
} ht_index SEC(".maps");

/* Both sets in one map, set 0 of a slot beside set 1 of it: HT_ENTRY(). */
struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(map_flags, BPF_F_MMAPABLE);
	__uint(max_entries, 2 * HT_GRANULES_DEFAULT);
	__type(key, __u32);
	__type(value, struct ht_granule);
} ht_granules SEC(".maps");

/* Slots touched in the epoch, in order: entry HT_ENTRY(set, i). */
struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(map_flags, BPF_F_MMAPABLE);
	__uint(max_entries, 2 * HT_GRANULES_DEFAULT);
	__type(key, __u32);
	__type(value, __u64); /* slot: an ARRAY strides by 8 bytes in any case */
} ht_changed SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(map_flags, BPF_F_MMAPABLE);
	__uint(max_entries, HT_GRANULES_DEFAULT);
	__type(key, __u32);
	__type(value, __u64); /* slot */
} ht_free SEC(".maps");

#define HT_ENTRY(set, index) ((index) * 2 + (set))
#define HT_ENTRY_SET(entry) ((entry) & 1)
#define HT_ENTRY_INDEX(entry) ((entry) / 2)

struct ht_drops {
	__u64 dropped_total[HT_DROPS];
};

struct {
	__uint(type, BPF_MAP_TYPE_PERCPU_ARRAY);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, struct ht_drops);
} ht_drops SEC(".maps");

/* Slot + 1 that this CPU took but could not insert; 0: none. */
struct {
	__uint(type, BPF_MAP_TYPE_PERCPU_ARRAY);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, __u32);
} ht_spare SEC(".maps");

static const __u32 ht_zero;

static __always_inline struct ht_granule *ht_granule(__u32 set, __u32 slot)
{
	__u32 entry = HT_ENTRY(set, slot);

	return bpf_map_lookup_elem(&ht_granules, &entry);
}

/* A free slot, or -HT_DROP_*. */
static __always_inline long ht_take_slot(__u32 *spare)
{
	__u64 head, *slot;
	__u32 index;

	if (*spare)
		return *spare - 1;
	head = ht_control.free_head;
	/* x86 keeps loads in order: entries below free_tail are written */
	if (head >= *(volatile __u64 *)&ht_control.free_tail)
		return -HT_DROP_FULL;
	index = head & (ht_control.capacity - 1);
	slot = bpf_map_lookup_elem(&ht_free, &index);
	if (!slot)
		return -HT_DROP_FULL;
	/* the entry may be reused as soon as the cursor has passed it: read first */
	index = *(volatile __u64 *)slot;
	if (__sync_val_compare_and_swap(&ht_control.free_head, head, head + 1) != head)
		return -HT_DROP_BUSY;
	return index;
}

/* The first sample of a granule. Its slot, or -HT_DROP_*. */
static __always_inline long ht_new_granule(struct ht_granule_key *key)
{
	__u32 *spare = bpf_map_lookup_elem(&ht_spare, &ht_zero);
	struct ht_granule *granule;
	__u32 slot, set, *found;
	long taken, err;

	if (!spare)
		return -HT_DROP_BUSY;
	taken = ht_take_slot(spare);
	if (taken < 0)
		return taken;
	slot = taken;

	/* the key is in place before the index shows the slot to anybody */
	for (set = 0; set < 2; set++) {
		granule = ht_granule(set, slot);
		if (!granule)
			return -HT_DROP_FULL;
		granule->granule = key->granule;
		granule->space = key->space;
	}

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

static __always_inline bool ht_holds(struct ht_granule *granule, __u64 space, __u64 number)
{
	return granule && granule->granule == number && granule->space == space;
}

#define HT_FIND_TRIES 3

/*
 * Asks the index, where the hint was wrong. A slot, or -HT_DROP_*. Another CPU
 * may take the same free slot, insert the same granule, or free the element
 * that was found (the hash hands a deleted one out again at once, so a lookup
 * that races a delete may return the slot of another granule): asked again.
 */
static __noinline long ht_find(__u64 space, __u64 granule)
{
	struct ht_granule_key key = { .space = space, .granule = granule };
	long slot = -HT_DROP_BUSY;

	for (int tries = 0; tries < HT_FIND_TRIES; tries++) {
		__u32 *found = bpf_map_lookup_elem(&ht_index, &key);

		slot = found ? *found : ht_new_granule(&key);
		if (slot < 0 && slot != -HT_DROP_BUSY)
			break;
		if (slot >= 0 && ht_holds(ht_granule(0, slot), space, granule)) {
			ht_hints[HT_HINT(space, granule) & ht_hint_mask] = slot;
			return slot;
		}
		slot = -HT_DROP_BUSY;
	}
	return slot;
}

/* Out of the way of the samples that count. */
static __noinline int ht_drop(enum ht_drop reason)
{
	struct ht_drops *drops = bpf_map_lookup_elem(&ht_drops, &ht_zero);

	if (drops && reason < HT_DROPS)
		drops->dropped_total[reason]++;
	return 0;
}

/*
 * Counts one sample; the return value says whether it was (tests). data_src is
 * perf's, read only where it is needed.
 */
static __always_inline int ht_count(__u64 space, __u64 address, const __u64 *data_src)
{
	struct ht_granule *granule;
	__u32 set, slot, word;
	__u64 number;

	if (!ht_control.enabled)
		return 0;
	if (!address)
		return ht_drop(HT_DROP_NO_ADDRESS);
	number = address >> HT_GRANULE_SHIFT;
	set = *(volatile __u32 *)&ht_control.active;
	slot = *(volatile __u32 *)&ht_hints[HT_HINT(space, number) & ht_hint_mask];
	granule = ht_granule(set, slot);
	/* no granule is held by space 0, nor lies in the kernel's half */
	if (!ht_holds(granule, space, number)) {
		long found;

		if ((__s64)address < 0)
			return ht_drop(HT_DROP_KERNEL_ADDRESS);
		if (!space)
			return ht_drop(HT_DROP_NO_SPACE);
		found = ht_find(space, number);
		if (found < 0)
			return ht_drop(-found);
		granule = ht_granule(ht_control.active, found);
		if (!ht_holds(granule, space, number)) /* freed since */
			return ht_drop(HT_DROP_BUSY);
	}

	word = (address >> (HT_PAGE_SHIFT + 1)) & (HT_GRANULE_PAGES / 2 - 1);
	__sync_fetch_and_add(&granule->pages[word], 1U << (address >> (HT_PAGE_SHIFT - 4) & 16));
	if (*data_src & HT_MEM_OP_STORE)
		__sync_fetch_and_add(&granule->stores, 1);
	if (!__sync_fetch_and_add(&granule->samples, 1)) {
		/* the first one of this epoch: nobody else saw 0, so it is listed once */
		__u32 entry = granule->entry;
		__u32 at = HT_ENTRY_SET(entry);
		__u64 *listed;

		at = HT_ENTRY(at, __sync_fetch_and_add(&ht_control.changed[at], 1));
		listed = bpf_map_lookup_elem(&ht_changed, &at);
		if (listed)
			*listed = HT_ENTRY_INDEX(entry);
	}
	return 1;
}

#endif /* HYPERTIER_SAMPLER_H */
