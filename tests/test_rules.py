"""The element-wise optimizers as their users meet them: in the place of those of mlx.optimizers."""

import copy
import inspect
import math
import pickle

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers
import mlx_fused_optim as optim
import numpy as np
import pytest
import rules
from bits import DTYPES, of_mlx, same
from mlx.utils import tree_flatten, tree_map_with_path, tree_unflatten

# Other numbers than the defaults, in the order of mlx.optimizers.
ARGUMENTS = {
    "SGD": (0.9, 0.01, 0.1, False),
    "Adam": ([0.8, 0.95], 1e-3, False),
    "AdamW": ([0.8, 0.95], 1e-3, 0.1, False),
    "Adamax": ([0.8, 0.95], 1e-3),
    "Lion": ([0.8, 0.95], 0.1),
    "RMSprop": (0.9, 1e-3),
    "Adagrad": (1e-3,),
    "AdaDelta": (0.8, 1e-4),
}
KEYS = {
    "SGD": {"v"}, "Adam": {"m", "v"}, "AdamW": {"m", "v"}, "Adamax": {"m", "v"}, "Lion": {"m"},
    "RMSprop": {"v"}, "Adagrad": {"v"}, "AdaDelta": {"v", "u"},
}  # fmt: skip
SHAPES = ((7, 5), (), (129,), (0,), (2049,), (1, 1), (3,))
every = pytest.mark.parametrize("name", ARGUMENTS)


def tree(seed: int, dtype: mx.Dtype = mx.float32):
    """Nested, with lists, scalars and nothing at all."""
    keys = mx.random.split(mx.random.key(seed), len(SHAPES))
    a, b, c, d, e, f, g = (
        mx.random.normal(shape, key=k).astype(dtype) for shape, k in zip(SHAPES, keys, strict=True)
    )
    return {"layers": [{"weight": a, "bias": b}, {"weight": c, "bias": d}], "head": [e, f], "g": g}


def ours(name, rate=0.05, **options):
    return getattr(optim, name)(rate, *ARGUMENTS[name], **options)


def theirs(name, rate=0.05):
    return getattr(mlx.optimizers, name)(rate, *ARGUMENTS[name])


def train(optimizer, parameters, seeds, dtype=mx.float32):
    for seed in seeds:
        parameters = optimizer.apply_gradients(tree(seed, dtype), parameters)
        mx.eval(parameters, optimizer.state)
    return parameters


def leaves(*trees):
    return dict(tree_flatten(list(trees)))


def assert_same(a, b):
    a, b = leaves(a), leaves(b)
    assert a.keys() == b.keys()
    assert [k for k in a if not same(a[k], b[k])] == []


def of_tensors(state):
    """What a state has of tensors."""
    return {k: v for k, v in state.items() if k in ("layers", "head", "g")}


# ---- In the place of MLX's ---------------------------------------------------------------


@every
@pytest.mark.parametrize("usual", [False, True])
def test_float32_has_the_bits_of_mlx(name, usual):
    """Parameters and state after each of 25 steps, run eagerly."""
    a, b = ours(name), theirs(name)
    if usual:
        a, b = getattr(optim, name)(0.01), getattr(mlx.optimizers, name)(0.01)
    one = two = tree(0)
    for seed in range(1, 26):
        one = a.apply_gradients(tree(seed), one)
        two = b.apply_gradients(tree(seed), two)
        mx.eval(one, two, a.state, b.state)
        assert_same(one, two)
        if name == "SGD" and usual:
            continue  # MLX keeps a momentum of zeros, ours none
        assert_same(of_tensors(a.unpacked_state()), of_tensors(b.state))


@every
def test_float32_has_the_bits_of_mlx_at_the_edges(name):
    """Zeros of both signs, subnormal numbers, infinities and NaN, as gradients and parameters."""
    edges = np.array([0.0, -0.0, 1e-45, -1e-40, 1e-20, 1e19, -3e38, np.inf, -np.inf, np.nan, 1.5],
                     np.float32)  # fmt: skip
    w, g = (x.reshape(-1) for x in np.meshgrid(edges, edges))
    results = []
    for optimizer in (ours(name), theirs(name)):
        parameters = {"w": mx.array(w)}
        for gradient in (g, g[::-1].copy()):
            parameters = optimizer.apply_gradients({"w": mx.array(gradient)}, parameters)
        is_ours = isinstance(optimizer, optim.FusedOptimizer)
        kept = (optimizer.unpacked_state() if is_ours else optimizer.state).get("w", {})
        # MLX keeps a momentum of zeros for SGD, ours none.
        moments = [] if name == "SGD" else [kept[slot] for slot in sorted(kept)]
        results.append([np.array(x) for x in (parameters["w"], *moments)])
    for ours_has, mlx_has in zip(*results, strict=True):  # a NaN stays in a moment too
        assert np.array_equal(ours_has, mlx_has, equal_nan=True)
        finite = np.isfinite(ours_has)
        assert np.array_equal(*(x[finite].view(np.uint32) for x in (ours_has, mlx_has)))
        assert 0 < finite.sum() < finite.size


@every
def test_arguments_and_defaults_are_those_of_mlx(name):
    own, mlxs = (
        list(inspect.signature(getattr(module, name).__init__).parameters.values())
        for module in (optim, mlx.optimizers)
    )
    positional = [p for p in own if p.kind is p.POSITIONAL_OR_KEYWORD]
    assert [p.name for p in positional] == [p.name for p in mlxs]

    def plain(default):
        return list(default) if isinstance(default, tuple) else default

    assert [plain(p.default) for p in positional] == [p.default for p in mlxs]


@every
def test_it_is_one_of_mlx(name):
    assert isinstance(ours(name), getattr(mlx.optimizers, name))
    assert isinstance(ours(name), optim.FusedOptimizer)
    assert getattr(optim, name).__name__ == name


@every
def test_attributes_of_mlx(name):
    """Those of its own class; setting one is as the argument."""
    one, two = ours(name), theirs(name)
    public = {k: v for k, v in vars(two).items() if k[0] != "_"}
    assert len(public) >= 1
    for key, value in public.items():
        got = getattr(one, key)
        assert (list(got) if isinstance(value, list) else got) == value
        setattr(one, key, value)
    assert_same(train(one, tree(0), [1, 2]), train(two, tree(0), [1, 2]))
    assert one.learning_rate.item() == two.learning_rate.item()


REFUSED = {
    "SGD": ({"momentum": -0.5}, {"dampening": 1.5}, {"nesterov": True},
            {"momentum": 0.9, "nesterov": "False"}),
    "Adam": ({"betas": (1.0, 0.9)}, {"betas": (0.9, -0.1)}, {"eps": -1e-8}, {"betas": (0.9,)},
             {"betas": 0.9}, {"amsgrad": "no"}, {"amsgrad": 2}, {"bias_correction": "False"},
             {"bias_correction": math.nan}),
    "Adamax": ({"betas": (1.0, 0.9)}, {"betas": (0.9, -0.1)}, {"eps": -1e-8}),
    "Lion": ({"betas": (1.0, 0.9)}, {"betas": (0.9, -0.1)}),
    "RMSprop": ({"alpha": -0.1}, {"alpha": 1.5}, {"eps": 0.0}, {"eps": -1.0}),
    "Adagrad": ({"eps": 0.0}, {"eps": -1.0}),
    "AdaDelta": ({"rho": -0.1}, {"rho": 1.5}, {"eps": 0.0}, {"eps": -1.0}),
}  # fmt: skip
REFUSED["AdamW"] = REFUSED["Adam"]
NUMBERS = {
    "SGD": ("momentum", "dampening"), "Adam": ("eps",), "AdamW": ("eps",), "Adamax": ("eps",),
    "Lion": (), "RMSprop": ("alpha", "eps"), "Adagrad": ("eps",), "AdaDelta": ("rho", "eps"),
}  # fmt: skip


@pytest.mark.parametrize("yes, no", [(True, False), (1, 0), (1.0, None)])
def test_truth_values_are_those_that_mlx_takes(yes, no):
    one = optim.AdamW(0.1, bias_correction=yes, amsgrad=no)
    two = optim.AdamW(0.1, bias_correction=True, amsgrad=False)
    assert_same(train(one, tree(0), [1, 2]), train(two, tree(0), [1, 2]))


@every
def test_numbers_that_make_no_sense_are_refused(name):
    cls = getattr(optim, name)
    bad = list(REFUSED[name])
    nan, inf = float("nan"), float("inf")
    bad += [{k: x} for k in (*NUMBERS[name], "weight_decay") for x in (nan, inf, "0.1", None)]
    if "betas" in inspect.signature(cls).parameters:
        bad += [{"betas": (nan, 0.9)}, {"betas": (0.9, nan)}, {"betas": ("0.9", 0.9)}]
    for arguments in bad:
        with pytest.raises((ValueError, TypeError), match=rf"^\[{name}\] .*: got .*, allowed "):
            cls(0.1, **arguments)
        # And as an attribute: by the next step, before anything is changed.
        optimizer = cls(0.1)
        parameters = train(optimizer, tree(0), [1])
        before = leaves(parameters, optimizer.unpacked_state())
        copies = {k: of_mlx(v).copy() for k, v in before.items()}

        def set_and_step(optimizer=optimizer, parameters=parameters, arguments=arguments):
            for key, value in arguments.items():
                setattr(optimizer, key, value)
            optimizer.apply_gradients(tree(2), parameters)

        with pytest.raises((ValueError, TypeError), match=rf"^\[{name}\] "):
            set_and_step()
        after = leaves(parameters, optimizer.unpacked_state())
        assert after.keys() == copies.keys()
        assert all(np.array_equal(of_mlx(after[k]), x) for k, x in copies.items()), arguments


@every
def test_what_mlx_refuses_is_refused(name):
    refused = 0
    for arguments in REFUSED[name]:
        try:
            getattr(mlx.optimizers, name)(0.1, **arguments)
        except (ValueError, TypeError) as error:
            refused += 1
            own = (ValueError, TypeError) if isinstance(error, TypeError) else ValueError
            with pytest.raises(own, match="got"):
                getattr(optim, name)(0.1, **arguments)
    assert refused >= 1


def test_an_unknown_argument_is_named():
    for name in ARGUMENTS:
        with pytest.raises(TypeError, match="amsgard"):
            getattr(optim, name)(0.1, amsgard=True)


# ---- States ----------------------------------------------------------------------------


@every
def test_a_state_moves_both_ways_in_mid_run(name):
    a, b = ours(name), theirs(name)
    one = two = tree(0)
    one, two = train(a, one, [1, 2]), train(b, two, [1, 2])
    to_theirs, to_ours = theirs(name), ours(name)
    to_theirs.state, to_ours.state = a.unpacked_state(), b.state
    for optimizer, start in ((to_theirs, one), (to_ours, two)):
        after = train(optimizer, start, [3, 4])
        assert_same(after, train(a if start is one else b, start, [3, 4]))
        assert optimizer.step.item() == 4


@every
def test_the_keys_of_a_state(name):
    optimizer = ours(name)
    optimizer.init(tree(0))
    kept = optimizer.unpacked_state()["layers"][0]["weight"]
    assert set(kept) == KEYS[name]
    assert all(not v.any().item() and v.dtype == mx.float32 for v in kept.values())
    assert set(ours(name).state) == {"step", "learning_rate"}


def test_the_keys_beyond_mlx():
    optimizer = optim.AdamW(0.1, amsgrad=True, master_weights=True, ema_decay=0.5)
    optimizer.init({"w": mx.ones(3, mx.bfloat16)})
    assert set(optimizer.unpacked_state()["w"]) == {"m", "v", "largest_v", "master", "ema"}


@pytest.mark.parametrize("name", ["Adam", "AdamW", "AdaDelta", "Adamax"])
def test_a_state_with_one_moment_of_two_is_refused(name):
    """SGD calls its momentum what these call the second moment. MLX misses the other one."""
    sgd, optimizer, w = optim.SGD(0.5, momentum=0.5), ours(name), tree(0)
    train(sgd, w, [1])
    optimizer.state = sgd.unpacked_state()
    before = of_mlx(w["layers"][0]["weight"]).copy()
    with pytest.raises(ValueError, match=rf"^\[{name}\] the state of .* is incomplete: got v, "):
        train(optimizer, w, [2])
    assert np.array_equal(of_mlx(w["layers"][0]["weight"]), before)
    # What the other moment is known of can be set alone.
    optimizer = ours(name)
    w = train(optimizer, w, [2])
    path = optimizer.unpacked_state()["layers"][0]["weight"]
    optimizer.state.update({"layers": [{"weight": {"v": mx.ones_like(path["v"])}}]})
    train(optimizer, w, [3])


@pytest.mark.parametrize(
    ("name", "other", "slot"),
    [("Adam", "Lion", "m"), ("AdamW", "RMSprop", "v"), ("Adamax", "Lion", "m"),
     ("AdaDelta", "Adagrad", "v")],
)  # fmt: skip
def test_arenas_with_one_moment_of_two_are_refused(name, other, slot):
    """Lion's moment has the name of Adam's first: its second would be zeros, and steps huge."""
    before, w = ours(other), tree(0)
    w = train(before, w, [1])
    want = {k: of_mlx(v).copy() for k, v in leaves(w).items()}
    words = rf" the state of .* is incomplete: got {slot}, allowed \w, \w or none"
    optimizer = ours(name)
    optimizer.state = before.state
    with pytest.raises(ValueError, match=rf"^\[{name}\]{words}"):
        optimizer.apply_gradients(tree(2), w)
    init = getattr(optim, f"fused_{name.lower()}_init")
    with pytest.raises(ValueError, match=rf"^\[fused_{name.lower()}_init\]{words}"):
        init(w, state=before.state)
    assert all(np.array_equal(of_mlx(v), want[k]) for k, v in leaves(w).items())


@pytest.mark.parametrize(("name", "slot"), [("Adam", "m"), ("AdamW", "v"), ("AdaDelta", "u")])
@pytest.mark.parametrize("is_loose", [False, True], ids=["arenas", "loose"])
def test_one_moment_of_two_that_is_forgotten_begins_as_zeros(name, slot, is_loose):
    """So what is left is a state, for mlx.optimizers too."""
    optimizer = ours(name)
    w = train(optimizer, tree(0), [1, 2])
    if is_loose:
        optimizer.state = optimizer.unpacked_state()
    want = tree_map_with_path(
        lambda path, a: mx.zeros_like(a) if path.endswith(f".{slot}") else a,
        optimizer.unpacked_state(),
    )
    optimizer.forget(slot)
    assert_same(optimizer.unpacked_state(), want)
    twin, mlx = ours(name), theirs(name)
    twin.state, mlx.state = want, optimizer.unpacked_state()
    got = train(optimizer, w, [3])
    assert_same(got, train(twin, w, [3]))
    assert_same(got, train(mlx, w, [3]))


@every
@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16])
def test_tensors_that_come_and_go_keep_what_is_theirs(name, dtype):
    """Freezing, unfreezing and adding: each tensor is as one that is trained alone."""
    all_names = "abcde"
    w = {k: tree(i, dtype)["layers"][0]["weight"] for i, k in enumerate(all_names)}
    together, alone = ours(name), {k: ours(name) for k in all_names}
    want = dict(w)
    for number, names in enumerate(("ab", "abc", "c", "abcde", "e", "ba", "abcde")):
        g = {k: tree(10 * number + i, dtype)["layers"][0]["weight"] for i, k in enumerate(names)}
        w.update(together.apply_gradients(g, w))
        for k in names:
            want[k] = alone[k].apply_gradients({k: g[k]}, {k: want[k]})[k]
    assert_same(w, want)
    kept = together.unpacked_state()
    assert_same({k: kept[k] for k in w}, {k: alone[k].unpacked_state()[k] for k in w})


@every
def test_saved_and_loaded(name, tmp_path):
    a, b = ours(name, ema_decay=0.9), ours(name, ema_decay=0.9)
    w = train(a, tree(0), [1, 2])
    path = str(tmp_path / "state.safetensors")
    mx.save_safetensors(path, dict(tree_flatten(a.state)))
    b.state = tree_unflatten(list(mx.load(path).items()))
    assert_same(train(b, w, [3]), train(a, w, [3]))
    assert_same(a.state, b.state)


@every
@pytest.mark.parametrize("copied", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
def test_copies_go_on_by_themselves(name, copied):
    a = ours(name)
    w = train(a, tree(0), [1, 2])
    b = copied(a)
    before = leaves(b.unpacked_state())
    before = {k: of_mlx(v).copy() for k, v in before.items()}
    train(a, w, [5])
    after = leaves(b.unpacked_state())
    assert all(np.array_equal(of_mlx(after[k]), x) for k, x in before.items())
    fresh = ours(name)
    train(fresh, tree(0), [1, 2])
    assert_same(train(b, w, [3]), train(fresh, w, [3]))


@every
def test_repr_makes_the_same_again(name):
    """But for the rate, which is an array."""
    options = {"clip_norm": 1.0, "state_dtype": mx.bfloat16, "ema_decay": 0.5}
    text = repr(ours(name, **options))
    assert text.startswith(f"{name}(learning_rate=array(0.05")
    names = {"array": mx.array, "float32": mx.float32, "mlx": mlx, "bfloat16": mx.bfloat16}
    made = eval(text, vars(optim) | names)
    assert repr(made) == text
    assert_same(train(made, tree(0), [1]), train(ours(name, **options), tree(0), [1]))
    assert repr(getattr(optim, name)(0.05)) == f"{name}(learning_rate=array(0.05, dtype=float32))"


# ---- In place --------------------------------------------------------------------------


@every
@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16])
def test_what_is_held_stays(name, dtype):
    """Parameters and what is kept of them; and holding changes no result."""
    a, b = ours(name), ours(name)
    one, two = train(a, tree(0, dtype), [1], dtype), train(b, tree(0, dtype), [1], dtype)
    held, kept = [], []
    for seed in range(2, 6):
        arrays = leaves(one, a.unpacked_state())
        held.append(arrays)
        kept.append({k: of_mlx(v).copy() for k, v in arrays.items()})
        one = train(a, one, [seed], dtype)
        two = train(b, two, [seed], dtype)
    for arrays, copies in zip(held, kept, strict=True):
        assert all(np.array_equal(of_mlx(arrays[k]), x) for k, x in copies.items())
    assert_same(one, two)
    assert_same(a.unpacked_state(), b.unpacked_state())


# ---- Compiled, and together with others ----------------------------------------------------


@every
def test_compiled_with_the_captured_state(name):
    """Also in a second trace, of another set of tensors."""
    options = {"bias_correction": True} if name in ("Adam", "AdamW") else {}
    arguments = ARGUMENTS[name][:-1] if options else ARGUMENTS[name]
    a, b = (getattr(optim, name)(0.05, *arguments, **options) for _ in range(2))
    one = two = tree(0)
    a.init(one)

    def step(parameters, gradients):
        return a.apply_gradients(gradients, parameters)

    compiled = mx.compile(step, inputs=a.state, outputs=a.state)
    for seed in range(1, 4):
        one = compiled(one, tree(seed))
        two = b.apply_gradients(tree(seed), two)
        mx.eval(one, two, a.state, b.state)
    part = {"g": one["g"]}
    for seed in range(4, 6):
        part = compiled(part, {"g": tree(seed)["g"]})
        two["g"] = b.apply_gradients({"g": tree(seed)["g"]}, {"g": two["g"]})["g"]
        mx.eval(part, two, a.state, b.state)
    assert_same({**one, **part}, two)
    assert_same(a.unpacked_state(), b.unpacked_state())
    assert a.step.item() == 5


@every
def test_compiled_without_the_state_is_refused(name):
    """What it keeps is named; it would go on for ever with what there was when it was traced."""
    options = {"bias_correction": True} if name in ("Adam", "AdamW") else {}
    arguments = ARGUMENTS[name][:-1] if options else ARGUMENTS[name]
    optimizer = getattr(optim, name)(0.05, *arguments, **options)
    compiled = mx.compile(lambda g: optimizer.apply_gradients(g, tree(0)))
    kept = {"momentum"} if name == "SGD" else KEYS[name]
    words = {*kept, *(["bias correction"] if options else [])}
    with pytest.raises(ValueError, match=rf"^\[{name}\] a compiled step needs ") as error:
        compiled(tree(1))
    said = str(error.value).partition(" with ")[2].partition(";")[0].split(", ")
    assert set(said) == words
    assert optimizer.step.item() == 0


@every
def test_a_model_is_updated(name):
    """nn.Module and value_and_grad, as in MLX's documentation. Both models get the gradients of
    one: the bits of MLX's products depend on how their factors' memory is aligned."""
    runs = []
    for make in (ours, theirs):
        mx.random.seed(3)
        model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 1))
        runs.append((model, make(name)))
    first = runs[0][0]
    x, y = mx.random.normal((16, 4), key=mx.random.key(1)), mx.ones((16, 1))
    loss = nn.value_and_grad(first, lambda model: ((model(x) - y) ** 2).mean())
    for _ in range(3):
        _, gradients = loss(first)
        for model, optimizer in runs:
            optimizer.update(model, gradients)
            mx.eval(model.parameters(), optimizer.state)
    assert_same(*(model.parameters() for model, _ in runs))


@every
def test_in_a_multi_optimizer(name):
    """Beside another one, with MLX's class and its filters."""
    results = []
    for make, module in ((ours, optim), (theirs, mlx.optimizers)):
        multi = optim.MultiOptimizer(
            [make(name), module.SGD(0.1)], [lambda path, _: path.startswith("layers")]
        )
        results.append(train(multi, tree(0), [1, 2, 3]))
    assert_same(*results)


@every
def test_with_a_grad_scaler(name):
    """A finite step has the bits of one without a scale of a power of two; an overflow changes
    nothing and halves the scale."""
    options = {"skip_nonfinite": True}

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.w = tree(0)["layers"][0]["weight"]

    model, scaler, optimizer = Model(), optim.GradScaler(8.0), ours(name, **options)
    plain, w = ours(name), {"w": model.w + 0}
    g = {"w": tree(1)["layers"][0]["weight"]}
    scaler.step(optimizer, model, {"w": 8 * g["w"]})
    scaler.update()
    w = plain.apply_gradients(g, w)
    assert_same({"w": model.w}, w)
    before = {k: of_mlx(v).copy() for k, v in leaves(optimizer.unpacked_state()).items()}
    scaler.step(optimizer, model, {"w": mx.full(g["w"].shape, float("inf"))})
    scaler.update()
    assert_same({"w": model.w}, w)
    after = leaves(optimizer.unpacked_state())
    changed = {k for k, x in before.items() if not np.array_equal(of_mlx(after[k]), x)}
    assert changed <= {f"0.{k}" for k in ("grad_norm", "skipped")}
    assert optimizer.step.item() == 1
    assert scaler.state["scale"].item() == 4.0


@every
def test_single_tensors_are_those_of_mlx(name):
    """init_single and apply_single, as a wrapping optimizer calls them."""
    a, b = ours(name), theirs(name)
    one, two, states = tree(0), tree(0), ({}, {})
    one, two = one["head"][0], two["head"][0]
    a.init_single(one, states[0])
    b.init_single(two, states[1])
    for seed in range(1, 4):
        g = tree(seed)["head"][0]
        one, two = a.apply_single(g, one, states[0]), b.apply_single(g, two, states[1])
    assert_same([one, states[0]], [two, states[1]])


@every
def test_a_subclass_with_its_own_step(name):
    """Takes it tensor by tensor, with MLX's state."""

    class Mine(getattr(optim, name)):
        def apply_single(self, gradient, parameter, state):
            return super().apply_single(2 * gradient, parameter, state)

    class Theirs(getattr(mlx.optimizers, name)):
        def apply_single(self, gradient, parameter, state):
            return super().apply_single(2 * gradient, parameter, state)

    a, b = (cls(0.05, *ARGUMENTS[name]) for cls in (Mine, Theirs))
    assert_same(train(a, tree(0), [1, 2]), train(b, tree(0), [1, 2]))
    assert_same(a.state, b.state)


# ---- Options -----------------------------------------------------------------------------


@every
def test_schedules_of_mlx_and_ours(name):
    """The same rates to 2 ulp, so parameters to a few: each step changes by at most that part
    of its change."""
    one, two, three = tree(0), tree(0), tree(0)
    a = getattr(optim, name)(mlx.optimizers.cosine_decay(0.1, 20), *ARGUMENTS[name])
    b = getattr(mlx.optimizers, name)(mlx.optimizers.cosine_decay(0.1, 20), *ARGUMENTS[name])
    c = getattr(optim, name)(lambda step: b.learning_rate, *ARGUMENTS[name])  # MLX's very rates
    for seed in range(1, 20):
        two = b.apply_gradients(tree(seed), two)
        one = a.apply_gradients(tree(seed), one)
        three = c.apply_gradients(tree(seed), three)
        mx.eval(one, two, three, a.state, b.state, c.state)
        assert abs(a.learning_rate.item() - b.learning_rate.item()) <= 1e-6 * 0.1
    assert_same(three, two)
    if name == "Lion":  # a sign may turn
        return
    for x, y in zip(leaves(one).values(), leaves(two).values(), strict=True):
        np.testing.assert_allclose(np.array(x), np.array(y), rtol=1e-4, atol=1e-4)


SCHEDULED = {
    "SGD": "momentum", "Adam": "beta1", "AdamW": "beta2", "Adamax": "beta2", "Lion": "beta1",
    "RMSprop": "alpha", "Adagrad": "eps", "AdaDelta": "rho",
}  # fmt: skip


@every
@pytest.mark.parametrize("kind", ["schedule", "callable"])
def test_a_scheduled_number(name, kind):
    """In the kernel, and called by Python: as one that is set before each step, but that
    1 - x is formed of a float32 x."""
    key = SCHEDULED[name]
    schedule = optim.linear_schedule(0.5, 0.9, 4)
    given = schedule if kind == "schedule" else lambda step: 0.5 + 0.1 * step
    a, b = (getattr(optim, name)(0.05) for _ in range(2))
    setattr(a, key, given)
    one = two = tree(0)
    for seed in range(4):
        setattr(b, key, 0.5 + 0.1 * seed)
        one = a.apply_gradients(tree(seed), one)
        two = b.apply_gradients(tree(seed), two)
        assert a.state[key].item() == pytest.approx(0.5 + 0.1 * seed, rel=1e-6)
        assert getattr(a, key).item() == a.state[key].item()
    for x, y in zip(leaves(one).values(), leaves(two).values(), strict=True):
        np.testing.assert_allclose(np.array(x), np.array(y), rtol=3e-5, atol=3e-6)
    constant = train(getattr(optim, name)(0.05), tree(0), range(4))
    assert any(not same(x, y) for x, y in zip(leaves(one).values(), leaves(constant).values(),
                                              strict=True))  # fmt: skip


def test_scheduled_betas():
    """As arguments, one or both; and of a group."""
    falling = optim.linear_schedule(0.5, 0.25, 4)
    optimizer = optim.Adam(0.05, betas=(falling, 0.75), bias_correction=True)
    assert [getattr(x, "item", lambda x=x: x)() for x in optimizer.betas] == [0.5, 0.75]
    one, two, three = tree(0), tree(0), tree(0)
    groups = [(lambda *_: True, {"betas": (lambda step: falling(step), 0.75)})]
    grouped = optim.Adam(0.05, betas=(0.9, 0.75), bias_correction=True, groups=groups)
    by_hand = optim.Adam(0.05, betas=(0.5, 0.75), bias_correction=True)
    for seed in range(4):
        by_hand.beta1 = 0.5 - 0.0625 * seed  # exact, and so is 1 - it
        one = optimizer.apply_gradients(tree(seed), one)
        two = by_hand.apply_gradients(tree(seed), two)
        three = grouped.apply_gradients(tree(seed), three)
        assert optimizer.betas[0].item() == by_hand.beta1
    assert_same(one, two)
    assert_same(three, two)


GROUPED = {
    "SGD": {"momentum": 0.5}, "Adam": {"betas": (0.5, 0.9), "eps": 0.1},
    "AdamW": {"betas": (0.5, 0.9), "eps": 0.1, "weight_decay": 0.0},
    "Adamax": {"betas": (0.5, 0.9), "eps": 0.1}, "Lion": {"betas": (0.5, 0.9)},
    "RMSprop": {"alpha": 0.5, "eps": 0.1}, "Adagrad": {"eps": 0.1},
    "AdaDelta": {"rho": 0.5, "eps": 0.1},
}  # fmt: skip


@every
@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16])
def test_groups_are_optimizers_of_their_own(name, dtype):
    """Bit for bit: a tensor of a group as one of an optimizer with these numbers."""
    numbers = {**GROUPED[name], "learning_rate_factor": 0.5}
    more = {"bias_correction": True} if name in ("Adam", "AdamW") else {}
    cls = getattr(optim, name)
    first = {"momentum": 0.9} if name == "SGD" else {}
    grouped = cls(0.25, **first, **more, groups=[(lambda path, _: path[0] == "l", numbers)])
    plain = cls(0.25, **first, **more)
    own = cls(0.125, **{**first, **GROUPED[name]}, **more)
    one, two, three = (train(o, tree(0, dtype), [1, 2, 3], dtype) for o in (grouped, plain, own))
    for key, x in leaves(one).items():
        other = three if "layers" in key else two
        assert same(x, leaves(other)[key]), key
    for key in ("layers", "g"):
        of = own if key == "layers" else plain
        assert_same(grouped.unpacked_state()[key], of.unpacked_state()[key])


@every
def test_l2_is_a_gradient_with_the_parameter_in_it(name):
    """weight_decay of any of them, coupled: bit for bit; and decoupled before the change."""
    arguments = {"momentum": 0.9} if name == "SGD" else {}
    cls = getattr(optim, name)
    a = cls(0.05, **arguments, weight_decay=0.25, decoupled=False)
    b = cls(0.05, **arguments, weight_decay=0.0)
    c = cls(0.05, **arguments, weight_decay=0.25, decoupled=True)
    w = tree(0)["head"][0]
    g = tree(1)["head"][0]
    coupled = a.apply_gradients({"w": g}, {"w": w})["w"]
    by_hand = b.apply_gradients({"w": g + mx.array(0.25) * w}, {"w": w})["w"]
    assert same(coupled, by_hand)
    assert same(a.unpacked_state()["w"][min(KEYS[name])], b.unpacked_state()["w"][min(KEYS[name])])
    decoupled = c.apply_gradients({"w": g}, {"w": w})["w"]
    plain = cls(0.05, **arguments, weight_decay=0.0).apply_gradients(
        {"w": g}, {"w": (1 - mx.array(0.05) * mx.array(0.25)) * w}
    )["w"]
    assert same(decoupled, plain)
    assert not same(coupled, decoupled)


@pytest.mark.parametrize("name", ["Adam", "AdamW"])
@pytest.mark.parametrize("corrected", [False, True])
def test_amsgrad(name, corrected):
    """Against float64 by the rule; gradients that shrink, so that the largest is an old one."""
    optimizer = getattr(optim, name)(
        0.05, (0.9, 0.5), 1e-3, amsgrad=True, bias_correction=corrected, weight_decay=0.0
    )
    w = mx.ones(7)
    flags = {"amsgrad"} | ({"bias_correction"} if corrected else set())
    scalars = {"beta1": 0.9, "beta2": 0.5, "eps": 1e-3}
    slots, want = dict.fromkeys(("m", "v", "largest_v"), np.zeros(7)), np.ones(7)
    for step in range(8):
        g = np.linspace(-1, 1, 7) * 0.5**step
        w = optimizer.apply_gradients({"w": mx.array(g.astype(np.float32))}, {"w": w})["w"]
        rates = rules.corrections(0.05, (0.9, 0.5), step + 1)
        rest = {name: 1 - x for name, x in scalars.items()}
        numbers = rules.Numbers(0.05, scalars, rest, *rates, flags)
        change, slots = rules.RULES["adam"].change(g, slots, numbers)
        want = want - change
    np.testing.assert_allclose(np.array(w), want, rtol=1e-6, atol=1e-6)
    kept = optimizer.unpacked_state()["w"]
    np.testing.assert_allclose(np.array(kept["largest_v"]), slots["largest_v"], rtol=1e-6)
    assert (kept["largest_v"] > kept["v"]).sum().item() == 6  # and the zero


@every
def test_half_parameters_keep_float32_moments(name):
    """But of SGD, whose momentum is of the parameter's dtype as in mlx.optimizers."""
    optimizer = ours(name)
    optimizer.init(tree(0, mx.bfloat16))
    kept = optimizer.unpacked_state()["layers"][0]["weight"]
    want = mx.bfloat16 if name == "SGD" else mx.float32
    assert {v.dtype for v in kept.values()} == {want}
    for dtype in DTYPES.values():
        optimizer = ours(name, state_dtype=dtype)
        w = optimizer.apply_gradients(tree(1, mx.bfloat16), tree(0, mx.bfloat16))
        kept = optimizer.unpacked_state()["layers"][0]["weight"]
        assert {v.dtype for v in kept.values()} == {dtype}
        assert {v.dtype for v in leaves(w).values()} == {mx.bfloat16}


@pytest.mark.parametrize("dtype", [mx.float16, mx.bfloat16])
def test_a_second_moment_of_half_parameters_decays(dtype):
    """0.999 is 1 in bfloat16, and the square of a small gradient 0 in float16."""
    optimizer = optim.AdamW(1e-3)
    w = {"w": mx.ones(3, dtype)}
    w = optimizer.apply_gradients({"w": mx.full(3, 1e-4, dtype)}, w)
    first = optimizer.unpacked_state()["w"]["v"][0].item()
    assert first == pytest.approx(1e-3 * 1e-8, rel=0.02)
    for _ in range(100):
        w = optimizer.apply_gradients({"w": mx.zeros(3, dtype)}, w)
    assert optimizer.unpacked_state()["w"]["v"][0].item() == pytest.approx(
        first * 0.999**100, rel=1e-4
    )
    assert mx.isfinite(w["w"]).all().item()


@every
@pytest.mark.parametrize("dtype", [mx.float16, mx.bfloat16])
def test_half_parameters_are_float32_rounded_once(name, dtype):
    """One step of the same numbers in float32, rounded."""
    half, wide = tree(0, dtype), leaves(tree(0, dtype))
    wide = tree_unflatten([(k[2:], v.astype(mx.float32)) for k, v in wide.items()])
    g = tree_unflatten([(k[2:], v.astype(mx.float32)) for k, v in leaves(tree(1, dtype)).items()])
    one = ours(name, state_dtype=mx.float32).apply_gradients(tree(1, dtype), half)
    two = ours(name).apply_gradients(g, wide)
    for x, y in zip(leaves(one).values(), leaves(two).values(), strict=True):
        assert same(x, y.astype(dtype))


# ---- The functions ---------------------------------------------------------------------


@every
def test_the_functions_have_the_bits_of_the_class(name):
    parameters = list(inspect.signature(getattr(optim, name).__init__).parameters)[2:]
    arguments = dict(zip(parameters, ARGUMENTS[name], strict=False))
    arguments |= {"clip_norm": 5.0, "ema_decay": 0.9}
    begin, step = (getattr(optim, f"fused_{name.lower()}_{end}") for end in ("init", "step"))
    optimizer = getattr(optim, name)(0.05, **arguments)
    one = two = tree(0)
    state = begin(two, **arguments)
    for seed in range(1, 4):
        one = optimizer.apply_gradients(tree(seed), one)
        two, state = step(two, tree(seed), state, learning_rate=0.05, **arguments)
    assert_same([one, optimizer.state], [two, state])
    assert_same(optim.fused_ema(state), optimizer.ema_parameters())


@pytest.mark.parametrize(
    "arguments",
    [
        {"eps": lambda step: -1.0},
        {"betas": (0.9, lambda step: 2)},
        {"betas": (lambda step: 1.0, 0)},
    ],
)
def test_numbers_of_a_callable_that_make_no_sense_are_refused(arguments):
    form = r"^\[%s\] (eps|beta1|beta2).* is out of range: got .*, allowed "
    with pytest.raises(ValueError, match=form % "AdamW"):
        optim.AdamW(0.1, **arguments)
    w = {"w": mx.ones(3)}
    with pytest.raises(ValueError, match=form % "fused_adamw_step"):
        optim.fused_adamw_step(w, w, optim.fused_adamw_init(w), learning_rate=0.1, **arguments)
    (name, value), *_ = arguments.items()
    grouped = optim.AdamW(0.1, groups=[(lambda path, _: True, {name: value})])
    with pytest.raises(ValueError, match=form % "AdamW"):
        grouped.apply_gradients(w, w)
    assert w["w"].tolist() == [1, 1, 1]


@every
def test_the_functions_refuse_what_the_class_refuses(name):
    begin, step = (getattr(optim, f"fused_{name.lower()}_{end}") for end in ("init", "step"))
    w = {"w": mx.ones(3)}
    state = begin(w)
    for arguments in (*REFUSED[name], {"amsgard": True}):
        for call, op in (
            (lambda a: begin(w, **a), f"fused_{name.lower()}_init"),
            (lambda a: step(w, w, state, learning_rate=0.1, **a), f"fused_{name.lower()}_step"),
        ):
            with pytest.raises((ValueError, TypeError), match=rf"^\[{op}\] .*got .*, allowed "):
                call(arguments)
    assert w["w"].tolist() == [1, 1, 1]


def test_the_pairs_are_all_there():
    for name in ARGUMENTS:
        for end in ("init", "step"):
            function = getattr(optim, f"fused_{name.lower()}_{end}")
            assert function.__name__ == f"fused_{name.lower()}_{end}"
            assert f":class:`{name}`" in function.__doc__ or end == "init"
