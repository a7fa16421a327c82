// SPDX-License-Identifier: GPL-2.0-only
/*
 * Moving pages between the tiers.
 *
 * Small pages that are mapped once go by their page-table entries (entries.c), most
 * of all moves. The rest goes by its folios, here:
 *
 * exchange: a hot folio in slow memory and a cold one in fast memory change
 * places. Both are unmapped (migration entries hold their users up), one TLB
 * flush serves the whole batch, their contents and identities are swapped,
 * and each one's users are mapped to the other. Nothing is allocated, both
 * nodes may be full.
 *
 * migrate: the kernel's own migrate_pages(), for what cannot be swapped in
 * place (page cache, swap cache, mlocked, unequal sizes) and for a side
 * without a partner. Demotions go first, so that promotions find room. A hot
 * huge page that finds no block of its size goes in pieces: its place is then
 * in many pages that were demoted for it. A cold one is left whole. The entries of
 * files' pages are dropped beforehand where they only read.
 *
 * split: a huge page is taken apart where it is (the kernel's own function), since
 * parts of it belong into different tiers. They are moved by exchange later.
 *
 * Why an exchange is consistent. Let A and B be the folios, a and b their
 * identities (contents, mapping, index, memcg, and the flags in SWAPPED).
 * - Nobody reaches A or B while identities change: they are off the LRU
 *   (PG_lru cleared, so page-table-less finders such as compaction, DAMON and
 *   page_idle pass), locked (rmap users wait), unmapped with the TLBs flushed
 *   (no access by user or device), and their reference counts are frozen at 0
 *   (no new reference, so no GUP). Freezing succeeds only if the references
 *   are ours: a pinned folio stays where it is.
 * - Users keep their rights: writable, exclusive, young, dirty, soft-dirty
 *   and userfaultfd-wp travel in the migration entries, as in any migration.
 *   PG_anon_exclusive is meaningful for mapped pages only and is set again
 *   from the entries; leftovers on unmapped pages are cleared.
 * - Counters by use (NR_ANON_MAPPED, NR_ANON_THPS, per node and memcg) go
 *   down at unmap with the old (memcg, node) and up at remap with the new
 *   one. LRU sizes go down at isolation and up at putback, the same way.
 *   NR_ISOLATED_ANON is per node, and each folio stays on its node.
 * - What counts pages and not places does not change, as both folios have
 *   the same size: memcg charges and css references (memcg_data says who is
 *   charged, A's charge becomes B's), rss of the mms, mTHP statistics.
 * - The deferred split queue is per memcg: a queued folio leaves it while
 *   frozen with its old memcg, and the folio with the same identity joins
 *   after. Partially mapped ones are not exchanged.
 * - Stays with the physical page: node, zone, last CPU (NUMA balancing is off
 *   while a policy is seated), page_owner's and allocation tags (debugging).
 */
#include <linux/gfp.h>
#include <linux/memcontrol.h>
#include <linux/mm_inline.h>
#include <linux/mmap_lock.h>
#include <linux/mmu_notifier.h>
#include <linux/mutex.h>
#include <linux/sched/mm.h>
#include <linux/userfaultfd_k.h>
#include <linux/vmstat.h>
#include <linux/wait.h>
#include <linux/workqueue.h>
#include <asm/tlbflush.h>

#include "module.h"

#define BATCH_PAIRS HT_ENTRIES_PAIRS	/* looked up together, and unmapped under one flush */
#define BATCH_PAGES 8192	/* 4 KiB pages unmapped at a time: users wait while they are copied */
#define DRAIN_WAIT_MS 100	/* for other CPUs, which takes less than 1 unless one is stuck */

/* The flags that belong to an identity, not to a physical page. */
#define SWAPPED                                                                               \
	(BIT(PG_referenced) | BIT(PG_uptodate) | BIT(PG_dirty) | BIT(PG_active) |             \
	 BIT(PG_workingset) | BIT(PG_young) | BIT(PG_idle) | LRU_REFS_MASK)

enum { HOT, COLD, SIDES };

struct side {
	struct folio *folio;	/* with a reference while not NULL */
	struct anon_vma *anon_vma;
	u32 pages;
	u8 result;		/* HT_MOVE_NONE: undecided, or not asked for */
	bool asked;
	bool listed;		/* given to migrate_pages(), which has dropped it: a name only */
};

enum plan { PLAN_NOTHING, PLAN_SWAP, PLAN_MIGRATE };

struct slot {
	struct ht_pair *pair;
	enum plan plan;
	bool unmapped;		/* both sides are isolated, locked and unmapped (or tried) */
	u8 mover;
	struct side side[SIDES];
};

/* One exchange at a time: it owns the slots. */
static DEFINE_MUTEX(move_mutex);
static struct slot slots[BATCH_PAIRS];

static const enum ht_tier source_tier[SIDES] = { HT_TIER_SLOW, HT_TIER_FAST };
static const enum ht_tier target_tier[SIDES] = { HT_TIER_FAST, HT_TIER_SLOW };

/* --------------------------------------------------------------- lookup */

/* What was looked into last, its mmap lock held: plans come by process and mapping. */
struct lookup {
	struct mm_struct *mm;
	struct vm_area_struct *vma;
	u64 space;
	bool drops;		/* entries of mm: they may be in a TLB still */
	u32 flush_calls;
};

/* What a pair says of one side: tierd's memory, read once. */
struct asked {
	u64 space, address;
	u32 pid;
};

static struct asked asked_of(const struct ht_pair *pair, int s)
{
	return (struct asked){
		.space = s == HOT ? READ_ONCE(pair->hot_space) : READ_ONCE(pair->cold_space),
		.address = s == HOT ? READ_ONCE(pair->hot_addr) : READ_ONCE(pair->cold_addr),
		.pid = s == HOT ? READ_ONCE(pair->hot_pid) : READ_ONCE(pair->cold_pid),
	};
}

static void lookup_end(struct lookup *lookup)
{
	if (!lookup->mm)
		return;
	if (lookup->drops) {
		ht_call(flush_tlb_mm_range)(lookup->mm, 0, TLB_FLUSH_ALL, PAGE_SHIFT, false);
		dec_tlb_flush_pending(lookup->mm);
		lookup->flush_calls++;
		lookup->drops = false;
	}
	mmap_read_unlock(lookup->mm);
	mmput(lookup->mm);
	lookup->mm = NULL;
	lookup->vma = NULL;
}

static bool lookup_begin(struct lookup *lookup, u32 pid, u64 space)
{
	if (lookup->mm && lookup->space == space)
		return true;
	lookup_end(lookup);
	if (!space)
		return false;
	lookup->mm = ht_get_mm(pid, &space);
	if (!lookup->mm)
		return false;
	lookup->space = space;
	/* Nothing is isolated or locked yet: waiting here holds nobody up. */
	mmap_read_lock(lookup->mm);
	return true;
}

/* Under the mmap lock. */
static struct vm_area_struct *lookup_vma(struct lookup *lookup, unsigned long address)
{
	if (!lookup->vma || address < lookup->vma->vm_start || address >= lookup->vma->vm_end)
		lookup->vma = vma_lookup(lookup->mm, address);
	return lookup->vma;
}

/* The same. HT_MOVE_NONE: found, with a reference. */
static u8 find_folio(struct lookup *lookup, unsigned long address, int s, struct folio **found)
{
	struct vm_area_struct *vma = lookup_vma(lookup, address);
	struct folio *folio;
	u8 result = HT_MOVE_NONE;

	if (!vma)
		return HT_MOVE_GONE;
	if (ht_vma_is_special(vma))
		return HT_MOVE_SPECIAL;
	folio = ht_get_folio(lookup->mm, address);
	if (!folio)
		return HT_MOVE_GONE;
	/* the huge zero folio has no mapping */
	if (folio_is_zone_device(folio) || folio_test_ksm(folio) || folio_test_hugetlb(folio) ||
	    !READ_ONCE(folio->mapping) || ht_is_everybodys(folio))
		result = HT_MOVE_SPECIAL;
	else if (ht_tier_of(folio_nid(folio)) == target_tier[s])
		result = HT_MOVE_ALREADY;
	else if (ht_tier_of(folio_nid(folio)) != source_tier[s])
		result = HT_MOVE_SPECIAL;
	if (result == HT_MOVE_NONE)
		*found = folio;
	else
		folio_put(folio);
	return result;
}

static void look_up(struct slot *slot, u32 nr, int s)
{
	struct lookup lookup = {};

	for (; nr--; slot++) {
		struct side *side = &slot->side[s];
		const struct asked asked = asked_of(slot->pair, s);

		side->pages = 1;
		side->asked = asked.address;
		if (!asked.address)
			continue;
		if (asked.address >= TASK_SIZE_MAX || !lookup_begin(&lookup, asked.pid, asked.space))
			side->result = HT_MOVE_GONE;
		else
			side->result = find_folio(&lookup, asked.address & PAGE_MASK, s, &side->folio);
		if (side->folio)
			side->pages = folio_nr_pages(side->folio);
	}
	lookup_end(&lookup);
}

/* ------------------------------------------------------------- exchange */

/* Of a kind that can be swapped in place; the rest is for migrate_pages(). */
static bool is_exchangeable(struct folio *folio)
{
	if (!folio_test_anon(folio) || !folio_test_swapbacked(folio) ||
	    folio_test_swapcache(folio) || folio_test_mlocked(folio) ||
	    folio_test_unevictable(folio))
		return false;
	return !folio_test_large(folio) ||
	       (folio_test_large_rmappable(folio) && !folio_test_partially_mapped(folio));
}

/* What stays true under the folio's lock while it is isolated. */
static u8 check(struct side *side)
{
	struct folio *folio = side->folio;

	if (!is_exchangeable(folio))
		return HT_MOVE_MISMATCH;
	if (folio_test_writeback(folio))
		return HT_MOVE_BUSY;
	if (folio_test_ksm(folio) || folio_test_hwpoison(folio) ||
	    (folio_test_large(folio) && folio_test_has_hwpoisoned(folio)))
		return HT_MOVE_SPECIAL;
	/* one reference a mapping, isolation's and ours; a pin is one more at least */
	if (folio_maybe_dma_pinned(folio) || folio_ref_count(folio) != folio_mapcount(folio) + 2)
		return HT_MOVE_PINNED;
	/* Keeps the anon_vma while nothing maps the folio. NULL: nothing does already. */
	side->anon_vma = ht_call(folio_get_anon_vma)(folio);
	return side->anon_vma ? HT_MOVE_NONE : HT_MOVE_GONE;
}

static void unisolate(struct folio *folio)
{
	node_stat_mod_folio(folio, NR_ISOLATED_ANON, -folio_nr_pages(folio));
	ht_call(folio_putback_lru)(folio);
}

/*
 * Takes a folio for exchange: off the LRU, locked, its anon_vma held. Only
 * trylock: with many folios locked, waiting for one could deadlock.
 */
static u8 hold(struct side *side)
{
	struct folio *folio = side->folio;
	u8 result = HT_MOVE_BUSY;

	if (!ht_call(folio_isolate_lru)(folio))
		return HT_MOVE_BUSY;
	/* Reclaim throttles itself by this counter. */
	node_stat_mod_folio(folio, NR_ISOLATED_ANON, folio_nr_pages(folio));
	if (folio_trylock(folio)) {
		result = check(side);
		if (result == HT_MOVE_NONE)
			return HT_MOVE_NONE;
		folio_unlock(folio);
	}
	unisolate(folio);
	return result;
}

static void release(struct side *side)
{
	if (atomic_dec_and_test(&side->anon_vma->refcount))
		ht_call(__put_anon_vma)(side->anon_vma);
	folio_unlock(side->folio);
	unisolate(side->folio);
}

static void give_up(struct slot *slot, int s, u8 result)
{
	slot->side[s].result = result;
	if (slot->side[!s].result == HT_MOVE_NONE)
		slot->side[!s].result = HT_MOVE_PARTNER;
	slot->plan = PLAN_NOTHING;
}

/* Holds both sides of a pair and replaces their page-table entries by migration entries. */
static void unmap_pair(struct slot *slot, bool may_migrate)
{
	int s = HOT;
	u8 result = hold(&slot->side[HOT]);

	if (result == HT_MOVE_NONE) {
		s = COLD;
		result = hold(&slot->side[COLD]);
		if (result != HT_MOVE_NONE)
			release(&slot->side[HOT]);
	}
	if (result == HT_MOVE_MISMATCH && may_migrate) {
		/* changed since it was looked up */
		slot->plan = PLAN_MIGRATE;
		return;
	}
	if (result != HT_MOVE_NONE) {
		give_up(slot, s, result);
		return;
	}
	ht_call(try_to_migrate)(slot->side[HOT].folio, TTU_BATCH_FLUSH);
	ht_call(try_to_migrate)(slot->side[COLD].folio, TTU_BATCH_FLUSH);
	slot->unmapped = true;
}

/*
 * From here to folio_ref_unfreeze() the folio is ours alone. 2: isolation's
 * reference and ours; with any other the folio is in use and stays.
 */
static bool freeze_pair(struct folio *hot, struct folio *cold)
{
	if (folio_mapped(hot) || folio_mapped(cold) || !folio_ref_freeze(hot, 2))
		return false;
	if (folio_ref_freeze(cold, 2))
		return true;
	folio_ref_unfreeze(hot, 2);
	return false;
}

/*
 * By registers: a third buffer would be written and read as well. noinline, or
 * gcc computes each address anew.
 */
noinline void ht_swap_page(u64 *a, u64 *b)
{
	int i;

#pragma GCC unroll 8
	for (i = 0; i < PAGE_SIZE / sizeof(*a); i++)
		swap(a[i], b[i]);
}

static void swap_contents(struct folio *hot, struct folio *cold)
{
	long i;

	for (i = 0; i < folio_nr_pages(hot); i++) {
		void *a = kmap_local_folio(hot, i * PAGE_SIZE);
		void *b = kmap_local_folio(cold, i * PAGE_SIZE);

		ht_swap_page(a, b);
		kunmap_local(b);
		kunmap_local(a);
		cond_resched();
	}
}

/* Takes a frozen folio off its memcg's deferred split queue; true: was on it. */
static bool unqueue(struct folio *folio)
{
	return folio_order(folio) > 1 && !data_race(list_empty(&folio->_deferred_list)) &&
	       ht_call(__folio_unqueue_deferred_split)(folio);
}

static void clear_exclusive(struct folio *folio)
{
	long i;

	/* try_to_migrate() has cleared those that were mapped: asking saves an atomic access each */
	for (i = 0; i < folio_nr_pages(folio); i++)
		if (PageAnonExclusive(folio_page(folio, i)))
			ClearPageAnonExclusive(folio_page(folio, i));
}

/*
 * Both frozen. Swaps everything but index, which remap() needs both ways.
 * Flags by cmpxchg: PG_waiters may be set at any time by who waits for the lock.
 */
static void swap_identities(struct folio *hot, struct folio *cold)
{
	unsigned long hot_flags = READ_ONCE(hot->flags) & SWAPPED;
	unsigned long cold_flags = READ_ONCE(cold->flags) & SWAPPED;

	clear_exclusive(hot);
	clear_exclusive(cold);
	set_mask_bits(&hot->flags, SWAPPED, cold_flags);
	set_mask_bits(&cold->flags, SWAPPED, hot_flags);
	swap(hot->mapping, cold->mapping);
#ifdef CONFIG_MEMCG
	swap(hot->memcg_data, cold->memcg_data);
#endif
}

/*
 * Maps each folio where the other was, and unfreezes them. For a large folio
 * the walk takes addresses from the source's index as well as from the
 * destination's, so both must be the same during it. Nobody else looks at
 * index meanwhile: that takes the folio's lock or a folio on the LRU.
 */
static void remap(struct folio *hot, struct folio *cold)
{
	pgoff_t hot_index = hot->index, cold_index = cold->index;

	cold->index = hot_index;
	folio_ref_unfreeze(cold, 2);
	ht_call(remove_migration_ptes)(hot, cold, 0);

	hot->index = cold_index;
	cold->index = cold_index;
	folio_ref_unfreeze(hot, 2);
	ht_call(remove_migration_ptes)(cold, hot, 0);
	cold->index = hot_index;
}

static void why_not(struct slot *slot)
{
	int s;

	for (s = 0; s < SIDES; s++)
		if (folio_mapped(slot->side[s].folio) || folio_ref_count(slot->side[s].folio) != 2)
			give_up(slot, s, HT_MOVE_PINNED);
	/* whoever held a reference has let go since */
	if (slot->side[HOT].result == HT_MOVE_NONE)
		give_up(slot, HOT, HT_MOVE_BUSY);
}

/* After the flush: swaps a pair, or puts both back as they were. */
static void finish_pair(struct slot *slot, struct ht_exchange_run *run)
{
	struct folio *hot = slot->side[HOT].folio, *cold = slot->side[COLD].folio;

	if (freeze_pair(hot, cold)) {
		bool hot_queued = unqueue(hot), cold_queued = unqueue(cold);

		swap_contents(hot, cold);
		swap_identities(hot, cold);
		remap(hot, cold);
		if (hot_queued)
			ht_call(deferred_split_folio)(cold, false);
		if (cold_queued)
			ht_call(deferred_split_folio)(hot, false);
		slot->side[HOT].result = slot->side[COLD].result = HT_MOVE_DONE;
		slot->mover = HT_MOVER_EXCHANGE;
		slot->plan = PLAN_NOTHING;
		run->exchanged_pairs++;
	} else {
		why_not(slot);
		ht_call(remove_migration_ptes)(hot, hot, 0);
		ht_call(remove_migration_ptes)(cold, cold, 0);
	}
	release(&slot->side[HOT]);
	release(&slot->side[COLD]);
	slot->unmapped = false;
}

/* One flush for all: the pages of every process that were unmapped before it. */
static void flush(struct ht_exchange_run *run)
{
	if (current->tlb_ubc.flush_required)
		run->flush_calls++;
	ht_call(try_to_unmap_flush)();
}

static void exchange(u32 first, u32 nr, bool may_migrate, struct ht_exchange_run *run)
{
	u32 i, pages = 0, pairs = 0;

	for (i = first; i < nr; i++) {
		if (slots[i].plan == PLAN_SWAP)
			unmap_pair(&slots[i], may_migrate);
		if (slots[i].unmapped) {
			pages += slots[i].side[HOT].pages + slots[i].side[COLD].pages;
			pairs++;
		}
		if (!pairs || (i + 1 < nr && pages < BATCH_PAGES))
			continue;
		flush(run);
		run->batches++;
		for (; first <= i; first++)
			if (slots[first].unmapped)
				finish_pair(&slots[first], run);
		pages = pairs = 0;
	}
}

/* -------------------------------------------------------------- migrate */

struct target {
	enum ht_tier tier;
	bool full;	/* an allocation failed */
};

struct folio *ht_allocate(enum ht_tier tier, unsigned int order)
{
	gfp_t gfp = (GFP_HIGHUSER_MOVABLE & ~__GFP_RECLAIM) | __GFP_NOWARN | __GFP_NOMEMALLOC |
		    __GFP_THISNODE | (order ? __GFP_COMP : __GFP_HIGH);
	u64 nodes;

	for (nodes = ht_tier_nodes(tier); nodes; nodes &= nodes - 1) {
		struct folio *folio = __folio_alloc(gfp, order, __ffs64(nodes), NULL);

		if (folio)
			return folio;
	}
	return NULL;
}

/* Called by migrate_pages(). */
static struct folio *allocate(struct folio *source, unsigned long private)
{
	struct target *target = (struct target *)private;
	struct folio *folio = ht_allocate(target->tier, folio_order(source));

	target->full |= !folio;
	return folio;
}

/* A folio that migrate_pages() left on the list: whose was it, or a piece of whose, and why? */
static void note_left(struct folio *folio, u32 nr, int s, const struct target *target)
{
	unsigned long pfn = folio_pfn(folio);
	u32 i;

	for (i = 0; i < nr; i++) {
		struct side *side = &slots[i].side[s];

		/* one that is not on a list is no name: its page may be a piece's by now */
		if (slots[i].plan != PLAN_MIGRATE || !side->listed ||
		    pfn - folio_pfn(side->folio) >= side->pages)
			continue;
		side->result = folio_maybe_dma_pinned(folio) ? HT_MOVE_PINNED :
			       target->full ? HT_MOVE_NO_MEMORY : HT_MOVE_BUSY;
	}
}

/* Is this side to be migrated? Not a hot one for which no room was made. */
static bool is_to_migrate(const struct slot *slot, int s)
{
	const struct side *cold = &slot->side[COLD];

	return slot->plan == PLAN_MIGRATE && slot->side[s].folio &&
	       (s == COLD || !cold->asked || cold->result == HT_MOVE_DONE);
}

/* Takes the entry that maps a small folio of a file away, if it only reads. */
static void drop_entry(struct lookup *lookup, struct folio *folio, unsigned long address)
{
	struct vm_area_struct *vma = lookup_vma(lookup, address);
	struct mm_struct *mm = lookup->mm;
	unsigned long next;
	spinlock_t *ptl;
	pmd_t *pmdp;
	pte_t *ptep, pte;

	if (!vma || userfaultfd_armed(vma) || vma->vm_flags & VM_LOCKED || mm_has_notifiers(mm))
		return;
	/* Tells others under the table's lock that an entry which is gone may be in a TLB (mm_inline.h). */
	if (!lookup->drops)
		inc_tlb_flush_pending(mm);
	lookup->drops = true;
	pmdp = ht_descend(mm, address, vma->vm_end, &next);
	ptep = pmdp ? ht_map_lock(pmdp, address, &ptl) : NULL;
	if (!ptep)
		return;
	pte = ptep_get(ptep);
	if (pte_present(pte) && pte_pfn(pte) == folio_pfn(folio) && !pte_write(pte) && !pte_dirty(pte)) {
		update_hiwater_rss(mm);
		/* a CPU may have set the accessed bit just now */
		if (pte_young(ptep_get_and_clear(mm, address, ptep)))
			folio_set_referenced(folio);
		ht_call(folio_remove_rmap_ptes)(folio, folio_page(folio, 0), 1, vma);
		percpu_counter_dec(&mm->rss_stat[mm_counter_file(folio)]);
		folio_put(folio);	/* the mapping's: not the last, we have one */
	}
	spin_unlock(ptl);
	rcu_read_unlock();	/* of ht_map_lock() */
}

/*
 * A page of a file that is only read through its entry needs no migration entry: who
 * wants it again finds it in the page cache. One flush a process then, where the kernel
 * does an rmap walk for each page, and flushes for each if the process is on no other
 * CPU. Nothing is isolated or locked yet: waiting for mmap locks holds nobody up.
 */
static void drop_entries(u32 nr, int s, struct ht_exchange_run *run)
{
	struct lookup lookup = {};
	u32 i;

	for (i = 0; i < nr; i++) {
		struct folio *folio = slots[i].side[s].folio;
		const struct asked asked = asked_of(slots[i].pair, s);

		if (is_to_migrate(&slots[i], s) && !folio_test_anon(folio) && !folio_test_large(folio) &&
		    asked.address < TASK_SIZE_MAX && lookup_begin(&lookup, asked.pid, asked.space))
			drop_entry(&lookup, folio, asked.address & PAGE_MASK);
	}
	lookup_end(&lookup);
	run->flush_calls += lookup.flush_calls;
}

static void migrate(u32 nr, int s, struct ht_exchange_run *run)
{
	struct target target = { .tier = target_tier[s] };
	struct folio *folio;
	LIST_HEAD(list);
	u32 i;

	drop_entries(nr, s, run);
	/* what the exchange has put back sits in this CPU's LRU batches */
	ht_call(lru_add_drain)();
	for (i = 0; i < nr; i++) {
		struct side *side = &slots[i].side[s];

		if (slots[i].plan != PLAN_MIGRATE || !side->folio)
			continue;
		if (!is_to_migrate(&slots[i], s)) {
			side->result = HT_MOVE_PARTNER;
			continue;
		}
		if (!ht_call(folio_isolate_lru)(side->folio)) {
			side->result = HT_MOVE_BUSY;
			continue;
		}
		node_stat_mod_folio(side->folio, NR_ISOLATED_ANON + folio_is_file_lru(side->folio),
				    folio_nr_pages(side->folio));
		list_add_tail(&side->folio->lru, &list);
		side->listed = true;
		side->result = HT_MOVE_DONE;	/* unless it is left on the list */
	}
	/*
	 * migrate_pages() tolerates no reference but isolation's. From here on
	 * the pointers are names only, for note_left().
	 */
	list_for_each_entry(folio, &list, lru)
		folio_put(folio);
	if (!list_empty(&list)) {
		/* MR_NUMA_MISPLACED: nothing is split; any other reason: what finds no block is */
		ht_call(migrate_pages)(&list, allocate, NULL, (unsigned long)&target, MIGRATE_ASYNC,
				       s == HOT ? MR_SYSCALL : MR_NUMA_MISPLACED, NULL);
		run->batches++;
		run->flush_calls++;	/* migrate_pages() flushes once a batch as well */
	}
	list_for_each_entry(folio, &list, lru)
		note_left(folio, nr, s, &target);
	ht_call(putback_movable_pages)(&list);
	for (i = 0; i < nr; i++) {
		struct side *side = &slots[i].side[s];

		if (slots[i].plan != PLAN_MIGRATE || !side->folio)
			continue;
		/* those that never were on the list still have our reference */
		if (!side->listed)
			folio_put(side->folio);
		side->folio = NULL;
		if (side->result == HT_MOVE_DONE)
			slots[i].mover = HT_MOVER_MIGRATE;
	}
}

/* ------------------------------------------------------------ one batch */

static void choose(struct slot *slot, bool may_swap, bool may_migrate)
{
	struct side *hot = &slot->side[HOT], *cold = &slot->side[COLD];

	slot->plan = PLAN_NOTHING;
	if ((hot->asked && !hot->folio) || (cold->asked && !cold->folio)) {
		/* Half a pair is not moved: the other half was to make or take its room. */
		if (hot->folio)
			hot->result = HT_MOVE_PARTNER;
		if (cold->folio)
			cold->result = HT_MOVE_PARTNER;
		return;
	}
	if (may_swap && hot->folio && cold->folio && hot->pages == cold->pages &&
	    is_exchangeable(hot->folio) && is_exchangeable(cold->folio))
		slot->plan = PLAN_SWAP;
	else if (may_migrate)
		slot->plan = PLAN_MIGRATE;
	else
		hot->result = cold->result = HT_MOVE_MISMATCH;
}

static void account(struct slot *slot, struct ht_exchange_run *run)
{
	int s;

	for (s = 0; s < SIDES; s++) {
		struct side *side = &slot->side[s];

		if (side->folio)
			folio_put(side->folio);
		if (!side->asked)
			side->result = HT_MOVE_NONE;
		else if (side->result != HT_MOVE_DONE)
			run->failed_pages[side->result] += side->pages;
		else
			run->mover_pages[slot->mover] += side->pages;
		if (side->result == HT_MOVE_DONE && s == HOT)
			run->promoted_pages += side->pages;
		if (side->result == HT_MOVE_DONE && s == COLD)
			run->demoted_pages += side->pages;
	}
	slot->pair->hot_result = slot->side[HOT].result;
	slot->pair->cold_result = slot->side[COLD].result;
	slot->pair->mover = slot->mover;
}

/* Fresh pages wait in per-CPU batches before they get on the LRU: not isolable there. */
static u32 off_lru(u32 first, u32 nr)
{
	u32 i, count = 0;
	int s;

	for (i = first; i < nr; i++)
		for (s = 0; s < SIDES; s++)
			count += slots[i].side[s].folio && !folio_test_lru(slots[i].side[s].folio);
	return count;
}

/*
 * Other CPUs' batches, emptied by a work item on each. A CPU in a callback that
 * does not give it up would hold up every scope's moves: so another task waits
 * for them all, and we wait for that one for a while only. Pages still in a
 * batch are BUSY then, and are tried again in a later epoch.
 */
static bool draining;	/* set under move_mutex */
static DECLARE_WAIT_QUEUE_HEAD(drained);

static void drain_all(struct work_struct *work)
{
	ht_call(lru_add_drain_all)();
	smp_store_release(&draining, false);
	wake_up(&drained);
}
static DECLARE_WORK(drain_work, drain_all);

static void drain_other_cpus(void)
{
	/* One that is still under way waits for a busy CPU, and another would too. */
	if (smp_load_acquire(&draining))
		return;
	WRITE_ONCE(draining, true);
	queue_work(system_unbound_wq, &drain_work);
	wait_event_timeout(drained, !smp_load_acquire(&draining), msecs_to_jiffies(DRAIN_WAIT_MS));
}

void ht_move_exit(void)
{
	flush_work(&drain_work);
}

/* Moves what is of the common kind; the other pairs get the slots from used on. */
static u32 fill_slots(u32 used, struct ht_pair *pairs, u32 nr, u32 movers,
		      struct ht_exchange_run *run)
{
	static DECLARE_BITMAP(done, BATCH_PAIRS);	/* under move_mutex */
	u32 i;

	ht_move_entries(pairs, nr, movers, done, run);
	for (i = 0; i < nr; i++)
		if (!test_bit(i, done))
			slots[used++] = (struct slot){ .pair = &pairs[i] };
	return used;
}

/* Accounts for what is decided and moves what waits for migrate to the front. */
static u32 keep_waiting(u32 nr, struct ht_exchange_run *run)
{
	u32 i, kept = 0;

	for (i = 0; i < nr; i++) {
		if (slots[i].plan == PLAN_MIGRATE)
			slots[kept++] = slots[i];
		else
			account(&slots[i], run);
	}
	return kept;
}

static void move_all(struct ht_pair *pairs, u32 nr, u32 flags, struct ht_exchange_run *run)
{
	u32 movers = ht_movers & ~(flags & HT_EXCHANGE_NO_SWAP ? HT_EXCHANGES : 0) &
		     ~(flags & HT_EXCHANGE_NO_MIGRATE ? HT_MIGRATES : 0);
	bool may_swap = movers & HT_EXCHANGES, may_migrate = movers & HT_MIGRATES;
	u32 next = 0, kept = 0, used, i;

	while (next < nr || kept) {
		u32 now = min(nr - next, BATCH_PAIRS - kept);

		/* fresh pages have a reference while they are in this CPU's LRU batches */
		ht_call(lru_add_drain)();
		used = fill_slots(kept, pairs + next, now, movers, run);
		next += now;
		look_up(slots + kept, used - kept, HOT);
		look_up(slots + kept, used - kept, COLD);
		/* Other CPUs' batches cost a round of work items: only if it pays. */
		if (off_lru(kept, used) > (used - kept) / 16)
			drain_other_cpus();
		for (i = kept; i < used; i++)
			choose(&slots[i], may_swap, may_migrate);
		exchange(kept, used, may_migrate, run);
		kept = keep_waiting(used, run);
		/* migrate_pages() flushes once a call: not for a few pages while more may come */
		if (kept && (kept >= BATCH_PAIRS / 2 || next == nr)) {
			migrate(kept, COLD, run);
			migrate(kept, HOT, run);
			for (i = 0; i < kept; i++)
				account(&slots[i], run);
			kept = 0;
		}
		cond_resched_tasks_rcu_qs();
	}
}

/* ---------------------------------------------------------------- split */

/*
 * Has our reference. Under the folio's lock and, for the mappings' sake, the mmap
 * lock of who was looked up, in the order in which the kernel takes them; the
 * kernel's function takes the anon_vma's. It freezes the references, so one that is
 * pinned stays whole. Afterwards our lock and reference are the first page's.
 */
static u8 split(struct folio *folio)
{
	u8 result = HT_MOVE_BUSY;

	if (!folio_test_large(folio))
		return HT_MOVE_MISMATCH;
	if (!folio_trylock(folio))
		return HT_MOVE_BUSY;
	if (!folio_test_anon(folio) || folio_test_ksm(folio) || folio_test_hugetlb(folio) ||
	    !folio_test_large_rmappable(folio))
		result = HT_MOVE_SPECIAL;
	else if (!folio_test_writeback(folio))
		result = ht_call(split_huge_page_to_list_to_order)(&folio->page, NULL, 0) ?
			 HT_MOVE_PINNED : HT_MOVE_DONE;
	folio_unlock(folio);
	return result;
}

static void split_all(struct ht_pair *pairs, u32 nr, struct ht_exchange_run *run)
{
	struct lookup lookup = {};
	u32 i;

	/* a reference of an LRU batch would look like a pin */
	ht_call(lru_add_drain)();
	for (i = 0; i < nr; i++) {
		struct ht_pair *pair = &pairs[i];
		const struct asked asked = asked_of(pair, HOT);
		struct folio *folio = NULL;
		u32 pages = 1;
		u8 result = HT_MOVE_GONE;

		if (asked.address && asked.address < TASK_SIZE_MAX &&
		    lookup_begin(&lookup, asked.pid, asked.space)) {
			struct vm_area_struct *vma = lookup_vma(&lookup, asked.address);

			if (vma && !ht_vma_is_special(vma))
				folio = ht_get_folio(lookup.mm, asked.address & PAGE_MASK);
		}
		if (folio) {
			pages = folio_nr_pages(folio);
			/* first: khugepaged may be at it as soon as it is in pieces */
			ht_collapse_hold(lookup.space, asked.address);
			result = ht_movers & HT_SPLITS ? split(folio) : HT_MOVE_OTHER;
			folio_put(folio);
		}
		if (result == HT_MOVE_DONE)
			run->split_pages += pages;
		else
			run->failed_pages[result] += pages;
		pair->hot_result = result;
		pair->cold_result = HT_MOVE_NONE;
		pair->mover = HT_MOVER_NONE;
		cond_resched_tasks_rcu_qs();
	}
	lookup_end(&lookup);
}

__bpf_kfunc_start_defs();

__bpf_kfunc int hypertier_exchange(struct ht_exchange_run *run, u32 run__sz, struct ht_pair *pairs,
				   u32 pairs__sz)
{
	u32 nr, flags;

	if (run__sz < sizeof(*run))
		return -EINVAL;
	nr = READ_ONCE(run->nr);
	flags = READ_ONCE(run->flags);
	memset(run, 0, sizeof(*run));
	run->nr = nr;
	run->flags = flags;
	if (nr > pairs__sz / sizeof(*pairs))
		return -EINVAL;
	if (!ht_tier_nodes(HT_TIER_FAST) || !ht_tier_nodes(HT_TIER_SLOW))
		return -ENODEV;
	if (!(ht_movers & (HT_EXCHANGES | HT_MIGRATES)))
		return -EOPNOTSUPP;
	mutex_lock(&move_mutex);
	if (flags & HT_EXCHANGE_SPLIT)
		split_all(pairs, nr, run);
	else
		move_all(pairs, nr, flags, run);
	mutex_unlock(&move_mutex);
	return 0;
}

__bpf_kfunc_end_defs();
