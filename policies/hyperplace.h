/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/*
 * The arithmetic of hyperplace: one definition for the BPF object and for the
 * tests that run it natively. What the rules are for is said in
 * hyperplace.bpf.c.
 */
#ifndef HYPERPLACE_H
#define HYPERPLACE_H

#include <hypertier/abi.h>

struct hyperplace_settings {
	__u32 scale;
	__u32 alpha;
	__u32 tau_split;
	__u32 split_sigmas;
	__u32 uneven;
	__u32 merge_idle_epochs;
	__u32 min_age_epochs;
	__u32 admit_sigmas;
};

#define HYPERPLACE_DEFAULTS { \
	.scale = 0, .alpha = 2, .tau_split = 0, .split_sigmas = 4, .uneven = 64, \
	.merge_idle_epochs = 8, .min_age_epochs = 1, .admit_sigmas = 5 }

/*
 * A decayed count C = sum d^i x_i of Poisson samples has variance C / (1 + d);
 * in 1/256, for the half-lives 1, 8, 48 and 256.
 */
static inline __u64 hyperplace_noise(__u32 scale)
{
	return scale == 0 ? 171 : scale == 1 ? 134 : scale == 2 ? 129 : 128;
}

/* Resident pages where they are known, else the size: sparse ranges look as hot as they are. */
static inline __u64 hyperplace_pages(const struct tier_range *r)
{
	if (r->tier_pages[HT_TIER_FAST] != HT_UNKNOWN64) {
		__u64 resident = r->tier_pages[HT_TIER_FAST] + r->tier_pages[HT_TIER_SLOW];

		if (resident)
			return resident;
	}
	return r->mapped_pages ? r->mapped_pages : 1;
}

static inline __u32 hyperplace_count(const struct tier_range *r, __u32 scale)
{
	return scale == 0 ? r->count[0] : scale == 1 ? r->count[1] : scale == 2 ? r->count[2] : r->count[3];
}

/* Samples per page; 32768 is one sample per 2 MiB. */
static inline __u32 hyperplace_heat(const struct tier_range *r, const struct hyperplace_settings *s)
{
	__u64 count = hyperplace_count(r, s->scale);
	__u64 heat = (count << 16) / hyperplace_pages(r);

	if (count && !heat)
		return 1;
	return heat > 0xffffffff ? 0xffffffff : (__u32)heat;
}

/* Does own exceed the count of one neighbour by more than the threshold? Both in 1/256 samples. */
static inline int hyperplace_exceeds(__u64 own, __u64 neighbour, __u32 cpus, const struct hyperplace_settings *s)
{
	__u64 fixed = ((__u64)s->alpha * s->tau_split * cpus) << HT_COUNT_SHIFT;
	__u64 excess, variance;

	if (own <= neighbour + fixed)
		return 0;
	excess = own - neighbour;
	variance = (own + neighbour) * hyperplace_noise(0);
	return excess * excess > (__u64)s->split_sigmas * s->split_sigmas * variance;
}

static inline __u32 hyperplace_action(const struct tier_range *r, __u32 cpus,
				      const struct hyperplace_settings *s)
{
	if (r->idle_epochs >= s->merge_idle_epochs && !(r->count[0] >> HT_COUNT_SHIFT))
		return TIER_MERGE;
	if (r->flags & TIER_RANGE_MIN)
		return TIER_KEEP;
	if (s->uneven && r->uneven >= s->uneven)
		return TIER_SPLIT;
	if (r->flags & TIER_RANGE_ROOT)
		return hyperplace_exceeds(r->count[0], 0, cpus, s) ? TIER_SPLIT : TIER_KEEP;
	if (r->left_count != HT_UNKNOWN32 && hyperplace_exceeds(r->count[0], r->left_count, cpus, s))
		return TIER_SPLIT;
	if (r->right_count != HT_UNKNOWN32 && hyperplace_exceeds(r->count[0], r->right_count, cpus, s))
		return TIER_SPLIT;
	return TIER_KEEP;
}

/*
 * Is hot hotter than cold beyond chance, by the counts of one scale? expected is
 * the count that hot would have if it were as hot as cold; 1/16 samples keep the
 * squares in 64 bits.
 */
static inline int hyperplace_hotter(const struct tier_range *hot, const struct tier_range *cold, __u32 scale,
				    __u32 sigmas)
{
	__u64 hot_count = hyperplace_count(hot, scale) >> 4;
	__u64 cold_count = hyperplace_count(cold, scale) >> 4;
	__u64 hot_pages = hyperplace_pages(hot);
	__u64 cold_pages = hyperplace_pages(cold);
	__u64 expected = cold_count * hot_pages / cold_pages;
	__u64 ratio, expected_variance, variance, excess;

	if (expected >= hot_count)
		return 0;
	/* variance of expected = expected * ratio, the ratio of the sizes in 1/16, bounded */
	ratio = (hot_pages << 4) / cold_pages;
	if (ratio > 0xffff)
		ratio = 0xffff;
	/* one sample more: a range that happened to get none is not surely cold */
	expected_variance = (cold_count + 16) * hot_pages / cold_pages * ratio;
	variance = ((hot_count << 4) + expected_variance) * hyperplace_noise(scale) >> 8;
	excess = hot_count - expected;
	return excess * excess > (__u64)sigmas * sigmas * variance;
}

/*
 * Only what is hotter beyond chance is worth a move: by the fresh counts, which
 * are quick to tell a large difference, or by the next longer memory, which
 * tells a small one.
 */
static inline int hyperplace_admit(const struct tier_range *hot, const struct tier_range *cold,
				   const struct hyperplace_settings *s)
{
	if (hot->age_epochs < s->min_age_epochs)
		return 0;
	if (cold->start == cold->end)
		return 1;
	if (cold->age_epochs < s->min_age_epochs)
		return 0;
	return hyperplace_hotter(hot, cold, s->scale, s->admit_sigmas) ||
	       hyperplace_hotter(hot, cold, s->scale + 1, s->admit_sigmas);
}

#endif /* HYPERPLACE_H */
