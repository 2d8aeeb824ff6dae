"""csrc/graph/donation.cpp where Python cannot bring it about: tests/donation_test.cpp."""

import os
import shutil
import subprocess
from pathlib import Path

import mlx.core as mx
import pytest

ROOT = Path(__file__).parents[1]


def test_memory_that_is_borrowed_and_memory_that_is_not_there(tmp_path):
    if mx.is_available(mx.gpu):
        pytest.skip("the program makes a buffer of MLX's allocator for CPUs")
    compiler = os.environ.get("CXX") or shutil.which("c++")
    if not compiler:
        pytest.skip("no C++ compiler")
    package = Path(mx.__file__).parent  # mlx.__path__ may have several
    program = tmp_path / "donation_test"
    build = [compiler, "-std=c++20", "-O0", "-Wall", "-I", ROOT / "csrc"]
    build += ["-isystem", f"{package}/include", ROOT / "tests/donation_test.cpp"]
    build += [ROOT / "csrc/graph/donation.cpp", "-o", program]
    build += [f"-L{package}/lib", "-lmlx", f"-Wl,-rpath,{package}/lib"]
    subprocess.run(build, check=True)
    subprocess.run([program], check=True)
