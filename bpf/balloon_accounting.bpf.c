// SPDX-License-Identifier: GPL-2.0-only
/*
 * What the host holds for every tier of a VM: counted where shmem itself
 * counts, so that it covers guest faults, KVM, pwrite, fallocate, punches by
 * anybody and swap alike. What a guest asks for (madvise, balloon requests) is
 * not looked at: it can ask for anything.
 *
 * A fault passes one hook, which finds its file in an array: a hash lookup and
 * a second hook would cost more than all the rest.
 */
#include "vmlinux.h"
#include <bpf/bpf_core_read.h>
#include <bpf/bpf_helpers.h>
#include <bpf/bpf_tracing.h>

#include <hypertier/flex.h>

char LICENSE[] SEC("license") = "GPL";

/* Only files that tierhostd entered are counted. */
struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(map_flags, BPF_F_MMAPABLE);
	__uint(max_entries, HF_SLOTS);
	__type(key, __u32);
	__type(value, struct hf_tier_slot);
} balloon_tiers SEC(".maps");

static __always_inline struct hf_tier_slot *slot_of(struct inode *inode)
{
	struct hf_tier_key key = { .dev = inode->i_sb->s_dev, .ino = inode->i_ino };
	__u32 probe;

	for (probe = 0; probe < HF_SLOT_PROBES; probe++) {
		__u32 index = hf_slot(key, probe);
		struct hf_tier_slot *slot = bpf_map_lookup_elem(&balloon_tiers, &index);

		if (slot && slot->key.ino == key.ino && slot->key.dev == key.dev)
			return slot;
	}
	return NULL;
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
	struct hf_tier_slot *slot = slot_of(inode);
	struct shmem_inode_info *info;
	__u64 pages;
	int i;

	if (!slot)
		return 0;
	info = bpf_core_cast((void *)inode - bpf_core_field_offset(struct shmem_inode_info, vfs_inode),
			     struct shmem_inode_info);
	/*
	 * Outside of the inode's lock: two CPUs may store in the wrong order. Who
	 * stores last looks again, so the last look wins.
	 */
	for (i = 0; i < 4; i++) {
		pages = info->alloced;
		*(volatile __u64 *)&slot->usage.alloced_pages = pages;
		slot->usage.swapped_pages = info->swapped;
		if (*(volatile unsigned long *)&info->alloced == pages)
			break;
	}
	if (alloced > 0) {
		__sync_fetch_and_add(&slot->usage.in_pages_total, alloced);
		if (slot->target_pages && pages - slot->usage.swapped_pages > slot->target_pages)
			__sync_fetch_and_add(&slot->usage.refault_pages_total, alloced);
	}
	return 0;
}

SEC("tp_btf/mm_filemap_delete_from_page_cache")
int BPF_PROG(ht_delete, struct folio *folio)
{
	struct hf_tier_slot *slot;

	if (!folio->mapping)
		return 0;
	slot = slot_of(folio->mapping->host);
	if (slot)
		__sync_fetch_and_add(&slot->usage.out_pages_total, pages_of(folio));
	return 0;
}
