// SPDX-License-Identifier: GPL-2.0-only
/*
 * Kernel functions that are not exported. A kprobe on the name yields the
 * address and is taken away at once. Calls go through static calls, which are
 * patched into direct ones: an indirect call to a function whose ENDBR the
 * kernel sealed would be fatal on hardware with IBT. The kprobe's address lies
 * behind the ENDBR, which is right for a direct call.
 */
#include <linux/kprobes.h>
#include <linux/module.h>

#include "module.h"

u32 ht_movers;
char ht_missing[sizeof_field(struct ht_module_info, missing)];

static void *resolve(const char *name)
{
	struct kprobe probe = { .symbol_name = name };
	void *address;

	if (register_kprobe(&probe))
		return NULL;
	address = probe.addr;
	unregister_kprobe(&probe);
	return address;
}

#define HT_DEFINE(symbol, movers)                                      \
	DEFINE_STATIC_CALL_NULL(ht_##symbol, symbol);                  \
	static bool resolve_##symbol(void)                             \
	{                                                              \
		typeof(&symbol) address = resolve(#symbol);            \
                                                                       \
		if (address)                                           \
			static_call_update(ht_##symbol, address);      \
		return address;                                        \
	}
HT_SYMBOLS(HT_DEFINE)

#define HT_ENTRY(symbol, movers) { #symbol, movers, resolve_##symbol },
static const struct {
	const char *name;
	u32 movers;
	bool (*resolve)(void);
} symbols[] = { HT_SYMBOLS(HT_ENTRY) };

void ht_resolve_symbols(void)
{
	int i;

	/* move_pages(2) is always there for tierd to use */
	ht_movers = HT_EXCHANGES | HT_MIGRATES | HT_SPLITS | 1 << HT_MOVER_SYSCALL;
	for (i = 0; i < ARRAY_SIZE(symbols); i++) {
		if (symbols[i].resolve())
			continue;
		ht_movers &= ~symbols[i].movers;
		if (ht_missing[0])
			strlcat(ht_missing, " ", sizeof(ht_missing));
		strlcat(ht_missing, symbols[i].name, sizeof(ht_missing));
	}
	if (ht_missing[0])
		pr_warn("this kernel lacks %s; movers left: %s%ssyscall\n", ht_missing,
			ht_movers & HT_EXCHANGES ? "exchange " : "",
			ht_movers & HT_MIGRATES ? "migrate " : "");
}
