"""``python -m mlx_fused_optim.check``: do the fused steps hold their word on this machine?

It runs every optimizer on MLX's default device (or the one given with ``--device``), compares
its bits with the same arithmetic in plain MLX operations and with ``mlx.optimizers``,
times two against those and against a copy, and prints a table to paste into an issue
(``--json FILE`` writes it down as well). It takes about half a minute and needs nothing but
the installed package. The exit code is 0 if all held, 1 if not.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import itertools
import json
import math
import os
import platform
import statistics
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import mlx.core as mx
import mlx.optimizers
from mlx.utils import tree_flatten

import mlx_fused_optim as optim

from . import reference
from ._dtypes import DTYPES


class Case(NamedTuple):
    """An optimizer of this package, and of ``mlx.optimizers``, and its arguments."""

    optimizer: str
    options: dict[str, Any]

    @property
    def dtypes(self) -> list[str]:
        short = self.options.get("master_weights") == "24bit"  # which others have no use for
        return ["bfloat16"] if short else list(DTYPES)

    def ours(self) -> optim.FusedOptimizer:
        made: optim.FusedOptimizer = getattr(optim, self.optimizer)(RATE, **self.options)
        return made

    def of_mlx(self) -> mlx.optimizers.Optimizer:
        made: mlx.optimizers.Optimizer = getattr(mlx.optimizers, self.optimizer)(
            RATE, **self.options
        )
        return made


MOMENTUM: dict[str, Any] = {"momentum": 0.9, "weight_decay": 0.01}
# What mlx.optimizers has too ...
OPTIMIZERS = {
    "SGD": Case("SGD", {}),
    "momentum": Case("SGD", {"momentum": 0.9}),
    "dampening": Case("SGD", {"momentum": 0.9, "dampening": 0.3}),
    "nesterov": Case("SGD", {"momentum": 0.9, "nesterov": True}),
    "weight decay": Case("SGD", {"weight_decay": 0.01}),
    "all": Case("SGD", {**MOMENTUM, "nesterov": True}),
    "Adam": Case("Adam", {}),
    "AdamW": Case("AdamW", {"weight_decay": 0.1}),
    "Adamax": Case("Adamax", {}),
    "Lion": Case("Lion", {"weight_decay": 0.1}),
    "RMSprop": Case("RMSprop", {}),
    "Adagrad": Case("Adagrad", {}),
    "AdaDelta": Case("AdaDelta", {}),
}
# ... options beyond it whose bits plain MLX operations have ...
BEYOND = {
    "maximize": Case("SGD", {"maximize": True}),
    "grad_scale": Case("SGD", {"grad_scale": 3.0}),
    "clip_value": Case("SGD", {"clip_value": 0.7}),
    "decoupled": Case("SGD", {**MOMENTUM, "decoupled": True}),
    "groups": Case(
        "SGD",
        {**MOMENTUM, "groups": [(lambda path, array: array.ndim < 2, {"weight_decay": 0.0})]},
    ),
    "state_dtype": Case("SGD", {**MOMENTUM, "state_dtype": mx.float32}),
    "master_weights": Case("SGD", {**MOMENTUM, "master_weights": True}),
    "master_weights in 24 bits": Case("SGD", {**MOMENTUM, "master_weights": "24bit"}),
    "compensated": Case("SGD", {**MOMENTUM, "compensated": True}),
    "ema_decay": Case("SGD", {**MOMENTUM, "ema_decay": 0.9}),
    "Adam, coupled": Case("Adam", {"weight_decay": 0.1, "clip_value": 0.7}),
    "AdamW, amsgrad": Case("AdamW", {"amsgrad": True, "state_dtype": mx.bfloat16}),
    "AdamW, master_weights": Case("AdamW", {"master_weights": True, "ema_decay": 0.9}),
    "Lion, compensated": Case("Lion", {"weight_decay": 0.1, "compensated": True}),
}
# ... and those whose bits every backend has: norms, random numbers and the numbers of a bias
# correction are made in one order.
SHARED = {
    "clip_norm": Case("SGD", {"clip_norm": 1.0}),
    "skip_nonfinite": Case("SGD", {"skip_nonfinite": True, "clip_norm": math.inf}),
    "trust_coefficient": Case("SGD", {**MOMENTUM, "trust_coefficient": 0.01}),
    "stochastic": Case("SGD", {**MOMENTUM, "rounding": "stochastic"}),
    "all": Case("SGD", {
        **MOMENTUM, "nesterov": True, "maximize": True, "grad_scale": 3.0, "clip_value": 0.7,
        "clip_norm": 1.0, "skip_nonfinite": True, "trust_coefficient": 0.01, "ema_decay": 0.9,
        "master_weights": True, "rounding": "stochastic", "state_dtype": mx.bfloat16,
    }),
    "Adam, bias_correction": Case("Adam", {"bias_correction": True}),
    "AdamW, all": Case("AdamW", {
        "bias_correction": True, "amsgrad": True, "maximize": True, "grad_scale": 3.0,
        "clip_norm": 1.0, "skip_nonfinite": True, "ema_decay": 0.9, "compensated": True,
        "rounding": "stochastic", "state_dtype": mx.bfloat16,
    }),
}  # fmt: skip
# Around the widths of vectors, tiles and blocks; no element and one.
SHAPES = [(0,), (1,), (3,), (4,), (5,), (17,), (33, 65), (16, 64), (255,), (4097,), (2, 3, 5)]
# Of Muon: wide, high, square, more dimensions, a vector; and how far the result may be from that
# with float32's products, as a part of it. On these bfloat16, the default of a GPU, is 2e-2 apart,
# and 11 bits, which some GPUs take of a float32, are 2e-3.
MATRICES = [(16, 64), (65, 33), (64, 64), (8, 3, 5), (17,), (128, 128)]
PRODUCTS = {"products as usual": (None, 5e-2), "products of float32": (mx.float32, 5e-3)}
STEPS = 3
RATE = 0.1


class Result(NamedTuple):
    """One row of the table: what was asked, and what is wrong (nothing if it held)."""

    question: str
    asked: int
    wrong: list[str]


# ---- Parity ------------------------------------------------------------------------


def bits(array: mx.array) -> mx.array:
    return array.view(mx.uint32 if array.dtype.size == 4 else mx.uint16) if array.ndim else array


def same(a: mx.array, b: mx.array) -> bool:
    return a.dtype == b.dtype and a.shape == b.shape and bool(mx.array_equal(bits(a), bits(b)))


LAYOUTS: dict[str, Callable[[mx.array], mx.array]] = {
    "contiguous": lambda a: a,
    # What the weight of nn.Linear gets.
    "transposed": lambda a: mx.contiguous(a.T).T,
    "unaligned": lambda a: mx.concatenate([a.reshape(-1)[:1], a.reshape(-1)])[1:].reshape(a.shape),
}


def parameters_and_gradients(
    dtype: str, gradient: str, layout: str
) -> tuple[list[mx.array], list[list[mx.array]]]:
    """Normal numbers, never near zero: a forgotten element would not show."""

    def draw(shape: tuple[int, ...], dtype: str) -> mx.array:
        values = mx.random.normal(shape)
        return mx.where(mx.abs(values) < 2**-6, 0.5, values).astype(DTYPES[dtype])

    mx.random.seed(1)
    parameters = [draw(shape, dtype) for shape in SHAPES]
    gradients = [[LAYOUTS[layout](draw(s, gradient)) for s in SHAPES] for _ in range(STEPS)]
    mx.eval(parameters, gradients)
    return parameters, gradients


def steps_differ(name: str, case: Case, dtype: str, gradient: str, layout: str) -> str:
    """The first difference from plain MLX operations in float32, or nothing."""
    parameters, gradients = parameters_and_gradients(dtype, gradient, layout)
    optimizer = case.ours()
    rule = getattr(reference, optimizer._rule.name)
    options = {
        "weight_decay": optimizer.weight_decay,
        "decoupled": optimizer.decoupled,
        **case.options,
    }
    expected, kept = {"w": parameters}, reference.init(parameters)
    tree = expected
    for step in range(STEPS):
        tree = optimizer.apply_gradients({"w": gradients[step]}, tree)
        expected, kept = reference.step(
            rule, expected, {"w": gradients[step]}, kept, learning_rate=RATE, **options
        )
        mx.eval(tree, optimizer.state, expected, kept)
        for shape, a, b in zip(SHAPES, tree["w"], expected["w"], strict=True):
            if not same(a, b):
                return f"{name}, {dtype}, {gradient} gradients, {layout}, {shape}, step {step}"
    return ""


def check_parity() -> Result:
    cases = [
        (name, case, dtype, gradient, layout)
        for (name, case), dtype, gradient in itertools.product(OPTIMIZERS.items(), DTYPES, DTYPES)
        for layout in (LAYOUTS if name in ("all", "AdamW") else ("contiguous",))
    ]
    wrong = [steps_differ(*case) for case in cases]
    return Result("bits of float32 arithmetic, rounded once", len(cases), list(filter(None, wrong)))


def check_options() -> Result:
    cases = [
        (name, case, dtype, dtype, layout)
        for name, case in BEYOND.items()
        for dtype in case.dtypes
        for layout in (LAYOUTS if "master_weights" in name else ("contiguous",))
    ]
    wrong = [steps_differ(*case) for case in cases]
    return Result("options beyond mlx.optimizers, likewise", len(cases), list(filter(None, wrong)))


def everything_after(case: Case, dtype: str, device: mx.Device) -> list[mx.array]:
    """Parameters and state after the steps on a device; in the last one a gradient is
    infinite, where that is skipped."""
    with mx.stream(mx.cpu):
        parameters, gradients = parameters_and_gradients(dtype, dtype, "transposed")
        if case.options.get("skip_nonfinite"):
            gradients[-1][-1] = gradients[-1][-1] * math.inf
            mx.eval(gradients)
    with mx.stream(device):
        optimizer = case.ours()
        tree = {"w": parameters}
        for gradient in gradients:
            tree = optimizer.apply_gradients({"w": gradient}, tree)
            mx.eval(tree, optimizer.state)
        leaves: list[tuple[str, Any]] = list(tree_flatten(optimizer.state))  # type: ignore[arg-type]
        return [*tree["w"], *(leaf for name, leaf in leaves if not name.endswith("table"))]


def check_bits_of_the_cpu() -> Result:
    """Every rule and option on the default device, against our CPU backend."""
    rows = [*OPTIMIZERS.items(), *BEYOND.items(), *SHARED.items()]
    cases = [(name, case, dtype) for name, case in rows for dtype in case.dtypes]
    wrong = []
    for name, case, dtype in cases:
        here = everything_after(case, dtype, mx.default_device())
        there = everything_after(case, dtype, mx.Device(mx.cpu))
        if len(here) != len(there) or not all(map(same_bytes, here, there)):
            wrong.append(f"{name}, {dtype}")
    return Result("every step has the bits of the CPU backend", len(cases), wrong)


def same_bytes(a: mx.array, b: mx.array) -> bool:
    """Like :func:`same`, for arrays of any dtype; NaN is NaN."""
    if mx.issubdtype(a.dtype, mx.floating):
        return same(a, b) or bool(mx.array_equal(a, b, equal_nan=True))
    return a.dtype == b.dtype and bool(mx.array_equal(a, b))


def check_bits_of_mlx() -> Result:
    wrong = []
    for name, case in OPTIMIZERS.items():
        for layout in LAYOUTS:
            parameters, gradients = parameters_and_gradients("float32", "float32", layout)
            trees = [{"w": parameters}, {"w": parameters}]
            optimizers = [case.ours(), case.of_mlx()]
            for step in range(STEPS):
                trees = [
                    o.apply_gradients({"w": gradients[step]}, tree)
                    for o, tree in zip(optimizers, trees, strict=True)
                ]
                mx.eval(trees)
            if not all(map(same, *(tree["w"] for tree in trees))):
                wrong.append(f"{name}, {layout}")
    return Result("float32 bits of mlx.optimizers", len(OPTIMIZERS) * len(LAYOUTS), wrong)


def check_what_is_held() -> Result:
    """A step writes in place where it may, and never into what somebody holds."""
    parameters, gradients = parameters_and_gradients("float32", "float32", "contiguous")
    optimizer = optim.SGD(RATE, momentum=0.9)
    wrong = []
    for step in range(STEPS):
        leaves: list[tuple[str, Any]] = list(tree_flatten(optimizer.state))  # type: ignore[arg-type]
        arrays = [*parameters, *(leaf for _, leaf in leaves)]
        copies = [mx.array(a) for a in arrays]
        mx.eval(copies)
        parameters = optimizer.apply_gradients({"w": gradients[step]}, {"w": parameters})["w"]
        mx.eval(parameters, optimizer.state)
        if not all(map(same_bytes, arrays, copies)):
            wrong.append(f"step {step}")
    return Result("arrays that somebody holds stay as they are", STEPS, wrong)


def check_schedules() -> Result:
    """In the kernel: at every step the float64 value to 2 ulp, and the counter counts."""
    wrong = []
    steps = (0, 1, 2, 10**6, 10**7, 2**32)
    for step in steps:
        optimizer = optim.SGD(optim.exponential_decay(RATE, 0.999999))
        optimizer.state["step"] = mx.array(step, mx.uint64)
        optimizer.apply_gradients({"w": mx.zeros(3)}, {"w": mx.zeros(3)})
        mx.eval(optimizer.state)
        exact = RATE * 2.0 ** (step * math.log2(0.999999))
        error = abs(optimizer.learning_rate.item() - exact)
        if error > 2 * math.ulp(exact) * 2**29 or optimizer.step.item() != step + 1:
            wrong.append(f"step {step}")
    return Result("learning rate and counter of the kernel", len(steps), wrong)


def orthogonal(shape: tuple[int, ...]) -> mx.array:
    """Nearly so, that Muon's iteration does not make roundings large: singular values near 1."""
    if len(shape) < 2:
        return mx.random.normal(shape)
    rows, columns = shape[0], math.prod(shape[1:])
    noise = 0.3 / math.sqrt(max(rows, columns)) * mx.random.normal((rows, columns))
    return (mx.eye(rows, columns) + noise).reshape(shape)


def directions(optimizer: mlx.optimizers.Optimizer, device: mx.Device) -> list[mx.array]:
    """Where the steps lead from zero, one of them with each of three gradients."""
    with mx.stream(mx.cpu):
        mx.random.seed(1)
        gradients = [[orthogonal(shape) for shape in MATRICES] for _ in range(STEPS)]
        tree = {"w": [mx.zeros(shape) for shape in MATRICES]}
        mx.eval(gradients, tree)
    with mx.stream(device):
        for gradient in gradients:
            tree = optimizer.apply_gradients({"w": gradient}, tree)
            mx.eval(tree, optimizer.state)
    return tree["w"]


def check_muon() -> Result:
    """Against that of mlx.optimizers on the CPU, up to the rounding of matrix products."""
    expected = directions(mlx.optimizers.Muon(RATE), mx.Device(mx.cpu))
    wrong = []
    for name, (dtype, most) in PRODUCTS.items():
        got = directions(optim.Muon(RATE, ns_dtype=dtype), mx.default_device())
        for shape, a, b in zip(MATRICES, got, expected, strict=True):
            with mx.stream(mx.cpu):
                apart: Any = mx.sqrt(mx.sum(mx.square(a - b)) / mx.sum(mx.square(b))).item()
            if not apart <= most:
                wrong.append(f"Muon, {name}, {shape}: {apart:.1e} apart")
    return Result("Muon is that of mlx.optimizers, roughly", len(PRODUCTS) * len(MATRICES), wrong)


# ---- Speed -------------------------------------------------------------------------


class Model(NamedTuple):
    name: str
    shapes: list[tuple[int, ...]]

    def least_bytes(self, moments: int) -> int:
        """What a step cannot do without: parameters and moments both ways, gradients in."""
        return 4 * (3 + 2 * moments) * sum(map(math.prod, self.shapes))


MODELS = [
    Model("448 adapters of 16 x 1024", [(16, 1024)] * 448),
    Model("12 matrices of 1024 x 1024", [(1024, 1024)] * 12),
]
# What is timed, and how many moments it keeps.
TIMED = {
    "SGD with momentum": (Case("SGD", {"momentum": 0.9}), 1),
    "AdamW": (Case("AdamW", {}), 2),
}
COPIED = 1 << 26  # elements: more than a cache holds


def copy_speed(repeats: int = 15) -> float:
    """GB/s, read and written, of a copy's work: a change of sign, in place, so that no memory is
    made for it; the fastest of a few. On a CPU, where an operation of MLX has one thread, a part
    for each core. A step whose arrays a cache holds can be faster."""
    device = mx.default_device()
    parts = min(os.cpu_count() or 1, 16) if device == mx.Device(mx.cpu) else 1
    streams = [mx.new_stream(device) for _ in range(parts)]
    arrays = [mx.ones(COPIED // parts) for _ in streams]
    mx.eval(arrays)
    size = 2 * sum(array.nbytes for array in arrays)
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        # Nobody holds the old ones when it is evaluated: it may write where it reads.
        arrays = [mx.negative(arrays.pop(0), stream=stream) for stream in streams]
        mx.eval(arrays)
        seconds.append(time.perf_counter() - start)
    return size / min(seconds) / 1e9


def step_of(optimizer: mlx.optimizers.Optimizer, compiled: bool) -> Callable[[Any, Any], Any]:
    if not compiled:
        return optimizer.apply_gradients
    step: Callable[[Any, Any], Any] = mx.compile(
        optimizer.apply_gradients, inputs=optimizer.state, outputs=optimizer.state
    )
    return step


def timed(case: Case, model: Model, seconds: float) -> dict[str, float]:
    """Median milliseconds of a step, of ours and of MLX's, in turns."""
    gradients = {"w": [mx.random.normal(s) for s in model.shapes]}
    candidates: dict[str, tuple[mlx.optimizers.Optimizer, bool]] = {
        "fused": (case.ours(), False),
        "mlx": (case.of_mlx(), False),
        "mlx compiled": (case.of_mlx(), True),
    }
    steps, trees = {}, {}
    times: dict[str, list[float]] = {name: [] for name in candidates}
    for name, (optimizer, compiled) in candidates.items():
        trees[name] = {"w": [mx.random.normal(s) for s in model.shapes]}
        optimizer.init(trees[name])
        steps[name] = step_of(optimizer, compiled)
    mx.eval(gradients, trees)
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or len(times["fused"]) < 5:
        for name, (optimizer, _) in candidates.items():
            start = time.perf_counter()
            trees[name] = steps[name](gradients, trees[name])
            mx.eval(trees[name], optimizer.state)
            times[name].append(1e3 * (time.perf_counter() - start))
    # The first two turns compile kernels and pack arenas.
    return {name: statistics.median(ms[2:]) for name, ms in times.items()}


# ---- Report ------------------------------------------------------------------------


def environment() -> Iterator[tuple[str, str]]:
    yield "mlx-fused-optim", optim.__version__
    yield "mlx", importlib.metadata.version("mlx")
    yield "Python", platform.python_version()
    system = f"macOS {platform.mac_ver()[0]}" if sys.platform == "darwin" else platform.platform()
    yield "system", f"{system}, {platform.machine()}"
    info = mx.device_info() if mx.default_device() == mx.Device(mx.gpu) else {}
    name = info.get("device_name") or info.get("architecture") or platform.processor()
    yield "device", f"{mx.default_device()} {name}".strip()
    for variable, value in sorted(os.environ.items()):
        if variable.startswith("MLX_FUSED_OPTIM_"):
            yield variable, value


def answered(check: Callable[[], Result]) -> Result:
    """The result; an exception is one too."""
    try:
        return check()
    except Exception as error:
        traceback.print_exc()
        return Result(check.__name__, 1, [f"{type(error).__name__}: {error}"])


def main(arguments: list[str] | None = None) -> int:
    """Run all checks and print the table; 0 if all held, else 1."""
    parser = argparse.ArgumentParser(
        prog="python -m mlx_fused_optim.check",
        description="Check the fused steps on this machine and print a table for an issue.",
    )
    parser.add_argument("--device", choices=("cpu", "gpu"), help="default: MLX's")
    parser.add_argument("--seconds", type=float, default=3.0, help="for each timing; 0: none")
    parser.add_argument("--json", type=Path, metavar="FILE", help="what is printed, as JSON too")
    options = parser.parse_args(arguments)
    if options.device:
        device = mx.Device(getattr(mx, options.device))
        if not mx.is_available(device):
            parser.error(f"MLX has no {options.device} on this machine")
        mx.set_default_device(device)
    start = time.perf_counter()

    record: dict[str, Any] = {"environment": dict(environment()), "checks": [], "steps": []}
    print("| | |\n|---|---|")
    for name, value in record["environment"].items():
        print(f"| {name} | {value} |")
    print("\n| check | asked | held |\n|---|---|---|", flush=True)
    wrong = []
    checks = [check_parity, check_bits_of_mlx, check_options, check_muon, check_what_is_held]
    checks.append(check_schedules)
    if mx.default_device() != mx.Device(mx.cpu):
        checks.append(check_bits_of_the_cpu)
    for check in checks:
        result = answered(check)
        verdict = "no" if result.wrong else "yes"
        print(f"| {result.question} | {result.asked} | {verdict} |", flush=True)
        record["checks"].append(result._asdict())
        wrong += [f"- {result.question}: {what}" for what in result.wrong]
    if options.seconds > 0 and not wrong:
        copy = record["copy_gb_s"] = copy_speed()
        print(f"\nA copy: {copy:.0f} GB/s, read and written.\n")
        print("| one step, float32 | fused | mlx | mlx compiled | fused, of a copy's speed |")
        print("|---|---|---|---|---|", flush=True)
        for (name, (case, moments)), model in itertools.product(TIMED.items(), MODELS):
            ms = timed(case, model, options.seconds)
            speeds = {key: model.least_bytes(moments) / t / 1e6 for key, t in ms.items()}
            columns = [f"{t:.2f} ms, {speeds[key]:.0f} GB/s" for key, t in ms.items()]
            columns.append(f"{speeds['fused'] / copy:.0%}")
            print(f"| {name}, {model.name} | {' | '.join(columns)} |", flush=True)
            step = {"optimizer": name, "model": model.name, "ms": ms, "gb_s": speeds}
            record["steps"].append(step)
    print(f"\n{'NOT ALL HELD' if wrong else 'All held'}, in {time.perf_counter() - start:.0f} s.")
    if wrong:
        print("\n".join(wrong[:20]))
    if options.json:
        record["held"] = not wrong
        options.json.write_text(json.dumps(record, indent=2) + "\n")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
