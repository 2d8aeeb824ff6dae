"""Programs of several processes on this machine, over MLX's ring.

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
from pathlib import Path

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


def started(size: int, program: list[str], **options) -> list[subprocess.Popen]:
    """The processes of a group, whose environment is that of mlx.launch."""
    with tempfile.NamedTemporaryFile("w", suffix=".json", delete=False) as hosts:
        json.dump([[f"127.0.0.1:{port}"] for port in ports(size)], hosts)
    environment = {**os.environ, "MLX_HOSTFILE": hosts.name, "OMP_NUM_THREADS": "1"}
    return [
        subprocess.Popen(program, env={**environment, "MLX_RANK": str(rank)}, **options)
        for rank in range(size)
    ]


def launched(size: int, file: str, checks: Iterable[str]) -> list[dict[str, str]]:
    """Of each process what came of each check: "" where it held, or what to read."""
    program = [sys.executable, __file__, file, *checks]
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    processes = started(size, program, **pipes)
    end = time.monotonic() + SECONDS
    outcomes = []
    try:
        for process in processes:
            try:
                output, _ = process.communicate(timeout=max(end - time.monotonic(), 0.1))
            except subprocess.TimeoutExpired:
                process.kill()
                output, _ = process.communicate()
                output += f"\nstopped after {SECONDS} seconds"
            marked = [line[len(MARK) :] for line in output.splitlines() if line.startswith(MARK)]
            outcome = dict(map(json.loads, marked))
            outcomes.append({name: outcome.get(name, output) for name in checks})
    finally:
        for process in processes:
            process.kill()
            process.wait()
    return outcomes


def main(file: str, *checks: str) -> None:
    import mlx.core as mx

    spec = importlib.util.spec_from_file_location("checks", file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    mx.set_default_device(mx.cpu)
    group = mx.distributed.init(strict=True, backend="ring")
    for name in checks:
        try:
            getattr(module, name)(group)
            text = ""
        except BaseException:
            text = traceback.format_exc()
        print(MARK + json.dumps([name, text]), flush=True)


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parent))
    main(*sys.argv[1:])
