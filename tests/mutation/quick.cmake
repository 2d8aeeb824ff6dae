# Most of a compiler's time goes to these headers: read once for all bugs.
cmake_language(DEFER CALL target_precompile_headers _ext PRIVATE
  <functional> <memory> <optional> <string> <vector> <mlx/array.h> <mlx/ops.h> <mlx/transforms.h>
  <nanobind/nanobind.h> <nanobind/stl/optional.h> <nanobind/stl/string.h> <nanobind/stl/vector.h>)
