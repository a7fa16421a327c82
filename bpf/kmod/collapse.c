// SPDX-License-Identifier: GPL-2.0-only
/*
 * khugepaged knows no tiers: it joins the pages of 2 MiB into a huge page on the
 * node that has most of them, and so takes what was placed page by page back.
 * While a policy is seated it passes over what lies in both tiers, and over what was
 * taken apart so lately that its parts are not placed yet; what else lies in one tier, it
 * joins there as ever. MADV_COLLAPSE does what its caller asks for.
 *
 * Means: a kprobe at the entry of the function with which khugepaged looks at 2 MiB
 * makes it return at once, with the answer "not this one" (the way of
 * Documentation/trace/kprobes.rst, "Changing Execution Path"). Returning from
 * there is one of that function's own ways: it holds nothing yet, and its caller
 * goes on with the next 2 MiB. A kernel that has no such function (it is static:
 * the compiler may have built it in elsewhere) is not interfered with.
 *
 * Nothing is locked. khugepaged holds the mmap lock (read), so mappings and upper
 * levels stay; RCU keeps the page table. Entries may change while they are read, and
 * pages may be moved until khugepaged has isolated them: the answer was right a
 * moment ago, and khugepaged looks again later.
 */
#include <linux/hash.h>
#include <linux/jiffies.h>
#include <linux/kprobes.h>
#include <linux/module.h>
#include <linux/ptrace.h>

#include "module.h"

static bool hold_collapse = true;
module_param(hold_collapse, bool, 0644);
MODULE_PARM_DESC(hold_collapse, "keep khugepaged from joining pages of both tiers while a policy is seated");

/* By khugepaged alone, one task. */
static ulong collapses_held;
module_param(collapses_held, ulong, 0444);
MODULE_PARM_DESC(collapses_held, "how often khugepaged was told so");

/*
 * What was taken apart last, by a hash. Written under move_mutex, read by khugepaged
 * without a lock: a mix of two entries names nothing, or holds one that need not be.
 */
#define APART_SECONDS 30
static struct {
	u64 space;
	u64 granule;
	unsigned long until;
} apart[1024];

static u32 apart_at(u64 space, u64 granule)
{
	return hash_64(space * GOLDEN_RATIO_64 ^ granule, ilog2(ARRAY_SIZE(apart)));
}

void ht_collapse_hold(u64 space, unsigned long address)
{
	u64 granule = address >> HT_GRANULE_SHIFT;
	u32 at = apart_at(space, granule);

	WRITE_ONCE(apart[at].space, space);
	WRITE_ONCE(apart[at].granule, granule);
	WRITE_ONCE(apart[at].until, jiffies + APART_SECONDS * HZ);
}

static bool apart_lately(u64 space, unsigned long address)
{
	u64 granule = address >> HT_GRANULE_SHIFT;
	u32 at = apart_at(space, granule);

	return READ_ONCE(apart[at].space) == space && READ_ONCE(apart[at].granule) == granule &&
	       time_before(jiffies, READ_ONCE(apart[at].until));
}

static bool in_both_tiers(struct mm_struct *mm, unsigned long address)
{
	bool seen[HT_TIERS] = {};
	unsigned long next;
	pmd_t *pmdp = ht_descend(mm, address, address + PMD_SIZE, &next), pmd;
	pte_t *ptes;
	int i;

	if (!pmdp)
		return false;
	rcu_read_lock();
	pmd = pmdp_get_lockless(pmdp);
	if (!pmd_none(pmd) && pmd_present(pmd) && !pmd_leaf(pmd) && !pmd_bad(pmd)) {
		ptes = pte_offset_kernel(&pmd, address);
		for (i = 0; i < PTRS_PER_PTE && !(seen[HT_TIER_FAST] && seen[HT_TIER_SLOW]); i++) {
			pte_t pte = ptep_get_lockless(ptes + i);
			u8 tier;

			if (!pte_present(pte) || pte_special(pte) || pte_devmap(pte))
				continue;
			tier = ht_tier_of(page_to_nid(pte_page(pte)));
			if (tier < HT_TIERS)
				seen[tier] = true;
		}
	}
	rcu_read_unlock();
	return seen[HT_TIER_FAST] && seen[HT_TIER_SLOW];
}

/* Stands in for the function: SCAN_FAIL of its enum scan_result. */
static int not_this_one(void)
{
	return 0;
}

/* int hpage_collapse_scan_pmd(mm, vma, address, bool *mmap_locked, control) */
static int on_scan(struct kprobe *probe, struct pt_regs *regs)
{
	struct mm_struct *mm = (void *)regs_get_kernel_argument(regs, 0);
	unsigned long address = regs_get_kernel_argument(regs, 2);

	/* a program that asks for it gets it */
	if (!(current->flags & PF_KTHREAD))
		return 0;
	if (!READ_ONCE(hold_collapse) || !ht_seats())
		return 0;
	if (!apart_lately(mm->context.ctx_id, address) && !in_both_tiers(mm, address))
		return 0;
	collapses_held++;
	instruction_pointer_set(regs, (unsigned long)not_this_one);
	return 1;	/* go on there */
}
NOKPROBE_SYMBOL(on_scan);

/* Only there so that the probe is not optimized into one that cannot change where to go on. */
static void after_scan(struct kprobe *probe, struct pt_regs *regs, unsigned long flags)
{
}
NOKPROBE_SYMBOL(after_scan);

static struct kprobe scan_probe = {
	.symbol_name = "hpage_collapse_scan_pmd",
	.pre_handler = on_scan,
	.post_handler = after_scan,
};
static bool probing;

void ht_collapse_init(void)
{
	int err = register_kprobe(&scan_probe);

	probing = !err;
	if (err)
		pr_warn("khugepaged cannot be kept from joining pages of both tiers (error %d)\n", err);
}

void ht_collapse_exit(void)
{
	if (!probing)
		return;
	unregister_kprobe(&scan_probe);
	/* khugepaged may still be in not_this_one(): until it has slept */
	synchronize_rcu_tasks();
}
