// SPDX-License-Identifier: GPL-2.0-only
/*
 * Exchange by page-table entries: the common case, in which both pages are
 * small, anonymous, of one memcg, and mapped once. There is nothing to look for
 * then: the entry that maps each is known, so no rmap walk, no isolation and no
 * statistics are needed. What is of another kind is left to move.c.
 *
 * A batch, with the mmap locks of its processes held for reading:
 * 1. Under the lock of its page table, each page is locked (trylock), its
 *    reference count frozen from 1 (the mapping's) to 0, and its entry replaced
 *    by a migration entry, on which a fault waits for the page's lock.
 * 2. One TLB flush for each process of the batch.
 * 3. For each pair, contents and identities are swapped, and the counts are set to 2:
 *    the mapping's reference and ours.
 * 4. Each entry comes back with its old bits and the other page's number, then
 *    both pages are unlocked and let go of.
 *
 * Why nobody else sees anything of it:
 * - A count of 0 admits no new reference: not GUP's, the LRU's, compaction's or
 *   DAMON's. It was 1, so there was none: no pin, no LRU batch, no isolation, and
 *   no rmap walk is under way.
 * - A page whose entry is a migration entry is locked, as the kernel demands: both
 *   entries of a pair are back before either page is unlocked.
 * - fork(), mremap(), munmap(), mprotect(), mlock(), khugepaged, userfaultfd's and
 *   MMU notifiers' registration take the mmap lock for writing, so they wait. Mappings
 *   with notifiers or userfaultfd are left to move.c.
 * - MADV_DONTNEED, truncation and the OOM reaper do not: they may take a migration
 *   entry away (and count it down in rss). Then the page that should have been mapped
 *   there is unmapped and freed in their stead. tlb_flush_pending tells them that
 *   entries were changed and not flushed yet, so that they flush all (mm_inline.h).
 *   change_prot_numa() may make a writable migration entry readable: it stays so.
 *
 * What stays with the place: node, zone, the folio's position on the LRU (with
 * PG_active and MGLRU's generation), and all statistics, which are by node and memcg.
 * What travels: contents, mapping, index, the entry's bits, and the flags below.
 */
#include <linux/bitmap.h>
#include <linux/memcontrol.h>
#include <linux/mm_inline.h>
#include <linux/mmap_lock.h>
#include <linux/mmu_notifier.h>
#include <linux/sched/mm.h>
#include <linux/swapops.h>
#include <linux/userfaultfd_k.h>
#include <asm/tlbflush.h>

#include "module.h"

#define TRAVELS                                                                               \
	(BIT(PG_referenced) | BIT(PG_uptodate) | BIT(PG_dirty) | BIT(PG_workingset) |         \
	 BIT(PG_young) | BIT(PG_idle) | BIT(PG_anon_exclusive))

#define OWNERS 32	/* processes in a batch; pairs of further ones are left to move.c */

/* A process of the batch, its mmap lock held; mm NULL: its pairs are left to move.c. */
struct owner {
	u64 space;
	struct mm_struct *mm;
	struct vm_area_struct *vma;	/* looked up last */
	bool unmapped;			/* something of it, since the last flush */
};

/* Where a page was mapped, and what maps it. */
struct place {
	struct owner *owner;
	struct vm_area_struct *vma;
	unsigned long address;
	pmd_t *pmdp;
	pte_t pte;		/* the entry as it was */
	struct folio *folio;	/* locked, frozen */
};

struct swapped {
	struct place hot, cold;
	u32 index;
};

/* Of the batch under way. Under move_mutex. */
static struct owner owners[OWNERS];
static u32 nr_owners;
static struct swapped batch[HT_ENTRIES_PAIRS];
static u32 nr_batch;

/* ------------------------------------------------------------- processes */

static struct owner *owner_of(u32 pid, u64 space)
{
	struct owner *owner = owners + nr_owners;
	struct mm_struct *mm;

	while (owner-- > owners)
		if (owner->space == space)
			return owner;
	if (!space || nr_owners == OWNERS)
		return NULL;
	owner = &owners[nr_owners++];
	*owner = (struct owner){ .space = space };
	mm = ht_get_mm(pid, &space);
	if (!mm)
		return owner;
	/* Waiting for one with others held could close a circle of waiters. */
	if (nr_owners == 1) {
		mmap_read_lock(mm);
	} else if (!mmap_read_trylock(mm)) {
		mmput_async(mm);
		return owner;
	}
	if (mm_has_notifiers(mm)) {
		mmap_read_unlock(mm);
		mmput_async(mm);
		return owner;
	}
	inc_tlb_flush_pending(mm);
	owner->mm = mm;
	return owner;
}

static void let_owners_go(void)
{
	for (; nr_owners; nr_owners--) {
		struct owner *owner = &owners[nr_owners - 1];

		if (!owner->mm)
			continue;
		dec_tlb_flush_pending(owner->mm);
		mmap_read_unlock(owner->mm);
		/* async: the last reference may be ours, and others' locks are held */
		mmput_async(owner->mm);
	}
}

static struct vm_area_struct *plain_mapping(struct owner *owner, unsigned long address)
{
	struct vm_area_struct *vma = owner->vma;

	if (!vma || address < vma->vm_start || address >= vma->vm_end)
		vma = owner->vma = vma_lookup(owner->mm, address);
	if (!vma || ht_vma_is_special(vma) || userfaultfd_armed(vma) || vma->vm_flags & VM_LOCKED)
		return NULL;
	return vma;
}

/* ---------------------------------------------------------------- entries */

/* The page that the entry maps, if it is of the common kind. Under the table's lock. */
static struct folio *common_folio(pte_t pte, enum ht_tier tier)
{
	struct folio *folio;

	if (!pte_present(pte) || pte_special(pte) || pte_devmap(pte))
		return NULL;
	folio = page_folio(pte_page(pte));
	if (folio_test_large(folio) || !folio_test_anon(folio) || folio_test_ksm(folio) ||
	    folio_is_zone_device(folio) || ht_tier_of(folio_nid(folio)) != tier ||
	    folio_mapcount(folio) != 1 || folio_ref_count(folio) != 1)
		return NULL;
	return folio;
}

/* With the folio's lock, under which none of these changes. */
static bool stays_common(struct folio *folio)
{
	return folio_test_anon(folio) && !folio_test_ksm(folio) && folio_test_swapbacked(folio) &&
	       !folio_test_swapcache(folio) && !folio_test_writeback(folio) &&
	       !folio_test_mlocked(folio) && !folio_test_unevictable(folio) &&
	       !folio_test_hwpoison(folio) && folio_mapcount(folio) == 1;
}

static pte_t migration_entry(struct folio *folio, pte_t pte)
{
	unsigned long pfn = folio_pfn(folio);
	pte_t entry;

	if (pte_write(pte))
		entry = swp_entry_to_pte(make_writable_migration_entry(pfn));
	else if (PageAnonExclusive(folio_page(folio, 0)))
		entry = swp_entry_to_pte(make_readable_exclusive_migration_entry(pfn));
	else
		entry = swp_entry_to_pte(make_readable_migration_entry(pfn));
	return pte_soft_dirty(pte) ? pte_swp_mksoft_dirty(entry) : entry;
}

/* Step 1 for one page. False: it is as it was. */
static bool unmap(struct place *place, u32 pid, u64 space, unsigned long address,
		  enum ht_tier tier)
{
	struct owner *owner = owner_of(pid, space);
	struct folio *folio;
	unsigned long next;
	bool done = false;
	spinlock_t *ptl;
	pte_t *ptep;
	pte_t pte;

	if (!owner || !owner->mm)
		return false;
	place->owner = owner;
	place->address = address;
	place->vma = plain_mapping(owner, address);
	if (!place->vma)
		return false;
	place->pmdp = ht_descend(owner->mm, address, place->vma->vm_end, &next);
	if (!place->pmdp)
		return false;
	ptep = ht_map_lock(place->pmdp, address, &ptl);
	if (!ptep)
		return false;
	folio = common_folio(ptep_get(ptep), tier);
	/* the mapping's reference keeps the folio while the table is locked */
	if (folio && folio_trylock(folio)) {
		if (stays_common(folio) && folio_ref_freeze(folio, 1)) {
			pte = ptep_get_and_clear(owner->mm, address, ptep);
			set_pte_at(owner->mm, address, ptep, migration_entry(folio, pte));
			place->pte = pte;
			place->folio = folio;
			owner->unmapped = true;
			done = true;
		} else {
			folio_unlock(folio);
		}
	}
	spin_unlock(ptl);
	rcu_read_unlock();	/* of ht_map_lock() */
	return done;
}

/*
 * Step 4 for one place: maps a folio there that has its identity and is locked. One of
 * its references becomes the mapping's.
 */
static void map(struct place *place, struct folio *folio)
{
	spinlock_t *ptl;
	pte_t *ptep = ht_map_lock(place->pmdp, place->address, &ptl);
	swp_entry_t entry = {};
	pte_t now, pte;

	/* Cannot be: whoever frees page tables of anonymous memory has the mmap lock for writing. */
	if (WARN_ON_ONCE(!ptep))
		return;
	now = ptep_get(ptep);
	if (is_swap_pte(now))
		entry = pte_to_swp_entry(now);
	if (is_migration_entry(entry) && swp_offset_pfn(entry) == folio_pfn(place->folio)) {
		pte = pfn_pte(folio_pfn(folio), pte_pgprot(place->pte));
		if (!is_writable_migration_entry(entry))
			pte = pte_wrprotect(pte);
		set_pte_at(place->owner->mm, place->address, ptep, pte);
	} else {
		/* Discarded meanwhile. Under the lock, since that disables preemption: statistics. */
		ht_call(folio_remove_rmap_ptes)(folio, folio_page(folio, 0), 1, place->vma);
		folio_put(folio);	/* not the last reference */
	}
	spin_unlock(ptl);
	rcu_read_unlock();	/* of ht_map_lock() */
}

/*
 * Two references: the mapping's, and ours while we hold the lock, since whoever
 * unmaps the folio again may be the last but us and must not free it locked.
 */
static void unfreeze(struct folio *folio)
{
	folio_ref_unfreeze(folio, 2);
}

static void let_go(struct folio *folio)
{
	folio_unlock(folio);
	folio_put(folio);
}

/* ------------------------------------------------------------------ batch */

/* Both frozen. The flags by cmpxchg: who waits for the lock sets PG_waiters. */
static void swap_identities(struct folio *hot, struct folio *cold)
{
	unsigned long hot_flags = READ_ONCE(hot->flags) & TRAVELS;
	unsigned long cold_flags = READ_ONCE(cold->flags) & TRAVELS;

	set_mask_bits(&hot->flags, TRAVELS, cold_flags);
	set_mask_bits(&cold->flags, TRAVELS, hot_flags);
	swap(hot->mapping, cold->mapping);
	swap(hot->index, cold->index);
}

static bool same_memcg(struct folio *hot, struct folio *cold)
{
#ifdef CONFIG_MEMCG
	return hot->memcg_data == cold->memcg_data;
#else
	return true;
#endif
}

static void put_back(struct place *place)
{
	unfreeze(place->folio);
	map(place, place->folio);
	let_go(place->folio);
}

/* Step 1 for a pair. */
static void unmap_pair(const struct ht_pair *pair, u32 index)
{
	struct swapped *swapped = &batch[nr_batch];
	u64 hot = READ_ONCE(pair->hot_addr), cold = READ_ONCE(pair->cold_addr);

	if (!hot || !cold || hot >= TASK_SIZE_MAX || cold >= TASK_SIZE_MAX)
		return;
	if (!unmap(&swapped->hot, READ_ONCE(pair->hot_pid), READ_ONCE(pair->hot_space),
		   hot & PAGE_MASK, HT_TIER_SLOW))
		return;
	if (!unmap(&swapped->cold, READ_ONCE(pair->cold_pid), READ_ONCE(pair->cold_space),
		   cold & PAGE_MASK, HT_TIER_FAST)) {
		put_back(&swapped->hot);
		return;
	}
	/* Step 3 moves nobody's charge. */
	if (!same_memcg(swapped->hot.folio, swapped->cold.folio)) {
		put_back(&swapped->hot);
		put_back(&swapped->cold);
		return;
	}
	swapped->index = index;
	nr_batch++;
}

/* Step 2. */
static void flush(struct ht_exchange_run *run)
{
	u32 i;

	for (i = 0; i < nr_owners; i++) {
		if (!owners[i].unmapped)
			continue;
		ht_call(flush_tlb_mm_range)(owners[i].mm, 0, TLB_FLUSH_ALL, PAGE_SHIFT, false);
		run->flush_calls++;
		owners[i].unmapped = false;
	}
}

static void finish_pair(struct swapped *swapped)
{
	struct folio *hot = swapped->hot.folio, *cold = swapped->cold.folio;
	void *a = kmap_local_folio(hot, 0), *b = kmap_local_folio(cold, 0);

	ht_swap_page(a, b);
	kunmap_local(b);
	kunmap_local(a);
	swap_identities(hot, cold);
	unfreeze(hot);
	unfreeze(cold);
	map(&swapped->hot, cold);
	map(&swapped->cold, hot);
	let_go(hot);
	let_go(cold);
}

void ht_exchange_entries(struct ht_pair *pairs, u32 nr, unsigned long *done,
			 struct ht_exchange_run *run)
{
	u32 i;

	bitmap_zero(done, nr);
	for (i = 0; i < nr; i++)
		unmap_pair(&pairs[i], i);
	flush(run);
	for (i = 0; i < nr_batch; i++) {
		finish_pair(&batch[i]);
		__set_bit(batch[i].index, done);
		cond_resched();
	}
	run->batches += nr_batch != 0;
	nr_batch = 0;
	let_owners_go();
}
