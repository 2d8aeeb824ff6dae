"""Every rule and every option on a real GPU, and the measurement, to the bit of the CPU backend.

At the extension's interface, so that every combination can be had. A variant of a kernel takes
half a second to compile: dtypes of gradients and of the state come in turn.
"""

import itertools
from dataclasses import replace

import mlx.core as mx
import mlx_fused_optim as optim
import numpy as np
import pytest
from full_cases import GROUPS
from full_step import Full, first_state, full_step, layout_of
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

MOMENTUM = Full(momentum=0.9, dampening=0.25)
NESTEROV = Full(momentum=0.9, nesterov=True)
CLIPS = dict(grad_scale=4.0, clip_value=0.2, clip_norm=2.0)
AT_RANDOM = dict(stochastic=True, seed=12345)
AVERAGE = dict(ema_decay=0.9)
FRAME = dict(**CLIPS, weight_decay=0.01, skip_nonfinite=True, trust_coefficient=0.05)
ALL = dict(**FRAME, **AT_RANDOM, **AVERAGE, maximize=True, decoupled=True, master_weights=True)
ALL_COMPENSATED = dict(**FRAME, **AT_RANDOM, **AVERAGE, compensated=True)
OPTIONS = {
    "nothing": Full(),
    "maximize": Full(maximize=True),
    "scaled": Full(grad_scale=4.0),
    "clipped by value": replace(MOMENTUM, clip_value=0.2),
    "clipped by norm": replace(NESTEROV, clip_norm=2.0),
    "scaled and clipped": replace(MOMENTUM, **CLIPS),
    "skips": replace(MOMENTUM, skip_nonfinite=True),
    "trust ratio": replace(MOMENTUM, trust_coefficient=0.05, weight_decay=0.01),
    "trust ratio, decoupled": replace(
        MOMENTUM, trust_coefficient=0.05, weight_decay=0.01, decoupled=True, clip_norm=2.0
    ),
    "decoupled": replace(NESTEROV, weight_decay=0.01, decoupled=True),
    "masters": replace(MOMENTUM, master_weights=True, weight_decay=0.01),
    "compensated": replace(MOMENTUM, compensated=True, weight_decay=0.01),
    "masters of 24 bits": replace(MOMENTUM, master_weights="24bit", weight_decay=0.01),
    "all, 24 bits": replace(NESTEROV, **{**ALL, "master_weights": "24bit"}),
    "bytes": replace(MOMENTUM, state_dtype="8bit", weight_decay=0.01),
    "bytes, all": replace(NESTEROV, **{**ALL, "state_dtype": "8bit"}),
    "bytes, 24 bits": replace(MOMENTUM, **AT_RANDOM, state_dtype="8bit", master_weights="24bit"),
    "stochastic": replace(MOMENTUM, weight_decay=0.01, **AT_RANDOM),
    "stochastic, masters": replace(MOMENTUM, master_weights=True, **AT_RANDOM),
    "averaged": Full(**AVERAGE),
    "averaged masters": replace(MOMENTUM, master_weights=True, **AVERAGE),
    "averaged, compensated": replace(MOMENTUM, compensated=True, **AVERAGE),
    "all": replace(NESTEROV, **ALL),
    "all, compensated": replace(MOMENTUM, **ALL_COMPENSATED),
}

# What is kept of each element, in every way that takes different code.
KERNELS = [
    "clipped by norm", "masters", "masters of 24 bits", "compensated", "stochastic", "all",
    "all, compensated", "bytes", "bytes, all",
]  # fmt: skip

RULES = {
    "adam": Full("adam"),
    "adam, corrected": Full("adam", bias_correction=True),
    "adam, amsgrad": Full("adam", bias_correction=True, amsgrad=True),
    **{rule: Full(rule) for rule in ("adamax", "lion", "rmsprop", "adagrad", "adadelta")},
}
every_rule = pytest.mark.parametrize("rule", RULES.values(), ids=RULES)
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)


def named(names):
    """(name, dtype): masters of 24 bits are not those of float16."""
    return pytest.mark.parametrize(
        "name, dtype",
        [
            (name, dtype)
            for name, dtype in itertools.product(names, DTYPES)
            if dtype != mx.float16 or "24 bits" not in name
        ],
        ids=str,
    )


def everything(parameters, state):
    """All that a step gives, as one list."""
    told = [x for x in state[1:] if x is not None]
    return [*parameters, *itertools.chain(*state.slots), *told]


def run(device, parameters, gradients, options, steps=3, evaluate_each=True, rate=0.1, **scalars):
    """Everything that there is after some steps."""
    previous = mx.default_device()
    mx.set_default_device(device)
    try:
        parameters = copied(parameters)
        state = first_state(options, parameters, step=7)
        mx.eval(everything(parameters, state))
        for _ in range(steps):
            parameters, state = full_step(options, parameters, gradients(), state, rate, **scalars)
            if evaluate_each:
                mx.eval(everything(parameters, state))
        result = everything(parameters, state)
        mx.eval(result)
        return result
    finally:
        mx.set_default_device(previous)


def assert_devices_agree(parameters, gradients, options, **more):
    got = run(GPU, parameters, gradients, options, **more)
    assert_same(got, run(mx.cpu, parameters, gradients, options, **more))
    return got


def in_turn(number, dtype):
    """A dtype of gradients, and one of the state or None."""
    gradients = [dtype, mx.float32, mx.bfloat16, mx.float16]
    states = [None, "float32", "bfloat16", "float16", None]
    return gradients[number % 4], states[number % 5]


def with_state(options, state_dtype):
    """Bytes stay."""
    return replace(options, state_dtype=options.state_dtype or state_dtype)


def flat_tensors(dtype, gradient_dtype):
    parameters = [random((n,), dtype, n) for n in SIZES]
    gradients = [random((n,), gradient_dtype, 1000 + n) for n in SIZES]
    return parameters, lambda: gradients


@named(OPTIONS)
def test_every_option_has_the_bits_of_the_cpu(name, dtype):
    number = list(OPTIONS).index(name) + DTYPES.index(dtype)
    for gradient_dtype, state_dtype in ((dtype, None), in_turn(number, dtype)):
        parameters, gradients = flat_tensors(dtype, gradient_dtype)
        options = with_state(OPTIONS[name], state_dtype)
        assert_devices_agree(parameters, gradients, options)


@every_dtype
@every_rule
def test_every_rule_has_the_bits_of_the_cpu(rule, dtype):
    """With the frame's code for each way to keep an element, in turn."""
    number = list(RULES.values()).index(rule) + DTYPES.index(dtype)
    kept = [dict(weight_decay=0.01), ALL, dict(master_weights=True), ALL_COMPENSATED, AT_RANDOM]
    cases = [({}, dtype, None), (kept[number % len(kept)], *in_turn(number, dtype))]
    for options, gradient_dtype, state_dtype in cases:
        parameters, gradients = flat_tensors(dtype, gradient_dtype)
        options = replace(rule, state_dtype=state_dtype, **options)
        assert_devices_agree(parameters, gradients, options)


@every_dtype
@every_rule
def test_every_rule_with_arrays_that_are_not_contiguous(rule, dtype):
    number = list(RULES.values()).index(rule) + DTYPES.index(dtype)
    gradient_dtype, state_dtype = in_turn(number, dtype)
    assert_any_way_to_lie(dtype, gradient_dtype, replace(rule, state_dtype=state_dtype))


def assert_any_way_to_lie(dtype, gradient_dtype, options):
    """All ways to lie in memory at once; the gradients are made on the device that steps."""
    parameters = [p for p, _ in strided_cases(dtype, gradient_dtype)]
    assert_devices_agree(
        parameters,
        lambda: [g for _, g in strided_cases(dtype, gradient_dtype)],
        options,
        steps=2,
    )


@pytest.mark.parametrize("dtype, gradient_dtype", list(itertools.product(DTYPES, DTYPES)), ids=str)
def test_every_pair_of_dtypes_that_is_not_contiguous(dtype, gradient_dtype):
    assert_any_way_to_lie(dtype, gradient_dtype, replace(OPTIONS["masters"], **AVERAGE))


@named(KERNELS)
def test_arrays_that_are_not_contiguous(name, dtype):
    for state_dtype in (None, "float32") if dtype != mx.float32 else (None,):
        assert_any_way_to_lie(dtype, dtype, with_state(OPTIONS[name], state_dtype))


@named([*KERNELS, *RULES])
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
    measured = dict(clip_norm=None, skip_nonfinite=False, trust_coefficient=None)
    options = replace({**OPTIONS, **RULES}[name], maximize=True, **measured)
    got = run(GPU, parameters, lambda: gradients, options)
    want = run(mx.cpu, parameters, lambda: gradients, options)
    for a, b in zip(got, want, strict=True):
        if a.dtype == mx.uint64:
            assert a.item() == b.item()
            continue
        nan = np.isnan(np.array(b.astype(mx.float32)))
        np.testing.assert_array_equal(np.isnan(np.array(a.astype(mx.float32))), nan)
        np.testing.assert_array_equal(bits(a)[~nan], bits(b)[~nan])


@named([*KERNELS, "decoupled", "trust ratio", *RULES])
def test_groups(name, dtype):
    parameters, gradients = flat_tensors(dtype, mx.float32)
    options = {**OPTIONS, **RULES}[name]
    state_dtype = in_turn(len(name), dtype)[1]
    options = replace(options, groups=GROUPS, state_dtype=state_dtype)
    assert_devices_agree(parameters, gradients, options)


def test_dtypes_side_by_side():
    """An arena of each: the norm is of all, and slots are where there is a use for them."""
    parameters = [random((n,), DTYPES[i % 3], n) for i, n in enumerate(SIZES)]
    gradients = [random((n,), DTYPES[i % 2], 1000 + n) for i, n in enumerate(SIZES)]
    options_of_all = [o for o in OPTIONS.values() if not o.has_master24]
    for options in (*options_of_all, replace(RULES["adam, corrected"], **ALL)):
        assert_devices_agree(parameters, lambda: gradients, options)


def test_scheduled_and_given_numbers():
    parameters, gradients = flat_tensors(mx.bfloat16, mx.bfloat16)
    schedule = optim.exponential_decay(0.5, 0.9)._device
    for numbers in (
        dict(grad_scale=schedule),
        dict(grad_scale=mx.array(8.0)),
        dict(rate=mx.array(0.2), momentum=schedule, weight_decay=mx.array(0.1)),
    ):
        assert_devices_agree(parameters, gradients, OPTIONS["all"], **numbers)
    adam = RULES["adam, corrected"]
    for numbers in (
        dict(rate=schedule, beta1=schedule, beta2=schedule, eps=schedule),
        dict(beta1=mx.array(0.8), beta2=mx.array(0.95)),
    ):
        assert_devices_agree(parameters, gradients, adam, **numbers)


def test_corrections_of_late_steps():
    """From the first to beyond what a float32 counts."""
    parameters, gradients = flat_tensors(mx.float32, mx.float32)
    for step in (0, 1, 1000, 2**24 + 1, 2**40):
        results = []
        for device in (GPU, mx.cpu):
            with mx.stream(device):
                own = copied(parameters)
                state = first_state(RULES["adam, corrected"], own, step=step)
                results.append(
                    everything(*full_step(RULES["adam, corrected"], own, gradients(), state, 0.1))
                )
                mx.eval(results[-1])
        assert_same(*results)


def test_more_tensors_than_a_launch_holds():
    rng = np.random.default_rng(0)
    shapes = [(int(n),) for n in rng.integers(0, 300, 2500)] + [(70000,), (17, 9), (40, 16)]
    parameters = [random(s, mx.bfloat16, i) for i, s in enumerate(shapes)]
    gradients = [random(s, mx.bfloat16, 5000 + i) for i, s in enumerate(shapes)]
    gradients[-2] = random((9, 17)).T
    gradients[-1] = random((16, 40)).T
    for options in (OPTIONS["all"], RULES["adam, amsgrad"]):
        options = replace(options, groups=GROUPS)
        assert_devices_agree(parameters, lambda: gradients, options, steps=2)


def test_arenas_of_the_state_that_are_not_contiguous():
    parameters = [random((n,), mx.bfloat16, n) for n in (5, 70, 4097)] + [
        random((16, 24), mx.bfloat16)
    ]
    gradients = [random((n,), mx.bfloat16, n + 1) for n in (5, 70, 4097)] + [
        random((24, 16), mx.bfloat16).T
    ]

    def step(device, options):
        with mx.stream(device):
            own = copied(parameters)
            state = first_state(options, own)
            (size,) = state.slots[0][0].shape
            wide = mx.array(np.arange(2 * size, dtype=np.float32) % 13)
            state.slots[0][0] = wide[::2]
            new, state = full_step(options, own, gradients, state, 0.1)
            mx.eval(new, state.slots)
            # What is between the tensors is not zero here, and becomes so.
            ((_, _, _, offsets, _),) = layout_of(parameters).arenas
            ends = [(begin, begin + p.size) for begin, p in zip(offsets, parameters, strict=True)]
            slots = [arena for arenas in state.slots for arena in arenas]
            return [*new, *[arena[a:b] for arena in slots for a, b in ends]]

    for options in (OPTIONS["averaged masters"], RULES["adam"]):
        options = replace(options, state_dtype="float32")
        assert_same(step(GPU, options), step(mx.cpu, options))


@every_dtype
def test_norms_have_the_bits_of_the_cpu(dtype):
    """Around chunks, and with more chunks than a fold has lanes; in every order."""
    sizes = [*SIZES, 2047, 2048, 2049, 1024 * 2048, 1025 * 2048 + 1, 3 << 20]
    parameters = [random((n,), dtype, n) for n in sizes]
    gradients = [random((n,), dtype, 1000 + n) for n in sizes]
    for p, g in strided_cases(dtype, dtype):
        parameters.append(p)
        gradients.append(g)
    for options in (
        Full(trust_coefficient=0.05),
        Full(trust_coefficient=0.05, grad_scale=4.0, clip_value=0.2),
        Full(clip_norm=2.0, skip_nonfinite=True),
    ):
        got = assert_devices_agree(parameters, lambda: gradients, options, steps=1)
        measured = got[-1]
        is_ratio = options.trust_coefficient is not None
        assert measured.size == (2 + 2 * len(parameters) if is_ratio else 2)
    total = sum((np.array(g.astype(mx.float32)).astype(np.float64) ** 2).sum() for g in gradients)
    assert measured[0].item() == pytest.approx(np.sqrt(total), rel=8e-7)


@pytest.mark.parametrize("bad", [np.inf, -np.inf, np.nan])
@pytest.mark.parametrize("held", [False, True], ids=["in place", "held"])
@every_dtype
@pytest.mark.parametrize(
    "kept",
    [
        replace(MOMENTUM, master_weights=True, **AVERAGE, **AT_RANDOM),
        replace(MOMENTUM, master_weights=True),
        replace(MOMENTUM, **AT_RANDOM),
        Full("adam", bias_correction=True, amsgrad=True),
    ],
    ids=["all", "masters", "stochastic", "adam"],
)
def test_a_skipped_step_changes_nothing(kept, dtype, held, bad):
    options = replace(kept, skip_nonfinite=True, clip_norm=2.0)
    parameters, gradients = flat_tensors(dtype, mx.float32)
    state = first_state(options, parameters, step=4)
    parameters, state = full_step(options, parameters, gradients(), state, 0.1)
    mx.eval(everything(parameters, state))
    before = [bits(a) for a in [*parameters, *itertools.chain(*state.slots)]]
    poisoned = list(gradients())
    poisoned[-1] = mx.where(mx.arange(SIZES[-1]) == 4097, bad, poisoned[-1])
    keep = everything(parameters, state) if held else None
    parameters, state = full_step(options, parameters, poisoned, state, 0.1)
    mx.eval(everything(parameters, state), keep)
    for a, b in zip([*parameters, *itertools.chain(*state.slots)], before, strict=True):
        np.testing.assert_array_equal(bits(a), b)
    assert (state.step.item(), state.skipped.item(), state.measured[1].item()) == (5, 1, 0)


@pytest.mark.parametrize(
    "kept",
    [
        replace(MOMENTUM, compensated=True),
        Full("adam", amsgrad=True, bias_correction=True),
        Full("adam", state_dtype="8bit"),
    ],
    ids=["sgd", "adam", "bytes"],
)
def test_gaps_of_fresh_memory_are_zero(kept):
    trash = [mx.full((1 << 18,), 7.0) for _ in range(12)]
    mx.eval(trash)
    del trash  # the step's memory comes from what these leave in the cache
    options = replace(with_state(kept, "float32"), skip_nonfinite=True, **AVERAGE, **AT_RANDOM)
    for apply in (True, False):
        shapes = [(1,), (65,), (4097,), (70001,), (12, 4), (9, 7), (3, 5, 7)]
        parameters = [random(s, mx.bfloat16) for s in shapes]
        gradients = [p * (1 if apply else np.inf) for p in parameters]
        gradients[-3] = (parameters[-3] * 1).reshape(4, 12).T
        gradients[-2] = (parameters[-2] * 1).reshape(7, 9).T
        gradients[-1] = (parameters[-1] * 1).reshape(7, 5, 3).transpose(2, 1, 0)
        state = first_state(options, parameters)
        _, new = full_step(options, parameters, gradients, state, 0.1)
        mx.eval(new.slots, state.slots)  # the old are held: all memory is fresh
        ((_, _, _, offsets, _),) = layout_of(parameters).arenas
        for arena in itertools.chain(*new.slots):
            values = np.array(arena.astype(mx.float32))
            values = values[:, 4:].reshape(-1) if arena.dtype == mx.uint8 else values  # codes
            for offset, p in zip(offsets, parameters, strict=True):
                end = -(-(offset + p.size) // 128) * 128
                assert (values[offset + p.size : end] == 0).all()


@pytest.mark.parametrize("kept", [MOMENTUM, Full("adam", amsgrad=True)], ids=["sgd", "adam"])
def test_steps_in_place_need_no_memory(kept):
    """But for sums: arenas are 4 to 8 MiB."""
    options = replace(kept, master_weights=True, clip_norm=2.0, skip_nonfinite=True, **AVERAGE)
    parameters = [random((1 << 20,), mx.bfloat16, i) + 0 for i in range(2)]
    gradients = [random((1 << 20,), mx.bfloat16, 100 + i) + 0 for i in range(2)]
    state = first_state(options, parameters)
    for number in range(6):
        parameters, state = full_step(options, parameters, gradients, state, 0.1)
        mx.eval(everything(parameters, state))
        mx.synchronize()
        if number == 2:
            mx.reset_peak_memory()
            active = mx.get_active_memory()
    assert mx.get_peak_memory() - active < 1 << 20
    assert mx.get_active_memory() - active < 1 << 20


@pytest.mark.parametrize("options", [OPTIONS["all"], replace(RULES["adam, corrected"], **ALL)])
def test_a_chain_of_steps_evaluated_at_once(options):
    parameters, gradients = flat_tensors(mx.bfloat16, mx.bfloat16)
    assert_devices_agree(parameters, gradients, options, steps=20, evaluate_each=False)


def test_compiled():
    parameters, gradients = flat_tensors(mx.float16, mx.float16)
    options = OPTIONS["all"]
    want = run(GPU, parameters, gradients, options, steps=4)

    @mx.compile
    def step(parameters, gradients, slots, count, skipped):
        state = first_state(options, [])._replace(slots=slots, step=count, skipped=skipped)
        return full_step(options, parameters, gradients, state, 0.1)

    new = copied(parameters)
    state = first_state(options, new, step=7)
    for _ in range(4):
        new, state = step(new, gradients(), state.slots, state.step, state.skipped)
        state = type(first_state(options, []))(*state)
        mx.eval(everything(new, state))
    assert_same(everything(new, state), want)


def test_no_tensors_count_steps():
    options = replace(MOMENTUM, weight_decay=0.01, clip_norm=2.0, skip_nonfinite=True, **AVERAGE)
    state = first_state(options, [], step=7)
    for _ in range(3):
        _, state = full_step(options, [], [], state, 0.1)
    assert state.step.item() == 10 and state.skipped.item() == 0
    assert state.measured.tolist() == [0, 1]
    assert state.used.tolist() == pytest.approx([0.1, 0.01, 1.0, 0.9, 0.25, 0])


@pytest.mark.fills_gpu
def test_out_of_memory_changes_nothing():
    options = replace(MOMENTUM, clip_norm=2.0, **AVERAGE)
    parameters = [mx.random.normal((1 << 24,)) for _ in range(8)]  # 64 MiB, an arena each
    gradients = [p * 0.5 for p in parameters]
    state = first_state(options, parameters)
    before = [p * 1 for p in parameters]
    mx.eval(everything(parameters, state), gradients, before)
    averages = [a * 1 for a in state.slots[-1]]
    mx.eval(averages)
    new, after = full_step(options, parameters, gradients, state, 0.1)
    # The step wants 1.5 GiB, as all its inputs are held.
    with (
        little_memory(),
        pytest.raises(RuntimeError, match=r"\[fused_step\] out of device memory: needed 64"),
    ):
        mx.eval(new, after.slots, after.step)
    assert_same(parameters, before)
    assert all((a == 0).all().item() for a in state.slots[0])
    assert_same(state.slots[-1], averages)
    assert state.step.item() == 0
    # The very same graph succeeds once there is room, as does a fresh one.
    mx.eval(new, after.slots, after.step)
    again, more = full_step(options, parameters, gradients, state, 0.1)
    assert after.step.item() == 1
    assert_same([*new, *itertools.chain(*after.slots)], [*again, *itertools.chain(*more.slots)])


@pytest.mark.parametrize("options", [Full(**AVERAGE), Full(clip_norm=2.0), Full("adam")])
def test_too_many_dimensions(options):
    shape = (2,) * 12
    parameter = mx.zeros(shape)
    gradient = random((3,) * 12).transpose(*range(11, -1, -1))[(slice(0, 2),) * 12]
    new, _ = full_step(options, [parameter], [gradient], first_state(options, [parameter]), 0.1)
    with pytest.raises(ValueError, match=r"too many dimensions: got more than 10"):
        mx.eval(new)
