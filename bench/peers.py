"""The candidates: everybody takes the same steps, with parameters of his own.

A peer is a class with two methods: ``step`` takes one step and returns when it is done;
``samples`` gives some elements of every parameter. Peers whose package is missing are
left out. All of them get the same values, dtype, betas or momentum, weight decay and schedule, and
all may reuse the memory of the old parameters and of the old state.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from importlib.util import find_spec
from typing import Any, Protocol

import mlx.core as mx
import mlx.optimizers
import mlx_fused_optim
import numpy as np
from mlx.utils import tree_flatten, tree_unflatten
from shapes import Work


@dataclass(frozen=True)
class Options:
    """Of SGD with momentum, or of AdamW with bias correction, which torch and optax always
    have; the moments have the parameters' dtype, as theirs do."""

    optimizer: str = "sgd"
    dtype: str = "float32"
    device: str = "cpu"
    momentum: float = 0.9
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 1e-4
    init: float = 0.1
    decay_rate: float = 0.999
    scheduled: bool = True

    def rate(self, step: int) -> float:
        return self.init * self.decay_rate**step if self.scheduled else self.init


USUAL: dict[str, Options] = {
    "sgd": Options(),
    "adamw": Options(optimizer="adamw", weight_decay=1e-2, init=1e-3),
}


class Peer(Protocol):
    def step(self) -> None: ...

    def samples(self) -> list[np.ndarray]: ...


# ---- Values ---------------------------------------------------------------------

PERIOD = 65521  # prime: no tensor's size is a multiple, so tensors differ
SAMPLE = 512  # elements of a tensor that are verified at each of its ends


def values(work: Work, seed: int) -> list[np.ndarray]:
    """Float32 numbers for every parameter; normally distributed."""
    block = np.random.default_rng(seed).standard_normal(PERIOD, dtype=np.float32)
    return [
        np.resize(np.roll(block, -7919 * number), shape)
        for number, (_, shape) in enumerate(work.parameters)
    ]


def sample(array: Any) -> Any:
    """Both ends of an array, flat; of any library."""
    flat = array.reshape(-1)
    return [flat] if flat.shape[0] <= 2 * SAMPLE else [flat[:SAMPLE], flat[-SAMPLE:]]


# ---- MLX ------------------------------------------------------------------------


def mlx_optimizer(module: Any, options: Options) -> Any:
    """The optimizer of mlx.optimizers, or ours: the same call."""
    rate = options.init
    if options.scheduled:
        rate = module.exponential_decay(options.init, options.decay_rate)
    if options.optimizer == "sgd":
        return module.SGD(rate, momentum=options.momentum, weight_decay=options.weight_decay)
    own = {} if module is mlx.optimizers else {"state_dtype": getattr(mx, options.dtype)}
    return module.AdamW(
        rate, options.betas, options.eps, options.weight_decay, bias_correction=True, **own
    )


class MlxSteps:
    """Whole steps of an optimizer with the interface of mlx.optimizers, eager or compiled."""

    def __init__(self, optimizer: Any, parameters: Any, gradients: Any, compiled: bool):
        self.optimizer, self.parameters, self.gradients = optimizer, parameters, gradients
        optimizer.init(parameters)
        mx.eval(parameters, gradients, optimizer.state)
        self.update = optimizer.apply_gradients
        if compiled:
            state = optimizer.state
            self.update = mx.compile(self.update, inputs=state, outputs=state)

    def step(self) -> None:
        # No reference to the old parameters stays: their memory can be reused.
        self.parameters = self.update(self.gradients, self.parameters)
        mx.eval(self.parameters, self.optimizer.state)


class MlxPeer(MlxSteps):
    def __init__(self, work: Work, options: Options, module: Any, compiled: bool):
        dtype = getattr(mx, options.dtype)
        names = [name for name, _ in work.parameters]

        def tree(seed: int) -> Any:
            arrays = [mx.array(array).astype(dtype) for array in values(work, seed)]
            return tree_unflatten(list(zip(names, arrays, strict=True)))

        super().__init__(mlx_optimizer(module, options), tree(1), tree(2), compiled)

    def samples(self) -> list[np.ndarray]:
        return [
            np.concatenate([np.array(part.astype(mx.float32)) for part in sample(array)])
            for _, array in tree_flatten(self.parameters)
        ]


# ---- torch ----------------------------------------------------------------------


class TorchPeer:
    def __init__(self, work: Work, options: Options, **implementation: bool):
        import torch

        self.torch, self.options, self.taken = torch, options, 0
        device = "cuda" if options.device == "gpu" else "cpu"
        if device == "cpu":
            torch.set_num_threads(os.cpu_count() or 1)
        self.synchronize = torch.cuda.synchronize if device == "cuda" else lambda: None

        def tensors(seed: int) -> list[Any]:
            dtype = getattr(torch, options.dtype)
            return [torch.from_numpy(a).to(device, dtype) for a in values(work, seed)]

        self.parameters = tensors(1)
        for parameter, gradient in zip(self.parameters, tensors(2), strict=True):
            parameter.requires_grad_()
            parameter.grad = gradient
        if options.optimizer == "sgd":
            cls, own = torch.optim.SGD, {"momentum": options.momentum}
        else:
            cls, own = torch.optim.AdamW, {"betas": options.betas, "eps": options.eps}
        self.optimizer = cls(
            self.parameters,
            lr=options.init,
            weight_decay=options.weight_decay,
            **own,
            **implementation,
        )

    def step(self) -> None:
        # The schedule as a Python number: cheaper than torch.optim.lr_scheduler.
        self.optimizer.param_groups[0]["lr"] = self.options.rate(self.taken)
        self.optimizer.step()
        self.taken += 1
        self.synchronize()

    def samples(self) -> list[np.ndarray]:
        return [
            np.concatenate([part.detach().float().cpu().numpy() for part in sample(parameter)])
            for parameter in self.parameters
        ]


# ---- optax ----------------------------------------------------------------------


class OptaxPeer:
    """Under jit, parameters and state donated."""

    def __init__(self, work: Work, options: Options):
        os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
        os.environ.setdefault("JAX_PLATFORMS", "cuda" if options.device == "gpu" else "cpu")
        import jax
        import jax.numpy as jnp
        import optax

        self.jax = jax
        self.names = [name for name, _ in work.parameters]  # jax sorts its dicts

        def arrays(seed: int) -> dict[str, Any]:
            dtype = getattr(jnp, options.dtype)
            # A copy: jax may otherwise share numpy's memory, which cannot be donated.
            made = [jnp.array(a, dtype=dtype, copy=True) for a in values(work, seed)]
            return dict(zip(self.names, made, strict=True))

        rate = options.init
        if options.scheduled:
            rate = optax.exponential_decay(options.init, 1, options.decay_rate)
        decay = options.weight_decay
        if options.optimizer == "sgd":
            optimizer = optax.chain(
                optax.add_decayed_weights(decay), optax.sgd(rate, momentum=options.momentum)
            )
        else:
            beta1, beta2 = options.betas
            optimizer = optax.adamw(rate, beta1, beta2, options.eps, weight_decay=decay)

        def update(parameters: Any, state: Any, gradients: Any) -> tuple[Any, Any]:
            updates, state = optimizer.update(gradients, state, parameters)
            return optax.apply_updates(parameters, updates), state

        self.update = jax.jit(update, donate_argnums=(0, 1))
        self.parameters, self.gradients = arrays(1), arrays(2)
        self.state = optimizer.init(self.parameters)

    def step(self) -> None:
        self.parameters, self.state = self.update(self.parameters, self.state, self.gradients)
        self.jax.block_until_ready((self.parameters, self.state))

    def samples(self) -> list[np.ndarray]:
        return [
            np.concatenate(
                [np.asarray(part).astype(np.float32) for part in sample(self.parameters[name])]
            )
            for name in self.names
        ]


# ---- The list -------------------------------------------------------------------


def _mlx(module: Any, compiled: bool, scheduled: bool = True) -> Callable[..., Peer]:
    return lambda work, options: MlxPeer(
        work, replace(options, scheduled=scheduled), module, compiled
    )


# Name -> (the package it needs, how to make it).
PEERS: dict[str, tuple[str, Callable[[Work, Options], Peer]]] = {
    "ours": ("mlx", _mlx(mlx_fused_optim, compiled=False)),
    "ours compiled": ("mlx", _mlx(mlx_fused_optim, compiled=True)),
    "ours constant": ("mlx", _mlx(mlx_fused_optim, compiled=False, scheduled=False)),
    "ours compiled constant": (
        "mlx",
        _mlx(mlx_fused_optim, compiled=True, scheduled=False),
    ),
    "mlx": ("mlx", _mlx(mlx.optimizers, compiled=False)),
    "mlx compiled": ("mlx", _mlx(mlx.optimizers, compiled=True)),
    "torch fused": ("torch", lambda work, options: TorchPeer(work, options, fused=True)),
    "torch foreach": ("torch", lambda work, options: TorchPeer(work, options, foreach=True)),
    "optax jit": ("optax", OptaxPeer),
}


def available() -> list[str]:
    return [name for name, (package, _) in PEERS.items() if find_spec(package)]


# ---- Verification ---------------------------------------------------------------

UNIT_ROUNDOFF = {"float32": 2.0**-24, "bfloat16": 2.0**-8}


def rounded(array: np.ndarray, dtype: str) -> np.ndarray:
    """Samples of an array, with the values that they have in this dtype."""
    narrow = mx.array(np.concatenate(sample(array))).astype(getattr(mx, dtype))
    return np.array(narrow.astype(mx.float32)).astype(np.float64)


def reference(work: Work, options: Options, steps: int) -> list[tuple[np.ndarray, np.ndarray]]:
    """Samples of every parameter after some steps, in float64, and a bound of the error.

    The bound allows a rounding to the dtype after every operation and of every constant,
    which is what the least exact peer does; ``u`` is one such rounding, relative.
    """
    u = UNIT_ROUNDOFF[options.dtype]
    take = sgd_steps if options.optimizer == "sgd" else adamw_steps
    result = []
    for start, gradient in zip(values(work, 1), values(work, 2), strict=True):
        p, error = take(
            rounded(start, options.dtype), rounded(gradient, options.dtype), options, steps, u
        )
        # Errors of errors: fewer than 16 roundings a step act on each other.
        result.append((p, error * (1 + 16 * steps * u)))
    return result


def rate_error(u: float) -> float:
    """Relative. A float32 schedule: 8 roundings for its power. Constants: one more for each."""
    return u + 8 * UNIT_ROUNDOFF["float32"]


def sgd_steps(
    p: np.ndarray, g: np.ndarray, options: Options, steps: int, u: float
) -> tuple[np.ndarray, np.ndarray]:
    decay, momentum = options.weight_decay, options.momentum
    v, error_p, error_v = np.zeros_like(p), np.zeros_like(p), np.zeros_like(p)
    for step in range(steps):
        rate = options.rate(step)
        decayed = g + decay * p
        error_v = momentum * error_v + 2 * u * momentum * abs(v)
        error_v += decay * (error_p + 2 * u * abs(p)) + u * abs(decayed)
        v = momentum * v + decayed
        error_v += u * abs(v)
        p = p - rate * v
        error_p += rate * (error_v + (u + rate_error(u)) * abs(v)) + u * abs(p)
    return p, error_p


def adamw_steps(
    p: np.ndarray, g: np.ndarray, options: Options, steps: int, u: float
) -> tuple[np.ndarray, np.ndarray]:
    beta1, beta2 = options.betas
    m, v, error_p = np.zeros_like(p), np.zeros_like(p), np.zeros_like(p)
    error_m, error_v = np.zeros_like(p), np.zeros_like(p)
    for step in range(steps):
        rate, bias1, bias2 = options.rate(step), 1 - beta1 ** (step + 1), 1 - beta2 ** (step + 1)
        # Each product: a constant and the product; their sum; and the square.
        error_m = beta1 * error_m + 3 * u * (beta1 * abs(m) + (1 - beta1) * abs(g))
        error_v = beta2 * error_v + 4 * u * (beta2 * v + (1 - beta2) * g * g)
        m, v = beta1 * m + (1 - beta1) * g, beta2 * v + (1 - beta2) * g * g
        below = np.sqrt(v / bias2) + options.eps
        change = rate / bias1 * m / below
        # The powers of betas, in float32: 8 roundings, and of the beta itself each time; they are
        # subtracted from 1. Then two numbers of a correction, a root, a sum, two products.
        powers = (9 + step) * UNIT_ROUNDOFF["float32"]
        of_numbers = powers * (1 / bias1 + 1 / bias2) + rate_error(u) + 6 * u
        relative_v = np.divide(error_v, 2 * v, out=np.zeros_like(v), where=v > 0)
        error = rate / bias1 * error_m / below + abs(change) * (relative_v + of_numbers)
        # Weight decay: the factor, the product, or the product and a sum of both terms.
        error_p += error + (2 + 2 * rate * options.weight_decay) * u * abs(p)
        p = (1 - rate * options.weight_decay) * p - change
        error_p += u * abs(p)
    return p, error_p


class WrongResultError(Exception):
    """A peer's parameters are not what the steps should give."""


def verify(name: str, peer: Peer, work: Work, options: Options, steps: int = 3) -> None:
    """Take a few steps from the start; WrongResultError where the result is wrong."""
    options = replace(options, scheduled=options.scheduled and "constant" not in name)
    for _ in range(steps):
        peer.step()
    expected = reference(work, options, steps)
    for (path, _), got, (want, bound) in zip(
        work.parameters, peer.samples(), expected, strict=True
    ):
        excess = abs(got.astype(np.float64) - want) / bound
        if not excess.max(initial=0) <= 1:
            at = int(np.argmax(excess))
            raise WrongResultError(
                f"[verify] '{name}' is wrong in '{path}' after {steps} steps: got {got[at]}, "
                f"allowed {want[at]} +- {bound[at]:.3g}."
            )
