"""What every optimizer of this package shares."""

from __future__ import annotations

import operator
import warnings
from typing import Any, ClassVar

import mlx.core as mx
from mlx.nn.layers.base import Module
from mlx.nn.layers.distributed import FullyShardedModule
from mlx.optimizers import Optimizer

from .. import _ext, _packing
from .._checks import LearningRate, checked_scalar
from .._groups import Groups, named_betas
from .._layout import layout_of
from .._options import PARTS, WORDS, Options, StepOptions, checked_options
from .._rules import Rule, Slots
from .._step import (
    Hyper,
    begun,
    checked_hyper,
    never_changes,
    prepared_step,
    take_step,
    uses_of_state,
)
from ..schedules import Schedule
from ..schedules._of_mlx import as_ours


class _Prepared:
    """What a step was prepared for, the step, and what trees are like. Copied and pickled as
    nothing: it is made again."""

    __slots__ = ("key", "outline", "step")

    def __init__(
        self,
        key: tuple[Any, ...] = (),
        step: _ext.PreparedStep | None = None,
        outline: _ext.Outline | None = None,
    ):
        self.key, self.step, self.outline = key, step, outline

    def __reduce__(self) -> tuple[Any, ...]:
        return _Prepared, ()


def _shown(value: Any) -> str:
    if callable(value) and not isinstance(value, Schedule):
        name = getattr(value, "__qualname__", type(value).__qualname__)
        return f"<{name}, called by Python before each step>"
    if isinstance(value, tuple):
        return f"({', '.join(map(_shown, value))})"
    return repr(value)


class _Views(dict[Any, Any]):
    """What arenas hold of some tensors, to be read: writing here would change nothing."""

    def _refuse(self, *_: Any, **__: Any) -> Any:
        raise TypeError(
            "[state] views of it are to be read: got a change, allowed a change of the state "
            "itself, such as optimizer.state.update({'layer': {'weight': {'v': array}}})."
        )

    __setitem__ = __delitem__ = __ior__ = _refuse
    clear = pop = popitem = setdefault = update = _refuse


class _State(dict[str, Any]):
    """A state, which also answers for what its arenas hold: ``state["layer"]["weight"]["v"]``
    is a view, without being in the state. Copied and pickled as the dict that it is."""

    def __init__(self, state: dict[str, Any], slots: Slots):
        super().__init__(state)
        self._slots = slots

    def __missing__(self, key: Any) -> Any:
        return _read_only(_packing.views(self, self._slots, "state")[key])

    def __reduce__(self) -> tuple[Any, ...]:
        return dict, (dict(self),)


def _read_only(tree: Any) -> Any:
    if isinstance(tree, dict):
        return _Views((key, _read_only(child)) for key, child in tree.items())
    return tuple(map(_read_only, tree)) if isinstance(tree, list) else tree


def _words(cls: type[FusedOptimizer]) -> str:
    """The part of a docstring that all optimizers share."""
    rule, usual = cls._rule, cls._usual
    names = [f"``{name}``," for name in rule.scalars if name not in ("beta1", "beta2")]
    if "beta1" in rule.scalars:
        names.insert(0, "``betas``,")
    dtype = "each parameter's own" if rule.state_dtype is None else "float32"
    return WORDS.format(state_dtype=dtype, decoupled=usual.decoupled, scalars=" ".join(names))


class Option:
    """An attribute that is one of the options of every optimizer: checked when it is set."""

    def __set_name__(self, owner: type, name: str) -> None:
        self._name = name

    def __get__(self, instance: Any, owner: type) -> Any:
        if instance is None:
            return self
        value = getattr(instance._options, self._name)
        return value.given() if isinstance(value, Groups) else value

    def __set__(self, instance: Any, value: Any) -> None:
        options = {**instance._options._asdict(), self._name: value}
        instance._options = checked_options(instance._op, instance._rule, **options)


class Number:
    """An attribute that is a number of the rule, or of weight decay: what was given, or the
    value that a schedule had last."""

    def __set_name__(self, owner: type, name: str) -> None:
        self._name = name

    def __get__(self, instance: Any, owner: type) -> Any:
        if instance is None:
            return self
        name, schedule = self._name, instance._schedulers.get(self._name)
        if schedule is None:
            return instance._constants[name]
        # A state from elsewhere may lack it.
        state = instance.state
        return state[name] if name in state else schedule(instance.step)

    def __set__(self, instance: Any, value: Any) -> None:
        name = self._name
        if callable(value):
            value = as_ours(value)
            first = instance._rule.value_at(instance.step, instance._op, name, value)
            instance._schedulers[name] = value
            instance.state[name] = first
        else:
            if instance._schedulers.pop(name, None) is not None:
                instance.state.pop(name, None)
            instance._constants[name] = value


class Betas:
    """The factors of the moving averages: a pair of numbers to be replaced as a whole, where
    mlx.optimizers has a list."""

    def __get__(self, instance: Any, owner: type) -> Any:
        return self if instance is None else (instance.beta1, instance.beta2)

    def __set__(self, instance: Any, betas: Any) -> None:
        for name, beta in named_betas(instance._op, betas).items():
            setattr(instance, name, beta)


# What a wrapping optimizer calls, and a subclass or an instance may have of its own.
SINGLE = ("init_single", "apply_single")


class FusedOptimizer(Optimizer):
    """An optimizer whose step is one kernel for the whole tree of parameters.

    A subclass has a rule, the numbers of the rule as attributes, and a constructor that calls
    ``_begin``. Its second base is the class of ``mlx.optimizers`` that it stands for, if
    any, so that it is one, and so that a step of one tensor is MLX's.
    """

    _op: ClassVar[str]  # its name in errors
    _rule: ClassVar[Rule]
    # What the class in mlx.optimizers has, of numbers and flags; and its options' defaults.
    _of_mlx: ClassVar[frozenset[str]] = frozenset()
    _usual: ClassVar[Options] = Options()
    _defaults: ClassVar[dict[str, Any]]  # of its own arguments

    _prepared = _Prepared()
    # Of one with a step of one tensor or a number of its own: as in MLX, tensor by tensor.
    _is_single = False
    _compiled = False  # a step was traced by mx.compile
    _state_of_trace = False  # the state was made inside a function that is traced
    _needs_whole: ClassVar[bool] = False  # a part of a tensor has no step of its own
    _whole: frozenset[str] = frozenset()  # sets of tensors of which none is a shard

    state_dtype = Option()
    min_8bit_size = Option()
    master_weights = Option()
    rounding = Option()
    compensated = Option()
    seed = Option()
    clip_norm = Option()
    clip_value = Option()
    grad_scale = Option()
    skip_nonfinite = Option()
    decoupled = Option()
    maximize = Option()
    groups = Option()
    trust_coefficient = Option()
    ema_decay = Option()
    weight_decay = Number()

    def __init__(self, *arguments: Any, **options: Any):
        raise TypeError(
            f"[{type(self).__name__}] only optimizers with a rule can be made: got "
            f"{type(self).__name__}, allowed AdamW, SGD and the other subclasses."
        )

    def _begin(self, learning_rate: LearningRate, options: StepOptions, **own: Any) -> None:
        """The constructor of every subclass, with its own arguments by name; nothing is made of
        arguments that make no sense."""
        _, checked = self._from_arguments(self._op, {**own, **options})
        Optimizer.__init__(self)  # type: ignore[no-untyped-call]  # not that of its second base
        self._options = checked
        self._is_single = self._is_single or self._is_per_tensor()
        self._state = _State(self._state, self._rule.slots)
        self._known: tuple[str, ...] = ()  # the arenas that this optimizer has made or checked
        self._state_of_trace = _ext.is_tracing()
        self._constants: dict[str, Any] = {}
        self._checked: tuple[tuple[Any, ...], Hyper] | None = None
        self.learning_rate = learning_rate
        self.weight_decay = 0.0
        for name, value in own.items():
            setattr(self, name, value)

    @classmethod
    def _names(cls) -> tuple[str, ...]:
        """Of its numbers, in the order of a Hyper's."""
        return ("weight_decay", *cls._rule.scalars)

    @classmethod
    def _from_arguments(cls, op: str, arguments: dict[str, Any]) -> tuple[Hyper, Options]:
        """Arguments of the constructor, but for the learning rate, checked."""
        own = {name: arguments.get(name, default) for name, default in cls._defaults.items()}
        options = {name: value for name, value in arguments.items() if name not in own}
        for name in options:
            if name not in Options._fields:
                allowed = ", ".join((*own, *Options._fields))
                raise TypeError(f"[{op}] an unknown argument: got {name}, allowed {allowed}.")
        if "betas" in own:
            own |= named_betas(op, own.pop("betas"))
        flags = {name: own.pop(name) for name in cls._rule.choices}
        checked = checked_options(op, cls._rule, **{**cls._usual._asdict(), **options})
        return cls._parsed(op, own, flags), checked

    @classmethod
    def _parsed(cls, op: str, numbers: dict[str, Any], flags: dict[str, bool]) -> Hyper:
        """The numbers and flags of the rule, checked."""
        return checked_hyper(op, cls._rule, {"weight_decay": 0.0, **numbers}, flags)

    def __setstate__(self, attributes: dict[str, Any]) -> None:
        vars(self).update(attributes)
        # Of copy.copy too: what is set on one is not set on the other.
        self._constants, self._schedulers = dict(self._constants), dict(self._schedulers)
        self._state = _State(self._state, self._rule.slots)

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if "_op" in vars(cls):
            code = cls.__init__.__code__
            names = code.co_varnames[2 : code.co_argcount]  # behind self and the learning rate
            cls._defaults = dict(zip(names, cls.__init__.__defaults__ or (), strict=True))
            cls._defaults |= cls.__init__.__kwdefaults__ or {}
        if cls.__doc__:
            for part, words in {**PARTS, "{options}": _words(cls)}.items():
                cls.__doc__ = cls.__doc__.replace(part, words)

    @classmethod
    def _is_per_tensor(cls) -> bool:
        """Asked when one is made, since a class may be changed after it was defined."""
        kinds, bases = (Number, Betas), cls.__mro__
        numbers = {name for base in bases for name, x in vars(base).items() if isinstance(x, kinds)}
        return any(
            getattr(cls, name) != getattr(FusedOptimizer, name)
            for name in ("learning_rate", *SINGLE)
        ) or not all(isinstance(getattr(cls, name), kinds) for name in numbers)

    def __setattr__(self, name: str, value: Any) -> None:
        is_stale = self._compiled and not _ext.is_tracing() and self._changes(name, value)
        super().__setattr__(name, value)
        if name in SINGLE:  # the next step unpacks the state
            vars(self).update(_is_single=True, _initialized=False)
        if is_stale:
            warnings.warn(
                f"[{self._op}] {name} was set after a step was compiled: functions that mx.compile "
                f"has traced go on without it; got {value!r}, allowed before the trace, or as a "
                "function of the step where one is allowed. Define and compile the function anew "
                f"(see {self._op} about compiled steps).",
                stacklevel=2,
            )

    def _changes(self, name: str, value: Any) -> bool:
        """Whether this value of an attribute changes what a step does, in a way that is not
        in the state."""
        if name == "learning_rate":
            return callable(value)
        if name not in {*SINGLE, "betas", *self._names(), *self._rule.choices, *Options._fields}:
            return False
        old, plain = getattr(self, name), (float, int, str)
        is_same = isinstance(old, plain) and isinstance(value, plain) and old == value
        return old is not value and not is_same

    @property
    def state(self) -> dict[str, Any]:
        """The optimizer's state. One that is assigned is copied (not its arrays), so that
        whoever it came from keeps its own.

        Reading a tensor's path gives views of its arenas, as :meth:`unpacked_state` does. What
        is put in, for instance with ``optimizer.state.update(saved)``, counts as a state that is
        assigned: the next step checks it, and takes it for what the arenas have of these tensors.
        """
        return self._state

    @state.setter
    def state(self, state: dict[str, Any]) -> None:
        self._initialized = False
        self._state_of_trace = _ext.is_tracing()
        self._state = _State(state, self._rule.slots) if isinstance(state, dict) else state

    @property
    def learning_rate(self) -> Any:
        """The learning rate to come, or of the last step when it is scheduled."""
        return self.state["learning_rate"]

    @learning_rate.setter
    def learning_rate(self, learning_rate: LearningRate) -> None:
        if callable(learning_rate):
            learning_rate = as_ours(learning_rate)
            first = checked_scalar(self._op, "learning_rate", learning_rate(self.step))
            self._schedulers["learning_rate"] = learning_rate
            learning_rate = first
        # A schedule goes on, as in mlx.optimizers: the next step sets the rate again.
        self.state["learning_rate"] = checked_scalar(self._op, "learning_rate", learning_rate)

    def init(self, parameters: Any) -> None:
        """Make the state for these parameters, keeping what it already knows of them.

        Optional: the first step does it. Useful to have the whole state before the first
        step, for instance to capture it in ``mx.compile``.

        Args:
            parameters (tree): A tree of the arrays that will be trained. Arrays of integers, as
                a quantized layer has, are nothing to train and are left out.
        """
        if self._is_single:
            # From our layout, if the state that was assigned has that.
            self._replace_state(self.unpacked_state())
            super().init(parameters)
            return
        tree = _ext.Tree(parameters, parameters, self._op)
        self._begin_state(tree, parameters, self._options)

    def _begin_state(self, tree: _ext.Tree, parameters: Any, options: Options) -> None:
        self._check_loaded_state(parameters)
        self._take(begun(self._op, tree, parameters, self.state, self._hyper(), options))

    @property
    def grad_norm(self) -> mx.array | None:
        """The global norm of the last step's gradients, unscaled and clipped by value but not
        by norm: a float32 scalar, 0 before the first step. None where nothing measures it
        (``clip_norm``, ``skip_nonfinite`` and ``trust_coefficient`` do)."""
        # An earlier step, or a state from elsewhere, may have left one.
        return self.state.get("grad_norm") if self._options.is_measured else None

    @property
    def skipped(self) -> mx.array:
        """How many steps ``skip_nonfinite`` has skipped, a uint64 scalar."""
        skipped = self.state.get("skipped")
        return mx.array(0, mx.uint64) if skipped is None else skipped

    def update(self, model: Any, gradients: Any, *, grad_scale: LearningRate | None = None) -> None:
        """One step, of the model in place.

        Args:
            model (mlx.nn.Module): The model.
            gradients (tree): A tree of arrays, for instance of ``mlx.nn.value_and_grad``.
            grad_scale (float, array, Schedule or callable): What these gradients were
                multiplied with, in place of the optimizer's ``grad_scale``.
        """
        # A subclass may have an apply_gradients of two arguments.
        scale = {} if grad_scale is None else {"grad_scale": grad_scale}
        model.update(self.apply_gradients(gradients, model, **scale))

    def apply_gradients(
        self, gradients: Any, parameters: Any, *, grad_scale: LearningRate | None = None
    ) -> Any:
        """One step: the updated parameters, in the structure of ``gradients``.

        Args:
            gradients (tree): A tree of arrays. It may have a part of the parameters only.
            parameters (tree): A tree of parameters, or the model.
            grad_scale (float, array, Schedule or callable): What these gradients were
                multiplied with, in place of the optimizer's ``grad_scale``.

        Returns:
            The updated parameters; each keeps its shape and dtype.
        """
        if self._is_single:
            self._check_single(grad_scale)
            return super().apply_gradients(gradients, parameters)
        prepared = self._prepared
        tree = _ext.Tree(gradients, parameters, self._op, like=prepared.outline)
        hyper = self._hyper()
        learning_rate = self._schedulers.get("learning_rate")
        key = (hyper, self._options, learning_rate)
        if (
            prepared.step is not None
            and grad_scale is None
            and self._initialized
            and len(self._schedulers) == (learning_rate is not None)
            and all(map(operator.is_, key, prepared.key))
        ):
            taken = prepared.step(tree, self._state, self._state.get("learning_rate"))
            if taken is not None:
                updated, state = taken
                self._replace_state(state)
                return updated
        self._prepared = _Prepared(prepared.key, prepared.step, tree.outline)
        return self._take_step(tree, parameters, self._options, grad_scale)

    def _take_step(
        self,
        tree: _ext.Tree,
        parameters: Any,
        options: Options,
        grad_scale: LearningRate | None,
        measured: list[mx.array] | None = None,
    ) -> Any:
        """The step of a tree with a look at every option; ``parameters`` may have more."""
        state, hyper = self.state, self._hyper()
        learning_rate = given_rate = self._schedulers.get("learning_rate")
        if self._check_loaded_state(parameters):
            state = begun(self._op, tree, parameters, state, hyper, options)
        if _ext.is_tracing():
            self._check_traced(tree, learning_rate, hyper, options, grad_scale)
        self._check_whole(tree, parameters, options)
        if learning_rate is None:
            rate = self.state.get("learning_rate")
            learning_rate = checked_scalar(self._op, "learning_rate", rate)
        # Of a subclass: whatever else it has put on a schedule.
        others = {
            name: schedule(self.step)
            for name, schedule in self._schedulers.items()
            if name != "learning_rate" and name not in hyper.named
        }
        updated, state, used = take_step(
            self._op,
            tree,
            parameters,
            state,
            learning_rate,
            hyper,
            options,
            grad_scale,
            None,
            packs=True,
            measured=measured,
        )
        self._take({**state, **used, **others})
        if options is self._options:
            step = prepared_step(tree, state, learning_rate, hyper, options)
            key = (hyper, options, given_rate)
            self._prepared = _Prepared(key, step, self._prepared.outline)
        return updated

    def ema_parameters(self, dtype: mx.Dtype | None = None) -> Any:
        """The moving average of the parameters, as a tree for ``model.update``.

        Its structure is that of ``mlx.utils.tree_unflatten``: dicts and lists by the
        parameters' paths. What it returns does not change with later steps. Tensors that are
        no longer trained are in it; of those that a model no longer has, such as ones that an
        adapter has wrapped since, ``model.update(..., strict=False)`` takes no notice.

        The average begins at the first step or at :meth:`init`, with the parameters of then.
        After weights were loaded, ``optimizer.forget("ema")`` begins it anew at the next step.

        Args:
            dtype (Dtype, optional): Of the arrays: float32, float16 or bfloat16. Default:
                each parameter's own (float32 where the state does not know it).

        Raises:
            ValueError: There is no average: no ``ema_decay``, or neither a step nor
                :meth:`init` yet. Or the dtype is none of these.

        Example:
            >>> from mlx_fused_optim import SGD
            >>> optimizer = SGD(learning_rate=1.0, ema_decay=0.5)
            >>> parameters = {"w": mx.array([1.0, 2.0])}
            >>> parameters = optimizer.apply_gradients({"w": mx.ones(2)}, parameters)
            >>> parameters["w"], optimizer.ema_parameters()["w"]
            (array([0, 1], dtype=float32), array([0.5, 1.5], dtype=float32))
        """
        return _packing.averages(self._states(), dtype, self._op)

    def _states(self) -> list[tuple[dict[str, Any], Slots]]:
        return [(self.state, self._rule.slots)]

    def forget(self, *slots: str) -> None:
        """Drop what the state keeps under these names, of all tensors: it begins anew at the
        next step or :meth:`init`, the moving average with the parameters of then. One moment of
        two is zeros at once, since no state of the rule lacks it.

        Args:
            slots (str): Any of ``"master"``, ``"compensation"``, ``"ema"``, and what the rule
                keeps: ``"momentum"`` of SGD, ``"m"`` and ``"v"`` of Adam, ...

        Example:
            >>> from mlx_fused_optim import SGD
            >>> optimizer = SGD(learning_rate=1.0, ema_decay=0.5)
            >>> optimizer.init({"w": mx.zeros(2)})
            >>> optimizer.forget("ema")
            >>> parameters = optimizer.apply_gradients({"w": mx.ones(2)}, {"w": mx.ones(2)})
            >>> optimizer.ema_parameters()["w"]
            array([0.5, 0.5], dtype=float32)
        """
        self._replace_state(_packing.without(self.state, slots, self._rule.slots, self._op))

    def keep_only(self, parameters: Any) -> None:
        """Drop what the state keeps of all other tensors, such as those that are frozen again.

        Args:
            parameters (tree): A tree of arrays, for instance ``model.trainable_parameters()``.

        Example:
            >>> from mlx_fused_optim import SGD
            >>> optimizer = SGD(learning_rate=1.0, momentum=0.9)
            >>> optimizer.init({"a": mx.zeros(2), "b": mx.zeros(3)})
            >>> optimizer.keep_only({"a": mx.zeros(2)})
            >>> optimizer.unpacked_state().keys()
            dict_keys(['step', 'learning_rate', 'a'])
        """
        state = _packing.of_parameters(self.state, parameters, self._rule.slots, self._op)
        self._replace_state(state)

    def unpacked_state(self) -> dict[str, Any]:
        """The state as ``mlx.optimizers`` has it, for instance ``state[...path...]["v"]`` an
        array, and beside it ``"master"``, ``"compensation"`` and ``"ema"`` where they are kept.

        Its arrays are views; while they live, the next step copies the momentum once
        instead of writing in place.

        Example:
            >>> from mlx_fused_optim import SGD
            >>> optimizer = SGD(learning_rate=0.5, momentum=0.9)
            >>> optimizer.init({"w": mx.zeros(2)})
            >>> optimizer.unpacked_state()["w"]
            {'v': array([0, 0], dtype=float32)}
        """
        return _packing.unpacked(self.state, self._rule.slots, self._op)

    def init_single(self, parameter: mx.array, state: dict[str, Any]) -> None:
        """Begin the state of one tensor as the class of ``mlx.optimizers`` does.

        Args:
            parameter (array): The parameter.
            state (dict): Of this tensor alone, for instance ``state["v"]``.
        """
        super().init_single(parameter, state)

    def apply_single(self, gradient: mx.array, parameter: mx.array, state: dict[str, Any]) -> Any:
        """The step of one tensor in plain MLX operations: what the class of
        ``mlx.optimizers`` has under this name, with its roundings.

        For an optimizer that wraps this one and steps tensor by tensor, and for subclasses:
        one that overrides this, :meth:`init_single` or a number (``learning_rate`` as a property),
        or an optimizer on which one of the two methods is set, takes all its steps so, without
        the kernel, and its state is that of MLX.

        Args:
            gradient (array): The gradient.
            parameter (array): The parameter.
            state (dict): Of this tensor alone; what it has is replaced.

        Returns:
            array: The updated parameter.

        Raises:
            ValueError: An option is set that the class of ``mlx.optimizers`` does not have, or
                a number other than the learning rate is scheduled.

        Example:
            >>> from mlx_fused_optim import SGD
            >>> optimizer, state = SGD(learning_rate=0.5, momentum=0.5), {}
            >>> optimizer.init_single(mx.array(1.0), state)
            >>> optimizer.apply_single(mx.array(1.0), mx.array(1.0), state), state
            (array(0.5, dtype=float32), {'v': array(1, dtype=float32)})
        """
        self._check_single()
        return super().apply_single(gradient, parameter, state)

    def __repr__(self) -> str:
        """The call that makes it, without what has its default."""
        beyond = self._beyond_mlx()
        shown = {"learning_rate": self._schedulers.get("learning_rate", self.learning_rate)}
        for name, default in self._defaults.items():
            value = self._given(name)
            if name in beyond:
                continue
            if callable(value) or value != default:
                shown[name] = value
        shown |= beyond
        arguments = [f"{name}={_shown(value)}" for name, value in shown.items()]
        return f"{type(self).__name__}({', '.join(arguments)})"

    def _given(self, name: str) -> Any:
        """The argument of this name: of a number that follows a schedule, the schedule."""
        if name == "betas":
            return self._given("beta1"), self._given("beta2")
        return self._schedulers.get(name, getattr(self, name))

    def _beyond_mlx(self) -> dict[str, Any]:
        """The options that the class of mlx.optimizers does not have, where not the default."""
        fields = zip(Options._fields, self._options, self._usual, strict=True)
        # A dtype takes no comparison with None.
        return {
            name: getattr(self, name)
            for name, value, usual in fields
            if type(value) is not type(usual) or value != usual
        }

    def _check_single(self, grad_scale: Any = None) -> None:
        """Nothing is asked for that MLX's step of one tensor does not do."""
        beyond = list(self._beyond_mlx()) if grad_scale is None else ["grad_scale"]
        numbers = {**self._constants, **self._schedulers}
        own = {name: numbers[name] for name in self._names() if name in numbers}
        own |= {name: getattr(self, name) for name in self._rule.choices}
        beyond += [f"a scheduled {name}" for name, value in own.items() if callable(value)]
        beyond += [
            name
            for name, value in own.items()
            if name not in self._of_mlx and not callable(value) and value
        ]
        if beyond:
            raise ValueError(
                f"[{self._op}] a step tensor by tensor is that of mlx.optimizers: got "
                f"{', '.join(beyond)}; allowed learning_rate, {', '.join(sorted(self._of_mlx))}, "
                "of which the first may be scheduled."
            )

    def _hyper(self) -> Hyper:
        numbers = {**self._constants, **self._schedulers}
        names = self._names()
        given = (*map(numbers.__getitem__, names), *map(vars(self).__getitem__, self._rule.choices))
        # Attributes are plain: checked at the next step, and then again where one has changed.
        if self._checked is None or not all(map(operator.is_, given, self._checked[0])):
            flags = {name: vars(self)[name] for name in self._rule.choices}
            hyper = self._parsed(self._op, {name: numbers[name] for name in names}, flags)
            if not all(map(never_changes, given)):
                return hyper
            self._checked = given, hyper
        return self._checked[1]

    def _check_traced(
        self,
        tree: _ext.Tree,
        learning_rate: LearningRate | None,
        hyper: Hyper,
        options: Options,
        grad_scale: LearningRate | None,
    ) -> None:
        """Raise ValueError for a step inside mx.compile that needs the state and cannot have
        it: it would go on for ever with what the state was when it was traced."""
        if not tree.has_placeholders:
            return
        if not self._state_of_trace and not _ext.has_placeholders([self.state["step"]]):
            rate = self.state["learning_rate"] if learning_rate is None else learning_rate
            uses = uses_of_state(rate, hyper, options, grad_scale)
            if uses:
                raise ValueError(
                    f"[{self._op}] a compiled step needs the optimizer's state: got a function "
                    f"that does not capture it, for steps with {', '.join(uses)}; allowed "
                    "mx.compile(function, inputs=state, outputs=state) with "
                    "state = [model.state, optimizer.state]."
                )
        self._compiled = True

    def _check_whole(self, tree: _ext.Tree, parameters: Any, options: Options) -> None:
        """Raise ValueError where norms are needed and a model has shards of its tensors."""
        if not (options.is_measured or self._needs_whole) or not isinstance(parameters, Module):
            return
        key = layout_of(tree, self._options.least_of_bytes).key  # wrapped, a module has other paths
        if key in self._whole:
            return
        for path, module in parameters.named_modules():  # type: ignore[no-untyped-call]
            if isinstance(module, FullyShardedModule):
                if self._needs_whole:
                    raise ValueError(
                        f"[{self._op}] whole matrices are orthogonalised: got shards, of "
                        f"mlx.nn.fully_shard, in '{path}'; allowed a model without them."
                    )
                raise ValueError(
                    f"[{self._op}] clip_norm, skip_nonfinite and trust_coefficient see the "
                    f"gradients of this process alone: got shards, of mlx.nn.fully_shard, in "
                    f"'{path}'; allowed mlx.nn.utils.clip_grad_norm_sharded before a step without "
                    "these options."
                )
        self._whole |= {key}

    def _check_loaded_state(self, parameters: Any) -> bool:
        """Whether somebody has assigned or edited it since the last step."""
        _packing.check_scalars(self.state, self._op)
        if self._initialized and not _packing.is_edited(self.state, self._known, self._rule.slots):
            return False
        _packing.check_state(self.state, parameters, self._rule.slots, self._op)
        return True

    def _take(self, state: dict[str, Any]) -> None:
        """The state after init() or a step. What was on a schedule in another run is not the
        value of an option that is a constant here."""
        self._replace_state(state)
        for name in self._names():
            if name in state and name not in self._schedulers:
                del self._state[name]
        self._known = tuple(state.get("arenas", ()))
        self._initialized = True

    def _replace_state(self, state: dict[str, Any]) -> None:
        # The dict itself stays: mx.compile captures it.
        if state is not self._state:
            self._state.clear()
            self._state.update(state)
