"""Time whole steps of Muon, host time included, beside mlx.optimizers.Muon and torch.optim.Muon.

    python bench/muon.py                          sets for this device
    python bench/muon.py --sets lora --seconds 20
    python bench/muon.py --sets layers --layers 24 --width 1024

Each of the "layers" has four square matrices, one four times as high and one four times as wide;
"lora" is 128 matrices of (1024, 8) and (8, 1024). Before it is timed, the first step of everybody
is compared with Newton-Schulz in float64 where that is quick.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable
from functools import cache
from typing import Any

import mlx.core as mx
import mlx.optimizers
import mlx_fused_optim
import numpy as np
import peers
import timing

RATE = 0.02
TRIPLE = (3.4445, -4.7750, 2.0315)
# How far an update may be from float64, over its norm: products in bfloat16 (or TF32), or float32.
MOST = {"float32": 2e-2, "bfloat16": 0.25}
SLOW = 1 << 18  # elements of a matrix that NumPy should not be asked about


Shapes = tuple[tuple[int, int], ...]


def shapes_of(name: str, layers: int, width: int) -> Shapes:
    if name == "lora":
        return ((1024, 8), (8, 1024)) * 64
    return (*((width, width),) * 4, (4 * width, width), (width, 4 * width)) * layers


@cache
def values(shapes: Shapes, seed: int) -> list[np.ndarray]:
    random = np.random.default_rng(seed)
    return [random.standard_normal(shape, dtype=np.float32) for shape in shapes]


class OfMlx(peers.MlxSteps):
    def __init__(self, optimizer: Any, shapes: Shapes, compiled: bool):
        parameters, gradients = (
            {"w": [mx.array(a) for a in values(shapes, seed)]} for seed in (1, 2)
        )
        super().__init__(optimizer, parameters, gradients, compiled)

    def results(self) -> list[np.ndarray]:
        return [np.array(w) for w in self.parameters["w"]]


class OfTorch:
    def __init__(self, shapes: Shapes, device: str):
        import torch

        self.parameters = [
            torch.nn.Parameter(torch.tensor(a).to(device)) for a in values(shapes, 1)
        ]
        for parameter, gradient in zip(self.parameters, values(shapes, 2), strict=True):
            parameter.grad = torch.tensor(gradient).to(device)
        self.optimizer = torch.optim.Muon(self.parameters, lr=RATE, weight_decay=0.0)
        self.synchronize = torch.cuda.synchronize if device == "cuda" else lambda: None

    def step(self) -> None:
        self.optimizer.step()
        self.synchronize()

    def results(self) -> list[np.ndarray]:
        return [parameter.detach().cpu().numpy() for parameter in self.parameters]


def candidates(device: str) -> dict[str, Callable[[Any], Any]]:
    ours, theirs = mlx_fused_optim.Muon, mlx.optimizers.Muon

    def of(cls: Any, compiled: bool, **options: Any) -> Callable[[Any], Any]:
        return lambda shapes: OfMlx(cls(RATE, weight_decay=0.0, **options), shapes, compiled)

    made = {
        "ours float32": of(ours, False, ns_dtype=mx.float32),
        "ours float32 compiled": of(ours, True, ns_dtype=mx.float32),
        "mlx": of(theirs, False),
        "mlx compiled": of(theirs, True),
    }
    if device == "gpu":
        made |= {
            "ours bfloat16": of(ours, False, ns_dtype=mx.bfloat16),
            "ours bfloat16 compiled": of(ours, True, ns_dtype=mx.bfloat16),
        }
    try:
        import torch

        if hasattr(torch.optim, "Muon"):
            made["torch bfloat16"] = lambda s: OfTorch(s, "cuda" if device == "gpu" else "cpu")
    except ImportError:
        pass
    return made


def verify(name: str, candidate: Any, shapes: Shapes) -> None:
    """The first step, of some matrices."""
    candidate.step()
    most = MOST["bfloat16" if "bfloat16" in name else "float32"]
    first, gradients, results = values(shapes, 1), values(shapes, 2), candidate.results()
    for i in range(min(len(shapes), 6)):
        if math.prod(shapes[i]) > SLOW:
            continue
        x = gradients[i].astype(np.float64) / np.linalg.norm(gradients[i].astype(np.float64))
        a, b, c = TRIPLE
        for _ in range(5):
            gram = x @ x.T
            x = a * x + (b * gram + c * gram @ gram) @ x
        want = RATE * math.sqrt(max(1, shapes[i][0] / shapes[i][1])) * x
        error = np.linalg.norm(first[i] - results[i] - want) / np.linalg.norm(want)
        if not error <= most:
            raise SystemExit(f"{name}: matrix {i} is {error:.1e} from float64, allowed {most}")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    gpu = mx.is_available(mx.gpu)
    parser.add_argument("--device", choices=("cpu", "gpu"), default="gpu" if gpu else "cpu")
    parser.add_argument("--sets", default="lora,layers", help="comma-separated")
    parser.add_argument("--layers", type=int, default=24 if gpu else 2)
    parser.add_argument("--width", type=int, default=1024 if gpu else 128)
    parser.add_argument("--seconds", type=float, default=20.0, help="for each set")
    chosen = parser.parse_args()
    mx.set_default_device(mx.gpu if chosen.device == "gpu" else mx.cpu)
    print(timing.header(chosen.device))
    for name in chosen.sets.split(","):
        shapes = shapes_of(name, chosen.layers, chosen.width)
        steps = {}
        for title, make in candidates(chosen.device).items():
            steps[title] = make(shapes)
            verify(title, steps[title], shapes)
        times = timing.time_in_turns({t: c.step for t, c in steps.items()}, chosen.seconds)
        print(f"\n{name}: {len(shapes)} matrices, {sum(map(math.prod, shapes)):,} elements")
        for title, time in sorted(times.items(), key=lambda item: item[1]["median_ms"]):
            new = ""
            if isinstance(steps[title], OfMlx):
                new = f"{timing.new_bytes(steps[title].step) / 2**20:9.1f} MiB new"
            quartiles = f"[{time['low_ms']:.2f}, {time['high_ms']:.2f}]"
            print(f"  {title:24} {time['median_ms']:9.2f} ms {quartiles:20} {new}")


if __name__ == "__main__":
    main()
