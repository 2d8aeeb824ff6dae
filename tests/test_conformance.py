"""The conformance table of tests/conformance.py, checked for every backend.

For each case and step, from the very bits that went into the step:
- the bits that come out are those of float32 arithmetic in NumPy, rounded once;
- they are within the derived bound of the float64 result;
- the learning rate is the float64 schedule's to 2 ulp, the counter counts;
- for float32 with a constant rate they are those of mlx.optimizers.SGD run eagerly;
- they are those of the first backend;
- where a GPU takes subnormal numbers of float32 (and so of bfloat16) for zeros, as Apple's
  do, that is all that differs.
"""

import functools
from dataclasses import fields

import mlx.core as mx
import mlx.optimizers
import numpy as np
import pytest
from bits import flushed, keeps_subnormals, of_mlx, one_nan, widened
from conformance import (
    BACKENDS,
    CASES,
    CONSTANT_RATE,
    DECAYING_RATE,
    LAYOUTS,
    STEPS,
    Case,
    flushes,
    results,
    run_case,
)
from references import NOTHING, Broken, step_float32, step_float64


@pytest.fixture(params=range(len(BACKENDS)), ids=[b.name for b in BACKENDS], scope="module")
def backend(request):
    return request.param


def steps_of(case: Case, bits):
    """(step, tensor, parameter, gradient, velocity) before each step: inputs as bits."""
    first, gradients = case.values()
    for step in range(STEPS):
        for i in range(len(first)):
            before = first[i] if step == 0 else bits[f"p{step - 1}.{i}"]
            velocity = np.zeros_like(before) if step == 0 else bits.get(f"v{step - 1}.{i}")
            if velocity is None:
                velocity = np.zeros_like(before)
            elif case.layout == "broadcast":
                velocity = velocity.reshape(before.shape)
            yield step, i, before, gradients[step][i], velocity


def mismatches(case: Case, bits, broken: Broken = NOTHING, flushes: bool = False) -> list[str]:
    """Where a backend's bits are not those of the (perhaps broken) reference."""
    found = []
    for step, i, before, gradient, velocity in steps_of(case, bits):
        rate = bits[f"rate{step}"].view(np.float32)[()]
        parameter, new_velocity = step_float32(
            before,
            gradient,
            velocity,
            case.dtype_of(i),
            case.gradient,
            rate,
            case.hyper,
            broken,
            flushes,
        )
        pairs = {"parameter": (bits[f"p{step}.{i}"], parameter)}
        if case.hyper.momentum:
            pairs["velocity"] = (bits[f"v{step}.{i}"], new_velocity)
        for name, (got, want) in pairs.items():
            assert got.shape == want.shape
            assert got.dtype == want.dtype
            want = one_nan(want, case.dtype_of(i))
            wrong = np.flatnonzero(got.reshape(-1) != want.reshape(-1))
            if wrong.size:
                found.append(f"{name} of shape {want.shape}, step {step}: elements {wrong[:5]}")
    return found


@functools.cache
def mismatches_of_the_first(case: Case) -> list[str]:
    return mismatches(case, results(0)[case.name])


def identical(a, b) -> bool:
    return a.keys() == b.keys() and all(np.array_equal(a[key], b[key]) for key in a)


@pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
def test_bits_of_float32_rounded_once(backend, case):
    bits = results(backend)[case.name]
    if identical(bits, results(0)[case.name]):
        assert mismatches_of_the_first(case) == []  # the same question, asked once
    else:
        assert mismatches(case, bits, flushes=flushes(backend)) == []


FINITE = [case for case in CASES if case.kind != "every_number"]


@pytest.mark.parametrize("case", FINITE, ids=lambda c: c.name)
def test_close_to_float64(case):
    bits = results(0)[case.name]
    for step, i, before, gradient, velocity in steps_of(case, bits):
        rate = bits[f"rate{step}"].view(np.float32)[()]
        dtype = case.dtype_of(i)
        parameter, new_velocity = step_float64(
            before, gradient, velocity, dtype, case.gradient, rate, case.hyper
        )
        pairs = [(bits[f"p{step}.{i}"], parameter)]
        if case.hyper.momentum:
            pairs.append((bits[f"v{step}.{i}"], new_velocity))
        for got, (want, bound) in pairs:
            error = np.abs(widened(got, dtype).astype(np.float64) - want)
            assert (error <= bound).all(), f"tensor {i}, step {step}: {(error - bound).max()}"


def test_rate_and_counter(backend):
    for case in CASES:
        bits = results(backend)[case.name]
        init, decay = DECAYING_RATE
        for step in range(STEPS):
            rate = bits[f"rate{step}"].view(np.float32)[()]
            assert bits[f"step{step}"] == step + 1
            if case.rate != "exponential":
                assert rate == np.float32(CONSTANT_RATE if case.rate == "constant" else 1)
            else:
                exact = init * decay**step
                assert abs(float(rate) - exact) <= 2 * np.spacing(np.float32(exact))


@pytest.mark.parametrize("number", range(1, len(BACKENDS)), ids=[b.name for b in BACKENDS[1:]])
def test_same_bits_as_the_first_backend(number):
    for case in CASES:
        if case.kind == "every_number" and flushes(number):
            continue  # test_bits_of_float32_rounded_once knows which differ, and how
        assert identical(results(0)[case.name], results(number)[case.name]), case.name


FLOAT32 = [
    case
    for case in CASES
    if (case.parameters, case.gradient, case.rate) == (("float32",), "float32", "constant")
]


@pytest.mark.parametrize("case", FLOAT32, ids=lambda c: c.name)
def test_float32_has_the_bits_of_mlx(case):
    """mlx.optimizers.SGD on the CPU, eagerly, from the same inputs."""
    bits = results(0)[case.name]
    first, gradients = case.values()
    with mx.stream(mx.cpu):
        optimizer = mlx.optimizers.SGD(CONSTANT_RATE, *case.hyper)
        place = LAYOUTS[case.layout]
        parameters = {"w": [place(p, "float32") for p in first]}
        for step in range(STEPS):
            gradient = {"w": [place(g, "float32") for g in gradients[step]]}
            parameters = optimizer.apply_gradients(gradient, parameters)
            mx.eval(parameters, optimizer.state)
            for i, parameter in enumerate(parameters["w"]):
                assert np.array_equal(of_mlx(parameter), bits[f"p{step}.{i}"])
                if case.hyper.momentum:
                    velocity = optimizer.state["w"][i]["v"]
                    assert np.array_equal(of_mlx(velocity), bits[f"v{step}.{i}"])


def test_layout_in_memory_changes_no_bit():
    """The layouts of one case differ in memory alone, but not in their numbers."""
    by_layout = {}
    for layout in ("contiguous", "transposed", "reversed", "odd_offset", "every_other"):
        case = next(c for c in FLOAT32 if c.layout == layout and c.kind == "matrices")

        # The numbers are drawn from the name: give all the same.
        class SameNumbers(Case):
            name = "one name for all"

        twin = SameNumbers(*(getattr(case, f.name) for f in fields(Case)))
        by_layout[layout] = run_case(twin, mx.cpu)
    for layout, bits in by_layout.items():
        for key, value in bits.items():
            assert np.array_equal(value, by_layout["contiguous"][key]), (layout, key)


BROKEN = {
    "no_decay": "decay",
    "no_momentum": "momentum",
    "no_dampening": "dampening",
    "no_nesterov": "nesterov",
    "last_element_skipped": "plain",
    "velocity_narrowed_early": "momentum",
    "rate_narrowed": "plain",
    "contracted": "decay",
}


@pytest.mark.parametrize("mistake", [f.name for f in fields(Broken)])
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_the_table_catches(mistake, dtype):
    """A control: a step with this mistake has other bits than ours."""
    if mistake == "velocity_narrowed_early" and dtype == "bfloat16":
        dtype = "float16"  # narrowing to bfloat16 is what storing does there
    if mistake == "contracted":
        dtype = "float32"  # the store of a half type hides almost all of it
    case = Case((dtype,), dtype, BROKEN[mistake])
    assert case in CASES
    bits = results(0)[case.name]
    assert mismatches(case, bits) == []
    assert mismatches(case, bits, Broken(**{mistake: True}))


# ---- Numbers at the edges of float32; those of the half types are cases of the table -----


def one_step(parameter: np.ndarray, gradient: np.ndarray) -> np.ndarray:
    import mlx_fused_optim as optim

    parameters, gradients = {"w": mx.array(parameter)}, {"w": mx.array(gradient)}
    return np.array(optim.SGD(1.0).apply_gradients(gradients, parameters)["w"])


def test_infinity_nan_and_overflow():
    gradient = np.array([np.inf, -np.inf, np.nan, -3.4e38, 3.4e38] * 7, np.float32)
    parameter = np.full(gradient.size, 3.4e38, np.float32)
    got = one_step(parameter, gradient)
    with np.errstate(over="ignore"):
        assert np.array_equal(got, parameter - gradient, equal_nan=True)
    assert np.isnan(got).sum() == 7
    assert np.isinf(got).sum() == 21


def test_negative_zero_and_subnormals_stay():
    """As in mlx.optimizers: nothing is flushed (but by Apple's GPUs, see bits.py), and 0 * x
    is not added where not asked."""
    parameter = np.array([-0.0, 0.0, 1e-40, -1e-45, 1.2e-38], np.float32)
    gradient = np.array([0.0, -0.0, 1e-45, 0.0, 1e-40], np.float32)
    if not keeps_subnormals():
        parameter, gradient = flushed(parameter), flushed(gradient)
    got = one_step(parameter, gradient).view(np.uint32)
    assert np.array_equal(got, (parameter - gradient).view(np.uint32))
