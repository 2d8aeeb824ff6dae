"""Memory: what anybody can still see never changes, and what nobody can is reused.

The step writes into the memory of the old parameters and the old momentum exactly when
nobody else holds it. Here are the ways to hold it, each with its bits compared before and
after, and then the steps in which nobody does, with MLX's own count of the bytes.
"""

import copy
import gc
import threading

import mlx.core as mx
import mlx.optimizers
import mlx_fused_optim as optim
import numpy as np
import pytest
from bits import of_mlx, same
from mlx.utils import tree_flatten, tree_map
from mlx_fused_optim import _ext
from waiting import comes_true, let_go

SHAPES = {"a": (33, 8), "b": (700,), "c": ()}
OPTIONS = {"momentum": 0.9, "weight_decay": 0.01}


class Run:
    """Parameters that are views of an arena, and an optimizer that may write in place."""

    def __init__(self):
        mx.random.seed(0)
        self.optimizer = optim.SGD(0.1, **OPTIONS)
        self.parameters = {name: mx.random.normal(shape) + 3 for name, shape in SHAPES.items()}
        self.step()

    def step(self, times=1):
        for _ in range(times):
            let_go()  # of the step before, and of the views whose addresses were asked for
            # No local variable, here or in a caller, may hold the old parameters.
            self.parameters = self.optimizer.apply_gradients(gradients(), self.parameters)
            mx.eval(self.parameters, self.optimizer.state)


def gradients():
    return {name: mx.full(shape, 0.25) for name, shape in SHAPES.items()}


def address(array: mx.array) -> int:
    return np.asarray(memoryview(array)).__array_interface__["data"][0]


def momentum_of(optimizer) -> mx.array:
    (entry,) = optimizer.state["arenas"].values()
    (arena,) = entry["momentum"]
    return arena


def test_control_nobody_holds_and_it_is_in_place():
    """Without this the tests below would pass with a step that never writes in place."""
    run = Run()

    def addresses():
        arrays = [*run.parameters.values(), momentum_of(run.optimizer)]
        return [address(array) for array in arrays]

    before = addresses()
    run.step(3)
    assert addresses() == before
    held = run.parameters["c"]
    run.step()
    after = addresses()
    assert after[:3] != before[:3]
    assert after[3] == before[3]
    del held


# ---- Holders of parameters -----------------------------------------------------------

HOLDERS = {
    "variable": lambda p: p["a"],
    "another array of the arena": lambda p: p["c"],
    "shallow copy of the tree": dict,
    "tree_map identity": lambda p: tree_map(lambda x: x, p),
    "tree_flatten": lambda p: tree_flatten(p),
    "copy.copy": lambda p: copy.copy(p["a"]),
    "copy.deepcopy": copy.deepcopy,
    "reshape": lambda p: p["a"].reshape(8, 33),
    "transpose": lambda p: p["a"].T,
    "row": lambda p: p["a"][5:6],  # of one number, MLX makes a copy
    "odd slice": lambda p: p["b"][3:698:5],
    "reversed": lambda p: p["b"][::-1],
    "broadcast": lambda p: mx.broadcast_to(p["c"], (4, 4)),
    "flatten": lambda p: p["a"].flatten(),
    "same dtype astype": lambda p: p["a"].astype(mx.float32),
    "bit view": lambda p: p["a"].view(mx.uint32),
    "lazy sum": lambda p: p["b"] + 1,
    "lazy view of a view": lambda p: p["a"].T[1:3].reshape(-1),
    "stop_gradient": lambda p: mx.stop_gradient(p["b"]),
    "dlpack": lambda p: np.from_dlpack(p["a"]),
    "numpy without a copy": lambda p: np.array(p["a"], copy=False),
    "memoryview": lambda p: memoryview(p["b"]),
    "memoryview of a slice": lambda p: memoryview(p["b"][7:90]),
    "capsule": lambda p: p["b"].__dlpack__(),
}


def snapshot(holder):
    if isinstance(holder, mx.array):
        return [of_mlx(holder).copy()]
    if isinstance(holder, (np.ndarray, memoryview)):
        return [np.array(holder, copy=True)]
    return [of_mlx(leaf).copy() for _, leaf in tree_flatten(holder) if isinstance(leaf, mx.array)]


def stays(holder, run, expected):
    run.step(2)
    for before, now in zip(expected, snapshot(holder), strict=True):
        assert before.tobytes() == now.tobytes()


@pytest.mark.parametrize("evaluated", [True, False], ids=["evaluated", "lazy"])
@pytest.mark.parametrize("name", HOLDERS)
def test_a_held_parameter_stays(name, evaluated):
    run = Run()
    # The expected bits come from an equal run, so that looking does not hold anything.
    twin = Run().parameters
    expected = snapshot(HOLDERS[name](twin))
    holder = HOLDERS[name](run.parameters)
    if evaluated and not isinstance(holder, (np.ndarray, memoryview)) and name != "capsule":
        mx.eval(holder)
    stays(holder, run, expected)
    if name == "capsule":

        class Exporter:
            def __dlpack__(self, **_):
                return holder

            def __dlpack_device__(self):
                return (1, 0)

        now = np.from_dlpack(Exporter())
        assert now.tobytes() == of_mlx(twin["b"]).tobytes()


def test_a_held_row_of_the_only_tensor_stays():
    """Alone in its arena, a tensor enters the graph as it is: the uses of its memory count."""
    optimizer = optim.SGD(0.5)
    ones = {"a": mx.ones((4, 64))}
    parameters = optimizer.apply_gradients(ones, ones)
    row = parameters["a"][1:2]
    mx.eval(parameters, row)
    let_go()
    parameters = optimizer.apply_gradients(ones, parameters)
    mx.eval(parameters)
    assert row.tolist() == [[0.5] * 64]
    assert parameters["a"].tolist() == [[0.0] * 64] * 4


@pytest.mark.parametrize("names", ["a", "ab"], ids=["one tensor", "two tensors"])
def test_parameters_transposed_in_their_place(names):
    """They begin where the arena has them, and nobody else holds them, but in another order."""
    optimizer = optim.SGD(1.0)
    first = mx.arange(64.0).reshape(8, 8)
    parameters = optimizer.apply_gradients(
        dict.fromkeys(names, -first), dict.fromkeys(names, first)
    )
    parameters = {name: p.T for name, p in parameters.items()}
    mx.eval(parameters)
    let_go()
    gradients = {name: mx.arange(64.0).reshape(8, 8) for name in names}
    parameters = optimizer.apply_gradients(gradients, parameters)
    for p in parameters.values():
        assert same(p, 2 * first.T - first)


def test_numpy_of_one_parameter_survives_the_tree():
    """The NumPy view holds its array alone; the arena must outlive the other views."""
    run = Run()
    view = np.array(run.parameters["b"], copy=False)
    before = view.copy()
    run.step(3)
    del run
    gc.collect()
    mx.clear_cache()
    noise = mx.eval([mx.full((700,), 7.0) for _ in range(20)])
    assert noise is None
    assert np.array_equal(view, before)


def test_the_gradient_is_the_parameter_itself():
    run = Run()
    parameters, optimizer = run.parameters, run.optimizer
    expected = {name: of_mlx(p) for name, p in parameters.items()}
    reference = mlx.optimizers.SGD(0.1, **OPTIONS)
    reference.state = optimizer.unpacked_state()
    reference.state = tree_map(lambda x: mx.array(np.array(x)), reference.state)
    want = reference.apply_gradients(dict(parameters), dict(parameters))
    mx.eval(want)
    held = dict(parameters)
    got = optimizer.apply_gradients(held, parameters)
    mx.eval(got)
    for name, bits in expected.items():
        assert np.array_equal(of_mlx(held[name]), bits)
        assert same(got[name], want[name])


def test_the_gradient_is_a_view_of_the_parameter_and_nothing_else_holds_it():
    """An alias inside the step: the arena must not be written while it is read as gradient."""
    run = Run()
    values = np.array(run.parameters["b"])
    velocity = np.array(run.optimizer.unpacked_state()["b"]["v"])
    reversed_view = run.parameters["b"][::-1]
    rest = {k: mx.zeros(SHAPES[k]) for k in ("a", "c")}
    run.parameters = run.optimizer.apply_gradients({**rest, "b": reversed_view}, run.parameters)
    del reversed_view
    mx.eval(run.parameters)
    f = np.float32
    g = values[::-1] + f(0.01) * values
    want = values - f(0.1) * (f(0.9) * velocity + g)
    assert np.array_equal(np.array(run.parameters["b"]), want)


def test_the_same_array_twice_in_the_tree():
    """Tied weights: two leaves, one array, each its own result."""
    shared = mx.arange(300, dtype=mx.float32) + 1
    optimizer = optim.SGD(0.5, momentum=0.9)
    tree = {"one": shared, "two": shared, "three": shared[None]}
    before = of_mlx(shared)
    grads = {"one": mx.full((300,), 1.0), "two": mx.full((300,), 2.0), "three": mx.ones((1, 300))}
    reference = mlx.optimizers.SGD(0.5, momentum=0.9)
    want = tree
    for _ in range(4):
        tree = optimizer.apply_gradients(grads, tree)
        want = reference.apply_gradients(grads, want)
        mx.eval(tree, want)
    assert all(same(tree[k], want[k]) for k in tree)
    assert np.array_equal(of_mlx(shared), before)
    # Tied again mid-run: both leaves are one view of the arena now.
    tree = {"one": tree["one"], "two": tree["one"], "three": tree["three"]}
    want = {"one": want["one"], "two": want["one"], "three": want["three"]}
    tree = optimizer.apply_gradients(grads, tree)
    want = reference.apply_gradients(grads, want)
    assert all(same(tree[k], want[k]) for k in tree)


def test_leaves_swapped_mid_run():
    """Views of the right arena at the wrong places are not the arena."""
    names = ("a", "b", "c")  # the first stays in its place
    parameters = {name: mx.full((64,), i + 1.0) for i, name in enumerate(names)}
    grads = {name: mx.full((64,), 0.5 / (i + 1)) for i, name in enumerate(names)}
    optimizer, reference = optim.SGD(0.1, momentum=0.9), mlx.optimizers.SGD(0.1, momentum=0.9)
    want = parameters
    for _ in range(4):
        parameters = optimizer.apply_gradients(grads, parameters)
        want = reference.apply_gradients(grads, want)
        for tree in (parameters, want):
            tree["b"], tree["c"] = tree["c"], tree["b"]
        mx.eval(parameters, want, optimizer.state)
    assert all(same(parameters[k], want[k]) for k in want)


@pytest.mark.parametrize("device", ["default", "cpu"])
def test_a_pending_slow_operation_on_a_second_stream(device):
    """It still reads the old parameter while the step wants to write."""
    if device == "cpu" and mx.cuda.is_available() and mx.default_device().type == mx.gpu:
        pytest.skip("MLX 0.32.4 can deadlock where the GPU waits for a CPU stream: docs/cuda.md")
    run = Run()
    expected = of_mlx(Run().parameters["b"])
    second = mx.new_stream(mx.cpu if device == "cpu" else mx.default_device())
    with mx.stream(second):
        slow = mx.random.normal((700, 700))
        for _ in range(6):
            slow = slow @ slow * 1e-3
        # Waits for `slow`, then reads the old parameter.
        late = mx.where(mx.sum(slow) > 1e30, 0.0, run.parameters["b"])
    mx.async_eval(late)
    run.step(3)
    assert np.array_equal(of_mlx(late), expected)
    assert not np.array_equal(of_mlx(run.parameters["b"]), expected)


def test_async_eval_in_flight():
    run, twin = Run(), Run()
    for _ in range(10):
        run.parameters = run.optimizer.apply_gradients(gradients(), run.parameters)
        mx.async_eval(run.parameters, run.optimizer.state)
    kept = run.parameters
    for _ in range(3):
        run.parameters = run.optimizer.apply_gradients(gradients(), run.parameters)
        mx.async_eval(run.parameters, run.optimizer.state)
    twin.step(10)
    assert all(same(kept[k], twin.parameters[k]) for k in kept)
    twin.step(3)
    assert all(same(run.parameters[k], twin.parameters[k]) for k in kept)
    assert same(momentum_of(run.optimizer), momentum_of(twin.optimizer))


# ---- Holders of momentum -----------------------------------------------------------------

STATE_HOLDERS = {
    "the arena": momentum_of,
    "tree_map identity": lambda o: tree_map(lambda x: x, o.state),
    "tree_flatten": lambda o: tree_flatten(o.state),
    "deepcopy of the state": lambda o: copy.deepcopy(o.state),
    "unpacked_state": lambda o: o.unpacked_state(),
    "one unpacked view": lambda o: o.unpacked_state()["b"]["v"],
    "lazy": lambda o: momentum_of(o) * 2,
    "slice": lambda o: momentum_of(o)[3:40],
    "numpy": lambda o: np.array(momentum_of(o), copy=False),
    "memoryview": lambda o: memoryview(momentum_of(o)),
    "step": lambda o: o.step,
    "learning rate": lambda o: o.learning_rate,
}


@pytest.mark.parametrize("name", STATE_HOLDERS)
def test_a_held_state_stays(name):
    run = Run()
    expected = snapshot(STATE_HOLDERS[name](Run().optimizer))
    stays(STATE_HOLDERS[name](run.optimizer), run, expected)


@pytest.mark.parametrize("rate", [0.1, optim.exponential_decay(0.1, 0.5)], ids=["number", "device"])
def test_a_held_learning_rate_and_step_stay(rate):
    optimizer = optim.SGD(rate)
    seen = []
    for _ in range(4):
        optimizer.update({}, {})
        seen.append((optimizer.step, optimizer.learning_rate))
    factor = 0.5 if callable(rate) else 1.0
    for number, (counter, used) in enumerate(seen):
        assert counter.item() == number + 1
        assert used.item() == np.float32(0.1 * factor**number)


def test_deepcopied_runs_go_separate_ways():
    run, alone = Run(), Run()
    other = copy.deepcopy(run)
    run.step(3)
    other.step(2)
    alone.step(2)
    for k in SHAPES:
        assert same(other.parameters[k], alone.parameters[k])
    assert same(momentum_of(other.optimizer), momentum_of(alone.optimizer))
    alone.step()
    for k in SHAPES:
        assert same(run.parameters[k], alone.parameters[k])
    assert same(momentum_of(run.optimizer), momentum_of(alone.optimizer))


@pytest.mark.parametrize("copied", [copy.copy, copy.deepcopy])
def test_what_is_set_on_a_copy_is_not_set_on_the_original(copied):
    one, two = (optim.SGD(0.5, momentum=0.5), optim.SGD(optim.cosine_decay(0.5, 9), momentum=0.5))
    for run in (one, two):
        other = copied(run)
        other.momentum, other.weight_decay = 0.25, optim.cosine_decay(0.1, 9)
        other.learning_rate, other.clip_norm = optim.cosine_decay(0.25, 9), 1.0
        assert (run.momentum, run.weight_decay, run.clip_norm) == (0.5, 0.0, None)
        w = {"w": mx.ones(1)}
        run.apply_gradients(w, w)
        assert (run.learning_rate.item(), run.step.item(), other.step.item()) == (0.5, 1, 0)
        assert (other.momentum, other.learning_rate.item()) == (0.25, 0.25)


def test_two_optimizers_from_the_same_parameters():
    run = Run()
    parameters, optimizer = run.parameters, run.optimizer
    other = optim.SGD(0.2)
    start = {k: of_mlx(p) for k, p in parameters.items()}
    one = optimizer.apply_gradients(gradients(), parameters)
    two = other.apply_gradients(gradients(), parameters)
    mx.eval(one, two)
    for k, bits in start.items():
        assert np.array_equal(of_mlx(parameters[k]), bits)
        values = bits.view(np.float32)
        assert np.array_equal(np.array(two[k]), values - np.float32(0.2) * np.float32(0.25))
        assert not np.array_equal(np.array(one[k]), np.array(two[k]))


def test_going_back_to_a_snapshot():
    """The pure functions: a step from an old state gives the old result."""
    w = {"w": mx.arange(1000, dtype=mx.float32)}
    g = {"w": mx.ones(1000)}
    state = optim.fused_sgd_init(w, momentum=0.9)
    history = [(w, state)]
    for _ in range(3):
        w, state = optim.fused_sgd_step(w, g, state, learning_rate=0.1, momentum=0.9)
        mx.eval(w, state)
        history.append((w, state))
    again = [history[0]]
    for w, state in history[:-1]:
        again.append(optim.fused_sgd_step(w, g, state, learning_rate=0.1, momentum=0.9))
    for (w1, s1), (w2, s2) in zip(history, again, strict=True):
        assert same(w1["w"], w2["w"])
        for (_, a), (_, b) in zip(tree_flatten(s1), tree_flatten(s2), strict=True):
            assert same(a, b)


# ---- Holders of the full step's parameters and slots ------------------------------------------

FULL = {
    **OPTIONS,
    "state_dtype": mx.float32,
    "clip_norm": 1e3,
    "skip_nonfinite": True,
    "ema_decay": 0.5,
}
RECORDS = {
    "master": {"master_weights": True},
    "byte": {"master_weights": "24bit"},
    "compensation": {"compensated": True},
}
SLOT_OF = {"byte": "master"}  # others are called so


class FullRun(Run):
    """The same with every slot: parameters of bfloat16 in one arena."""

    def __init__(self, record):
        mx.random.seed(0)
        self.optimizer = optim.SGD(2.0**-7, **FULL, **RECORDS[record])
        self.parameters = {
            name: (mx.random.normal(shape) + 3).astype(mx.bfloat16)
            for name, shape in SHAPES.items()
        }
        self.step()


def slot_of(optimizer, slot) -> mx.array:
    (entry,) = optimizer.state["arenas"].values()
    (arena,) = entry[slot]
    return arena


def full_addresses(run, record):
    slots = ("momentum", SLOT_OF.get(record, record), "ema")
    return [
        *(address(p.view(mx.uint16) if p.ndim else p[None].view(mx.uint16))
          for p in run.parameters.values()),
        *(address(slot_of(run.optimizer, s).view(mx.uint8)) for s in slots),
    ]  # fmt: skip


@pytest.mark.parametrize("record", RECORDS)
def test_control_a_full_step_is_in_place(record):
    run = FullRun(record)
    before = full_addresses(run, record)
    run.step(3)
    assert full_addresses(run, record) == before
    for number, slot in enumerate(("momentum", SLOT_OF.get(record, record), "ema")):
        held = slot_of(run.optimizer, slot)
        run.step()
        after = full_addresses(run, record)
        assert [i for i in range(6) if after[i] != before[i]] == [3 + number]
        before = after
        del held


SLOT_HOLDERS = {
    "the arena": slot_of,
    "lazy": lambda o, slot: slot_of(o, slot).astype(mx.float32) * 2,
    "slice": lambda o, slot: slot_of(o, slot)[3:40],
    "bit view": lambda o, slot: slot_of(o, slot).view(mx.uint8),
    "tree_map identity": lambda o, slot: tree_map(lambda x: x, o.state),
    "deepcopy of the state": lambda o, slot: copy.deepcopy(o.state),
    "unpacked_state": lambda o, slot: o.unpacked_state(),
    "one unpacked view": lambda o, slot: o.unpacked_state()["b"].get(slot, o.skipped),
    "averages": lambda o, slot: o.ema_parameters(),
    "averages in float32": lambda o, slot: o.ema_parameters(mx.float32)["b"],
    "memoryview": lambda o, slot: memoryview(slot_of(o, slot).view(mx.uint16)),
    "norm and count": lambda o, slot: [o.grad_norm, o.skipped],
}


@pytest.mark.parametrize("evaluated", [True, False], ids=["evaluated", "lazy"])
@pytest.mark.parametrize("slot", ["momentum", *RECORDS, "ema"])
@pytest.mark.parametrize("name", SLOT_HOLDERS)
def test_a_held_slot_stays(name, slot, evaluated):
    record = slot if slot in RECORDS else "master"
    slot = SLOT_OF.get(slot, slot)
    run = FullRun(record)
    expected = snapshot(SLOT_HOLDERS[name](FullRun(record).optimizer, slot))
    holder = SLOT_HOLDERS[name](run.optimizer, slot)
    if evaluated and not isinstance(holder, memoryview):
        mx.eval(holder)
    stays(holder, run, expected)
    # The run itself goes on as one that nobody looked at.
    twin = FullRun(record)
    twin.step(2)
    for k in SHAPES:
        assert same(run.parameters[k], twin.parameters[k])
    for own in ("momentum", SLOT_OF.get(record, record), "ema"):
        assert same(slot_of(run.optimizer, own), slot_of(twin.optimizer, own))


@pytest.mark.parametrize("record", RECORDS)
@pytest.mark.parametrize("name", ["variable", "row", "lazy sum", "shallow copy of the tree"])
def test_a_held_parameter_of_a_full_step_stays(name, record):
    run = FullRun(record)
    expected = snapshot(HOLDERS[name](FullRun(record).parameters))
    stays(HOLDERS[name](run.parameters), run, expected)


def test_a_held_parameter_that_is_a_slot_too():
    """Averages of one float32 tensor that begin as the very array of the parameter."""
    w = {"w": mx.arange(64, dtype=mx.float32)}
    optimizer = optim.SGD(0.5, ema_decay=0.5)
    optimizer.init(w)
    bits = of_mlx(w["w"])
    new = optimizer.apply_gradients({"w": mx.ones(64)}, w)
    assert np.array_equal(of_mlx(w["w"]), bits)
    assert new["w"].tolist() == [i - 0.5 for i in range(64)]
    assert optimizer.ema_parameters()["w"].tolist() == [i - 0.25 for i in range(64)]


# ---- Tracers -------------------------------------------------------------------------------


@pytest.mark.parametrize("first", ["parameters", "state"])
def test_values_inside_a_gradient_trace_stay(first):
    """mx.eval inside mx.grad: the graph still needs every intermediate value.

    Which of a step's results is evaluated first must not matter to the way back.
    """
    state_first = first == "state"
    run = Run()
    parameters, optimizer = run.parameters, run.optimizer
    state = optimizer.state

    def loss(w):
        first, s = optim.fused_sgd_step(
            w, {k: v * 2 for k, v in w.items()}, state, learning_rate=0.1, momentum=0.9
        )
        mx.eval(s if state_first else first)
        mx.eval(first, s)
        before = {k: of_mlx(v) for k, v in first.items()}
        second, _ = optim.fused_sgd_step(
            first, {k: v * v for k, v in first.items()}, s, learning_rate=0.1, momentum=0.9
        )
        mx.eval(second)
        for k, bits in before.items():
            assert np.array_equal(of_mlx(first[k]), bits)
        return sum(v.sum() for v in second.values())

    gradient = mx.grad(loss)(parameters)
    # dp2/dp0, with p1 = p0 - lr (mu v0 + 2 p0), v1 = mu v0 + 2 p0,
    # p2 = p1 - lr (mu v1 + p1^2):  (1 - 2 lr)(1 - 2 lr p1) - 2 lr mu.
    for k, v in optimizer.unpacked_state().items():
        if k in SHAPES:
            p0, v0 = np.array(parameters[k], np.float64), np.array(v["v"], np.float64)
            p1 = p0 - 0.1 * (0.9 * v0 + 2 * p0)
            want = (1 - 0.2) * (1 - 0.2 * p1) - 0.2 * 0.9
            np.testing.assert_allclose(np.array(gradient[k]), want, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("transform", ["compile", "checkpoint", "grad", "vjp", "jvp"])
def test_inputs_of_a_transformed_step_stay(transform):
    run = Run()
    parameters, optimizer = run.parameters, run.optimizer
    state = optimizer.state
    expected = {k: of_mlx(p) for k, p in parameters.items()}
    momentum = of_mlx(momentum_of(optimizer))

    def total(w):
        new, _ = optim.fused_sgd_step(w, w, state, learning_rate=0.1, momentum=0.9)
        return sum(v.sum() for v in new.values())

    def flat(a, b, c):
        return total({"a": a, "b": b, "c": c})

    arrays = [parameters[k] for k in ("a", "b", "c")]
    run = {
        "compile": lambda: mx.compile(flat)(*arrays),
        "checkpoint": lambda: mx.grad(mx.checkpoint(flat))(*arrays),
        "grad": lambda: mx.grad(flat, argnums=[0, 1, 2])(*arrays),
        "vjp": lambda: mx.vjp(flat, arrays, [mx.array(1.0)]),
        "jvp": lambda: mx.jvp(flat, arrays, [mx.ones_like(a) for a in arrays]),
    }[transform]
    for _ in range(2):
        mx.eval(run())
    for k, bits in expected.items():
        assert np.array_equal(of_mlx(parameters[k]), bits)
    assert np.array_equal(of_mlx(momentum_of(optimizer)), momentum)


def test_a_compiled_step_leaves_what_is_held():
    run = Run()
    parameters, optimizer = run.parameters, run.optimizer
    state = [parameters, optimizer.state]

    def body():
        parameters.update(optimizer.apply_gradients(gradients(), parameters))

    compiled = mx.compile(body, inputs=state, outputs=state)
    for _ in range(4):
        held = [*parameters.values(), momentum_of(optimizer), optimizer.step]
        bits = [of_mlx(a) for a in held]
        compiled()
        mx.eval(state)
        assert all(np.array_equal(of_mlx(a), b) for a, b in zip(held, bits, strict=True))


# ---- Memory is reused --------------------------------------------------------------------

# Far above the few hundred bytes of counters and rates, far below any tensor here.
SLACK = 32 * 1024
BIG = {"a": (256, 512), "b": (128, 999), "c": (1, 75_001)}


def big_run(dtype=mx.float32, rate=0.1, **options):
    parameters = {k: mx.random.normal(s).astype(dtype) for k, s in BIG.items()}
    grads = {k: mx.random.normal(s).astype(dtype) for k, s in BIG.items()}
    optimizer = optim.SGD(rate, **options)
    mx.eval(parameters, grads)
    return parameters, grads, optimizer


def new_bytes(body) -> int:
    """Bytes by which memory peaked above what was in use before."""
    mx.synchronize()
    gc.collect()
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    body()
    mx.synchronize()
    return mx.get_peak_memory() - before


@pytest.mark.parametrize("dtype", [mx.float32, mx.float16, mx.bfloat16], ids=str)
@pytest.mark.parametrize("rate", [0.1, optim.exponential_decay(0.1, 0.9)], ids=["number", "device"])
@pytest.mark.parametrize("options", [{}, OPTIONS, {"momentum": 0.9, "nesterov": True}], ids=str)
def test_an_eager_step_needs_no_new_memory(dtype, rate, options):
    parameters, grads, optimizer = big_run(dtype, rate, **options)

    def run():
        nonlocal parameters
        parameters = optimizer.apply_gradients(grads, parameters)
        mx.eval(parameters, optimizer.state)

    run()  # moves into the arena
    run()
    assert [new_bytes(run) < SLACK for _ in range(3)] == [True] * 3
    kept = parameters["c"]
    assert new_bytes(run) >= kept.nbytes  # the control: one held tensor costs its arena


def test_a_functional_step_needs_no_new_memory():
    parameters, grads, _ = big_run()
    state = optim.fused_sgd_init(parameters, momentum=0.9)

    def run():
        nonlocal parameters, state
        parameters, state = optim.fused_sgd_step(
            parameters, grads, state, learning_rate=0.1, momentum=0.9
        )
        mx.eval(parameters, state)

    run()
    run()
    assert new_bytes(run) < SLACK


@pytest.mark.parametrize("rate", [0.1, optim.exponential_decay(0.1, 0.9)], ids=["number", "device"])
def test_a_compiled_step_needs_no_new_memory(rate):
    parameters, grads, optimizer = big_run(rate=rate, **OPTIONS)
    optimizer.init(parameters)
    state = [parameters, optimizer.state]

    def body(g):
        parameters.update(optimizer.apply_gradients(g, parameters))

    compiled = mx.compile(body, inputs=state, outputs=state)

    def run():
        compiled(grads)
        mx.eval(state)

    run()
    run()
    assert [new_bytes(run) < SLACK for _ in range(3)] == [True] * 3


def test_several_arenas_need_no_new_memory():
    """Mixed dtypes: each arena is donated by itself."""
    parameters, grads, optimizer = big_run(**OPTIONS)
    dtypes = {"a": mx.float32, "b": mx.float16, "c": mx.bfloat16}
    parameters = {k: p.astype(dtypes[k]) for k, p in parameters.items()}

    def run():
        nonlocal parameters
        parameters = optimizer.apply_gradients(grads, parameters)
        mx.eval(parameters, optimizer.state)

    run()
    run()
    assert new_bytes(run) < SLACK
    kept = parameters["b"]
    assert parameters["b"].nbytes <= new_bytes(run) < parameters["a"].nbytes
    del kept


def test_memory_does_not_grow_over_many_steps():
    run = Run()
    run.step(2)
    before = mx.get_active_memory()
    run.step(200)
    assert comes_true(lambda: mx.get_active_memory() - before < 4096)


def test_everything_is_freed():
    gc.collect()
    mx.synchronize()
    before = mx.get_active_memory()
    parameters, grads, optimizer = big_run(**OPTIONS)
    for _ in range(3):
        parameters = optimizer.apply_gradients(grads, parameters)
        mx.eval(parameters, optimizer.state)
    del parameters, grads, optimizer
    gc.collect()
    assert comes_true(lambda: mx.get_active_memory() - before < SLACK)


def test_holding_from_another_thread():
    """A thread that takes and drops references while steps run never sees a change.

    It takes evaluated arrays only: two threads that evaluate one graph crash MLX itself.
    """
    run = Run()
    evaluated = [run.parameters]
    failures, looks = [], 0
    stop = threading.Event()

    def watch():
        nonlocal looks
        while not stop.is_set():
            views = [np.array(v, copy=False) for v in evaluated[0].values()]
            copies = [v.copy() for v in views]
            looks += 1
            if not all(np.array_equal(v, c) for v, c in zip(views, copies, strict=True)):
                failures.append(looks)
            del views

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        for _ in range(300):
            run.step()
            evaluated[0] = run.parameters
    finally:
        stop.set()
        thread.join()
    assert failures == []
    assert looks > 0


@pytest.mark.parametrize("dtype", [mx.float32, mx.float16, mx.bfloat16], ids=str)
@pytest.mark.parametrize("begins", [(0, 320, 1024), (1, 270, 975), (4, 268, 972)], ids=str)
@pytest.mark.parametrize("state", [None, "8bit"])
def test_gradients_that_are_views_nobody_has_made(dtype, begins, state):
    """They are read where they lie, at any place of what they are views of; and are there later."""
    given = mx.random.normal((1100,), key=mx.random.key(1)).astype(dtype)
    places = dict(zip(SHAPES, begins, strict=True))

    def views(flat):
        return {name: _ext.arena_view(flat, shape, places[name]) for name, shape in SHAPES.items()}

    made = views(given)
    mx.eval(given, made)
    options = {**OPTIONS, **({} if state is None else {"state_dtype": state, "min_8bit_size": 0})}
    ours, other = (optim.SGD(0.1, **options) for _ in range(2))
    start = {name: mx.random.normal(s, key=mx.random.key(2)) + 3 for name, s in SHAPES.items()}
    got, want = start, start
    for _ in range(3):
        lazy = views(mx.stop_gradient(given))
        got, want = ours.apply_gradients(lazy, got), other.apply_gradients(made, want)
        mx.eval(got, want, ours.state, other.state)
        assert all(same(got[name], want[name]) for name in SHAPES)
    assert all(same(lazy[name], made[name]) for name in SHAPES)
