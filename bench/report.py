"""Write docs/benchmarks.md, docs/medians.md and their picture from the runs in bench/results.

python bench/bench.py --json bench/results/NAME.json
python bench/report.py
"""

from __future__ import annotations

import json
from pathlib import Path

import picture

RESULTS = Path(__file__).parent / "results"
REPORT = Path(__file__).parent.parent / "docs" / "benchmarks.md"
MEDIANS = REPORT.with_name("medians.md")

# A load average above this, for each core, is somebody else's work.
BUSY = 0.5

INTRODUCTION = """\
# Benchmarks

<!-- Written by bench/report.py from bench/results/*.json: change those. -->

Whole steps, host time included: from the call until the last result is in memory (for MLX, until
`mx.eval` returns). Every candidate takes the same step (SGD: momentum 0.9, weight decay 1e-4;
AdamW: betas 0.9 and 0.999, bias correction, weight decay 1e-2, moments in the parameters' dtype;
both with an exponential decay of the learning rate) with parameters of its own, and may reuse the
memory of the old ones. Before it is timed, its result is compared with a float64 reference; a
candidate outside the error that its roundings allow is told, not timed. Candidates take turns of
a few steps each; medians, and the quartiles beside them. GB/s counts the bytes that a step cannot
do without: parameters and moments read and written, gradients read. In a training step, an
optimizer's share is what it adds to the gradients alone, turn by turn: the median of the
differences. "New memory" is what one step of MLX allocates beyond what is held before it, by
MLX's own counter.

"mlx" is `mlx.optimizers`, "torch" is `torch.optim`, "optax jit" is `optax.sgd` or `optax.adamw`
under `jax.jit` with donated parameters and state. "constant" is ours with a constant learning rate.
What a run leaves out, for time, is missing in its tables (optax, with hundreds of tensors). Tables
with a date of their own are of earlier code: of 2026-11-27 with a launch for each arena; "in
graphs", with every launch in a CUDA graph; "16 arenas", with twice as many arenas in a node.

Compare within a table. A process on the H100's host has one of two speeds, whatever it runs: on 448
tensors of 64 MLX's compiled SGD took 8.96 ms in one run and 12.70 in the next, ours 1.30 and 1.96.
And more candidates make a process slower: with nine of them, on 2026-11-25, torch's fused SGD took
1.74 ms on the LoRA of Llama-3.2-1B, with four 0.31. What a change of the code does is measured with
processes of both in turn ([CUDA](cuda.md)).

    make bench                                  # this machine; ARGS="--optimizer adamw"
    python bench/bench.py --json bench/results/NAME.json && python bench/report.py
"""


SUMMARY = """\
# Benchmarks at a glance

<!-- Written by bench/report.py from bench/results/*.json: change those. -->

Medians of whole steps, ms, host time included: momentum or AdamW, weight decay and a decaying
learning rate. The shortest time of a row is bold. [Benchmarks](benchmarks.md) says how it was
measured and has quartiles, GB/s and memory; `make bench` measures on your machine.

The picture has what all four of its runs have timed, each group on a scale of its own:

![Bars of a step's time, ours beside mlx compiled, torch fused and optax jit](benchmarks.svg)

Where we lose on a GPU to torch's fused kernels, it is with tens or hundreds of tensors, mostly in
SGD's steps, which are bound by the host: each arena, a sixteenth of a model, costs it time
([CUDA](cuda.md)). One tensor of 268M takes up to 4 % more than MLX's compiled step. An empty
cell was not measured in the run of its row. [Benchmarks](benchmarks.md) says which rows are of
earlier code.
"""


def report(runs: dict[str, dict]) -> str:
    return "\n".join([INTRODUCTION, *(_run(name, run) for name, run in runs.items())])


def load() -> dict[str, dict]:
    return {path.stem: json.loads(path.read_text()) for path in sorted(RESULTS.glob("*.json"))}


def medians(runs: dict[str, dict]) -> str:
    """A line for every work, wins and losses alike: the shortest time is bold."""
    lines = [
        SUMMARY,
        "| | ours | ours compiled | mlx compiled | torch fused | optax jit |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    peers = ("ours", "ours compiled", "mlx compiled", "torch fused", "optax jit")
    before = None
    for run in runs.values():
        heading = f"| **{_device(run)}, {_optimizer(run)}, {run['dtype']}** | | | | | |"
        if heading != before:  # runs of one kind are one part of the table
            lines.append(heading)
        before = heading
        for result in run["results"]:
            times = {p: result["candidates"].get(p, {}).get("median_ms") for p in peers}
            least = min(filter(None, times.values()))
            cells = [_cell(time, time == least) for time in times.values()]
            title = _in_training(result) if result["kind"] == "training" else result["title"]
            lines.append(f"| {title} | {' | '.join(cells)} |")
    return "\n".join([*lines, ""])


def _cell(time: float | None, bold: bool) -> str:
    text = "" if time is None else f"{time:.2f}"
    return f"**{text}**" if bold else text


def _device(run: dict) -> str:
    machine = run["machine"]
    return machine.get("gpu") or f"{machine['processor']}, {machine['cores']} cores"


def _optimizer(run: dict) -> str:
    # Runs of before there was a choice do not say it.
    return {"sgd": "SGD", "adamw": "AdamW"}[run.get("optimizer", "sgd")]


def _run(name: str, run: dict) -> str:
    machine, versions = run["machine"], run["versions"]
    packages = ", ".join(f"{package} {version}" for package, version in versions.items())
    lines = [
        f"## {_device(run)}, {_optimizer(run)}, {run['dtype']}, {run['date']}",
        "",
        f"{machine['system']}, {packages}. Load average at the start: "
        f"{machine['load']}. From `bench/results/{name}.json`.",
        "",
    ]
    if "copy_gb_s" in machine:
        lines += [f"A copy in the GPU's memory: {machine['copy_gb_s']} GB/s.", ""]
    if machine["load"] > BUSY * machine["cores"]:
        lines += [
            "**The machine was busy with other work.** Times are too long, and longest for "
            "those whose threads wait for each other (torch, optax): such a run shows that "
            "the benchmark works, not who is faster.",
            "",
        ]
    for result in run["results"]:
        lines += _training(result) if result["kind"] == "training" else _step(result)
    return "\n".join(lines)


def _step(result: dict) -> list[str]:
    times = result["candidates"]
    date = f", {result['date']}" if "date" in result else ""  # of another run than the others
    lines = [f"### {result['title']} ({result['elements']:,} elements){date}", ""]
    lines += ["| | ms | quartiles | GB/s | new memory |", "| --- | ---: | ---: | ---: | ---: |"]
    for name, time in _ranked(times):
        rate = f"{result['least_bytes'] / time['median_ms'] / 1e6:.1f}"
        memory = _memory(time["new_bytes"]) if "new_bytes" in time else ""
        lines.append(f"| {name} | {_times(time)} | {rate} | {memory} |")
    lines += ["", *(f"- {line}" for line in _ratios(times)), ""]
    lines += [f"Left out: {error}\n" for error in result["wrong"].values()]
    return lines


def _training(result: dict) -> list[str]:
    times = result["candidates"]
    lines = [f"### {_in_training(result)}", ""]
    lines += ["| | ms | quartiles | the optimizer's share, ms | quartiles |"]
    lines += ["| --- | ---: | ---: | ---: | ---: |"]
    for name, time in _ranked(times):
        share = _times(time["share"]) if "share" in time else " | "
        lines.append(f"| {name} | {_times(time)} | {share} |")
    return [*lines, ""]


def _in_training(result: dict) -> str:
    title = result["title"]
    return title if "training" in title else f"{title}, in a training step"


def _ranked(times: dict) -> list[tuple[str, dict]]:
    return sorted(times.items(), key=lambda item: item[1]["median_ms"])


def _times(time: dict) -> str:
    return f"{time['median_ms']:.3f} | {time['low_ms']:.3f} - {time['high_ms']:.3f}"


def _memory(count: int) -> str:
    return f"{count / 2**20:.1f} MiB" if count >= 2**16 else f"{count} bytes"


def _ratios(times: dict) -> list[str]:
    """The claims to check, in words: against each peer, and what the schedule costs."""

    def median(name: str) -> float | None:
        return times[name]["median_ms"] if name in times else None

    ours = [m for m in (median("ours"), median("ours compiled")) if m]
    if not ours:
        return []
    best = min(ours)
    others = [
        f"{time['median_ms'] / best:.2f} of {name}"
        for name, time in _ranked(times)
        if not name.startswith("ours")
    ]
    lines = []
    if others:
        lines.append(f"Times of the others as multiples of our best: {', '.join(others)}.")
    for name in ("ours", "ours compiled"):
        scheduled, constant = median(name), median(f"{name} constant")
        if scheduled and constant:
            lines.append(f"Scheduled against constant rate, {name}: {scheduled / constant:.2f}.")
    return lines


def written(runs: dict[str, dict]) -> dict[Path, str]:
    """The files, and what is to be in them."""
    return {
        REPORT: report(runs),
        MEDIANS: medians(runs),
        picture.PICTURE: picture.draw(runs),
    }


if __name__ == "__main__":
    for path, text in written(load()).items():
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
        print(f"Written: {path}")
