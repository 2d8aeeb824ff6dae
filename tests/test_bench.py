"""The benchmark: its data, its verification, its files, and that the report is current."""

import importlib
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import mlx.core as mx
import mlx.optimizers
import mlx_fused_optim as optim
import pytest

pytest.importorskip("matplotlib")
pytest.importorskip("rich")

BENCH = Path(__file__).parent.parent / "bench"
sys.path.insert(0, str(BENCH))

import optimizers  # noqa: E402
import peers  # noqa: E402
import report  # noqa: E402
import shapes  # noqa: E402
import timing  # noqa: E402
import training  # noqa: E402

SMALL = shapes.Work(
    "small", "small", (("a.0.w", (3, 700)), ("a.0.b", (33,)), ("a.1.w", ()), ("b", (1, 1)))
)


@pytest.mark.parametrize("name", shapes.MODELS)
def test_model_data_is_complete(name):
    data = json.loads((shapes.DATA / f"{name}.json").read_text())
    work = shapes.load(name)
    assert work.elements == data["elements"]
    assert len(work.parameters) == data["tensors"]
    assert len(dict(work.parameters)) == data["tensors"]  # no path twice


def test_least_bytes():
    work = shapes.load("448x16x1024")
    assert work.elements == 448 * 16 * 1024
    assert work.least_bytes("float32", "sgd") == 5 * 4 * work.elements
    assert work.least_bytes("bfloat16", "sgd") == 5 * 2 * work.elements
    assert work.least_bytes("float32", "adamw") == 7 * 4 * work.elements


def test_unknown_shapes_are_refused():
    with pytest.raises(ValueError, match=r"\[shapes\] no such work: got '5M', allowed 16M"):
        shapes.load("5M")


# ---- Verification ----------------------------------------------------------------


@pytest.mark.parametrize("optimizer", peers.USUAL)
@pytest.mark.parametrize("dtype", shapes.ITEMSIZE)
@pytest.mark.parametrize("name", peers.available())
def test_peers_take_the_same_steps(name, dtype, optimizer):
    if name == "torch fused" and dtype == "bfloat16":
        pytest.skip("torch's fused CPU step skips whole vectors in half precision")
    options = replace(peers.USUAL[optimizer], dtype=dtype)
    peers.verify(name, peers.PEERS[name][1](SMALL, options), SMALL, options, steps=10)


@pytest.mark.parametrize("dtype", shapes.ITEMSIZE)
@pytest.mark.parametrize(
    "change",
    [{"momentum": 0.8}, {"weight_decay": 0.0}, {"init": 0.15}, {"scheduled": False}],
    ids=lambda change: next(iter(change)),
)
def test_verification_sees_another_step(change, dtype):
    right = peers.Options(dtype=dtype, weight_decay=0.1, decay_rate=0.9)
    wrong = peers.MlxPeer(SMALL, replace(right, **change), mlx.optimizers, compiled=False)
    with pytest.raises(peers.WrongResultError, match=r"\[verify\] 'mlx' is wrong in 'a\.0\.w'"):
        peers.verify("mlx", wrong, SMALL, right, steps=10)


@pytest.mark.parametrize("dtype", shapes.ITEMSIZE)
@pytest.mark.parametrize(
    "change",
    [{"optimizer": "sgd"}, {"weight_decay": 0.0}, {"init": 0.15}, {"scheduled": False}],
    ids=lambda change: next(iter(change)),
)
def test_verification_sees_another_step_of_adamw(change, dtype):
    """But for other betas: the gradient of a benchmark is the same at each step, of which Adam
    with bias correction makes its sign whatever they are."""
    right = replace(peers.USUAL["adamw"], dtype=dtype, init=0.1, weight_decay=0.5, decay_rate=0.8)
    wrong = peers.MlxPeer(SMALL, replace(right, **change), mlx.optimizers, compiled=False)
    with pytest.raises(peers.WrongResultError, match=r"\[verify\] 'mlx' is wrong in 'a\.0\.w'"):
        peers.verify("mlx", wrong, SMALL, right, steps=10)


def test_verification_sees_no_bias_correction():
    right = peers.USUAL["adamw"]
    wrong = peers.MlxPeer(SMALL, right, mlx.optimizers, compiled=False)
    wrong.optimizer.bias_correction = False
    with pytest.raises(peers.WrongResultError, match="'mlx' is wrong"):
        peers.verify("mlx", wrong, SMALL, right)


def test_verification_sees_a_part_left_out():
    class Idle(peers.MlxPeer):
        """Leaves the last tensor as it was."""

        def step(self):
            last = self.parameters["b"] + 0
            super().step()
            self.parameters["b"] = last

    options = peers.Options()
    idle = Idle(SMALL, options, mlx.optimizers, compiled=False)
    with pytest.raises(peers.WrongResultError, match="wrong in 'b'"):
        peers.verify("idle", idle, SMALL, options)


def in_order(time):
    return 0 < time["low_ms"] <= time["median_ms"] <= time["high_ms"]


# ---- Timing ----------------------------------------------------------------------


def test_candidates_take_turns():
    calls = []
    steps = {name: lambda name=name: calls.append(name) for name in "ab"}
    times = timing.time_in_turns(steps, seconds=0)
    turn = timing.WARM_STEPS + timing.STEPS
    assert calls == (["a"] * turn + ["b"] * turn) * timing.FEWEST_TURNS
    for time in times.values():
        assert time["steps"] == timing.FEWEST_TURNS * timing.STEPS
        assert len(time["turns_ms"]) == timing.FEWEST_TURNS
        assert in_order(time)


def test_a_share_is_a_difference_within_each_turn():
    """A host that is five times slower in one turn is so for both."""
    times = {
        "gradients alone": {"turns_ms": [10, 50, 10, 12]},
        "ours": {"turns_ms": [11, 51, 11.5, 13]},
        "mlx": {"turns_ms": [13, 53, 12, 16]},
    }
    training.add_shares(times)
    assert times["ours"]["share"]["median_ms"] == 1
    assert times["mlx"]["share"]["median_ms"] == 3
    assert "share" not in times["gradients alone"]


@pytest.mark.parametrize("name", ["ours", "ours compiled"])
@pytest.mark.parametrize("optimizer", peers.USUAL)
def test_a_donated_step_needs_no_new_memory(name, optimizer):
    work = shapes.load("448x64")
    peer = peers.PEERS[name][1](work, peers.USUAL[optimizer])
    for _ in range(3):
        peer.step()
    # The counter and the few numbers of the step are fresh, and MLX rounds sizes up;
    # parameters or momentum would be 100 KiB.
    assert timing.new_bytes(peer.step) <= 1024


def test_new_bytes_sees_an_allocation():
    held = []
    assert timing.new_bytes(lambda: held.append(mx.eval(mx.ones(1 << 16)))) >= 1 << 18


def test_training_steps_move_the_parameters():
    work, rows = training.lora_work(quick=True, device="cpu")
    loss = training.lora_loss(work, rows, mx.float32)
    made = training.candidates(work, peers.Options(), loss)
    before = loss(made["ours"].parameters).item()
    for _ in range(3):
        for candidate in made.values():
            candidate.step()
    after = {name: loss(candidate.parameters).item() for name, candidate in made.items()}
    assert after["gradients alone"] == after["gradients alone compiled"] == before
    for name in ("ours", "ours compiled", "mlx", "mlx compiled"):
        assert after[name] < before
        # The same steps: apart from roundings, which the chain of layers amplifies.
        assert after[name] == pytest.approx(after["mlx"], rel=1e-4)


# ---- Files -----------------------------------------------------------------------


def bench(*arguments):
    command = [sys.executable, str(BENCH / "bench.py"), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True)


@pytest.mark.parametrize("optimizer", peers.USUAL)
def test_quick_run_writes_json_and_png(tmp_path, optimizer):
    files = {"--json": tmp_path / "new" / "run.json", "--png": tmp_path / "new" / "run.png"}
    result = bench(
        "--quick", "--optimizer", optimizer, "--device", "cpu", "--shapes", "448x64,lora_training",
        "--peers", "ours,ours constant,mlx compiled", *(x for pair in files.items() for x in pair),
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    assert files["--png"].read_bytes().startswith(b"\x89PNG")
    run = json.loads(files["--json"].read_text())
    assert run["machine"]["cores"] >= 1
    assert run["optimizer"] == optimizer
    assert run["versions"]["mlx"] == mx.__version__
    step, lora = run["results"]
    assert (step["kind"], step["tensors"], step["wrong"]) == ("step", 448, {})
    assert list(step["candidates"]) == ["ours", "ours constant", "mlx compiled"]
    assert lora["kind"] == "training"
    assert {"gradients alone", "ours", "mlx compiled"} <= set(lora["candidates"])
    for time in (*step["candidates"].values(), *lora["candidates"].values()):
        assert in_order(time)
    share = lora["candidates"]["ours"]["share"]
    assert share["low_ms"] <= share["median_ms"] <= share["high_ms"]
    # Such a run can be reported.
    text = report.report({"run": run})
    assert {"sgd": ", SGD, float32, ", "adamw": ", AdamW, float32, "}[optimizer] in text
    assert "448 tensors of 64" in text
    assert "Scheduled against constant rate, ours:" in text
    step["date"] = "2001-02-03"  # of another run than the rest
    assert " elements), 2001-02-03\n" in report.report({"run": run})


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--shapes", "5M"], "--shapes: got '5M', allowed 16M"),
        (["--peers", "apex"], "--peers: got 'apex', here are ours"),
        (["--dtype", "float64"], "invalid choice: 'float64'"),
        (["--seconds", "0"], "--seconds: got 0.0, allowed more than 0"),
    ],
)
def test_bad_arguments(arguments, message, capsys):
    refused(importlib.import_module("bench"), arguments, message, capsys)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--works", "5M"], "--works: got 5M, allowed 16M"),
        (["--optimizers", "Adam,Lamb"], "--optimizers: got Lamb, allowed SGD,Adam"),
        (["--turns", "0"], "--turns: got 0, allowed 1 or more"),
    ],
)
def test_bad_arguments_for_every_optimizer(arguments, message, capsys):
    refused(optimizers, arguments, message, capsys)


def refused(program, arguments, message, capsys):
    with pytest.raises(SystemExit) as stopped:
        program.main(arguments)
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err


def test_every_optimizer_is_timed_beside_mlx(tmp_path, monkeypatch):
    few = shapes.Work("few", "few", (("a.w", (3, 4)), ("a.v", (5, 2)), ("b", (2, 2))))
    monkeypatch.setattr(shapes, "load", lambda name: few)
    path = tmp_path / "new" / "run.json"
    optimizers.main(["--works", "448x64", "--turns", "1", "--output", str(path)])
    run = json.loads(path.read_text())
    assert [result["optimizer"] for result in run["results"]] == [*optimizers.OPTIMIZERS]
    for result in run["results"]:
        assert list(result["candidates"]) == ["ours", "mlx compiled", "mlx"]
        assert all(time["steps"] == timing.STEPS for time in result["candidates"].values())
        assert all(map(in_order, result["candidates"].values()))


def test_another_step_is_not_timed_as_the_optimizers(monkeypatch):
    monkeypatch.setitem(optimizers.CANDIDATES, "ours", (SimpleNamespace(Adam=optim.AdamW), False))
    work = shapes.Work("one", "one", (("w", (64,)),))
    with pytest.raises(SystemExit, match=r"Adam: ours is .* from mlx, which moved"):
        optimizers.measure("Adam", work, optimizers.tree(work, 2), turns=1)


@pytest.mark.parametrize(
    "path", sorted(optimizers.RECORDS.glob("*.json")), ids=lambda path: path.stem
)
def test_recorded_runs_have_every_optimizer(path):
    run = json.loads(path.read_text())
    works = {
        name: {r["name"] for r in run["results"] if r["optimizer"] == name}
        for name in optimizers.OPTIMIZERS
    }
    usual = set(optimizers.WORKS[run["device"]])
    assert all(found == usual for name, found in works.items() if name != "Muon")
    assert works["Muon"]
    assert all(in_order(time) for r in run["results"] for time in r["candidates"].values())


@pytest.mark.parametrize(("load", "told"), [(0.9, False), (1.1, True)])
def test_report_tells_a_busy_machine(load, told):
    machine = {"processor": "any", "cores": 2, "load": load, "system": "Linux"}
    run = {"date": "", "machine": machine, "versions": {}, "dtype": "float32", "results": []}
    assert ("busy with other work" in report.report({"run": run})) == told


def test_report_is_current():
    runs = report.load()
    assert runs, "bench/results has no run"
    for path, text in report.written(runs).items():
        assert path.read_text() == text, f"{path.name}: run python bench/report.py"


def test_the_picture_hides_no_loss():
    """It has every work that its runs have in common, and says each time as the file does."""
    picture, runs = importlib.import_module("picture"), report.load()
    drawn = picture.draw(runs)
    timed_alone = {
        name: [r for r in runs[name]["results"] if r["kind"] == "step"] for name in picture.COLUMNS
    }
    common = set.intersection(*({r["name"] for r in steps} for steps in timed_alone.values()))
    assert picture.works(runs).keys() == common and len(common) >= 4
    for steps in timed_alone.values():
        for result in steps:
            if result["name"] in common:
                timed = picture.PEERS.keys() & result["candidates"].keys()
                assert timed >= picture.PEERS.keys() - {"optax jit"}
                for peer in timed:
                    assert f">{result['candidates'][peer]['median_ms']:.2f}<" in drawn
