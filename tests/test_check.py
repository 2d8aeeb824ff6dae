"""``python -m mlx_fused_optim.check``: it says yes where all holds, and no where not."""

import json
import subprocess
import sys

import mlx.core as mx
import pytest
from mlx_fused_optim import check, reference
from mlx_fused_optim._requirements import MLX_VERSION


@pytest.fixture(autouse=True)
def same_device():
    before = mx.default_device()
    yield
    mx.set_default_device(before)


def test_all_held(capsys):
    assert check.main(["--device", "cpu", "--seconds", "0"]) == 0
    out = capsys.readouterr().out
    assert out.count("| yes |") == 6 and "| no |" not in out and "All held, in" in out
    assert f"| mlx | {MLX_VERSION} |" in out and "| device | Device(cpu, 0)" in out


@pytest.fixture
def small(monkeypatch):
    monkeypatch.setattr(check, "OPTIMIZERS", {"AdamW": check.OPTIMIZERS["AdamW"]})
    monkeypatch.setattr(check, "BEYOND", {})
    monkeypatch.setattr(check, "SHARED", {})
    monkeypatch.setattr(check, "MODELS", [check.Model("two small tensors", [(3,), (4, 5)])])
    monkeypatch.setattr(check, "COPIED", 1 << 12)


def test_speed_is_shown(small, capsys):
    assert check.main(["--seconds", "0.05"]) == 0
    rows = [line for line in capsys.readouterr().out.splitlines() if "two small" in line]
    assert [row.count(" ms, ") for row in rows] == [3, 3]
    assert [row.count(" GB/s |") for row in rows] == [3, 3]
    assert rows[1].startswith("| AdamW, ") and rows[1].endswith("% |")


def test_what_is_printed_is_written_down(small, tmp_path, capsys):
    file = tmp_path / "check.json"
    assert check.main(["--seconds", "0.05", "--json", str(file)]) == 0
    record = json.loads(file.read_text())
    assert record["held"] and record["environment"]["mlx"] == MLX_VERSION
    assert all(row["wrong"] == [] for row in record["checks"])
    assert sum(row["asked"] for row in record["checks"]) > 10
    assert record["copy_gb_s"] > 0
    sgd, adamw = record["steps"]
    # 23 elements of 4 bytes, 5 times and 7: parameter and moments both ways, gradient in.
    for step, moved in ((sgd, 23 * 4 * 5), (adamw, 23 * 4 * 7)):
        assert step["ms"].keys() == step["gb_s"].keys() == {"fused", "mlx", "mlx compiled"}
        for name, ms in step["ms"].items():
            assert step["gb_s"][name] == pytest.approx(moved / ms / 1e6)
    shown = capsys.readouterr().out
    assert f"{adamw['ms']['fused']:.2f} ms, {adamw['gb_s']['fused']:.0f} GB/s" in shown


def test_what_is_wrong_is_written_down(small, tmp_path, monkeypatch):
    monkeypatch.setattr(check, "check_schedules", lambda: check.Result("question", 1, ["step 3"]))
    file = tmp_path / "check.json"
    assert check.main(["--json", str(file)]) == 1
    record = json.loads(file.read_text())
    assert not record["held"] and record["steps"] == []
    assert {"question": "question", "asked": 1, "wrong": ["step 3"]} in record["checks"]


def test_the_copy_makes_no_memory(monkeypatch):
    monkeypatch.setattr(check, "COPIED", 1 << 20)
    made = []
    # A GPU's worker may let go of an array late, of which a copy then is a new one: not each time.
    for _ in range(5 if mx.is_available(mx.gpu) else 1):
        mx.synchronize()
        before = mx.get_active_memory()
        mx.reset_peak_memory()
        assert check.copy_speed(4) > 0
        mx.synchronize()
        made.append(mx.get_peak_memory() - before)
    assert min(made) <= 4 * (1 << 20) + (1 << 16)


def test_a_wrong_step_is_found(capsys, monkeypatch):
    monkeypatch.setattr(check, "DTYPES", {"float32": mx.float32})
    monkeypatch.setattr(check, "BEYOND", {})
    right = reference.step

    def no_decay(*arguments, weight_decay=0.0, **options):
        return right(*arguments, **options)

    monkeypatch.setattr(reference, "step", no_decay)
    assert check.main(["--seconds", "0"]) == 1
    out = capsys.readouterr().out
    assert "NOT ALL HELD" in out
    for name in ("weight decay", "AdamW", "Lion"):
        assert f"- bits of float32 arithmetic, rounded once: {name}, float32, " in out
    (row,) = [line for line in out.splitlines() if line.startswith("| bits of float32 arith")]
    assert row.endswith("| no |")


@pytest.mark.parametrize("name", ["Adam", "AdamW", "Adamax", "Lion", "RMSprop", "AdaDelta"])
def test_a_wrong_rule_is_found(name, capsys, monkeypatch):
    """Other moments than MLX's: neither its bits nor those of its operations."""
    case = check.OPTIMIZERS[name]
    other = {"RMSprop": {"alpha": 0.9}, "AdaDelta": {"rho": 0.8}}.get(name, {"betas": (0.8, 0.7)})
    wrong = check.Case(case.optimizer, {**case.options, **other})
    monkeypatch.setattr(check.Case, "of_mlx", lambda self: wrong.ours())
    monkeypatch.setattr(check, "OPTIMIZERS", {name: case})
    result = check.check_bits_of_mlx()
    assert result.wrong == [f"{name}, {layout}" for layout in check.LAYOUTS]
    moved = vars(reference)["_moved"]
    monkeypatch.setattr(reference, "_moved", lambda a, x, factor: moved(a, x, factor / 2))
    monkeypatch.setattr(check, "DTYPES", {"float32": mx.float32})
    assert all(name in what for what in check.check_parity().wrong)
    assert check.check_parity().wrong


@pytest.mark.parametrize(
    "wrong", [{"nesterov": False}, {"ns_steps": 4}, {"scale": "match_rms_adamw"}], ids=str
)
def test_a_wrong_muon_is_found(wrong, monkeypatch):
    assert check.check_muon().wrong == []
    right = check.optim.Muon
    monkeypatch.setattr(check.optim, "Muon", lambda *args, **kw: right(*args, **kw, **wrong))
    assert len(check.check_muon().wrong) >= 5


def test_muon_of_bfloat16_is_within_what_is_allowed(monkeypatch):
    """As a GPU's products are by default; not within what is allowed of float32's."""
    right = check.optim.Muon

    def half(rate, ns_dtype):
        return right(rate, ns_dtype=mx.bfloat16)

    monkeypatch.setattr(check.optim, "Muon", half)
    wrong = check.check_muon().wrong
    assert wrong and all("products of float32" in what for what in wrong)


def test_a_wrong_option_is_found(capsys, monkeypatch):
    monkeypatch.setattr(check, "OPTIMIZERS", {"AdamW": check.OPTIMIZERS["AdamW"]})
    right = reference.step

    def no_master(*arguments, master_weights=False, **options):
        return right(*arguments, **options)

    monkeypatch.setattr(reference, "step", no_master)
    assert check.main(["--seconds", "0"]) == 1
    out = capsys.readouterr().out
    assert "- options beyond mlx.optimizers, likewise: master_weights, float16" in out
    assert out.count("| no |") == 1


def test_another_device_is_compared_with_the_cpu(monkeypatch):
    result = check.check_bits_of_the_cpu()
    assert (result.asked, result.wrong) == (
        3 * (len(check.OPTIMIZERS) + len(check.BEYOND) + len(check.SHARED)) - 2,
        [],
    )

    for cases in ("OPTIMIZERS", "SHARED"):
        monkeypatch.setattr(check, cases, {})
    right, calls = check.everything_after, []

    def off_on_the_cpu(case, dtype, device):
        calls.append(device)
        arrays = right(case, dtype, device)
        if len(calls) % 2 == 0 and case == check.BEYOND["compensated"]:
            arrays[1] = arrays[1] + 1
        return arrays

    monkeypatch.setattr(check, "everything_after", off_on_the_cpu)
    wrong = check.check_bits_of_the_cpu().wrong
    assert wrong == [f"compensated, {dtype}" for dtype in check.DTYPES]


def test_an_exception_is_an_answer(capsys, monkeypatch):
    def broken(*arguments, **options):
        raise RuntimeError("no such kernel")

    monkeypatch.setattr(check.optim.FusedOptimizer, "apply_gradients", broken)
    assert check.main(["--seconds", "0"]) == 1
    out = capsys.readouterr().out
    # On a GPU one more: whether the CPU has the same bits.
    checks = 6 if mx.default_device() == mx.Device(mx.cpu) else 7
    assert out.count("| no |") == checks and "RuntimeError: no such kernel" in out


@pytest.mark.skipif(mx.is_available(mx.Device(mx.gpu)), reason="MLX has a GPU here")
def test_a_device_that_is_not_there_is_no_traceback(capsys):
    with pytest.raises(SystemExit) as stopped:
        check.main(["--device", "gpu"])
    assert stopped.value.code == 2
    assert "error: MLX has no gpu on this machine" in capsys.readouterr().err


def test_as_a_program():
    command = [sys.executable, "-m", "mlx_fused_optim.check", "--help"]
    help_text = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    assert "print a table for an issue" in help_text
