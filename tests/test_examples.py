"""The programs in examples/ do what they say."""

import importlib.util
import re
import sys
from pathlib import Path

import pytest
from ring import started

EXAMPLES = Path(__file__).parent.parent / "examples"


def load(name: str):
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_a_learning_rate_is_learnt():
    first, best = load("meta_learning_rate").main()
    assert best < first / 10


def test_a_larger_model_fits_with_small_states():
    """Of 16 + 2 bytes a parameter and of 7.1 + 2."""
    wide, small = load("largest_model").main(48).values()
    assert small > 1.8 * wide > 0


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
