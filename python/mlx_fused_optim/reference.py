"""The fused step in plain MLX operations: the maths to read, and an oracle for tests.

A step is a frame and a rule. :func:`step` is the frame, which all optimizers share; a rule is
a function of the gradient and of what is kept, such as :func:`adam`, and gives back what the
parameter loses. It is slow, allocates freely and keeps one array a tensor; apart from that it
gives the fused step's results, bit for bit on one device (norms, and the two numbers of a bias
correction, but for their last bits).
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import mlx.core as mx
from mlx.utils import tree_flatten, tree_map

from ._masters import MASTER24, master_of, parts_of

Kept = dict[str, mx.array]
"""What is kept of one tensor, by the name of the slot; float32 within a rule."""

# ---- The rules ---------------------------------------------------------------------


def _moved(average: mx.array, x: mx.array, factor: float) -> mx.array:
    return factor * average + (1 - factor) * x


def sgd(
    g: mx.array,
    kept: Kept,
    rate: mx.array,
    t: mx.array,
    *,
    momentum: float = 0.0,
    dampening: float = 0.0,
    nesterov: bool = False,
) -> tuple[mx.array, Kept]:
    r"""Stochastic gradient descent: (what the parameter loses, the new slots).

    .. math::

        v \leftarrow \mu v + (1 - \tau) g, \quad
        \Delta = \eta \, (g + \mu v \text{ if nesterov else } v)

    or :math:`\eta g` without momentum.

    Args:
        g (array): The gradient as the frame gives it, float32.
        kept (dict): The slots before the step, float32; zeros where they begin.
        rate (array): The learning rate :math:`\eta`, float32.
        t (array): The number of the update, from 1.
        momentum, dampening, nesterov: As of :class:`SGD`.

    Example:
        >>> sgd(mx.array(2.0), {}, mx.array(0.25), mx.array(1))
        (array(0.5, dtype=float32), {})
    """
    if momentum == 0:
        return rate * g, {}
    v = momentum * kept["momentum"] + (1 - dampening) * g
    return rate * (g + momentum * v if nesterov else v), {"momentum": v}


def adam(
    g: mx.array,
    kept: Kept,
    rate: mx.array,
    t: mx.array,
    *,
    betas: Sequence[float] = (0.9, 0.999),
    eps: float = 1e-8,
    bias_correction: bool = False,
    amsgrad: bool = False,
) -> tuple[mx.array, Kept]:
    r"""Adam; AdamW is this with ``decoupled`` weight decay of the frame.

    .. math::

        m \leftarrow \beta_1 m + (1 - \beta_1) g, \quad
        v \leftarrow \beta_2 v + (1 - \beta_2) g^2, \quad
        \Delta = \frac{\eta m}{\sqrt{v} + \epsilon}

    With ``bias_correction`` :math:`\eta / (1 - \beta_1^t)` takes the place of :math:`\eta`
    and :math:`\sqrt{v / (1 - \beta_2^t)}` that of the root; with ``amsgrad`` the largest
    :math:`v` so far that of :math:`v` in the root. Arguments as of :func:`sgd` and
    :class:`Adam`.

    Example:
        >>> zeros = {"m": mx.array(0.0), "v": mx.array(0.0)}
        >>> change, _ = adam(mx.array(2.0), zeros, mx.array(0.5), mx.array(1), bias_correction=True)
        >>> change
        array(0.5, dtype=float32)
    """
    m = _moved(kept["m"], g, betas[0])
    v = _moved(kept["v"], g * g, betas[1])
    new, second, root = {"m": m, "v": v}, v, mx.array(1.0)
    if amsgrad:
        second = new["largest_v"] = mx.maximum(kept["largest_v"], v)
    if bias_correction:
        number: Any = t.item()
        first_bias, second_bias = (_bias(beta, number) for beta in betas)
        rate, root = mx.array(rate.item() / first_bias), mx.array(1 / math.sqrt(second_bias))
    return rate * m / (mx.sqrt(second) * root + eps), new


def _bias(beta: float, t: int) -> float:
    """1 - beta^t in float64."""
    return -math.expm1(t * math.log(beta)) if beta > 0 else 1.0


def adamax(
    g: mx.array,
    kept: Kept,
    rate: mx.array,
    t: mx.array,
    *,
    betas: Sequence[float] = (0.9, 0.999),
    eps: float = 1e-8,
) -> tuple[mx.array, Kept]:
    r"""Adam by the infinity norm; arguments as of :func:`sgd` and :class:`Adamax`.

    .. math::

        m \leftarrow \beta_1 m + (1 - \beta_1) g, \quad
        v \leftarrow \max(\beta_2 v, |g|), \quad \Delta = \frac{\eta m}{v + \epsilon}

    Example:
        >>> zeros = {"m": mx.array(0.0), "v": mx.array(0.0)}
        >>> adamax(mx.array(2.0), zeros, mx.array(1.0), mx.array(1), betas=(0.5, 0.5))[0]
        array(0.5, dtype=float32)
    """
    m = _moved(kept["m"], g, betas[0])
    v = mx.maximum(betas[1] * kept["v"], mx.abs(g))
    return rate * m / (v + eps), {"m": m, "v": v}


def lion(
    g: mx.array,
    kept: Kept,
    rate: mx.array,
    t: mx.array,
    *,
    betas: Sequence[float] = (0.9, 0.99),
) -> tuple[mx.array, Kept]:
    r"""Lion, whose weight decay is ``decoupled``; arguments as of :func:`sgd` and :class:`Lion`.

    .. math::

        \Delta = \eta \, \mathrm{sign}(\beta_1 m + (1 - \beta_1) g), \quad
        m \leftarrow \beta_2 m + (1 - \beta_2) g

    Example:
        >>> lion(mx.array(-2.0), {"m": mx.array(0.0)}, mx.array(0.25), mx.array(1))[0]
        array(-0.25, dtype=float32)
    """
    direction = _moved(kept["m"], g, betas[0])
    return rate * mx.sign(direction), {"m": _moved(kept["m"], g, betas[1])}


def rmsprop(
    g: mx.array,
    kept: Kept,
    rate: mx.array,
    t: mx.array,
    *,
    alpha: float = 0.99,
    eps: float = 1e-8,
) -> tuple[mx.array, Kept]:
    r"""RMSprop; arguments as of :func:`sgd` and :class:`RMSprop`.

    .. math::

        v \leftarrow \alpha v + (1 - \alpha) g^2, \quad
        \Delta = \frac{\eta g}{\sqrt{v} + \epsilon}

    Example:
        >>> rmsprop(mx.array(2.0), {"v": mx.array(4.0)}, mx.array(0.5), mx.array(1), alpha=0.5)[0]
        array(0.5, dtype=float32)
    """
    v = _moved(kept["v"], g * g, alpha)
    return rate * g / (mx.sqrt(v) + eps), {"v": v}


def adagrad(
    g: mx.array, kept: Kept, rate: mx.array, t: mx.array, *, eps: float = 1e-8
) -> tuple[mx.array, Kept]:
    r"""Adagrad; arguments as of :func:`sgd` and :class:`Adagrad`.

    .. math::

        v \leftarrow v + g^2, \quad \Delta = \frac{\eta g}{\sqrt{v} + \epsilon}

    Example:
        >>> adagrad(mx.array(2.0), {"v": mx.array(0.0)}, mx.array(0.5), mx.array(1))[0]
        array(0.5, dtype=float32)
    """
    v = kept["v"] + g * g
    return rate * g / (mx.sqrt(v) + eps), {"v": v}


def adadelta(
    g: mx.array, kept: Kept, rate: mx.array, t: mx.array, *, rho: float = 0.9, eps: float = 1e-6
) -> tuple[mx.array, Kept]:
    r"""AdaDelta; arguments as of :func:`sgd` and :class:`AdaDelta`.

    .. math::

        v \leftarrow \rho v + (1 - \rho) g^2, \quad
        d = \frac{\sqrt{u + \epsilon}}{\sqrt{v + \epsilon}} g, \quad
        u \leftarrow \rho u + (1 - \rho) d^2, \quad \Delta = \eta d

    Example:
        >>> kept = {"v": mx.array(4.0), "u": mx.array(4.0)}
        >>> adadelta(mx.array(2.0), kept, mx.array(0.5), mx.array(1))[0]
        array(1, dtype=float32)
    """
    v = _moved(kept["v"], g * g, rho)
    d = mx.sqrt(kept["u"] + eps) / mx.sqrt(v + eps) * g
    return rate * d, {"v": v, "u": _moved(kept["u"], d * d, rho)}


def muon(
    g: mx.array,
    kept: Kept,
    rate: mx.array,
    t: mx.array,
    *,
    momentum: float = 0.95,
    nesterov: bool = True,
    ns_coefficients: Sequence[tuple[float, float, float]] = ((3.4445, -4.7750, 2.0315),) * 5,
) -> tuple[mx.array, Kept]:
    r"""Muon, a matrix at a time: (what the parameter loses, the new slots).

    .. math::

        v \leftarrow \mu v + (1 - \mu) g, \quad
        u = \mu v + (1 - \mu) g \text{ if nesterov else } v, \quad
        \Delta = \eta \sqrt{\max(1, \text{rows} / \text{columns})} \, \mathrm{NS}(u)

    or :math:`\eta u` for what is no matrix. :math:`\mathrm{NS}` replaces the singular values of
    :math:`u` over its norm by polynomials of them, :math:`x \mapsto a x + b x^3 + c x^5`, with
    each triple of ``ns_coefficients`` once.

    Example:
        >>> change, kept = muon(mx.eye(2), {"v": mx.zeros((2, 2))}, mx.array(1.0), mx.array(1))
        >>> mx.round(change, 2)
        array([[1.11, 0],
               [0, 1.11]], dtype=float32)
    """
    v = _moved(kept["v"], g, momentum)
    u = _moved(v, g, momentum) if nesterov else v
    if u.ndim < 2 or u.size == 0:
        return rate * u, {"v": v}
    x = u.reshape(u.shape[0], -1)
    x = x / mx.maximum(_norm(x.reshape(-1)), 2.0**-126)
    for a, b, c in ns_coefficients:
        gram = x @ x.T
        x = a * x + (b * gram + c * gram @ gram) @ x
    scale = max(1, u.shape[-2] / u.shape[-1]) ** 0.5
    return rate * (scale * x.reshape(u.shape)), {"v": v}


Rule = Callable[..., tuple[mx.array, Kept]]

# ---- The frame ---------------------------------------------------------------------


def init(parameters: Any) -> dict[str, Any]:
    """What a step keeps, before the first one: nothing yet.

    Example:
        >>> init({"w": mx.ones(2)})["step"]
        array(0, dtype=uint64)
    """
    return {
        "step": mx.array(0, mx.uint64),
        "skipped": mx.array(0, mx.uint64),
        "grad_norm": mx.array(0.0),
        "tensors": [{} for _ in _leaves(parameters)],
    }


def step(
    rule: Rule,
    parameters: Any,
    gradients: Any,
    state: dict[str, Any],
    *,
    learning_rate: float | mx.array,
    weight_decay: float = 0.0,
    state_dtype: mx.Dtype | None = None,
    master_weights: bool | str = False,
    compensated: bool = False,
    clip_norm: float | None = None,
    clip_value: float | None = None,
    grad_scale: float | mx.array = 1.0,
    skip_nonfinite: bool = False,
    decoupled: bool = False,
    maximize: bool = False,
    groups: Sequence[tuple[Callable[[str, mx.array], Any], dict[str, Any]]] = (),
    trust_coefficient: float | None = None,
    ema_decay: float | None = None,
    **numbers: Any,
) -> tuple[Any, dict[str, Any]]:
    """One step by a rule, rounded to nearest: (parameters, state).

    All arithmetic is float32, in the order of ``mlx.optimizers``; each result is rounded once.
    What enters the update is what is kept before that rounding.

    Args:
        rule (callable): One of those above.
        parameters, gradients (tree): Of the same structure.
        state (dict): Of :func:`init` or of the last step. What is kept of each tensor is a dict
            in ``state["tensors"]``, in the order of ``tree_flatten``: the rule's slots,
            ``"master"``, ``"compensation"`` and ``"ema"``.
        **numbers: The rule's own; the others are the options of :class:`FusedOptimizer`.

    Example:
        >>> w = {"w": mx.array([3.0, 4.0])}
        >>> w, state = step(sgd, w, w, init(w), learning_rate=1.0, clip_norm=2.5)
        >>> w["w"], state["grad_norm"]
        (array([1.5, 2], dtype=float32), array(5, dtype=float32))
    """
    old = _leaves(parameters)

    # The gradient that is measured: unscaled, then clipped by value.
    scale = mx.array(grad_scale, mx.float32)
    inverts = (scale >= 2.0**-126) & mx.isfinite(scale)
    unscale = mx.where(inverts, 1 / scale, math.nan)
    raw = [x.astype(mx.float32) for _, x in _leaves(gradients)]
    g = [(-x if maximize else x) * unscale for x in raw]
    finite = [mx.all(mx.isfinite(x)) for x in g]
    if clip_value is not None:
        g = [mx.clip(x, -clip_value, clip_value) for x in g]
    norms = [_norm(x.reshape(-1)) for x in g]
    norm = _norm(mx.stack(norms)) if norms else mx.array(0.0)
    applies = mx.array(True)
    if skip_nonfinite:
        applies = mx.all(mx.stack([*finite, mx.isfinite(norm) | (clip_norm in (None, math.inf))]))
    factor = mx.array(1.0)
    if clip_norm not in (None, math.inf):
        factor = clip_norm / (norm + 1e-6)
        factor = mx.where(factor > 1, 1.0, factor)

    new, tensors = [], []
    for (path, parameter), x, own_norm, kept in zip(old, g, norms, state["tensors"], strict=True):
        own = dict(numbers)
        own |= {"learning_rate": learning_rate, "weight_decay": weight_decay}
        own |= {"trust_coefficient": trust_coefficient, "learning_rate_factor": 1.0}
        for predicate, overrides in groups:
            if predicate(path, parameter):
                own.update(overrides)
                break
        rate = own.pop("learning_rate_factor") * mx.array(own.pop("learning_rate"), mx.float32)
        decay, trust = own.pop("weight_decay"), own.pop("trust_coefficient")
        is_half = parameter.dtype != mx.float32

        w = parameter.astype(mx.float32)
        has_master24 = master_weights == MASTER24 and is_half
        if has_master24:
            byte = kept.get("master", mx.zeros_like(parameter, mx.int8))
            w = master_of(byte, parameter)
        elif master_weights and is_half:
            # A parameter that is not its master's rounding was set by somebody else.
            master = kept.get("master", w)
            w = mx.where(master.astype(parameter.dtype) == parameter, master, w)
        begun = {"master": mx.zeros_like(w, mx.int8) if has_master24 else w, "ema": w}
        x = x * factor
        if decay != 0 and not decoupled:
            x = x + decay * w
        if trust is not None:
            norm_w = _norm(parameter.astype(mx.float32).reshape(-1))
            norm_g = own_norm * factor
            ratio = trust * norm_w / (norm_g + (0.0 if decoupled else decay) * norm_w)
            x = mx.where((norm_g > 0) & (norm_w > 0) & mx.isfinite(ratio), ratio, 1.0) * x

        zeros = mx.zeros_like(w)
        slots = {slot: value.astype(mx.float32) for slot, value in kept.items()}
        change, slots = rule(
            x, defaultdict(partial(mx.zeros_like, w), slots), rate, state["step"] + 1, **own
        )
        own_dtype = state_dtype or (parameter.dtype if rule is sgd else mx.float32)
        after = {**kept, **{slot: value.astype(own_dtype) for slot, value in slots.items()}}

        if decay != 0 and decoupled:
            w = w * (1 - rate * decay)
        exact = w - change
        rounded = None
        if compensated and is_half:
            # Kahan: the part that the last rounding lost joins this update.
            lost = kept.get("compensation", zeros).astype(mx.float32)
            change = lost - change
            exact = w + change
            rounded = exact.astype(parameter.dtype)
            after["compensation"] = (change - (rounded.astype(mx.float32) - w)).astype(
                parameter.dtype
            )
        elif has_master24:
            rounded, after["master"] = parts_of(exact)
            exact = master_of(after["master"], rounded)
        elif master_weights and is_half:
            after["master"] = exact
        else:
            exact = exact.astype(parameter.dtype).astype(mx.float32)
        if ema_decay is not None:
            average = kept.get("ema", begun["ema"])
            after["ema"] = average + (1 - ema_decay) * (exact - average)
        # A skipped step leaves everything as it was; what had not begun begins.
        rounded = exact.astype(parameter.dtype) if rounded is None else rounded
        new.append(mx.where(applies, rounded, parameter))
        tensors.append(
            {
                slot: mx.where(applies, x, kept.get(slot, begun.get(slot, mx.zeros_like(x))))
                for slot, x in after.items()
            }
        )
    counted = applies.astype(mx.uint64)
    next_state = {
        "step": state["step"] + counted,
        "skipped": state["skipped"] + 1 - counted,
        "grad_norm": norm,
        "tensors": tensors,
    }
    updated = iter(new)
    return tree_map(lambda _: next(updated), parameters), next_state


def _norm(x: mx.array) -> mx.array:
    """Of a vector, divided by its largest magnitude: no square overflows or vanishes."""
    peak = mx.max(mx.abs(x)) if x.size else mx.array(0.0)
    divisor = mx.where((peak > 0) & mx.isfinite(peak), peak, 1.0)
    return divisor * mx.sqrt(mx.sum(mx.square(x / divisor)))


def _leaves(tree: Any) -> list[tuple[str, mx.array]]:
    leaves: Any = tree_flatten(tree)
    return list(leaves)
