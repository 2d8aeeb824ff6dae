"""bench/precision.py, in short; and what bfloat16 loses and the options keep."""

import importlib
import json
import sys
from functools import partial
from pathlib import Path

import mlx.core as mx
import pytest

BENCH = Path(__file__).parent.parent / "bench"
REPORT = BENCH.parent / "docs" / "precision.md"
RECORDED = BENCH / "results" / "precision"


@pytest.fixture(scope="module")
def precision():
    sys.path.insert(0, str(BENCH))
    yield importlib.import_module("precision")
    sys.path.remove(str(BENCH))


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_a_short_run_is_written_and_becomes_the_table(optimizer, precision, tmp_path, monkeypatch):
    monkeypatch.setattr(precision, "ELEMENTS", {mx.cpu: 4096, mx.gpu: 4096})
    monkeypatch.setattr(precision, "REPORT", tmp_path / "precision.md")
    few = partial(precision.characters, context=16, size=4)
    monkeypatch.setattr(precision, "characters", few)
    monkeypatch.setattr(precision.passages, "files", list)  # not installed
    marks = [mark.format(optimizer) for mark in precision.MARKS]
    precision.REPORT.write_text("before\n" + "".join(marks) + "after\n")
    path = tmp_path / "run.json"
    modes = ["float32", "bfloat16, compensated"]
    arguments = ["--optimizer", optimizer, "--steps", "20", "--modes", *modes]
    precision.main([*arguments, "--json", str(path)])
    run = json.loads(path.read_text())
    assert [row["mode"] for row in run["rows"]] == modes
    for row in run["rows"]:
        assert set(row["losses"]) == {"digits", "characters"}
        assert all(0 < loss < 10 for loss in row["losses"].values())
    precision.main(["--recorded", str(path)])
    text = precision.REPORT.read_text()
    assert text.startswith("before\n")
    assert text.endswith("after\n")
    assert all(f"| {mode} |" in text for mode in modes)


def test_a_pretrained_model_is_fine_tuned_on_what_is_not_held_out(precision, tmp_path, monkeypatch):
    tokenizers = pytest.importorskip("tokenizers")  # which mlx-lm brings

    weights, tokenizer_file = (tmp_path / name for name in ("v.safetensors", "tokenizer.json"))
    words = ["unknown", "the", "a", "of", "is", "to", "and", "in"]
    model = tokenizers.models.WordLevel({w: i for i, w in enumerate(words)}, words[0])
    tokenizer = tokenizers.Tokenizer(model)
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    tokenizer.save(str(tokenizer_file))
    mx.save_safetensors(str(weights), {"vectors": mx.random.normal((8, 16)).astype(mx.float16)})
    monkeypatch.setattr(precision.passages, "files", lambda: [weights, tokenizer_file])
    task, source = precision.topics(size=8), precision.passages.Passages()
    for held_out in (False, True):
        tokens, topics = source.draw(50, held_out)
        assert tokens.shape == (50, precision.passages.TOKENS)
        for row, topic in zip(tokens.tolist(), topics.tolist(), strict=True):
            ids = source.tokens[topic].tolist()
            border = len(ids) * 9 // 10
            part = ids[border:] if held_out else ids[:border]
            assert any(part[i : i + len(row)] == row for i in range(len(part)))
    choice = precision.CHOICES["adamw"]
    losses = {
        name: precision.train(task, choice, choice.modes[name], 20)
        for name in ("float32", "float32, moments 8 bits")
    }
    assert all(0 < loss < 10 for loss in losses.values())


def test_costs_alone_train_nothing(precision, tmp_path, monkeypatch):
    monkeypatch.setattr(precision, "ELEMENTS", {mx.cpu: 4096, mx.gpu: 4096})
    monkeypatch.setattr(precision, "train", None)
    path = tmp_path / "run.json"
    modes = ["float32", "bfloat16, master"]
    precision.main(["--costs", "--modes", *modes, "--json", str(path)])
    run = json.loads(path.read_text())
    assert [row["mode"] for row in run["rows"]] == modes
    assert all(row["costs"]["milliseconds"] > 0 and not row["losses"] for row in run["rows"])
    assert run["options"].keys() == precision.CHOICES["sgd"].options.keys()


def test_modes_of_another_optimizer_are_an_error(precision, capsys):
    with pytest.raises(SystemExit):
        precision.main(["--optimizer", "adamw", "--modes", "bfloat16, momentum float32"])
    assert "--modes: got bfloat16, momentum float32, allowed float32" in capsys.readouterr().err


def test_costs_of_nothing_are_an_error(precision, capsys):
    with pytest.raises(SystemExit):
        precision.main(["--costs-of", "run.json"])
    assert "--costs-of: got no --recorded" in capsys.readouterr().err


def test_too_few_steps_are_an_error(precision, capsys):
    with pytest.raises(SystemExit):
        precision.main(["--steps", "3"])
    assert "got 3, allowed 20 to 100000" in capsys.readouterr().err


def test_a_step_in_bfloat16_learns_digits_as_float32_does(precision):
    """Pure bfloat16 stays behind, the compensated one does not."""
    task, choice = precision.digits(), precision.CHOICES["sgd"]
    losses = {
        name: precision.train(task, choice, choice.modes[name], 200)
        for name in ("float32", "bfloat16", "bfloat16, compensated")
    }
    behind = losses["bfloat16"] - losses["float32"]
    assert behind > 0
    assert abs(losses["bfloat16, compensated"] - losses["float32"]) < behind / 4


def test_the_table_is_that_of_the_recorded_runs(precision, tmp_path, monkeypatch):
    losses, costs = (RECORDED / f"{name}.json" for name in ("h200", "h100-costs"))
    copy = tmp_path / "precision.md"
    copy.write_text(REPORT.read_text())
    monkeypatch.setattr(precision, "REPORT", copy)
    precision.main(["--recorded", str(losses), "--costs-of", str(costs)])
    assert copy.read_text() == REPORT.read_text()
