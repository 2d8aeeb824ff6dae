"""Settings for the whole suite."""

import os

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


@pytest.fixture(autouse=True)
def no_reference_left_over():
    """Each test starts with nothing pending and MLX's memory pool empty."""
    yield
    mx.synchronize()
    mx.clear_cache()
