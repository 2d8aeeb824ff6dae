"""Rounding of what a step stores: to nearest, and at random.

The rounding at random is held against the independent one of full_references.py bit for
bit, for every number of a half type and what lies between them. That one is then shown to
have the right mean for all of its random bits, so that statistics are needed only for the
bits themselves: positions, steps, seeds, arenas.
"""

import math
import os
import subprocess
import sys

import mlx.core as mx
import mlx_fused_optim as optim
import numpy as np
import pytest
from bits import DTYPES, keeps_subnormals, narrowed, of_mlx, one_nan, same, to_mlx, widened
from full_references import (
    FORMATS,
    arenas_of,
    neighbours,
    random_words,
    round_at_random,
    round_to_nearest,
)
from full_step import Full, first_state, full_step

HALF = ["float16", "bfloat16"]
every_half = pytest.mark.parametrize("dtype", HALF)


def between(dtype: str) -> np.ndarray:
    """Every number of ``dtype`` and, in float32, what lies between it and the next: the middle
    and its neighbours, quarters, the float32 next to it; what overflows; infinities, NaN."""
    every = widened(np.arange(2**16, dtype=np.uint16), dtype)
    finite = np.unique(every[np.isfinite(every)].astype(np.float64))
    gaps = finite[1:] - finite[:-1]
    parts = [finite[:-1] + gaps * part for part in (0.25, 0.5, 0.625)]
    middle = parts[1].astype(np.float32)
    largest = np.float32(finite[-1])
    top = np.float32((2 - 2.0 ** -(FORMATS[dtype].digits + 1)) * 2.0 ** FORMATS[dtype].most)
    edges = [largest, top, *(np.nextafter(top, np.float32(x)) for x in (0, np.inf)), 3.4e38]
    edges += [np.nextafter(largest, np.float32(np.inf)), 1e-45, 1e-40, 2.0**-25, 2.0**-24, 0.0]
    if dtype == "float16":
        edges += [65535.99, 65536.0, 65520.0, 1e-30, 3e-8, 5.9e-8]
    nans = np.array([0x7F800001, 0x7FFFFFFF, 0xFFFFFFFF, 0xFF800100], np.uint32).view(np.float32)
    signed = np.array(edges, np.float32)
    finite_numbers = every[np.isfinite(every)]
    return np.concatenate(
        [every, *parts, np.nextafter(middle, np.float32(np.inf)),
         np.nextafter(middle, np.float32(-np.inf)),
         np.nextafter(finite_numbers, np.float32(np.inf)),
         signed, -signed, nans, np.array([np.inf, -np.inf], np.float32)],
        dtype=np.float32, casting="unsafe",
    )  # fmt: skip


def exists(values: np.ndarray) -> np.ndarray:
    """Which float32 numbers every device has: Apple's GPUs flush subnormal ones to zero."""
    subnormal = (np.abs(values) < 2.0**-126) & (values != 0)
    return ~(subnormal & mx.metal.is_available())


def without_minus_zero(values: np.ndarray) -> np.ndarray:
    """A difference that is zero is never -0.0."""
    return np.where(values == 0, np.float32(0), values)


def numbers_between(dtype: str) -> np.ndarray:
    values = without_minus_zero(between(dtype))
    return values[exists(values)]


def stored(values: np.ndarray, dtype: str, options: Full, step: int = 0) -> np.ndarray:
    """The bits that a step stores for these float32 numbers: parameters that begin at zero
    and move by the gradient's negative; the rate is 1."""
    zero = mx.zeros(values.shape, DTYPES[dtype])
    # Another sign: 0 - (-x) is x; but -0.0 becomes 0.0.
    gradient = mx.array(-values)
    state = first_state(options, [zero], step)
    (parameter,), _ = full_step(options, [zero], [gradient], state, 1.0)
    return of_mlx(parameter)


def stored_velocity(values: np.ndarray, dtype: str, options: Full, step: int = 0) -> np.ndarray:
    """The same of a velocity of ``dtype`` of a float32 parameter, which begins at zero."""
    zero = mx.zeros(values.shape)
    state = first_state(options, [zero], step)
    _, state = full_step(options, [zero], [mx.array(values)], state, 1.0)
    return of_mlx(state.slots[0][0])[: values.size]


def words(dtype: str, size: int, seed: int, step: int) -> np.ndarray:
    (arena,) = arenas_of([(size,)], [dtype])
    return random_words(seed, step, arena.fingerprint, np.arange(size))


# ---- Bits ------------------------------------------------------------------------------


@every_half
def test_to_nearest(dtype):
    """In the full kernel; maximize makes the step one that is not plain."""
    values = numbers_between(dtype)
    got = stored(-values, dtype, Full(maximize=True))
    assert np.array_equal(one_nan(got, dtype), one_nan(narrowed(values, dtype), dtype))


@every_half
@pytest.mark.parametrize("seed", [0, 1, 2**64 - 1])
def test_at_random(dtype, seed):
    values = numbers_between(dtype)
    got = stored(values, dtype, Full(stochastic=True, seed=seed), step=seed % 7)
    random = words(dtype, values.size, seed, seed % 7)
    want = narrowed(round_at_random(values, dtype, random), dtype)
    assert np.array_equal(one_nan(got, dtype), one_nan(want, dtype))


@every_half
@pytest.mark.parametrize("seed", [0, 12345])
def test_a_velocity_at_random(dtype, seed):
    """By the upper half of the random bits. -0.0 is added to zero times momentum."""
    values = numbers_between(dtype)
    options = Full(momentum=0.9, stochastic=True, seed=seed, state_dtype=dtype)
    got = stored_velocity(values, dtype, options, step=3)
    random = words("float32", values.size, seed, 3) >> 16
    want = narrowed(round_at_random(values, dtype, random), dtype)
    assert np.array_equal(one_nan(got, dtype), one_nan(want, dtype))


@every_half
@pytest.mark.parametrize("stochastic", [False, True])
def test_numbers_of_the_type_stay(dtype, stochastic):
    """Zero of either sign, subnormal numbers and infinities too."""
    every = np.arange(2**16, dtype=np.uint16)
    every = every[exists(widened(every, dtype))]
    parameter, zero = to_mlx(every, dtype), mx.zeros(every.shape)
    options = Full(stochastic=stochastic, seed=3, maximize=not stochastic)
    (after,), _ = full_step(options, [parameter], [zero], first_state(options, [parameter]), 1.0)
    want = one_nan(every, dtype)
    if not stochastic:
        with np.errstate(invalid="ignore"):  # the signalling NaN
            want = widened(every, dtype) - np.float32(-0.0)
        want = one_nan(narrowed(want, dtype), dtype)
    assert np.array_equal(one_nan(of_mlx(after), dtype), want)


COMPOSED = """
import os, sys
sys.path.insert(0, sys.argv[1])
import numpy as np, mlx.core as mx
import test_rounding as t
from bits import of_mlx, to_mlx
from full_step import Full, first_state, full_step
found = []
for dtype in t.HALF:
    values = t.between(dtype)
    found.append(t.stored(values, dtype, t.Full(stochastic=True, seed=5), 2))
    found.append(t.stored_velocity(
        values, dtype, t.Full(momentum=0.9, stochastic=True, seed=5, state_dtype=dtype), 2))
    every = to_mlx(np.arange(2**16, dtype=np.uint16), dtype)
    options = t.Full(stochastic=True, seed=3)
    zero = mx.zeros(every.shape)
    (after,), _ = full_step(options, [every], [zero], first_state(options, [every]), 1.0)
    found.append(of_mlx(after))
np.savez(sys.argv[2], *found)
"""


def test_the_composed_way_has_the_same_bits(tmp_path):
    results = []
    for composed in ("0", "1"):
        output = tmp_path / f"{composed}.npz"
        environment = {
            **os.environ,
            "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
            "MLX_FUSED_OPTIM_COMPOSED": composed,
        }
        command = [sys.executable, "-c", COMPOSED, os.path.dirname(__file__), str(output)]
        subprocess.run(command, check=True, env=environment, timeout=300)
        results.append(np.load(output))
    for i, name in enumerate(results[0].files):
        dtype = HALF[i // 3]
        kernel, operations = (one_nan(found[name], dtype) for found in results)
        assert np.array_equal(kernel, operations), i


# ---- The mean, for all random bits --------------------------------------------------------


@every_half
def test_the_mean_is_the_number(dtype):
    """Over all 2^16 random numbers: exactly, but for float16's subnormal numbers, where
    2^16 of them decide about up to 24 bits and the mean is off by less than 2^-16 units."""
    random = np.random.default_rng(1)
    form = FORMATS[dtype]
    exponents = random.integers(form.least - form.digits - 3, form.most - 1, 60)
    values = np.ldexp(random.uniform(1, 2, 60), exponents).astype(np.float32)
    values *= random.choice(np.float32([-1, 1]), 60)
    every = np.arange(2**16, dtype=np.uint32)
    for x in values:
        rounded = round_at_random(np.full(2**16, x), dtype, every).astype(np.float64)
        lower, upper, _ = neighbours(np.float32([x]), dtype)
        assert set(np.abs(rounded)) <= {lower[0], upper[0]}
        off = rounded.mean() - np.float64(x)
        unit = upper[0] - lower[0]
        if dtype == "float16" and abs(x) < 2.0**form.least:
            assert 0 <= off * np.sign(x) < unit * 2.0**-16
        elif dtype == "float16":
            assert off == 0  # 13 bits are cut off, and 13 decide
        else:
            assert off == 0  # likewise 16


def test_random_bits_are_a_bijection():
    """Of positions: over 2^20 neighbours no 32-bit number comes twice, and every 12 bits of
    a block of 2^20 come about as often: chi-squared within 5 sigma."""
    for seed, step in ((0, 0), (1, 0), (0, 1), (2**63, 2**40)):
        random = random_words(seed, step, 99, np.arange(2**20))
        assert np.unique(random).size == 2**20
        for shift in (0, 4, 16, 20):
            counts = np.bincount(random >> np.uint32(shift) & 4095, minlength=4096)
            expected = 2**20 / 4096
            chi = ((counts - expected) ** 2 / expected).sum()
            # 4095 degrees of freedom: this mean, this variance times two.
            assert abs(chi - 4095) < 5 * math.sqrt(2 * 4095), (seed, step, shift, chi)


# ---- Statistics of the kernel ---------------------------------------------------------------

SIZE = 1 << 16


def ups(dtype: str, seed: int = 0, step: int = 0, part: float = 0.5, size: int = SIZE):
    """1 where 1 + part * (distance to the next number) was rounded up, else 0, for each
    position; of the parameter and of the velocity. ``part`` must have few bits."""
    distance = 2.0 ** -FORMATS[dtype].digits
    value = np.float32(1 + part * distance)
    options = Full(momentum=0.0, stochastic=True, seed=seed)
    zero = mx.zeros(size, DTYPES[dtype])
    state = first_state(options, [zero], step)
    (parameter,), state = full_step(options, [zero], [mx.full(size, -value)], state, 1.0)
    found = []
    for array, sign in ((parameter, 1), (state.slots[0][0][:size], -1)):
        values = sign * widened(of_mlx(array), dtype).astype(np.float64)
        assert set(values) <= {1.0, 1 + distance}
        found.append((values > 1).astype(np.float64))
    return found


def assert_mean(of: np.ndarray, p: float, what: str) -> None:
    """Within 5 sigma of n draws that are 1 with probability p: once in 1.7 million."""
    sigma = math.sqrt(p * (1 - p) / of.size)
    assert abs(of.mean() - p) < 5 * sigma, (what, of.mean(), p, sigma)


def assert_uncorrelated(a: np.ndarray, b: np.ndarray, what: str) -> None:
    """Of two sequences of fair coins: agreement within 5 sigma of one half."""
    assert_mean((a == b).astype(np.float64), 0.5, what)


@every_half
@pytest.mark.parametrize("part", [2**-7, 0.25, 0.5, 0.875])
def test_unbiased(dtype, part):
    """Over positions, and over 40 seeds and 40 steps of few positions."""
    for name, of in zip(("parameter", "velocity"), ups(dtype, seed=1, part=part), strict=True):
        assert_mean(of, part, name)
    for kind in ("seed", "step"):
        runs = [ups(dtype, part=part, size=1024, **{kind: number}) for number in range(40)]
        for i, name in enumerate(("parameter", "velocity")):
            every = np.stack([run[i] for run in runs])
            assert_mean(every, part, f"{name} over {kind}s")
            # Of each position: 1024 times 5 sigma of 40 draws; in all, chi-squared.
            variance = part * (1 - part)
            z = (every.mean(axis=0) - part) / math.sqrt(variance / 40)
            of_square = 2 + (1 / variance - 6) / 40  # its variance: binomial, not quite normal
            assert abs((z**2).sum() - 1024) < 5 * math.sqrt(1024 * of_square)


@every_half
def test_equally_over_positions(dtype):
    """In every stretch of 1024 neighbours, and for every remainder of a power of two: lanes of
    a vector, threads of a block."""
    for name, of in zip(("parameter", "velocity"), ups(dtype, seed=2), strict=True):
        for width in (2, 4, 8, 16, 32, 128, 1024):
            for axis in (0, 1):
                table = of.reshape(-1, width)
                n = table.shape[axis]
                z = (table.mean(axis=axis) - 0.5) / (0.5 / math.sqrt(n))
                k = z.size
                # A sum of k squares of nearly normal numbers; 6 sigma as k may be 2.
                assert (z**2).sum() < k + 6 * math.sqrt(2 * k) + 18, (name, width, axis)


@every_half
def test_no_correlation(dtype):
    """Neighbours, steps, seeds, parameter and velocity."""
    parameter, velocity = ups(dtype)
    assert_uncorrelated(parameter, velocity, "parameter and velocity")
    for of in (parameter, velocity):
        for distance in (1, 2, 3, 4, 8, 16, 32, 64, 128, 256, 1024, 4096):
            assert_uncorrelated(of[distance:], of[:-distance], f"positions {distance} apart")
    for kind in ("seed", "step"):
        for number in (1, 2, 3, 64, 2**32, 2**63):
            others = ups(dtype, **{kind: number})
            for of, other in zip((parameter, velocity), others, strict=True):
                assert_uncorrelated(of, other, f"{kind} {number}")
    seed, step = ups(dtype, seed=1)[0], ups(dtype, step=1)[0]
    assert_uncorrelated(seed, step, "a seed and the step of the same number")


@every_half
def test_seeds_and_steps_repeat(dtype):
    """The same bits for the same numbers; others for others."""
    first = np.stack(ups(dtype, seed=7, step=5))
    assert np.array_equal(first, np.stack(ups(dtype, seed=7, step=5)))
    for other in ({"seed": 8, "step": 5}, {"seed": 7, "step": 6}, {"seed": 5, "step": 7}):
        agree = (first == np.stack(ups(dtype, **other))).mean()
        assert abs(agree - 0.5) < 0.02


def test_tensors_of_one_arena_have_their_own_bits():
    """And so have arenas: two dtypes with tensors of one shape."""
    size, value = 4096, 1 + 2.0**-12
    names = ["bfloat16", "bfloat16", "float16"]
    options = Full(stochastic=True, seed=1)
    parameters = [mx.zeros(size, DTYPES[name]) for name in names]
    gradients = [
        mx.full(size, -np.float32(1 + 0.5 * 2.0 ** -FORMATS[name].digits)) for name in names
    ]
    after, _ = full_step(options, parameters, gradients, first_state(options, parameters), 1.0)
    up = [
        (np.array(p.astype(mx.float32)).astype(np.float64) > value).astype(np.float64)
        for p in after
    ]
    up[2] = (np.array(after[2].astype(mx.float32)) > 1).astype(np.float64)
    for a, b in ((0, 1), (0, 2), (1, 2)):
        assert_uncorrelated(up[a], up[b], f"{a} and {b}")


# ---- What it is for ----------------------------------------------------------------------


def test_small_steps_are_not_lost():
    """100 steps of 1e-3 from 1 in bfloat16, whose numbers below 1 are 2^-8 apart: to nearest
    nothing ever moves; at random the mean does, as compensated and by a master it does."""
    size, steps = 4096, 100

    def train(options: Full) -> np.ndarray:
        w = [mx.ones(size, mx.bfloat16)]
        g = [mx.full(size, np.float32(1e-3), mx.float32)]
        state = first_state(options, w)
        for _ in range(steps):
            w, state = full_step(options, w, g, state, 1.0)
            mx.eval(w, state.slots, state.step)
        return np.array(w[0].astype(mx.float32)).astype(np.float64)

    exact = 1 - steps * np.float64(np.float32(1e-3))
    assert (train(Full(maximize=False, ema_decay=0.5)) == 1).all()
    randomly = train(Full(stochastic=True, seed=3))
    # Each step errs with a variance of at most a quarter of the squared distance.
    sigma = math.sqrt(steps / 4) * 2.0**-8 / math.sqrt(size)
    assert abs(randomly.mean() - exact) < 5 * sigma
    assert len(set(randomly)) > 3
    for options in (Full(compensated=True), Full(master_weights=True)):
        # Within one rounding, and here that is the nearest number or the one beside it.
        assert np.abs(train(options) - exact).max() <= 2.0**-9 + 2.0**-10


def test_float32_is_not_rounded():
    values = np.random.default_rng(0).standard_normal(1000).astype(np.float32)
    got = stored(values, "float32", Full(stochastic=True, seed=1))
    assert np.array_equal(got, values.view(np.uint32))
    assert np.array_equal(round_to_nearest(values, "float32"), values)


# ---- Masters in 24 bits ------------------------------------------------------------------


def bits_of(x):
    return np.array(x.view(mx.uint16)).astype(np.uint32) << 16


def still(parameter, byte):
    """What a step of nothing makes of a parameter and a byte."""
    optimizer = optim.SGD(0.0, master_weights="24bit")
    optimizer.init({"w": parameter})
    optimizer.state["w"] = {"master": byte}
    new = optimizer.apply_gradients({"w": mx.zeros(parameter.shape)}, {"w": parameter})
    return new["w"], optimizer.unpacked_state()["w"]["master"]


def test_every_parameter_with_every_byte():
    """A step of nothing changes nothing: parameter and byte are one master's. But ties are of
    the larger parameter, and 0, infinity and NaN have bytes that are nobody's."""
    parameter = mx.repeat(mx.arange(2**16, dtype=mx.uint32).astype(mx.uint16), 256)
    parameter = parameter.view(mx.bfloat16)
    byte = mx.tile(mx.arange(-128, 128).astype(mx.int8), 2**16)
    new, after = still(parameter, byte)
    if not keeps_subnormals():
        pytest.skip("subnormal masters are zeros there")
    upper = bits_of(parameter)
    value = upper.view(np.float32)
    master = (upper & 0x7FFFFFFF).astype(np.int64) + 256 * np.array(byte).astype(np.int64)
    own = (master >= 0) & (master <= 0x7F800000)
    master = np.where(own, master, upper & 0x7FFFFFFF)
    want = (master + 0x8000) >> 16 << 16
    nan = np.isnan(value)
    assert own[~nan].mean() > 0.99
    assert np.array_equal(nan, np.isnan(bits_of(new).view(np.float32)))
    got = (bits_of(new) & 0x7FFFFFFF).astype(np.int64)
    assert np.array_equal(got[~nan], want[~nan])
    assert np.array_equal(bits_of(new)[~nan] >> 31, upper[~nan] >> 31)
    assert np.array_equal(np.array(after)[~nan], ((master - want) // 256)[~nan])
    assert not np.array(after)[nan].any()


@pytest.mark.parametrize("stochastic", [False, True])
def test_a_master_of_24_bits_rounds_float32(stochastic):
    """To nearest even; at random up with the probability of what is cut off."""
    rng = np.random.default_rng(1)
    parts = np.arange(256, dtype=np.uint32)
    size = 4096
    first = rng.integers(0x38000000, 0x48000000, dtype=np.uint32) & ~np.uint32(0xFF)
    bits = np.repeat(first + parts, size)
    exact = bits.view(np.float32)
    options = {"rounding": "stochastic"} if stochastic else {}
    optimizer = optim.SGD(1.0, master_weights="24bit", **options)
    zero = mx.zeros(exact.shape, mx.bfloat16)
    new = optimizer.apply_gradients({"w": mx.array(-exact)}, {"w": zero})["w"]
    byte = np.array(optimizer.unpacked_state()["w"]["master"]).astype(np.int64)
    master = bits_of(new).astype(np.int64) + 256 * byte
    up = (master - (bits & ~np.uint32(0xFF))) // 256
    assert set(np.unique(up)) <= {0, 1}
    shares = up.reshape(256, size).mean(1)
    if stochastic:
        # Five deviations of a mean of `size`, at most 1/2 each; 256 of them.
        assert np.abs(shares - parts / 256).max() <= 5 * 0.5 / math.sqrt(size)
        assert (shares[1:] > 0).all()
    else:
        is_odd = first >> 8 & 1
        assert np.array_equal(shares, np.where(parts == 128, is_odd, parts > 128))


def test_masters_move_between_float32_and_24_bits():
    """Both ways in the middle of a run: a float32 master is rounded, also one whose parameter
    is not the larger of two; a parameter that is not its rounding wins."""
    bits = np.array([0x3F808000, 0x3F818000, 0x3F80FF7F, 0x3F7FFFFF, 0x40000080], np.uint32)
    master = mx.array(bits.view(np.float32))
    parameter = {"w": master.astype(mx.bfloat16)}
    optimizer = optim.SGD(0.0, master_weights=True)
    optimizer.init(parameter)
    optimizer.state["w"] = {"master": master}
    zero = {"w": mx.zeros(5)}
    parameter = optimizer.apply_gradients(zero, parameter)
    optimizer.master_weights = "24bit"
    assert optimizer.apply_gradients(zero, parameter)["w"].tolist() == parameter["w"].tolist()
    # The first is a tie that went down, where a byte of 24 bits would need to be 128.
    assert optimizer.unpacked_state()["w"]["master"].tolist() == [127, -128, -1, 0, 0]
    optimizer.master_weights = True
    again = optimizer.apply_gradients(zero, parameter)
    back = np.array(optimizer.unpacked_state()["w"]["master"]).view(np.uint32)
    assert back.tolist() == [0x3F807F00, 0x3F818000, 0x3F80FF00, 0x3F800000, 0x40000000]
    assert same(again["w"], parameter["w"])
    # Set by somebody else.
    optimizer.master_weights = "24bit"
    other = {"w": mx.ones(5, mx.bfloat16) * 3}
    assert optimizer.apply_gradients(zero, other)["w"].tolist() == [3.0] * 5
    assert optimizer.unpacked_state()["w"]["master"].tolist() == [0] * 5
