#!/usr/bin/env bash
# Proves the Metal backend as far as Linux can (docs/metal.md):
#   tools/metal_check.sh [build | PYTEST_OPTIONS...]
# checks the kernels' source, builds the extension on the double of Metal, plainly and
# under AddressSanitizer, and (without "build") runs the tests that need it. PYTHON has
# the package and its test requirements installed. Debian packages: clang-19
# libclang-rt-19-dev.
set -euo pipefail
cd "$(dirname "$0")/.."
python=$(realpath -s "$(command -v "${PYTHON:-python3}")")
export PATH=${python%/*}:$PATH # ninja

build() { # FOLDER FLAGS...: the package as it would be on a Mac, but for the double
  local folder=build/$1
  "$python" -m cmake -S . -B "$folder" -G Ninja -DPython_EXECUTABLE="$python" \
    -DMETAL_ON_CPU=ON -DCMAKE_CXX_FLAGS_RELEASE="-O1 -DNDEBUG" "${@:2}" > "$folder.log" ||
    { cat "$folder.log"; exit 1; }
  "$python" -m cmake --build "$folder" >> "$folder.log" || { cat "$folder.log"; exit 1; }
  rm -rf "$folder/package" && mkdir "$folder/package"
  cp -r python/mlx_fused_optim "$folder/package"
  cp "$folder/_ext.abi3.so" "$folder/package/mlx_fused_optim"
}
mkdir -p build
{
  build metal_on_cpu
  "$python" tests/metal_on_cpu/translate.py check build/metal_on_cpu/metal_source/step.joined.metal
} &
plain=$!
build metal_on_cpu_asan -DCMAKE_CXX_COMPILER=clang++-19 \
  -DCMAKE_CXX_FLAGS="-fsanitize=address -shared-libasan -Wno-deprecated-declarations" \
  -DMETAL_ON_CPU_FLAGS=-fsanitize=address
wait $plain
[ "${1:-}" = build ] && exit

# What the double alone can tell, and what is held or given away. (It has one device, and
# nothing to compare it with.)
PYTHONPATH=build/metal_on_cpu/package "$python" -m pytest -q "$@" \
  --deselect tests/test_check.py::test_another_device_is_compared_with_the_cpu \
  tests/test_metal.py tests/test_holding.py tests/test_schedules_step.py tests/test_check.py
# The conformance tables: Metal's rows, against the CPU's bits.
METAL_ON_CPU=build "$python" -m pytest -q "$@" tests/test_conformance.py \
  tests/test_full_conformance.py -k metal
