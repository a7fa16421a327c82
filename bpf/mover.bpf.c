// SPDX-License-Identifier: GPL-2.0-only
/*
 * The way from tierd into hypertier.ko: six SYSCALL programs that pass the
 * values of mmapable one-entry maps on to the module's kfuncs, and nothing
 * else. tierd fills the maps in place, runs a program, reads the answers in
 * place. What a policy is asked lies in a map of its scope, made when the scope
 * is; the page walk and the moves have one set of maps for all.
 */
#include "vmlinux.h"
#include <bpf/bpf_helpers.h>
#include <hypertier/abi.h>

char LICENSE[] SEC("license") = "GPL";

/*
 * pahole 1.24 writes no declarations of kfuncs into BTF; these are the
 * module's. void: the verifier knows no arrays of structs within an argument.
 * __weak: the sampler, in the same object, loads without the module too.
 */
extern int hypertier_classify(struct ht_run *run, u32 run__sz, struct tier_range *ranges,
			      u32 ranges__sz) __ksym __weak;
extern int hypertier_admit(struct ht_run *run, u32 run__sz, struct tier_pair *pairs,
			   u32 pairs__sz) __ksym __weak;
extern int hypertier_moved(struct ht_run *run, u32 run__sz, struct tier_result *results,
			   u32 results__sz) __ksym __weak;
extern int hypertier_spaces(void *run, u32 run__sz, struct ht_mapping *mappings,
			    u32 mappings__sz) __ksym __weak;
extern int hypertier_walk(void *run, u32 run__sz, u64 *pages, u32 pages__sz) __ksym __weak;
extern int hypertier_exchange(struct ht_exchange_run *run, u32 run__sz, struct ht_pair *pairs,
			      u32 pairs__sz) __ksym __weak;

/* Map values must be one struct each: an array of its own is no value type. */
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

/* Or clang writes only a forward declaration of it, which is no value type. */
const struct ht_call *ht_call_type __attribute__((unused));

struct call_map {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(map_flags, BPF_F_MMAPABLE);
	__uint(max_entries, 1);
	__type(key, u32);
	__type(value, struct ht_call);
};

struct {
	__uint(type, BPF_MAP_TYPE_ARRAY_OF_MAPS);
	__uint(max_entries, HT_CALLS_MAX);
	__type(key, u32);
	__array(values, struct call_map);
} calls SEC(".maps");

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

static struct ht_call *call_of(struct ht_call_number *at)
{
	u32 number = at->number;
	void *map = bpf_map_lookup_elem(&calls, &number);

	return map ? bpf_map_lookup_elem(map, &zero) : NULL;
}

#define ASK(kfunc, at, entries)                                                              \
	({                                                                                   \
		struct ht_call *_call = call_of(at);                                         \
		_call ? kfunc(&_call->run, sizeof(_call->run), (void *)_call->entries,       \
			      sizeof(_call->entries)) : -22;                                 \
	})

SEC("syscall")
int classify(struct ht_call_number *at)
{
	return ASK(hypertier_classify, at, ranges);
}

SEC("syscall")
int admit(struct ht_call_number *at)
{
	return ASK(hypertier_admit, at, pairs);
}

SEC("syscall")
int moved(struct ht_call_number *at)
{
	return ASK(hypertier_moved, at, results);
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
