# The CPU backend.
list(APPEND sources
  csrc/cpu/isa.cpp csrc/cpu/measure.cpp csrc/cpu/parallel.cpp csrc/cpu/step.cpp)

# The CPU kernels, once for each instruction set; csrc/cpu/isa.cpp picks one at
# run time. An object library each, because flags and names differ.
set(isas baseline)
set(isa_flags_baseline)
if(CMAKE_SYSTEM_PROCESSOR MATCHES "x86_64|AMD64")
  list(APPEND isas avx2 avx512)
  set(isa_flags_avx2 -mavx2 -mf16c)
  set(isa_flags_avx512 -mavx2 -mf16c -mavx512f -mavx512bw -mavx512dq -mavx512vl)
endif()
foreach(isa ${isas})
  add_library(kernel_${isa} OBJECT
    csrc/cpu/kernel.cpp csrc/cpu/norm_kernel.cpp)
  target_include_directories(kernel_${isa} PRIVATE csrc)
  target_compile_options(kernel_${isa} PRIVATE -O3 -ffp-contract=off ${isa_flags_${isa}})
  target_compile_definitions(kernel_${isa} PRIVATE ISA=${isa})
  set_target_properties(kernel_${isa} PROPERTIES POSITION_INDEPENDENT_CODE ON CXX_VISIBILITY_PRESET hidden)
  list(APPEND sources $<TARGET_OBJECTS:kernel_${isa}>)
endforeach()
