"""The step as a pure function, for hot loops that keep no optimizer object."""

from __future__ import annotations

import operator
from typing import Any, NamedTuple

import mlx.core as mx

from . import _ext, _packing
from ._checks import Hyperparameter, LearningRate, checked_scalar
from ._groups import GroupList, known_groups
from ._options import Options, checked_options
from ._step import begun, checked_hyperparameters, never_changes, prepared_step, take_step
from .schedules._of_mlx import as_ours


def fused_sgd_init(
    parameters: Any,
    *,
    momentum: Hyperparameter = 0.0,
    weight_decay: Hyperparameter = 0.0,
    dampening: float = 0.0,
    nesterov: bool = False,
    state: _packing.State | None = None,
    momentum_dtype: mx.Dtype | None = None,
    master_weights: bool = False,
    rounding: str = "nearest",
    compensated: bool = False,
    seed: int = 0,
    clip_norm: float | None = None,
    clip_value: float | None = None,
    grad_scale: LearningRate = 1.0,
    skip_nonfinite: bool = False,
    decoupled: bool = False,
    maximize: bool = False,
    groups: GroupList = (),
    trust_coefficient: float | None = None,
    ema_decay: float | None = None,
) -> _packing.State:
    """The state before the first step.

    Args:
        parameters (array or tree): What will be trained: one array, or dicts, lists and
            tuples of arrays, float32, float16 or bfloat16.
        momentum (float, Schedule or callable): The momentum of the steps to come; 0 needs
            no memory for it. Default: ``0.0``.
        weight_decay, dampening, nesterov: Those of the steps to come, so that one dict of
            options serves both functions; they need no state.
        state (dict, optional): An earlier state, of this function or of
            ``mlx.optimizers.SGD``: its step, learning rate and what it has of every
            tensor whose path it knows go on; other tensors begin.
        momentum_dtype, ..., ema_decay: The options of the steps to come, as of
            :class:`SGD`. They decide what a state keeps: master weights, compensations and
            moving averages besides momentum, ``grad_norm`` and ``skipped``.

    Returns:
        dict: A tree of arrays. ``step`` is a uint64 scalar, ``learning_rate`` the float32
        rate of the last step (0 before the first), ``grad_norm`` and ``skipped`` what
        :class:`SGD` has under these names; the rest is kept of the parameters.

    Raises:
        ValueError, TypeError: A leaf cannot be trained, or does not fit ``state``; an option
            makes no sense.

    Example:
        >>> state = fused_sgd_init({"w": mx.ones(3)}, momentum=0.9)
        >>> state["step"]
        array(0, dtype=uint64)
    """
    op = "fused_sgd_init"
    tree = _ext.Tree(parameters, parameters, op, exact=True)
    hyper = checked_hyperparameters(op, momentum, weight_decay, dampening, nesterov)
    given = (
        momentum_dtype,
        master_weights,
        rounding,
        compensated,
        seed,
        clip_norm,
        clip_value,
        grad_scale,
        skip_nonfinite,
        decoupled,
        maximize,
        groups,
        trust_coefficient,
        ema_decay,
    )
    options = _checked_options(op, given)
    if state is None:
        state = {"step": mx.array(0, mx.uint64), "learning_rate": mx.array(0.0)}
    else:
        _packing.check_scalars(state, op)
    return dict(begun(op, tree, parameters, state, hyper, options))


def fused_sgd_step(
    parameters: Any,
    gradients: Any,
    state: _packing.State,
    *,
    learning_rate: LearningRate,
    momentum: Hyperparameter = 0.0,
    weight_decay: Hyperparameter = 0.0,
    dampening: float = 0.0,
    nesterov: bool = False,
    momentum_dtype: mx.Dtype | None = None,
    master_weights: bool = False,
    rounding: str = "nearest",
    compensated: bool = False,
    seed: int = 0,
    clip_norm: float | None = None,
    clip_value: float | None = None,
    grad_scale: LearningRate = 1.0,
    skip_nonfinite: bool = False,
    decoupled: bool = False,
    maximize: bool = False,
    groups: GroupList = (),
    trust_coefficient: float | None = None,
    ema_decay: float | None = None,
    stream: mx.Stream | mx.Device | None = None,
) -> tuple[Any, _packing.State]:
    r"""One step of stochastic gradient descent for all parameters, in one kernel.

    .. math::

        g &\leftarrow g + \lambda w \\
        v &\leftarrow \mu v + (1 - \tau) g \\
        w &\leftarrow w - \eta_t \, (g + \mu v \text{ if nesterov else } v)

    With :math:`\mu = 0` there is no :math:`v`, and :math:`w \leftarrow w - \eta_t g`.

    It is a pure function: ``state`` and the trees are not changed. Memory is written in
    place exactly when nobody else can see it any more, so keep no reference to the old
    parameters and state if you want the step to need no new memory::

        parameters, state = fused_sgd_step(parameters, gradients, state, learning_rate=0.1)
        mx.eval(parameters, state)

    The arithmetic is float32, rounded once to the dtype of each result. In float32 with a
    constant rate it has the bits of ``mlx.optimizers.SGD`` run eagerly.

    Args:
        parameters (array or tree): :math:`w`, of any shapes; float32, float16 or bfloat16.
        gradients (array or tree): :math:`g`, the same structure and shapes; any of
            these dtypes.
        state (dict): From :func:`fused_sgd_init` with the same parameters, or from the
            last step.
        learning_rate (float, array, Schedule or callable): :math:`\eta_t`; an array has
            one element. A
            :class:`Schedule` is evaluated in the kernel at ``state["step"]``; any other
            callable is called with ``state["step"]`` and returns a scalar.
        momentum (float, Schedule or callable): :math:`\mu`, 0 or more; scheduled like the
            learning rate. Default: ``0.0``.
        weight_decay (float, Schedule or callable): :math:`\lambda`; scheduled likewise.
            Default: ``0.0``.
        dampening (float): :math:`\tau`, 0 to 1. Default: ``0.0``.
        nesterov (bool): Nesterov momentum; needs momentum and no dampening.
            Default: ``False``.
        momentum_dtype, ..., ema_decay: The options of :class:`SGD`, with its meaning and
            defaults, and those that :func:`fused_sgd_init` was given. ``grad_scale`` may
            change from step to step. Inside ``mx.compile`` they are as they were at the
            trace: see :class:`SGD` on compiled steps. Keep one list of ``groups``: its
            predicates are called again for new ones.
        stream (Stream or Device, optional): Where to run. Default: MLX's default.

    Returns:
        tuple: The updated parameters (same structure, shapes and dtypes) and the next
        state, in which ``learning_rate`` is the rate this step used.

    Raises:
        ValueError, TypeError: Trees, shapes, dtypes, options or state do not fit; nothing
            has been changed then.

    Reference: ``mlx.optimizers.SGD``.

    Example:
        >>> w, state = mx.array([1.0, 2.0]), fused_sgd_init(mx.array([1.0, 2.0]))
        >>> w, state = fused_sgd_step(w, mx.array([2.0, 4.0]), state, learning_rate=0.25)
        >>> w, state["step"]
        (array([0.5, 1], dtype=float32), array(1, dtype=uint64))
    """
    op = "fused_sgd_step"
    tree = _ext.Tree(gradients, parameters, op, exact=True)
    if callable(learning_rate):
        schedule = learning_rate = as_ours(learning_rate)
    else:
        schedule, learning_rate = None, checked_scalar(op, "learning_rate", learning_rate)
    numbers = (momentum, weight_decay, dampening, nesterov)
    given = (
        momentum_dtype,
        master_weights,
        rounding,
        compensated,
        seed,
        clip_norm,
        clip_value,
        grad_scale,
        skip_nonfinite,
        decoupled,
        maximize,
        groups,
        trust_coefficient,
        ema_decay,
    )
    key = (schedule, *numbers, *given)
    prepared = _prepared.get(tuple(map(id, key)))
    if prepared is not None:
        taken = prepared.step(tree, state, learning_rate, stream)
        if taken is not None:
            return taken

    hyper = checked_hyperparameters(op, *numbers)
    options = _checked_options(op, given)
    _packing.check_scalars(state, op)
    updated, state, _ = take_step(
        op, tree, parameters, state, learning_rate, hyper, options, None, stream, packs=False
    )
    _prepare(key, prepared_step(tree, state, learning_rate, hyper, options))
    return updated, state


def fused_sgd_ema(state: _packing.State, dtype: mx.Dtype | None = None) -> Any:
    """The moving average of the parameters that a state keeps, see
    :meth:`SGD.ema_parameters`.

    Args:
        state (dict): From :func:`fused_sgd_init` or :func:`fused_sgd_step` with an
            ``ema_decay``.
        dtype (Dtype, optional): Of the arrays: float32, float16 or bfloat16. Default: each
            parameter's own.

    Raises:
        ValueError: The state has no average, or the dtype is none of these.

    Example:
        >>> state = fused_sgd_init({"w": mx.ones(2)}, ema_decay=0.5)
        >>> fused_sgd_ema(state)
        {'w': array([1, 1], dtype=float32)}
    """
    op = "fused_sgd_ema"
    _packing.check_scalars(state, op)
    return _packing.averages(state, dtype, _packing.SGD, op)


class _Prepared(NamedTuple):
    """A step for these very arguments, which live as long as their ids are looked up."""

    key: tuple[Any, ...]
    step: _ext.PreparedStep


_prepared: dict[tuple[int, ...], _Prepared] = {}


def _prepare(key: tuple[Any, ...], step: _ext.PreparedStep | None) -> None:
    if step is not None and all(map(never_changes, key)):
        if len(_prepared) >= 16:  # a number that is another object in each call
            del _prepared[next(iter(_prepared))]
        _prepared[tuple(map(id, key))] = _Prepared(key, step)


_PLAIN = Options()
_DEFAULTS = (None, False, "nearest", False, 0, None, None, 1.0, False, False, False, (), None, None)


def _checked_options(op: str, given: tuple[Any, ...]) -> Options:
    # Without options, the usual case, there is nothing to check.
    if all(map(operator.is_, given, _DEFAULTS)):
        return _PLAIN
    checked = checked_options(op, **dict(zip(Options._fields, given, strict=True)))
    if checked.groups.members:
        checked = checked._replace(groups=known_groups(checked.groups))
    return checked
