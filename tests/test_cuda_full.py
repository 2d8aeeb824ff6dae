"""The full step and the measurement on a real GPU, to the bit of the CPU backend.

At the extension's interface, so that every combination can be had.
"""

import itertools

import mlx.core as mx
import mlx_fused_optim as optim
import numpy as np
import pytest
from mlx_fused_optim import _ext
from test_cuda import (
    DTYPES,
    GPU,
    SIZES,
    assert_same,
    bits,
    copied,
    little_memory,
    random,
    strided_cases,
)

NUMBERS = dict(
    learning_rate=0.1,
    momentum=0.9,
    weight_decay=0.01,
    grad_scale=4.0,
    dampening=0.25,
    clip_value=0.2,
    clip_norm=2.0,
    trust_coefficient=0.05,
    ema_decay=0.9,
    seed=12345,
    momentum_dtype=None,
    groups=None,
    group_numbers=None,
    skipped=None,
)
OPTIONS = {
    "maximize": "maximize",
    "scaled": "grad_scale",
    "clipped by value": "clip_value momentum",
    "clipped by norm": "clip_norm momentum nesterov",
    "scaled and clipped": "grad_scale clip_value clip_norm momentum",
    "skips": "skip_nonfinite momentum",
    "trust ratio": "trust_ratio weight_decay momentum",
    "trust ratio, decoupled": "trust_ratio weight_decay decoupled momentum clip_norm",
    "decoupled": "weight_decay decoupled momentum nesterov",
    "masters": "master_weights momentum weight_decay",
    "compensated": "compensated momentum weight_decay",
    "stochastic": "stochastic momentum weight_decay",
    "stochastic, masters": "stochastic master_weights momentum",
    "averaged": "ema",
    "averaged masters": "ema master_weights momentum",
    "averaged, compensated": "ema compensated momentum",
    "all": "momentum nesterov weight_decay decoupled maximize grad_scale clip_value clip_norm "
    "skip_nonfinite trust_ratio master_weights stochastic ema",
    "all, compensated": "momentum weight_decay grad_scale clip_value clip_norm skip_nonfinite "
    "trust_ratio compensated stochastic ema",
}

# What is kept of each element, in every way that takes different code.
KERNELS = ["clipped by norm", "masters", "compensated", "stochastic", "all", "all, compensated"]


def flags_of(names):
    return sum(_ext.FLAGS[name] for name in names.split())


def layout_of(parameters):
    return _ext.Layout(_ext.Tree(parameters, parameters, "test"))


def empty_slots(layout, names, momentum_dtype):
    """Zeros for every slot that a step of these options has."""
    names = names.split()
    half = [a for a in layout.arenas if a[0] != mx.float32]
    return [
        [mx.zeros(a[1], momentum_dtype or a[0]) for a in layout.arenas if "momentum" in names],
        [mx.zeros(a[1], mx.float32) for a in half if "master_weights" in names],
        [mx.zeros(a[1], a[0]) for a in half if "compensated" in names],
        [mx.zeros(a[1], mx.float32) for a in layout.arenas if "ema" in names],
    ]


def step_once(parameters, gradients, slots, step, names, **numbers):
    """(parameters, slots, step, used, measured or None, skipped or None)"""
    return _ext.sgd_step(
        _ext.Tree(gradients, parameters, "test"),
        layout_of(parameters),
        slots,
        step,
        flags=flags_of(names),
        **{**NUMBERS, **numbers},
    )


def run(device, parameters, gradients, names, steps=3, evaluate_each=True, **numbers):
    """Everything that there is after some steps."""
    previous = mx.default_device()
    mx.set_default_device(device)
    try:
        parameters = copied(parameters)
        slots = empty_slots(layout_of(parameters), names, numbers.get("momentum_dtype"))
        step, skipped = mx.array(7, mx.uint64), mx.array(2, mx.uint64)
        mx.eval(parameters, slots, step, skipped)
        for _ in range(steps):
            parameters, slots, step, used, measured, skipped = step_once(
                parameters, gradients(), slots, step, names, **{**numbers, "skipped": skipped}
            )
            if evaluate_each:
                mx.eval(parameters, slots, step)
        result = [*parameters, *itertools.chain(*slots), step]
        result += [] if used is None else [used]
        result += [] if measured is None else [measured, skipped]
        mx.eval(result)
        return result
    finally:
        mx.set_default_device(previous)


def assert_devices_agree(parameters, gradients, names, **more):
    got = run(GPU, parameters, gradients, names, **more)
    assert_same(got, run(mx.cpu, parameters, gradients, names, **more))
    return got


def groups_of(tensors, names):
    """Three groups of different numbers and flags, in turn."""
    tensor_flags = ["momentum", "nesterov", "weight_decay", "trust_ratio"]
    own = [name for name in names.split() if name in tensor_flags]
    flags = [flags_of(" ".join(own)), flags_of(" ".join(own[1:])), 0]
    numbers = np.zeros((3, _ext.GROUP_NUMBERS), np.float32)
    numbers[0] = [1, 0, 1, 0, 1, 0, 0.05]
    numbers[1] = [0.1, 0, 0, 0.8, 2, 0.001, 0.01]
    numbers[2] = [0, 0.03, 1, -0.1, 1, 0, 1]
    return dict(
        groups=_ext.Groups([t % 3 for t in range(tensors)], flags),
        group_numbers=mx.array(numbers),
    )


def flat_tensors(dtype, gradient_dtype):
    parameters = [random((n,), dtype, n) for n in SIZES]
    gradients = [random((n,), gradient_dtype, 1000 + n) for n in SIZES]
    return parameters, lambda: gradients


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("names", OPTIONS.values(), ids=OPTIONS)
def test_every_option_has_the_bits_of_the_cpu(names, dtype):
    for gradient_dtype, momentum_dtype in itertools.product(DTYPES, [None, *DTYPES]):
        parameters, gradients = flat_tensors(dtype, gradient_dtype)
        assert_devices_agree(parameters, gradients, names, momentum_dtype=momentum_dtype)
        if "momentum" not in names.split():
            break


@pytest.mark.parametrize("dtype, gradient_dtype", list(itertools.product(DTYPES, DTYPES)), ids=str)
@pytest.mark.parametrize("names", [*(OPTIONS[name] for name in KERNELS), "ema"])
def test_arrays_that_are_not_contiguous(names, dtype, gradient_dtype):
    """All ways to lie in memory at once; the gradients are made on the device that steps."""
    parameters = [p for p, _ in strided_cases(dtype, gradient_dtype)]
    for momentum_dtype in (None, mx.float32):
        assert_devices_agree(
            parameters,
            lambda: [g for _, g in strided_cases(dtype, gradient_dtype)],
            names,
            steps=2,
            momentum_dtype=momentum_dtype,
        )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", KERNELS)
def test_numbers_at_which_formats_end(name, dtype):
    """To the bit, but for which NaN it is: that is the processor's."""
    special = [0, -0.0, np.inf, -np.inf, np.nan, 1e-45, -1e-40, 6e-8, -3e-5, 65504, 65520, -3.4e38]
    values = np.array(special, np.float32)
    n = len(special)
    with mx.stream(mx.cpu):
        values = mx.array(values).astype(dtype)
        parameters = [mx.repeat(values, n), random((n * n,), dtype), random((n * n,), dtype, 1)]
        gradients = [mx.tile(values, n), mx.repeat(values, n), random((n * n,), dtype, 2)]
        mx.eval(parameters, gradients)
    # A norm of these would make everything NaN.
    measured = {"clip_norm", "skip_nonfinite", "trust_ratio"}
    names = " ".join({*OPTIONS[name].split(), "maximize"} - measured)
    for momentum_dtype in (None, mx.float32):
        more = dict(momentum_dtype=momentum_dtype)
        got = run(GPU, parameters, lambda: gradients, names, **more)
        want = run(mx.cpu, parameters, lambda: gradients, names, **more)
        for a, b in zip(got, want, strict=True):
            nan = np.isnan(np.array(b.astype(mx.float32)))
            np.testing.assert_array_equal(np.isnan(np.array(a.astype(mx.float32))), nan)
            np.testing.assert_array_equal(bits(a)[~nan], bits(b)[~nan])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", [*KERNELS, "decoupled", "trust ratio"])
def test_groups(name, dtype):
    parameters, gradients = flat_tensors(dtype, mx.float32)
    names = OPTIONS[name] + " groups"
    for momentum_dtype in (None, mx.float32):
        more = dict(momentum_dtype=momentum_dtype, **groups_of(len(SIZES), names))
        assert_devices_agree(parameters, gradients, names, **more)


def test_dtypes_side_by_side():
    """An arena of each: the norm is of all, and slots are where there is a use for them."""
    parameters = [random((n,), DTYPES[i % 3], n) for i, n in enumerate(SIZES)]
    gradients = [random((n,), DTYPES[i % 2], 1000 + n) for i, n in enumerate(SIZES)]
    for names in OPTIONS.values():
        assert_devices_agree(parameters, lambda: gradients, names)


def test_scheduled_and_given_numbers():
    parameters, gradients = flat_tensors(mx.bfloat16, mx.bfloat16)
    schedule = optim.exponential_decay(0.5, 0.9)._device
    names = OPTIONS["all"]
    for numbers in (
        dict(grad_scale=schedule),
        dict(grad_scale=mx.array(8.0)),
        dict(learning_rate=mx.array(0.2), momentum=schedule, weight_decay=mx.array(0.1)),
    ):
        assert_devices_agree(parameters, gradients, names, **numbers)


def test_more_tensors_than_a_launch_holds():
    rng = np.random.default_rng(0)
    shapes = [(int(n),) for n in rng.integers(0, 300, 2500)] + [(70000,), (17, 9)]
    parameters = [random(s, mx.bfloat16, i) for i, s in enumerate(shapes)]
    gradients = [random(s, mx.bfloat16, 5000 + i) for i, s in enumerate(shapes)]
    gradients[-1] = random((9, 17)).T
    names = OPTIONS["all"] + " groups"
    assert_devices_agree(
        parameters, lambda: gradients, names, steps=2, **groups_of(len(shapes), names)
    )


def test_arenas_of_the_state_that_are_not_contiguous():
    parameters = [random((n,), mx.bfloat16, n) for n in (5, 70, 4097)]
    gradients = [random((n,), mx.bfloat16, n + 1) for n in (5, 70, 4097)]
    names = OPTIONS["averaged masters"]

    def step(device):
        with mx.stream(device):
            own = copied(parameters)
            slots = empty_slots(layout_of(own), names, mx.float32)
            (size,) = slots[0][0].shape
            wide = mx.array(np.arange(2 * size, dtype=np.float32) % 13)
            slots[0] = [wide[::2]]
            new, slots, *_ = step_once(
                own, gradients, slots, mx.array(0, mx.uint64), names, momentum_dtype=mx.float32
            )
            mx.eval(new, slots)
            # What is between the tensors is not zero here, and becomes so.
            ranges = ((0, 5), (128, 198), (256, 4353))
            return [*new, *[arena[0][a:b] for arena in (slots[0], slots[1]) for a, b in ranges]]

    assert_same(step(GPU), step(mx.cpu))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_norms_have_the_bits_of_the_cpu(dtype):
    """Around chunks, and with more chunks than a fold has lanes; in every order."""
    sizes = [*SIZES, 2047, 2048, 2049, 1024 * 2048, 1025 * 2048 + 1, 3 << 20]
    parameters = [random((n,), dtype, n) for n in sizes]
    gradients = [random((n,), dtype, 1000 + n) for n in sizes]
    for p, g in strided_cases(dtype, dtype):
        parameters.append(p)
        gradients.append(g)
    for names in ("trust_ratio", "trust_ratio grad_scale clip_value", "clip_norm skip_nonfinite"):
        got = assert_devices_agree(parameters, lambda: gradients, names, steps=1)
        measured = got[-2]
        assert measured.size == (2 + 2 * len(parameters) if "trust" in names else 2)
    total = sum((np.array(g.astype(mx.float32)).astype(np.float64) ** 2).sum() for g in gradients)
    assert measured[0].item() == pytest.approx(np.sqrt(total), rel=8e-7)


@pytest.mark.parametrize("bad", [np.inf, -np.inf, np.nan])
@pytest.mark.parametrize("held", [False, True], ids=["in place", "held"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kept", ["master_weights ema stochastic", "master_weights", "stochastic"])
def test_a_skipped_step_changes_nothing(kept, dtype, held, bad):
    names = f"momentum skip_nonfinite clip_norm {kept}"
    parameters, gradients = flat_tensors(dtype, mx.float32)
    slots = empty_slots(layout_of(parameters), names, None)
    step = mx.array(4, mx.uint64)
    parameters, slots, step, _, _, skipped = step_once(parameters, gradients(), slots, step, names)
    mx.eval(parameters, slots, step, skipped)
    before = [bits(a) for a in [*parameters, *itertools.chain(*slots)]]
    poisoned = list(gradients())
    poisoned[-1] = mx.where(mx.arange(SIZES[-1]) == 4097, bad, poisoned[-1])
    keep = (parameters, slots) if held else None
    parameters, slots, step, used, measured, skipped = step_once(
        parameters, poisoned, slots, step, names, skipped=skipped
    )
    mx.eval(parameters, slots, step, used, measured, skipped, keep)
    for a, b in zip([*parameters, *itertools.chain(*slots)], before, strict=True):
        np.testing.assert_array_equal(bits(a), b)
    assert (step.item(), skipped.item(), measured[1].item()) == (5, 1, 0)


def test_gaps_of_fresh_memory_are_zero():
    trash = [mx.full((1 << 18,), 7.0) for _ in range(12)]
    mx.eval(trash)
    del trash  # the step's memory comes from what these leave in the cache
    names = "momentum compensated ema stochastic skip_nonfinite"
    for apply in (True, False):
        shapes = [(1,), (65,), (4097,), (70001,), (9, 7), (3, 5, 7)]
        parameters = [random(s, mx.bfloat16) for s in shapes]
        gradients = [p * (1 if apply else np.inf) for p in parameters]
        gradients[-2] = (parameters[-2] * 1).reshape(7, 9).T
        gradients[-1] = (parameters[-1] * 1).reshape(7, 5, 3).transpose(2, 1, 0)
        layout = layout_of(parameters)
        slots = empty_slots(layout, names, mx.float32)
        _, new, *_ = step_once(
            parameters,
            gradients,
            slots,
            mx.array(0, mx.uint64),
            names,
            momentum_dtype=mx.float32,
        )
        mx.eval(new, slots)  # the old are held: all memory is fresh
        ((_, _, _, offsets),) = layout.arenas
        for arena in itertools.chain(*new):
            values = np.array(arena.astype(mx.float32))
            for offset, p in zip(offsets, parameters, strict=True):
                end = -(-(offset + p.size) // 128) * 128
                assert (values[offset + p.size : end] == 0).all()


def test_steps_in_place_need_no_memory():
    """But for sums: arenas are 4 to 8 MiB."""
    names = "momentum master_weights ema clip_norm skip_nonfinite"
    parameters = [random((1 << 20,), mx.bfloat16, i) + 0 for i in range(2)]
    gradients = [random((1 << 20,), mx.bfloat16, 100 + i) + 0 for i in range(2)]
    slots = empty_slots(layout_of(parameters), names, None)
    step = mx.array(0, mx.uint64)
    for number in range(6):
        parameters, slots, step, *_ = step_once(parameters, gradients, slots, step, names)
        mx.eval(parameters, slots, step)
        mx.synchronize()
        if number == 2:
            mx.reset_peak_memory()
            active = mx.get_active_memory()
    assert mx.get_peak_memory() - active < 1 << 20
    assert mx.get_active_memory() - active < 1 << 20


def test_a_chain_of_steps_evaluated_at_once():
    parameters, gradients = flat_tensors(mx.bfloat16, mx.bfloat16)
    assert_devices_agree(parameters, gradients, OPTIONS["all"], steps=20, evaluate_each=False)


def test_compiled():
    parameters, gradients = flat_tensors(mx.float16, mx.float16)
    names = OPTIONS["all"]
    want = run(GPU, parameters, gradients, names, steps=4)

    @mx.compile
    def step(parameters, gradients, slots, step, skipped):
        return step_once(parameters, gradients, slots, step, names, skipped=skipped)

    new, slots = copied(parameters), empty_slots(layout_of(parameters), names, None)
    count, skipped = mx.array(7, mx.uint64), mx.array(2, mx.uint64)
    for _ in range(4):
        new, slots, count, used, measured, skipped = step(new, gradients(), slots, count, skipped)
        mx.eval(new, slots, count)
    assert_same([*new, *itertools.chain(*slots), count, used, measured, skipped], want)


def test_no_tensors_count_steps():
    names = "momentum ema clip_norm skip_nonfinite"
    got = run(GPU, [], lambda: [], names, steps=3)
    step, used, measured, skipped = got
    assert step.item() == 10 and skipped.item() == 2
    assert measured.tolist() == [0, 1]
    assert used.tolist() == pytest.approx([0.1, 0.9, 0.01, 1.0])


def test_out_of_memory_changes_nothing():
    names = "momentum ema clip_norm"
    parameters = [mx.random.normal((1 << 24,)) for _ in range(8)]  # 64 MiB each, two an arena
    gradients = [p * 0.5 for p in parameters]
    slots = empty_slots(layout_of(parameters), names, None)
    step = mx.array(0, mx.uint64)
    before = [p * 1 for p in parameters]
    mx.eval(parameters, gradients, slots, step, before)
    new, new_slots, after, *_ = step_once(parameters, gradients, slots, step, names)
    # The step wants 1.5 GiB, as all its inputs are held.
    with (
        little_memory(),
        pytest.raises(RuntimeError, match=r"\[fused_sgd_step\] out of device memory: needed 128"),
    ):
        mx.eval(new, new_slots, after)
    assert_same(parameters, before)
    assert all((a == 0).all().item() for a in itertools.chain(*slots))
    assert step.item() == 0
    # The very same graph succeeds once there is room, as does a fresh one.
    mx.eval(new, new_slots, after)
    again, again_slots, *_ = step_once(parameters, gradients, slots, step, names)
    assert after.item() == 1
    assert_same([*new, *itertools.chain(*new_slots)], [*again, *itertools.chain(*again_slots)])


def test_too_many_dimensions():
    shape = (2,) * 12
    parameter = mx.zeros(shape)
    gradient = random((3,) * 12).transpose(*range(11, -1, -1))[(slice(0, 2),) * 12]
    for names in ("ema", "clip_norm"):
        slots = empty_slots(layout_of([parameter]), names, None)
        new, *_ = step_once([parameter], [gradient], slots, mx.array(0, mx.uint64), names)
        with pytest.raises(ValueError, match=r"too many dimensions: got more than 10"):
            mx.eval(new)
