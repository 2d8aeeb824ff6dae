"""Audit a macOS wheel on any machine: would it load, on every macOS that it claims?

    python tools/audit_mac_wheel.py WHEEL --sdk SDK LIBMLX...

Each finding is printed, and the exit code is 1 if there is one. LIBMLX are the libraries of
MLX's wheels for each macOS; SDK comes from tools/mac_sdk.py. Python's limited API is
abi3audit's business: it is run too.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from pathlib import Path

LLVM = "/usr/lib/llvm-19/bin/llvm-"
TAG = "cp310-abi3-macosx_14_0_arm64"
EXTENSION = "mlx_fused_optim/_ext.abi3.so"
RPATH = "@loader_path/../mlx/lib"
SYSTEM = {
    "libc++": "/usr/lib/libc++.1.dylib",
    "libobjc": "/usr/lib/libobjc.A.dylib",
    "libSystem": "/usr/lib/libSystem.B.dylib",
}
# By flat lookup at run time: from Python itself, and from nanobind's shared backend.
DYNAMIC = re.compile(r"_(Py|_Py)\w+$")


def llvm(tool: str, *arguments: str | Path) -> str:
    command = [LLVM + tool, *map(str, arguments)]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def exported(library: Path) -> set[str]:
    return {line.split()[-1] for line in llvm("nm", "-gU", library).splitlines() if line.strip()}


def stub_symbols(stub: Path) -> set[str]:
    return set(re.findall(r"'([^']*)'", stub.read_text().split("symbols:")[1]))


def findings_of_wheel(wheel: Path) -> Iterator[str]:
    names = zipfile.ZipFile(wheel).namelist()
    if not wheel.stem.endswith(TAG):
        yield f"the wheel's tag is not {TAG}: {wheel.name}"
    binaries = [n for n in names if n.endswith((".so", ".dylib", ".a", ".metallib"))]
    if binaries != [EXTENSION]:
        yield f"the binaries are not only {EXTENSION}: {binaries}"
    for name in names:
        if not re.match(r"mlx_fused_optim(-[\w.]+\.dist-info)?/", name):
            yield f"a file outside of the package: {name}"


def findings_of_commands(extension: Path) -> Iterator[str]:
    header = llvm("objdump", "--macho", "--private-header", extension)
    if not re.search(r"\bARM64\b.*\bBUNDLE\b", header):
        yield f"not a bundle for arm64: {header.strip()}"
    commands = llvm("otool", "-l", extension)
    minimum = re.findall(r"minos (\S+)", commands)
    if minimum != ["14.0"]:
        yield f"the oldest macOS is not 14.0: {minimum}"
    rpaths = re.findall(r"cmd LC_RPATH\n.*\n\s+path (\S+)", commands)
    if rpaths != [RPATH]:
        yield f"the rpath is not {RPATH}: {rpaths}"
    if "LC_CODE_SIGNATURE" not in commands:
        yield "not signed: arm64 wants an ad-hoc signature at least"
    libraries = set(re.findall(r"cmd LC_LOAD_DYLIB\n.*\n\s+name (\S+)", commands))
    if extra := libraries - {"@rpath/libmlx.dylib", *SYSTEM.values()}:
        yield f"libraries that it must not need: {sorted(extra)}"


def findings_of_symbols(extension: Path, sdk: Path, mlx: list[Path]) -> Iterator[str]:
    sources = {name: [(name, stub_symbols(sdk / f"usr/lib/{name}.tbd"))] for name in SYSTEM}
    sources["libmlx"] = [(str(path), exported(path)) for path in mlx]
    for line in llvm("nm", "-m", "-u", extension).splitlines():
        match = re.search(r"external (\S+) \((?:from (\S+)|(dynamically looked up))\)$", line)
        if not match:
            yield f"a symbol of an unknown kind: {line.strip()}"
        elif match[3]:
            if not DYNAMIC.match(match[1]):
                yield f"{match[1]}: looked up at run time, but not Python's"
        elif match[2] not in sources:
            yield f"{match[1]}: from {match[2]}, which is not audited"
        else:
            for library, symbols in sources[match[2]]:
                if match[1] not in symbols:
                    yield f"{match[1]}: not exported by {library}"
    if (exports := exported(extension)) != {"_PyInit__ext"}:
        yield f"exports more than its initialisation: {sorted(exports)}"


def findings(wheel: Path, sdk: Path, mlx: list[Path]) -> Iterator[str]:
    yield from findings_of_wheel(wheel)
    with tempfile.TemporaryDirectory() as folder:
        extension = Path(zipfile.ZipFile(wheel).extract(EXTENSION, folder))
        yield from findings_of_commands(extension)
        yield from findings_of_symbols(extension, sdk, mlx)
    limited = subprocess.run(
        [sys.executable, "-m", "abi3audit", "--strict", "--verbose", wheel],
        capture_output=True,
        text=True,
    )
    if limited.returncode:
        yield f"not within Python's limited API:\n{limited.stdout}{limited.stderr}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("wheel", type=Path)
    parser.add_argument("mlx", type=Path, nargs="+")
    parser.add_argument("--sdk", type=Path, required=True)
    arguments = parser.parse_args()
    found = list(findings(arguments.wheel, arguments.sdk, arguments.mlx))
    print(
        "\n".join(found) or f"{arguments.wheel.name}: ok, with {len(arguments.mlx)} builds of MLX"
    )
    sys.exit(bool(found))


if __name__ == "__main__":
    main()
