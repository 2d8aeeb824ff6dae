"""Pictures of schedules: with matplotlib, or as text in the terminal."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import mlx.core as mx

from ._checks import as_length

if TYPE_CHECKING:
    from ._schedule import Schedule

# More points than this, and no screen shows the difference.
_MOST_POINTS = 2000
# Braille characters are a grid of 2 by 4 dots each: the bit of each dot, row by row.
_BRAILLE = 0x2800
_DOTS = ((0x01, 0x08), (0x02, 0x10), (0x04, 0x20), (0x40, 0x80))


def sampled(
    schedule: Schedule, steps: int, most: int = _MOST_POINTS
) -> tuple[list[int], list[float]]:
    """Up to ``most`` steps, evenly from 0 to ``steps`` - 1, and the values there."""
    count = min(steps, most)
    at = [i * (steps - 1) // max(count - 1, 1) for i in range(count)]
    values: Any = schedule(mx.array(at, mx.uint64)).tolist()
    return at, values


def plot(schedule: Schedule, steps: int, ax: Any = None) -> Any:
    steps = as_length("plot", "steps", steps)
    try:
        from matplotlib import pyplot
    except ImportError as error:
        raise ImportError(
            "[plot] matplotlib is not installed: pip install 'mlx-fused-optim[plot]'; "
            "python -m mlx_fused_optim.schedules draws in the terminal without it."
        ) from error
    if ax is None:
        _, ax = pyplot.subplots(figsize=(7, 3), layout="constrained")
    ax.plot(*sampled(schedule, steps), drawstyle="steps-post" if steps <= 50 else "default")
    ax.set_xlabel("step")
    ax.set_title(repr(schedule), fontsize="small", wrap=True)
    ax.margins(x=0)
    ax.grid(alpha=0.3)
    return ax


def as_text(schedule: Schedule, steps: int, width: int = 72, height: int = 16) -> str:
    """The schedule as lines of text: a curve in braille dots, with its scales.

    Args:
        schedule (Schedule): What to draw.
        steps (int): How many steps, from step 0.
        width (int): Characters of the curve across. Default: ``72``.
        height (int): Lines of the curve. Default: ``16``.
    """
    import math

    columns, rows = 2 * width, 4 * height
    at, values = sampled(schedule, steps, 4 * columns)
    shown = [value for value in values if math.isfinite(value)]
    low, high = min(shown, default=0.0), max(shown, default=0.0)
    if low > 0 and (low < high / 2 or low == high):
        low = 0.0
    span = (high - low) or 1.0
    cells = [[0] * width for _ in range(height)]

    def dot(column: int, row: int) -> None:
        cells[row // 4][column // 2] |= _DOTS[row % 4][column % 2]

    last = None
    for step, value in zip(at, values, strict=True):
        if not math.isfinite(value):
            last = None
            continue
        column = step * (columns - 1) // max(steps - 1, 1)
        row = round((high - value) / span * (rows - 1))
        # A steep part is a column of dots, not a gap.
        near = row if last is None else last
        for between in range(min(row, near), max(row, near) + 1):
            dot(column, between)
        last = row

    labels = {0: f"{high:.4g}", height - 1: f"{low:.4g}"}
    margin = max(map(len, labels.values()))
    lines = [
        f"{labels.get(number, ''):>{margin}} ┤" + "".join(chr(_BRAILLE + cell) for cell in line)
        for number, line in enumerate(cells)
    ]
    axis = f"{'0':<{width // 2}}{steps - 1:>{width - width // 2}}"
    return "\n".join([*lines, " " * margin + " └" + "─" * width, " " * (margin + 2) + axis])
