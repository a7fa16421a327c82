/* SPDX-License-Identifier: GPL-2.0-only */
/*
 * Shared inside hypertier.ko. One file a duty:
 *   main.c     /dev/hypertier, load and unload
 *   symbols.c  kernel functions that are not exported
 *   policy.c   the struct_ops type, the seats, classify/admit/moved
 *   walk.c     spaces and their mappings, page-table walk
 *   move.c     exchange and migrate
 *   entries.c  small pages that are mapped once
 *   abit.c     accessed bits, cleared and tested
 *   collapse.c khugepaged kept off what lies in both tiers
 */
#ifndef HYPERTIER_MODULE_H
#define HYPERTIER_MODULE_H

#undef pr_fmt
#define pr_fmt(fmt) KBUILD_MODNAME ": " fmt

#include <linux/bpf.h>
#include <linux/btf.h>
#include <linux/mm.h>
#include <linux/migrate.h>
#include <linux/rmap.h>
#include <linux/static_call.h>
#include <linux/types.h>
#include <hypertier/abi.h>

/* ---------------------------------------------------------------- symbols.c */

/* Of mm/internal.h and linux/swap.h; the rest is declared by public headers. */
bool folio_isolate_lru(struct folio *folio);
void folio_putback_lru(struct folio *folio);
void try_to_unmap_flush(void);
struct anon_vma *folio_get_anon_vma(struct folio *folio);
bool __folio_unqueue_deferred_split(struct folio *folio);
void lru_add_drain(void);
void lru_add_drain_all(void);
/* Of asm/tlbflush.h, which hides it from modules. */
void flush_tlb_mm_range(struct mm_struct *mm, unsigned long start, unsigned long end,
			unsigned int stride_shift, bool freed_tables);

#define HT_EXCHANGES (1 << HT_MOVER_EXCHANGE)
#define HT_MIGRATES (1 << HT_MOVER_MIGRATE)
#define HT_SPLITS (1 << HT_MOVERS) /* huge pages are taken apart: no mover, and told to nobody */

/* Every unexported function of the module, with the movers that need it. */
#define HT_SYMBOLS(SYMBOL)                                           \
	SYMBOL(folio_isolate_lru, HT_EXCHANGES | HT_MIGRATES)        \
	SYMBOL(folio_putback_lru, HT_EXCHANGES | HT_MIGRATES)        \
	SYMBOL(lru_add_drain, HT_EXCHANGES | HT_MIGRATES)            \
	SYMBOL(lru_add_drain_all, HT_EXCHANGES | HT_MIGRATES)        \
	SYMBOL(try_to_migrate, HT_EXCHANGES)                         \
	SYMBOL(try_to_unmap_flush, HT_EXCHANGES)                     \
	SYMBOL(remove_migration_ptes, HT_EXCHANGES)                  \
	SYMBOL(folio_get_anon_vma, HT_EXCHANGES)                     \
	SYMBOL(__put_anon_vma, HT_EXCHANGES)                         \
	SYMBOL(__folio_unqueue_deferred_split, HT_EXCHANGES)         \
	SYMBOL(deferred_split_folio, HT_EXCHANGES)                   \
	SYMBOL(folio_remove_rmap_ptes, HT_EXCHANGES | HT_MIGRATES)   \
	SYMBOL(folio_add_anon_rmap_ptes, HT_MIGRATES)                \
	SYMBOL(flush_tlb_mm_range, HT_EXCHANGES | HT_MIGRATES)       \
	SYMBOL(migrate_pages, HT_MIGRATES)                           \
	SYMBOL(putback_movable_pages, HT_MIGRATES)                   \
	SYMBOL(split_huge_page_to_list_to_order, HT_SPLITS)

#define HT_DECLARE(symbol, movers) DECLARE_STATIC_CALL(ht_##symbol, symbol);
HT_SYMBOLS(HT_DECLARE)
#undef HT_DECLARE

/* Call of an unexported function: always direct, see symbols.c. */
#define ht_call(symbol) static_call(ht_##symbol)

void ht_resolve_symbols(void);

/* Filled by ht_resolve_symbols(), constant afterwards. */
extern u32 ht_movers;
extern char ht_missing[sizeof_field(struct ht_module_info, missing)];

/* ------------------------------------------------------------------- main.c */

/* enum ht_tier of a node; HT_TIER_NONE until HT_IOC_TIERS names it. */
u8 ht_tier_of(int nid);
u64 ht_tier_nodes(enum ht_tier tier);
/* Is tierd there? Tells a policy that leaves whether it was asked to. */
bool ht_device_is_open(void);

/* ----------------------------------------------------------------- policy.c */

int ht_policy_init(void);
u64 ht_seats(void);
/* Says what a seat holds, or ejects its policy. */
int ht_ask_seat(struct ht_seat __user *user, bool ejects);

/* ------------------------------------------------------------------- walk.c */

/*
 * The mm of a thread group, if its space is (or *space is 0: then it is
 * filled in). NULL when gone. The caller mmput()s it: may sleep.
 */
struct mm_struct *ht_get_mm(u32 pid, u64 *space);
/*
 * The folio mapped at address, with a reference, not marked accessed as GUP
 * would; NULL: none, or the zero page. Under the mmap lock.
 */
struct folio *ht_get_folio(struct mm_struct *mm, unsigned long address);
/* Mappings whose pages are not the module's business. */
bool ht_vma_is_special(struct vm_area_struct *vma);
/* Nor are these pages, in whatever mapping. */
bool ht_is_everybodys(struct folio *folio);
/*
 * The pmd of address; NULL: nothing there, and *next is where there may be
 * something again. Under the mmap lock.
 */
pmd_t *ht_descend(struct mm_struct *mm, unsigned long address, unsigned long end,
		  unsigned long *next);
/*
 * The entry of address, its page table locked and RCU held; NULL: no page table
 * any more, nothing is held.
 */
pte_t *ht_map_lock(pmd_t *pmdp, unsigned long address, spinlock_t **ptl);

/* ------------------------------------------------------------------- move.c */

/* Before the module goes: nothing of ours runs any more. */
void ht_move_exit(void);
/* Swaps the contents of two pages. */
void ht_swap_page(u64 *a, u64 *b);
/*
 * A folio of that tier, or NULL. Small ones may dip into reserves: a batch gives back
 * what it takes. Does not sleep.
 */
struct folio *ht_allocate(enum ht_tier tier, unsigned int order);

/* ---------------------------------------------------------------- entries.c */

#define HT_ENTRIES_PAIRS 1024	/* unmapped under one flush: users wait while they are copied */

/*
 * Moves those of the pairs (HT_ENTRIES_PAIRS at most) whose pages are of the common
 * kind, by these movers, accounts for them and sets their bits in done. The others are
 * as they were. Under move_mutex.
 */
void ht_move_entries(struct ht_pair *pairs, u32 nr, u32 movers, unsigned long *done,
		     struct ht_exchange_run *run);

/* --------------------------------------------------------------- collapse.c */

void ht_collapse_init(void);
/* What was taken apart just now. Under move_mutex. */
void ht_collapse_hold(u64 space, unsigned long address);
/* Before the module goes: khugepaged does not come through here any more. */
void ht_collapse_exit(void);

/* ------------------------------------------------------------- kfuncs (all) */

int hypertier_classify(struct ht_run *run, u32 run__sz, struct tier_range *ranges, u32 ranges__sz);
int hypertier_admit(struct ht_run *run, u32 run__sz, struct tier_pair *pairs, u32 pairs__sz);
int hypertier_moved(struct ht_run *run, u32 run__sz, struct tier_result *results, u32 results__sz);
/* void: the verifier knows no arrays of structs within an argument's struct */
int hypertier_spaces(void *run, u32 run__sz, struct ht_mapping *mappings, u32 mappings__sz);
int hypertier_walk(void *run, u32 run__sz, u64 *pages, u32 pages__sz);
int hypertier_bits(void *run, u32 run__sz);
int hypertier_exchange(struct ht_exchange_run *run, u32 run__sz, struct ht_pair *pairs, u32 pairs__sz);

#endif
