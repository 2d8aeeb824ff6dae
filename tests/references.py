"""What a step must give, in NumPy and independent of the library.

``step_float32`` is the arithmetic that is promised: float32, each operation rounded, no
fused multiply-add, one more rounding at the store. ``step_float64`` is the mathematics,
with a bound on how far any such arithmetic may be from it.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from bits import EPSILON, TINIEST, flushed, narrowed, widened


@dataclass(frozen=True)
class Broken:
    """Mistakes that a test must catch: each is a step that leaves something out."""

    no_decay: bool = False
    no_momentum: bool = False
    no_dampening: bool = False
    no_nesterov: bool = False
    last_element_skipped: bool = False
    velocity_narrowed_early: bool = False
    rate_narrowed: bool = False
    contracted: bool = False


NOTHING = Broken()


def _fused(a: np.float32, b: np.ndarray, c: np.ndarray) -> np.ndarray:
    """a * b + c rounded once; exact enough, as float64 holds the product exactly."""
    return (np.float64(a) * b.astype(np.float64) + c.astype(np.float64)).astype(np.float32)


def step_float32(
    parameter: np.ndarray,
    gradient: np.ndarray,
    velocity: np.ndarray,
    dtype: str,
    gradient_dtype: str,
    rate: np.float32,
    hyper,
    broken: Broken = NOTHING,
    flushes: bool = False,
) -> tuple[np.ndarray, np.ndarray]:
    """Bits in, bits out; ``dtype`` is that of the parameter and the velocity. ``flushes``:
    on a device whose float32 has no subnormal numbers."""
    seen = flushed if flushes else np.asarray
    w, g, v = (
        seen(widened(parameter, dtype)),
        seen(widened(gradient, gradient_dtype)),
        seen(widened(velocity, dtype)),
    )
    mu, decay = np.float32(hyper.momentum), np.float32(hyper.weight_decay)
    # 1 - dampening is formed in float64, as Python does for mlx.optimizers.
    weight = np.float32(1.0 if broken.no_dampening else 1.0 - hyper.dampening)
    if broken.rate_narrowed:
        rate = widened(narrowed(rate, "bfloat16"), "bfloat16")
    if hyper.weight_decay and not broken.no_decay:
        g = _fused(decay, w, g) if broken.contracted else seen(g + seen(decay * w))
    update = g
    if hyper.momentum:
        v = seen(seen((np.float32(0) if broken.no_momentum else mu) * v) + seen(weight * g))
        if broken.velocity_narrowed_early:
            v = widened(narrowed(v, "bfloat16"), "bfloat16")
        update = seen(g + seen(mu * v)) if hyper.nesterov and not broken.no_nesterov else v
    with np.errstate(over="ignore", invalid="ignore"):
        w = seen(w - seen(rate * update))
    new = narrowed(w, dtype).reshape(parameter.shape)
    new_velocity = narrowed(v, dtype).reshape(parameter.shape)
    if broken.last_element_skipped and parameter.size:
        new = new.copy()
        new.reshape(-1)[-1] = parameter.reshape(-1)[-1]
    return new, new_velocity


def step_float64(
    parameter: np.ndarray,
    gradient: np.ndarray,
    velocity: np.ndarray,
    dtype: str,
    gradient_dtype: str,
    rate: np.float32,
    hyper,
) -> tuple[tuple[np.ndarray, np.ndarray], tuple[np.ndarray, np.ndarray]]:
    """((parameter, bound), (velocity, bound)) in float64.

    Each float32 operation errs by at most half an ulp of its result, u = 2^-24 of it, and
    hands on the errors of its operands; the store errs by half an ulp of its dtype. The
    factor 1 + 2^-10 covers the terms of second order. The hyperparameters are float32
    numbers to begin with, as they are in mlx.optimizers.
    """
    u = 2.0**-24
    w, g, v = (
        widened(bits, name).astype(np.float64)
        for bits, name in ((parameter, dtype), (gradient, gradient_dtype), (velocity, dtype))
    )
    mu, decay = np.float64(np.float32(hyper.momentum)), np.float64(np.float32(hyper.weight_decay))
    weight, rate = np.float64(np.float32(1.0 - hyper.dampening)), np.float64(rate)

    def rounding(*results: np.ndarray) -> np.ndarray:
        return sum(u * np.abs(result) for result in results)

    g_error = np.zeros_like(g)
    if hyper.weight_decay:
        g_error = rounding(decay * w, g + decay * w)
        g = g + decay * w
    update, error, v_error = g, g_error, np.zeros_like(g)
    if hyper.momentum:
        v_error = weight * g_error + rounding(mu * v, weight * g, mu * v + weight * g)
        v = mu * v + weight * g
        update, error = v, v_error
        if hyper.nesterov:
            error = g_error + mu * v_error + rounding(mu * v, g + mu * v)
            update = g + mu * v
    w_error = rate * error + rounding(rate * update, w - rate * update)
    w = w - rate * update

    def bound(value: np.ndarray, error: np.ndarray) -> np.ndarray:
        store = 0.0 if dtype == "float32" else EPSILON[dtype] / 2 * np.abs(value) + TINIEST[dtype]
        return (1 + 2.0**-10) * (error + store) + 2.0**-149

    return (w, bound(w, w_error)), (v, bound(v, v_error))
