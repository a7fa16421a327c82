#!/bin/bash
# SPDX-License-Identifier: GPL-2.0-or-later
# All tests of the guards in one boot of the lab.
# usage: run_all.sh BUILD
here=$(dirname "$0")
result=0
for test in idle see bad_policies; do
	echo "=== $test" && "$here/$test.sh" "$1" || result=1
done
exit $result
