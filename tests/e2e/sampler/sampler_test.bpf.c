// SPDX-License-Identifier: GPL-2.0-only
/*
 * The sampler's own code behind a SYSCALL program, since perf_event programs
 * have no test run, and the empty perf_event program that its cost is compared
 * with.
 */
#include "sampler.h"

char LICENSE[] SEC("license") = "GPL";

struct ht_test_sample {
	__u64 space;
	__u64 address;
	__u32 store;
	__u32 counted; /* out */
};

SEC("syscall")
int sample_once(struct ht_test_sample *sample)
{
	__u64 data_src = sample->store ? HT_MEM_OP_STORE : 0;

	sample->counted = ht_count(sample->space, sample->address, &data_src);
	return 0;
}

SEC("perf_event")
int empty(void *ctx)
{
	return 0;
}
