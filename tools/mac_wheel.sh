#!/usr/bin/env bash
# Builds and audits the wheel for macOS on arm64, on Linux (docs/metal.md):
#   tools/mac_wheel.sh [OUTPUT]
# PYTHON has the build requirements of pyproject.toml. Debian packages: clang-19
# lld-19 llvm-19 libc++-19-dev.
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}
output=$(realpath -m "${1:-dist/mac}")
work=$PWD/build/mac

requirement() { # the pinned version of a package
  "$python" -c "import re, sys; print(re.search(rf'\"({sys.argv[1]}==[\w.]+)', open('pyproject.toml').read())[1])" "$1"
}
mlx=$(requirement mlx)
pip() { "$python" -m pip --quiet --disable-pip-version-check "$@"; }
fetch() { # FOLDER REQUIREMENT PLATFORM: unpacked once
  [ -d "$work/$1" ] && return
  rm -rf "$work/downloads" && mkdir -p "$work/downloads"
  pip download --no-deps --only-binary=:all: --python-version 3.12 --platform "$3" \
    --dest "$work/downloads" "$2"
  "$python" -m zipfile -e "$work"/downloads/*.whl "$work/$1.partial"
  mv "$work/$1.partial" "$work/$1"
}
for macos in 14 15 26; do
  fetch "mlx-metal-$macos" "mlx-metal==${mlx#mlx==}" "macosx_${macos}_0_arm64"
done
fetch mlx-core "$mlx" macosx_14_0_arm64
fetch nanobind-backend "nanobind-backend==1.0.0" macosx_14_0_arm64
fetch zig "ziglang==0.17.1" manylinux_2_12_x86_64
"$python" -c 'import abi3audit' 2>/dev/null || pip install abi3audit

"$python" tools/mac_sdk.py "$work/sdk" --zig "$work/zig/ziglang/lib" \
  "$work/mlx-metal-14/mlx/lib/libmlx.dylib" "$work"/mlx-core/mlx/core.*.so \
  "$work"/nanobind-backend/nanobind_backend/*.so

rm -rf "$work/wheel"
MAC_SDK=$work/sdk _PYTHON_HOST_PLATFORM=macosx-14.0-arm64 \
  CMAKE_TOOLCHAIN_FILE=$PWD/cross/macos-arm64.cmake \
  pip wheel --no-build-isolation --no-deps --wheel-dir "$work/wheel" \
  --config-settings "cmake.define.MLX_ROOT=$work/mlx-metal-14/mlx/share/cmake/MLX" .

"$python" tools/audit_mac_wheel.py "$work"/wheel/*.whl --sdk "$work/sdk" \
  "$work"/mlx-metal-*/mlx/lib/libmlx.dylib
mkdir -p "$output"
cp "$work"/wheel/*.whl "$output"
ls -l "$output"/*macosx*.whl
