"""Time whole optimizer steps, host time included, against everybody who is installed.

    python bench/bench.py                       the usual sizes for this device
    python bench/bench.py --quick               a minute's look: small sizes, few steps
    python bench/bench.py --optimizer adamw     AdamW in the place of SGD with momentum
    python bench/bench.py --shapes 16M,gpt2 --peers "ours,mlx compiled,torch fused"

Every candidate is verified against a float64 reference before it is timed.
"""

from __future__ import annotations

import argparse
import gc
import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import chart
import mlx.core as mx
import peers
import shapes
import timing
import training
from rich import box
from rich.console import Console
from rich.table import Table

SECONDS = {"usual": 12.0, "quick": 0.5}  # for each set of shapes
TRAINING = 3  # times longer: a share is a small difference


def measure(work: shapes.Work, names: list[str], options: peers.Options, seconds: float) -> dict:
    """Steps on given gradients: the optimizer alone."""
    candidates, wrong = {}, {}
    for name in names:
        peer = peers.PEERS[name][1](work, options)
        try:
            peers.verify(name, peer, work, options)
        except peers.WrongResultError as error:
            if name.startswith("ours"):
                raise
            wrong[name] = str(error)  # told, not timed
        else:
            candidates[name] = peer
    times = timing.time_in_turns({name: p.step for name, p in candidates.items()}, seconds)
    for name, peer in candidates.items():
        if isinstance(peer, peers.MlxPeer):
            times[name]["new_bytes"] = timing.new_bytes(peer.step)
    return {**record("step", work, options, times), "wrong": wrong}


def measure_training(
    work: shapes.Work, loss: Any, names: list[str], options: peers.Options, seconds: float
) -> dict:
    """Steps with a forward and a backward pass."""
    candidates = training.candidates(work, options, loss)
    chosen = {
        name: candidate.step
        for name, candidate in candidates.items()
        if candidate.optimizer is None or name in names
    }
    times = timing.time_in_turns(chosen, seconds)
    training.add_shares(times)
    return record("training", work, options, times)


def record(kind: str, work: shapes.Work, options: peers.Options, times: dict) -> dict:
    for time in times.values():
        del time["turns_ms"]  # of interest for what is computed from them
    return {
        "kind": kind,
        "name": work.name,
        "title": work.title,
        "tensors": len(work.parameters),
        "elements": work.elements,
        "least_bytes": work.least_bytes(options.dtype, options.optimizer),
        "candidates": times,
    }


# ---- Output ---------------------------------------------------------------------


def table(result: dict) -> Table:
    """The candidates, fastest first; ratios to the fastest of ours."""
    times = result["candidates"]
    in_training = result["kind"] == "training"
    shown = Table(box=box.SIMPLE_HEAD, padding=(0, 2, 0, 0), pad_edge=False, title_justify="left")
    shown.title = result["title"]
    shown.add_column("", no_wrap=True)
    third = "share ms" if in_training else "GB/s"
    for title in ("ms", "quartiles", third, "/ ours", "new MiB"):
        shown.add_column(title, justify="right", no_wrap=True)
    best = min((t["median_ms"] for n, t in times.items() if n.startswith("ours")), default=None)
    for name, time in sorted(times.items(), key=lambda item: item[1]["median_ms"]):
        median = time["median_ms"]
        if in_training:
            third = f"{time['share']['median_ms']:.3f}" if "share" in time else ""
        else:
            third = f"{result['least_bytes'] / median / 1e6:.1f}"
        shown.add_row(
            name,
            f"{median:.3f}",
            f"{time['low_ms']:.3f}-{time['high_ms']:.3f}",
            third,
            f"{median / best:.2f}x" if best else "",
            f"{time['new_bytes'] / 2**20:.2f}" if "new_bytes" in time else "",
            style="bold" if name.startswith("ours") else None,
        )
    return shown


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    gpu = mx.is_available(mx.gpu)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--seconds", type=float, help="for each set of shapes")
    parser.add_argument("--shapes", help=f"comma-separated, or 'all'; of {', '.join(shapes.NAMES)}")
    parser.add_argument("--peers", help=f"comma-separated; of {', '.join(peers.PEERS)}")
    parser.add_argument("--device", choices=("cpu", "gpu"), default="gpu" if gpu else "cpu")
    parser.add_argument("--optimizer", choices=tuple(peers.USUAL), default="sgd")
    parser.add_argument("--dtype", choices=tuple(shapes.ITEMSIZE), default="float32")
    parser.add_argument(
        "--in-training", action="store_true", help="each set of shapes in a training step too"
    )
    parser.add_argument("--json", type=Path, default=Path("out/bench.json"), metavar="FILE")
    parser.add_argument("--png", type=Path, default=Path("out/bench.png"), metavar="FILE")
    options = parser.parse_args(arguments)

    if options.device == "gpu" and not gpu:
        parser.error("--device gpu: this build of MLX has no GPU, allowed cpu")
    if options.seconds is not None and not options.seconds > 0:
        parser.error(f"--seconds: got {options.seconds}, allowed more than 0")
    if options.shapes == "all":
        options.shapes = list(shapes.NAMES)
    elif options.shapes:
        options.shapes = options.shapes.split(",")
    else:
        options.shapes = list(shapes.QUICK if options.quick else shapes.DEFAULT[options.device])
    for name in options.shapes:
        if name not in shapes.NAMES:
            parser.error(f"--shapes: got '{name}', allowed {', '.join(shapes.NAMES)}")
    if options.peers:
        options.peers = options.peers.split(",")
        for name in options.peers:
            if name not in peers.available():
                parser.error(f"--peers: got '{name}', here are {', '.join(peers.available())}")
    else:
        options.peers = peers.available()
    return options


def main(arguments: list[str] | None = None) -> None:
    chosen = parse(arguments)
    console = Console()
    mx.set_default_device(mx.gpu if chosen.device == "gpu" else mx.cpu)
    options = replace(peers.USUAL[chosen.optimizer], dtype=chosen.dtype, device=chosen.device)
    own = {"momentum": options.momentum}
    if chosen.optimizer == "adamw":
        own = {"betas": options.betas, "eps": options.eps, "bias_correction": True}
    seconds = chosen.seconds or SECONDS["quick" if chosen.quick else "usual"]
    run: dict[str, Any] = {
        **timing.header(chosen.device),
        "device": chosen.device,
        "optimizer": chosen.optimizer,
        "dtype": chosen.dtype,
        "import_ms": timing.import_ms(),
        "options": {
            **own,
            "weight_decay": options.weight_decay,
            "schedule": f"exponential_decay({options.init}, {options.decay_rate})",
        },
        "results": [],
    }
    console.print(f"{run['machine']}\n{run['versions']}")
    console.print(f"{chosen.device}, {chosen.optimizer}, {chosen.dtype}")
    console.print(f"import, beside mlx.optimizers: {run['import_ms']:.1f} ms")
    for path in (chosen.json, chosen.png):
        path.parent.mkdir(parents=True, exist_ok=True)
    for name in chosen.shapes:
        for result in results_of(name, chosen, options, seconds):
            console.print(table(result))
            for error in result.get("wrong", {}).values():
                console.print(f"Left out: {error}")
            run["results"].append(result)
            chosen.json.write_text(json.dumps(run, indent=1) + "\n")  # what is had is had
            gc.collect()
            mx.clear_cache()
    chart.draw(run, chosen.png)
    console.print(f"Written: {chosen.json} and {chosen.png}.")


def results_of(
    name: str, chosen: argparse.Namespace, options: peers.Options, seconds: float
) -> Iterator[dict]:
    if name == shapes.LORA_TRAINING:
        work, rows = training.lora_work(chosen.quick, chosen.device)
        loss = training.lora_loss(work, rows, getattr(mx, chosen.dtype))
        yield measure_training(work, loss, chosen.peers, options, TRAINING * seconds)
        return
    work = shapes.load(name)
    yield measure(work, chosen.peers, options, seconds)
    if chosen.in_training:
        yield measure_training(work, training.quadratic_loss, chosen.peers, options, seconds)


if __name__ == "__main__":
    main()
