"""Steps of every kind on the GPU, small, for compute-sanitizer. Not a test of its own:

    MLX_USE_CUDA_GRAPHS=0 compute-sanitizer --tool memcheck python tests/cuda/steps.py
    ... --tool racecheck
    ... --tool synccheck
    ... --tool initcheck --check-api-memory-access no

initcheck without that option reports MLX's copies of whole buffers to the host, whose last
bytes, from rounding up the size, nobody wrote. It must see every kernel, so filter none.
"""

import itertools

import mlx.core as mx
import mlx_fused_optim as optim
import numpy as np

mx.set_cache_limit(0)  # every buffer is fresh memory
DTYPES = [mx.float32, mx.float16, mx.bfloat16]
SIZES = [0, 1, 3, 5, 63, 64, 65, 127, 1025, 4095, 4097, 8193, 40001]
OPTIONS = [
    dict(weight_decay=0.01),
    dict(momentum=0.9, dampening=0.25, weight_decay=0.01),
    dict(momentum=0.9, nesterov=True),
]


def array(shape, dtype, seed):
    """In the memory of the current device, as an operation writes it."""
    values = np.random.default_rng(seed).standard_normal(shape).astype(np.float32)
    return (mx.array(values) + 0).astype(dtype)


def tensors(dtype, gradient_dtype):
    """(parameter, gradient) of each kind of entry, at every alignment."""

    def gradient(*shape):
        return array(shape, gradient_dtype, sum(shape))

    for n in SIZES:
        yield array((n,), dtype, n), gradient(n)
    sides = [(64, 64), (65, 63), (1, 70), (70, 1), (3, 4099), (130, 257), (512, 8), (256, 128)]
    for rows, columns in sides:
        yield array((rows, columns), dtype, rows), gradient(columns, rows).T
    yield array((7, 129), dtype, 1), gradient(140, 20)[5:134, 3:10].T
    yield array((6, 5, 7), dtype, 3), gradient(7, 5, 6).transpose(2, 1, 0)
    yield array((300, 40), dtype, 5), mx.broadcast_to(gradient(40), (300, 40))
    yield array((65, 66), dtype, 7), mx.broadcast_to(gradient(1, 1), (65, 66))
    yield array((4097,), dtype, 9), gradient(3 * 4097)[::3]
    yield array((4097,), dtype, 11), gradient(4097)[::-1]
    for shift in (1, 2, 3, 5, 7):
        yield array((4096 + shift,), dtype, shift), gradient(4096 + 2 * shift)[shift:]
        yield array((5000,), dtype, 14)[shift:4500], gradient(4500 - shift)
    yield array((40, 300), dtype, 16).T, gradient(300, 40)


def run(device, dtype, gradient_dtype, options, rate, hold):
    """Everything after two steps. `hold`: into fresh memory, from strided momentum."""
    with mx.stream(device):
        parameters, gradients = map(list, zip(*tensors(dtype, gradient_dtype), strict=True))
        mx.eval(parameters, gradients)
        state = optim.fused_sgd_init(parameters, momentum=options.get("momentum", 0.0))
        held = []
        for entry in state["arenas"].values() if hold and "arenas" in state else ():
            entry["momentum"] = [mx.zeros(2 * a.size, dtype)[::2] for a in entry["momentum"]]
        for _ in range(2):
            parameters, state = optim.fused_sgd_step(
                parameters, gradients, state, learning_rate=rate, **options
            )
            mx.eval(parameters, state)
            mx.synchronize()
            if hold:
                held = [list(parameters), dict(state)]
        arenas = [a for entry in state.get("arenas", {}).values() for a in entry["momentum"]]
        results = [*parameters, *arenas, state["step"], state["learning_rate"]]
        del held
        return [np.array(a.astype(mx.float32)) for a in results]


def several_launches():
    """More tensors than one launch holds, side by side; and none at all."""
    counts = np.random.default_rng(0).integers(0, 300, 1500)
    parameters = [array((int(n),), mx.float32, i) for i, n in enumerate(counts)]
    gradients = [p * 1 for p in parameters]
    state = optim.fused_sgd_init(parameters, momentum=0.9)
    for _ in range(2):
        parameters, state = optim.fused_sgd_step(
            parameters, gradients, state, learning_rate=0.1, momentum=0.9
        )
        mx.eval(parameters, state)
    _, state = optim.fused_sgd_step({}, {}, optim.fused_sgd_init({}), learning_rate=0.5)
    mx.eval(state)


def schedule_alone(device, schedule, count):
    with mx.stream(device):
        return np.array(schedule(mx.arange(count).astype(mx.uint64)))


def main():
    decay = optim.exponential_decay(0.1, 0.9)
    different = cases = 0
    for dtype, gradient_dtype in itertools.product(DTYPES, DTYPES):
        for options, hold in itertools.product(OPTIONS, (False, True)):
            for rate in (0.1, decay) if dtype == gradient_dtype else (0.1,):
                case = dtype, gradient_dtype, options, rate, hold
                got, want = run(mx.gpu, *case), run(mx.cpu, *case)
                cases += 1
                different += not all(map(np.array_equal, got, want))
    for count in (1, 255, 257, 100_000):
        got, want = (schedule_alone(device, decay, count) for device in (mx.gpu, mx.cpu))
        cases += 1
        different += not np.array_equal(got, want)
    several_launches()
    print(f"{cases} cases, {different} differ from the CPU backend")


if __name__ == "__main__":
    main()
