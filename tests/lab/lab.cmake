# SPDX-License-Identifier: GPL-2.0-or-later
# hypertier_lab_test(NAME name LABELS quick|soak [OPTS lab-option...] [TIMEOUT seconds] COMMAND cmd...)
#
# A CTest test that boots the lab and runs COMMAND in it; a WARNING or BUG of
# the guest's kernel fails it. One VM at a time: two would share two cores, and
# multi-threaded guests get slow when their CPUs wait for each other.
function(hypertier_lab_test)
  cmake_parse_arguments(LAB "" "NAME;TIMEOUT" "LABELS;OPTS;COMMAND" ${ARGN})
  if(NOT LAB_NAME OR NOT LAB_COMMAND OR NOT LAB_LABELS)
    message(FATAL_ERROR "hypertier_lab_test needs NAME, LABELS and COMMAND")
  endif()
  if(NOT LAB_TIMEOUT)
    set(LAB_TIMEOUT 600)
  endif()
  math(EXPR ctest_timeout "${LAB_TIMEOUT} + 60") # the lab's own comes first and leaves its logs
  add_test(NAME ${LAB_NAME}
    COMMAND ${CMAKE_SOURCE_DIR}/tests/lab/lab --build ${CMAKE_BINARY_DIR} --name ${LAB_NAME} --timeout ${LAB_TIMEOUT}
            --fail-on-warn ${LAB_OPTS} -- ${LAB_COMMAND})
  set_tests_properties(${LAB_NAME} PROPERTIES LABELS "${LAB_LABELS};lab" RESOURCE_LOCK lab_vm TIMEOUT ${ctest_timeout})
endfunction()
