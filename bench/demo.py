"""Train a small network on handwritten digits, with MLX's SGD and with the fused one.

    python bench/demo.py [--epochs N] [--seed N] [--learning-rate F] [--decay-rate F]

Both runs start from the same weights and see the same batches in the same order. The
digits are the 1797 real scans that scikit-learn ships: nothing is downloaded.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers
import mlx_fused_optim
import numpy as np

try:
    import matplotlib
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
    from rich.table import Table
    from sklearn.datasets import load_digits
except ImportError as error:
    sys.exit(f"[demo] a package is missing: {error}; pip install 'mlx-fused-optim[bench]'")

MOMENTUM = 0.9
WEIGHT_DECAY = 1e-4
BATCH = 64
TEST_IMAGES = 360  # a fifth of them


class Network(nn.Module):
    """Blocks of a layer normalisation and a linear layer, each added to its input."""

    def __init__(self, pixels: int = 64, width: int = 128, blocks: int = 6, classes: int = 10):
        super().__init__()
        self.first = nn.Linear(pixels, width)
        self.blocks = [
            nn.Sequential(nn.LayerNorm(width), nn.Linear(width, width), nn.ReLU())
            for _ in range(blocks)
        ]
        self.last = nn.Linear(width, classes)

    def __call__(self, x: mx.array) -> mx.array:
        x = self.first(x)
        for block in self.blocks:
            x = x + block(x)
        return self.last(x)


@dataclass
class Digits:
    images: mx.array
    labels: mx.array
    test_images: mx.array
    test_labels: mx.array


class Training:
    """One network in training, and what was seen on the way."""

    def __init__(self, name: str, optimizer: mlx.optimizers.Optimizer, seed: int):
        before = mx.get_active_memory()
        mx.random.seed(seed)
        self.name = name
        self.model = Network()
        self.optimizer = optimizer
        optimizer.init(self.model.trainable_parameters())
        self.state = [self.model.state, optimizer.state]
        mx.eval(self.state)
        self.losses: list[float] = []
        self.rates: list[float] = []
        self.milliseconds: list[float] = []
        self.held_bytes = mx.get_active_memory() - before
        self.most_new_bytes = 0  # in a step, beyond what the training holds
        self._step = mx.compile(self._eager_step, inputs=self.state, outputs=self.state)

    def _eager_step(self, images: mx.array, labels: mx.array) -> mx.array:
        def loss_of(model: Network) -> mx.array:
            return nn.losses.cross_entropy(model(images), labels, reduction="mean")

        loss, gradients = nn.value_and_grad(self.model, loss_of)(self.model)
        self.optimizer.update(self.model, gradients)
        return loss

    def step(self, images: mx.array, labels: mx.array) -> None:
        before = mx.get_active_memory()
        mx.reset_peak_memory()
        start = time.perf_counter()
        loss = self._step(images, labels)
        mx.eval(loss, self.state)
        self.milliseconds.append(1e3 * (time.perf_counter() - start))
        self.most_new_bytes = max(self.most_new_bytes, mx.get_peak_memory() - before)
        self.losses.append(loss.item())
        self.rates.append(self.optimizer.learning_rate.item())

    def accuracy(self, images: mx.array, labels: mx.array) -> float:
        return mx.mean(mx.argmax(self.model(images), axis=1) == labels).item()


def load_data(seed: int) -> Digits:
    digits = load_digits()
    order = np.random.default_rng(seed).permutation(len(digits.target))
    images = mx.array((digits.data[order] / 16.0).astype(np.float32))
    labels = mx.array(digits.target[order].astype(np.uint32))
    n = TEST_IMAGES
    return Digits(images[n:], labels[n:], images[:n], labels[:n])


def batches(count: int, seed: int) -> list[mx.array]:
    """The image numbers of every batch of an epoch; an incomplete last one is left out."""
    order = np.random.default_rng(seed).permutation(count).astype(np.uint32)
    return [mx.array(order[i : i + BATCH]) for i in range(0, count - count % BATCH, BATCH)]


def train_in_turns(
    trainings: list[Training], data: Digits, epochs: int, seed: int, progress: Progress
) -> None:
    """An epoch of one, the same epoch of the other: a drift of the clock falls on both."""
    orders = [batches(len(data.labels), seed + epoch) for epoch in range(epochs)]
    tasks = [
        progress.add_task(training.name, total=epochs * len(orders[0]), loss=float("nan"))
        for training in trainings
    ]
    for order in orders:
        for training, task in zip(trainings, tasks, strict=True):
            for numbers in order:
                images, labels = data.images[numbers], data.labels[numbers]
                mx.eval(images, labels)
                training.step(images, labels)
                progress.update(task, advance=1, loss=training.losses[-1])


# ---- Report ---------------------------------------------------------------------


def compared(first: Training, second: Training) -> str:
    """In words, whether two trainings took the same path."""
    a, b = np.array(first.losses), np.array(second.losses)
    unequal = np.flatnonzero(a != b)
    if len(unequal) == 0:
        return f"All {len(a)} losses are equal to the bit."
    text = (
        f"The losses are equal to the bit for {unequal[0]} steps; after that they differ by "
        f"{np.abs(a - b).max():.1e} at most."
    )
    ours, theirs = np.array(second.rates), np.array(first.rates)
    if (ours != theirs).any():
        text += (
            f" The learning rates differ by {np.abs(theirs / ours - 1).max():.1e} (relative) at "
            "most: MLX takes the power of a rounded decay rate. With --decay-rate 1 they are "
            "the same."
        )
    return text


def summary(trainings: list[Training], data: Digits) -> Table:
    table = Table(title="Handwritten digits: the same weights and batches for both")
    table.add_column("SGD of", no_wrap=True)
    for title in ("final\nloss", "test\naccuracy", "ms a step\n(median)", "peak\nmemory"):
        table.add_column(title, justify="right")
    for training in trainings:
        peak = training.held_bytes + training.most_new_bytes
        table.add_row(
            training.name,
            f"{training.losses[-1]:.6f}",
            f"{training.accuracy(data.test_images, data.test_labels):.2%}",
            f"{statistics.median(training.milliseconds):.2f}",
            f"{peak / 2**20:.2f} MiB",
        )
    return table


def draw(trainings: list[Training], path: Path) -> None:
    """Both loss curves and the learning rate, over the steps."""
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    ink, quiet = "#222222", "#8a8a8a"
    looks: list[dict[str, Any]] = [
        {"color": "#9ecae1", "linewidth": 4.5, "solid_capstyle": "round"},
        {"color": "#c1440e", "linewidth": 1.3},
    ]
    plt.rcParams.update({"font.size": 10, "text.color": ink, "axes.labelcolor": quiet})
    figure, (top, bottom) = plt.subplots(
        2, 1, figsize=(8, 5.6), sharex=True, height_ratios=[3, 1], constrained_layout=True
    )
    for training, look in zip(trainings, looks, strict=True):
        steps = np.arange(1, len(training.losses) + 1)
        # A running mean over 20 batches: single batches of 64 hide the curve.
        width = min(20, len(training.losses))
        smooth = np.convolve(training.losses, np.ones(width) / width, mode="valid")
        top.plot(steps[width - 1 :], smooth, label=training.name, **look)
        bottom.plot(steps, training.rates, **look)
    top.set_yscale("log")
    top.yaxis.set_major_formatter("{x:g}")
    top.yaxis.set_minor_formatter("")
    top.set_title(
        "Training loss on handwritten digits (mean of 20 batches)", loc="left", fontsize=12
    )
    top.legend(frameon=False, loc="upper right")
    bottom.set_title("Learning rate", loc="left", fontsize=10)
    bottom.set_ylim(bottom=0)
    bottom.set_xlabel("step")
    for axes in (top, bottom):
        axes.spines[["top", "right"]].set_visible(False)
        axes.spines[["left", "bottom"]].set_color("#cccccc")
        axes.tick_params(colors=quiet, which="both", length=0)
        axes.margins(x=0.01)
        axes.grid(axis="y", color="#eeeeee")
        axes.set_axisbelow(True)
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
    parser.add_argument("--epochs", type=int, default=30)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--learning-rate", type=float, default=0.05, help="at the first step")
    parser.add_argument("--decay-rate", type=float, default=0.995, help="factor a step")
    parser.add_argument(
        "--schedule",
        type=schedule_of,
        metavar="TEXT",
        help='instead of both, any schedule: "warmup(cosine_decay(0.1, 660), 100)"',
    )
    parser.add_argument("--output", type=Path, default=Path("out/demo.png"), metavar="PNG")
    options = parser.parse_args(arguments)
    if options.epochs < 1:
        parser.error(f"--epochs too small: got {options.epochs}, allowed 1 or more")
    return options


def main(arguments: list[str] | None = None) -> None:
    options = parse(arguments)
    console = Console()
    data = load_data(options.seed)
    trainings = []
    for module in (mlx.optimizers, mlx_fused_optim):
        # MLX calls a schedule of ours like any other callable.
        schedule = options.schedule or module.exponential_decay(
            options.learning_rate, options.decay_rate
        )
        optimizer = module.SGD(schedule, momentum=MOMENTUM, weight_decay=WEIGHT_DECAY)
        trainings.append(Training(module.__name__, optimizer, options.seed))
    columns = (
        TextColumn("{task.description:15}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("loss {task.fields[loss]:.4f}"),
    )
    with Progress(*columns, console=console) as progress:
        train_in_turns(trainings, data, options.epochs, options.seed, progress)
    draw(trainings, options.output)
    console.print(summary(trainings, data))
    console.print(compared(*trainings))
    console.print(f"The curves are in {options.output}.")


if __name__ == "__main__":
    main()
