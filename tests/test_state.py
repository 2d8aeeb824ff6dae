"""What users do with a state: put things in, read it, move it, drop parts of it."""

import copy
import gc
import pickle

import full_references
import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers
import mlx_fused_optim as optim
import numpy as np
import pytest
from bits import of_mlx, same
from mlx.utils import tree_flatten, tree_map, tree_unflatten
from mlx_fused_optim import _layout

SLOTS = {
    "momentum": "v",
    "momentum in bytes": "v",
    "master": "master",
    "master of 24 bits": "master",
    "compensation": "compensation",
    "ema": "ema",
}
KEEPS = {
    "momentum": dict(momentum=0.5),
    "momentum in bytes": dict(momentum=0.5, state_dtype="8bit", min_8bit_size=15),
    "master": dict(momentum=0.5, master_weights=True),
    "master of 24 bits": dict(momentum=0.5, master_weights="24bit"),
    "compensation": dict(momentum=0.5, compensated=True),
    "ema": dict(momentum=0.5, ema_decay=0.5),
}


def tree(seed, dtype=mx.bfloat16):
    values = np.random.default_rng(seed).standard_normal
    return {
        "a": mx.array(values((3, 5))).astype(mx.float32),
        "b": [{"w": mx.array(values(70)).astype(dtype)}, {"w": mx.array(values(4)).astype(dtype)}],
    }


def stepped(optimizer, steps, parameters=None):
    parameters = tree(0) if parameters is None else parameters
    for i in range(steps):
        parameters = optimizer.apply_gradients(tree(1 + i), parameters)
    mx.eval(parameters, optimizer.state)
    return parameters


def assert_same(got, want):
    got, want = tree_flatten(got), tree_flatten(want)
    assert [path for path, _ in got] == [path for path, _ in want]
    for (path, a), (_, b) in zip(got, want, strict=True):
        assert same(a, b), path


# ---- What somebody puts in -----------------------------------------------------------

RUNS = {"never": 0, "init": -1, "one step": 1, "a prepared step": 2}


def run_before(optimizer, run):
    if RUNS[run] < 0:
        optimizer.init(tree(0))
    stepped(optimizer, max(RUNS[run], 0))


@pytest.mark.parametrize("form", ["arenas", "unpacked", "of a part", "flattened"])
@pytest.mark.parametrize("run", RUNS)
@pytest.mark.parametrize("slot", SLOTS)
def test_a_state_that_is_put_in_counts_as_one_that_is_assigned(slot, run, form):
    saved = optim.SGD(0.25, **KEEPS[slot])
    parameters = stepped(saved, 3)
    if form == "of a part":  # other arenas
        saved.apply_gradients({"a": parameters["a"]}, parameters)
    state = saved.state if form in ("arenas", "of a part") else saved.unpacked_state()
    if form == "flattened":
        state = tree_unflatten(tree_flatten(state))
    edited, assigned = optim.SGD(0.25, **KEEPS[slot]), optim.SGD(0.25, **KEEPS[slot])
    run_before(edited, run)
    edited.state.update(state)
    assigned.state = state
    for i in range(2):
        got = edited.apply_gradients(tree(7 + i), parameters)
        assert_same(got, assigned.apply_gradients(tree(7 + i), parameters))
        assert_same(edited.unpacked_state(), assigned.unpacked_state())
        parameters = got
    assert edited.state.keys() == {"step", "learning_rate", "arenas"}


def test_a_state_of_mlx_that_is_put_in():
    """As public training scripts restore a run."""
    one, two = mlx.optimizers.SGD(0.25, momentum=0.5), mlx.optimizers.SGD(0.25, momentum=0.5)
    parameters = stepped(one, 3, tree(0, mx.float32))
    for run in RUNS:
        ours = optim.SGD(0.25, momentum=0.5)
        run_before(ours, run)
        ours.state.update(one.state)
        two.state = tree_map(lambda a: a, one.state)
        want = two.apply_gradients(tree(9, mx.float32), parameters)
        assert_same(ours.apply_gradients(tree(9, mx.float32), parameters), want)
        assert ours.step.item() == 4


@pytest.mark.parametrize("slot", SLOTS)
@pytest.mark.parametrize("run", ["init", "one step", "a prepared step"])
def test_one_slot_of_one_tensor(run, slot):
    """What somebody has put in, and the arenas for all the rest."""
    optimizer = optim.SGD(0.0, **KEEPS[slot])
    run_before(optimizer, run)
    before = optimizer.unpacked_state()
    own = before["b"][0]["w"][SLOTS[slot]]
    value = mx.full((70,), 3.0).astype(own.dtype)
    optimizer.state["b"] = [{"w": {SLOTS[slot]: value}}]
    optimizer.init(tree(0))
    after = optimizer.unpacked_state()
    assert same(after["b"][0]["w"].pop(SLOTS[slot]), value)
    before["b"][0]["w"].pop(SLOTS[slot])
    assert_same(after, before)


def test_what_is_put_in_for_a_frozen_tensor_waits_for_it():
    optimizer = optim.SGD(1.0, momentum=0.5)
    w = {"a": mx.zeros(2), "b": mx.zeros(2)}
    for _ in range(2):
        optimizer.apply_gradients({"a": mx.ones(2)}, w)
    optimizer.state["b"] = {"v": mx.full((2,), 4.0)}
    optimizer.apply_gradients({"a": mx.ones(2)}, w)
    assert optimizer.state.keys() == {"step", "learning_rate", "arenas"}
    assert optimizer.apply_gradients({"b": mx.ones(2)}, w)["b"].tolist() == [-3.0, -3.0]
    assert optimizer.unpacked_state()["a"]["v"].tolist() == [1.75, 1.75]


def test_frozen_masters_of_both_kinds_stay():
    """Those of 24 bits beside float32, where all are put in and none is in the step."""
    options = dict(momentum=0.5, master_weights="24bit")
    w = {name: mx.random.normal((70,)).astype(mx.bfloat16) for name in "abc"}
    first, then, last = (
        optim.SGD(0.1, momentum=0.5, master_weights=True),
        *(optim.SGD(0.1, **options) for _ in range(2)),
    )
    w = first.apply_gradients(w, w)
    then.state = first.state
    w = {**w, **then.apply_gradients({"a": w["a"]}, w)}
    last.state = then.unpacked_state()
    last.apply_gradients({"c": w["c"]}, w)
    before, after = then.unpacked_state(), last.unpacked_state()
    assert before["a"]["master"].dtype == mx.int8 and before["b"]["master"].dtype == mx.float32
    for name in "ab":
        assert_same(after[name], before[name])


EDITS = {
    "two shapes of one that is frozen": lambda state: state.update(
        c={"v": mx.ones(4), "ema": mx.ones(5)}
    ),
    "another model": lambda state: state.update(x={"v": mx.ones(4)}) or state.pop("arenas"),
    "another model's arenas": lambda state: state.update(arenas=arenas_of({"x": mx.ones(4)})),
    "another shape": lambda state: state.update(a={"v": mx.ones(4)}),
    "another shape in arenas": lambda state: state["arenas"].update(arenas_of({"a": mx.ones(4)})),
    "another rule's slot": lambda state: state.update(a={"m": mx.ones((3, 5))}),
    "numbers": lambda state: state.update(a={"v": 1.0}),
}


def arenas_of(parameters):
    optimizer = optim.SGD(0.1, momentum=0.9)
    optimizer.init(parameters)
    return optimizer.state["arenas"]


@pytest.mark.parametrize("how", ["edited", "assigned"])
@pytest.mark.parametrize("run", ["one step", "a prepared step"])
@pytest.mark.parametrize("name", EDITS)
def test_what_is_put_in_is_checked(name, run, how):
    optimizer = optim.SGD(0.25, momentum=0.5)
    run_before(optimizer, run)
    state = {**optimizer.state, "arenas": dict(optimizer.state["arenas"])}
    EDITS[name](state)
    if how == "edited":
        optimizer.state.clear()
        optimizer.state.update(state)
    else:
        optimizer.state = state
    for call in (
        lambda: optimizer.apply_gradients(tree(5), tree(0)),
        lambda: optimizer.init(tree(0)),
    ):
        with pytest.raises(ValueError, match=r"^\[SGD\] .*: got .*, (allowed|the parameter has) "):
            call()
        got, want = tree_flatten(optimizer.state), tree_flatten(state)
        assert all(a is b for (_, a), (_, b) in zip(got, want, strict=True))


def test_what_is_put_in_between_compiled_steps():
    def run(library):
        optimizer = library.SGD(0.25, momentum=0.5)
        parameters = {"w": mx.zeros(3)}
        optimizer.init(parameters)
        state = [parameters, optimizer.state]

        def step():
            parameters.update(optimizer.apply_gradients({"w": mx.ones(3)}, parameters))

        compiled = mx.compile(step, inputs=state, outputs=state)
        for i in range(4):
            if i == 2:
                optimizer.state["w"] = {"v": mx.full((3,), 8.0)}
            compiled()
            mx.eval(state)
        return parameters["w"]

    assert same(run(optim), run(mlx.optimizers))


def test_what_is_put_into_the_state_of_the_functions():
    w = {"a": mx.zeros(2), "b": mx.zeros(2)}
    options = dict(learning_rate=1.0, momentum=0.5)
    state = optim.fused_sgd_init(w, momentum=0.5)
    for _ in range(2):
        _, state = optim.fused_sgd_step(w, w, state, **options)
    state["a"] = {"v": mx.ones(2)}
    got, state = optim.fused_sgd_step(w, w, state, **options)
    assert got["a"].tolist() == [-0.5, -0.5] and got["b"].tolist() == [0.0, 0.0]
    assert state.keys() == {"step", "learning_rate", "arenas"}
    state["a"] = {"v": mx.ones(3)}
    with pytest.raises(ValueError, match=r"^\[fused_sgd_step\] the state is of another model"):
        optim.fused_sgd_step(w, w, state, **options)


@pytest.mark.parametrize("dtype", [mx.int8, mx.int32, mx.uint32, mx.int64, mx.uint64, int], ids=str)
@pytest.mark.parametrize("momentum", [0.0, 0.5])
def test_a_step_that_is_set_by_hand(momentum, dtype):
    rate = optim.exponential_decay(0.5, 0.5)
    w = {"w": mx.zeros(1)}
    for call in (
        lambda o: o.apply_gradients({"w": mx.ones(1)}, w),
        lambda o: o.init(w) or o.apply_gradients({"w": mx.ones(1)}, w),
    ):
        optimizer = optim.SGD(rate, momentum=momentum)
        for _ in range(3):
            optimizer.apply_gradients({"w": mx.ones(1)}, w)
        optimizer.state["step"] = 1 if dtype is int else mx.array(1, dtype)
        call(optimizer)
        assert optimizer.learning_rate.item() == 0.25
        assert optimizer.step.item() == 2 and optimizer.step.dtype == mx.uint64
    state = optim.fused_sgd_init(w, momentum=momentum)
    state["step"] = mx.array(1, mx.int32)
    _, state = optim.fused_sgd_step(w, w, state, learning_rate=rate, momentum=momentum)
    assert state["learning_rate"].item() == 0.25 and state["step"].dtype == mx.uint64


@pytest.mark.parametrize("how", ["assigned", "put in"])
@pytest.mark.parametrize("name", ["momentum", "weight_decay"])
def test_a_schedule_that_is_resumed_as_a_constant(name, how):
    first = optim.SGD(0.1, **{name: optim.linear_schedule(0.0, 0.5, 4)})
    w = first.apply_gradients({"w": mx.ones(2)}, {"w": mx.ones(2)})
    assert name in first.state
    for begin in (lambda o: o.init(w), lambda o: o.apply_gradients({"w": mx.ones(2)}, w)):
        optimizer = optim.SGD(0.1, **{name: 0.75})
        if how == "assigned":
            optimizer.state = first.state
        else:
            optimizer.state.update(first.state)
        begin(optimizer)
        assert name not in optimizer.state and getattr(optimizer, name) == 0.75


# ---- Keys ------------------------------------------------------------------------------

KEYS = {
    "dots": {"layers.0.weight": 2, "layers.1.weight": 3},
    "integers": {0: 2, 7: {1: 3}, -1: 4},
    "empty": {"": 2, "c": {"": 3}},
    "dots at the ends": {".": 2, "a.": 3, ".a": 4},
    "numbers as text": {"x": {"0": 2, "1": 3, "01": 4}},
    "integers and text": {"x": {0: 2, "0": 3}},
    "lists": {"x": [2, {"y": 3}], "z": {0: [4]}},
    "collisions": {"a.b": 2, "a": {"b": 3}, "a.b.c": 4},
    "escapes": {"a\\.b": 2, "a\\": {".b": 3}, "größe": 4},
}


def tree_of(name, value=None):
    """Arrays of these lengths."""
    make = lambda n: mx.full((n,), float(n) if value is None else value)  # noqa: E731
    return tree_map(make, KEYS[name])


def structure(tree):
    return tree_map(lambda a: a.tolist(), tree)


every_key = pytest.mark.parametrize("name", KEYS)


@every_key
def test_keys_come_back(name):
    """As they were, and as mlx.optimizers has them in its own state."""
    ours, theirs = optim.SGD(1.0, momentum=0.5), mlx.optimizers.SGD(1.0, momentum=0.5)
    averaging = optim.SGD(1.0, ema_decay=0.0)
    for optimizer in (ours, theirs, averaging):
        optimizer.apply_gradients(tree_of(name), tree_of(name, 0.0))
    assert structure(ours.unpacked_state()) == structure(theirs.state)
    averages = averaging.ema_parameters()
    assert structure(averages) == structure(tree_map(lambda a: -a, tree_of(name)))


@every_key
def test_keys_move_to_mlx_and_back(name):
    w, g = tree_of(name, 0.0), tree_of(name)
    ours, theirs = optim.SGD(1.0, momentum=0.5), mlx.optimizers.SGD(1.0, momentum=0.5)
    w = ours.apply_gradients(g, w)
    theirs.state = ours.unpacked_state()
    w = theirs.apply_gradients(g, w)
    again = optim.SGD(1.0, momentum=0.5)
    again.state = theirs.state
    w = again.apply_gradients(g, w)
    # v = 1, 1.5, 1.75 times g
    assert structure(w) == structure(tree_map(lambda a: -4.25 * a, g))


@every_key
def test_keys_survive_saving(name, tmp_path):
    w, g = tree_of(name, 0.0), tree_of(name)
    optimizer = optim.SGD(1.0, momentum=0.5, ema_decay=0.0)
    w = optimizer.apply_gradients(g, w)
    path = str(tmp_path / "state.safetensors")
    mx.save_safetensors(path, dict(tree_flatten(optimizer.state)))
    _layout._layouts.clear()  # as in another process
    loaded = optim.SGD(1.0, momentum=0.5, ema_decay=0.0)
    loaded.state = tree_unflatten(list(mx.load(path).items()))
    assert structure(loaded.unpacked_state()) == structure(optimizer.unpacked_state())
    assert structure(loaded.ema_parameters()) == structure(optimizer.ema_parameters())
    _layout._layouts.clear()
    assert structure(loaded.apply_gradients(g, w)) == structure(tree_map(lambda a: -2.5 * a, g))


@every_key
def test_keys_of_tensors_that_come_and_go(name):
    """Each one alone, then all: nobody gets the momentum of another."""
    w, g = tree_of(name, 0.0), tree_of(name)
    optimizer = optim.SGD(1.0, momentum=0.5)
    for key in g:
        optimizer.apply_gradients({key: g[key]}, w)
    got = optimizer.apply_gradients(g, w)
    assert structure(got) == structure(tree_map(lambda a: -1.5 * a, g))


def test_a_new_tensor_does_not_get_what_another_of_its_name_has():
    optimizer = optim.SGD(1.0, momentum=0.5)
    optimizer.apply_gradients({"a.b": mx.ones(2)}, {"a.b": mx.zeros(2)})
    w = {"a.b": mx.zeros(2), "a": {"b": mx.zeros(2)}}
    new = optimizer.apply_gradients({"a": {"b": mx.ones(2)}}, w)
    assert new["a"]["b"].tolist() == [-1.0, -1.0]


@pytest.mark.parametrize("name", ["dots", "numbers as text", "integers", "lists"])
def test_a_state_of_mlx_that_was_flattened_finds_its_tensors(name):
    """tree_flatten loses the kinds of keys; a name that is clear is enough."""
    w, g = tree_of(name, 0.0), tree_of(name)
    theirs = mlx.optimizers.SGD(1.0, momentum=0.5)
    w = theirs.apply_gradients(g, w)
    ours = optim.SGD(1.0, momentum=0.5)
    ours.state = tree_unflatten(tree_flatten(theirs.state))
    assert structure(ours.apply_gradients(g, w)) == structure(tree_map(lambda a: -2.5 * a, g))


# ---- Sets of tensors ---------------------------------------------------------------------


def test_a_set_of_tensors_has_the_name_that_saved_states_have():
    """On every platform: a hash of paths, dtypes and shapes, formed anew in full_references.py."""
    shapes = [(2, 3), (258,), (3, 2), (), (1, 70000)]
    optimizer = optim.SGD(0.1, momentum=0.9)
    optimizer.init({"w": [mx.zeros(shape) for shape in shapes]})
    (arena,) = full_references.arenas_of(shapes, ["float32"] * len(shapes))
    assert list(optimizer.state["arenas"]) == [f"layout_{arena.fingerprint:016x}"]


def test_other_tensors_of_the_same_number_are_told_apart():
    """A layout's number is of bytes in which dimensions can spell the next tensor."""
    spelled = [int.from_bytes(part, "little") for part in (b"\xfe\xf8bi", b"as\xff\x01")]
    one, other = {"a": mx.zeros((*spelled, 0))}, {"a": mx.zeros(()), "bias": mx.zeros((0,))}
    optimizer = optim.SGD(1.0, momentum=0.9)
    optimizer.apply_gradients(one, one)
    (name,) = optimizer.state["arenas"]
    with pytest.raises(ValueError, match="the layout is of other tensors") as error:
        optim.SGD(1.0, momentum=0.9).apply_gradients(other, other)
    assert str(error.value).count(name) == 2


def test_what_is_known_of_sets_of_tensors_is_bounded():
    asked = []
    groups = [(lambda path, array: asked.append(path) or True, {"learning_rate": 0.5})]
    w = {f"t{i}": mx.zeros(1) for i in range(12)}
    optimizer = optim.SGD(1.0, momentum=0.5, groups=groups)
    for i in range(1, 200):
        part = {k: mx.ones(1) for number, k in enumerate(w) if i >> number & 1}
        w.update(optimizer.apply_gradients(part, w))
    known = optimizer._options.groups
    assert len(_layout._layouts) <= _layout._layouts.most == 64
    assert len(known.rows) <= known.rows.most and len(known.made) <= known.made.most
    # All steps of the first tensor: v = 1 + v / 2.
    velocity = value = 0.0
    for _ in range(100):
        velocity = 1 + velocity / 2
        value -= 0.5 * velocity
    assert w["t0"].item() == pytest.approx(value, rel=2e-7 * 100)  # a rounding a step


def test_a_recent_set_stays_known():
    asked = []
    groups = [(lambda path, array: asked.append(path) or True, {"learning_rate": 0.5})]
    optimizer = optim.SGD(1.0, groups=groups)
    w = {f"t{i}": mx.zeros(1) for i in range(40)}
    for k in w:
        optimizer.apply_gradients({k: mx.ones(1)}, w)
        optimizer.apply_gradients({"t0": mx.ones(1)}, w)  # in between, always
    asked.clear()
    optimizer.apply_gradients({"t0": mx.ones(1)}, w)
    assert asked == []


@pytest.mark.parametrize("slot", SLOTS)
def test_frozen_tensors_are_dropped(slot):
    optimizer = optim.SGD(0.25, **KEEPS[slot])
    parameters = stepped(optimizer, 2)
    optimizer.apply_gradients({"a": parameters["a"]}, parameters)  # b is frozen
    before = optimizer.unpacked_state()
    optimizer.keep_only({"a": parameters["a"]})
    want = {k: v for k, v in before.items() if k != "b"}
    assert_same(optimizer.unpacked_state(), want)
    # Within arenas, too; the others go on.
    optimizer = optim.SGD(0.25, **KEEPS[slot])
    parameters = stepped(optimizer, 2)
    before = optimizer.unpacked_state()
    optimizer.keep_only({"b": [{}, parameters["b"][1]]})
    del before["a"], before["b"][0]["w"]
    assert_same(optimizer.unpacked_state(), before)
    optimizer.apply_gradients(tree(3), parameters)
    optimizer.keep_only({})
    assert optimizer.state.keys() == {"step", "learning_rate"}


def test_dropping_gives_memory_back():
    w = {"large": mx.zeros(1 << 20), "small": mx.zeros(4)}
    optimizer = optim.SGD(0.5, momentum=0.5)
    mx.eval(optimizer.apply_gradients(w, w), optimizer.state)
    before = mx.get_active_memory()
    optimizer.keep_only({"small": w["small"]})
    mx.eval(optimizer.state)
    mx.synchronize()
    assert mx.get_active_memory() < before - 4 * (1 << 20) + 2**16


@pytest.mark.parametrize("slot", SLOTS)
def test_a_slot_that_is_forgotten_begins_anew(slot):
    optimizer = optim.SGD(0.25, **KEEPS[slot])
    parameters = stepped(optimizer, 2)
    loaded = tree_map(lambda a: 0 * a + 2, parameters)
    before = optimizer.unpacked_state()
    optimizer.forget(slot.split()[0])
    optimizer.init(loaded)
    after = optimizer.unpacked_state()
    fresh = optim.SGD(0.25, **KEEPS[slot])
    fresh.init(loaded)
    for path, value in tree_flatten(after):
        is_it = path.endswith("." + SLOTS[slot])
        want = fresh.unpacked_state() if is_it else before
        assert same(value, dict(tree_flatten(want))[path]), path
    optimizer.apply_gradients(tree(2), loaded)
    optimizer.forget(slot.split()[0])  # and without init: a prepared step is not taken
    twin = optim.SGD(0.25, **KEEPS[slot])
    twin.state = optimizer.state
    twin.init(loaded)
    got = optimizer.apply_gradients(tree(3), loaded)
    assert_same(got, twin.apply_gradients(tree(3), loaded))
    assert_same(optimizer.unpacked_state(), twin.unpacked_state())


def test_an_unknown_slot_cannot_be_forgotten():
    optimizer = optim.SGD(0.25, momentum=0.5)
    stepped(optimizer, 1)
    with pytest.raises(ValueError, match=r"^\[SGD\] a slot is unknown: got 'v', allowed 'mom"):
        optimizer.forget("ema", "v")
    assert "v" in optimizer.unpacked_state()["a"]


# ---- Models with data that nobody trains ---------------------------------------------------


def quantized():
    model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 8))
    nn.quantize(model, class_predicate=lambda path, layer: path == "layers.0")
    return model


def loss(model, x):
    return mx.mean(mx.square(model(x)))


def gradients_of_quantized(model, x):
    # MLX compiles its quantized products when they are called; not every GPU machine can.
    with mx.stream(mx.cpu):
        return nn.value_and_grad(model, loss)(model, x)[1]


def test_a_model_with_quantized_layers():
    model, x = quantized(), mx.ones((2, 64))
    state = tree_map(lambda a: a, model.parameters())
    other = quantized()
    other.update(state)
    ours, theirs = optim.SGD(0.1, momentum=0.5), mlx.optimizers.SGD(0.1, momentum=0.5)
    for net, optimizer in ((model, ours), (other, theirs)):
        optimizer.init(net.parameters())
        for _ in range(2):
            optimizer.update(net, gradients_of_quantized(net, x))
    assert_same(model.parameters(), other.parameters())
    moved = optim.SGD(0.1, momentum=0.5)
    moved.state.update(theirs.state)  # which has momentum of integers, too
    moved.init(other.trainable_parameters())
    assert moved.unpacked_state()["layers"][0].keys() == {"bias", "scales", "biases"}
    gradients = gradients_of_quantized(model, x)
    ours.update(model, gradients)
    moved.update(other, gradients)
    assert_same(model.parameters(), other.parameters())


def test_integers_in_init_leave_the_places_of_the_others():
    w = {"l": [mx.array([1, 2]), mx.ones(3), mx.array([True]), mx.ones(2)]}
    optimizer = optim.SGD(1.0, momentum=0.5)
    optimizer.init(w)
    assert [list(kept) for kept in optimizer.unpacked_state()["l"]] == [[], ["v"], [], ["v"]]
    got = optimizer.apply_gradients({"l": [{}, mx.ones(3), {}, mx.ones(2)]}, w)
    assert got["l"][1].tolist() == [0.0] * 3
    # A tree for both, as it is where somebody descends along the parameters themselves.
    both = optimizer.apply_gradients(w, w)
    assert both["l"][0].tolist() == [1, 2] and both["l"][1].tolist() == [-0.5] * 3
    with pytest.raises(ValueError, match=r"^\[SGD\] the gradient at 'l.0' has a dtype"):
        optimizer.apply_gradients({"l": [mx.array([1, 2])]}, w)


# ---- Reading -------------------------------------------------------------------------------


def test_reading_a_path_gives_what_the_arenas_hold():
    optimizer = optim.SGD(0.25, momentum=0.5, ema_decay=0.5)
    parameters = stepped(optimizer, 2)
    unpacked, before = optimizer.unpacked_state(), dict(optimizer.state)
    assert same(optimizer.state["a"]["v"], unpacked["a"]["v"])
    assert same(optimizer.state["b"][1]["w"]["ema"], unpacked["b"][1]["w"]["ema"])
    read = tree_map(lambda p, kept: kept["v"], parameters, optimizer.state)
    assert_same(read, tree_map(lambda p, kept: kept["v"], parameters, unpacked))
    for key in ("c", "v", 0, ""):
        with pytest.raises(KeyError):
            optimizer.state[key]
    # And changes nothing.
    state = optimizer.state
    assert "a" not in state and list(state) == list(before) and state.get("a") is None
    assert all(state[key] is before[key] for key in before)
    assert [k for k, _ in tree_flatten(state)] == [k for k, _ in tree_flatten(before)]
    assert type(copy.deepcopy(state)) is type(pickle.loads(pickle.dumps({}))) is dict
    assert type(tree_map(lambda a: a, state)) is dict
    assert repr(state) == repr(before)


def test_what_is_read_does_not_change_with_later_steps():
    optimizer = optim.SGD(0.25, momentum=0.5)
    parameters = stepped(optimizer, 2)
    held = optimizer.state["a"]["v"]
    bits = of_mlx(held).tobytes()
    stepped(optimizer, 2, parameters)
    assert of_mlx(held).tobytes() == bits


def test_writing_into_what_is_read_is_refused():
    optimizer = optim.SGD(0.25, momentum=0.5)
    stepped(optimizer, 1)
    for change in (
        lambda state: state["a"].update(v=mx.ones((3, 5))),
        lambda state: state["a"].__setitem__("v", mx.ones((3, 5))),
        lambda state: state["b"][0]["w"].pop("v"),
        lambda state: state["b"].__setitem__(0, {}),
    ):
        with pytest.raises((TypeError, AttributeError)):
            change(optimizer.state)


@pytest.mark.parametrize("how", [copy.deepcopy, copy.copy])
def test_copies_of_an_optimizer_can_be_read(how):
    optimizer = optim.SGD(0.25, momentum=0.5)
    parameters = stepped(optimizer, 2)
    other = how(optimizer)
    assert same(other.state["a"]["v"], optimizer.state["a"]["v"])
    assert_same(other.apply_gradients(tree(9), parameters), optim_step(optimizer, parameters))


def optim_step(optimizer, parameters):
    fresh = optim.SGD(0.25, momentum=0.5)
    fresh.state = optimizer.state
    return fresh.apply_gradients(tree(9), parameters)


def test_reading_between_compiled_steps():
    optimizer = optim.SGD(0.25, momentum=0.5)
    parameters = {"w": mx.zeros(2)}
    optimizer.init(parameters)
    state, traces = [parameters, optimizer.state], []

    def step():
        traces.append(1)
        parameters.update(optimizer.apply_gradients({"w": mx.ones(2)}, parameters))

    compiled = mx.compile(step, inputs=state, outputs=state)
    for velocity in (1.0, 1.5, 1.75):
        compiled()
        mx.eval(state)
        assert optimizer.state["w"]["v"].tolist() == [velocity] * 2
    assert len(traces) == 1


def test_describe_says_what_a_state_has(tmp_path):
    optimizer = optim.SGD(0.25, momentum=0.5, master_weights=True, ema_decay=0.5, clip_norm=1.0)
    parameters = stepped(optimizer, 2)
    optimizer.apply_gradients({"a": parameters["a"]}, parameters)
    text = optim.describe(optimizer.state)
    lines = [line.split() for line in text.splitlines()]
    assert lines[0] == ["tensor", "shape", "v", "master", "ema"]
    rows = {line[0]: line[1:] for line in lines[1:4]}
    assert rows == {
        "a": ["(3,", "5)", "float32", "float32"],
        "b.0.w": ["(70,)", "bfloat16", "float32", "float32"],
        "b.1.w": ["(4,)", "bfloat16", "float32", "float32"],
    }
    assert lines[4] == ["3", "tensors", "bytes", "208", "296", "356"]
    assert [line[0] for line in lines[5:]] == ["grad_norm:", "learning_rate:", "step:"]
    assert "layout_" not in text
    path = str(tmp_path / "state.safetensors")
    mx.save_safetensors(path, dict(tree_flatten(optimizer.state)))
    for other in (mx.load(path), optimizer.unpacked_state()):  # in another order
        assert sorted(optim.describe(other).split("\n")) == sorted(text.split("\n"))
    assert optim.describe(optim.SGD(0.5).state).split("\n")[1].split() == ["0", "tensors", "bytes"]
    for bad in (None, [], {"arenas": 3}, {"a": {"x": mx.ones(2)}}):
        with pytest.raises(ValueError, match=r"^\[describe\] .*: got .*, allowed"):
            optim.describe(bad)


# ---- A prepared step ---------------------------------------------------------------------


def test_a_prepared_step_keeps_no_rate_alive():
    """The first one may hang on a whole graph."""
    optimizer = optim.SGD(0.25, momentum=0.5)
    large = mx.ones(1 << 20) * 2
    mx.eval(large)
    optimizer.learning_rate = mx.mean(large)
    optimizer.apply_gradients({"w": mx.ones(2)}, {"w": mx.ones(2)})
    assert optimizer._prepared.step is not None
    optimizer.state = {}
    before = mx.get_active_memory()
    del large
    gc.collect()
    assert mx.get_active_memory() <= before - 4 * (1 << 20)


def test_a_prepared_step_is_not_taken_on_a_state_just_assigned():
    """It would not see that the rest of the state is of another model."""
    optimizer = optim.SGD(0.25, momentum=0.5)
    parameters = {**tree(0), "c": mx.ones(3)}
    optimizer.apply_gradients({"c": mx.ones(3)}, parameters)
    for i in range(2):
        parameters.update(optimizer.apply_gradients(tree(1 + i), parameters))
    _, own = optimizer.state["arenas"]
    optimizer.state = {
        **optimizer.state,
        "arenas": {own: optimizer.state["arenas"][own], **arenas_of({"c": mx.ones(4)})},
    }
    with pytest.raises(ValueError, match=r"another model: got momentum of shape \(4,\) for 'c'"):
        optimizer.apply_gradients(tree(5), parameters)
