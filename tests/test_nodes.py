"""Arenas whose gradients and parameters are there are stepped by one node of the graph, up to 8
and 128 MiB; those that wait, and those of a trace, have a node each. Neither changes a bit, nor
what somebody holds, nor what is written in place."""

import io
import itertools
import threading

import mlx.core as mx
import mlx_fused_optim as optim
import numpy as np
import pytest
from bits import of_mlx, same
from mlx.utils import tree_flatten
from mlx_fused_optim import _ext
from waiting import let_go

MIB = 2**20
# Two tensors an arena, whose limit is 8 MiB.
HALF = (1024, 1000)
OPTIONS = {
    "plain": {},
    "momentum": {"momentum": 0.9, "weight_decay": 0.01},
    "stochastic": {"momentum": 0.9, "state_dtype": mx.bfloat16, "rounding": "stochastic"},
    "measured": {"momentum": 0.9, "clip_norm": 1.0, "skip_nonfinite": True},
    "groups": {"groups": [(lambda path, _: path.endswith("1"), {"learning_rate": 0.5})]},
    "schedule": {"learning_rate": optim.exponential_decay(0.1, 0.5), "ema_decay": 0.5},
}


def nodes(arrays) -> int:
    """Steps in the graph of these arrays."""
    text = io.StringIO()
    mx.export_to_dot(text, *arrays)
    return text.getvalue().count('label ="FusedStep"')


def random(shapes, dtypes=(mx.float32,), seed=0):
    keys = mx.random.split(mx.random.key(seed), len(shapes))
    arrays = [
        mx.random.normal(shape, key=key).astype(dtype)
        for shape, key, dtype in zip(shapes, keys, itertools.cycle(dtypes), strict=False)
    ]
    mx.eval(arrays)
    return {f"p{i}": a for i, a in enumerate(arrays)}


def lazy(gradients):
    return {k: mx.stop_gradient(g) for k, g in gradients.items()}


def in_arenas(optimizer, parameters):
    """After a first step: views of arenas."""
    zeros = {k: mx.broadcast_to(mx.array(0.0), p.shape) for k, p in parameters.items()}
    parameters = optimizer.apply_gradients(zeros, parameters)
    mx.eval(parameters, optimizer.state)
    return parameters


def made(parameters, gradients, **options):
    """Nodes of a step."""
    optimizer = optim.SGD(**{"learning_rate": 0.1, **options})
    parameters = in_arenas(optimizer, parameters)
    mx.eval(gradients)
    parameters = optimizer.apply_gradients(gradients, parameters)
    return nodes(parameters.values())


def arrays_of(state):
    return [a for _, a in tree_flatten(state) if isinstance(a, mx.array)]


def flat(shape):
    return mx.broadcast_to(mx.array(0.25), shape)


def test_arenas_that_wait_for_nothing_are_one_node():
    parameters = random([HALF] * 6)
    gradients = {k: flat(p.shape) for k, p in parameters.items()}
    assert made(parameters, gradients) == 1
    assert made(parameters, gradients, momentum=0.9, clip_norm=1.0) == 1
    optimizer = optim.SGD(0.1)
    parameters = in_arenas(optimizer, parameters)
    for last, expected in [("p5", 2), ("p2", 3), ("p0", 2)]:
        some = {**gradients, last: mx.stop_gradient(gradients[last])}
        assert nodes(optimizer.apply_gradients(some, parameters).values()) == expected
    assert nodes(optimizer.apply_gradients(lazy(gradients), parameters).values()) == 3
    # Neither do parameters that are elsewhere join, nor those of a step that has not been taken.
    copies = {k: p + 1 for k, p in parameters.items()}
    assert nodes(optimizer.apply_gradients(gradients, copies).values()) == 3
    mx.eval(copies)
    assert nodes(optimizer.apply_gradients(gradients, copies).values()) == 3


def test_a_node_has_eight_arenas_of_128_mib_at_most():
    alone = (9 * MIB // 8,)  # 4.5 MiB: two are too large for an arena
    gradients = {f"p{i}": flat(alone) for i in range(9)}
    assert made(random([alone] * 9), gradients) == 2
    assert made(random([alone] * 8), {k: gradients[k] for k in list(gradients)[:8]}) == 1
    large = (10 * MIB,)  # 40 MiB
    assert made(random([large] * 3), {f"p{i}": flat(large) for i in range(3)}) == 1
    assert made(random([large] * 4), {f"p{i}": flat(large) for i in range(4)}) == 2


def test_dtypes_in_turn():
    """A node is of one dtype."""
    alone = (9 * MIB // 8,)
    shapes, dtypes = [alone, (9 * MIB // 4,)] * 3, [mx.float32, mx.bfloat16]
    gradients = {f"p{i}": flat(shape) for i, shape in enumerate(shapes)}
    assert made(random(shapes, dtypes), gradients) == 6
    order = [0, 2, 4, 1, 3, 5]
    parameters = random([shapes[i] for i in order], [mx.float32] * 3 + [mx.bfloat16] * 3)
    assert made(parameters, {f"p{n}": gradients[f"p{i}"] for n, i in enumerate(order)}) == 2


@pytest.mark.parametrize("dtypes", [(mx.float32,), (mx.bfloat16,), (mx.float32, mx.bfloat16)])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_the_bits_are_those_of_a_node_an_arena(options, dtypes):
    """What is there, what is lazy, and some of each; prepared steps too."""
    parameters = random([HALF, (9 * MIB // 8,), (33, 7), HALF, HALF, (3 * MIB // 2,)], dtypes)
    gradients = random([p.shape for p in parameters.values()], seed=1)
    results = []
    for keep_lazy in (gradients, {}, ["p2", "p4"]):
        optimizer = optim.SGD(**{"learning_rate": 0.1, **options})
        current = in_arenas(optimizer, dict(parameters))
        for _ in range(3):
            some = {k: mx.stop_gradient(g) if k in keep_lazy else g for k, g in gradients.items()}
            current = optimizer.apply_gradients(some, current)
            mx.eval(current, optimizer.state)
        results.append([*current.values(), *arrays_of(optimizer.state)])
    assert optimizer.step.item() == 4
    for other in results[1:]:
        assert len(other) == len(results[0])
        assert all(same(a, b) for a, b in zip(results[0], other, strict=True))


HOLDERS = {
    "variable": lambda p, o: p["p2"],
    "view": lambda p, o: p["p3"][5:6],
    "transposed copy": lambda p, o: mx.contiguous(p["p2"].T),
    "lazy": lambda p, o: p["p3"] * 2,
    "momentum": lambda p, o: momentum_of(o)[1],
    "part of a momentum": lambda p, o: momentum_of(o)[1][7:9],
}


def momentum_of(optimizer):
    (entry,) = optimizer.state["arenas"].values()
    return entry["momentum"]


def addresses(parameters, optimizer):
    """Of the parameters' arenas and of the momentum's."""
    arrays = [parameters[f"p{i}"] for i in (0, 2, 4)] + momentum_of(optimizer)
    return [np.asarray(memoryview(a)).__array_interface__["data"][0] for a in arrays]


@pytest.mark.parametrize("name", [None, *HOLDERS])
def test_of_several_arenas_one_is_held(name):
    """It stays, and the others are written in place."""
    optimizer = optim.SGD(0.1, momentum=0.9)
    parameters = in_arenas(optimizer, random([HALF] * 6))
    gradients = {k: flat(HALF) for k in parameters}
    mx.eval(gradients)
    let_go()
    before = addresses(parameters, optimizer)
    let_go()
    holder = HOLDERS[name](parameters, optimizer) if name else mx.array(0.0)
    if name == "lazy":  # as it would have been
        expected = (np.array(parameters["p3"]) * np.float32(2)).view(np.uint32)
    else:
        expected = of_mlx(holder).copy()
    let_go()
    parameters = optimizer.apply_gradients(gradients, parameters)
    mx.eval(parameters, optimizer.state)
    let_go()
    moved = {i for i, b in enumerate(addresses(parameters, optimizer)) if b != before[i]}
    copied = name in (None, "transposed copy")
    assert moved == (set() if copied else {4} if "momentum" in name else {1})
    assert (of_mlx(holder) == expected).all()


def test_a_gradient_that_is_a_parameter_of_another_arena():
    """It is read by the same node that would write it."""
    optimizer, other = (optim.SGD(0.5) for _ in range(2))
    start = random([HALF] * 4)
    parameters, want = in_arenas(optimizer, dict(start)), in_arenas(other, dict(start))

    def gradients(of, turned):
        others = {f"p{i}": of[f"p{(i + 2) % 4}"] for i in range(4)}
        return {k: g[::-1] if turned else g for k, g in others.items()}

    for turned in (False, True):
        some, those = gradients(parameters, turned), gradients(want, turned)
        mx.eval(some, those)
        those = {k: mx.contiguous(g) + 0 for k, g in those.items()}
        parameters = optimizer.apply_gradients(some, parameters)
        del some
        want = other.apply_gradients(those, want)
        mx.eval(parameters, want)
        assert all(same(parameters[k], want[k]) for k in want)


def test_gradients_live_as_long_as_the_step():
    """They are no inputs of the graph: nobody else may hold them, until it is evaluated."""
    optimizer = optim.SGD(1.0)
    parameters = in_arenas(optimizer, {f"p{i}": mx.zeros(HALF) for i in range(4)})
    for turn in range(3):
        gradients = {f"p{i}": mx.full(HALF, float(i + turn)) for i in range(4)}
        mx.eval(gradients)
        let_go()
        before = mx.get_active_memory()
        new = optimizer.apply_gradients(gradients, parameters)
        del gradients
        noise = [mx.full(HALF, 77.0) for _ in range(4)]
        mx.eval(noise)
        del noise
        assert mx.get_active_memory() >= before - MIB
        mx.eval(new)
        let_go()
        # The old parameters are held, so that the new ones have taken the gradients' place.
        assert mx.get_active_memory() <= before + MIB
        change = {
            k: (p - n)[0, 0].item()
            for (k, n), p in zip(new.items(), parameters.values(), strict=True)
        }
        assert change == {f"p{i}": float(i + turn) for i in range(4)}
        parameters.clear()
        parameters.update(new)


def test_gradients_live_until_the_device_has_read_them():
    """Nobody holds them when the step is under way, which is late: it waits for its rate."""
    optimizer = optim.SGD(1.0)
    parameters = in_arenas(optimizer, {f"p{i}": mx.zeros(HALF) for i in range(4)})
    gradients = {f"p{i}": mx.full(HALF, float(i)) for i in range(4)}
    mx.eval(gradients)
    slow = mx.random.normal((1000, 1000))
    for _ in range(8):
        slow = slow @ slow * 1e-3
    state = optim.fused_sgd_init(parameters)
    rate = mx.where(mx.sum(slow) > 1e30, 0.0, 1.0)
    new, _ = optim.fused_sgd_step(parameters, gradients, state, learning_rate=rate)
    assert nodes(new.values()) == 1
    del gradients
    mx.async_eval(new)
    with mx.stream(mx.new_stream(mx.default_device())):
        noise = [mx.full(HALF, 77.0) for _ in range(8)]
        mx.eval(noise)
    for i in range(4):
        assert mx.all(new[f"p{i}"] == -float(i)).item()


@pytest.mark.parametrize("nobody_takes", ["momentum", "parameters"])
def test_what_nobody_takes_lives_until_the_device_has_written_it(nobody_takes):
    """Its memory would be somebody else's meanwhile."""
    parameters = in_arenas(optim.SGD(1.0), {f"p{i}": mx.zeros(HALF) for i in range(4)})
    gradients = {f"p{i}": mx.full(HALF, float(i)) for i in range(4)}
    state = optim.fused_sgd_init(parameters, momentum=0.5)
    mx.eval(gradients, state)
    slow = mx.random.normal((1000, 1000))
    for _ in range(8):
        slow = slow @ slow * 1e-3
    rate = mx.where(mx.sum(slow) > 1e30, 0.0, 1.0)
    new, state = optim.fused_sgd_step(
        parameters, gradients, state, learning_rate=rate, momentum=0.5
    )
    assert nodes(new.values()) == 1
    taken = list(new.values()) if nobody_takes == "momentum" else arrays_of(state)
    del new, state
    mx.async_eval(taken)
    with mx.stream(mx.new_stream(mx.default_device())):
        noise = [mx.full((2 * HALF[0], HALF[1]), 77.0) for _ in range(4)]  # an arena's size
        mx.eval(noise)
    mx.eval(taken)
    assert all(mx.all(x == 77.0).item() for x in noise)


def test_parameters_that_wait_while_others_of_their_step_go_on():
    """They have the values of their step whenever they are asked for."""
    optimizer = optim.SGD(1.0, momentum=0.5)
    parameters = in_arenas(optimizer, {f"p{i}": mx.zeros(HALF) for i in range(6)})
    gradients = {f"p{i}": mx.full(HALF, float(i + 1)) for i in range(6)}
    mx.eval(gradients)
    kept = []
    for _ in range(4):
        parameters = optimizer.apply_gradients(gradients, parameters)
        kept.append(parameters)
        mx.eval(parameters["p0"], optimizer.state)
        if len(kept) == 2:
            mx.eval(parameters)
    velocity = value = 0.0
    for parameters in kept:
        velocity = 0.5 * velocity + 1.0
        value -= velocity
        assert all(mx.all(parameters[f"p{i}"] == value * (i + 1)).item() for i in range(6))


def test_a_parameter_that_waits_holds_its_own_arena_alone():
    """The others of its step are written in place."""
    optimizer = optim.SGD(0.1)
    parameters = in_arenas(optimizer, random([HALF] * 6))
    gradients = {k: flat(HALF) for k in parameters}
    mx.eval(gradients)
    let_go()
    held = (parameters[f"p{i}"] for i in (2, 4))
    before = [np.asarray(memoryview(p)).__array_interface__["data"][0] for p in held]
    kept = []
    for _ in range(3):
        parameters = optimizer.apply_gradients(gradients, parameters)
        kept.append(parameters["p0"])
        mx.eval([parameters[f"p{i}"] for i in range(2, 6)])
        let_go()
    held = (parameters[f"p{i}"] for i in (2, 4))
    assert before == [np.asarray(memoryview(p)).__array_interface__["data"][0] for p in held]


def test_a_rate_that_waits_holds_no_parameters():
    """It is an output of a step whose others are evaluated."""
    optimizer = optim.SGD(optim.exponential_decay(1.0, 0.5), momentum=0.5)
    parameters = in_arenas(optimizer, {f"p{i}": mx.zeros(HALF) for i in range(4)})
    gradients = {f"p{i}": mx.full(HALF, float(i)) for i in range(4)}
    mx.eval(gradients)
    rates, used = [], []
    for _ in range(6):
        new = optimizer.apply_gradients(gradients, parameters)
        assert nodes(new.values()) == 1
        parameters = new
        del new
        mx.eval(parameters, optimizer.state["arenas"], optimizer.step)
        rates.append(optimizer.learning_rate)
        let_go()
        used.append(mx.get_active_memory())
    assert max(used[2:]) - used[2] < HALF[0] * HALF[1] * 4
    assert [rate.item() for rate in rates] == [0.5**i for i in range(1, 7)]


@pytest.mark.parametrize("shapeless", [False, True])
def test_a_node_that_a_compiled_function_captures(shapeless):
    """It is evaluated with each call, from what it was made of."""
    optimizer = optim.SGD(1.0, momentum=0.5)
    parameters = in_arenas(optimizer, {f"p{i}": mx.zeros(HALF) for i in range(4)})
    gradients = {f"p{i}": mx.full(HALF, float(i)) for i in range(4)}
    mx.eval(gradients)
    new = optimizer.apply_gradients(gradients, parameters)
    del gradients
    assert nodes(new.values()) == 1
    function = mx.compile(lambda x: [x + mx.max(n) for n in new.values()], shapeless=shapeless)
    for x in range(3):
        assert [y.item() for y in function(mx.array(float(x)))] == [x - float(i) for i in range(4)]
    assert all(p[0, 0].item() == 0 for p in parameters.values())


def test_calls_that_wait_for_a_captured_node():
    """A call's numbers are those of the step, whatever another one has made meanwhile; and what
    nobody has taken (momentum, here) does not stay."""
    optimizer = optim.SGD(1.0, momentum=0.5)
    parameters = in_arenas(optimizer, {f"p{i}": mx.zeros(HALF) for i in range(4)})
    gradients = {f"p{i}": mx.full(HALF, float(i)) for i in range(4)}
    mx.eval(gradients)
    new = optimizer.apply_gradients(gradients, parameters)
    assert nodes(new.values()) == 1
    function = mx.compile(lambda x: [n + x for n in new.values()])
    calls = [function(mx.array(float(x))) for x in range(3)]
    mx.eval(calls)
    for x, call in enumerate(calls):
        for i, n in enumerate(call):
            assert mx.all(n == x - i).item()
    del calls, call, n
    few = mx.compile(lambda x: new["p1"] + x)
    mx.eval(few(mx.array(1.0)))
    let_go()
    before = mx.get_active_memory()
    for _ in range(10):
        mx.eval(few(mx.array(1.0)))
    let_go()
    assert mx.get_active_memory() < before + 4 * HALF[0] * HALF[1] * 4


def partly_evaluated(**options):
    """A step of one node, of which somebody has looked at one parameter."""
    optimizer = optim.SGD(**{"learning_rate": 1.0, "momentum": 0.5, **options})
    parameters = in_arenas(optimizer, {f"p{i}": mx.zeros(HALF) for i in range(4)})
    gradients = {f"p{i}": mx.full(HALF, float(i)) for i in range(4)}
    mx.eval(gradients)
    new = optimizer.apply_gradients(gradients, parameters)
    assert nodes(new.values()) == 1
    mx.eval(new["p0"])
    return optimizer, new


@pytest.mark.parametrize("shapeless", [False, True])
def test_a_compiled_function_captures_a_node_that_is_partly_evaluated(shapeless):
    """Each call asks for the same arrays of the same evaluation."""
    _, new = partly_evaluated()
    function = mx.compile(lambda x: [n + x for n in new.values()], shapeless=shapeless)
    for x in range(3):
        for i, n in enumerate(function(mx.array(float(x)))):
            assert mx.all(n == x - i).item()
    assert all(mx.all(n == -i).item() for i, n in enumerate(new.values()))


def test_an_evaluation_that_fails_takes_nothing():
    """Another thread has no such stream: MLX throws when it comes to a view."""
    _, new = partly_evaluated()
    errors = []

    def evaluate():
        try:
            mx.eval(new)
        except RuntimeError as error:
            errors.append(error)

    thread = threading.Thread(target=evaluate)
    thread.start()
    thread.join()
    assert errors
    assert all(mx.all(n == -i).item() for i, n in enumerate(new.values()))


def test_a_number_that_is_kept_holds_no_arenas():
    """The counter of a step whose parameters were evaluated, and which nobody has asked for."""
    parameters = random([HALF] * 4)
    gradients = random([HALF] * 4, seed=1)
    numbers = {"learning_rate": optim.exponential_decay(0.1, 0.9), "momentum": 0.9}
    state = optim.fused_sgd_init(parameters, momentum=0.9)
    for _ in range(2):
        parameters, state = optim.fused_sgd_step(parameters, gradients, state, **numbers)
        mx.eval(parameters, state)
    let_go()
    before, kept = mx.get_active_memory(), []
    for _ in range(4):
        new, after = optim.fused_sgd_step(parameters, gradients, state, **numbers)
        assert nodes(new.values()) == 1
        mx.eval(new)
        kept.append(after["step"])
        del new, after
    let_go()
    assert mx.get_active_memory() < before + MIB


def test_what_a_captured_node_makes_for_nobody_goes():
    optimizer = optim.SGD(1.0, momentum=0.5)
    parameters = in_arenas(optimizer, random([HALF] * 4))
    gradients = random([HALF] * 4, seed=1)
    new = optimizer.apply_gradients(gradients, parameters)
    function = mx.compile(lambda x: new["p1"][0, 0] + x)
    let_go()
    before = mx.get_active_memory()
    mx.eval(function(mx.array(1.0)))
    let_go()
    assert mx.get_active_memory() < before + MIB


def test_a_loop_that_evaluates_parameters_only_has_one_node_a_step():
    optimizer = optim.SGD(0.1, momentum=0.9)
    parameters = in_arenas(optimizer, random([HALF] * 6))
    gradients = {k: flat(HALF) for k in parameters}
    mx.eval(gradients)
    for _ in range(4):
        parameters = optimizer.apply_gradients(gradients, parameters)
        assert nodes(parameters.values()) == 1
        mx.eval(parameters)


@pytest.mark.parametrize("shapeless", [False, True])
def test_a_node_of_views_that_a_compiled_function_captures(shapeless):
    start = {"a": mx.full((4, 4), 2.0)}
    total = optim.accumulate_gradients(optim.accumulate_gradients(None, start), start)
    new = optim.SGD(0.5).apply_gradients(total, start)
    function = mx.compile(lambda x: new["a"] + x, shapeless=shapeless)
    for x in range(3):
        assert (function(mx.array(float(x))) == x).all()


@pytest.mark.parametrize("transform", ["compile", "grad", "jvp", "vmap"])
def test_a_trace_has_a_node_an_arena(transform):
    """Also of arrays that do not depend on what is traced."""
    optimizer = optim.SGD(0.1)
    parameters = in_arenas(optimizer, random([HALF] * 4))
    gradients = {k: flat(HALF) for k in parameters}
    mx.eval(gradients)
    init, step = optim.fused_sgd_init, optim.fused_sgd_step
    seen = []

    def function(x):
        new, _ = step(parameters, gradients, init(parameters), learning_rate=0.1)
        seen.append(nodes(new.values()))
        return x * sum(p[0, 0] for p in new.values())

    one = mx.array(2.0)
    result = {
        "compile": lambda: mx.compile(function)(one) / 2,
        "grad": lambda: mx.grad(function)(one),
        "jvp": lambda: mx.jvp(function, [one], [mx.array(1.0)])[1][0],
        "vmap": lambda: mx.vmap(function)(mx.ones(2))[0],
    }[transform]()
    want = sum((p[0, 0] - 0.1 * 0.25).item() for p in parameters.values())
    assert abs(result.item() - want) < 1e-5
    assert seen == [2]


# ---- Gradients that are views of flat arrays -------------------------------------------


def views_of_flat(gradients, *parts):
    """As views that nothing has evaluated, of a flat array for each part."""
    views = {}
    for names in parts:
        arrays = [gradients[name] for name in names]
        rows = [(name, array.shape, array.dtype) for name, array in zip(names, arrays, strict=True)]
        ends = list(itertools.accumulate(-(-a.size // 128) * 128 for a in arrays))
        begins = [0, *ends[:-1]]
        arena = (arrays[0].dtype, ends[-1], list(range(len(names))), begins, False, 0, 0)
        layout = _ext.Layout(rows, [arena])
        (packed,) = _ext.pack_arrays(arrays, layout)
        mx.eval(packed)
        views |= zip(names, _ext.tensors_of([mx.stop_gradient(packed)], layout), strict=True)
    return {**gradients, **views}


ALL = [f"p{i}" for i in range(6)]


def test_arenas_that_wait_for_the_same_flat_arrays_are_one_node():
    parameters = random([HALF] * 6)
    gradients = random([HALF] * 6, seed=1)
    optimizer = optim.SGD(0.1)
    parameters = in_arenas(optimizer, parameters)

    def made(*parts, **others):
        views = {**views_of_flat(gradients, *parts), **others}
        return nodes(optimizer.apply_gradients(views, parameters).values())

    assert made(ALL) == 1
    assert made(ALL[:2], ALL[2:]) == 2
    assert made(ALL[:3], ALL[3:]) == 2  # the second arena has some of both, the third of one
    assert made(ALL[:1], ALL[1:]) == 1
    assert made(ALL[2:]) == 2  # the first is there
    assert made(ALL, p3=mx.stop_gradient(gradients["p3"])) == 3
    assert made([ALL[0], *ALL[2:]]) == 2  # one of the first is there, the other a view


FLAT_OPTIONS = {**OPTIONS, "8bit": {"momentum": 0.9, "state_dtype": "8bit"}}


@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16], ids=str)
@pytest.mark.parametrize("options", FLAT_OPTIONS.values(), ids=FLAT_OPTIONS)
def test_the_bits_are_those_of_arrays(options, dtype):
    """Of views that are together, in parts, some of them views, and some turned."""
    shapes = [HALF, (9 * MIB // 8,), (33, 7), (64, 48), (1001, 1000), (3 * MIB // 2,)]
    parameters = random(shapes, [mx.float32, mx.bfloat16])
    gradients = random([p.shape for p in parameters.values()], [dtype], seed=1)
    turned = {"p3": mx.contiguous(gradients["p3"].T).T}
    mx.eval(turned)

    def given(number):
        if number == 0:
            return gradients
        parts = [(ALL,), (ALL[:2], ALL[2:]), (ALL[1:3], [ALL[4]])][number - 1]
        return views_of_flat(gradients, *parts) | (turned if number == 3 else {})

    results = []
    for number in range(4):
        optimizer = optim.SGD(**{"learning_rate": 0.1, **options})
        current = in_arenas(optimizer, dict(parameters))
        for _ in range(3):
            current = optimizer.apply_gradients(given(number), current)
            mx.eval(current, optimizer.state)
        results.append([*current.values(), *arrays_of(optimizer.state)])
    for other in results[1:]:
        assert len(other) == len(results[0])
        assert all(same(a, b) for a, b in zip(results[0], other, strict=True))


def test_views_that_a_step_did_not_make_have_their_values_later():
    gradients = random([HALF] * 6, seed=1)
    optimizer = optim.SGD(0.1, momentum=0.9)
    parameters = in_arenas(optimizer, random([HALF] * 6))
    views = views_of_flat(gradients, ALL)
    for _ in range(2):
        parameters = optimizer.apply_gradients(views, parameters)
        mx.eval(parameters, optimizer.state)
    assert all(same(views[k], gradients[k]) for k in gradients)


def test_gradients_that_are_views_of_the_parameters():
    """What is read is not written, whether the step before has been taken or not."""
    start, gradients = random([HALF] * 4), random([HALF] * 4, seed=1)
    for is_taken in (False, True):
        optimizer, other = (optim.SGD(0.5) for _ in range(2))
        parameters, want = in_arenas(optimizer, dict(start)), in_arenas(other, dict(start))
        parameters = optimizer.apply_gradients(gradients, parameters)
        want = other.apply_gradients(gradients, want)
        mx.eval(want)
        if is_taken:
            mx.eval(parameters)
        parameters = optimizer.apply_gradients({k: parameters[k] for k in parameters}, parameters)
        want = {k: p - 0.5 * p for k, p in want.items()}
        assert all(same(parameters[k], want[k]) for k in want)


def test_traced_views_are_made():
    """A compiled step has its gradients as inputs: they are others in the next call."""
    parameters, optimizer = random([HALF] * 6), optim.SGD(0.1)
    layout_rows = [random([HALF] * 6, seed=seed) for seed in (1, 2)]

    def step(parameters, gradients):
        gradients = optim.accumulate_gradients(gradients, gradients)
        return optimizer.apply_gradients(gradients, parameters)

    compiled = mx.compile(step)
    for gradients in layout_rows:
        want, got = step(parameters, gradients), compiled(parameters, gradients)
        assert all(same(got[k], want[k]) for k in want)

    def loss(gradients):
        stepped = step(parameters, gradients)
        return sum(a.sum() for a in stepped.values())

    for k, slope in mx.grad(loss)(layout_rows[0]).items():
        assert mx.allclose(slope, mx.full(HALF, -0.2)), k
