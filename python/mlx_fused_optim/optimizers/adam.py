"""Adam and its kin: moving averages of the gradient and of its size."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import mlx.optimizers

from .._checks import Hyperparameter, LearningRate
from .._options import Options, StepOptions
from .._rules import BELOW_ONE, FROM_ZERO, Rule
from .base import Betas, FusedOptimizer, Number

if TYPE_CHECKING:
    from typing_extensions import Unpack


class Adam(FusedOptimizer, mlx.optimizers.Adam):
    r"""Adam, the whole parameter tree in one kernel.

    Takes the place of ``mlx.optimizers.Adam``: the same arguments, the same methods and,
    in float32 with a constant learning rate and no bias correction, the same bits as its
    eager step.

    .. math::

        m &\leftarrow \beta_1 m + (1 - \beta_1) g \\
        v &\leftarrow \beta_2 v + (1 - \beta_2) g^2 \\
        w &\leftarrow w - \eta_t \frac{m}{\sqrt{v} + \epsilon}

    {frame}

    Args:
        {learning_rate}
        {betas} Default: ``(0.9, 0.999)``.
        eps (float): The term :math:`\epsilon` in the denominator, 0 or more. Default: ``1e-8``.
        bias_correction (bool): Divide :math:`m` by :math:`1 - \beta_1^t` and :math:`v` by
            :math:`1 - \beta_2^t`, :math:`t` counting from 1. The two numbers are exact to an
            ulp of float32 at every step. Default: ``False``.
        amsgrad (bool): Divide by the largest :math:`v` so far. Default: ``False``.
        weight_decay (float, Schedule or callable): The weight decay :math:`\lambda`.
            Coupled (L2) unless ``decoupled``. Default: ``0.0``.
        {options}

    {raises}

    References:
        ``mlx.optimizers.Adam``. Kingma and Ba, 2015, https://arxiv.org/abs/1412.6980. AMSGrad:
        Reddi, Kale and Kumar, 2018, https://arxiv.org/abs/1904.09237.

    Example:
        >>> import mlx.core as mx
        >>> optimizer = Adam(learning_rate=0.5)
        >>> parameters = {"w": mx.array([1.0, 2.0])}
        >>> parameters = optimizer.apply_gradients({"w": mx.array([0.5, -0.5])}, parameters)
        >>> parameters["w"], optimizer.step
        (array([-0.581138, 3.58114], dtype=float32), array(1, dtype=uint64))
    """

    _op = "Adam"
    _rule = Rule("adam", beta1=BELOW_ONE, beta2=BELOW_ONE, eps=FROM_ZERO)
    _of_mlx = frozenset({"beta1", "beta2", "eps", "bias_correction"})
    beta1 = Number()
    beta2 = Number()
    betas = Betas()
    eps = Number()
    bias_correction = False
    amsgrad = False

    def __init__(
        self,
        learning_rate: LearningRate,
        betas: Sequence[Hyperparameter] = (0.9, 0.999),
        eps: Hyperparameter = 1e-8,
        bias_correction: bool = False,
        *,
        amsgrad: bool = False,
        weight_decay: Hyperparameter = 0.0,
        **options: Unpack[StepOptions],
    ):
        self._begin(
            learning_rate,
            options,
            betas=betas,
            eps=eps,
            bias_correction=bias_correction,
            amsgrad=amsgrad,
            weight_decay=weight_decay,
        )


class AdamW(Adam, mlx.optimizers.AdamW):
    r"""Adam with decoupled weight decay, the whole parameter tree in one kernel.

    Takes the place of ``mlx.optimizers.AdamW``: the same arguments, the same methods and,
    in float32 with a constant learning rate and no bias correction, the same bits as its
    eager step.

    .. math::

        w &\leftarrow (1 - \eta_t \lambda) w \\
        m &\leftarrow \beta_1 m + (1 - \beta_1) g \\
        v &\leftarrow \beta_2 v + (1 - \beta_2) g^2 \\
        w &\leftarrow w - \eta_t \frac{m}{\sqrt{v} + \epsilon}

    {frame}

    Args:
        {learning_rate}
        {betas} Default: ``(0.9, 0.999)``.
        eps (float): The term :math:`\epsilon` in the denominator, 0 or more. Default: ``1e-8``.
        weight_decay (float, Schedule or callable): The weight decay :math:`\lambda`.
            Default: ``0.01``.
        bias_correction (bool): Divide :math:`m` by :math:`1 - \beta_1^t` and :math:`v` by
            :math:`1 - \beta_2^t`, :math:`t` counting from 1. The two numbers are exact to an
            ulp of float32 at every step. Default: ``False``.
        amsgrad (bool): Divide by the largest :math:`v` so far. Default: ``False``.
        {options}

    {raises}

    References:
        ``mlx.optimizers.AdamW``. Loshchilov and Hutter, 2019, https://arxiv.org/abs/1711.05101.

    Example:
        >>> import mlx.core as mx
        >>> optimizer = AdamW(learning_rate=0.5)
        >>> parameters = {"w": mx.array([1.0, 2.0])}
        >>> parameters = optimizer.apply_gradients({"w": mx.array([0.5, -0.5])}, parameters)
        >>> parameters["w"], optimizer.step
        (array([-0.586138, 3.57114], dtype=float32), array(1, dtype=uint64))
    """

    _op = "AdamW"
    _of_mlx = frozenset({"beta1", "beta2", "eps", "weight_decay", "bias_correction"})
    _usual = Options(decoupled=True)

    def __init__(
        self,
        learning_rate: LearningRate,
        betas: Sequence[Hyperparameter] = (0.9, 0.999),
        eps: Hyperparameter = 1e-8,
        weight_decay: Hyperparameter = 0.01,
        bias_correction: bool = False,
        *,
        amsgrad: bool = False,
        **options: Unpack[StepOptions],
    ):
        self._begin(
            learning_rate,
            options,
            betas=betas,
            eps=eps,
            weight_decay=weight_decay,
            bias_correction=bias_correction,
            amsgrad=amsgrad,
        )


class Adamax(Adam, mlx.optimizers.Adamax):
    r"""Adam by the infinity norm, the whole parameter tree in one kernel.

    Takes the place of ``mlx.optimizers.Adamax``: the same arguments, the same methods and,
    in float32 with a constant learning rate, the same bits as its eager step.

    .. math::

        m &\leftarrow \beta_1 m + (1 - \beta_1) g \\
        v &\leftarrow \max(\beta_2 v, |g|) \\
        w &\leftarrow w - \eta_t \frac{m}{v + \epsilon}

    {frame}

    Args:
        {learning_rate}
        {betas} Default: ``(0.9, 0.999)``.
        eps (float): The term :math:`\epsilon` in the denominator, 0 or more. Default: ``1e-8``.
        weight_decay (float, Schedule or callable): The weight decay :math:`\lambda`.
            Coupled (L2) unless ``decoupled``. Default: ``0.0``.
        {options}

    {raises}

    References:
        ``mlx.optimizers.Adamax``. Kingma and Ba, 2015, https://arxiv.org/abs/1412.6980,
        section 7.1.

    Example:
        >>> import mlx.core as mx
        >>> optimizer = Adamax(learning_rate=0.5)
        >>> parameters = {"w": mx.array([1.0, 2.0])}
        >>> parameters = optimizer.apply_gradients({"w": mx.array([0.5, -0.5])}, parameters)
        >>> parameters["w"], optimizer.step
        (array([0.95, 2.05], dtype=float32), array(1, dtype=uint64))
    """

    _op = "Adamax"
    _rule = Rule("adamax", beta1=BELOW_ONE, beta2=BELOW_ONE, eps=FROM_ZERO)
    _of_mlx = frozenset({"beta1", "beta2", "eps"})

    def __init__(
        self,
        learning_rate: LearningRate,
        betas: Sequence[Hyperparameter] = (0.9, 0.999),
        eps: Hyperparameter = 1e-8,
        *,
        weight_decay: Hyperparameter = 0.0,
        **options: Unpack[StepOptions],
    ):
        self._begin(learning_rate, options, betas=betas, eps=eps, weight_decay=weight_decay)
