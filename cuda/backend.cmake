# The CUDA backend, on Linux: the target mlx_fused_optim_cuda, a library of its own that the
# extension loads when it is needed, see csrc/cuda/backend.h. Nothing of CUDA is needed to
# build: the kernels are source (csrc/cuda/compiler.h), and what MLX's headers name is declared
# in csrc/cuda/include.
#
#   -DMLX_FUSED_OPTIM_CUDA=OFF   leaves it out
option(MLX_FUSED_OPTIM_CUDA "Build the CUDA backend (Linux)" ON)
if(NOT MLX_FUSED_OPTIM_CUDA OR NOT CMAKE_SYSTEM_NAME STREQUAL "Linux")
  list(APPEND sources csrc/no_gpu/step.cpp)
  return()
endif()
list(APPEND sources csrc/cuda/loader.cpp)
set(backend_libraries ${CMAKE_DL_LIBS})

include(cuda/source.cmake)
add_library(mlx_fused_optim_cuda SHARED
  csrc/cuda/batches.cpp csrc/cuda/compiler.cpp csrc/cuda/disk_cache.cpp csrc/cuda/encoding.cpp
  csrc/cuda/kernels.cpp csrc/cuda/measure.cpp csrc/cuda/measure_batches.cpp csrc/cuda/memory.cpp
  csrc/cuda/pace.cpp csrc/cuda/packing.cpp csrc/cuda/schedule.cpp csrc/cuda/step.cpp csrc/cuda/variants.cpp)
target_include_directories(mlx_fused_optim_cuda PRIVATE csrc csrc/cuda/include ${cuda_source_dir})
target_compile_options(mlx_fused_optim_cuda PRIVATE -Wall -Wextra)
# libmlx brings the driver and NVRTC with it where it has CUDA; a libmlx without CUDA, like the
# one of most build machines, lacks symbols that resolve elsewhere.
target_link_libraries(mlx_fused_optim_cuda PRIVATE mlx)
set_source_files_properties(
  csrc/cuda/encoding.cpp csrc/cuda/measure.cpp csrc/cuda/memory.cpp csrc/cuda/pace.cpp
  csrc/cuda/schedule.cpp csrc/cuda/step.cpp
  PROPERTIES UNITY_GROUP mlx) # see CMakeLists.txt
set_source_files_properties(
  csrc/cuda/batches.cpp csrc/cuda/disk_cache.cpp csrc/cuda/kernels.cpp csrc/cuda/measure_batches.cpp
  csrc/cuda/packing.cpp csrc/cuda/variants.cpp
  PROPERTIES UNITY_GROUP host)
set_target_properties(mlx_fused_optim_cuda PROPERTIES
  UNITY_BUILD_MODE GROUP
  CXX_VISIBILITY_PRESET hidden
  BUILD_WITH_INSTALL_RPATH ON
  INSTALL_RPATH "$ORIGIN/../mlx/lib")
install(TARGETS mlx_fused_optim_cuda LIBRARY DESTINATION mlx_fused_optim)
