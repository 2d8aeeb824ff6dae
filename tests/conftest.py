"""Settings for the whole suite."""

import fcntl
import os
import shutil
import sys
import tempfile
from pathlib import Path

import mlx.core as mx
import pytest
from hypothesis import settings

# The machines that run this are shared and slow to wake: no deadline. The examples are
# the same in every run, so that a failure is a change of the code.
settings.register_profile("suite", deadline=None, derandomize=True)
settings.load_profile("suite")


# Everything that does not name a device runs on this GPU; what tests/test_cuda*.py call the
# GPU is it too. Why there is more to it than set_default_device: docs/cuda.md.
if number := os.environ.get("MLX_FUSED_OPTIM_TEST_GPU"):
    device = mx.Device(mx.gpu, int(number))
    mx.set_default_device(device)
    mx.set_default_stream(mx.new_stream(device))
    mx.set_cache_limit(0)


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_terminal_summary(terminalreporter):
    """What `make test` left out, where it is read: right before pytest's last line."""
    yield
    if sys.platform == "linux" and not shutil.which("clang++-19"):
        terminalreporter.section("METAL IS NOT CHECKED", red=True)
        terminalreporter.line(
            "CLANG++-19 IS NOT INSTALLED (TOOLS/APT-PACKAGES LISTS WHAT IS NEEDED)."
        )


@pytest.fixture(scope="session", autouse=True)
def shared_folder(tmp_path_factory):
    """Where the processes that share a suite leave what only one of them must compute."""
    if "PYTEST_XDIST_WORKER" in os.environ:
        folder = tmp_path_factory.getbasetemp().parent
        os.environ["MLX_FUSED_OPTIM_TEST_SHARED"] = str(folder)


@pytest.fixture(autouse=True)
def gpu_memory(request):
    """A test that fills the GPU's memory has the GPU for itself, whatever process others run in."""
    if not mx.cuda.is_available():
        yield
        return
    kind = fcntl.LOCK_EX if request.node.get_closest_marker("fills_gpu") else fcntl.LOCK_SH
    folder = Path(tempfile.gettempdir())
    with (folder / "mlx_fused_optim.gpu_memory").open("w") as memory:
        with (folder / "mlx_fused_optim.gpu_next").open("w") as turn:
            fcntl.flock(turn, kind)  # nobody goes in while it waits for those that are
            fcntl.flock(memory, kind)
        yield


@pytest.fixture(autouse=True)
def no_reference_left_over():
    """Each test starts with nothing pending and MLX's memory pool empty."""
    yield
    mx.synchronize()
    mx.clear_cache()
