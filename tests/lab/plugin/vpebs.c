// SPDX-License-Identifier: GPL-2.0-or-later
// The simulated memory: a QEMU TCG plugin that puts a CPU cache in front of
// the guest's two tiers, counts the misses of user code per tier and page (the
// truth), and writes every period-th of them to a ring (the samples).
//
// Kernel code is not counted: its translation blocks get no callback, except
// for loads of cr3, which tell us that the address space changed.
#define _GNU_SOURCE
#include <fcntl.h>
#include <pthread.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

#include "../vpebs_shared.h"

// ------------------------- QEMU's plugin interface, version 4 (QEMU 10.0)
// Declared here because Debian ships no qemu-plugin.h.
typedef uint64_t qemu_plugin_id_t;
typedef uint32_t qemu_plugin_meminfo_t;
struct qemu_plugin_tb;
struct qemu_plugin_insn;
struct qemu_plugin_hwaddr;
struct qemu_plugin_register;
enum { CB_NO_REGS, CB_R_REGS, CB_RW_REGS };
enum { MEM_R = 1, MEM_W = 2, MEM_RW = 3 };
// GLib's GByteArray and GArray, whose first two members are public
struct bytes { uint8_t *data; unsigned len; };
struct register_descriptor {
	struct qemu_plugin_register *handle;
	const char *name;
	const char *feature;
};
struct registers { struct register_descriptor *data; unsigned len; };

void qemu_plugin_register_vcpu_init_cb(qemu_plugin_id_t, void (*)(qemu_plugin_id_t, unsigned));
void qemu_plugin_register_vcpu_tb_trans_cb(qemu_plugin_id_t, void (*)(qemu_plugin_id_t, struct qemu_plugin_tb *));
void qemu_plugin_register_vcpu_insn_exec_cb(struct qemu_plugin_insn *, void (*)(unsigned, void *), int flags, void *);
void qemu_plugin_register_vcpu_mem_cb(struct qemu_plugin_insn *,
				      void (*)(unsigned, qemu_plugin_meminfo_t, uint64_t, void *),
				      int flags, int rw, void *);
uint64_t qemu_plugin_tb_vaddr(const struct qemu_plugin_tb *);
size_t qemu_plugin_tb_n_insns(const struct qemu_plugin_tb *);
struct qemu_plugin_insn *qemu_plugin_tb_get_insn(const struct qemu_plugin_tb *, size_t);
size_t qemu_plugin_insn_data(const struct qemu_plugin_insn *, void *, size_t);
size_t qemu_plugin_insn_size(const struct qemu_plugin_insn *);
bool qemu_plugin_mem_is_store(qemu_plugin_meminfo_t);
struct qemu_plugin_hwaddr *qemu_plugin_get_hwaddr(qemu_plugin_meminfo_t, uint64_t);
bool qemu_plugin_hwaddr_is_io(const struct qemu_plugin_hwaddr *);
uint64_t qemu_plugin_hwaddr_phys_addr(const struct qemu_plugin_hwaddr *);
struct registers *qemu_plugin_get_registers(void);
int qemu_plugin_read_register(struct qemu_plugin_register *, struct bytes *);
struct bytes *g_byte_array_new(void);
struct bytes *g_byte_array_set_size(struct bytes *, unsigned);

__attribute__((visibility("default"))) int qemu_plugin_version = 4;

// ---------------------------------------------------------------- state
#define LINE_SHIFT 6
#define WAYS 8

struct vcpu {
	uint64_t last_line;
	uint64_t cr3;
	uint64_t tag_space;	// cr3's page number, above the bits of a line
	bool cr3_unknown;
	uint32_t period;
	uint32_t period_request;
	uint32_t countdown;
	uint64_t *tags;		// sets of WAYS, most recently used first
	struct vpebs_record *ring;
	struct vpebs_cpu *shared;
	struct bytes *buffer;
	struct qemu_plugin_register *cr3_register;
} __attribute__((aligned(128)));

static struct vcpu vcpus[VPEBS_CPUS];
static struct vpebs_shared *shared;
static struct vpebs_page *pages;
static uint64_t pages_mask;
static unsigned set_shift;
static int shared_fd;
static pthread_mutex_t pages_lock = PTHREAD_MUTEX_INITIALIZER;
static const uint32_t latency_ns[VPEBS_NODES] = {80, 250};

#define LOAD(x) __atomic_load_n(&(x), __ATOMIC_ACQUIRE)
#define STORE(x, v) __atomic_store_n(&(x), (v), __ATOMIC_RELEASE)
// counters have one writer: no locked instruction is needed
#define COUNT(x) __atomic_store_n(&(x), (x) + 1, __ATOMIC_RELAXED)

static uint64_t read_cr3(struct vcpu *v)
{
	uint64_t cr3 = 0;

	g_byte_array_set_size(v->buffer, 0);
	qemu_plugin_read_register(v->cr3_register, v->buffer);
	memcpy(&cr3, v->buffer->data, v->buffer->len < 8 ? v->buffer->len : 8);
	return cr3 & 0x000ffffffffff000ULL;	// without PCID and LAM bits
}

static void vcpu_init(qemu_plugin_id_t id, unsigned cpu)
{
	struct vcpu *v = &vcpus[cpu];
	struct registers *registers = qemu_plugin_get_registers();

	(void)id;
	for (unsigned i = 0; i < registers->len; i++)
		if (!strcmp(registers->data[i].name, "cr3"))
			v->cr3_register = registers->data[i].handle;
	if (!v->cr3_register) {
		fprintf(stderr, "lab: this QEMU shows no cr3 register to plugins, 10.0 is needed\n");
		_exit(1);
	}
	v->buffer = g_byte_array_new();
	v->cr3_unknown = true;
	v->last_line = ~0ULL;
}

// ------------------------------------------------------------ the truth
static void clear_pages(uint64_t request)
{
	pthread_mutex_lock(&pages_lock);
	if (shared->pages_generation != request) {
		// A hole reads as zero in every mapping of the file. A miss that
		// another vCPU counts right now may survive or not: it happens
		// at the moment of the reset.
		fallocate(shared_fd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, shared->pages_offset,
			  shared->pages_entries * sizeof(*pages));
		STORE(shared->pages_used, 0);
		STORE(shared->pages_lost, 0);
		STORE(shared->pages_generation, request);
	}
	pthread_mutex_unlock(&pages_lock);
}

static void count_page(uint64_t key, unsigned node)
{
	uint64_t request = LOAD(shared->pages_request);

	if (request != LOAD(shared->pages_generation))
		clear_pages(request);
	for (uint64_t i = key * 0x9e3779b97f4a7c15ULL >> 20, probes = 0; probes < 64; i++, probes++) {
		struct vpebs_page *page = &pages[i & pages_mask];
		uint64_t found = LOAD(page->key);

		if (!found && __atomic_compare_exchange_n(&page->key, &found, key, false, __ATOMIC_ACQ_REL,
							  __ATOMIC_ACQUIRE)) {
			__atomic_fetch_add(&shared->pages_used, 1, __ATOMIC_RELAXED);
			found = key;
		}
		if (found == key) {
			__atomic_fetch_add(&page->misses[node], 1, __ATOMIC_RELAXED);
			return;
		}
	}
	__atomic_fetch_add(&shared->pages_lost, 1, __ATOMIC_RELAXED);
}

static int node_of(uint64_t paddr)
{
	for (int i = 0; i < VPEBS_SPANS; i++)
		if (paddr >= shared->span[i].start && paddr < shared->span[i].end)
			return shared->span[i].node;
	return -1;
}

static void wait_ns(uint64_t ns)
{
	struct timespec start, now;

	clock_gettime(CLOCK_MONOTONIC, &start);
	do
		clock_gettime(CLOCK_MONOTONIC, &now);
	while ((uint64_t)(now.tv_sec - start.tv_sec) * 1000000000 + now.tv_nsec - start.tv_nsec < ns);
}

static void sample(struct vcpu *v, uint64_t vaddr, uint64_t paddr, int node, bool is_store)
{
	struct vpebs_cpu *c = v->shared;
	uint64_t head = c->head;

	if (head - LOAD(c->tail) >= shared->ring_entries) {
		COUNT(c->lost);
		return;
	}
	v->ring[head & (shared->ring_entries - 1)] = (struct vpebs_record){
		.vaddr = vaddr, .cr3 = v->cr3, .weight_ns = latency_ns[node], .is_store = is_store, .node = node,
		.paddr = paddr};
	STORE(c->head, head + 1);
}

static __attribute__((noinline)) void miss(struct vcpu *v, qemu_plugin_meminfo_t info, uint64_t vaddr)
{
	struct vpebs_cpu *c = v->shared;
	struct qemu_plugin_hwaddr *hwaddr = qemu_plugin_get_hwaddr(info, vaddr);
	uint64_t paddr;
	int node;

	if (!hwaddr || qemu_plugin_hwaddr_is_io(hwaddr) ||
	    (node = node_of(paddr = qemu_plugin_hwaddr_phys_addr(hwaddr))) < 0) {
		COUNT(c->misses_other);
		return;
	}
	COUNT(c->misses[node]);
	count_page(VPEBS_PAGE_KEY(v->cr3, vaddr), node);

	if (LOAD(c->period_request) != v->period_request) {
		v->period_request = c->period_request;
		v->period = v->countdown = c->period;
		STORE(c->period_ack, v->period_request);
	}
	if (v->period && --v->countdown == 0) {
		v->countdown = v->period;
		if (read_cr3(v) != v->cr3)
			COUNT(c->stale);
		sample(v, vaddr, paddr, node, qemu_plugin_mem_is_store(info));
	}
	if (node == 1 && shared->penalty_ns)
		wait_ns(shared->penalty_ns);
}

// ------------------------------------------------------------- the cache
static void access_memory(unsigned cpu, qemu_plugin_meminfo_t info, uint64_t vaddr, void *unused)
{
	struct vcpu *v = &vcpus[cpu];
	uint64_t line = vaddr >> LINE_SHIFT, tag, *set;
	int way;

	(void)unused;
	if (!LOAD(shared->enabled))
		return;
	COUNT(v->shared->accesses);
	if (v->cr3_unknown) {
		v->cr3_unknown = false;
		v->cr3 = read_cr3(v);
		v->tag_space = v->cr3 >> 12 << (47 - LINE_SHIFT);
		v->last_line = ~0ULL;
	}
	if (line == v->last_line)
		return;
	v->last_line = line;

	tag = line | v->tag_space;
	set = v->tags + (tag * 0x9e3779b97f4a7c15ULL >> set_shift) * WAYS;
	for (way = 0; way < WAYS - 1 && set[way] != tag; way++)
		;
	bool hit = set[way] == tag;
	memmove(set + 1, set, way * sizeof(*set));
	set[0] = tag;
	if (!hit)
		miss(v, info, vaddr);
}

// The callback runs before the load; no user code runs between the two.
static void cr3_load(unsigned cpu, void *unused)
{
	(void)unused;
	vcpus[cpu].cr3_unknown = true;
	COUNT(vcpus[cpu].shared->switches);
}

static bool is_cr3_load(struct qemu_plugin_insn *insn)
{
	uint8_t code[4];
	size_t n = qemu_plugin_insn_size(insn), i = 0;

	if (n < 3 || n > sizeof(code) || qemu_plugin_insn_data(insn, code, n) != n)
		return false;
	if (n == 4 && (code[i++] & 0xf0) != 0x40)	// REX
		return false;
	return code[i] == 0x0f && code[i + 1] == 0x22 && ((code[i + 2] >> 3) & 7) == 3;
}

static void translate(qemu_plugin_id_t id, struct qemu_plugin_tb *tb)
{
	bool kernel = qemu_plugin_tb_vaddr(tb) >> 47;
	size_t n = qemu_plugin_tb_n_insns(tb);

	(void)id;
	for (size_t i = 0; i < n; i++) {
		struct qemu_plugin_insn *insn = qemu_plugin_tb_get_insn(tb, i);

		if (!kernel)
			qemu_plugin_register_vcpu_mem_cb(insn, access_memory, CB_R_REGS, MEM_RW, NULL);
		else if (is_cr3_load(insn))
			qemu_plugin_register_vcpu_insn_exec_cb(insn, cr3_load, CB_NO_REGS, NULL);
	}
}

// ----------------------------------------------------------------- setup
static uint64_t power_of_two(uint64_t n)
{
	uint64_t p = 1;

	while (p < n)
		p *= 2;
	return p;
}

static int refuse(const char *what)
{
	fprintf(stderr, "lab: plugin: %s\n", what);
	return 1;
}

// Arguments: shm=FILE,cpus=N,fast=BYTES,slow=BYTES,lowmem=BYTES,cache=BYTES,penalty=NS
__attribute__((visibility("default"))) int qemu_plugin_install(qemu_plugin_id_t id, const void *info, int argc,
							       char **argv)
{
	const char *file = NULL;
	uint64_t cpus = 1, fast = 0, slow = 0, lowmem = 0, cache = 4 << 20, penalty = 0;
	struct stat st;

	(void)info;
	for (int i = 0; i < argc; i++) {
		char *value = strchr(argv[i], '=');

		if (!value)
			return refuse("an argument has no value");
		*value++ = 0;
		if (!strcmp(argv[i], "shm"))
			file = value;
		else if (!strcmp(argv[i], "cpus"))
			cpus = strtoull(value, NULL, 0);
		else if (!strcmp(argv[i], "fast"))
			fast = strtoull(value, NULL, 0);
		else if (!strcmp(argv[i], "slow"))
			slow = strtoull(value, NULL, 0);
		else if (!strcmp(argv[i], "lowmem"))
			lowmem = strtoull(value, NULL, 0);
		else if (!strcmp(argv[i], "cache"))
			cache = strtoull(value, NULL, 0);
		else if (!strcmp(argv[i], "penalty"))
			penalty = strtoull(value, NULL, 0);
		else
			return refuse("unknown argument");
	}
	if (!file || !fast || !slow || !cpus || cpus > VPEBS_CPUS)
		return refuse("shm, fast, slow and 1 to 64 cpus are needed");

	shared_fd = open(file, O_RDWR);
	if (shared_fd < 0 || fstat(shared_fd, &st))
		return refuse("cannot open the shared file");
	shared = mmap(NULL, st.st_size, PROT_READ | PROT_WRITE, MAP_SHARED, shared_fd, 0);
	if (shared == MAP_FAILED)
		return refuse("cannot map the shared file");

	_Static_assert(sizeof(*shared) <= VPEBS_HEADER_BYTES, "header too large");
	shared->bytes = st.st_size;
	shared->cpus = cpus;
	shared->ring_entries = 32768;
	shared->ring_offset = VPEBS_HEADER_BYTES;
	shared->pages_offset = shared->ring_offset + cpus * shared->ring_entries * sizeof(struct vpebs_record);
	shared->pages_entries = power_of_two(2 * ((fast + slow) >> 12));
	if (shared->pages_offset + shared->pages_entries * sizeof(struct vpebs_page) > (uint64_t)st.st_size)
		return refuse("the shared file is too small");
	shared->cache_bytes = power_of_two(cache / cpus);
	shared->penalty_ns = penalty;
	pages = (void *)((char *)shared + shared->pages_offset);
	pages_mask = shared->pages_entries - 1;

	// RAM is split at lowmem: what does not fit below goes to 4 GiB and up
	uint64_t start = 0;
	for (int node = 0, s = 0; node < VPEBS_NODES; node++) {
		uint64_t end = start + (node ? slow : fast);

		if (start < lowmem) {
			shared->span[s++] = (struct vpebs_span){start, end < lowmem ? end : lowmem, node};
		}
		if (end > lowmem) {
			uint64_t high = (4ULL << 30) - lowmem;
			shared->span[s++] = (struct vpebs_span){(start > lowmem ? start : lowmem) + high, end + high, node};
		}
		start = end;
	}

	uint64_t sets = shared->cache_bytes / (WAYS << LINE_SHIFT);
	if (sets < 2)
		return refuse("the cache is too small");
	set_shift = 64 - __builtin_ctzll(sets);
	for (uint64_t i = 0; i < cpus; i++) {
		vcpus[i].shared = &shared->cpu[i];
		vcpus[i].ring = (void *)((char *)shared + shared->ring_offset +
					 i * shared->ring_entries * sizeof(struct vpebs_record));
		vcpus[i].tags = aligned_alloc(64, sets * WAYS * sizeof(uint64_t));
		memset(vcpus[i].tags, 0xff, sets * WAYS * sizeof(uint64_t));
	}
	STORE(shared->magic, VPEBS_MAGIC);
	qemu_plugin_register_vcpu_init_cb(id, vcpu_init);
	qemu_plugin_register_vcpu_tb_trans_cb(id, translate);
	return 0;
}
