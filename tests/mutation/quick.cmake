# Quick to compile and enough to tell a bug: one instruction set under all three names, and most
# of a compiler's time, which goes to these headers, spent once for all bugs.
set(CMAKE_SYSTEM_PROCESSOR any)
foreach(isa avx2 avx512)
  add_compile_definitions(update_${isa}=update_baseline measure_${isa}=measure_baseline)
endforeach()
cmake_language(DEFER CALL set_property TARGET kernel_baseline
  PROPERTY COMPILE_OPTIONS -O1 -ffp-contract=off)
cmake_language(DEFER CALL target_precompile_headers _ext PRIVATE
  <functional> <memory> <optional> <string> <vector> <mlx/array.h> <mlx/ops.h> <mlx/transforms.h>
  <nanobind/nanobind.h> <nanobind/stl/optional.h> <nanobind/stl/string.h> <nanobind/stl/vector.h>)
# The double of Metal looks at each access of its kernels: it has to be quick itself.
file(GLOB double tests/metal_on_cpu/*.cpp)
set_source_files_properties(${double} PROPERTIES COMPILE_OPTIONS -O3 SKIP_PRECOMPILE_HEADERS ON)
