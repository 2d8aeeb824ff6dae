"""Groups of tensors with numbers of their own."""

import copy
import pickle

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers
import mlx_fused_optim as optim
import numpy as np
import pytest
from bits import of_mlx, same
from mlx.utils import tree_flatten, tree_map_with_path
from mlx_fused_optim import cosine_decay, exponential_decay, linear_schedule, reference
from test_optimizer import batch, loss, network, train, velocities


def bias(path, array):
    return path.endswith("bias")


def matrix(path, array):
    return array.ndim == 2


def tensors(seed, dtype=mx.float32):
    mx.random.seed(seed)
    shapes = {"one": {"weight": (5, 7), "bias": (7,)}, "two": {"weight": (7, 3), "bias": (3,)}}
    tree = {
        k: {n: mx.random.normal(s).astype(dtype) for n, s in v.items()} for k, v in shapes.items()
    }
    return {**tree, "scale": mx.array(1.5, dtype)}


def flat(tree):
    return dict(tree_flatten(tree))


def assert_same(one, two):
    one, two = flat(one), flat(two)
    assert one.keys() == two.keys()
    assert [name for name in one if not same(one[name], two[name])] == []


def by_hand(own, groups, steps, dtype=mx.float32):
    """A plain optimizer for each tensor, with the numbers of its group; ``own`` are those of
    the others. float32 steps do not depend on what else is in the tree."""
    w = tensors(0, dtype)
    optimizers = {}
    for path, array in tree_flatten(w):
        options = dict(own)
        for predicate, overrides in groups:
            if predicate(path, array):
                options.update(overrides)
                break
        optimizers[path] = optim.SGD(**options)
    for step in range(steps):
        g = flat(tensors(step + 1, dtype))
        w = tree_map_with_path(
            lambda path, p, g=g: optimizers[path].apply_gradients({"p": g[path]}, {"p": p})["p"], w
        )
    return w, optimizers


BASE = {"learning_rate": 0.1, "momentum": 0.9, "weight_decay": 0.01}
PLAIN = {"learning_rate": 0.1}
ROWS = {
    "a rate": (BASE, [(bias, {"learning_rate": 0.3})]),
    "no decay": (BASE, [(bias, {"weight_decay": 0.0})]),
    "no momentum": (BASE, [(bias, {"momentum": 0.0})]),
    "nothing but the gradient": (BASE, [(bias, {"momentum": 0.0, "weight_decay": 0.0})]),
    "other numbers": (BASE, [(bias, {"momentum": 0.5, "weight_decay": 0.1})]),
    "only a group has momentum": (PLAIN, [(matrix, {"momentum": 0.9})]),
    "only a group decays": (PLAIN, [(matrix, {"weight_decay": 0.1})]),
    "two groups": (BASE, [(bias, {"learning_rate": 0.3}), (matrix, {"weight_decay": 0.2})]),
    "the first wins": (BASE, [(bias, {"momentum": 0.5}), (lambda p, a: True, {"momentum": 0.7})]),
    "nesterov": ({**BASE, "nesterov": True}, [(matrix, {"momentum": 0.5})]),
    "nesterov, partly": (
        {**BASE, "nesterov": True}, [(bias, {"momentum": 0.5, "weight_decay": 0.0})]),
    "dampening": ({**BASE, "dampening": 0.3}, [(bias, {"learning_rate": 0.2})]),
    "decoupled": ({**BASE, "decoupled": True}, [(bias, {"weight_decay": 0.0})]),
    "a rate of a schedule": (BASE, [(bias, {"learning_rate": exponential_decay(0.3, 0.5)})]),
    "everything scheduled": (
        {"learning_rate": exponential_decay(0.1, 0.7), "momentum": linear_schedule(0.9, 0.5, 9),
         "weight_decay": 0.01},
        [(bias, {"learning_rate": cosine_decay(0.3, 5), "momentum": linear_schedule(0.1, 0.5, 3),
                 "weight_decay": lambda step: 0.1 / (1.0 + step.astype(mx.float32))})],
    ),
    "arrays": (BASE, [(bias, {"learning_rate": mx.array(0.3)}), (matrix, {"learning_rate": 0.2})]),
    "a rate of integers": (BASE, [(bias, {"learning_rate": mx.array(1)})]),
    "zero learning rate": (BASE, [(bias, {"learning_rate": 0.0})]),
}  # fmt: skip


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16], ids=str)
@pytest.mark.parametrize("name", ROWS)
def test_a_group_has_the_bits_of_an_optimizer_of_its_own(name, dtype, compiled):
    own, groups = ROWS[name]
    want, optimizers = by_hand(own, groups, 4, dtype)
    optimizer = optim.SGD(**own, groups=groups)
    w = tensors(0, dtype)
    optimizer.init(w)
    state = [w, optimizer.state]

    def step(gradients):
        w.update(optimizer.apply_gradients(gradients, w))

    if compiled:
        step = mx.compile(step, inputs=state, outputs=state)
    for number in range(4):
        step(tensors(number + 1, dtype))
        mx.eval(state)
    if compiled and any(callable(v) for _, overrides in groups for v in overrides.values()):
        # MLX's compiled arithmetic around a callable may round elsewhere.
        for path, value in flat(w).items():
            assert mx.allclose(value, flat(want)[path], rtol=1e-2 if dtype != mx.float32 else 1e-5)
        return
    assert_same(w, want)
    # Momentum of tensors that have none stays zero.
    for path, velocity in velocities(optimizer).items():
        theirs = velocities(optimizers[path.removesuffix(".v")])
        assert not velocity.any() if not theirs else same(velocity, theirs["p.v"])


def test_a_factor_multiplies_the_schedule():
    rate = exponential_decay(0.1, 0.7)
    groups = [(bias, {"learning_rate_factor": 4.0}), (matrix, {"learning_rate_factor": 0.0})]
    optimizer = optim.SGD(rate, groups=groups)
    w = tensors(0)
    expected = {k: np.array(v) for k, v in flat(w).items()}
    for step in range(3):
        g = flat(tensors(step + 1))
        w = optimizer.apply_gradients(tensors(step + 1), w)
        used = np.array(rate(step))
        for path, value in expected.items():
            factor = np.float32(4.0 if path.endswith("bias") else 0.0 if value.ndim == 2 else 1.0)
            expected[path] = value - factor * used * np.array(g[path])
    assert {k: v.tolist() for k, v in flat(w).items()} == {
        k: v.tolist() for k, v in expected.items()
    }
    # What the state reports is the rate without a group.
    assert optimizer.learning_rate.item() == rate(2).item()


@pytest.mark.parametrize("groups", [
    [(bias, {"trust_coefficient": None})],
    [(bias, {"trust_coefficient": 0.1, "weight_decay": 0.0})],
    [(matrix, {"trust_coefficient": 0.5}), (bias, {"trust_coefficient": None})],
], ids=["off", "another", "both"])  # fmt: skip
@pytest.mark.parametrize("own", [0.02, None], ids=["with", "without"])
def test_trust_ratios_of_groups(own, groups):
    options = {"learning_rate": 0.5, "momentum": 0.9, "weight_decay": 0.01}
    optimizer = optim.SGD(**options, trust_coefficient=own, groups=groups)
    w = want = tensors(0)
    state = reference.init(w)
    for step in range(3):
        w = optimizer.apply_gradients(tensors(step + 1), w)
        want, state = reference.step(
            reference.sgd,
            want,
            tensors(step + 1),
            state,
            **options,
            trust_coefficient=own,
            groups=groups,
        )
    for path, value in flat(w).items():
        assert mx.allclose(value, flat(want)[path], rtol=1e-5, atol=1e-6), path


def test_predicates_are_asked_once_for_a_layout():
    asked = []

    def predicate(path, array):
        asked.append((path, array.shape))
        return array.ndim < 2

    optimizer = optim.SGD(0.1, momentum=0.9, groups=[(predicate, {"learning_rate": 0.2})])
    w = tensors(0)
    for step in range(3):
        w = optimizer.apply_gradients(tensors(step + 1), w)
    # Once each for the layout, and once each to see that the group has a tensor at all.
    assert sorted(asked) == sorted([(p, a.shape) for p, a in tree_flatten(w)] * 2)
    asked.clear()
    for step in range(2):
        w.update(optimizer.apply_gradients({"one": tensors(step)["one"]}, w))
    assert sorted(asked) == [("one.bias", (7,)), ("one.weight", (5, 7))]
    asked.clear()
    optimizer.momentum = 0.0
    w = optimizer.apply_gradients(tensors(1), w)
    assert asked == []


def test_the_functions_know_their_groups_again():
    asked = []

    def predicate(path, array):
        asked.append(path)
        return bias(path, array)

    own = {"learning_rate": 0.1, "momentum": 0.9}
    w = tensors(0)
    state = optim.fused_sgd_init(w, momentum=0.9)
    for step in range(3):
        groups = [(predicate, {"learning_rate": 0.3, "weight_decay": 0.1})]
        w, state = optim.fused_sgd_step(w, tensors(step + 1), state, **own, groups=groups)
    assert len(asked) == 2 * len(flat(w))
    want, _ = by_hand(own, groups, 3)
    assert_same(w, want)
    # Other numbers are other groups.
    groups = [(predicate, {"learning_rate": 0.0})]
    after, _ = optim.fused_sgd_step(w, tensors(4), state, **own, groups=groups)
    assert same(after["one"]["bias"], w["one"]["bias"])
    assert not same(after["one"]["weight"], w["one"]["weight"])


@pytest.mark.parametrize(
    "rate",
    [mx.array, lambda value: optim.constant(value), lambda value: lambda step: mx.array(value)],
    ids=["array", "schedule", "callable"],
)
def test_groups_of_functions_that_differ_in_one_value(rate):
    """Of which only the identity is known: the groups of the step before are others."""
    w = {"bias": mx.ones(1)}
    state = optim.fused_sgd_init(w)
    kept = []  # no identity comes twice
    for value in (0.5, 0.25):
        kept.append(rate(value))
        groups = [(bias, {"learning_rate": kept[-1]})]
        new, _ = optim.fused_sgd_step(w, w, state, learning_rate=0.0, groups=groups)
        assert new["bias"].item() == 1.0 - value


def test_many_groups_of_functions_are_forgotten():
    from mlx_fused_optim import _groups

    w = {"a": mx.ones(1)}
    state = optim.fused_sgd_init(w)
    for number in range(40):
        groups = [(lambda path, array: True, {"learning_rate": float(number)})]
        new, _ = optim.fused_sgd_step(w, w, state, learning_rate=0.0, groups=groups)
        assert new["a"].item() == 1.0 - number
    assert len(_groups._known) <= _groups._known.most


def test_layouts_that_change():
    """Freezing: the tensors keep their groups, by path."""

    def run(library, optimizer):
        model = network()
        for stage, change in enumerate([
            lambda m: None, lambda m: m.layers[0].freeze(), lambda m: m.unfreeze(),
        ]):  # fmt: skip
            change(model)
            train(model, optimizer, 3, 5 * stage)
        return model

    rest = {"momentum": 0.9, "weight_decay": 0.01}
    groups = [(bias, {"momentum": 0.0, "weight_decay": 0.0, "learning_rate": 0.02})]
    ours = run(optim, optim.SGD(0.05, **rest, groups=groups))
    theirs = run(
        mlx.optimizers,
        mlx.optimizers.MultiOptimizer(
            [mlx.optimizers.SGD(0.02), mlx.optimizers.SGD(0.05, **rest)], [bias]
        ),
    )
    assert_same(ours.parameters(), theirs.parameters())


def test_multi_optimizer_of_optimizers_with_groups():
    """Each of its optimizers sees the whole model as parameters, and its part as gradients."""
    model, other = network(), network()
    rest = {"momentum": 0.9, "weight_decay": 0.01}
    ours = mlx.optimizers.MultiOptimizer(
        [
            optim.SGD(0.05, **rest, clip_norm=1e6, groups=[(bias, {"weight_decay": 0.0})]),
            optim.SGD(0.1, ema_decay=0.5),
        ],
        [lambda path, array: path.startswith("layers")],
    )
    theirs = mlx.optimizers.MultiOptimizer(
        [mlx.optimizers.SGD(0.05, momentum=0.9), mlx.optimizers.SGD(0.05, **rest),
         mlx.optimizers.SGD(0.1)],
        [lambda p, a: p.startswith("layers") and bias(p, a), lambda p, a: p.startswith("layers")],
    )  # fmt: skip
    assert train(model, ours, 8) == train(other, theirs, 8)
    assert_same(model.parameters(), other.parameters())
    averages = ours.optimizers[1].ema_parameters()
    assert flat(averages).keys() == {"norm.weight", "norm.bias", "scale"}
    model.update(averages)
    saved = ours.state
    again = mlx.optimizers.MultiOptimizer(ours.optimizers, ours.filters[:-1])
    again.state = saved
    train(model, again, 1, 9)


def test_every_tensor_of_a_group_without_the_rest():
    """A step in which all tensors are of one group, and one with none."""
    optimizer = optim.SGD(0.1, groups=[(bias, {"learning_rate": 1.0})])
    w = {"bias": mx.ones(2), "weight": mx.ones((2, 2))}
    assert optimizer.apply_gradients({"bias": mx.ones(2)}, w)["bias"].tolist() == [0.0, 0.0]
    new = optimizer.apply_gradients({"weight": mx.ones((2, 2))}, w)["weight"]
    assert np.array_equal(of_mlx(new), of_mlx(w["weight"] - 0.1 * w["weight"]))


def test_groups_in_a_training_step_of_a_model():
    model = network()
    optimizer = optim.SGD(0.05, momentum=0.9, groups=[(bias, {"learning_rate_factor": 0.0})])
    before = flat(model.parameters())
    value, gradients = nn.value_and_grad(model, loss)(model, *batch(0))
    optimizer.update(model, gradients)
    mx.eval(model.parameters(), value)
    for path, array in flat(model.parameters()).items():
        assert same(array, before[path]) == path.endswith("bias"), path


def test_groups_read_as_they_were_given():
    given = [(bias, {"weight_decay": 0.0}), (matrix, {"learning_rate_factor": 2.0})]
    optimizer = optim.SGD(0.1, groups=given[:1])
    assert optimizer.groups == given[:1]
    optimizer.groups[0][1]["momentum"] = 0.5  # a copy
    optimizer.groups += given[1:]
    assert optimizer.groups == given
    assert list(optim.SGD(0.1).groups) == []


def test_betas_of_a_group():
    """Under the name of the argument; what is wrong with them names the group."""
    for overrides, words in (
        ({"betas": 0.9}, "betas of group 1 is not a pair: got 0.9, allowed two numbers"),
        ({"betas": (0.9, 2)}, "beta2 of group 1 is out of range: got 2.0, allowed 0 to <1"),
        ({"beta": 0.9}, "got 'beta', allowed .*, betas, beta1, beta2, eps"),
    ):
        with pytest.raises(ValueError, match=rf"^\[Adam\] .*{words}"):
            optim.Adam(0.1, groups=[(bias, {}), (matrix, overrides)])
    with pytest.raises(ValueError, match=r"got 'betas', allowed .*, alpha, eps"):
        optim.RMSprop(0.1, groups=[(bias, {"betas": (0.9, 0.9)})])


def test_copies_of_an_optimizer_with_groups():
    """As any other: a deep copy goes its own way, and a pickle where its predicates can."""
    options = {**BASE, "ema_decay": 0.5, "clip_norm": 1.0}
    optimizer = optim.SGD(**options, groups=[(bias, {"weight_decay": 0.0})])
    w = optimizer.apply_gradients(tensors(1), tensors(0))
    others = [copy.deepcopy(optimizer), pickle.loads(pickle.dumps(optimizer.groups))]
    others[1] = optim.SGD(**options, groups=others[1])
    others[1].state = optimizer.state
    want = optimizer.apply_gradients(tensors(2), w)
    for other in others:
        assert_same(other.apply_gradients(tensors(2), w), want)
