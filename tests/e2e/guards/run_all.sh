#!/bin/bash
# SPDX-License-Identifier: GPL-2.0-or-later
# Several tests of the guards in one boot of the lab.
# usage: run_all.sh BUILD TEST...
here=$(dirname "$0") build=$1
shift
result=0
for test in "$@"; do
	echo "=== $test" && "$here/$test.sh" "$build" || result=1
done
exit $result
