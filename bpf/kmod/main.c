// SPDX-License-Identifier: GPL-2.0-only
#include <linux/module.h>
#include <hypertier/abi.h>
MODULE_LICENSE("GPL");
MODULE_VERSION(HT_VERSION);
