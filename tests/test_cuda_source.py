"""CUDA's kernels are source that NVRTC compiles: every kind of step for every generation of
GPUs, without one, by the package nvidia-cuda-nvrtc and the backend's own C++."""

import glob
import importlib.util
import itertools
import os
import pathlib
import shutil
import subprocess
import sys

import pytest
from mlx_fused_optim import _ext

ROOT = pathlib.Path(__file__).parents[1]
CAPABILITIES = [80, 90, 100, 120]

# Kind, Type and fused_math::ScheduleKind, in the order of csrc/cuda/variants.h, csrc/cuda/launch.h
# and csrc/math/schedule.h.
PLAIN = range(5)
TILED, STRIDED, DENSE, SPARSE, FOLD, FINISH, SCHEDULE = range(5, 12)
FLOAT32, FLOAT16, BFLOAT16 = TYPES = range(3)
ANY_TYPE = 7
GENERIC = 2**32 - 1
NO_SCHEDULE, COSINE, ANY_SCHEDULE = (0, 0), (1 << 2, 8), (GENERIC, GENERIC)

# What a full step consists of; the first of each line is one that has no other of its kind.
FULL_STEPS = [
    "maximize",
    "grad_scale clip_value clip_norm momentum",
    "skip_nonfinite momentum nesterov",
    "trust_ratio weight_decay decoupled momentum clip_norm",
    "groups momentum nesterov weight_decay trust_ratio",
    "master_weights momentum weight_decay",
    "master_weights momentum stochastic groups",
    "master_weights momentum ema",
    "compensated momentum weight_decay",
    "compensated momentum stochastic ema",
    "stochastic momentum weight_decay",
    "ema",
    "momentum nesterov weight_decay decoupled maximize grad_scale clip_value clip_norm "
    "skip_nonfinite trust_ratio groups master_weights stochastic ema",
]
OF_HALF_TYPES = {"master_weights", "compensated"}


def flags_of(names):
    bits = {**_ext.FLAGS, **_ext.RULES[0]["flags"]}
    return sum(bits[name] for name in names.split())


def variants():
    """(kind, parameter, momentum, set of gradients' types, flags, schedule's kinds and flags)"""
    plain = itertools.cycle(["momentum", "", "momentum nesterov weight_decay"])
    for kind, dtype in itertools.product(PLAIN, TYPES):
        yield kind, dtype, dtype, 1 << dtype, flags_of(next(plain)), *NO_SCHEDULE
    turn = itertools.count()
    for names, dtype in itertools.product(FULL_STEPS, TYPES):
        if dtype == FLOAT32 and OF_HALF_TYPES & {*names.split()}:
            continue
        number = next(turn)
        momentum = FLOAT32 if number % 3 == 1 else dtype
        gradients = 1 << (FLOAT32 if number % 5 == 2 else dtype)
        yield TILED, dtype, momentum, gradients, flags_of(names), *NO_SCHEDULE
        if number % 4 == 0:
            yield STRIDED, dtype, momentum, gradients, flags_of(names), *NO_SCHEDULE
    for number, kind in enumerate([DENSE, DENSE, DENSE, SPARSE]):
        scaled = flags_of("grad_scale clip_value") if number % 2 else 0
        yield kind, FLOAT32, FLOAT32, 1 << number % 3, scaled, *NO_SCHEDULE
    yield FOLD, FLOAT32, FLOAT32, 1, 0, *NO_SCHEDULE
    yield FINISH, FLOAT32, FLOAT32, 1, 0, *NO_SCHEDULE
    for kind in (0, TILED):
        yield kind, BFLOAT16, BFLOAT16, 1 << BFLOAT16, flags_of("momentum"), *COSINE
    # Every schedule, gradients of several types, and every option known at run time only.
    yield SCHEDULE, FLOAT32, FLOAT32, 1, 0, *ANY_SCHEDULE
    for kind in PLAIN:
        yield kind, BFLOAT16, BFLOAT16, ANY_TYPE, flags_of("momentum"), *ANY_SCHEDULE
    for kind, momentum in itertools.product([TILED, STRIDED], [FLOAT32, BFLOAT16]):
        yield kind, BFLOAT16, momentum, ANY_TYPE, GENERIC, *ANY_SCHEDULE
    for kind in (DENSE, SPARSE):
        yield kind, FLOAT32, FLOAT32, ANY_TYPE, flags_of("grad_scale"), *ANY_SCHEDULE


def nvrtc():
    """The library, newest first, or None."""
    spec = importlib.util.find_spec("nvidia")
    folders = spec.submodule_search_locations if spec else []
    found = [p for f in folders for p in glob.glob(f"{f}/**/libnvrtc.so.1[23]", recursive=True)]
    return max(found, key=os.path.basename, default=None)


@pytest.fixture(scope="module")
def compiler(tmp_path_factory):
    """Runs tests/cuda/variants_test.cpp: (its lines, its exit status)."""
    library, cxx = nvrtc(), os.environ.get("CXX") or shutil.which("c++")
    if not library or not cxx or not sys.platform.startswith("linux"):
        pytest.skip("needs Linux, a C++ compiler and the package nvidia-cuda-nvrtc")
    folder = tmp_path_factory.mktemp("nvrtc")
    script = ROOT / "cuda/source.cmake"
    subprocess.run(
        [sys.executable, "-m", "cmake", f"-DPROJECT_SOURCE_DIR={ROOT}", "-P", script],
        cwd=folder,
        check=True,
    )
    program = folder / "variants_test"
    sources = ["tests/cuda/variants_test.cpp", "csrc/cuda/compiler.cpp", "csrc/cuda/variants.cpp"]
    includes = [
        f"-I{i}" for i in (ROOT / "csrc", ROOT / "csrc/cuda/include", folder / "cuda_source")
    ]
    subprocess.run(
        [cxx, "-std=c++20", *includes, "-o", program, *(ROOT / s for s in sources), library],
        check=True,
    )
    # NVRTC looks for a part of its own when it compiles. What a test run may preload does not
    # concern it.
    environment = {k: v for k, v in os.environ.items() if k != "LD_PRELOAD"}
    environment["LD_LIBRARY_PATH"] = os.path.dirname(library)

    def run(what, lines=()):
        text = "".join(" ".join(map(str, line)) + "\n" for line in lines)
        result = subprocess.run(
            [program, what], input=text, capture_output=True, text=True, env=environment
        )
        return result.stdout.splitlines(), result.returncode

    return run


@pytest.mark.parametrize("part", range(4))  # so that they share the work of many processes
def test_every_kind_of_step_compiles_and_spills_nothing(compiler, part):
    """For sm_90, and for one of the others in turn; what takes long for one of them all."""
    each, others = itertools.cycle(CAPABILITIES), itertools.cycle([80, 100, 120])

    def capabilities(variant):
        return (next(each),) if variant[-2:] == ANY_SCHEDULE else (90, next(others))

    lines = [(c, *v) for v in variants() for c in capabilities(v)][part::4]
    said, status = compiler("machine", lines)
    assert status == 0 and len(said) == len(lines), "\n".join(said[-20:])
    for line in said:
        _, registers, stack, spilled, _, description = line.split("|")
        assert int(registers) > 0, line
        # Four blocks of the full step's threads at once, two of those for transposed gradients.
        limited = "full_tiled" in description or "transposed" in description
        assert not limited or int(registers) <= 64, line
        if "schedules 0xffffffff" not in description:  # of which one may spill
            assert (int(stack), int(spilled)) == (0, 0), line


def test_nothing_is_contracted(compiler):
    """Only schedules have a fused multiply-add, and they say so. Of PTX, which is what a GPU that
    NVRTC does not know gets."""
    kernels = [
        (0, FLOAT32, FLOAT32, 1, flags_of("momentum nesterov weight_decay")),
        (2, BFLOAT16, BFLOAT16, 4, flags_of("momentum weight_decay")),
        (TILED, BFLOAT16, FLOAT32, 4, flags_of(FULL_STEPS[-1])),
        (DENSE, FLOAT32, FLOAT32, 1, flags_of("grad_scale clip_value")),
        (FOLD, FLOAT32, FLOAT32, 1, 0),
    ]
    said, status = compiler("ptx", [(0, *k, *NO_SCHEDULE) for k in kernels])
    assert status == 0 and len(said) == len(kernels), "\n".join(said)
    assert [line.split("|")[0] for line in said] == ["0"] * len(kernels), "\n".join(said)
    ((with_schedule,), _) = compiler("ptx", [(0, *kernels[0], *ANY_SCHEDULE)])
    assert int(with_schedule.split("|")[0]) > 0


def test_errors_have_the_words_of_the_compiler(compiler):
    said, status = compiler("broken")
    assert status == 1
    text = "\n".join(said)
    assert "--gpu-architecture=sm_90" in text
    assert 'error: identifier "no_such_thing" is undefined' in text


# ---- The files of compiled kernels ------------------------------------------------------


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Runs tests/cuda/disk_cache_test.cpp."""
    cxx = os.environ.get("CXX") or shutil.which("c++")
    if not cxx or not sys.platform.startswith("linux"):
        pytest.skip("needs Linux and a C++ compiler")
    program = tmp_path_factory.mktemp("disk_cache") / "disk_cache_test"
    sources = [ROOT / "tests/cuda/disk_cache_test.cpp", ROOT / "csrc/cuda/disk_cache.cpp"]
    subprocess.run([cxx, "-std=c++20", f"-I{ROOT}/csrc", *sources, "-o", program], check=True)

    def start(*arguments, **environment):
        return subprocess.Popen(
            [program, *map(str, arguments)],
            stdout=subprocess.PIPE,
            text=True,
            env={"PATH": os.environ["PATH"], **environment},
        )

    def run(*arguments, **environment):
        with start(*arguments, **environment) as process:
            said = process.communicate()[0].strip()
            assert process.returncode == 0
            return said

    run.start = start
    return run


def test_files_are_found_by_another_process(files, tmp_path):
    folder = dict(MLX_FUSED_OPTIM_KERNEL_CACHE=str(tmp_path / "a/b"))
    assert files("find", "key", **folder) == "none"
    files("keep", "key", "value", **folder)
    assert files("find", "key", **folder) == "found value"
    assert files("find", "another", **folder) == "none"
    assert [p.suffix for p in (tmp_path / "a/b").iterdir()] == [".kernel"]


def test_where_the_files_are(files, tmp_path):
    for environment, folder in [
        (dict(XDG_CACHE_HOME=str(tmp_path / "x")), tmp_path / "x/mlx_fused_optim"),
        (dict(HOME=str(tmp_path / "h")), tmp_path / "h/.cache/mlx_fused_optim"),
    ]:
        files("keep", "key", "value", **environment)
        assert len(list(folder.iterdir())) == 1
        assert files("find", "key", **environment) == "found value"
    for environment in ({}, dict(HOME=str(tmp_path), MLX_FUSED_OPTIM_KERNEL_CACHE="")):
        files("keep", "key", "value", **environment)
        assert files("find", "key", **environment) == "none"


def test_a_broken_file_is_made_anew(files, tmp_path):
    folder = dict(MLX_FUSED_OPTIM_KERNEL_CACHE=str(tmp_path))
    files("keep", "key", "some value", **folder)
    (path,) = tmp_path.iterdir()
    whole = path.read_bytes()
    flipped = whole[:-1] + bytes([whole[-1] ^ 1])
    for broken in (b"", whole[:5], whole[:8], whole[:-1], whole + b"x", flipped):
        path.write_bytes(broken)
        assert files("find", "key", **folder) == "none"
    files("keep", "key", "some value", **folder)
    assert path.read_bytes() == whole
    # Another key's file under this name is not taken for its own.
    files("keep", "other", "other value", **folder)
    (other,) = set(tmp_path.iterdir()) - {path}
    path.write_bytes(other.read_bytes())
    assert files("find", "key", **folder) == "none"


def test_a_folder_that_cannot_be_written_is_no_error(files, tmp_path):
    (tmp_path / "file").write_text("")
    folder = dict(MLX_FUSED_OPTIM_KERNEL_CACHE=str(tmp_path / "file/folder"))
    files("keep", "key", "value", **folder)
    assert files("find", "key", **folder) == "none"


def test_many_processes_at_once(files, tmp_path):
    """All write one key, again and again, and read it: whole or not at all."""
    folder = dict(MLX_FUSED_OPTIM_KERNEL_CACHE=str(tmp_path))
    processes = [files.start("together", 200, **folder) for _ in range(6)]
    for process in processes:
        said = process.communicate()[0]
        assert process.returncode == 0, said
    assert len(list(tmp_path.iterdir())) == 1  # and nothing temporary is left


def test_old_files_go(files, tmp_path):
    folder = dict(MLX_FUSED_OPTIM_KERNEL_CACHE=str(tmp_path))
    most = int(files("most"))
    for number in range(most):
        path = tmp_path / f"{number}.kernel"
        path.write_bytes(b"")
        os.utime(path, (number, number))
    files("keep", "key", "value", **folder)
    left = {p.name for p in tmp_path.iterdir()}
    assert len(left) == most + 1 - (most + 1) // 2
    assert "0.kernel" not in left and f"{most - 1}.kernel" in left
    assert files("find", "key", **folder) == "found value"
