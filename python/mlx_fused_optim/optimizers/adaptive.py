"""Gradients over the root of what their squares add up to."""

from __future__ import annotations

from typing import TYPE_CHECKING

import mlx.optimizers

from .._checks import Hyperparameter, LearningRate
from .._options import StepOptions
from .._rules import ABOVE_ZERO, UNIT, Rule
from .base import FusedOptimizer, Number

if TYPE_CHECKING:
    from typing_extensions import Unpack


class RMSprop(FusedOptimizer, mlx.optimizers.RMSprop):
    r"""RMSprop, the whole parameter tree in one kernel.

    Takes the place of ``mlx.optimizers.RMSprop``: the same arguments, the same methods and,
    in float32 with a constant learning rate, the same bits as its eager step.

    .. math::

        v &\leftarrow \alpha v + (1 - \alpha) g^2 \\
        w &\leftarrow w - \eta_t \frac{g}{\sqrt{v} + \epsilon}

    {frame}

    Args:
        {learning_rate}
        alpha (float, Schedule or callable): The factor :math:`\alpha`, 0 to 1.
            Default: ``0.99``.
        eps (float): The term :math:`\epsilon` in the denominator, above 0. Default: ``1e-8``.
        weight_decay (float, Schedule or callable): The weight decay :math:`\lambda`.
            Coupled (L2) unless ``decoupled``. Default: ``0.0``.
        {options}

    {raises}

    References:
        ``mlx.optimizers.RMSprop``. Tieleman and Hinton, 2012, lecture 6.5 of Neural
        networks for machine learning.

    Example:
        >>> import mlx.core as mx
        >>> optimizer = RMSprop(learning_rate=0.5)
        >>> parameters = {"w": mx.array([1.0, 2.0])}
        >>> parameters = optimizer.apply_gradients({"w": mx.array([0.5, -0.5])}, parameters)
        >>> parameters["w"], optimizer.step
        (array([-4, 7], dtype=float32), array(1, dtype=uint64))
    """

    _op = "RMSprop"
    _rule = Rule("rmsprop", alpha=UNIT, eps=ABOVE_ZERO)
    _of_mlx = frozenset({"alpha", "eps"})

    alpha = Number()
    eps = Number()

    def __init__(
        self,
        learning_rate: LearningRate,
        alpha: Hyperparameter = 0.99,
        eps: Hyperparameter = 1e-8,
        *,
        weight_decay: Hyperparameter = 0.0,
        **options: Unpack[StepOptions],
    ):
        self._begin(learning_rate, options, alpha=alpha, eps=eps, weight_decay=weight_decay)


class Adagrad(FusedOptimizer, mlx.optimizers.Adagrad):
    r"""Adagrad, the whole parameter tree in one kernel.

    Takes the place of ``mlx.optimizers.Adagrad``: the same arguments, the same methods and,
    in float32 with a constant learning rate, the same bits as its eager step.

    .. math::

        v &\leftarrow v + g^2 \\
        w &\leftarrow w - \eta_t \frac{g}{\sqrt{v} + \epsilon}

    {frame}

    Args:
        {learning_rate}
        eps (float): The term :math:`\epsilon` in the denominator, above 0. Default: ``1e-8``.
        weight_decay (float, Schedule or callable): The weight decay :math:`\lambda`.
            Coupled (L2) unless ``decoupled``. Default: ``0.0``.
        {options}

    {raises}

    References:
        ``mlx.optimizers.Adagrad``. Duchi, Hazan and Singer, 2011,
        https://jmlr.org/papers/v12/duchi11a.html.

    Example:
        >>> import mlx.core as mx
        >>> optimizer = Adagrad(learning_rate=0.5)
        >>> parameters = {"w": mx.array([1.0, 2.0])}
        >>> parameters = optimizer.apply_gradients({"w": mx.array([0.5, -0.5])}, parameters)
        >>> parameters["w"], optimizer.step
        (array([0.5, 2.5], dtype=float32), array(1, dtype=uint64))
    """

    _op = "Adagrad"
    _rule = Rule("adagrad", eps=ABOVE_ZERO)
    _of_mlx = frozenset({"eps"})

    eps = Number()

    def __init__(
        self,
        learning_rate: LearningRate,
        eps: Hyperparameter = 1e-8,
        *,
        weight_decay: Hyperparameter = 0.0,
        **options: Unpack[StepOptions],
    ):
        self._begin(learning_rate, options, eps=eps, weight_decay=weight_decay)


class AdaDelta(FusedOptimizer, mlx.optimizers.AdaDelta):
    r"""AdaDelta, the whole parameter tree in one kernel.

    Takes the place of ``mlx.optimizers.AdaDelta``: the same arguments, the same methods and,
    in float32 with a constant learning rate, the same bits as its eager step.

    .. math::

        v &\leftarrow \rho v + (1 - \rho) g^2 \\
        d &= \frac{\sqrt{u + \epsilon}}{\sqrt{v + \epsilon}} g \\
        u &\leftarrow \rho u + (1 - \rho) d^2 \\
        w &\leftarrow w - \eta_t d

    {frame}

    Args:
        {learning_rate}
        rho (float, Schedule or callable): The factor :math:`\rho`, 0 to 1.
            Default: ``0.9``.
        eps (float): The term :math:`\epsilon` under the roots, above 0. Default: ``1e-6``.
        weight_decay (float, Schedule or callable): The weight decay :math:`\lambda`.
            Coupled (L2) unless ``decoupled``. Default: ``0.0``.
        {options}

    {raises}

    References:
        ``mlx.optimizers.AdaDelta``. Zeiler, 2012, https://arxiv.org/abs/1212.5701.

    Example:
        >>> import mlx.core as mx
        >>> optimizer = AdaDelta(learning_rate=0.5)
        >>> parameters = {"w": mx.array([1.0, 2.0])}
        >>> parameters = optimizer.apply_gradients({"w": mx.array([0.5, -0.5])}, parameters)
        >>> parameters["w"], optimizer.step
        (array([0.998419, 2.00158], dtype=float32), array(1, dtype=uint64))
    """

    _op = "AdaDelta"
    _rule = Rule("adadelta", rho=UNIT, eps=ABOVE_ZERO)
    _of_mlx = frozenset({"rho", "eps"})

    rho = Number()
    eps = Number()

    def __init__(
        self,
        learning_rate: LearningRate,
        rho: Hyperparameter = 0.9,
        eps: Hyperparameter = 1e-6,
        *,
        weight_decay: Hyperparameter = 0.0,
        **options: Unpack[StepOptions],
    ):
        self._begin(learning_rate, options, rho=rho, eps=eps, weight_decay=weight_decay)
