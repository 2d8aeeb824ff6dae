"""The global norm that a step measures: its error against float64 at every size, on numbers
chosen to lose digits, infinities, any layout in memory; and the same bits for any number of
threads. The order of its sums is held against NumPy in test_full_conformance.py."""

import math
import os
import subprocess
import sys

import mlx.core as mx
import numpy as np
import pytest
from bits import DTYPES, of_mlx
from conformance import LAYOUTS
from full_references import measured_float32
from full_step import Full, first_state, full_step
from mlx_fused_optim import _ext

BOUND = 1e-6  # relative; csrc/math/norm.h derives 7.5e-7
NORM = Full(clip_norm=1.0)


def measured(gradients, options=NORM, parameters=None, **scalars) -> np.ndarray:
    """What a step measures, without doing it."""
    if parameters is None:
        parameters = [mx.zeros(g.shape, mx.bfloat16) for g in gradients]
    state = first_state(options, parameters)
    return np.array(full_step(options, parameters, gradients, state, 0.1, **scalars)[1].measured)


def norm(*gradients, options=NORM) -> float:
    arrays = [g if isinstance(g, mx.array) else mx.array(g) for g in gradients]
    return float(measured(arrays, options)[0])


def exact(*arrays: np.ndarray) -> float:
    """float32 squares are exact in float64."""
    return math.sqrt(math.fsum(float(np.square(a, dtype=np.float64).sum()) for a in arrays))


def assert_close(got: float, want: float) -> None:
    assert abs(got - want) <= BOUND * want, (got, want, abs(got - want) / want)


# ---- Sizes ------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "size",
    [1, 2, 5, 127, 128, 129, 2047, 2048, 2049, 5000, 32 * 2048 + 1, 1023 * 2048, 1024 * 2048 + 1,
     5_000_011],
)  # fmt: skip
def test_error_by_size(size, dtype):
    values = np.random.default_rng(size).standard_normal(size).astype(np.float32)
    gradient = mx.array(values).astype(DTYPES[dtype])
    assert_close(norm(gradient), exact(np.array(gradient.astype(mx.float32))))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("count", [1, 2, 3, 8])
def test_norms_of_tensors(count, dtype):
    """Each has its own, in their order; of any size, magnitude and layout."""
    random = np.random.default_rng(count)
    sizes = (3, 2049, 0, 5000)
    scales = (1.0, 1e-30, 1e30, 1e-3) if dtype != "float16" else (1.0, 1e-3, 1e3, 1e-2)
    tensors = []
    for i in range(count):
        values = random.standard_normal((sizes[i % 4], 7)) * scales[i % 3]
        tensors.append(mx.array(values.astype(np.float32)).astype(DTYPES[dtype]))
        tensors[-1] = tensors[-1].T if i % 2 else tensors[-1]
    norms = np.array(_ext.norms(tensors))
    assert norms.shape == (count,) and norms.dtype == np.float32
    for got, tensor in zip(norms, tensors, strict=True):
        assert_close(float(got), exact(np.array(tensor.astype(mx.float32))))


def long_gradient(size: int, dtype: mx.Dtype) -> tuple[mx.array, float]:
    """One stretch of 2^20 numbers again and again, with uniform ones: all of one sign and
    size, so that errors of one direction would add up."""
    values = np.random.default_rng(2).uniform(0.5, 1, 1 << 20).astype(np.float32)
    one = mx.array(values).astype(dtype)
    want = exact(np.array(one.astype(mx.float32)))
    return mx.tile(one, size >> 20), want * math.sqrt(size >> 20)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_error_of_a_long_one(dtype):
    gradient, want = long_gradient(1 << 27, DTYPES[dtype])
    assert_close(norm(gradient), want)


@pytest.mark.skipif(
    "MLX_FUSED_OPTIM_SLOW" not in os.environ, reason="8 GiB; MLX_FUSED_OPTIM_SLOW=1 runs it"
)
def test_error_beyond_32_bits():
    """More elements than int32 counts, in one tensor and in several."""
    gradient, want = long_gradient(1 << 30, mx.bfloat16)
    assert_close(norm(gradient, gradient, gradient), want * math.sqrt(3))
    rows = gradient.reshape(-1, 1 << 10)  # one axis cannot be as long
    rows = mx.concatenate([rows, rows, rows[: 1 << 10]])
    assert_close(norm(rows), want * math.sqrt(2 + 2.0**-10))


# ---- Numbers chosen to lose digits ------------------------------------------------------


@pytest.mark.parametrize("at", [0, 1, 127, 128, 2047, 2048, 500_000, (1 << 20) - 1])
@pytest.mark.parametrize("large", [1.0, 1e2, 1e4])
def test_one_large_among_small(at, large):
    """Each small square is lost when it is added to the large one, and together they count."""
    values = np.full(1 << 20, 3e-2, np.float32)
    values[at] = large
    assert_close(norm(values), exact(values))


def test_these_numbers_are_hard():
    """A control: one float32 after another is far off, on most of the data of this file."""
    values = np.full(1 << 20, 3e-2, np.float32)
    values[0] = 1e4
    one_sign = np.random.default_rng(2).uniform(0.5, 1, 1 << 20).astype(np.float32)
    for data in (values, one_sign):
        naive = math.sqrt(np.cumsum(np.square(data))[-1])
        assert abs(naive - exact(data)) > 2 * BOUND * exact(data)


def test_many_tensors_beside_a_large_one():
    small = [np.full(7, 1e-2, np.float32)] * 3000
    large = np.full(10, 30, np.float32)
    for gradients in ([large, *small], [*small, large], [*small[:1500], large, *small[1500:]]):
        assert_close(norm(*gradients), exact(*gradients))


@pytest.mark.parametrize("order", ["random", "rising", "falling"])
@pytest.mark.parametrize(
    "least, most", [(-10, 10), (-30, 30), (-62, 52), (-126, -80), (-126, 110), (60, 110)]
)
def test_exponents_spread(order, least, most):
    """Numbers of all sizes beside each other, up to all that float32 has."""
    random = np.random.default_rng(most + 126)
    values = np.ldexp(random.uniform(1, 2, 300_001), random.integers(least, most, 300_001))
    values = values.astype(np.float32) * random.choice(np.float32([-1, 1]), values.size)
    if order != "random":
        values = values[np.argsort(np.abs(values))]
        values = values if order == "rising" else values[::-1].copy()
    assert_close(norm(values), exact(values))


def test_worst_roundings():
    """Squares that all round the same way, each sum too: as bad as the bound allows for."""
    u = 2.0**-12
    for first in (1 + u, 1 + 3 * u, 1.5 + u, math.sqrt(2) + u):
        values = np.full(2048 * 3 + 77, first, np.float32)
        assert_close(norm(values), exact(values))
    rising = np.sqrt(np.linspace(1, 2, 100_000)).astype(np.float32)
    assert_close(norm(rising), exact(rising))


# ---- Infinities, overflow, zeros, nothing --------------------------------------------------


@pytest.mark.parametrize("size", [1, 100, 2048, 70_000])
def test_not_finite(size):
    values = np.random.default_rng(0).standard_normal(size).astype(np.float32)
    for at in {0, size // 2, size - 1}:
        for bad, want in ((np.inf, np.inf), (-np.inf, np.inf), (np.nan, np.nan)):
            gradient = values.copy()
            gradient[at] = bad
            for options in (NORM, Full(clip_norm=1.0, skip_nonfinite=True)):
                got = measured([mx.array(values), mx.array(gradient)], options)
                assert np.array_equal(got[0], np.float32(want), equal_nan=True)
                assert got[1] == (0 if options.skip_nonfinite else 1)


def test_norms_beyond_float32():
    """Finite gradients: only a norm that is to be clipped is a reason to skip."""
    gradient = mx.array(np.full(100, 1e38, np.float32))
    assert measured([gradient]).tolist() == [np.inf, 1]
    assert measured([gradient], Full(skip_nonfinite=True)).tolist() == [np.inf, 1]
    both = Full(clip_norm=1.0, skip_nonfinite=True)
    assert measured([gradient], both).tolist() == [np.inf, 0]
    # Of one tensor, or of two together; and nearly.
    assert norm(np.full(2, 3e38, np.float32)) == np.inf
    assert norm(*[np.full(1, 3e38, np.float32)] * 2) == np.inf
    for almost in ([3.4e38], [2.4e38, 2.4e38], [1e38] * 11):
        assert_close(norm(np.float32(almost)), exact(np.float32(almost)))


@pytest.mark.parametrize("skips", [False, True])
def test_the_composed_way_has_the_same_verdicts(skips, monkeypatch):
    """Only a step that may be skipped is."""
    monkeypatch.setenv("MLX_FUSED_OPTIM_COMPOSED", "1")
    options = Full(clip_norm=1.0, skip_nonfinite=skips)
    for gradient in ([1.0, np.inf], [1e38] * 100, [3.0, 4.0]):
        finite = gradient == [3.0, 4.0]
        want = [5.0 if finite else np.inf, float(finite or not skips)]
        assert measured([mx.array(gradient)], options).tolist() == want


@pytest.mark.parametrize("size", [1, 3, 2048, 2049, 300_001])
@pytest.mark.parametrize("exponent", [*range(-126, -30, 5), *range(30, 105, 5), 110])
def test_every_finite_gradient_has_its_norm(exponent, size):
    """Squares beyond float32 and squares that vanish, in whole chunks and beside others."""
    values = np.random.default_rng(size).uniform(1, 2, size).astype(np.float32)
    values = np.ldexp(values, exponent)
    assert_close(norm(values), exact(values))
    ones = np.ones(5000, np.float32)
    for gradients in ((ones, values), (values, ones), (ones, values, values / 2)):
        assert_close(norm(*gradients), exact(*gradients))
    mixed = np.concatenate([values, ones])
    assert_close(norm(mixed, values), exact(mixed, values))


@pytest.mark.parametrize("edge", [-41, -40, -39, 40, 41, 42])
def test_where_the_scale_begins(edge):
    """A chunk whose peak is the last that needs no scale, or the first that does."""
    for value in (2.0**edge, np.nextafter(np.float32(2.0**edge), np.float32(0))):
        values = np.full(2048, 2.0 ** (edge - 11), np.float32)
        values[1000] = value
        for count in (1, 2, 70):
            many = np.concatenate([values * np.float32(2.0**-k) for k in range(count)])
            assert_close(norm(many), exact(many))


def test_chunks_of_every_scale():
    """From the largest numbers to the smallest, in every order: each fold meets each scale."""
    random = np.random.default_rng(9)
    chunks = [
        np.ldexp(random.uniform(1, 2, 2048), e).astype(np.float32) for e in range(-126, 121, 3)
    ]
    for _ in range(5):
        random.shuffle(chunks)
        values = np.concatenate(chunks)
        assert_close(norm(values), exact(values))
        assert_close(norm(*chunks), exact(values))
    small = [chunk for chunk in chunks if chunk.max() < 2.0**-60]
    assert_close(norm(*small), exact(*small))


def test_clipping_by_value_sets_the_scale():
    """What is squared decides, not what was given."""
    gradient = np.full(3000, 1e30, np.float32)
    for limit in (1e-30, 0.5, 1e25):
        got = measured([mx.array(gradient)], Full(clip_value=limit, clip_norm=1.0))
        assert_close(got[0], float(np.float32(limit)) * math.sqrt(3000))


def test_clipping_by_value_does_not_hide_an_infinity():
    """The gradient as it was given decides; NaN would stay in any case."""
    gradient = mx.array(np.array([1, np.inf, 2], np.float32))
    options = Full(clip_value=3.0, clip_norm=1.0, skip_nonfinite=True)
    got = measured([gradient], options)
    assert got.tolist() == [np.float32(math.sqrt(1 + 9 + 4)), 0]


@pytest.mark.parametrize("clip_value", [None, 3.0])
def test_an_infinity_that_unscaling_makes_counts(clip_value):
    """A gradient that is finite as given, and beyond float32 without its scale."""
    options = Full(grad_scale=0.5, clip_value=clip_value, skip_nonfinite=True)
    for value, applies in ((3e38, 0), (-3e38, 0), (1.7e38, 1)):
        gradient = mx.array(np.array([1, value, 2], np.float32))
        assert measured([gradient], options)[1] == applies


@pytest.mark.parametrize(
    "scale", [0.0, -0.0, -2.0, math.inf, -math.inf, math.nan, 2.0**-127, 1e-45]
)
def test_a_scale_that_cannot_be_inverted_skips(scale):
    """Whatever the gradients are, zeros too: and without skipping all are NaN."""
    for gradient in (mx.zeros(3), mx.ones(3), mx.full(3, 1e-40)):
        for clip_value in (None, 1.0):
            options = Full(grad_scale=1.0, clip_value=clip_value, skip_nonfinite=True)
            given = mx.array(np.float32(scale))
            got = measured([gradient], options, grad_scale=given)
            assert np.isnan(got[0]) and got[1] == 0
    options = Full(grad_scale=1.0)
    after, _ = full_step(
        options, [mx.ones(3)], [mx.ones(3)], first_state(options, [mx.ones(3)]), 0.1,
        grad_scale=mx.array(np.float32(scale)),
    )  # fmt: skip
    assert np.isnan(np.array(after[0])).all()


def test_the_smallest_scale():
    options = Full(grad_scale=1.0, skip_nonfinite=True)
    got = measured([mx.full(4, 2.0**-60)], options, grad_scale=mx.array(2.0**-126))
    assert got.tolist() == [2.0**67, 1]


def test_a_scale_is_undone_before_squaring():
    gradient = np.full(1000, 1e25, np.float32)
    got = measured([mx.array(gradient)], Full(grad_scale=1e20, clip_norm=1.0))
    assert_close(got[0], exact(gradient) / 1e20)
    clipped = measured([mx.array(gradient)], Full(grad_scale=1e20, clip_value=0.5, clip_norm=1.0))
    assert_close(clipped[0], 0.5 * math.sqrt(1000))


def test_zeros_and_nothing():
    assert norm(np.zeros(3000, np.float32), np.float32(-0.0)) == 0
    assert norm(np.zeros((0, 3), np.float32)) == 0
    values = np.arange(1, 6, dtype=np.float32)
    empty = np.zeros((3, 0), np.float32)
    assert norm(empty, values, empty, np.float32(2), empty) == norm(values, np.float32(2))
    options = Full(clip_norm=1.0, skip_nonfinite=True, trust_coefficient=0.1)
    assert measured([], options).tolist() == [0, 1]
    nothing = mx.array(np.zeros(0, np.float32))
    got = measured([mx.zeros(5), nothing], options, [mx.ones(5), nothing])
    assert got.tolist() == [0, 1, 0, np.float32(math.sqrt(5)), 0, 0]


# ---- Layouts, dtypes, many tensors -----------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", [(5, 7), (65, 130), (3, 50, 129), (2, 2049), (2049, 2)])
def test_layouts(layout, shape, dtype):
    values = np.random.default_rng(1).standard_normal(shape).astype(np.float32)
    if layout == "broadcast":
        values = np.broadcast_to(values[:1], shape).copy()
    bits = of_mlx(mx.array(values).astype(DTYPES[dtype]))
    gradient = LAYOUTS[layout](bits, dtype)
    plain = np.array(mx.array(values).astype(DTYPES[dtype]).astype(mx.float32))
    assert_close(norm(gradient), exact(plain))
    # The promised order: memory's where the elements fill it, else that of the indices.
    order = plain.T if layout == "transposed" else plain
    (want, _) = measured_float32(NORM, [order.reshape(-1)], [], 1)
    assert norm(gradient) == want


def test_other_orders_of_axes():
    values = np.random.default_rng(1).standard_normal((6, 33, 65)).astype(np.float32)
    base = mx.array(values)
    for axes in ((0, 1, 2), (2, 1, 0), (1, 2, 0), (0, 2, 1)):
        # The same memory in the same order: the same bits.
        assert norm(base.transpose(*axes)) == norm(base)
    part = base[:, 3:20, ::2]
    assert_close(norm(part), exact(np.array(part)))
    assert_close(norm(part.transpose(2, 0, 1)), exact(np.array(part)))
    # An axis of length 1 has a stride that says nothing.
    assert norm(base[:, :1, :]) == norm(mx.array(values[:, :1, :].copy()))
    # One number, everywhere: all strides 0.
    everywhere = mx.broadcast_to(mx.array(0.3), (50, 60))
    assert_close(norm(everywhere), math.sqrt(3000) * float(np.float32(0.3)))


def test_three_thousand_tensors():
    random = np.random.default_rng(4)
    gradients = [random.standard_normal(1 + i % 40).astype(np.float32) for i in range(3000)]
    assert_close(norm(*gradients), exact(*gradients))
    options = Full(trust_coefficient=0.1)
    parameters = [mx.array(np.float32(2) * g) for g in gradients]
    got = measured([mx.array(g) for g in gradients], options, parameters)
    for i, g in enumerate(gradients):
        assert_close(got[2 + 2 * i], exact(g))
        assert_close(got[3 + 2 * i], 2 * exact(g))


def test_gradients_of_several_dtypes():
    values = np.random.default_rng(5).standard_normal(3000).astype(np.float32)
    gradients = [mx.array(values).astype(dtype) for dtype in DTYPES.values()]
    want = exact(*(np.array(g.astype(mx.float32)) for g in gradients))
    assert_close(norm(*gradients), want)


THREADS = """
import sys
sys.path.insert(0, sys.argv[1])
import mlx.core as mx, numpy as np
from test_norm import measured
from full_step import Full
mx.set_default_device(mx.cpu)
random = np.random.default_rng(6)
sizes = [1, 200_000, 3, 0, 1_000_003, 2048 * 64, 77]
gradients = [random.standard_normal(n).astype(np.float32) for n in sizes]
arrays = [mx.array(g) for g in gradients] + [mx.array(gradients[1]).reshape(400, 500)[:, ::3]]
got = measured(arrays, Full(trust_coefficient=0.1), [x * 2 for x in arrays])
print(got.view(np.uint32).tolist())
"""


def test_the_same_bits_for_any_number_of_threads():
    printed = set()
    for threads in ("1", "2", "7"):
        environment = {
            **os.environ,
            "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
            "MLX_FUSED_OPTIM_NUM_THREADS": threads,
        }
        command = [sys.executable, "-c", THREADS, os.path.dirname(__file__)]
        run = subprocess.run(
            command, check=True, env=environment, timeout=300, capture_output=True, text=True
        )
        printed.add(run.stdout)
    assert len(printed) == 1, printed


# ---- What it is for, and the other way to compute it ------------------------------------------


def test_clipped_gradients_have_the_norm_asked_for():
    random = np.random.default_rng(7)
    gradients = [mx.array(random.standard_normal(n).astype(np.float32)) for n in (10, 3000, 1)]
    zeros = [mx.zeros(g.shape) for g in gradients]
    for limit, want in ((0.5, 0.5), (1e3, exact(*(np.array(g) for g in gradients)))):
        options = Full(clip_norm=limit)
        after, _ = full_step(options, zeros, gradients, first_state(options, zeros), 1.0)
        assert abs(exact(*(np.array(p) for p in after)) - want) <= 3e-6 * want
    # Below the limit nothing is touched.
    for p, g in zip(after, gradients, strict=True):
        assert np.array_equal(np.array(p), 0 - np.array(g))


def test_the_composed_way_is_close(monkeypatch):
    random = np.random.default_rng(8)
    gradients = [random.standard_normal(n).astype(np.float32) for n in (1, 513, 0, 1 << 22)]
    gradients.append(random.uniform(0.5, 1, 5_000_000).astype(np.float32))
    arrays = [mx.array(g) for g in gradients]
    # MLX 0.32.4 on CUDA divides by zero where it compiles operations on an empty array.
    with mx.stream(mx.cpu):
        kernel = measured(arrays, Full(trust_coefficient=0.1), arrays)
        monkeypatch.setenv("MLX_FUSED_OPTIM_COMPOSED", "1")
        composed = measured(arrays, Full(trust_coefficient=0.1), arrays)
        for exponent in (-100, -30, 60, 110):
            powers = [mx.array(np.ldexp(g, exponent)) for g in gradients[:2]]
            monkeypatch.setenv("MLX_FUSED_OPTIM_COMPOSED", "1")
            got = measured(powers, Full(trust_coefficient=0.1), powers)
            monkeypatch.setenv("MLX_FUSED_OPTIM_COMPOSED", "0")
            want = measured(powers, Full(trust_coefficient=0.1), powers)
            np.testing.assert_allclose(got, want, rtol=5e-6)
    np.testing.assert_allclose(composed, kernel, rtol=5e-6)
    assert abs(composed[0] - exact(*gradients)) <= 5e-6 * exact(*gradients)
