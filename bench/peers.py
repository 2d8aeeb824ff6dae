"""The candidates: everybody takes the same steps, with parameters of his own.

A peer is a class with two methods: ``step`` takes one step and returns when it is done;
``samples`` gives some elements of every parameter. Peers whose package is missing are
left out. All of them get the same values, dtype, momentum, weight decay and schedule, and
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
    dtype: str = "float32"
    device: str = "cpu"
    momentum: float = 0.9
    weight_decay: float = 1e-4
    init: float = 0.1
    decay_rate: float = 0.999
    scheduled: bool = True

    def rate(self, step: int) -> float:
        return self.init * self.decay_rate**step if self.scheduled else self.init


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
    """The SGD of mlx.optimizers, or ours: the same call."""
    rate = options.init
    if options.scheduled:
        rate = module.exponential_decay(options.init, options.decay_rate)
    return module.SGD(rate, momentum=options.momentum, weight_decay=options.weight_decay)


class MlxPeer:
    """An optimizer with the interface of mlx.optimizers, eager or compiled."""

    def __init__(self, work: Work, options: Options, module: Any, compiled: bool):
        dtype = getattr(mx, options.dtype)
        names = [name for name, _ in work.parameters]

        def tree(seed: int) -> Any:
            arrays = [mx.array(array).astype(dtype) for array in values(work, seed)]
            return tree_unflatten(list(zip(names, arrays, strict=True)))

        self.parameters, self.gradients = tree(1), tree(2)
        self.optimizer = mlx_optimizer(module, options)
        self.optimizer.init(self.parameters)
        mx.eval(self.parameters, self.gradients, self.optimizer.state)
        self.update = self.optimizer.apply_gradients
        if compiled:
            state = self.optimizer.state
            self.update = mx.compile(self.update, inputs=state, outputs=state)

    def step(self) -> None:
        # No reference to the old parameters stays: their memory can be reused.
        self.parameters = self.update(self.gradients, self.parameters)
        mx.eval(self.parameters, self.optimizer.state)

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
        self.optimizer = torch.optim.SGD(
            self.parameters,
            lr=options.init,
            momentum=options.momentum,
            weight_decay=options.weight_decay,
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
        optimizer = optax.chain(
            optax.add_decayed_weights(options.weight_decay),
            optax.sgd(rate, momentum=options.momentum),
        )

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
    # A float32 schedule: 8 roundings for its power. Constants: one more for each.
    of_rate = u + 8 * UNIT_ROUNDOFF["float32"]
    decay, momentum = options.weight_decay, options.momentum
    result = []
    for start, gradient in zip(values(work, 1), values(work, 2), strict=True):
        p, g = rounded(start, options.dtype), rounded(gradient, options.dtype)
        v, error_p, error_v = np.zeros_like(p), np.zeros_like(p), np.zeros_like(p)
        for step in range(steps):
            rate = options.rate(step)
            decayed = g + decay * p
            error_v = momentum * error_v + 2 * u * momentum * abs(v)
            error_v += decay * (error_p + 2 * u * abs(p)) + u * abs(decayed)
            v = momentum * v + decayed
            error_v += u * abs(v)
            p = p - rate * v
            error_p += rate * (error_v + (u + of_rate) * abs(v)) + u * abs(p)
        # Errors of errors: fewer than 16 roundings a step act on each other.
        result.append((p, error_p * (1 + 16 * steps * u)))
    return result


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
