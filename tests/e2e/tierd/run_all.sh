#!/bin/bash
# SPDX-License-Identifier: GPL-2.0-or-later
# All tests of tierd in one boot of the lab.
# usage: run_all.sh BUILD SWAPS KILLS
here=$(dirname "$0")
result=0
echo "=== bad input" && "$here/bad_input.sh" "$1" || result=1
echo "=== $2 hot swaps" && "$here/swap.sh" "$1" "$2" || result=1
echo "=== $3 kills" && "$here/crash.sh" "$1" "$3" || result=1
echo "=== a kernel that lacks a function" && "$here/missing_symbol.sh" "$1" || result=1
exit $result
