"""Stochastic gradient descent."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import mlx.optimizers

from .._checks import Hyperparameter, LearningRate
from .._options import StepOptions
from .._rules import FROM_ZERO, UNIT, Rule
from .._step import Hyper
from .base import FusedOptimizer, Number

if TYPE_CHECKING:
    from typing_extensions import Unpack


class SGD(FusedOptimizer, mlx.optimizers.SGD):
    r"""Stochastic gradient descent, the whole parameter tree in one kernel.

    Takes the place of ``mlx.optimizers.SGD``: the same arguments, the same methods and,
    in float32 with a constant learning rate, the same bits as its eager step.

    .. math::

        g &\leftarrow g + \lambda w \\
        v &\leftarrow \mu v + (1 - \tau) g \\
        w &\leftarrow w - \eta_t \, (g + \mu v \text{ if nesterov else } v)

    With :math:`\mu = 0` there is no :math:`v`, and :math:`w \leftarrow w - \eta_t g`.
    {frame}

    Args:
        {learning_rate}
        momentum (float, Schedule or callable): The momentum :math:`\mu`, 0 or more;
            scheduled like the learning rate, it may pass through 0. Default: ``0.0``.
        weight_decay (float, Schedule or callable): The weight decay :math:`\lambda`.
            Coupled (L2) unless ``decoupled``. Default: ``0.0``.
        dampening (float): The dampening :math:`\tau` of the momentum, 0 to 1.
            Default: ``0.0``.
        nesterov (bool): Nesterov momentum; needs momentum and no dampening.
            Default: ``False``.
        {options}

    {raises}

    References:
        ``mlx.optimizers.SGD``, ``mlx.optimizers.clip_grad_norm``. LARS: You, Gitman and
        Ginsburg, 2017, https://arxiv.org/abs/1708.03888. Decoupled weight decay: Loshchilov
        and Hutter, 2019, https://arxiv.org/abs/1711.05101. Master weights: Micikevicius et
        al., 2018, https://arxiv.org/abs/1710.03740.

    Example:
        >>> import mlx.core as mx
        >>> optimizer = SGD(learning_rate=0.5, momentum=0.5)
        >>> parameters = {"w": mx.array([1.0, 2.0])}
        >>> for _ in range(2):
        ...     parameters = optimizer.apply_gradients({"w": mx.array([1.0, 1.0])}, parameters)
        >>> parameters["w"], optimizer.step
        (array([-0.25, 0.75], dtype=float32), array(2, dtype=uint64))

        bfloat16 has no number between 1 and 0.996; a master has:

        >>> parameters = {"w": mx.array([1.0], mx.bfloat16)}
        >>> optimizer = SGD(learning_rate=2**-10, master_weights=True, clip_norm=4.0)
        >>> for _ in range(8):
        ...     parameters = optimizer.apply_gradients({"w": mx.array([1.0])}, parameters)
        >>> parameters["w"], optimizer.grad_norm
        (array([0.992188], dtype=bfloat16), array(1, dtype=float32))

        Biases without weight decay, and at twice the learning rate:

        >>> bias = lambda path, array: array.ndim < 2
        >>> optimizer = SGD(
        ...     learning_rate=0.5,
        ...     weight_decay=0.5,
        ...     groups=[(bias, {"weight_decay": 0.0, "learning_rate_factor": 2.0})],
        ... )
        >>> parameters = {"weight": mx.ones((1, 2)), "bias": mx.ones(2)}
        >>> gradients = {"weight": mx.zeros((1, 2)), "bias": mx.ones(2)}
        >>> parameters = optimizer.apply_gradients(gradients, parameters)
        >>> parameters["weight"], parameters["bias"]
        (array([[0.75, 0.75]], dtype=float32), array([0, 0], dtype=float32))
    """

    _op = "SGD"
    _rule = Rule("sgd", None, {"momentum": "v"}, momentum=FROM_ZERO, dampening=UNIT)
    _of_mlx = frozenset({"momentum", "weight_decay", "dampening", "nesterov"})

    momentum = Number()
    dampening = Number()

    def __init__(
        self,
        learning_rate: LearningRate,
        momentum: Hyperparameter = 0.0,
        weight_decay: Hyperparameter = 0.0,
        dampening: Hyperparameter = 0.0,
        nesterov: bool = False,
        **options: Unpack[StepOptions],
    ):
        self._begin(
            learning_rate,
            options,
            momentum=momentum,
            weight_decay=weight_decay,
            dampening=dampening,
            nesterov=nesterov,
        )

    @classmethod
    def _parsed(cls, op: str, numbers: dict[str, Any], flags: dict[str, bool]) -> Hyper:
        hyper = super()._parsed(op, numbers, flags)
        nesterov = hyper.flags & cls._rule.flags["nesterov"]
        momentum, dampening = hyper.named["momentum"], hyper.named["dampening"]
        if nesterov and (momentum == 0 or dampening != 0):
            raise ValueError(
                f"[{op}] nesterov requires a momentum and zero dampening: got "
                f"momentum={momentum}, dampening={dampening}, "
                "allowed momentum above 0 and dampening 0."
            )
        bit = cls._rule.flags["momentum"] if momentum != 0 else 0
        return hyper._replace(flags=hyper.flags | bit)
