"""docs/architecture.md says how a rule is added, with an example: applied to a copy of the
sources, built, and trained with.

As a program, this file is what is run with that build: ``train``.
"""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

ROOT = Path(__file__).parents[1]
# A line that ends in the name of a file and a colon; then a block.
BLOCK = r"^[^\n]*`([\w./]+)`:\n\n```(\w+)\n(.*?)^```$"


def example() -> list[tuple[str, str, str]]:
    """Its blocks: file, language, text."""
    text = (ROOT / "docs/architecture.md").read_text()
    section = text[text.index("\n**An optimizer.**") :]
    return re.findall(BLOCK, section, re.DOTALL | re.MULTILINE)


def apply(tree: Path, file: str, language: str, text: str) -> None:
    """A new file, or changes: parts between ``@@``, lines that stay, go (-) and come (+)."""
    path = tree / file
    if language != "diff":
        assert not path.exists(), f"{file} is there already"
        path.write_text(text)
        return
    now = path.read_text()
    for part in text.split("@@\n"):
        lines = part.splitlines(keepends=True)
        assert {line[0] for line in lines} <= set(" -+"), part
        old, new = ("".join(x[1:] for x in lines if x[0] != sign) for sign in "+-")
        assert now.count(old) == 1, f"{file} has not once:\n{old}"
        now = now.replace(old, new)
    path.write_text(now)


def built(tree: Path, folder: Path) -> Path:
    """The package of these sources, in a folder of its own; only the CPU's backend on Linux."""
    package = folder / "package"
    shutil.copytree(tree / "python", package)
    cmake = [sys.executable, "-m", "cmake"]
    options = ["-G", "Ninja", f"-DPython_EXECUTABLE={sys.executable}"]
    options += ["-DCMAKE_CXX_FLAGS_RELEASE=-O0 -DNDEBUG", "-DMLX_FUSED_OPTIM_CUDA=OFF"]
    options += [f"-DCMAKE_PROJECT_INCLUDE={ROOT}/tests/mutation/quick.cmake"]
    run([*cmake, "-S", tree, "-B", folder / "build", *options])
    run([*cmake, "--build", folder / "build"])
    shutil.copy(folder / "build/_ext.abi3.so", package / "mlx_fused_optim")
    return package


def run(command: list[str | Path], **environment: str) -> None:
    bin_folder = Path(sys.executable).parent  # where ninja is
    path = os.pathsep.join((str(bin_folder), os.environ["PATH"]))
    done = subprocess.run(
        command,
        env={**os.environ, "PATH": path, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert done.returncode == 0, done.stdout


def test_the_example_is_short():
    """A header, a row, a class, and the lines that export it."""
    blocks = example()
    kinds = [language for _, language, _ in blocks]
    assert kinds == ["cpp", "diff", "py", "diff", "diff"]
    changed = [line for _, kind, text in blocks if kind == "diff" for line in text.splitlines()]
    assert sum(line[0] == "+" for line in changed) <= 8
    assert sum(line[0] == "-" for line in changed) <= 1
    assert len(blocks[0][2].splitlines()) <= 30


def test_the_example_works(tmp_path):
    if not (os.environ.get("CXX") or shutil.which("c++")):
        pytest.skip("no C++ compiler")
    tree = tmp_path / "tree"
    for name in ("csrc", "cuda", "metal", "python"):
        shutil.copytree(ROOT / name, tree / name)
    shutil.copy(ROOT / "CMakeLists.txt", tree)
    for block in example():
        apply(tree, *block)
    package = str(built(tree, tmp_path))
    for composed in "01":
        run([sys.executable, __file__], PYTHONPATH=package, MLX_FUSED_OPTIM_COMPOSED=composed)


# ---- With the new rule -------------------------------------------------------------------

STEPS, BETA, DECAY = 4, 0.75, 0.5
SHAPES = [(5, 7), (), (0,), (2049,)]


def numbers(seed: int) -> list[np.ndarray]:
    """Multiples of 1/16 up to 2, of which all that follows is exact in float32. Every fifth is
    always 0, and so has no direction."""
    engine = np.random.default_rng(seed)
    found = [np.array(engine.integers(-32, 33, shape) / 16) for shape in SHAPES]
    for x in found:
        x.reshape(-1)[4::5] = 0
    return found


def expected(rate: float) -> list[tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]]:
    """By the formula in float64: of each tensor the parameter, m, its average by halves, and the
    last direction."""
    found = []
    for i, w in enumerate(numbers(0)):
        m, average, direction = np.zeros_like(w), w, w
        for step in range(1, STEPS + 1):
            g = numbers(step)[i] + DECAY * w
            m = BETA * m + (1 - BETA) * g
            direction = np.sign(m)
            w = w - rate * direction
            average = average + (w - average) / 2
        found.append((w, m, average, direction))
    return found


def arrays(seed: int, dtype: mx.Dtype = mx.float32) -> dict[str, mx.array]:
    return {str(i): mx.array(x, mx.float32).astype(dtype) for i, x in enumerate(numbers(seed))}


def assert_exact(got: mx.array, want: np.ndarray) -> None:
    np.testing.assert_array_equal(np.array(got.astype(mx.float32), np.float64), want)


def train() -> None:
    """With the package that has Signum."""
    import mlx_fused_optim as optim
    from mlx_fused_optim import Signum, fused_signum_init, fused_signum_step

    mx.set_default_device(mx.cpu)
    options = {"beta": BETA, "weight_decay": DECAY}

    # The class and the functions.
    optimizer, w = Signum(2**-4, **options), arrays(0)
    other, state = w, fused_signum_init(w, **options)
    for step in range(1, STEPS + 1):
        w = optimizer.apply_gradients(arrays(step), w)
        other, state = fused_signum_step(other, arrays(step), state, learning_rate=2**-4, **options)
    kept = optimizer.unpacked_state()
    directions = set()
    for i, (parameter, m, _, direction) in enumerate(expected(2**-4)):
        assert_exact(w[str(i)], parameter)
        assert_exact(other[str(i)], parameter)
        assert_exact(kept[str(i)]["m"], m)
        directions |= set(direction.reshape(-1))
    assert directions == {-1, 0, 1}
    assert (
        repr(optimizer)
        == "Signum(learning_rate=array(0.0625, dtype=float32), beta=0.75, weight_decay=0.5)"
    )

    # Options that all share: what the steps below bfloat16's last bit add up to.
    optimizer = Signum(2**-10, **options, master_weights=True, ema_decay=0.5)
    w = arrays(0, mx.bfloat16)
    for step in range(1, STEPS + 1):
        w = optimizer.apply_gradients(arrays(step), w)
    kept = optimizer.unpacked_state()
    for i, (parameter, _, average, _) in enumerate(expected(2**-10)):
        assert w[str(i)].dtype == mx.bfloat16
        assert_exact(kept[str(i)]["master"], parameter)
        assert_exact(kept[str(i)]["ema"], average)
        rounded = mx.array(parameter, mx.float32).astype(mx.bfloat16).astype(mx.float32)
        assert_exact(w[str(i)], np.array(rounded, np.float64))
    assert not np.array_equal(np.array(kept["3"]["master"]), np.array(w["3"].astype(mx.float32)))

    # A number of its own on a schedule and of a group, and one that makes no sense.
    falling = optim.linear_schedule(0.75, 0.25, 2)
    scheduled = Signum(2**-4, falling)
    grouped = Signum(2**-4, groups=[(lambda *_: True, {"beta": falling})])
    one = two = three = arrays(0)
    m = np.zeros(SHAPES[3])
    want = numbers(0)[3]
    for step in range(STEPS):
        beta = max(0.75 - 0.25 * step, 0.25)
        m = beta * m + (1 - beta) * numbers(step)[3]
        want = want - 2**-4 * np.sign(m)
        one = scheduled.apply_gradients(arrays(step), one)
        two = grouped.apply_gradients(arrays(step), two)
    assert_exact(one["3"], want)
    assert_exact(two["3"], want)
    with pytest.raises(ValueError, match=r"^\[Signum\] beta is out of range: got 1.0, allowed"):
        Signum(0.1, beta=1.0)

    # Transforms: the derivative by the learning rate is the direction.
    g, begun = arrays(1), fused_signum_init(three)

    def stepped(rate: mx.array) -> mx.array:
        return fused_signum_step(three, g, begun, learning_rate=rate)[0]["3"]

    _, (slope,) = mx.jvp(stepped, [mx.array(0.5)], [mx.array(1.0)])
    assert_exact(slope, -np.sign(numbers(1)[3]))

    # And it trains: to within a few steps' length of the least loss.
    target, w = mx.array(numbers(7)[3], mx.float32), {"w": mx.zeros(SHAPES[3])}
    optimizer = Signum(optim.linear_schedule(0.1, 1e-3, 100), beta=0.5)
    loss = mx.value_and_grad(lambda w: mx.mean(mx.square(w["w"] - target)))
    first, _ = loss(w)
    for _ in range(100):
        w = optimizer.apply_gradients(loss(w)[1], w)
    assert loss(w)[0] < 1e-3 * first


if __name__ == "__main__":
    train()
