# The CUDA backend, where nvcc is found: the target mlx_fused_optim_cuda, a library
# of its own that the extension loads when it is needed, see csrc/cuda/backend.h.
#
#   -DMLX_FUSED_OPTIM_CUDA=OFF   leaves it out, ON makes a missing nvcc an error
set(MLX_FUSED_OPTIM_CUDA "AUTO" CACHE STRING "Build the CUDA backend: AUTO, ON or OFF")
set(has_cuda FALSE)
if(NOT MLX_FUSED_OPTIM_CUDA STREQUAL "OFF" AND CMAKE_SYSTEM_NAME STREQUAL "Linux")
  find_package(CUDAToolkit 12.8 QUIET) # the first that knows sm_120
  set(has_cuda ${CUDAToolkit_FOUND})
endif()
if(NOT has_cuda)
  if(MLX_FUSED_OPTIM_CUDA STREQUAL "ON")
    message(FATAL_ERROR "MLX_FUSED_OPTIM_CUDA=ON, but nvcc 12.8 or later was not found on this Linux system.")
  elseif(CMAKE_SYSTEM_NAME STREQUAL "Linux")
    message(STATUS "CUDA backend: left out (nvcc 12.8 or later not found, or MLX_FUSED_OPTIM_CUDA=OFF)")
  endif()
  list(APPEND sources csrc/no_gpu/sgd.cpp)
  return()
endif()
list(APPEND sources csrc/cuda/loader.cpp)
set(backend_libraries ${CMAKE_DL_LIBS})
message(STATUS "CUDA backend: built with ${CUDAToolkit_NVCC_EXECUTABLE} ${CUDAToolkit_VERSION}")

# Machine code for the generations that are out, and PTX of the oldest, which the
# driver compiles for those that come later. --fmad=false: csrc/math names every
# rounding. --compress-mode=size: a tenth, as kernels have much in common.
set(architectures)
foreach(number 80 90 100 120)
  list(APPEND architectures -gencode=arch=compute_${number},code=sm_${number})
endforeach()
set(fatbins)
foreach(name sgd full measure)
  set(fatbin ${CMAKE_CURRENT_BINARY_DIR}/${name}.fatbin)
  add_custom_command(
    OUTPUT ${fatbin}
    COMMAND ${CUDAToolkit_NVCC_EXECUTABLE} -fatbin -std=c++17 --fmad=false --compress-mode=size
            ${architectures}
            -gencode=arch=compute_80,code=compute_80 -I${CMAKE_CURRENT_SOURCE_DIR}/csrc
            -MD -MF ${fatbin}.d ${CMAKE_CURRENT_SOURCE_DIR}/cuda/${name}.cu -o ${fatbin}
    DEPENDS cuda/${name}.cu
    DEPFILE ${fatbin}.d
    COMMENT "Compiling the CUDA kernels of ${name}.cu"
    VERBATIM)
  list(APPEND fatbins ${fatbin})
endforeach()

add_library(mlx_fused_optim_cuda SHARED
  csrc/cuda/batches.cpp csrc/cuda/encoding.cpp csrc/cuda/full_batches.cpp
  csrc/cuda/full_step.cpp csrc/cuda/kernels.cpp csrc/cuda/measure.cpp
  csrc/cuda/measure_batches.cpp csrc/cuda/memory.cpp csrc/cuda/packing.cpp
  csrc/cuda/plain_step.cpp csrc/cuda/schedule.cpp csrc/cuda/sgd.cpp)
set_source_files_properties(csrc/cuda/kernels.cpp PROPERTIES
  COMPILE_DEFINITIONS "MLX_FUSED_OPTIM_FATBINS=\"${CMAKE_CURRENT_BINARY_DIR}\""
  OBJECT_DEPENDS "${fatbins}")
target_include_directories(mlx_fused_optim_cuda PRIVATE
  csrc csrc/cuda/include ${CUDAToolkit_INCLUDE_DIRS})
target_compile_options(mlx_fused_optim_cuda PRIVATE -Wall -Wextra)
# libmlx brings the driver's library with it where it has CUDA; a libmlx without
# CUDA, like the one of most build machines, lacks symbols that resolve elsewhere.
target_link_libraries(mlx_fused_optim_cuda PRIVATE mlx)
set_target_properties(mlx_fused_optim_cuda PROPERTIES
  CXX_VISIBILITY_PRESET hidden
  BUILD_WITH_INSTALL_RPATH ON
  INSTALL_RPATH "$ORIGIN/../mlx/lib")
install(TARGETS mlx_fused_optim_cuda LIBRARY DESTINATION mlx_fused_optim)
