"""The full step beside the mathematics in float64, and what its options promise."""

import itertools
import math
import os
import random
import subprocess
import sys

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers
import mlx_fused_optim as optim
import numpy as np
import pytest
from bits import DTYPES, EPSILON, TINIEST, dtype_name, narrowed, of_mlx, same, to_mlx
from conformance import Options
from hypothesis import given, settings
from hypothesis import strategies as st
from ids import spelled
from mlx.utils import tree_flatten, tree_unflatten
from mlx_fused_optim import reference
from references import step_float64
from test_optimizer import network, train
from test_traces import CONFIGURATIONS, INPUTS, OPTAX, STEPS, TORCH, Trace, flat, traces, tree

SIZES = (1, 7, 64, 129, 300)
HALVES = ("float16", "bfloat16")
NAN, INF = math.nan, math.inf


def bias(path, array):
    return path in ("t0", "t3")


GROUPS = {
    "none": (),
    "rates": [(bias, {"learning_rate_factor": 3.0, "weight_decay": 0.0})],
    "terms": [(bias, {"momentum": 0.0, "trust_coefficient": None, "learning_rate": 0.02})],
    "more terms": [(bias, {"momentum": 0.5, "trust_coefficient": 0.01, "weight_decay": 0.1})],
}


def tensors(seed, dtypes, scale=1.0):
    """Never 0, so that nothing can be forgotten; exact in no narrow format."""
    numbers = np.random.default_rng(seed)
    result = {}
    for i, size in enumerate(SIZES):
        values = numbers.standard_normal(size).astype(np.float32)
        values = np.where(np.abs(values) < 2**-6, np.float32(0.5), values) * np.float32(scale)
        dtype = dtypes[i % len(dtypes)]
        result[f"t{i}"] = to_mlx(narrowed(values, dtype), dtype)
    return result


def float64(array):
    return np.array(array.astype(mx.float32)).astype(np.float64)


# ---- The mathematics ------------------------------------------------------------------


class Exact:
    """One step in float64 from given numbers, without any rounding, and how large the terms
    were that it is made of."""

    def __init__(self, parameters, gradients, kept, options):
        o = {"momentum": 0.0, "weight_decay": 0.0, "dampening": 0.0, **options}
        sign = -1.0 if o.get("maximize") else 1.0
        scale, limit = o.get("grad_scale", 1.0), o.get("clip_value") or INF
        g = {k: np.clip(sign * float64(a) / scale, -limit, limit) for k, a in gradients.items()}
        self.norm = math.sqrt(sum((x * x).sum() for x in g.values()))
        factor = min(1.0, o["clip_norm"] / (self.norm + 1e-6)) if o.get("clip_norm") else 1.0
        self.results = {}
        for path, parameter in parameters.items():
            own = {
                "rate": o["learning_rate"],
                "mu": o["momentum"],
                "decay": o["weight_decay"],
                "trust": o.get("trust_coefficient"),
            }
            for predicate, overrides in o.get("groups", ()):
                if predicate(path, parameter):
                    own["rate"] = overrides.get("learning_rate", own["rate"])
                    own["rate"] *= overrides.get("learning_rate_factor", 1.0)
                    own["mu"] = overrides.get("momentum", own["mu"])
                    own["decay"] = overrides.get("weight_decay", own["decay"])
                    own["trust"] = overrides.get("trust_coefficient", own["trust"])
                    break
            self.results[path] = self._one(
                float64(parameter), g[path], factor, kept[path], o, **own
            )

    @staticmethod
    def _one(p, g, factor, kept, o, rate, mu, decay, trust):
        w = kept.get("master", p)
        coupled = 0.0 if o.get("decoupled") else decay
        ratio = 1.0
        norms = np.linalg.norm(p), np.linalg.norm(g)
        if trust and min(norms) > 0:
            ratio = trust * norms[0] / (norms[1] * factor + coupled * norms[0])
        x = ratio * (factor * g + coupled * w)
        size = abs(ratio) * (abs(factor * g) + abs(coupled * w))
        u, v = x, kept.get("v")
        if mu:
            size_v = abs(mu * v) + size
            v = mu * v + (1 - o["dampening"]) * x
            u, size = (x + mu * v, size + size_v) if o.get("nesterov") else (v, size_v)
        if o.get("decoupled"):
            u = u + decay * w
            size = size + abs(decay * w)
        lost = kept.get("compensation", 0.0)
        return {
            "w": w - rate * u + lost,
            "v": v,
            "size": abs(w) + abs(lost) + rate * size,
            "size_v": size,
        }


# A float32 operation errs by half an ulp, 2^-24, of a term; there are about twenty to a
# result, norms (7.5e-7, see csrc/math/norm.h) and float32 options among them.
FLOAT32 = 64 * 2.0**-24


def check_step(before, gradients, kept, after, kept_after, options, norm):
    """``kept`` is what unpacked_state() has, by path, in float64."""
    exact = Exact(before, gradients, kept, options)
    if norm is not None:
        assert norm.item() == pytest.approx(exact.norm, rel=1e-6)
    random_rounding = 2 if options.get("rounding") == "stochastic" else 1

    def close(got, want, size, dtype, ulps=1):
        store = ulps * (EPSILON[dtype] / 2 * np.abs(want) + TINIEST[dtype])
        if dtype == "float32":
            store = 0.0
        bound = FLOAT32 * size + store * 1.01 + 2.0**-149
        assert (np.abs(got - want) <= bound).all(), np.abs(got - want).max()

    for path, result in exact.results.items():
        dtype = dtype_name(before[path].dtype)
        w, size = result["w"], result["size"]
        got, slots = float64(after[path]), kept_after[path]
        has_record = "master" in slots or "compensation" in slots
        close(got, w, size, dtype, 1 if has_record else random_rounding)
        if options.get("master_weights"):
            assert ("master" in slots) == (dtype != "float32")
        if options.get("compensated"):
            assert ("compensation" in slots) == (dtype != "float32")
        value = got
        if "master" in slots:
            close(slots["master"], w, size, "float32")
            value = slots["master"]
            assert np.array_equal(
                of_mlx(after[path]), narrowed(value.astype(np.float32), dtype).reshape(got.shape)
            )
        if "compensation" in slots:
            # Parameter and compensation together are the exact parameter.
            value = w
            store = EPSILON[dtype] / 2 * np.abs(slots["compensation"]) + TINIEST[dtype]
            error = np.abs(got + slots["compensation"] - w)
            assert (error <= FLOAT32 * size + store * 1.01).all()
        if options.get("ema_decay") is not None:
            old = kept[path]["ema"]
            average = old + (1 - options["ema_decay"]) * (value - old)
            close(slots["ema"], average, size + np.abs(old), "float32")
        if result["v"] is not None and "v" in slots:
            velocity = options.get("state_dtype")
            velocity = dtype_name(velocity) if velocity is not None else dtype
            close(slots["v"], result["v"], result["size_v"], velocity, random_rounding)


def kept_of(optimizer, parameters):
    state = optimizer.unpacked_state()
    return {path: {k: float64(v) for k, v in state.get(path, {}).items()} for path in parameters}


def stepper(optimizer, parameters, compiled):
    """A function of the gradients that updates ``parameters``."""
    optimizer.init(parameters)
    state = [parameters, optimizer.state]

    def step(gradients):
        parameters.update(optimizer.apply_gradients(gradients, parameters))

    return mx.compile(step, inputs=state, outputs=state) if compiled else step


def run_checked(options, dtypes, gradient_dtype="float32", steps=3, compiled=False, seed=0):
    parameters = tensors(seed, dtypes)
    optimizer = optim.SGD(**options)
    step = stepper(optimizer, parameters, compiled)
    bits = []
    for number in range(steps):
        before, kept = dict(parameters), kept_of(optimizer, parameters)
        gradients = tensors(
            100 * seed + number + 1, [gradient_dtype], options.get("grad_scale", 1.0)
        )
        step(gradients)
        mx.eval(parameters, optimizer.state)
        after = kept_of(optimizer, parameters)
        check_step(before, gradients, kept, parameters, after, options, optimizer.grad_norm)
        bits.append([of_mlx(a) for _, a in tree_flatten([parameters, optimizer.state])])
    return bits


BASE = {"learning_rate": 0.1, "momentum": 0.9, "weight_decay": 0.01}
EACH = {
    "state_dtype float32": {**BASE, "state_dtype": mx.float32},
    "state_dtype float16": {**BASE, "state_dtype": mx.float16},
    "state_dtype bfloat16": {**BASE, "state_dtype": mx.bfloat16},
    "master_weights": {**BASE, "master_weights": True},
    "master_weights, no momentum": {"learning_rate": 0.1, "master_weights": True},
    "stochastic": {**BASE, "rounding": "stochastic", "seed": 3},
    "stochastic momentum": {**BASE, "rounding": "stochastic", "master_weights": True},
    "compensated": {**BASE, "compensated": True},
    "clip_norm": {**BASE, "clip_norm": 1.5},
    "clip_norm above": {**BASE, "clip_norm": 1e4},
    "clip_norm inf": {**BASE, "clip_norm": INF},
    "clip_value": {**BASE, "clip_value": 0.75},
    "grad_scale": {**BASE, "grad_scale": 3.0},
    "skip_nonfinite": {**BASE, "skip_nonfinite": True},
    "decoupled": {**BASE, "decoupled": True},
    "decoupled, no momentum": {"learning_rate": 0.1, "weight_decay": 0.1, "decoupled": True},
    "maximize": {**BASE, "maximize": True},
    "trust_coefficient": {**BASE, "trust_coefficient": 0.02},
    "trust_coefficient, decoupled": {**BASE, "trust_coefficient": 0.02, "decoupled": True},
    "ema": {**BASE, "ema_decay": 0.75},
    "ema 0": {**BASE, "ema_decay": 0.0},
    "ema of masters": {**BASE, "ema_decay": 0.75, "master_weights": True},
    "ema of compensated": {**BASE, "ema_decay": 0.75, "compensated": True},
    "groups": {**BASE, "groups": GROUPS["terms"]},
    "everything": {
        **BASE, "nesterov": True, "state_dtype": mx.bfloat16, "master_weights": True,
        "rounding": "stochastic", "seed": 2**63 + 5, "clip_norm": 2.0, "clip_value": 1.0,
        "grad_scale": 8.0, "skip_nonfinite": True, "decoupled": True, "maximize": True,
        "groups": GROUPS["rates"], "trust_coefficient": 0.05, "ema_decay": 0.9,
    },
}  # fmt: skip


@pytest.mark.parametrize(
    "dtypes", [("float32",), ("float16",), ("bfloat16",), tuple(DTYPES)], ids=str
)
@pytest.mark.parametrize("name", EACH)
def test_each_option_is_the_mathematics(name, dtypes):
    eager = run_checked(EACH[name], dtypes)
    compiled = run_checked(EACH[name], dtypes, compiled=True)
    for one, two in zip(eager, compiled, strict=True):
        assert all(np.array_equal(a, b) for a, b in zip(one, two, strict=True))


COMBINATIONS = st.fixed_dictionaries({
    "learning_rate": st.sampled_from([0.1, 0.5]),
    "momentum": st.sampled_from([0.0, 0.9]),
    "weight_decay": st.sampled_from([0.0, 0.03]),
    "dampening": st.sampled_from([0.0, 0.3]),
    "state_dtype": st.sampled_from([None, *DTYPES.values()]),
    "record": st.sampled_from([{}, {"master_weights": True}, {"compensated": True}]),
    "rounding": st.sampled_from(["nearest", "stochastic"]),
    "clip_norm": st.sampled_from([None, 1.0, 30.0, INF]),
    "clip_value": st.sampled_from([None, 0.5]),
    "grad_scale": st.sampled_from([1.0, 7.0]),
    "skip_nonfinite": st.booleans(),
    "decoupled": st.booleans(),
    "maximize": st.booleans(),
    "groups": st.sampled_from(list(GROUPS.values())),
    "trust_coefficient": st.sampled_from([None, 0.05]),
    "ema_decay": st.sampled_from([None, 0.5]),
})  # fmt: skip


@settings(max_examples=120)
@given(
    options=COMBINATIONS,
    dtypes=st.sampled_from([("float32",), ("float16",), ("bfloat16",), tuple(DTYPES)]),
    gradient_dtype=st.sampled_from(list(DTYPES)),
    compiled=st.booleans(),
    nesterov=st.booleans(),
)
def test_combinations_are_the_mathematics(options, dtypes, gradient_dtype, compiled, nesterov):
    options = {**options, **options["record"]}
    del options["record"]
    if nesterov and options["momentum"]:
        options.update(nesterov=True, dampening=0.0)
    run_checked(options, dtypes, gradient_dtype, steps=2, compiled=compiled)


# Where an option changes nothing: a norm below the limit, decay that no momentum carries on.
SAME = [
    ("clip_norm above", "clip_norm"),
    ("clip_norm inf", "clip_norm"),
    ("decoupled, no momentum", "decoupled"),
]


def test_the_checks_can_fail():
    """A control: each option left out of the mathematics is noticed."""
    for name, options in EACH.items():
        unseen = {"rounding", "seed", "state_dtype", "skip_nonfinite", "master_weights"}
        for option in options.keys() - unseen - {"learning_rate", "compensated", "ema_decay"}:
            if (name, option) in SAME:
                continue
            left_out = {k: v for k, v in options.items() if k not in (option, "nesterov")}
            parameters = tensors(0, ("float32",))
            optimizer = optim.SGD(**options)
            before = parameters
            for number in range(2):
                kept = kept_of(optimizer, parameters)
                gradients = tensors(number + 1, ["float32"], options.get("grad_scale", 1.0))
                before, parameters = parameters, optimizer.apply_gradients(gradients, parameters)
            after = kept_of(optimizer, parameters)
            with pytest.raises(AssertionError):
                check_step(before, gradients, kept, parameters, after, left_out, None)


@pytest.mark.parametrize("dtype", [*DTYPES])
@pytest.mark.parametrize("name", [n for n in EACH if "stochastic" not in str(EACH[n])])
def test_the_reference_reads_like_the_step(name, dtype):
    """Bit for bit, but for norms."""
    options = dict(EACH[name])
    parameters = want = tensors(0, [dtype])
    optimizer, state = optim.SGD(**options), reference.init(parameters)
    measures = optimizer.clip_norm not in (None, INF) or optimizer.trust_coefficient
    for number in range(3):
        gradients = tensors(number + 1, ["float32"])
        parameters = optimizer.apply_gradients(gradients, parameters)
        want, state = reference.step(reference.sgd, want, gradients, state, **options)
        unpacked = optimizer.unpacked_state()
        for (path, value), kept in zip(parameters.items(), state["tensors"], strict=True):
            kept = {"v" if k == "momentum" else k: v for k, v in kept.items()}
            ours = unpacked.get(path, {})
            if "v" in ours and "v" not in kept:  # a group without momentum
                assert not ours.pop("v").any()
            assert ours.keys() == kept.keys()
            pairs = [(value, want[path]), *((unpacked[path][k], kept[k]) for k in kept)]
            for ours, theirs in pairs:
                if measures:
                    rtol = 1e-5 if ours.dtype == mx.float32 else 2 * EPSILON[dtype]
                    atol = 1e-5 if dtype == "float32" else 4 * EPSILON[dtype]
                    assert mx.allclose(ours, theirs, rtol=rtol, atol=atol)
                else:
                    assert same(ours, theirs), path
    assert optimizer.step.item() == state["step"].item() == 3


# ---- Peers ------------------------------------------------------------------------------


@pytest.mark.parametrize("limit", [0.5, 1e3])
def test_clip_norm_is_clip_grad_norm_and_a_step(limit):
    ours = theirs = tensors(0, ["float32"])
    one = optim.SGD(0.1, momentum=0.9, clip_norm=limit)
    two = mlx.optimizers.SGD(0.1, momentum=0.9)
    for number in range(5):
        gradients = tensors(number + 1, ["float32"])
        ours = one.apply_gradients(gradients, ours)
        clipped, norm = mlx.optimizers.clip_grad_norm(gradients, limit)
        theirs = two.apply_gradients(clipped, theirs)
        assert one.grad_norm.item() == pytest.approx(norm.item(), rel=1e-6)
        for path in ours:
            assert mx.allclose(ours[path], theirs[path], rtol=1e-5, atol=1e-6)
    assert (norm.item() > limit) == (limit == 0.5)


@traces("torch", "f32.single", "f32.fused", where=lambda options: options["maximize"])
def test_maximize_within_the_roundings_of_torch(name, kind):
    """Each step from torch's own state; see test_traces.py for the bound."""
    trace = Trace(name, kind, TORCH)
    for step in range(STEPS):
        # torch does not dampen the first step.
        options = trace.options._replace(dampening=0.0) if step == 0 else trace.options
        start = INPUTS["w0"] if step == 0 else trace.parameters[step - 1]
        velocity = np.zeros_like(start)
        if options.momentum and step > 0:
            velocity = trace.velocities[step - 1]
        raw = INPUTS["g"][step].view(np.float32)
        optimizer = optim.SGD(trace.rates[step], *options, maximize=True)
        if options.momentum:
            optimizer.state = {
                "step": mx.array(step, mx.uint64),
                "learning_rate": mx.array(trace.rates[step]),
                "t": {k: {"v": v} for k, v in tree(velocity).items()},
            }
        new = flat(optimizer.apply_gradients({"t": tree(raw)}, {"t": tree(start)})["t"])
        (_, bound), _ = step_float64(
            start, (-raw).view(np.uint32), velocity, "float32", "float32",
            np.float32(trace.rates[step]), options,
        )  # fmt: skip
        error = np.abs(new.view(np.float32) - trace.parameters[step].view(np.float32).astype(float))
        assert (error <= 3 * bound).all()
        assert bound.max() < 1e-5


DECOUPLED = [name for name, c in CONFIGURATIONS.items() if "decoupled.f32" in c["optax"]]


@pytest.mark.parametrize("name", DECOUPLED)
def test_decoupled_is_that_of_optax(name):
    """chain(trace, add_decayed_weights, scale_by_learning_rate): w - lr (v + wd w), where ours is
    (1 - lr wd) w - lr v. Velocities do not depend on w, so each step adds the roundings of one:
    less than eight of numbers that are at most twice the largest parameter, on both sides."""
    trace = Trace(name, "decoupled.f32", OPTAX)
    options = Options(*trace.options)._replace(dampening=0.0)
    optimizer = optim.SGD(
        lambda step: mx.array(trace.rates, mx.float32)[step], *options, decoupled=True
    )
    parameters = tree(INPUTS["w0"])
    bound = 0.0
    for step in range(STEPS):
        gradients = tree(INPUTS["g"][step].view(np.float32))
        parameters = optimizer.apply_gradients(gradients, parameters)
        theirs = trace.parameters[step].view(np.float32).astype(np.float64)
        bound += 8 * 2.0**-24 * 2 * np.abs(theirs).max()
        assert np.abs(flat(parameters).view(np.float32) - theirs).max() <= bound
    assert bound < 1e-4
    assert len(DECOUPLED) >= 5


def test_the_formula_of_lars():
    """You, Gitman and Ginsburg, 2017, equation 6, by hand."""
    w = {"a": mx.array([3.0, 4.0]), "zero": mx.zeros(2), "still": mx.array([1.0, 1.0])}
    g = {"a": mx.array([0.0, 2.0]), "zero": mx.array([1.0, 2.0]), "still": mx.zeros(2)}
    optimizer = optim.SGD(0.5, weight_decay=0.2, trust_coefficient=0.1)
    new = optimizer.apply_gradients(g, w)
    ratio = 0.1 * 5.0 / (2.0 + 0.2 * 5.0)
    want = np.array([3.0, 4.0]) - 0.5 * ratio * (np.array([0.0, 2.0]) + 0.2 * np.array([3.0, 4.0]))
    np.testing.assert_allclose(np.array(new["a"]), want, rtol=1e-6)
    # Where a norm is 0 the ratio is 1.
    np.testing.assert_allclose(np.array(new["zero"]), [-0.5, -1.0], rtol=1e-6)
    np.testing.assert_allclose(np.array(new["still"]), [0.9, 0.9], rtol=1e-6)


# ---- Precision ---------------------------------------------------------------------------

# lr * g = 1e-3 is less than half of the distance from 1 to bfloat16's next number below.
PRECISE = {
    "master_weights": {"master_weights": True},
    "compensated": {"compensated": True},
    "stochastic": {"rounding": "stochastic"},
    "master of 24 bits": {"master_weights": "24bit"},
    "stochastic, 24 bits": {"master_weights": "24bit", "rounding": "stochastic"},
}


@pytest.mark.parametrize("dtype", HALVES)
def test_small_updates_are_lost_without_an_option(dtype):
    rate = 1e-3 if dtype == "bfloat16" else 1e-4
    for name, options in {"nothing": {}, **PRECISE}.items():
        if dtype == "float16" and "24 bits" in name:
            continue
        w = {"w": mx.ones(1000, DTYPES[dtype])}
        optimizer = optim.SGD(rate, **options)
        for _ in range(100):
            w = optimizer.apply_gradients({"w": mx.ones(1000)}, w)
            mx.eval(w, optimizer.state)
        mean = float64(w["w"]).mean()
        if name == "nothing":
            assert mean == 1.0
        else:
            # Stochastic: at most an ulp at 1 from each of 100 roundings, over 1000 walks.
            walk = EPSILON[dtype] / 2 * 10 / math.sqrt(1000) * 4
            store = EPSILON[dtype] / 2
            # Of 24 bits: half of their unit at 1 in each step.
            bound = walk if name == "stochastic" else store
            bound += 100 * 2.0**-17 if name == "master of 24 bits" else 0
            assert abs(mean - (1 - 100 * rate)) <= bound, name


def test_the_seed_decides():
    def run(seed):
        w = {"w": mx.ones(1000, mx.bfloat16)}
        optimizer = optim.SGD(1e-3, rounding="stochastic", seed=seed)
        for _ in range(5):
            w = optimizer.apply_gradients({"w": mx.ones(1000)}, w)
        return w["w"]

    assert same(run(1), run(1))
    assert not same(run(1), run(2))
    assert not same(run(0), run(2**63))


def test_a_parameter_that_is_set_from_outside_replaces_its_master():
    optimizer = optim.SGD(2.0**-12, master_weights=True)
    w = {"w": mx.ones(4, mx.bfloat16)}
    for _ in range(3):
        w = optimizer.apply_gradients({"w": mx.ones(4)}, w)
    w = {"w": mx.array([1.0, 1.0, 5.0, 1.0], mx.bfloat16)}
    optimizer.apply_gradients({"w": mx.ones(4)}, w)
    master = optimizer.unpacked_state()["w"]["master"]
    assert master.tolist() == [1 - 2.0**-10, 1 - 2.0**-10, 5 - 2.0**-12, 1 - 2.0**-10]


# ---- Steps that are skipped ---------------------------------------------------------------


@pytest.mark.parametrize("bad", [INF, -INF, NAN], ids=str)
@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_a_skipped_step_leaves_all_bits(bad, compiled):
    options = {**EACH["everything"], "learning_rate": optim.exponential_decay(0.1, 0.9)}
    parameters = tensors(0, tuple(DTYPES))
    optimizer = optim.SGD(**options)
    step = stepper(optimizer, parameters, compiled)
    seen = set()
    for number in range(12):
        gradients = tensors(number + 1, ["float32"])
        skips = number in (0, 3, 4, 9)
        if skips:
            path = f"t{number % len(SIZES)}"
            values = np.array(gradients[path])
            values[-1] = bad
            gradients[path] = mx.array(values)
        before = {k: of_mlx(v) for k, v in tree_flatten([parameters, optimizer.state])}
        step(gradients)
        mx.eval(parameters, optimizer.state)
        after = {k: of_mlx(v) for k, v in tree_flatten([parameters, optimizer.state])}
        changed = {k.split(".")[1] if k[0] == "1" else "parameters"
                   for k in after if not np.array_equal(before[k], after[k])}  # fmt: skip
        if skips:
            assert changed <= {"skipped", "grad_norm", "learning_rate"}
            assert "skipped" in changed
        else:
            assert {"parameters", "arenas", "step"} <= changed
            assert "skipped" not in changed
        seen |= {number} if skips else set()
    assert optimizer.skipped.item() == len(seen) == 4
    assert optimizer.step.item() == 8


def test_a_norm_that_is_infinite_skips():
    """Finite gradients whose norm float32 does not have: there is nothing to clip to."""
    w, g = {"w": mx.ones(4)}, {"w": mx.full((4,), 3e38)}
    optimizer = optim.SGD(0.1, skip_nonfinite=True, clip_norm=1.0)
    assert optimizer.apply_gradients(g, w)["w"].tolist() == [1.0] * 4
    assert (optimizer.skipped.item(), optimizer.grad_norm.item()) == (1, INF)
    optimizer = optim.SGD(2e-38, skip_nonfinite=True)  # normal: Apple's GPUs have no other
    new = optimizer.apply_gradients(g, w)["w"]
    np.testing.assert_allclose(np.array(new), 1 - 6.0, rtol=1e-6)
    assert optimizer.skipped.item() == 0


def test_counters_before_the_first_step():
    optimizer = optim.SGD(0.1)
    assert (optimizer.grad_norm, optimizer.skipped.item()) == (None, 0)
    optimizer = optim.SGD(0.1, clip_norm=1.0, skip_nonfinite=True)
    assert (optimizer.grad_norm, optimizer.skipped.item()) == (None, 0)
    optimizer.init({"w": mx.ones(2)})
    assert (optimizer.grad_norm.item(), optimizer.skipped.item()) == (0.0, 0)
    assert optimizer.grad_norm.dtype == mx.float32
    assert optimizer.skipped.dtype == mx.uint64
    optimizer.apply_gradients({}, {})
    assert optimizer.grad_norm.item() == 0.0


# ---- Scales -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "scale",
    [8.0, 8, mx.array(8.0), mx.array(8, mx.int32), mx.array(8.0, mx.float16),
     optim.constant(8.0), lambda step: 8.0, lambda step: mx.array(8.0)],
    ids=spelled,
)  # fmt: skip
@pytest.mark.parametrize("how", ["option", "call"])
def test_a_scale_of_any_kind(scale, how):
    """A power of two changes no bit."""
    w = tensors(0, tuple(DTYPES))
    options = {**BASE, "clip_norm": 2.0}
    plain = optim.SGD(**options)
    optimizer = optim.SGD(**options, **({"grad_scale": scale} if how == "option" else {}))
    call = {"grad_scale": scale} if how == "call" else {}
    one, two = w, w
    for number in range(3):
        gradients = tensors(number + 1, ["float32"])
        one = plain.apply_gradients(gradients, one)
        scaled = {k: 8.0 * g for k, g in gradients.items()}
        two = optimizer.apply_gradients(scaled, two, **call)
        assert same(plain.grad_norm, optimizer.grad_norm)
    assert all(same(one[k], two[k]) for k in one)
    assert set(optimizer.state) == set(plain.state)


def test_the_scale_of_a_call_is_in_place_of_the_optimizers():
    optimizer = optim.SGD(1.0, grad_scale=2.0)
    model = nn.Linear(1, 1)
    model.bias = mx.array([10.0])
    optimizer.update(model, {"bias": mx.array([4.0])}, grad_scale=4.0)
    assert model.bias.item() == 9.0
    optimizer.update(model, {"bias": mx.array([4.0])})
    assert model.bias.item() == 7.0


def test_a_schedule_of_the_scale():
    optimizer = optim.SGD(1.0, grad_scale=optim.step_decay(4.0, 0.5, 1))
    w = {"w": mx.array([10.0])}
    for want in (9.0, 7.0, 3.0):
        w = optimizer.apply_gradients({"w": mx.array([4.0])}, w)
        assert w["w"].item() == want


def test_a_subclass_may_have_an_apply_gradients_of_two():
    class Mine(optim.SGD):
        def apply_gradients(self, gradients, parameters):
            return super().apply_gradients(gradients, parameters)

    model = nn.Linear(1, 1)
    Mine(1.0).update(model, {"bias": mx.array([0.5])})


# ---- Averages ---------------------------------------------------------------------------


def test_averages_of_a_model():
    model = network()
    optimizer = optim.SGD(0.05, momentum=0.9, ema_decay=0.9)
    want = {k: float64(v) for k, v in tree_flatten(model.parameters())}
    for number in range(8):
        train(model, optimizer, 1, number)
        for path, value in tree_flatten(model.parameters()):
            want[path] = 0.9 * want[path] + 0.1 * float64(value)
    averages = optimizer.ema_parameters()
    for path, value in tree_flatten(averages):
        np.testing.assert_allclose(np.array(value), want[path], rtol=1e-5, atol=1e-6)
    assert dict(tree_flatten(averages)).keys() == want.keys()
    held = {k: of_mlx(v) for k, v in tree_flatten(averages)}
    other = network()
    other.update(averages)
    train(model, optimizer, 2, 20)
    train(other, optim.SGD(0.05), 2, 20)
    for path, value in tree_flatten(averages):
        assert np.array_equal(of_mlx(value), held[path])


def test_dtypes_of_averages():
    w = {"a": mx.ones(3, mx.bfloat16), "b": [mx.ones(2, mx.float16), mx.ones(2)], "c": mx.ones(1)}
    optimizer = optim.SGD(0.1, ema_decay=0.5)
    optimizer.apply_gradients(w, w)
    averages = optimizer.ema_parameters()
    assert isinstance(averages["b"], list)
    kinds = {k: v.dtype for k, v in tree_flatten(averages)}
    assert kinds == {k: v.dtype for k, v in tree_flatten(w)}
    assert {v.dtype for _, v in tree_flatten(optimizer.ema_parameters(mx.float32))} == {mx.float32}
    exact = optimizer.ema_parameters(mx.float32)["a"]
    assert same(exact.astype(mx.bfloat16), averages["a"])
    state = optim.fused_sgd_init(mx.ones(3), ema_decay=0.5)
    assert optim.fused_ema(state).tolist() == [1.0, 1.0, 1.0]
    assert optim.fused_ema(state, mx.float16).dtype == mx.float16


def test_averages_of_a_compensated_run_know_what_rounding_lost():
    w = {"w": mx.ones(4, mx.bfloat16)}
    optimizer = optim.SGD(2.0**-12, compensated=True, ema_decay=0.0)
    for _ in range(3):
        w = optimizer.apply_gradients({"w": mx.ones(4)}, w)
    assert optimizer.ema_parameters(mx.float32)["w"].tolist() == [1 - 3 * 2.0**-12] * 4
    assert w["w"].tolist() == [1.0] * 4


# ---- The state ---------------------------------------------------------------------------


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("record", ["master_weights", "compensated"])
def test_a_run_that_is_interrupted_goes_on_with_the_same_bits(tmp_path, record, compiled):
    options = {**EACH["everything"], "learning_rate": optim.cosine_decay(0.1, 20)}
    options = {**options, "master_weights": False, record: True}
    stop = random.Random(record + str(compiled)).randrange(1, 12)

    def gradients(number):
        values = tensors(number + 1, ["bfloat16"])
        return {**values, "t1": values["t1"] * INF} if number % 5 == 2 else values

    ends = []
    for interrupted in (False, True):
        parameters = tensors(0, tuple(DTYPES))
        optimizer = optim.SGD(**options)
        step = stepper(optimizer, parameters, compiled)
        for number in range(12):
            if interrupted and number == stop:
                path = str(tmp_path / "run.safetensors")
                mx.save_safetensors(path, dict(tree_flatten([parameters, optimizer.state])))
                parameters, state = tree_unflatten(list(mx.load(path).items()))
                optimizer = optim.SGD(**options)
                optimizer.state = state
                step = stepper(optimizer, parameters, compiled)
            step(gradients(number))
            mx.eval(parameters, optimizer.state)
        assert optimizer.skipped.item() == 2
        ends.append({k: of_mlx(v) for k, v in tree_flatten([parameters, optimizer.state])})
    assert ends[0].keys() == ends[1].keys()
    assert [k for k in ends[0] if not np.array_equal(ends[0][k], ends[1][k])] == []


CONTINUE = """
import sys
import mlx.core as mx
from mlx.utils import tree_flatten, tree_unflatten
import mlx_fused_optim as optim
from test_full_step import EACH, tensors

path, result = sys.argv[1:]
parameters, state = tree_unflatten(list(mx.load(path).items()))
optimizer = optim.SGD(**EACH["everything"])
optimizer.state = state
for number in range(3):
    gradients = tensors(number, ["float32"])
    part = {k: gradients[k] for k in ("t1", "t2")}  # another layout: everything moves by path
    parameters.update(optimizer.apply_gradients(part, parameters))
mx.save_safetensors(result, dict(tree_flatten([parameters, optimizer.unpacked_state()])))
"""


def test_a_new_process_finds_every_slot(tmp_path):
    """The table of the state is all it has, and the layout is another one."""
    parameters = tensors(0, tuple(DTYPES))
    optimizer = optim.SGD(**EACH["everything"])
    for number in range(3):
        parameters = optimizer.apply_gradients(tensors(number, ["float32"]), parameters)
    path, result = (str(tmp_path / name) for name in ("run.safetensors", "result.safetensors"))
    mx.save_safetensors(path, dict(tree_flatten([parameters, optimizer.state])))
    search = os.pathsep.join(filter(None, sys.path))
    subprocess.run(
        [sys.executable, "-c", CONTINUE, path, result],
        env={**os.environ, "PYTHONPATH": search}, check=True, timeout=120,
    )  # fmt: skip
    for number in range(3):
        gradients = tensors(number, ["float32"])
        part = {k: gradients[k] for k in ("t1", "t2")}
        parameters.update(optimizer.apply_gradients(part, parameters))
    want = dict(tree_flatten([parameters, optimizer.unpacked_state()]))
    got = mx.load(result)
    assert got.keys() == want.keys()
    assert {k.rpartition(".")[2] for k in want} >= {"v", "master", "ema", "skipped"}
    assert [k for k in want if not same(got[k], want[k])] == []


def test_layouts_that_change_keep_every_slot():
    """Tensors come and go; each one's slots follow its path."""
    for record in ("master_weights", "compensated"):
        options = {"learning_rate": 0.01, "momentum": 0.9, "ema_decay": 0.5, record: True}
        parameters = tensors(0, ["bfloat16", "float32"])
        optimizer = optim.SGD(**options)
        alone = {k: optim.SGD(**options) for k in parameters}
        want = dict(parameters)
        sets = [("t0", "t1", "t2"), ("t3",), ("t1", "t3", "t4"), tuple(parameters), ("t4", "t0")]
        for number, names in enumerate(itertools.chain(sets, sets)):
            gradients = tensors(number + 1, ["float32"])
            parameters.update(
                optimizer.apply_gradients({k: gradients[k] for k in names}, parameters)
            )
            for k in names:
                want[k] = alone[k].apply_gradients({"p": gradients[k]}, {"p": want[k]})["p"]
        unpacked = optimizer.unpacked_state()
        for k in parameters:
            assert same(parameters[k], want[k])
            kept = alone[k].unpacked_state()["p"]
            assert unpacked[k].keys() == kept.keys()
            assert all(same(unpacked[k][slot], kept[slot]) for slot in kept)


TURNED_ON = {
    "master_weights": ({"master_weights": True}, "master"),
    "master of 24 bits": ({"master_weights": "24bit"}, "master"),
    "compensated": ({"compensated": True}, "compensation"),
    "ema": ({"ema_decay": 0.5}, "ema"),
    "momentum": ({"momentum": 0.5}, "v"),
}


@pytest.mark.parametrize("how", ["attribute", "state"])
@pytest.mark.parametrize("name", TURNED_ON)
def test_an_option_turned_on_and_off_in_the_middle(name, how):
    options, slot = TURNED_ON[name]
    base = (
        {"learning_rate": 0.125}
        if name == "momentum"
        else {"learning_rate": 0.125, "momentum": 0.5}
    )
    parameters = tensors(0, ["bfloat16"])
    optimizer = optim.SGD(**base)
    for number in range(2):
        parameters = optimizer.apply_gradients(tensors(number, ["float32"]), parameters)
    velocity = {k: of_mlx(v) for k, v in tree_flatten(optimizer.unpacked_state()) if ".v" in k}
    if how == "attribute":
        for key, value in options.items():
            setattr(optimizer, key, value)
    else:
        state, optimizer = optimizer.state, optim.SGD(**base, **options)
        optimizer.state = state
    optimizer.init(parameters)
    unpacked = optimizer.unpacked_state()
    for path, parameter in parameters.items():
        begun = unpacked[path][slot]
        if slot == "ema" or (begun.dtype == mx.float32 and slot == "master"):
            assert same(begun, parameter.astype(mx.float32))
        else:
            assert not begun.any()
    for key, bits in velocity.items():
        assert np.array_equal(of_mlx(dict(tree_flatten(unpacked))[key]), bits)
    for number in range(2):
        parameters = optimizer.apply_gradients(tensors(number, ["float32"]), parameters)
    assert slot in optimizer.unpacked_state()["t0"]
    if name == "momentum":
        return  # stays, as in mlx.optimizers
    # And off: what is no longer kept up would no longer be true.
    plain = optim.SGD(**base)
    plain.state = optimizer.state
    new = plain.apply_gradients(tensors(5, ["float32"]), parameters)
    assert set(plain.unpacked_state()["t0"]) == {"v"}
    mx.eval(new)


@pytest.mark.parametrize("names", [("t0", "t1"), ("t0", "t1", "t2", "t3", "t4")], ids=len)
def test_momentum_outlasts_steps_without_it(names):
    """As in mlx.optimizers, also where its tensors move to other arenas meanwhile."""
    parameters = tensors(0, ["bfloat16"])
    optimizer = optim.SGD(0.1, momentum=0.9)
    parameters = optimizer.apply_gradients(tensors(1, ["float32"]), parameters)
    want = {k: kept["v"] for k, kept in optimizer.unpacked_state().items() if k in parameters}
    optimizer.momentum, optimizer.ema_decay = 0.0, 0.5
    for number in range(2):
        gradients = tensors(number, ["float32"])
        gradients = {k: gradients[k] for k in names}
        parameters.update(optimizer.apply_gradients(gradients, parameters))
    unpacked = optimizer.unpacked_state()
    assert all(same(unpacked[k]["v"], want[k]) for k in parameters)
    assert {k for k in parameters if "ema" in unpacked[k]} == set(names)
    optimizer.momentum = 0.9
    optimizer.init(parameters)
    unpacked = optimizer.unpacked_state()
    assert all(same(unpacked[k]["v"], want[k]) for k in parameters)


@pytest.mark.parametrize("momentum", [0.0, 0.5])
@pytest.mark.parametrize("how", ["arenas", "unpacked", "function"])
@pytest.mark.parametrize("record", ["master_weights", "compensated"])
def test_options_turned_off_for_some_tensors_are_forgotten_there(record, how, momentum):
    """A step that keeps nothing leaves nothing behind that is no longer true, whatever other
    tensors there are. What they have, and momentum, stays."""
    options = {"momentum": momentum, "ema_decay": 0.5, record: True}
    parameters = tensors(0, ["bfloat16"])
    optimizer = optim.SGD(0.125, **options)
    optimizer.apply_gradients(tensors(1, ["float32"]), parameters)
    before = optimizer.unpacked_state()
    state = before if how == "unpacked" else optimizer.state
    some = {"t1": parameters["t1"]}
    if how == "function":
        _, after = optim.fused_sgd_step(some, some, state, learning_rate=0.1)
        optimizer.state = after
        after = optimizer.unpacked_state()
    else:
        plain = optim.SGD(0.125)
        plain.state = state
        plain.apply_gradients(some, some)
        after = plain.unpacked_state()
    assert set(after.get("t1", {})) == set(before["t1"]) & {"v"}
    for path in parameters.keys() - {"t1"}:
        assert after[path].keys() == before[path].keys()
        assert all(same(after[path][slot], before[path][slot]) for slot in before[path])


@pytest.mark.parametrize("how", ["arenas", "unpacked"])
def test_an_option_turned_off_for_a_tree_that_is_one_array(how):
    optimizer = optim.SGD(0.125, ema_decay=0.5)
    w = optimizer.apply_gradients(mx.ones(3), mx.ones(3))
    state = optimizer.state if how == "arenas" else optimizer.unpacked_state()
    plain = optim.SGD(0.125)
    plain.state = state
    plain.apply_gradients(mx.ones(3), w)
    assert plain.state.keys() <= {"step", "learning_rate", "arenas"}
    assert not plain.state.get("arenas")


@pytest.mark.parametrize("dtype", [*DTYPES])
def test_momentum_changes_its_dtype(dtype):
    """On loading a state, and by the attribute: cast once."""
    parameters = tensors(0, ["bfloat16", "float32"])
    optimizer = optim.SGD(0.1, momentum=0.9, state_dtype=mx.float32)
    parameters = optimizer.apply_gradients(tensors(1, ["float32"]), parameters)
    before = optimizer.unpacked_state()
    loaded = optim.SGD(0.1, momentum=0.9, state_dtype=DTYPES[dtype])
    loaded.state = optimizer.state
    loaded.init(parameters)
    for path, kept in loaded.unpacked_state().items():
        if path in parameters:
            assert kept["v"].dtype == DTYPES[dtype]
            assert same(kept["v"], before[path]["v"].astype(DTYPES[dtype]))
    optimizer.state_dtype = None
    optimizer.apply_gradients(tensors(2, ["float32"]), parameters)
    unpacked = optimizer.unpacked_state()
    assert all(unpacked[k]["v"].dtype == v.dtype for k, v in parameters.items())


def test_a_state_of_mlx_gets_what_it_lacks():
    parameters = tensors(0, ["bfloat16"])
    theirs = mlx.optimizers.SGD(0.1, momentum=0.9)
    parameters = theirs.apply_gradients(tensors(1, ["bfloat16"]), parameters)
    ours = optim.SGD(0.1, momentum=0.9, master_weights=True, ema_decay=0.5, clip_norm=1.0,
                     skip_nonfinite=True)  # fmt: skip
    ours.state = theirs.state
    ours.init(parameters)
    for path, kept in ours.unpacked_state().items():
        if path in parameters:
            assert same(kept["v"], theirs.state[path]["v"])
            assert same(kept["master"], parameters[path].astype(mx.float32))
            assert same(kept["ema"], kept["master"])
    parameters = ours.apply_gradients(tensors(2, ["float32"]), parameters)
    assert (ours.step.item(), ours.skipped.item()) == (2, 0)
    # And back: MLX looks at its own momentum alone.
    theirs.state = ours.unpacked_state()
    theirs.apply_gradients(tensors(3, ["bfloat16"]), parameters)


def test_an_average_begins_at_the_master():
    w = {"w": mx.ones(2, mx.bfloat16)}
    optimizer = optim.SGD(2.0**-12, master_weights=True)
    w = optimizer.apply_gradients({"w": mx.ones(2)}, w)
    optimizer.ema_decay = 0.5
    optimizer.init(w)
    assert optimizer.ema_parameters(mx.float32)["w"].tolist() == [1 - 2.0**-12] * 2


def test_modules_with_the_names_of_slots():
    """A module may be called as a slot is, and so may its tensors."""

    def make(value):
        names = ("v", "master", "compensation", "ema")
        return {a: {b: mx.full((2,), value, mx.bfloat16) for b in names} for a in names}

    optimizer = optim.SGD(0.25, momentum=0.5, master_weights=True, ema_decay=0.5)
    w = make(1.0)
    w = optimizer.apply_gradients(w, w)
    w.update(optimizer.apply_gradients({"ema": w["ema"]}, w))  # the others are loose now
    unpacked = optimizer.unpacked_state()
    assert unpacked["master"]["ema"]["ema"].tolist() == [0.875] * 2
    loaded = optim.SGD(0.25, momentum=0.5, master_weights=True, ema_decay=0.5)
    loaded.state = unpacked
    a, b = optimizer.apply_gradients(w, w), loaded.apply_gradients(w, w)
    for (_, one), (_, two) in zip(tree_flatten(a), tree_flatten(b), strict=True):
        assert same(one, two)
    for tree_of_one in (mx.ones(3, mx.bfloat16), {"skipped": {"v": mx.ones(2)}}):
        optimizer = optim.SGD(0.1, master_weights=True, ema_decay=0.5, skip_nonfinite=True)
        optimizer.apply_gradients(tree_of_one, tree_of_one)
        assert optimizer.skipped.item() == 0


def test_the_functions_have_the_bits_of_the_optimizer():
    options = {k: v for k, v in EACH["everything"].items() if k not in (*BASE, "nesterov")}
    rest = {k: v for k, v in EACH["everything"].items() if k not in options}
    one = two = tensors(0, tuple(DTYPES))
    optimizer = optim.SGD(**rest, **options)
    state = optim.fused_sgd_init(two, momentum=0.9, **options)
    for number in range(3):
        gradients = tensors(number + 1, ["float32"])
        one = optimizer.apply_gradients(gradients, one)
        two, state = optim.fused_sgd_step(two, gradients, state, **rest, **options)
    a, b = dict(tree_flatten([one, optimizer.state])), dict(tree_flatten([two, state]))
    assert a.keys() == b.keys()
    assert [k for k in a if not same(a[k], b[k])] == []


# ---- Memory -------------------------------------------------------------------------------

SIZE = 1 << 20
# Bytes of state a parameter of bfloat16.
MEMORY = {
    "nothing": ({}, 0),
    "momentum": ({"momentum": 0.9}, 2),
    "momentum in float32": ({"momentum": 0.9, "state_dtype": mx.float32}, 4),
    "momentum in bytes": ({"momentum": 0.9, "state_dtype": "8bit"}, 68 / 64),
    "master": ({"momentum": 0.9, "master_weights": True}, 2 + 4),
    "master of 24 bits": ({"optimizer": "AdamW", "master_weights": "24bit"}, 4 + 4 + 1),
    "adamw": ({"optimizer": "AdamW"}, 4 + 4),
    "adamw in bfloat16": ({"optimizer": "AdamW", "state_dtype": mx.bfloat16}, 2 + 2),
    "adamw in bytes": (
        {"optimizer": "AdamW", "state_dtype": "8bit", "master_weights": "24bit"}, 2 * 68 / 64 + 1,
    ),
    "adam with masters": (
        {"optimizer": "Adam", "amsgrad": True, "bias_correction": True, "master_weights": True},
        4 + 4 + 4 + 4,
    ),
    "lion": ({"optimizer": "Lion", "compensated": True}, 4 + 2),
    "adadelta": ({"optimizer": "AdaDelta"}, 4 + 4),
    "compensated": ({"momentum": 0.9, "compensated": True}, 2 + 2),
    "stochastic": ({"momentum": 0.9, "rounding": "stochastic"}, 2),
    "ema": ({"ema_decay": 0.9}, 4),
    "clip_norm": ({"clip_norm": 1.0, "skip_nonfinite": True}, 0),
    "everything": (
        {"momentum": 0.9, "state_dtype": mx.float32, "compensated": True, "ema_decay": 0.9,
         "clip_norm": 1.0}, 4 + 2 + 4),
}  # fmt: skip


@pytest.mark.parametrize("name", MEMORY)
def test_bytes_a_parameter(name):
    options, state_bytes = dict(MEMORY[name][0]), MEMORY[name][1]
    cls = getattr(optim, options.pop("optimizer", "SGD"))
    mx.synchronize()
    mx.clear_cache()
    before = mx.get_active_memory()
    parameters = {"a": mx.ones(SIZE // 4, mx.bfloat16), "b": mx.ones(3 * SIZE // 4, mx.bfloat16)}
    gradients = {k: mx.full(v.shape, 1e-3, mx.bfloat16) for k, v in parameters.items()}
    optimizer = cls(0.1, **options)

    def step():
        nonlocal parameters
        parameters = optimizer.apply_gradients(gradients, parameters)
        mx.eval(parameters, optimizer.state)

    mx.eval(parameters, gradients)
    step()
    step()
    mx.synchronize()
    slack = 64 * 1024
    used = mx.get_active_memory() - before
    assert abs(used - (2 + 2 + state_bytes) * SIZE) < slack  # parameter, gradient, state
    # And in place: a step needs no more than it keeps.
    mx.reset_peak_memory()
    step()
    mx.synchronize()
    assert mx.get_peak_memory() - before - used < slack
    # Held, a slot is copied, and only that one.
    if state_bytes:
        (entry,) = optimizer.state["arenas"].values()
        (held,) = entry[next(reversed(entry))]
        del entry
        mx.reset_peak_memory()
        step()
        mx.synchronize()
        extra = mx.get_peak_memory() - before - used
        assert abs(extra - held.nbytes) < slack
        del held


def test_an_infinite_clip_norm_measures_and_changes_nothing():
    """Not even where the norm is beyond float32: a factor of inf / inf would be NaN."""
    for options in ({}, {"skip_nonfinite": True}):
        gradients, parameters = {"w": mx.array([3e38, 3e38])}, {"w": mx.array([1.0, 1.0])}
        plain = optim.SGD(2e-38).apply_gradients(gradients, parameters)
        optimizer = optim.SGD(2e-38, clip_norm=INF, **options)
        measured = optimizer.apply_gradients(gradients, parameters)
        assert measured["w"].tolist() == plain["w"].tolist()
        assert optimizer.grad_norm.item() == INF
        assert optimizer.step.item() == 1


def test_a_step_with_an_infinite_clip_norm_has_a_derivative():
    def after(w, clip_norm):
        state = optim.fused_sgd_init(w, clip_norm=clip_norm)
        gradient = 2 * w
        return optim.fused_sgd_step(w, gradient, state, learning_rate=0.25, clip_norm=clip_norm)[
            0
        ].sum()

    w = mx.array([1.0, -2.0])
    assert mx.grad(lambda w: after(w, INF))(w).tolist() == [0.5, 0.5]
