"""The two numbers of Adam's bias correction, learning_rate / (1 - beta1^t) and
1 / sqrt(1 - beta2^t): within an ulp of float64 at every step.

They are seen through the step itself: its bits are those of float32 arithmetic with one of the
two float32 numbers around the exact one, for hundreds of elements at once."""

import itertools
import math

import mlx.core as mx
import mlx_fused_optim as optim
import numpy as np
import pytest
from bits import of_mlx, to_mlx
from full_references import Place, Used, full_step_float32
from full_step import Full, State, full_step
from rules import corrections

SIZE = 300
STEPS = (1, 2, 3, 4, 10, 99, 1000, 4097, 10**5, 2**20 + 1, 2**24 + 1, 2**31, 2**32)
RATE = np.float32(1e-3)
BETAS = ((0.9, 0.999), (0.0, 0.0), (0.5, 0.9), (0.95, 0.98), (0.999, 0.9), (0.9999, 0.99999),
         (1 - 1e-7, 1 - 1e-8), (1e-3, 1e-12))  # fmt: skip
OPTIONS = [Full("adam", beta1=a, beta2=b, eps=1e-8, bias_correction=True) for a, b in BETAS]


def one_step(options, t, scalars=None):
    """(what went in, what came out), as bits."""
    random = np.random.default_rng(t % 1000)
    draw = [random.standard_normal(SIZE).astype(np.float32) for _ in range(4)]
    p, g, m, v = draw[0], draw[1], draw[2], np.square(draw[3])
    size = -(-SIZE // 64) * 64
    slots = [to_mlx(np.pad(x, (0, size - SIZE)).view(np.uint32), "float32") for x in (m, v)]
    state = State([[slots[0]], [slots[1]], [], [], [], []], mx.array(np.array(t - 1, np.uint64)))
    (after,), state = full_step(
        options, [mx.array(p)], [mx.array(g)], state, RATE.item(), **(scalars or {})
    )
    old = {"parameter": p.view(np.uint32), "m": m.view(np.uint32), "v": v.view(np.uint32)}
    new = {name: of_mlx(s[0])[:SIZE] for name, s in zip("mv", state.slots[:2], strict=True)}
    return old, g, {"parameter": of_mlx(after), **new}


def neighbours(exact: float) -> list[int]:
    """The two float32 numbers around a number, in ulps from the nearest."""
    nearest = np.float32(exact)
    if float(nearest) == exact:
        return [0]
    return [0, 1 if float(nearest) < exact else -1]


def found(options, t, used):
    """The pairs of neighbours with which the step has these bits."""
    old, g, new = one_step(options, t, {k: mx.array(used.values[k]) for k in used.varying})
    place = Place(0, 0, t - 1, 0)
    values = [float(used.values[k]) for k in ("beta1", "beta2")]
    if not used.varying:
        values = [options.beta1, options.beta2]
    exact = corrections(float(RATE), values, t)
    return [
        pair
        for pair in itertools.product(*map(neighbours, exact))
        if all(
            np.array_equal(new[k], x)
            for k, x in full_step_float32(
                options, "float32", old, g, place, used, None, nudged=pair
            ).items()
        )
    ]


def used_of(options, varying=()):
    values = {k: np.float32(x) for k, x in options.scalars.items()}
    return Used({**values, "learning_rate": RATE}, frozenset(varying))


@pytest.mark.parametrize("options", OPTIONS, ids=[str(betas) for betas in BETAS])
def test_constants_to_an_ulp_at_every_step(options):
    """Of what Python has of a beta, not of its float32: 1 - 0.999f^t is another number."""
    for t in STEPS:
        assert found(options, t, used_of(options)), t


@pytest.mark.parametrize("options", OPTIONS[:5], ids=[str(betas) for betas in BETAS[:5]])
def test_arrays_to_an_ulp_at_every_step(options):
    used = used_of(options, ("beta1", "beta2"))
    for t in STEPS:
        assert found(options, t, used), t


def test_it_is_nearly_always_the_nearest():
    """In double float32, an ulp is a promise that is kept with room."""
    pairs = [found(options, t, used_of(options))[0] for options in OPTIONS[:5] for t in STEPS]
    assert sum(pair == (0, 0) for pair in pairs) >= 0.95 * len(pairs)


@pytest.mark.parametrize("t", STEPS[:5])
def test_the_reference_is_exact(t):
    """A control: the float64 numbers against integers of any size."""
    from fractions import Fraction

    for rate, betas in ((0.1, (0.9, 0.999)), (1e-3, (0.5, 1 - 2.0**-40))):
        first, second = (1 - Fraction(beta) ** t for beta in betas)
        got = corrections(rate, betas, t)
        assert math.isclose(got[0], rate / float(first), rel_tol=1e-14)
        assert math.isclose(got[1], 1 / math.sqrt(float(second)), rel_tol=1e-14)


def test_a_step_off_by_one_shows():
    """A control: at a step that is not the first thousands, the neighbours' numbers differ."""
    options = OPTIONS[0]
    for t in STEPS[:7]:
        old, g, new = one_step(options, t)
        place = Place(0, 0, t, 0)  # one too many
        wrong = full_step_float32(options, "float32", old, g, place, used_of(options), None)
        assert not np.array_equal(new["parameter"], wrong["parameter"]), t


def test_after_long_it_is_nothing():
    """Then the bits are those of a step without it."""
    for t in (10**6, 2**40, 2**63):
        *_, with_it = one_step(OPTIONS[0], t)
        *_, without = one_step(Full("adam", eps=1e-8), t)
        assert all(np.array_equal(with_it[k], without[k]) for k in with_it)


def test_the_first_step_moves_by_the_rate():
    """m / (1 - beta1) is g and v / (1 - beta2) its square: lr * sign(g), whatever the betas."""
    for betas in BETAS:
        optimizer = optim.Adam(0.5, betas=betas, eps=0.0, bias_correction=True)
        after = optimizer.apply_gradients({"w": mx.array([3.0, -0.001])}, {"w": mx.zeros(2)})
        np.testing.assert_allclose(np.array(after["w"]), [-0.5, 0.5], rtol=1e-6)
