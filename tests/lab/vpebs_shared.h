/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/*
 * What the QEMU plugin (the simulated memory), vpebs.ko (the PMU) and labctl
 * share: the contents of the ivshmem file, BAR 2 of PCI device 1af4:1110.
 *
 * Every field has one writer. Counters only grow; "since the reset" is the
 * difference to a base that labctl keeps here, so that a reset races nobody.
 */
#ifndef VPEBS_SHARED_H
#define VPEBS_SHARED_H

#include <linux/types.h>
#include <linux/ioctl.h>

#define VPEBS_MAGIC 0x3153424550565448ULL	/* "HTVPEBS1" */
#define VPEBS_CPUS 64
#define VPEBS_NODES 2
#define VPEBS_SPANS 4
#define VPEBS_HEADER_BYTES 65536
#define VPEBS_PCI_VENDOR 0x1af4
#define VPEBS_PCI_DEVICE 0x1110

/* Guest-physical memory of a node; a node may have two (below and above 4 GiB). */
struct vpebs_span {
	__u64 start;
	__u64 end;
	__u64 node;
};

struct vpebs_record {
	__u64 vaddr;
	__u64 cr3;
	__u32 weight_ns;
	__u16 is_store;
	__u16 node;
	__u64 paddr;
};

/* One vCPU. Written on its own thread or by its own guest kernel only. */
struct vpebs_cpu {
	/* vpebs.ko: misses per sample, 0 off; a new request changes the number */
	__u32 period;
	__u32 period_request;
	__u64 tail;		/* records read */
	__u64 gs_base;		/* of this CPU's kernel: tells vCPUs apart */
	__u64 _pad0[5];
	/* plugin */
	__u64 head;		/* records written */
	__u64 lost;		/* ring full */
	__u64 accesses;
	__u64 misses[VPEBS_NODES];
	__u64 misses_other;	/* neither node: device memory */
	__u64 switches;		/* cr3 loads seen */
	__u64 stale;		/* samples whose cr3 or CPU was not the one remembered: must stay 0 */
	__u32 period_ack;	/* the period_request that counts */
	__u32 _pad1;
	__u64 _pad2[7];
};

/* Misses of one page of one address space. */
struct vpebs_page {
	__u64 key;		/* VPEBS_PAGE_KEY, 0 empty */
	__u32 misses[VPEBS_NODES];
};
#define VPEBS_PAGE_KEY(cr3, vaddr) (((__u64)(cr3) >> 12 << 36) | (((__u64)(vaddr) >> 12) & 0xfffffffffULL))
#define VPEBS_PAGE_CR3(key) ((__u64)(key) >> 36 << 12)
#define VPEBS_PAGE_VADDR(key) (((__u64)(key) & 0xfffffffffULL) << 12)

struct vpebs_shared {
	/* plugin, before the guest runs */
	__u64 magic;
	__u64 bytes;
	__u32 cpus;
	__u32 ring_entries;	/* of each CPU, a power of two */
	__u64 ring_offset;	/* CPU i: ring_offset + i * ring_entries * sizeof(record) */
	__u64 pages_offset;
	__u64 pages_entries;	/* a power of two */
	__u64 cache_bytes;	/* of each CPU */
	__u64 penalty_ns;
	struct vpebs_span span[VPEBS_SPANS];
	__u64 _pad0[6];
	/* plugin */
	__u64 pages_generation;	/* labctl's request that the page counts began with */
	__u64 pages_used;
	__u64 pages_lost;	/* misses that found the table full */
	__u64 _pad1[5];
	/* vpebs.ko */
	__u64 enabled;		/* count; off while the guest boots */
	/* labctl */
	__u64 pages_request;	/* raise it to clear the page counts */
	__u64 base_misses[VPEBS_NODES];
	__u64 base_other;
	__u64 base_accesses;
	__u64 base_ns;		/* guest's CLOCK_MONOTONIC at the reset */
	__u64 _pad2[1];
	struct vpebs_cpu cpu[VPEBS_CPUS];
};

/* /dev/vpebs: the page table root of a process */
struct vpebs_space {
	__u32 pid;
	__u32 _pad;
	__u64 cr3;
};
#define VPEBS_DEVICE "/dev/vpebs"
#define VPEBS_IOC_SPACE _IOWR('V', 1, struct vpebs_space)

#endif
