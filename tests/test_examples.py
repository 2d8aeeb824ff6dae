"""The programs in examples/ do what they say."""

import importlib.util
import re
import sys
from pathlib import Path

import mlx.core as mx
import mlx_fused_optim
import pytest
from ring import started

ROOT = Path(__file__).parent.parent
EXAMPLES = ROOT / "examples"


def load(name: str, folder: Path = EXAMPLES):
    spec = importlib.util.spec_from_file_location(name, folder / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_every_example_is_on_a_page_and_tested():
    pages = "".join(page.read_text() for page in (ROOT / "docs").rglob("*.md"))
    here = Path(__file__).read_text()
    for path in EXAMPLES.glob("*.py"):
        assert f"examples/{path.name}" in pages, path.name
        assert f'load("{path.stem}")' in here or f'"{path.name}"' in here, path.name


def test_a_learning_rate_is_learnt():
    first, best = load("meta_learning_rate").main()
    assert best < first / 10


def test_a_larger_model_fits_with_small_states():
    """Of 16 + 2 bytes a parameter and of 7.1 + 2."""
    wide, small = load("largest_model").main(48).values()
    assert small > 1.8 * wide > 0


def test_accumulated_gradients_make_the_step_of_a_large_batch():
    """Up to the order of sums: in the 20 steps of 0.01 the weights move by 0.2 at most, and where a
    gradient is nothing but rounding, AdamW moves by its sign. On CUDA MLX's products of matrices
    have the 10 bits of TF32, so that more gradients are."""
    allowed = 1e-3 if mx.default_device() == mx.cpu else 1e-2
    assert load("gradient_accumulation").main() < allowed


def test_float16_trains_and_skips():
    first, last, skipped = load("mixed_precision").main()
    assert last < first / 50
    assert 0 < skipped < 20


def test_groups_have_their_own_numbers():
    """The decay of a step is the rate times the decay, 0.1 each; of the head ten times that."""
    moved = load("parameter_groups").main()
    assert moved.pop("body.layers.0.weight") == pytest.approx(0.01, rel=1e-3)
    assert moved.pop("head.weight") == pytest.approx(0.1, rel=1e-3)
    assert set(moved.values()) == {0.0}


def test_a_resumed_run_has_the_bits_of_the_other():
    assert load("resume").main()


def test_the_average_is_better_than_what_it_is_of():
    last, average = load("moving_average").main()
    assert average < 1.15 < last


def test_moments_of_a_byte_train_as_wide_ones():
    (wide, loss), (small, other) = load("eight_bit_states").main().values()
    assert wide == pytest.approx(12, abs=0.1) and small == pytest.approx(3.1, abs=0.2)
    assert abs(other - loss) < 0.05 * loss


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_mlx_lm_takes_our_options(optimizer, tmp_path, monkeypatch):
    pytest.importorskip("mlx_lm", reason="mlx-lm is not installed")
    monkeypatch.setenv("PYTHONPATH", str(Path(mlx_fused_optim.__file__).parents[1]))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    load("fine_tuning", ROOT / "bench").make(tmp_path)
    options = ["--iters=2", "--num-layers=2", "--batch-size=4", "--val-batches=1"]
    report = load("fine_tune_mlx_lm").main(
        str(tmp_path / "model"),
        str(tmp_path / "data"),
        *(*options, "--adapter-path", str(tmp_path / "adapters"), "--optimizer", optimizer),
    )
    (ours,) = re.findall(r"ours: (\w+\(.*\))", report)
    wanted = {
        "adamw": r"AdamW\(.*state_dtype='8bit', min_8bit_size=0, clip_norm=1.0, skip_n",
        "muon": r"Muon\(.*scale='match_rms_adamw'",
    }
    assert re.search(wanted[optimizer], ours), ours
    assert "2 steps of" in report


@pytest.mark.parametrize("average", [[], ["--average"]], ids=["sharded", "averaged"])
def test_two_processes_train_one_model(average, tmp_path):
    """The program itself asks that they have the same model in the end."""
    program = [sys.executable, str(EXAMPLES / "data_parallel.py"), "--steps", "12", *average]
    with (tmp_path / "0").open("w") as first, (tmp_path / "1").open("w") as second:
        processes = started(2, program, [first, second])
        codes = [process.wait(timeout=120) for process in processes]
    told = (tmp_path / "0").read_text()
    assert codes == [0, 0], told + (tmp_path / "1").read_text()
    before, after = map(float, re.search(r"2 processes, loss (\S+) -> (\S+)", told).groups())
    assert after < before - 0.5
