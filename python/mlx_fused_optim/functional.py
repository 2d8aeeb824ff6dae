"""The step as a pure function, for hot loops that keep no optimizer object."""

from __future__ import annotations

from typing import Any

import mlx.core as mx

from . import _ext, _packing
from ._step import (
    Hyperparameter,
    LearningRate,
    checked_hyperparameters,
    checked_scalar,
    take_step,
)


def fused_sgd_init(
    parameters: Any, *, momentum: Hyperparameter = 0.0, state: _packing.State | None = None
) -> _packing.State:
    """The state before the first step.

    Args:
        parameters (array or tree): What will be trained: one array, or dicts, lists and
            tuples of arrays, float32, float16 or bfloat16.
        momentum (float, Schedule or callable): The momentum of the steps to come; 0 needs
            no memory for it. Default: ``0.0``.
        state (dict, optional): An earlier state, of this function or of
            ``mlx.optimizers.SGD``: its step, learning rate and the momentum of every
            tensor whose path it knows go on; other tensors start from zero.

    Returns:
        dict: A tree of arrays. ``step`` is a uint64 scalar, ``learning_rate`` the float32
        rate of the last step (0 before the first); the rest is momentum.

    Raises:
        ValueError: A leaf cannot be trained, or does not fit ``state``.

    Example:
        >>> state = fused_sgd_init({"w": mx.ones(3)}, momentum=0.9)
        >>> state["step"]
        array(0, dtype=uint64)
    """
    op = "fused_sgd_init"
    tree = _ext.Tree(parameters, parameters, op, exact=True)
    hyper = checked_hyperparameters(op, momentum, 0.0, 0.0, False)
    if state is None:
        state = {"step": mx.array(0, mx.uint64), "learning_rate": mx.array(0.0)}
    else:
        _packing.check_scalars(state, op)
    if hyper.has_momentum and len(tree) > 0:
        return _packing.packed(state, tree, op)
    return dict(state)


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
        learning_rate (float, array, Schedule or callable): :math:`\eta_t`. A
            :class:`Schedule` is evaluated in the kernel at ``state["step"]``; any other
            callable is called with ``state["step"]`` and returns a scalar.
        momentum (float, Schedule or callable): :math:`\mu`, 0 or more; scheduled like the
            learning rate. Default: ``0.0``.
        weight_decay (float, Schedule or callable): :math:`\lambda`, 0 or more; scheduled
            likewise. Default: ``0.0``.
        dampening (float): :math:`\tau`, 0 to 1. Default: ``0.0``.
        nesterov (bool): Nesterov momentum; needs momentum and no dampening.
            Default: ``False``.
        stream (Stream or Device, optional): Where to run. Default: MLX's default.

    Returns:
        tuple: The updated parameters (same structure, shapes and dtypes) and the next
        state, in which ``learning_rate`` is the rate this step used.

    Raises:
        ValueError: Trees, shapes, dtypes, options or state do not fit; nothing has been
            changed then.

    Reference: ``mlx.optimizers.SGD``.

    Example:
        >>> w, state = mx.array([1.0, 2.0]), fused_sgd_init(mx.array([1.0, 2.0]))
        >>> w, state = fused_sgd_step(w, mx.array([2.0, 4.0]), state, learning_rate=0.25)
        >>> w, state["step"]
        (array([0.5, 1], dtype=float32), array(1, dtype=uint64))
    """
    op = "fused_sgd_step"
    tree = _ext.Tree(gradients, parameters, op, exact=True)
    hyper = checked_hyperparameters(op, momentum, weight_decay, dampening, nesterov)
    _packing.check_scalars(state, op)
    missing = _packing.momentum_arenas(state, tree, op) is None
    if hyper.has_momentum and len(tree) > 0 and missing:
        raise ValueError(
            f"[{op}] the state has no momentum for these parameters: got the state of other "
            "parameters, or of steps without momentum; allowed one from "
            "fused_sgd_init(parameters, momentum=..., state=...)."
        )
    if not callable(learning_rate):
        learning_rate = checked_scalar(op, "learning_rate", learning_rate)
    parameters, state, _ = take_step(op, tree, state, learning_rate, hyper, stream)
    return parameters, state
