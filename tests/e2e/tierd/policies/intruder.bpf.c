// SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause
// A policy that brings a program of another kind along.
#include <hypertier/policy.bpf.h>

SEC("tracepoint/sched/sched_switch")
int intruder_program(void *context)
{
	return 0;
}

HYPERTIER_POLICY(intruder);
