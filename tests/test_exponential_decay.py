"""exponential_decay: the values of float64 to 2 ulp, at every step up to 2^32."""

import json
import math
from pathlib import Path

import mlx.core as mx
import mlx.optimizers
import mlx_fused_optim as optim
import numpy as np
import pytest
from bits import SMALLEST_NORMAL, keeps_subnormals
from hypothesis import example, given, settings
from hypothesis import strategies as st
from mlx_fused_optim import exponential_decay

DATA = Path(__file__).parent / "data"
RECORDS = json.loads((DATA / "schedules" / "exponential_decay.json").read_text())["records"]
ERRORS = json.loads((DATA / "mlx_exponential_decay_error.json").read_text())["rates"]

TINY = 2.0**-149
LARGEST = float(np.finfo(np.float32).max)
LAST_STEP = 2**32


def ulps(got, exact: float) -> float:
    """Distance in units of the last place of the float32 nearest to ``exact``.

    Infinity counts as 2^128, the number that would come after the largest.
    """
    got, exact = (max(-(2.0**128), min(2.0**128, float(x))) for x in (got, exact))
    nearest = np.float32(max(-LARGEST, min(LARGEST, exact)))
    return abs(got - exact) / (float(nearest) - float(np.nextafter(nearest, np.float32(0))) or TINY)


def exact_value(
    init, rate, step, transition_steps=1, transition_begin=0, staircase=False, end=None
):
    """In float64; good to some 2^-45, far below half a float32 ulp of 2^-24."""
    elapsed = max(step - transition_begin, 0)
    exponent = elapsed // transition_steps if staircase else elapsed / transition_steps
    # The power alone may leave float64 where the value does not.
    half = rate ** (exponent / 2) if abs(math.log2(rate) * exponent) < 1600 else (
        0.0 if rate < 1 else math.inf
    )  # fmt: skip
    value = init * half * half if init else 0.0
    if end is not None:
        value = max(value, end) if rate < 1 else min(value, end)
    return value


def values(schedule, steps) -> np.ndarray:
    return np.array(schedule(mx.array(np.array(steps, np.uint64))))


# ---- Against exact values ------------------------------------------------------------

rates = st.one_of(
    st.floats(1e-3, 1, exclude_max=True),
    st.floats(1, 4),
    st.floats(-12, -1).map(lambda x: 1 - 10.0**x),
    st.floats(-12, -1).map(lambda x: 1 + 10.0**x),
)
steps = st.one_of(
    st.integers(0, LAST_STEP),
    st.integers(0, 5000),
    st.integers(0, 31).flatmap(lambda k: st.integers(2**k - 1, 2**k + 1)),
    st.sampled_from([0, 1, 2**24 - 1, 2**24, 2**24 + 1, LAST_STEP - 1, LAST_STEP]),
)


def is_close(value, exact) -> bool:
    """2 ulp; where subnormals are zeros, anything between is as good as they."""
    if exact < SMALLEST_NORMAL and not keeps_subnormals():
        return 0 <= value <= SMALLEST_NORMAL
    return ulps(value, exact) <= 2


# Without the ends of float32's range, where init itself is subnormal or its product with
# the power overflows.
@settings(max_examples=500)
@given(
    st.floats(1e-30, 1e30),
    rates,
    steps,
    st.one_of(st.just(1), st.integers(1, 10**6), st.integers(1, 2**40)),
    st.one_of(st.just(0), st.integers(0, LAST_STEP)),
    st.booleans(),
    st.one_of(st.none(), st.floats(1e-30, 1e30)),
)
@example(0.1, 0.99999999, LAST_STEP, 1, 0, False, None)
@example(0.1, 0.9, 987, 1, 0, False, None)  # subnormal
@example(0.1, 0.9, 5, 1, 7, False, None)  # before the beginning
def test_two_ulp(init, rate, step, transition_steps, transition_begin, staircase, end):
    keywords = {
        "transition_steps": transition_steps,
        "transition_begin": transition_begin,
        "staircase": staircase,
        "end": end,
    }
    schedule = exponential_decay(init, rate, **keywords)
    value = schedule(step)
    assert value.dtype == mx.float32
    assert value.shape == ()
    exact = exact_value(init, rate, step, **keywords)
    assert is_close(value.item(), exact)


@pytest.mark.parametrize("rate", [0.9, 0.999, 0.999999, 0.99999999, 1.0, 1.0001, 1.5])
def test_a_dense_range_of_steps(rate):
    """Every step around the places where a counter in float32 would fail."""
    near = [k + d for k in (0, 2**12, 2**24, 2**31, LAST_STEP - 64) for d in range(65)]
    got = values(exponential_decay(0.3, rate), near)
    worst = max(ulps(g, exact_value(0.3, rate, s)) for s, g in zip(near, got, strict=True))
    assert worst <= 2


def test_underflow_is_gradual():
    """Through the subnormals to zero, without a jump."""
    got = values(exponential_decay(1.0, 0.5), range(120, 155))
    last = 149 if keeps_subnormals() else 126
    assert got.tolist() == [2.0**-s if s <= last else 0.0 for s in range(120, 155)]


def test_overflow_is_infinity():
    assert values(exponential_decay(1.0, 2.0), [127, 128, 2**20]).tolist() == [
        2.0**127,
        math.inf,
        math.inf,
    ]


def test_staircase_is_constant_within_a_transition():
    schedule = exponential_decay(0.2, 0.9, transition_steps=3, staircase=True)
    got = values(schedule, range(12)).reshape(4, 3)
    assert (got == got[:, :1]).all()
    assert (np.diff(got[:, 0]) < 0).all()


def test_steps_beyond_the_promise():
    """From 2^48 on the step is rounded to 48 bits: no wrap, no NaN."""
    schedule = exponential_decay(1.0, 1 - 2.0**-45)
    far = values(schedule, [2**48 - 1, 2**48, 2**50, 2**63, 2**64 - 1])
    for value, exponent in zip(far, (-8, -8, -32, -(2**18), -(2**19)), strict=True):
        assert ulps(value, math.exp(exponent)) <= 2


@pytest.mark.parametrize("dtype", [mx.uint8, mx.int32, mx.int64, mx.uint32, mx.uint64], ids=str)
def test_any_integer_step(dtype):
    schedule = exponential_decay(0.1, 0.9)
    steps_ = mx.array([[0, 1], [2, 100]], dtype)
    got = schedule(steps_)
    assert got.shape == (2, 2)
    assert np.array_equal(np.array(got), values(schedule, [[0, 1], [2, 100]]))
    # A layout that is not contiguous.
    assert np.array_equal(np.array(schedule(steps_.T)), np.array(got).T)


def test_negative_steps_count_as_zero():
    assert exponential_decay(0.1, 0.9)(mx.array([-5, -1, 0])).tolist() == [np.float32(0.1)] * 3


def test_schedule_under_transforms():
    schedule = exponential_decay(1.0, 0.5)
    assert mx.compile(lambda s: schedule(s))(mx.array(3)).item() == 0.125
    assert mx.vmap(schedule)(mx.array([1, 2])).tolist() == [0.5, 0.25]
    assert mx.vmap(schedule, in_axes=1)(mx.array([[1, 2]])).tolist() == [[0.5], [0.25]]
    assert mx.grad(lambda x: x * schedule(mx.array(1)))(mx.array(2.0)).item() == 0.5


# ---- Against recorded values -------------------------------------------------------------


def arguments_of(record):
    """The record's schedule in our arguments; None where the peer's rules are not ours."""
    given = record["arguments"]
    if record["name"] == "exponential_decay" and record["peer"] == "mlx":
        return (given["init"], given["decay_rate"]), {}
    if record["name"] == "ExponentialLR":
        return (given["lr"], given["gamma"]), {}
    if record["name"] == "exponential_decay" and record["peer"] == "optax":
        if given["transition_steps"] < 1 or given["decay_rate"] <= 0:
            return None  # optax means "constant"; here it is an error
        return (given["init_value"], given["decay_rate"]), {
            "transition_steps": given["transition_steps"],
            "transition_begin": max(given["transition_begin"], 0),  # optax's own rule
            "staircase": given["staircase"],
            "end": given["end_value"],
        }
    return None  # with a warm-up


COMPARABLE = [r for r in RECORDS if arguments_of(r)]


def test_the_records_are_used():
    assert {r["peer"] for r in COMPARABLE} == {"mlx", "optax", "torch"}
    assert len(COMPARABLE) >= 20


@pytest.mark.parametrize("record", COMPARABLE, ids=lambda r: f"{r['peer']}-{r['id'][-3:]}")
def test_recorded_values(record):
    arguments, keywords = arguments_of(record)
    recorded = [(s, float(x)) for s, x in record["exact"] if s <= LAST_STEP]
    assert len(recorded) > 10
    got = values(exponential_decay(*arguments, **keywords), [s for s, _ in recorded])
    for (step, exact), value in zip(recorded, got, strict=True):
        assert is_close(value, exact), step
    # What the peer itself gave, as far as the record says that it is exact.
    theirs = {s: float(x) for s, x in record["values"]}
    scale = max(abs(x) for _, x in recorded if math.isfinite(x))
    allowed = float(record["max_difference"])
    if math.isfinite(allowed):
        for (step, _), value in zip(recorded, got, strict=True):
            if step in theirs:
                assert abs(float(value) - theirs[step]) <= (allowed + 2 * 2.0**-23) * scale


@pytest.mark.parametrize("row", ERRORS, ids=lambda r: str(r["decay_rate"]))
def test_the_error_of_mlx_is_not_ours(row):
    columns = ("step", "mlx", "exact", "relative_error", "of_pow", "in_range")
    schedule = exponential_decay(1.0, row["decay_rate"])
    for entry in row["rows"]:
        cell = dict(zip(columns, entry, strict=True))
        if cell["in_range"]:
            got = values(schedule, [cell["step"]])[0]
            assert abs(float(got) / float(cell["exact"]) - 1) <= 2 * 2.0**-23


def test_mlx_loses_the_rate():
    """The reason for the above, live: if MLX mends it, its table and docs should go."""
    step = mx.array(10_000_000, mx.uint64)
    exact = 0.1 * 0.999999**10_000_000
    theirs = mlx.optimizers.exponential_decay(0.1, 0.999999)(step).item()
    ours = exponential_decay(0.1, 0.999999)(step).item()
    assert abs(theirs / exact - 1) > 0.1
    assert abs(ours / exact - 1) < 3e-7
    assert mlx.optimizers.exponential_decay(0.1, 0.99999999)(step).item() == np.float32(0.1)
    assert exponential_decay(0.1, 0.99999999)(step).item() == pytest.approx(0.1 * math.exp(-0.1))


def test_with_two_arguments_it_is_the_schedule_of_mlx():
    """Where MLX's own rounding of the rate stays small."""
    theirs, ours = mlx.optimizers.exponential_decay(0.1, 0.9), exponential_decay(0.1, 0.9)
    for step in range(50):
        counter = mx.array(step, mx.uint64)
        # The rate's rounding grows with the step; 0.9 is 2.7e-8 off.
        assert ours(counter).item() == pytest.approx(theirs(counter).item(), rel=3e-8 * (step + 8))


# ---- The step uses it ----------------------------------------------------------------------


@pytest.mark.parametrize("first", [0, 1, 2**24 + 1, 2**32])
def test_the_kernel_uses_the_value_at_its_own_counter(first):
    """From any counter: a gradient of 1 shows the rate that the kernel used."""
    schedule = exponential_decay(0.5, 0.99999999, transition_steps=3, staircase=True, end=0.01)
    optimizer = optim.SGD(schedule)
    optimizer.state["step"] = mx.array(first, mx.uint64)
    for step in range(first, first + 4):
        moved = optimizer.apply_gradients({"w": mx.ones(3)}, {"w": mx.zeros(3)})["w"]
        want = schedule(step).item()
        assert moved.tolist() == [-want] * 3
        assert optimizer.learning_rate.item() == want
        assert optimizer.step.item() == step + 1


def test_the_documented_example():
    """mlx.optimizers.exponential_decay's own, to the letter."""
    lr_schedule = optim.exponential_decay(1e-1, 0.9)
    optimizer = optim.SGD(learning_rate=lr_schedule)
    assert repr(optimizer.learning_rate) == "array(0.1, dtype=float32)"
    for _ in range(5):
        optimizer.update({}, {})
    assert repr(optimizer.learning_rate) == "array(0.06561, dtype=float32)"


# ---- A value -------------------------------------------------------------------------------


def test_it_is_a_value():
    import copy
    import pickle

    schedule = exponential_decay(0.1, 0.9, transition_steps=7, end=0.01)
    assert repr(schedule) == "exponential_decay(0.1, 0.9, transition_steps=7, end=0.01)"
    for twin in (copy.deepcopy(schedule), pickle.loads(pickle.dumps(schedule)),
                 eval(repr(schedule))):  # fmt: skip
        assert twin == schedule
        assert hash(twin) == hash(schedule)
        assert np.array_equal(values(twin, range(20)), values(schedule, range(20)))
    assert schedule != exponential_decay(0.1, 0.9, transition_steps=7)
    assert schedule != "exponential_decay"
