"""Train a small transformer with AdamW of MLX and with the fused one, and say what each costs.

    python bench/demo.py [--task digits] [--steps N] [--seed N] [--schedule TEXT]

The trainings start from the same weights, see the same batches and take turns, step by step. The
gradients are evaluated before the update, so that the optimizer's time and memory are its own. The
text is the Python manual's, which every Python ships: nothing is downloaded.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers
import mlx_fused_optim
import numpy as np
import tasks
from mlx.utils import tree_flatten

try:
    import matplotlib
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
    from rich.table import Table
except ImportError as error:
    sys.exit(f"[demo] a package is missing: {error}; pip install 'mlx-fused-optim[bench]'")

TASKS: dict[str, Callable[[], tasks.Task]] = {
    # Many small tensors, whose steps cost more time than arithmetic.
    "characters": lambda: tasks.characters(context=32, size=2, width=32, layers=8),
    "digits": tasks.digits,
}
WARM = 5  # steps that are not timed: kernels are compiled, arenas packed


# ---- Training ----------------------------------------------------------------------


class Training:
    """A model in training, and what was seen on the way."""

    def __init__(
        self, name: str, task: tasks.Task, optimizer: Any, seed: int, compiled: bool = False
    ):
        mx.random.seed(seed)
        self.name = name
        self.model = task.model()
        self.optimizer = optimizer
        optimizer.init(self.model.trainable_parameters())
        self.state = [self.model.state, optimizer.state]
        mx.eval(self.state)
        self.update = self._update
        if compiled:
            self.update = mx.compile(self._update, inputs=self.state, outputs=self.state)
        self.loss_and_gradients = nn.value_and_grad(self.model, tasks.loss_of)
        self.losses: list[float] = []
        self.rates: list[float] = []
        self.gradients_ms: list[float] = []
        self.optimizer_ms: list[float] = []
        self.new_bytes = 0  # of an update, at most, beyond what there was before it

    def _update(self, gradients: Any) -> None:
        self.optimizer.update(self.model, gradients)

    def step(self, x: mx.array, y: mx.array) -> None:
        start = time.perf_counter()
        loss, gradients = self.loss_and_gradients(self.model, x, y)
        mx.eval(loss, gradients)
        between = time.perf_counter()
        before = mx.get_active_memory()
        mx.reset_peak_memory()
        self.update(gradients)
        del gradients
        mx.eval(self.state)
        end = time.perf_counter()
        if len(self.losses) >= WARM:
            self.gradients_ms.append(1e3 * (between - start))
            self.optimizer_ms.append(1e3 * (end - between))
            self.new_bytes = max(self.new_bytes, mx.get_peak_memory() - before)
        self.losses.append(loss.item())
        self.rates.append(self.optimizer.learning_rate.item())

    def held_out(self, task: tasks.Task) -> float:
        return tasks.loss_of(self.model, *task.held_out[0]).item()

    @property
    def kept_bytes(self) -> int:
        return sum(array.nbytes for _, array in tree_flatten(self.optimizer.state))

    @property
    def own_ms(self) -> float:
        return statistics.median(self.optimizer_ms)


def train_in_turns(
    trainings: list[Training], task: tasks.Task, steps: int, console: Console
) -> None:
    """A step of one, the same step of the next: a drift of the clock falls on all."""
    columns = (
        TextColumn("{task.description:24}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("loss {task.fields[loss]:.4f}"),
    )
    with Progress(*columns, console=console) as progress:
        bars = [progress.add_task(t.name, total=steps, loss=float("nan")) for t in trainings]
        for step in range(steps):
            x, y = task.batch(step)
            mx.eval(x, y)
            for training, bar in zip(trainings, bars, strict=True):
                training.step(x, y)
                progress.update(bar, advance=1, loss=training.losses[-1])


# ---- Report ---------------------------------------------------------------------


def compared(ours: Training, theirs: Training) -> str:
    """In words, whether two trainings took the same path."""
    a, b = np.array(ours.losses), np.array(theirs.losses)
    unequal = np.flatnonzero(a != b)
    if len(unequal) == 0:
        return f"The same curve: all {len(a)} losses are equal to the bit."
    text = (
        f"The losses are equal to the bit for {unequal[0]} steps; after that they differ by "
        f"{np.abs(a - b).max():.1e} at most."
    )
    rates = np.array(ours.rates) / np.array(theirs.rates)
    if (rates != 1).any():
        text += f" The learning rates differ by {np.abs(rates - 1).max():.1e} (relative) at most."
    return text


def costs(ours: Training, others: list[Training], gradients_ms: float) -> str:
    """In words, what the update takes: its time, its share of a step, and its memory."""

    def time_of(training: Training) -> str:
        share = training.own_ms / (gradients_ms + training.own_ms)
        return f"{training.own_ms:.2f} ms, {share:.0%} of a step"

    text = f"The update takes {time_of(ours)}."
    for other in others:
        ratio = (gradients_ms + other.own_ms) / (gradients_ms + ours.own_ms)
        text += (
            f" With {other.name}: {time_of(other)}, so a whole step is {ratio:.2f} times as fast "
            "with ours."
        )
    there = " and ".join(f"{other.new_bytes / 2**20:.2f}" for other in others)
    return f"{text} New memory for an update: {ours.new_bytes / 2**20:.2f} MiB, there {there}."


def summary(trainings: list[Training], task: tasks.Task, gradients_ms: float) -> Table:
    arrays = [array for _, array in tree_flatten(trainings[0].model.trainable_parameters())]
    count = sum(array.size for array in arrays)
    table = Table(
        title=f"{task.name.capitalize()}: {len(arrays)} tensors, {count:,} parameters; forward and "
        f"backward {gradients_ms:.1f} ms"
    )
    table.add_column("AdamW of", no_wrap=True)
    for title in (
        "last\nloss", "held\nout", "update\nms", "of the\nstep", "state\nMiB", "new\nMiB"
    ):  # fmt: skip
        table.add_column(title, justify="right")
    for training in trainings:
        table.add_row(
            training.name,
            f"{training.losses[-1]:.4f}",
            f"{training.held_out(task):.4f}",
            f"{training.own_ms:.2f}",
            f"{training.own_ms / (gradients_ms + training.own_ms):.1%}",
            f"{training.kept_bytes / 2**20:.2f}",
            f"{training.new_bytes / 2**20:.2f}",
        )
    return table


def draw(trainings: list[Training], task: tasks.Task, gradients_ms: float, path: Path) -> None:
    """The loss curves, one above the other, and what a step is made of."""
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    ink, quiet, ours = "#222222", "#8a8a8a", "#c1440e"
    looks: list[dict[str, Any]] = [
        {"color": "#9ecae1", "linewidth": 5.5, "solid_capstyle": "round"},
        {"color": "#4a7ba6", "linewidth": 3.0, "solid_capstyle": "round"},
        {"color": ours, "linewidth": 1.3},
    ]
    plt.rcParams.update({"font.size": 10, "text.color": ink, "axes.labelcolor": quiet})
    figure, (top, bottom) = plt.subplots(
        2, 1, figsize=(8, 5.6), height_ratios=[3, 1], constrained_layout=True
    )
    for training, look in zip(trainings, looks, strict=True):
        # A running mean over batches: single ones hide the curve.
        width = min(20, len(training.losses))
        smooth = np.convolve(training.losses, np.ones(width) / width, mode="valid")
        top.plot(np.arange(width, len(training.losses) + 1), smooth, label=training.name, **look)
    top.set_title(f"Training loss on {task.name} (mean of 20 batches)", loc="left", fontsize=12)
    top.set_xlabel("step")
    top.legend(frameon=False, loc="upper right")
    for y, training in enumerate(reversed(trainings)):
        colour = ours if training is trainings[-1] else "#4a7ba6"
        bottom.barh(y, gradients_ms, color="#dddddd", height=0.7)
        bottom.barh(y, training.own_ms, left=gradients_ms, color=colour, height=0.7)
        end = gradients_ms + training.own_ms
        bottom.annotate(f" {training.own_ms:.2f} ms", (end, y), va="center", fontsize=9)
    bottom.set_yticks(range(len(trainings)), [t.name for t in reversed(trainings)])
    bottom.set_title(
        f"A step: forward and backward, {gradients_ms:.1f} ms, and the update", loc="left",
        fontsize=10,
    )  # fmt: skip
    bottom.set_xlim(0, 1.12 * max(gradients_ms + t.own_ms for t in trainings))
    for axes in (top, bottom):
        axes.spines[["top", "right"]].set_visible(False)
        axes.spines[["left", "bottom"]].set_color("#cccccc")
        axes.tick_params(colors=quiet, which="both", length=0)
    top.grid(axis="y", color="#eeeeee")
    top.set_axisbelow(True)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def schedule_of(text: str) -> mlx_fused_optim.Schedule:
    try:
        return mlx_fused_optim.parse_schedule(text)
    except (TypeError, ValueError) as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--task", choices=TASKS, default="characters")
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument(
        "--schedule",
        type=schedule_of,
        metavar="TEXT",
        help='instead of it, any schedule: "warmup(cosine_decay(0.002, 90), 10)"',
    )
    parser.add_argument("--output", type=Path, default=Path("out/demo.png"), metavar="PNG")
    options = parser.parse_args(arguments)
    if options.steps <= WARM:
        parser.error(f"--steps too small: got {options.steps}, allowed {WARM + 1} or more")
    return options


def main(arguments: list[str] | None = None) -> None:
    options = parse(arguments)
    console = Console()
    task = TASKS[options.task]()
    # MLX calls a schedule of ours like any other callable.
    rate = options.schedule or options.learning_rate
    mlx_eager, _, ours = trainings = [
        Training(name, task, module.AdamW(rate), options.seed, compiled)
        for name, module, compiled in (
            ("mlx.optimizers", mlx.optimizers, False),
            ("mlx.optimizers, compiled", mlx.optimizers, True),
            ("mlx_fused_optim", mlx_fused_optim, False),
        )
    ]
    train_in_turns(trainings, task, options.steps, console)
    # Forward and backward are the same work in all.
    gradients_ms = statistics.median(ms for t in trainings for ms in t.gradients_ms)
    draw(trainings, task, gradients_ms, options.output)
    console.print(summary(trainings, task, gradients_ms))
    console.print(compared(ours, mlx_eager))
    console.print(costs(ours, trainings[:-1], gradients_ms))
    console.print(f"The curves are in {options.output}.")


if __name__ == "__main__":
    main()
