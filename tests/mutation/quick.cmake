# Most of a compiler's time goes to these headers: read once for all bugs, each of which is in
# one file.
set(CMAKE_UNITY_BUILD OFF)
cmake_language(DEFER CALL target_precompile_headers _ext PRIVATE
  <functional> <memory> <optional> <string> <vector> <mlx/array.h> <mlx/ops.h> <mlx/transforms.h>
  <nanobind/nanobind.h> <nanobind/stl/optional.h> <nanobind/stl/string.h> <nanobind/stl/vector.h>)
