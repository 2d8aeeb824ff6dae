"""A step that is taken again, csrc/binding/prepared.h: the same as one that Python looked at, and
never taken where something has changed since."""

import contextlib
import copy
import math
import pickle

import mlx.core as mx
import mlx_fused_optim as optim
import numpy as np
import pytest
from mlx.utils import tree_flatten
from mlx_fused_optim import _ext, functional
from mlx_fused_optim.optimizers import base

OPTIONS = {
    "plain": dict(),
    "momentum": dict(momentum=0.9, weight_decay=0.01),
    "nesterov": dict(momentum=0.9, nesterov=True),
    "float32 momentum": dict(momentum=0.9, state_dtype=mx.float32),
    "master": dict(momentum=0.9, master_weights=True, ema_decay=0.5),
    "master of 24 bits": dict(optimizer="AdamW", master_weights="24bit"),
    "bytes": dict(optimizer="AdamW", state_dtype="8bit", min_8bit_size=16),
    "bytes at random": dict(
        momentum=0.9, state_dtype="8bit", min_8bit_size=0, rounding="stochastic", clip_norm=0.5
    ),
    "compensated": dict(compensated=True, clip_value=0.5),
    "stochastic": dict(momentum=0.9, rounding="stochastic", seed=3),
    "adamw": dict(optimizer="AdamW", bias_correction=True, amsgrad=True, weight_decay=0.1),
    "adam": dict(optimizer="Adam", betas=(0.5, 0.75), weight_decay=0.1, state_dtype=mx.bfloat16),
    "adamax": dict(optimizer="Adamax", master_weights=True),
    "lion": dict(optimizer="Lion", weight_decay=0.5, ema_decay=0.5),
    "rmsprop": dict(optimizer="RMSprop", compensated=True),
    "adagrad": dict(optimizer="Adagrad", rounding="stochastic"),
    "adadelta": dict(optimizer="AdaDelta"),
    "clipped": dict(optimizer="AdamW", clip_norm=0.5, weight_decay=0.1),
    "skipping": dict(optimizer="Lion", skip_nonfinite=True, master_weights=True),
    "trust ratio": dict(momentum=0.9, trust_coefficient=0.5, clip_norm=2.0, skip_nonfinite=True),
    "groups": dict(
        optimizer="Adam",
        weight_decay=0.1,
        clip_norm=1.0,
        groups=[(lambda path, _: path == "a", dict(weight_decay=0.0, learning_rate_factor=0.5))],
    ),
    "scaled": dict(grad_scale=4.0, decoupled=True, weight_decay=0.1, maximize=True),
}
RATES = {
    "constant": lambda: 0.25,
    "integer": lambda: mx.array(1),
    "schedule": lambda: optim.exponential_decay(0.5, 0.75),
}


def tree(seed, dtype=mx.bfloat16):
    values = np.random.default_rng(seed).standard_normal
    return {
        "a": mx.array(values((3, 5)), mx.float32),
        "b": [{"w": mx.array(values(70)).astype(dtype)}, (mx.array(values(())).astype(dtype),)],
    }


def same(got, want):
    got, want = tree_flatten(got), tree_flatten(want)
    assert [path for path, _ in got] == [path for path, _ in want]
    for (path, a), (_, b) in zip(got, want, strict=True):
        assert a.dtype == b.dtype and a.shape == b.shape, path
        assert mx.array_equal(a, b).item(), path


@pytest.fixture
def calls(monkeypatch):
    """How often Python looked at a step."""
    seen = []
    for module in (base, functional):
        original = module.take_step

        def counted(*args, original=original, **kwargs):
            seen.append(args[0])
            return original(*args, **kwargs)

        monkeypatch.setattr(module, "take_step", counted)
    functional._prepared.clear()
    return seen


@pytest.fixture
def never(monkeypatch):
    """Makes every step one that Python looks at."""

    def switch():
        for module in (base, functional):
            monkeypatch.setattr(module, "prepared_step", lambda *_: None)
        functional._prepared.clear()

    return switch


def optimizer_run(options, rate, steps=4):
    options = dict(options)
    optimizer = getattr(optim, options.pop("optimizer", "SGD"))(rate, **options)
    parameters = tree(1)
    for i in range(steps):
        parameters = optimizer.apply_gradients(tree(2 + i), parameters)
        mx.eval(parameters, optimizer.state)
    return parameters, optimizer.state


def function_run(options, rate, steps=4):
    options, parameters = dict(options), tree(1)
    name = f"fused_{options.pop('optimizer', 'SGD').lower()}"
    begin, step = (getattr(optim, f"{name}_{end}") for end in ("init", "step"))
    state = begin(parameters, **options)
    for i in range(steps):
        parameters, state = step(parameters, tree(2 + i), state, learning_rate=rate, **options)
        mx.eval(parameters, state)
    return parameters, state


@pytest.mark.parametrize("run", [optimizer_run, function_run])
@pytest.mark.parametrize("rate", RATES)
@pytest.mark.parametrize("options", OPTIONS)
def test_the_same_as_a_step_that_python_looks_at(run, rate, options, calls, never):
    rate, options = RATES[rate](), OPTIONS[options]
    got = run(options, rate)
    # A function looks at a list in each of its steps: anybody may have changed it.
    looked_at = 4 if run is function_run and "groups" in options else 1
    assert len(calls) == looked_at
    never()
    want = run(options, rate)
    assert len(calls) == looked_at + 4
    same(got, want)


def test_in_a_compiled_step(never):
    def run():
        optimizer = optim.SGD(optim.exponential_decay(0.5, 0.75), momentum=0.9)
        parameters = tree(1)
        optimizer.init(parameters)
        for i in range(3):  # prepared, then traced
            parameters = optimizer.apply_gradients(tree(2 + i), parameters)
        step = mx.compile(optimizer.apply_gradients, optimizer.state, optimizer.state)
        for i in range(3):
            parameters = step(tree(5 + i), parameters)
            mx.eval(parameters, optimizer.state)
        return parameters, optimizer.state

    got = run()
    assert got[1]["step"].item() == 6
    never()
    same(got, run())


# ---- What Python has to look at ---------------------------------------------------


@pytest.fixture
def prepared(calls):
    """An optimizer that has taken two steps, one of them as prepared."""
    optimizer = optim.SGD(0.25, momentum=0.9)
    parameters = tree(1)
    for i in range(2):
        parameters = optimizer.apply_gradients(tree(2 + i), parameters)
    assert calls == ["SGD"]
    return optimizer, parameters


CHANGES = {
    "learning_rate": optim.cosine_decay(0.5, 10),
    "momentum": 0.5,
    "weight_decay": optim.cosine_decay(0.5, 10),
    "dampening": 0.5,
    "nesterov": True,
    "clip_value": 0.01,
    "clip_norm": 0.01,
    "grad_scale": 2.0,
    "maximize": True,
    "groups": [(lambda path, array: path == "a", {"learning_rate": 0.0})],
    "ema_decay": 0.5,
    "state_dtype": mx.float32,
}


@pytest.mark.parametrize("name", CHANGES)
def test_a_changed_option_counts_at_once(prepared, calls, name):
    optimizer, parameters = prepared
    fresh = optim.SGD(0.25, momentum=0.9)
    fresh.state = optimizer.state
    for one in (optimizer, fresh):
        setattr(one, name, CHANGES[name])
    got, want = (one.apply_gradients(tree(9), parameters) for one in (optimizer, fresh))
    assert calls == ["SGD"] * 3
    same((got, optimizer.state), (want, fresh.state))


def test_a_rate_that_is_set_needs_no_look(prepared, calls):
    optimizer, parameters = prepared
    optimizer.learning_rate = 0.0
    same(optimizer.apply_gradients(tree(9), parameters), parameters)
    assert calls == ["SGD"]


def test_the_scale_of_one_call(prepared, calls):
    optimizer, parameters = prepared
    fresh = optim.SGD(0.25, momentum=0.9)
    fresh.state = optimizer.state
    got = optimizer.apply_gradients(tree(9), parameters, grad_scale=2.0)
    same(got, fresh.apply_gradients(tree(9), parameters, grad_scale=2.0))
    assert calls == ["SGD"] * 3


def test_other_tensors(prepared, calls):
    optimizer, parameters = prepared
    for part in ({"a": tree(9)["a"]}, tree(9)):
        optimizer.apply_gradients(part, parameters)
    assert calls == ["SGD"] * 3


def test_a_state_that_is_assigned(prepared, calls):
    optimizer, parameters = prepared
    optimizer.state = {"step": mx.array(7, mx.uint64), "learning_rate": mx.array(0.5)}
    optimizer.apply_gradients(tree(9), parameters)
    assert calls == ["SGD"] * 2 and optimizer.step.item() == 8


def test_momentum_that_is_put_in(prepared, calls):
    """As mlx.optimizers keeps it: it wins, in a step of the optimizer and of the function."""
    optimizer, parameters = prepared
    state = dict(optimizer.state)
    for own in (optimizer.state, state):
        own["a"] = {"v": mx.full((3, 5), 64.0)}
    optimizer.apply_gradients(tree(9), parameters)
    assert calls == ["SGD"] * 2 and "a" not in optimizer.state
    want = tree(9)["a"] + mx.array(0.9) * 64.0
    assert mx.array_equal(optimizer.state["a"]["v"], want).item()

    parameters, options = tree(1), dict(learning_rate=0.25, momentum=0.9)
    optim.fused_sgd_step(
        parameters, tree(9), optim.fused_sgd_init(parameters, momentum=0.9), **options
    )
    _, state = optim.fused_sgd_step(parameters, tree(9), state, **options)
    assert calls[2:] == ["fused_sgd_step"] * 2 and "a" not in state
    same(state["arenas"], optimizer.state["arenas"])


def test_a_schedule_of_a_subclass(calls):
    class Scheduled(optim.SGD):
        def __init__(self):
            super().__init__(0.25, momentum=0.9)
            self._maybe_schedule("own", lambda step: step * 2.0)

    optimizer, parameters = Scheduled(), tree(1)
    for i in range(3):
        parameters = optimizer.apply_gradients(tree(2 + i), parameters)
        assert optimizer.state["own"].item() == 2 * i
    assert calls == ["SGD"] * 3


WRONG = {
    "no step": lambda state: state.pop("step"),
    "a step that is no integer": lambda state: state.update(step=mx.array(1.0)),
    "a step that is text": lambda state: state.update(step="1"),
    "a step below 0": lambda state: state.update(step=-1),
    "a slot that nobody knows": lambda state: next(iter(state["arenas"].values())).update(
        m=[mx.zeros(64)]
    ),
    "no rate": lambda state: state.pop("learning_rate"),
    "a rate with a shape": lambda state: state.update(learning_rate=mx.array([0.5, 0.5])),
    "a rate that is a number of bits": lambda state: state.update(learning_rate=mx.array(True)),
    "arenas that are a list": lambda state: state.update(arenas=[]),
    "an entry that is a list": lambda state: state["arenas"].update(
        {key: [] for key in state["arenas"]}
    ),
    "momentum that is one array": lambda state: next(iter(state["arenas"].values())).update(
        momentum=mx.zeros(64)
    ),
    "momentum of another shape": lambda state: next(iter(state["arenas"].values())).update(
        momentum=[mx.zeros(64)]
    ),
    "momentum that is text": lambda state: next(iter(state["arenas"].values())).update(
        momentum=["a", "b"]
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_state_that_went_wrong(prepared, calls, name):
    """The words are those of a first step."""
    optimizer, parameters = prepared
    WRONG[name](optimizer.state)
    before = dict(optimizer.state)
    with pytest.raises(ValueError, match=r"^\[SGD\] .*: got .*, (allowed|expected) |^\[fused"):
        optimizer.apply_gradients(tree(9), parameters)
    assert calls in (["SGD"], ["SGD"] * 2)
    assert optimizer.state.keys() == before.keys()
    assert all(optimizer.state[key] is before[key] for key in before)


def test_a_prepared_step_counts_what_it_skips(calls):
    optimizer = optim.AdamW(0.5, skip_nonfinite=True, clip_norm=1.0)
    parameters = tree(1)
    for i in range(6):
        gradients = tree(2 + i)
        gradients["a"] = gradients["a"] * (math.inf if i % 2 else 1.0)
        before = parameters["a"].tolist()
        parameters = optimizer.apply_gradients(gradients, parameters)
        assert (parameters["a"].tolist() == before) == bool(i % 2)
        assert math.isfinite(optimizer.state["grad_norm"].item()) != bool(i % 2)
    assert optimizer.state["skipped"].item() == 3 and optimizer.state["step"].item() == 3
    assert len(calls) == 1


@pytest.mark.parametrize("name", ["grad_norm", "skipped"])
def test_counters_that_went_wrong(calls, name):
    optimizer = optim.AdamW(0.5, skip_nonfinite=True)
    parameters = optimizer.apply_gradients(tree(2), tree(1))
    del optimizer.state[name]  # begins again
    parameters = optimizer.apply_gradients(tree(2), parameters)
    assert len(calls) == 2 and optimizer.state[name].size == 1
    optimizer.state[name] = mx.array(1, mx.int32)
    with pytest.raises(ValueError, match=rf"^\[AdamW\] state\['{name}'\] is of the wrong type"):
        optimizer.apply_gradients(tree(2), parameters)


@pytest.mark.parametrize("option", [dict(clip_norm=1.0), dict(skip_nonfinite=True)])
def test_counters_of_an_earlier_option_are_no_hindrance(option, calls, never):
    def run():
        optimizer, parameters = optim.AdamW(0.5, **option), tree(1)
        for i in range(5):
            if i == 2:
                optimizer.clip_norm, optimizer.skip_nonfinite = None, False
            parameters = optimizer.apply_gradients(tree(2 + i), parameters)
        return parameters, optimizer.state

    got = run()
    assert len(calls) == 2  # the first step with each set of options
    never()
    same(got, run())


def test_what_an_earlier_option_kept_is_forgotten(calls):
    """A step without momentum does not know that a state has more than it says."""
    optimizer, parameters = optim.SGD(0.25), tree(1)
    parameters = optimizer.apply_gradients(tree(2), parameters)
    kept = optim.SGD(0.25, ema_decay=0.5)
    kept.init(parameters)
    optimizer.state["arenas"] = kept.state["arenas"]
    optimizer.apply_gradients(tree(3), parameters)
    assert calls == ["SGD"] * 2 and "arenas" not in optimizer.state


# ---- The function -------------------------------------------------------------------


def test_the_function_knows_several_sets_of_arguments(calls):
    parameters = tree(1)
    many, few = {"momentum": 0.9}, {"momentum": 0.5}
    states = [optim.fused_sgd_init(parameters, momentum=0.9) for _ in range(2)]
    for i in range(3):
        for options, state in zip((many, few), states, strict=True):
            optim.fused_sgd_step(parameters, tree(2 + i), state, learning_rate=0.5, **options)
    assert calls == ["fused_sgd_step"] * 2


def test_numbers_that_are_new_objects_leave_nothing_behind(calls):
    parameters = {"w": mx.ones(3)}
    state = optim.fused_sgd_init(parameters, momentum=0.9)
    for i in range(100):
        parameters, state = optim.fused_sgd_step(
            parameters, parameters, state, learning_rate=0.0, momentum=float(f"0.{i}1")
        )
    assert len(calls) == 100 and len(functional._prepared) <= 16


@pytest.mark.skipif(mx.is_available(mx.gpu), reason="MLX has a GPU here")
def test_the_stream_is_that_of_each_call():
    """One that is not there tells that it was looked at."""
    parameters = {"w": mx.ones(3)}
    state = optim.fused_sgd_init(parameters)
    for _ in range(2):
        optim.fused_sgd_step(parameters, parameters, state, learning_rate=0.5)
    with pytest.raises(ValueError, match="gpu"):
        optim.fused_sgd_step(parameters, parameters, state, learning_rate=0.5, stream=mx.gpu)


def test_a_wrong_argument_is_refused_after_a_right_one():
    parameters = {"w": mx.ones(3)}
    state = optim.fused_sgd_init(parameters, momentum=0.9)

    def step(**changes):
        arguments = dict(learning_rate=0.5, momentum=0.9)
        return optim.fused_sgd_step(parameters, parameters, state, **{**arguments, **changes})

    step()
    for change in (
        dict(learning_rate=-1e39),
        dict(momentum=-1.0),
        dict(learning_rate=mx.ones(2)),
        dict(clip_value=0.0),
        dict(nesterov=True, dampening=0.5),
    ):
        with pytest.raises(ValueError, match=r"^\[fused_sgd_step\] .*: got "):
            step(**change)
    for bad in (None, [], {"step": 1}):
        with pytest.raises(ValueError, match=r"^\[fused_sgd_step\] .*: got "):
            optim.fused_sgd_step(parameters, parameters, bad, learning_rate=0.5, momentum=0.9)


def stepped(function, **options):
    return function({"w": mx.ones(4)}, {"w": mx.ones(4)}, learning_rate=0.5, **options)[0]["w"][0]


def test_an_argument_that_changes_counts_at_once():
    """The same object with another value: an array in place, a list."""
    state = optim.fused_sgd_init({"w": mx.ones(4)})

    def step(**options):
        return stepped(lambda p, g, **o: optim.fused_sgd_step(p, g, state, **o), **options).item()

    scale, decay, groups = np.array(2.0), mx.array(0.5), []
    assert [step(grad_scale=scale) for _ in range(2)] == [0.75, 0.75]
    scale[...] = 4.0
    assert step(grad_scale=scale) == 0.875
    assert [step(weight_decay=decay) for _ in range(2)] == [0.25, 0.25]
    decay *= 0
    assert step(weight_decay=decay) == 0.5
    assert [step(groups=groups) for _ in range(2)] == [0.5, 0.5]
    groups.append((lambda path, array: True, {"learning_rate": 0.0}))
    assert step(groups=groups) == 1.0


@pytest.mark.parametrize("name", ["momentum", "weight_decay", "dampening"])
def test_an_attribute_that_changes_in_place_counts_at_once(name):
    value = mx.array(0.5)
    options = {"momentum": 0.5, "weight_decay": 0.5, name: value}
    changing, fixed = optim.SGD(0.5, **options), optim.SGD(0.5, **{**options, name: 0.5})
    gradients, parameters = {"w": mx.ones(4)}, {"w": mx.ones(4)}
    for number in (0.5, 0.5, 0.25):
        value += number - value
        setattr(fixed, name, number)
        one, other = (o.apply_gradients(gradients, parameters) for o in (changing, fixed))
        same((one, changing.state), (other, fixed.state))


@pytest.mark.parametrize("kind", ["function", "optimizer"])
def test_a_rate_of_the_first_step_is_not_kept(kind):
    parameters = {"w": mx.ones(4)}
    state = optim.fused_sgd_init(parameters)
    optimizer = optim.SGD(0.5)
    mx.eval(parameters, state)
    before = mx.get_active_memory()
    big = mx.ones(1 << 20)
    rate = (big * 2).mean()  # lazy: it holds 4 MiB
    if kind == "function":
        result = optim.fused_sgd_step(parameters, parameters, state, learning_rate=rate)
    else:
        optimizer.learning_rate = rate
        result = optimizer.apply_gradients(parameters, parameters)
        optimizer.learning_rate = 0.5
    del big, rate, result
    mx.synchronize()
    assert mx.get_active_memory() - before < 1 << 20


class Numbered(optim.SGD):
    """A subclass with a state for copies of its own."""

    def __getstate__(self):
        return dict(self.__dict__)


def test_a_subclass_that_copies_itself(calls):
    optimizer, parameters = Numbered(0.25, momentum=0.9), tree(1)
    parameters = optimizer.apply_gradients(tree(2), parameters)
    for copied in (copy.deepcopy(optimizer), pickle.loads(pickle.dumps(optimizer))):
        mine = copy.deepcopy(optimizer).apply_gradients(tree(3), parameters)
        same(copied.apply_gradients(tree(3), parameters), mine)


@pytest.mark.parametrize("change", ["clear", "grow"])
def test_keys_that_change_the_trees(change):
    """Whatever comes of it: an error, or a step. Not a crash."""

    class Key:
        def __init__(self, name):
            self.name, self.looks = name, 0

        def __hash__(self):
            return hash(self.name)

        def __eq__(self, other):
            return isinstance(other, Key) and self.name == other.name

        def __str__(self):
            self.looks += 1
            if change == "clear":
                gradients.clear()
                parameters.clear()
            elif self.looks > 1:
                gradients["more"] = [mx.ones(2)] * 50
            return self.name

    gradients, parameters = ({Key(n): {"x": mx.ones(3)} for n in "abc"} for _ in range(2))
    state = optim.fused_sgd_init({"w": mx.ones(3)})
    with contextlib.suppress(ValueError, RuntimeError, KeyError):
        optim.fused_sgd_step(parameters, gradients, state, learning_rate=0.1)


@pytest.mark.filterwarnings("ignore:nanobind")
def test_an_array_that_was_never_made(prepared):
    optimizer, parameters = prepared
    optimizer.state["step"] = mx.array.__new__(mx.array)
    with pytest.raises((TypeError, ValueError, RuntimeError)):
        optimizer.apply_gradients(tree(9), parameters)
    with pytest.raises((TypeError, ValueError, RuntimeError)):
        optim.SGD(0.1).apply_gradients({"w": mx.array.__new__(mx.array)}, {"w": mx.ones(3)})


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda one: pickle.loads(pickle.dumps(one))])
def test_copies_prepare_their_own(prepared, calls, copied):
    optimizer, parameters = prepared
    other = copied(optimizer)
    same(other.apply_gradients(tree(9), parameters), optimizer.apply_gradients(tree(9), parameters))
    assert calls == ["SGD"] * 2


def test_a_layout_of_other_tensors_is_refused():
    """Below Python: the step itself asks for the tensors that it was laid out for."""
    one, two = {"w": mx.ones(3)}, {"w": mx.ones(4)}
    layout = _ext.Layout(_ext.Tree(two, two, "test"))
    with pytest.raises(ValueError, match=r"\[fused_step\] the layout is of other tensors: got"):
        _ext.fused_step(
            _ext.Tree(one, one, "test"),
            layout,
            [[]] * 6,
            mx.array(0, mx.uint64),
            _ext.Options(rule=0, scalars=[0.5, 0.0, 1.0, 0.0, 0.0], flags=0),
        )
