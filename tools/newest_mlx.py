"""Require the newest MLX that pip finds in place of the pinned one, in this checkout.

    python tools/newest_mlx.py [VERSION]

For the weekly job that builds and tests against it and says what broke. It prints both versions.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
FILES = ("pyproject.toml", "python/mlx_fused_optim/_requirements.py")
PINNED = re.compile(r'("mlx(?:\[\w+\])?==|MLX_VERSION = ")([\d.]+)(?=")')


def newest() -> str:
    command = [sys.executable, "-m", "pip", "install", "--dry-run", "--ignore-installed"]
    command += ["--no-deps", "--quiet", "--report", "-", "mlx"]
    report = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
    return json.loads(report)["install"][0]["metadata"]["version"]


def pin(root: Path, version: str) -> str:
    """Writes the version into the files, and says which they had."""
    texts = {root / name: (root / name).read_text() for name in FILES}
    before = {match[2] for text in texts.values() for match in PINNED.finditer(text)}
    if len(before) != 1:
        raise ValueError(
            f"[newest_mlx] the files differ: got {', '.join(sorted(before))}, allowed one version."
        )
    for path, text in texts.items():
        path.write_text(PINNED.sub(rf"\g<1>{version}", text))
    return before.pop()


if __name__ == "__main__":
    wanted = sys.argv[1] if sys.argv[1:] else newest()
    print(f"mlx {pin(ROOT, wanted)} is pinned, {wanted} is the newest.")
