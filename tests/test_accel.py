"""Programs written for mlx.optimizers that run with ours unchanged: mlx_fused_optim.install() and
python -m mlx_fused_optim.accel."""

import copy
import importlib
import inspect
import os
import pickle
import re
import subprocess
import sys
import textwrap
import zipfile
from functools import partial
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers
import mlx.optimizers as imported_before
import mlx_fused_optim as optim
import pytest
from bits import same
from mlx.optimizers import AdamW as name_from_before
from mlx.utils import tree_flatten
from test_clients import LOOPS

REGISTRY = {"adam": mlx.optimizers.Adam, "adamw": mlx.optimizers.AdamW}
OURS = ["SGD", "Adam", "AdamW", "Adamax", "Lion", "Muon", "RMSprop", "Adagrad", "AdaDelta"]
BEFORE = {name: vars(getattr(mlx.optimizers, name)).copy() for name in [*OURS, "Optimizer"]}


@pytest.fixture
def installed():
    optim.install()
    yield
    optim.uninstall()


@pytest.fixture(autouse=True)
def on_the_cpu():
    """Where MLX's step has the bits of ours."""
    device = mx.default_device()
    mx.set_default_device(mx.cpu)
    yield
    mx.set_default_device(device)


def unchanged():
    return all(vars(getattr(mlx.optimizers, name)) == own for name, own in BEFORE.items())


def is_ours(optimizer):
    return isinstance(optimizer, optim.FusedOptimizer)


# ---- Every way to the classes -----------------------------------------------------------


def within_a_function():
    from mlx.optimizers.optimizers import AdamW

    return AdamW


WAYS = {
    "imported before": lambda: imported_before.AdamW,
    "a name from before": lambda: name_from_before,
    "a registry": lambda: REGISTRY["adamw"],
    "a default": lambda kind=mlx.optimizers.AdamW: kind,
    "getattr": lambda: getattr(importlib.import_module("mlx.optimizers"), "AdamW"),  # noqa: B009
    "within a function": within_a_function,
    "a partial": lambda: partial(REGISTRY["adamw"], eps=1e-8),
}


@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
def test_however_a_class_is_found(installed, way):
    optimizer = way()(1e-3, weight_decay=0.125)
    assert isinstance(optimizer, optim.AdamW)
    assert isinstance(optimizer, mlx.optimizers.AdamW)
    assert optimizer.weight_decay == 0.125


@pytest.mark.parametrize("name", OURS)
def test_each_is_ours_and_has_the_bits_of_mlx_for_vectors(name):
    results, kind = [], getattr(mlx.optimizers, name)
    for install in (optim.install, optim.uninstall):
        install()
        optimizer = kind(learning_rate=0.125)
        p = {"w": mx.array([1.0, -2.0, 3.0])}
        for _ in range(3):
            p = optimizer.apply_gradients({"w": mx.array([0.5, 0.25, -1.0])}, p)
        results.append(p["w"])
        assert isinstance(optimizer, getattr(optim, name)) == (install is optim.install)
        assert type(optimizer).__name__ == name
    assert same(*results)


@pytest.mark.parametrize("name", ["Adafactor", "MultiOptimizer"])
def test_others_stay_as_they_are(installed, name):
    kind = getattr(mlx.optimizers, name)
    arguments = [[mlx.optimizers.SGD(0.1)]] if name == "MultiOptimizer" else [0.1]
    assert type(kind(*arguments)) is kind


def test_the_parts_of_a_multi_optimizer_are_ours(installed):
    both = mlx.optimizers.MultiOptimizer(
        [mlx.optimizers.SGD(0.5), mlx.optimizers.Lion(0.25)], [lambda path, w: w.ndim == 2]
    )
    assert all(map(is_ours, both.optimizers))
    p = both.apply_gradients(
        {"a": mx.ones((1, 1)), "b": mx.ones(1)}, {"a": mx.ones((1, 1)), "b": mx.ones(1)}
    )
    assert (p["a"].item(), p["b"].item()) == (0.5, 0.75)


@pytest.mark.parametrize(
    "name, arguments", [("cosine_decay", (0.1, 10, 0.05)), ("linear_schedule", (0.1, 0.05, 10))]
)
def test_its_schedules_are_evaluated_in_the_kernel(installed, name, arguments):
    schedule = getattr(mlx.optimizers.schedulers, name)(*arguments)
    optimizer = mlx.optimizers.SGD(schedule)
    known = optimizer._schedulers["learning_rate"]
    assert known == getattr(optim, name)(*arguments)
    assert known.in_kernel


def test_signatures_stay():
    before = {name: inspect.signature(getattr(mlx.optimizers, name)) for name in OURS}
    optim.install()
    assert {name: inspect.signature(getattr(mlx.optimizers, name)) for name in OURS} == before
    optim.uninstall()


def test_installing_and_uninstalling_twice():
    optim.uninstall()
    assert unchanged()
    for _ in range(2):
        optim.install()
        optim.install()
        ours = mlx.optimizers.Adam(1e-3)
        assert is_ours(ours)
        assert not unchanged()
        optim.uninstall()
        optim.uninstall()
        assert unchanged()
        assert type(mlx.optimizers.Adam(1e-3)) is mlx.optimizers.Adam
        ours.apply_gradients({"w": mx.ones(1)}, {"w": mx.ones(1)})  # what is there goes on
        assert ours.step.item() == 1


def test_optimizers_from_before_stay_what_they_are():
    theirs, want = mlx.optimizers.Adam(0.1), mlx.optimizers.Adam(0.1)
    w = {"w": mx.array([1.0, 2.0])}
    before = pickle.dumps({"betas": theirs.betas})
    optim.install()
    assert type(theirs) is mlx.optimizers.Adam
    assert type(copy.copy(theirs)) is type(copy.deepcopy(theirs)) is mlx.optimizers.Adam
    assert pickle.loads(before)["betas"] == theirs.betas
    got = theirs.apply_gradients(w, w)
    optim.uninstall()
    assert same(got["w"], want.apply_gradients(w, w)["w"])


@pytest.mark.parametrize("loop", LOOPS, ids=lambda loop: loop.__name__)
def test_loops(loop):
    want = loop(mlx.optimizers)
    optim.install()
    got = dict(tree_flatten(loop(mlx.optimizers)))
    optim.uninstall()
    for name, value in tree_flatten(want):
        # MLX's compiler contracts into fused multiply-adds: six steps of a few roundings.
        assert mx.abs(got[name] - value).max().item() <= 1e-6, name


# ---- Subclasses of the program's own ----------------------------------------------------


class Clipping(mlx.optimizers.Adam):
    """With a step around that of its base."""

    def __init__(self, learning_rate, most=1.0):
        self.most = most
        super().__init__(learning_rate, bias_correction=True)
        self.count = 0

    def apply_gradients(self, gradients, parameters):
        self.count += 1
        gradients, _ = mlx.optimizers.clip_grad_norm(gradients, self.most)
        return super().apply_gradients(gradients, parameters)


class ByName(mlx.optimizers.SGD):
    def __init__(self, learning_rate):
        mlx.optimizers.SGD.__init__(self, learning_rate, momentum=0.5)


def steps(optimizer, count=3):
    p = {"w": mx.array([1.0, -2.0]), "b": mx.array(3.0)}
    for number in range(count):
        p = optimizer.apply_gradients({"w": mx.array([4.0, 0.5 * number]), "b": mx.array(1.0)}, p)
    return p


def same_trees(one, two):
    one, two = tree_flatten(one), tree_flatten(two)
    return [k for k, _ in one] == [k for k, _ in two] and all(
        same(a, b) for (_, a), (_, b) in zip(one, two, strict=True)
    )


@pytest.mark.parametrize("kind", [Clipping, ByName])
def test_a_subclass_is_ours(kind):
    theirs = kind(0.125)
    want = steps(theirs)
    optim.install()
    ours = kind(0.125)
    optim.uninstall()
    assert is_ours(ours)
    assert isinstance(ours, kind)
    assert type(ours).__name__ == kind.__name__
    got = steps(ours)
    for name, value in want.items():
        # MLX's 1 - 0.999^t has lost 2^-25 / 0.001, of which the root is half; three steps of 0.125.
        most = 3 * 0.125 * 2**-25 / 0.001 / 2 if kind is Clipping else 0
        assert mx.abs(got[name] - value).max().item() <= most
    own = {"most", "count"} & vars(theirs).keys()
    assert {name: vars(ours)[name] for name in own} == {name: vars(theirs)[name] for name in own}


@pytest.mark.parametrize("make", [lambda: mlx.optimizers.Adam(0.125), lambda: Clipping(0.125)])
def test_copies_and_pickles(installed, make):
    optimizer = make()
    steps(optimizer)
    copies = [copy.deepcopy(optimizer), pickle.loads(pickle.dumps(optimizer))]
    want = steps(optimizer)
    for copied in copies:
        assert type(copied) is type(optimizer)
        assert same_trees(steps(copied), want)


def test_what_is_pickled_needs_no_installing():
    optim.install()
    pickled = pickle.dumps(Clipping(0.125))
    optim.uninstall()
    assert is_ours(pickle.loads(pickled))


def overriding(name):
    base = mlx.optimizers.SGD

    def method(self, *args):
        return getattr(super(kind, self), name)(*args)

    kind = type("Overriding", (base,), {name: method})
    return kind


class Halved:
    def apply_single(self, gradient, parameter, state):
        return super().apply_single(0.5 * gradient, parameter, state)


class Mixed(Halved, mlx.optimizers.SGD):
    pass


class Further(Mixed):
    pass


class HasAnOption(mlx.optimizers.SGD):
    """An attribute of its own that has the name of an option of ours."""

    def __init__(self, learning_rate):
        super().__init__(learning_rate)
        self.clip_norm = 0.25

    def apply_gradients(self, gradients, parameters):
        gradients, _ = mlx.optimizers.clip_grad_norm(gradients, self.clip_norm)
        return super().apply_gradients(gradients, parameters)


class WholeStep(mlx.optimizers.SGD):
    def apply_gradients(self, gradients, parameters):
        if not self._initialized:
            self.init(gradients)
        self.state["step"] = self.step + 1
        return {
            key: self.apply_single(gradient, parameters[key], self.state[key])
            for key, gradient in gradients.items()
        }


class Rate(mlx.optimizers.SGD):
    @property
    def learning_rate(self):
        return mx.array(0.25)

    @learning_rate.setter
    def learning_rate(self, value):
        pass


class Numbered(mlx.optimizers.SGD):
    weight_decay = 0.5


class NeedsAnArgument(mlx.optimizers.SGD):
    def __init_subclass__(cls, needed, **kwargs):
        super().__init_subclass__(**kwargs)


class Meta(type):
    def __new__(cls, name, bases, namespace):
        if len(bases) > 1:
            raise RuntimeError("one base")
        return super().__new__(cls, name, bases, namespace)


class OfAMeta(mlx.optimizers.SGD, metaclass=Meta):
    pass


FALL_BACK = {
    "apply_single": overriding("apply_single"),
    "init_single": overriding("init_single"),
    "mixed in": Mixed,
    "further": Further,
    "option": HasAnOption,
    "whole step": WholeStep,
    "rate": Rate,
    "number": Numbered,
    "init_subclass": NeedsAnArgument,
    "metaclass": OfAMeta,
}


@pytest.mark.parametrize("kind", FALL_BACK.values(), ids=FALL_BACK)
def test_a_subclass_with_a_part_in_the_step_is_of_mlx(kind):
    want = steps(kind(0.125))
    optim.install()
    optimizer = kind(0.125)
    optim.uninstall()
    assert type(optimizer) is kind
    assert same_trees(steps(optimizer), want)


def test_a_subclass_of_ours_and_ours_themselves(installed):
    """A program may import both."""

    class Mine(optim.SGD):
        pass

    assert type(Mine(0.1)) is Mine
    assert type(optim.SGD(0.1)) is optim.SGD
    optimizer = mlx.optimizers.SGD(0.1)
    optimizer.__init__(0.5)
    assert optimizer.learning_rate.item() == 0.5
    assert is_ours(optimizer)


def test_a_class_that_the_program_has_changed(installed, monkeypatch):
    def doubled(self, gradient, parameter, state):
        return parameter - 2 * gradient

    monkeypatch.setattr(mlx.optimizers.SGD, "apply_single", doubled)
    assert type(mlx.optimizers.SGD(0.1)) is mlx.optimizers.SGD
    monkeypatch.undo()
    assert is_ours(mlx.optimizers.SGD(0.1))


def test_what_a_program_has_put_around_a_constructor_stays(monkeypatch):
    made = []
    optim.install()
    inner = mlx.optimizers.SGD.__init__

    def noting(self, *args, **kwargs):
        inner(self, *args, **kwargs)
        made.append(is_ours(self))

    monkeypatch.setattr(mlx.optimizers.SGD, "__init__", noting)
    mlx.optimizers.SGD(0.1)
    optim.uninstall()
    assert mlx.optimizers.SGD.__init__ is noting
    mlx.optimizers.SGD(0.1)
    assert made == [True, False]
    monkeypatch.undo()
    mlx.optimizers.SGD.__init__ = BEFORE["SGD"]["__init__"]


# ---- What ours refuses ------------------------------------------------------------------

REFUSED = {
    "momentum": lambda: mlx.optimizers.SGD(0.1, momentum=-0.5),
    "dampening": lambda: mlx.optimizers.SGD(0.1, momentum=0.5, dampening=-1.0),
}


@pytest.mark.parametrize("make", REFUSED.values(), ids=REFUSED)
def test_arguments_that_ours_refuses_are_for_mlx(installed, make):
    optimizer = make()
    assert type(optimizer) is mlx.optimizers.SGD
    optim.uninstall()
    assert vars(optimizer).keys() == vars(make()).keys()
    assert same_trees(steps(optimizer), steps(make()))


def test_arguments_that_mlx_refuses_are_its_errors(installed):
    with pytest.raises(TypeError, match="missing 1 required positional argument"):
        mlx.optimizers.Adam()
    with pytest.raises(ValueError, match=r"epsilon should be >=0, -1\.0 was provided"):
        mlx.optimizers.Adam(0.1, eps=-1.0)


def test_options_of_ours_may_be_given(installed):
    optimizer = mlx.optimizers.SGD(1.0, clip_norm=0.5)
    assert steps(optimizer, 1)["w"][0].item() == pytest.approx(1 - 0.5 * 4 / 17**0.5)
    with pytest.raises(ValueError, match=r"^\[SGD\] clip_norm .*: got -1.*, allowed"):
        mlx.optimizers.SGD(1.0, clip_norm=-1.0)
    # And are not forgotten where MLX would take the step.
    with pytest.raises(ValueError, match="complex64"):
        optimizer.apply_gradients({"z": mx.array([1j])}, {"z": mx.array([2j])})
    assert is_ours(optimizer)


def complex_steps(optimizer, p):
    for _ in range(2):
        p = optimizer.apply_gradients({"z": mx.array([1 + 2j]), "w": mx.array([0.5])}, p)
    return p


@pytest.mark.parametrize("begins", ["at once", "with init", "after steps"])
@pytest.mark.parametrize("rate", [0.125, mlx.optimizers.linear_schedule(0.5, 0.125, 3)])
def test_a_step_that_ours_refuses_is_taken_by_mlx(rate, begins):
    """And those after it, from the same state; the dict of the state stays."""
    results = []
    for install in (optim.uninstall, optim.install):
        install()
        optimizer = mlx.optimizers.SGD(rate, momentum=0.5)
        optimizer.weight_decay = 0.25
        state, p = optimizer.state, {"z": mx.array([1 - 1j]), "w": mx.array([1.0])}
        if begins == "with init":
            optimizer.init(p)
        if begins == "after steps":
            for _ in range(2):
                p |= optimizer.apply_gradients({"w": mx.array([0.5])}, {"w": p["w"]})
            assert is_ours(optimizer) == (install is optim.install)
            if install is optim.uninstall:
                optimizer.init(p)  # as it has no state for "z"
        p = complex_steps(optimizer, p)
        assert type(optimizer) is mlx.optimizers.SGD
        assert optimizer.state is state
        results.append({"p": p, "state": dict(state)})
    optim.uninstall()
    for name in ("z", "w"):
        assert mx.abs(results[0]["p"][name] - results[1]["p"][name]).max().item() <= 1e-6
    assert (
        dict(tree_flatten(results[0]["state"])).keys()
        == dict(tree_flatten(results[1]["state"])).keys()
    )
    assert results[1]["state"]["step"].item() == results[0]["state"]["step"].item()


def test_a_compiled_step_whose_state_is_not_captured():
    """MLX goes on with the state of the trace, and so does the program."""
    results = []
    for install in (optim.uninstall, optim.install):
        install()
        model = nn.Linear(2, 1)
        model.update({"weight": mx.array([[1.0, 2.0]]), "bias": mx.array([0.0])})
        optimizer = mlx.optimizers.SGD(0.125, momentum=0.5)

        @partial(mx.compile, inputs=model.state, outputs=model.state)
        def step(x):
            gradients = nn.value_and_grad(model, lambda m, x: m(x).sum())(model, x)[1]  # noqa: B023
            optimizer.update(model, gradients)  # noqa: B023

        for _ in range(3):
            step(mx.ones((1, 2)))
        results.append(model.parameters())
    optim.uninstall()
    assert same_trees(*results)


def test_a_compiled_step_that_ours_takes(installed):
    model = nn.Linear(2, 1)
    optimizer = mlx.optimizers.Adam(0.125)
    state = [model.state, optimizer.state]  # before it has any

    @partial(mx.compile, inputs=state, outputs=state)
    def step(x):
        gradients = nn.value_and_grad(model, lambda m, x: m(x).sum())(model, x)[1]
        optimizer.update(model, gradients)

    for _ in range(3):
        step(mx.ones((1, 2)))
        mx.eval(state)
    assert is_ours(optimizer)
    assert optimizer.step.item() == 3


# ---- The command line -------------------------------------------------------------------


def run(folder, *arguments, accel=True, code=0):
    command = [sys.executable, *(["-m", "mlx_fused_optim.accel"] if accel else []), *arguments]
    environment = {**os.environ, "PYTHONPATH": str(Path(optim.__file__).parents[1])}
    result = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    assert result.returncode == code, result.stderr
    return result.stdout, result.stderr


SHOW = """
    '''Its words.'''
    from __future__ import annotations
    import atexit, pickle, sys
    import beside
    class Own:
        pass
    def show(*more):
        print(__name__, __doc__, __package__, __spec__ and __spec__.name, *more)
        print(sys.argv, sys.path[0], beside.__file__, type(__loader__).__name__)
        print(pickle.loads(pickle.dumps(Own)) is sys.modules["__main__"].Own)
    print(__file__, sorted(name for name in globals() if name != "__annotations__"))
    atexit.register(show, "at the end")
    show()
    print("said", file=sys.stderr)
"""
ENDS = {
    "sys.exit(3)": 3,
    "sys.exit('a word')": 1,
    "raise SystemExit": 0,
    "def f():\n    1 / 0\nf()": 1,
    "raise KeyboardInterrupt": -2,
    "sys.excepthook = lambda *x: print(x[1])\nint('x')": 1,
    "x = (": 1,
}


@pytest.fixture
def folder(tmp_path):
    place = tmp_path / "a folder"
    (place / "package").mkdir(parents=True)
    source = textwrap.dedent(SHOW)
    for name in ("script.py", "module.py", "package/__main__.py"):
        (place / name).write_text(source)
    for name in ("beside.py", "package/beside.py", "package/__init__.py"):
        (place / name).write_text("")
    with zipfile.ZipFile(place / "zipped.pyz", "w") as archive:
        archive.writestr("__main__.py", source)
        archive.writestr("beside.py", "")
    return place


WAYS_TO_RUN = [
    ["script.py", "--report", "-m", "x y"],
    ["../a folder/script.py"],
    ["package"],
    ["zipped.pyz", "x"],
    ["-m", "module", "-c", "x"],
    ["-m", "package"],
    ["-m", "absent"],
]


@pytest.mark.parametrize("arguments", WAYS_TO_RUN, ids=lambda x: " ".join(x))
def test_a_program_runs_as_it_does_without(folder, arguments):
    code = 1 if "absent" in arguments else 0
    assert run(folder, *arguments, code=code) == run(folder, *arguments, accel=False, code=code)


@pytest.mark.skipif(sys.version_info < (3, 11), reason="Python 3.10 has no -P")
@pytest.mark.parametrize("name", ["script.py", "package"])
def test_a_path_that_python_leaves_alone(tmp_path, name):
    (tmp_path / "package").mkdir()
    for place in ("script.py", "package/__main__.py"):
        (tmp_path / place).write_text("import sys\nprint(sys.path)\n")
    want = run(tmp_path, "-P", name, accel=False)
    assert run(tmp_path, "-P", "-m", "mlx_fused_optim.accel", name, accel=False) == want


@pytest.mark.parametrize("body", ENDS, ids=lambda body: body.splitlines()[-1])
def test_a_program_ends_as_it_does_without(tmp_path, body):
    """Its exit code, and its traceback without a line of ours."""
    (tmp_path / "script.py").write_text(f"import sys\n{body}\n")
    for way in (["script.py"], ["-m", "script"])[: 2 if "f()" in body else 1]:
        want = run(tmp_path, *way, accel=False, code=ENDS[body])
        assert run(tmp_path, *way, code=ENDS[body]) == want


@pytest.mark.parametrize(
    "arguments, words",
    [
        ([], r"nothing to run: got no name"),
        (["--report"], r"nothing to run: got no name"),
        (["-m"], r"nothing to run: got no name"),
        (["--repot", "x.py"], r"an unknown option: got --repot"),
        (["absent.py"], r"the script does not exist: got absent\.py"),
    ],
)
def test_a_command_line_that_makes_no_sense(tmp_path, arguments, words):
    said = run(tmp_path, *arguments, code=2)
    assert re.fullmatch(rf"\[accel\] {words}, allowed .*\.\n", said[1])


# ---- The report -------------------------------------------------------------------------

TRAIN = """
    import atexit, sys, weakref
    from functools import partial
    import mlx.core as mx
    import mlx.nn as nn
    import mlx.optimizers as optim

    class Own(optim.SGD):
        def apply_single(self, gradient, parameter, state):
            return parameter

    class Strange(optim.Optimizer):
        def apply_gradients(self, gradients, parameters):
            return super().apply_gradients(gradients, parameters)
        def init_single(self, parameter, state):
            self.there
        def apply_single(self, gradient, parameter, state):
            return parameter

    def train(optimizer, count, compiled=False):
        p = {"w": mx.ones((3, 4)), "b": [mx.ones(5)]}
        state = optimizer.state
        step = optimizer.apply_gradients
        if compiled:
            step = mx.compile(step, inputs=state, outputs=state)
        for _ in range(count):
            p = step(p, p)
            mx.eval(p, state)

    def gone():
        optimizer = optim.AdamW(optim.cosine_decay(0.1, 10), weight_decay=0.25)
        train(optimizer, 7, compiled=True)
        return weakref.ref(optimizer)

    assert gone()() is None
    ended = []
    atexit.register(ended.append, 1)
    sgd = optim.SGD(lambda step: mx.array(0.1) if not ended else sys.exit("called at the end"))
    train(sgd, 3)
    train(optim.Adafactor(0.1), 2)
    train(optim.SGD(0.1, momentum=-1.0), 2)
    train(Own(0.1), 1)
    try:
        train(Strange(), 1)
    except AttributeError:
        Strange.there = 1
        last = Strange()
        last.state["learning_rate"] = mx.array(1.0)
        train(last, 1)
        del Strange.there
    optim.Lion(0.1)
    sys.exit(4)
"""


def test_report(tmp_path):
    (tmp_path / "train.py").write_text(textwrap.dedent(TRAIN))
    _, said = run(tmp_path, "--report", "train.py", code=4)
    said = re.sub(r"\d[\d.e-]* (ms|s)\b", r"N \1", said)
    said = re.sub(r": [\d.e-]+%", ": N%", said)
    said = re.sub(r"Device\(.*\)", "a device", said)
    alone = "a step alone, timed after the program: N ms"
    refused = "[SGD] momentum is out of range: got -1.0, allowed 0 to 3.40282e+38, finite."
    share = "its share of the N s from the first step on: N%"
    assert said == textwrap.dedent(f"""\
        [accel] N s on a device
          ours: AdamW(learning_rate=cosine_decay(0.1, 10), weight_decay=0.25)
            7 steps of 2 tensors, 17 parameters, compiled
            {alone}, with mlx.optimizers N ms
            {share}
          ours: SGD(learning_rate=<<lambda>, called by Python before each step>)
            3 steps of 2 tensors, 17 parameters
            {alone}, with mlx.optimizers N ms
            {share}
          MLX's own: Adafactor, because there is no kernel for it
            2 steps of 2 tensors, 17 parameters
            {alone}
            {share}
          MLX's own: SGD, because {refused}
            2 steps of 2 tensors, 17 parameters
            {alone}
            {share}
          not replaced: Own, because Own has a part in how a step is taken (apply_single)
            1 steps of 2 tensors, 17 parameters
            {alone}
            {share}
          not replaced: Strange, because it is a class of the program's
            1 steps of 2 tensors, 17 parameters
            its time is not known (AttributeError: 'Strange' object has no attribute 'there')
        """)


def test_report_of_a_step_that_mlx_has_taken_over(tmp_path):
    source = """
        import mlx.core as mx
        import mlx.optimizers as optim
        optimizer, p = optim.Lion(0.125), {"z": mx.array([1j])}
        p = optimizer.apply_gradients(p, p)
    """
    (tmp_path / "train.py").write_text(textwrap.dedent(source))
    _, said = run(tmp_path, "--report", "train.py")
    assert "MLX's own: Lion, because [Lion] " in said
    assert "complex64" in said
    assert "1 steps of 1 tensors" in said


def test_report_where_nothing_steps(tmp_path):
    (tmp_path / "train.py").write_text(
        "import mlx.optimizers\nprint(mlx.optimizers.SGD(0.1).step)\n"
    )
    out, said = run(tmp_path, "--report", "train.py")
    assert re.fullmatch(r"\[accel\] .*\n  no optimizer of mlx.optimizers has taken a step\n", said)
    assert "uint64" in out
