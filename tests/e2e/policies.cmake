# SPDX-License-Identifier: GPL-2.0-or-later
# hypertier_test_policies(TARGET comment): every policies/*.bpf.c of the directory
# becomes policies/*.bpf.o in its build directory, with the users' own clang line.
function(hypertier_test_policies target comment)
  set(objects)
  file(GLOB sources CONFIGURE_DEPENDS policies/*.bpf.c)
  foreach(source ${sources})
    get_filename_component(name ${source} NAME_WLE)
    set(object ${CMAKE_CURRENT_BINARY_DIR}/policies/${name}.o)
    add_custom_command(
      OUTPUT ${object}
      COMMAND ${CMAKE_COMMAND} -E make_directory ${CMAKE_CURRENT_BINARY_DIR}/policies
      COMMAND ${BPF_CLANG} -O2 -g -target bpf -mcpu=v3 -Wall -I ${CMAKE_SOURCE_DIR}/include -c ${source} -o ${object}
      DEPENDS ${source} ${CMAKE_SOURCE_DIR}/include/hypertier/abi.h ${CMAKE_SOURCE_DIR}/include/hypertier/policy.bpf.h
      COMMENT "${comment} ${name}"
      VERBATIM)
    list(APPEND objects ${object})
  endforeach()
  add_custom_target(${target} ALL DEPENDS ${objects})
endfunction()
