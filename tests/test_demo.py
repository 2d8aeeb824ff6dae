"""The demo runs, with few steps, and says what it saw."""

import importlib
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import mlx.core as mx
import pytest

pytest.importorskip("matplotlib")
pytest.importorskip("sklearn")

DEMO = Path(__file__).parent.parent / "bench" / "demo.py"


def run(*arguments):
    return subprocess.run(
        [sys.executable, str(DEMO), *map(str, arguments)], capture_output=True, text=True
    )


def test_demo_trains_and_draws(tmp_path):
    picture = tmp_path / "new" / "demo.png"
    result = run("--steps", 8, "--output", picture)
    assert result.returncode == 0, result.stderr
    for text in ("mlx.optimizers, compiled", "mlx_fused_optim", "8/8", "losses are equal"):
        assert text in result.stdout
    if mx.default_device() == mx.Device(mx.cpu):
        # At a constant rate both optimizers take the same path, to the bit. On a GPU the
        # embedding's gradient is a sum in any order.
        assert "all 8 losses are equal" in result.stdout
    said = " ".join(result.stdout.split())
    assert re.search(r"The update takes [\d.]+ ms, \d+% of a step\. With mlx.optimizers: ", said)
    assert len(re.findall(r"so a whole step is [\d.]+ times as fast with ours\.", said)) == 2
    assert re.search(r"update: 0\.0\d MiB, there [\d.]+ and [\d.]+\.", said)
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_demo_takes_any_schedule(tmp_path):
    picture = tmp_path / "demo.png"
    schedule = "warmup(cosine_decay(0.002, 6), 2)"
    result = run("--task", "digits", "--steps", 8, "--schedule", schedule, "--output", picture)
    assert result.returncode == 0, result.stderr
    assert "Digits: 28 tensors" in result.stdout and "losses are equal" in result.stdout
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_demo_says_how_the_runs_differ(monkeypatch):
    monkeypatch.syspath_prepend(str(DEMO.parent))
    demo = importlib.import_module("demo")
    ours, theirs = SimpleNamespace(), SimpleNamespace()
    ours.losses, theirs.losses = [1.0, 0.5, 0.25], [1.0, 0.5, 0.125]
    ours.rates, theirs.rates = [0.5, 0.5, 0.5], [0.5, 0.5, 0.4]
    text = demo.compared(ours, theirs)
    assert "equal to the bit for 2 steps; after that they differ by 1.2e-01" in text
    assert "learning rates differ by 2.5e-01" in text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--schedule", "cosine_decay(0.1"], "[parse_schedule]"),
        (["--steps", "5"], "--steps too small: got 5, allowed 6 or more"),
    ],
    ids=lambda x: x[0] if isinstance(x, list) else "",
)
def test_demo_refuses(arguments, message, capsys, monkeypatch):
    monkeypatch.syspath_prepend(str(DEMO.parent))
    with pytest.raises(SystemExit) as stopped:
        importlib.import_module("demo").main(arguments)
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err
