// SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause
/*
 * hyperplace: ranges that are fine where heat is uneven; the hottest per page
 * get the fast tier.
 *
 * Where it comes from: the guest half of Demeter (SOSP'25). Each epoch counts
 * are halved, a range whose count stands out from a neighbour's is split in
 * two, neighbours that have gone silent are merged, and ranges are ranked by
 * count per page. Four things differ, each with a setting that gives the
 * original back:
 *
 * - Threshold. The original splits when the excess over a neighbour is more
 *   than alpha * tau_split * CPUs samples (2 * 15 * CPUs): a fixed number, out
 *   of reach where samples are few, so that only ~100 ranges form in a large
 *   guest. Here the excess must be more than chance explains: split_sigmas
 *   standard deviations of the difference of two such counts. That scales by
 *   itself with the sample rate and the size of the scope.
 * - Inside. A range between equally busy neighbours never splits in the
 *   original, however hot a part of it is. Here it also splits when its own
 *   samples are spread more unevenly than chance explains (range->uneven, a
 *   lower bound, so it is silent where samples are too few to tell).
 * - Admission. The original moves on every difference of rank. Here a pair is
 *   admitted only if the hot side is hotter beyond chance (admit_sigmas), so
 *   that even heat moves nothing.
 * - Youth. Ranges younger than min_age_epochs are held back by admit, in both
 *   directions: a new half keeps its rank, so it is not mistaken for cold. One
 *   epoch, not the original's three: where the hot set slides, three are half of
 *   its life (redis, youngest keys hottest: true hit ratio 0.46 with 3, 0.59 with
 *   1), and chance is what admission is for.
 *
 * Works badly: on heat that is scattered below the engine's smallest range (2
 * MiB unless set lower): the pieces are averaged. On very few samples: half-life
 * 1 forgets within two epochs; use scale=1 or 2 there. On a hot region that is
 * even, large and beside cold memory: the neighbour rule cuts it finer than
 * needed (alpha, split_sigmas raise the bar).
 */
#include <hypertier/policy.bpf.h>

#include "hyperplace.h"

/* Which decayed count is heat: half-lives of 0: 1, 1: 8, 2: 48, 3: 256 epochs. Original: 0. */
SETTING(__u32, scale, 0);
/* Factor of tau_split. Original: 2. */
SETTING(__u32, alpha, 2);
/* Fixed part of the split threshold, samples per CPU. Original: 15. */
SETTING(__u32, tau_split, 0);
/* Excess over a neighbour's count that splits, standard deviations. Original: 0. */
SETTING(__u32, split_sigmas, 4);
/* Unevenness inside that splits: relative variance in 1/256; 0 switches it off. Original: 0. */
SETTING(__u32, uneven, 64);
/* Neighbours that had no sample for so many epochs are merged. */
SETTING(__u32, merge_idle_epochs, 8);
/* Ranges younger than this neither come nor go, epochs. Original: 3. */
SETTING(__u32, min_age_epochs, 1);
/*
 * How much hotter a range must be to displace another, standard deviations. The
 * pair is the best of hundreds, so chance alone often gives 4. Original: 0.
 */
SETTING(__u32, admit_sigmas, 5);

static inline struct hyperplace_settings settings(void)
{
	struct hyperplace_settings s = {
		.scale = scale,
		.alpha = alpha,
		.tau_split = tau_split,
		.split_sigmas = split_sigmas,
		.uneven = uneven,
		.merge_idle_epochs = merge_idle_epochs,
		.min_age_epochs = min_age_epochs,
		.admit_sigmas = admit_sigmas,
	};

	return s;
}

SEC("struct_ops/hyperplace_classify")
void BPF_PROG(hyperplace_classify, struct tier_range *range, struct tier_scope *scope)
{
	struct hyperplace_settings s = settings();

	range->heat = hyperplace_heat(range, &s);
	range->action = hyperplace_action(range, scope->cpus, &s);
}

SEC("struct_ops/hyperplace_admit_pair")
bool BPF_PROG(hyperplace_admit_pair, struct tier_range *hot, struct tier_range *cold, struct tier_scope *scope)
{
	struct hyperplace_settings s = settings();

	return hyperplace_admit(hot, cold, &s);
}

HYPERTIER_POLICY(hyperplace,
	.classify = (void *)hyperplace_classify,
	.admit = (void *)hyperplace_admit_pair);
