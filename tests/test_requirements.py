"""What importing the package demands, says and brings.

Each fault is real: a fresh folder of packages, arranged as a wrong installation leaves
them, and a new interpreter that sees nothing else.
"""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import mlx.core as mx
import mlx_fused_optim
import nanobind_backend
import pytest
from mlx_fused_optim._requirements import MLX_VERSION

MLX = Path(mx.__file__).parent
PACKAGE = Path(mlx_fused_optim.__file__).parent
BACKEND = Path(nanobind_backend.__file__).parent


class Site:
    """A folder in the place of site-packages."""

    def __init__(self, path):
        self.path = path
        path.mkdir()

    def link(self, *packages):
        for package in packages:
            (self.path / package.name).symlink_to(package)

    def link_mlx(self):
        # mlx, and on Linux the libraries that its backend brings beside it.
        beside = [*MLX.parent.glob("mlx*"), *MLX.parent.glob("nvidia*")]
        self.link(*(path for path in beside if not path.name.startswith(PACKAGE.name)))

    def copy_package(self):
        shutil.copytree(PACKAGE, self.path / PACKAGE.name)

    def patch_extension(self, pattern, replacement):
        """Change one string of the copied extension, for another of its length."""
        (extension,) = (self.path / PACKAGE.name).glob("_ext*.so")
        image, count = re.subn(pattern, replacement, extension.read_bytes())
        assert count == 1
        extension.write_bytes(image)
        if sys.platform == "darwin":  # which loads only what is signed
            subprocess.run(["codesign", "--force", "--sign", "-", extension], check=True)

    def python(self, code):
        # -S hides the real site-packages; a clean environment, the libraries.
        return subprocess.run(
            [sys.executable, "-S", "-c", code],
            env={"PYTHONPATH": str(self.path)},
            capture_output=True,
            text=True,
            timeout=60,
        )

    def import_error(self):
        """The last line of the traceback of importing the package."""
        result = self.python("import mlx_fused_optim")
        assert result.returncode == 1, result
        message = result.stderr.strip().splitlines()[-1]
        assert message.startswith("ImportError: [mlx_fused_optim] "), result.stderr
        return message


@pytest.fixture
def site(tmp_path):
    site = Site(tmp_path / "site")
    site.copy_package()
    return site


def test_a_right_installation_imports(site):
    site.link(BACKEND)
    site.link_mlx()
    result = site.python("import mlx_fused_optim; print(mlx_fused_optim.__file__)")
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith(str(site.path))


def test_mlx_is_not_installed(site):
    site.link(BACKEND)
    message = site.import_error()
    assert "MLX is not installed" in message
    assert "pip install 'mlx-fused-optim[cpu]'" in message


def test_the_version_of_mlx_is_wrong(site):
    site.link(BACKEND)
    (site.path / "mlx").mkdir()
    (site.path / "mlx" / "core.py").write_text("__version__ = '0.31.9'\n")
    message = site.import_error()
    assert f"the wrong version of MLX: got 0.31.9, allowed {MLX_VERSION} only" in message
    assert "pip install 'mlx-fused-optim[cpu]'" in message


def test_mlx_has_no_backend(site):
    # What `pip install mlx` leaves on Linux: all of MLX but lib/libmlx.so.
    site.link(BACKEND)
    shutil.copytree(MLX, site.path / "mlx", ignore=shutil.ignore_patterns("lib", "include"))
    message = site.import_error()
    assert "MLX is installed but does not load" in message
    assert "libmlx" in message
    assert "pip install 'mlx-fused-optim[cpu]' (or [cuda12], [cuda13])" in message


def test_the_nanobind_backend_is_missing(site):
    site.link_mlx()
    message = site.import_error()
    assert "the compiled extension does not load" in message
    assert "nanobind-backend" in message


def test_the_nanobind_backend_refuses_the_extension(site):
    # nanobind compares this tag of compiler and library before it serves anyone.
    site.link(BACKEND)
    site.link_mlx()
    site.patch_extension(rb"\0nanobind_(?!backend)(\w+)\0", rb"\0nanobinD_\1\0")
    message = site.import_error()
    assert "the compiled extension does not load" in message
    assert "nanobinD_" in message
    assert "pip install --force-reinstall" in message


def test_the_extension_does_not_share_mlx_types(site):
    # In another nanobind domain it loads, but mlx.core.array is a stranger to it.
    site.link(BACKEND)
    site.link_mlx()
    site.patch_extension(rb"\0mlx\0", rb"\0mly\0")
    message = site.import_error()
    assert "does not see MLX's arrays" in message
    assert "pip install --force-reinstall" in message


def test_import_brings_nothing_else():
    """What it costs beside mlx.optimizers is its own modules: none of Python's or of
    anybody's that MLX has not brought already, and of its own none that only some need."""
    code = (
        "import sys, mlx.optimizers; before = set(sys.modules); import mlx_fused_optim; "
        "print(*sorted(set(sys.modules) - before))"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, check=True, text=True
    )
    brought = set(result.stdout.split())
    own = {name for name in brought if name.partition(".")[0] == "mlx_fused_optim"}
    others = {name for name in brought - own if name.partition(".")[0] != "nanobind_backend"}
    assert "mlx_fused_optim.optimizers" in own
    assert others <= {"__future__", "weakref", "_weakrefset"}  # small ones
    rarely = {"accel", "check", "reference", "schedules.drawing", "schedules.__main__"}
    assert own.isdisjoint(f"mlx_fused_optim.{name}" for name in rarely)
