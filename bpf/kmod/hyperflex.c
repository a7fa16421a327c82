// SPDX-License-Identifier: GPL-2.0-only
/*
 * hyperflex.ko: one balloon per memory tier on the stock virtio-balloon device.
 *
 * The device knows one balloon. It punches whatever pages it is told, so the
 * guest decides which node they come from: this driver keeps a balloon per
 * tier. 2 MiB blocks go through the free-page-reporting queue (one discard a
 * block, with QEMU's own checks), single pages through the inflate queue.
 * Deflating needs no message: a page comes back when it is touched.
 *
 * One work item owns both balloons' way to their targets; the balloon lists are
 * under one mutex, because the OOM notifier takes from them too. Pages are
 * allocated outside of it: an allocation may end in that notifier.
 */
#define pr_fmt(fmt) KBUILD_MODNAME ": " fmt

#include <linux/device/bus.h>
#include <linux/gfp.h>
#include <linux/memory_hotplug.h>
#include <linux/mm.h>
#include <linux/module.h>
#include <linux/nodemask.h>
#include <linux/oom.h>
#include <linux/scatterlist.h>
#include <linux/slab.h>
#include <linux/virtio.h>
#include <linux/virtio_balloon.h>
#include <linux/virtio_config.h>
#include <linux/virtio_ids.h>
#include <linux/virtio_ring.h>
#include <linux/vmstat.h>
#include <linux/workqueue.h>

#include <hypertier/abi.h>
#include <hypertier/flex.h>

#define BLOCK_ORDER 9
/*
 * With init_on_alloc a block is written, and so faulted in on the host, before
 * it is punched: few at a time keep that short and in the cache.
 */
#define BLOCKS_PER_KICK 8
#define PAGES_PER_KICK 256
#define OOM_PAGES HF_BLOCK_PAGES
#define RETRY_MIN_MS 200
#define RETRY_MAX_MS 5000
/* While memory is demoted for us: how often to look, and how much room to wait for. */
#define DEMOTE_LOOK_MS 100
#define DEMOTE_CHUNK_PAGES (8UL * HF_BLOCK_PAGES)
#define DEMOTE_MAX_MS 60000
/* A node is a little smaller than the memory behind it: firmware, holes. */
#define TIER_ALIGN (16UL << 20)

static int fast_node = NUMA_NO_NODE;
module_param(fast_node, int, 0444);
MODULE_PARM_DESC(fast_node, "node of the fast tier (default: the first with CPUs)");
static int slow_node = NUMA_NO_NODE;
module_param(slow_node, int, 0444);
MODULE_PARM_DESC(slow_node, "node of the slow tier (default: the first without CPUs)");
static unsigned long fast_bytes;
module_param(fast_bytes, ulong, 0444);
MODULE_PARM_DESC(fast_bytes, "size of the memory behind the fast node (default: the node's, rounded up to 16 MiB)");
static unsigned long slow_bytes;
module_param(slow_bytes, ulong, 0444);
MODULE_PARM_DESC(slow_bytes, "size of the memory behind the slow node");

enum { VQ_INFLATE, VQ_DEFLATE, VQ_STATS, VQ_FREE_PAGE, VQ_REPORTING, VQS };

struct tier {
	int nid;
	u64 size_pages;
	u64 target_pages;	/* of the balloon */
	struct list_head blocks;	/* 2 MiB; page_private says how they were allocated */
	struct list_head pages;
	u64 nr_blocks;
	u64 nr_pages;
	unsigned long cursor;	/* pfn where the search for movable blocks goes on */
	u64 migrated_blocks_total;
	u64 busy_blocks_total;
	u64 oom_pages_total;
};

struct hyperflex {
	struct virtio_device *vdev;
	struct virtqueue *inflate_vq, *stats_vq, *reporting_vq;
	struct tier tier[HT_TIERS];
	struct mutex lock;		/* lists, counts and queues */
	wait_queue_head_t acked;
	struct delayed_work resize;
	struct work_struct answer_stats;
	unsigned int retry_ms;
	unsigned int demote_first_ms;	/* written by tierd; 0: nobody demotes */
	bool demote_asked;		/* for the order under way */
	unsigned long demote_until;	/* jiffies */
	u64 demote_room_pages;		/* seen so far: more is progress */
	u32 slow_miss_share;		/* 1/65536, written by the agent */
	u32 num_pages;			/* last value of the config space that was obeyed */
	bool config_seen;
	bool stopping;
	struct notifier_block oom;
	/* the device reads these: kmalloc'ed memory only, so part of this struct */
	__virtio32 pfns[PAGES_PER_KICK];
	struct scatterlist sg[BLOCKS_PER_KICK];
	struct virtio_balloon_stat stats[VIRTIO_BALLOON_S_NR];
};

static u64 balloon_pages(const struct tier *tier)
{
	return tier->nr_blocks * HF_BLOCK_PAGES + tier->nr_pages;
}

/* ------------------------------------------------------------ the device */

static void acked(struct virtqueue *vq)
{
	struct hyperflex *hf = vq->vdev->priv;

	wake_up(&hf->acked);
}

/* A reset device never answers: then the wait ends with the queue broken. */
static void kick_and_wait(struct hyperflex *hf, struct virtqueue *vq)
{
	unsigned int len;

	virtqueue_kick(vq);
	wait_event(hf->acked, virtqueue_get_buf(vq, &len) || virtqueue_is_broken(vq));
}

/* Under hf->lock: pfns and sg are shared. */
static void punch_pages(struct hyperflex *hf, unsigned int nr)
{
	struct scatterlist sg;

	sg_init_one(&sg, hf->pfns, nr * sizeof(hf->pfns[0]));
	/* one buffer into an empty queue */
	if (WARN_ON_ONCE(virtqueue_add_outbuf(hf->inflate_vq, &sg, 1, hf, GFP_KERNEL)))
		return;
	kick_and_wait(hf, hf->inflate_vq);
}

static void punch_blocks(struct hyperflex *hf, struct page **blocks, unsigned int nr)
{
	unsigned int i, k;

	if (hf->reporting_vq) {
		sg_init_table(hf->sg, nr);
		for (i = 0; i < nr; i++)
			sg_set_page(&hf->sg[i], blocks[i], HF_BLOCK_PAGES << PAGE_SHIFT, 0);
		if (!virtqueue_add_inbuf(hf->reporting_vq, hf->sg, nr, hf, GFP_KERNEL)) {
			kick_and_wait(hf, hf->reporting_vq);
			return;
		}
	}
	/* without free-page-reporting=on: page by page */
	for (i = 0; i < nr; i++) {
		for (k = 0; k < HF_BLOCK_PAGES; k++) {
			hf->pfns[k % PAGES_PER_KICK] = cpu_to_virtio32(hf->vdev, page_to_pfn(blocks[i]) + k);
			if (k % PAGES_PER_KICK == PAGES_PER_KICK - 1)
				punch_pages(hf, PAGES_PER_KICK);
		}
	}
}

static void report_actual(struct hyperflex *hf)
{
	u32 actual = balloon_pages(&hf->tier[HT_TIER_FAST]) + balloon_pages(&hf->tier[HT_TIER_SLOW]);

	virtio_cwrite_le(hf->vdev, struct virtio_balloon_config, actual, &actual);
}

/* --------------------------------------------------------------- balloons */

/*
 * Ballooned pages are offline for kdump and /proc/kcore: reading one would
 * fault it in on the host. They do not count as the guest's memory, so that
 * everybody who asks for a node's size sees what is left.
 */
static void take(struct page *page, unsigned int nr)
{
	unsigned int i;

	for (i = 0; i < nr; i++)
		__SetPageOffline(page + i);
	adjust_managed_page_count(page, -(long)nr);
}

static void give_back(struct page *page, unsigned int order)
{
	unsigned int i;

	for (i = 0; i < 1U << order; i++)
		__ClearPageOffline(page + i);
	adjust_managed_page_count(page, 1L << order);
	__free_pages(page, order);
}

static void give_back_block(struct tier *tier)
{
	struct page *page = list_first_entry(&tier->blocks, struct page, lru);
	unsigned int i, order = page_private(page);

	list_del(&page->lru);
	set_page_private(page, 0);
	tier->nr_blocks--;
	for (i = 0; i < HF_BLOCK_PAGES; i += 1U << order)
		give_back(page + i, order);
}

static void break_block(struct tier *tier)
{
	struct page *page = list_first_entry(&tier->blocks, struct page, lru);
	unsigned int i;

	list_del(&page->lru);
	if (page_private(page))
		split_page(page, page_private(page));
	set_page_private(page, 0);
	tier->nr_blocks--;
	for (i = 0; i < HF_BLOCK_PAGES; i++)
		list_add_tail(&page[i].lru, &tier->pages);
	tier->nr_pages += HF_BLOCK_PAGES;
}

/* Under hf->lock. Gives back nr pages, or all there are. */
static u64 deflate(struct tier *tier, u64 nr)
{
	u64 done = 0;

	while (done < nr && balloon_pages(tier)) {
		u64 left = nr - done;

		if (left >= HF_BLOCK_PAGES && tier->nr_blocks) {
			give_back_block(tier);
			done += HF_BLOCK_PAGES;
			continue;
		}
		if (!tier->nr_pages)
			break_block(tier);
		while (left && tier->nr_pages) {
			struct page *page = list_first_entry(&tier->pages, struct page, lru);

			list_del(&page->lru);
			tier->nr_pages--;
			give_back(page, 0);
			left--;
			done++;
		}
	}
	return done;
}

#define TIER_GFP (GFP_HIGHUSER | __GFP_THISNODE | __GFP_NORETRY | __GFP_NOWARN | __GFP_NOMEMALLOC)

/*
 * Free blocks, nothing else: no reclaim, no compaction, no other node.
 * GFP_HIGHUSER and not MOVABLE: nothing here could move a balloon's page.
 */
static struct page *free_block(struct tier *tier)
{
	struct page *page = alloc_pages_node(tier->nid, TIER_GFP & ~__GFP_RECLAIM, BLOCK_ORDER);

	if (page)
		set_page_private(page, BLOCK_ORDER);
	return page;
}

/*
 * A block in use: its pages are migrated away, within the node while there is
 * room, else to the other tier. One round over the node at most.
 */
static struct page *used_block(struct hyperflex *hf, struct tier *tier)
{
	unsigned long start = ALIGN(node_start_pfn(tier->nid), HF_BLOCK_PAGES);
	unsigned long end = ALIGN_DOWN(node_end_pfn(tier->nid), HF_BLOCK_PAGES);
	unsigned long tries = end > start ? (end - start) / HF_BLOCK_PAGES : 0;

	while (tries-- && !READ_ONCE(hf->stopping)) {
		unsigned long pfn = tier->cursor;
		struct page *page;

		if (pfn < start || pfn >= end)
			pfn = start;
		tier->cursor = pfn + HF_BLOCK_PAGES;
		page = pfn_to_online_page(pfn);
		if (!page || page_to_nid(page) != tier->nid || PageReserved(page) || PageOffline(page))
			continue;
		/* no __GFP_NORETRY: it would give up at the first page that is busy */
		if (alloc_contig_range(pfn, pfn + HF_BLOCK_PAGES, MIGRATE_MOVABLE, GFP_KERNEL | __GFP_NOWARN)) {
			tier->busy_blocks_total++;
			cond_resched();
			continue;
		}
		tier->migrated_blocks_total++;
		set_page_private(page, 0);	/* 512 single pages */
		return page;
	}
	return NULL;
}

/* Free pages of a node that can be had without reclaim. */
static u64 room_pages(const struct tier *tier)
{
	u64 room = 0;
	int z;

	for (z = 0; z < MAX_NR_ZONES; z++) {
		struct zone *zone = &NODE_DATA(tier->nid)->node_zones[z];
		u64 free = zone_page_state(zone, NR_FREE_PAGES);

		/* a zone that is not there has neither */
		if (free > high_wmark_pages(zone))
			room += free - high_wmark_pages(zone);
	}
	return room;
}

static u64 missing_pages(const struct tier *tier)
{
	u64 have = balloon_pages(tier), target = READ_ONCE(tier->target_pages);

	return target > have ? target - have : 0;
}

/*
 * The fast tier is in use: whoever knows what is cold there demotes it, before
 * we push out whatever lies where the block is. It gets its time as long as the
 * room grows; then (it may have died) we go on without it.
 */
static bool wait_for_demotion(struct hyperflex *hf, struct tier *tier)
{
	unsigned int patience_ms = READ_ONCE(hf->demote_first_ms);
	u64 room;

	if (tier != &hf->tier[HT_TIER_FAST] || !patience_ms)
		return false;
	room = room_pages(tier);
	if (room >= min(missing_pages(tier), DEMOTE_CHUNK_PAGES)) {
		hf->demote_asked = false;
		return false;
	}
	if (!hf->demote_asked || room > hf->demote_room_pages) {
		hf->demote_asked = true;
		hf->demote_room_pages = room;
		hf->demote_until = jiffies + msecs_to_jiffies(patience_ms);
	}
	return time_before(jiffies, hf->demote_until);
}

static int inflate_blocks(struct hyperflex *hf, struct tier *tier, u64 nr)
{
	struct page *blocks[BLOCKS_PER_KICK];
	unsigned int i, got = 0;

	while (got < nr && got < BLOCKS_PER_KICK) {
		blocks[got] = free_block(tier);
		if (!blocks[got] && !got) {
			if (wait_for_demotion(hf, tier))
				return -EAGAIN;
			blocks[got] = used_block(hf, tier);
		}
		if (!blocks[got])
			break;
		got++;
	}
	if (!got)
		return 0;
	mutex_lock(&hf->lock);
	for (i = 0; i < got; i++) {
		take(blocks[i], HF_BLOCK_PAGES);
		list_add(&blocks[i]->lru, &tier->blocks);
	}
	tier->nr_blocks += got;
	punch_blocks(hf, blocks, got);
	mutex_unlock(&hf->lock);
	return got;
}

static unsigned int inflate_pages(struct hyperflex *hf, struct tier *tier, u64 nr)
{
	LIST_HEAD(pages);
	struct page *page, *next;
	unsigned int got = 0;

	while (got < nr && got < PAGES_PER_KICK) {
		page = alloc_pages_node(tier->nid, TIER_GFP, 0);
		if (!page)
			break;
		list_add(&page->lru, &pages);
		got++;
	}
	if (!got)
		return 0;
	mutex_lock(&hf->lock);
	got = 0;
	list_for_each_entry_safe(page, next, &pages, lru) {
		take(page, 1);
		list_move(&page->lru, &tier->pages);
		hf->pfns[got++] = cpu_to_virtio32(hf->vdev, page_to_pfn(page));
	}
	tier->nr_pages += got;
	punch_pages(hf, got);
	mutex_unlock(&hf->lock);
	return got;
}

/* One step towards the target: 1 taken, 0 there is none to take, -EAGAIN wait. */
static int inflate_step(struct hyperflex *hf, struct tier *tier)
{
	u64 missing = missing_pages(tier);

	if (!missing)
		return 0;
	if (missing >= HF_BLOCK_PAGES) {
		int got = inflate_blocks(hf, tier, missing / HF_BLOCK_PAGES);

		if (got)
			return got < 0 ? got : 1;
	}
	return inflate_pages(hf, tier, missing) ? 1 : 0;
}

static void read_config(struct hyperflex *hf)
{
	u32 num_pages;

	virtio_cread_le(hf->vdev, struct virtio_balloon_config, num_pages, &num_pages);
	mutex_lock(&hf->lock);
	hf_unpack(hf->tier[HT_TIER_FAST].size_pages, hf->tier[HT_TIER_SLOW].size_pages, num_pages,
		  &hf->tier[HT_TIER_FAST].target_pages, &hf->tier[HT_TIER_SLOW].target_pages);
	hf->demote_asked = false;
	hf->num_pages = num_pages;
	mutex_unlock(&hf->lock);
}

static void resize_fn(struct work_struct *work)
{
	struct hyperflex *hf = container_of(to_delayed_work(work), struct hyperflex, resize);
	bool progress = false, missing = false, demoting = false;
	int t;

	if (xchg(&hf->config_seen, false))
		read_config(hf);

	/* What is given comes before what is taken: the pages pushed out of the
	 * fast tier need room in the slow one.
	 */
	mutex_lock(&hf->lock);
	for (t = HT_TIERS - 1; t >= 0; t--) {
		struct tier *tier = &hf->tier[t];
		u64 have = balloon_pages(tier);

		if (have > tier->target_pages)
			deflate(tier, have - tier->target_pages);
	}
	mutex_unlock(&hf->lock);

	for (t = HT_TIERS - 1; t >= 0; t--) {
		while (!READ_ONCE(hf->stopping) && !READ_ONCE(hf->config_seen)) {
			int step = inflate_step(hf, &hf->tier[t]);

			demoting |= step == -EAGAIN;
			if (step <= 0)
				break;
			progress = true;
			cond_resched();
		}
		if (missing_pages(&hf->tier[t]))
			missing = true;
	}
	report_actual(hf);

	if (READ_ONCE(hf->stopping))
		return;
	if (READ_ONCE(hf->config_seen)) {
		queue_delayed_work(system_freezable_wq, &hf->resize, 0);
	} else if (demoting) {
		queue_delayed_work(system_freezable_wq, &hf->resize, msecs_to_jiffies(DEMOTE_LOOK_MS));
	} else if (missing) {
		hf->retry_ms = progress ? RETRY_MIN_MS : min(hf->retry_ms * 2, RETRY_MAX_MS);
		queue_delayed_work(system_freezable_wq, &hf->resize, msecs_to_jiffies(hf->retry_ms));
	}
}

static void hyperflex_changed(struct virtio_device *vdev)
{
	struct hyperflex *hf = vdev->priv;

	/* Interrupt context: only note it. The same number again is an order too:
	 * it undoes what an OOM gave back.
	 */
	WRITE_ONCE(hf->config_seen, true);
	hf->retry_ms = RETRY_MIN_MS;
	if (!READ_ONCE(hf->stopping))
		mod_delayed_work(system_freezable_wq, &hf->resize, 0);
}

/*
 * Out of memory: a block of each tier comes back, since nobody says which node
 * ran out. The balloon then stays smaller until the host asks again; the host
 * measures, so this hides nothing from it.
 */
static int hyperflex_oom(struct notifier_block *nb, unsigned long unused, void *freed)
{
	struct hyperflex *hf = container_of(nb, struct hyperflex, oom);
	int t;

	mutex_lock(&hf->lock);
	for (t = 0; t < HT_TIERS; t++) {
		struct tier *tier = &hf->tier[t];
		u64 done = deflate(tier, OOM_PAGES);

		tier->target_pages = min(tier->target_pages, balloon_pages(tier));
		tier->oom_pages_total += done;
		*(unsigned long *)freed += done;
	}
	mutex_unlock(&hf->lock);
	return NOTIFY_OK;
}

/* ------------------------------------------------------------- statistics */

static void stat(struct hyperflex *hf, unsigned int *nr, u16 tag, u64 value)
{
	hf->stats[*nr].tag = cpu_to_virtio16(hf->vdev, tag);
	hf->stats[(*nr)++].val = cpu_to_virtio64(hf->vdev, value);
}

static unsigned int fill_stats(struct hyperflex *hf)
{
	const struct tier *fast = &hf->tier[HT_TIER_FAST], *slow = &hf->tier[HT_TIER_SLOW];
	unsigned int nr = 0;
	struct sysinfo info;

	si_meminfo(&info);
	stat(hf, &nr, VIRTIO_BALLOON_S_MEMFREE, (u64)info.freeram << PAGE_SHIFT);
	stat(hf, &nr, VIRTIO_BALLOON_S_MEMTOT, (u64)info.totalram << PAGE_SHIFT);
	stat(hf, &nr, VIRTIO_BALLOON_S_AVAIL, (u64)si_mem_available() << PAGE_SHIFT);
	stat(hf, &nr, VIRTIO_BALLOON_S_CACHES, (u64)global_node_page_state(NR_FILE_PAGES) << PAGE_SHIFT);
	stat(hf, &nr, HF_TAG_SLOW_MISS, hf->slow_miss_share);
	stat(hf, &nr, HF_TAG_MAGIC, HF_MAGIC);
	stat(hf, &nr, HF_TAG_FAST, fast->size_pages << 32 | balloon_pages(fast));
	stat(hf, &nr, HF_TAG_SLOW, slow->size_pages << 32 | balloon_pages(slow));
	stat(hf, &nr, HF_TAG_TARGETS, fast->target_pages << 32 | slow->target_pages);
	return nr;
}

/* The host asks by giving the buffer back; it gets it again, filled. */
static void send_stats(struct hyperflex *hf)
{
	struct scatterlist sg;

	sg_init_one(&sg, hf->stats, fill_stats(hf) * sizeof(hf->stats[0]));
	if (!virtqueue_add_outbuf(hf->stats_vq, &sg, 1, hf, GFP_KERNEL))
		virtqueue_kick(hf->stats_vq);
}

static void answer_stats_fn(struct work_struct *work)
{
	struct hyperflex *hf = container_of(work, struct hyperflex, answer_stats);
	unsigned int len;

	/* An order that waits for the work item counts: what is said to be aimed at
	 * is what the host asked last, however long the step takes that is under way.
	 */
	if (READ_ONCE(hf->config_seen))
		read_config(hf);
	if (virtqueue_get_buf(hf->stats_vq, &len))
		send_stats(hf);
}

static void stats_asked(struct virtqueue *vq)
{
	struct hyperflex *hf = vq->vdev->priv;

	if (!READ_ONCE(hf->stopping))
		queue_work(system_freezable_wq, &hf->answer_stats);
}

/* ------------------------------------------------------------------ sysfs */

static struct hyperflex *to_hf(struct device *dev)
{
	return dev_to_virtio(dev)->priv;
}

static ssize_t target_store(struct device *dev, enum ht_tier t, const char *buf, size_t count)
{
	struct hyperflex *hf = to_hf(dev);
	struct tier *tier = &hf->tier[t];
	u64 bytes;
	int err = kstrtou64(buf, 0, &bytes);

	if (err)
		return err;
	if (bytes >> PAGE_SHIFT > tier->size_pages)
		return -ERANGE;
	mutex_lock(&hf->lock);
	tier->target_pages = bytes >> PAGE_SHIFT;
	hf->demote_asked = false;
	mutex_unlock(&hf->lock);
	hf->retry_ms = RETRY_MIN_MS;
	mod_delayed_work(system_freezable_wq, &hf->resize, 0);
	return count;
}

#define TIER_ATTRS(name, t)                                                                           \
	static ssize_t name##_bytes_show(struct device *dev, struct device_attribute *attr, char *buf) \
	{                                                                                             \
		return sysfs_emit(buf, "%llu\n", to_hf(dev)->tier[t].size_pages << PAGE_SHIFT);        \
	}                                                                                             \
	static DEVICE_ATTR_RO(name##_bytes);                                                           \
	static ssize_t name##_balloon_bytes_show(struct device *dev, struct device_attribute *attr,    \
						 char *buf)                                           \
	{                                                                                             \
		return sysfs_emit(buf, "%llu\n", balloon_pages(&to_hf(dev)->tier[t]) << PAGE_SHIFT);   \
	}                                                                                             \
	static DEVICE_ATTR_RO(name##_balloon_bytes);                                                   \
	static ssize_t name##_balloon_target_bytes_show(struct device *dev,                            \
							struct device_attribute *attr, char *buf)     \
	{                                                                                             \
		return sysfs_emit(buf, "%llu\n", to_hf(dev)->tier[t].target_pages << PAGE_SHIFT);      \
	}                                                                                             \
	static ssize_t name##_balloon_target_bytes_store(struct device *dev,                           \
							 struct device_attribute *attr,               \
							 const char *buf, size_t count)               \
	{                                                                                             \
		return target_store(dev, t, buf, count);                                              \
	}                                                                                             \
	static DEVICE_ATTR_RW(name##_balloon_target_bytes);                                            \
	static ssize_t name##_counters_show(struct device *dev, struct device_attribute *attr, char *buf) \
	{                                                                                             \
		struct tier *tier = &to_hf(dev)->tier[t];                                             \
		return sysfs_emit(buf,                                                                \
				  "node %d\nblocks %llu\npages %llu\nmigrated_blocks_total %llu\n"   \
				  "busy_blocks_total %llu\noom_pages_total %llu\n",                   \
				  tier->nid, tier->nr_blocks, tier->nr_pages,                         \
				  tier->migrated_blocks_total, tier->busy_blocks_total,               \
				  tier->oom_pages_total);                                             \
	}                                                                                             \
	static DEVICE_ATTR_RO(name##_counters)

TIER_ATTRS(fast, HT_TIER_FAST);
TIER_ATTRS(slow, HT_TIER_SLOW);

static ssize_t slow_miss_share_show(struct device *dev, struct device_attribute *attr, char *buf)
{
	return sysfs_emit(buf, "%u\n", to_hf(dev)->slow_miss_share);
}

static ssize_t slow_miss_share_store(struct device *dev, struct device_attribute *attr, const char *buf,
				     size_t count)
{
	u32 share;
	int err = kstrtou32(buf, 0, &share);

	if (err)
		return err;
	if (share > 65536)
		return -ERANGE;
	to_hf(dev)->slow_miss_share = share;
	return count;
}
static DEVICE_ATTR_RW(slow_miss_share);

/* What a demoter has to make free in the fast tier, beyond what is free. */
static ssize_t fast_missing_bytes_show(struct device *dev, struct device_attribute *attr, char *buf)
{
	struct tier *tier = &to_hf(dev)->tier[HT_TIER_FAST];
	u64 missing = missing_pages(tier), room = room_pages(tier);

	return sysfs_emit(buf, "%llu\n", (missing > room ? missing - room : 0) << PAGE_SHIFT);
}
static DEVICE_ATTR_RO(fast_missing_bytes);

static ssize_t demote_first_ms_show(struct device *dev, struct device_attribute *attr, char *buf)
{
	return sysfs_emit(buf, "%u\n", to_hf(dev)->demote_first_ms);
}

static ssize_t demote_first_ms_store(struct device *dev, struct device_attribute *attr, const char *buf,
				     size_t count)
{
	unsigned int ms;
	int err = kstrtouint(buf, 0, &ms);

	if (err)
		return err;
	if (ms > DEMOTE_MAX_MS)
		return -ERANGE;
	WRITE_ONCE(to_hf(dev)->demote_first_ms, ms);
	return count;
}
static DEVICE_ATTR_RW(demote_first_ms);

static struct attribute *hyperflex_attrs[] = {
	&dev_attr_fast_bytes.attr,
	&dev_attr_fast_balloon_bytes.attr,
	&dev_attr_fast_balloon_target_bytes.attr,
	&dev_attr_fast_counters.attr,
	&dev_attr_slow_bytes.attr,
	&dev_attr_slow_balloon_bytes.attr,
	&dev_attr_slow_balloon_target_bytes.attr,
	&dev_attr_slow_counters.attr,
	&dev_attr_slow_miss_share.attr,
	&dev_attr_fast_missing_bytes.attr,
	&dev_attr_demote_first_ms.attr,
	NULL,
};
ATTRIBUTE_GROUPS(hyperflex);

/* ----------------------------------------------------------------- driver */

static int find_tiers(struct hyperflex *hf)
{
	int nid, fast = fast_node, slow = slow_node, t;

	for_each_node_state(nid, N_MEMORY) {
		if (fast == NUMA_NO_NODE && nid != slow && node_state(nid, N_CPU))
			fast = nid;
		else if (slow == NUMA_NO_NODE && nid != fast && !node_state(nid, N_CPU))
			slow = nid;
	}
	if (fast == NUMA_NO_NODE || slow == NUMA_NO_NODE || fast == slow ||
	    !node_state(fast, N_MEMORY) || !node_state(slow, N_MEMORY)) {
		pr_err("two tiers are needed: a memory node with CPUs and one without (or fast_node= and slow_node=)\n");
		return -ENODEV;
	}
	hf->tier[HT_TIER_FAST].nid = fast;
	hf->tier[HT_TIER_SLOW].nid = slow;
	for (t = 0; t < HT_TIERS; t++) {
		struct tier *tier = &hf->tier[t];
		u64 bytes = t == HT_TIER_FAST ? fast_bytes : slow_bytes;

		if (!bytes)
			bytes = ALIGN((u64)node_present_pages(tier->nid) << PAGE_SHIFT, TIER_ALIGN);
		tier->size_pages = bytes >> PAGE_SHIFT;
		INIT_LIST_HEAD(&tier->blocks);
		INIT_LIST_HEAD(&tier->pages);
	}
	return 0;
}

static int find_queues(struct hyperflex *hf)
{
	struct virtqueue_info info[VQS] = {};
	struct virtqueue *vqs[VQS] = {};
	int err;

	info[VQ_INFLATE] = (struct virtqueue_info){ "inflate", acked };
	info[VQ_DEFLATE] = (struct virtqueue_info){ "deflate", acked };
	if (virtio_has_feature(hf->vdev, VIRTIO_BALLOON_F_STATS_VQ))
		info[VQ_STATS] = (struct virtqueue_info){ "stats", stats_asked };
	if (virtio_has_feature(hf->vdev, VIRTIO_BALLOON_F_REPORTING))
		info[VQ_REPORTING] = (struct virtqueue_info){ "reporting", acked };
	err = virtio_find_vqs(hf->vdev, VQS, vqs, info, NULL);
	if (err)
		return err;
	hf->inflate_vq = vqs[VQ_INFLATE];
	hf->stats_vq = vqs[VQ_STATS];
	hf->reporting_vq = vqs[VQ_REPORTING];
	return 0;
}

static int hyperflex_probe(struct virtio_device *vdev)
{
	struct hyperflex *hf = kzalloc(sizeof(*hf), GFP_KERNEL);
	int err;

	if (!hf)
		return -ENOMEM;
	vdev->priv = hf;
	hf->vdev = vdev;
	hf->retry_ms = RETRY_MIN_MS;
	mutex_init(&hf->lock);
	init_waitqueue_head(&hf->acked);
	INIT_DELAYED_WORK(&hf->resize, resize_fn);
	INIT_WORK(&hf->answer_stats, answer_stats_fn);
	err = find_tiers(hf);
	if (err)
		goto free;
	err = find_queues(hf);
	if (err)
		goto free;
	hf->oom.notifier_call = hyperflex_oom;
	err = register_oom_notifier(&hf->oom);
	if (err)
		goto queues;
	virtio_device_ready(vdev);
	if (hf->stats_vq)
		send_stats(hf);
	if (!hf->reporting_vq)
		dev_warn(&vdev->dev, "the device has no free-page-reporting=on: 2 MiB blocks go page by page\n");
	/* A restarted driver takes up the targets it finds. */
	hyperflex_changed(vdev);
	return 0;
queues:
	vdev->config->del_vqs(vdev);
free:
	vdev->priv = NULL;
	kfree(hf);
	return err;
}

static void hyperflex_remove(struct virtio_device *vdev)
{
	struct hyperflex *hf = vdev->priv;
	int t;

	WRITE_ONCE(hf->stopping, true);
	unregister_oom_notifier(&hf->oom);
	cancel_delayed_work_sync(&hf->resize);
	cancel_work_sync(&hf->answer_stats);
	for (t = 0; t < HT_TIERS; t++)
		deflate(&hf->tier[t], balloon_pages(&hf->tier[t]));
	report_actual(hf);
	virtio_reset_device(vdev);
	vdev->config->del_vqs(vdev);
	vdev->priv = NULL;
	kfree(hf);
}

static int hyperflex_validate(struct virtio_device *vdev)
{
	/* Indirect descriptors would be allocated on the way to a punch. */
	__virtio_clear_bit(vdev, VIRTIO_RING_F_INDIRECT_DESC);
	/* PFNs are physical addresses, whatever stands before the device. */
	__virtio_clear_bit(vdev, VIRTIO_F_ACCESS_PLATFORM);
	return 0;
}

static const unsigned int features[] = {
	VIRTIO_BALLOON_F_STATS_VQ,
	VIRTIO_BALLOON_F_DEFLATE_ON_OOM,
	VIRTIO_BALLOON_F_REPORTING,
};

static const struct virtio_device_id ids[] = {
	{ VIRTIO_ID_BALLOON, VIRTIO_DEV_ANY_ID },
	{ 0 },
};

static struct virtio_driver hyperflex_driver = {
	.driver.name = KBUILD_MODNAME,
	.driver.dev_groups = hyperflex_groups,
	.id_table = ids,
	.feature_table = features,
	.feature_table_size = ARRAY_SIZE(features),
	.validate = hyperflex_validate,
	.probe = hyperflex_probe,
	.remove = hyperflex_remove,
	.config_changed = hyperflex_changed,
};

static bool is_balloon(struct device *dev)
{
	return dev_to_virtio(dev)->id.device == VIRTIO_ID_BALLOON;
}

/* From the stock driver to us. It gives back its pages and does not come again. */
static int take_over(struct device *dev, void *unused)
{
	if (is_balloon(dev) && dev->driver && dev->driver != &hyperflex_driver.driver) {
		device_release_driver(dev);
		if (device_driver_attach(&hyperflex_driver.driver, dev) && device_attach(dev) < 0)
			dev_warn(dev, "no driver took the balloon back\n");
	}
	return 0;
}

/* To whoever else drives it. */
static int hand_back(struct device *dev, void *unused)
{
	if (is_balloon(dev) && !dev->driver && device_attach(dev) < 0)
		dev_warn(dev, "no driver took the balloon back\n");
	return 0;
}

static int __init hyperflex_init(void)
{
	int err = register_virtio_driver(&hyperflex_driver);

	if (err)
		return err;
	bus_for_each_dev(hyperflex_driver.driver.bus, NULL, NULL, take_over);
	return 0;
}

static void __exit hyperflex_exit(void)
{
	const struct bus_type *bus = hyperflex_driver.driver.bus;

	unregister_virtio_driver(&hyperflex_driver);
	bus_for_each_dev(bus, NULL, NULL, hand_back);
}

module_init(hyperflex_init);
module_exit(hyperflex_exit);

/* No device table: it would load by itself where the stock driver is wanted. */
MODULE_DESCRIPTION("HyperTier: one balloon per memory tier on the stock virtio-balloon device");
MODULE_VERSION(HT_VERSION);
MODULE_LICENSE("GPL");
