"""Lion: the sign of a moving average."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import mlx.optimizers

from .._checks import Hyperparameter, LearningRate
from .._options import Options, StepOptions
from .._rules import BELOW_ONE, Rule
from .base import Betas, FusedOptimizer, Number

if TYPE_CHECKING:
    from typing_extensions import Unpack


class Lion(FusedOptimizer, mlx.optimizers.Lion):
    r"""Lion, the whole parameter tree in one kernel.

    Takes the place of ``mlx.optimizers.Lion``: the same arguments, the same methods and,
    in float32 with a constant learning rate, the same bits as its eager step.

    .. math::

        c &= \beta_1 m + (1 - \beta_1) g \\
        m &\leftarrow \beta_2 m + (1 - \beta_2) g \\
        w &\leftarrow (1 - \eta_t \lambda) w - \eta_t \, \mathrm{sign}(c)

    {frame}

    Args:
        {learning_rate}
        {betas} Default: ``(0.9, 0.99)``.
        weight_decay (float, Schedule or callable): The weight decay :math:`\lambda`.
            Default: ``0.0``.
        {options}

    {raises}

    References:
        ``mlx.optimizers.Lion``. Chen et al., 2023, https://arxiv.org/abs/2302.06675.

    Example:
        >>> import mlx.core as mx
        >>> optimizer = Lion(learning_rate=0.5)
        >>> parameters = {"w": mx.array([1.0, 2.0])}
        >>> parameters = optimizer.apply_gradients({"w": mx.array([0.5, -0.5])}, parameters)
        >>> parameters["w"], optimizer.step
        (array([0.5, 2.5], dtype=float32), array(1, dtype=uint64))
    """

    _op = "Lion"
    _rule = Rule("lion", beta1=BELOW_ONE, beta2=BELOW_ONE)
    _of_mlx = frozenset({"beta1", "beta2", "weight_decay"})
    _usual = Options(decoupled=True)
    beta1 = Number()
    beta2 = Number()
    betas = Betas()

    def __init__(
        self,
        learning_rate: LearningRate,
        betas: Sequence[Hyperparameter] = (0.9, 0.99),
        weight_decay: Hyperparameter = 0.0,
        **options: Unpack[StepOptions],
    ):
        self._begin(learning_rate, options, betas=betas, weight_decay=weight_decay)
