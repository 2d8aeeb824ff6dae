"""Loss scaling for float16: a scale that grows while gradients are finite."""

from __future__ import annotations

import math
from typing import Any

import mlx.core as mx
from mlx.utils import tree_map

from ._checks import checked_number, checked_positive
from ._layout import described
from ._options import SMALLEST_SCALE
from .optimizers import FusedOptimizer
from .schedules._checks import as_integer

# No step since the last update.
_NO_STEP = -1


class GradScaler:
    """Scales a loss so that its float16 gradients do not vanish, and finds the scale.

    As ``torch.amp.GradScaler``: a step whose gradients are infinite or NaN is skipped and
    multiplies the scale with ``backoff_factor``; ``growth_interval`` steps in a row without
    one multiply it with ``growth_factor``, as long as it stays finite. The gradients are
    unscaled in the step's kernel, before they are clipped. Nothing waits for the device:
    whether a step was skipped is an array too.

    ``state`` is a dict of arrays, for ``mx.compile`` and ``mx.save_safetensors``.

    Args:
        init_scale (float): The first scale. Default: ``65536.0``.
        growth_factor (float): Above 1. Default: ``2.0``.
        backoff_factor (float): Above 0, below 1. Default: ``0.5``.
        growth_interval (int): In steps, 1 or more. Default: ``2000``.

    Raises:
        ValueError, TypeError: An argument makes no sense.

    Reference: https://docs.pytorch.org/docs/stable/amp.html#gradient-scaling

    Example:
        >>> from mlx_fused_optim import SGD
        >>> import mlx.nn as nn
        >>> model, scaler = nn.Linear(2, 1), GradScaler(init_scale=8.0)
        >>> optimizer = SGD(learning_rate=0.1, momentum=0.9, skip_nonfinite=True)
        >>> def loss_fn(model, x):
        ...     return scaler.scale(mx.mean(model(x)))
        >>> loss, gradients = nn.value_and_grad(model, loss_fn)(model, mx.ones((4, 2)))
        >>> gradients["bias"]
        array([8], dtype=float32)
        >>> scaler.step(optimizer, model, gradients)
        >>> scaler.update()
        >>> optimizer.grad_norm, scaler.state["scale"], scaler.state["growth_tracker"]
        (array(1.73205, dtype=float32), array(8, dtype=float32), array(1, dtype=int32))
    """

    def __init__(
        self,
        init_scale: float = 65536.0,
        growth_factor: float = 2.0,
        backoff_factor: float = 0.5,
        growth_interval: int = 2000,
    ):
        op = "GradScaler"
        scale = checked_positive(op, "init_scale", init_scale, at_least=SMALLEST_SCALE)
        self._growth_factor = checked_number(op, "growth_factor", growth_factor)
        if not 1 < self._growth_factor < math.inf:
            raise ValueError(
                f"[{op}] growth_factor is out of range: got {self._growth_factor}, allowed above "
                "1, finite."
            )
        self._backoff_factor = checked_number(op, "backoff_factor", backoff_factor)
        if not 0 < self._backoff_factor < 1:
            raise ValueError(
                f"[{op}] backoff_factor is out of range: got {self._backoff_factor}, allowed above "
                "0, below 1."
            )
        self._growth_interval = as_integer(
            op, "growth_interval", growth_interval, at_least=1, at_most=2**31 - 1
        )
        self._state = {
            "scale": mx.array(scale),
            "growth_tracker": mx.array(0, mx.int32),
            "found_inf": mx.array(_NO_STEP, mx.int32),
        }

    @property
    def state(self) -> dict[str, mx.array]:
        """``scale`` (float32), ``growth_tracker`` (int32: steps since the scale changed) and
        ``found_inf`` (int32: whether a step since the last update was skipped, -1 without
        one). One that is assigned is copied (not its arrays)."""
        return self._state

    @state.setter
    def state(self, state: dict[str, mx.array]) -> None:
        for name, own in self._state.items():
            value = state.get(name) if isinstance(state, dict) else None
            if not isinstance(value, mx.array) or value.dtype != own.dtype or value.ndim != 0:
                raise ValueError(
                    f"[GradScaler] state['{name}'] is missing or of the wrong type: got "
                    f"{described(value)}, allowed a scalar array of {own.dtype}."
                )
        self._state = {name: state[name] for name in self._state}

    def scale(self, loss: Any) -> Any:
        """The loss times the scale: an array, or a tree of arrays. A float16 loss becomes
        float32, where the product has room."""
        return tree_map(lambda value: value * self._state["scale"], loss)

    def step(self, optimizer: FusedOptimizer, model: Any, gradients: Any) -> None:
        """One step of the optimizer with gradients of the scaled loss; one that is not finite
        changes nothing. Several optimizers may have theirs before one :meth:`update`. The
        optimizer's own ``grad_scale`` does not count in it.

        Raises:
            TypeError, ValueError: The optimizer is not an :class:`SGD` with
                ``skip_nonfinite``.
        """
        if not isinstance(optimizer, FusedOptimizer):
            raise TypeError(
                f"[GradScaler] the optimizer cannot unscale: got {type(optimizer).__name__}, "
                "allowed an optimizer of mlx_fused_optim that is fused."
            )
        if not optimizer.skip_nonfinite:
            raise ValueError(
                "[GradScaler] the optimizer does not skip: got skip_nonfinite=False, "
                "allowed skip_nonfinite=True."
            )
        before = optimizer.skipped
        optimizer.update(model, gradients, grad_scale=self._state["scale"])
        found = (optimizer.skipped != before).astype(mx.int32)
        self._state["found_inf"] = mx.maximum(self._state["found_inf"], found)

    def update(self) -> None:
        """The scale of the next step. Without a step since the last update, the same."""
        scale, tracker, found = (
            self._state[name] for name in ("scale", "growth_tracker", "found_inf")
        )
        steps = mx.where(found == 0, tracker + 1, mx.where(found == _NO_STEP, tracker, 0))
        larger = scale * self._growth_factor
        grows = (found == 0) & (steps == self._growth_interval)
        finite = mx.isfinite(larger)
        scale = mx.where(grows & finite, larger, scale)
        scale = mx.where(found == 1, scale * self._backoff_factor, scale)
        self._state.update(
            scale=scale,
            growth_tracker=mx.where(grows, 0, steps).astype(mx.int32),
            found_inf=mx.array(_NO_STEP, mx.int32),
        )
