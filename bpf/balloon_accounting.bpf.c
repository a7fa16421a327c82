// SPDX-License-Identifier: GPL-2.0-only
/*
 * What the host holds for every tier of a VM: counted where shmem itself
 * counts, so that it covers guest faults, KVM, pwrite, fallocate, punches by
 * anybody and swap alike. What a guest asks for (madvise, balloon requests) is
 * not looked at: it can ask for anything.
 */
#include "vmlinux.h"
#include <bpf/bpf_core_read.h>
#include <bpf/bpf_helpers.h>
#include <bpf/bpf_tracing.h>

#include <hypertier/flex.h>

char LICENSE[] SEC("license") = "GPL";

/* Only files that tierhostd entered are counted: the rest costs one lookup. */
struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(max_entries, HF_TIERS_MAX);
	__type(key, struct hf_tier_key);
	__type(value, struct hf_tier_usage);
} balloon_tiers SEC(".maps");

/* Pages that a tier is to have; a map of its own, because tierhostd writes it. */
struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(max_entries, HF_TIERS_MAX);
	__type(key, struct hf_tier_key);
	__type(value, __u64);
} balloon_targets SEC(".maps");

static __always_inline struct hf_tier_key key_of(struct inode *inode)
{
	struct hf_tier_key key = { .dev = inode->i_sb->s_dev, .ino = inode->i_ino };

	return key;
}

static __always_inline struct hf_tier_usage *usage_of(struct inode *inode)
{
	struct hf_tier_key key = key_of(inode);

	return bpf_map_lookup_elem(&balloon_tiers, &key);
}

static __always_inline __u64 pages_of(struct folio *folio)
{
	__u64 head = 1ULL << bpf_core_enum_value(enum pageflags, PG_head);

	return folio->flags & head ? 1ULL << (folio->_flags_1 & 0xff) : 1;
}

/* Called after every change of what a file holds. */
SEC("fexit/shmem_recalc_inode")
int BPF_PROG(ht_recalc, struct inode *inode, long alloced, long swapped)
{
	struct hf_tier_usage *usage = usage_of(inode);
	struct shmem_inode_info *info;
	int i;

	if (!usage)
		return 0;
	info = (void *)inode - bpf_core_field_offset(struct shmem_inode_info, vfs_inode);
	/*
	 * Outside of the inode's lock: two CPUs may store in the wrong order. Who
	 * stores last looks again, so the last look wins.
	 */
	for (i = 0; i < 4; i++) {
		__u64 pages = BPF_CORE_READ(info, alloced);

		*(volatile __u64 *)&usage->alloced_pages = pages;
		usage->swapped_pages = BPF_CORE_READ(info, swapped);
		if (BPF_CORE_READ(info, alloced) == pages)
			break;
	}
	return 0;
}

SEC("fexit/shmem_add_to_page_cache")
int BPF_PROG(ht_add, struct folio *folio, struct address_space *mapping, unsigned long index, void *expected,
	     gfp_t gfp, int ret)
{
	struct hf_tier_usage *usage;
	struct hf_tier_key key;
	__u64 pages, *target;

	if (ret)
		return 0;
	usage = usage_of(mapping->host);
	if (!usage)
		return 0;
	pages = pages_of(folio);
	__sync_fetch_and_add(&usage->in_pages_total, pages);
	key = key_of(mapping->host);
	target = bpf_map_lookup_elem(&balloon_targets, &key);
	if (target && usage->alloced_pages - usage->swapped_pages + pages > *target)
		__sync_fetch_and_add(&usage->refault_pages_total, pages);
	return 0;
}

SEC("tp_btf/mm_filemap_delete_from_page_cache")
int BPF_PROG(ht_delete, struct folio *folio)
{
	struct hf_tier_usage *usage;

	if (!folio->mapping)
		return 0;
	usage = usage_of(folio->mapping->host);
	if (usage)
		__sync_fetch_and_add(&usage->out_pages_total, pages_of(folio));
	return 0;
}
