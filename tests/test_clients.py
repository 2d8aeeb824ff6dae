"""What programs written for mlx.optimizers do with ours: names, schedules of MLX, optimizers
that wrap it and that derive from it, and the loops of the usual examples."""

import copy
import importlib
import itertools
import pickle
from functools import partial
from types import FunctionType

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers
import mlx_fused_optim as optim
import numpy as np
import pytest
from bits import same
from mlx.utils import tree_flatten, tree_map
from mlx_fused_optim.schedules._of_mlx import MADE_BY_MLX, as_ours

# ---- Names ------------------------------------------------------------------------------

MODULES = ["", ".optimizers", ".schedulers"]


def defined(module):
    """The functions and classes of MLX's optimizers that one finds in a module."""
    return {
        name: value
        for name, value in vars(module).items()
        if getattr(value, "__module__", "").startswith("mlx.optimizers") and name[0] != "_"
    }


OURS = {"SGD", "Adam", "AdamW", "Adamax", "Lion", "Muon", "RMSprop", "Adagrad", "AdaDelta"}


@pytest.mark.parametrize("place", MODULES)
def test_every_name_of_mlx_is_in_its_place(place):
    theirs = importlib.import_module("mlx.optimizers" + place)
    ours = importlib.import_module("mlx_fused_optim" + place)
    starred = {}
    exec(f"from {ours.__name__} import *", starred)
    names = defined(theirs)
    assert len(names) >= 5
    assert names.keys() <= set(dir(ours))
    assert names.keys() <= starred.keys()
    for name, value in names.items():
        own = getattr(ours, name)
        assert starred[name] is own
        assert own is getattr(optim, name)
        is_ours = name in OURS or name in MADE_BY_MLX
        assert (own is value) != is_ours, name


def test_submodules_are_attributes_and_ours():
    assert optim.schedulers is importlib.import_module("mlx_fused_optim.schedulers")
    assert optim.optimizers is importlib.import_module("mlx_fused_optim.optimizers")
    assert optim.schedulers.__all__ == optim.schedules.__all__
    starred = {}
    exec("from mlx_fused_optim import *", starred)
    assert starred["schedulers"] is optim.schedulers
    assert starred["optimizers"] is optim.optimizers


def test_what_mlx_only_imports_is_here_too():
    assert optim.tree_map is tree_map
    with pytest.raises(AttributeError, match="no attribute 'Sgd'"):
        optim.Sgd  # noqa: B018


def test_one_finds_all_optimizers_as_subclasses():
    """A registry by name, as configuration files want it. The base of ours is none of them."""

    def registry(module):
        members = {name: getattr(module, name) for name in dir(module)}
        return {
            name
            for name, value in members.items()
            if isinstance(value, type) and issubclass(value, mlx.optimizers.Optimizer)
        }

    assert registry(optim) == registry(mlx.optimizers)
    assert issubclass(optim.SGD, optim.FusedOptimizer)


@pytest.mark.parametrize("name", ["RMSprop", "Adagrad", "AdaDelta"])
@pytest.mark.parametrize("eps", [0.0, -1.0])
def test_an_epsilon_that_mlx_refuses_is_refused_in_words_that_a_program_may_match(name, eps):
    for module in (optim, mlx.optimizers):
        with pytest.raises(ValueError, match=">0"):
            getattr(module, name)(0.1, eps=eps)


# ---- Schedules that MLX made ------------------------------------------------------------

# What is called, in either module.
MADE = {
    "exponential_decay": lambda m: m.exponential_decay(0.1, 0.999),
    "step_decay": lambda m: m.step_decay(0.1, 0.5, 10),
    "cosine_decay": lambda m: m.cosine_decay(0.1, 100),
    "cosine_decay_end": lambda m: m.cosine_decay(0.1, 100, 0.01),
    "linear_schedule": lambda m: m.linear_schedule(0, 1, 100),
    "whole_length": lambda m: m.linear_schedule(0.0, 0.1, 100.0),
    "join_schedules": lambda m: m.join_schedules(
        [m.linear_schedule(0.0, 0.1, 10), m.cosine_decay(0.1, 90)], [11]
    ),
    "joined_twice": lambda m: m.join_schedules(
        [
            m.join_schedules([m.step_decay(0.1, 0.5, 2), m.linear_schedule(0.1, 0.2, 3)], [5]),
            m.exponential_decay(0.2, 0.9),
        ],
        [9],
    ),
}
every_schedule = pytest.mark.parametrize("make", MADE.values(), ids=MADE)


def test_every_schedule_of_mlx_is_known():
    """The names, and the code behind each: a new version of MLX may have others."""
    assert MADE_BY_MLX.keys() == defined(mlx.optimizers.schedulers).keys()
    assert MADE_BY_MLX.keys() <= MADE.keys()


@every_schedule
def test_a_schedule_of_mlx_is_ours(make):
    theirs = make(mlx.optimizers)
    known = as_ours(theirs)
    assert known == make(optim)
    assert known.in_kernel
    assert as_ours(theirs) is known
    # The same schedule, up to MLX's roundings of values of at most 1.
    steps = mx.arange(120).astype(mx.uint64)
    assert mx.abs(known(steps) - theirs(steps)).max().item() <= 4e-7


PLACES = {
    "learning_rate": lambda s: optim.SGD(s),
    "momentum": lambda s: optim.SGD(0.1, momentum=s),
    "weight_decay": lambda s: optim.SGD(0.1, weight_decay=s),
    "grad_scale": lambda s: optim.SGD(0.1, grad_scale=s),
    "groups": lambda s: optim.SGD(
        0.1, groups=[(lambda path, array: True, {"learning_rate": s, "weight_decay": s})]
    ),
}


@pytest.mark.parametrize("place", PLACES)
def test_wherever_a_schedule_is_taken(place):
    def run(schedule, steps=6):
        optimizer, w = PLACES[place](schedule), {"w": mx.array([1.0, -2.0, 3.0])}
        for _ in range(steps):
            w = optimizer.apply_gradients({"w": mx.array([0.5, 0.25, -1.0])}, w)
        return optimizer, w["w"]

    def make(module):
        # No momentum and no loss scale may be 0.
        return module.cosine_decay(0.5, 10, 0.125)

    optimizer, w = run(make(mlx.optimizers))
    assert "cosine_decay(0.5, 10, end=0.125)" in repr(optimizer)
    assert "Python" not in repr(optimizer).replace("<function", "")
    assert same(w, run(make(optim))[1])
    optimizer = optim.SGD(0.1, momentum=0.5)
    if place != "groups":
        setattr(optimizer, place, make(mlx.optimizers))
        assert "cosine_decay(0.5, 10, end=0.125)" in repr(optimizer)


def test_steps_with_a_schedule_of_mlx_are_prepared():
    """It costs what ours costs: nothing is evaluated beside the step's kernel."""
    optimizer, w = optim.SGD(mlx.optimizers.cosine_decay(0.1, 10)), {"w": mx.ones(3)}
    optimizer.apply_gradients(w, w)
    assert optimizer._prepared.step is not None


def test_the_function_takes_a_schedule_of_mlx():
    """At a step where MLX's own rounding would show: 12 % of each number."""

    def run(module):
        schedule = module.exponential_decay(0.9, 0.999999)
        w, g = {"a": mx.array([1.0, 2.0]), "b": mx.array([3.0])}, {"a": mx.ones(2), "b": mx.ones(1)}
        group = (lambda path, array: path == "a", {"learning_rate": schedule})
        decay = module.exponential_decay(1e4, 0.999999)
        options = {"momentum": schedule, "weight_decay": decay, "groups": [group]}
        state = optim.fused_sgd_init(w, **options)
        state = {**state, "step": mx.array(10_000_000, mx.uint64)}
        for rate in (schedule, 0.25):
            for _ in range(2):
                options["grad_scale"] = schedule
                w, state = optim.fused_sgd_step(w, g, state, learning_rate=rate, **options)
        return w

    ours, theirs = run(optim), run(mlx.optimizers)
    assert same(ours["a"], theirs["a"])
    assert same(ours["b"], theirs["b"])


def test_its_value_is_exact_where_that_of_mlx_is_not():
    schedule = mlx.optimizers.exponential_decay(0.1, 0.999999)
    optimizer, w = optim.SGD(schedule), {"w": mx.ones(1)}
    optimizer.state = {**optimizer.state, "step": mx.array(10_000_000, mx.uint64)}
    optimizer.apply_gradients(w, w)
    exact = 0.1 * 0.999999**10_000_000
    assert abs(optimizer.learning_rate.item() - exact) <= 2 * np.spacing(np.float32(exact))
    # Whoever wants MLX's roundings wraps its function.
    optimizer = optim.SGD(lambda step: schedule(step))
    optimizer.state = {**optimizer.state, "step": mx.array(10_000_000, mx.uint64)}
    optimizer.apply_gradients(w, w)
    assert optimizer.learning_rate.item() == schedule(mx.array(10_000_000, mx.uint64)).item()


def same_code_elsewhere():
    """MLX's own code, but what it calls is another's."""
    made = mlx.optimizers.cosine_decay(0.1, 10)
    return FunctionType(made.__code__, dict(made.__globals__), None, None, made.__closure__)


def look_alike(init=0.1, decay_steps=10, end=0.0):
    def schedule(step):
        s = mx.minimum(step, decay_steps)
        return end + (init - end) * (1 - s / decay_steps)

    return schedule


NOT_RECOGNISED = {
    "wrapped": lambda m: lambda step: m.cosine_decay(0.1, 10)(step),
    "partial": lambda m: partial(lambda f, step: f(step), m.cosine_decay(0.1, 10)),
    "look_alike": lambda m: look_alike(),
    "same_code": lambda m: same_code_elsewhere(),
    "array": lambda m: m.exponential_decay(mx.array(0.1), 0.9),
    "numpy": lambda m: m.linear_schedule(np.float32(0.1), 0.0, 10),
    "flag": lambda m: m.linear_schedule(True, 0.0, 10),
    "rate_of_0": lambda m: m.exponential_decay(0.1, 0.0),
    "boundary_of_0": lambda m: m.join_schedules(
        [m.linear_schedule(0.0, 0.1, 5), m.cosine_decay(0.1, 5)], [0]
    ),
    "member": lambda m: m.join_schedules([lambda step: 0.1, m.cosine_decay(0.1, 5)], [2]),
    "too_long": lambda m: m.join_schedules([m.linear_schedule(0.0, 0.1, 5)] * 9, list(range(1, 9))),
}


@pytest.mark.parametrize("make", NOT_RECOGNISED.values(), ids=NOT_RECOGNISED)
def test_anything_else_stays_a_function_and_the_optimizer_says_so(make):
    schedule = make(mlx.optimizers)
    assert as_ours(schedule) is schedule
    ours, theirs = optim.SGD(schedule), mlx.optimizers.SGD(schedule)
    assert "called by Python before each step" in repr(ours)
    w = {"w": mx.array([1.0, -2.0])}
    a, b = w, w
    for _ in range(4):
        a, b = ours.apply_gradients(w, a), theirs.apply_gradients(w, b)
        assert same(a["w"], b["w"])
        assert ours.learning_rate.item() == theirs.learning_rate.item()


def test_an_optimizer_with_a_schedule_of_mlx_is_copied_and_pickled():
    """A function inside a function cannot be pickled, but a schedule of ours can."""
    optimizer = optim.SGD(mlx.optimizers.cosine_decay(0.1, 10), momentum=0.9)
    for copied in (copy.deepcopy(optimizer), pickle.loads(pickle.dumps(optimizer))):
        assert repr(copied) == repr(optimizer)


def test_parts_of_mlx_join_ours():
    mixed = optim.join_schedules(
        [mlx.optimizers.linear_schedule(0.0, 0.1, 10), optim.cosine_decay(0.1, 90)], [10]
    )
    assert mixed.in_kernel
    assert mixed == optim.join_schedules(
        [optim.linear_schedule(0.0, 0.1, 10), optim.cosine_decay(0.1, 90)], [10]
    )
    assert optim.warmup(mlx.optimizers.step_decay(0.1, 0.5, 3), 5).in_kernel
    assert optim.scaled(mlx.optimizers.step_decay(0.1, 0.5, 3), 5).in_kernel
    other = mlx.optimizers.join_schedules(
        [optim.inverse_sqrt(0.1, 4), mlx.optimizers.cosine_decay(0.1, 90)], [10]
    )
    assert as_ours(other).in_kernel


def configured(module, name, arguments, warmup_steps=0, start=0.0):
    """A schedule out of a configuration file, as fine-tuning programs make it: found by name
    in the module of schedulers, with a line up to its first argument and a step more."""
    schedule = getattr(module.schedulers, name)(*arguments)
    if not warmup_steps:
        return schedule
    line = module.schedulers.linear_schedule(start, arguments[0], warmup_steps)
    return module.schedulers.join_schedules([line, schedule], [warmup_steps + 1])


@pytest.mark.parametrize("warmup_steps", [0, 10])
@pytest.mark.parametrize(
    "name, arguments",
    [
        ("cosine_decay", (1e-5, 100, 1e-7)),
        ("exponential_decay", (1e-4, 0.99)),
        ("step_decay", (1e-4, 0.5, 20)),
        ("linear_schedule", (1e-4, 0.0, 50)),
    ],
)
def test_a_schedule_by_configuration(name, arguments, warmup_steps):
    """Whichever of the two modules the program still imports, the kernel evaluates it."""
    ours, half = (configured(m, name, arguments, warmup_steps) for m in (optim, mlx.optimizers))
    assert isinstance(ours, optim.Schedule)
    assert ours.in_kernel
    assert as_ours(half) == ours
    w = {"w": mx.ones(2)}
    rates = []
    for schedule in (ours, half):
        optimizer, p = optim.SGD(schedule, momentum=0.9), w
        for _ in range(15):
            p = optimizer.apply_gradients(w, p)
        rates.append(optimizer.learning_rate.item())
    assert rates[0] == rates[1]
    want = mlx.optimizers.SGD(half)
    for _ in range(15):
        want.apply_gradients(w, w)
    assert rates[0] == pytest.approx(want.learning_rate.item(), rel=1e-5)


def test_repr_is_the_call():
    assert repr(optim.SGD(0.5)) == "SGD(learning_rate=array(0.5, dtype=float32))"
    optimizer = optim.SGD(
        optim.cosine_decay(0.1, 10), momentum=0.9, nesterov=True, clip_norm=1.0, seed=3
    )
    assert repr(optimizer) == (
        "SGD(learning_rate=cosine_decay(0.1, 10), momentum=0.9, nesterov=True, seed=3, "
        "clip_norm=1.0)"
    )

    def momentum_by_hand(step):
        return 0.5

    class Mine(optim.SGD):
        pass

    shown = repr(Mine(0.5, momentum=momentum_by_hand, weight_decay=optim.constant(0.0)))
    assert shown.startswith("Mine(learning_rate=array(0.5, dtype=float32), momentum=<")
    assert "momentum_by_hand, called by Python before each step>" in shown
    assert shown.endswith("weight_decay=constant(0.0))")
    shown = repr(optim.AdamW(0.5, betas=(momentum_by_hand, optim.constant(0.25))))
    assert "momentum_by_hand, called by Python before each step>, constant(0.25))" in shown
    assert "betas=(0.5, 0.75)" in repr(optim.Lion(0.5, betas=[0.5, 0.75]))


# ---- Tensor by tensor -------------------------------------------------------------------


class Wrapping(mlx.optimizers.Optimizer):
    """Matrices by their sign, and the rest by another optimizer, tensor by tensor."""

    def __init__(self, rate, other):
        super().__init__()
        self._maybe_schedule("learning_rate", rate)
        self.other = other

    def init_single(self, parameter, state):
        if parameter.ndim == 2:
            state["m"] = mx.zeros_like(parameter)
        else:
            self.other.init_single(parameter, state)

    def apply_single(self, gradient, parameter, state):
        if parameter.ndim != 2:
            return self.other.apply_single(gradient, parameter, state)
        state["m"] = 0.5 * state["m"] + gradient
        return parameter - self.learning_rate * mx.sign(state["m"])


def zero_step(gradient, parameter, state):
    return parameter * 0


@pytest.mark.parametrize("name", ["SGD", "AdamW", "Lion"])
def test_a_step_of_one_tensor_may_be_set_on_an_optimizer(name):
    """Or on its class, after it was defined: tensor by tensor from then on, as in MLX."""
    tree = {"a": mx.array([1.0, -2.0]), "b": [mx.array(3.0)]}
    for module in (mlx.optimizers, optim):
        optimizer = getattr(module, name)(0.1)
        updated = optimizer.apply_gradients(tree, tree)
        assert updated["a"].tolist() != [0, 0]
        before = optimizer.unpacked_state() if module is optim else optimizer.state
        kept = {k: v.tolist() for k, v in tree_flatten(before) if k.startswith("a.")}
        optimizer.apply_single = zero_step
        assert optimizer.apply_gradients(tree, tree)["a"].tolist() == [0, 0]
        after = {k: v.tolist() for k, v in tree_flatten(optimizer.state) if k.startswith("a.")}
        assert after.items() >= kept.items()  # unpacked, for whoever steps by himself

        changed = type("Changed", (getattr(module, name),), {})
        changed.apply_single = lambda self, gradient, parameter, state: parameter * 0
        assert changed(0.1).apply_gradients(tree, tree)["a"].tolist() == [0, 0]


def test_a_beginning_of_one_tensor_may_be_set_on_an_optimizer():
    def five(parameter, state):
        state["v"] = mx.full(parameter.shape, 5.0)

    tree, updated = {"a": mx.array([1.0, -2.0])}, []
    for module in (mlx.optimizers, optim):
        optimizer = module.SGD(0.1, momentum=0.9)
        optimizer.init_single = five
        updated.append(optimizer.apply_gradients(tree, tree)["a"].tolist())
    assert updated[0] == updated[1]
    assert (
        updated[0]
        != mlx.optimizers.SGD(0.1, momentum=0.9).apply_gradients(tree, tree)["a"].tolist()
    )


def test_a_step_of_one_tensor_that_is_set_after_a_trace_warns():
    tree = {"a": mx.array([1.0, -2.0])}
    optimizer = optim.SGD(0.1, momentum=0.9)
    optimizer.init(tree)
    step = mx.compile(optimizer.apply_gradients, inputs=optimizer.state, outputs=optimizer.state)
    mx.eval(step(tree, tree))
    with pytest.warns(
        UserWarning, match=r"^\[SGD\] apply_single was set after a step was compiled"
    ):
        optimizer.apply_single = zero_step


def test_the_base_of_optimizers_makes_none():
    with pytest.raises(TypeError, match=r"^\[FusedOptimizer\] .* got .*, allowed AdamW"):
        optim.FusedOptimizer(0.1)


ALONE = {
    "plain": {},
    "momentum": {"momentum": 0.9},
    "all": {"momentum": 0.9, "weight_decay": 0.1, "dampening": 0.25},
    "nesterov": {"momentum": 0.9, "nesterov": True},
}
every_option = pytest.mark.parametrize("options", ALONE.values(), ids=ALONE)


def assert_same_tree(one, two):
    one, two = dict(tree_flatten(one)), dict(tree_flatten(two))
    assert one.keys() == two.keys()
    assert [name for name in one if not same(one[name], two[name])] == []


def some(dtype=mx.float32, seed=0):
    """A tree of parameters or gradients."""
    keys = iter(mx.random.split(mx.random.key(seed), 3))
    return {
        "w": mx.random.normal((3, 5), key=next(keys)).astype(dtype),
        "layers": [{"b": mx.random.normal((7,), key=next(keys)).astype(dtype)}],
        "s": mx.random.normal((), key=next(keys)).astype(dtype),
    }


@pytest.mark.parametrize("dtype", [mx.float32, mx.float16, mx.bfloat16], ids=str)
@every_option
def test_an_optimizer_that_wraps_ours(options, dtype):
    results = []
    for module in (optim, mlx.optimizers):
        optimizer, p = Wrapping(0.125, module.SGD(0.1, **options)), some(dtype)
        for number in range(4):
            p = optimizer.apply_gradients(some(dtype, number + 1), p)
        results.append((p, optimizer.state))
    assert_same_tree(results[0][0], results[1][0])
    assert_same_tree(results[0][1], results[1][1])


def test_a_wrapping_optimizer_in_a_compiled_step():
    def run(module):
        model = nn.Linear(4, 3)
        model.update({"weight": mx.full((3, 4), 0.5), "bias": mx.zeros(3)})
        optimizer = Wrapping(0.125, module.SGD(0.1, momentum=0.9))
        optimizer.init(model.trainable_parameters())
        state = [model.state, optimizer.state]

        @partial(mx.compile, inputs=state, outputs=state)
        def step(x):
            loss, gradients = nn.value_and_grad(model, lambda m, x: m(x).square().mean())(model, x)
            optimizer.update(model, gradients)
            return loss

        for number in range(3):
            mx.eval(step(mx.random.normal((2, 4), key=mx.random.key(number))), state)
        return model.parameters()

    assert_same_tree(run(optim), run(mlx.optimizers))


BEYOND_MLX = [
    ({"clip_norm": 1.0}, "clip_norm"),
    ({"master_weights": True, "skip_nonfinite": True}, "master_weights, skip_nonfinite"),
    ({"momentum": optim.constant(0.5)}, "a scheduled momentum"),
    ({"weight_decay": lambda step: 0.5}, "a scheduled weight_decay"),
    ({"groups": [(lambda path, array: True, {"weight_decay": 0.5})]}, "groups"),
    ({"grad_scale": 2.0, "ema_decay": 0.5}, "grad_scale, ema_decay"),
]


@pytest.mark.parametrize("options, named", BEYOND_MLX, ids=[named for _, named in BEYOND_MLX])
def test_what_goes_beyond_mlx_needs_the_kernel(options, named):
    class Mine(optim.SGD):
        def apply_single(self, gradient, parameter, state):
            return super().apply_single(gradient, parameter, state)

    message = rf"^\[SGD\] a step tensor by tensor is .*: got {named}; allowed learning_rate, "
    state = {"v": mx.zeros(2)}
    with pytest.raises(ValueError, match=message):
        optim.SGD(0.1, **options).apply_single(mx.ones(2), mx.ones(2), state)
    assert state["v"].tolist() == [0, 0]
    optimizer = Mine(0.1, **options)
    with pytest.raises(ValueError, match=message):
        optimizer.apply_gradients({"w": mx.ones(2)}, {"w": mx.ones(2)})
    assert optimizer.step.item() == 0


def test_a_loss_scale_needs_the_kernel():
    class Mine(optim.SGD):
        def init_single(self, parameter, state):
            super().init_single(parameter, state)

    optimizer, w = Mine(0.1), {"w": mx.ones(2)}
    with pytest.raises(ValueError, match="got grad_scale; allowed"):
        optimizer.apply_gradients(w, w, grad_scale=2.0)
    assert optimizer.step.item() == 0


# Classes that change the step of a tensor, over either library's SGD.


def signed(base):
    class Signed(base):
        def apply_single(self, gradient, parameter, state):
            return super().apply_single(mx.sign(gradient), parameter, state)

    return Signed


def counting(base):
    """A state of its own, made beside that of the base."""

    class Counting(base):
        def init_single(self, parameter, state):
            super().init_single(parameter, state)
            state["n"] = mx.array(0)

        def apply_single(self, gradient, parameter, state):
            state["n"] = state["n"] + 1
            return super().apply_single(gradient / state["n"], parameter, state)

    return Counting


def mixed_in(base):
    class Halved:
        def apply_single(self, gradient, parameter, state):
            return super().apply_single(0.5 * gradient, parameter, state)

    class Mixed(Halved, base):
        def apply_gradients(self, gradients, parameters):
            return super().apply_gradients(tree_map(mx.negative, gradients), parameters)

    class Further(Mixed):
        pass

    return Further


def numbered(base):
    class Numbered(base):
        """Numbers of its own: half the rate, a momentum that is halved, a default."""

        dampening = 0.125  # the constructor's wins

        @property
        def learning_rate(self):
            return base.learning_rate.fget(self) * 0.5

        @learning_rate.setter
        def learning_rate(self, value):
            base.learning_rate.fset(self, value)

        @property
        def momentum(self):
            return self._own_momentum

        @momentum.setter
        def momentum(self, value):
            self._own_momentum = value / 2

    return Numbered


DERIVED = {"signed": signed, "counting": counting, "mixed_in": mixed_in, "numbered": numbered}


@pytest.mark.parametrize("derive", DERIVED.values(), ids=DERIVED)
@pytest.mark.parametrize("rate", [0.1, mlx.optimizers.linear_schedule(0.5, 0.125, 3)])
@every_option
def test_a_subclass_with_a_step_of_its_own(options, rate, derive):
    """What it overrides is called, and its state is that of MLX."""
    results = []
    for module in (optim, mlx.optimizers):
        optimizer, p = derive(module.SGD)(rate, **options), some()
        for number in range(4):
            gradients = some(seed=number + 1)
            if number == 1:
                del gradients["s"]  # frozen for a step
            p = {**p, **optimizer.apply_gradients(gradients, p)}
        results.append((p, optimizer.state))
    assert_same_tree(results[0][0], results[1][0])
    assert_same_tree(results[0][1], results[1][1])


@pytest.mark.parametrize("derive", DERIVED.values(), ids=DERIVED)
def test_such_a_subclass_goes_on_from_any_state(derive):
    """From the kernel's state, from MLX's, and back."""
    options = {"learning_rate": 0.1, "momentum": 0.5}
    fused, theirs = optim.SGD(**options), mlx.optimizers.SGD(**options)
    p = fused.apply_gradients(some(seed=1), some())
    assert_same_tree(p, theirs.apply_gradients(some(seed=1), some()))
    if derive is counting:  # a state with less than it wants, in MLX too
        for state in (fused.unpacked_state(), theirs.state):
            optimizer = derive(optim.SGD)(**options)
            optimizer.state = state
            with pytest.raises(KeyError):
                optimizer.apply_gradients(some(seed=2), p)
        return
    want = derive(mlx.optimizers.SGD)(**options)
    want.state = copy.deepcopy(theirs.state)
    updated = want.apply_gradients(some(seed=2), p)
    for state in (fused.state, fused.unpacked_state(), copy.deepcopy(theirs.state)):
        optimizer = derive(optim.SGD)(**options)
        optimizer.state = state
        assert_same_tree(optimizer.apply_gradients(some(seed=2), p), updated)
        assert_same_tree(optimizer.unpacked_state(), want.state)
        back = optim.SGD(**options)
        back.state = optimizer.state
        reference = mlx.optimizers.SGD(**options)
        reference.state = copy.deepcopy(want.state)
        assert_same_tree(
            back.apply_gradients(some(seed=3), updated),
            reference.apply_gradients(some(seed=3), updated),
        )


def test_a_subclass_in_a_compiled_step_and_a_multi_optimizer():
    def run(base, module):
        model = nn.Linear(4, 3)
        model.update({"weight": mx.full((3, 4), 0.5), "bias": mx.zeros(3)})
        optimizer = module.MultiOptimizer(
            [signed(base)(0.125, momentum=0.5), base(0.25)], [lambda path, w: w.ndim == 2]
        )
        optimizer.init(model.trainable_parameters())
        state = [model.state, optimizer.state]

        @partial(mx.compile, inputs=state, outputs=state)
        def step(x):
            loss, gradients = nn.value_and_grad(model, lambda m, x: m(x).square().mean())(model, x)
            optimizer.update(model, gradients)
            return loss

        for number in range(3):
            mx.eval(step(mx.random.normal((2, 4), key=mx.random.key(number))), state)
        return model.parameters()

    assert_same_tree(run(optim.SGD, optim), run(mlx.optimizers.SGD, mlx.optimizers))


def test_one_dict_of_state_per_optimizer_stays():
    """mx.compile captures it."""
    optimizer = signed(optim.SGD)(0.1, momentum=0.5)
    state = optimizer.state
    for _ in itertools.repeat(None, 2):
        optimizer.apply_gradients(some(seed=1), some())
        assert optimizer.state is state


# ---- The loops of the usual examples -----------------------------------------------------


def regression(seed=0):
    """A model, its loss, and batches of two sizes, as the last one of an epoch makes them."""
    mx.random.seed(seed)
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Dropout(0.25), nn.Linear(8, 2))
    mx.eval(model.parameters())
    sizes = (8, 8, 3, 8, 8, 3)
    x = [mx.random.normal((n, 6), key=mx.random.key(i)) for i, n in enumerate(sizes)]
    return model, [(x, x[:, :2] - x[:, 2:4]) for x in x]


def squares(model, x, y):
    return nn.losses.mse_loss(model(x), y)


def uncaptured(module):
    """Only the model is captured, as the state of a constant rate is not needed."""
    model, batches = regression()
    model.eval()  # no dropout: nobody captures the random state
    optimizer = module.SGD(learning_rate=0.1)
    gradient = nn.value_and_grad(model, squares)

    @partial(mx.compile, inputs=model.state, outputs=model.state)
    def step(x, y):
        loss, gradients = gradient(model, x, y)
        optimizer.update(model, gradients)
        return loss

    for batch in batches:
        step(*batch)
        mx.eval(model.state)
    # And on, without compiling.
    _, gradients = gradient(model, *batches[0])
    optimizer.update(model, gradients)
    return model.parameters()


def random_state_too(module):
    model, batches = regression()
    optimizer = module.SGD(module.cosine_decay(0.1, 5), momentum=0.9, weight_decay=0.01)
    state = [model.state, optimizer.state, mx.random.state]

    @partial(mx.compile, inputs=state, outputs=state)
    def step(x, y):
        loss, gradients = nn.value_and_grad(model, squares)(model, x, y)
        optimizer.update(model, nn.utils.average_gradients(gradients))
        return loss

    for batch in batches:
        mx.eval(step(*batch), state)
    return model.parameters()


def accumulating(module):
    """Gradients of three batches a step; the function is compiled for both."""
    model, batches = regression()
    optimizer = module.SGD(0.1, momentum=0.9)
    state = [model.state, optimizer.state, mx.random.state]

    @partial(mx.compile, inputs=state, outputs=state)
    def step(batch, before, updates):
        loss, gradients = nn.value_and_grad(model, squares)(model, *batch)
        if before is not None:
            gradients = tree_map(mx.add, gradients, before)
        if updates:
            optimizer.update(model, tree_map(lambda g: g / 3, gradients))
            gradients = None
        return loss, gradients

    before = None
    for number, batch in enumerate(batches):
        loss, before = step(batch, before, number % 3 == 2)
        mx.eval(state, loss, before)
    return model.parameters()


def warmed_up_by_hand(module):
    model, batches = regression()
    optimizer = module.SGD(0.1, momentum=0.9)
    state = [model.state, optimizer.state, mx.random.state]

    @partial(mx.compile, inputs=state, outputs=state)
    def step(x, y):
        loss, gradients = nn.value_and_grad(model, squares)(model, x, y)
        gradients, _ = module.clip_grad_norm(gradients, max_norm=0.5)
        optimizer.update(model, gradients)
        return loss

    for number, batch in enumerate(batches):
        optimizer.learning_rate = min(1, number / 4) * 0.1
        mx.eval(step(*batch), state)
    return model.parameters()


def embeddings(module):
    """Words beside words: two tables and their biases, of which a batch uses a few rows."""
    mx.random.seed(0)
    model = {
        "words": mx.random.normal((20, 4)),
        "contexts": mx.random.normal((20, 4)),
        "biases": [mx.zeros(20), mx.zeros(20)],
    }
    optimizer = module.SGD(learning_rate=0.05)

    def loss(model, i, j, count):
        both = (model["words"][i] * model["contexts"][j]).sum(axis=1)
        both = both + model["biases"][0][i] + model["biases"][1][j]
        return (mx.minimum(count / 10, 1) ** 0.75 * (both - mx.log(count)) ** 2).mean()

    gradient = mx.value_and_grad(loss)
    for number in range(5):
        i, j = mx.random.randint(0, 20, (2, 7), key=mx.random.key(number))
        _, gradients = gradient(model, i, j, 1.0 + i)
        model = optimizer.apply_gradients(gradients, model)
        mx.eval(model)
    return model


LOOPS = [uncaptured, random_state_too, accumulating, warmed_up_by_hand, embeddings]


@pytest.mark.parametrize("loop", LOOPS, ids=lambda loop: loop.__name__)
def test_loops(loop):
    ours, theirs = dict(tree_flatten(loop(optim))), dict(tree_flatten(loop(mlx.optimizers)))
    assert ours.keys() == theirs.keys()
    for name, value in ours.items():
        # MLX's compiler contracts into fused multiply-adds: six steps of a few roundings.
        assert mx.abs(value - theirs[name]).max().item() <= 1e-6, name
