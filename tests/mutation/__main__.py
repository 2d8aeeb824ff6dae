"""Plants bugs, one at a time, in a copy of the project, and asks that the tests catch each.

    python tests/mutation [--quick] [host | metal] [NAME...]

It plants all bugs of the list that is named, or of both; with names only these. The checks run
in order, the cheap ones first, and the table says which one caught a bug:

    source   translate.py check: Metal's language, ASCII, names (of the list ``metal``)
    build    CMake and the compilers
    tests    the tests that should catch it: those of its row, then those of the list
    suite    every other test (of the list ``host``)

The exit code is 0 if every bug was caught, and if every test that caught one passes without
it. With --quick there is no suite.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import contextmanager
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
# Quick to compile; the kernels have an optimisation of their own.
QUICK = [
    "-DCMAKE_CXX_FLAGS_RELEASE=-O0 -DNDEBUG",
    f"-DCMAKE_PROJECT_INCLUDE={TREE}/tests/mutation/quick.cmake",
    "-DCMAKE_UNITY_BUILD=OFF",
]
OPTIONS = {
    "host": [*QUICK, "-DMLX_FUSED_OPTIM_CUDA=OFF"],
    "metal": [*QUICK, "-DMETAL_ON_CPU=ON", "-DMETAL_ON_CPU_FLAGS=-g0"],
}
# Where the code of these headers is, of all that include them for their types and constants.
KERNEL = "CMakeFiles/kernel_baseline.dir/csrc/cpu/kernel.cpp.o"
HOST_STEP = "CMakeFiles/_ext.dir/csrc/cpu/step.cpp.o"
HOST_MEASURE = "CMakeFiles/_ext.dir/csrc/cpu/measure.cpp.o"
OBJECTS = {
    "host": {
        "csrc/math/rules/": [KERNEL],
        "csrc/math/bytes.h": [KERNEL],
        "csrc/cpu/bytes.h": [KERNEL],
        "csrc/math/frame.h": [KERNEL, HOST_STEP, HOST_MEASURE],
    },
    "metal": {"csrc/math/": ["metal_source/kernels_on_cpu.cpp.o"]},
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
    return match[1] if match else said.strip().splitlines()[-1]


@contextmanager
def planted(kind: str, mutant: Mutant):
    """Within it the tree has the bug, until the function it gives is called; after it, tree and
    build are as they were, times included, so that no build repeats anything."""
    path, folder, clean = TREE / mutant.file, WORK / kind, WORK / f"{kind}_clean"
    text, status = path.read_text(), path.stat()

    def undo() -> None:
        path.write_text(text)
        os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))

    assert text.count(mutant.old) == 1, f"{mutant.name}: its text is not once in {mutant.file}"
    path.write_text(text.replace(mutant.old, mutant.new))
    try:
        yield undo
    finally:
        undo()
        if not is_python(mutant):
            shutil.copytree(clean, folder, dirs_exist_ok=True)


def objects_of(kind: str, mutant: Mutant) -> list[str]:
    """The object files that a bug changes, if fewer than include its file."""
    found = (o for start, o in OBJECTS[kind].items() if mutant.file.startswith(start))
    return next(found, [])


def build(
    kind: str, native: bool, objects: Sequence[str] = (), undo: Callable[[], None] = lambda: None
) -> tuple[str, str]:
    """The package in build/mutation/KIND/package, or the check that failed and what it said.

    With ``objects``, only these see the tree as it is; the rest sees it after ``undo``.
    """
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
        if objects:
            said = run(*cmake, "--build", folder, "--target", *objects, package=package)
            undo()
        said = said or run(*cmake, "--build", folder, package=package)
        if said:
            return "build", first_line(r"(error: .*)$", said)
    # Anew: Python would believe a compiled file of the same second and size.
    shutil.rmtree(package, ignore_errors=True)
    shutil.copytree(TREE / "python", package)
    shutil.copy(folder / "_ext.abi3.so", package / "mlx_fused_optim")
    return "", ""


def tests_of(kind: str, mutants: list[Mutant]) -> list[list[str]]:
    """Pytest's arguments for those that should catch any of these bugs."""
    names = dict.fromkeys(name for m in mutants for name in m.tests.split())
    files = [f"tests/test_{name}.py" for name in names]
    if kind == "metal":
        return [files, *METAL_TESTS] if files else METAL_TESTS
    # This build has one instruction set: what is asked of it by name is asked of "cpu" already.
    return [[*files, "-k", "not baseline and not avx"]]


def failure(kind: str, check: str, arguments: list[str]) -> tuple[str, str]:
    """The name of a check that fails on the package as it is, and what it says."""
    said = run(*PYTEST, *arguments, package=WORK / kind / "package")
    # A crash has a stack instead.
    crash = re.search(r'tests/(test_\w+\.py)", line \d+ in (test_\w+)', said)
    if crash and not re.search(r"^(?:FAILED|ERROR) ", said, re.MULTILINE):
        return check, "::".join(crash.groups())
    pattern = r"^(?:FAILED|ERROR) (?:tests/)?(.*?)(?: - .*)?$"
    return (check, first_line(pattern, said)) if said else ("", "")


def caught_by(kind: str, mutant: Mutant, quick: bool, undo: Callable[[], None]) -> tuple[str, str]:
    """The first check that fails on the tree as it is, and what it says."""
    found = build(kind, not is_python(mutant), objects_of(kind, mutant), undo)
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
    folder, clean = WORK / kind, WORK / f"{kind}_clean"
    if clean.exists():
        shutil.copytree(clean, folder, dirs_exist_ok=True)  # the last run may have been stopped
    check, said = build(kind, native=True)
    if check:
        sys.exit(f"without any bug, '{check}' fails: {said}")
    ignored = shutil.ignore_patterns("package", "*.gch")
    shutil.copytree(folder, clean, ignore=ignored, dirs_exist_ok=True)
    survivors = 0
    catching = {}
    print(f"{kind:30} {'caught by':10} {'seconds':>7}  how", flush=True)
    for m in mutants:
        if m.same:
            print(f"{m.name:30} {'-':10} {0:7.0f}  changes nothing: {m.same}", flush=True)
            continue
        start = time.perf_counter()
        with planted(kind, m) as undo:
            try:
                check, said = caught_by(kind, m, quick, undo)
            except subprocess.TimeoutExpired:
                check, said = "time", "did not end"
        survivors += not check
        if said.startswith("test_"):
            catching[f"tests/{said}"] = None
        seconds = time.perf_counter() - start
        print(f"{m.name:30} {check or 'NOTHING':10} {seconds:7.0f}  {said[:100]}", flush=True)
    # What fails without a bug too has caught none.
    check, said = build(kind, native=True)
    if catching and not check:
        check, said = failure(kind, "tests", list(catching))
    if check:
        sys.exit(f"without any bug, '{check}' fails: {said}")
    return survivors


def main(names: list[str]) -> int:
    quick = "--quick" in names
    names = [name for name in names if name != "--quick"]
    known = {m.name for mutants in LISTS.values() for m in mutants}
    unknown = set(names) - known - set(LISTS)
    if unknown:
        sys.exit(f"no such bug: {', '.join(sorted(unknown))}")
    kinds = [name for name in names if name in LISTS] or list(LISTS)
    names = [name for name in names if name not in LISTS]
    chosen = {kind: [m for m in LISTS[kind] if not names or m.name in names] for kind in kinds}
    if chosen.get("metal") and not shutil.which("clang++-19"):
        sys.exit("clang++-19 is not installed: tools/apt-packages lists what is needed")
    prepare()
    survivors = sum(plant(kind, mutants, quick) for kind, mutants in chosen.items() if mutants)
    planted = sum(not m.same for mutants in chosen.values() for m in mutants)
    print(f"{planted - survivors} of {planted} bugs caught")
    return survivors > 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
