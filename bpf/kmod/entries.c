// SPDX-License-Identifier: GPL-2.0-only
/*
 * Moving by page-table entries: the common case, in which a page is small,
 * anonymous, and mapped once. There is nothing to look for then: the entry that maps
 * it is known, so no rmap walk is needed. What is of another kind is left to move.c.
 *
 * exchange: a hot page and a cold one, of one memcg, change places. Nothing is
 * allocated, isolated or counted. migrate: a side without a partner gets a new page.
 *
 * A batch, with the mmap locks of its processes held for reading:
 * 1. Under the lock of its page table, each page is locked (trylock), its
 *    reference count frozen at 0, and its entry replaced by a migration entry, on
 *    which a fault waits for the page's lock.
 * 2. One TLB flush for each process of the batch.
 * 3. exchange: contents and identities of both are swapped, and the counts are set to
 *    2: the mapping's reference and ours. migrate: contents and identity are copied.
 * 4. Each entry comes back with its old bits and the other page's number, then the
 *    pages are unlocked and let go of. migrate: the old one is freed.
 *
 * Why nobody else sees anything of it:
 * - A count of 0 admits no new reference: not GUP's, the LRU's, compaction's or
 *   DAMON's. It was the mapping's alone (and isolation's), so there was no other: no
 *   pin, no LRU batch, and no rmap walk is under way.
 * - A page whose entry is a migration entry is locked, as the kernel demands: all
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
 * What stays with the place in an exchange: node, zone, the folio's position on the LRU
 * (with PG_active and MGLRU's generation), and all statistics, which are by node and
 * memcg. What travels: contents, mapping, index, the entry's bits, and the flags below.
 * In a migration the old page leaves the LRU and the new one joins it; NR_ANON_MAPPED
 * goes with the rmap functions, of the old page while it still has its memcg; the
 * charge goes over with memcg_data, as in mem_cgroup_migrate().
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

/* And what a new page takes over beside these: its place on the LRU is found anew. */
#define TAKEN_OVER ((TRAVELS | BIT(PG_active) | BIT(PG_swapbacked)) & ~BIT(PG_anon_exclusive))

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

/* A pair that is under way, or one side of it to a new folio. */
struct moving {
	u32 index;
	bool promotes;		/* fresh: to fast memory */
	struct folio *fresh;	/* NULL: an exchange */
	struct place place, partner;
};

/* Of the batch under way. Under move_mutex. */
static struct owner owners[OWNERS];
static u32 nr_owners;
static struct moving batch[HT_ENTRIES_PAIRS];
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

/* The mapping's reference is the only one, and isolation's if it is to be freed. */
static bool freeze(struct folio *folio, bool isolate)
{
	if (!isolate)
		return folio_ref_freeze(folio, 1);
	/* The LRU's lock is taken inside the table's, as mm/rmap.c has it. */
	if (!ht_call(folio_isolate_lru)(folio))
		return false;
	if (folio_ref_freeze(folio, 2))
		return true;
	ht_call(folio_putback_lru)(folio);
	return false;
}

/* Step 1 for one page. False: it is as it was. */
static bool unmap(struct place *place, u32 pid, u64 space, unsigned long address,
		  enum ht_tier tier, bool isolate)
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
		if (stays_common(folio) && freeze(folio, isolate)) {
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

/* The entry of a place, its table locked, and whether it is still our migration entry. */
static pte_t *map_lock(struct place *place, spinlock_t **ptl, pte_t *now, bool *ours)
{
	pte_t *ptep = ht_map_lock(place->pmdp, place->address, ptl);
	swp_entry_t entry = {};

	/* Cannot be: whoever frees page tables of anonymous memory has the mmap lock for writing. */
	if (WARN_ON_ONCE(!ptep))
		return NULL;
	*now = ptep_get(ptep);
	if (is_swap_pte(*now))
		entry = pte_to_swp_entry(*now);
	*ours = is_migration_entry(entry) && swp_offset_pfn(entry) == folio_pfn(place->folio);
	return ptep;
}

static void set_entry(struct place *place, pte_t *ptep, pte_t now, struct folio *folio)
{
	pte_t pte = pfn_pte(folio_pfn(folio), pte_pgprot(place->pte));

	if (!is_writable_migration_entry(pte_to_swp_entry(now)))
		pte = pte_wrprotect(pte);
	set_pte_at(place->owner->mm, place->address, ptep, pte);
}

/*
 * Step 4 for one place: maps a folio there that has its identity and is locked. One of
 * its references becomes the mapping's.
 */
static void map(struct place *place, struct folio *folio)
{
	spinlock_t *ptl;
	bool ours;
	pte_t now, *ptep = map_lock(place, &ptl, &now, &ours);

	if (!ptep)
		return;
	if (ours) {
		set_entry(place, ptep, now, folio);
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
static bool unmap_pair(struct moving *moving, const struct ht_pair *pair, u64 hot, u64 cold)
{
	struct place *place = &moving->place, *partner = &moving->partner;

	if (!unmap(place, READ_ONCE(pair->hot_pid), READ_ONCE(pair->hot_space), hot,
		   HT_TIER_SLOW, false))
		return false;
	if (!unmap(partner, READ_ONCE(pair->cold_pid), READ_ONCE(pair->cold_space), cold,
		   HT_TIER_FAST, false)) {
		put_back(place);
		return false;
	}
	/* Step 3 moves nobody's charge. */
	if (!same_memcg(place->folio, partner->folio)) {
		put_back(place);
		put_back(partner);
		return false;
	}
	return true;
}

/* Step 1 for a side without a partner. */
static bool unmap_single(struct moving *moving, const struct ht_pair *pair, u64 hot, u64 cold)
{
	struct folio *fresh = ht_allocate(hot ? HT_TIER_FAST : HT_TIER_SLOW, 0);
	bool done;

	if (!fresh)
		return false;
	if (hot)
		done = unmap(&moving->place, READ_ONCE(pair->hot_pid), READ_ONCE(pair->hot_space),
			     hot, HT_TIER_SLOW, true);
	else
		done = unmap(&moving->place, READ_ONCE(pair->cold_pid), READ_ONCE(pair->cold_space),
			     cold, HT_TIER_FAST, true);
	if (!done) {
		folio_put(fresh);
		return false;
	}
	/* nobody else knows it */
	folio_trylock(fresh);
	moving->fresh = fresh;
	moving->promotes = hot;
	return true;
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

static void finish_pair(struct moving *moving)
{
	struct folio *hot = moving->place.folio, *cold = moving->partner.folio;
	void *a = kmap_local_folio(hot, 0), *b = kmap_local_folio(cold, 0);

	ht_swap_page(a, b);
	kunmap_local(b);
	kunmap_local(a);
	swap_identities(hot, cold);
	unfreeze(hot);
	unfreeze(cold);
	map(&moving->place, cold);
	map(&moving->partner, hot);
	let_go(hot);
	let_go(cold);
}

/* The new folio takes the old one's identity but for what goes by the rmap functions. */
static void take_over(struct folio *fresh, struct folio *old)
{
	copy_highpage(folio_page(fresh, 0), folio_page(old, 0));
	set_mask_bits(&fresh->flags, TAKEN_OVER, READ_ONCE(old->flags) & TAKEN_OVER);
	fresh->mapping = old->mapping;
	fresh->index = old->index;
}

static void take_over_charge(struct folio *fresh, struct folio *old)
{
#ifdef CONFIG_MEMCG
	fresh->memcg_data = old->memcg_data;
	old->memcg_data = 0;
#endif
}

/* False: it was discarded meanwhile, and the new folio with it. */
static bool finish_single(struct moving *moving)
{
	struct place *place = &moving->place;
	struct folio *old = place->folio, *fresh = moving->fresh;
	spinlock_t *ptl;
	bool ours;
	pte_t now, *ptep;

	take_over(fresh, old);
	ptep = map_lock(place, &ptl, &now, &ours);
	if (!ptep)
		return false;
	/* Statistics, by the old one's memcg and node, and then by the new one's. */
	ht_call(folio_remove_rmap_ptes)(old, folio_page(old, 0), 1, place->vma);
	if (ours) {
		bool exclusive = PageAnonExclusive(folio_page(old, 0));

		take_over_charge(fresh, old);
		ht_call(folio_add_anon_rmap_ptes)(fresh, folio_page(fresh, 0), 1, place->vma,
						  place->address, exclusive ? RMAP_EXCLUSIVE : RMAP_NONE);
		folio_get(fresh);	/* the mapping's */
		set_entry(place, ptep, now, fresh);
	}
	spin_unlock(ptl);
	rcu_read_unlock();	/* of ht_map_lock() */
	folio_ref_unfreeze(old, 1);
	folio_unlock(old);
	folio_unlock(fresh);
	if (ours) {
		/* It is no user's any more: off the LRU, uncharged, its last reference ours. */
		folio_clear_active(old);
		folio_put(old);
		ht_call(folio_putback_lru)(fresh);
	} else {
		/* Still charged: it goes the way of all folios that were isolated. */
		ht_call(folio_putback_lru)(old);
		fresh->mapping = NULL;
		folio_clear_active(fresh);
		folio_put(fresh);
	}
	return ours;
}

static void account(struct moving *moving, struct ht_pair *pair, struct ht_exchange_run *run)
{
	bool promotes = !moving->fresh || moving->promotes;
	bool demotes = !moving->fresh || !moving->promotes;

	pair->mover = moving->fresh ? HT_MOVER_MIGRATE : HT_MOVER_EXCHANGE;
	pair->hot_result = promotes ? HT_MOVE_DONE : HT_MOVE_NONE;
	pair->cold_result = demotes ? HT_MOVE_DONE : HT_MOVE_NONE;
	run->exchanged_pairs += !moving->fresh;
	run->promoted_pages += promotes;
	run->demoted_pages += demotes;
	run->mover_pages[pair->mover] += promotes + demotes;
}

/* Step 1, if the pair is of the common kind. *more: it is, but what makes room goes first. */
static void unmap_common(const struct ht_pair *pair, u32 index, u32 movers, bool makes_room,
			 bool *more)
{
	u64 hot = READ_ONCE(pair->hot_addr) & PAGE_MASK;
	u64 cold = READ_ONCE(pair->cold_addr) & PAGE_MASK;
	struct moving *moving = &batch[nr_batch];
	bool single = !hot || !cold;

	if ((!hot && !cold) || hot >= TASK_SIZE_MAX || cold >= TASK_SIZE_MAX ||
	    !(movers & (single ? HT_MIGRATES : HT_EXCHANGES)))
		return;
	if (makes_room != (cold != 0)) {
		*more |= makes_room;
		return;
	}
	moving->index = index;
	moving->fresh = NULL;
	if (single ? unmap_single(moving, pair, hot, cold) : unmap_pair(moving, pair, hot, cold))
		nr_batch++;
}

void ht_move_entries(struct ht_pair *pairs, u32 nr, u32 movers, unsigned long *done,
		     struct ht_exchange_run *run)
{
	bool makes_room = true, more;
	u32 i;

	bitmap_zero(done, nr);
	do {
		more = false;
		for (i = 0; i < nr; i++)
			unmap_common(&pairs[i], i, movers, makes_room, &more);
		flush(run);
		for (i = 0; i < nr_batch; i++) {
			struct moving *moving = &batch[i];

			if (!moving->fresh)
				finish_pair(moving);
			else if (!finish_single(moving))
				continue;
			account(moving, &pairs[moving->index], run);
			__set_bit(moving->index, done);
			cond_resched();
		}
		run->batches += nr_batch != 0;
		nr_batch = 0;
		makes_room = false;
	} while (more);
	let_owners_go();
}
