"""The CUDA backend where there is no GPU: its packing of launches, and how it refuses."""

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


def test_launches_hold_every_element_once(tmp_path):
    compiler = os.environ.get("CXX") or shutil.which("c++")
    if not compiler:
        pytest.skip("needs a C++ compiler")
    program = tmp_path / "batches_test"
    sources = [ROOT / "tests/cuda/batches_test.cpp", ROOT / "csrc/cuda/batches.cpp"]
    sanitize = ["-g", "-fsanitize=address,undefined", "-fno-sanitize-recover=undefined"]
    build = [compiler, "-std=c++20", *sanitize, f"-I{ROOT / 'csrc'}", *sources, "-o", program]
    subprocess.run(build, check=True)
    # The library that a test run may preload is not the sanitizer's own.
    environment = {k: v for k, v in os.environ.items() if k != "LD_PRELOAD"}
    result = subprocess.run([program], capture_output=True, text=True, env=environment)
    assert result.returncode == 0, result.stdout + result.stderr
    elements = int(result.stdout.split()[1])
    assert elements > 100_000


@pytest.mark.skipif(not LIBRARY.exists(), reason="built without nvcc")
@pytest.mark.skipif(mx.is_available(mx.gpu), reason="MLX has a GPU here")
def test_the_library_asks_for_cuda():
    """An MLX without CUDA lacks symbols: an error that names one, at once."""
    with pytest.raises(OSError, match=r"undefined symbol: .*(cu[A-Z]|CommandEncoder)"):
        ctypes.CDLL(str(LIBRARY), mode=os.RTLD_NOW)
