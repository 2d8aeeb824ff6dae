# Metal compiles the kernels at run time.
include(csrc/join.cmake)
join_source(metal metal/step.metal metal csrc/math csrc/math/rules)
