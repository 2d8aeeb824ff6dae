"""Several GPUs: each step on its own, in one process, with the bits of the CPU backend.

MLX_FUSED_OPTIM_TEST_GPU=1 runs any other test file on the second one.
"""

import mlx.core as mx
import mlx_fused_optim as optim
import numpy as np
import pytest

if mx.metal.is_available() or mx.device_count(mx.gpu) < 2:
    pytest.skip("needs MLX with CUDA and two GPUs", allow_module_level=True)

DEVICES = [mx.Device(mx.gpu, i) for i in range(mx.device_count(mx.gpu))]
SHAPES = [(5,), (65, 33), (4097,), (1 << 20,), ()]
OPTIONS = {
    "plain": dict(momentum=0.9, weight_decay=0.01),
    "full": dict(momentum=0.9, clip_norm=1.0, skip_nonfinite=True, master_weights=True),
    "stochastic": dict(momentum=0.9, rounding="stochastic", seed=5),
}


class Training:
    """Some steps on one device. Gradients are made there, from the parameters."""

    def __init__(self, device, dtype, options):
        self.device, self.options = device, options
        normal = np.random.default_rng(1).standard_normal
        with mx.stream(device):
            self.parameters = [
                mx.array(np.asarray(normal(shape), np.float32)).astype(dtype) for shape in SHAPES
            ]
            self.state = optim.fused_sgd_init(self.parameters, **options)
            mx.eval(self.parameters, self.state)

    def step(self):
        with mx.stream(self.device):
            gradients = [p * 0.5 for p in self.parameters]
            mx.eval(gradients)
            self.parameters, self.state = optim.fused_sgd_step(
                self.parameters,
                gradients,
                self.state,
                learning_rate=optim.exponential_decay(0.5, 0.9),
                **self.options,
            )
            mx.eval(self.parameters, self.state)

    def values(self):
        with mx.stream(self.device):
            arrays = [p.astype(mx.float32) for p in self.parameters]
            mx.eval(arrays)
        return [np.array(a) for a in [*arrays, self.state["step"], self.state["learning_rate"]]]


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("dtype", [mx.float32, mx.float16, mx.bfloat16], ids=str)
def test_trainings_on_all_devices_at_once(dtype, options):
    """A step here, a step there: what is kept for a device is that device's."""
    on_cpu = Training(mx.cpu, dtype, options)
    for _ in range(4):
        on_cpu.step()
    want = on_cpu.values()
    trainings = [Training(device, dtype, options) for device in (*DEVICES, *DEVICES)]
    for _ in range(4):
        for training in trainings:
            training.step()
    for training in trainings:
        for got, expected in zip(training.values(), want, strict=True):
            np.testing.assert_array_equal(got, expected, err_msg=str(training.device))


def test_memory_of_one_device_is_not_left_to_another():
    """What the first device has let go of lies in MLX's cache when the next allocates."""
    for _ in range(3):
        for device in DEVICES:
            with mx.stream(device):
                parameters = [mx.ones((1 << 22,)) for _ in range(8)]
                state = optim.fused_sgd_init(parameters, momentum=0.5)
                mx.eval(parameters, state)
                held = list(parameters)
                for _ in range(2):
                    parameters, state = optim.fused_sgd_step(
                        parameters, parameters, state, learning_rate=0.5, momentum=0.5
                    )
                    mx.eval(parameters, state)
                # v = 1, p = 1/2; v = 1/2 + 1/2 = 1, p = 0
                sums = mx.stack([p.sum() for p in (*parameters, *held)])
                mx.eval(sums)
            assert sums.tolist() == [0.0] * 8 + [float(1 << 22)] * 8
            del parameters, state, held
