"""Train a small transformer on characters with AdamW, and with Muon and AdamW for the others.

    python bench/muon_training.py [--steps N] [--svg docs/optimizers/muon.svg]

The task is that of bench/tasks.py, with shorter texts: the same weights to begin with, the same
batches, for each of a few learning rates; the best of each is drawn, by the loss on held-out text.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import mlx.core as mx
import mlx.nn as nn
import mlx_fused_optim as optim
import tasks

EVERY = 25  # steps from a look at the held-out text to the next


class Run(NamedTuple):
    title: str
    losses: list[tuple[int, float]]
    seconds: float  # of its steps


def scheduled(rate: float, steps: int) -> optim.Schedule:
    return optim.warmup(optim.cosine_decay(rate, steps), steps // 20)


def adamw(rate: float, steps: int) -> optim.FusedOptimizer:
    return optim.AdamW(scheduled(rate, steps), bias_correction=True, clip_norm=1.0)


def muon(rate: float, steps: int) -> optim.FusedOptimizer:
    return optim.Muon(
        scheduled(rate, steps),
        weight_decay=0.0,
        clip_norm=1.0,
        others=optim.AdamW(scheduled(2e-3, steps), bias_correction=True),
        # Hidden layers are Muon's alone.
        others_filter=lambda path, array: array.ndim < 2 or not path.startswith("blocks"),
    )


RUNS: dict[str, tuple[Callable[[float, int], optim.FusedOptimizer], tuple[float, ...]]] = {
    "AdamW": (adamw, (2e-3, 5e-3, 1e-2)),
    "Muon, others AdamW": (muon, (1e-2, 2e-2, 5e-2)),
}


def train(title: str, optimizer: optim.FusedOptimizer, task: tasks.Task, steps: int) -> Run:
    mx.random.seed(0)
    model = task.model()
    loss_and_gradients = nn.value_and_grad(model, tasks.loss_of)
    losses, seconds = [], 0.0
    for step in range(steps + 1):
        if step % EVERY == 0 or step == steps:
            held_out = (tasks.loss_of(model, x, y).item() for x, y in task.held_out[:4])
            losses.append((step, statistics.mean(held_out)))
        start = time.perf_counter()
        _, gradients = loss_and_gradients(model, *task.batch(step))
        optimizer.update(model, gradients)
        mx.eval(model.parameters(), optimizer.state)
        seconds += time.perf_counter() - start
    print(f"{title}: {losses[-1][1]:.4f} in {seconds:.0f} s", flush=True)
    return Run(title, losses, seconds)


# ---- The picture -------------------------------------------------------------------------

WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM, LINE = 720, 260, 52, 14, 12, 32, 17
COLOURS = ("#c8553d", "#0b62a4")
TEXT = 'font-family="sans-serif" font-size="11" fill="#444"'


def picture(runs: list[Run]) -> str:
    """An SVG document: a curve for each, from the first look after the beginning on."""
    steps = runs[0].losses[-1][0]
    runs = [run._replace(losses=run.losses[1:]) for run in runs]
    values = [loss for run in runs for _, loss in run.losses]
    low, high = min(values), max(values)
    bottom = HEIGHT - BOTTOM

    def at(step: float, loss: float) -> tuple[str, str]:
        x = LEFT + (WIDTH - LEFT - RIGHT) * step / steps
        y = bottom - (bottom - TOP) * (loss - low) / (high - low)
        return f"{x:.1f}", f"{y:.1f}"

    height = HEIGHT + LINE * len(runs)
    lines: list[Any] = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" {TEXT}>',
        f'<rect width="{WIDTH}" height="{height}" fill="#fff"/>',
    ]
    for part in range(5):
        loss, step = low + (high - low) * part / 4, steps * part / 4
        x, y = at(step, loss)
        lines.append(f'<path d="M{LEFT} {y}H{WIDTH - RIGHT}" stroke="#ddd"/>')
        lines.append(f'<text x="{LEFT - 6}" y="{y}" text-anchor="end">{loss:.2f}</text>')
        lines.append(f'<text x="{x}" y="{bottom + 16}" text-anchor="middle">{step:g}</text>')
    for number, (run, colour) in enumerate(zip(runs, COLOURS, strict=True)):
        points = " ".join(",".join(at(*point)) for point in run.losses)
        lines.append(
            f'<polyline points="{points}" fill="none" stroke="{colour}" stroke-width="2"/>'
        )
        y = HEIGHT + LINE * number
        shown = f"{run.title}: {run.losses[-1][1]:.3f} after {steps} steps"
        lines.append(f'<text x="{LEFT}" y="{y + 6}" fill="{colour}">{shown}</text>')
    return "\n".join([*lines, "</svg>", ""])


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--svg", type=Path, default=Path("docs/optimizers/muon.svg"))
    chosen = parser.parse_args()
    task, best = tasks.characters(context=32, size=8), []
    for name, (make, rates) in RUNS.items():
        runs = [
            train(f"{name}, rate {rate:g}", make(rate, chosen.steps), task, chosen.steps)
            for rate in rates
        ]
        best.append(min(runs, key=lambda run: run.losses[-1][1]))
    chosen.svg.write_text(picture(best))
    print(f"Written: {chosen.svg}.")


if __name__ == "__main__":
    main()
