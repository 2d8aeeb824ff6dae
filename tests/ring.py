"""Programs of several processes on this machine, over MLX's ring; or over NCCL, a GPU each, with
MLX_FUSED_OPTIM_TEST_NCCL as the number of GPUs.

``launched(n, CHECKS)`` starts ``python ring.py FILE CHECK...`` n times; each process calls the
checks of a file in turn with the group, and says how each went. So starting is paid for once,
and every test has the outcome of its own check.
"""

from __future__ import annotations

import importlib.util
import json
import os
import socket
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Iterable
from contextlib import ExitStack
from pathlib import Path
from typing import IO

GPUS = int(os.environ.get("MLX_FUSED_OPTIM_TEST_NCCL", "0"))
MARK = "outcome of "
SECONDS = 120  # for everything; an idle machine takes five


def ports(count: int) -> list[int]:
    """Free ones: found all at once, so that they differ."""
    sockets = [socket.socket() for _ in range(count)]
    for one in sockets:
        one.bind(("127.0.0.1", 0))
    found = [one.getsockname()[1] for one in sockets]
    for one in sockets:
        one.close()
    return found


def started(size: int, program: list[str], outputs: list[IO[str]]) -> list[subprocess.Popen]:
    """The processes of a group, whose environment is that of mlx.launch."""
    with tempfile.NamedTemporaryFile("w", suffix=".json", delete=False) as hosts:
        json.dump([[f"127.0.0.1:{port}"] for port in ports(size)], hosts)
    environment = {**os.environ, "MLX_HOSTFILE": hosts.name}
    if GPUS:
        environment.pop("MLX_HOSTFILE")
        environment |= {"NCCL_HOST_IP": "127.0.0.1", "NCCL_PORT": str(ports(1)[0])}
        environment["MLX_WORLD_SIZE"] = str(size)
    return [
        subprocess.Popen(
            program,
            env={**environment, "MLX_RANK": str(rank), **_device(rank)},
            stdout=output,
            stderr=subprocess.STDOUT,
        )
        for rank, output in enumerate(outputs)
    ]


def _device(rank: int) -> dict[str, str]:
    return {"CUDA_VISIBLE_DEVICES": str(rank)} if GPUS else {}


def launched(size: int, file: str, checks: Iterable[str]) -> list[dict[str, str]]:
    """Of each process what came of each check: "" where it held, or what to read. A process ends
    at the first that does not hold; the others cannot go on without it."""
    program = [sys.executable, __file__, file, *checks]
    for _ in range(3):
        outcomes = _launched(size, program, checks)
        if not any("Couldn't bind" in text for o in outcomes for text in o.values()):
            break  # somebody else may have taken a port that was free
    return outcomes


def _launched(size: int, program: list[str], checks: Iterable[str]) -> list[dict[str, str]]:
    with tempfile.TemporaryDirectory() as folder:
        outputs = [Path(folder, str(rank)) for rank in range(size)]
        with ExitStack() as files:
            opened = [files.enter_context(path.open("w")) for path in outputs]
            processes = started(size, program, opened)
        end = time.monotonic() + SECONDS
        while any(p.poll() is None for p in processes) and time.monotonic() < end:
            if any(p.poll() for p in processes):
                end = min(end, time.monotonic() + 2)  # for the others' own words
            time.sleep(0.02)
        for process in processes:
            process.kill()
            process.wait()
        return [_outcomes(path.read_text(), checks) for path in outputs]


def _outcomes(output: str, checks: Iterable[str]) -> dict[str, str]:
    marked = [line[len(MARK) :] for line in output.splitlines() if line.startswith(MARK)]
    outcomes = dict(map(json.loads, marked))
    return {name: outcomes.get(name, f"not finished: ...{output[-800:]}") for name in checks}


def main(file: str, *checks: str) -> None:
    import mlx.core as mx

    spec = importlib.util.spec_from_file_location("checks", file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    if not GPUS:
        mx.set_default_device(mx.cpu)
    group = mx.distributed.init(strict=True, backend="nccl" if GPUS else "ring")
    for name in checks:
        begin = time.monotonic()
        try:
            getattr(module, name)(group)
            text = ""
        except BaseException:
            text = traceback.format_exc()
        print(f"{name}: {time.monotonic() - begin:.1f} s")
        print(MARK + json.dumps([name, text]), flush=True)
        if text:
            os._exit(1)


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parent))
    main(*sys.argv[1:])
