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
#define HF_AGENT_PORT "org.hypertier.flex.0"	/* name of the virtio-serial port */

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
	__u64 in_pages_total;	/* newly held; coming back from swap is not */
	__u64 out_pages_total;
	__u64 refault_pages_total; /* of those in: that brought the tier above its target */
};

/*
 * The slots of the accounting: found by a cheap function of the key and a few
 * probes, because every fault of every shmem file on the host looks.
 */
struct hf_tier_slot {
	struct hf_tier_key key;	/* ino 0: free */
	__u64 target_pages;	/* 0: none */
	struct hf_tier_usage usage;
};

#define HF_SLOT_BITS 10
#define HF_SLOTS (1U << HF_SLOT_BITS)
#define HF_SLOT_PROBES 4U

static inline __u32 hf_slot(struct hf_tier_key key, __u32 probe)
{
	__u64 mixed = (key.ino + (key.dev << 40)) * 0x9e3779b97f4a7c15ULL;

	return ((__u32)(mixed >> (64 - HF_SLOT_BITS)) + probe) & (HF_SLOTS - 1);
}

#endif /* HYPERTIER_FLEX_H */
