"""The programs in examples/ do what they say."""

import importlib.util
from pathlib import Path

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
