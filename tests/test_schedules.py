"""Schedules as values: printed, compared, pickled; their errors; MLX's own beside them."""

import inspect
import math
import pickle

import mlx.core as mx
import mlx.optimizers
import mlx_fused_optim as optim
import numpy as np
import pytest
from bits import SMALLEST_NORMAL, keeps_subnormals
from mlx_fused_optim import (
    Schedule,
    constant,
    cosine_decay,
    cosine_restarts,
    exponential_decay,
    inverse_sqrt,
    join_schedules,
    linear_schedule,
    multi_step,
    one_cycle,
    parse_schedule,
    polynomial_decay,
    scaled,
    step_decay,
    triangular,
    warmup,
    warmup_stable_decay,
)


def halving(step):
    """A Python function of the step, at module level so that it pickles."""
    return 0.5 ** step.astype(mx.float32)


NINE = join_schedules([constant(i) for i in range(9)], [10 * i for i in range(1, 9)])

# One of each, as it prints itself.
PRINTED = {
    "constant(0.5)": constant(0.5),
    "cosine_decay(0.1, 1000)": cosine_decay(0.1, 1000),
    "cosine_decay(0.1, 1000, end=0.01, exponent=2.0)": cosine_decay(0.1, 1000, 0.01, exponent=2),
    "cosine_restarts(0.1, 10, cycle_multiplier=2)": cosine_restarts(0.1, 10, cycle_multiplier=2),
    "exponential_decay(0.1, 0.9)": exponential_decay(0.1, 0.9),
    "exponential_decay(0.1, 0.9, transition_steps=5, staircase=True, end=0.01)": exponential_decay(
        0.1, 0.9, transition_steps=5, staircase=True, end=0.01
    ),
    "inverse_sqrt(0.1, warmup_steps=100)": inverse_sqrt(0.1, 100),
    "join_schedules([constant(0.1), constant(0.2)], [10])": join_schedules(
        (constant(0.1), constant(0.2)), (10,)
    ),
    "linear_schedule(0.1, 0.0, 10)": linear_schedule(0.1, 0, 10),
    "multi_step(0.1, [30, 60])": multi_step(0.1, [30, 60]),
    "multi_step(0.1, [30, 60], scales=[0.5, 0.1])": multi_step(0.1, (30, 60), (0.5, 0.1)),
    "one_cycle(100, 0.1)": one_cycle(100, 0.1),
    "one_cycle(100, 0.1, pct_final=0.85, anneal='linear')": one_cycle(
        100, 0.1, pct_final=0.85, anneal="linear"
    ),
    "polynomial_decay(0.1, 0.0, 2.0, 10)": polynomial_decay(0.1, 0, 2, 10),
    "scaled(cosine_decay(0.1, 10), 0.5)": scaled(cosine_decay(0.1, 10), 0.5),
    "step_decay(0.1, 0.5, 10)": step_decay(0.1, 0.5, 10),
    "triangular(0.0, 0.1, 10, decay_rate=0.5)": triangular(0, 0.1, 10, decay_rate=0.5),
    "warmup(cosine_decay(0.1, 1000), 100)": warmup(cosine_decay(0.1, 1000), 100),
    "warmup_stable_decay(0.1, 10, 80, 10, decay_type='1-sqrt')": warmup_stable_decay(
        0.1, 10, 80, 10, decay_type="1-sqrt"
    ),
}


@pytest.mark.parametrize("text", PRINTED)
def test_a_schedule_is_a_value(text):
    schedule = PRINTED[text]
    assert repr(schedule) == text
    again = parse_schedule(text)
    assert again == schedule
    assert hash(again) == hash(schedule)
    loaded = pickle.loads(pickle.dumps(schedule))
    assert loaded == schedule
    steps = mx.arange(0, 200, 7)
    assert mx.array_equal(loaded(steps), schedule(steps))
    assert sum(other == schedule for other in PRINTED.values()) == 1
    assert schedule != text
    assert schedule.in_kernel


def test_every_schedule_is_printed_above():
    made = {text.partition("(")[0] for text in PRINTED}
    functions = {name for name in optim.schedules.__all__ if name[0].islower()}
    assert made == functions - {"parse_schedule"}
    assert functions <= set(optim.__all__)


def test_an_alias_has_the_same_arguments():
    assert linear_schedule(0, 1, 10.0) == linear_schedule(0.0, np.float32(1), np.int64(10))
    assert join_schedules([constant(1)], []) != constant(1)


@pytest.mark.parametrize("text", PRINTED)
def test_steps_of_any_shape_and_integer_type(text):
    schedule = PRINTED[text]
    steps = mx.array([[0, 1, 2], [10, 50, 120]])
    values = schedule(steps)
    assert values.shape == steps.shape
    assert values.dtype == mx.float32
    for dtype in (mx.uint8, mx.int16, mx.uint32, mx.int64, mx.uint64):
        assert mx.array_equal(schedule(steps.astype(dtype)), values)
    assert [schedule(t).item() for t in (0, 1, 2, 10, 50, 120)] == values.flatten().tolist()
    assert mx.array_equal(schedule(mx.array([-1, -(2**40)])), schedule(mx.array([0, 0])))


# ---- Beside mlx.optimizers -------------------------------------------------------

MLX = {
    "exponential_decay": [(0.1, 0.9), (0.001, 1.01)],
    "step_decay": [(0.1, 0.9, 10), (1.0, 0.5, 1)],
    "cosine_decay": [(0.1, 1000), (0.1, 100, 0.01), (0.1, 7, 0.2)],
    "linear_schedule": [(0, 0.1, 100), (0.1, 1e-5, 7)],
}


@pytest.mark.parametrize("name", [*MLX, "join_schedules"])
def test_arguments_are_those_of_mlx(name):
    theirs = inspect.signature(getattr(mlx.optimizers, name)).parameters
    ours = inspect.signature(getattr(optim, name)).parameters
    assert list(ours)[: len(theirs)] == list(theirs)
    for key, parameter in theirs.items():
        assert ours[key].default == parameter.default
        assert ours[key].kind == parameter.kind
    # What is ours alone cannot be given by position.
    assert all(p.kind == p.KEYWORD_ONLY for key, p in ours.items() if key not in theirs)


@pytest.mark.parametrize(("name", "arguments"), [(n, a) for n, many in MLX.items() for a in many])
def test_values_are_those_of_mlx(name, arguments):
    steps = mx.arange(300)
    theirs = np.array(getattr(mlx.optimizers, name)(*arguments)(steps), np.float64)
    ours = np.array(getattr(optim, name)(*arguments)(steps), np.float64)
    # MLX rounds the rate to float32: half an ulp of it, taken to the power of the step. A
    # cosine and a line have absolute errors, of an ulp or two at the larger end.
    relative = 300 * 2.0**-24 if "decay_rate" in signature(name) else 2.0**-22
    scale = abs(theirs) if "decay_rate" in signature(name) else abs(theirs).max()
    bound = relative * scale + (0 if keeps_subnormals() else SMALLEST_NORMAL)
    assert (abs(ours - theirs) <= bound).all()


def signature(name):
    return inspect.signature(getattr(mlx.optimizers, name)).parameters


def test_a_join_is_that_of_mlx():
    def make(module):
        parts = [module.linear_schedule(0, 0.1, steps=10), module.cosine_decay(0.1, 200)]
        return module.join_schedules(parts, [10])

    steps = mx.arange(300)
    assert mx.allclose(make(optim)(steps), make(mlx.optimizers)(steps), rtol=0, atol=0.1 * 2.0**-22)


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("step_decay", (0.1, 0.9, 0)),
        ("cosine_decay", (0.1, 0)),
        ("linear_schedule", (0.1, 0.0, 0)),
        ("join_schedules", ([], [])),
        ("join_schedules", ([abs], [1])),
    ],
)
def test_errors_are_those_of_mlx(name, arguments):
    with pytest.raises(ValueError, match=r"greater than 0|at least 1|expected"):
        getattr(mlx.optimizers, name)(*arguments)
    with pytest.raises(ValueError, match=rf"^\[{name}\] .*: got .*, allowed "):
        getattr(optim, name)(*arguments)


def test_the_end_of_a_line():
    """MLX's line to zero ends below it."""
    assert mlx.optimizers.linear_schedule(1e-4, 0, 1000)(mx.array(1000)).item() < 0
    assert linear_schedule(1e-4, 0, 1000)(mx.array(1000)).item() == 0


# ---- Errors ----------------------------------------------------------------------

NAN = math.nan
BAD = [
    (constant, (NAN,)),
    (constant, (math.inf,)),
    (constant, (1e39,)),
    (constant, ("0.1x",)),
    (exponential_decay, (NAN, 0.9)),
    (exponential_decay, (0.1, NAN)),
    (exponential_decay, (0.1, 0.0)),
    (exponential_decay, (0.1, -0.9)),
    (exponential_decay, (0.1, 0.9, {"transition_steps": 0})),
    (exponential_decay, (0.1, 0.9, {"transition_begin": -1})),
    (exponential_decay, (0.1, 0.9, {"end": NAN})),
    (step_decay, (0.1, 0.9, 0)),
    (step_decay, (0.1, 0.0, 10)),
    (step_decay, (0.1, 0.9, 2.5)),
    (cosine_decay, (0.1, 0.5)),
    (linear_schedule, (0.1, 0.0, math.inf)),
    (linear_schedule, (0.1, NAN, 10)),
    (linear_schedule, (0.1, 0.0, -1)),
    (linear_schedule, (0.1, 0.0, "ten")),
    (linear_schedule, (0.1, 0.0, 2**60 + 1)),
    (cosine_decay, (0.1, 0)),
    (cosine_decay, (NAN, 10)),
    (cosine_decay, (0.1, 10, NAN)),
    (cosine_decay, (0.1, 10, {"exponent": 0})),
    (polynomial_decay, (0.1, 0.0, 0, 10)),
    (polynomial_decay, (0.1, 0.0, -0.5, 10)),
    (polynomial_decay, (0.1, 0.0, NAN, 10)),
    (polynomial_decay, (0.1, 0.0, 1, 0)),
    (polynomial_decay, (0.1, 0.0, 1, 10, -5)),
    (inverse_sqrt, (NAN,)),
    (inverse_sqrt, (0.1, -1)),
    (inverse_sqrt, (0.1, 10, 0)),
    (multi_step, (0.1, [30, 30])),
    (multi_step, (0.1, [60, 30])),
    (multi_step, (0.1, [0, 30])),
    (multi_step, (0.1, [30, 60], [0.1])),
    (multi_step, (0.1, [30], -0.1)),
    (multi_step, (0.1, [30], NAN)),
    (multi_step, (1e30, [30], 1e30)),
    (one_cycle, (0, 0.1)),
    (one_cycle, (100, NAN)),
    (one_cycle, (100, 0.1, -0.1)),
    (one_cycle, (100, 0.1, 1.1)),
    (one_cycle, (100, 0.1, 1.0)),
    (one_cycle, (100, 0.1, 0.5, 0.4)),
    (one_cycle, (100, 0.1, 0.5, 1.0)),
    (one_cycle, (100, 0.1, 0.3, None, 0)),
    (one_cycle, (100, 0.1, 0.3, None, 25, -1)),
    (one_cycle, (100, 0.1, {"anneal": "cos"})),
    (cosine_restarts, (0.1, 0)),
    (cosine_restarts, (0.1, 10, NAN)),
    (cosine_restarts, (0.1, 10, {"cycle_multiplier": 0})),
    (cosine_restarts, (0.1, 10, {"cycle_multiplier": 65536})),
    (cosine_restarts, (0.1, 100 / 7)),
    (triangular, (0.0, 0.1, 0)),
    (triangular, (0.0, 0.1, 10, 0)),
    (triangular, (0.0, NAN, 10)),
    (triangular, (0.0, 0.1, 10, {"decay_rate": 1.1})),
    (triangular, (0.0, 0.1, 10, {"decay_rate": 0})),
    (triangular, (0.0, 0.1, 10, {"decay_every": "epoch"})),
    (join_schedules, ([], [])),
    (join_schedules, ([constant(1)], [10])),
    (join_schedules, ([constant(1)] * 2, [0])),
    (join_schedules, ([constant(1)] * 3, [10, 10])),
    (join_schedules, ([constant(1)] * 3, [10, 5])),
    (join_schedules, ([constant(1)] * 2, [NAN])),
    (join_schedules, ([constant(1), 0.1], [10])),
    (warmup, (constant(1), -1)),
    (warmup, (constant(1), 10, NAN)),
    (warmup, (0.1, 10)),
    (scaled, (constant(1), NAN)),
    (scaled, (constant(1), -1)),
    (scaled, (constant(1e30), 1e30)),
    (scaled, (0.1, 2)),
    (warmup_stable_decay, (NAN, 10, 10, 10)),
    (warmup_stable_decay, (0.1, -1, 10, 10)),
    (warmup_stable_decay, (0.1, 10, -1, 10)),
    (warmup_stable_decay, (0.1, 10, 10, 0)),
    (warmup_stable_decay, (0.1, 10, 10, 10, {"end_value": NAN})),
    (warmup_stable_decay, (0.1, 10, 10, 10, {"decay_type": "sqrt"})),
    (warmup_stable_decay, (0.1, 10, 10, 10, {"warmup_type": "none"})),
]


@pytest.mark.parametrize(("make", "arguments"), BAD, ids=lambda x: getattr(x, "__name__", str(x)))
def test_bad_arguments_raise(make, arguments):
    keywords = arguments[-1] if isinstance(arguments[-1], dict) else {}
    positional = arguments[: len(arguments) - bool(keywords)]
    with pytest.raises((ValueError, TypeError), match=rf"^\[{make.__name__}\] .*: got .*, allowed"):
        make(*positional, **keywords)


def test_large_limits_are_said_in_words():
    with pytest.raises(ValueError, match=r"got 0, allowed 1 to 2\*\*60\.$"):
        cosine_decay(0.1, 0)
    with pytest.raises(ValueError, match=r"got -1, allowed 0 to 2\*\*64 - 1\.$"):
        cosine_decay(0.1, 10)(-1)


@pytest.mark.parametrize("step", [-1, 1.5, 2**64, "one", None, mx.array(1.0), mx.array(True)])
def test_bad_steps_raise(step):
    with pytest.raises(
        (ValueError, TypeError), match=r"^\[cosine_decay\] .*step must be|out of range"
    ):
        cosine_decay(0.1, 10)(step)


# ---- Outside the kernel ----------------------------------------------------------


def test_nine_segments():
    assert not NINE.in_kernel
    assert repr(NINE) == (
        f"<join_schedules([{', '.join(f'constant({i}.0)' for i in range(9))}], "
        "[10, 20, 30, 40, 50, 60, 70, 80]), evaluated by MLX operations because it has 9 "
        "segments, and the kernel takes 8>"
    )
    steps = mx.arange(100)
    assert NINE(steps).tolist() == [min(t // 10, 8) for t in range(100)]
    assert NINE(mx.array(np.array([2**63, 2**64 - 1], np.uint64))).tolist() == [8, 8]
    assert pickle.loads(pickle.dumps(NINE)) == NINE
    assert hash(NINE) == hash(pickle.loads(pickle.dumps(NINE)))
    half = scaled(NINE, 0.5)
    assert mx.array_equal(half(steps), NINE(steps) * 0.5)
    assert "evaluated by MLX operations because it has 9 segments" in repr(half)
    late = warmup(NINE, 10, 5.0)
    assert late(mx.array([0, 4, 10, 20, 200])).tolist() == [5, 3, 0, 1, 8]
    assert not late.in_kernel


def test_eight_segments_are_in_the_kernel():
    eight = join_schedules([constant(i) for i in range(8)], [10 * i for i in range(1, 8)])
    assert eight.in_kernel
    steps = mx.arange(80)
    assert mx.array_equal(eight(steps), NINE(steps))


def test_what_is_never_seen_takes_no_segment():
    tail = join_schedules([constant(i) for i in range(5)], [10, 20, 30, 40])
    both = join_schedules([tail, tail], [15])
    assert both.in_kernel  # 2 + 5 of the 10 segments
    assert both(mx.array([0, 14, 15, 24, 25, 60])).tolist() == [0, 1, 0, 0, 1, 4]


@pytest.mark.parametrize("power", [1.0, 2.5])
def test_a_length_that_is_not_whole(power):
    """As in mlx.optimizers; MLX operations evaluate it, in float32."""
    steps = np.array([0, 1, 50, 99, 100, 1000, 2**40], np.uint64)
    progress = np.minimum(steps / 99.9, 1)
    line = linear_schedule(0.25, 0.75, 99.9)
    wave = cosine_decay(1.0, 99.9, end=0.5, exponent=power)
    left = (0.5 * (1 + np.cos(np.pi * progress))) ** power
    # Six float32 operations on numbers below 1, and the cosine's and the power's own errors.
    for schedule, want in ((line, 0.25 + 0.5 * progress), (wave, 0.5 + 0.5 * left)):
        np.testing.assert_allclose(np.array(schedule(mx.array(steps))), want, atol=2**-20)
        assert not schedule.in_kernel
        assert repr(schedule).endswith("because its length is not a whole number>")
        assert pickle.loads(pickle.dumps(schedule)) == schedule
        assert schedule(10**6).item() == want[-1]  # reached exactly
    assert cosine_decay(1.0, 99.0) == cosine_decay(1.0, 99)
    theirs = mlx.optimizers.cosine_decay(0.1, 99.9)
    optimizer = optim.SGD(cosine_decay(0.1, 99.9))
    w = {"w": mx.ones(2)}
    for step in range(3):
        w = optimizer.apply_gradients({"w": mx.ones(2)}, w)
        want = theirs(mx.array(step)).item()
        assert optimizer.learning_rate.item() == pytest.approx(want, rel=2**-20)


def test_a_warmup_without_a_step():
    schedule = cosine_decay(0.5, 10)
    assert warmup(schedule, 0) is schedule
    assert warmup(halving, 0, start=0.25)(mx.array([0, 1, 2])).tolist() == [1, 0.5, 0.25]
    assert pickle.loads(pickle.dumps(warmup(halving, 0))) == warmup(halving, 0)


def test_both_ends_of_a_line_are_scaled():
    schedule = scaled(linear_schedule(2.0, 4.0, 4), 0.5)
    assert [schedule(step).item() for step in (0, 2, 4)] == [1.0, 1.5, 2.0]


def test_a_python_function_as_a_member():
    schedule = join_schedules([halving, constant(3.0)], [4])
    assert not schedule.in_kernel
    assert repr(schedule).endswith(
        "evaluated by MLX operations because a member is a Python function>"
    )
    assert schedule(mx.array([0, 1, 3, 4, 9])).tolist() == [1, 0.5, 0.125, 3, 3]
    assert schedule(2).item() == 0.25
    assert pickle.loads(pickle.dumps(schedule)) == schedule
    shifted = join_schedules([constant(3.0), halving], [4])
    assert shifted(mx.array([0, 3, 4, 5])).tolist() == [3, 3, 1, 0.5]
    assert warmup(halving, 4)(mx.array([0, 2, 4, 5])).tolist() == [0, 0.5, 1, 0.5]
    doubled = scaled(halving, 2)
    assert doubled(mx.array([0, 1])).tolist() == [2, 1]
    assert doubled == scaled(halving, 2)
    assert join_schedules([lambda step: 0.1, constant(1)], [2])(mx.arange(3)).tolist() == [
        np.float32(0.1).item(),
        np.float32(0.1).item(),
        1,
    ]


@pytest.mark.parametrize("schedule", [NINE, join_schedules([halving, NINE], [2])])
def test_outside_the_kernel_in_a_step(schedule):
    """The kernel gets its value as an array."""
    assert isinstance(schedule, Schedule)
    optimizer = optim.SGD(learning_rate=schedule, momentum=0.0)
    w = {"w": mx.array([1.0, 2.0])}
    for step in range(14):
        updated = optimizer.apply_gradients({"w": mx.ones(2)}, w)
        assert optimizer.learning_rate.item() == schedule(step).item()
        assert mx.array_equal(updated["w"], w["w"] - schedule(step))
        w = updated
