"""Settings for the whole suite."""

import mlx.core as mx
import pytest
from hypothesis import settings

# The machines that run this are shared and slow to wake: no deadline. The examples are
# the same in every run, so that a failure is a change of the code.
settings.register_profile("suite", deadline=None, derandomize=True)
settings.load_profile("suite")


@pytest.fixture(autouse=True)
def no_reference_left_over():
    """Each test starts with nothing pending and MLX's memory pool empty."""
    yield
    mx.synchronize()
    mx.clear_cache()
