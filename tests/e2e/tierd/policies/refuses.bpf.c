// SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause
// Does not want the seat.
#include <hypertier/policy.bpf.h>

SEC("struct_ops/refuses_init")
int BPF_PROG(refuses_init, struct tier_scope *scope)
{
	return -12; /* ENOMEM */
}

HYPERTIER_POLICY(refuses, .init = (void *)refuses_init);
