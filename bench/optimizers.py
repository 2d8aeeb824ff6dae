"""Time whole steps of every optimizer, host time included, beside that of mlx.optimizers.

    python bench/optimizers.py                          the usual works for this device
    python bench/optimizers.py --works 448x64 --optimizers AdamW,Lion --turns 10

All have their usual options and a constant learning rate, in float32. What they have made is
compared before the times are told. docs/facts.py shows the runs in bench/results/optimizers, each
optimizer's on its page.
"""

from __future__ import annotations

import argparse
import gc
import json
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.optimizers
import mlx_fused_optim
import peers
import shapes
import timing
from mlx.utils import tree_flatten, tree_map, tree_unflatten

RECORDS = Path(__file__).parent / "results" / "optimizers"
OPTIMIZERS = ("SGD", "Adam", "AdamW", "Adamax", "Lion", "Muon", "RMSprop", "Adagrad", "AdaDelta")
# By default; on a CPU three minutes on two cores, one of them Muon's.
WORKS = {"cpu": ("16M", "448x16x1024"), "gpu": ("268M", "448x16x4096")}
TURNS = {"cpu": 2, "gpu": 4}
CANDIDATES = {
    "ours": (mlx_fused_optim, False),
    "mlx compiled": (mlx.optimizers, True),
    "mlx": (mlx.optimizers, False),
}
RATE = 1e-3
# Of what a step changes, how much may be another's: roundings; and products in bfloat16.
MOST = {"Muon": 0.25}
USUAL_MOST = 1e-3


def tree(work: shapes.Work, seed: int) -> Any:
    """Made where it is used: of a GPU's large works, NumPy's would take longer than the steps."""
    keys = mx.random.split(mx.random.key(seed), len(work.parameters))
    rows = zip(work.parameters, keys, strict=True)
    return tree_unflatten([(name, mx.random.normal(shape, key=key)) for (name, shape), key in rows])


def distance(a: Any, b: Any) -> mx.array:
    """The norm of a difference of trees."""
    squares = tree_map(lambda x, y: mx.sum(mx.square(x - y)), a, b)
    return mx.sqrt(sum(square for _, square in tree_flatten(squares)))


def measure(name: str, work: shapes.Work, gradients: Any, turns: int) -> dict[str, Any]:
    """The times of one optimizer's candidates, who all take the same steps."""
    made = {}
    own = {"momentum": 0.9} if name == "SGD" else {}  # without one it keeps nothing
    for title, (module, compiled) in CANDIDATES.items():
        optimizer = getattr(module, name)(learning_rate=RATE, **own)
        made[title] = peers.MlxSteps(optimizer, tree(work, 1), gradients, compiled)
    times = timing.time_in_turns({title: m.step for title, m in made.items()}, 0, turns)
    want = made.pop("mlx").parameters
    moved = distance(tree(work, 1), want).item()
    for title, candidate in made.items():
        apart = distance(candidate.parameters, want).item()
        if not apart <= MOST.get(name, USUAL_MOST) * moved:
            raise SystemExit(f"{name}: {title} is {apart:.1e} from mlx, which moved {moved:.1e}")
    for time in times.values():
        del time["turns_ms"]
    return times


def has(name: str, work: shapes.Work) -> bool:
    """Muon is for matrices."""
    return name != "Muon" or all(len(shape) > 1 for _, shape in work.parameters)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    device = "gpu" if mx.is_available(mx.gpu) else "cpu"
    works, names = ",".join(WORKS[device]), ",".join(OPTIMIZERS)
    parser.add_argument("--works", default=works, help=f"of bench/shapes.py; default: {works}")
    parser.add_argument("--optimizers", default=names, help=f"default: {names}")
    parser.add_argument("--turns", type=int, default=TURNS[device])
    parser.add_argument("--output", type=Path, default=Path("out/optimizers.json"), metavar="JSON")
    chosen = parser.parse_args(arguments)
    if unknown := set(chosen.optimizers.split(",")) - set(OPTIMIZERS):
        parser.error(f"--optimizers: got {', '.join(sorted(unknown))}, allowed {names}")
    if unknown := set(chosen.works.split(",")) - {*shapes.SYNTHETIC, *shapes.MODELS}:
        allowed = ", ".join((*shapes.SYNTHETIC, *shapes.MODELS))
        parser.error(f"--works: got {', '.join(sorted(unknown))}, allowed {allowed}")
    if chosen.turns < 1:
        parser.error(f"--turns: got {chosen.turns}, allowed 1 or more")

    run = {**timing.header(device), "device": device, "dtype": "float32", "results": []}
    print(run["machine"], run["versions"], sep="\n")
    chosen.output.parent.mkdir(parents=True, exist_ok=True)
    for work in map(shapes.load, chosen.works.split(",")):
        gradients = tree(work, 2)
        for name in filter(lambda name: has(name, work), chosen.optimizers.split(",")):
            times = measure(name, work, gradients, chosen.turns)
            run["results"].append(
                {"optimizer": name, "name": work.name, "title": work.title, "candidates": times}
            )
            medians = (f"{title} {time['median_ms']:.2f}" for title, time in times.items())
            print(f"{work.name} {name}, ms: {', '.join(medians)}", flush=True)
            chosen.output.write_text(json.dumps(run, indent=1) + "\n")  # what is had is had
            gc.collect()
            mx.clear_cache()


if __name__ == "__main__":
    main()
