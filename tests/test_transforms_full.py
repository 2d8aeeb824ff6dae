"""Derivatives of a full step with respect to everything that goes in, and vmap over its
gradients.

The derivatives are held against finite differences of the step in float64, norms included.
Rounding counts as the identity there: a derivative goes straight through it.
"""

import math
from collections.abc import Callable
from dataclasses import replace

import mlx.core as mx
import mlx_fused_optim as optim
import numpy as np
import pytest
from bits import DTYPES, of_mlx, same
from full_references import arenas_of
from full_step import FRAME_SLOTS, Full, Group, State, full_step
from mlx_fused_optim import _ext
from rules import RULES, SIGNED, Numbers, corrections

SHAPES = ((7, 5), (3,), ())
LEARNING_RATE = 0.25
STEP = 4
GROUPS = (
    Group(trust_coefficient=0.4),
    Group((0.5, 0.1), (2.0, 0.01), 0.7, ((0.8, 0.05), (0.5, 0.2)), without=("nesterov",)),
    Group(without=("momentum", "nesterov", "trust_ratio", "amsgrad")),
)
MOMENTUM = Full(momentum=0.9, dampening=0.3, weight_decay=0.1)
NESTEROV = Full(momentum=0.9, nesterov=True, weight_decay=0.1)
# The norm of the gradients is about 7.
OPTIONS = {
    "momentum through the full kernel": replace(MOMENTUM, maximize=True),
    "grad_scale": replace(MOMENTUM, grad_scale=3.0),
    "clip_value": Full(grad_scale=2.0, clip_value=0.4),
    "clip_norm": replace(MOMENTUM, clip_norm=2.0),
    "clip_norm of a small one": replace(MOMENTUM, clip_norm=1e3),
    "clip_norm, all clips": replace(NESTEROV, clip_norm=0.5, clip_value=0.4, grad_scale=2.0),
    "skip_nonfinite": replace(MOMENTUM, skip_nonfinite=True, clip_norm=2.0),
    "trust ratio": Full(trust_coefficient=0.5),
    "trust ratio, decay": replace(NESTEROV, trust_coefficient=0.5),
    "trust ratio, decoupled": replace(NESTEROV, trust_coefficient=0.5, decoupled=True),
    "trust ratio, clip_norm": replace(MOMENTUM, trust_coefficient=0.5, clip_norm=2.0),
    "decoupled": replace(MOMENTUM, decoupled=True),
    "ema": replace(MOMENTUM, ema_decay=0.7),
    "groups": replace(NESTEROV, groups=GROUPS, trust_coefficient=0.5),
    "everything": replace(
        NESTEROV, maximize=True, grad_scale=3.0, clip_value=0.6, clip_norm=1.0, groups=GROUPS,
        skip_nonfinite=True, trust_coefficient=0.5, ema_decay=0.7, master_weights=True,
        stochastic=True,
    ),
}  # fmt: skip
for _rule in RULES:
    OPTIONS[_rule] = Full(_rule, eps=0.1, beta2=0.9, weight_decay=0.1)
    OPTIONS[f"{_rule}, decoupled"] = replace(OPTIONS[_rule], decoupled=True, clip_norm=2.0)
OPTIONS["adam, corrected"] = replace(OPTIONS["adam"], bias_correction=True)
OPTIONS["adam, everything"] = replace(
    OPTIONS["everything"], rule="adam", eps=0.1, beta2=0.9, bias_correction=True, amsgrad=True
)
HALF_OPTIONS = {
    "master_weights": replace(MOMENTUM, master_weights=True, ema_decay=0.7),
    "compensated": replace(MOMENTUM, compensated=True, ema_decay=0.7),
    "stochastic": replace(MOMENTUM, stochastic=True, ema_decay=0.7),
    "state_dtype": replace(MOMENTUM, state_dtype="float32", clip_norm=2.0),
    "everything": OPTIONS["everything"],
    "adam, everything": OPTIONS["adam, everything"],
}
CASES = [(name, "float32") for name in OPTIONS] + [
    (name, dtype) for name in HALF_OPTIONS for dtype in ("float16", "bfloat16")
]
every_case = pytest.mark.parametrize("name, dtype", CASES)

Values = dict[str, list[np.ndarray]]
"""By tensor: 'parameter', 'gradient' and slots; and one number for each scalar."""


def options_of(name: str, dtype: str) -> Full:
    return OPTIONS[name] if dtype == "float32" else HALF_OPTIONS[name]


def first_values(options: Full, dtype: str) -> Values:
    """Numbers that their dtypes hold exactly."""
    random = np.random.default_rng(3)

    def draw(kind: str) -> list[np.ndarray]:
        arrays = [mx.array(random.standard_normal(s).astype(np.float32)) for s in SHAPES]
        return [np.array(a.astype(DTYPES[kind]).astype(mx.float32)) for a in arrays]

    values = {"parameter": draw(dtype), "gradient": draw("float32")}
    for slot in filter(None, options.places):
        kind = options.slot_dtype(slot, dtype)
        if kind is not None:
            values[slot] = draw(kind)
            if slot not in (*SIGNED, *FRAME_SLOTS):
                values[slot] = [np.abs(x) for x in values[slot]]
    if "master" in values:  # of which the parameters are the roundings
        values["master"] = [p * np.float32(1 + 2.0**-13) for p in values["parameter"]]
    if "compensation" in values:
        values["compensation"] = [c * np.float32(2.0**-10) for c in values["compensation"]]
    for scalar, number in {**options.scalars, "learning_rate": LEARNING_RATE}.items():
        values[scalar] = [np.array(number, np.float32)]
    return values


def mathematics(options: Full, values: Values) -> Values:
    """The new parameters and slots, in float64 and without any rounding."""
    rate, weight_decay, scale, *scalars = (values[name][0] for name in options.scalar_names)
    sign = -1.0 if options.maximize else 1.0
    gradients = [g / scale if options.grad_scale else g for g in values["gradient"]]
    if options.clip_value is not None:
        gradients = [np.clip(g, -options.clip_value, options.clip_value) for g in gradients]
    factor = 1.0
    if options.clip_norm is not None:
        norm = np.sqrt(sum((g * g).sum() for g in gradients))
        factor = min(options.clip_norm / (norm + 1e-6), 1.0)
    # Trust ratios are of the parameters, not of their masters.
    kept = values.get("master", values["parameter"])
    new: Values = {name: [] for name in values if name not in ("gradient", *options.scalar_names)}
    for t, (before, w, g) in enumerate(zip(values["parameter"], kept, gradients, strict=True)):
        flags, trust = set(options.flags), options.trust_coefficient
        lr, decay, own = rate, weight_decay, list(scalars)
        if options.groups is not None:
            group = options.groups[t % len(options.groups)]
            flags -= set(group.without)
            lr = group.rate[0] * rate + group.rate[1]
            decay = group.weight_decay[0] * weight_decay + group.weight_decay[1]
            own = [
                times * x + plus
                for x, (times, plus) in zip(own, map(group.own, range(3)), strict=False)
            ]
            trust = group.trust_coefficient
        update = sign * g * factor
        coupled = "weight_decay" in flags and not options.decoupled
        if coupled:
            update = update + decay * w
        if "trust_ratio" in flags:
            of_parameter = np.sqrt((before * before).sum())
            below = np.sqrt((g * g).sum()) * factor + (decay * of_parameter if coupled else 0.0)
            update = update * (trust * of_parameter / below)
        rule = RULES[options.rule]
        rates = [1.0, 1.0]
        if "bias_correction" in flags:
            rates = list(corrections(lr, own, STEP + 1))
        named = dict(zip(rule.scalars, own, strict=True))
        rest = {name: 1 - x for name, x in named.items()}
        kept_of = {slot: values[slot][t] for slot in rule.slots if slot in values}
        change, after = rule.change(update, kept_of, Numbers(lr, named, rest, *rates, flags))
        if "weight_decay" in flags and options.decoupled:
            w = w * (1 - lr * decay)
        for slot, x in {**kept_of, **after}.items():
            new[slot].append(x)
        lost = values["compensation"][t] if "compensation" in values else 0.0
        after = w - change + lost
        new["parameter"].append(after)
        if "master" in values:
            new["master"].append(after)
        if "compensation" in values:
            new["compensation"].append(np.zeros_like(after))
        if "average" in values:
            average = values["average"][t]
            new["average"].append(average + (1 - options.ema_decay) * (after - average))
    return new


class Step:
    """A step as a function of flat lists of arrays, for MLX's transforms."""

    def __init__(self, options: Full, dtype: str):
        self.options, self.dtype = options, dtype
        self.values = first_values(options, dtype)
        (self.arena,) = arenas_of(SHAPES, [dtype] * len(SHAPES))
        self.scalars = options.scalar_names
        self.slots = [slot for slot in options.places if slot in self.values]

    def packed(self, arrays: list[np.ndarray]) -> np.ndarray:
        flat = np.zeros(self.arena.size)
        for offset, values in zip(self.arena.offsets, arrays, strict=True):
            flat[offset : offset + values.size] = values.reshape(-1)
        return flat

    def unpacked(self, flat: np.ndarray) -> list[np.ndarray]:
        return [
            flat[offset : offset + math.prod(shape)].reshape(shape)
            for offset, shape in zip(self.arena.offsets, SHAPES, strict=True)
        ]

    def arrays(self, values: Values) -> list[mx.array]:
        """Parameters, gradients, scalars, arenas of the slots."""
        arrays = [mx.array(p.astype(np.float32)).astype(DTYPES[self.dtype])
                  for p in values["parameter"]]  # fmt: skip
        arrays += [mx.array(g.astype(np.float32)) for g in values["gradient"]]
        arrays += [mx.array(values[name][0].astype(np.float32)) for name in self.scalars]
        for slot in self.slots:
            kind = DTYPES[self.options.slot_dtype(slot, self.dtype)]
            arrays.append(mx.array(self.packed(values[slot]).astype(np.float32)).astype(kind))
        return arrays

    def numbers(self, arrays: list[mx.array]) -> Values:
        """The other way round, for derivatives."""
        n = len(SHAPES)
        parts = [np.array(a.astype(mx.float32)).astype(np.float64) for a in arrays]
        values = {"parameter": parts[:n], "gradient": parts[n : 2 * n]}
        for name, part in zip(self.scalars, parts[2 * n :], strict=False):
            values[name] = [part]
        for slot, part in zip(self.slots, parts[2 * n + len(self.scalars) :], strict=True):
            values[slot] = self.unpacked(part)
        return values

    def __call__(self, *arrays: mx.array) -> list[mx.array]:
        n = len(SHAPES)
        rate, *scalars = arrays[2 * n : 2 * n + len(self.scalars)]
        given = dict(zip(self.scalars[1:], scalars, strict=True))
        slots = iter(arrays[2 * n + len(self.scalars) :])
        state = State(
            [[next(slots)] if slot in self.slots else [] for slot in self.options.places],
            mx.array(STEP, mx.uint64),
            mx.array(0, mx.uint64),
        )
        parameters, state = full_step(
            self.options, arrays[:n], arrays[n : 2 * n], state, rate, **given
        )
        return [*parameters, *(arena for slot in state.slots for arena in slot)]

    def of_gradients(self, arrays: list[mx.array]) -> Callable[..., list[mx.array]]:
        n = len(SHAPES)
        return lambda *gradients: self(*arrays[:n], *gradients, *arrays[2 * n :])

    def outputs(self, values: Values) -> list[np.ndarray]:
        """What __call__ gives, by the mathematics."""
        new = mathematics(self.options, values)
        return [*new["parameter"], *(self.packed(new[slot]) for slot in self.slots)]

    def weights(self) -> list[np.ndarray]:
        """Of the outputs in a loss: few digits, so that every dtype has them."""
        random = np.random.default_rng(5)
        shapes = [*SHAPES, *((self.arena.size,) for _ in self.slots)]
        return [random.integers(-8, 9, shape) / 8.0 for shape in shapes]


def wide(values: Values) -> Values:
    return {name: [np.asarray(x, np.float64) for x in arrays] for name, arrays in values.items()}


def finite_differences(step: Step) -> Values:
    """Of the weighted sum of all outputs, in float64."""
    values, weights = wide(step.values), step.weights()

    def loss() -> float:
        outputs = step.outputs(values)
        return sum(float((w * x).sum()) for w, x in zip(weights, outputs, strict=True))

    found: Values = {}
    for name, arrays in values.items():
        found[name] = []
        for array in arrays:
            derivative = np.zeros(array.shape)
            for at in np.ndindex(array.shape):
                kept, ends = array[at], []
                for sign in (1, -1):
                    array[at] = kept + sign * 1e-5
                    ends.append(loss())
                array[at] = kept
                derivative[at] = (ends[0] - ends[1]) / 2e-5
            found[name].append(derivative)
    return found


def assert_derivatives(got: Values, want: Values, step: Step) -> None:
    assert got.keys() == want.keys()
    for name in want:
        kind = "float32"
        if name == "parameter":
            kind = step.dtype
        elif name in step.slots:
            kind = step.options.slot_dtype(name, step.dtype)
        tolerance = 1e-4 if kind == "float32" else 2e-2
        if step.dtype != "float32" and step.options.stochastic:
            tolerance = 2e-2  # the average's derivative goes through the half type
        size = max(1.0, *(np.abs(x).max(initial=0) for x in want[name]))
        for a, b in zip(got[name], want[name], strict=True):
            np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance * size, err_msg=name)


@every_case
def test_values(name, dtype):
    """The mathematics of this file is that of the step."""
    step = Step(options_of(name, dtype), dtype)
    tolerance = {"float32": 1e-5, "float16": 2e-3, "bfloat16": 2e-2}[dtype]
    got = step(*step.arrays(step.values))
    for a, b in zip(got, step.outputs(wide(step.values)), strict=True):
        np.testing.assert_allclose(
            np.array(a.astype(mx.float32)), b, rtol=tolerance, atol=tolerance
        )


@every_case
def test_vjp(name, dtype):
    step = Step(options_of(name, dtype), dtype)
    arrays = step.arrays(step.values)
    outputs = step(*arrays)
    cotangents = [
        mx.array(w.astype(np.float32)).astype(x.dtype)
        for w, x in zip(step.weights(), outputs, strict=True)
    ]
    _, found = mx.vjp(step, arrays, cotangents)
    want = finite_differences(step)
    assert max(np.abs(g).max() for g in want["gradient"]) > 1e-3  # there is something to find
    assert_derivatives(step.numbers(found), want, step)


@every_case
def test_jvp(name, dtype):
    """Along one direction, of which every input has a part."""
    step = Step(options_of(name, dtype), dtype)
    arrays = step.arrays(step.values)
    random = np.random.default_rng(6)
    directions = {
        key: [random.integers(-8, 9, x.shape) / 8.0 for x in values]
        for key, values in step.values.items()
    }
    _, tangents = mx.jvp(step, arrays, step.arrays(directions))
    want = finite_differences(step)
    slope = sum(
        float((a * b).sum())
        for key in want
        for a, b in zip(want[key], directions[key], strict=True)
    )
    got = sum(
        float((w * np.array(t.astype(mx.float32))).sum())
        for w, t in zip(step.weights(), tangents, strict=True)
    )
    tolerance = 2e-4 if dtype == "float32" else 3e-2
    assert abs(got - slope) <= tolerance * max(10, abs(slope))


@pytest.mark.parametrize("name", ["clip_norm", "trust ratio, decay", "skip_nonfinite"])
def test_gradients_that_are_zero_have_derivatives(name):
    """Norms of 0, whose roots have none: nothing becomes NaN."""
    step = Step(OPTIONS[name], "float32")
    for zero in ([0], [0, 1, 2]):
        for t in zero:
            step.values["gradient"][t] = np.zeros_like(step.values["gradient"][t])
        arrays = step.arrays(step.values)
        _, found = mx.vjp(step, arrays, [mx.ones(x.shape) for x in step(*arrays)])
        for name_of, derivatives in step.numbers(found).items():
            assert all(np.isfinite(d).all() for d in derivatives), name_of


def test_a_skipped_step_is_the_identity():
    """Its outputs are its inputs, whatever the gradients are: so are the derivatives."""
    step = Step(replace(OPTIONS["skip_nonfinite"], trust_coefficient=0.5), "float32")
    for bad in (np.inf, np.nan):
        step.values["gradient"][0][1, 1] = bad
        arrays = step.arrays(step.values)
        outputs = step(*arrays)
        weights = [mx.array(w.astype(np.float32)) for w in step.weights()]
        _, found = mx.vjp(step, arrays, weights)
        got = step.numbers(found)
        for a, b in zip(got.pop("parameter"), weights, strict=False):
            assert np.array_equal(a, np.array(b))
        mask = step.packed([np.ones(s) for s in SHAPES])
        velocity = np.array(weights[len(SHAPES)]) * mask
        for a, b in zip(got.pop("velocity"), step.unpacked(velocity), strict=True):
            assert np.array_equal(a, b)
        for name, derivatives in got.items():
            assert all((d == 0).all() for d in derivatives), name
        for a, b in zip(outputs, [*arrays[: len(SHAPES)], arrays[-1]], strict=True):
            assert same(a, b)


# ---- vmap --------------------------------------------------------------------------------


@every_case
def test_vmap_over_gradients(name, dtype):
    """Each step of a batch as if it were alone; the norms are each one's own."""
    step = Step(options_of(name, dtype), dtype)
    arrays = step.arrays(step.values)
    batch = 3
    random = np.random.default_rng(8)
    gradients = [
        mx.array((random.standard_normal((batch, *s)) * 2).astype(np.float32)) for s in SHAPES
    ]

    of_gradients = step.of_gradients(arrays)
    batched = mx.vmap(of_gradients)(*gradients)
    for b in range(batch):
        alone = of_gradients(*(g[b] for g in gradients))
        for many, one in zip(batched, alone, strict=True):
            tolerance = {"float32": 1e-6, "float16": 1e-3, "bfloat16": 8e-3}[dtype]
            np.testing.assert_allclose(
                np.array(many[b].astype(mx.float32)),
                np.array(one.astype(mx.float32)),
                rtol=tolerance,
                atol=tolerance,
            )


def test_vmap_skips_one_of_a_batch():
    step = Step(OPTIONS["skip_nonfinite"], "float32")
    arrays, n = step.arrays(step.values), len(SHAPES)
    gradients = [mx.stack([g, g * 2]) for g in arrays[n : 2 * n]]
    bad = np.array(gradients[1])
    bad[1, 0] = np.nan
    gradients[1] = mx.array(bad)
    new = mx.vmap(step.of_gradients(arrays))(*gradients)
    for many, one, old in zip(new, step(*arrays), [*arrays[:n], arrays[-1]], strict=True):
        np.testing.assert_allclose(np.array(many[0]), np.array(one), rtol=1e-6, atol=1e-6)
        assert np.array_equal(of_mlx(many[1]), of_mlx(old))


def test_vmap_without_norms_has_the_same_bits():
    for name, dtype in (("stochastic", "bfloat16"), ("compensated", "float16"), ("ema", "float32")):
        step = Step(options_of(name, dtype), dtype)
        arrays, n = step.arrays(step.values), len(SHAPES)
        gradients = [mx.stack([g, g * 2]) for g in arrays[n : 2 * n]]

        of_gradients = step.of_gradients(arrays)
        batched = mx.vmap(of_gradients)(*gradients)
        for b in range(2):
            for many, one in zip(batched, of_gradients(*(g[b] for g in gradients)), strict=True):
                assert same(many[b], one), (name, b)


@pytest.mark.parametrize("axis", [0, 1])
def test_a_view_of_a_batch_of_arenas(axis):
    arenas = mx.arange(24, dtype=mx.float32).reshape(3, 8)
    given = arenas if axis == 0 else arenas.T
    views = mx.vmap(lambda arena: _ext.arena_view(arena, [2, 2], 3), in_axes=axis)(given)
    assert np.array_equal(np.array(views), np.array(arenas)[:, 3:7].reshape(3, 2, 2))


@pytest.mark.parametrize("rounding", ["nearest", "stochastic"])
def test_derivatives_go_past_the_byte_of_a_master(rounding):
    """With a master of 24 bits they are those with a float32 one, but that the parameter is a
    part of it, where a float32 master stands for the parameter. And a vectorised step has the
    bits of each alone."""
    random = np.random.default_rng(4)
    gradient, weights = (mx.array(random.standard_normal(70).astype(np.float32)) for _ in "ab")
    first = {"w": mx.array(random.standard_normal(70).astype(np.float32)).astype(mx.bfloat16)}

    def stepped(masters, parameter, gradient, rate):
        options = {"momentum": 0.5, "master_weights": masters, "rounding": rounding}
        state = optim.fused_sgd_init(first, **options)
        parameters, gradients = {"w": parameter}, {"w": gradient}
        new, _ = optim.fused_sgd_step(parameters, gradients, state, learning_rate=rate, **options)
        return new["w"]

    def loss(masters):
        return lambda *args: (stepped(masters, *args).astype(mx.float32) * weights).sum()

    primals = [first["w"], gradient, mx.array(0.125)]
    tangents = [mx.zeros_like(first["w"]), mx.ones_like(gradient), mx.array(1.0)]
    found = [mx.grad(loss(masters), argnums=(0, 1, 2))(*primals) for masters in ("24bit", True)]
    forward = [mx.jvp(loss(masters), primals, tangents)[1][0] for masters in ("24bit", True)]
    assert same(found[0][0], weights.astype(mx.bfloat16))
    assert all(same(a, b) for a, b in zip(found[0][1:], found[1][1:], strict=True))
    assert same(*forward)
    assert all(mx.abs(x).max().item() > 0 for x in (*found[0], forward[0]))

    rates = mx.array([0.125, 0.5])
    many = mx.vmap(lambda rate: stepped("24bit", first["w"], gradient, rate))(rates)
    for number, rate in enumerate(rates):
        assert same(many[number], stepped("24bit", first["w"], gradient, rate))
