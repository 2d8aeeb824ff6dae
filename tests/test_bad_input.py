"""Bad input: a clear error in one form, and nothing has changed afterwards.

``[op] what is wrong: got ..., allowed ...`` (or "expected", "the parameter has", "the
layout has": the allowed value itself).
"""

import math
import re

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers
import mlx_fused_optim as optim
import numpy as np
import pytest
from bits import of_mlx
from mlx.utils import tree_flatten
from mlx_fused_optim import exponential_decay

FORM = re.compile(
    r"^\[(\w+)\] .*\b(got|requires)\b.*\b(allowed|expected|has|traced with)\b", re.DOTALL
)


def assert_refused(call, op, *words, error=ValueError):
    """``call`` raises ``error``, in the form, and names what it is about."""
    with pytest.raises(error) as caught:
        call()
    text = str(caught.value)
    match = FORM.match(text)
    assert match, text
    assert match[1] == op, text
    for word in words:
        assert word in text, text


# ---- Hyperparameters -----------------------------------------------------------------

NAN, INF = math.nan, math.inf
HYPERPARAMETERS = [
    ({"momentum": -0.1}, "momentum", "-0.1"),
    ({"momentum": NAN}, "momentum", "nan"),
    ({"momentum": INF}, "momentum", "inf"),
    ({"weight_decay": -1e39}, "weight_decay"),
    ({"weight_decay": NAN}, "weight_decay", "nan"),
    ({"weight_decay": INF}, "weight_decay", "inf"),
    ({"momentum": 0.9, "dampening": -0.5}, "dampening", "-0.5"),
    ({"momentum": 0.9, "dampening": 1.5}, "dampening", "1.5"),
    ({"momentum": 0.9, "dampening": NAN}, "dampening", "nan"),
    ({"nesterov": True}, "nesterov", "momentum=0.0"),
    ({"momentum": 0.9, "dampening": 0.1, "nesterov": True}, "nesterov", "dampening=0.1"),
]
RATES = [(-1e39, "-1e+39"), (NAN, "nan"), (INF, "inf"), (-INF, "inf")]
NOT_NUMBERS = ["0.9", b"0.9", None, [0.9], {}, 1j, True, np.ones(2), mx.array([0.5, 0.5])]


@pytest.mark.parametrize(("options", "words"), [(o, w) for o, *w in HYPERPARAMETERS], ids=str)
def test_hyperparameters(options, words):
    assert_refused(lambda: optim.SGD(0.1, **options), "SGD", *words)
    w = mx.ones(3)
    state = optim.fused_sgd_init(w, momentum=0.9)
    assert_refused(
        lambda: optim.fused_sgd_step(w, w, state, learning_rate=0.1, **options),
        "fused_sgd_step",
        *words,
    )
    if options.keys() == {"momentum"}:
        assert_refused(lambda: optim.fused_sgd_init(w, **options), "fused_sgd_init", *words)


@pytest.mark.parametrize("value", NOT_NUMBERS, ids=repr)
@pytest.mark.parametrize("name", ["momentum", "weight_decay", "dampening"])
def test_hyperparameters_that_are_no_numbers(name, value):
    assert_refused(
        lambda: optim.SGD(0.1, **{name: value}), "SGD", name, type(value).__name__, error=TypeError
    )


@pytest.mark.parametrize("change", [o for o, *_ in HYPERPARAMETERS], ids=str)
def test_hyperparameters_set_later(change):
    """Attributes are plain: they are checked at the next step."""
    check = Untouched(momentum=0.9)
    check.optimizer.momentum = 0.0
    for name, value in change.items():
        setattr(check.optimizer, name, value)
    check.refused(check.gradients, check.parameters)


@pytest.mark.parametrize(("rate", "word"), RATES, ids=str)
def test_learning_rates(rate, word):
    assert_refused(lambda: optim.SGD(rate), "SGD", "learning_rate", word)
    w = mx.ones(3)
    state = optim.fused_sgd_init(w)
    assert_refused(
        lambda: optim.fused_sgd_step(w, w, state, learning_rate=rate),
        "fused_sgd_step", "learning_rate", word,
    )  # fmt: skip
    assert_refused(lambda: optim.SGD(lambda step: rate), "SGD", "learning_rate", word)


@pytest.mark.parametrize("rate", ["0.1", None, [0.1], {}, 1j, np.ones(2)], ids=repr)
def test_learning_rates_that_are_no_numbers(rate):
    words = ("learning_rate", type(rate).__name__)
    assert_refused(lambda: optim.SGD(rate), "SGD", *words, error=TypeError)
    assert_refused(lambda: optim.SGD(lambda step: rate), "SGD", *words, error=TypeError)


@pytest.mark.parametrize(
    ("rate", "word"),
    [
        (mx.array([0.1, 0.2]), "(2,)"),
        (mx.zeros((0,)), "(0,)"),
        (mx.array(1j), "complex64"),
        (mx.array(True), "bool"),
    ],
    ids=str,
)
def test_learning_rates_that_are_no_real_scalars(rate, word):
    assert_refused(lambda: optim.SGD(rate), "SGD", "learning_rate", word)
    assert_refused(lambda: optim.SGD(lambda step: rate), "SGD", "learning_rate", word)
    optimizer = optim.SGD(0.1)
    with pytest.raises(ValueError, match="learning_rate"):
        optimizer.learning_rate = rate
    assert optimizer.learning_rate.item() == pytest.approx(0.1)
    # Put into the state by hand, it is refused by the step.
    check = Untouched(momentum=0.9)
    check.optimizer.state["learning_rate"] = rate
    check.refused(check.gradients, check.parameters, "learning_rate", word)


def test_a_callable_that_goes_wrong_later():
    rates = iter([0.1, 0.1, mx.array([0.1, 0.2]), -1e39, "fast"])
    check = Untouched(lambda step: next(rates), momentum=0.9, steps=1)
    check.refused(check.gradients, check.parameters, "learning_rate", "(2,)")
    check.refused(check.gradients, check.parameters, "learning_rate", "-1e+39")
    check.refused(check.gradients, check.parameters, "learning_rate", "str", error=TypeError)


# ---- Schedules -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "keywords", "words"),
    [
        ((0.1, 0.0), {}, ("decay_rate", "0.0")),
        ((0.1, -0.5), {}, ("decay_rate", "-0.5")),
        ((0.1, NAN), {}, ("decay_rate", "nan")),
        ((0.1, INF), {}, ("decay_rate", "inf")),
        ((NAN, 0.9), {}, ("init", "nan")),
        ((INF, 0.9), {}, ("init", "inf")),
        ((1e39, 0.9), {}, ("init", "1e+39")),
        ((0.1, 0.9), {"transition_steps": 0}, ("transition_steps", "0")),
        ((0.1, 0.9), {"transition_steps": -3}, ("transition_steps", "-3")),
        ((0.1, 0.9), {"transition_steps": 2**64}, ("transition_steps", str(2**64))),
        ((0.1, 0.9), {"transition_begin": -1}, ("transition_begin", "-1")),
        ((0.1, 0.9), {"end": NAN}, ("end", "nan")),
        ((0.1, 0.9), {"end": 1e39}, ("end", "1e+39")),
    ],
    ids=str,
)
def test_exponential_decay(arguments, keywords, words):
    assert_refused(lambda: exponential_decay(*arguments, **keywords), "exponential_decay", *words)


@pytest.mark.parametrize(
    ("arguments", "keywords", "name"),
    [
        ((None, 0.9), {}, "init"),
        ((0.1, [0.9]), {}, "decay_rate"),
        ((0.1, 0.9), {"transition_steps": [1]}, "transition_steps"),
        ((0.1, 0.9), {"transition_begin": "1"}, "transition_begin"),
        ((0.1, 0.9), {"end": 1j}, "end"),
    ],
    ids=str,
)
def test_exponential_decay_of_wrong_types(arguments, keywords, name):
    assert_refused(
        lambda: exponential_decay(*arguments, **keywords),
        "exponential_decay", name,
        error=TypeError,
    )  # fmt: skip


@pytest.mark.parametrize("step", [-1, 2**64], ids=str)
def test_a_step_out_of_range(step):
    assert_refused(
        lambda: exponential_decay(0.1, 0.9)(step), "exponential_decay", "step", str(step)
    )


def test_a_step_that_is_no_integer():
    schedule = exponential_decay(0.1, 0.9)
    assert_refused(lambda: schedule(1.5), "exponential_decay", "step", "1.5")
    assert_refused(lambda: schedule("1"), "exponential_decay", "step", "str", error=TypeError)
    assert_refused(lambda: schedule(mx.array(1.0)), "exponential_decay", "step", "float32")


# ---- Trees ---------------------------------------------------------------------------


class Untouched:
    """A run in its middle, and the assertion that a refused call leaves it as it was."""

    def __init__(self, rate=0.1, steps=2, **options):
        self.parameters = {"a": mx.arange(1, 5, dtype=mx.float32), "b": [mx.ones((2, 3))]}
        self.gradients = {"a": mx.ones(4), "b": [mx.full((2, 3), 2.0)]}
        self.optimizer = optim.SGD(rate, **options)
        for _ in range(steps):
            self.parameters = self.optimizer.apply_gradients(self.gradients, self.parameters)
        mx.eval(self.parameters, self.optimizer.state)

    def everything(self):
        state = {k: v for k, v in self.optimizer.state.items() if k != "learning_rate"}
        leaves = tree_flatten([self.parameters, self.gradients, state])
        return [(name, of_mlx(leaf).tobytes()) for name, leaf in leaves]

    def refused(self, gradients, parameters, *words, error=ValueError):
        before = self.everything()
        state = self.optimizer.state
        keys = list(state)
        assert_refused(
            lambda: self.optimizer.apply_gradients(gradients, parameters),
            "SGD", *words,
            error=error,
        )  # fmt: skip
        assert self.everything() == before
        assert self.optimizer.state is state
        assert list(state) == keys


def untouched():
    return Untouched(momentum=0.9)


BAD_TREES = {
    "a gradient without a parameter": (
        lambda c: ({**c.gradients, "c": mx.ones(2)}, c.parameters), ("'c'",)),
    "a nested gradient without a parameter": (
        lambda c: ({"b": [mx.ones((2, 3)), mx.ones(1)]}, c.parameters), ("'b'", "2", "1")),
    "a wrong shape": (
        lambda c: ({**c.gradients, "a": mx.ones(5)}, c.parameters), ("'a'", "(5)", "(4)")),
    "a shape that would broadcast": (
        lambda c: ({"b": [mx.ones((1, 3))]}, c.parameters), ("'b.0'", "(1,3)", "(2,3)")),
    "a scalar for an array": (
        lambda c: ({**c.gradients, "a": mx.array(1.0)}, c.parameters), ("'a'", "()")),
    "the transposed shape": (
        lambda c: ({"b": [mx.ones((3, 2))]}, c.parameters), ("'b.0'", "(3,2)")),
    "a dict of gradients for an array": (
        lambda c: ({"a": {"x": mx.ones(4)}}, c.parameters), ("'a'", "dict", "array")),
    "a list of gradients for an array": (
        lambda c: ({"a": [mx.ones(4)]}, c.parameters), ("'a'", "array")),
    "an array for a list": (
        lambda c: ({"b": mx.ones((2, 3))}, c.parameters), ("'b'", "list")),
    "a list for a dict": (
        lambda c: ([mx.ones(4)], c.parameters), ("the tree itself", "dict")),
    "a dict for a list": (
        lambda c: ({"b": {"0": mx.ones((2, 3))}}, c.parameters), ("'b'", "dict", "list")),
    "None for a gradient": (
        lambda c: ({**c.gradients, "a": None}, c.parameters), ("'a'", "NoneType")),
    "a number for a gradient": (
        lambda c: ({**c.gradients, "a": 1.0}, c.parameters), ("'a'", "float")),
    "NumPy for a gradient": (
        lambda c: ({**c.gradients, "a": np.ones(4, np.float32)}, c.parameters),
        ("'a'", "ndarray")),
    "integer gradients": (
        lambda c: ({**c.gradients, "a": mx.ones(4, mx.int32)}, c.parameters), ("'a'", "int32")),
    "complex gradients": (
        lambda c: ({**c.gradients, "a": mx.ones(4, mx.complex64)}, c.parameters),
        ("'a'", "complex64")),
    "boolean gradients": (
        lambda c: ({**c.gradients, "a": mx.ones(4, mx.bool_)}, c.parameters), ("'a'", "bool")),
    "integer parameters": (
        lambda c: (c.gradients, {**c.parameters, "a": mx.ones(4, mx.int64)}), ("'a'", "int64")),
    "complex parameters": (
        lambda c: (c.gradients, {**c.parameters, "a": mx.ones(4, mx.complex64)}),
        ("'a'", "complex64")),
    "float64 parameters": (
        lambda c: (c.gradients, {**c.parameters, "a": mx.ones(4).astype(mx.float64, mx.cpu)}),
        ("'a'", "float64")),
    "a string among the parameters": (
        lambda c: (c.gradients, {**c.parameters, "a": "four"}), ("'a'", "str")),
    "no parameters": (lambda c: (c.gradients, {}), ("'a'",)),
    "None for the parameters": (lambda c: (c.gradients, None), ("the tree itself", "NoneType")),
    "None for the gradients": (lambda c: (None, c.parameters), ("the tree itself", "NoneType")),
    "one path twice": (
        lambda c: ({None: mx.ones(1), "None": mx.ones(1)},
                   {None: mx.ones(1), "None": mx.ones(1)}), ("'None'", "twice")),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD_TREES)
def test_trees(name):
    make, words = BAD_TREES[name]
    check = untouched()
    check.refused(*make(check), *words)
    # And it goes on as if nothing had been.
    twin = untouched()
    ours = check.optimizer.apply_gradients(check.gradients, check.parameters)
    theirs = twin.optimizer.apply_gradients(twin.gradients, twin.parameters)
    for (_, a), (_, b) in zip(tree_flatten(ours), tree_flatten(theirs), strict=True):
        assert of_mlx(a).tobytes() == of_mlx(b).tobytes()


@pytest.mark.parametrize("name", BAD_TREES)
def test_trees_of_the_function(name):
    make, words = BAD_TREES[name]
    check = untouched()
    gradients, parameters = make(check)
    state = optim.fused_sgd_init(check.parameters, momentum=0.9)
    before = check.everything(), [of_mlx(v).tobytes() for _, v in tree_flatten(state)]

    def call():
        own = state
        if name == "one path twice":
            own = optim.fused_sgd_init(parameters, momentum=0.9)
        return optim.fused_sgd_step(parameters, gradients, own, learning_rate=0.1, momentum=0.9)

    op = "fused_sgd_init" if name == "one path twice" else "fused_sgd_step"
    if name in ("a dict of gradients for an array", "a list of gradients for an array"):
        assert_refused(call, op)
    else:
        assert_refused(call, op, *words)
    assert (check.everything(), [of_mlx(v).tobytes() for _, v in tree_flatten(state)]) == before


def test_the_function_wants_every_gradient():
    w = {"a": mx.ones(2), "b": [mx.ones(2), mx.ones(2)]}
    state = optim.fused_sgd_init(w)

    def call(gradients):
        return lambda: optim.fused_sgd_step(w, gradients, state, learning_rate=0.1)

    assert_refused(call({"a": mx.ones(2)}), "fused_sgd_step", "'b'")
    assert_refused(call({"a": mx.ones(2), "b": [mx.ones(2)]}), "fused_sgd_step", "'b'", "2", "1")


@pytest.mark.parametrize("value", [3, "w", None, mx.ones(2, mx.int32), np.ones(2)], ids=repr)
def test_init_of_what_cannot_be_trained(value):
    assert_refused(lambda: optim.fused_sgd_init({"w": [value]}), "fused_sgd_init", "'w.0'")
    if isinstance(value, mx.array):
        return  # the optimizer is given models, which have such data
    assert_refused(lambda: optim.SGD(0.1, momentum=0.9).init({"w": [value]}), "SGD", "'w.0'")


def test_a_refused_first_step_leaves_no_state():
    optimizer = optim.SGD(0.1, momentum=0.9)
    before = dict(optimizer.state)
    assert_refused(
        lambda: optimizer.apply_gradients({"a": mx.ones(2)}, {"a": mx.ones(3)}), "SGD", "'a'"
    )
    assert optimizer.state == before
    optimizer.apply_gradients({"b": mx.ones(2)}, {"b": mx.ones(2)})
    assert optimizer.step.item() == 1


def test_a_tree_that_contains_itself():
    """Python's own error, as from mlx.optimizers."""
    check = untouched()
    before = check.everything()
    tree = [mx.ones(1)]
    tree.append(tree)
    with pytest.raises(RecursionError):
        check.optimizer.apply_gradients(tree, tree)
    assert check.everything() == before


def test_a_model_keeps_its_parameters():
    model = nn.Linear(3, 2)
    bits = [of_mlx(v).tobytes() for _, v in tree_flatten(model.parameters())]
    optimizer = optim.SGD(0.1, momentum=0.9)
    gradients = {"weight": mx.ones((2, 3)), "bias": mx.ones(3)}
    assert_refused(lambda: optimizer.update(model, gradients), "SGD", "'bias'")
    assert [of_mlx(v).tobytes() for _, v in tree_flatten(model.parameters())] == bits


def test_in_a_compiled_step():
    """The same error; but MLX leaves its placeholders in captured trees after any exception."""
    check = untouched()
    parameters = dict(check.parameters)
    state = [parameters, check.optimizer.state]

    def body(gradients):
        parameters.update(check.optimizer.apply_gradients(gradients, parameters))

    compiled = mx.compile(body, inputs=state, outputs=state)
    assert_refused(lambda: compiled({"a": mx.ones(5)}), "SGD", "'a'", "(5)")


# ---- States --------------------------------------------------------------------------


def key_of(state):
    (key,) = state["arenas"]
    return key


def entry_of(state):
    return state["arenas"][key_of(state)]


def other_model():
    optimizer = optim.SGD(0.1, momentum=0.9)
    optimizer.init({"x": mx.ones(4), "y": mx.ones(9)})
    return optimizer.state


def other_shapes(unpacked):
    optimizer = optim.SGD(0.1, momentum=0.9)
    optimizer.init({"a": mx.ones(7), "b": [mx.ones((2, 3))]})
    return optimizer.unpacked_state() if unpacked else optimizer.state


def renamed(state):
    """The right momentum under the name of another layout."""
    return {**state, "arenas": {"layout_0123456789abcdef": entry_of(state)}}


def with_entry(**changes):
    def change(state):
        return {**state, "arenas": {key_of(state): {**entry_of(state), **changes}}}

    return change


def without_entry(name):
    def change(state):
        entry = {k: v for k, v in entry_of(state).items() if k != name}
        return {**state, "arenas": {key_of(state): entry}}

    return change


BAD_STATES = {
    "None": (lambda s: None, ("nothing", "dict")),
    "a list": (lambda s: [s], ("list",)),
    "empty": (lambda s: {}, ("step",)),
    "without step": (lambda s: {k: v for k, v in s.items() if k != "step"}, ("step", "nothing")),
    "a number for step": (lambda s: {**s, "step": 3.0}, ("step", "float")),
    "a negative step": (lambda s: {**s, "step": -3}, ("step", "int", "0 or more")),
    "a negative step in an array": (
        lambda s: {**s, "step": mx.array(-3)}, ("step", "-3", "0 or more")),
    "a step of float32": (lambda s: {**s, "step": mx.array(3.0)}, ("step", "float32")),
    "a step of shape (1,)": (
        lambda s: {**s, "step": mx.array([3], mx.uint64)}, ("step", "(1,)")),
    "without learning rate": (
        lambda s: {k: v for k, v in s.items() if k != "learning_rate"}, ("learning_rate",)),
    "a number for the learning rate": (
        lambda s: {**s, "learning_rate": 0.1}, ("learning_rate", "float")),
    "an array of learning rates": (
        lambda s: {**s, "learning_rate": mx.ones(2)}, ("learning_rate", "(2,)")),
    "None for arenas": (lambda s: {**s, "arenas": None}, ("arenas", "nothing")),
    "a list of arenas": (lambda s: {**s, "arenas": [entry_of(s)]}, ("arenas", "list")),
    "an array for an entry": (
        lambda s: {**s, "arenas": {key_of(s): mx.ones(3)}}, ("arenas", "float32")),
    "without momentum": (without_entry("momentum"), ("momentum",)),
    "None for momentum": (with_entry(momentum=None), ("momentum", "nothing")),
    "None for an arena": (with_entry(momentum=[None]), ("momentum",)),
    "an arena too few": (with_entry(momentum=[]), ("momentum",)),
    "an arena too many": (
        lambda s: with_entry(momentum=entry_of(s)["momentum"] * 2)(s), ("momentum",)),
    "an arena of another size": (with_entry(momentum=[mx.ones(100)]), ("100",)),
    "an arena of another dtype": (
        lambda s: with_entry(momentum=[entry_of(s)["momentum"][0].astype(mx.int32)])(s),
        ("int32", "float32")),
    "an arena of another shape": (
        lambda s: with_entry(momentum=[entry_of(s)["momentum"][0][None]])(s), ("momentum",)),
    "a foreign leaf": (lambda s: {**s, "a": {"m": mx.ones(4)}}, ("'a.m'",)),
    "a number for momentum": (lambda s: {**s, "a": {"v": 1.0}}, ("'a.v'", "float")),
    "integer momentum": (
        lambda s: {**s, "a": {"v": mx.ones(4, mx.int32)}}, ("'a.v'", "int32")),
    "another model": (lambda s: other_model(), ("another model",)),
    "another model's shapes": (lambda s: other_shapes(False), ("another model", "'a'", "(7,)")),
    "another model's shapes, of MLX": (
        lambda s: other_shapes(True), ("another model", "'a'", "(7,)")),
    "the name of another layout": (renamed, ("layout_0123456789abcdef",)),
}  # fmt: skip
# What only a state that is loaded into an optimizer is asked.
NEEDS_TABLE = {
    "without table": (without_entry("table"), ("table",)),
    "None for the table": (with_entry(table=None), ("table",)),
    "a table that is no JSON": (with_entry(table=mx.array([1, 2, 3], mx.uint8)), ("table",)),
    "a table of floats": (with_entry(table=mx.ones(4)), ("table",)),
    "another's table": (
        lambda s: with_entry(table=entry_of(other_model())["table"])(s),
        ("table of 'x' and 1 more", "layout_")),
}  # fmt: skip


def copied(state):
    """Containers of its own, the same arrays."""
    if isinstance(state, dict):
        return {k: copied(v) for k, v in state.items()}
    return [copied(v) for v in state] if isinstance(state, list) else state


@pytest.mark.parametrize("how", ["step", "init"])
@pytest.mark.parametrize("name", BAD_STATES)
def test_states_of_the_optimizer(name, how):
    make, words = BAD_STATES[name]
    check = untouched()
    bad = make(copied(check.optimizer.state))
    optimizer = optim.SGD(0.1, momentum=0.9)
    optimizer.state = bad
    before = copied(bad)
    parameters = [of_mlx(v).tobytes() for _, v in tree_flatten(check.parameters)]
    call = {
        "step": lambda: optimizer.apply_gradients(check.gradients, check.parameters),
        "init": lambda: optimizer.init(check.parameters),
    }[how]
    assert_refused(call, "SGD", *words)
    if isinstance(bad, dict):
        assert optimizer.state is not bad  # whoever made it keeps it
        after = tree_flatten(optimizer.state)
        assert [k for k, _ in after] == [k for k, _ in tree_flatten(before)]
        assert all(a is b for (_, a), (_, b) in zip(after, tree_flatten(before), strict=True))
    assert [of_mlx(v).tobytes() for _, v in tree_flatten(check.parameters)] == parameters
    # A good state mends it.
    optimizer.state = check.optimizer.state
    optimizer.apply_gradients(check.gradients, check.parameters)
    assert optimizer.step.item() == 3


@pytest.mark.parametrize("name", NEEDS_TABLE)
def test_tables_in_a_new_process(name):
    """A layout that this process has seen needs no table; forget it."""
    from mlx_fused_optim import _layout

    make, words = NEEDS_TABLE[name]
    check = untouched()
    optimizer = optim.SGD(0.1, momentum=0.9)
    optimizer.state = make(copied(check.optimizer.state))
    _layout._layouts.clear()
    assert_refused(
        lambda: optimizer.apply_gradients(check.gradients, check.parameters), "SGD", *words
    )


@pytest.mark.parametrize("name", BAD_STATES)
def test_states_of_the_function(name):
    make, _ = BAD_STATES[name]
    check = untouched()
    bad = make(copied(check.optimizer.state))
    assert_refused(
        lambda: optim.fused_sgd_step(
            check.parameters, check.gradients, bad, learning_rate=0.1, momentum=0.9
        ),
        "fused_sgd_step",
    )


def test_an_error_of_the_extension_names_who_asked():
    parameters = {"w": mx.ones(3)}
    for name in ("sgd", "adamw", "lion"):
        options = {"momentum": 0.9} if name == "sgd" else {}
        state = getattr(optim, f"fused_{name}_init")(parameters, **options)
        (layout,) = state["arenas"]
        entry = {slot: [] for slot in state["arenas"][layout]}
        bad = {**state, "arenas": {layout: entry}}
        step = getattr(optim, f"fused_{name}_step")
        assert_refused(
            lambda step=step, bad=bad, options=options: step(
                parameters, parameters, bad, learning_rate=0.1, **options
            ),
            f"fused_{name}_step", "number of arenas",
        )  # fmt: skip


@pytest.mark.parametrize("name", sorted(BAD_STATES.keys() - {"None", "another model"}))
def test_states_for_init_of_the_function(name):
    """None is the beginning, and a state that knows none of the tensors is fine here."""
    make, _ = BAD_STATES[name]
    check = untouched()
    bad = make(copied(check.optimizer.state))
    # Other parameters, so that every part is looked at.
    parameters = {**check.parameters, "new": mx.ones(1)}
    assert_refused(
        lambda: optim.fused_sgd_init(parameters, momentum=0.9, state=bad), "fused_sgd_init"
    )


def test_a_state_without_momentum_for_a_step_with_it():
    w = mx.ones(3)
    state = optim.fused_sgd_init(w)
    assert_refused(
        lambda: optim.fused_sgd_step(w, w, state, learning_rate=0.1, momentum=0.9),
        "fused_sgd_step", "momentum", "fused_sgd_init",
    )  # fmt: skip


def test_the_state_of_other_parameters():
    state = optim.fused_sgd_init({"w": mx.ones(3)}, momentum=0.9)
    for parameters in ({"w": mx.ones(4)}, {"x": mx.ones(3)}, {"w": mx.ones(3, mx.float16)}):
        assert_refused(
            lambda p=parameters: optim.fused_sgd_step(
                p, p, state, learning_rate=0.1, momentum=0.9
            ),
            "fused_sgd_step", "other parameters",
        )  # fmt: skip


def test_a_state_of_another_optimizer_of_mlx():
    adam = mlx.optimizers.Adam(0.1)
    w = {"w": mx.ones(3)}
    adam.apply_gradients(w, w)
    optimizer = optim.SGD(0.1, momentum=0.9)
    optimizer.state = adam.state
    assert_refused(lambda: optimizer.apply_gradients(w, w), "SGD", "'w.m'")


def test_a_loaded_state_in_a_compiled_step_says_what_to_do():
    """Its table has no value inside the trace; init() before helps."""
    from mlx_fused_optim import _layout

    def loaded():
        check = untouched()
        _layout._layouts.clear()
        # Another layout than the state's: its momentum has to be found in there.
        part = {"a": check.parameters["a"]}
        optimizer = optim.SGD(0.1, momentum=0.9)
        optimizer.state = check.optimizer.state
        return optimizer, part

    def compiled(optimizer, part):
        def body():
            return optimizer.apply_gradients({"a": mx.ones(4)}, part)

        return mx.compile(body, inputs=optimizer.state, outputs=optimizer.state)

    with pytest.raises(ValueError, match=r"init\(parameters\)"):
        compiled(*loaded())()
    optimizer, part = loaded()
    optimizer.init(part)
    got = compiled(optimizer, part)()
    other, part = loaded()
    want = other.apply_gradients({"a": mx.ones(4)}, part)
    assert of_mlx(got["a"]).tobytes() == of_mlx(want["a"]).tobytes()
