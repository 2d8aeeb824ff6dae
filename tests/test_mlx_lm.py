"""mlx-lm's fine-tuning through its command line, with accel and without: a client that nobody here
wrote. The model and the data are made here, and nothing is downloaded."""

import argparse
import importlib
import itertools
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import mlx.core as mx
import mlx.optimizers
import mlx_fused_optim as optim
import pytest

lora = pytest.importorskip("mlx_lm.lora", reason="mlx-lm is not installed")

sys.path.insert(0, str(Path(__file__).parents[1] / "bench"))
import fine_tuning  # noqa: E402

KINDS = ["lora", "dora", "full"]
REPLACED = {"adam": "Adam", "adamw": "AdamW", "sgd": "SGD", "muon": "Muon"}
OTHERS = {"adafactor": "Adafactor"}
# A configuration file has these beside what a test is about.
USUAL = {
    "train": True,
    "iters": 6,
    "batch_size": 4,
    "num_layers": 2,
    "val_batches": 1,
    "steps_per_report": 2,
    "save_every": 4,
    "lora_parameters": {"rank": 4, "dropout": 0.0, "scale": 20.0},
    "learning_rate": 1e-2,
    "lr_schedule": {"name": "cosine_decay", "warmup": 1, "arguments": [1e-2, 5, 1e-3]},
}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tiny")
    fine_tuning.make(folder)
    return {"model": str(folder / "model"), "data": str(folder / "data")}


def configuration(tiny, folder, **options):
    """The file and the folder of the adapters. YAML has every JSON."""
    folder.mkdir(parents=True)
    adapters = folder / "adapters"
    (folder / "config.yaml").write_text(
        json.dumps({**tiny, **USUAL, "adapter_path": str(adapters), **options})
    )
    return str(folder / "config.yaml"), adapters


def assert_close(got, want, most=2e-6):
    """Both files of weights. The schedule's values have MLX's roundings or ours, a few ulp, and
    steps are of 0.01 at most; weights are of 1."""
    got, want = mx.load(str(got)), mx.load(str(want))
    assert got.keys() == want.keys()
    for name, value in want.items():
        assert mx.abs(got[name] - value).max().item() <= most, name


# ---- In this process: every optimizer that a configuration offers -------------------------


@pytest.fixture
def tuned(tiny, tmp_path, monkeypatch, capsys):
    """Runs mlx-lm's own main with a configuration, eagerly: its compiled functions would compile
    C++ for each. Gives the file of weights and the optimizer."""
    device = mx.default_device()
    mx.set_default_device(mx.cpu)
    mx.disable_compile()

    def tune(name, **options):
        made = []

        def train(*args, optimizer, **kwargs):
            made.append(optimizer)
            return own(*args, optimizer=optimizer, **kwargs)

        own = lora.train
        file, adapters = configuration(tiny, tmp_path / name, **options)
        with monkeypatch.context() as patch:
            patch.setattr(sys, "argv", ["mlx_lm.lora", "--config", file])
            patch.setattr(lora, "train", train)
            lora.main()
        return adapters / "adapters.safetensors", made[0]

    yield tune
    optim.uninstall()
    mx.enable_compile()
    mx.set_default_device(device)


def test_these_are_the_optimizers_that_it_offers():
    assert lora.CONFIG_DEFAULTS["optimizer_config"].keys() == {*REPLACED, *OTHERS}


@pytest.mark.parametrize("kind, name", list(itertools.product(KINDS, REPLACED)))
def test_fine_tuning(tuned, kind, name):
    options = {"fine_tune_type": kind, "optimizer": name, "grad_accumulation_steps": 2}
    want, theirs = tuned("mlx", **options)
    optim.install()
    got, ours = tuned("ours", **options)
    assert type(theirs) is getattr(mlx.optimizers, REPLACED[name])
    assert isinstance(ours, getattr(optim, REPLACED[name]))
    assert ours._schedulers["learning_rate"].in_kernel
    assert ours.step.item() == theirs.step.item() == 3
    # Of adapters that have no gradient yet, Muon's direction is their decay: of norms about 1e-3,
    # to which MLX adds 1e-7.
    assert_close(got, want, 5e-6 if name == "muon" else 2e-6)


@pytest.mark.parametrize("name", OTHERS)
def test_an_optimizer_that_is_not_replaced(tuned, name):
    optim.install()
    _, optimizer = tuned("mlx", optimizer=name)
    assert type(optimizer) is getattr(mlx.optimizers, OTHERS[name])


def test_options_of_an_optimizer_from_the_configuration(tuned):
    """Those of MLX's, and those that only ours has."""
    config = {"adamw": {"weight_decay": 0.5, "betas": [0.8, 0.9], "eps": 1e-6}}
    want, _ = tuned("mlx", optimizer="adamw", optimizer_config=config)
    optim.install()
    got, optimizer = tuned("ours", optimizer="adamw", optimizer_config=config)
    assert optimizer.betas == (0.8, 0.9)
    assert_close(got, want)
    config["adamw"] |= {"clip_norm": 0.5, "skip_nonfinite": True}
    _, optimizer = tuned("more", optimizer="adamw", optimizer_config=config)
    assert optimizer.clip_norm == 0.5
    assert optimizer.grad_norm.item() > 0


def test_resuming_from_a_checkpoint(tuned):
    want, _ = tuned("mlx", optimizer="adam")
    optim.install()
    first, _ = tuned("ours", optimizer="adam")
    saved = first.parent / "0000004_adapters.safetensors"
    assert_close(saved, want.parent / saved.name)
    got, _ = tuned("on", optimizer="sgd", resume_adapter_file=str(saved))
    optim.uninstall()
    want, _ = tuned("on with mlx", optimizer="sgd", resume_adapter_file=str(saved))
    assert_close(got, want)


def test_gradient_checkpointing(tuned, monkeypatch):
    block = importlib.import_module("mlx_lm.models.llama").TransformerBlock
    results = []
    for name in ("mlx", "ours"):
        monkeypatch.setattr(block, "__call__", block.__call__)  # which mlx-lm replaces
        results.append(tuned(name, grad_checkpoint=True, optimizer="adam"))
        monkeypatch.undo()
        optim.install()
    assert isinstance(results[1][1], optim.Adam)
    assert_close(results[1][0], results[0][0])


# ---- Its command line -------------------------------------------------------------------


def test_command_line(tiny, tmp_path):
    """With a compiled step, and a test at the end; MLX's is eager, which costs a tenth."""

    def run(name, *accel, **environment):
        file, adapters = configuration(tiny, tmp_path / name, optimizer="adamw", test=True)
        environment |= {"PYTHONPATH": str(Path(optim.__file__).parents[1]), "HF_HUB_OFFLINE": "1"}
        result = subprocess.run(
            [sys.executable, *accel, "-m", "mlx_lm", "lora", "--config", file],
            env={**os.environ, **environment},
            capture_output=True,
            text=True,
        )
        assert result.returncode == 0, result.stderr
        (loss,) = re.findall(r"Test loss ([\d.]+)", result.stdout)
        return float(loss), result.stderr, adapters / "adapters.safetensors"

    loss, said, got = run("ours", "-m", "mlx_fused_optim.accel", "--report")
    want_loss, _, want = run("mlx", MLX_DISABLE_COMPILE="1")
    assert abs(loss - want_loss) <= 0.001  # the last of the digits that it prints
    if mx.default_device() == mx.Device(mx.cpu):  # a GPU's compiled step has other roundings
        assert_close(got, want)
    assert re.search(
        r"ours: AdamW\(learning_rate=join_schedules\(\[linear_schedule\(.*\), cosine_decay\(.*\)\]"
        r", \[2\]\)\)\n    6 steps of 28 tensors, [\d,]+ parameters, compiled\n",
        said,
    )


# ---- The benchmark ----------------------------------------------------------------------


def test_the_benchmark_writes_its_table(tmp_path, monkeypatch, capsys):
    """Of a fine-tune with moments that only ours has; the page keeps what is around the table."""
    page = tmp_path / "accelerate.md"
    page.write_text("before\n" + "old\n".join(fine_tuning.MARKS) + "after\n")
    monkeypatch.setattr(fine_tuning, "PAGE", page)
    run = fine_tuning.Run("full", "adamw", {"state_dtype": "8bit", "min_8bit_size": 0})
    monkeypatch.setattr(fine_tuning, "RUNS", [run])
    monkeypatch.setenv("PYTHONPATH", str(Path(optim.__file__).parents[1]))
    command = "fine_tuning.py --iters 20 --repeats 1 --layers 2 --width 32 --write"
    monkeypatch.setattr(sys, "argv", command.split())
    fine_tuning.main()
    text = page.read_text()
    assert text.startswith("before\n") and text.endswith("after\n") and "old" not in text
    assert capsys.readouterr().out in text
    (row,) = (line for line in text.splitlines() if line.startswith("| full"))
    name, trained, *numbers = row.strip("| ").split(" | ")
    assert name == "full, `adamw`, accel with `state_dtype: 8bit`, `min_8bit_size: 0`"
    assert trained.endswith(" tensors, 0.02 M")
    *times, _, _, alone, accelerated = map(float, numbers)
    assert min(times) > 0
    # Nearly the loss of float32 moments, and not to the digit.
    assert 0 < abs(alone - accelerated) < 0.05 * alone


@pytest.mark.parametrize("load, busy", [(1.9, False), (2.1, True)])
def test_the_benchmark_tells_a_busy_machine(load, busy):
    """A run itself is a load of 1, and of two cores half may be somebody else's."""
    given = argparse.Namespace(layers=2, width=8, iters=20, repeats=1)
    machine = {"processor": "any", "cores": 2, "load": 0.5}
    run = {"machine": machine, "versions": {"mlx": "1.2.3"}, "date": "2026-01-02"}
    assert ("busy with other work" in fine_tuning.caption(given, run, load)) == busy


def test_the_benchmarks_page_has_its_table():
    text = fine_tuning.PAGE.read_text()
    begin, end = map(text.index, fine_tuning.MARKS)
    table = text[begin:end]
    assert all(f"\n| {run} | " in table for run in fine_tuning.RUNS)
