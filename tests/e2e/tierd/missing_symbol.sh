#!/bin/bash
# SPDX-License-Identifier: GPL-2.0-or-later
# On a kernel without one of the functions that the module needs: it says which,
# and pages are moved by what is left. The function is taken away by another
# spelling of its name in a copy of the module.
# usage: missing_symbol.sh BUILD   (in the lab, --no-tierd)
. "$(dirname "$0")/lib.sh"

moved_at_least() { [ "$(counter promoted_pages_total)" -ge "$1" ]; }

# name, mover that is left
lacking() {
	note "without $1: $2"
	sed "s/$1/${1%?}_/g" "$MODULE" >"$work/hypertier.ko"
	dmesg --clear
	check "the module loads without $1" insmod "$work/hypertier.ko"
	check "it says what is missing" grep -q "this kernel lacks ${1%?}_; movers left: .*syscall" <(dmesg)
	dmesg | grep 'this kernel lacks'
	start_tierd --fresh
	coproc hotset { exec hotset --size 192M --hot 32M --place slow-hot; }
	local line pid=$hotset_PID
	read -r line <&"${hotset[0]}" # ready
	check "load" tierctl load hyperplace
	check_equal "mover" "$2" "$(status /mover)"
	echo go >&"${hotset[1]}"
	read -r line <&"${hotset[0]}"
	check "pages are moved" wait_until 120 moved_at_least 4096
	check_at_least "pages moved by $2" 4096 "$(status /mover_pages/$2)"
	echo "promoted $(counter promoted_pages_total), demoted $(counter demoted_pages_total), failed $(counter move_failed_pages_total) pages"
	echo stop >&"${hotset[1]}"
	check "no byte is wrong" wait "$pid"
	check "unload" tierctl unload
	stop_tierd
	check "the module unloads" wait_until 20 module_unloads
}

lacking folio_isolate_lru syscall
lacking try_to_migrate migrate
finish
