"""Everything about the CUDA backend that needs a GPU: its tests, what the first step of a process
waits for the compiler, and how fast what is compiled is, beside a copy.

    python bench/cuda_check.py [--no-tests] [--elements N]

From the source tree, with the package installed. Timings are medians and have the host's time
in them.
"""

from __future__ import annotations

import argparse
import itertools
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx_fused_optim as optim

TESTS = ["test_cuda", "test_cuda_full", "test_cuda_devices", "test_cuda_host", "test_schedules_gpu"]

# An optimizer, its options, and bytes that a step must move for each element beyond twice the
# parameter and once the gradient.
Kept = tuple[str, dict[str, Any], int]
OF_SGD = dict(momentum=0.9)
OF_ADAMW = dict(bias_correction=True)
KEPT: dict[mx.Dtype, dict[str, Kept]] = {
    mx.float32: {
        "SGD": ("SGD", dict(), 8),
        "SGD, average": ("SGD", dict(ema_decay=0.999), 16),
        "AdamW": ("AdamW", dict(), 16),
    },
    mx.bfloat16: {
        "SGD": ("SGD", dict(), 4),
        "SGD, momentum float32": ("SGD", dict(state_dtype=mx.float32), 8),
        "SGD, masters": ("SGD", dict(master_weights=True), 12),
        "SGD, masters, momentum float32": (
            "SGD",
            dict(master_weights=True, state_dtype=mx.float32),
            16,
        ),
        "SGD, compensated": ("SGD", dict(compensated=True), 8),
        "SGD, stochastic": ("SGD", dict(rounding="stochastic"), 4),
        "SGD, stochastic, momentum float32": (
            "SGD",
            dict(rounding="stochastic", state_dtype=mx.float32),
            8,
        ),
        "SGD, compensated, stochastic": ("SGD", dict(compensated=True, rounding="stochastic"), 8),
        "SGD, masters, momentum float32, average": (
            "SGD",
            dict(master_weights=True, state_dtype=mx.float32, ema_decay=0.999),
            24,
        ),
        "AdamW, moments bfloat16": ("AdamW", dict(state_dtype=mx.bfloat16), 8),
        "AdamW, moments float32": ("AdamW", dict(state_dtype=mx.float32), 16),
        "AdamW, masters, moments float32": (
            "AdamW",
            dict(master_weights=True, state_dtype=mx.float32),
            24,
        ),
        "AdamW, masters, moments float32, average": (
            "AdamW",
            dict(master_weights=True, state_dtype=mx.float32, ema_decay=0.999),
            32,
        ),
    },
}
KEPT[mx.float16] = KEPT[mx.bfloat16]

# Of a process that has an empty, then a full, folder of compiled kernels.
FIRST_STEPS = {
    "float32, momentum": "{}",
    "float32, AdamW": "{}, optimizer='AdamW'",
    "float32, momentum, transposed gradient": "{}, transposed=True",
    "float32, a cosine decay": "dict(learning_rate=optim.cosine_decay(0.1, 1000))",
    "bfloat16, masters, momentum float32, clip_norm": (
        "dict(master_weights=True, state_dtype=mx.float32, clip_norm=1.0), mx.bfloat16"
    ),
    "bfloat16, AdamW, masters, moments float32": (
        "dict(master_weights=True, state_dtype=mx.float32), mx.bfloat16, optimizer='AdamW'"
    ),
}
FIRST_STEP = """
import time
import mlx.core as mx, mlx_fused_optim as optim

def first_step(options, dtype=mx.float32, transposed=False, optimizer="SGD"):
    w = mx.random.normal((512, 512)).astype(dtype)
    gradient = mx.random.normal((512, 512)).astype(dtype)
    gradient = gradient.T if transposed else gradient
    mx.eval(w, gradient)
    mx.synchronize()
    start = time.perf_counter()
    own = dict(momentum=0.9) if optimizer == "SGD" else dict(bias_correction=True)
    optimizer = getattr(optim, optimizer)(**{"learning_rate": 0.1, **own, **options})
    mx.eval(optimizer.apply_gradients({"w": gradient}, {"w": w}), optimizer.state)
    mx.synchronize()
    print(time.perf_counter() - start)

"""


def show_first_steps() -> None:
    print("\nFirst step of a process, s", "empty folder", "full folder", sep=" | ")
    for name, arguments in FIRST_STEPS.items():
        times = []
        with tempfile.TemporaryDirectory() as folder:
            environment = {**os.environ, "MLX_FUSED_OPTIM_KERNEL_CACHE": folder}
            for _ in range(4):  # the first compiles
                command = [sys.executable, "-c", f"{FIRST_STEP}first_step({arguments})"]
                said = subprocess.run(command, env=environment, check=True, capture_output=True)
                times.append(float(said.stdout))
        print(name, f"{times[0]:.3f}", f"{statistics.median(times[1:]):.3f}", sep=" | ", flush=True)


def milliseconds(call: Any, repeats: int = 25) -> float:
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        call()
        times.append(1e3 * (time.perf_counter() - start))
    return statistics.median(times[3:])


def copy_rate(elements: int) -> float:
    """GB/s"""
    source = mx.random.normal((elements,))
    mx.eval(source)
    return 8e-6 * elements / milliseconds(lambda: mx.eval(source + 0))


def show_kernels(elements: int) -> None:
    copy = copy_rate(elements)
    print(f"\nA copy moves {copy:.0f} GB/s ({elements} float32, MLX's addition of 0)")
    print("step", "bytes an element", "ms", "GB/s", "of the copy", sep=" | ")
    for dtype, kept in KEPT.items():
        for (name, row), transposed in itertools.product(kept.items(), (False, True)):
            rule, options, extra = row
            mx.clear_cache()
            columns = 4096
            shape = (elements // columns, columns)
            parameters = {"w": mx.random.normal(shape).astype(dtype)}
            gradient = mx.random.normal(shape[::-1] if transposed else shape).astype(dtype)
            gradients = {"w": gradient.T if transposed else gradient}
            mx.eval(parameters, gradients)
            own = OF_SGD if rule == "SGD" else OF_ADAMW
            optimizer = getattr(optim, rule)(1e-3, **own, **options)

            def step(optimizer: Any = optimizer, gradients: Any = gradients) -> None:
                nonlocal parameters
                parameters = optimizer.apply_gradients(gradients, parameters)
                mx.eval(parameters, optimizer.state)

            took = milliseconds(step)
            moved = 3 * dtype.size + extra
            rate = 1e-6 * moved * elements / took
            name_of = f"{dtype}".removeprefix("mlx.core.") + f", {name}" + ", .T" * transposed
            print(name_of, moved, f"{took:.3f}", f"{rate:.0f}", f"{rate / copy:.2f}", sep=" | ")
            sys.stdout.flush()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--no-tests", action="store_true", help="timings only")
    parser.add_argument("--elements", type=int, default=1 << 28, help="of the step that is timed")
    options = parser.parse_args()
    if not mx.is_available(mx.gpu) or mx.metal.is_available():
        sys.exit("[cuda_check] needs MLX with CUDA and a GPU")
    print(mx.device_info().get("device_name", "a GPU"), f"MLX {mx.__version__}")
    show_first_steps()
    show_kernels(options.elements)
    if not options.no_tests:
        folder = Path(__file__).parents[1] / "tests"
        tests = [folder / f"{name}.py" for name in TESTS]
        sys.exit(subprocess.run([sys.executable, "-m", "pytest", "-q", *tests]).returncode)


if __name__ == "__main__":
    main()
