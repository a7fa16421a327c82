// SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause
/*
 * heattree: the hottest pages get the fast tier, as far as moving them pays.
 *
 * Heat is the engine's estimate (a radix tree over the addresses in which a page
 * with few samples looks like its neighbours and one with many like its own
 * count), so ranges go down to single pages. Two rules decide about moves:
 *
 * - Margin. A page displaces another only if its rate is margin_percent of the
 *   other's or more, and the more of the last moves were taken back, the more it
 *   must be: near the cut, pages do not change places for ever. A page that was
 *   moved lately goes back only for one that is far hotter.
 * - Trial. The pairs that pass the margin are watched for some epochs, as they
 *   stood, whether they were moved or not: samples of the hot side less samples
 *   of the cold side is what the swaps gain. Moves go on while that is, with
 *   some certainty, more than what they cost. So random accesses (nothing is
 *   hot) and sweeps (what was hot is not any more) move nothing.
 *
 * Works badly: on heat that moves faster than samples can tell; where the source
 * has very few samples (below 0.005 a page of the fast tier and epoch).
 */
#include <hypertier/policy.bpf.h>

#include "heattree.h"

/* How hot a page must be to displace another, percent of the other's rate, while moves last. */
SETTING(__u32, margin_percent, 130);
/* The same if one of the two pages came from there in the last twelve epochs. */
SETTING(__u32, back_percent, 200);
/* For so many percent of the moves that are taken back it must be 100 more. */
SETTING(__u32, vain_percent, 6);
/* What an epoch leaves of the trial's memory, 1/10000: half-life of 16 epochs. */
SETTING(__u32, trial_keep, 9576);
/* The same of its memory of the last swaps: half-life of 4 epochs. */
SETTING(__u32, recent_keep, 8409);
/* Epochs after seating in which moves need no proof. */
SETTING(__u32, open_epochs, 6);
/* Epochs in which a swap has to bring in what it cost. */
SETTING(__u32, pay_epochs, 40);
/* How much longer an access to slow memory takes, ns. */
SETTING(__u32, slow_extra_ns, 170);
/* Cost of swapping two pages, in accesses to slow memory; 0: as measured. */
SETTING(__u32, swap_misses, 0);
/* What taking a huge page apart costs beside moving its hot part, in swaps; 4294967295: never. */
SETTING(__u32, split_swaps, 64);

/* Not static: the compiler would take it apart into pieces whose names the kernel refuses. */
struct heattree_trial trial;

static inline struct heattree_settings settings(void)
{
	struct heattree_settings s = {
		.margin_percent = margin_percent,
		.back_percent = back_percent,
		.vain_percent = vain_percent,
		.trial_keep = trial_keep,
		.recent_keep = recent_keep,
		.open_epochs = open_epochs,
		.pay_epochs = pay_epochs,
		.slow_extra_ns = slow_extra_ns,
		.swap_misses = swap_misses,
		.split_swaps = split_swaps,
	};

	return s;
}

SEC("struct_ops/heattree_epoch")
void BPF_PROG(heattree_epoch, struct tier_scope *scope)
{
	struct heattree_settings s = settings();

	heattree_judge(&trial, scope, &s);
}

SEC("struct_ops/heattree_classify")
void BPF_PROG(heattree_classify, struct tier_range *range, struct tier_scope *scope)
{
	range->heat = heattree_heat(range);
}

SEC("struct_ops/heattree_admit_pair")
bool BPF_PROG(heattree_admit_pair, struct tier_range *hot, struct tier_range *cold, struct tier_scope *scope)
{
	struct heattree_settings s = settings();

	return heattree_admit(hot, cold, scope, &trial, &s);
}

HYPERTIER_POLICY(heattree,
	.epoch_begin = (void *)heattree_epoch,
	.classify = (void *)heattree_classify,
	.admit = (void *)heattree_admit_pair,
	.flags = HT_POLICY_ESTIMATED);
