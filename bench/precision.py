"""Train in bfloat16 in every way that the optimizer offers, and compare with float32.

    python bench/precision.py [--optimizer sgd | adamw] [--steps N] [--modes NAME ...]
                              [--json FILE] [--write | --costs]

The tasks are those of tasks.py: digits, characters, and a pretrained model to fine-tune where its
files are installed. Every mode starts from the same weights (rounded to its dtype) and sees
the same batches. --write puts the optimizer's table into docs/precision.md; --costs
trains nothing and only weighs and times the step of every mode.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from datetime import date
from pathlib import Path
from typing import Any, NamedTuple

import mlx.core as mx
import mlx.nn as nn
import mlx_fused_optim as optim

try:
    import passages
    import timing
    from rich.console import Console
    from rich.progress import track
    from rich.table import Table
    from tasks import Task, characters, digits, loss_of, topics
except ImportError as error:
    sys.exit(f"[precision] a package is missing: {error}; pip install 'mlx-fused-optim[bench]'")

REPORT = Path(__file__).parent.parent / "docs" / "precision.md"
MARKS = "<!-- {}: begin -->\n", "<!-- {}: end -->\n"  # of an optimizer's table
# Of the step that is timed and weighed: large enough that memory is what takes time.
ELEMENTS = {mx.cpu: 1 << 24, mx.gpu: 1 << 28}


class Mode(NamedTuple):
    dtype: mx.Dtype
    options: dict[str, Any]


class Choice(NamedTuple):
    """What is trained with, and in which ways."""

    make: Callable[..., optim.FusedOptimizer]  # of the learning rate and a mode's options
    learning_rates: dict[str, float]  # by task
    modes: dict[str, Mode]
    options: dict[str, Mode]  # timed and weighed, not trained


SGD_MODES = {
    "float32": Mode(mx.float32, {}),
    "bfloat16": Mode(mx.bfloat16, {}),
    "bfloat16, momentum float32": Mode(mx.bfloat16, {"state_dtype": mx.float32}),
    "bfloat16, stochastic": Mode(mx.bfloat16, {"rounding": "stochastic"}),
    "bfloat16, compensated": Mode(mx.bfloat16, {"compensated": True}),
    "bfloat16, compensated, stochastic": Mode(
        mx.bfloat16, {"compensated": True, "rounding": "stochastic"}
    ),
    "bfloat16, master": Mode(mx.bfloat16, {"master_weights": True}),
    "bfloat16, master of 24 bits": Mode(mx.bfloat16, {"master_weights": "24bit"}),
    "bfloat16, master, momentum float32": Mode(
        mx.bfloat16, {"master_weights": True, "state_dtype": mx.float32}
    ),
}

ADAMW_MODES = {
    "float32": Mode(mx.float32, {}),
    "bfloat16": Mode(mx.bfloat16, {}),
    "bfloat16, stochastic": Mode(mx.bfloat16, {"rounding": "stochastic"}),
    "bfloat16, compensated": Mode(mx.bfloat16, {"compensated": True}),
    "bfloat16, master": Mode(mx.bfloat16, {"master_weights": True}),
    "bfloat16, master of 24 bits": Mode(mx.bfloat16, {"master_weights": "24bit"}),
    "bfloat16, master of 24 bits, stochastic": Mode(
        mx.bfloat16,
        {"master_weights": "24bit", "state_dtype": mx.float32, "rounding": "stochastic"},
    ),
    "float32, moments 8 bits": Mode(mx.float32, {"state_dtype": "8bit"}),
    "bfloat16, master, moments 8 bits": Mode(
        mx.bfloat16, {"master_weights": True, "state_dtype": "8bit"}
    ),
    "bfloat16, master of 24 bits, moments 8 bits": Mode(
        mx.bfloat16, {"master_weights": "24bit", "state_dtype": "8bit"}
    ),
    "bfloat16, master of 24 bits, moments 8 bits, stochastic": Mode(
        mx.bfloat16,
        {"master_weights": "24bit", "state_dtype": "8bit", "rounding": "stochastic"},
    ),
    "bfloat16, master, moments bfloat16": Mode(
        mx.bfloat16, {"master_weights": True, "state_dtype": mx.bfloat16}
    ),
    "bfloat16, master, moments bfloat16, stochastic": Mode(
        mx.bfloat16,
        {"master_weights": True, "state_dtype": mx.bfloat16, "rounding": "stochastic"},
    ),
}
OPTIONS = {
    "float32": Mode(mx.float32, {}),
    "clip_value=1": Mode(mx.float32, {"clip_value": 1.0}),
    "grad_scale=2": Mode(mx.float32, {"grad_scale": 2.0}),
    "weight_decay=0.1, decoupled": Mode(mx.float32, {"weight_decay": 0.1, "decoupled": True}),
    "skip_nonfinite": Mode(mx.float32, {"skip_nonfinite": True}),
    "clip_norm=1": Mode(mx.float32, {"clip_norm": 1.0}),
    "clip_norm=1, grad_scale=2, skip_nonfinite": Mode(
        mx.float32, {"clip_norm": 1.0, "grad_scale": 2.0, "skip_nonfinite": True}
    ),
    "ema_decay=0.999": Mode(mx.float32, {"ema_decay": 0.999}),
}
CHOICES = {
    "sgd": Choice(
        lambda rate, **options: optim.SGD(rate, momentum=0.9, **options),
        {"digits": 0.02, "characters": 0.1, "passages": 1.0},
        SGD_MODES,
        {**OPTIONS, "trust_coefficient=0.001": Mode(mx.float32, {"trust_coefficient": 1e-3})},
    ),
    "adamw": Choice(
        lambda rate, **options: optim.AdamW(rate, bias_correction=True, **options),
        {"digits": 0.001, "characters": 0.002, "passages": 0.003},
        ADAMW_MODES,
        {**OPTIONS, "amsgrad": Mode(mx.float32, {"amsgrad": True})},
    ),
}


# ---- Training ----------------------------------------------------------------------


def train(task: Task, choice: Choice, mode: Mode, steps: int) -> float:
    """The loss on the held-out batches after these steps, in float32 of the weights."""
    mx.random.seed(0)
    model = task.model()
    model.set_dtype(mode.dtype)
    rate = optim.cosine_decay(choice.learning_rates[task.name], steps)
    optimizer = choice.make(optim.warmup(rate, steps // 20), clip_norm=1.0, **mode.options)
    optimizer.init(model.trainable_parameters())
    state = [model.state, optimizer.state]
    loss_and_gradients = nn.value_and_grad(model, loss_of)

    def step(x: mx.array, y: mx.array) -> mx.array:
        if x.dtype == mx.float32:
            x = x.astype(mode.dtype)
        loss, gradients = loss_and_gradients(model, x, y)
        optimizer.update(model, gradients)
        return loss

    compiled = mx.compile(step, inputs=state, outputs=state)
    for number in track(range(steps), description=task.name, transient=True):
        mx.eval(compiled(*task.batch(number)), state)
    model.set_dtype(mx.float32)
    return statistics.mean(loss_of(model, x, y).item() for x, y in task.held_out)


# ---- Costs -------------------------------------------------------------------------


@dataclass
class Costs:
    bytes_a_parameter: float  # parameter and state, by MLX's counter
    milliseconds: float  # of a step of ELEMENTS, host time included


def costs(choice: Choice, mode: Mode, repeats: int = 25) -> Costs:
    # What an earlier mode had must be gone: cycles, and what a GPU gives back later.
    gc.collect()
    mx.synchronize()
    time.sleep(0.5)
    elements = ELEMENTS[mx.default_device().type]
    gradients = {"w": mx.random.normal((elements,)).astype(mode.dtype)}
    mx.eval(gradients)
    mx.synchronize()
    time.sleep(0.1)  # the memory of what was cast goes back a moment later
    before = mx.get_active_memory()
    parameters = {"w": mx.random.normal((elements,)).astype(mode.dtype)}
    optimizer = choice.make(1e-3, **mode.options)
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        parameters = optimizer.apply_gradients(gradients, parameters)
        mx.eval(parameters, optimizer.state)
        times.append(1e3 * (time.perf_counter() - start))
    mx.synchronize()  # what is done with is let go of a moment after mx.eval
    held = mx.get_active_memory() - before
    return Costs(round(held / elements, 2), statistics.median(times[2:]))


# ---- Report ------------------------------------------------------------------------


@dataclass
class Row:
    mode: str
    costs: Costs
    losses: dict[str, float]  # by task


def table_of(run: dict[str, Any]) -> list[list[str]]:
    reference = next((row for row in run["rows"] if row["mode"] == "float32"), None)
    lines = []
    for row in run["rows"]:
        line = [
            row["mode"],
            f"{row['costs']['bytes_a_parameter']:g}",
            f"{row['costs']['milliseconds']:.2f}",
        ]
        for task, loss in row["losses"].items():
            line.append(f"{loss:.4f}")
            if reference:
                line.append(f"{loss - reference['losses'][task]:+.4f}")
        lines.append(line)
    return lines


def options_of(run: dict[str, Any]) -> list[list[str]]:
    return [
        [name, f"{costs['bytes_a_parameter']:g}", f"{costs['milliseconds']:.2f}"]
        for name, costs in run["options"].items()
    ]


def markdown(heads: list[str], lines: list[list[str]]) -> list[str]:
    rows = [heads, *lines]
    rows.insert(1, ["---", *["---:"] * (len(heads) - 1)])
    return ["| " + " | ".join(row) + " |" for row in rows]


def headings(run: dict[str, Any]) -> list[str]:
    found = ["", "bytes a parameter", f"ms a step of {run['elements'] // 2**20}M"]
    for task in run["rows"][0]["losses"]:
        found += [f"{task}: loss", "against float32"]
    return found


def with_costs(run: dict[str, Any], other: dict[str, Any]) -> dict[str, Any]:
    """The losses of one run with the costs of another."""
    costs = {row["mode"]: row["costs"] for row in other["rows"]}
    return {
        **run,
        "rows": [{**row, "costs": costs[row["mode"]]} for row in run["rows"]],
        "elements": other["elements"],
        "options": other["options"],
        "costs_of": _where(other),
    }


def _where(run: dict[str, Any]) -> str:
    return f"{run['machine']}, MLX {run['mlx']}, {run['date']}"


def write(run: dict[str, Any]) -> None:
    """The table in docs/precision.md, renewed."""
    million = f"{run['elements'] // 2**20}M"
    costs = f" Bytes and times: {run['costs_of']}." if "costs_of" in run else ""
    lines = [
        f"Losses of {run['steps']} steps: {_where(run)}.{costs}",
        "",
        *markdown(headings(run), table_of(run)),
        "",
        f"A step of {million} float32 parameters, there:",
        "",
        *markdown(["", "bytes a parameter", "ms"], options_of(run)),
        "",
    ]
    text = REPORT.read_text()
    first, last = (mark.format(run["optimizer"]) for mark in MARKS)
    begin, end = text.index(first) + len(first), text.index(last)
    REPORT.write_text(text[:begin] + "\n" + "\n".join(lines) + "\n" + text[end:])


def machine() -> str:
    if mx.default_device().type == mx.gpu:
        return str(mx.device_info().get("device_name", "a GPU"))
    return f"{timing.processor()}, {os.cpu_count()} cores"


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--optimizer", choices=CHOICES, default="sgd")
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--modes", nargs="+", help="by default all of the optimizer's")
    parser.add_argument("--json", type=Path)
    either = parser.add_mutually_exclusive_group()
    either.add_argument("--write", action="store_true", help="renew the table of docs/precision.md")
    either.add_argument("--costs", action="store_true", help="weigh and time only, train nothing")
    parser.add_argument("--recorded", type=Path, help="write that run of --json into the docs")
    parser.add_argument("--costs-of", type=Path, help="with the costs of that run of --json")
    options = parser.parse_args(arguments)
    if options.recorded:
        run = json.loads(options.recorded.read_text())
        if options.costs_of:
            run = with_costs(run, json.loads(options.costs_of.read_text()))
        write(run)
        return
    if options.costs_of:
        parser.error("--costs-of: got no --recorded, allowed with it only")
    choice = CHOICES[options.optimizer]
    names = options.modes or list(choice.modes)
    if unknown := set(names) - choice.modes.keys():
        parser.error(
            f"--modes: got {', '.join(sorted(unknown))}, allowed {', '.join(choice.modes)}"
        )
    if not 20 <= options.steps <= 100_000:
        parser.error(f"--steps out of range: got {options.steps}, allowed 20 to 100000")
    console = Console()
    costs(choice, choice.modes["float32"])  # what a device does at its first step only
    rows = []
    tasks = [] if options.costs else [digits(), characters()]
    if tasks and passages.files():
        tasks.append(topics())
    for name in names:
        mode = choice.modes[name]
        cost = costs(choice, mode)
        losses = {task.name: train(task, choice, mode, options.steps) for task in tasks}
        rows.append(asdict(Row(name, cost, losses)))
        if tasks:
            console.print(rows[-1])
    run = {
        "optimizer": options.optimizer,
        "machine": machine(),
        "mlx": mx.__version__,
        "date": date.today().isoformat(),
        "steps": options.steps,
        "elements": ELEMENTS[mx.default_device().type],
        "rows": rows,
        "options": {name: asdict(costs(choice, m)) for name, m in choice.options.items()},
    }
    table = Table(*headings(run), title="bfloat16 against float32")
    for line in table_of(run):
        table.add_row(*line)
    console.print(table)
    for line in options_of(run):
        console.print(*line)
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(run, indent=2) + "\n")
    if options.write:
        write(run)


if __name__ == "__main__":
    main()
