"""Muon: its orthogonalisation beside float64, its steps beside those of mlx.optimizers, and
everything that an optimizer of the whole model promises."""

import copy
import json
import math
import pickle
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers
import mlx_fused_optim as optim
import numpy as np
import pytest
from bits import DTYPES, of_mlx, same
from mlx.nn.layers.distributed import FullyShardedModule
from mlx.utils import tree_flatten, tree_map, tree_unflatten
from mlx_fused_optim import _ext, _newton_schulz, reference
from mlx_fused_optim._layout import layout_of_rows
from test_bad_input import assert_refused
from waiting import let_go

# Of one shape in a row and apart, tall, wide and long, with gaps between them in the arena;
# filters; what is no matrix; what has no element.
SHAPES = {
    "a": (16, 16), "b": (16, 16), "up": (64, 16), "down": (16, 64), "c": (16, 16), "odd": (5, 7),
    "odd_too": (5, 7), "tall": (7, 3), "lora_a": (96, 4), "lora_b": (4, 96), "filter": (8, 3, 6, 2),
    "one": (1, 1), "row": (1, 9), "norm": (16,), "bias": (5,), "scalar": (), "none": (0, 4),
}  # fmt: skip
# Roundings of float32, 2^-24, that lie in the direction of a singular value near 0 grow as that
# does: 3.4445^5 = 485 times. Sums add some.
CLOSE = 4 * 485 * 2.0**-24


@pytest.fixture(autouse=True)
def on_the_cpu():
    """Where products of float32 are exact to float32."""
    device = mx.default_device()
    mx.set_default_device(mx.cpu)
    yield
    mx.set_default_device(device)


def tree(seed, dtype=mx.float32, shapes=SHAPES, scale=1.0):
    keys = mx.random.split(mx.random.key(seed), len(shapes))
    return {
        name: (scale * mx.random.normal(shape, key=k)).astype(dtype)
        for (name, shape), k in zip(shapes.items(), keys, strict=True)
    }


def numbers(array):
    return np.array(array.astype(mx.float32)).astype(np.float64)


def identical(a, b):
    a, b = dict(tree_flatten(a)), dict(tree_flatten(b))
    return a.keys() == b.keys() and all(same(a[name], b[name]) for name in a)


def train(optimizer, parameters, seeds, dtype=mx.float32, **options):
    for seed in seeds:
        gradients = tree(seed, dtype, {name: p.shape for name, p in parameters.items()})
        parameters = optimizer.apply_gradients(gradients, parameters, **options)
        mx.eval(parameters, optimizer.state)
    return parameters


# ---- Newton-Schulz in float64 --------------------------------------------------------------


def newton_schulz(direction, triples):
    """From the paper, of one matrix: more than two dimensions are flattened."""
    x = direction.reshape(direction.shape[0], -1).astype(np.float64)
    norm = np.linalg.norm(x)
    x = x if norm == 0 else x / norm
    for a, b, c in triples:
        gram = x @ x.T
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.reshape(direction.shape)


def update_of(gradients, **options):
    """What Muon makes of them alone: no momentum, no decay, from zeros, at a rate of 1."""
    optimizer = optim.Muon(1.0, momentum=0.0, weight_decay=0.0, **options)
    zeros = tree_map(lambda g: mx.zeros(g.shape), gradients)
    return tree_map(lambda x: -x, optimizer.apply_gradients(gradients, zeros))


def triples_of(name, steps):
    triples = _newton_schulz.COEFFICIENTS[name]
    return [triples[min(i, len(triples) - 1)] for i in range(steps)]


MATRICES = {name: shape for name, shape in SHAPES.items() if len(shape) > 1 and math.prod(shape)}


@pytest.mark.parametrize("steps", [0, 1, 2, 5, 9])
@pytest.mark.parametrize("name", _newton_schulz.COEFFICIENTS)
def test_it_is_newton_schulz(name, steps):
    gradients = tree(1, shapes=MATRICES)
    updates = update_of(gradients, ns_coefficients=name, ns_steps=steps)
    growth = math.prod(max(1.0, a) for a, _, _ in triples_of(name, min(steps, 5)))
    growth = max(growth, *(sum(map(abs, triple)) for triple in triples_of(name, steps)), 1.0, 1.0)
    for key, g in gradients.items():
        rows, columns = g.shape[-2:]
        want = math.sqrt(max(1, rows / columns)) * newton_schulz(
            numbers(g), triples_of(name, steps)
        )
        error = np.abs(numbers(updates[key]) - want).max()
        assert error <= 4 * growth * 2.0**-24, key


# Half types round each product to 2^-9 and 2^-12, and so the noise in the direction of a small
# singular value grows; of these matrices, in the sum of squares.
WITHIN = {"float32": 2.0**-14, "float16": 2.0**-5, "bfloat16": 2.0**-2}


@pytest.mark.parametrize("dtype", WITHIN)
@pytest.mark.parametrize("name", _newton_schulz.COEFFICIENTS)
def test_in_other_dtypes(name, dtype):
    gradients = tree(1, shapes=MATRICES)
    updates = update_of(gradients, ns_coefficients=name, ns_dtype=DTYPES[dtype])
    for key, g in gradients.items():
        rows, columns = g.shape[-2:]
        want = math.sqrt(max(1, rows / columns)) * newton_schulz(numbers(g), triples_of(name, 5))
        error = np.linalg.norm(numbers(updates[key]) - want) / np.linalg.norm(want)
        assert error <= WITHIN[dtype], (key, error)
        # A control: these are no products of float32.
        assert dtype == "float32" or error > 2.0**-14, key


def test_the_scales():
    gradients = tree(1, shapes=MATRICES)
    plain = update_of(gradients)
    matched = update_of(gradients, scale="match_rms_adamw")
    for key, g in gradients.items():
        rows, columns = g.shape[0], g.size // g.shape[0]
        own = math.sqrt(max(1, g.shape[-2] / g.shape[-1]))
        factor = 0.2 * math.sqrt(max(rows, columns)) / own
        assert np.allclose(
            numbers(matched[key]), factor * numbers(plain[key]), rtol=1e-5, atol=1e-5
        )


def best_polynomial(low, high):
    """The odd polynomial of degree 5 that is closest to 1 between two numbers, and how close:
    its error is as large, with changing signs, in four points (Remez)."""
    inner = (3 * low + high) / 4, (low + 3 * high) / 4
    for _ in range(60):
        points = (low, *inner, high)
        rows = [[x, x**3, x**5, (-1) ** i] for i, x in enumerate(points)]
        a, b, c, error = np.linalg.solve(rows, np.ones(4))
        root = math.sqrt(9 * b * b - 20 * a * c)
        inner = math.sqrt((-3 * b - root) / (10 * c)), math.sqrt((-3 * b + root) / (10 * c))
    return (a, b, c), abs(error)


def test_the_triples_of_the_polar_express():
    low, high = 1e-3, 1.0
    *triples, last = _newton_schulz.COEFFICIENTS["polar_express"]
    for triple in triples:
        (a, b, c), error = best_polynomial(low, high)
        want = a / 1.01, b / 1.01**3, c / 1.01**5
        assert np.allclose(triple, want, rtol=0, atol=0.5001e-4)
        low, high = 1 - error, 1 + error
    # 1 is where its first two derivatives are 0.
    assert np.allclose(np.array(last) @ [[1, 1, 0], [1, 3, 6], [1, 5, 20]], [1, 0, 0])


BANDS = {  # of singular values after so many iterations, of those from the first number on
    ("original", 5): (0.003, 0.68, 1.21),
    ("polar_express", 5): (0.001, 0.85, 1.12),
    ("polar_express", 6): (0.001, 0.99, 1.01),
}


@pytest.mark.parametrize("name, steps", BANDS)
def test_the_bands_of_the_docstring(name, steps):
    least, low, high = BANDS[name, steps]
    x = np.geomspace(least, 1, 100001)
    for a, b, c in triples_of(name, steps):
        x = a * x + b * x**3 + c * x**5
    assert low <= x.min() and x.max() <= high
    assert x.min() < low + 0.02 and x.max() > high - 0.02  # and no wider


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(16, 16), (32, 8), (8, 64)], ids=str)
@pytest.mark.parametrize("name, steps", BANDS)
def test_singular_values(name, steps, shape, dtype):
    """Of full rank and of less, of matrices of ordinary, tiny and huge numbers: no other than of
    those between, and zeros where there are none."""
    least, low, high = BANDS[name, steps]
    random = np.random.default_rng(0)
    u, s, v = np.linalg.svd(random.standard_normal(shape), full_matrices=False)
    rank = len(s) // 2
    half = (u * np.where(np.arange(len(s)) < rank, s, 0)) @ v
    gradients = {
        "full": u @ np.diag(np.geomspace(1, 4 * least, len(s))) @ v,
        "half": half, "tiny": 1e-30 * (u @ v), "huge": 1e30 * (u @ v), "tiny_half": 1e-30 * half,
        "huge_half": 1e30 * half, "least": 2.0**-120 * (u @ v), "zero": np.zeros(shape),
    }  # fmt: skip
    gradients = {key: mx.array(g.astype(np.float32)) for key, g in gradients.items()}
    options = {"ns_coefficients": name, "ns_steps": steps, "ns_dtype": DTYPES[dtype]}
    updates = update_of(gradients, scale="match_rms_adamw", **options)
    more = {"float32": 1e-3, "float16": 0.03, "bfloat16": 0.1}[dtype]
    for key, update in updates.items():
        values = np.linalg.svd(numbers(update), compute_uv=False) / (0.2 * math.sqrt(max(shape)))
        if key == "zero":
            assert (values == 0).all()
            continue
        if "half" in key:
            growth = math.prod(a for a, _, _ in triples_of(name, steps))
            noise = {"float32": 2.0**-22, "float16": 2.0**-11, "bfloat16": 2.0**-8}[dtype] * growth
            assert (values[rank:] <= min(noise, high)).all(), (key, values)
            values = values[:rank]
        if key == "full" and dtype != "float32":
            values = values[: rank + 1]  # the others are noise of half types
        assert (values >= low - more).all() and (values <= high + more).all(), (key, values)


def test_infinities_spread_no_further_than_their_matrix():
    gradients = tree(1, shapes={"a": (4, 4), "b": (4, 4), "c": (4,)})
    gradients["a"] = gradients["a"] * mx.where(mx.arange(16).reshape(4, 4) == 5, mx.inf, 1)
    updates = update_of(gradients)
    assert not np.isfinite(numbers(updates["a"])).any()
    assert np.isfinite(numbers(updates["b"])).all() and np.isfinite(numbers(updates["c"])).all()


def test_norms_at_the_end_of_float32():
    """Beyond it a matrix moves nothing, and is no NaN; within it its direction counts."""
    x = np.random.default_rng(0).standard_normal((16, 16)).astype(np.float32)
    x /= np.linalg.norm(x)
    scales = {"one": 1.0, "last": 3e38, "first": 2e-38, "beyond": 2e38, "below": 1e-41}
    gradients = {key: mx.array(x * np.float32(scale)) for key, scale in scales.items()}
    gradients["beyond"] = 2 * gradients["beyond"]
    updates = {key: numbers(update) for key, update in update_of(gradients).items()}
    for key in ("last", "first"):  # of which 2e-38 has elements that are subnormal
        assert np.abs(updates[key] - updates["one"]).max() < (CLOSE if key == "last" else 2e-3)
    assert (updates["beyond"] == 0).all() and np.abs(updates["below"]).max() < 1e-38


# ---- Batches ----------------------------------------------------------------------------------


def test_matrices_of_one_shape_are_one_batch():
    shapes = [(16, 16), (16, 64), (16, 16), (9,), (16, 64), (16, 16), (5, 7), (5, 7)]
    optimizer = optim.Muon(0.1)
    optimizer.init({"w": [mx.zeros(s) for s in shapes]})
    (key,) = optimizer.state["arenas"]
    batches = _newton_schulz._batches.find(key)
    assert batches is None  # of a step, not of a state
    optimizer.apply_gradients(*[{"w": [mx.ones(s) for s in shapes]}] * 2)
    batches = _newton_schulz._batches.find(key)
    assert [(b.shape, len(b.tensors)) for b in batches] == [
        ((16, 16), 3), ((16, 64), 2), ((5, 7), 2), ((9,), 1),
    ]  # fmt: skip


def test_an_arena_bounds_a_batch():
    rows = [((str(i),), (1024, 1024), mx.float32) for i in range(64)]
    batches = _newton_schulz.batches_of(layout_of_rows(rows))
    assert sum(len(b.tensors) for b in batches) == 64
    assert max(len(b.tensors) for b in batches) == 4  # a sixteenth of 256 MiB


@pytest.mark.skipif(mx.default_device() == mx.cpu, reason="nothing is launched ahead on a CPU")
def test_a_gpu_does_not_have_the_products_of_all_batches_at_once():
    """Launched ahead without end, they would be 15 of half the size of all directions."""
    parameters = {"w": [mx.random.normal((1024, 1024)) for _ in range(64)]}
    gradients = {"w": [mx.random.normal((1024, 1024)) for _ in range(64)]}
    optimizer = optim.Muon(0.1, ns_dtype=mx.bfloat16)
    optimizer.init(parameters)
    mx.eval(parameters, gradients, optimizer.state)
    for _ in range(3):
        mx.synchronize()
        mx.reset_peak_memory()
        before = mx.get_active_memory()
        parameters = optimizer.apply_gradients(gradients, parameters)
        mx.eval(parameters, optimizer.state)
    size = 4 * 64 * 1024 * 1024
    # Directions and updates, and what two or three batches of 16 have under way.
    assert mx.get_peak_memory() - before < 4 * size


@pytest.mark.parametrize("large", [1, 1 << 20])
def test_batches_that_wait_for_each_other(monkeypatch, large):
    """The numbers are the same, and large batches are no earlier than their turn."""
    monkeypatch.setattr(_newton_schulz, "_LARGE", large)
    waits = []
    own = _ext.after
    monkeypatch.setattr(_ext, "after", lambda *args: waits.append(args) or own(*args))
    got = update_of(tree(1))
    monkeypatch.undo()
    assert len(waits) == (len(set(MATRICES.values())) - 1 if large == 1 else 0)
    assert identical(got, update_of(tree(1)))


# ---- mlx.optimizers.Muon --------------------------------------------------------------------

ARGUMENTS = {
    "as it is": {},
    "no nesterov": {"nesterov": False},
    "no decay": {"weight_decay": 0.0, "momentum": 0.5},
    "no momentum": {"momentum": 0.0},
    "steps": {"ns_steps": 3},
    "none": {"ns_steps": 0},
}


@pytest.mark.parametrize("arguments", ARGUMENTS.values(), ids=ARGUMENTS)
def test_step_by_step_beside_mlx(arguments):
    """From the same state each time. Of what is no matrix it has the bits."""
    ours, theirs = optim.Muon(0.05, **arguments), mlx.optimizers.Muon(0.05, **arguments)
    parameters = tree(0)
    theirs.init(parameters)
    for step in range(4):
        gradients = tree(step + 1)
        before = parameters
        got = ours.apply_gradients(gradients, before)
        parameters = theirs.apply_gradients(gradients, before)
        mx.eval(got, parameters, ours.state, theirs.state)
        for name, want in parameters.items():
            if want.ndim < 2:
                assert same(got[name], want), name
            elif want.size:
                # The change: 0.05 times at most 8 here, times two results of that error; and a
                # rounding of a parameter below 8.
                error = np.abs(numbers(got[name]) - numbers(want)).max()
                assert error <= 2 * 0.05 * 8 * CLOSE + 2.0**-21, name
        moments = ours.unpacked_state()
        for name in parameters:
            assert same(moments[name]["v"], theirs.state[name]["v"]), name
        ours.state = theirs.state


def test_states_move_both_ways():
    ours, theirs = optim.Muon(0.05), mlx.optimizers.Muon(0.05)
    parameters = train(theirs, tree(0), (1, 2))
    ours.state = theirs.state
    moved = train(ours, parameters, (3,))
    again = mlx.optimizers.Muon(0.05)
    again.state = ours.unpacked_state()
    got, want = train(again, moved, (4,)), train(theirs, parameters, (3, 4))
    assert ours.step.item() == 3 and again.step.item() == theirs.step.item() == 4
    for name in want:
        assert np.allclose(numbers(got[name]), numbers(want[name]), rtol=0, atol=1e-3), name
    assert identical({"v": again.state["norm"]["v"]}, {"v": theirs.state["norm"]["v"]})


def test_it_is_one_of_mlx():
    optimizer = optim.Muon(0.1, 0.9, 0.1, False, 3)
    assert isinstance(optimizer, mlx.optimizers.Muon)
    assert (optimizer.momentum, optimizer.weight_decay) == (0.9, 0.1)
    assert (optimizer.nesterov, optimizer.ns_steps) == (False, 3)
    theirs, state, other = mlx.optimizers.Muon(0.1, 0.9, 0.1, False, 3), {}, {}
    w, g = tree(0)["a"], tree(1)["a"]
    optimizer.init_single(w, state)
    theirs.init_single(w, other)
    assert same(optimizer.apply_single(g, w, state), theirs.apply_single(g, w, other))
    assert identical(state, other)


def test_a_subclass_with_a_step_of_its_own():
    class Own(optim.Muon):
        def apply_single(self, gradient, parameter, state):
            return parameter - gradient

    parameters = Own(0.1).apply_gradients({"w": mx.ones((2, 2))}, {"w": mx.ones((2, 2))})
    assert (numbers(parameters["w"]) == 0).all()


def test_what_a_step_tensor_by_tensor_cannot():
    for options, word in (
        ({"scale": "match_rms_adamw"}, "scale"),
        ({"ns_coefficients": "polar_express"}, "ns_coefficients"),
        ({"ns_dtype": mx.bfloat16}, "ns_dtype"),
        ({"others": optim.AdamW(1e-3)}, "others"),
        ({"clip_norm": 1.0}, "clip_norm"),
    ):
        optimizer = optim.Muon(0.1, **options)
        assert_refused(lambda o=optimizer: o.apply_single(mx.ones(2), mx.ones(2), {}), "Muon", word)


# ---- torch.optim.Muon, recorded ---------------------------------------------------------------

with np.load(Path(__file__).parent / "data/optimizers/torch_muon.npz") as _file:
    TORCH = dict(_file)
ABOUT = json.loads(TORCH.pop("about").tobytes())


def as_ours(configuration):
    options = {**configuration, "learning_rate": configuration["lr"], "decoupled": True}
    del options["lr"]
    options["scale"] = options.pop("adjust_lr_fn", "original")
    if "ns_coefficients" in options:
        options["ns_coefficients"] = [options["ns_coefficients"]]
    return options


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("number", range(len(ABOUT["configurations"])))
def test_eight_steps_of_torch(number, dtype):
    """torch multiplies in bfloat16. Each update is as far from it as two such are at most, and
    the moments are its own."""
    configuration = ABOUT["configurations"][number]
    optimizer = optim.Muon(ns_dtype=DTYPES[dtype], **as_ours(configuration))
    names = [key.partition(".")[2] for key in TORCH if key.startswith("w0.")]
    parameters = {name: mx.array(TORCH[f"w0.{name}"]) for name in names}
    moved = dict.fromkeys(names, 0.0)
    for step in range(ABOUT["steps"]):
        before = {k: numbers(w) for k, w in parameters.items()}
        gradients = {name: mx.array(TORCH[f"g{step}.{name}"]) for name in names}
        parameters = optimizer.apply_gradients(gradients, parameters)
        for name in names:
            decay = 1 - configuration["lr"] * configuration["weight_decay"]
            moved[name] += np.linalg.norm(numbers(parameters[name]) - decay * before[name])
            error = np.linalg.norm(numbers(parameters[name]) - TORCH[f"{number}.p{step}.{name}"])
            assert error <= 2.0**-5 * moved[name], (step, name, error / moved[name])
            v = numbers(optimizer.unpacked_state()[name]["v"])
            assert np.allclose(v, TORCH[f"{number}.m{step}.{name}"], rtol=1e-6, atol=1e-6)


# ---- The two halves of a step ------------------------------------------------------------------

OF_GRADIENTS = {
    "maximize": {"maximize": True},
    "grad_scale": {"grad_scale": 3.0},
    "clip_value": {"clip_value": 0.5},
    "clip_norm": {"clip_norm": 1.0},
    "all": {"maximize": True, "grad_scale": 3.0, "clip_value": 0.5, "clip_norm": 1.0},
}


@pytest.mark.parametrize("options", OF_GRADIENTS.values(), ids=OF_GRADIENTS)
def test_the_frame_before_the_momentum(options):
    """The gradients that SGD's step from zeros at the rate -1 leaves."""
    ours, bare = optim.Muon(0.1, **options), optim.Muon(0.1)
    got = want = tree(0)
    for seed in (1, 2, 3):
        gradients = tree(seed)
        zeros = tree_map(mx.zeros_like, got)
        ready = optim.SGD(-1.0, **options).apply_gradients(gradients, zeros)
        got = ours.apply_gradients(gradients, got)
        want = bare.apply_gradients(ready, want)
    assert identical(got, want)
    assert identical(ours.unpacked_state()["up"], bare.unpacked_state()["up"])


OF_PARAMETERS = {
    "nothing": {},
    "decoupled": {"weight_decay": 0.1, "decoupled": True},
    "master_weights": {"master_weights": True},
    "master24": {"master_weights": "24bit"},
    "compensated": {"compensated": True},
    "stochastic": {"rounding": "stochastic", "seed": 5},
    "ema_decay": {"ema_decay": 0.9},
    "all": {
        "weight_decay": 0.1, "decoupled": True, "master_weights": True, "ema_decay": 0.9,
        "rounding": "stochastic", "seed": 5,
    },
}  # fmt: skip


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("options", OF_PARAMETERS.values(), ids=OF_PARAMETERS)
def test_the_frame_after_the_orthogonalisation(options, dtype):
    """An SGD step whose gradient is the update of a Muon without the frame."""
    dtype, scheduled = DTYPES[dtype], {"learning_rate": optim.cosine_decay(0.05, 10)}
    if options.get("master_weights") == "24bit" and dtype != mx.bfloat16:
        pytest.skip("of bfloat16")
    ours = optim.Muon(**{"weight_decay": 0.0, **scheduled, **options})
    bare = optim.Muon(1.0, weight_decay=0.0)
    sgd = optim.SGD(**scheduled, **options)
    # In the order of ours, which is that of random numbers.
    order = {k: SHAPES[k] for k in ("a", "b", "c", "up", "down", "odd", "odd_too", "norm", "bias")}
    got = want = tree(0, dtype, order)
    for seed in (1, 2, 3):
        gradients = tree(seed, dtype, order)
        updates = bare.apply_gradients(gradients, tree(9, shapes=order, scale=0.0))
        updates = tree_map(lambda x: -x, updates)
        got = ours.apply_gradients(gradients, got)
        want = sgd.apply_gradients(updates, want)
    assert identical(got, want)
    state, other = ours.unpacked_state(), sgd.unpacked_state()
    assert same(state["learning_rate"], other["learning_rate"])
    for name, kept in other.items():
        if isinstance(kept, dict):
            own = {k: x for k, x in state[name].items() if k != "v"}
            assert identical(own, kept), name


@pytest.mark.parametrize("name", ["a", "norm"])
@pytest.mark.parametrize("kept", [{}, {"master_weights": True}, {"compensated": True}], ids=str)
def test_coupled_decay(kept, name):
    """Of the master, where there is one; of a vector too, whether or not a matrix is beside it."""
    ours, bare = (optim.Muon(0.1, weight_decay=x, **kept) for x in (0.5, 0.0))
    beside = {"up": tree(0)["up"]}
    together = optim.Muon(0.1, weight_decay=0.5, **kept)
    got = want = {"w": tree(0, mx.bfloat16)[name]}
    other = {**got, **beside}
    for seed in (1, 2, 3):
        g = {"w": tree(seed)[name]}
        w = bare.unpacked_state().get("w", {}).get("master", want["w"].astype(mx.float32))
        want = bare.apply_gradients({"w": g["w"] + 0.5 * w}, want)
        got = ours.apply_gradients(g, got)
        other = together.apply_gradients({**g, "up": tree(seed)["up"]}, other)
        assert identical(got, want) and same(other["w"], got["w"])
        assert identical(ours.unpacked_state()["w"], bare.unpacked_state()["w"])


def test_numbers_on_schedules():
    """One step is seen by both halves: rate, decay and momentum of the step that is taken."""
    ends = (0.1, 0.02), (0.1, 0.3), (0.5, 0.9)
    rate, decay, momentum = (optim.linear_schedule(x, y, 4) for x, y in ends)
    for decoupled in (False, True):
        ours = optim.Muon(rate, momentum, decay, decoupled=decoupled)
        got = want = tree(0)
        v = tree_map(mx.zeros_like, got)
        for step in range(3):
            numbers_of = [x(mx.array(step)).item() for x in (rate, momentum, decay)]
            constant = optim.Muon(*numbers_of, decoupled=decoupled)
            constant.state.update({name: {"v": x} for name, x in v.items()})
            gradients = tree(step + 1)
            got = ours.apply_gradients(gradients, got)
            want = constant.apply_gradients(gradients, want)
            v = {name: constant.unpacked_state()[name]["v"] for name in v}
            assert identical(got, want)
            assert ours.learning_rate.item() == numbers_of[0]
            assert ours.momentum.item() == numbers_of[1]
            assert ours.weight_decay.item() == numbers_of[2]


def test_groups():
    slow = (lambda path, array: path == "up", {"learning_rate_factor": 0.25, "weight_decay": 0.0})
    own = (lambda path, array: path in ("a", "norm"), {"learning_rate": -0.5, "momentum": 0.0})
    ours = optim.Muon(0.1, weight_decay=0.1, groups=[slow, own])
    got = train(ours, tree(0), (1, 2))
    alone = {
        "up": optim.Muon(0.025, weight_decay=0.0),
        "a": optim.Muon(-0.5, momentum=0.0, weight_decay=0.1),
        "norm": optim.Muon(-0.5, momentum=0.0, weight_decay=0.1),
        "b": optim.Muon(0.1, weight_decay=0.1),
    }
    for name, optimizer in alone.items():
        want = {name: tree(0)[name]}
        for seed in (1, 2):
            want = optimizer.apply_gradients({name: tree(seed)[name]}, want)
        assert identical({name: got[name]}, want), name


@pytest.mark.parametrize("dtype", DTYPES)
def test_state_dtype(dtype):
    """The moment is rounded when it is stored; the direction comes of the one before that."""
    ours = optim.Muon(0.1, state_dtype=DTYPES[dtype], weight_decay=0.0)
    got = train(ours, tree(0), (1,))
    assert identical(got, train(optim.Muon(0.1, weight_decay=0.0), tree(0), (1,)))
    for name, g in tree(1).items():
        v = ours.unpacked_state()[name]["v"]
        assert same(v, (mx.array(1 - 0.95) * g).astype(DTYPES[dtype])), name


def test_moments_in_bytes():
    """Of what is large enough; the direction of a step comes of the moment before it is one."""
    shapes = {"a": (64, 64), "b": (64, 128), "up": (16, 16), "norm": (16,)}
    ours = optim.Muon(0.1, state_dtype="8bit")
    got = train(ours, tree(0, shapes=shapes), (1,))
    assert identical(got, train(optim.Muon(0.1), tree(0, shapes=shapes), (1,)))
    (entry,) = ours.state["arenas"].values()
    assert sorted(str(a.dtype) for a in entry["v"]) == ["mlx.core.float32", "mlx.core.uint8"]
    got = train(ours, got, (2, 3))
    want = train(optim.Muon(0.1), tree(0, shapes=shapes), (1, 2, 3))
    for name, x in want.items():
        # A moment errs by less than a fiftieth of the largest of its group; in two updates.
        error = np.linalg.norm(numbers(got[name]) - numbers(x))
        moved = np.linalg.norm(numbers(x) - numbers(tree(0, shapes=shapes)[name]))
        assert error <= 0.04 * moved, name
        assert (error > 0) == (name in "ab"), name


def test_half_parameters_have_float32_moments_and_directions():
    """Gradients that a float16 direction would lose."""
    shapes = {"w": (8, 8), "b": (8,)}
    gradients = tree(1, shapes=shapes, scale=1e-7)
    got = optim.Muon(1.0, weight_decay=0.0).apply_gradients(
        gradients, tree(0, mx.float16, shapes, 0)
    )
    want = optim.Muon(1.0, weight_decay=0.0).apply_gradients(
        gradients, tree(0, mx.float32, shapes, 0)
    )
    assert same(got["w"], want["w"].astype(mx.float16))


# ---- Whatever a gradient or a tree is like -------------------------------------------------


def test_gradients_that_lie_in_any_way():
    flat = tree(1)
    turned = {k: g.T if g.ndim == 2 else g for k, g in flat.items()}
    turned = tree_map(lambda g: mx.contiguous(g), turned)
    turned = {k: g.T if g.ndim == 2 else g for k, g in turned.items()}
    apart = tree_map(lambda g: mx.repeat(g, 2, -1)[..., ::2] if g.ndim else g, flat)
    constant = {k: mx.broadcast_to(mx.array(0.5), g.shape) for k, g in flat.items()}
    for gradients in (turned, apart, constant):
        copied = tree_map(lambda g: mx.array(np.array(g)), gradients)
        assert identical(
            optim.Muon(0.1).apply_gradients(gradients, tree(0)),
            optim.Muon(0.1).apply_gradients(copied, tree(0)),
        )


def test_dtypes_beside_each_other():
    """Each tensor moves as it does alone."""
    parameters = {f"{k}_{d}": x for d, dtype in DTYPES.items() for k, x in tree(0, dtype).items()}
    gradients = {f"{k}_{d}": x.astype(mx.bfloat16) for d in DTYPES for k, x in tree(1).items()}
    together = optim.Muon(0.1, weight_decay=0.0).apply_gradients(gradients, parameters)
    for d in DTYPES:
        own = {k: x for k, x in parameters.items() if k.endswith(d)}
        alone = optim.Muon(0.1, weight_decay=0.0).apply_gradients(
            {k: gradients[k] for k in own}, own
        )
        assert identical({k: together[k] for k in own}, alone)


def test_trees_of_any_form():
    w = tree(0)["a"]
    for given in (
        w,
        [w, w],
        {"x": [{"y": w}, {"y": tree(0)["norm"]}]},
        {},
        {"none": mx.zeros((0, 3))},
    ):
        got = optim.Muon(0.1).apply_gradients(given, given)
        assert [k for k, _ in tree_flatten(got)] == [k for k, _ in tree_flatten(given)]
        for (_, x), (_, y) in zip(tree_flatten(got), tree_flatten(given), strict=True):
            assert (x.shape, x.dtype) == (y.shape, y.dtype)
            assert not x.size or not same(x, y)


def test_frozen_and_thawed():
    """What is left out keeps its moment, and moves on where it comes back."""
    parameters, optimizer, whole = tree(0), optim.Muon(0.1), optim.Muon(0.1)
    first = train(optimizer, parameters, (1,))
    few = {k: tree(2)[k] for k in ("a", "up", "norm")}
    second = {**first, **optimizer.apply_gradients(few, first)}
    third = optimizer.apply_gradients(tree(3), second)
    same_first = train(whole, parameters, (1,))
    theirs = {k: tree(2)[k] if k in few else None for k in parameters}
    moments = whole.unpacked_state()
    assert identical(first, same_first)
    for name in ("b", "bias"):  # that skipped the second step
        alone = optim.Muon(0.1)
        alone.state = {"step": mx.array(2), "learning_rate": mx.array(0.1), name: moments[name]}
        want = alone.apply_gradients({name: tree(3)[name]}, {name: first[name]})
        assert theirs[name] is None and identical({name: third[name]}, want)


# ---- Memory -----------------------------------------------------------------------------------


def address(array):
    return np.asarray(memoryview(array)).__array_interface__["data"][0]


def test_it_writes_in_place_where_nobody_holds_anything():
    optimizer, parameters, where = optim.Muon(0.1, others=optim.AdamW(0.1)), tree(0), []
    for seed in (1, 2, 3):
        parameters = optimizer.apply_gradients(tree(seed), parameters)
        mx.eval(parameters, optimizer.state)
        let_go()
        arenas = [optimizer.state["arenas"], optimizer.others.state["arenas"]]
        kept = [x for key, x in tree_flatten(arenas) if "table" not in key]
        where.append([address(x) for x in [*parameters.values(), *kept] if x.size])
        del arenas, kept
    assert where[0] == where[1] == where[2]


@pytest.mark.parametrize("others", [False, True])
def test_what_somebody_holds_does_not_change(others):
    options = {"others": optim.AdamW(0.1)} if others else {}
    optimizer = optim.Muon(0.1, master_weights=True, ema_decay=0.9, **options)
    parameters = train(optimizer, tree(0, mx.bfloat16), (1, 2), mx.bfloat16)
    let_go()
    held = parameters, optimizer.unpacked_state(), copy.deepcopy(optimizer).state
    average, gradients = optimizer.ema_parameters(), tree(3, mx.bfloat16)
    mx.eval(average, gradients)
    held = [x for _, x in tree_flatten([*held, average, gradients])]
    before = [of_mlx(x).copy() for x in held]
    for _ in range(2):
        parameters = optimizer.apply_gradients(gradients, parameters)
        mx.eval(parameters, optimizer.state)
    assert all((of_mlx(x) == bits).all() for x, bits in zip(held, before, strict=True))


# ---- One optimizer for the whole model ------------------------------------------------------


def no_matrix(name):
    return len(SHAPES[name]) < 2


def test_the_others_have_their_own_step():
    ours = optim.Muon(0.1, others=optim.AdamW(0.01, weight_decay=0.5))
    got = train(ours, tree(0), (1, 2, 3))
    for mine, optimizer in ((False, optim.Muon(0.1)), (True, optim.AdamW(0.01, weight_decay=0.5))):
        shapes = {k: s for k, s in SHAPES.items() if no_matrix(k) == mine}
        want = {k: x for k, x in tree(0).items() if k in shapes}
        for seed in (1, 2, 3):
            gradients = {k: x for k, x in tree(seed).items() if k in shapes}
            want = optimizer.apply_gradients(gradients, want)
        assert identical({k: got[k] for k in shapes}, want)
    assert list(got) == list(SHAPES)


def test_a_predicate_says_which_these_are():
    takes = lambda path, array: path in ("layers.0.w", "head") or array.ndim < 2  # noqa: E731
    w = {"layers": [{"w": mx.ones((4, 4))}, {"w": mx.ones((4, 4))}], "head": mx.ones((2, 4))}
    optimizer = optim.Muon(0.1, others=optim.SGD(0.5), others_filter=takes)
    got = optimizer.apply_gradients(w, w)
    assert (numbers(got["layers"][0]["w"]) == 0.5).all() and (numbers(got["head"]) == 0.5).all()
    assert (numbers(got["layers"][1]["w"]) > 0.5).all()
    assert set(optimizer.unpacked_state()) == {"step", "learning_rate", "layers", "others_state"}
    optimizer.others_filter = lambda path, array: True  # another one is asked at the next step
    got = optimizer.apply_gradients(w, w)
    assert (numbers(got["layers"][1]["w"]) == 0.5).all()


@pytest.mark.parametrize("scaled", [False, True])
def test_clipping_is_by_the_norm_of_all(scaled):
    options = {"clip_norm": 0.5, "clip_value": 0.7, "grad_scale": 4.0}
    ours = optim.Muon(0.1, others=optim.AdamW(0.01), **options)
    bare = optim.Muon(0.1, others=optim.AdamW(0.01))
    scale = {"grad_scale": mx.array(4.0)} if scaled else {}
    got = ours.apply_gradients(tree(1), tree(0), **scale)
    ready = optim.SGD(-1.0, **options).apply_gradients(tree(1), tree(0, scale=0.0))
    assert identical(got, bare.apply_gradients(ready, tree(0)))
    clipped = np.concatenate(
        [
            np.clip(numbers(g) / 4, -np.float32(0.7), np.float32(0.7)).ravel()
            for g in tree(1).values()
        ]
    )
    assert math.isclose(ours.grad_norm.item(), np.linalg.norm(clipped), rel_tol=1e-6)


def test_a_schedule_of_the_scale_is_asked_once():
    calls = []

    def scale(step):
        calls.append(step.item())
        return mx.array(2.0)

    for options in ({}, {"clip_norm": 1.0}):
        optimizer = optim.Muon(0.1, others=optim.AdamW(0.01), grad_scale=scale, **options)
        before = len(calls)
        train(optimizer, tree(0), (1,))
        assert calls[before:] == [0]


def test_what_was_measured_for_all_has_no_norms_of_tensors():
    tree_of = _ext.Tree({"w": mx.ones(2)}, {"w": mx.ones(2)}, "op")
    made = _ext.Options(
        rule=0,
        scalars=[0.1, 0.0, 1.0, 0.0, 0.0],
        flags=_ext.FLAGS["trust_ratio"],
        trust_coefficient=0.1,
        measured=[mx.ones(2), mx.array(0, mx.uint64)],
        op="op",
    )
    call = lambda: _ext.fused_step(  # noqa: E731
        tree_of, _ext.Layout(tree_of), [[]] * 6, mx.array(0, mx.uint64), made
    )
    assert_refused(call, "op", "trust ratio")


@pytest.mark.parametrize("bad", ["up", "norm"])
def test_a_skipped_step_changes_nothing_of_either(bad):
    options = {"master_weights": True, "ema_decay": 0.9, "skip_nonfinite": True}
    ours = optim.Muon(0.1, others=optim.AdamW(0.01, bias_correction=True), **options)
    parameters = train(ours, tree(0, mx.bfloat16), (1,), mx.bfloat16)
    state = tree_map(lambda x: mx.array(np.array(x)) if x.dtype != mx.bfloat16 else x + 0,
                     ours.unpacked_state())  # fmt: skip
    bits = [of_mlx(x).copy() for _, x in tree_flatten(parameters)]
    gradients = tree(2, mx.bfloat16)
    gradients[bad] = gradients[bad] * mx.inf
    after = ours.apply_gradients(gradients, parameters)
    mx.eval(after, ours.state)
    assert all((of_mlx(x) == b).all() for (_, x), b in zip(tree_flatten(after), bits, strict=True))
    got = ours.unpacked_state()
    for own, other in ((got, state), (got["others_state"], state["others_state"])):
        for name, kept in own.items():
            if isinstance(kept, dict) and name != "others_state":
                assert identical(kept, other[name]), name
        assert own["step"].item() == 1 and own["skipped"].item() == 1
    assert ours.skipped.item() == 1 and ours.others.skipped.item() == 1
    again = train(ours, after, (3,), mx.bfloat16)
    assert ours.step.item() == 2
    assert not identical(again, after)


def test_options_that_all_share():
    ours = optim.Muon(0.1, others=optim.AdamW(0.01), master_weights=True, ema_decay=0.5)
    train(ours, tree(0, mx.bfloat16), (1,), mx.bfloat16)
    assert ours.unpacked_state()["others_state"]["norm"].keys() == {"m", "v", "master", "ema"}
    average = ours.ema_parameters()
    assert {k: (x.shape, x.dtype) for k, x in average.items()} == {
        k: (s, mx.bfloat16) for k, s in SHAPES.items()
    }
    ours.ema_decay = None
    train(ours, tree(0, mx.bfloat16), (1,), mx.bfloat16)
    assert ours.unpacked_state()["others_state"]["norm"].keys() == {"m", "v", "master"}


def test_one_state(tmp_path):
    def made():
        return optim.Muon(0.1, others=optim.AdamW(optim.cosine_decay(0.01, 9)), clip_norm=1.0)

    optimizer = made()
    parameters = train(optimizer, tree(0), (1, 2))
    file = str(tmp_path / "state.safetensors")
    mx.save_safetensors(file, dict(tree_flatten(optimizer.state)))
    want = train(optimizer, parameters, (3, 4))
    for state in (
        tree_unflatten(list(mx.load(file).items())),
        copy.deepcopy(mx.load(file)) and tree_unflatten(list(mx.load(file).items())),
    ):
        other = made()
        other.state = state
        assert identical(train(other, parameters, (3, 4)), want)
    edited = made()
    edited.state.update(tree_unflatten(list(mx.load(file).items())))
    assert identical(train(edited, parameters, (3, 4)), want)
    unpacked = made()
    unpacked.state = edited.unpacked_state()
    assert unpacked.step.item() == 4
    assert identical(train(unpacked, want, (5,)), train(optimizer, want, (5,)))
    assert unpacked.others.step.item() == 5


def pickled(optimizer):
    return pickle.loads(pickle.dumps(optimizer))


@pytest.mark.parametrize("copied", [copy.copy, copy.deepcopy, pickled])
def test_copies_go_on_alone(copied):
    optimizer = optim.Muon(0.1, ns_dtype=mx.bfloat16, others=optim.AdamW(0.01), clip_norm=1.0)
    parameters = train(optimizer, tree(0), (1,))
    other = copied(optimizer)
    assert repr(other) == repr(optimizer)
    want = train(other, parameters, (2,))
    assert optimizer.step.item() == optimizer.others.step.item() == 1
    assert identical(train(optimizer, parameters, (2,)), want)


def test_what_every_optimizer_has():
    optimizer = optim.Muon(0.1, others=optim.AdamW(0.01), ema_decay=0.5)
    optimizer.init(tree(0))
    assert optimizer.state["others_state"]["arenas"]
    assert optimizer.unpacked_state()["others_state"]["norm"].keys() == {"m", "v", "ema"}
    assert optimizer.state["up"]["v"].shape == (64, 16)
    optimizer.forget("ema")
    assert optimizer.unpacked_state()["up"].keys() == {"v"}
    assert optimizer.unpacked_state()["others_state"]["norm"].keys() == {"m", "v"}
    optimizer.forget("m")
    assert_refused(lambda: optimizer.forget("u"), "Muon", "'u'")
    optimizer.keep_only({k: tree(0)[k] for k in ("up", "norm")})
    own = optimizer.unpacked_state()
    assert {k for k in own if isinstance(own[k], dict)} == {"up", "others_state"}
    assert {k for k, x in own["others_state"].items() if isinstance(x, dict)} == {"norm"}
    text = optim.describe(optimizer.state)
    assert "up" in text and "others:" in text and "norm" in text
    text = optim.describe(dict(tree_flatten(optimizer.state)))
    assert "up" in text and "others:" in text and "norm" in text


def test_its_call():
    text = "Muon(learning_rate=array(0.1, dtype=float32)"
    assert repr(optim.Muon(0.1)) == text + ")"
    more = optim.Muon(0.1, nesterov=False, scale="match_rms_adamw", others=optim.SGD(0.5))
    assert repr(more).startswith(text + ", nesterov=False, scale='match_rms_adamw', others=SGD(")


def test_a_rate_that_is_set_between_steps():
    optimizer = optim.Muon(0.1, others=optim.SGD(0.5))
    parameters = train(optimizer, tree(0), (1,))
    optimizer.learning_rate = optimizer.others.learning_rate = 0.0
    assert identical(train(optimizer, parameters, (2,)), parameters)


# ---- Compiled --------------------------------------------------------------------------------


@pytest.mark.skipif(not mx.metal.is_available() and mx.default_device() != mx.cpu, reason="CPU")
@pytest.mark.parametrize("others", [False, True])
@pytest.mark.parametrize("shapeless", [False, True])
def test_compiled_steps(others, shapeless):
    def made():
        options = {"others": optim.AdamW(optim.cosine_decay(0.01, 9))} if others else {}
        return optim.Muon(optim.cosine_decay(0.1, 9), clip_norm=1.0, skip_nonfinite=True, **options)

    names = ("a", "b", "up", "odd", "odd_too", "lora_a", "filter", "norm")
    shapes = {k: SHAPES[k] for k in names}
    want, eager = tree(0, shapes=shapes), made()
    got, optimizer = want, made()
    optimizer.init(got)
    step = mx.compile(
        lambda parameters, gradients: optimizer.apply_gradients(gradients, parameters),
        inputs=optimizer.state, outputs=optimizer.state, shapeless=shapeless,
    )  # fmt: skip
    for seed in (1, 2, 3):
        gradients = tree(seed, shapes=shapes)
        got, want = step(got, gradients), eager.apply_gradients(gradients, want)
        mx.eval(got, want, optimizer.state, eager.state)
        for name in want:
            assert np.allclose(numbers(got[name]), numbers(want[name]), rtol=0, atol=2.0**-18), name
        assert optimizer.step.item() == seed
        assert same(optimizer.learning_rate, eager.learning_rate)
        if others:
            assert same(optimizer.others.learning_rate, eager.others.learning_rate)


def test_a_compiled_step_needs_the_state():
    w = {"w": mx.ones((2, 2)), "b": mx.ones(2)}
    for optimizer in (optim.Muon(0.1), optim.Muon(0.1, others=optim.AdamW(0.1))):
        optimizer.init(w)
        step = mx.compile(lambda p, o=optimizer: o.apply_gradients(p, p))
        with pytest.raises(
            ValueError, match=r"^\[\w+\] a compiled step needs the optimizer's state"
        ):
            step(w)


def test_setting_an_option_after_a_trace_warns():
    optimizer, w = optim.Muon(0.1), {"w": mx.ones((2, 2))}
    optimizer.init(w)
    mx.compile(
        lambda p: optimizer.apply_gradients(p, p), inputs=optimizer.state, outputs=optimizer.state
    )(w)
    with pytest.warns(UserWarning, match="ns_steps was set after"):
        optimizer.ns_steps = 3


# ---- MLX's transforms -----------------------------------------------------------------------


@pytest.mark.parametrize("large", [1, 1 << 20])
def test_derivatives(monkeypatch, large):
    """Of a step, by the gradients: those of MLX's. Of batches that wait for each other too."""
    monkeypatch.setattr(_newton_schulz, "_LARGE", large)
    parameters, gradients = tree(0, shapes=MATRICES), tree(1, shapes=MATRICES)

    def derivative(cls):
        def loss(g):
            return sum(mx.sum(mx.sin(x)) for x in cls(0.1).apply_gradients(g, parameters).values())

        return mx.grad(loss)(gradients)

    got, want = derivative(optim.Muon), derivative(mlx.optimizers.Muon)
    for name, x in want.items():
        assert np.abs(numbers(x)).max() > 1e-4 or x.size == 1, name
        # Each a sum of hundreds of products of float32, of numbers up to 500.
        assert np.allclose(numbers(got[name]), numbers(x), rtol=1e-3, atol=1e-4), name


@pytest.mark.parametrize("exponent", [-100, -60, 60, 100])
@pytest.mark.parametrize("steps", [0, 5])
def test_derivatives_of_tiny_and_huge_gradients(steps, exponent):
    """Of gradients twice as large the update is the same, and its derivative half as large: to
    the bit, also where a norm's square would be nothing or infinite."""
    parameters, gradients = tree(0, shapes=MATRICES), tree(1, shapes=MATRICES)

    def derivative(exponent):
        def loss(g):
            optimizer = optim.Muon(0.1, weight_decay=0.0, ns_steps=steps)
            return sum(mx.sum(mx.sin(x)) for x in optimizer.apply_gradients(g, parameters).values())

        def scaled(a):
            return a * 2.0**exponent

        return {k: scaled(d) for k, d in mx.grad(loss)(tree_map(scaled, gradients)).items()}

    got, want = derivative(exponent), derivative(0)
    for name, x in want.items():
        assert np.abs(numbers(x)).max() > 1e-4 or x.size == 1, name
        assert same(got[name], x), name


def test_what_waits_has_its_own_derivative():
    """Forward and vectorised, by what waits and by what it waits for."""
    w, t = (mx.random.normal((6, 4), key=mx.random.key(seed)) for seed in (1, 2))

    def wait(a, b):
        return _ext.after(a, 2 * b)

    zero = mx.zeros_like(w)
    assert mx.array_equal(mx.jvp(wait, [w, w], [t, zero])[1][0], t)
    assert mx.array_equal(mx.jvp(wait, [w, w], [zero, t])[1][0], zero)
    for axes in ((0, None), (None, 0), (1, 1), (0, 0)):
        got = mx.vmap(wait, in_axes=axes)(w, w)
        rows = w.T if axes[0] == 1 else w if axes[0] == 0 else mx.stack([w] * 6)
        assert mx.array_equal(got, rows[: got.shape[0]]), axes


@pytest.mark.parametrize("large", [1, 1 << 20])
def test_vectorised(monkeypatch, large):
    monkeypatch.setattr(_newton_schulz, "_LARGE", large)
    parameters = tree(0)
    gradients = {k: mx.stack([tree(seed)[k] for seed in (1, 2, 3)]) for k in parameters}
    got = mx.vmap(lambda g: optim.Muon(0.1).apply_gradients(g, parameters))(gradients)
    for i, seed in enumerate((1, 2, 3)):
        want = optim.Muon(0.1).apply_gradients(tree(seed), parameters)
        for name, x in want.items():
            assert np.allclose(numbers(got[name][i]), numbers(x), rtol=0, atol=2.0**-18), name


# ---- Beside other parts of the package -------------------------------------------------------


def test_the_pure_functions():
    parameters, optimizer = tree(0), optim.Muon(0.1, momentum=0.9, scale="match_rms_adamw")
    state = optim.fused_muon_init(parameters, momentum=0.9)
    for seed in (1, 2):
        got, state = optim.fused_muon_step(
            parameters, tree(seed), state, learning_rate=0.1, momentum=0.9, scale="match_rms_adamw"
        )
        want = optimizer.apply_gradients(tree(seed), parameters)
        assert identical(got, want)
        parameters = want
    assert state["step"].item() == 2
    assert_refused(
        lambda: optim.fused_muon_init(parameters, others=optim.SGD(0.1)),
        "fused_muon_init", "others",
    )  # fmt: skip


def test_in_a_multi_optimizer():
    both = optim.MultiOptimizer([optim.Muon(0.1), optim.AdamW(0.01)], [lambda path, w: w.ndim >= 2])
    got = both.apply_gradients(tree(1), tree(0))
    one = optim.Muon(0.1, others=optim.AdamW(0.01))
    assert identical(got, one.apply_gradients(tree(1), tree(0)))


def test_with_a_scaler():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.w, self.b = mx.ones((4, 4)), mx.ones(4)

    model, scaler = Model(), optim.GradScaler(4.0)
    optimizer = optim.Muon(0.1, others=optim.AdamW(0.01), skip_nonfinite=True)
    gradients = {"w": mx.random.normal((4, 4)), "b": mx.ones(4)}
    for bad in (True, False):
        scaled = tree_map(lambda g, factor=mx.inf if bad else 1: 4 * g * factor, gradients)
        scaler.step(optimizer, model, scaled)
        scaler.update()
        if bad:
            assert (numbers(model.w) == 1).all() and (numbers(model.b) == 1).all()
            scaler = optim.GradScaler(4.0)
    want = optim.Muon(0.1, others=optim.AdamW(0.01)).apply_gradients(
        gradients, {"w": mx.ones((4, 4)), "b": mx.ones(4)}
    )
    assert identical({"w": model.w, "b": model.b}, want)


def test_programs_for_mlx_get_ours():
    optim.install()
    try:
        optimizer = mlx.optimizers.Muon(0.1, momentum=0.9)
        assert isinstance(optimizer, optim.Muon) and optimizer.momentum == 0.9
        assert identical(
            optimizer.apply_gradients(tree(1), tree(0)),
            optim.Muon(0.1, momentum=0.9).apply_gradients(tree(1), tree(0)),
        )
    finally:
        optim.uninstall()
    assert not isinstance(mlx.optimizers.Muon(0.1), optim.Muon)


def test_the_reference_says_the_same():
    parameters, optimizer = tree(0), optim.Muon(0.1)
    state = reference.init(parameters)
    for seed in (1, 2):
        want, state = reference.step(
            reference.muon, parameters, tree(seed), state,
            learning_rate=0.1, momentum=0.95, nesterov=True, weight_decay=0.01,
        )  # fmt: skip
        parameters = optimizer.apply_gradients(tree(seed), parameters)
        for name, x in want.items():
            assert np.allclose(numbers(parameters[name]), numbers(x), rtol=0, atol=1e-4), name


# ---- What makes no sense ----------------------------------------------------------------------

WRONG = [
    ({"ns_steps": -1}, ValueError, ("ns_steps", "-1")),
    ({"ns_steps": 2.5}, ValueError, ("ns_steps", "2.5")),
    ({"ns_coefficients": "better"}, ValueError, ("ns_coefficients", "'better'", "'polar_express'")),
    ({"ns_coefficients": []}, ValueError, ("ns_coefficients", "[]")),
    ({"ns_coefficients": [(1, 2)]}, ValueError, ("ns_coefficients", "(1, 2)")),
    ({"ns_coefficients": [(1, 2, math.nan)]}, ValueError, ("ns_coefficients", "nan")),
    ({"ns_coefficients": [(1, 2, math.inf)]}, ValueError, ("ns_coefficients", "inf")),
    ({"ns_coefficients": [(1, 2, 1e39)]}, ValueError, ("ns_coefficients", "1e+39")),
    ({"ns_coefficients": [(1, 2, 10**400)]}, ValueError, ("ns_coefficients", "1000")),
    ({"ns_coefficients": 3.4}, ValueError, ("ns_coefficients", "3.4")),
    ({"ns_dtype": mx.int8}, ValueError, ("ns_dtype", "int8", "bfloat16")),
    ({"ns_dtype": "bfloat16"}, ValueError, ("ns_dtype", "bfloat16")),
    ({"scale": "spectral"}, ValueError, ("scale", "'spectral'", "'match_rms_adamw'")),
    ({"momentum": 1.5}, ValueError, ("momentum", "1.5")),
    ({"momentum": -0.1}, ValueError, ("momentum", "-0.1")),
    ({"trust_coefficient": 0.1}, ValueError, ("trust_coefficient",)),
    ({"others": 3}, TypeError, ("others", "int")),
    ({"others": mlx.optimizers.AdamW(0.1)}, TypeError, ("others", "AdamW")),
    ({"others": optim.Muon(0.1)}, TypeError, ("others", "Muon")),
    ({"others_filter": lambda path, array: True}, ValueError, ("others_filter",)),
    ({"others": optim.SGD(0.1), "others_filter": 3}, TypeError, ("others_filter", "int")),
    ({"others": optim.SGD(0.1, clip_norm=1.0)}, ValueError, ("others", "clip_norm")),
    ({"others": optim.SGD(0.1, ema_decay=0.9, seed=1)}, ValueError, ("seed, ema_decay",)),
    ({"others": optim.SGD(0.1, trust_coefficient=0.1)}, ValueError, ("trust_coefficient",)),
    (
        {"others": optim.SGD(0.1, groups=[(lambda p, a: True, {"trust_coefficient": 0.1})])},
        ValueError,
        ("trust_coefficient",),
    ),
]


@pytest.mark.parametrize("options, error, words", WRONG, ids=[" ".join(w) for *_, w in WRONG])
def test_options_that_make_no_sense(options, error, words):
    assert_refused(lambda: optim.Muon(0.1, **options), "Muon", *words, error=error)


@pytest.mark.parametrize("name, value", [("ns_steps", -1), ("scale", "x"), ("others", 3)])
def test_attributes_that_make_no_sense_are_refused_at_the_step(name, value):
    optimizer = optim.Muon(0.1)
    parameters = train(optimizer, tree(0), (1,))
    bits = [of_mlx(x).copy() for _, x in tree_flatten(parameters)]
    setattr(optimizer, name, value)
    error = TypeError if name == "others" else ValueError
    call = lambda: optimizer.apply_gradients(tree(2), parameters)  # noqa: E731
    assert_refused(call, "Muon", name, error=error)
    assert optimizer.step.item() == 1
    assert all(
        (of_mlx(x) == b).all() for (_, x), b in zip(tree_flatten(parameters), bits, strict=True)
    )


def test_a_list_of_coefficients_that_changes():
    """Attributes are plain: the next step has what the list says then."""
    triples = [(3.0, -2.0, 0.5), (2.0, -1.5, 0.4)]
    optimizer = optim.Muon(0.1, ns_coefficients=triples)
    parameters = train(optimizer, tree(0), (1,))
    triples[1] = (1.0, 0.0, 0.0)
    other = optim.Muon(0.1, ns_coefficients=list(triples))
    other.state = dict(optimizer.state)
    want = train(other, parameters, (2,))
    assert identical(train(optimizer, parameters, (2,)), want)
    triples[1] = (1.0, 0.0)
    call = lambda: train(optimizer, parameters, (3,))  # noqa: E731
    assert_refused(call, "Muon", "ns_coefficients")


def test_nothing_has_changed_where_one_of_both_refuses():
    """A group of Muon's that takes no tensor: found after the others have taken their step."""
    nothing = [(lambda path, array: False, {"weight_decay": 0.0})]
    optimizer = optim.Muon(0.1, others=optim.AdamW(0.01), groups=nothing)
    parameters = tree(0)
    assert_refused(lambda: optimizer.apply_gradients(tree(1), parameters), "Muon", "group 0")
    assert optimizer.step.item() == optimizer.others.step.item() == 0
    assert identical(parameters, tree(0))
    optimizer.groups = []
    want = optim.Muon(0.1, others=optim.AdamW(0.01)).apply_gradients(tree(1), tree(0))
    assert identical(optimizer.apply_gradients(tree(1), parameters), want)


def test_states_that_do_not_fit():
    with_others = optim.Muon(0.1, others=optim.AdamW(0.01))
    train(with_others, tree(0), (1,))
    optimizer = optim.Muon(0.1)
    optimizer.state = with_others.state
    call = lambda: optimizer.apply_gradients(tree(1), tree(0))  # noqa: E731
    assert_refused(call, "Muon", "others_state")
    with_others.state = [1]
    assert_refused(lambda: with_others.apply_gradients(tree(1), tree(0)), "Muon", "list")
    with_others.state = {**optim.Muon(0.1).state, "others_state": mx.array(1)}
    assert_refused(lambda: with_others.apply_gradients(tree(1), tree(0)), "AdamW", "a dict")
    optimizer = optim.Muon(0.1)
    adam = optim.Adam(0.1)
    train(adam, tree(0), (1,))
    optimizer.state = adam.unpacked_state()
    assert_refused(call, "Muon")


def test_shards_of_matrices_are_refused():
    """A part of a matrix would be orthogonalised for itself."""
    model = FullyShardedModule(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)))
    gradients = model.trainable_parameters()
    for optimizer in (optim.Muon(0.1), optim.Muon(0.1, others=optim.AdamW(0.1))):
        call = lambda o=optimizer: o.update(model, gradients)  # noqa: E731
        assert_refused(call, "Muon", "shards")
        assert optimizer.step.item() == 0
