# The extension as it is on a Mac, except for four things: MLX's Metal headers are
# doubles, the CPU's streams take the GPU's path (our CPU backend is left out), the
# kernels are compiled by clang, and each of their accesses to memory is checked.
include(metal/source.cmake)
set(harness "${PROJECT_SOURCE_DIR}/tests/metal_on_cpu")
set(kernels "${metal_source_dir}/kernels_on_cpu.cpp")
set(METAL_ON_CPU_FLAGS "" CACHE STRING "More flags for the kernels, such as a sanitizer's")

# FMA is on so that it shows if the source failed to switch contraction off. No loop becomes
# a call of memcpy, whose accesses nobody would see.
add_custom_command(OUTPUT ${kernels}.o
  COMMAND ${Python_EXECUTABLE} ${harness}/translate.py run ${metal_source_dir}/step.joined.metal ${kernels}
  COMMAND clang++-19 -std=c++20 -O1 -g -fPIC -mfma -mf16c -fno-builtin -ffp-contract=fast-honor-pragmas
          -fsanitize-coverage=func,trace-loads,trace-stores -fvisibility=hidden -Wall
          -Wno-unknown-attributes -Wno-duplicate-decl-specifier -Wno-unused-function
          ${METAL_ON_CPU_FLAGS} -c ${kernels} -o ${kernels}.o
  DEPENDS ${metal_source_dir}/step.joined.metal ${harness}/translate.py ${harness}/grid.h
          ${harness}/shared.h ${harness}/include/metal_stdlib
  COMMAND_EXPAND_LISTS VERBATIM)

list(APPEND sources
  csrc/metal/dispatch.cpp csrc/metal/library.cpp csrc/metal/measure.cpp csrc/metal/pack.cpp
  csrc/metal/step.cpp csrc/metal/sources.cpp
  ${harness}/device.cpp ${harness}/eval_cpu.cpp ${harness}/grid.cpp ${harness}/memory.cpp
  ${kernels}.o)
# What runs at each access. A sanitizer is for the backend, not for these checks.
set_source_files_properties(${harness}/memory.cpp PROPERTIES
  COMPILE_OPTIONS "-O3;-fno-sanitize=address")
set(backend_includes ${harness}/include ${harness} metal ${metal_source_dir})
