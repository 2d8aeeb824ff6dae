"""Time averages of gradients and whole steps of several processes, host time included.

    mlx.launch -n 2 bench/distributed.py                                  the ring, here
    mlx.launch --backend nccl --hosts 127.0.0.1 --repeat-hosts 2 bench/distributed.py
    ... bench/distributed.py --works 448x64 150x4096x1024 --optimizers adamw --turns 20

Beside MLX's own (nn.average_gradients, and the optimizer of mlx.optimizers, compiled) and, with
NCCL and torch, all-reduces of flat buckets with torch's fused optimizer, and its
ZeroRedundancyOptimizer. "collectives" are the bare ones on flat arrays of the same bytes. All take
the same steps, which are compared first; every process takes the same number of them, in turns. The
first process tells medians and quartiles, in ms, and what an optimizer's state takes on it, by
MLX's count.
"""

from __future__ import annotations

import argparse
import gc
import os
import statistics
import time
from collections.abc import Callable
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers
import mlx_fused_optim as optim
import numpy as np
import shapes
from mlx.utils import tree_flatten, tree_unflatten

WARM, STEPS = 2, 5  # of a turn
RATE, DECAY, BETAS, EPS, MOMENTUM = 1e-3, 1e-2, (0.9, 0.999), 1e-8, 0.9
BUCKET = 25 << 20  # torch's own
SIZE = 32 << 20  # MLX's


def numbers(work: shapes.Work, seed: int) -> list[np.ndarray]:
    """Of tensors that differ, without the time that drawing each takes."""
    block = np.random.default_rng(seed).standard_normal(65521, dtype=np.float32)
    return [
        np.resize(np.roll(block, -7919 * i), shape) for i, (_, shape) in enumerate(work.parameters)
    ]


# ---- MLX -----------------------------------------------------------------------------


class OfMlx:
    """Averages, then a step; without an optimizer the averages alone."""

    def __init__(self, work: shapes.Work, group: mx.distributed.Group, average: Any, update: Any):
        def tree(seed: int) -> Any:
            arrays = [mx.array(a) for a in numbers(work, seed)]
            return tree_unflatten([(f"w.{i}", a) for i, a in enumerate(arrays)])

        self.parameters, self.gradients = tree(1), tree(2 + group.rank())
        mx.eval(self.parameters, self.gradients)
        self.average, self.update = average, update
        self.state_bytes = 0
        if update is not None:
            before = mx.get_active_memory()
            update.init(self.parameters)
            mx.eval(update.state)
            self.state_bytes = mx.get_active_memory() - before
        self.apply = update and update.apply_gradients
        if isinstance(update, mlx.optimizers.Optimizer) and type(update).__module__.startswith(
            "mlx.optimizers"
        ):
            self.apply = mx.compile(self.apply, inputs=update.state, outputs=update.state)

    def step(self) -> None:
        gradients = self.average(self.gradients)
        if self.update is None:
            mx.eval(gradients)
            return
        self.parameters = self.apply(gradients, self.parameters)
        mx.eval(self.parameters, self.update.state)

    def sample(self) -> np.ndarray:
        arrays = [a for _, a in tree_flatten(self.parameters)]
        return np.array(mx.concatenate([a.reshape(-1)[:64] for a in arrays]))


def optimizer_of(module: Any, name: str) -> Any:
    if name == "momentum":
        return module.SGD(RATE, momentum=MOMENTUM)
    return module.AdamW(RATE, BETAS, EPS, DECAY, bias_correction=True)


class Collectives:
    """What has to be communicated, on flat arrays that are there."""

    def __init__(self, work: shapes.Work, group: mx.distributed.Group, scattered: bool):
        item = SIZE // 4 // group.size() * group.size()
        sizes = [min(item, work.elements - at) for at in range(0, work.elements, item)]
        sizes = [-(-size // group.size()) * group.size() for size in sizes]
        self.arrays, self.group, self.scattered = [mx.ones(n) for n in sizes], group, scattered
        mx.eval(self.arrays)

    def step(self) -> None:
        if not self.scattered:
            mx.eval([mx.distributed.all_sum(a, group=self.group) for a in self.arrays])
            return
        parts = [mx.distributed.sum_scatter(a, group=self.group) for a in self.arrays]
        mx.eval([mx.distributed.all_gather(a, group=self.group) for a in parts])


# ---- torch ---------------------------------------------------------------------------


class OfTorch:
    """Buckets that are summed, and a fused optimizer, of everything or of a part (ZeRO)."""

    def __init__(self, work: shapes.Work, rank: int, size: int, name: str, sharded: bool):
        import torch
        from torch.distributed.optim import ZeroRedundancyOptimizer

        self.torch, self.size = torch, size
        make = lambda seed: [torch.from_numpy(a).cuda() for a in numbers(work, seed)]  # noqa: E731
        self.parameters = [p.requires_grad_() for p in make(1)]
        self.gradients = make(2 + rank)
        for parameter, gradient in zip(self.parameters, self.gradients, strict=True):
            parameter.grad = gradient.clone()
        cls: Any = torch.optim.SGD if name == "momentum" else torch.optim.AdamW
        own: dict[str, Any] = {"momentum": MOMENTUM}
        if name != "momentum":
            own = {"betas": BETAS, "eps": EPS, "weight_decay": DECAY}
        own |= {"lr": RATE, "fused": True}
        if sharded:
            own |= {"optimizer_class": cls, "parameters_as_bucket_view": True}
            cls = ZeroRedundancyOptimizer
        self.optimizer = cls(self.parameters, **own)
        self.buckets: list[list[Any]] = [[]]
        room = BUCKET
        for parameter in self.parameters:
            bytes_ = 4 * parameter.numel()
            if self.buckets[-1] and room < bytes_:
                self.buckets.append([])
                room = BUCKET
            self.buckets[-1].append(parameter)
            room -= bytes_

    def step(self) -> None:
        torch = self.torch
        from torch._utils import _flatten_dense_tensors, _unflatten_dense_tensors

        under_way = []
        at = 0
        for bucket in self.buckets:
            gradients = self.gradients[at : at + len(bucket)]
            at += len(bucket)
            flat = _flatten_dense_tensors(gradients).div_(self.size)
            under_way.append((bucket, flat, torch.distributed.all_reduce(flat, async_op=True)))
        for bucket, flat, work in under_way:
            work.wait()
            like = [parameter.grad for parameter in bucket]
            parts = _unflatten_dense_tensors(flat, like)
            for parameter, part in zip(bucket, parts, strict=True):
                parameter.grad = part
        self.optimizer.step()
        torch.cuda.synchronize()

    def sample(self) -> np.ndarray:
        parts = [p.detach().reshape(-1)[:64] for p in self.parameters]
        return self.torch.cat(parts).cpu().numpy()


def torch_is_here(rank: int, size: int) -> bool:
    """With NCCL, and with this process in its group."""
    try:
        import torch
    except ImportError:
        return False
    if not torch.cuda.is_available() or not torch.distributed.is_nccl_available():
        return False
    os.environ.setdefault("MASTER_ADDR", os.environ.get("NCCL_HOST_IP", "127.0.0.1"))
    os.environ.setdefault("MASTER_PORT", str(int(os.environ.get("NCCL_PORT", "12345")) + 1))
    torch.distributed.init_process_group("nccl", rank=rank, world_size=size)
    return True


# ---- Times ---------------------------------------------------------------------------


def in_turns(
    candidates: dict[str, Callable[[], None]], turns: int, wait: Callable[[], None]
) -> dict[str, list[float]]:
    times: dict[str, list[float]] = {name: [] for name in candidates}
    for _ in range(turns):
        for name, step in candidates.items():
            for number in range(WARM + STEPS):
                wait()
                begin = time.perf_counter()
                step()
                if number >= WARM:
                    times[name].append(1e3 * (time.perf_counter() - begin))
    return times


def report(title: str, times: dict[str, list[float]], states: dict[str, int]) -> None:
    print(f"\n{title}")
    for name, milliseconds in times.items():
        low, median, high = statistics.quantiles(milliseconds, n=4)
        state = f"   state {states[name] / 2**20:8.1f} MiB" if states.get(name) else ""
        print(f"  {name:44} {median:9.2f} ms  [{low:.2f}, {high:.2f}]{state}", flush=True)


def compare(
    work: shapes.Work, group: mx.distributed.Group, name: str | None, turns: int, has_torch: bool
) -> None:
    """One table; without an optimizer's name that of averages."""
    of_mlx = lambda tree: nn.average_gradients(tree, group)  # noqa: E731
    of_ours = lambda tree: optim.average_gradients(tree, group)  # noqa: E731
    made: dict[str, Any] = {}
    if name is None:
        made["collectives: all_sum"] = Collectives(work, group, False)
        if has_scatter(group):
            made["collectives: sum_scatter, all_gather"] = Collectives(work, group, True)
        made["nn.average_gradients"] = OfMlx(work, group, of_mlx, None)
        made["average_gradients"] = OfMlx(work, group, of_ours, None)
    else:
        plain = optimizer_of(mlx.optimizers, name)
        made["nn.average_gradients, MLX compiled"] = OfMlx(work, group, of_mlx, plain)
        ours = optimizer_of(optim, name)
        made["average_gradients, ours"] = OfMlx(work, group, of_ours, ours)
        sharded = optim.Sharded(optimizer_of(optim, name), group)
        made["ours, sharded"] = OfMlx(work, group, lambda tree: tree, sharded)
        if has_torch:
            place = group.rank(), group.size(), name
            made["torch all-reduce, fused"] = OfTorch(work, *place, False)
            made["torch ZeroRedundancyOptimizer, fused"] = OfTorch(work, *place, True)
        samples = {}
        for title, one in made.items():
            for _ in range(2):
                one.step()
            samples[title] = one.sample()
        first = next(iter(samples.values()))
        for title, sample in samples.items():
            assert np.allclose(sample, first, rtol=1e-4, atol=1e-5), f"{title} takes other steps"

    def wait() -> None:
        mx.eval(mx.distributed.all_sum(mx.ones(8), group=group))

    times = in_turns({title: one.step for title, one in made.items()}, turns, wait)
    if group.rank() == 0:
        states = {title: getattr(one, "state_bytes", 0) for title, one in made.items()}
        report(f"{work.title}, {name or 'averages'}", times, states)
    made.clear()
    gc.collect()
    mx.clear_cache()


def has_scatter(group: mx.distributed.Group) -> bool:
    try:
        mx.eval(mx.distributed.sum_scatter(mx.ones(group.size()), group=group))
    except RuntimeError:
        return False
    return True


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    on_gpu = mx.default_device().type == mx.gpu
    works = ["448x64", "448x16x4096", "150x4096x1024"] if on_gpu else ["448x64", "448x16x1024"]
    parser.add_argument("--works", nargs="+", choices=shapes.NAMES, default=works)
    parser.add_argument(
        "--optimizers", nargs="*", choices=["momentum", "adamw"], default=["momentum", "adamw"]
    )
    parser.add_argument("--turns", type=int, default=10)
    parser.add_argument("--backend", default="any")
    arguments = parser.parse_args()
    group = mx.distributed.init(strict=True, backend=arguments.backend)
    has_torch = on_gpu and torch_is_here(group.rank(), group.size())
    if group.rank() == 0:
        print(f"{group.size()} processes, {mx.default_device()}, {mx.device_info()}")
    for work in map(shapes.load, arguments.works):
        for name in (None, *arguments.optimizers):
            compare(work, group, name, arguments.turns, has_torch)


if __name__ == "__main__":
    main()
