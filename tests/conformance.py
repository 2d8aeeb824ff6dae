"""The conformance table: what every backend must compute, and how a backend joins.

A **case** is a sequence of steps: dtypes, options, schedule, the tensors and how they lie
in memory. ``run_case`` performs it with MLX and mlx_fused_optim and returns bits; those of
full_cases.py are about the full step. A
**backend** runs all cases somewhere and returns their bits: on a device of this process
(``InProcess``), or in a process of its own with another environment (``Subprocess``).
tests/test_conformance.py compares the bits with NumPy, with mlx.optimizers.SGD and between
backends.

To join the table, append a backend to ``BACKENDS``.

As a program (``python conformance.py OUTPUT [DEVICE]``) it runs every case in this
process and writes the bits to OUTPUT; that is how ``Subprocess`` works.
"""

from __future__ import annotations

import fcntl
import functools
import itertools
import os
import pickle
import platform
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import NamedTuple, Protocol

import mlx.core as mx
import numpy as np
from bits import DTYPES, dtype_name, narrowed, of_mlx, one_nan, to_mlx, widened
from full_cases import FULL_CASES, FullCase

STEPS = 3


class Options(NamedTuple):
    momentum: float = 0.0
    weight_decay: float = 0.0
    dampening: float = 0.0
    nesterov: bool = False


# Exact in no format, so that a number narrowed on its way shows.
OPTIONS = {
    "plain": Options(),
    "momentum": Options(momentum=0.9),
    "dampening": Options(momentum=0.9, dampening=0.3),
    "nesterov": Options(momentum=0.9, nesterov=True),
    "decay": Options(weight_decay=0.01),
    "decay_dampening": Options(momentum=0.9, weight_decay=0.01, dampening=0.3),
    "decay_nesterov": Options(momentum=0.9, weight_decay=0.01, nesterov=True),
}

CONSTANT_RATE = 0.1
# (init, decay_rate): two steps change the rate visibly.
DECAYING_RATE = (0.1, 0.7)

# One below, at and above each vector width, block and alignment; a scalar and no element.
SHAPES: tuple[tuple[int, ...], ...] = (
    (), (0,), (1,), (2,), (3,), (4,), (5,), (7,), (8,), (9,), (15,), (16,), (17,),
    (31,), (32,), (33,), (3, 0, 2), (63,), (64,), (65,), (127,), (128,), (129,),
    (255,), (256,), (257,), (511,), (512,), (513,), (3, 5, 7), (1023,), (1024,), (1025,),
    (1, 1), (4099,),
)  # fmt: skip
# Pieces for several threads: their borders fall inside tensors and between them.
LARGE_SHAPES = ((32767,), (5,), (32768,), (32769,), (65537,), (0,), (1,))
# For the layouts below every shape needs at least two dimensions. The last one has rows longer
# than what a kernel reads at once, so that it begins within a row.
MATRICES = ((1, 7), (7, 1), (3, 5), (16, 33), (9, 64), (2, 3, 130), (3, 700))


# ---- Layouts in memory ---------------------------------------------------------


def _contiguous(bits: np.ndarray, dtype: str) -> mx.array:
    return to_mlx(bits, dtype)


def _transposed(bits: np.ndarray, dtype: str) -> mx.array:
    return to_mlx(bits.T.copy(), dtype).T


def _broadcast(bits: np.ndarray, dtype: str) -> mx.array:
    """One row, repeated with stride 0."""
    return mx.broadcast_to(to_mlx(bits[:1].copy(), dtype), bits.shape)


def _reversed(bits: np.ndarray, dtype: str) -> mx.array:
    return to_mlx(bits[::-1].copy(), dtype)[::-1]


def _odd_offset(bits: np.ndarray, dtype: str) -> mx.array:
    """Contiguous, but three elements into a buffer."""
    flat = np.concatenate([np.full(3, 1, bits.dtype), bits.ravel()])
    return to_mlx(flat, dtype)[3:].reshape(bits.shape)


def _every_other(bits: np.ndarray, dtype: str) -> mx.array:
    wide = np.repeat(bits, 2, axis=-1)
    wide[..., 1::2] = 1
    return to_mlx(wide, dtype)[..., ::2]


LAYOUTS: dict[str, Callable[[np.ndarray, str], mx.array]] = {
    "contiguous": _contiguous,
    "transposed": _transposed,
    "broadcast": _broadcast,
    "reversed": _reversed,
    "odd_offset": _odd_offset,
    "every_other": _every_other,
}


# ---- Cases -----------------------------------------------------------------------


@dataclass(frozen=True)
class Case:
    """One row of the table. The numbers of ``parameters`` cycle through its dtypes."""

    parameters: tuple[str, ...]
    gradient: str
    options: str
    rate: str = "constant"
    shapes: tuple[tuple[int, ...], ...] = SHAPES
    layout: str = "contiguous"
    kind: str = field(default="sizes")

    @property
    def name(self) -> str:
        parts = ("+".join(self.parameters), self.gradient, self.options, self.rate)
        return "-".join((*parts, self.kind, self.layout))

    @property
    def hyper(self) -> Options:
        return OPTIONS[self.options]

    def dtype_of(self, tensor: int) -> str:
        return self.parameters[tensor % len(self.parameters)]

    def values(self) -> tuple[list[np.ndarray], list[list[np.ndarray]]]:
        """Bits of the first parameters, and of the gradients of each step."""
        random = np.random.default_rng(sum(map(ord, self.name)))

        def draw(shape: tuple[int, ...], dtype: str) -> np.ndarray:
            values = random.standard_normal(shape).astype(np.float32)
            # Never zero: a forgotten element would not show.
            values = np.where(np.abs(values) < 2**-6, np.float32(0.5), values)
            if self.layout == "broadcast":
                values = np.broadcast_to(values[:1], shape).copy()
            return narrowed(values, dtype)

        parameters = [draw(s, self.dtype_of(i)) for i, s in enumerate(self.shapes)]
        gradients = [[draw(s, self.gradient) for s in self.shapes] for _ in range(STEPS)]
        return parameters, gradients


class EdgeCase(Case):
    """Every number of a half type, read and written, and what lies between its numbers.

    The first tensor starts from zero and moves by exactly its gradient (the rate is 1),
    the second has every number as a parameter and does not move.
    """

    def values(self) -> tuple[list[np.ndarray], list[list[np.ndarray]]]:
        half = next(name for name in (*self.parameters, self.gradient) if name != "float32")
        every = np.arange(2**16, dtype=np.uint16)
        numbers = widened(every, half)
        finite = np.unique(numbers[np.isfinite(numbers)].astype(np.float64))
        middles = ((finite[1:] + finite[:-1]) / 2).astype(np.float32)
        # The last is where rounding begins to give infinity, if float32 has it.
        overflow = np.float32(65520.0 if half == "float16" else 2.0**128 * (1 - 2.0**-9))
        middles = np.append(middles, [overflow, -overflow]).astype(np.float32)
        nans = np.array([0x7F800001, 0x7FFFFFFF, 0xFFFFFFFF, 0xFF800100], np.uint32)
        between = np.concatenate([
            np.nextafter(middles, np.float32(-np.inf)),
            middles,
            np.nextafter(middles, np.float32(np.inf)),
            np.array([np.inf, -np.inf, 3e38, -3e38, 1e-45, -0.0] * 9, np.float32),
            # Over a whole vector, so that the wide body sees each of them.
            np.tile(nans, 16).view(np.float32),
            numbers,
        ])  # fmt: skip
        moves = narrowed(between, self.gradient)
        zeros = [np.zeros(moves.size, np.float32), np.zeros(every.size, np.float32)]
        parameter = self.parameters[0]
        return (
            [narrowed(zeros[0], parameter), narrowed(numbers, parameter)],
            [[moves, narrowed(zeros[1], self.gradient)]] * STEPS,
        )


def _cases() -> list[Case]:
    cases: list[Case] = []
    for half in ("float16", "bfloat16"):
        for parameter, gradient in ((half, "float32"), ("float32", half)):
            # The shapes are those of `values`, found once.
            case = EdgeCase((parameter,), gradient, "plain", "unit", kind="every_number")
            shapes = tuple(bits.shape for bits in case.values()[0])
            cases.append(replace(case, shapes=shapes))
    for parameter in DTYPES:
        for gradient in DTYPES:
            for options in OPTIONS:
                cases.append(Case((parameter,), gradient, options))
            cases.append(Case((parameter,), gradient, "decay_nesterov", "exponential"))
            cases.append(
                Case((parameter,), gradient, "decay_dampening", shapes=LARGE_SHAPES, kind="large")
            )
            for layout in LAYOUTS:
                cases.append(
                    Case((parameter,), gradient, "decay_nesterov", "constant", MATRICES, layout,
                         "matrices")
                )  # fmt: skip
    for options in OPTIONS:
        for rate in ("constant", "exponential"):
            cases.append(Case(tuple(DTYPES), "float16", options, rate, kind="mixed"))
            cases.append(Case(("float32",), "float32", options, rate, LARGE_SHAPES, kind="large"))
    return list(dict.fromkeys(cases))


CASES = _cases()
ALL_CASES: list[Case | FullCase] = [*CASES, *FULL_CASES]

Bits = dict[str, np.ndarray]
"""Of each step: ``p<step>.<tensor>``, ``v<step>.<tensor>``, ``rate<step>``, ``step<step>``."""


def learning_rate(case: Case):
    from mlx_fused_optim import exponential_decay

    constants = {"constant": CONSTANT_RATE, "unit": 1.0}
    return constants.get(case.rate) or exponential_decay(*DECAYING_RATE)


def run_case(case: Case | FullCase, device: mx.Device) -> Bits:
    """Perform the steps of a case on a device: every number after every step.

    The first step writes to fresh memory, the second may write in place, and before the
    third somebody else holds everything, so that it must not.
    """
    if isinstance(case, FullCase):
        return case.run(device)
    import mlx_fused_optim as optim

    first, gradients = case.values()
    result: Bits = {}
    kept = None
    with mx.stream(device):
        place = LAYOUTS[case.layout]
        optimizer = optim.SGD(learning_rate(case), *case.hyper)
        parameters = [place(p, case.dtype_of(i)) for i, p in enumerate(first)]
        for step in range(STEPS):
            if step == STEPS - 1:
                kept = (parameters, optimizer.unpacked_state())
            gradient = [place(g, case.gradient) for g in gradients[step]]
            parameters = optimizer.apply_gradients({"w": gradient}, {"w": parameters})["w"]
            mx.eval(parameters, optimizer.state)
            _record(result, step, parameters, optimizer)
            if case.layout != "contiguous":
                # Not the arena's views: as a user's own reshaping would leave them.
                parameters = [
                    place(result[f"p{step}.{i}"], case.dtype_of(i)) for i in range(len(first))
                ]
    del kept
    return result


def _record(result: Bits, step: int, parameters: list[mx.array], optimizer) -> None:
    # A function of its own: its variables must not hold an array into the next step.
    for i, parameter in enumerate(parameters):
        result[f"p{step}.{i}"] = one_nan(of_mlx(parameter), dtype_name(parameter.dtype))
    for i, velocity in enumerate(optimizer.unpacked_state().get("w", [])):
        result[f"v{step}.{i}"] = one_nan(of_mlx(velocity["v"]), dtype_name(velocity["v"].dtype))
    result[f"rate{step}"] = of_mlx(optimizer.learning_rate)
    result[f"step{step}"] = of_mlx(optimizer.step)


# ---- Backends ----------------------------------------------------------------------


class Backend(Protocol):
    """A name, and the bits of cases by their names."""

    name: str

    def run(self, cases: Sequence[Case | FullCase]) -> Mapping[str, Bits]: ...


@dataclass(frozen=True)
class InProcess:
    """A device of this process."""

    name: str
    device: mx.Device

    def run(self, cases: Sequence[Case | FullCase]) -> Mapping[str, Bits]:
        return {case.name: run_case(case, self.device) for case in cases}


@dataclass(frozen=True)
class Subprocess:
    """A process of its own, for what a process decides once: its environment."""

    name: str
    environment: Mapping[str, str]
    device: str = "cpu"

    def run(self, cases: Sequence[Case | FullCase]) -> Mapping[str, Bits]:
        assert list(cases) == ALL_CASES  # the program below knows no other
        with tempfile.TemporaryDirectory() as folder:
            output = Path(folder) / "bits.pickle"
            path = os.pathsep.join(filter(None, sys.path))
            subprocess.run(
                [sys.executable, __file__, str(output), self.device],
                env={**os.environ, "PYTHONPATH": path, **self.environment},
                check=True,
                timeout=1500,
            )
            results: dict[str, Bits] = pickle.loads(output.read_bytes())
        return results


# The step in MLX operations. Its norms are summed in another order.
COMPOSED = "cpu-composed"


def _cpu_backends() -> list[Backend]:
    isas = ["baseline"]
    if platform.machine() in ("x86_64", "AMD64"):
        # Where the processor lacks one, the next smaller one runs: still a valid row.
        isas += ["avx2", "avx512"]
    rows: list[Backend] = [InProcess("cpu", mx.cpu)]
    for isa, threads in itertools.product(isas, ("1", "2")):
        environment = {"MLX_FUSED_OPTIM_CPU_ISA": isa, "MLX_FUSED_OPTIM_NUM_THREADS": threads}
        rows.append(Subprocess(f"cpu-{isa}-{threads}", environment))
    rows.append(Subprocess(COMPOSED, {"MLX_FUSED_OPTIM_COMPOSED": "1"}))
    return rows


def _gpu_backends() -> list[Backend]:
    """The GPU, and Metal's host code and kernels run by the CPU (docs/metal.md).

    METAL_ON_CPU is the folder with the two builds that tools/metal_check.sh makes.
    """
    rows: list[Backend] = []
    if mx.is_available(mx.gpu):
        rows.append(InProcess("metal" if mx.metal.is_available() else "cuda", mx.gpu))
    builds = os.environ.get("METAL_ON_CPU")
    if not builds:
        return rows
    plain, checked = (
        {"PYTHONPATH": str(Path(builds, name, "package").resolve())}
        for name in ("metal_on_cpu", "metal_on_cpu_asan")
    )
    for order, threads in (("forward", "1024"), ("reverse", "96"), ("shuffled", "32")):
        settings = {"METAL_ON_CPU_ORDER": order, "METAL_ON_CPU_MAX_THREADS": threads}
        rows.append(Subprocess(f"metal-{order}-{threads}", {**plain, **settings}))
    # The arithmetic of Apple's GPUs, see test_conformance.py.
    rows.append(Subprocess("metal-flush", {**plain, "METAL_ON_CPU_FLUSH": "1"}))
    find = ["clang++-19", "-print-file-name=libclang_rt.asan-x86_64.so"]
    library = subprocess.run(find, check=True, capture_output=True, text=True).stdout.strip()
    # Python frees little at exit; locals must stay on the stack that the harness knows.
    asan = {"ASAN_OPTIONS": "detect_leaks=0:detect_stack_use_after_return=0"}
    rows.append(Subprocess("metal-asan", {**checked, **asan, "LD_PRELOAD": library}))
    return rows


# A backend joins here. The first one is what the others' bits are compared with.
BACKENDS: list[Backend] = _cpu_backends() + _gpu_backends()


@functools.cache
def results(backend_number: int) -> Mapping[str, Bits]:
    """The bits of all cases on a backend, which runs them once for all processes of a suite."""
    backend = BACKENDS[backend_number]
    folder = os.environ.get("MLX_FUSED_OPTIM_TEST_SHARED")
    if not folder:
        return backend.run(ALL_CASES)
    if not _ran(backend, folder, wait=False):
        # Another process is at it: meanwhile one of those that are still to come.
        later = (b for b in reversed(BACKENDS[backend_number:]) if not _file_of(b, folder).exists())
        any(_ran(other, folder, wait=False) for other in later)
        _ran(backend, folder, wait=True)
    bits: Mapping[str, Bits] = pickle.loads(_file_of(backend, folder).read_bytes())
    return bits


def _file_of(backend: Backend, folder: str) -> Path:
    return Path(folder, f"{backend.name}.pickle")


def _ran(backend: Backend, folder: str, *, wait: bool) -> bool:
    """Whether the bits of a backend are there now; without ``wait`` they are not while another
    process runs it."""
    path = _file_of(backend, folder)
    with path.with_suffix(".lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        if not path.exists():
            path.write_bytes(pickle.dumps(backend.run(ALL_CASES)))
    return True


@functools.cache
def flushes(backend: int) -> bool:
    """Whether a backend takes subnormals for zeros: only Metal may, and only for all of them."""
    if not BACKENDS[backend].name.startswith("metal"):
        return False
    case = next(c for c in CASES if c.kind == "every_number" and c.gradient == "bfloat16")
    _, gradients = case.values()
    gradient = widened(gradients[0][0], "bfloat16")
    subnormal = (np.abs(gradient) < 2.0**-126) & (gradient != 0)
    after = results(backend)[case.name]["p0.0"].view(np.float32)[subnormal]
    assert (after == 0).all() or (after != 0).all()
    return bool((after == 0).all())


if __name__ == "__main__":
    chosen = mx.Device(mx.gpu if sys.argv[2:] == ["gpu"] else mx.cpu)
    Path(sys.argv[1]).write_bytes(pickle.dumps(InProcess("", chosen).run(ALL_CASES)))
