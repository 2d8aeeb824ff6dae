"""The installed package: what the wheel carries, and numbers that must agree."""

import importlib.metadata
import importlib.util
import re
import shutil
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


def test_the_citation_has_the_version_too():
    (version,) = re.findall(r"^version: (.*)$", (ROOT / "CITATION.cff").read_text(), re.MULTILINE)
    assert version == mlx_fused_optim.__version__


def test_another_mlx_can_be_pinned(tmp_path):
    """tools/newest_mlx.py: everywhere, or it says that the files differ."""
    spec = importlib.util.spec_from_file_location("newest_mlx", ROOT / "tools/newest_mlx.py")
    newest_mlx = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(newest_mlx)
    for name in newest_mlx.FILES:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, tmp_path / name)
    assert newest_mlx.pin(tmp_path, "9.8.7") == MLX_VERSION
    texts = [(tmp_path / name).read_text() for name in newest_mlx.FILES]
    assert [text.count("9.8.7") for text in texts] == [5, 1]
    assert not any(f'"{MLX_VERSION}"' in text or f"=={MLX_VERSION}" in text for text in texts)
    (tmp_path / newest_mlx.FILES[1]).write_text('MLX_VERSION = "1.2.3"')
    with pytest.raises(ValueError, match=r"the files differ: got 1\.2\.3, 9\.8\.7, allowed"):
        newest_mlx.pin(tmp_path, "9.8.8")


def test_public_names_exist_and_are_documented():
    for name in mlx_fused_optim.__all__:
        assert getattr(mlx_fused_optim, name).__doc__, name
