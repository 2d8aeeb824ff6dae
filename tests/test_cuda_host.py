"""The CUDA backend where there is no GPU: its launches, its kernels, and how it refuses."""

import ctypes
import os
import pathlib
import shutil
import subprocess

import mlx.core as mx
import mlx_fused_optim
import pytest

ROOT = pathlib.Path(__file__).parents[1]
LIBRARY = pathlib.Path(mlx_fused_optim.__file__).with_name("libmlx_fused_optim_cuda.so")


def run(tmp_path, name, *sources, arguments=()):
    """What a program prints that is compiled from tests/cuda and csrc/cuda, sanitized."""
    compiler = os.environ.get("CXX") or shutil.which("c++")
    if not compiler:
        pytest.skip("needs a C++ compiler")
    program = tmp_path / name
    paths = [ROOT / f"tests/cuda/{name}.cpp", *(ROOT / f"csrc/cuda/{s}.cpp" for s in sources)]
    # Compiling takes longer than running.
    build = [compiler, "-std=c++20", "-O0", "-g1", "-ffp-contract=off"]
    build += ["-fsanitize=address,undefined", "-fno-sanitize-recover=undefined"]
    build += [f"-I{ROOT}/csrc"]
    subprocess.run([*build, *paths, "-pthread", "-o", program], check=True)
    # The library that a test run may preload is not the sanitizer's own.
    environment = {k: v for k, v in os.environ.items() if k != "LD_PRELOAD"}
    environment["ASAN_OPTIONS"] = "detect_stack_use_after_return=0"  # thousands of threads
    result = subprocess.run([program, *arguments], capture_output=True, text=True, env=environment)
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout.split()


def test_launches_hold_every_element_once(tmp_path):
    said = run(tmp_path, "batches_test", "batches", "measure_batches", "packing")
    assert int(said[1]) > 1_000_000


def test_kernels_of_the_step_and_of_the_measurement(tmp_path):
    """Emulated, thread by thread; every bit compared."""
    sources = "batches", "measure_batches", "packing"
    said = run(tmp_path, "kernels_test", *sources, arguments=["42"])
    assert int(said[1]) > 100_000


@pytest.mark.skipif(not LIBRARY.exists(), reason="built without CUDA")
@pytest.mark.skipif(not shutil.which("nm"), reason="needs nm")
def test_the_library_asks_nothing_of_the_extension():
    """Which may be loaded where nobody else finds its symbols."""
    command = ["nm", "--dynamic", "--undefined-only", LIBRARY]
    said = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    assert "mlx" in said and "mlx_fused_optim" not in said


@pytest.mark.skipif(not LIBRARY.exists(), reason="built without CUDA")
@pytest.mark.skipif(mx.is_available(mx.gpu), reason="MLX has a GPU here")
def test_the_library_asks_for_cuda():
    """An MLX without CUDA lacks symbols: an error that names one, at once."""
    with pytest.raises(OSError, match=r"undefined symbol: .*(cu[A-Z]|nvrtc|CommandEncoder)"):
        ctypes.CDLL(str(LIBRARY), mode=os.RTLD_NOW)
