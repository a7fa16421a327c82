// SPDX-License-Identifier: GPL-2.0-only
/*
 * Accessed bits as a source of heat: they are cleared, and an interval later
 * tested, a whole granule under one page-table lock.
 *
 * A translation that a CPU has cached keeps its page looking untouched until it
 * is evicted, and the hottest ones never are: huge pages on hardware, everything
 * under QEMU's large TLB, once nothing is moved any more and so nothing flushed.
 * So the first step ends with one flush of the process, if it cleared any bit: of
 * a process that is idle none, of a busy one four a second. It comes after all of
 * the process's granules, late by the time that clearing them took, which is
 * small beside the interval.
 *
 * Reclaim lives on the same bits. Marking the folio young instead, as page_idle
 * does, would touch every struct page, and the aging of the multi-gen LRU does
 * not look there. So the second step only reads, which leaves pages that were
 * touched in between young, and puts the bit back where the first one took it
 * and nobody touched since: afterwards the bits tell the kernel what they told
 * it before. Only an aging walk in between misses some, until its next round.
 *
 * Secondary MMUs are not told: the bits are hints, so nothing depends on it. The
 * memory of a nested virtual machine is touched through tables that are not read
 * here, and looks cold.
 *
 * Locks are those of walk.c: the mmap lock (read) keeps mappings and upper
 * levels, dropped after every STEP granules so that no mmap() waits long; the
 * page-table lock keeps the entries and is held over one page table at most.
 * Bits are changed by atomic operations, since CPUs set theirs meanwhile.
 */
#include <linux/mm.h>
#include <linux/mmap_lock.h>
#include <linux/sched/mm.h>

#include <asm/tlbflush.h>

#include "module.h"

#define STEP 64	/* granules read under one hold of the mmap lock */

struct pages {
	u64 bits[HT_GRANULE_PAGES / 64];
};

/* One process in one step, under its mmap lock. */
struct visit {
	struct mm_struct *mm;
	u64 visits;
	u64 cleared;
};

/* One granule in one step. */
struct reader {
	struct visit *visit;
	bool test;
	struct pages took;	/* test: what clearing found set */
	/* found now */
	struct pages present;
	struct pages set;
	bool huge;
};

static void mark(struct pages *pages, u32 page)
{
	pages->bits[page / 64] |= BIT_ULL(page % 64);
}

static bool marked(const struct pages *pages, u32 page)
{
	return pages->bits[page / 64] & BIT_ULL(page % 64);
}

/* An entry's bit, read or taken. The word is an entry of any level: the bit is the same. */
static bool read_bit(struct reader *reader, unsigned long *entry, u32 page)
{
	if (!reader->test) {
		bool young = test_and_clear_bit(_PAGE_BIT_ACCESSED, entry);

		reader->visit->cleared += young;
		return young;
	}
	if (test_bit(_PAGE_BIT_ACCESSED, entry))
		return true;
	if (marked(&reader->took, page))
		set_bit(_PAGE_BIT_ACCESSED, entry);
	return false;
}

static void read_ptes(struct reader *reader, pmd_t *pmdp, unsigned long address, unsigned long end)
{
	spinlock_t *ptl;
	pte_t *ptep = ht_map_lock(pmdp, address, &ptl);

	if (!ptep)
		return;
	for (; address < end; ptep++, address += PAGE_SIZE) {
		pte_t pte = ptep_get(ptep);
		u32 page = (address & (HT_GRANULE_SIZE - 1)) >> PAGE_SHIFT;

		if (!pte_present(pte) || pte_special(pte) || pte_devmap(pte))
			continue;
		reader->visit->visits++;
		mark(&reader->present, page);
		if (read_bit(reader, (unsigned long *)&ptep->pte, page))
			mark(&reader->set, page);
	}
	spin_unlock(ptl);
	rcu_read_unlock();	/* of ht_map_lock() */
}

/* One bit for all pages. Is it not huge any more, nothing is read. */
static void read_huge(struct reader *reader, struct mm_struct *mm, pmd_t *pmdp,
		      unsigned long address, unsigned long end)
{
	spinlock_t *ptl = pmd_lock(mm, pmdp);
	u32 page = (address & (HT_GRANULE_SIZE - 1)) >> PAGE_SHIFT;

	if (pmd_present(*pmdp) && pmd_trans_huge(*pmdp) && !pmd_devmap(*pmdp)) {
		bool young = read_bit(reader, (unsigned long *)&pmdp->pmd, page);

		reader->visit->visits++;
		reader->huge = true;
		for (; address < end; address += PAGE_SIZE, page++) {
			mark(&reader->present, page);
			if (young)
				mark(&reader->set, page);
		}
	}
	spin_unlock(ptl);
}

/* Under the mmap lock. */
static void read_granule(struct reader *reader, struct mm_struct *mm, unsigned long start)
{
	unsigned long next, end = start + HT_GRANULE_SIZE;
	struct vm_area_struct *vma;
	VMA_ITERATOR(iterator, mm, start);
	pmd_t *pmdp = ht_descend(mm, start, end, &next), pmd;

	if (!pmdp)
		return;
	pmd = pmdp_get_lockless(pmdp);
	if (pmd_none(pmd) || !pmd_present(pmd))
		return;
	for_each_vma_range(iterator, vma, end) {
		unsigned long from = max(start, vma->vm_start), to = min(end, vma->vm_end);

		if (ht_vma_is_special(vma))
			continue;
		if (pmd_leaf(pmd))
			read_huge(reader, mm, pmdp, from, to);
		else
			read_ptes(reader, pmdp, from, to);
	}
}

static void serve(struct ht_check *check, u32 phase, struct visit *visit)
{
	struct reader reader = { .visit = visit, .test = phase == HT_CHECK_TEST };
	struct ht_bits *bits = &check->bits;
	u64 granule = READ_ONCE(bits->granule), now = ktime_get_ns();
	bool same = READ_ONCE(bits->huge);
	u32 i;

	if (granule >= TASK_SIZE_MAX >> HT_GRANULE_SHIFT) {
		check->error = -EINVAL;
		return;
	}
	if (reader.test)
		memcpy(&reader.took, bits->set, sizeof(reader.took));
	read_granule(&reader, visit->mm, granule << HT_GRANULE_SHIFT);
	check->error = 0;
	if (!reader.test) {
		check->cleared_ns = now;
		bits->huge = reader.huge;
		memcpy(bits->checked, &reader.present, sizeof(bits->checked));
	} else {
		bits->interval_ns = now - READ_ONCE(check->cleared_ns);
		/* what was split or collapsed in between says nothing */
		for (i = 0; i < ARRAY_SIZE(bits->checked); i++)
			bits->checked[i] = same == reader.huge ? bits->checked[i] & reader.present.bits[i] : 0;
	}
	memcpy(bits->set, &reader.set, sizeof(bits->set));
}

/* Lets go of the process. The flush needs no lock: it only makes bits tell more. */
static void leave(struct visit *visit, struct ht_bits_run *checks)
{
	mmap_read_unlock(visit->mm);
	if (visit->cleared && static_call_query(ht_flush_tlb_mm_range)) {
		ht_call(flush_tlb_mm_range)(visit->mm, 0, TLB_FLUSH_ALL, PAGE_SHIFT, false);
		checks->flush_calls++;
	}
	checks->visits += visit->visits;
	mmput(visit->mm);
	*visit = (struct visit){};
}

__bpf_kfunc_start_defs();

/* Entries of one space should be neighbours: they share one hold of its locks. */
__bpf_kfunc int hypertier_bits(void *run, u32 run__sz)
{
	struct ht_bits_run *checks = run;
	u64 start_ns = ktime_get_ns(), space = 0;
	struct visit visit = {};
	u32 i, nr, phase, held = 0;

	if (run__sz < sizeof(*checks))
		return -EINVAL;
	nr = READ_ONCE(checks->nr);
	phase = READ_ONCE(checks->phase);
	if (nr > HT_CHECKS_MAX || phase > HT_CHECK_TEST)
		return -EINVAL;
	checks->visits = 0;
	checks->flush_calls = 0;
	for (i = 0; i < nr; i++) {
		struct ht_check *check = &checks->check[i];
		u64 wanted = READ_ONCE(check->bits.space);

		if (visit.mm && wanted != space) {
			leave(&visit, checks);
			cond_resched();
		} else if (visit.mm && held++ == STEP) {
			mmap_read_unlock(visit.mm);
			cond_resched();
			mmap_read_lock(visit.mm);
			held = 1;
		}
		if (!visit.mm) {
			space = wanted;
			visit.mm = space ? ht_get_mm(READ_ONCE(check->pid), &space) : NULL;
			if (!visit.mm) {
				check->error = -ESRCH;
				continue;
			}
			mmap_read_lock(visit.mm);
			held = 1;
		}
		serve(check, phase, &visit);
	}
	if (visit.mm)
		leave(&visit, checks);
	checks->ns = ktime_get_ns() - start_ns;
	return 0;
}

__bpf_kfunc_end_defs();
