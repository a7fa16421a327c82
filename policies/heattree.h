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
	__u32 trial_keep;
	__u32 open_epochs;
	__u32 pay_epochs;
	__u32 slow_extra_ns;
	__u32 swap_misses;
};

#define HEATTREE_DEFAULTS { \
	.margin_percent = 120, .trial_keep = 9576, .open_epochs = 6, .pay_epochs = 40, \
	.slow_extra_ns = 170, .swap_misses = 0 }

/* What swaps on trial brought, decayed, in 1/256 samples. */
struct heattree_trial {
	__s64 gained;	/* samples of the hot sides less those of the cold sides */
	__s64 seen;	/* samples of both: the variance of gained */
	__s64 swaps;	/* page pairs, each epoch anew */
	__u32 epochs;
	__u32 open;	/* moves pay, or nothing speaks against it yet */
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

/* Samples, in 1/256, that a swap has to gain in each of pay_epochs epochs, times swaps. */
static inline __s64 heattree_cost(__s64 swaps, const struct tier_scope *scope, const struct heattree_settings *s)
{
	__u64 misses = s->swap_misses;
	__u64 per = (__u64)(scope->period ? scope->period : 1) * (s->pay_epochs ? s->pay_epochs : 1);

	if (!misses)
		misses = scope->swap_ns && s->slow_extra_ns ? scope->swap_ns / s->slow_extra_ns : 50;
	return (__s64)((__u64)swaps * misses / per);
}

/* Once an epoch: are moves worth their cost? */
static inline void heattree_judge(struct heattree_trial *t, const struct tier_scope *scope,
				  const struct heattree_settings *s)
{
	__u64 hot = scope->trial_hits[HT_TIER_SLOW], cold = scope->trial_hits[HT_TIER_FAST];
	__u64 pairs = scope->trial_pages[HT_TIER_SLOW];

	/* negative numbers are not divided: BPF has no signed division everywhere */
	t->gained = t->gained < 0 ? -(__s64)((__u64)-t->gained * s->trial_keep / 10000) :
				    (__s64)((__u64)t->gained * s->trial_keep / 10000);
	t->seen = (__s64)((__u64)t->seen * s->trial_keep / 10000);
	t->swaps = (__s64)((__u64)t->swaps * s->trial_keep / 10000);
	t->gained += ((__s64)hot - (__s64)cold) * 256;
	t->seen += (__s64)(hot + cold) * 256;
	t->swaps += (__s64)pairs * 256;
	t->epochs++;
	t->open = t->epochs <= s->open_epochs ||
		  t->gained - (__s64)(heattree_sqrt((__u64)t->seen << 8) / 2) > heattree_cost(t->swaps, scope, s) - 256;
}

static inline __u32 heattree_heat(const struct tier_range *r)
{
	return r->rate;
}

static inline int heattree_admit(struct tier_range *hot, const struct tier_range *cold,
				 const struct heattree_trial *t, const struct heattree_settings *s)
{
	if ((__u64)hot->rate * 100 <= (__u64)cold->rate * s->margin_percent)
		return 0;
	if (t->open)
		return 1;
	hot->action = TIER_TRY;
	return 0;
}

#endif /* HEATTREE_H */
