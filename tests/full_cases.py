"""The part of the conformance table that is about the full step: every option alone for
each dtype, and combinations in which every two choices meet.

Like the cases of conformance.py, each is a few steps that give bits; the slots and all that
was measured are among them.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import mlx.core as mx
import numpy as np
from bits import DTYPES, dtype_name, narrowed, of_mlx, one_nan, to_mlx, widened
from byte_references import BYTE_FORMATS
from full_references import arenas_of
from full_step import FRAME_SLOTS, Full, Group, State, full_step
from rules import RULES, SIGNED

STEPS = 3
LEARNING_RATE = 0.1
Bits = dict[str, np.ndarray]
"""Of each step: ``p<step>.<tensor>``, ``<slot><step>.<arena>``, ``step<step>``;
``used<step>`` where something depends on the step, and where gradients are measured
``measured<step>`` and ``skipped<step>``."""

# Vector widths and blocks of the kernels, the chunk of a norm and its lanes, one less and
# one more; two tensors smaller than any of them, and none at all.
SHAPES: tuple[tuple[int, ...], ...] = (
    (2049,), (), (1,), (0,), (3,), (7, 5), (127,), (129,), (2047,), (16, 128), (513,), (4, 1025),
)  # fmt: skip
MATRICES = ((1, 7), (33, 65), (3, 5), (16, 33), (2, 3, 130), (2, 1025))
# Parts for several threads, and more than one chunk in a lane of the fold.
LARGE = ((32769,), (5,), (65537,), (0,), (1,))
# More chunks, and more tensors, than a fold has lanes.
LONG = ((1024 * 2048 + 4099,), (3,))
MANY = tuple((1 + i % 3,) for i in range(1027))

GROUPS = (
    Group(trust_coefficient=0.003),
    Group((0.5, 0.01), (2.0, 0.001), 0.002, ((0.9, 0.05), (0.0, 0.3), (0.5, 0.0001))),
    Group((0.0, 0.03), without=("momentum", "nesterov", "amsgrad")),
    Group(without=("weight_decay", "trust_ratio", "bias_correction")),
)

# Exact in no format, so that a number narrowed on its way shows.
PLAIN: dict[str, Full] = {
    **{rule: Full(rule) for rule in RULES},
    "sgd": Full(momentum=0.9, nesterov=True),
    "muon": Full("muon", momentum=0.9, nesterov=True),
}
# Of one rule only.
OWN: dict[str, Full] = {
    "plain": Full(),
    "momentum": Full(momentum=0.9, dampening=0.3),
    "muon_average": Full("muon", momentum=0.9),
    "muon_vectors": Full("muon", weight_decay=0.01),
    "gradients": Full("sgd", momentum=None, nesterov=False, direction=True, pack=True),
    "bias_correction": Full("adam", bias_correction=True),
    "amsgrad": Full("adam", amsgrad=True),
    "groups_amsgrad": Full("adam", amsgrad=True, bias_correction=True, groups=GROUPS),
    "squares_8bit": Full("rmsprop", state_dtype="8bit"),
    "corrected_amsgrad": Full("adam", bias_correction=True, amsgrad=True),
}
# With any rule.
ALONE: dict[str, dict[str, Any]] = {
    "maximize": {"maximize": True},
    "grad_scale": {"grad_scale": 3.0},
    "clip_value": {"clip_value": 0.7},
    "clip_norm": {"clip_norm": 1.3},
    "measure_norm": {"measure_norm": True},
    "skip_nonfinite": {"skip_nonfinite": True},
    "trust_ratio": {"trust_coefficient": 0.003},
    "trust_ratio_decay": {"trust_coefficient": 0.003, "weight_decay": 0.01},
    "groups": {"weight_decay": 0.01, "groups": GROUPS},
    "decay": {"weight_decay": 0.01},
    "decoupled": {"weight_decay": 0.01, "decoupled": True},
    "master_weights": {"weight_decay": 0.01, "master_weights": True},
    "compensated": {"compensated": True},
    "master24": {"weight_decay": 0.01, "master_weights": "24bit"},
    "master24_stochastic": {"master_weights": "24bit", "stochastic": True, "seed": 9},
    "stochastic": {"stochastic": True, "seed": 2**63 + 12345},
    "ema": {"ema_decay": 0.97},
    "state_float32": {"state_dtype": "float32"},
    "state_float16": {"state_dtype": "float16"},
    "state_bfloat16": {"state_dtype": "bfloat16"},
    "state_8bit": {"state_dtype": "8bit"},
    "state_8bit_stochastic": {"state_dtype": "8bit", "stochastic": True, "seed": 3},
    "state_8bit_skip": {"state_dtype": "8bit", "skip_nonfinite": True},
    "direction": {"weight_decay": 0.01, "direction": True},
    "direction_frame": {
        "weight_decay": 0.01, "maximize": True, "grad_scale": 3.0, "clip_value": 0.7,
        "clip_norm": 1.3, "skip_nonfinite": True, "groups": GROUPS, "stochastic": True, "seed": 7,
        "state_dtype": "bfloat16", "direction": True,
    },
    "pack": {"direction": True, "pack": True},
    "direction_8bit": {"weight_decay": 0.01, "state_dtype": "8bit", "direction": True},
}  # fmt: skip


@dataclass(frozen=True)
class FullCase:
    """One row. The numbers of ``parameters`` cycle through its dtypes; ``numbers`` says where
    the scalars of the steps come from; the ``bad`` step has infinities and NaN among its
    gradients; of a ``measured`` case only what was measured is kept."""

    title: str
    options: Full
    parameters: tuple[str, ...]
    gradient: str
    numbers: str = "constant"
    shapes: tuple[tuple[int, ...], ...] = SHAPES
    layout: str = "contiguous"
    first_step: int = 3
    steps: int = STEPS
    bad: int | None = None
    scale: float = 1.0
    measured_only: bool = field(default=False)

    @property
    def name(self) -> str:
        return f"{self.title}-{'+'.join(self.parameters)}-{self.gradient}-{self.layout}"

    @property
    def dtypes(self) -> list[str]:
        return [self.parameters[i % len(self.parameters)] for i in range(len(self.shapes))]

    def out_dtype(self, dtype: str) -> str:
        """Of what a step puts out in the place of a parameter."""
        return self.options.out_dtype(dtype)

    def values(self) -> tuple[list[np.ndarray], list[list[np.ndarray]], dict[str, np.ndarray]]:
        """Bits of the first parameters, of the gradients of each step, and of the first slots
        (``<slot>.<arena>``)."""
        random = np.random.default_rng(sum(map(ord, self.name)))

        def draw(shape: tuple[int, ...]) -> np.ndarray:
            values = random.standard_normal(shape).astype(np.float32)
            # Never zero: a forgotten element would not show.
            return np.where(np.abs(values) < 2**-6, np.float32(0.5), values).astype(np.float32)

        def placed(shape: tuple[int, ...], dtype: str, scale: float = 1.0) -> np.ndarray:
            values = np.float32(scale) * draw(shape)
            if self.options.state_dtype == "8bit":  # beside which others are large
                values.reshape(-1)[::7] *= np.float32(2.0**-20)
            if self.layout == "broadcast":
                values = np.broadcast_to(values[:1], shape).copy()
            return narrowed(values, dtype)

        parameters = [placed(s, d) for s, d in zip(self.shapes, self.dtypes, strict=True)]
        gradients = [
            [placed(s, self.gradient, self.scale) for s in self.shapes] for _ in range(self.steps)
        ]
        if self.bad is not None:
            for tensor, value in ((-1, np.nan), (0, np.inf), (4, -np.inf)):
                bits = gradients[self.bad][tensor]
                bits[..., -1:] = narrowed(np.float32(value), self.gradient)

        slots = {}
        for number, arena in enumerate(arenas_of(self.shapes, self.dtypes)):
            for slot in filter(None, self.options.places):
                dtype = self.options.slot_dtype(slot, arena.dtype)
                if dtype is None:
                    continue
                flat = np.zeros(arena.size, np.float32)
                for tensor, offset in zip(arena.tensors, arena.offsets, strict=True):
                    values = draw((math.prod(self.shapes[tensor]),))
                    if slot not in (*SIGNED, *FRAME_SLOTS):
                        values = values * values  # of squares
                    if slot == "compensation":
                        values = values * np.float32(2**-10)
                    if dtype == "int8":
                        values = np.float32(random.integers(-128, 128, values.size))
                    elif slot == "master":
                        near = widened(parameters[tensor], arena.dtype).reshape(-1)
                        # Within a rounding of the parameter; every fifth was set by somebody.
                        near = near * (1 + np.float32(2**-13) * values.astype(np.float32))
                        values = np.where(np.arange(values.size) % 5 == 2, values, near)
                    if dtype in BYTE_FORMATS:  # groups of many sizes, and some of zeros
                        groups = np.repeat(random.integers(-24, 8, values.size // 64 + 1), 64)
                        values = np.ldexp(values, groups[: values.size])
                        values = np.where(groups[: values.size] % 7 == 0, 0, values)
                        values[::11] *= np.float32(2.0**-20)  # beside which others are large
                    flat[offset : offset + values.size] = values
                slots[f"{slot}.{number}"] = narrowed(flat, dtype)
        return parameters, gradients, slots

    def scalars(self) -> dict[str, Any]:
        """The learning rate and what else does not come from the options."""
        if self.numbers == "constant":
            return {"learning_rate": LEARNING_RATE}
        values = {k: v for k, v in self.expected_scalars(0).items() if k in self.varying}
        if self.numbers == "arrays":
            return {name: mx.array(value) for name, value in values.items()}
        import mlx_fused_optim as optim

        return {name: optim.exponential_decay(v, 0.7)._device for name, v in values.items()}

    def expected_scalars(self, step: int) -> dict[str, float]:
        """What a step is to use, in float64; ``step`` counts from 0 of the schedules."""
        values = {**self.options.scalars, "learning_rate": LEARNING_RATE}
        factor = 0.7**step if self.numbers == "schedules" else 1.0
        return {name: values[name] * (factor if name in self.varying else 1.0) for name in values}

    @property
    def varying(self) -> frozenset[str]:
        """The scalars that are not constant: all that the step has."""
        if self.numbers == "constant":
            return frozenset()
        values = {**self.options.scalars, "learning_rate": LEARNING_RATE}
        absent = {"grad_scale"} if self.options.grad_scale is None else set()
        return frozenset(k for k, value in values.items() if value and k not in absent)

    def run(self, device: mx.Device) -> Bits:
        """Perform the steps: every number after every step.

        The first step writes to fresh memory, the second may write in place, and before the
        third somebody else holds everything, so that it must not.
        """
        from conformance import LAYOUTS

        first, gradients, slots = self.values()
        result: Bits = {}
        kept: Any = None
        with mx.stream(device):
            place = LAYOUTS[self.layout]
            state = State(
                [
                    [
                        to_mlx(slots[f"{slot}.{number}"], dtype)
                        for number, arena in enumerate(arenas_of(self.shapes, self.dtypes))
                        if slot and (dtype := self.options.slot_dtype(slot, arena.dtype))
                    ]
                    for slot in self.options.places
                ],
                mx.array(self.first_step, mx.uint64),
                mx.array(7, mx.uint64),
            )
            scalars = self.scalars()
            parameters = [place(p, d) for p, d in zip(first, self.dtypes, strict=True)]
            for step in range(self.steps):
                if step == STEPS - 1:
                    kept = (parameters, state)
                gradient = [place(g, self.gradient) for g in gradients[step]]
                parameters, state = full_step(
                    self.options, parameters, gradient, state, stream=device, **scalars
                )
                del gradient
                mx.eval(parameters, [x for x in state if x is not None])
                self._record(result, step, parameters, state)
                if self.options.direction:  # of the parameters, which stay
                    parameters = [place(p, d) for p, d in zip(first, self.dtypes, strict=True)]
        del kept
        return result

    def _record(self, result: Bits, step: int, parameters: list[mx.array], state: State) -> None:
        # A function of its own: its variables must not hold an array into the next step.
        for name in ("used", "step", "measured", "skipped"):
            value = getattr(state, name)
            if value is not None:
                bits = of_mlx(value)
                result[f"{name}{step}"] = one_nan(bits, "float32") if bits.itemsize < 8 else bits
        if self.measured_only:
            return
        for i, parameter in enumerate(parameters):
            result[f"p{step}.{i}"] = one_nan(of_mlx(parameter), dtype_name(parameter.dtype))
        for slot, arrays in zip(self.options.places, state.slots, strict=True):
            for number, array in enumerate(arrays):
                bits = one_nan(of_mlx(array), dtype_name(array.dtype))
                result[f"{slot}{step}.{number}"] = bits


# ---- Combinations -------------------------------------------------------------------

CHOICES: dict[str, Sequence[Any]] = {
    "dtypes": (("float32",), ("float16",), ("bfloat16",), tuple(DTYPES)),
    "gradient": tuple(DTYPES),
    "layout": ("contiguous", "transposed", "broadcast", "reversed", "odd_offset", "every_other"),
    "numbers": ("constant", "arrays", "schedules"),
    "rule": tuple(RULES),
    # Each rule takes of these what it has.
    "flags": (
        {},
        {"momentum": 0.9, "dampening": 0.3, "bias_correction": True},
        {"momentum": 0.9, "nesterov": True, "bias_correction": True, "amsgrad": True},
    ),
    "state_dtype": (None, *DTYPES, "8bit"),
    "weight_decay": ({}, {"weight_decay": 0.01}, {"weight_decay": 0.01, "decoupled": True}),
    "maximize": (False, True),
    "grad_scale": (None, 3.0),
    "clip_value": (None, 0.7),
    "clip_norm": (None, 1.3, 1e9),
    "skip_nonfinite": (False, True),
    "trust_coefficient": (None, 0.003),
    "groups": (None, GROUPS),
    "keeps": ({}, {"master_weights": True}, {"compensated": True}, {"master_weights": "24bit"}),
    "stochastic": ({}, {"stochastic": True, "seed": 11}),
    "ema_decay": (None, 0.97),
}


def covering_array(choices: Mapping[str, Sequence[Any]]) -> list[dict[str, int]]:
    """Rows of choices (by number) in which every two choices of different names meet.

    Greedy: a row begins with a pair that has not met yet, and takes for each other name the
    choice that brings most new pairs.
    """
    names = list(choices)
    missing = {
        ((a, i), (b, j))
        for a, b in itertools.combinations(names, 2)
        for i in range(len(choices[a]))
        for j in range(len(choices[b]))
    }

    def pair(a: tuple[str, int], b: tuple[str, int]) -> tuple:
        return (a, b) if names.index(a[0]) < names.index(b[0]) else (b, a)

    rows = []
    while missing:
        row = dict(min(missing, key=lambda p: (names.index(p[0][0]), names.index(p[1][0]), p)))
        for name in names:
            if name in row:
                continue

            # Of equals another one in each row, so that triples meet too.
            order = [(i + len(rows)) % len(choices[name]) for i in range(len(choices[name]))]
            gains = [sum(pair((name, i), other) in missing for other in row.items()) for i in order]
            row[name] = order[gains.index(max(gains))]
        missing -= {pair(a, b) for a, b in itertools.combinations(row.items(), 2)}
        rows.append({name: row[name] for name in names})
    return rows


def _combination(number: int, row: Mapping[str, int]) -> FullCase:
    chosen = {name: CHOICES[name][i] for name, i in row.items()}
    dtypes, gradient, layout, numbers = (
        chosen.pop(name) for name in ("dtypes", "gradient", "layout", "numbers")
    )
    options: dict[str, Any] = {}
    for name, value in chosen.items():
        options.update(value if isinstance(value, dict) else {name: value})
    if options.get("master_weights") == "24bit" and "float16" in dtypes:
        options["master_weights"] = True
    return FullCase(
        f"pairs{number}",
        Full(**options),
        dtypes,
        gradient,
        numbers,
        shapes=SHAPES if layout == "contiguous" else MATRICES,
        layout=layout,
        bad=1 if options["skip_nonfinite"] else None,
    )


def _cases() -> list[FullCase]:
    cases = []
    for dtype in DTYPES:
        for title, options in {**PLAIN, **OWN}.items():
            cases.append(FullCase(title, options, (dtype,), dtype))
    # Of the first rule in every dtype, of the others in one, another one for each option.
    for (i, rule), (j, title) in itertools.product(enumerate(RULES), enumerate(ALONE)):
        options = replace(PLAIN[rule], **ALONE[title])
        # What a skipped direction is nobody asks: the update is skipped too.
        bad = 1 if options.skip_nonfinite and not options.direction else None
        one = "bfloat16" if options.has_master24 else tuple(DTYPES)[(i + j) % 3]
        for dtype in DTYPES if i == 0 and not options.has_master24 else (one,):
            cases.append(FullCase(f"{rule}_{title}", options, (dtype,), dtype, bad=bad))
    cases += [_combination(i, row) for i, row in enumerate(covering_array(CHOICES))]

    everything = Full(
        momentum=0.9, nesterov=True, weight_decay=0.01, maximize=True, grad_scale=3.0,
        clip_value=0.7, clip_norm=1.3, skip_nonfinite=True, trust_coefficient=0.003,
        groups=GROUPS, master_weights=True, stochastic=True, seed=5, ema_decay=0.97,
        state_dtype="bfloat16",
    )  # fmt: skip
    randomly = replace(everything, master_weights=False, state_dtype=None)
    adam = replace(randomly, rule="adam", bias_correction=True, amsgrad=True)
    short = replace(everything, master_weights="24bit")
    # Without a skip, infinities and NaN go into bytes.
    eight = replace(adam, state_dtype="8bit", skip_nonfinite=False, clip_norm=None)
    large = {
        "everything": everything, "randomly": randomly, "adam": adam, "short": short,
        "eight": eight,
    }  # fmt: skip
    for title, options in large.items():
        large = FullCase(f"{title}_large", options, ("bfloat16",), "bfloat16", shapes=LARGE)
        cases.append(large)
        cases.append(replace(large, title=f"{title}_late", shapes=SHAPES, first_step=2**40 + 1))
    # Enough for ties, and for parameters that are powers of two.
    short = Full(weight_decay=0.01, master_weights="24bit")
    cases.append(FullCase("large_master24", short, ("bfloat16",), "float32", shapes=LARGE))
    for rule, largest in (("sgd", 1e30), ("adam", 1e18)):  # whose squares float32 knows
        bad = Full(rule, momentum=0.9, state_dtype="8bit")
        for dtype in DTYPES:
            cases.append(FullCase(f"{rule}_8bit_bad", bad, (dtype,), "float32", bad=1))
        for scale in (1e-30, 1e-12, 1e12, largest):
            cases.append(
                FullCase(f"{rule}_8bit_{scale:g}", bad, ("float32",), "float32", scale=scale)
            )
    measured = Full(clip_norm=1.3, trust_coefficient=0.003)
    cases.append(
        FullCase("long", measured, ("bfloat16",), "bfloat16", shapes=LONG, steps=1,
                 measured_only=True)
    )  # fmt: skip
    cases.append(FullCase("many", measured, ("float32",), "float16", shapes=MANY, steps=1))
    # Finite gradients, but a norm beyond float32; and one below it.
    overflow = Full(clip_norm=1.3, skip_nonfinite=True, momentum=0.9)
    cases.append(FullCase("overflow", overflow, ("float32",), "float32", scale=5e37))
    cases.append(FullCase("large", overflow, ("float32",), "float32", scale=1e20))
    cases.append(
        FullCase("overflow_scaled", replace(overflow, grad_scale=2.0**40), ("float16",),
                 "bfloat16", scale=1e20)
    )  # fmt: skip
    infinite = Full(clip_norm=1.3, trust_coefficient=0.003, weight_decay=0.01)
    cases.append(FullCase("infinite", infinite, ("float32",), "float32", scale=5e37))
    # Gradients that only unscaling makes infinite, behind a clipping that hides it; and a
    # scale that cannot be inverted.
    unscaled = Full(grad_scale=2.0**-120, skip_nonfinite=True, clip_value=0.7)
    cases.append(FullCase("overflow_unscaled", unscaled, ("float32",), "bfloat16", scale=1e7))
    inverse = Full(grad_scale=2.0**-127, skip_nonfinite=True, momentum=0.9)
    cases.append(FullCase("overflow_inverse", inverse, ("bfloat16",), "float32"))
    beyond = Full(trust_coefficient=1e30, skip_nonfinite=True)  # a ratio that is
    cases.append(FullCase("ratio_beyond", beyond, ("float32",), "float32", scale=1e-20))
    small = Full(clip_norm=5e-5)  # of a norm that an epsilon of 1e-6 changes
    cases.append(FullCase("small_norm", small, ("float32",), "float32", scale=1e-6))
    underflow = Full(clip_norm=1.3, trust_coefficient=0.003)
    cases.append(FullCase("underflow", underflow, ("float32",), "float32", scale=1e-30))
    assert len({case.name for case in cases}) == len(cases)
    return cases


FULL_CASES: list[FullCase] = _cases()
