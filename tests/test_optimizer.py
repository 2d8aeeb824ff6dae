"""SGD as a subclass of mlx.optimizers.Optimizer: everything that one does with it, beside
mlx.optimizers.SGD and bit for bit where both can."""

import itertools
import os
import subprocess
import sys
from typing import NamedTuple

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers
import mlx_fused_optim as optim
import numpy as np
import pytest
from bits import of_mlx, same
from mlx.utils import tree_flatten, tree_map, tree_unflatten
from mlx_fused_optim import reference
from waiting import comes_true, let_go

OPTIONS = {
    "plain": {},
    "momentum": {"momentum": 0.9},
    "decay_dampening": {"momentum": 0.9, "weight_decay": 0.01, "dampening": 0.3},
    "nesterov": {"momentum": 0.9, "weight_decay": 0.01, "nesterov": True},
}
every_option = pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)


class Network(nn.Module):
    """Lists, nested modules, a scalar and an array of its own."""

    def __init__(self):
        super().__init__()
        self.layers = [nn.Linear(5, 16), nn.Linear(16, 16), nn.Linear(16, 3)]
        self.norm = nn.LayerNorm(16)
        self.scale = mx.array(1.5)

    def __call__(self, x):
        x = mx.tanh(self.layers[0](x))
        x = self.norm(mx.tanh(self.layers[1](x)))
        return self.scale * self.layers[2](x)


def network():
    mx.random.seed(3)
    model = Network()
    mx.eval(model.parameters())
    return model


def batch(number):
    x = mx.random.normal((8, 5), key=mx.random.key(number))
    return x, mx.stack([x.sum(1), x[:, 0], mx.sin(x[:, 1])], axis=1)


def loss(model, x, y):
    return mx.mean((model(x) - y) ** 2)


def train(model, optimizer, steps, first=0):
    gradient = nn.value_and_grad(model, loss)
    losses = []
    for number in range(first, first + steps):
        value, gradients = gradient(model, *batch(number))
        optimizer.update(model, gradients)
        mx.eval(model.parameters(), optimizer.state)
        losses.append(value.item())
    return losses


def drift(model, optimizer, steps, first=0):
    """Steps whose gradients no matrix product makes: on a GPU its bits depend on where in memory
    its factors lie, and so on the process."""
    for number in range(first, first + steps):
        key = mx.random.key(number)
        gradients = tree_map(
            lambda p, key=key: 0.1 * p + mx.random.normal(p.shape, key=key),
            model.trainable_parameters(),
        )
        optimizer.update(model, gradients)
        mx.eval(model.parameters(), optimizer.state)


def velocities(optimizer):
    """Momentum by path, of either library's optimizer."""
    ours = isinstance(optimizer, optim.SGD)
    state = optimizer.unpacked_state() if ours else optimizer.state
    return {k: v for k, v in tree_flatten(state) if k.endswith(".v")}


def assert_same_training(model, optimizer, other_model, other):
    one, two = dict(tree_flatten(model.parameters())), dict(tree_flatten(other_model.parameters()))
    assert one.keys() == two.keys()
    assert [name for name in one if not same(one[name], two[name])] == []
    assert optimizer.step.item() == other.step.item()
    assert same(optimizer.learning_rate, other.learning_rate)
    if optimizer.momentum:
        one, two = velocities(optimizer), velocities(other)
        assert one.keys() == two.keys()
        assert [name for name in one if not same(one[name], two[name])] == []


# ---- Training, beside MLX ---------------------------------------------------------------


@pytest.mark.parametrize(
    "rate",
    [0.05, mx.array(0.05), lambda step: 0.05 * (0.9 ** step.astype(mx.float32))],
    ids=["number", "array", "callable"],
)
@every_option
def test_twenty_steps_have_the_bits_of_mlx(options, rate):
    model, other = network(), network()
    ours, theirs = optim.SGD(rate, **options), mlx.optimizers.SGD(rate, **options)
    losses = train(model, ours, 20)
    assert train(other, theirs, 20) == losses
    if not options:
        theirs.momentum = 0
    assert_same_training(model, ours, other, theirs)
    assert losses[-1] < losses[0]


def test_our_schedule_in_the_optimizer_of_mlx():
    """The same values, evaluated outside the step: the same bits."""
    schedule = optim.exponential_decay(0.1, 0.9)
    model, other = network(), network()
    ours, theirs = optim.SGD(schedule, momentum=0.9), mlx.optimizers.SGD(schedule, momentum=0.9)
    assert train(model, ours, 10) == train(other, theirs, 10)
    assert_same_training(model, ours, other, theirs)


def test_a_callable_may_return_a_number():
    w = {"w": mx.zeros(2)}
    optimizer = optim.SGD(lambda step: 0.5)
    assert optimizer.apply_gradients({"w": mx.ones(2)}, w)["w"].tolist() == [-0.5, -0.5]
    assert optimizer.learning_rate.item() == 0.5


@pytest.mark.parametrize(
    "rate", [1, np.float32(0.5), mx.array(0.5, mx.float16), mx.array(2, mx.int32)], ids=str
)
def test_rates_of_other_types(rate):
    optimizer, other = optim.SGD(rate), mlx.optimizers.SGD(rate)
    w = {"w": mx.array([1.0, 2.0])}
    for _ in range(2):
        ours, theirs = optimizer.apply_gradients(w, w), other.apply_gradients(w, w)
        assert same(ours["w"], theirs["w"])
    assert optimizer.learning_rate.item() == other.learning_rate.item()


def test_learning_rate_getter_and_setter():
    optimizer = optim.SGD(0.1, momentum=0.9)
    assert optimizer.learning_rate.dtype == mx.float32
    w = {"w": mx.zeros(1)}
    w = optimizer.apply_gradients({"w": mx.ones(1)}, w)
    optimizer.learning_rate = 0.5
    assert optimizer.learning_rate.item() == 0.5
    w = optimizer.apply_gradients({"w": mx.ones(1)}, w)
    f = np.float32
    assert w["w"].item() == -f(0.1) - f(0.5) * (f(0.9) + f(1))
    # A schedule overwrites what was set, as in mlx.optimizers.
    for library in (optim, mlx.optimizers):
        scheduled = library.SGD(optim.exponential_decay(0.5, 0.5))
        scheduled.learning_rate = 100.0
        moved = scheduled.apply_gradients({"w": mx.ones(1)}, {"w": mx.zeros(1)})["w"]
        assert moved.item() == -0.5


def test_the_rate_in_the_state_is_the_one_the_update_used():
    for library in (optim, mlx.optimizers):
        optimizer = library.SGD(optim.exponential_decay(1.0, 0.5))
        seen = [optimizer.learning_rate.item()]
        for _ in range(3):
            optimizer.update({}, {})
            seen.append(optimizer.learning_rate.item())
        assert seen == [1.0, 1.0, 0.5, 0.25]
        assert optimizer.step.item() == 3
        assert optimizer.step.dtype == mx.uint64


# ---- Part of the tree ---------------------------------------------------------------------


def test_apply_gradients_with_a_subset():
    model = network()
    optimizer = optim.SGD(0.1, momentum=0.9)
    before = {k: of_mlx(v) for k, v in tree_flatten(model.parameters())}
    gradients = {"layers": [{}, {"bias": mx.ones(16)}], "scale": mx.array(2.0)}
    result = optimizer.apply_gradients(gradients, model)
    assert isinstance(result, dict)
    assert not isinstance(result, nn.Module)
    assert [name for name, _ in tree_flatten(result)] == ["layers.1.bias", "scale"]
    assert result["layers"][0] == {}
    model.update(result)
    changed = {
        name for name, v in tree_flatten(model.parameters())
        if not np.array_equal(of_mlx(v), before[name])
    }  # fmt: skip
    assert changed == {"layers.1.bias", "scale"}


def test_alternating_subsets_keep_their_momentum():
    """A GAN's way: three overlapping subsets in turn."""
    names = ("a", "b", "c", "d")
    tree = {name: mx.random.normal((5, i + 1)) for i, name in enumerate(names)}
    ours, theirs = (lib.SGD(0.1, momentum=0.9) for lib in (optim, mlx.optimizers))
    theirs.init(tree)
    one, two = dict(tree), dict(tree)
    for number in range(12):
        subset = (("a", "b"), ("c",), ("b", "c", "d"))[number % 3]
        gradients = {name: one[name] * 0.5 + number for name in subset}
        one.update(ours.apply_gradients(gradients, one))
        gradients = {name: two[name] * 0.5 + number for name in subset}
        two.update(theirs.apply_gradients(gradients, two))
        mx.eval(one, two, ours.state)
    for name in names:
        assert same(one[name], two[name])
        assert same(velocities(ours)[f"{name}.v"], theirs.state[name]["v"])


def test_freeze_and_unfreeze_mid_run():
    model, other = network(), network()
    ours, theirs = (lib.SGD(0.05, **OPTIONS["nesterov"]) for lib in (optim, mlx.optimizers))
    for stage, change in enumerate([
        lambda m: None,
        lambda m: m.layers[0].freeze(),
        lambda m: m.freeze(keys="scale", recurse=False),
        lambda m: m.unfreeze(),
        lambda m: m.freeze(keys="bias"),
        lambda m: m.unfreeze(),
    ]):  # fmt: skip
        change(model)
        change(other)
        assert train(model, ours, 3, 10 * stage) == train(other, theirs, 3, 10 * stage)
    assert_same_training(model, ours, other, theirs)


def test_start_frozen_then_unfreeze():
    model, other = network(), network()
    ours, theirs = (lib.SGD(0.05, momentum=0.9) for lib in (optim, mlx.optimizers))
    for m in (model, other):
        m.freeze()
        m.layers[2].unfreeze()
    train(model, ours, 3)
    train(other, theirs, 3)
    for m in (model, other):
        m.unfreeze()
    theirs.init(other.trainable_parameters())  # MLX needs to be told
    assert train(model, ours, 3, 5) == train(other, theirs, 3, 5)
    assert_same_training(model, ours, other, theirs)


class Adapter(nn.Module):
    """A LoRA around a frozen linear layer."""

    def __init__(self, linear):
        super().__init__()
        self.linear = linear
        self.lora_a = mx.random.normal((5, 2), key=mx.random.key(9))
        self.lora_b = mx.zeros((2, 16))

    def __call__(self, x):
        return self.linear(x) + x @ self.lora_a @ self.lora_b


def test_add_adapters_mid_run():
    """The layers that go on training keep their momentum under their paths."""
    model, other = network(), network()
    ours, theirs = (lib.SGD(0.05, momentum=0.9) for lib in (optim, mlx.optimizers))
    train(model, ours, 5)
    train(other, theirs, 5)
    kept = {k: of_mlx(v) for k, v in velocities(ours).items()}
    for m in (model, other):
        m.layers[0].freeze()
        m.layers[0] = Adapter(m.layers[0])
        m.layers[0].linear.freeze()
    theirs.init(other.trainable_parameters())
    assert train(model, ours, 1, 5) == train(other, theirs, 1, 5)
    # The frozen layer's momentum stays under its old path, for when it returns there.
    assert np.array_equal(of_mlx(velocities(ours)["layers.0.weight.v"]), kept["layers.0.weight.v"])
    assert train(model, ours, 5, 6) == train(other, theirs, 5, 6)
    assert_same_training(model, ours, other, theirs)


def test_a_run_with_adapters_can_be_resumed(tmp_path):
    """Its state still knows the layer under the path from before it was wrapped."""

    def adapted():
        model = network()
        model.freeze()
        model.layers[0] = Adapter(model.layers[0])
        model.layers[0].linear.freeze()
        return model

    model, optimizer = network(), optim.SGD(0.05, momentum=0.9)
    train(model, optimizer, 3)
    model.freeze()
    model.layers[0] = Adapter(model.layers[0])
    model.layers[0].linear.freeze()
    train(model, optimizer, 3, 3)
    path = str(tmp_path / "state.safetensors")
    mx.save_safetensors(path, dict(tree_flatten(optimizer.state)))
    other, resumed = adapted(), optim.SGD(0.05, momentum=0.9)
    other.update(model.parameters())
    resumed.state = tree_unflatten(list(mx.load(path).items()))
    assert train(model, optimizer, 3, 6) == train(other, resumed, 3, 6)
    assert_same_training(model, optimizer, other, resumed)


def test_change_of_dtype_mid_run_keeps_momentum():
    w = {"w": mx.array([1.0, 2.0, 3.0])}
    optimizer = optim.SGD(0.5, momentum=0.5)
    w = optimizer.apply_gradients({"w": mx.ones(3)}, w)
    w = {"w": w["w"].astype(mx.bfloat16)}
    w = optimizer.apply_gradients({"w": mx.ones(3)}, w)
    assert w["w"].dtype == mx.bfloat16
    assert w["w"].tolist() == [-0.25, 0.75, 1.75]  # 0.5 more than without momentum: exact
    assert velocities(optimizer)["w.v"].dtype == mx.bfloat16


def test_another_order_of_the_same_tensors():
    """Momentum goes by path, not by position."""
    tree = {"a": mx.ones(3), "b": mx.ones(3) * 2}
    optimizer, other = optim.SGD(0.1, momentum=0.9), mlx.optimizers.SGD(0.1, momentum=0.9)
    want = dict(tree)
    for number in range(6):
        gradients = {"a": mx.full(3, 1.0), "b": mx.full(3, -0.5)}
        if number % 2:
            gradients = dict(reversed(gradients.items()))
        tree.update(optimizer.apply_gradients(gradients, tree))
        want.update(other.apply_gradients(gradients, want))
    assert all(same(tree[k], want[k]) for k in tree)


# ---- MultiOptimizer ----------------------------------------------------------------------


def test_multi_optimizer():
    def build(library):
        return mlx.optimizers.MultiOptimizer(
            [library.SGD(0.05, momentum=0.9), library.SGD(0.1, weight_decay=0.01)],
            [lambda path, weight: weight.ndim > 1],
        )

    model, other = network(), network()
    ours, theirs = build(optim), build(mlx.optimizers)
    assert train(model, ours, 10) == train(other, theirs, 10)
    ours.learning_rate = theirs.learning_rate = 0.025
    assert train(model, ours, 5, 10) == train(other, theirs, 5, 10)
    for name, value in tree_flatten(model.parameters()):
        assert same(value, dict(tree_flatten(other.parameters()))[name])
    # Its state is saved and assigned as a whole.
    again = build(optim)
    again.state = tree_unflatten(tree_flatten(ours.state))
    assert train(model, again, 5, 20) == train(other, theirs, 5, 20)


# ---- init and state -----------------------------------------------------------------------


def test_init_makes_the_state_before_the_first_step():
    model = network()
    optimizer = optim.SGD(0.1, momentum=0.9)
    optimizer.init(model.trainable_parameters())
    names = [name for name, _ in tree_flatten(optimizer.state)]
    assert set(velocities(optimizer)) == {
        f"{name}.v" for name, _ in tree_flatten(model.trainable_parameters())
    }
    assert all(not v.any() for v in velocities(optimizer).values())
    train(model, optimizer, 2)
    assert [name for name, _ in tree_flatten(optimizer.state)] == names  # for mx.compile
    kept = velocities(optimizer)
    optimizer.init(model.trainable_parameters())
    assert all(same(kept[name], v) for name, v in velocities(optimizer).items())


def test_without_momentum_there_is_no_state_to_keep():
    optimizer = optim.SGD(0.1)
    model = network()
    optimizer.init(model.trainable_parameters())
    train(model, optimizer, 2)
    assert set(optimizer.state) == {"step", "learning_rate"}


def test_the_state_is_arrays_only_and_one_dict():
    model = network()
    optimizer = optim.SGD(0.1, momentum=0.9)
    state = optimizer.state
    train(model, optimizer, 2)
    model.layers[0].freeze()
    train(model, optimizer, 2)
    assert optimizer.state is state
    leaves = tree_flatten(state)
    assert all(isinstance(leaf, mx.array) for _, leaf in leaves)
    assert [name for name, _ in tree_flatten(tree_unflatten(leaves))] == [n for n, _ in leaves]


def test_the_gaps_of_the_state_are_zero():
    """Memory between tensors is saved with the state: it must be the same in every run."""
    tree = {"a": mx.ones(3), "b": mx.ones(70), "c": mx.array(1.0)}
    optimizer = optim.SGD(0.1, momentum=0.9)
    noise = [mx.full((64 * 4,), float("nan")) for _ in range(20)]
    mx.eval(noise)
    del noise
    for number in range(4):
        kept = tree, optimizer.unpacked_state() if number % 2 else None
        tree = optimizer.apply_gradients(tree, tree)
        mx.eval(tree, optimizer.state)
        ((arena,),) = (e["momentum"] for e in optimizer.state["arenas"].values())
        values = np.array(arena)
        used = sum(a.size for a in tree.values())
        assert np.count_nonzero(values) == used
        assert np.isfinite(values).all()
    del kept


def test_momentum_and_decay_changed_mid_run():
    model, other = network(), network()
    ours, theirs = optim.SGD(0.05), mlx.optimizers.SGD(0.05)
    stages = [
        {}, {"momentum": 0.9}, {"momentum": 0.5, "nesterov": True}, {"weight_decay": 0.1},
        {"nesterov": False, "momentum": 0.0}, {"momentum": 0.7, "dampening": 0.5},
    ]  # fmt: skip
    for stage, change in enumerate(stages):
        for name, value in change.items():
            setattr(ours, name, value)
            setattr(theirs, name, value)
        assert train(model, ours, 2, 5 * stage) == train(other, theirs, 2, 5 * stage)
    assert_same_training(model, ours, other, theirs)


# ---- Save and load -------------------------------------------------------------------------

CONTINUE = """
import sys
import conftest  # the same device: products on another stream may have other bits
import mlx.core as mx
from mlx.utils import tree_flatten, tree_unflatten
import mlx_fused_optim as optim
from test_optimizer import OPTIONS, drift, network

folder, name = sys.argv[1:]
model = network()
model.load_weights(folder + "/model.safetensors")
optimizer = optim.SGD(optim.exponential_decay(0.1, 0.95), **OPTIONS[name])
optimizer.state = tree_unflatten(list(mx.load(folder + "/state.safetensors").items()))
if model.layers[0].weight[0, 0].item() != model.layers[0].weight[0, 0].item():
    raise SystemExit("NaN")
drift(model, optimizer, 5, 10)
mx.save_safetensors(folder + "/result.safetensors", dict(tree_flatten(model.parameters())))
mx.save_safetensors(folder + "/result_state.safetensors", dict(tree_flatten(optimizer.state)))
"""


@pytest.mark.parametrize("frozen", [False, True], ids=["", "a layer frozen before saving"])
@pytest.mark.parametrize("name", ["plain", "nesterov"])
def test_a_new_process_goes_on_with_the_same_bits(tmp_path, name, frozen):
    model = network()
    optimizer = optim.SGD(optim.exponential_decay(0.1, 0.95), **OPTIONS[name])
    drift(model, optimizer, 7)
    if frozen:
        model.layers[1].freeze()
    drift(model, optimizer, 3, 7)
    model.save_weights(str(tmp_path / "model.safetensors"))
    mx.save_safetensors(str(tmp_path / "state.safetensors"), dict(tree_flatten(optimizer.state)))
    path = os.pathsep.join(filter(None, sys.path))
    subprocess.run(
        [sys.executable, "-c", CONTINUE, str(tmp_path), name],
        env={**os.environ, "PYTHONPATH": path},
        check=True,
        timeout=120,
    )
    model.unfreeze()
    drift(model, optimizer, 5, 10)
    saved = mx.load(str(tmp_path / "result.safetensors"))
    for key, value in tree_flatten(model.parameters()):
        assert same(saved[key], value), key
    saved = mx.load(str(tmp_path / "result_state.safetensors"))
    state = dict(tree_flatten(optimizer.state))
    assert saved.keys() == state.keys()
    assert all(same(saved[key], state[key]) for key in state)


def test_moving_to_mlx_and_back_mid_run():
    model, other = network(), network()
    alone = mlx.optimizers.SGD(0.05, **OPTIONS["nesterov"])
    optimizer = optim.SGD(0.05, **OPTIONS["nesterov"])
    for stage in range(4):
        losses = train(model, optimizer, 3, 3 * stage)
        assert losses == train(other, alone, 3, 3 * stage)
        if isinstance(optimizer, optim.SGD):
            state, optimizer = optimizer.unpacked_state(), mlx.optimizers.SGD(0.05)
        else:
            state, optimizer = optimizer.state, optim.SGD(0.05)
        for name, value in OPTIONS["nesterov"].items():
            setattr(optimizer, name, value)
        optimizer.state = state
    assert_same_training(model, optimizer, other, alone)


def test_unpacked_state_has_the_layout_of_mlx():
    model, other = network(), network()
    ours, theirs = optim.SGD(0.05, momentum=0.9), mlx.optimizers.SGD(0.05, momentum=0.9)
    train(model, ours, 2)
    train(other, theirs, 2)
    one, two = dict(tree_flatten(ours.unpacked_state())), dict(tree_flatten(theirs.state))
    assert one.keys() == two.keys()
    assert all(same(one[name], two[name]) for name in one)
    assert tree_map(lambda _: 0, ours.unpacked_state()) == tree_map(lambda _: 0, theirs.state)


def test_a_state_of_mlx_without_momentum_loads():
    """MLX keeps zeros for every tensor even then."""
    model = network()
    theirs = mlx.optimizers.SGD(0.05)
    train(model, theirs, 2)
    ours = optim.SGD(0.05)
    ours.state = theirs.state
    train(model, ours, 2, 2)
    assert ours.step.item() == 4


# ---- Trees ----------------------------------------------------------------------------------


class Pair(NamedTuple):
    first: mx.array
    second: mx.array


TREES = {
    "nothing": {},
    "empty lists": {"a": [], "b": {}, "c": ()},
    "one array": lambda: mx.ones(5),
    "list": lambda: [mx.ones(5), mx.ones((2, 3))],
    "tuple": lambda: (mx.ones(5), [mx.ones(2)]),
    "named tuple": lambda: {"pair": Pair(mx.ones(2), mx.ones(3))},
    "named tuple at the top": lambda: Pair(mx.ones(2), mx.ones(3)),
    "nested": lambda: {"a": [{"b": (mx.ones(2), {"c": mx.array(3.0)})}], "d": mx.zeros((0, 2))},
    "integer keys": lambda: {0: mx.ones(2), 7: {1: mx.ones(3)}},
    "keys that look like numbers": lambda: {"x": {"0": mx.ones(2), "1": mx.ones(3)}},
    "keys with dots": lambda: {"a.b": mx.ones(2), "c": mx.ones(3)},
    "an empty key": lambda: {"": mx.ones(2), "c": mx.ones(3)},
    "own names": lambda: {"step": mx.ones(2), "arenas": mx.ones(3), "v": mx.ones(1)},
    "not ascii": lambda: {"größe": mx.ones(2), "幅": [mx.ones(3)]},
    "half": lambda: {"a": mx.ones(2).astype(mx.float16), "b": mx.ones(3)},
}
every_tree = pytest.mark.parametrize(
    "make", [t if callable(t) else (lambda t=t: t) for t in TREES.values()], ids=TREES
)


@every_tree
def test_trees(make):
    """Any structure goes through, and comes back with the same types."""
    optimizer = optim.SGD(0.5, momentum=0.5)
    tree = want = make()
    state = reference.init(tree)
    for _ in range(3):
        tree = optimizer.apply_gradients(tree, tree)
        want, state = reference.step(
            reference.sgd, want, want, state, learning_rate=0.5, momentum=0.5
        )
        mx.eval(tree, optimizer.state)
    assert tree_map(lambda _: 0, tree) == tree_map(lambda _: 0, want)
    assert type(tree) is type(want)
    for (_, a), (_, b) in zip(tree_flatten(tree), tree_flatten(want), strict=True):
        assert same(a, b)


@every_tree
def test_trees_survive_saving(make, tmp_path):
    optimizer = optim.SGD(0.5, momentum=0.5)
    tree = optimizer.apply_gradients(make(), make())
    path = str(tmp_path / "state.safetensors")
    mx.save_safetensors(path, dict(tree_flatten(optimizer.state)))
    loaded = optim.SGD(0.5, momentum=0.5)
    loaded.state = tree_unflatten(list(mx.load(path).items()))
    one, two = optimizer.apply_gradients(tree, tree), loaded.apply_gradients(tree, tree)
    for (_, a), (_, b) in zip(tree_flatten(one), tree_flatten(two), strict=True):
        assert same(a, b)


@every_tree
def test_trees_whose_layout_changes(make):
    """Half types turn to float32: every tensor moves to another arena, by its path."""
    optimizer = optim.SGD(0.5, momentum=0.5)
    tree = tree_map(mx.ones_like, make())
    tree = optimizer.apply_gradients(tree, tree)
    tree = tree_map(lambda p: p.astype(mx.bfloat16), tree)
    tree = optimizer.apply_gradients(tree, tree)
    # w = 1: v = 1, w = 0.5; v = 0.5 + 0.5, w = 0. All numbers are exact.
    for _, leaf in tree_flatten(tree):
        assert not leaf.any()


@every_tree
def test_trees_in_the_layout_of_mlx(make):
    """unpacked_state, and a state that is loaded from it."""
    optimizer = optim.SGD(0.5, momentum=0.5)
    tree = optimizer.apply_gradients(make(), make())
    if isinstance(tree, dict) and tree.keys() & {"step", "learning_rate", "arenas"}:
        with pytest.raises(ValueError, match=r"\[SGD\] .*of 'arenas', allowed"):
            optimizer.unpacked_state()
        return
    state = optimizer.unpacked_state()
    assert len(tree_flatten(state)) == 2 + len(tree_flatten(tree))
    loaded = optim.SGD(0.5, momentum=0.5)
    loaded.state = state
    one, two = optimizer.apply_gradients(tree, tree), loaded.apply_gradients(tree, tree)
    for (_, a), (_, b) in zip(tree_flatten(one), tree_flatten(two), strict=True):
        assert same(a, b)


def test_the_input_trees_are_left_alone():
    inner = [mx.ones(2)]
    parameters, gradients = {"a": inner}, {"a": [mx.ones(2)]}
    optimizer = optim.SGD(0.5, momentum=0.5)
    result = optimizer.apply_gradients(gradients, parameters)
    assert parameters["a"] is inner
    assert inner[0].tolist() == [1.0, 1.0]
    assert result["a"] is not inner


# ---- Size ------------------------------------------------------------------------------------


def test_more_than_one_arena_and_a_tensor_larger_than_one():
    """Arenas hold a sixteenth of the parameters: here each tensor is more than that."""
    sizes = {"first": 30_000_001, "large": 68_000_003, "last": 1000}
    pattern = mx.arange(1, 1009, dtype=mx.float32) / 1024
    gradient = mx.tile(pattern, 68_000_003 // 1008 + 1).astype(mx.float16)[: sizes["large"]]
    tree = {name: mx.ones(size, mx.float16) for name, size in sizes.items()}
    gradients = {name: gradient[:size] for name, size in sizes.items()}
    mx.eval(gradients)
    optimizer = optim.SGD(0.5)
    for _ in range(2):
        tree = optimizer.apply_gradients(gradients, tree)
        mx.eval(tree)
    period = np.float32(1.0)
    one = np.array(gradient[:1008]).astype(np.float32)
    for _ in range(2):
        period = (period - np.float32(0.5) * one).astype(np.float16).astype(np.float32)
    for name, size in sizes.items():
        # Whole periods against the one computed, and what is left over.
        whole = size // 1008 * 1008
        want = mx.array(period.astype(np.float16))
        rows = tree[name][:whole].reshape(-1, 1008)
        assert (rows == want).all().item(), name
        assert (tree[name][whole:] == want[: size - whole]).all().item(), name


def test_the_layout_of_arenas():
    """What docs and other backends rely on: aligned, in order, apart, at most 128 MiB."""
    from mlx_fused_optim import _ext

    random = np.random.default_rng(0)
    dtypes = (mx.float32, mx.float16, mx.bfloat16)
    sizes = [*random.integers(0, 40_000_000, 40), 2**25, 2**25 + 1, 70_000_000, 0, 1]
    rows = [((f"t{i}",), (int(size),), dtypes[i % 3]) for i, size in enumerate(sizes)]
    arenas = _ext.Layout(rows).arenas
    assert sorted(t for _, _, tensors, *_ in arenas for t in tensors) == list(range(len(rows)))
    for dtype, shape, tensors, offsets, _ in arenas:
        total = int(np.prod(shape)) * dtype.size
        assert total <= 2**27 or len(tensors) == 1
        end = 0
        for tensor, offset in zip(tensors, offsets, strict=True):
            _, (size,), own = rows[tensor]
            assert own == dtype
            assert offset * dtype.size % 256 == 0
            assert end <= offset < end + 256 // dtype.size
            end = offset + size
        assert end * dtype.size <= total < end * dtype.size + 256
        assert tensors == sorted(tensors)
    # No arena has room for the first tensor of the next one of its dtype.
    for dtype in dtypes:
        own = [(int(np.prod(s)), rows[t[0]][1][0]) for d, s, t, *_ in arenas if d == dtype]
        for (size, _), (_, following) in itertools.pairwise(own):
            assert (size + following + 256) * dtype.size > 2**27 - 256 * dtype.size


@pytest.mark.parametrize("mib, limit", [(1, 8), (32, 8), (128, 8), (256, 16), (2048, 128)])
def test_an_arena_is_a_sixteenth_of_the_model(mib, limit):
    """At most, from 8 MiB to 128: what a step that cannot write in place needs beside it."""
    from mlx_fused_optim import _ext

    half = 2**19  # bytes: float16 and float32 share the limit, not an arena
    rows = [((f"t{i}",), (half // 4,), mx.float32) for i in range(mib)]
    rows += [((f"h{i}",), (half // 2,), mx.float16) for i in range(mib)]
    for dtype in (mx.float32, mx.float16):
        held = [len(tensors) for d, _, tensors, *_ in _ext.Layout(rows).arenas if d == dtype]
        whole, rest = divmod(mib, 2 * limit)
        assert held == [2 * limit] * whole + [rest] * (rest > 0)


def peak_of_training(optimizer) -> int:
    """Bytes beyond what the model had, of steps that evaluate loss, gradients and update
    together, so that nothing can be written in place."""
    mx.random.seed(0)
    layers = [layer for _ in range(24) for layer in (nn.Linear(1024, 1024), nn.ReLU())]
    model = nn.Sequential(*layers)
    x = mx.random.normal((8, 1024))
    mx.eval(model.parameters(), x)
    before = mx.get_active_memory()
    loss_and_grad = nn.value_and_grad(model, lambda model, x: mx.square(model(x)).mean())
    for step in range(3):
        if step == 1:  # the state has begun
            mx.synchronize()
            mx.reset_peak_memory()
        loss, gradients = loss_and_grad(model, x)
        optimizer.update(model, gradients)
        del gradients
        mx.eval(model.parameters(), optimizer.state, loss)
    mx.synchronize()
    return mx.get_peak_memory() - before


@pytest.mark.parametrize("name, options", [("SGD", {"momentum": 0.9}), ("AdamW", {})])
def test_the_peak_of_a_whole_evaluation_is_at_most_that_of_mlx(name, options):
    if mx.default_device() != mx.cpu:
        pytest.skip("a GPU evaluates ahead of what is freed, and how far varies")
    ours, theirs = (
        peak_of_training(getattr(module, name)(1e-3, **options))
        for module in (optim, mlx.optimizers)
    )
    assert ours <= theirs


def test_many_small_tensors():
    tree = {f"t{i}": mx.full((i % 5,), float(i + 1)) for i in range(1000)}
    ours, theirs = optim.SGD(0.5, momentum=0.9), mlx.optimizers.SGD(0.5, momentum=0.9)
    one = two = tree
    for _ in range(3):
        one, two = ours.apply_gradients(one, one), theirs.apply_gradients(two, two)
    assert all(same(one[name], two[name]) for name in tree)


# ---- The pure functions and the reference ------------------------------------------------------


@pytest.mark.parametrize("dtype", [mx.float32, mx.float16, mx.bfloat16], ids=str)
@every_option
def test_functions_and_reference_have_the_bits_of_the_optimizer(options, dtype):
    mx.random.seed(8)
    first = {"a": mx.random.normal((40, 9)), "b": [mx.random.normal((130,)), mx.array(0.3)]}
    first = tree_map(lambda p: p.astype(dtype), first)
    gradients = tree_map(lambda p: (p * 0.3 + 1).astype(dtype), first)
    optimizer = optim.SGD(0.1, **options)
    momentum = options.get("momentum", 0.0)
    one = two = three = first
    state = optim.fused_sgd_init(first, momentum=momentum)
    kept = reference.init(first)
    for _ in range(3):
        one = optimizer.apply_gradients(gradients, one)
        two, state = optim.fused_sgd_step(two, gradients, state, learning_rate=0.1, **options)
        three, kept = reference.step(
            reference.sgd, three, gradients, kept, learning_rate=0.1, **options
        )
    flat = [tree_flatten(t) for t in (one, two, three)]
    for (_, a), (_, b), (_, c) in zip(*flat, strict=True):
        assert same(a, b)
        assert same(a, c)
    assert state["step"].item() == 3
    assert state["learning_rate"].item() == np.float32(0.1)


def test_fused_sgd_init_goes_on_from_other_states():
    w = {"a": mx.array([1.0, 2.0]), "b": mx.array([3.0])}
    theirs = mlx.optimizers.SGD(0.5, momentum=0.5)
    w = theirs.apply_gradients(w, w)
    want = theirs.apply_gradients(w, dict(w))
    theirs_before = mlx.optimizers.SGD(0.5, momentum=0.5)
    first = {"a": mx.array([1.0, 2.0]), "b": mx.array([3.0])}
    w = theirs_before.apply_gradients(first, first)
    state = optim.fused_sgd_init(w, momentum=0.5, state=theirs_before.state)
    got, state = optim.fused_sgd_step(w, w, state, learning_rate=0.5, momentum=0.5)
    assert all(same(got[k], want[k]) for k in got)
    assert state["step"].item() == 2
    # On with a part of the tensors, then with one more again.
    part = {"b": got["b"]}
    state = optim.fused_sgd_init(part, momentum=0.5, state=state)
    part, state = optim.fused_sgd_step(part, part, state, learning_rate=0.5, momentum=0.5)
    state = optim.fused_sgd_init({**got, **part}, momentum=0.5, state=state)
    optimizer = optim.SGD(0.5)
    optimizer.state = state
    # a: v0 = 1, w = 0.5; v = 1, w = 0. b: v = 3, 3, and then 1.5 with a gradient of 0.
    assert optimizer.unpacked_state()["a"]["v"].tolist() == [1.0, 2.0]
    assert optimizer.unpacked_state()["b"]["v"].tolist() == [1.5]
    assert state["step"].item() == 3


# ---- What a subclass, an owner of a state and a migration may expect -------------------


def test_a_state_that_is_assigned_stays_its_owners():
    parameters = {"w": mx.ones(3)}
    theirs = mlx.optimizers.SGD(0.5, momentum=0.5)
    theirs.apply_gradients(parameters, parameters)
    ours = optim.SGD(0.5, momentum=0.5)
    ours.state = theirs.state
    a = ours.apply_gradients(parameters, parameters)
    b = theirs.apply_gradients(parameters, parameters)
    assert mx.array_equal(a["w"], b["w"])
    assert ours.step.item() == theirs.step.item() == 2


def test_a_subclass_may_schedule_what_it_likes():
    class Mine(optim.SGD):
        def __init__(self):
            super().__init__(0.5, momentum=0.5)
            self._maybe_schedule("temperature", lambda step: 1.0 * (step + 1))

    optimizer, parameters = Mine(), {"w": mx.ones(3)}
    for step in range(3):
        parameters = optimizer.apply_gradients(parameters, parameters)
        assert optimizer.state["temperature"].item() == step + 1
    assert optimizer.unpacked_state()["temperature"].item() == 3


def test_multi_optimizer_over_a_list_of_arrays():
    def run(module):
        sgd = module.SGD(0.5, momentum=0.5)
        filters = [lambda path, array: path.endswith("1")]
        optimizer = optim.MultiOptimizer([sgd, module.SGD(0.25)], filters)
        parameters = {"l": [mx.ones(2), mx.ones(2)]}
        for _ in range(2):
            parameters = optimizer.apply_gradients(parameters, parameters)
        return parameters["l"]

    for ours, theirs in zip(run(optim), run(mlx.optimizers), strict=True):
        assert mx.array_equal(ours, theirs)


def test_learning_rate_can_become_a_schedule():
    optimizer, parameters = optim.SGD(1.0), {"w": mx.ones(1)}
    optimizer.learning_rate = optim.exponential_decay(0.5, 0.5)
    rates = []
    for _ in range(2):
        parameters = optimizer.apply_gradients(parameters, parameters)
        rates.append(optimizer.learning_rate.item())
    assert rates == [0.5, 0.25]
    for rate in (-1e39, float("nan"), 1e39, 10**400):
        with pytest.raises(ValueError, match=r"\[SGD\] learning_rate is out of range"):
            optimizer.learning_rate = rate


def test_frozen_momentum_leaves_its_arena():
    """A few numbers that are frozen do not keep the arena that they were in."""
    parameters = {"large": mx.ones(1 << 20), "small": mx.ones(4)}
    optimizer = optim.SGD(0.5, momentum=0.5)
    parameters = optimizer.apply_gradients(parameters, parameters)
    parameters = {
        **parameters,
        **optimizer.apply_gradients({"large": parameters["large"]}, parameters),
    }
    mx.eval(parameters, optimizer.state)
    let_go()
    before = mx.get_active_memory()
    entry = next(e for e in optimizer.state["arenas"].values() if e["momentum"][0].size < 1000)
    entry["momentum"] = [1 * entry["momentum"][0]]
    mx.eval(optimizer.state)
    assert comes_true(lambda: abs(mx.get_active_memory() - before) < 1024)
