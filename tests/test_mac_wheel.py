"""The audit of the macOS wheel finds what is planted. Runs after ``make mac-wheel``."""

import importlib.util
import re
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
WORK = ROOT / "build/mac"
WHEELS = list(WORK.glob("wheel/*.whl"))
if not WHEELS:
    pytest.skip("no macOS wheel has been built here: make mac-wheel", allow_module_level=True)

spec = importlib.util.spec_from_file_location("audit", ROOT / "tools/audit_mac_wheel.py")
audit = importlib.util.module_from_spec(spec)
spec.loader.exec_module(audit)

SDK = WORK / "sdk"
MLX = sorted(WORK.glob("mlx-metal-*/mlx/lib/libmlx.dylib"))


def planted(folder: Path, change=lambda binary: binary, name=None, extra=None) -> Path:
    """A copy of the wheel with another extension, another name, or one file more."""
    copy = folder / (name or WHEELS[0].name)
    with zipfile.ZipFile(WHEELS[0]) as old, zipfile.ZipFile(copy, "w") as new:
        for item in old.namelist():
            data = old.read(item)
            if item == audit.EXTENSION:
                changed = change(data)
                assert len(changed) == len(data)
                data = changed
            new.writestr(item, data)
        if extra:
            new.writestr(extra, b"")
    return copy


def swapped(old: bytes, new: bytes):
    """Every ``old`` of the binary becomes ``new``, of the same length."""

    def change(binary: bytes) -> bytes:
        assert old in binary
        return binary.replace(old, new)

    return change


def words(*numbers: int) -> bytes:
    return b"".join(number.to_bytes(4, "little") for number in numbers)


# In a Mach-O file: LC_BUILD_VERSION (0x32) has 32 bytes, platform 1 (macOS) and the
# version as x.y.z in 16, 8 and 8 bits; LC_CODE_SIGNATURE (0x1d) has 16 bytes, as
# LC_SOURCE_VERSION (0x2a) has.
PLANTED = {
    "newer macOS": (
        swapped(words(0x32, 32, 1, 14 << 16), words(0x32, 32, 1, 26 << 16)),
        "the oldest macOS is not 14.0",
    ),
    "another rpath": (
        swapped(b"@loader_path/../mlx/lib", b"/Users/somebody/mlx/lib"),
        "the rpath is not",
    ),
    "no signature": (
        swapped(words(0x1D, 16), words(0x2A, 16)),
        "not signed",
    ),
    "another library": (
        swapped(b"/usr/lib/libobjc.A.dylib", b"/opt/lib/libobjc.A.dylib"),
        "libraries that it must not need",
    ),
    "an Intel binary": (
        lambda binary: binary[:4] + words(0x01000007) + binary[8:],
        "not a bundle for arm64",
    ),
    "a symbol that MLX lacks": (
        swapped(
            b"__ZN3mlx4core5metal6deviceENS0_6DeviceE", b"__ZN3mlx4core5metal6devicfENS0_6DeviceE"
        ),
        "not exported by",
    ),
    "a symbol that macOS lacks": (
        swapped(b"\0_memcpy\0", b"\0_memcpz\0"),
        "_memcpz: not exported by libSystem",
    ),
    "no function of the limited API": (
        swapped(b"\0_PyDict_Next\0", b"\0_PyDict_Nexd\0"),
        "not within Python's limited API",
    ),
    "a public name": (
        swapped(b"_PyInit__ext", b"_PyInit__txe"),
        "exports more than its initialisation",
    ),
}


def test_the_wheel_itself_has_no_findings():
    assert len(MLX) == 3
    assert list(audit.findings(WHEELS[0], SDK, MLX)) == []


@pytest.mark.parametrize("plant", PLANTED)
def test_planted_in_the_binary(plant, tmp_path):
    change, finding = PLANTED[plant]
    found = list(audit.findings(planted(tmp_path, change), SDK, MLX))
    assert any(finding in f for f in found), found


def test_planted_in_the_wheel(tmp_path):
    wrong_tag = WHEELS[0].name.replace("macosx_14_0", "macosx_13_0")
    assert "the wheel's tag is not" in " ".join(
        audit.findings(planted(tmp_path, name=wrong_tag), SDK, MLX)
    )
    for extra, finding in {
        "mlx/lib/libmlx.dylib": "the binaries are not only",
        "setup.cfg": "a file outside of the package",
    }.items():
        found = list(audit.findings(planted(tmp_path, extra=extra), SDK, MLX))
        assert any(finding in f for f in found), found


def test_one_older_mlx_is_enough(tmp_path):
    """A symbol must be in every MLX, not in one of them."""
    symbol = b"_ZN3mlx4core5metal6deviceENS0_6DeviceE"
    older = tmp_path / "libmlx.dylib"
    older.write_bytes(MLX[0].read_bytes().replace(symbol, symbol[:-1] + b"F"))
    found = list(audit.findings(WHEELS[0], SDK, [*MLX, older]))
    assert found and all(re.search(f"not exported by {older}", f) for f in found)
