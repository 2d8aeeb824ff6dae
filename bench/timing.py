"""Fair times: everybody in turn, warm, medians and quartiles of whole steps."""

from __future__ import annotations

import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from datetime import date
from importlib import metadata
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx_fused_optim

PAUSE = 0.005  # s; the threads of some libraries spin for a while after their last work
WARM_STEPS = 2  # of each turn, not counted: caches and threads belong to the turn before
STEPS = 5  # of each turn
FEWEST_TURNS = 4


def time_in_turns(
    candidates: Mapping[str, Callable[[], None]], seconds: float, turns: int = FEWEST_TURNS
) -> dict[str, dict[str, Any]]:
    """Median and quartiles (ms) of each candidate (name -> one step, host time included), and
    its median in each turn.

    They take turns, so that a drift of clock or heat falls on all. A turn is a few steps in
    a row, as in a training loop. A step must return only when its work is done. There are as many
    ``turns``, and as many more as ``seconds`` have room for.
    """
    times: dict[str, list[float]] = {name: [] for name in candidates}
    end = time.perf_counter() + seconds
    while turns > 0 or time.perf_counter() < end:
        turns -= 1
        for name, step in candidates.items():
            time.sleep(PAUSE)
            for _ in range(WARM_STEPS):
                step()
            for _ in range(STEPS):
                start = time.perf_counter()
                step()
                times[name].append(1e3 * (time.perf_counter() - start))
    result = {}
    for name, milliseconds in times.items():
        low, median, high = statistics.quantiles(milliseconds, n=4)
        result[name] = {
            "median_ms": median,
            "low_ms": low,
            "high_ms": high,
            "steps": len(milliseconds),
            "turns_ms": [
                statistics.median(milliseconds[at : at + STEPS])
                for at in range(0, len(milliseconds), STEPS)
            ],
        }
    return result


def new_bytes(step: Callable[[], None]) -> int:
    """The memory that a step of MLX needs beyond what is held before it."""
    mx.synchronize()
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    step()
    return mx.get_peak_memory() - before


def copy_speed() -> float | None:
    """GB/s of a copy in the GPU's memory, read and written; torch's, which is the driver's."""
    try:
        import torch
    except ImportError:
        return None
    source = torch.randn(1 << 28, device="cuda")
    target = torch.empty_like(source)
    seconds = []
    for _ in range(30):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        target.copy_(source)
        end.record()
        torch.cuda.synchronize()
        seconds.append(1e-3 * start.elapsed_time(end))
    return 2 * source.numel() * source.element_size() / statistics.median(seconds) / 1e9


def header(device: str) -> dict:
    """Where and when, for the record."""
    machine = {
        "processor": processor(),
        "cores": os.cpu_count(),
        "load": round(os.getloadavg()[0], 1),  # of others, at the start
        "system": f"{platform.system()} {platform.machine()}",
    }
    if device == "gpu":
        machine["gpu"] = str(mx.device_info().get("device_name", "unknown"))
        if not mx.metal.is_available() and (speed := copy_speed()) is not None:
            machine["copy_gb_s"] = round(speed)
    versions = {"python": platform.python_version()}
    versions["mlx-fused-optim"] = mlx_fused_optim.__version__
    for package in ("mlx", "torch", "jax", "optax"):
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return {"date": date.today().isoformat(), "machine": machine, "versions": versions}


def processor() -> str:
    information = Path("/proc/cpuinfo")
    if information.exists():
        for line in information.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def import_ms(processes: int = 5) -> float:
    """What importing the package takes (ms of one thread's time) after mlx.optimizers, which
    it is used with: the median of fresh processes."""
    code = (
        "import time, mlx.optimizers; start = time.thread_time(); import mlx_fused_optim; "
        "print(1e3 * (time.thread_time() - start))"
    )
    command = [sys.executable, "-c", code]
    times = (
        subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout for _ in range(processes)
    )
    return statistics.median(map(float, times))
