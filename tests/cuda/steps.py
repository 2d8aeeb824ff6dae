"""Steps of every rule and every kind on the GPU, small, for compute-sanitizer. Not a test of its
own:

    MLX_USE_CUDA_GRAPHS=0 compute-sanitizer --tool memcheck python tests/cuda/steps.py
    ... --tool racecheck
    ... --tool synccheck
    ... --tool initcheck --check-api-memory-access no

initcheck without that option reports MLX's copies of whole buffers to the host, whose last
bytes, from rounding up the size, nobody wrote. It must see every kernel, so filter none. With
2/4 behind it: the second of four parts, so that several processes share the work.
"""

import itertools
import sys

import mlx.core as mx
import mlx_fused_optim as optim
import numpy as np

mx.set_cache_limit(0)  # every buffer is fresh memory
RULES = {
    "sgd": [
        dict(),
        dict(momentum=0.9, dampening=0.25, weight_decay=0.01),
        dict(momentum=0.9, nesterov=True, weight_decay=0.01, trust_coefficient=0.05),
    ],
    "adam": [dict(), dict(bias_correction=True), dict(bias_correction=True, amsgrad=True)],
    "adamw": [dict(bias_correction=True)],
    "adamax": [dict()],
    "lion": [dict(weight_decay=0.01)],
    "rmsprop": [dict()],
    "adagrad": [dict()],
    "adadelta": [dict()],
}
# What is kept of an element.
BYTES = dict(state_dtype="8bit", min_8bit_size=0)
OF_FLOAT32 = [{}, dict(state_dtype=mx.bfloat16, ema_decay=0.9), BYTES]
OF_HALF = [
    {},
    dict(state_dtype=mx.float32),
    dict(master_weights=True),
    dict(master_weights=True, state_dtype=mx.float32),
    dict(compensated=True),
    dict(rounding="stochastic", seed=7),
    dict(rounding="stochastic", compensated=True, ema_decay=0.9),
    dict(**BYTES, rounding="stochastic"),
]
OF_BFLOAT16 = [
    dict(master_weights="24bit", **BYTES),
    dict(master_weights="24bit"),
    dict(master_weights="24bit", state_dtype=mx.float32, rounding="stochastic", ema_decay=0.9),
]
KEPT = {mx.float32: OF_FLOAT32, mx.float16: OF_HALF, mx.bfloat16: OF_HALF + OF_BFLOAT16}
# What else a step may consist of.
OPTIONS = [
    {},
    dict(clip_norm=2.0, skip_nonfinite=True),
    dict(grad_scale=4.0, clip_value=0.2, maximize=True),
    dict(
        groups=[
            (lambda path, _: int(path) % 3 == 1, dict(learning_rate=0.01)),
            (lambda path, _: int(path) % 3 == 2, dict(weight_decay=0.0)),
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
    for rows, columns in ((64, 64), (68, 132), (65, 63), (1, 70), (3, 517), (260, 24)):
        yield array((rows, columns), dtype, rows), gradient(columns, rows).T
    yield array((7, 129), dtype, 1), gradient(140, 20)[5:134, 3:10].T
    yield array((8, 128), dtype, 1), gradient(140, 20)[4:132, 4:12].T
    yield array((6, 5, 7), dtype, 3), gradient(7, 5, 6).transpose(2, 1, 0)
    yield array((30, 40), dtype, 5), mx.broadcast_to(gradient(40), (30, 40))
    yield array((1025,), dtype, 9), gradient(3 * 1025)[::3]
    yield array((1025,), dtype, 11), gradient(1025)[::-1]
    for shift in (1, 3):
        yield array((1027,), dtype, 13), gradient(1027 + shift)[shift:]
        yield array((1027 + shift,), dtype, 15)[shift:], gradient(1027)
    yield array((40, 30), dtype, 16).T, gradient(30, 40)


def results_of(parameters, state):
    results = list(parameters)
    for entry in state.get("arenas", {}).values():
        results += itertools.chain(*(entry[slot] for slot in sorted(entry.keys() - {"table"})))
    names = ("step", "learning_rate", "grad_norm", "skipped")
    return results + [state[name] for name in names if name in state]


def run(device, rule, dtype, gradient_dtype, options, rate, hold):
    """Everything after two steps, and a third of infinities. `hold`: into fresh memory, from
    strided arenas."""
    init, step = (getattr(optim, f"fused_{rule}_{what}") for what in ("init", "step"))
    with mx.stream(device):
        parameters, gradients = map(list, zip(*tensors(dtype, gradient_dtype), strict=True))
        mx.eval(parameters, gradients)
        state = init(parameters, **options)
        for entry in state.get("arenas", {}).values() if hold else ():
            for slot in entry.keys() - {"table"}:
                entry[slot] = [mx.repeat(a, 2, axis=0)[::2] for a in entry[slot]]
        held = []
        for number in range(3 if "skip_nonfinite" in options else 2):
            if number == 2:
                gradients[-1] = gradients[-1] * mx.array(np.inf).astype(gradient_dtype)
            parameters, state = step(parameters, gradients, state, learning_rate=rate, **options)
            mx.eval(parameters, state)
            mx.synchronize()
            if hold:
                held = [list(parameters), dict(state)]
        results = results_of(parameters, state)
        del held
        return [np.array(a.astype(mx.float32)) for a in results]


def several_launches():
    """More tensors than one launch holds, side by side; few; and none at all."""
    for many in (1500, 3):
        counts = np.random.default_rng(0).integers(0, 300, many)
        parameters = [array((int(n),), mx.float32, i) for i, n in enumerate(counts)]
        gradients = [p * 1 for p in parameters]
        parameters.append(array((64, 64), mx.float32, 1))
        gradients.append(array((64, 64), mx.float32, 2).T)
        state = optim.fused_adam_init(parameters)
        for _ in range(2):
            parameters, state = optim.fused_adam_step(
                parameters, gradients, state, learning_rate=0.1
            )
            mx.eval(parameters, state)
    _, state = optim.fused_sgd_step({}, {}, optim.fused_sgd_init({}), learning_rate=0.5)
    mx.eval(state)


def schedule_alone(device, schedule, count):
    with mx.stream(device):
        return np.array(schedule(mx.arange(count).astype(mx.uint64)))


def cases():
    """All rules; all ways to keep an element and all options of each dtype, in turn."""
    decay = optim.exponential_decay(0.1, 0.9)
    of_rules = itertools.cycle([(rule, own) for rule, all_own in RULES.items() for own in all_own])
    for dtype, of_dtype in KEPT.items():
        # As many of float32, so that each dtype meets each rule.
        many = max(len(of_dtype), len(OF_HALF))
        ways = itertools.islice(itertools.cycle(of_dtype), many)
        for number, (kept, options) in enumerate(itertools.product(ways, OPTIONS)):
            rule, own = next(of_rules)
            # The gradient of another dtype, a schedule, and all into fresh memory, in turn.
            gradient_dtype = dtype if number % 4 else [mx.float32, mx.bfloat16][dtype == mx.float32]
            rate = 0.1 if number % 5 else decay
            yield rule, dtype, gradient_dtype, {**own, **options, **kept}, rate, number % 3 == 0


def main(part="1/1"):
    number, of = map(int, part.split("/"))
    different = count = 0
    for case in itertools.islice(cases(), number - 1, None, of):
        got, want = run(mx.gpu, *case), run(mx.cpu, *case)
        count += 1
        if not all(np.array_equal(a, b, equal_nan=True) for a, b in zip(got, want, strict=True)):
            different += 1
            print("differs:", *case)
    for size in (1, 255, 257, 100_000) if number == of else ():
        schedule = optim.exponential_decay(0.1, 0.9)
        got, want = (schedule_alone(device, schedule, size) for device in (mx.gpu, mx.cpu))
        count += 1
        different += not np.array_equal(got, want)
    if number == of:
        several_launches()
    print(f"{count} cases, {different} differ from the CPU backend")


if __name__ == "__main__":
    main(*sys.argv[1:])
