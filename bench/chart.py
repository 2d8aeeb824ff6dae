"""A bar chart of a run: one panel for each set of shapes."""

from __future__ import annotations

from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

OURS, OTHERS, INK = "#c1440e", "#b8c4cf", "#222222"


def draw(run: dict, path: Path) -> None:
    results = run["results"]
    columns = min(2, len(results))
    rows = -(-len(results) // columns)
    tallest = max(len(result["candidates"]) for result in results)
    figure, grid = plt.subplots(
        rows,
        columns,
        figsize=(5.6 * columns, (0.26 * tallest + 0.7) * rows + 0.7),
        squeeze=False,
        layout="constrained",
    )
    panels = list(grid.flat)
    for axes, result in zip(panels, results, strict=False):
        _panel(axes, result)
    for axes in panels[len(results) :]:
        axes.set_axis_off()
    device = run["machine"].get("gpu") or (
        f"{run['machine']['processor']}, {run['machine']['cores']} cores"
    )
    figure.suptitle(
        f"One optimizer step, host time included: median milliseconds, less is better\n"
        f"{device}, {run['optimizer']}, {run['dtype']}, "
        f"MLX {run['versions']['mlx']}, {run['date']}",
        fontsize=10,
        color=INK,
        x=0.01,
        ha="left",
    )
    figure.savefig(path, dpi=150)
    plt.close(figure)


def _panel(axes: plt.Axes, result: dict) -> None:
    ranked = sorted(result["candidates"].items(), key=lambda item: -item[1]["median_ms"])
    medians = [time["median_ms"] for _, time in ranked]
    for y, (name, time) in enumerate(ranked):
        colour = OURS if name.startswith("ours") else OTHERS
        median = time["median_ms"]
        axes.barh(y, median, color=colour, height=0.72)
        # The quartiles, as a thin line on the bar's end.
        axes.plot([time["low_ms"], time["high_ms"]], [y, y], color=INK, linewidth=1)
        end = max(median, time["high_ms"])
        axes.annotate(
            f"{median:.3g}",
            (end, y),
            (4, 0),
            textcoords="offset points",
            va="center",
            fontsize=8,
            color=INK,
        )
    axes.set_yticks(range(len(ranked)), [name for name, _ in ranked], fontsize=8, color=INK)
    axes.set_xlim(0, 1.12 * max(*medians, *(time["high_ms"] for _, time in ranked)))
    axes.set_xticks([])
    axes.tick_params(length=0)
    axes.spines[["top", "right", "bottom", "left"]].set_visible(False)
    axes.set_title(result["title"], loc="left", fontsize=9, color=INK)
