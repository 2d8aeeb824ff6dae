"""Every schedule is within 2 ulp (float32) of its float64 value, at any step up to 2^32.

The oracles are written here in float64, from the formulas of the docstrings. Ends are
weighed as one * w + zero * (1 - w), both terms without cancellation, so that the oracle
itself is good to some 2^-50.
"""

import math
from itertools import pairwise

import mlx.core as mx
import mlx.optimizers
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from mlx_fused_optim import (
    constant,
    cosine_decay,
    cosine_restarts,
    exponential_decay,
    inverse_sqrt,
    join_schedules,
    linear_schedule,
    multi_step,
    one_cycle,
    polynomial_decay,
    scaled,
    step_decay,
    triangular,
    warmup,
    warmup_stable_decay,
)

LAST = 2**32
settings.register_profile("schedules", deadline=None, derandomize=True, max_examples=60)
settings.load_profile("schedules")

# ---- Oracles ----------------------------------------------------------------------


def blend(one, zero, weight):
    w, rest = weight
    return one * w + zero * rest


def line(t, n):
    t = min(max(t, 0), n)
    return (n - t) / n, t / n  # integers: each rounded once


def wave(t, n):
    w, rest = line(t, n)
    return math.sin(math.pi / 2 * w) ** 2, math.sin(math.pi / 2 * rest) ** 2


def swapped(weight):
    return weight[1], weight[0]


def to_power(weight, p):
    w, rest = weight
    if w == 0 or rest == 0:
        return weight
    log = math.log1p(-rest) if rest < 0.5 else math.log(w)
    return math.exp(p * log), -math.expm1(p * log)


def ulp(value):
    return 2.0 ** max(math.frexp(value)[1] - 24, -149) if value else 2.0**-149


def unsigned(steps):
    return mx.array(np.array(steps, np.uint64))


def check(schedule, oracle, steps):
    """2 ulp of the float64 value, where that is a normal number of float32."""
    steps = sorted({min(max(int(t), 0), LAST) for t in steps})
    got = schedule(unsigned(steps)).tolist()
    for t, value in zip(steps, got, strict=True):
        want = oracle(t)
        if abs(want) > float(np.finfo(np.float32).max):
            assert math.isinf(value), (schedule, t)
        else:
            # GPUs may flush subnormal numbers to zero.
            bound = max(2 * ulp(want), 2.0**-126 if abs(want) < 2.0**-126 else 0)
            assert abs(value - want) <= bound, (schedule, t, value, want)


def around(*boundaries):
    """Both sides of each boundary, the first and the last step."""
    near = [b + d for b in (0, *boundaries, LAST) for d in (-2, -1, 0, 1, 2)]
    return near + [b // 2 + d for b in boundaries for d in (-1, 0, 1)]


def test_the_check_notices_float32():
    """A control: the same formula in float32 does not pass."""
    check(exponential_decay(0.1, 0.999999), lambda t: 0.1 * 0.999999**t, [10**6])
    mlx_schedule = mlx.optimizers.exponential_decay(0.1, 0.999999)
    with pytest.raises(AssertionError):
        check(mlx_schedule, lambda t: 0.1 * 0.999999**t, [10**6])


SPAN = 2**17
RATE = 1 - 2.0**-17


@pytest.mark.parametrize(
    ("schedule", "exact", "before_rounding"),
    [
        # exp2_parts: the excess to 2^-28, and it is less than half of the value.
        (exponential_decay(1.0, RATE), lambda x: np.exp2(x * SPAN * math.log2(RATE)), 2**-29),
        # Nothing but the excess, to 2^-28.
        (polynomial_decay(0.0, 1.0, 0.5, SPAN), lambda x: -np.expm1(np.log1p(-x) / 2), 2**-28),
        (polynomial_decay(0.0, 1.0, 1.5, SPAN), lambda x: -np.expm1(np.log1p(-x) * 1.5), 2**-28),
        # The sine to 2^-31, squared.
        (cosine_decay(0.0, SPAN, 1.0), lambda x: np.sin(math.pi / 2 * x) ** 2, 2**-30),
    ],
    ids=["exponential", "square root", "power", "cosine"],
)
def test_the_last_rounding_is_nearly_all_of_the_error(schedule, exact, before_rounding):
    """What csrc/math/elementary.h promises, on a range dense enough to meet it.

    2 ulp would let a wrong low half of a constant pass. An error of 2^-n before the last
    rounding adds at most 2^(24 - n) to its half ulp.
    """
    steps = np.arange(1, SPAN)
    want = exact(steps / SPAN)
    got = np.array(schedule(unsigned(steps))).astype(np.float64)
    error = np.abs(got - want) / 2.0 ** (np.frexp(want)[1] - 24)
    assert error.max() <= 0.5 + before_rounding * 2**24


# ---- Arguments ----------------------------------------------------------------------

values = st.one_of(st.just(0.0), st.floats(1e-9, 1e3), st.sampled_from([0.1, 1e-3, 1.0, 3e-4]))
positive = st.floats(1e-9, 1e3)
lengths = st.one_of(
    st.integers(1, 100),
    st.integers(1, LAST),
    st.sampled_from([1, 2, 3, 7, 1000, 2**24, 2**24 + 1, LAST - 1, LAST]),
)
some_steps = st.lists(st.integers(0, LAST), max_size=8)
powers = st.one_of(st.sampled_from([0.5, 1.0, 1.5, 2.0, 3.0]), st.floats(0.05, 8.0))
rates = st.one_of(
    st.floats(0.05, 1.5), st.sampled_from([0.9, 0.999, 0.999999, 0.999999999, 1.0, 1.0001])
)


@given(init=values, end=values, steps=lengths, more=some_steps)
@example(init=1e-4, end=0.0, steps=1000, more=[])
def test_linear_schedule(init, end, steps, more):
    schedule = linear_schedule(init, end, steps)
    check(schedule, lambda t: blend(init, end, line(t, steps)), around(steps) + more)


@given(init=values, end=values, steps=lengths, exponent=powers, more=some_steps)
def test_cosine_decay(init, end, steps, exponent, more):
    schedule = cosine_decay(init, steps, end, exponent=exponent)

    def oracle(t):
        return blend(init, end, to_power(wave(t, steps), exponent))

    check(schedule, oracle, around(steps) + more)


@given(init=values, end=values, power=powers, steps=lengths, begin=lengths, more=some_steps)
def test_polynomial_decay(init, end, power, steps, begin, more):
    schedule = polynomial_decay(init, end, power, steps, begin)

    def oracle(t):
        return blend(init, end, to_power(line(t - begin, steps), power))

    check(schedule, oracle, around(begin, begin + steps) + more)


@given(init=values, rate=rates, steps=lengths, begin=lengths, stairs=st.booleans(), more=some_steps)
def test_exponential_decay(init, rate, steps, begin, stairs, more):
    schedule = exponential_decay(
        init, rate, transition_steps=steps, transition_begin=begin, staircase=stairs
    )

    def oracle(t):
        t = max(t - begin, 0)
        # The power of a whole number of transitions is exact to an ulp; a root of the
        # rate goes through its logarithm.
        exponent = t // steps if stairs else t / steps
        log = exponent * math.log(rate)
        return init * (rate**exponent if log < 700 else math.inf) if init else 0.0

    check(schedule, oracle, around(begin, begin + steps) + more)


@given(init=positive, rate=rates, end=positive, more=some_steps)
def test_the_bound_of_an_exponential(init, rate, end, more):
    schedule = exponential_decay(init, rate, end=end)
    clip = max if rate < 1 else min

    def oracle(t):
        value = init * rate**t if t * math.log(rate) < 700 else math.inf
        return clip(value, end)

    check(schedule, oracle, around() + more)


@given(init=values, rate=rates, size=lengths, more=some_steps)
def test_step_decay(init, rate, size, more):
    def oracle(t):
        n = t // size
        return init * (rate**n if n * math.log(rate) < 700 else math.inf) if init else 0.0

    check(step_decay(init, rate, size), oracle, around(size, 2 * size) + more)


@given(peak=values, warm=st.one_of(st.just(0), lengths), scale=lengths, more=some_steps)
def test_inverse_sqrt(peak, warm, scale, more):
    def oracle(t):
        return peak * t / warm if t < warm else peak * math.sqrt(scale / (scale + t - warm))

    check(inverse_sqrt(peak, warm, scale), oracle, around(warm, warm + 3 * scale) + more)


@given(
    init=values, end=values, first=lengths, factor=st.sampled_from([1, 2, 3, 10]), more=some_steps
)
def test_cosine_restarts(init, end, first, factor, more):
    def oracle(t):
        length = first
        if factor == 1:
            t %= length
        while t >= length:
            t, length = t - length, length * factor
        return blend(init, end, wave(t, length))

    restarts = [first, first * (1 + factor), first * (1 + factor + factor**2)]
    schedule = cosine_restarts(init, first, end, cycle_multiplier=factor)
    check(schedule, oracle, around(*restarts) + more)


@given(
    base=values,
    peak=values,
    up=lengths,
    down=lengths,
    rate=st.sampled_from([1.0, 0.5, 0.9, 0.9999, 0.9999999]),
    every=st.sampled_from(["cycle", "step"]),
    more=some_steps,
)
def test_triangular(base, peak, up, down, rate, every, more):
    def oracle(t):
        cycle, within = divmod(t, up + down)
        n = cycle if every == "cycle" else t
        w, rest = swapped(line(within, up)) if within <= up else line(within - up, down)
        height, lost = rate**n, -math.expm1(n * math.log(rate))
        return blend(peak, base, (w * height, rest + w * lost))

    schedule = triangular(base, peak, up, down, decay_rate=rate, decay_every=every)
    check(schedule, oracle, around(up, up + down, 2 * up + down) + more)


@given(
    steps=st.integers(10, LAST),
    peak=positive,
    start=st.floats(0.15, 0.45),
    final=st.one_of(st.none(), st.floats(0.6, 0.85)),
    div=st.floats(1.5, 100),
    final_div=st.floats(2, 1e5),
    anneal=st.sampled_from(["linear", "cosine"]),
    more=some_steps,
)
def test_one_cycle(steps, peak, start, final, div, final_div, anneal, more):
    schedule = one_cycle(steps, peak, start, final, div, final_div, anneal=anneal)
    points = [(0, peak / div), (math.floor(start * steps * (1 + 2**-50)), peak)]
    if final is not None:
        points.append((math.floor(final * steps * (1 + 2**-50)), peak / div))
    points.append((steps, peak / (div * final_div)))

    def oracle(t):
        for (begin, value), (end, after) in pairwise(points):
            if t < end:
                weight = line if anneal == "linear" else wave
                return blend(value, after, weight(t - begin, end - begin))
        return points[-1][1]

    check(schedule, oracle, around(*(step for step, _ in points)) + more)


WSD = ["linear", "cosine", "1-sqrt"]


@given(
    peak=values,
    ends=st.tuples(values, values),
    parts=st.tuples(lengths, st.integers(0, 10**6), lengths),
    types=st.tuples(st.sampled_from(WSD), st.sampled_from(WSD)),
    more=some_steps,
)
def test_warmup_stable_decay(peak, ends, parts, types, more):
    (init, end), (rise, stable, fall) = ends, parts
    schedule = warmup_stable_decay(
        peak,
        rise,
        stable,
        fall,
        init_value=init,
        end_value=end,
        warmup_type=types[0],
        decay_type=types[1],
    )

    def oracle(t):
        if t < rise:
            weight = (wave if types[0] == "cosine" else line)(t, rise)
            return blend(init, peak, to_power(weight, 0.5) if types[0] == "1-sqrt" else weight)
        weight = (wave if types[1] == "cosine" else line)(t - rise - stable, fall)
        if types[1] == "1-sqrt":
            return blend(end, peak, to_power(swapped(weight), 0.5))
        return blend(peak, end, weight)

    check(schedule, oracle, around(rise, rise + stable, rise + stable + fall) + more)


@given(
    init=positive,
    boundaries=st.lists(lengths, max_size=12, unique=True).map(sorted),
    scale=st.floats(0.1, 2.0),
)
def test_multi_step(init, boundaries, scale):
    def oracle(t):
        value = init
        for boundary in boundaries:
            value *= scale if boundary <= t else 1
        return value

    schedule = multi_step(init, boundaries, scale)
    assert schedule.in_kernel == (len(boundaries) < 8)
    check(schedule, oracle, around(*boundaries))


@given(peak=positive, start=values, warm=lengths, steps=lengths, factor=st.floats(0, 10))
def test_combinators(peak, start, warm, steps, factor):
    schedule = scaled(warmup(cosine_decay(peak, steps), warm, start), factor)

    def oracle(t):
        if t < warm:
            return factor * blend(start, peak, line(t, warm))
        return factor * blend(peak, 0.0, wave(t - warm, steps))

    check(schedule, oracle, around(warm, warm + steps))


@given(
    parts=st.lists(st.tuples(positive, positive, st.integers(1, 1000)), min_size=2, max_size=12),
    gap=st.integers(1, 2000),
)
def test_joins_nest(parts, gap):
    """A join of joins is the join of all, in the kernel or not."""
    members = [linear_schedule(init, end, steps) for init, end, steps in parts]
    boundaries = [gap * (i + 1) for i in range(len(members) - 1)]
    flat = join_schedules(members, boundaries)
    head = join_schedules(members[:1], [])
    tail = join_schedules(members[1:], boundaries[: len(members) - 2])
    nested = join_schedules([head, tail], [gap])
    steps = mx.array(around(*boundaries)[5:], mx.int64)
    assert flat.in_kernel == nested.in_kernel == (len(members) <= 8)
    assert mx.array_equal(flat(steps), nested(steps))

    def oracle(t):
        i = min(t // gap, len(parts) - 1)
        init, end, length = parts[i]
        return blend(init, end, line(t - i * gap, length))

    check(flat, oracle, around(*boundaries))


# ---- Ends and order -----------------------------------------------------------------


@given(init=values, end=values, steps=lengths, power=powers, wavy=st.booleans())
def test_ends_are_exact_and_never_passed(init, end, steps, power, wavy):
    if wavy:
        schedule = cosine_decay(init, steps, end, exponent=power)
    else:
        schedule = polynomial_decay(init, end, power, steps)
    at = unsigned([0, steps, steps + 1, 2 * steps, 2**48, 2**64 - 1])
    assert schedule(at).tolist() == np.float32([init, *[end] * 5]).tolist()
    low, high = sorted(np.float32([init, end]).tolist())
    inside = schedule(mx.array([t for t in around(steps) if 0 <= t <= steps], mx.uint64))
    assert low <= inside.min().item() <= inside.max().item() <= high


@pytest.mark.parametrize(
    ("make", "init", "end", "steps", "at"),
    [
        (cosine_decay, "0x1.9f10b1p-2", "0x1.9f10b038e8f5fp-2", 27050, 3),
        (linear_schedule, "0x1.47f497p-15", "0x1.47f4980953f7ep-15", 607136888306255, 1),
    ],
)
def test_no_rounding_passes_an_end(make, init, end, steps, at):
    """An end half-way between two numbers of float32: found to round past it unclamped."""
    init, end = float.fromhex(init), float.fromhex(end)
    arguments = (init, steps, end) if make is cosine_decay else (init, end, steps)
    low, high = sorted(np.float32([init, end]).tolist())
    assert low <= make(*arguments)(at).item() <= high


@pytest.mark.parametrize("steps", [1, 2, 10, 999, 1000, 12345])
@pytest.mark.parametrize(
    "make",
    [
        lambda n: linear_schedule(0.1, 1e-5, n),
        lambda n: linear_schedule(0.1, 0.0, n),
        lambda n: cosine_decay(0.1, n, 1e-5),
        lambda n: cosine_decay(0.3, n),
        lambda n: polynomial_decay(0.1, 0.0, 2, n),
        lambda n: polynomial_decay(0.1, 0.01, 0.5, n),
        lambda n: exponential_decay(0.1, 0.5, transition_steps=n),
        lambda n: inverse_sqrt(0.1, 0, n),
        lambda n: warmup_stable_decay(0.1, 0, 0, n, decay_type="1-sqrt"),
    ],
)
def test_a_fall_never_rises(make, steps):
    rates = np.array(make(steps)(mx.arange(3 * steps + 2)))
    assert (np.diff(rates) <= 0).all()


@pytest.mark.parametrize(
    "schedule",
    [
        exponential_decay(0.1, 0.9),
        exponential_decay(0.1, 0.9, transition_begin=2**60),
        step_decay(0.1, 0.9, 2**60),
        linear_schedule(0.0, 1.0, 2**60),
        cosine_decay(0.1, 2**60),
        polynomial_decay(0.1, 0.0, 2, 2**60, 2**60),
        inverse_sqrt(0.1, 2**60, 2**60),
        cosine_restarts(0.1, 1, cycle_multiplier=65535),
        cosine_restarts(0.1, 2**60, cycle_multiplier=65535),
        triangular(0.0, 0.1, 2**60, 2**60, decay_rate=0.9, decay_every="step"),
        join_schedules([constant(0.1), cosine_decay(0.1, 2**60)], [2**60]),
    ],
    ids=str,
)
def test_no_step_wraps_around(schedule):
    steps = [0, 1, 2**32, 2**48 - 1, 2**48, 2**60 - 1, 2**60, 2**61, 2**63, 2**64 - 1]
    rates = schedule(unsigned(steps)).tolist()
    assert all(0 <= rate <= 1 for rate in rates)


def test_a_line_through_zero():
    """Ends of different signs cancel: the error is then that of the larger end, 2^-44."""
    schedule = linear_schedule(-0.1, 0.1, 1000)
    steps = np.arange(1001)
    got = np.array(schedule(mx.array(steps)), np.float64)
    want = -0.1 * (1 - steps / 1000) + 0.1 * (steps / 1000)
    assert (abs(got - want) <= 2.0**-23 * abs(want) + 0.1 * 2.0**-44).all()
