"""CUDA's kernels are source that NVRTC compiles: every kind of step for every generation of
GPUs, without one, by the package nvidia-cuda-nvrtc and the backend's own C++."""

import collections
import glob
import importlib.util
import itertools
import os
import pathlib
import re
import shutil
import subprocess
import sys

import pytest
from mlx_fused_optim import _ext

ROOT = pathlib.Path(__file__).parents[1]
CAPABILITIES = [80, 90, 100, 120]

# Kind, Type and fused_math::ScheduleKind, in the order of csrc/cuda/variants.h, csrc/cuda/launch.h
# and csrc/math/schedule.h.
TILED, TURNED, STRIDED, DENSE, SPARSE, FOLD, FINISH, SCHEDULE = range(8)
FLOAT32, FLOAT16, BFLOAT16 = TYPES = range(3)
BYTES = 4  # of the state
ANY_TYPE = 7
GENERIC = 2**32 - 1
NO_SCHEDULE, COSINE, ANY_SCHEDULE = (0, 0), (1 << 2, 8), (GENERIC, GENERIC)

# The rules, with the flags of their own that they come with.
RULES = {rule["name"]: (number, rule["flags"]) for number, rule in enumerate(_ext.RULES)}
OWN = [
    "sgd",
    "sgd momentum",
    "sgd momentum nesterov",
    "adam",
    "adam bias_correction",
    "adam bias_correction amsgrad",
    *(name for name in RULES if name not in ("sgd", "adam", "muon")),
    "muon momentum nesterov",
]
# What else a step consists of; the first of each line is one that has no other of its kind.
FRAMES = [
    "maximize",
    "grad_scale clip_value clip_norm",
    "skip_nonfinite",
    "trust_ratio weight_decay decoupled clip_norm",
    "groups weight_decay trust_ratio",
    "master_weights weight_decay",
    "master_weights stochastic groups",
    "master_weights ema",
    "master_weights compensated weight_decay",  # of 24 bits
    "master_weights compensated stochastic ema",
    "compensated weight_decay",
    "compensated stochastic ema",
    "stochastic weight_decay",
    "ema",
    "weight_decay decoupled maximize grad_scale clip_value clip_norm skip_nonfinite trust_ratio "
    "groups master_weights stochastic ema",
]
OF_HALF_TYPES = {"master_weights", "compensated"}


def flags_of(rule, names):
    bits = {**_ext.FLAGS, **RULES[rule][1]}
    return sum(bits[name] for name in names.split())


def step(kind, own, frame, parameter, state=None, gradients=None, schedules=NO_SCHEDULE, most=0):
    """(kind, rule, parameter, state, set of gradients' types, flags, schedule's kinds and flags,
    capacity)"""
    rule, _, flags = own.partition(" ")
    state = parameter if state is None else state
    gradients = 1 << parameter if gradients is None else gradients
    flags = frame if isinstance(frame, int) else flags_of(rule, f"{flags} {frame}")
    return kind, RULES[rule][0], parameter, state, gradients, flags, *schedules, most


def measurement(kind, gradients=1, flags="", schedules=NO_SCHEDULE, most=0):
    return kind, 0, FLOAT32, FLOAT32, gradients, flags_of("sgd", flags), *schedules, most


def variants():
    kinds = itertools.cycle([(TURNED, 32), (STRIDED, 0), (TURNED, 0), (TILED, 256), (STRIDED, 64)])
    frames = itertools.cycle(["", "weight_decay", "weight_decay decoupled"])
    for own, dtype in itertools.product(OWN, TYPES):
        frame = next(frames)
        yield step(TILED, own, frame, dtype)
        kind, most = next(kinds)
        yield step(kind, own, frame, dtype, most=most)
    # Every way to keep an element, with every rule's slots in their own and in float32.
    turn, owns = itertools.count(), itertools.cycle(OWN)
    for frame, dtype in itertools.product(FRAMES, TYPES):
        if dtype == FLOAT32 and OF_HALF_TYPES & {*frame.split()}:
            continue
        if dtype == FLOAT16 and {*frame.split()} >= OF_HALF_TYPES:
            continue
        own, number = next(owns), next(turn)
        state = FLOAT32 if number % 3 == 1 else dtype
        gradients = 1 << (FLOAT32 if number % 5 == 2 else dtype)
        for kind in (TILED, STRIDED if number % 4 == 0 else TURNED):
            yield step(kind, own, frame, dtype, state, gradients)
    # The first half of a step.
    for dtype, kind in itertools.product((FLOAT16, BFLOAT16, FLOAT32), [TILED, TURNED, STRIDED]):
        frame = "direction groups weight_decay skip_nonfinite stochastic"
        yield step(kind, "muon momentum nesterov", frame, dtype, BFLOAT16 if dtype else FLOAT32)
    # What takes most: three slots, masters and an average, all of float32.
    most = FRAMES[-1]
    for own, kind in itertools.product(["sgd momentum", *OWN[5:]], [TILED, TURNED]):
        yield step(kind, own, most, BFLOAT16, FLOAT32)
    # Moments in bytes, and what takes most beside them.
    ways = ["master_weights compensated weight_decay", "stochastic", "ema groups"]
    for own, frame, dtype in zip(OWN[1:], itertools.cycle(ways), itertools.cycle(TYPES)):
        dtype = BFLOAT16 if "master_weights" in frame else dtype
        yield step(TILED, own, frame, dtype, BYTES)
        yield step(TURNED, own, frame, dtype, BYTES)
    for own, kind in itertools.product([OWN[2], OWN[5]], [TILED, TURNED]):
        yield step(kind, own, most, BFLOAT16, BYTES)
    for number in range(3):
        scaled = "grad_scale clip_value" if number % 2 else ""
        yield measurement(DENSE, 1 << number, scaled, most=32 << number)
    yield measurement(SPARSE)
    yield measurement(SPARSE, most=32)
    yield measurement(FOLD)
    yield measurement(FINISH)
    for kind, own in itertools.product([TILED, TURNED], ["sgd momentum", "adam bias_correction"]):
        yield step(kind, own, "", BFLOAT16, schedules=COSINE)
    # Every schedule, gradients of several types, and every option known at run time only.
    yield measurement(SCHEDULE, schedules=ANY_SCHEDULE)
    for number, (kind, own) in enumerate(zip([TILED, TURNED, STRIDED] * 3, RULES, strict=False)):
        flags = GENERIC ^ (number % 2 << 30)  # one has masters of 24 bits
        yield step(kind, own, flags, BFLOAT16, FLOAT32, ANY_TYPE, ANY_SCHEDULE)
    for kind in (DENSE, SPARSE):
        yield measurement(kind, ANY_TYPE, "grad_scale", ANY_SCHEDULE)


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


def is_light(description):
    """Whether a quad of everything has 12 words or fewer: at least those that keep nothing but
    slots of half types (kTurnedBlocks in cuda/step.cu)."""
    halves = re.search(r"parameters \w?float16, state \w?float16", description)
    flags = int(re.search(r"flags (\w+)", description)[1], 16)
    return bool(halves) and flags < _ext.FLAGS["master_weights"]


@pytest.mark.parametrize("part", range(4))  # so that they share the work of many processes
def test_every_kind_of_step_compiles_and_spills_next_to_nothing(compiler, part):
    """For sm_90, and of every rule, tiles and the rest in turn, for one of the others; what takes
    long for one of them all. So that every generation meets every rule, and every dtype in both
    forms."""
    each = itertools.cycle(CAPABILITIES)
    others = collections.defaultdict(lambda: itertools.cycle([80, 100, 120]))

    def capabilities(kind, rule, *rest):
        takes_long = rest[-3:-1] == ANY_SCHEDULE
        return (next(each),) if takes_long else (90, next(others[rule, kind == TILED]))

    lines = [(c, *v) for v in variants() for c in capabilities(*v)]
    met = {(capability, v[1]) for capability, *v in lines}
    assert met == set(itertools.product(CAPABILITIES, range(len(RULES))))
    met = {(capability, v[0] == TILED, v[2]) for capability, *v in lines}
    assert met == set(itertools.product(CAPABILITIES, (True, False), TYPES))
    lines = lines[part::4]
    said, status = compiler("machine", lines)
    assert status == 0 and len(said) == len(lines), "\n".join(said[-20:])
    for line in said:
        capability, registers, stack, spilled, _, description = line.split("|")
        assert int(registers) > 0, line
        # Four blocks of the threads of tiles at once, and one or two of the many of a square.
        # Three of those that keep three moments in bytes, and a master and an average.
        tiles = 80 if "state bytes" in line and "flags 0x6fff" in line else 64
        most = {"step_tiled": tiles, "step_turned": 64 if is_light(description) else 128}
        limits = [limit for name, limit in most.items() if description.startswith(name)]
        assert all(int(registers) <= limit for limit in limits), line
        if "schedules 0xffffffff" not in description:  # of which one may spill
            # On these ptxas spills a few registers of some kernels at their limit.
            most = {"100": 24, "120": 40}.get(capability, 0)
            assert max(int(stack), int(spilled)) <= most, line


def test_nothing_is_contracted(compiler):
    """Only schedules and bias corrections, so Adam, have a fused multiply-add, and they say so.
    Of PTX, which is what a GPU that NVRTC does not know gets."""
    kernels = [
        *(step(TILED, own, "weight_decay", FLOAT32) for own in OWN if "adam " not in f"{own} "),
        step(TURNED, "sgd momentum nesterov", "weight_decay", BFLOAT16),
        step(TILED, "sgd momentum", FRAMES[-1], BFLOAT16, FLOAT32),
        step(STRIDED, "adadelta", "compensated stochastic ema", FLOAT16),
        measurement(DENSE, 1, "grad_scale clip_value"),
        measurement(FOLD),
    ]
    said, status = compiler("ptx", [(0, *k) for k in kernels])
    assert status == 0 and len(said) == len(kernels), "\n".join(said)
    assert [line.split("|")[0] for line in said] == ["0"] * len(kernels), "\n".join(said)
    exact = [
        step(TILED, "sgd momentum", "", FLOAT32, schedules=COSINE),
        step(TILED, "adam bias_correction", "", FLOAT32),
    ]
    said, _ = compiler("ptx", [(0, *k) for k in exact])
    assert all(int(line.split("|")[0]) > 0 for line in said) and len(said) == 2, "\n".join(said)


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
