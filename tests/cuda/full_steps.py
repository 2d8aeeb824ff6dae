"""Full steps on the GPU, small, for compute-sanitizer: every kernel of the full step and of
the measurement. Not a test of its own:

    MLX_USE_CUDA_GRAPHS=0 compute-sanitizer --tool memcheck python tests/cuda/full_steps.py
    ... --tool racecheck
    ... --tool synccheck
    ... --tool initcheck --check-api-memory-access no

steps.py does the same for the plain step, and says why initcheck needs its option.
"""

import itertools

import mlx.core as mx
import mlx_fused_optim as optim
import numpy as np

mx.set_cache_limit(0)  # every buffer is fresh memory
# What is kept of an element.
OF_FLOAT32 = [{}, dict(momentum_dtype=mx.bfloat16, ema_decay=0.9)]
OF_HALF = [
    {},
    dict(momentum_dtype=mx.float32),
    dict(master_weights=True),
    dict(master_weights=True, momentum_dtype=mx.float32),
    dict(compensated=True),
    dict(rounding="stochastic", seed=7),
    dict(rounding="stochastic", compensated=True, ema_decay=0.9),
]
KEPT = {mx.float32: OF_FLOAT32, mx.float16: OF_HALF, mx.bfloat16: OF_HALF}
# What else a step may consist of.
OPTIONS = [
    dict(momentum=0.9, clip_norm=2.0, skip_nonfinite=True),
    dict(momentum=0.9, nesterov=True, weight_decay=0.01, grad_scale=4.0, clip_value=0.2),
    dict(
        momentum=0.9,
        dampening=0.25,
        weight_decay=0.01,
        decoupled=True,
        maximize=True,
        trust_coefficient=0.05,
        groups=[
            (lambda path, _: int(path) % 3 == 1, dict(momentum=0.0, learning_rate=0.01)),
            (lambda path, _: int(path) % 3 == 2, dict(weight_decay=0.0, trust_coefficient=0.1)),
        ],
    ),
]


def array(shape, dtype, seed):
    """In the memory of the current device, as an operation writes it."""
    values = np.random.default_rng(seed).standard_normal(shape).astype(np.float32)
    return (mx.array(values) + 0).astype(dtype)


def tensors(dtype, gradient_dtype):
    """(parameter, gradient): contiguous, transposed, strided, and at odd addresses."""

    def gradient(*shape):
        return array(shape, gradient_dtype, sum(shape))

    for n in (0, 1, 3, 5, 127, 1025, 4097, 9001):
        yield array((n,), dtype, n), gradient(n)
    for rows, columns in ((64, 64), (65, 63), (1, 70), (3, 517), (260, 24)):
        yield array((rows, columns), dtype, rows), gradient(columns, rows).T
    yield array((7, 129), dtype, 1), gradient(140, 20)[5:134, 3:10].T
    yield array((6, 5, 7), dtype, 3), gradient(7, 5, 6).transpose(2, 1, 0)
    yield array((30, 40), dtype, 5), mx.broadcast_to(gradient(40), (30, 40))
    yield array((1025,), dtype, 9), gradient(3 * 1025)[::3]
    yield array((1025,), dtype, 11), gradient(1025)[::-1]
    yield array((1027,), dtype, 13), gradient(1030)[3:]
    yield array((1030,), dtype, 15)[3:], gradient(1027)
    yield array((40, 30), dtype, 16).T, gradient(30, 40)


def run(device, dtype, gradient_dtype, options, hold):
    """Everything after two steps, and a third of infinities. `hold`: into fresh memory, from
    strided arenas."""
    with mx.stream(device):
        parameters, gradients = map(list, zip(*tensors(dtype, gradient_dtype), strict=True))
        mx.eval(parameters, gradients)
        state = optim.fused_sgd_init(parameters, **options)
        for entry in state["arenas"].values() if hold else ():
            for slot in entry.keys() - {"table"}:
                entry[slot] = [mx.repeat(a, 2)[::2] for a in entry[slot]]
        held = []
        for step in range(3 if "skip_nonfinite" in options else 2):
            if step == 2:
                gradients[-1] = gradients[-1] * mx.array(np.inf).astype(gradient_dtype)
            parameters, state = optim.fused_sgd_step(
                parameters, gradients, state, learning_rate=0.1, **options
            )
            mx.eval(parameters, state)
            mx.synchronize()
            if hold:
                held = [list(parameters), dict(state)]
        results = list(parameters)
        for entry in state["arenas"].values():
            results += itertools.chain(*(entry[slot] for slot in sorted(entry.keys() - {"table"})))
        names = ("step", "learning_rate", "grad_norm", "skipped")
        results += [state[name] for name in names if name in state]
        del held
        return [np.array(a.astype(mx.float32)) for a in results]


def main():
    different = cases = 0
    for dtype, options in itertools.product(KEPT, OPTIONS):
        for number, kept in enumerate(KEPT[dtype]):
            # The gradient of another dtype, and all into fresh memory, in turn.
            turn = number + OPTIONS.index(options)
            gradient_dtype = dtype if turn % 4 else [mx.float32, mx.bfloat16][dtype == mx.float32]
            case = dtype, gradient_dtype, {**options, **kept}, turn % 3 == 0
            got, want = run(mx.gpu, *case), run(mx.cpu, *case)
            cases += 1
            different += not all(map(np.array_equal, got, want))
    print(f"{cases} cases, {different} differ from the CPU backend")


if __name__ == "__main__":
    main()
