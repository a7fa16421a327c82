/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/*
 * The arithmetic of heattree: one definition for the BPF object, for the tests
 * and for the replay, which run it natively. What the rules are for is said in
 * heattree.bpf.c.
 */
#ifndef HEATTREE_H
#define HEATTREE_H

#include <hypertier/abi.h>

struct heattree_settings {
	__u32 margin_percent;
	__u32 back_percent;
	__u32 vain_percent;
	__u32 trial_keep;
	__u32 recent_keep;
	__u32 open_epochs;
	__u32 pay_epochs;
	__u32 slow_extra_ns;
	__u32 swap_misses;
	__u32 split_swaps;
};

#define HEATTREE_DEFAULTS { \
	.margin_percent = 130, .back_percent = 200, .vain_percent = 6, .trial_keep = 9576, .recent_keep = 8409, .open_epochs = 6, .pay_epochs = 40, \
	.slow_extra_ns = 170, .swap_misses = 0, .split_swaps = 64 }

/* What swaps on trial brought, decayed, in 1/256 samples. */
struct heattree_sum {
	__s64 gained;	/* samples of the hot sides less those of the cold sides */
	__s64 seen;	/* samples of both: the variance of gained */
	__s64 swaps;	/* page pairs, each epoch anew */
};

struct heattree_trial {
	struct heattree_sum all;
	struct heattree_sum recent;
	__u64 moved;	/* 1/256 pages, decayed, */
	__u64 moved_back;	/* and those of them that came back */
	__u32 epochs;
	__u32 open;	/* moves pay, or nothing speaks against it yet */
	__u32 margin_percent;	/* now */
};

static inline __u32 heattree_sqrt(__u64 value)
{
	__u64 root = 0;
	int bit;

	for (bit = 31; bit >= 0; bit--) {
		__u64 next = root | 1ULL << bit;

		if (next * next <= value)
			root = next;
	}
	return (__u32)root;
}

/* What a swap costs, in accesses to slow memory. */
static inline __u64 heattree_swap_misses(const struct tier_scope *scope, const struct heattree_settings *s)
{
	if (s->swap_misses)
		return s->swap_misses;
	return scope->swap_ns && s->slow_extra_ns ? scope->swap_ns / s->slow_extra_ns : 50;
}

/* Misses that a sample an epoch stands for until a swap has to have paid. 0: not known. */
static inline __u64 heattree_misses_per_sample(const struct tier_scope *scope, const struct heattree_settings *s)
{
	return (__u64)scope->period * (s->pay_epochs ? s->pay_epochs : 1);
}

/*
 * Samples, in 1/256, that a swap has to gain in each of pay_epochs epochs, times
 * swaps. Of a source that counts no misses (accessed bits) nobody knows what a
 * sample is worth: there the hot sides must have a seventh more than the cold ones,
 * or pages that are all alike would change places for ever.
 */
static inline __s64 heattree_cost(const struct heattree_sum *sum, const struct tier_scope *scope,
				  const struct heattree_settings *s)
{
	__u64 per = heattree_misses_per_sample(scope, s);

	if (!per)
		return sum->seen >> 4;
	return (__s64)((__u64)sum->swaps * heattree_swap_misses(scope, s) / per);
}

static inline __u64 heattree_kept(__s64 value, __u32 keep)
{
	/* negative numbers are not divided: BPF has no signed division everywhere */
	return value < 0 ? -((__u64)-value * keep / 10000) : (__u64)value * keep / 10000;
}

static inline void heattree_add(struct heattree_sum *sum, const struct tier_scope *scope, __u32 keep)
{
	__u64 hot = scope->trial_hits[HT_TIER_SLOW], cold = scope->trial_hits[HT_TIER_FAST];

	sum->gained = heattree_kept(sum->gained, keep) + ((__s64)hot - (__s64)cold) * 256;
	sum->seen = heattree_kept(sum->seen, keep) + (__s64)(hot + cold) * 256;
	sum->swaps = heattree_kept(sum->swaps, keep) + (__s64)scope->trial_pages[HT_TIER_SLOW] * 256;
}

/* Of gained, in 1/256 samples. */
static inline __s64 heattree_deviation(const struct heattree_sum *sum)
{
	return heattree_sqrt((__u64)sum->seen << 8);
}

/*
 * The margin: 100 more for each vain_percent of the moves that were taken back, 300 at
 * most. A twentieth of the fast tier counts as moved for good: a few moves to and fro
 * among many pages that stay are no reason.
 */
static inline __u32 heattree_margin(const struct heattree_trial *t, const struct tier_scope *scope,
				    const struct heattree_settings *s)
{
	__u64 moved = t->moved + scope->fast_capacity_pages * 256 / 20 + 1;
	__u64 more = t->moved_back * 100 * 100 / (moved * (s->vain_percent ? s->vain_percent : 1));

	return s->margin_percent + (__u32)(more < 300 ? more : 300);
}

/*
 * Once an epoch: are moves worth their cost? Yes if, over all that is
 * remembered, they brought more by half a standard deviation; but no if the
 * last ones alone brought less, by a whole one.
 */
static inline void heattree_judge(struct heattree_trial *t, const struct tier_scope *scope,
				  const struct heattree_settings *s)
{
	const struct heattree_sum *all = &t->all, *recent = &t->recent;

	/* Accessed bits (no period) are read in some epochs only: the others tell nothing, and nothing is forgotten. */
	if (scope->period || scope->trial_pages[HT_TIER_SLOW]) {
		heattree_add(&t->all, scope, s->trial_keep);
		heattree_add(&t->recent, scope, s->recent_keep);
	}
	t->moved = heattree_kept(t->moved, s->trial_keep) + scope->moved_pages * 256;
	t->moved_back = heattree_kept(t->moved_back, s->trial_keep) + scope->moved_back_pages * 256;
	t->margin_percent = heattree_margin(t, scope, s);
	t->epochs++;
	t->open = t->epochs <= s->open_epochs ||
		  (all->gained - heattree_deviation(all) / 2 > heattree_cost(all, scope, s) - 256 &&
		   recent->gained + heattree_deviation(recent) > heattree_cost(recent, scope, s) - 256);
}

static inline __u32 heattree_heat(const struct tier_range *r)
{
	return r->rate;
}

/* Does the difference of the rates promise what a swap costs? Rates are of 2^24 pages. */
static inline int heattree_pays(const struct tier_range *hot, const struct tier_range *cold,
				const struct tier_scope *scope, const struct heattree_settings *s)
{
	__u64 per = heattree_misses_per_sample(scope, s);

	return !per || (__u64)(hot->rate - cold->rate) * per >= heattree_swap_misses(scope, s) << 24;
}

/*
 * A huge page is taken apart if what its hot part gains pays for the swaps of that part
 * and for as much again as split_swaps: the splitting, and the longer page walks from
 * then on. What was seen of the part is the proof; a source that counts no misses has none.
 */
static inline int heattree_split(const struct tier_range *hot, const struct tier_range *cold,
				 const struct tier_scope *scope, const struct heattree_settings *s)
{
	__u64 per = heattree_misses_per_sample(scope, s);

	return per && (__u64)(hot->rate - cold->rate) * per * hot->mapped_pages >=
			      heattree_swap_misses(scope, s) * (hot->mapped_pages + s->split_swaps) << 24;
}

static inline int heattree_admit(struct tier_range *hot, const struct tier_range *cold, const struct tier_scope *scope,
				 const struct heattree_trial *t, const struct heattree_settings *s)
{
	__u32 margin = t->margin_percent;

	if (hot->flags & TIER_RANGE_BACK && margin < s->back_percent)
		margin = s->back_percent;
	if ((__u64)hot->rate * 100 <= (__u64)cold->rate * margin)
		return 0;
	if (hot->flags & TIER_RANGE_SPLIT)
		return heattree_split(hot, cold, scope, s);
	if (!heattree_pays(hot, cold, scope, s))
		return 0;
	/* Room for what comes is proved by what came: its rate is how new memory was used. */
	if (t->open || hot->flags & TIER_RANGE_COMING)
		return 1;
	hot->action = TIER_TRY;
	return 0;
}

#endif /* HEATTREE_H */
