"""The steps as pure functions, for hot loops that keep no optimizer object: for each rule a
function that begins a state and one that takes a step, made from the optimizer's class."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import mlx.core as mx

from . import _ext, _packing, optimizers
from ._checks import LearningRate, checked_scalar
from ._groups import known_groups
from ._options import Options
from ._rules import all_slots
from ._step import Hyper, begun, never_changes, prepared_step, take_step
from .optimizers.base import FusedOptimizer
from .schedules._of_mlx import as_ours

__all__ = [
    "fused_adadelta_init",
    "fused_adadelta_step",
    "fused_adagrad_init",
    "fused_adagrad_step",
    "fused_adam_init",
    "fused_adam_step",
    "fused_adamax_init",
    "fused_adamax_step",
    "fused_adamw_init",
    "fused_adamw_step",
    "fused_ema",
    "fused_lion_init",
    "fused_lion_step",
    "fused_muon_init",
    "fused_muon_step",
    "fused_rmsprop_init",
    "fused_rmsprop_step",
    "fused_sgd_init",
    "fused_sgd_step",
]

Init = Callable[..., _packing.State]
Step = Callable[..., tuple[Any, _packing.State]]


class _Prepared(NamedTuple):
    """A step for these very arguments, which live as long as their ids are looked up."""

    key: tuple[Any, ...]
    step: _ext.PreparedStep
    outline: _ext.Outline | None


_prepared: dict[tuple[Any, ...], _Prepared] = {}


def _prepare(
    name: tuple[Any, ...],
    key: tuple[Any, ...],
    step: _ext.PreparedStep | None,
    outline: _ext.Outline | None,
) -> None:
    if step is not None and all(map(never_changes, key)):
        if len(_prepared) >= 16:  # a number that is another object in each call
            del _prepared[next(iter(_prepared))]
        _prepared[name] = _Prepared(key, step, outline)


def _checked(
    cls: type[FusedOptimizer], op: str, arguments: dict[str, Any]
) -> tuple[Hyper, Options]:
    """The arguments of the class, but for the learning rate."""
    hyper, options = cls._from_arguments(op, arguments)
    if options.groups.members:
        options = options._replace(groups=known_groups(cls._rule, options.groups))
    return hyper, options


def _init_of(cls: type[FusedOptimizer]) -> Init:
    name = f"fused_{cls._op.lower()}"
    op = f"{name}_init"

    def init(
        parameters: Any, *, state: _packing.State | None = None, **arguments: Any
    ) -> _packing.State:
        tree = _ext.Tree(parameters, parameters, op, exact=True)
        hyper, options = _checked(cls, op, arguments)
        if state is None:
            state = {"step": mx.array(0, mx.uint64), "learning_rate": mx.array(0.0)}
        else:
            _packing.check_scalars(state, op)
        return dict(begun(op, tree, parameters, state, hyper, options))

    init.__doc__ = f"""The state before the first step of :func:`{name}_step`.

    Args:
        parameters (array or tree): What will be trained: one array, or dicts, lists and
            tuples of arrays, float32, float16 or bfloat16.
        state (dict, optional): An earlier state, of this function or of
            ``mlx.optimizers.{cls.__name__}``: its step, learning rate and what it has of every
            tensor whose path it knows go on; other tensors begin.
        **arguments: Those of the steps to come, as of :class:`{cls.__name__}`. They decide what
            a state keeps.

    Returns:
        dict: A tree of arrays. ``step`` is a uint64 scalar, ``learning_rate`` the float32
        rate of the last step (0 before the first), ``grad_norm`` and ``skipped`` what
        :class:`{cls.__name__}` has under these names; the rest is kept of the parameters.

    Raises:
        ValueError, TypeError: A leaf cannot be trained, or does not fit ``state``; an
            argument makes no sense.

    Example:
        >>> state = {op}({{"w": mx.ones(3)}})
        >>> state["step"]
        array(0, dtype=uint64)
    """
    init.__name__ = init.__qualname__ = op
    return init


def _step_of(cls: type[FusedOptimizer]) -> Step:
    name = f"fused_{cls._op.lower()}"
    op = f"{name}_step"

    def step(
        parameters: Any,
        gradients: Any,
        state: _packing.State,
        *,
        learning_rate: LearningRate,
        stream: mx.Stream | mx.Device | None = None,
        **arguments: Any,
    ) -> tuple[Any, _packing.State]:
        if callable(learning_rate):
            schedule = learning_rate = as_ours(learning_rate)
        else:
            schedule, learning_rate = None, checked_scalar(op, "learning_rate", learning_rate)
        key = (schedule, *arguments.values())
        key_name = (op, *arguments, *map(id, key))
        prepared = _prepared.get(key_name)
        like = None if prepared is None else prepared.outline
        tree = _ext.Tree(gradients, parameters, op, exact=True, like=like)
        if prepared is not None:
            taken = prepared.step(tree, state, learning_rate, stream)
            if taken is not None:
                return taken

        hyper, options = _checked(cls, op, arguments)
        _packing.check_scalars(state, op)
        updated, state, _ = take_step(
            op, tree, parameters, state, learning_rate, hyper, options, None, stream, packs=False
        )
        again = prepared_step(tree, state, learning_rate, hyper, options)
        _prepare(key_name, key, again, tree.outline)
        return updated, state

    step.__doc__ = f"""One step of :class:`{cls.__name__}` for all parameters, in one kernel.

    It is a pure function: ``state`` and the trees are not changed. Memory is written in
    place exactly when nobody else can see it any more, so keep no reference to the old
    parameters and state if you want the step to need no new memory::

        parameters, state = {op}(parameters, gradients, state, learning_rate=0.1)
        mx.eval(parameters, state)

    Args:
        parameters (array or tree): Of any shapes; float32, float16 or bfloat16.
        gradients (array or tree): The same structure and shapes; any of these dtypes.
        state (dict): From :func:`{name}_init` with the same parameters, or from the last
            step.
        learning_rate (float, array, Schedule or callable): A :class:`Schedule` is evaluated
            in the kernel at ``state["step"]``; any other callable is called with it and
            returns a scalar.
        stream (Stream or Device, optional): Where to run. Default: MLX's default.
        **arguments: Those of :class:`{cls.__name__}`, with its meaning and defaults, and that
            :func:`{name}_init` was given. ``grad_scale`` may change from step to step. Keep one
            list of ``groups``: its predicates are called again for new ones.

    Returns:
        tuple: The updated parameters (same structure, shapes and dtypes) and the next
        state, in which ``learning_rate`` is the rate this step used.

    Raises:
        ValueError, TypeError: Trees, shapes, dtypes, arguments or state do not fit; nothing
            has been changed then.

    Example:
        >>> w = mx.array([1.0, 2.0])
        >>> state = {name}_init(w)
        >>> w, state = {op}(w, mx.array([0.5, 0.0]), state, learning_rate=0.25)
        >>> state["step"], state["learning_rate"]
        (array(1, dtype=uint64), array(0.25, dtype=float32))
    """
    step.__name__ = step.__qualname__ = op
    return step


def _pair(cls: type[FusedOptimizer]) -> tuple[Init, Step]:
    return _init_of(cls), _step_of(cls)


def fused_ema(state: _packing.State, dtype: mx.Dtype | None = None) -> Any:
    """The moving average of the parameters that a state keeps, see
    :meth:`FusedOptimizer.ema_parameters`.

    Args:
        state (dict): Of any of the functions here, with an ``ema_decay``.
        dtype (Dtype, optional): Of the arrays: float32, float16 or bfloat16. Default: each
            parameter's own.

    Raises:
        ValueError: The state has no average, or the dtype is none of these.

    Example:
        >>> state = fused_sgd_init({"w": mx.ones(2)}, ema_decay=0.5)
        >>> fused_ema(state)
        {'w': array([1, 1], dtype=float32)}
    """
    _packing.check_scalars(state, "fused_ema")
    return _packing.averages([(state, all_slots())], dtype, "fused_ema")


fused_sgd_init, fused_sgd_step = _pair(optimizers.SGD)
fused_adam_init, fused_adam_step = _pair(optimizers.Adam)
fused_adamw_init, fused_adamw_step = _pair(optimizers.AdamW)
fused_adamax_init, fused_adamax_step = _pair(optimizers.Adamax)
fused_lion_init, fused_lion_step = _pair(optimizers.Lion)
fused_muon_init, fused_muon_step = _pair(optimizers.Muon)
fused_rmsprop_init, fused_rmsprop_step = _pair(optimizers.RMSprop)
fused_adagrad_init, fused_adagrad_step = _pair(optimizers.Adagrad)
fused_adadelta_init, fused_adadelta_step = _pair(optimizers.AdaDelta)
