"""What a compiled step knows of its optimizer: with and without the captured state, and of
options that are set after its trace."""

import copy
import io
import pickle
import warnings
from functools import partial

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers
import mlx_fused_optim as optim
import numpy as np
import pytest
from bits import of_mlx
from mlx.nn.layers.distributed import FullyShardedModule
from mlx.utils import tree_flatten
from mlx_fused_optim._options import StepOptions

W = {"w": mx.array([1.0, 2.0, -3.0])}
G = {"w": mx.array([0.5, -1.0, 0.25])}

# With these nothing of a step is in the state but a constant rate.
CONSTANT = {
    "plain": {},
    "weight decay": {"weight_decay": 0.25},
    "an array as rate": {"learning_rate": mx.array(0.125)},
    "decoupled": {"weight_decay": 0.25, "decoupled": True},
    "full": {"clip_value": 0.5, "maximize": True, "grad_scale": 2.0},
    "groups": {"groups": [(lambda path, array: True, {"learning_rate_factor": 2.0})]},
}
# With these something is: what an error says of it.
USES = {
    "schedule": ({"learning_rate": optim.exponential_decay(0.1, 0.5)}, "a scheduled learning_rate"),
    "callable": ({"learning_rate": lambda step: 0.1 * step}, "a scheduled learning_rate"),
    "scheduled decay": ({"weight_decay": optim.constant(0.1)}, "a scheduled weight_decay"),
    "scheduled scale": ({"grad_scale": lambda step: 2.0}, "a scheduled grad_scale"),
    "scheduled group": (
        {"groups": [(lambda path, array: True, {"learning_rate": optim.cosine_decay(1.0, 9)})]},
        "a scheduled number of a group",
    ),
    "momentum": ({"momentum": 0.9}, "momentum"),
    "momentum of a group": (
        {"groups": [(lambda path, array: True, {"momentum": 0.9})]},
        "momentum",
    ),
    "ema": ({"ema_decay": 0.9}, "ema"),
    "master": ({"master_weights": True}, "master"),
    "rounding": ({"rounding": "stochastic"}, "stochastic rounding"),
    "norm": ({"clip_norm": 1.0}, "grad_norm"),
    "skips": ({"skip_nonfinite": True}, "grad_norm"),
}


def sgd(options, module=optim):
    return module.SGD(**{"learning_rate": 0.125, **options})


def each(cases):
    return pytest.mark.parametrize("case", list(cases.values()), ids=list(cases))


def same(a, b):
    """Equal to the bit."""
    return of_mlx(a["w"]).tobytes() == of_mlx(b["w"]).tobytes()


def no_value():
    """A step as a trace leaves it in a state that it does not give back."""
    kept = []
    mx.compile(lambda x: kept.append(x) or x + 1)(mx.array(7, mx.uint64))
    return kept[0]


# ---- Without the state ------------------------------------------------------------------


class Words(nn.Module):
    """As CBOW: what is summed are rows of a table, so its gradient is scattered."""

    def __init__(self):
        super().__init__()
        self.table, self.out = nn.Embedding(11, 5), nn.Linear(5, 1)

    def __call__(self, x):
        return self.out(self.table(x).sum(axis=1))


MODELS = {
    "dense": (lambda: nn.Linear(3, 1), lambda n: mx.arange(3.0 * n).reshape(n, 3) / 8),
    "embedding": (Words, lambda n: mx.arange(2 * n).reshape(n, 2) % 11),
}


@pytest.mark.parametrize("options", [{}, {"weight_decay": 0.25}], ids=["plain", "weight decay"])
@pytest.mark.parametrize("name", MODELS)
def test_a_compiled_step_that_captures_the_model_alone(name, options):
    """As MLX's example of MNIST has it. Each batch size is a trace."""
    make_model, batch = MODELS[name]

    def run(module):
        mx.random.seed(0)
        model = make_model()
        mx.eval(model.parameters())
        optimizer = sgd(options, module)
        gradient = nn.value_and_grad(model, lambda m, x: mx.mean(mx.square(m(x))))

        def body(x):
            loss, gradients = gradient(model, x)
            optimizer.update(model, gradients)
            return loss

        step = mx.compile(body, inputs=model.state, outputs=model.state)
        for size in (4, 4, 3, 5, 4):
            step(batch(size))
            mx.eval(model.state)
        body(batch(2))  # and an eager one
        mx.eval(model.state, optimizer.state)
        return model, optimizer

    (ours, optimizer), (theirs, other) = run(optim), run(mlx.optimizers)
    for (path, a), (_, b) in zip(
        tree_flatten(ours.parameters()), tree_flatten(theirs.parameters()), strict=True
    ):
        # MLX fuses its update with the gradient: a rounding may differ in each of six steps.
        np.testing.assert_allclose(np.array(a), np.array(b), rtol=6e-6, atol=1e-6, err_msg=path)
    # Three traces and an eager step count, as in MLX; and the state can be read.
    assert optimizer.step.item() == other.step.item() == 4
    assert optimizer.learning_rate.item() == other.learning_rate.item() == 0.125


@each(CONSTANT)
@pytest.mark.parametrize("is_prepared", [False, True], ids=["first", "prepared"])
def test_a_constant_step_does_not_read_the_counter(case, is_prepared):
    optimizer, want = sgd(case), sgd(case)
    if is_prepared:
        assert same(optimizer.apply_gradients(G, W), want.apply_gradients(G, W))
    optimizer.state["step"] = no_value()
    got = optimizer.apply_gradients(G, W)
    assert same(got, want.apply_gradients(G, W))
    with pytest.raises(RuntimeError, match="without a primitive"):
        mx.eval(optimizer.step)


@each({name: USES[name] for name in ("schedule", "rounding", "skips")})
def test_others_do_read_it(case):
    """The control."""
    optimizer = sgd(case[0])
    optimizer.state["step"] = no_value()
    parameters = {"w": W["w"].astype(mx.bfloat16)}
    with pytest.raises(RuntimeError, match="without a primitive"):
        mx.eval(optimizer.apply_gradients(G, parameters), optimizer.state)


@each(CONSTANT)
def test_a_step_that_captures_inputs_alone(case):
    """As MLX's own tests do: the next step is in nobody's outputs."""
    optimizer, want, parameters = sgd(case), sgd(case), dict(W)
    step = mx.compile(lambda g, p: optimizer.apply_gradients(g, p), inputs=optimizer.state)
    for _ in range(3):
        assert same(step(G, parameters), want.apply_gradients(G, parameters))
    assert same(optimizer.apply_gradients(G, parameters), want.apply_gradients(G, parameters))


@pytest.mark.parametrize("momentum", [0.0, 0.5])
@pytest.mark.parametrize("rate", [0.125, optim.constant(0.125)], ids=["number", "constant()"])
def test_the_counter_counts_without_being_looked_at(rate, momentum):
    optimizer, parameters = optim.SGD(rate, momentum=momentum), dict(W)
    optimizer.init(parameters)
    for _ in range(1000):
        parameters = optimizer.apply_gradients(G, parameters)
        mx.eval(parameters)
    graph = io.StringIO()
    mx.export_to_dot(graph, optimizer.step)
    assert "Add" not in graph.getvalue()  # no chain of 1000 sums
    assert optimizer.step.item() == 1000
    assert optimizer.learning_rate.item() == 0.125


@pytest.mark.parametrize("tree", [{}, {"w": mx.zeros((0, 3))}], ids=["no tensor", "empty"])
@each({"plain": ({}, ""), **USES})
def test_a_step_of_nothing_counts(tree, case):
    options = case[0]
    if options.get("groups"):
        return  # a group without a tensor is an error
    optimizer = sgd(options)
    for number in range(3):
        assert optimizer.apply_gradients(tree, tree).keys() == tree.keys()
        mx.eval(optimizer.state)
        assert optimizer.step.item() == number + 1


def test_a_step_that_is_not_known_yet_counts():
    optimizer = optim.SGD(0.125)
    optimizer.state["step"] = mx.array(3, mx.uint64) + mx.array(4, mx.uint64)
    optimizer.apply_gradients(G, optimizer.apply_gradients(G, W))
    assert optimizer.step.item() == 9


def test_a_vectorised_counter():
    state = optim.fused_sgd_init(W["w"])

    def step(count):
        _, new = optim.fused_sgd_step(W["w"], G["w"], {**state, "step": count}, learning_rate=1.0)
        return new["step"]

    assert mx.vmap(step)(mx.array([3, 8], mx.uint64)).tolist() == [4, 9]


# ---- Where the state is needed ----------------------------------------------------------


@each(USES)
def test_an_uncaptured_state_that_is_needed(case):
    """MLX goes on with what the state was at the trace, until another trace fails."""
    options, what = case
    optimizer = sgd(options)
    before = dict(optimizer.state)
    parameters = {"w": W["w"].astype(mx.bfloat16)}
    step = mx.compile(lambda g, p: optimizer.apply_gradients(g, p))
    with pytest.raises(ValueError, match=rf"^\[SGD\] a compiled step .*: got .*{what}; allowed .*"):
        step(G, parameters)
    assert optimizer.state.keys() == before.keys()
    assert all(optimizer.state[key] is value for key, value in before.items())
    # The parameters alone, closed over gradients, are no better.
    with pytest.raises(ValueError, match=r"optimizer\.state"):
        mx.compile(lambda p: optimizer.apply_gradients(G, p))(parameters)
    # With the state, captured or given, it runs.
    captured = mx.compile(step_of(optimizer), inputs=optimizer.state, outputs=optimizer.state)
    mx.eval(captured(G, parameters), captured(G, parameters), optimizer.state)
    given = sgd(options)

    @mx.compile
    def with_state(g, p, state):
        given.state = state
        return given.apply_gradients(g, p), given.state

    new, state = with_state(G, parameters, given.state)
    mx.eval(with_state(G, new, state))
    assert same(with_state(G, parameters, sgd(options).state)[0], new)


def step_of(optimizer):
    return lambda g, p: optimizer.apply_gradients(g, p)


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_an_uncaptured_state_behind_a_differentiation(momentum):
    """As MLX's example of MNIST has it: what comes out of nn.value_and_grad is no tracer."""
    model = nn.Linear(2, 1)
    optimizer = optim.SGD(0.125, momentum=momentum)
    gradient = nn.value_and_grad(model, lambda m, x: mx.mean(mx.square(m(x))))

    @partial(mx.compile, inputs=model.state, outputs=model.state)
    def step(x):
        loss, gradients = gradient(model, x)
        optimizer.update(model, gradients)
        return loss

    before = mx.array(model.weight)
    if momentum:
        with pytest.raises(ValueError, match="does not capture it, for steps with momentum"):
            step(mx.ones((3, 2)))
    else:
        mx.eval(step(mx.ones((3, 2))), model.state)
        assert not mx.array_equal(model.weight, before)


@each(USES)
def test_an_optimizer_inside_the_function(case):
    """It has nothing to capture."""
    parameters = {"w": W["w"].astype(mx.bfloat16)}

    def body(g, p):
        optimizer = sgd(case[0])
        for _ in range(2):
            p = optimizer.apply_gradients(g, p)
        return p

    mx.eval(mx.compile(body)(G, parameters))


@each(USES)
def test_a_differentiated_step_needs_no_capture(case):
    """Its arrays have values, and so has the state it leaves."""
    optimizer = sgd(case[0])

    def loss(w):
        return mx.sum(optimizer.apply_gradients(G, {"w": w})["w"])

    mx.eval(mx.grad(loss)(W["w"]), optimizer.state)
    mx.eval(optimizer.apply_gradients(G, W), optimizer.state)
    assert optimizer.step.item() == 2


@each(USES)
def test_a_function_closes_over_its_state(case):
    """It is pure: a state that is not an argument is a constant, and nothing is left behind."""
    options = {"learning_rate": 0.125, **case[0]}
    if "groups" in options:
        return  # predicates want the optimizer's path
    rate = options.pop("learning_rate")
    state = optim.fused_sgd_init(W, **options)
    mx.eval(state)

    def body(g, p):
        return optim.fused_sgd_step(p, g, state, learning_rate=rate, **options)

    for _ in range(2):
        got, _ = mx.compile(body)(G, W)
        want, _ = body(G, W)
        np.testing.assert_allclose(np.array(got["w"]), np.array(want["w"]), rtol=1e-6)


# ---- Options that are set after a trace ---------------------------------------------------


LATER = {
    "momentum": 0.5, "weight_decay": 0.5, "dampening": 0.5, "nesterov": True,
    "clip_norm": 1.0, "clip_value": 1.0, "grad_scale": 2.0, "skip_nonfinite": True,
    "decoupled": True, "maximize": True, "trust_coefficient": 0.5, "ema_decay": 0.5, "seed": 3,
    "state_dtype": mx.float32, "min_8bit_size": 64, "master_weights": True,
    "rounding": "stochastic", "compensated": True,
    "groups": [(lambda path, array: True, {"momentum": 0.25})],
    "learning_rate": optim.cosine_decay(0.5, 10),
}  # fmt: skip


def compiled_once(**options):
    optimizer = optim.SGD(0.125, momentum=0.9, **options)
    state = optimizer.state
    step = mx.compile(lambda g: optimizer.apply_gradients(g, W), inputs=state, outputs=state)
    step(G)
    return optimizer, step


@pytest.mark.parametrize("name", LATER)
def test_an_option_that_is_set_after_a_trace_warns(name):
    optimizer, _ = compiled_once()
    with pytest.warns(UserWarning, match=rf"^\[SGD\] {name} was set after .*: .*got .*, allowed"):
        setattr(optimizer, name, LATER[name])
    eager = optim.SGD(0.125, momentum=0.9)
    eager.apply_gradients(G, W)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        setattr(eager, name, LATER[name])  # before any trace


def test_every_option_warns():
    names = {"learning_rate", "momentum", "weight_decay", "dampening", "nesterov"}
    assert set(LATER) == names | set(StepOptions.__annotations__)


def test_what_a_compiled_step_sees_does_not_warn():
    optimizer, _ = compiled_once(clip_norm=4.0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        optimizer.learning_rate = 0.25
        optimizer.momentum = 0.9  # as it was
        optimizer.clip_norm = 4
        optimizer.state = optimizer.state
    before = optimizer.momentum
    with pytest.raises(ValueError, match="clip_norm"):
        optimizer.clip_norm = -1.0
    assert (optimizer.clip_norm, optimizer.momentum) == (4.0, before)


def test_a_function_that_is_compiled_anew_has_the_option():
    """The warning's advice: the old one is stale, a new one is not."""
    optimizer, step = compiled_once(clip_value=1.0)
    gradient = {"w": mx.array([4.0, 4.0, 4.0])}

    def moved(step):
        optimizer.state["arenas"] = {}  # without the momentum of other steps
        optimizer.init(W)
        return (W["w"] - step(gradient)["w"]).tolist()

    assert moved(step) == [0.125] * 3
    with pytest.warns(UserWarning, match="clip_value"):
        optimizer.clip_value = 2.0
    assert moved(step) == [0.125] * 3

    def anew(g):
        return optimizer.apply_gradients(g, W)

    assert moved(mx.compile(anew, inputs=optimizer.state, outputs=optimizer.state)) == [0.25] * 3


def test_a_number_that_is_captured_is_never_stale():
    """The other advice: a function of the step that reads a captured array."""
    numbers = {"decay": mx.array(0.0)}
    optimizer = optim.SGD(1.0, weight_decay=lambda step: numbers["decay"])
    state = [optimizer.state, numbers]

    @partial(mx.compile, inputs=state, outputs=state)
    def step(parameters):
        return optimizer.apply_gradients({"w": mx.zeros(3)}, parameters)

    assert step(W)["w"].tolist() == W["w"].tolist()
    numbers["decay"] = mx.array(0.5)
    assert step(W)["w"].tolist() == (W["w"] / 2).tolist()
    assert optimizer.weight_decay.item() == 0.5


def test_copies_and_pickles_after_a_trace():
    optimizer, _ = compiled_once()
    copies = [copy.deepcopy(optimizer), pickle.loads(pickle.dumps(optimizer))]
    want = optimizer.apply_gradients(G, W)
    for other in copies:
        assert same(other.apply_gradients(G, W), want)


# ---- Learning rates that MLX takes ----------------------------------------------------


def run_rate(rate, weight_decay, how):
    optimizer = optim.SGD(0.0, weight_decay=weight_decay)
    parameters = {"w": mx.ones((2, 2))}
    gradient = {"w": mx.full((2, 2), 2.0)}
    if how == "function":
        state = optim.fused_sgd_init(parameters)
        return optim.fused_sgd_step(
            parameters, gradient, state, learning_rate=rate, weight_decay=weight_decay
        )[0]
    if how == "callable":
        optimizer = optim.SGD(lambda step: rate, weight_decay=weight_decay)
    elif how == "group":
        groups = [(lambda path, array: True, {"learning_rate": rate})]
        optimizer = optim.SGD(1.0, weight_decay=weight_decay, groups=groups)
    else:
        optimizer.learning_rate = rate
    step = optimizer.apply_gradients
    if how == "compiled":
        step = mx.compile(step_of(optimizer), inputs=optimizer.state)
    if how == "loaded":
        optimizer.state["learning_rate"] = rate if isinstance(rate, mx.array) else mx.array(rate)
    if how == "prepared":
        step(gradient, parameters)
    return step(gradient, parameters)


HOW = ["set", "loaded", "prepared", "compiled", "callable", "function", "group"]


@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize("weight_decay", [0.0, -0.5])
@pytest.mark.parametrize(
    "rate",
    [-1.0, -0.25, mx.array(-2.0), mx.array([0.5]), mx.array([[-0.5]]), mx.array([2])],
    ids=lambda rate: str(np.array(rate).tolist()),
)
def test_rates_below_zero_and_of_one_element(rate, weight_decay, how):
    got = run_rate(rate, weight_decay, how)["w"]
    assert got.shape == (2, 2)
    # Exact in binary.
    assert (np.array(got) == 1 - np.array(rate).item() * (2 + weight_decay)).all()


def test_a_rate_of_one_element_reads_as_a_scalar():
    optimizer = optim.SGD(mx.array([0.5]))
    assert optimizer.learning_rate.shape == () and optimizer.learning_rate.item() == 0.5


def test_a_rate_that_changes_sign_in_a_compiled_step():
    """MLX's own test of a rate that is set between compiled steps."""
    optimizer = optim.SGD(-1.0)
    step = mx.compile(lambda g: optimizer.apply_gradients(g, W), inputs=optimizer.state)
    assert step(G)["w"].tolist() == (W["w"] + G["w"]).tolist()
    optimizer.learning_rate = -2.0
    assert step(G)["w"].tolist() == (W["w"] + 2 * G["w"]).tolist()


@pytest.mark.parametrize("call", ["optimizer", "function"])
def test_a_negative_decay_has_no_trust_ratio(call):
    """Its denominator may be 0."""
    options = {"weight_decay": -0.5, "trust_coefficient": 0.5}

    def step():
        if call == "optimizer":
            return optim.SGD(0.125, **options).apply_gradients(G, W)
        state = optim.fused_sgd_init(W, **options)
        return optim.fused_sgd_step(W, G, state, learning_rate=0.125, **options)

    with pytest.raises(ValueError, match=r"trust ratio .*: got weight_decay=-0\.5 .*, allowed"):
        step()


# ---- Shards ---------------------------------------------------------------------------


@pytest.mark.parametrize("where", ["whole", "part"])
@pytest.mark.parametrize(
    "options",
    [
        {"clip_norm": 1.0},
        {"clip_norm": float("inf")},
        {"skip_nonfinite": True},
        {"trust_coefficient": 0.5},
    ],
    ids=str,
)
def test_norms_of_a_model_in_shards(options, where):
    """Each process would clip, or skip, by its own part."""

    def model():
        layers = [nn.Linear(4, 4), nn.Linear(4, 4)]
        if where == "part":
            layers[1] = FullyShardedModule(layers[1])
            return nn.Sequential(*layers)
        return FullyShardedModule(nn.Sequential(*layers))

    sharded, plain = model(), nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    optimizer = optim.SGD(0.125, **options)
    optimizer.update(plain, plain.trainable_parameters())
    before = dict(optimizer.state)
    for _ in range(2):
        with pytest.raises(ValueError, match=r"^\[SGD\] .*: got shards.*, in '.*'; allowed"):
            optimizer.update(sharded, sharded.trainable_parameters())
    assert all(optimizer.state[key] is value for key, value in before.items())
    optim.SGD(0.125, momentum=0.5).update(sharded, sharded.trainable_parameters())
