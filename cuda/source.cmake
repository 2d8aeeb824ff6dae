# NVRTC compiles the kernels at run time. A script too: cmake -DPROJECT_SOURCE_DIR=... -P this
include("${PROJECT_SOURCE_DIR}/csrc/join.cmake")
join_source(cuda cuda/kernels.cu cuda csrc/cuda csrc/math csrc/math/rules)
