"""Schedules as text and pictures: the parser, the command line, the plots, the docs."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import mlx.core as mx
import pytest
from mlx_fused_optim import (
    Schedule,
    constant,
    cosine_decay,
    join_schedules,
    linear_schedule,
    multi_step,
    one_cycle,
    parse_schedule,
    warmup,
)
from mlx_fused_optim.schedules import __all__ as names
from mlx_fused_optim.schedules.__main__ import main
from mlx_fused_optim.schedules.drawing import as_text, sampled

DOCS = Path(__file__).parent.parent / "docs"


def drawer():
    spec = importlib.util.spec_from_file_location("draw", DOCS / "schedules/draw.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


# ---- The parser -------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "schedule"),
    [
        ("cosine_decay(1e-1, 1000)", cosine_decay(0.1, 1000)),
        (" cosine_decay( 0.1,\n decay_steps=1_000, end=+.01 ) ", cosine_decay(0.1, 1000, 0.01)),
        ("warmup(cosine_decay(1e-1, 1000), 100)", warmup(cosine_decay(0.1, 1000), 100)),
        ("linear_schedule(-1, 1, 10)", linear_schedule(-1, 1, 10)),
        ("multi_step(1, (3, 6), [0.5, 0.1])", multi_step(1, [3, 6], [0.5, 0.1])),
        ("one_cycle(9, 1, pct_final=None, anneal='linear')", one_cycle(9, 1, anneal="linear")),
        (
            "join_schedules([constant(1), warmup(constant(2), 3)], [4])",
            join_schedules([constant(1), warmup(constant(2), 3)], [4]),
        ),
        ("0.25", constant(0.25)),
        ("3", constant(3)),
    ],
)
def test_parsed(text, schedule):
    assert parse_schedule(text) == schedule


@pytest.mark.parametrize(
    "text",
    [
        "",
        "cosine_decay(0.1,",
        "cosine_decay",
        "cosine(0.1, 10)",
        "'cosine_decay(0.1, 10)'",
        "[constant(1)]",
        "True",
        "None",
        "__import__('os').system('true')",
        "(lambda: 0)()",
        "constant(open('x'))",
        "constant.__call__(1)",
        "constant(value=[x for x in (1,)])",
        "constant(1 + 1)",
        "constant(10 ** 10 ** 10)",
        "constant(*[1])",
        "constant(**{'value': 1})",
        "constant(f'{1}')",
        "constant(b'1')",
        "constant(1j)",
        "Schedule('constant', {}, None)",
        "parse_schedule('1')",
        "constant(1, 2, 3)",
        "constant(values=1)",
        "constant(1, value=1)",
        "constant(nan)",
        "cosine_decay(0.1, 0)",
        "constant('a')",
        "x = 1",
        "constant(1); constant(2)",
        "constant(1)\x00",
        "(" * 500 + "1" + ")" * 500,
        "scaled(" * 60 + "constant(1)" + ", 1)" * 60,
        "1" * 20000,
        "-" * 9000 + "1",
    ],
    ids=lambda text: repr(text[:40]),
)
def test_anything_else_is_refused(text):
    with pytest.raises(ValueError, match=r"^\[[a-z_]+\] ") as raised:
        parse_schedule(text)
    assert len(str(raised.value)) < 500


def test_arguments_in_a_dict_are_refused_for_what_they_are():
    with pytest.raises(ValueError, match=r"^\[parse_schedule\] \*\* is not allowed: write"):
        parse_schedule("constant(**{'value': 1})")


def test_only_text_is_parsed():
    with pytest.raises(TypeError, match=r"^\[parse_schedule\] text must be a string: got float"):
        parse_schedule(0.1)


# ---- Pictures ---------------------------------------------------------------------


def test_samples_are_the_schedule():
    schedule = warmup(cosine_decay(0.1, 1000), 100)
    steps, values = sampled(schedule, 1101)
    assert steps == list(range(1101))
    assert values == schedule(mx.arange(1101)).tolist()
    steps, values = sampled(schedule, 10**6)
    assert len(steps) == 2000
    assert (steps[0], steps[-1]) == (0, 10**6 - 1)
    assert values == schedule(mx.array(steps)).tolist()
    assert sampled(schedule, 1) == ([0], [0.0])


def test_plot(monkeypatch):
    matplotlib = pytest.importorskip("matplotlib")
    matplotlib.use("agg")
    from matplotlib import pyplot

    schedule = cosine_decay(0.1, 80)
    axes = schedule.plot(100)
    (line,) = axes.get_lines()
    assert line.get_xdata().tolist() == list(range(100))
    assert line.get_ydata().tolist() == schedule(mx.arange(100)).tolist()
    assert axes.get_title() == "cosine_decay(0.1, 80)"
    assert constant(0.1).plot(100, ax=axes) is axes
    assert len(axes.get_lines()) == 2
    pyplot.close("all")
    with pytest.raises(ValueError, match=r"^\[plot\] steps is out of range: got 0"):
        schedule.plot(0)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ImportError, match=r"^\[plot\] matplotlib is not installed: pip install"):
        schedule.plot(100)


def test_text_picture():
    lines = as_text(linear_schedule(0, 1, 39), 40, width=20, height=10).splitlines()
    assert len(lines) == 12
    assert lines[0].startswith("1 ┤")
    assert lines[9].startswith("0 ┤")
    assert lines[11].split() == ["0", "39"]
    # A rising line: the first dots of each row of text move to the left.
    starts = [len(line[3:]) - len(line[3:].lstrip("\u2800")) for line in lines[:10]]
    assert starts == sorted(starts, reverse=True)
    assert (starts[0], starts[9]) == (18, 0)
    for odd in (constant(0.0), constant(0.1), parse_schedule("exponential_decay(1, 1e9)")):
        assert len(as_text(odd, 50).splitlines()) == 18


@pytest.mark.parametrize(
    "picture", sorted(path.stem for path in (DOCS / "schedules").glob("*.svg"))
)
def test_pictures_are_current(picture):
    draw = drawer()
    stored = (DOCS / f"schedules/{picture}.svg").read_text()
    assert draw.picture(*draw.PICTURES[picture]) == stored, "run: make schedules-docs"
    # A control: another schedule has another picture.
    texts, steps = draw.PICTURES[picture]
    assert draw.picture([*texts[:-1], "constant(0.0999)"], steps) != stored


def test_docs_show_every_schedule():
    made = {name for name in names if name[0].islower()} - {"parse_schedule"}
    assert drawer().PICTURES.keys() == made
    text = (DOCS / "schedules.md").read_text()
    for name in made:
        assert f"### {name}\n\n![{name}](schedules/{name}.svg)\n\n`{name}(" in text


# ---- The command line ------------------------------------------------------------


def run(*arguments):
    return subprocess.run(
        [sys.executable, "-m", "mlx_fused_optim.schedules", *arguments],
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, "COLUMNS": "92"},
    )


def test_command_line_draws():
    done = run("warmup(cosine_decay(1e-1, 1000), 100)")
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[0] == "warmup(cosine_decay(0.1, 1000), 100)"
    assert lines[1:] == as_text(parse_schedule(lines[0]), 1201, width=76).splitlines()


def test_command_line_refuses():
    done = run("__import__('os')")
    assert done.returncode == 1
    assert done.stderr.startswith("[parse_schedule] a function is unknown: got '__import__'")
    assert done.stdout == ""


def test_command_line_writes_png(tmp_path, capsys):
    pytest.importorskip("matplotlib")
    path = tmp_path / "schedule.png"
    assert main(["triangular(0, 1, 10)", "--steps", "50", "--png", str(path)]) == 0
    assert path.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    assert str(path) in capsys.readouterr().out
    assert main(["constant(1)", "--png", str(tmp_path / "no/such/folder.png")]) == 1
    assert main(["constant(1)", "--steps", "0"]) == 1
    assert "--steps is out of range: got 0" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "steps"),
    [
        ("cosine_decay(0.1, 1000)", 1101),
        ("exponential_decay(1, 0.5)", 6),
        ("step_decay(1, 0.5, 10)", 51),
        ("triangular(0, 1, 10)", 81),
        ("cosine_restarts(1, 10, cycle_multiplier=2)", 71),
        ("constant(1)", 11),
        ("linear_schedule(0, 1, 1152921504606846976)", 10**18),
    ],
)
def test_how_much_is_drawn(text, steps):
    assert parse_schedule(text)._natural_length() == steps
    nine = multi_step(1.0, [10 * i for i in range(1, 10)])
    assert 90 <= nine._natural_length() <= 200
    assert isinstance(nine, Schedule)
