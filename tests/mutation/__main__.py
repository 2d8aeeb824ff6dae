"""Plants bugs, one at a time, in a copy of the project, and asks that the tests catch each.

    python tests/mutation [--quick] [host | metal] [NAME...]

A list that is not named is not run; without names, both are. The checks run in order, the
cheap ones first, and the table says which one caught a bug:

    source   translate.py check: Metal's language, ASCII, names (of the list ``metal``)
    build    CMake and the compilers
    tests    the tests that should catch it: those of its row, or of the list
    suite    every other test (of the list ``host``)

The exit code is 0 if every bug was caught, and if the tests pass without one. With --quick
neither that is looked at, nor the suite.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import host_bugs
import metal_bugs
from mutant import Mutant

ROOT = Path(__file__).resolve().parents[2]
WORK = ROOT / "build/mutation"
TREE = WORK / "tree"
LISTS = {"host": host_bugs.MUTANTS, "metal": metal_bugs.MUTANTS}
PYTHON = sys.executable
PYTEST = [PYTHON, "-m", "pytest", "-qx", "--no-header", "-p", "no:cacheprovider"]
OPTIONS = {
    # Quick to compile; the CPU's kernels have an optimisation of their own.
    "host": [
        "-DCMAKE_CXX_FLAGS_RELEASE=-O0 -DNDEBUG",
        "-DMLX_FUSED_OPTIM_CUDA=OFF",
        f"-DCMAKE_PROJECT_INCLUDE={TREE}/tests/mutation/quick.cmake",
    ],
    "metal": ["-DMETAL_ON_CPU=ON"],
}
# What catches most bugs of the Metal backend, the quickest first.
METAL_TESTS = [
    ["tests/test_metal.py"],
    ["tests/test_conformance.py", "tests/test_full_conformance.py", "-k", "not cpu-"],
    [
        "tests/test_holding.py",
        "tests/test_schedules_step.py",
        "tests/test_exponential_decay.py",
        "tests/test_schedules_exact.py",
    ],
]


def run(*command: str | Path, package: Path) -> str:
    """What the command said, if it failed; else nothing."""
    environment = {**os.environ, "PYTHONPATH": str(package)}
    environment["PATH"] = f"{Path(PYTHON).parent}:{environment['PATH']}"
    done = subprocess.run(
        command,
        cwd=TREE,
        env=environment,
        capture_output=True,
        text=True,
        errors="replace",
        timeout=1200,
    )
    return "" if done.returncode == 0 else done.stdout + done.stderr or "failed"


def first_line(pattern: str, said: str) -> str:
    match = re.search(pattern, said, re.MULTILINE)
    return (match[1] if match else said.strip().splitlines()[-1])[:100]


def build(kind: str, native: bool) -> tuple[str, str]:
    """The package in build/mutation/KIND/package, or the check that failed and what it said."""
    folder = WORK / kind
    package = folder / "package"
    if native:
        cmake = [PYTHON, "-m", "cmake"]
        options = ["-G", "Ninja", f"-DPython_EXECUTABLE={PYTHON}", *OPTIONS[kind]]
        said = run(*cmake, "-S", ".", "-B", folder, *options, package=package)
        if said:
            return "source", first_line(r"^(.*ASCII.*)$", said)
        if kind == "metal":
            joined = folder / "metal_source/step.joined.metal"
            check = "tests/metal_on_cpu/translate.py"
            said = run(PYTHON, check, "check", joined, package=package)
            if said:
                return "source", first_line(r"(error: .*|^  .*)$", said).strip()
        said = run(*cmake, "--build", folder, package=package)
        if said:
            return "build", first_line(r"(error: .*)$", said)
    # Anew: Python would believe a compiled file of the same second and size.
    shutil.rmtree(package, ignore_errors=True)
    shutil.copytree(TREE / "python", package)
    shutil.copy(folder / "_ext.abi3.so", package / "mlx_fused_optim")
    return "", ""


def tests_of(kind: str, mutants: list[Mutant]) -> list[list[str]]:
    """Pytest's arguments for those that should catch any of these bugs."""
    if kind == "metal":
        return METAL_TESTS
    names = dict.fromkeys(name for m in mutants for name in m.tests.split())
    return [[f"tests/test_{name}.py" for name in names]]


def failure(kind: str, check: str, arguments: list[str]) -> tuple[str, str]:
    """The name of a check that fails on the package as it is, and what it says."""
    said = run(*PYTEST, *arguments, package=WORK / kind / "package")
    pattern = r"^(?:FAILED|ERROR) (?:tests/)?(.*?)(?: - .*)?$"
    return (check, first_line(pattern, said)) if said else ("", "")


def caught_by(kind: str, mutant: Mutant, quick: bool) -> tuple[str, str]:
    """The first check that fails on the tree as it is, and what it says."""
    found = build(kind, native=not is_python(mutant))
    for arguments in tests_of(kind, [mutant]):
        if not found[0]:
            found = failure(kind, "tests", arguments)
    if not found[0] and kind == "host" and not quick:
        found = failure(kind, "suite", ["-n", "auto", "--maxprocesses", "8", "tests"])
    return found


def is_python(mutant: Mutant) -> bool:
    return mutant.file.endswith(".py")


def prepare() -> None:
    shutil.rmtree(TREE, ignore_errors=True)
    ignored = shutil.ignore_patterns(".*", "build", "dist", "out", "__pycache__", "*.so")
    shutil.copytree(ROOT, TREE, ignore=ignored)
    shutil.copytree(ROOT / ".github", TREE / ".github")


def plant(kind: str, mutants: list[Mutant], quick: bool) -> int:
    """How many of the bugs nothing caught."""
    check, said = build(kind, native=True)
    for arguments in tests_of(kind, mutants):
        if not check and not quick:
            check, said = failure(kind, "tests", arguments)
    if check:
        sys.exit(f"without any bug, '{check}' fails: {said}")
    survivors = 0
    print(f"{kind:30} {'caught by':10} {'seconds':>7}  how", flush=True)
    # Python first: a bug in C++ stays built until the next build.
    for m in sorted(mutants, key=is_python, reverse=True):
        if m.same:
            print(f"{m.name:30} {'-':10} {0:7.0f}  changes nothing: {m.same}", flush=True)
            continue
        path = TREE / m.file
        text = path.read_text()
        path.write_text(text.replace(m.old, m.new))
        start = time.perf_counter()
        try:
            check, said = caught_by(kind, m, quick)
        except subprocess.TimeoutExpired:
            check, said = "time", "did not end"
        path.write_text(text)
        survivors += not check
        seconds = time.perf_counter() - start
        print(f"{m.name:30} {check or 'NOTHING':10} {seconds:7.0f}  {said}", flush=True)
    return survivors


def main(names: list[str]) -> int:
    quick = "--quick" in names
    names = [name for name in names if name != "--quick"]
    known = {m.name for mutants in LISTS.values() for m in mutants}
    unknown = set(names) - known - set(LISTS)
    if unknown:
        sys.exit(f"no such bug: {', '.join(sorted(unknown))}")
    chosen = {
        kind: [m for m in mutants if not names or kind in names or m.name in names]
        for kind, mutants in LISTS.items()
    }
    if chosen["metal"] and not shutil.which("clang++-19"):
        sys.exit("clang++-19 is not installed: tools/apt-packages lists what is needed")
    prepare()
    survivors = sum(plant(kind, mutants, quick) for kind, mutants in chosen.items() if mutants)
    planted = sum(not m.same for mutants in chosen.values() for m in mutants)
    print(f"{planted - survivors} of {planted} bugs caught")
    return survivors > 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
