"""What a page says of an optimizer in numbers: taken from the code, when the page is built, and
from recorded runs.

``python docs/facts.py AdamW`` prints it.
"""

from __future__ import annotations

import inspect
import json
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.optimizers
import mlx_fused_optim as optim
from mlx.utils import tree_flatten

# Every optimizer that has a kernel.
OPTIMIZERS = ("SGD", "Adam", "AdamW", "Adamax", "Lion", "Muon", "RMSprop", "Adagrad", "AdaDelta")
OPTIONS: dict[str, dict[str, Any]] = {
    "amsgrad=True": {"amsgrad": True},
    "state_dtype=mx.bfloat16": {"state_dtype": mx.bfloat16},
    'state_dtype="8bit"': {"state_dtype": "8bit"},
    "compensated=True": {"compensated": True},
    "master_weights=True": {"master_weights": True},
    "ema_decay=0.999": {"ema_decay": 0.999},
}
ELEMENTS, STEPS = 1 << 14, 100
# Of bench/optimizers.py, a file a machine.
RUNS = Path(__file__).parents[1] / "bench" / "results" / "optimizers"


def usual(name: str) -> dict[str, Any]:
    """SGD with a momentum: without one it keeps nothing."""
    return {"momentum": 0.9} if name == "SGD" else {}


def kept_bytes(optimizer: Any, dtype: mx.Dtype) -> float:
    """Bytes that the state has for each element of a large parameter."""
    optimizer.init({"w": mx.zeros(ELEMENTS, dtype)})
    arrays = (array for _, array in tree_flatten(optimizer.state))
    return sum(a.nbytes for a in arrays if a.size >= ELEMENTS) / ELEMENTS


def rows_of_memory(name: str) -> Iterable[tuple[str, float, float]]:
    """(what is asked for, bytes a parameter of float32, of a half type)."""
    ours, theirs = getattr(optim, name), getattr(mlx.optimizers, name)

    def row(cls: Any, **arguments: Any) -> tuple[float, float]:
        return (
            kept_bytes(cls(learning_rate=0.1, **arguments), mx.float32),
            kept_bytes(cls(learning_rate=0.1, **arguments), mx.bfloat16),
        )

    first = "`momentum=0.9`" if name == "SGD" else "as it is"
    if name == "SGD":
        yield "no momentum", *row(ours)
    yield first, *row(ours, **usual(name))
    for text, option in OPTIONS.items():
        if "amsgrad" not in option or "amsgrad" in inspect.signature(ours).parameters:
            both = f"{first} and `{text}`" if name == "SGD" else f"`{text}`"
            yield both, *row(ours, **usual(name), **option)
    yield f"`mlx.optimizers.{name}`, {first}", *row(theirs, **usual(name))


def distance(name: str, **arguments: Any) -> tuple[int, float]:
    """After STEPS eager steps in float32: how many elements are not MLX's, and the largest
    difference. A schedule is given by its name and arguments, and each makes its own."""
    with mx.stream(mx.cpu):
        ours, theirs = (
            trained(package, name, {"learning_rate": 1e-3, **usual(name), **arguments})
            for package in (optim, mlx.optimizers)
        )
        return int(mx.sum(ours != theirs).item()), float(mx.max(mx.abs(ours - theirs)).item())


def trained(package: Any, name: str, arguments: dict[str, Any]) -> mx.array:
    for key, value in arguments.items():
        if isinstance(value, tuple):
            arguments[key] = getattr(package, value[0])(*value[1:])
    optimizer = getattr(package, name)(**arguments)
    w = start = mx.random.normal((ELEMENTS,), key=mx.random.key(0))
    for step in range(STEPS):
        w = optimizer.apply_gradients({"w": mx.sin(start + step)}, {"w": w})["w"]
        mx.eval(w, optimizer.state)
    return w


def rows_of_distance(name: str) -> Iterable[tuple[str, int, float]]:
    """(case, elements that differ, the largest difference)."""
    yield "a constant learning rate", *distance(name)
    if "bias_correction" in inspect.signature(getattr(optim, name)).parameters:
        yield "`bias_correction=True`", *distance(name, bias_correction=True)
    yield (
        "`cosine_decay(1e-3, 1000)`",
        *distance(name, learning_rate=("cosine_decay", 1e-3, 1000)),
    )


def rows_of_speed(name: str) -> Iterable[tuple[str, float, float, float]]:
    """(machine and work, ms a step of ours, of MLX's compiled, of MLX's eager)."""
    for machine, run in runs():
        for result in run["results"]:
            if result["optimizer"] == name:
                times = result["candidates"]
                ours, compiled, eager = (
                    times[title]["median_ms"] for title in ("ours", "mlx compiled", "mlx")
                )
                yield f"{machine}: {result['title']}", ours, compiled, eager


def runs() -> Iterable[tuple[str, dict[str, Any]]]:
    """(machine, what was recorded there)."""
    for path in sorted(RUNS.glob("*.json")):
        run = json.loads(path.read_text())
        machine = run["machine"]
        yield machine.get("gpu") or f"{machine['processor']}, {machine['cores']} cores", run


def table(head: str, rows: Iterable[Iterable[str]]) -> str:
    names = head.split("|")
    lines = [names, ["---", *["---:"] * (len(names) - 1)], *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"


def of(name: str) -> str:
    """The page's part for one optimizer, as Markdown."""
    memory = table(
        "bytes a parameter|of float32|of a half type",
        ((text, f"{whole:g}", f"{half:g}") for text, whole, half in rows_of_memory(name)),
    )
    apart = table(
        "with|differ|at most by",
        (
            (text, f"{count:,}" if count else "none", f"{most:.1e}" if count else "0")
            for text, count, most in rows_of_distance(name)
        ),
    )
    speed = table(
        "ms a step|ours|MLX's, compiled|MLX's",
        ((text, *(f"{ms:.2f}" for ms in row)) for text, *row in rows_of_speed(name)),
    )
    measured = "; ".join(
        f"{machine}: {run['date']}, MLX {run['versions']['mlx']}, load average before it "
        f"{run['machine']['load']} on {run['machine']['cores']} cores"
        for machine, run in runs()
    )
    return (
        f"What the state keeps, beside the parameter:\n\n{memory}\n"
        f"How many of {ELEMENTS:,} normally distributed float32 parameters differ from those of "
        f"`mlx.optimizers.{name}`, after {STEPS} eager steps with the same gradients, when this "
        f"page was built, on a CPU:\n\n{apart}\n"
        "A schedule's rates are ours in the first and MLX's, with its roundings, in the other.\n\n"
        "Medians of whole steps in turns, host time included, in float32 and with gradients that "
        f"are there, by `python bench/optimizers.py`:\n\n{speed}\n{measured}.\n"
    )


def of_all() -> str:
    """All optimizers, a row each."""
    rows = []
    for name in OPTIMIZERS:
        keys = ", ".join(f"`{slot.key}`" for slot in slots(name))
        first, *_ = (x for x in rows_of_memory(name) if x[0] != "no momentum")
        page = f"[{name}](/optimizers/{name.lower()}.md)"
        rows.append((page, keys, f"{first[1]:g}", f"{first[2]:g}"))
    return table("|keeps|bytes of float32|of a half type", rows)


def slots(name: str) -> list[Any]:
    """What it keeps of each element, unless it is asked for more."""
    optimizer = getattr(optim, name)(learning_rate=0.1, **usual(name))
    optimizer.init({"w": mx.zeros(1)})
    kept = optimizer.unpacked_state()["w"]
    return [slot for slot in optimizer._rule.slots.values() if slot.key in kept]


if __name__ == "__main__":
    print(of(sys.argv[1]) if sys.argv[1:] else of_all())
