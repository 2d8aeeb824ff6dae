"""The full step's part of the conformance table (tests/full_cases.py), for every backend.

For each case and step, from the very bits that went into the step:
- the bits that come out are those of float32 arithmetic in NumPy, rounded once;
- they are within the bound of the float64 result;
- the norms that were measured have the promised bits, and are within 1e-6 of float64;
- a skipped step changes nothing, and is counted;
- they are those of the first backend, and in float32 those of mlx.optimizers run eagerly.
"""

import functools
import itertools
from dataclasses import fields, replace

import mlx.core as mx
import mlx.optimizers
import numpy as np
import pytest
from bits import flushed, of_mlx, to_mlx, widened
from byte_references import BYTE_FORMATS, GROUP, ROW
from conformance import BACKENDS, COMPOSED, LAYOUTS, flushes, results, run_case
from full_cases import CHOICES, FULL_CASES, LEARNING_RATE, PLAIN, FullCase, covering_array
from full_references import (
    RIGHT,
    Bounded,
    Element,
    Mistake,
    Place,
    Used,
    arenas_of,
    full_step_float32,
    full_step_float64,
    master24_of,
    measured_float32,
    numbers_in,
    part_of,
)
from rules import RULES, slots_of

every_case = pytest.mark.parametrize("case", FULL_CASES, ids=lambda c: c.name)


@pytest.fixture(params=range(len(BACKENDS)), ids=[b.name for b in BACKENDS], scope="module")
def backend(request):
    return request.param


@functools.cache
def arenas(case: FullCase):
    return arenas_of(case.shapes, case.dtypes)


@functools.cache
def values(case: FullCase):
    return case.values()


def applies(case: FullCase, bits, step: int) -> bool:
    measured = bits.get(f"measured{step}")
    return measured is None or bool(measured.view(np.float32)[1])


def counter(case: FullCase, bits, step: int) -> int:
    """Of the schedules and the random numbers: steps that were skipped do not count."""
    return case.first_step if step == 0 else int(bits[f"step{step - 1}"])


def tensors_of(case: FullCase, bits, step: int):
    """(arena number, place, dtype, what went in as bits, the gradient in float32)."""
    first, gradients, slots = values(case)
    for number, arena in enumerate(arenas(case)):
        for tensor, offset in zip(arena.tensors, arena.offsets, strict=True):
            shape = case.shapes[tensor]
            goes_on = step and not case.options.direction
            old = {"parameter": bits[f"p{step - 1}.{tensor}"] if goes_on else first[tensor]}
            for slot in case.options.places:
                if f"{slot}.{number}" in slots:
                    index = _slot_number(case, slot, number)
                    whole = bits[f"{slot}{step - 1}.{index}"] if step else slots[f"{slot}.{number}"]
                    kind = case.options.slot_dtype(slot, arena.dtype)
                    old[slot] = part_of(whole, kind, offset, shape)
            gradient = widened(gradients[step][tensor], case.gradient)
            place = Place(tensor, offset, counter(case, bits, step), arena.fingerprint)
            yield number, place, arena.dtype, old, gradient


def _slot_number(case: FullCase, slot: str, number: int) -> int:
    """Of an arena among those that have the slot."""
    return sum(case.options.slot_dtype(slot, a.dtype) is not None for a in arenas(case)[:number])


def outcome(case: FullCase, bits, step: int):
    """What a step needs to know besides the tensors."""
    measured = bits.get(f"measured{step}")
    names, used = case.options.scalar_names, bits.get(f"used{step}")
    if used is None:
        values = case.expected_scalars(0)
        used = np.array([values[name] for name in names], np.float32)
    values = dict(zip(names, used.view(np.float32), strict=False))
    return Used(values, case.varying), None if measured is None else measured.view(np.float32)


# The two numbers of a bias correction are promised to an ulp: a step has the bits of one pair.
NUDGES = sorted(itertools.product((0, -1, 1), repeat=2), key=lambda pair: np.abs(pair).sum())


def _of_tensor(case: FullCase, bits, step: int, number: int, place: Place, old: Element) -> Element:
    """What came out of a step of a tensor of an arena."""
    got = {"parameter": bits[f"p{step}.{place.tensor}"]}
    shape = got["parameter"].shape
    for slot in old.keys() - {"parameter"}:
        whole = bits[f"{slot}{step}.{_slot_number(case, slot, number)}"]
        kind = case.options.slot_dtype(slot, arenas(case)[number].dtype)
        got[slot] = part_of(whole, kind, place.offset, shape)
    return got


def _same(case: FullCase, dtype: str, slot: str, got: np.ndarray, want: np.ndarray) -> np.ndarray:
    name = case.out_dtype(dtype) if slot == "parameter" else case.options.slot_dtype(slot, dtype)
    if name in BYTE_FORMATS:
        return got == want
    return (got == want) | (np.isnan(widened(got, name)) & np.isnan(widened(want, name)))


def mismatches(case: FullCase, bits, wrong: Mistake = RIGHT) -> list[str]:
    """Where bits are not those of the (perhaps wrong) reference."""
    found = []
    if case.measured_only:
        return found
    for step in range(case.steps):
        used, measured = outcome(case, bits, step)
        want: dict[str, np.ndarray] = {}
        for number, place, dtype, old, gradient in tensors_of(case, bits, step):
            got = _of_tensor(case, bits, step, number, place, old)
            for nudged in NUDGES if "bias_correction" in case.options.flags else NUDGES[:1]:
                new = full_step_float32(
                    case.options, dtype, old, gradient, place, used, measured, wrong, nudged
                )
                if all(_same(case, dtype, slot, got[slot], new[slot]).all() for slot in new):
                    break
            assert new.keys() == old.keys()
            want[f"p{step}.{place.tensor}"] = new.pop("parameter")
            for slot, part in new.items():
                key = f"{slot}{step}.{_slot_number(case, slot, number)}"
                # Between the tensors are zeros.
                arena = arenas(case)[number]
                kind = case.options.slot_dtype(slot, dtype)
                shape = (arena.size // GROUP, ROW) if kind in BYTE_FORMATS else arena.size
                whole = want.setdefault(key, np.zeros(shape, part.dtype))
                here = part_of(whole, kind, place.offset, old["parameter"].shape)
                here[...] = part
        names = ("measured", "used", "step", "skipped")
        got_keys = {k for k in bits if not k.startswith(names) and _step_of(k) == step}
        assert want.keys() == got_keys
        for key, expected in want.items():
            got = bits[key]
            assert (got.shape, got.dtype) == (expected.shape, expected.dtype), key
            same = got == expected
            if got.dtype != np.uint8:
                nan = [np.isnan(_numbers(case, key, x)) for x in (got, expected)]
                same |= nan[0] & nan[1]
            if not same.all():
                found.append(f"{key}: elements {np.flatnonzero(~same.reshape(-1))[:5]}")
    return found


def _step_of(key: str) -> int:
    name = key.partition(".")[0]
    return int(name[len(name.rstrip("0123456789")) :])


def _numbers(case: FullCase, key: str, bits: np.ndarray) -> np.ndarray:
    name, _, number = key.partition(".")
    if name.rstrip("0123456789") == "p":
        return widened(bits, case.out_dtype(case.dtypes[int(number)]))
    slot = name.rstrip("0123456789")
    having = [a.dtype for a in arenas(case) if case.options.slot_dtype(slot, a.dtype)]
    return widened(bits, case.options.slot_dtype(slot, having[int(number)]))


@functools.cache
def mismatches_of_the_first(case: FullCase) -> list[str]:
    return mismatches(case, results(0)[case.name])


def identical(a, b) -> bool:
    return a.keys() == b.keys() and all(np.array_equal(a[key], b[key]) for key in a)


@every_case
def test_bits_of_float32_rounded_once(backend, case):
    bits = results(backend)[case.name]
    if identical(bits, results(0)[case.name]):
        assert mismatches_of_the_first(case) == []  # the same question, asked once
    else:
        assert mismatches(case, bits) == []


def excess(case: FullCase, dtype: str, got: Element, want: dict[str, Bounded]) -> dict[str, float]:
    """By how much numbers are further from float64 than their bounds; 0 and less is right."""
    numbers = numbers_in(got, case.options, dtype, case.out_dtype(dtype))
    if "compensation" in numbers:
        left = numbers.pop("compensation").astype(np.float64)
        numbers["sum"] = numbers["parameter"] + left
    if case.options.has_master24 and "master" in numbers:
        numbers["sum"] = master24_of(numbers["parameter"], numbers.pop("master"))
    assert numbers.keys() == want.keys()
    found = {}
    for name, value in numbers.items():
        error = np.abs(value.astype(np.float64) - want[name].value)
        found[name] = np.max(error - want[name].error, initial=-np.inf)
    return found


@every_case
def test_close_to_float64(case):
    bits = results(0)[case.name]
    for step in range(0 if case.measured_only else case.steps):
        used, measured = outcome(case, bits, step)
        if measured is not None and np.isinf(measured[0]) and measured[1]:
            continue  # no bound: test_bits_of_float32_rounded_once
        if case.bad is not None and not case.options.skip_nonfinite and step >= case.bad:
            continue  # likewise, of what is not finite
        for number, place, dtype, old, gradient in tensors_of(case, bits, step):
            want = full_step_float64(case.options, dtype, old, gradient, place, used, measured)
            got = _of_tensor(case, bits, step, number, place, old)
            for name, more in excess(case, dtype, got, want).items():
                assert more <= 0, f"{name} of tensor {place.tensor}, step {step}: {more}"


WITHIN_THE_BOUND = {
    # Roundings, and random bits.
    "scaled_by_division", "norm_without_epsilon", "compensation_of_the_exact", "rounded_to_nearest",
    "same_bits_for_slots", "position_in_the_tensor", "one_key_for_every_step",
    "one_key_for_every_arena", "average_of_the_exact", "slots_in_the_parameters_dtype",
    "rest_of_the_rounded", "decay_after_the_change", "clipped_before_unscaling",
    # What is not finite has no bound, and the smallest code is one step.
    "a_nan_for_all", "squares_become_zero",
}  # fmt: skip
BEYOND_THE_BOUND = sorted(f.name for f in fields(Mistake) if f.name not in WITHIN_THE_BOUND)


@pytest.mark.parametrize("mistake", BEYOND_THE_BOUND)
def test_the_bounds_catch(mistake):
    """A control: a step with this mistake is further from float64 than its bound."""
    wrong = replace(RIGHT, **{mistake: True})
    for dtype in ("float32", "float16", "bfloat16"):
        title = CATCHING[mistake]
        if dtype == "float32" and title in OF_HALF_TYPES:
            continue
        if dtype != "bfloat16" and title in OF_BFLOAT16:
            continue
        case = next(c for c in FULL_CASES if c.title == title and c.parameters == (dtype,))
        bits, found = results(0)[case.name], -np.inf
        for step in range(case.steps):
            used, measured = outcome(case, bits, step)
            for _, place, name, old, gradient in tensors_of(case, bits, step):
                arguments = (case.options, name, old, gradient, place, used, measured)
                with np.errstate(invalid="ignore"):  # infinities of a step not skipped
                    more = excess(
                        case,
                        name,
                        full_step_float32(*arguments, wrong),
                        full_step_float64(*arguments),
                    )
                found = max(found, *more.values())
        assert found > 0, dtype


# ---- What was measured -----------------------------------------------------------------

MEASURED = [case for case in FULL_CASES if case.options.is_measured]


def in_order(case: FullCase, values: np.ndarray) -> np.ndarray:
    """The numbers of an array in the order in which they are summed: that of memory where
    they fill it."""
    return (values.T if case.layout == "transposed" else values).reshape(-1)


@functools.cache
def measured_by_reference(case: FullCase) -> list[np.ndarray]:
    bits = results(0)[case.name]
    first, gradients, _ = values(case)
    found = []
    for step in range(case.steps):
        goes_on = step and not case.options.direction
        before = [bits[f"p{step - 1}.{i}"] for i in range(len(first))] if goes_on else first
        # The first parameters lie as the gradients do; later ones are an arena's.
        parameters = [
            in_order(case, widened(p, d)) if step == 0 else widened(p, d).reshape(-1)
            for p, d in zip(before, case.dtypes, strict=True)
        ]
        ready = [in_order(case, widened(g, case.gradient)) for g in gradients[step]]
        scale = outcome(case, bits, step)[0].grad_scale
        found.append(measured_float32(case.options, ready, parameters, scale))
    return found


@pytest.mark.parametrize("case", MEASURED, ids=lambda c: c.name)
def test_norms_have_the_promised_bits(case):
    bits = results(0)[case.name]
    for step, want in enumerate(measured_by_reference(case)):
        got = bits[f"measured{step}"].view(np.float32)
        assert np.array_equal(got, want, equal_nan=True), step


@pytest.mark.parametrize("case", MEASURED, ids=lambda c: c.name)
def test_norms_are_close_to_float64(backend, case):
    bits = results(backend)[case.name]
    first, gradients, _ = values(case)
    options = case.options
    composed = BACKENDS[backend].name == COMPOSED
    for step in range(case.steps):
        got = bits[f"measured{step}"].view(np.float32).astype(np.float64)
        scale = np.float64(outcome(case, bits, step)[0].grad_scale)
        scale = scale if scale >= 2.0**-126 else np.nan  # which cannot be inverted
        with np.errstate(all="ignore"):
            ready = [widened(g, case.gradient).astype(np.float64) / scale for g in gradients[step]]
            if options.clip_value is not None:
                limit = np.float64(np.float32(options.clip_value))
                ready = [np.clip(g, -limit, limit) for g in ready]
            norms = [np.sqrt(sum(np.square(g).sum() for g in ready))]
            if options.trust_coefficient is not None:
                before = [bits[f"p{step - 1}.{i}"] for i in range(len(first))] if step else first
                for g, bits_of, dtype in zip(ready, before, case.dtypes, strict=True):
                    parameter = widened(bits_of, dtype).astype(np.float64)
                    norms += [np.sqrt(np.square(x).sum()) for x in (g, parameter)]
        for a, b in zip(np.delete(got, 1), norms, strict=True):
            if not np.isfinite(b):
                assert not np.isfinite(a)
            elif b > np.finfo(np.float32).max:
                assert a == np.inf
            else:
                # A sum in MLX's order promises less.
                assert abs(a - b) <= (1e-5 if composed else 1e-6) * b


def test_skipped_steps(backend):
    """Exactly those with a gradient that is not finite, or a norm to clip that is not."""
    skipping = [case for case in FULL_CASES if case.options.skip_nonfinite]
    assert {case.bad for case in skipping} == {None, 1}
    for case in FULL_CASES:
        bits = results(backend)[case.name]
        skipped, count = 7, case.first_step
        for step in range(case.steps):
            overflows = case.title in ("overflow", "overflow_unscaled", "overflow_inverse")
            bad = case.options.skip_nonfinite and (step == case.bad or overflows)
            assert applies(case, bits, step) is not bad, (case.name, step)
            skipped, count = skipped + bad, count + (not bad)
            assert bits[f"step{step}"] == count
            if case.options.is_measured:
                assert bits[f"skipped{step}"] == skipped
            else:
                assert f"skipped{step}" not in bits


def _reads_step(case: FullCase) -> bool:
    """Whether something depends on the step in its first arena, which is the one that tells."""
    first, options = arenas(case)[0].dtype, case.options
    rounds = {first, options.momentum_dtype or first} != {"float32"}
    return case.numbers == "schedules" or options.skip_nonfinite or (options.stochastic and rounds)


def test_scalars_that_were_used(backend):
    """Told where something depends on the step."""
    told = 0
    for case in FULL_CASES:
        bits = results(backend)[case.name]
        on_step = {"stochastic", "skip_nonfinite", "bias_correction"} & case.options.flags
        for step in range(case.steps):
            if case.numbers != "schedules" and not on_step:
                assert f"used{step}" not in bits, case.name
                continue
            told += 1
            used, _ = outcome(case, bits, step)
            expected = case.expected_scalars(counter(case, bits, step))
            assert used.values.keys() == expected.keys()
            for name, want in expected.items():
                got, want = np.float32(used.values[name]), np.float32(want)
                if flushes(backend):  # which it may do or not to a number that it only copies
                    got, want = flushed(got), flushed(want)
                ulps = 2 if case.numbers == "schedules" and name in case.varying else 0
                assert abs(float(got) - float(want)) <= ulps * np.spacing(want), (case.name, name)
    assert told > 100


# ---- mlx.optimizers -----------------------------------------------------------------------

CLASSES = {
    "sgd": ("SGD", ("momentum", "weight_decay", "dampening", "nesterov")),
    "adam": ("Adam", ("betas", "eps")),
    "adamax": ("Adamax", ("betas", "eps")),
    "lion": ("Lion", ("betas",)),
    "rmsprop": ("RMSprop", ("alpha", "eps")),
    "adagrad": ("Adagrad", ("eps",)),
    "adadelta": ("AdaDelta", ("rho", "eps")),
    "muon": ("Muon", ("momentum", "nesterov")),  # whose vectors are not orthogonalised
}
DECOUPLED = {"adam": "AdamW", "lion": "Lion"}  # the weight decay that MLX has of these


@pytest.mark.parametrize("rule", [*PLAIN, "adam_decoupled", "lion_decoupled", "sgd_decay"])
def test_float32_has_the_bits_of_mlx(rule):
    """Run eagerly on the CPU, from the same parameters and slots; other backends have the bits
    of the first one."""
    case = next(c for c in FULL_CASES if c.title == rule)
    case = replace(case, parameters=("float32",), gradient="float32")
    bits = run_case(case, mx.cpu)
    options = case.options
    name, arguments = CLASSES[options.rule]
    numbers = {k: getattr(options, k, None) for k in arguments if k != "betas"}
    if "betas" in arguments:
        numbers["betas"] = [options.beta1, options.beta2]
    numbers = {k: 0.0 if x is None else x for k, x in numbers.items()}
    if options.decoupled:
        name, numbers["weight_decay"] = DECOUPLED[options.rule], options.weight_decay
    first, gradients, slots = case.values()
    if options.rule == "muon":
        numbers["weight_decay"] = 0.0
        first, gradients = (
            [p.reshape(-1) for p in first],
            [[g.reshape(-1) for g in gs] for gs in gradients],
        )
    (arena,) = arenas(case)
    keys = {s: s.replace("velocity", "v") for s in slots_of(options.rule, options.flags)}
    with mx.stream(mx.cpu):
        optimizer = getattr(mlx.optimizers, name)(LEARNING_RATE, **numbers)
        parameters = {"w": [to_mlx(p, "float32") for p in first]}
        optimizer.init(parameters)
        for tensor, offset in zip(arena.tensors, arena.offsets, strict=True):
            for slot, key in keys.items():
                here = slots[f"{slot}.0"][offset : offset + first[tensor].size]
                state = optimizer.state["w"][tensor]
                assert key in state
                state[key] = to_mlx(here.reshape(first[tensor].shape), "float32")
        for step in range(case.steps):
            gradient = {"w": [to_mlx(g, "float32") for g in gradients[step]]}
            parameters = optimizer.apply_gradients(gradient, parameters)
            mx.eval(parameters, optimizer.state)
            for tensor, offset in zip(arena.tensors, arena.offsets, strict=True):
                parameter = parameters["w"][tensor]
                expected = bits[f"p{step}.{tensor}"].reshape(first[tensor].shape)
                assert np.array_equal(of_mlx(parameter), expected)
                for slot, key in keys.items():
                    theirs = of_mlx(optimizer.state["w"][tensor][key]).reshape(-1)
                    whole = bits[f"{slot}{step}.0"]
                    assert np.array_equal(theirs, whole[offset : offset + theirs.size])


# ---- Backends, layouts, the table itself --------------------------------------------------


@pytest.mark.parametrize("number", range(1, len(BACKENDS)), ids=[b.name for b in BACKENDS[1:]])
def test_same_bits_as_the_first_backend(number):
    for case in FULL_CASES:
        first, other = results(0)[case.name], results(number)[case.name]
        if BACKENDS[number].name == COMPOSED:
            if {"clip_norm", "trust_ratio"} & case.options.flags:
                continue  # from its own norms: test_bits_of_float32_rounded_once
            first, other = (
                {k: v for k, v in bits.items() if not k.startswith("measured")}
                for bits in (first, other)
            )
        if flushes(number):
            # A subnormal scale is a zero there: neither has an inverse, and all else is the same.
            first, other = (
                bits
                | {
                    k: flushed(v.view(np.float32)).view(np.uint32)
                    for k, v in bits.items()
                    if "used" in k
                }
                for bits in (first, other)
            )
        assert identical(first, other), case.name


def test_every_two_choices_meet():
    rows = covering_array(CHOICES)
    for (a, of_a), (b, of_b) in itertools.combinations(CHOICES.items(), 2):
        met = {(row[a], row[b]) for row in rows}
        assert met == set(itertools.product(range(len(of_a)), range(len(of_b)))), (a, b)
    assert {case.title for case in FULL_CASES} >= {f"pairs{i}" for i in range(len(rows))}
    assert set(CHOICES["layout"]) == set(LAYOUTS)


# The case in which a mistake shows; None: some case has the options that it needs.
CATCHING = {
    "gradient_not_negated": "sgd_maximize",
    "gradient_not_unscaled": "sgd_grad_scale",
    "scaled_by_division": "sgd_grad_scale",
    "not_clipped_by_value": "sgd_clip_value",
    "clipped_before_unscaling": None,
    "not_clipped_by_norm": "sgd_clip_norm",
    "norm_without_epsilon": "small_norm",
    "skipped_step_taken": "sgd_skip_nonfinite",
    "trust_ratio_left_out": "sgd_trust_ratio",
    "trust_ratio_without_decay": "sgd_trust_ratio_decay",
    "groups_ignored": "sgd_groups",
    "flags_of_groups_ignored": "sgd_groups",
    "groups_own_scalars_ignored": "sgd_groups",
    "decay_coupled": "sgd_decoupled",
    "decay_after_the_change": "sgd_decoupled",
    "decay_of_the_parameter": "sgd_master_weights",
    "master_always_wins": "sgd_master_weights",
    "master_rounded": "sgd_master_weights",
    "byte_forgotten": "sgd_master24",
    "byte_in_units_of_the_parameter": "large_master24",
    "ties_of_24_bits_to_even": "large_master24",
    "compensation_forgotten": "sgd_compensated",
    "compensation_of_the_exact": None,
    "rounded_to_nearest": "sgd_stochastic",
    "same_bits_for_slots": "sgd_stochastic",
    "position_in_the_tensor": "sgd_stochastic",
    "one_key_for_every_step": "sgd_stochastic",
    "one_key_for_every_arena": "sgd_stochastic",
    "average_of_the_old": "sgd_ema",
    "average_of_the_exact": "sgd_ema",
    "slots_in_the_parameters_dtype": "sgd_state_float32",
    "rest_of_the_rounded": "adam",
    "dampening_forgotten": "momentum",
    "nesterov_forgotten": "sgd",
    "moments_not_moved": "adam",
    "squares_of_nothing": "rmsprop",
    "epsilon_forgotten": "adagrad",
    "epsilon_under_the_root": "adam",
    "not_corrected": "bias_correction",
    "corrected_by_the_step_before": "bias_correction",
    "root_not_corrected": "bias_correction",
    "scale_of_the_tensor": "sgd_state_8bit",
    "not_companded": "sgd_state_8bit",
    "codes_cut_off": "sgd_state_8bit",
    "squares_become_zero": "squares_8bit",
    "a_nan_for_all": "sgd_8bit_bad",
    "largest_forgotten": "amsgrad",
    "largest_of_the_old": "amsgrad",
    "magnitude_forgotten": "adamax",
    "direction_of_the_new_moment": "lion",
    "direction_not_a_sign": "lion",
    "changes_of_the_new": "adadelta",
    "changes_forgotten": "adadelta",
}
OF_HALF_TYPES = {
    "sgd_master_weights", "sgd_compensated", "sgd_stochastic", "sgd_state_float32",
}  # fmt: skip
OF_BFLOAT16 = {"sgd_master24", "large_master24"}
# The store of a half type hides almost all of it.
EXACT_ONLY_IN_FLOAT32 = {"scaled_by_division", "norm_without_epsilon", "rest_of_the_rounded"}


@pytest.mark.parametrize("mistake", [f.name for f in fields(Mistake)])
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_the_table_catches(mistake, dtype):
    """A control: a step with this mistake has other bits than ours."""
    title = CATCHING[mistake]
    wrong = replace(RIGHT, **{mistake: True})
    if title is None:  # needs two options: some combination has them
        several = [c for c in FULL_CASES if c.title.startswith("pairs") and dtype in c.parameters]
        assert any(mismatches(case, results(0)[case.name], wrong) for case in several)
        return
    if mistake in EXACT_ONLY_IN_FLOAT32:
        dtype = "float32"  # the store of a half type hides almost all of it
    if title in OF_BFLOAT16 or (dtype == "float32" and title in OF_HALF_TYPES):
        dtype = "bfloat16"
    if mistake == "average_of_the_exact" and dtype == "float32":
        dtype = "float16"  # a float32 parameter is exact
    case = next(c for c in FULL_CASES if c.title == title and c.parameters == (dtype,))
    bits = results(0)[case.name]
    assert mismatches(case, bits) == []
    assert mismatches(case, bits, wrong)


def test_every_option_alone():
    """In the table with every rule; a flag without a row is a forgotten option."""
    from mlx_fused_optim import _ext

    alone = [case for case in FULL_CASES if not case.title.startswith("pairs")]
    for row in _ext.RULES:
        flags = {f for c in alone if c.options.rule == row["name"] for f in c.options.flags}
        assert flags == {*_ext.FLAGS, *row["flags"]}
        # Here "momentum" is the number, and "v" a square.
        named = {"v": "velocity"} if row["name"] == "muon" else {"momentum": "velocity"}
        assert tuple(named.get(s, s) for s in row["slots"]) == RULES[row["name"]].slots
        assert tuple(row["scalars"]) == RULES[row["name"]].scalars
