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
	const void *env;	// QEMU's CPU state, never looked into: a name for the vCPU
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
} __attribute__((aligned(128)));

static struct vcpu vcpus[VPEBS_CPUS];	// in the order of their first cr3 load
static unsigned nr_vcpus;
static struct qemu_plugin_register *cr3_register, *k_gs_base_register;
static __thread struct bytes *buffer;
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

static uint64_t read_register(struct qemu_plugin_register *r)
{
	uint64_t value = 0;

	if (!buffer)
		buffer = g_byte_array_new();
	g_byte_array_set_size(buffer, 0);
	qemu_plugin_read_register(r, buffer);
	memcpy(&value, buffer->data, buffer->len < 8 ? buffer->len : 8);
	return value;
}

static uint64_t read_cr3(void)
{
	return read_register(cr3_register) & 0x000ffffffffff000ULL;	// without PCID and LAM bits
}

static void vcpu_init(qemu_plugin_id_t id, unsigned index)
{
	struct registers *registers = qemu_plugin_get_registers();

	(void)id, (void)index;
	for (unsigned i = 0; i < registers->len; i++) {
		if (!strcmp(registers->data[i].name, "cr3"))
			cr3_register = registers->data[i].handle;
		if (!strcmp(registers->data[i].name, "k_gs_base"))
			k_gs_base_register = registers->data[i].handle;
	}
	if (!cr3_register || !k_gs_base_register) {
		fprintf(stderr, "lab: this QEMU shows no cr3 register to plugins, 10.0 is needed\n");
		_exit(1);
	}
}

// Which vCPU runs? The index that callbacks get is no answer: with one thread
// for all (-icount), QEMU 10.0 compiles the index of the vCPU that translated a
// block into the block, and others run it too. Generated code keeps the running
// CPU's state in rbp, so two small entries pass that on. Accesses made by QEMU's
// own C code (xsave and the like) come with any rbp: there the guest's per-CPU
// register tells, which is slow but rare.
#ifndef __x86_64__
#error "the lab's plugin knows how to tell vCPUs apart on x86-64 hosts only"
#endif
void access_memory_entry(unsigned index, qemu_plugin_meminfo_t info, uint64_t vaddr, void *unused);
void cr3_load_entry(unsigned index, void *unused);
__asm__(".text\n"
	".hidden access_memory_entry\n"
	"access_memory_entry: mov %rbp, %r8\n jmp access_memory\n"
	".hidden cr3_load_entry\n"
	"cr3_load_entry: mov %rbp, %rdx\n jmp cr3_load\n");

static struct vcpu *find_vcpu(const void *env)
{
	unsigned nr = LOAD(nr_vcpus);

	for (unsigned i = 0; i < nr; i++)
		if (vcpus[i].env == env)
			return &vcpus[i];
	return NULL;
}

// In user mode the kernel's per-CPU pointer rests in k_gs_base.
static unsigned cpu_by_register(void)
{
	uint64_t base = read_register(k_gs_base_register);

	for (unsigned i = 0; i < shared->cpus; i++)
		if (shared->cpu[i].gs_base == base)
			return i;
	return VPEBS_CPUS;
}

static void adopt(struct vcpu *v, unsigned cpu)
{
	v->shared = &shared->cpu[cpu];
	v->ring = (void *)((char *)shared + shared->ring_offset +
			   cpu * shared->ring_entries * sizeof(struct vpebs_record));
}

static struct vcpu *vcpu_by_register(void)
{
	unsigned cpu = cpu_by_register();

	for (unsigned i = 0; i < LOAD(nr_vcpus); i++)
		if (vcpus[i].shared == &shared->cpu[cpu])
			return &vcpus[i];
	return NULL;
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
		if (read_cr3() != v->cr3 || read_register(k_gs_base_register) != c->gs_base)
			COUNT(c->stale);
		sample(v, vaddr, paddr, node, qemu_plugin_mem_is_store(info));
	}
	if (node == 1 && shared->penalty_ns)
		wait_ns(shared->penalty_ns);
}

// ------------------------------------------------------------- the cache
__attribute__((used)) static void access_memory(unsigned index, qemu_plugin_meminfo_t info, uint64_t vaddr,
						void *unused, const void *env)
{
	struct vcpu *v;
	uint64_t line = vaddr >> LINE_SHIFT, tag, *set;
	int way;

	(void)index, (void)unused;
	if (!LOAD(shared->enabled))
		return;
	v = find_vcpu(env);
	if (!v && !(v = vcpu_by_register()))
		return;
	if (!v->shared) {
		unsigned cpu = cpu_by_register();

		if (cpu == VPEBS_CPUS)
			return;
		adopt(v, cpu);
	}
	COUNT(v->shared->accesses);
	if (v->cr3_unknown) {
		v->cr3_unknown = false;
		v->cr3 = read_cr3();
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
__attribute__((used)) static void cr3_load(unsigned index, void *unused, const void *env)
{
	struct vcpu *v = find_vcpu(env);

	(void)index, (void)unused;
	if (!v) {
		static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;

		pthread_mutex_lock(&lock);
		if (nr_vcpus < shared->cpus) {
			v = &vcpus[nr_vcpus];
			v->env = env;
			STORE(nr_vcpus, nr_vcpus + 1);
		}
		pthread_mutex_unlock(&lock);
		if (!v)
			return;
	}
	v->cr3_unknown = true;
	if (v->shared)
		COUNT(v->shared->switches);
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
			qemu_plugin_register_vcpu_mem_cb(insn, access_memory_entry, CB_R_REGS, MEM_RW, NULL);
		else if (is_cr3_load(insn))
			qemu_plugin_register_vcpu_insn_exec_cb(insn, cr3_load_entry, CB_NO_REGS, NULL);
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
	// all pages of the guest, and those that short-lived processes had
	shared->pages_entries = power_of_two(4 * ((fast + slow) >> 12));
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
		vcpus[i].last_line = ~0ULL;
		vcpus[i].tags = aligned_alloc(64, sets * WAYS * sizeof(uint64_t));
		memset(vcpus[i].tags, 0xff, sets * WAYS * sizeof(uint64_t));
	}
	STORE(shared->magic, VPEBS_MAGIC);
	qemu_plugin_register_vcpu_init_cb(id, vcpu_init);
	qemu_plugin_register_vcpu_tb_trans_cb(id, translate);
	return 0;
}
