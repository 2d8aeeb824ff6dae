"""The rules, in NumPy and from the papers that csrc/math/rules names: what an optimizer does
between the gradient that the frame gives it and the change of the parameter.

Each is written once, for float32 arrays and for numbers with bounds (full_references.py):
the order of the operations is that of mlx.optimizers, which is what is promised bit for bit.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

Slots = dict[str, Any]


@dataclass(frozen=True)
class RuleMistake:
    """Mistakes that a test must catch: each is a rule that does something else."""

    rest_of_the_rounded: bool = False  # 1 - 0.9f, not (1 - 0.9)f
    dampening_forgotten: bool = False
    nesterov_forgotten: bool = False
    moments_not_moved: bool = False
    squares_of_nothing: bool = False  # g in place of g g
    epsilon_forgotten: bool = False
    epsilon_under_the_root: bool = False
    not_corrected: bool = False
    corrected_by_the_step_before: bool = False
    root_not_corrected: bool = False
    largest_forgotten: bool = False
    largest_of_the_old: bool = False
    magnitude_forgotten: bool = False
    direction_of_the_new_moment: bool = False
    direction_not_a_sign: bool = False
    changes_of_the_new: bool = False
    changes_forgotten: bool = False


RIGHT = RuleMistake()


class Numbers(NamedTuple):
    """Of one tensor at one step: ``rest`` is 1 - each scalar, ``rate`` and ``root`` the
    numbers of a bias correction."""

    learning_rate: Any
    scalars: dict[str, Any]
    rest: dict[str, Any]
    rate: Any
    root: Any
    flags: set[str]
    wrong: RuleMistake = RIGHT

    def moved(self, average: Any, x: Any, factor: str) -> Any:
        if self.wrong.moments_not_moved:
            return average
        return self.scalars[factor] * average + self.rest[factor] * x

    def square(self, x: Any) -> Any:
        return x if self.wrong.squares_of_nothing else x * x

    def over(self, above: Any, below: Any) -> Any:
        """``below`` is a size; without an epsilon a zero would have no direction."""
        return above / below if self.wrong.epsilon_forgotten else above / (below + self.eps)

    def root_of(self, square: Any) -> Any:
        return np.sqrt(square + self.eps if self.wrong.epsilon_under_the_root else square)

    @property
    def eps(self) -> Any:
        return self.scalars["eps"]


Change = tuple[Any, Slots]
"""What the parameter loses, and the new slots."""


def sgd(g: Any, old: Slots, n: Numbers) -> Change:
    if "momentum" not in n.flags:
        return n.learning_rate * g, {}
    momentum = n.scalars["momentum"]
    rest = np.float32(1) if n.wrong.dampening_forgotten else n.rest["dampening"]
    v = momentum * old["velocity"] + rest * g
    if n.wrong.moments_not_moved:
        v = g
    forward = "nesterov" in n.flags and not n.wrong.nesterov_forgotten
    return n.learning_rate * (g + momentum * v if forward else v), {"velocity": v}


def adam(g: Any, old: Slots, n: Numbers) -> Change:
    m = n.moved(old["m"], g, "beta1")
    v = n.moved(old["v"], n.square(g), "beta2")
    new, size = {"m": m, "v": v}, v
    if "amsgrad" in n.flags:
        new["largest_v"] = np.maximum(old["largest_v"], v)
        size = old["largest_v"] if n.wrong.largest_of_the_old else new["largest_v"]
        size = v if n.wrong.largest_forgotten else size
    rate, below = n.learning_rate, n.root_of(size)
    if "bias_correction" in n.flags and not n.wrong.not_corrected:
        rate = n.rate
        below = below if n.wrong.root_not_corrected else below * n.root
    return n.over(rate * m, below), new


def adamax(g: Any, old: Slots, n: Numbers) -> Change:
    m = n.moved(old["m"], g, "beta1")
    magnitude = g if n.wrong.magnitude_forgotten else np.abs(g)
    v = np.maximum(n.scalars["beta2"] * old["v"], magnitude)
    if n.wrong.largest_of_the_old:
        v = np.maximum(old["v"], magnitude)
    return n.over(n.learning_rate * m, v), {"m": m, "v": v}


def lion(g: Any, old: Slots, n: Numbers) -> Change:
    m = n.moved(old["m"], g, "beta2")
    c = n.moved(m if n.wrong.direction_of_the_new_moment else old["m"], g, "beta1")
    # A sum that is no number has no direction.
    direction = c if n.wrong.direction_not_a_sign else np.sign(c)
    return n.learning_rate * direction, {"m": m}


def rmsprop(g: Any, old: Slots, n: Numbers) -> Change:
    v = n.moved(old["v"], n.square(g), "alpha")
    return n.over(n.learning_rate * g, n.root_of(v)), {"v": v}


def adagrad(g: Any, old: Slots, n: Numbers) -> Change:
    v = old["v"] + n.square(g)
    return n.over(n.learning_rate * g, n.root_of(v)), {"v": v}


def adadelta(g: Any, old: Slots, n: Numbers) -> Change:
    v = n.moved(old["v"], n.square(g), "rho")
    eps = np.float32(0) if n.wrong.epsilon_forgotten else n.eps
    moved = n.moved(old["u"], g * g, "rho") if n.wrong.changes_of_the_new else old["u"]
    d = np.sqrt(moved + eps) / np.sqrt(v + eps) * g
    u = old["u"] if n.wrong.changes_forgotten else n.moved(old["u"], d * d, "rho")
    return n.learning_rate * d, {"v": v, "u": u}


def muon(g: Any, old: Slots, n: Numbers) -> Change:
    if "momentum" not in n.flags:
        return n.learning_rate * g, {}
    v = g if n.wrong.moments_not_moved else n.moved(old["velocity"], g, "momentum")
    forward = "nesterov" in n.flags and not n.wrong.nesterov_forgotten
    return n.learning_rate * (n.moved(v, g, "momentum") if forward else v), {"velocity": v}


class Rule(NamedTuple):
    change: Callable[[Any, Slots, Numbers], Change]
    slots: tuple[str, ...]  # in their places; the signed ones are moments of the gradient
    scalars: tuple[str, ...]
    flags: tuple[str, ...] = ()


RULES = {
    "sgd": Rule(sgd, ("velocity",), ("momentum", "dampening"), ("momentum", "nesterov")),
    "adam": Rule(
        adam, ("m", "v", "largest_v"), ("beta1", "beta2", "eps"), ("bias_correction", "amsgrad")
    ),
    "adamax": Rule(adamax, ("m", "v"), ("beta1", "beta2", "eps")),
    "lion": Rule(lion, ("m",), ("beta1", "beta2")),
    "rmsprop": Rule(rmsprop, ("v",), ("alpha", "eps")),
    "adagrad": Rule(adagrad, ("v",), ("eps",)),
    "adadelta": Rule(adadelta, ("v", "u"), ("rho", "eps")),
    "muon": Rule(muon, ("velocity",), ("momentum",), ("momentum", "nesterov")),
}
SIGNED = ("velocity", "m")


def slots_of(rule: str, flags: set[str]) -> tuple[str, ...]:
    """Those that a step with these flags keeps."""
    absent = {"velocity": "momentum", "largest_v": "amsgrad"}
    return tuple(s for s in RULES[rule].slots if absent.get(s) is None or absent[s] in flags)


def corrections(learning_rate: float, betas: Sequence[float], t: int) -> tuple[float, float]:
    """learning_rate / (1 - beta1^t) and 1 / sqrt(1 - beta2^t) in float64, t from 1."""

    def rest(beta: float) -> float:
        return 1.0 if beta <= 0 else -math.expm1(t * math.log1p(-(1 - beta)))

    return learning_rate / rest(betas[0]), 1 / math.sqrt(rest(betas[1]))
