"""Several GPUs: each step on its own, in one process, with the bits of the CPU backend.

MLX_FUSED_OPTIM_TEST_GPU=1 runs any other test file on the second one. MLX 0.32.4 cannot give
what its cache has of one GPU to another (docs/cuda.md): here it keeps nothing.
"""

import ctypes

import mlx.core as mx
import mlx_fused_optim as optim
import numpy as np
import pytest

if mx.metal.is_available() or mx.device_count(mx.gpu) < 2:
    pytest.skip("needs MLX with CUDA and two GPUs", allow_module_level=True)

# Streams of their own: a default stream would be on the first GPU, whatever its device.
STREAMS = [mx.new_stream(mx.Device(mx.gpu, i)) for i in range(mx.device_count(mx.gpu))]
SHAPES = [(5,), (65, 33), (4097,), (1 << 20,), ()]
OPTIONS = {
    "plain": dict(momentum=0.9, weight_decay=0.01),
    "full": dict(momentum=0.9, clip_norm=1.0, skip_nonfinite=True, master_weights=True),
    "stochastic": dict(momentum=0.9, rounding="stochastic", seed=5),
}


@pytest.fixture(autouse=True, scope="module")
def no_cache():
    limit = mx.set_cache_limit(0)
    yield
    mx.set_cache_limit(limit)


class Training:
    """Some steps on one stream. Gradients are made there, from the parameters."""

    def __init__(self, stream, dtype, options):
        self.stream, self.options = stream, options
        normal = np.random.default_rng(1).standard_normal
        with mx.stream(stream):
            self.parameters = [
                mx.array(np.asarray(normal(shape), np.float32)).astype(dtype) for shape in SHAPES
            ]
            self.state = optim.fused_sgd_init(self.parameters, **options)
            mx.eval(self.parameters, self.state)

    def step(self):
        with mx.stream(self.stream):
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
        arrays = [*self.parameters, self.state["step"], self.state["learning_rate"]]
        with mx.stream(self.stream):
            # Computed: MLX 0.32.4 reads the memory of the GPU that worked last.
            arrays = [(a + 0).astype(mx.float32) for a in arrays]
            mx.eval(arrays)
        return [np.array(a) for a in arrays]


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("dtype", [mx.float32, mx.float16, mx.bfloat16], ids=str)
def test_trainings_on_all_devices_at_once(dtype, options):
    """A step here, a step there: what is kept for a device is that device's."""
    on_cpu = Training(mx.cpu, dtype, options)
    for _ in range(4):
        on_cpu.step()
    want = on_cpu.values()
    trainings = [Training(stream, dtype, options) for stream in (*STREAMS, *STREAMS)]
    for _ in range(4):
        for training in trainings:
            training.step()
    for training in trainings:
        for got, expected in zip(training.values(), want, strict=True):
            np.testing.assert_array_equal(got, expected, err_msg=str(training.stream))


def free_memory(number):
    """Of a GPU, by the driver (bytes)."""
    driver, context = ctypes.CDLL("libcuda.so.1"), ctypes.c_void_p()
    free, total = ctypes.c_size_t(), ctypes.c_size_t()
    assert driver.cuDevicePrimaryCtxRetain(ctypes.byref(context), number) == 0
    assert driver.cuCtxPushCurrent_v2(context) == 0
    assert driver.cuCtxSynchronize() == 0
    assert driver.cuMemGetInfo_v2(ctypes.byref(free), ctypes.byref(total)) == 0
    assert driver.cuCtxPopCurrent_v2(ctypes.byref(context)) == 0
    return free.value


def test_new_memory_is_on_the_device_of_the_stream():
    for number, stream in enumerate(STREAMS):
        with mx.stream(stream):
            parameters = mx.zeros((1 << 28,)) + 1  # 1 GiB
            state = optim.fused_sgd_init(parameters, momentum=0.5)
            mx.eval(parameters, state)
            before = [free_memory(n) for n in range(len(STREAMS))]
            new, after = optim.fused_sgd_step(
                parameters, parameters, state, learning_rate=0.5, momentum=0.5
            )
            mx.eval(new, after)
            taken = [was - free_memory(n) for n, was in enumerate(before)]
            values = new[-3:]
            mx.eval(values)
        assert taken[number] >= 2 << 30
        assert all(less < 1 << 30 for n, less in enumerate(taken) if n != number)
        assert values.tolist() == [0.5] * 3
        del parameters, state, new, after
