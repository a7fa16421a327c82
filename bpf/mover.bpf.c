// SPDX-License-Identifier: GPL-2.0-only
/*
 * The way from tierd into hypertier.ko: six SYSCALL programs that pass the
 * values of mmapable one-entry maps on to the module's kfuncs, and nothing
 * else. tierd fills the maps in place, runs a program, reads the answers in
 * place: one call an epoch and step, no copy.
 */
#include "vmlinux.h"
#include <bpf/bpf_helpers.h>
#include <hypertier/abi.h>

char LICENSE[] SEC("license") = "GPL";

/*
 * pahole 1.24 writes no declarations of kfuncs into BTF; these are the
 * module's. void: the verifier knows no arrays of structs within an argument.
 */
extern int hypertier_classify(struct ht_run *run, u32 run__sz, struct tier_range *ranges,
			      u32 ranges__sz) __ksym;
extern int hypertier_admit(struct ht_run *run, u32 run__sz, struct tier_pair *pairs,
			   u32 pairs__sz) __ksym;
extern int hypertier_moved(struct ht_run *run, u32 run__sz, struct tier_result *results,
			   u32 results__sz) __ksym;
extern int hypertier_spaces(void *run, u32 run__sz, struct ht_mapping *mappings,
			    u32 mappings__sz) __ksym;
extern int hypertier_walk(void *run, u32 run__sz, u64 *pages, u32 pages__sz) __ksym;
extern int hypertier_exchange(struct ht_exchange_run *run, u32 run__sz, struct ht_pair *pairs,
			      u32 pairs__sz) __ksym;

/* Map values must be one struct each: an array of its own is no value type. */
struct ht_ranges { struct tier_range range[HT_RANGES_MAX]; };
struct ht_admits { struct tier_pair pair[HT_ADMITS_MAX]; };
struct ht_results { struct tier_result result[HT_ADMITS_MAX]; };
struct ht_mappings { struct ht_mapping mapping[HT_MAPPINGS_MAX]; };
struct ht_pages { u64 page[HT_PAGES_MAX]; };
struct ht_pairs { struct ht_pair pair[HT_PAIRS_MAX]; };

#define ONE_ENTRY(map, contents)                      \
	struct {                                      \
		__uint(type, BPF_MAP_TYPE_ARRAY);     \
		__uint(map_flags, BPF_F_MMAPABLE);    \
		__uint(max_entries, 1);               \
		__type(key, u32);                     \
		__type(value, struct contents);       \
	} map SEC(".maps")

ONE_ENTRY(run, ht_run);
ONE_ENTRY(ranges, ht_ranges);
ONE_ENTRY(admits, ht_admits);
ONE_ENTRY(results, ht_results);
ONE_ENTRY(spaces, ht_spaces_run);
ONE_ENTRY(mappings, ht_mappings);
ONE_ENTRY(walks, ht_walks_run);
ONE_ENTRY(pages, ht_pages);
ONE_ENTRY(pairs, ht_pairs);
ONE_ENTRY(exchange, ht_exchange_run);

static const u32 zero;

/* Both values always exist; the verifier wants to see that it was asked. */
#define PASS(kfunc, first, second)                                                    \
	({                                                                            \
		typeof(*first.value) *_a = bpf_map_lookup_elem(&first, &zero);        \
		typeof(*second.value) *_b = bpf_map_lookup_elem(&second, &zero);      \
		_a && _b ? kfunc(_a, sizeof(*_a), (void *)_b, sizeof(*_b)) : -22;     \
	})

SEC("syscall")
int classify(void *ctx)
{
	return PASS(hypertier_classify, run, ranges);
}

SEC("syscall")
int admit(void *ctx)
{
	return PASS(hypertier_admit, run, admits);
}

SEC("syscall")
int moved(void *ctx)
{
	return PASS(hypertier_moved, run, results);
}

SEC("syscall")
int spaces_run(void *ctx)
{
	return PASS(hypertier_spaces, spaces, mappings);
}

SEC("syscall")
int walk(void *ctx)
{
	return PASS(hypertier_walk, walks, pages);
}

SEC("syscall")
int exchange_run(void *ctx)
{
	return PASS(hypertier_exchange, exchange, pairs);
}
