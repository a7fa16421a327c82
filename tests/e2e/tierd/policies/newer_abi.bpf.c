// SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause
// Of the next ABI.
#include <hypertier/policy.bpf.h>

char LICENSE[] SEC("license") = "GPL";
SEC(".struct_ops.link")
struct hypertier_policy newer_abi = {
	.abi = (HT_ABI_MAJOR + 1) << 16, .name = "newer_abi",
};
