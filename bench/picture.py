"""The picture of README.md: a step of ours beside its peers, from the runs in bench/results.

Written by bench/report.py. The file depends on the recorded numbers alone, so a test can compare
it byte for byte.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

PICTURE = Path(__file__).parent.parent / "docs" / "benchmarks.svg"
COLUMNS = {
    "h100-adamw-float32": "NVIDIA H100, AdamW",
    "h100-sgd-float32": "NVIDIA H100, SGD",
    "linux-2-cores-adamw": "2 CPU cores, AdamW",
    "linux-2-cores": "2 CPU cores, SGD",
}
PEERS = {
    "ours": "#c1440e",
    "mlx compiled": "#5b7c99",
    "torch fused": "#93a9bc",
    "optax jit": "#c3ced8",
}
SELDOM = {"optax jit"}  # left out of runs that have little time
LEFT, COLUMN, LONGEST = 12, 176, 118  # the longest bar of a group, before its number
TOP, ROW, BAR = 74, 82, 13
WIDTH = LEFT + COLUMN * len(COLUMNS)
# On a dark page the words are light; the bars stand out on both.
STYLE = (
    "<style>svg{fill:#24292f}.quiet{fill:#6b747d}.head{font-weight:600}"
    "@media(prefers-color-scheme:dark){svg{fill:#d7dde3}.quiet{fill:#9aa5b0}}</style>"
)


def steps(run: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """What a run has timed by the name of the work, but for steps in a training step."""
    return {r["name"]: r for r in run["results"] if r["kind"] == "step"}


def works(runs: dict[str, dict[str, Any]]) -> dict[str, str]:
    """Names and titles of what every run of the picture has timed, wins and losses alike."""
    timed = [
        {
            name: result["title"]
            for name, result in steps(runs[column]).items()
            if PEERS.keys() - SELDOM <= result["candidates"].keys()
        }
        for column in COLUMNS
    ]
    return {name: title for name, title in timed[0].items() if all(name in t for t in timed)}


def draw(runs: dict[str, dict[str, Any]]) -> str:
    rows = works(runs)
    height = TOP + ROW * len(rows) + 4
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" '
        f'width="{WIDTH}" height="{height}" font-family="sans-serif" font-size="12">',
        STYLE,
        f'<text x="{LEFT}" y="18" class="head">One optimizer step in float32, milliseconds: '
        "shorter is better</text>",
    ]
    x = LEFT
    for peer, colour in PEERS.items():
        lines.append(f'<rect x="{x}" y="28" width="10" height="10" fill="{colour}"/>')
        lines.append(f'<text x="{x + 14}" y="37">{peer}</text>')
        x += 36 + 7 * len(peer)
    for column, (name, title) in enumerate(COLUMNS.items()):
        x = LEFT + COLUMN * column
        lines.append(f'<text x="{x}" y="62" class="head">{title}</text>')
        results = steps(runs[name])
        for row, work in enumerate(rows):
            lines += _group(results[work]["candidates"], x, TOP + ROW * row + 18)
    for row, title in enumerate(rows.values()):
        lines.append(f'<text x="{LEFT}" y="{TOP + ROW * row + 11}" class="quiet">{title}</text>')
    return "\n".join([*lines, "</svg>", ""])


def _group(times: dict[str, Any], x: int, y: int) -> list[str]:
    """Bars on a scale of their own, the shortest in bold."""
    medians = {peer: times[peer]["median_ms"] for peer in PEERS if peer in times}
    lines = []
    for number, (peer, median) in enumerate(medians.items()):
        top = y + BAR * number
        width = LONGEST * median / max(medians.values())
        bold = ' font-weight="700"' if median == min(medians.values()) else ""
        lines.append(
            f'<rect x="{x}" y="{top}" width="{width:.1f}" height="{BAR - 2}" fill="{PEERS[peer]}"/>'
        )
        lines.append(f'<text x="{x + width + 4:.1f}" y="{top + 10}"{bold}>{median:.2f}</text>')
    return lines
