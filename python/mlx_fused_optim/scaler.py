"""Loss scaling for float16: a scale that grows while gradients are finite."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, cast

import mlx.core as mx
from mlx.utils import tree_map, tree_merge

from ._checks import checked_number, checked_positive
from ._layout import described
from ._options import SMALLEST_SCALE
from .distributed import Sharded
from .optimizers import FusedOptimizer
from .schedules._checks import as_integer

if TYPE_CHECKING:
    from mlx.optimizers import MultiOptimizer

# No step since the last update.
_NO_STEP = -1
# The default of min_scale: the smallest number of float16.
_MIN_SCALE = 2.0**-24


def _as_float32(number: float) -> float:
    """As :meth:`GradScaler.update` computes with it."""
    return cast(float, mx.array(number).item())


class GradScaler:
    """Scales a loss so that its float16 gradients do not vanish, and finds the scale.

    As ``torch.amp.GradScaler``, but for a floor and the first scale: a step whose gradients
    are infinite or NaN is skipped and multiplies the scale with ``backoff_factor``, down to
    ``min_scale``; ``growth_interval`` steps in a row without one multiply it with
    ``growth_factor``, as long as it stays finite. The gradients are unscaled in the step's
    kernel, before they are clipped. Nothing waits for the device: whether a step was skipped
    is an array too.

    ``state`` is a dict of arrays, for ``mx.compile`` and ``mx.save_safetensors``.

    Args:
        init_scale (float): The first scale. The backward pass of a float16 loss begins with
            it as a float16 number, so the default is the largest power of two that is one;
            torch's 65536 would lose the first step of such a loss. Default: ``32768.0``.
        growth_factor (float): Above 1, in float32. Default: ``2.0``.
        backoff_factor (float): Above 0, below 1, in float32. Default: ``0.5``.
        growth_interval (int): In steps, 1 or more. Default: ``2000``.
        min_scale (float, optional): No step makes the scale smaller, however many in a row
            are bad; :math:`2^{-126}` to ``init_scale``. Without a floor 145 of them leave a
            scale that cannot be inverted. Default: :math:`2^{-24}`, at which float16
            gradients stand for numbers up to :math:`2^{40}`, or ``init_scale`` if that is
            smaller.

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
        init_scale: float = 32768.0,
        growth_factor: float = 2.0,
        backoff_factor: float = 0.5,
        growth_interval: int = 2000,
        min_scale: float | None = None,
    ):
        op = "GradScaler"
        scale = checked_positive(op, "init_scale", init_scale, at_least=SMALLEST_SCALE)
        self._growth_factor = _as_float32(checked_number(op, "growth_factor", growth_factor))
        if not 1 < self._growth_factor < math.inf:
            raise ValueError(
                f"[{op}] growth_factor is out of range: got {growth_factor}, allowed >1, finite, "
                "in float32."
            )
        self._backoff_factor = _as_float32(checked_number(op, "backoff_factor", backoff_factor))
        if not 0 < self._backoff_factor < 1:
            raise ValueError(
                f"[{op}] backoff_factor is out of range: got {backoff_factor}, allowed >0 to <1, "
                "in float32."
            )
        self._growth_interval = as_integer(
            op, "growth_interval", growth_interval, at_least=1, at_most=2**31 - 1
        )
        if min_scale is None:
            min_scale = min(scale, _MIN_SCALE)
        self._min_scale = checked_positive(op, "min_scale", min_scale, at_least=SMALLEST_SCALE)
        if self._min_scale > scale:
            raise ValueError(
                f"[{op}] min_scale is above init_scale: got {self._min_scale}, allowed at most "
                f"{scale}."
            )
        self._state = {
            "scale": mx.array(scale),
            "growth_tracker": mx.array(0, mx.int32),
            "found_inf": mx.array(_NO_STEP, mx.int32),
        }

    @property
    def state(self) -> dict[str, mx.array]:
        """``scale`` (float32), ``growth_tracker`` (int32, steps since the scale changed) and
        ``found_inf`` (int32, whether a step since the last update was skipped, -1 without
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
        """The loss times the scale: an array, or a tree of arrays, of float16 and bfloat16
        ones in float32.

        What a float16 loss gets in the backward pass is the scale, as float16: infinity from
        65520 on. So where the loss itself is float16, a scale that has grown to 65536 costs
        one skipped step, which halves it again. A loss that is taken in float32
        (``loss.astype(mx.float32)`` before its mean) has no such limit.

        Raises:
            TypeError: What is no array, nor a number.
        """

        def scaled(value: Any) -> mx.array:
            if not isinstance(value, (mx.array, float, int)):
                raise TypeError(
                    f"[GradScaler.scale] the loss must be of arrays: got {type(value).__name__}, "
                    "allowed an array or a tree of arrays."
                )
            return value * self._state["scale"]

        return tree_map(scaled, loss)

    def step(
        self, optimizer: FusedOptimizer | Sharded | MultiOptimizer, model: Any, gradients: Any
    ) -> None:
        """One step of the optimizer with gradients of the scaled loss; one that is not finite
        changes nothing. Several optimizers may have theirs before one :meth:`update`. The
        optimizer's own ``grad_scale`` does not count in it.

        The optimizers in a ``MultiOptimizer`` are several too, as torch's are: each skips by
        the gradients that it gets, and one that skips makes the scale smaller.

        Raises:
            TypeError, ValueError: The optimizer is not a :class:`FusedOptimizer` with
                ``skip_nonfinite``, nor a :class:`Sharded` one or a ``MultiOptimizer`` of such.
        """
        parts = _parts_of(optimizer)
        before = [part.skipped for part in parts]
        scale = self._state["scale"]
        if isinstance(optimizer, (FusedOptimizer, Sharded)):
            optimizer.update(model, gradients, grad_scale=scale)
        else:
            tree: Any = {}
            split = optimizer._split_dictionary(gradients)  # as its own apply_gradients does
            for part, own in zip(parts, split, strict=True):
                tree = tree_merge(  # type: ignore[no-untyped-call]
                    tree, part.apply_gradients(own, model, grad_scale=scale)
                )
            model.update(tree)
        for part, count in zip(parts, before, strict=True):
            found = (part.skipped != count).astype(mx.int32)
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
        smaller = scale * self._backoff_factor
        # Also where a state that was assigned has 0, infinity or NaN: no step goes on there.
        above = mx.isfinite(smaller) & (smaller >= self._min_scale)
        smaller = mx.where(above, smaller, self._min_scale)
        scale = mx.where(grows & finite, larger, scale)
        scale = mx.where(found == 1, smaller, scale)
        self._state.update(
            scale=scale,
            growth_tracker=mx.where(grows, 0, steps).astype(mx.int32),
            found_inf=mx.array(_NO_STEP, mx.int32),
        )


def _parts_of(optimizer: Any) -> list[FusedOptimizer]:
    """The optimizers that step: of a MultiOptimizer all of its own."""
    from mlx.optimizers import MultiOptimizer  # here: an import that nobody else needs

    is_multi = isinstance(optimizer, MultiOptimizer)
    alone = optimizer.optimizer if isinstance(optimizer, Sharded) else optimizer
    parts = optimizer.optimizers if is_multi else [alone]
    where = " in the MultiOptimizer" if is_multi else ""
    for part in parts:
        if not isinstance(part, FusedOptimizer):
            raise TypeError(
                f"[GradScaler] the optimizer{where} cannot unscale: got {type(part).__name__}, "
                "allowed a fused one of mlx_fused_optim, or a MultiOptimizer of such."
            )
        if not part.skip_nonfinite:
            raise ValueError(
                f"[GradScaler] the optimizer{where} does not skip: got "
                "skip_nonfinite=False, allowed one with skip_nonfinite=True."
            )
    return list(parts)
