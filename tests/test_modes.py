"""The ways to run a step: eager, lazy, compiled, asynchronous, on streams, in threads; and
the transformations: grad, jvp, vjp, vmap, checkpoint, export."""

import threading

import mlx.core as mx
import mlx.optimizers
import mlx_fused_optim as optim
import numpy as np
import pytest
from bits import of_mlx, same
from mlx.utils import tree_flatten
from mlx_fused_optim import _ext

SHAPES = {"a": (33, 8), "b": (700,), "c": (), "d": (0, 3)}
CUDA = mx.is_available(mx.gpu) and not mx.metal.is_available()
if CUDA:
    # MLX 0.32.4 on CUDA divides by zero where it compiles operations on an empty array.
    del SHAPES["d"]
OPTIONS = [
    {},
    {"momentum": 0.9, "dampening": 0.3, "weight_decay": 0.01},
    {"momentum": 0.9, "nesterov": True},
    {"momentum": 0.9, "state_dtype": "8bit", "min_8bit_size": 64},
]
RATES = {
    "number": 0.1,
    "schedule": optim.exponential_decay(0.1, 0.7),
    "callable": lambda step: 0.1 / (1 + step.astype(mx.float32)),
}
every_option = pytest.mark.parametrize("options", OPTIONS, ids=str)
every_rate = pytest.mark.parametrize("rate", RATES.values(), ids=RATES)


def first_parameters():
    mx.random.seed(1)
    return {name: mx.random.normal(shape) + 2 for name, shape in SHAPES.items()}


def gradient_of(parameters):
    """Depends on the parameters, so that an error would spread."""
    return {name: 0.5 * p + 0.25 for name, p in parameters.items()}


def eager(steps, rate, options):
    """The truth of this file; tests/test_conformance.py holds it against NumPy and MLX."""
    parameters, optimizer = first_parameters(), optim.SGD(rate, **options)
    for _ in range(steps):
        parameters = optimizer.apply_gradients(gradient_of(parameters), parameters)
        mx.eval(parameters, optimizer.state)
    return parameters, optimizer


def assert_same_run(parameters, optimizer, want_parameters, want_optimizer):
    for name in SHAPES:
        assert same(parameters[name], want_parameters[name]), name
    state = dict(tree_flatten(optimizer.state))
    want = dict(tree_flatten(want_optimizer.state))
    assert state.keys() == want.keys()
    for name in want:
        assert same(state[name], want[name]), name


# ---- When and where it runs ------------------------------------------------------------


@every_rate
@every_option
def test_lazy_over_several_steps(options, rate):
    parameters, optimizer = first_parameters(), optim.SGD(rate, **options)
    for _ in range(5):
        parameters = optimizer.apply_gradients(gradient_of(parameters), parameters)
    mx.eval(parameters, optimizer.state)
    assert_same_run(parameters, optimizer, *eager(5, rate, options))


def test_the_state_may_stay_unevaluated():
    """Evaluating the parameters alone is enough, and nothing piles up."""
    rate, options = RATES["schedule"], OPTIONS[1]
    parameters, optimizer = first_parameters(), optim.SGD(rate, **options)
    for _ in range(50):
        parameters = optimizer.apply_gradients(gradient_of(parameters), parameters)
        mx.eval(parameters)
    assert_same_run(parameters, optimizer, *eager(50, rate, options))


@every_rate
def test_async_eval(rate):
    options = OPTIONS[1]
    parameters, optimizer = first_parameters(), optim.SGD(rate, **options)
    for _ in range(8):
        parameters = optimizer.apply_gradients(gradient_of(parameters), parameters)
        mx.async_eval(parameters, optimizer.state)
    assert_same_run(parameters, optimizer, *eager(8, rate, options))


@every_rate
@every_option
def test_a_chosen_stream(options, rate):
    stream = mx.new_stream(mx.cpu)
    parameters, optimizer = first_parameters(), optim.SGD(rate, **options)
    for number in range(5):
        gradients = gradient_of(parameters)
        if number % 2:  # back and forth between two streams
            with mx.stream(stream):
                parameters = optimizer.apply_gradients(gradients, parameters)
        else:
            parameters = optimizer.apply_gradients(gradients, parameters)
        if CUDA:
            # Not mx.async_eval: MLX 0.32.4 can deadlock where the GPU waits for a CPU
            # stream, with any operations (docs/cuda.md).
            mx.eval(parameters, optimizer.state)
            mx.synchronize()
        elif number > 1:
            mx.async_eval(parameters)
    assert_same_run(parameters, optimizer, *eager(5, rate, options))


def test_the_stream_of_the_function():
    stream = mx.new_stream(mx.cpu)
    w, g = mx.arange(5000, dtype=mx.float32), mx.ones(5000)
    state = optim.fused_sgd_init(w, momentum=0.9)
    other_w, other_state = w, state
    for _ in range(3):
        w, state = optim.fused_sgd_step(w, g, state, learning_rate=0.1, momentum=0.9, stream=stream)
        other_w, other_state = optim.fused_sgd_step(
            other_w, g, other_state, learning_rate=0.1, momentum=0.9
        )
    assert same(w, other_w)
    for (_, a), (_, b) in zip(tree_flatten(state), tree_flatten(other_state), strict=True):
        assert same(a, b)


def test_two_threads():
    """Each trains its own model on its own stream; the results are the sequential ones."""
    jobs = [(RATES["schedule"], OPTIONS[1]), (0.05, OPTIONS[2])]
    got, errors = [None, None], []
    # All on the CPU: a GPU draws other random numbers, and an array in its memory must
    # not first be read by two threads at once (docs/cuda.md).
    with mx.stream(mx.cpu):
        want = [eager(30, *job) for job in jobs]
        # Large enough that both use the pool of helper threads at the same time.
        big = mx.arange(200_000, dtype=mx.float32) * 1e-3
        mx.eval(big)

    def train(number, rate, options):
        try:
            stream = mx.new_stream(mx.cpu)
            with mx.stream(stream):
                parameters, optimizer = first_parameters(), optim.SGD(rate, **options)
                extra, extra_optimizer = {"w": big + 0}, optim.SGD(0.1, momentum=0.9)
                for _ in range(30):
                    parameters = optimizer.apply_gradients(gradient_of(parameters), parameters)
                    extra = extra_optimizer.apply_gradients({"w": big}, extra)
                    mx.eval(parameters, optimizer.state, extra)
                got[number] = (parameters, optimizer, np.array(extra["w"]))
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=train, args=(i, *job)) for i, job in enumerate(jobs)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
    for (parameters, optimizer, _), expected in zip(got, want, strict=True):
        assert_same_run(parameters, optimizer, *expected)
    w, v = np.array(big), np.zeros(200_000, np.float32)
    for _ in range(30):
        v = np.float32(0.9) * v + np.array(big)
        w = w - np.float32(0.1) * v
    assert np.array_equal(got[0][2], w)
    assert np.array_equal(got[1][2], w)


# ---- mx.compile -------------------------------------------------------------------------


def compiled_run(steps, rate, options, *, init, shapeless=False, set_rate=None):
    parameters, optimizer = first_parameters(), optim.SGD(rate, **options)
    if init:
        optimizer.init(parameters)
    state = [parameters, optimizer.state]

    def body(scale):
        if set_rate is not None:
            optimizer.learning_rate = set_rate * scale
        gradients = gradient_of(parameters)
        parameters.update(optimizer.apply_gradients(gradients, parameters))

    compiled = mx.compile(body, inputs=state, outputs=state, shapeless=shapeless)
    for number in range(steps):
        compiled(mx.array(float(number + 1)))
        mx.eval(state)
    return parameters, optimizer


@pytest.mark.parametrize("shapeless", [False, True])
@pytest.mark.parametrize("init", [True, False], ids=["after init", "first step inside"])
@every_rate
@every_option
def test_compiled(options, rate, init, shapeless):
    """Captured state; the gradients are what MLX compiles, so they are compared loosely."""
    parameters, optimizer = compiled_run(5, rate, options, init=init, shapeless=shapeless)
    want_parameters, want_optimizer = eager(5, rate, options)
    # gradient_of fuses two operations: one rounding may differ in each of five steps.
    for name in SHAPES:
        np.testing.assert_allclose(
            np.array(parameters[name]), np.array(want_parameters[name]), rtol=5e-6
        )
    assert optimizer.step.item() == 5
    assert optimizer.learning_rate.item() == pytest.approx(want_optimizer.learning_rate.item())


@pytest.mark.parametrize("shapeless", [False, True])
@every_rate
@every_option
def test_compiled_has_the_bits_of_eager(options, rate, shapeless):
    """With gradients from outside: the step itself."""
    parameters, optimizer = first_parameters(), optim.SGD(rate, **options)
    eager_parameters, eager_optimizer = first_parameters(), optim.SGD(rate, **options)
    optimizer.init(parameters)
    state = [parameters, optimizer.state]

    def body(gradients):
        parameters.update(optimizer.apply_gradients(gradients, parameters))

    compiled = mx.compile(body, inputs=state, outputs=state, shapeless=shapeless)
    mx.random.seed(4)
    for _ in range(5):
        gradients = {name: mx.random.normal(shape) for name, shape in SHAPES.items()}
        compiled(gradients)
        eager_parameters = eager_optimizer.apply_gradients(gradients, eager_parameters)
        mx.eval(state, eager_parameters)
    assert_same_run(parameters, optimizer, eager_parameters, eager_optimizer)


def test_two_compiled_steps_of_many_tensors_of_one_shape():
    """MLX makes one node of equivalent nodes: views of one arena differ by where they begin."""
    count = 17  # more than the views of two nodes
    tensors = [mx.full((3,), float(i)) for i in range(count)]

    def two_steps(tensors):
        optimizer = optim.SGD(0.5)
        for _ in range(2):
            tensors = optimizer.apply_gradients(tensors, tensors)
        return tensors

    got = mx.compile(two_steps)(tensors)
    assert [t.tolist() for t in got] == [[0.25 * i] * 3 for i in range(count)]


def test_two_schedules_of_one_step_in_a_compiled_function():
    """Nodes of one kind and one input, with other values."""
    one, half = optim.cosine_decay(1.0, 8), optim.cosine_decay(0.5, 8)
    difference = mx.compile(lambda step: one(step) - half(step))
    assert difference(mx.array(4, mx.uint64)).item() == 0.25


def test_the_learning_rate_set_inside_a_compiled_step():
    options = OPTIONS[1]
    parameters, optimizer = compiled_run(4, 0.1, options, init=True, set_rate=0.01)
    want, want_optimizer = first_parameters(), mlx.optimizers.SGD(0.1, **options)
    for number in range(4):
        want_optimizer.learning_rate = 0.01 * mx.array(float(number + 1))
        want = want_optimizer.apply_gradients(gradient_of(want), want)
    for name in SHAPES:
        np.testing.assert_allclose(np.array(parameters[name]), np.array(want[name]), rtol=5e-6)
    assert optimizer.learning_rate.item() == np.float32(0.01) * np.float32(4)


def test_the_learning_rate_set_between_compiled_steps():
    """The rate is part of the captured state, not of the compiled graph."""
    w, optimizer = {"w": mx.zeros(3)}, optim.SGD(0.5)
    state = [w, optimizer.state]

    def body():
        w.update(optimizer.apply_gradients({"w": mx.ones(3)}, w))

    compiled = mx.compile(body, inputs=state, outputs=state)
    compiled()
    optimizer.learning_rate = 0.25
    compiled()
    assert w["w"].tolist() == [-0.75] * 3
    assert optimizer.learning_rate.item() == 0.25
    assert optimizer.step.item() == 2


def test_compiled_once_for_every_batch_size():
    """shapeless=True. The gradient is of |x w - 1|^2 / 2, written by hand: MLX's own
    value_and_grad inside a shapeless compile corrupts memory when the batch changes."""
    traces = []
    w, optimizer = {"w": mx.ones((6, 2))}, optim.SGD(RATES["schedule"], momentum=0.9)
    want, want_optimizer = {"w": mx.ones((6, 2))}, optim.SGD(RATES["schedule"], momentum=0.9)
    optimizer.init(w)
    state = [w, optimizer.state]

    def gradient(w, x):
        return {"w": x.T @ (x @ w["w"] - 1)}

    def body(x):
        traces.append(x.shape)
        w.update(optimizer.apply_gradients(gradient(w, x), w))

    compiled = mx.compile(body, inputs=state, outputs=state, shapeless=True)
    for batch in (8, 8, 5, 16):
        x = mx.sin(mx.arange(batch * 6, dtype=mx.float32)).reshape(batch, 6) / batch
        compiled(x)
        want = want_optimizer.apply_gradients(gradient(want, x), want)
        mx.eval(state, want)
    assert len(traces) == 1
    np.testing.assert_allclose(np.array(w["w"]), np.array(want["w"]), rtol=1e-6)
    assert optimizer.step.item() == 4


def test_compiled_with_a_model():
    """The loop of MLX's documentation; twenty steps towards a line."""
    import mlx.nn as nn

    mx.random.seed(5)
    model = nn.Linear(6, 2)
    mx.eval(model.parameters())
    optimizer = optim.SGD(optim.exponential_decay(0.1, 0.99), momentum=0.9)
    state = [model.state, optimizer.state]
    x = mx.random.normal((32, 6))
    y = x[:, :2] * 2 - 1

    def loss():
        return mx.mean((model(x) - y) ** 2)

    @lambda body: mx.compile(body, inputs=state, outputs=state)
    def step():
        value, gradients = nn.value_and_grad(model, loss)()
        optimizer.update(model, gradients)
        return value

    losses = []
    for _ in range(60):
        losses.append(step().item())
        mx.eval(state)
    assert losses[-1] < 0.05 * losses[0]
    assert optimizer.step.item() == 60


@pytest.mark.parametrize("w, g", [(5, 5), (5, 4), (4, 5)])
def test_shapeless_says_why_parameters_cannot_change_shape(w, g):
    def body(w, g):
        return optim.fused_sgd_step(w, g, optim.fused_sgd_init(w), learning_rate=0.1)[0]

    compiled = mx.compile(body, shapeless=True)
    assert compiled(mx.ones(4), mx.ones(4)).tolist() == [np.float32(0.9)] * 4
    with pytest.raises(ValueError, match=r"\[fused_step\] a shapeless compiled step"):
        mx.eval(compiled(mx.ones(w), mx.ones(g)))


def test_compiled_first_step_then_eager_then_compiled():
    """State goes in and out of a compiled step."""
    parameters, optimizer = first_parameters(), optim.SGD(RATES["schedule"], **OPTIONS[1])
    state = [parameters, optimizer.state]
    want, want_optimizer = first_parameters(), optim.SGD(RATES["schedule"], **OPTIONS[1])

    def body(gradients):
        parameters.update(optimizer.apply_gradients(gradients, parameters))

    compiled = mx.compile(body, inputs=state, outputs=state)
    for number in range(6):
        gradients = {name: mx.full(shape, 0.5) for name, shape in SHAPES.items()}
        (body if number in (2, 3) else compiled)(gradients)
        want = want_optimizer.apply_gradients(gradients, want)
        mx.eval(state, want)
    assert_same_run(parameters, optimizer, want, want_optimizer)


def test_the_pure_function_compiled():
    @mx.compile
    def body(w, state):
        for _ in range(2):
            w, state = optim.fused_sgd_step(
                w, {"w": mx.ones(300)}, state,
                learning_rate=RATES["schedule"], momentum=0.9,
            )  # fmt: skip
        return w, state

    w = eager_w = {"w": mx.arange(300, dtype=mx.float32)}
    state = eager_state = optim.fused_sgd_init(w, momentum=0.9)
    for _ in range(3):
        w, state = body(w, state)
        for _ in range(2):
            eager_w, eager_state = optim.fused_sgd_step(
                eager_w, {"w": mx.ones(300)}, eager_state,
                learning_rate=RATES["schedule"], momentum=0.9,
            )  # fmt: skip
    assert same(w["w"], eager_w["w"])
    assert state["step"].item() == 6
    for (_, a), (_, b) in zip(tree_flatten(state), tree_flatten(eager_state), strict=True):
        assert same(a, b)


# ---- Differentiation ----------------------------------------------------------------------

# One step in float64, and what it depends on. The gradient of each is compared with central
# differences of this function, which are good to some 1e-9 here.
MU, DECAY, DAMPENING = 0.9, 0.01, 0.25


def step_float64(w, g, v, rate, nesterov):
    g = g + DECAY * w
    v = MU * v + (1.0 if nesterov else 1.0 - DAMPENING) * g
    return w - rate * (g + MU * v if nesterov else v), v


def setting(nesterov):
    random = np.random.default_rng(2)
    w, g, v = (random.standard_normal(7).astype(np.float32) for _ in range(3))
    options = {"momentum": MU, "weight_decay": DECAY, "nesterov": nesterov}
    if not nesterov:
        options["dampening"] = DAMPENING

    def ours(w, g, v, rate):
        state = {
            "step": mx.array(3, mx.uint64),
            "learning_rate": mx.array(0.0),
            "v": v,
        }
        state = optim.fused_sgd_init(w, momentum=MU, state=state)
        new, state = optim.fused_sgd_step(w, g, state, learning_rate=rate, **options)
        optimizer = optim.SGD(rate, **options)
        optimizer.state = state
        return new, optimizer.unpacked_state()["v"]

    return (w, g, v, np.float32(0.3)), ours


def differences(function, arguments, direction, h=1e-5):
    plus = function(*(a + h * d for a, d in zip(arguments, direction, strict=True)))
    minus = function(*(a - h * d for a, d in zip(arguments, direction, strict=True)))
    return [(p - m) / (2 * h) for p, m in zip(plus, minus, strict=True)]


@pytest.mark.parametrize("nesterov", [False, True])
def test_jvp(nesterov):
    values, ours = setting(nesterov)
    random = np.random.default_rng(3)
    direction = [np.asarray(random.standard_normal(np.shape(v)), np.float32) for v in values]
    (_, tangents) = mx.jvp(ours, [mx.array(v) for v in values], [mx.array(d) for d in direction])
    doubles = [np.asarray(v, np.float64) for v in values]
    want = differences(
        lambda *a: step_float64(*a, nesterov), doubles, [np.float64(d) for d in direction]
    )
    for got, expected in zip(tangents, want, strict=True):
        np.testing.assert_allclose(np.array(got), expected, rtol=2e-5, atol=2e-6)


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("nesterov", [False, True])
def test_vjp_and_grad(nesterov, compiled):
    values, ours = setting(nesterov)
    random = np.random.default_rng(4)
    weights = [random.standard_normal(7).astype(np.float32) for _ in range(2)]

    def loss(*arguments):
        return sum(
            (mx.array(c) * out).sum() for c, out in zip(weights, ours(*arguments), strict=True)
        )

    gradient = mx.grad(loss, argnums=[0, 1, 2, 3])
    if compiled:
        gradient = mx.compile(gradient)
    got = gradient(*(mx.array(v) for v in values))

    def loss64(*arguments):
        return [
            sum(
                (c * out).sum()
                for c, out in zip(weights, step_float64(*arguments, nesterov), strict=True)
            )
        ]

    doubles = [np.asarray(v, np.float64) for v in values]
    for number, value in enumerate(doubles):
        want = np.zeros_like(value)
        for index in np.ndindex(value.shape):
            direction = [np.zeros_like(d) for d in doubles]
            direction[number][index] = 1
            (want[index],) = differences(loss64, doubles, direction)
        np.testing.assert_allclose(np.array(got[number]), want, rtol=2e-5, atol=2e-6)


def test_a_view_of_an_arena_takes_a_tangent_with_strides():
    """The tangent's memory is not laid out as the arena's."""
    tangent = mx.arange(20.0)[::2]
    _, (view,) = mx.jvp(lambda a: _ext.arena_view(a, [2, 3], 1), [mx.zeros(10)], [tangent])
    assert view.tolist() == [[2.0, 4.0, 6.0], [8.0, 10.0, 12.0]]


def test_gradient_through_parameters_that_are_evaluated_on_the_way():
    """They have values in an arena's memory, and are still what is differentiated."""

    def loss(w):
        optimizer = optim.SGD(0.5)
        for _ in range(2):
            w = optimizer.apply_gradients(w, w)
            mx.eval(w)
        return sum(value.sum() for value in w.values())

    gradient = mx.grad(loss)({"a": mx.ones(3), "b": mx.ones(2)})
    assert gradient["a"].tolist() == [0.25] * 3
    assert gradient["b"].tolist() == [0.25] * 2


def test_second_derivative():
    """Of the loss after a step, as in meta-learning: f(w - r f'(w)) with f = w^3."""
    w = mx.array([0.5, -1.0, 2.0])

    def after(w):
        gradient = 3 * w**2
        new, _ = optim.fused_sgd_step(w, gradient, optim.fused_sgd_init(w), learning_rate=0.1)
        return (new**3).sum()

    first = mx.grad(after)
    second = mx.grad(lambda w: first(w).sum())(w)
    x = np.array(w, np.float64)
    u, du, ddu = x - 0.3 * x**2, 1 - 0.6 * x, -0.6
    np.testing.assert_allclose(np.array(second), 6 * u * du**2 + 3 * u**2 * ddu, rtol=1e-5)


def test_gradient_of_the_learning_rate_through_training():
    """Two steps on f = w^2 / 2: w2 = w0 (1 - r)^2, so dw2/dr = -2 w0 (1 - r)."""

    def final(rate):
        w = {"w": mx.array([1.0, -2.0])}
        optimizer = optim.SGD(rate)
        for _ in range(2):
            w = optimizer.apply_gradients(w, w)
        return w["w"].sum()

    got = mx.grad(final)(mx.array(0.25)).item()
    assert got == pytest.approx(-2 * -1.0 * 0.75, rel=1e-6)


def test_gradient_of_the_learning_rate_past_a_counter():
    """The second step's counter comes of the first step, and has no derivative."""
    w, momentum = mx.array([1.0, -2.0]), optim.linear_schedule(0.5, 0.25, 1)

    def after(rate):
        new, state = w, optim.fused_sgd_init(w, momentum=momentum)
        for _ in range(2):
            new, state = optim.fused_sgd_step(
                new, new, state, learning_rate=rate, momentum=momentum
            )
        return (new / w).sum()

    # v = w, then m w + (1 - r) w with m = 1/4: two times w ((1 - r)^2 - r m).
    got = mx.grad(after)(mx.array(0.125))
    assert got.item() == 2 * (-2 * (1 - 0.125) - 0.25)


@pytest.mark.parametrize("dtype", [mx.float16, mx.bfloat16], ids=str)
def test_gradient_of_half_types(dtype):
    w = mx.array([1.0, 2.0, 3.0]).astype(dtype)
    state = optim.fused_sgd_init(w, momentum=0.5)
    got = mx.grad(
        lambda w: optim.fused_sgd_step(
            w, (w * w).astype(dtype), state, learning_rate=0.125, momentum=0.5
        )[0].sum()
    )(w)
    assert got.dtype == dtype
    assert got.tolist() == [0.75, 0.5, 0.25]  # 1 - 2 * 0.125 * w, exact in both


def test_gradient_does_not_flow_through_the_schedule():
    """Steps are counted: a schedule has no derivative, but the rest does."""
    w = mx.ones(3)
    state = optim.fused_sgd_init(w)
    got = mx.grad(
        lambda w: optim.fused_sgd_step(
            w, 2 * w, state, learning_rate=optim.exponential_decay(0.25, 0.5)
        )[0].sum()
    )(w)
    assert got.tolist() == [0.5] * 3


def test_checkpoint():
    values, ours = setting(False)
    arrays = [mx.array(v) for v in values]
    plain = mx.grad(lambda *a: ours(*a)[0].sum(), argnums=[0, 1, 2, 3])(*arrays)
    saved = mx.grad(
        lambda *a: mx.checkpoint(lambda *b: ours(*b)[0].sum())(*a), argnums=[0, 1, 2, 3]
    )(*arrays)
    assert all(same(a, b) for a, b in zip(plain, saved, strict=True))


# ---- Vectorisation --------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [mx.float32, mx.float16, mx.bfloat16], ids=str)
@pytest.mark.parametrize("axes", [(0, 0), (1, 1), (0, None), (None, 0)], ids=str)
def test_vmap(axes, dtype):
    """Several models at once have the bits of one model after the other."""
    mx.random.seed(6)
    shape = {0: (4, 33), 1: (33, 4), None: (33,)}
    w, g = (mx.random.normal(shape[a]).astype(dtype) for a in axes)
    state = optim.fused_sgd_init(mx.zeros(33).astype(dtype), momentum=0.9)
    schedule = optim.exponential_decay(0.1, 0.5)

    def two_steps(w, g):
        s = state
        for _ in range(2):
            w, s = optim.fused_sgd_step(
                w, g, s, learning_rate=schedule, momentum=0.9, weight_decay=0.01
            )
        return w, s["step"]

    got, counters = mx.vmap(two_steps, in_axes=axes)(w, g)
    assert counters.tolist() == [2] * 4
    for i in range(4):
        one = [x if a is None else mx.take(x, i, axis=a) for x, a in zip((w, g), axes, strict=True)]
        want, _ = two_steps(*one)
        assert got.dtype == dtype
        assert same(got[i], want)


def test_vmap_over_the_learning_rate():
    w, state = mx.ones((2, 3)), optim.fused_sgd_init(mx.ones((2, 3)))
    rates = mx.array([0.25, 0.5])
    got = mx.vmap(lambda r: optim.fused_sgd_step(w, w, state, learning_rate=r)[0])(rates)
    assert got.shape == (2, 2, 3)
    assert got[:, 0, 0].tolist() == [0.75, 0.5]


def test_vmap_of_a_tree_with_momentum_and_mixed_dtypes():
    tree = {"a": mx.random.normal((3, 5, 2)), "b": mx.random.normal((3, 9)).astype(mx.float16)}
    one = {k: v[0] for k, v in tree.items()}
    state = optim.fused_sgd_init(one, momentum=0.9)

    def body(w):
        w, s = optim.fused_sgd_step(w, w, state, learning_rate=0.1, momentum=0.9)
        return optim.fused_sgd_step(w, w, s, learning_rate=0.1, momentum=0.9)[0]

    got = mx.vmap(body)(tree)
    for i in range(3):
        want = body({k: v[i] for k, v in tree.items()})
        assert all(same(got[k][i], want[k]) for k in tree)


def test_vmap_of_grad():
    w = mx.array([[0.5, -1.0], [2.0, 1.0], [0.0, 3.0]])
    state = optim.fused_sgd_init(w[0])

    def after(w):
        return (optim.fused_sgd_step(w, w * w, state, learning_rate=0.25)[0] ** 2).sum()

    got = mx.vmap(mx.grad(after))(w)
    x = np.array(w, np.float64)
    np.testing.assert_allclose(
        np.array(got), 2 * (x - 0.25 * x**2) * (1 - 0.5 * x), rtol=1e-6, atol=1e-7
    )


# ---- Export ------------------------------------------------------------------------------------


def test_the_graph_can_be_drawn(tmp_path):
    w = mx.ones(3)
    new, _ = optim.fused_sgd_step(w, w, optim.fused_sgd_init(w), learning_rate=0.1)
    path = tmp_path / "graph.dot"
    mx.export_to_dot(str(path), new)
    text = path.read_text()
    assert "FusedStep" in text
    assert "ArenaView" in text


def test_of_mlx_sees_every_bit():
    """The helper of this suite: NaN payloads and the sign of zero count."""
    assert of_mlx(mx.array([0.0, -0.0])).tolist() == [0, 2**31]
    assert not same(mx.array(0.0), mx.array(-0.0))
    assert same(mx.array(float("nan")), mx.array(float("nan")))
