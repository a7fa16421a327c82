/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/*
 * What hyperflex.ko (guest) and tierhostd (host) agree on. Both ways between
 * them are those of the stock virtio-balloon device: one 32-bit number down
 * (num_pages), a few statistics tags up.
 *
 * A tier's balloon is the memory taken from the guest, in 4 KiB pages; what is
 * left is the tier's size minus its balloon.
 */
#ifndef HYPERTIER_FLEX_H
#define HYPERTIER_FLEX_H

#ifndef __VMLINUX_H__
#include <linux/types.h>
#endif

#define HF_PAGE_SHIFT 12
#define HF_BLOCK_PAGES 512U	/* 2 MiB, the unit of the reporting queue */

/*
 * Statistics tags that carry our numbers. QEMU drops tags that it does not
 * know, so the last five of the stock driver's are used; what they say for the
 * stock driver is not reported while hyperflex.ko is bound.
 */
#define HF_TAG_SLOW_MISS 11	/* "stat-alloc-stalls": share of misses, 1/65536 */
#define HF_TAG_MAGIC 12		/* "stat-async-scans" */
#define HF_TAG_FAST 13		/* "stat-direct-scans": size << 32 | balloon, pages */
#define HF_TAG_SLOW 14		/* "stat-async-reclaims": the same */
#define HF_TAG_TARGETS 15	/* "stat-direct-reclaims": fast << 32 | slow, balloon pages aimed at */

#define HF_MAGIC 0x48464c4558000001ULL	/* "HFLEX", version 1 */

/*
 * Two balloon sizes in one num_pages. The device accepts numbers up to the
 * VM's memory in pages, so the sizes are counted in the smallest unit (a power
 * of two, at least 64 KiB) with which every pair has a number. 0 is: no
 * balloon, as for the stock driver.
 */
static inline unsigned int hf_unit_shift(__u64 fast_pages, __u64 slow_pages)
{
	unsigned int shift = 4;

	while (((fast_pages >> shift) + 1) * ((slow_pages >> shift) + 1) > fast_pages + slow_pages)
		shift++;
	return shift;
}

static inline __u32 hf_pack(__u64 fast_pages, __u64 slow_pages, __u64 fast_balloon, __u64 slow_balloon)
{
	unsigned int shift = hf_unit_shift(fast_pages, slow_pages);

	return (__u32)((fast_balloon >> shift) * ((slow_pages >> shift) + 1) + (slow_balloon >> shift));
}

static inline void hf_unpack(__u64 fast_pages, __u64 slow_pages, __u32 packed, __u64 *fast_balloon,
			     __u64 *slow_balloon)
{
	unsigned int shift = hf_unit_shift(fast_pages, slow_pages);
	__u32 radix = (__u32)(slow_pages >> shift) + 1;

	*fast_balloon = (__u64)(packed / radix) << shift;
	*slow_balloon = (__u64)(packed % radix) << shift;
	if (*fast_balloon > fast_pages)
		*fast_balloon = fast_pages;
}

/* ------------------------------------------- accounting (BPF, on the host) */

/* The file behind a tier: s_dev as the kernel writes it (major << 20 | minor), inode. */
struct hf_tier_key {
	__u64 dev;
	__u64 ino;
};

struct hf_tier_usage {
	__u64 alloced_pages;	/* of the file: st_blocks / 8; swapped ones included */
	__u64 swapped_pages;
	__u64 in_pages_total;
	__u64 out_pages_total;
	__u64 refault_pages_total; /* of those in: that brought the tier above its target */
};

#define HF_TIERS_MAX 4096

#endif /* HYPERTIER_FLEX_H */
