# Quick to compile and enough to tell a bug: one instruction set under all three names. Where
# files are compiled one by one, since a bug is in one of them, most of a compiler's time goes to
# these headers, and is spent once for all bugs.
set(CMAKE_SYSTEM_PROCESSOR any)
foreach(isa avx2 avx512)
  add_compile_definitions(update_${isa}=update_baseline measure_${isa}=measure_baseline)
endforeach()
function(make_quick)
  if(TARGET kernel_baseline)
    set_property(TARGET kernel_baseline PROPERTY COMPILE_OPTIONS -O1 -ffp-contract=off)
  endif()
  if(NOT CMAKE_UNITY_BUILD)
    target_precompile_headers(_ext PRIVATE
      <functional> <memory> <optional> <string> <vector> <mlx/array.h> <mlx/ops.h>
      <mlx/transforms.h> <nanobind/nanobind.h> <nanobind/stl/optional.h> <nanobind/stl/string.h>
      <nanobind/stl/vector.h>)
  endif()
endfunction()
cmake_language(DEFER CALL make_quick)
# The double of Metal looks at each access of its kernels: it has to be quick itself.
file(GLOB double tests/metal_on_cpu/*.cpp)
set_source_files_properties(${double} PROPERTIES COMPILE_OPTIONS -O3 SKIP_PRECOMPILE_HEADERS ON)
