# The Metal backend, on a Mac or cross-built for one (cross/macos-arm64.cmake).
include(metal/source.cmake)
list(APPEND sources
  csrc/metal/dispatch.cpp csrc/metal/library.cpp csrc/metal/measure.cpp csrc/metal/pack.cpp
  csrc/metal/step.cpp csrc/metal/sources.cpp)
set(backend_includes metal ${metal_source_dir})
set(backend_libraries objc) # metal-cpp sends Objective-C messages
# The MLX wheel's target names frameworks by their paths on its builder's Mac; the
# extension calls none of them itself.
set_target_properties(mlx PROPERTIES INTERFACE_LINK_LIBRARIES "")
