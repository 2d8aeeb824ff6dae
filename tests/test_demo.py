"""The demo runs, with few steps, and says what it saw."""

import importlib
import subprocess
import sys
from pathlib import Path

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
    # At a constant rate both optimizers take the same path, to the bit.
    result = run("--epochs", 2, "--decay-rate", 1, "--output", picture)
    assert result.returncode == 0, result.stderr
    for text in ("mlx.optimizers", "mlx_fused_optim", "44/44", "All 44 losses are equal"):
        assert text in result.stdout
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_demo_says_how_the_runs_differ(tmp_path):
    result = run("--epochs", 1, "--decay-rate", 0.9, "--output", tmp_path / "demo.png")
    assert result.returncode == 0, result.stderr
    assert "equal to the bit for" in result.stdout
    assert "learning rates differ by" in result.stdout


def test_demo_takes_any_schedule(tmp_path):
    picture = tmp_path / "demo.png"
    schedule = "warmup(cosine_decay(0.1, 22), 5)"
    result = run("--epochs", 1, "--schedule", schedule, "--output", picture)
    assert result.returncode == 0, result.stderr
    assert "All 22 losses are equal" in result.stdout
    assert picture.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--schedule", "cosine_decay(0.1"], "[parse_schedule]"),
        (["--epochs", "0"], "--epochs too small: got 0, allowed 1 or more"),
    ],
    ids=lambda x: x[0] if isinstance(x, list) else "",
)
def test_demo_refuses(arguments, message, capsys, monkeypatch):
    monkeypatch.syspath_prepend(str(DEMO.parent))
    with pytest.raises(SystemExit) as stopped:
        importlib.import_module("demo").main(arguments)
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err
