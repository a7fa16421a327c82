// SPDX-License-Identifier: GPL-2.0-only
/*
 * Where memory is: spaces and what they map, and a bounded page-table walk
 * that counts resident pages per tier and lists those of one tier.
 *
 * Nothing here marks a page accessed or takes a reference on one. Locks: the
 * mmap lock (read) keeps mappings and upper page-table levels; it is dropped
 * after every STEP page tables so that no mmap() waits long. A page-table
 * lock is held over one page table at most (512 entries), since entries and
 * the folios behind them are stable under it only.
 */
#include <linux/dax.h>
#include <linux/huge_mm.h>
#include <linux/hugetlb.h>
#include <linux/mm_inline.h>
#include <linux/mmap_lock.h>
#include <linux/pid.h>
#include <linux/sched/mm.h>
#include <linux/sched/signal.h>
#include <linux/shmem_fs.h>

#include "module.h"

#define STEP_PMDS 64	/* page tables walked under one hold of the mmap lock */

struct mm_struct *ht_get_mm(u32 pid, u64 *space)
{
	struct task_struct *leader, *task;
	struct mm_struct *mm = NULL;

	/*
	 * RCU keeps the tasks; get_task_mm() takes a reference on the mm. Any
	 * thread will do: a leader that has exited has no mm, its threads do.
	 */
	rcu_read_lock();
	leader = pid_task(find_pid_ns(pid, &init_pid_ns), PIDTYPE_TGID);
	if (leader)
		for_each_thread(leader, task) {
			mm = get_task_mm(task);
			if (mm)
				break;
		}
	rcu_read_unlock();
	if (mm && *space && mm->context.ctx_id != *space) {
		mmput(mm);
		return NULL;
	}
	if (mm)
		*space = mm->context.ctx_id;
	return mm;
}

bool ht_vma_is_special(struct vm_area_struct *vma)
{
	return vma->vm_flags & (VM_IO | VM_PFNMAP | VM_MIXEDMAP | VM_HUGETLB) || vma_is_dax(vma) ||
	       (!vma_is_anonymous(vma) && !vma->vm_file);
}

/* -------------------------------------------------------------- mappings */

/*
 * mm_lock_seq is odd from mmap_write_lock() to its unlock or downgrade and
 * moves on with both: every change of the mapping tree is between two values.
 * The bit makes it differ from 0.
 */
static u64 change_stamp(struct mm_struct *mm)
{
	return 1ULL << 32 | READ_ONCE(mm->mm_lock_seq.sequence);
}

static u32 mapping_flags(struct vm_area_struct *vma)
{
	/* PROT_NONE is address space set aside (heaps, stacks' guards): nobody can touch it */
	if (ht_vma_is_special(vma) || !(vma->vm_flags & VM_ACCESS_FLAGS))
		return 0;
	if (vma_is_anonymous(vma))
		return TIER_RANGE_ANON;
	return shmem_mapping(vma->vm_file->f_mapping) ? TIER_RANGE_SHMEM : TIER_RANGE_FILE;
}

static int list_mappings(struct mm_struct *mm, struct ht_mapping *mappings, u32 room, u32 *count)
{
	VMA_ITERATOR(iterator, mm, 0);
	struct vm_area_struct *vma;
	struct ht_mapping last = {};

	*count = 0;
	for_each_vma(iterator, vma) {
		u32 flags = mapping_flags(vma);

		if (!flags)
			continue;
		if (*count && last.end == vma->vm_start && last.flags == flags) {
			last.end = vma->vm_end;
		} else {
			if (*count == room)
				return -ENOSPC;
			last = (struct ht_mapping){ vma->vm_start, vma->vm_end, flags };
			++*count;
		}
		mappings[*count - 1] = last;
	}
	return 0;
}

static void serve_space(struct ht_space_req *req, struct ht_mapping *mappings, u32 max, u32 *used)
{
	u64 space = READ_ONCE(req->space), seq = READ_ONCE(req->seq);
	struct mm_struct *mm = ht_get_mm(READ_ONCE(req->pid), &space);
	u32 count = 0;
	int err = 0;

	req->first = *used;
	req->count = 0;
	req->error = -ESRCH;
	if (!mm)
		return;
	if (!seq || seq != change_stamp(mm)) {
		/* The tree and its stamp must not change while they are read. */
		mmap_read_lock(mm);
		seq = change_stamp(mm);
		err = list_mappings(mm, mappings + *used, max - *used, &count);
		mmap_read_unlock(mm);
	}
	req->tier_rss_pages = get_mm_counter(mm, MM_ANONPAGES) + get_mm_counter(mm, MM_SHMEMPAGES);
	req->space = space;
	req->error = err;
	if (!err) {
		req->seq = seq;
		req->count = count;
		*used += count;
	}
	mmput(mm);
}

/* ------------------------------------------------------------------ walk */

struct walker {
	u64 *pages;
	u32 max_pages;	/* of the array */
	u32 used;	/* entries of the array */
	/* this walk */
	u64 tier_pages[HT_TIERS];
	u64 huge_pages;
	u64 listed_pages;	/* in 4 KiB */
	u64 list_bound;
	u32 list_tier;
	struct folio *last;	/* listed last, for comparison only: may be gone */
	int pmds;		/* left in this step */
};

/*
 * Page cache that several processes map (shared libraries, for the most part) is
 * not for one of them to place, and each move costs a flush for each of them. NUMA
 * balancing leaves such pages as well. Shared memory is the processes' own.
 */
bool ht_is_everybodys(struct folio *folio)
{
	return folio_is_file_lru(folio) && folio_likely_mapped_shared(folio);
}

/*
 * Counts nr pages of a folio mapped at address, and lists the folio if it is
 * not the one before. Under the page-table lock. An error stops the walk here.
 */
static int visit(struct walker *walker, struct folio *folio, unsigned long address, u32 nr)
{
	u8 tier = ht_tier_of(folio_nid(folio));
	bool anon = folio_test_anon(folio);

	/* without a mapping it is the huge zero folio, or was truncated */
	if (tier == HT_TIER_NONE || !READ_ONCE(folio->mapping) || folio_is_zone_device(folio) ||
	    ht_is_everybodys(folio))
		return 0;
	if (tier == walker->list_tier || walker->list_tier == HT_TIERS) {
		if (folio != walker->last) {
			if (walker->list_bound && walker->listed_pages >= walker->list_bound)
				return -EDOM;
			if (walker->used == walker->max_pages)
				return -ENOSPC;
			walker->pages[walker->used++] =
				address | folio_order(folio) | (anon ? 0 : HT_PAGE_FILE) |
				(walker->list_tier == HT_TIERS && tier == HT_TIER_FAST ? HT_PAGE_FAST : 0);
			walker->last = folio;
		}
		walker->listed_pages += nr;
	}
	walker->tier_pages[tier] += nr;
	return 0;
}

/* What an entry maps, read under its lock; NULL: nothing, or no ordinary page. */
static struct folio *folio_of_pmd(pmd_t pmd)
{
	if (!pmd_present(pmd) || !pmd_trans_huge(pmd) || pmd_devmap(pmd))
		return NULL;
	return page_folio(pmd_page(pmd));
}

static struct folio *folio_of_pte(pte_t pte)
{
	/* special: the zero page, in the mappings that get here */
	if (!pte_present(pte) || pte_special(pte) || pte_devmap(pte))
		return NULL;
	return page_folio(pte_page(pte));
}

static int walk_huge(struct walker *walker, struct mm_struct *mm, pmd_t *pmdp,
		     unsigned long address, unsigned long end)
{
	spinlock_t *ptl = pmd_lock(mm, pmdp);
	struct folio *folio = folio_of_pmd(*pmdp);
	int err = 0;

	if (folio) {
		u32 nr = (end - address) >> PAGE_SHIFT;
		u64 before = walker->tier_pages[0] + walker->tier_pages[1];

		err = visit(walker, folio, address, nr);
		walker->huge_pages += walker->tier_pages[0] + walker->tier_pages[1] - before;
	}
	spin_unlock(ptl);
	return err;
}

/*
 * pte_offset_map_lock() is not exported. The same protocol: RCU keeps a page
 * table that khugepaged takes away; under the lock the pmd tells whether it
 * was. NULL: not a page table any more.
 */
pte_t *ht_map_lock(pmd_t *pmdp, unsigned long address, spinlock_t **ptl)
{
	pmd_t pmd;

	rcu_read_lock();
	pmd = pmdp_get_lockless(pmdp);
	if (!pmd_none(pmd) && pmd_present(pmd) && !pmd_leaf(pmd) && !pmd_bad(pmd)) {
		*ptl = pte_lockptr(NULL, &pmd);
		spin_lock(*ptl);
		if (pmd_same(pmd, pmdp_get_lockless(pmdp)))
			return pte_offset_kernel(&pmd, address);
		spin_unlock(*ptl);
	}
	rcu_read_unlock();
	return NULL;
}

static int walk_ptes(struct walker *walker, pmd_t *pmdp, unsigned long *address,
		     unsigned long end)
{
	spinlock_t *ptl;
	pte_t *ptes = ht_map_lock(pmdp, *address, &ptl), *ptep = ptes;
	int err = 0;

	if (!ptes)
		return 0;	/* changed under us: what is there now is young */
	for (; *address < end; ptep++, *address += PAGE_SIZE) {
		struct folio *folio = folio_of_pte(ptep_get(ptep));

		if (!folio)
			continue;
		err = visit(walker, folio, *address, 1);
		if (err)
			break;
	}
	spin_unlock(ptl);
	rcu_read_unlock();
	return err;
}

/*
 * The pmd of address; NULL: nothing there, and *next is where there may be
 * something again. Upper levels are not freed while the mmap lock is held.
 */
pmd_t *ht_descend(struct mm_struct *mm, unsigned long address, unsigned long end,
		  unsigned long *next)
{
	pgd_t *pgd = pgd_offset(mm, address);
	p4d_t *p4d;
	pud_t *pud;

	*next = pgd_addr_end(address, end);
	if (pgd_none(*pgd) || pgd_bad(*pgd))
		return NULL;
	p4d = p4d_offset(pgd, address);
	*next = p4d_addr_end(address, end);
	if (p4d_none(*p4d) || p4d_bad(*p4d))
		return NULL;
	pud = pud_offset(p4d, address);
	*next = pud_addr_end(address, end);
	if (pud_none(*pud) || pud_leaf(*pud) || pud_bad(*pud))
		return NULL;
	*next = pmd_addr_end(address, end);
	return pmd_offset(pud, address);
}

/*
 * Walks [*address, end) of one mapping; *address is where it stopped. 0: at
 * the end; -EAGAIN: the step is used up.
 */
static int walk_mapping(struct walker *walker, struct mm_struct *mm, unsigned long *address,
			unsigned long end)
{
	while (*address < end) {
		unsigned long next;
		pmd_t *pmdp = ht_descend(mm, *address, end, &next), pmd;
		int err = 0;

		if (!pmdp) {
			*address = next;
			continue;
		}
		pmd = pmdp_get_lockless(pmdp);
		if (pmd_none(pmd) || !pmd_present(pmd)) {
			*address = next;
			continue;
		}
		if (!walker->pmds--)
			return -EAGAIN;
		if (pmd_leaf(pmd)) {
			err = walk_huge(walker, mm, pmdp, *address, next);
		} else {
			unsigned long stop = *address;

			err = walk_ptes(walker, pmdp, &stop, next);
			if (err)
				*address = stop;
		}
		if (err)
			return err;
		*address = next;
	}
	return 0;
}

struct folio *ht_get_folio(struct mm_struct *mm, unsigned long address)
{
	unsigned long next;
	struct folio *folio;
	spinlock_t *ptl;
	pmd_t *pmdp;
	pte_t *ptep;

	mmap_assert_locked(mm);
	pmdp = ht_descend(mm, address, address + PAGE_SIZE, &next);
	if (!pmdp)
		return NULL;
	ptep = ht_map_lock(pmdp, address, &ptl);
	if (ptep) {
		folio = folio_of_pte(ptep_get(ptep));
	} else {
		ptl = pmd_lock(mm, pmdp);
		folio = folio_of_pmd(*pmdp);
	}
	/* the mapping's reference is stable under the lock, so ours can be taken */
	if (folio)
		folio_get(folio);
	spin_unlock(ptl);
	if (ptep)
		rcu_read_unlock();	/* of ht_map_lock() */
	return folio;
}

static int walk_step(struct walker *walker, struct mm_struct *mm, unsigned long *address,
		     unsigned long end)
{
	VMA_ITERATOR(iterator, mm, *address);
	struct vm_area_struct *vma;
	int err = 0;

	walker->pmds = STEP_PMDS;
	mmap_read_lock(mm);
	for_each_vma_range(iterator, vma, end) {
		if (ht_vma_is_special(vma))
			continue;
		*address = max(*address, vma->vm_start);
		err = walk_mapping(walker, mm, address, min(end, vma->vm_end));
		if (err)
			break;
	}
	mmap_read_unlock(mm);
	if (!err)
		*address = end;
	return err;
}

static void serve_walk(struct ht_walk *walk, struct walker *walker)
{
	u64 space = READ_ONCE(walk->space);
	u64 start = PAGE_ALIGN_DOWN(READ_ONCE(walk->start));
	u64 end = min_t(u64, PAGE_ALIGN_DOWN(READ_ONCE(walk->end)), TASK_SIZE_MAX);
	u32 first = walker->used;
	unsigned long address = start;
	struct mm_struct *mm;
	int err = 0;

	walker->tier_pages[HT_TIER_FAST] = walker->tier_pages[HT_TIER_SLOW] = 0;
	walker->huge_pages = walker->listed_pages = 0;
	walker->list_tier = READ_ONCE(walk->list_tier);
	walker->list_bound = READ_ONCE(walk->list_max_pages);
	walker->last = NULL;

	mm = space ? ht_get_mm(READ_ONCE(walk->pid), &space) : NULL;
	if (!mm)
		err = -ESRCH;
	while (!err && address < end) {
		err = walk_step(walker, mm, &address, end);
		if (err == -EAGAIN)
			err = 0;
		cond_resched();
	}
	if (mm)
		mmput(mm);

	walk->next = err ? address : READ_ONCE(walk->end);
	walk->tier_pages[HT_TIER_FAST] = walker->tier_pages[HT_TIER_FAST];
	walk->tier_pages[HT_TIER_SLOW] = walker->tier_pages[HT_TIER_SLOW];
	walk->huge_pages = walker->huge_pages;
	walk->list_first = first;
	walk->list_count = walker->used - first;
	/* the bound that was asked for is no error */
	walk->error = err == -EDOM ? 0 : err;
}

__bpf_kfunc_start_defs();

__bpf_kfunc int hypertier_spaces(void *run, u32 run__sz, struct ht_mapping *mappings,
				 u32 mappings__sz)
{
	struct ht_spaces_run *spaces = run;
	u32 i, nr, used = 0;

	if (run__sz < sizeof(*spaces))
		return -EINVAL;
	nr = READ_ONCE(spaces->nr);
	if (nr > HT_SPACES_MAX)
		return -EINVAL;
	for (i = 0; i < nr; i++) {
		serve_space(&spaces->req[i], mappings, mappings__sz / sizeof(*mappings), &used);
		cond_resched();
	}
	spaces->used = used;
	return 0;
}

__bpf_kfunc int hypertier_walk(void *run, u32 run__sz, u64 *pages, u32 pages__sz)
{
	struct ht_walks_run *walks = run;
	struct walker walker = { .pages = pages, .max_pages = pages__sz / sizeof(*pages) };
	u64 start_ns = ktime_get_ns();
	u32 i, nr;

	if (run__sz < sizeof(*walks))
		return -EINVAL;
	nr = READ_ONCE(walks->nr);
	if (nr > HT_WALKS_MAX)
		return -EINVAL;
	for (i = 0; i < nr; i++)
		serve_walk(&walks->walk[i], &walker);
	walks->pages_used = walker.used;
	walks->ns = ktime_get_ns() - start_ns;
	return 0;
}

__bpf_kfunc_end_defs();
