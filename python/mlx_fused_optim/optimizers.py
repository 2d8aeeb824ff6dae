"""Optimizers that read like ``mlx.optimizers``."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
from mlx.optimizers import Optimizer

from . import _ext, _packing
from ._step import (
    Hyperparameter,
    LearningRate,
    checked_hyperparameters,
    checked_scalar,
    take_step,
)


class SGD(Optimizer):
    r"""Stochastic gradient descent, the whole parameter tree in one kernel.

    Takes the place of ``mlx.optimizers.SGD``: the same arguments, the same methods and,
    in float32 with a constant learning rate, the same bits as its eager step.

    .. math::

        g &\leftarrow g + \lambda w \\
        v &\leftarrow \mu v + (1 - \tau) g \\
        w &\leftarrow w - \eta_t \, (g + \mu v \text{ if nesterov else } v)

    With :math:`\mu = 0` there is no :math:`v`, and :math:`w \leftarrow w - \eta_t g`.
    Arithmetic is float32 and is rounded once, to the parameter's dtype (float32, float16
    or bfloat16), which a parameter always keeps. Momentum has the parameter's dtype.

    ``state`` is a tree of arrays for ``mx.compile`` and ``mx.save_safetensors``; a state
    of ``mlx.optimizers.SGD`` can be assigned to it, and :meth:`unpacked_state` gives that
    layout back. As for the learning rate, ``state["momentum"]`` and
    ``state["weight_decay"]`` are there when they are scheduled, with the value that the last
    step used.

    Args:
        learning_rate (float, array, Schedule or callable): The learning rate
            :math:`\eta_t`. A :class:`Schedule` is evaluated in the kernel; any other
            callable gets the step and returns a scalar.
        momentum (float, Schedule or callable): The momentum :math:`\mu`, 0 or more;
            scheduled like the learning rate, it may pass through 0. Default: ``0.0``.
        weight_decay (float, Schedule or callable): The weight decay :math:`\lambda` (L2
            penalty), 0 or more; scheduled likewise. Default: ``0.0``.
        dampening (float): The dampening :math:`\tau` of the momentum, 0 to 1.
            Default: ``0.0``.
        nesterov (bool): Nesterov momentum; needs momentum and no dampening.
            Default: ``False``.

    Raises:
        ValueError: An option makes no sense; at a step: trees, shapes, dtypes or state do
            not fit. Nothing has been changed then.

    Reference: ``mlx.optimizers.SGD``.

    Example:
        >>> optimizer = SGD(learning_rate=0.5, momentum=0.5)
        >>> parameters = {"w": mx.array([1.0, 2.0])}
        >>> for _ in range(2):
        ...     parameters = optimizer.apply_gradients({"w": mx.array([1.0, 1.0])}, parameters)
        >>> parameters["w"], optimizer.step
        (array([-0.25, 0.75], dtype=float32), array(2, dtype=uint64))
    """

    def __init__(
        self,
        learning_rate: LearningRate,
        momentum: Hyperparameter = 0.0,
        weight_decay: Hyperparameter = 0.0,
        dampening: float = 0.0,
        nesterov: bool = False,
    ):
        checked_hyperparameters("SGD", momentum, weight_decay, dampening, nesterov)
        super().__init__()  # type: ignore[no-untyped-call]
        self._constants: dict[str, Any] = {}
        self.learning_rate = learning_rate
        self.momentum = momentum
        self.weight_decay = weight_decay
        self.dampening = dampening
        self.nesterov = nesterov

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        for name in ("init_single", "apply_single"):
            if name in vars(cls):
                raise TypeError(
                    f"[SGD] a subclass cannot change the step of one tensor: got {name} in "
                    f"{cls.__name__}, allowed apply_gradients, or mlx.optimizers.SGD as the base."
                )

    @property
    def state(self) -> dict[str, Any]:
        """The optimizer's state. One that is assigned is copied (not its arrays), so that
        whoever it came from keeps its own."""
        return self._state

    @state.setter
    def state(self, state: dict[str, Any]) -> None:
        self._initialized = False
        self._state = dict(state) if isinstance(state, dict) else state

    @property
    def learning_rate(self) -> Any:
        """The learning rate: the one to come, or of the last step when it is scheduled."""
        return self.state["learning_rate"]

    @learning_rate.setter
    def learning_rate(self, learning_rate: LearningRate) -> None:
        if callable(learning_rate):
            first = checked_scalar("SGD", "learning_rate", learning_rate(self.step))
            self._schedulers["learning_rate"] = learning_rate
            learning_rate = first
        # A schedule goes on, as in mlx.optimizers: the next step sets the rate again.
        self.state["learning_rate"] = checked_scalar("SGD", "learning_rate", learning_rate)

    @property
    def momentum(self) -> Any:
        """The momentum: the number that was given, or the value a schedule had last."""
        return self._hyperparameter("momentum")

    @momentum.setter
    def momentum(self, value: Hyperparameter) -> None:
        self._set_hyperparameter("momentum", value)

    @property
    def weight_decay(self) -> Any:
        """The weight decay: the number that was given, or the value a schedule had last."""
        return self._hyperparameter("weight_decay")

    @weight_decay.setter
    def weight_decay(self, value: Hyperparameter) -> None:
        self._set_hyperparameter("weight_decay", value)

    def init(self, parameters: Any) -> None:
        """Make the state for these parameters, keeping what it already knows of them.

        Optional: the first step does it. Useful to have the whole state before the first
        step, for instance to capture it in ``mx.compile``.

        Args:
            parameters (tree): A tree of the arrays that will be trained.
        """
        tree = _ext.Tree(parameters, parameters, "SGD")
        self._check_loaded_state(parameters)
        if self._hyperparameters().has_momentum and len(tree) > 0:
            self._replace_state(_packing.packed(self.state, tree, "SGD"))
        self._initialized = True

    def apply_gradients(self, gradients: Any, parameters: Any) -> Any:
        """One step: the updated parameters, in the structure of ``gradients``.

        Args:
            gradients (tree): A tree of arrays. It may have a part of the parameters only.
            parameters (tree): A tree of parameters, or the model.

        Returns:
            The updated parameters; each keeps its shape and dtype.
        """
        tree = _ext.Tree(gradients, parameters, "SGD")
        hyper = self._hyperparameters()
        self._check_loaded_state(parameters)
        learning_rate = self._schedulers.get("learning_rate")
        if learning_rate is None:
            rate = self.state.get("learning_rate")
            learning_rate = checked_scalar("SGD", "learning_rate", rate)
        # Of a subclass: whatever else it has put on a schedule.
        others = {
            name: schedule(self.step)
            for name, schedule in self._schedulers.items()
            if name not in ("learning_rate", "momentum", "weight_decay")
        }
        updated, state, used = take_step("SGD", tree, self.state, learning_rate, hyper, None)
        self._replace_state({**state, **used, **others})
        self._initialized = True
        return updated

    def unpacked_state(self) -> dict[str, Any]:
        """The state as ``mlx.optimizers.SGD`` has it: ``state[...path...]["v"]`` an array.

        Its arrays are views; while they live, the next step copies the momentum once
        instead of writing in place.

        Example:
            >>> optimizer = SGD(learning_rate=0.5, momentum=0.9)
            >>> optimizer.init({"w": mx.zeros(2)})
            >>> optimizer.unpacked_state()["w"]
            {'v': array([0, 0], dtype=float32)}
        """
        return _packing.unpacked(self.state, "SGD")

    def init_single(self, parameter: mx.array, state: dict[str, Any]) -> None:
        raise NotImplementedError(
            "[SGD] init_single is not used: the state is that of the whole tree, see init()."
        )

    def apply_single(self, gradient: mx.array, parameter: mx.array, state: dict[str, Any]) -> Any:
        raise NotImplementedError(
            "[SGD] apply_single is not used: a step is one kernel for the whole tree, see "
            "apply_gradients()."
        )

    def _hyperparameters(self) -> Any:
        options: dict[str, Any] = {**self._constants, **self._schedulers}
        momentum, weight_decay = options["momentum"], options["weight_decay"]
        return checked_hyperparameters("SGD", momentum, weight_decay, self.dampening, self.nesterov)

    def _hyperparameter(self, name: str) -> Any:
        schedule = self._schedulers.get(name)
        if schedule is None:
            return self._constants[name]
        # A state from elsewhere may lack it.
        return self.state[name] if name in self.state else schedule(self.step)

    def _set_hyperparameter(self, name: str, value: Hyperparameter) -> None:
        if callable(value):
            first = checked_scalar("SGD", name, value(self.step))
            self._schedulers[name] = value
            self.state[name] = first
        else:
            if self._schedulers.pop(name, None) is not None:
                self.state.pop(name, None)
            self._constants[name] = value

    def _check_loaded_state(self, parameters: Any) -> None:
        if self._initialized:
            _packing.check_scalars(self.state, "SGD")
        else:
            _packing.check_state(self.state, parameters, "SGD")

    def _replace_state(self, state: dict[str, Any]) -> None:
        # The dict itself stays: mx.compile captures it.
        if state is not self._state:
            self._state.clear()
            self._state.update(state)
