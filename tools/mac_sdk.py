"""Collect what it takes to compile and link for macOS on Linux. Nothing of it is shipped.

    python tools/mac_sdk.py OUTPUT --zig FOLDER RELEASED_BINARY...

- The C headers of Darwin, open source, as the ``ziglang`` wheel carries them; the C++
  headers of Debian's libc++, with Apple's availability marks on, so that using what the
  oldest supported macOS lacks is an error.
- Stand-ins for the two frameworks that metal-cpp names (cross/include).
- Stub libraries with exactly the symbols that released binaries for the same macOS (MLX's
  own) import from the system, and a short list: anything else does not link.
"""

from __future__ import annotations

import argparse
import re
import shutil
import subprocess
from pathlib import Path

LLVM = Path("/usr/lib/llvm-19")
LIBRARIES = {
    "libc++": "/usr/lib/libc++.1.dylib",
    "libobjc": "/usr/lib/libobjc.A.dylib",
    "libSystem": "/usr/lib/libSystem.B.dylib",
}
# What MLX happens not to import. Each needs a reason.
ALSO = {
    # ISO C, in every macOS; dyld_stub_binder is the linker's own.
    "libSystem": {"_ldexp", "_strtol", "_wmemchr", "dyld_stub_binder"},
    # Imported by wheels for macOS 11 (seen in duckdb's).
    "libc++": {
        "__ZNSt11logic_errorC1EPKc",
        "__ZNSt11logic_errorD1Ev",
        "__ZTISt11logic_error",
        "__ZNSt3__115basic_streambufIcNS_11char_traitsIcEEEC2Ev",
        "__ZNSt3__115basic_streambufIcNS_11char_traitsIcEEED2Ev",
    },
}

# Darwin's newest headers leave these to a <float.h> of C23, which clang 19 lacks.
MATH_CONSTANTS = """
#ifndef INFINITY
#define INFINITY __builtin_inff()
#endif
#ifndef NAN
#define NAN __builtin_nanf("")
#endif
"""

STUB = """--- !tapi-tbd
tbd-version: 4
targets: [ arm64-macos ]
install-name: '{path}'
exports:
  - targets: [ arm64-macos ]
    symbols: [ {symbols} ]
...
"""


def replaced(path: Path, pattern: str, new: str) -> None:
    text, count = re.subn(pattern, new, path.read_text())
    if count == 0:
        raise SystemExit(f"{path}: '{pattern}' is not there")
    path.write_text(text)


def headers(include: Path, zig: Path) -> None:
    shutil.copytree(zig / "libc/include/any-darwin-any", include)
    shutil.copytree(LLVM / "include/c++/v1", include / "c++/v1")
    replaced(
        include / "c++/v1/__config_site",
        r"(#define _LIBCPP_HAS_VENDOR_AVAILABILITY_ANNOTATIONS) 0"
        r"|#define _LIBCPP_HAS_NO_VENDOR_AVAILABILITY_ANNOTATIONS",
        "#define _LIBCPP_HAS_VENDOR_AVAILABILITY_ANNOTATIONS 1",
    )
    with (include / "math.h").open("a") as math:
        math.write(MATH_CONSTANTS)
    stand_ins = Path(__file__).resolve().parent.parent / "cross/include"
    shutil.copytree(stand_ins, include, dirs_exist_ok=True)


def imported(binaries: list[Path]) -> dict[str, set[str]]:
    """Symbols that the binaries take from each system library."""
    symbols: dict[str, set[str]] = {name: set() for name in LIBRARIES}
    for binary in binaries:
        command = [LLVM / "bin/llvm-nm", "-m", "-u", binary]
        listing = subprocess.run(command, check=True, capture_output=True, text=True).stdout
        for symbol, library in re.findall(r"external (\S+) \(from (\S+)\)", listing):
            if library in symbols:
                symbols[library].add(symbol)
    return symbols


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("output", type=Path)
    parser.add_argument("--zig", type=Path, required=True, help="the wheel's ziglang/lib")
    parser.add_argument("binaries", type=Path, nargs="+")
    arguments = parser.parse_args()
    shutil.rmtree(arguments.output, ignore_errors=True)
    headers(arguments.output / "usr/include", arguments.zig)
    settings = '{"Version": "14.0", "MaximumDeploymentTarget": "14.0.99"}\n'
    (arguments.output / "SDKSettings.json").write_text(settings)
    stubs = arguments.output / "usr/lib"
    stubs.mkdir()
    for name, symbols in imported(arguments.binaries).items():
        symbols |= ALSO.get(name, set())
        listed = ", ".join(f"'{symbol}'" for symbol in sorted(symbols))
        (stubs / f"{name}.tbd").write_text(STUB.format(path=LIBRARIES[name], symbols=listed))
        print(f"{name}: {len(symbols)} symbols")


if __name__ == "__main__":
    main()
