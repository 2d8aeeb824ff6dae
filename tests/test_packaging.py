"""The installed package: what the wheel carries, and numbers that must agree."""

import importlib.metadata
import re
from pathlib import Path

import mlx_fused_optim
import pytest
from mlx_fused_optim._requirements import MLX_VERSION

NAME = "mlx-fused-optim"
ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def distribution():
    try:
        return importlib.metadata.distribution(NAME)
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("the package is not installed from a wheel")


def test_the_wheel_carries_types_extension_and_licence(distribution):
    files = {str(file) for file in distribution.files}
    assert {"mlx_fused_optim/py.typed", "mlx_fused_optim/_ext.pyi"} <= files
    assert "mlx_fused_optim/_ext.abi3.so" in files
    assert any(file.endswith("licenses/LICENSE") for file in files)
    # Nothing beside the package, and no libraries of others.
    tops = {file.split("/")[0] for file in files if not file.startswith("..")}
    assert tops == {"mlx_fused_optim", f"mlx_fused_optim-{mlx_fused_optim.__version__}.dist-info"}
    assert not any("libmlx." in file for file in files)


def test_one_wheel_serves_every_python_from_3_10(distribution):
    (tag,) = re.findall(r"^Tag: (.*)$", distribution.read_text("WHEEL"), re.MULTILINE)
    assert tag.startswith("cp310-abi3-")


def test_the_version_is_that_of_the_module(distribution):
    assert distribution.version == mlx_fused_optim.__version__


def test_every_requirement_of_mlx_is_the_version_that_is_checked():
    versions = re.findall(r'"mlx(?:\[\w+\])?==([\d.]+)"', (ROOT / "pyproject.toml").read_text())
    assert len(versions) == 5  # to build, to run, cpu, cuda12, cuda13
    assert set(versions) == {MLX_VERSION}


def test_public_names_exist_and_are_documented():
    for name in mlx_fused_optim.__all__:
        assert getattr(mlx_fused_optim, name).__doc__, name
