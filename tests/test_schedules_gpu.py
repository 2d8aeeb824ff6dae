"""A schedule has the bits of the CPU on a GPU, whichever MLX has."""

import mlx.core as mx
import numpy as np
import pytest
from test_schedules import PRINTED
from test_schedules_step import SCHEDULES

if not mx.is_available(mx.gpu):
    pytest.skip("MLX has no GPU here", allow_module_level=True)

RNG = np.random.default_rng(0)
STEPS = np.concatenate(
    [np.arange(3000), RNG.integers(0, 2**20, 3000), RNG.integers(0, 2**32, 3000)]
).astype(np.uint64)


@pytest.mark.parametrize("schedule", [*PRINTED.values(), *SCHEDULES], ids=str)
def test_same_bits(schedule):
    found = []
    for device in (mx.cpu, mx.gpu):
        with mx.stream(device):
            values = schedule(mx.array(STEPS))
            mx.eval(values)
        found.append(np.array(values))
    cpu, gpu = found
    # A GPU may flush subnormal numbers to zero.
    normal = abs(cpu) >= 2.0**-126
    assert normal.any()
    assert (cpu.view(np.uint32)[normal] == gpu.view(np.uint32)[normal]).all()
    assert (abs(gpu[~normal]) < 2.0**-126).all()
