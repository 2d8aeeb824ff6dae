"""How a step becomes Metal dispatches: through the double of Metal (tests/metal_on_cpu).

What the dispatches compute is the conformance table's business. These tests count them,
and the bytes they move, and see that errors tell the user what to do. They run where the
extension was built with METAL_ON_CPU (``make metal-check``).
"""

import ctypes
import json
import math

import mlx.core as mx
import mlx.optimizers
import mlx_fused_optim as optim
import numpy as np
import pytest
from bits import DTYPES, same
from full_references import measured_float32
from full_step import Full
from mlx_fused_optim import _ext

double = ctypes.CDLL(_ext.__file__)
if not hasattr(double, "metal_on_cpu_log"):
    pytest.skip("the extension is not built on the double of Metal", allow_module_level=True)
double.metal_on_cpu_log.restype = ctypes.c_char_p

BUFFERS = 27  # of a dispatch, beside the four that have a step's numbers
SOURCES = BUFFERS - 3  # for parameters and gradients, of a step with momentum and nothing else
MEASURED = BUFFERS - 1  # arrays that are measured in a dispatch
CHUNK = 2048  # elements that are summed together
THREADS = 256
TILE = 16  # columns, unless set


@pytest.fixture(autouse=True)
def exact_buffers():
    """No buffer is longer than its array, so that the harness sees every overrun; and what an
    earlier test has used, whose memory may come again, is in flight no more."""
    before = mx.set_cache_limit(0)
    mx.synchronize()
    double.metal_on_cpu_clear()
    yield
    mx.set_cache_limit(before)


def dispatches(evaluate) -> list[dict]:
    """What ``evaluate`` sends to the device, of inputs that are ready."""
    mx.synchronize()
    double.metal_on_cpu_clear()
    evaluate()
    mx.synchronize()
    return json.loads(double.metal_on_cpu_log())


# Of the frame and of SGD.
FLAGS = {**_ext.FLAGS, **_ext.RULES[0]["flags"]}
SLOTS = {
    "velocities": "momentum",
    "masters": "master_weights",
    "compensations": "compensated",
    "averages": "ema",
}
NEEDS_MEASURE = ("clip_norm", "skip_nonfinite", "trust_ratio")


def role(dispatch: dict, name: str) -> str:
    """What lies in a buffer that its kernel knows by number: the places of metal/table.h."""
    if not name.startswith("buffer"):
        return name
    number = int(name.removeprefix("buffer"))
    if dispatch["kernel"] == "measure_chunks":
        return f"source{number - 1}"
    rule, flags, *_ = map(int, dispatch["pipeline"].removeprefix("fused_step_").split("_"))
    assert rule == 0
    roles = ["parameters_out"]
    for slot, flag in SLOTS.items():
        roles += [slot, f"{slot}_out"] if flags & FLAGS[flag] else []
    roles += ["measured"] if any(flags & FLAGS[flag] for flag in NEEDS_MEASURE) else []
    roles += ["groups"] if flags & FLAGS["groups"] else []
    return roles[number] if number < len(roles) else f"source{number - len(roles)}"


def bytes_of(log: list[dict], *names: str) -> dict[str, int]:
    """The sum over all dispatches, of the buffers bound in any of these roles."""
    total = {"read": 0, "read_again": 0, "written": 0, "accesses": 0}
    for dispatch in log:
        for bound, traffic in dispatch["traffic"].items():
            if any(role(dispatch, part).startswith(names) for part in bound.split(",")):
                for key in total:
                    total[key] += traffic[key]
    return total


# 0.1 at every step that a test takes; a schedule, so that kernels count.
ALWAYS = optim.multi_step(0.1, [10**6])


class Training:
    """An optimizer, and parameters that nobody else holds."""

    def __init__(self, shapes, dtype=mx.float32, momentum=0.9, place=lambda g: g, **options):
        self.optimizer = optim.SGD(options.pop("rate", ALWAYS), momentum=momentum, **options)
        self.parameters = [mx.random.normal(s).astype(dtype) for s in shapes]
        self.gradients = [place(mx.random.normal(s).astype(dtype)) for s in shapes]
        mx.eval(self.parameters, self.gradients)

    def step(self) -> None:
        tree = self.optimizer.apply_gradients({"w": self.gradients}, {"w": self.parameters})
        self.parameters = tree["w"]
        del tree
        mx.eval(self.parameters, self.optimizer.state)


class FullTraining:
    """Full steps of the extension, of arrays that nobody else holds."""

    def __init__(self, shapes, flags, dtype=mx.float32, state_dtype=None, place=lambda g: g):
        self.flags = sum(FLAGS[name] for name in flags)
        self.state_dtype = state_dtype
        self.parameters = [mx.random.normal(s).astype(dtype) for s in shapes]
        self.gradients = [place(mx.random.normal(s).astype(dtype)) for s in shapes]
        mx.eval(self.parameters, self.gradients)
        self.step_number = mx.array(3, mx.uint64)
        self.skipped = mx.array(0, mx.uint64)
        self.groups = self.group_numbers = None
        self.layout = _ext.Layout(self.tree())
        arenas = [(dtype, shape) for dtype, shape, *_ in self.layout.arenas]
        halves = [(dtype, shape) for dtype, shape in arenas if dtype != mx.float32]
        made = {
            "momentum": [mx.zeros(shape, state_dtype or dtype) for dtype, shape in arenas],
            "master_weights": [mx.zeros(shape) for _, shape in halves],
            "compensated": [mx.zeros(shape, dtype) for dtype, shape in halves],
            "ema": [mx.zeros(shape) for _, shape in arenas],
        }
        momentum, *frame = [arrays if name in flags else [] for name, arrays in made.items()]
        self.slots = [momentum, [], [], *frame]
        mx.eval(self.slots)

    def tree(self):
        return _ext.Tree({"w": self.gradients}, {"w": self.parameters}, "test")

    def step(self) -> None:
        tree, self.parameters = self.tree(), None
        slots, self.slots = self.slots, None
        options = _ext.Options(
            rule=0,
            scalars=[0.1, 0.01, 4.0, 0.9, 0.0],
            flags=self.flags,
            clip_value=0.7,
            clip_norm=0.5,
            trust_coefficient=0.02,
            ema_decay=0.9,
            seed=1,
            state_dtype=self.state_dtype,
            groups=self.groups,
            group_numbers=self.group_numbers,
            skipped=self.skipped
            if any(self.flags & FLAGS[name] for name in NEEDS_MEASURE)
            else None,
        )
        result, self.slots, self.step_number, self.used, self.measured, skipped = _ext.fused_step(
            tree, self.layout, slots, self.step_number, options
        )
        self.parameters = result["w"]
        self.skipped = self.skipped if skipped is None else skipped
        del tree, slots
        mx.eval(self.parameters, self.slots, self.step_number, self.skipped)

    def slot_arrays(self) -> list[mx.array]:
        return [array for slot in self.slots for array in slot]

    def everything(self) -> list[np.ndarray]:
        arrays = [*self.parameters, *self.slot_arrays(), self.step_number, self.skipped]
        return [np.array(a.view(mx.uint16) if a.itemsize == 2 else a) for a in arrays]


# ---- Dispatches and bytes ----------------------------------------------------------


def test_448_tensors_take_few_dispatches_and_exactly_the_bytes():
    """As many tensors as a LoRA of a 7B model has, but shorter."""
    training = Training([(16, 12)] * 448)
    training.step()
    log = dispatches(training.step)
    kernels = [d["kernel"] for d in log]
    # The arena takes one source, the gradients the others.
    assert kernels.count("fused_step") == math.ceil(448 / (SOURCES - 1)) == 20
    assert kernels.count("step_finish") == 1
    assert len(log) == 21 <= 23
    assert not any(d["barrier"] for d in log)

    size = 4 * 448 * 16 * 12
    arena = bytes_of(log, "parameters_out")
    momentum = bytes_of(log, "velocities")
    everything = bytes_of(log, "source", "velocities", "parameters_out")
    for in_place in (arena, momentum):
        assert (in_place["read"], in_place["written"]) == (size, size)
    # Parameters, gradients and momentum in, parameters and momentum out.
    assert (everything["read"], everything["written"]) == (3 * size, 2 * size)
    assert everything["read_again"] == 0
    assert everything["accesses"] == 5 * size / 16  # each of four elements
    counters = bytes_of(log, "step_out", "used_out")
    assert (counters["read"], counters["written"]) == (0, 8 + 24)


def test_a_constant_step_counts_in_no_kernel():
    training = Training([(7,)] * 3, rate=0.1)
    training.step()
    assert [d["kernel"] for d in dispatches(training.step)] == ["fused_step"]


def test_barriers_stand_only_where_data_flows():
    """The second step waits for the first, once; the dispatches of each run side by side."""
    training = Training([(100,)] * 60)

    def two_steps():
        for _ in range(2):
            tree = training.optimizer.apply_gradients(
                {"w": training.gradients}, {"w": training.parameters}
            )
            training.parameters = tree["w"]
        mx.eval(training.parameters, training.optimizer.state)

    log = dispatches(two_steps)
    each = len(log) // 2
    assert [d["kernel"] for d in log].count("step_finish") == 2
    barriers = [i for i, d in enumerate(log) if d["barrier"]]
    # The first step had a buffer for each parameter, the second one for all.
    assert len(barriers) == 1 and log[barriers[0] - 1]["kernel"] == "step_finish", each


def test_what_a_pending_command_uses_is_not_written(monkeypatch):
    """MLX's command buffer keeps the inputs of its operations, and the outputs beside the one
    that took over memory, until it has completed: nothing else keeps a step from writing
    what an earlier command still reads. So momentum waits for the command buffer."""
    monkeypatch.setenv("METAL_ON_CPU_KEEP", "1")
    training = Training([(100,)] * 3)
    training.step()
    for _ in range(2):
        log = dispatches(lambda: [training.step() for _ in range(2)])
        steps = [d for d in log if d["kernel"].startswith("fused_step")]
        assert len(steps) == 2
        in_place = [
            [bytes_of([d], name)["read"] > 0 for d in steps]
            for name in ("parameters_out", "velocities_out")
        ]
        assert in_place == [[True, True], [True, False]]


@pytest.mark.parametrize("columns", [4, 16, 32, 128])
@pytest.mark.parametrize("threads", [256, 96])
def test_tiles_of_any_width_change_no_bit(monkeypatch, columns, threads):
    """Transposed gradients, around the borders of tiles: against mlx.optimizers."""
    monkeypatch.setenv("METAL_ON_CPU_MAX_THREADS", str(threads))
    monkeypatch.setenv("MLX_FUSED_OPTIM_METAL_TILE", str(columns))
    shapes = [(threads, columns), (33, 31), (70, columns + 1), (1, 5), (5, 1), (3, 129)]
    ours = Training(shapes, place=lambda g: mx.contiguous(g.T).T)
    theirs = mlx.optimizers.SGD(0.1, momentum=0.9)
    tree = theirs.apply_gradients({"w": ours.gradients}, {"w": list(ours.parameters)})
    mx.eval(tree)
    log = dispatches(ours.step)
    assert log[0]["pipeline"].endswith(f"_{columns}")
    everything = bytes_of(log, "source", "parameters_out")
    size = 4 * sum(math.prod(s) for s in shapes)
    assert everything["read"] == 2 * size and everything["read_again"] == 0
    assert all(same(a, b) for a, b in zip(ours.parameters, tree["w"], strict=True))


@pytest.mark.parametrize("columns", ["0", "12", "256", "-4", "wide"])
def test_a_tile_of_no_such_width_is_refused(monkeypatch, columns):
    monkeypatch.setenv("MLX_FUSED_OPTIM_METAL_TILE", columns)
    with pytest.raises(ValueError, match=f"METAL_TILE .*: got '{columns}', allowed 4, 8, 16"):
        Training([(5,)]).step()


@pytest.mark.parametrize("tensors", [1, 12, 13, 23, 24, 47, 100])
def test_dispatches_by_the_number_of_tensors(tensors):
    training = Training([(7,)] * tensors)
    first = dispatches(training.step)  # every parameter in a buffer of its own
    assert len(first) == 1 + math.ceil(tensors / (SOURCES // 2))
    later = dispatches(training.step)  # all in one arena
    assert len(later) == 1 + math.ceil(tensors / (SOURCES - 1))


def test_parameters_that_somebody_holds_still_come_from_one_buffer():
    training = Training([(7,)] * 23)
    training.step()
    held = list(training.parameters)
    log = dispatches(training.step)
    assert len(log) == 2
    assert bytes_of(log, "parameters_out")["read"] == 0  # a fresh arena
    del held


def test_gradients_of_one_buffer_fill_the_table():
    """Slots are buffers, not tensors: then only the table's length counts."""
    training = Training([(8,)] * 100)
    training.step()
    training.gradients = list(mx.random.normal((100, 8)))
    mx.eval(training.gradients)
    theirs = mlx.optimizers.SGD(0.1, momentum=0.9)
    theirs.state = {"w": training.optimizer.unpacked_state()["w"], **theirs.state}
    tree = {"w": [mx.array(p) for p in training.parameters]}
    tree = theirs.apply_gradients({"w": training.gradients}, tree)
    mx.eval(tree)
    log = dispatches(training.step)
    assert [d["kernel"] for d in log].count("fused_step") == math.ceil(100 / 48)
    assert all(same(a, b) for a, b in zip(training.parameters, tree["w"], strict=True))


def test_gradients_of_three_dtypes():
    training = Training([(9,)] * 9)
    training.step()
    training.gradients = [
        g.astype(list(DTYPES.values())[i % 3]) for i, g in enumerate(training.gradients)
    ]
    mx.eval(training.gradients)
    log = dispatches(training.step)
    assert [d["kernel"] for d in log] == ["fused_step"] * 3 + ["step_finish"]
    assert [d["pipeline"].split("_")[5] for d in log[:3]] == ["0", "1", "2"]


def test_every_kernel_is_asked_for_by_its_name():
    """All kernels in metal/, and no others."""

    def everything():
        for dtype in DTYPES.values():
            training = Training([(3,), (3, 4, 5)], dtype, place=lambda g: g)
            for gradient in DTYPES.values():
                training.gradients = [
                    mx.random.normal((3,)).astype(gradient),
                    mx.random.normal((5, 4, 3)).astype(gradient).transpose(2, 1, 0),
                ]
                training.step()
        mx.eval(optim.exponential_decay(0.1, 0.9)(mx.arange(3)))

        FullTraining([(3,)], ["clip_norm"]).step()

    asked = {d["kernel"] for d in dispatches(everything)}
    measure = {"measure_chunks", "measure_arrays", "measure_finish"}
    assert asked == {"fused_step", "step_finish", "schedule_values", "pack_2", "pack_4"} | measure


def test_options_are_specialised_and_named():
    """A pipeline's name has the value of every function constant."""
    pipelines = set()
    for momentum, nesterov, decay in [
        (0, 0, 0),
        (0.9, 0, 0),
        (0.9, 1, 0),
        (0, 0, 0.1),
        (0.9, 1, 0.1),
    ]:
        training = Training([(5,)], momentum=momentum, nesterov=bool(nesterov), weight_decay=decay)
        log = dispatches(training.step)
        flags = FLAGS["momentum"] * (momentum > 0) | FLAGS["nesterov"] * nesterov
        flags |= FLAGS["weight_decay"] * (decay > 0)
        assert log[0]["pipeline"] == f"fused_step_0_{flags}_0_0_0_{TILE}"
        pipelines.add(log[0]["pipeline"])
        assert (bytes_of(log, "velocities")["read"] > 0) == (momentum > 0)
    assert len(pipelines) == 5


# ---- The full step -----------------------------------------------------------------


def test_448_tensors_of_a_full_step_take_few_dispatches_and_four_stages():
    training = FullTraining([(16, 12)] * 448, ["momentum", "clip_norm", "skip_nonfinite"])
    training.step()
    log = dispatches(training.step)
    kernels = [d["kernel"] for d in log]
    chunks, steps = math.ceil(448 / MEASURED), math.ceil(448 / (SOURCES - 2))
    assert kernels == (
        ["measure_chunks"] * chunks
        + ["measure_arrays", "measure_finish"]
        + ["fused_step"] * steps
        + ["step_finish"]
    )
    assert len(log) == 42
    # Each stage reads what the one before it wrote; within one there is no barrier.
    barriers = [i for i, d in enumerate(log) if d["barrier"]]
    assert barriers == [chunks, chunks + 1, chunks + 2]


@pytest.mark.parametrize("state_dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("slots", [["master_weights", "ema"], ["compensated"], []])
def test_a_full_step_moves_exactly_its_bytes(dtype, state_dtype, slots):
    shapes = [(64, 12), (256,)]  # which leave no gaps
    training = FullTraining(
        shapes, ["momentum", "stochastic", "maximize", *slots], dtype, state_dtype
    )
    training.step()
    log = dispatches(training.step)
    half = dtype != mx.float32
    # Where nothing is rounded at random, nothing depends on the step.
    rounds = half or state_dtype != mx.float32
    assert [d["kernel"] for d in log] == ["fused_step", *["step_finish"] * rounds]
    size, count = sum(math.prod(s) for s in shapes), dtype.size
    widths = {
        "velocities": state_dtype.size,
        "masters": 4 if half and "master_weights" in slots else 0,
        "compensations": count if half and "compensated" in slots else 0,
        "averages": 4 if "ema" in slots else 0,
    }
    for name, width in widths.items():
        moved = bytes_of(log, name)
        assert (moved["read"], moved["written"]) == (width * size, width * size), name
        assert moved["accesses"] == (2 * size / 4 if width else 0), name
    everything = bytes_of(log, "source", "parameters_out", *SLOTS)
    kept = sum(widths.values())
    assert everything["read"] == (2 * count + kept) * size
    assert everything["written"] == (count + kept) * size
    assert everything["read_again"] == 0


def test_measuring_reads_each_gradient_once():
    shapes = [(3 * CHUNK + 5,), (64, 64), (1,), (0,)]
    training = FullTraining(shapes, ["clip_norm", "trust_ratio"])
    log = dispatches(training.step)
    kernels = [d["kernel"] for d in log]
    assert kernels[:3] == ["measure_chunks", "measure_arrays", "measure_finish"]
    size = 4 * sum(math.prod(s) for s in shapes)
    read = bytes_of(log[:1], "source")
    assert (read["read"], read["read_again"]) == (2 * size, 0)  # gradients and parameters
    # A sum in two parts, its scale and a peak, of each chunk and of each array.
    chunks = 2 * sum(math.ceil(math.prod(s) / CHUNK) for s in shapes)
    assert bytes_of(log[:1], "chunk_sums")["written"] == 16 * chunks
    assert bytes_of(log[1:2], "chunk_sums")["read"] == 16 * chunks
    assert bytes_of(log[1:2], "array_sums_out")["written"] == 16 * 2 * len(shapes)
    assert bytes_of(log[2:3], "measured_out")["written"] == 4 * (2 + 2 * len(shapes))
    squares = [np.square(np.array(g, np.float64)).sum() for g in training.gradients]
    exact = [math.sqrt(sum(squares)), 1.0]
    measured = np.array(training.measured, np.float64)
    np.testing.assert_allclose(measured[:2], exact, rtol=7.5e-7)
    np.testing.assert_allclose(measured[2::2], np.sqrt(squares), rtol=7.5e-7)


@pytest.mark.parametrize(
    ("threads", "order"), [(256, "forward"), (256, "reverse"), (96, "shuffled"), (32, "reverse")]
)
def test_norms_have_their_bits_whatever_the_threads(monkeypatch, threads, order):
    """Sizes around chunks and around the lanes of a fold, in every dtype."""
    monkeypatch.setenv("METAL_ON_CPU_ORDER", order)
    monkeypatch.setenv("METAL_ON_CPU_MAX_THREADS", str(threads))
    shapes = [(1025 * CHUNK + 3,), (CHUNK - 1,), (CHUNK,), (CHUNK + 1,), (1,), (130,), (63, 65)]
    training = FullTraining(shapes, ["clip_norm", "trust_ratio", "grad_scale", "clip_value"])
    training.gradients = [
        (3 * g).astype(list(DTYPES.values())[i % 3]) for i, g in enumerate(training.gradients)
    ]
    # The order is that of memory: a transposed matrix, and a stretch that begins anywhere.
    memory = [np.array(g.astype(mx.float32)).ravel() for g in training.gradients]
    training.gradients[6] = training.gradients[6].reshape(65, 63).T
    training.gradients[1] = mx.concatenate([mx.zeros(1, mx.float16), training.gradients[1]])[1:]
    mx.eval(training.gradients)
    parameters = [np.array(p).ravel() for p in training.parameters]
    training.step()
    options = Full(clip_norm=1.0, trust_coefficient=1.0, grad_scale=4.0, clip_value=0.7)
    expected = measured_float32(options, memory, parameters, 4.0)
    np.testing.assert_array_equal(np.array(training.measured), expected)
    # Chunks that need a scale beside some that need none.
    memory = [np.ldexp(g, -100 + 30 * i) for i, g in enumerate(memory)]
    training.gradients = [mx.array(g.reshape(s)) for g, s in zip(memory, shapes, strict=True)]
    parameters = [np.array(p).ravel() for p in training.parameters]
    training.step()
    expected = measured_float32(options, memory, parameters, 4.0)
    np.testing.assert_array_equal(np.array(training.measured), expected)


def test_every_thread_of_a_chunk_has_a_part_in_its_peak():
    """Eight threads share a chunk: what any of them meets scales it, or skips the step."""
    training = FullTraining([(128,)], ["clip_norm", "skip_nonfinite"])
    for skipped, at in enumerate(range(0, 128, 4)):
        for value in (1e30, math.nan):  # whose square is beyond float32, and none
            gradient = np.ones(128, np.float32)
            gradient[at + at // 4 % 4] = value
            training.gradients = [mx.array(gradient)]
            training.step()
            if value == 1e30:  # beside which the ones are nothing
                assert training.measured.tolist() == [pytest.approx(1e30, rel=7.5e-7), 1], at
        assert training.skipped.item() == skipped + 1, at


def test_unaligned_memory_of_a_full_step_is_read_element_by_element():
    """One element into a buffer: the harness refuses a wide access there."""
    training = FullTraining([(64,), (64,)], ["clip_norm", "momentum"])
    training.step()
    aligned = dispatches(training.step)
    training.gradients = [mx.random.normal((65,))[1:] for _ in range(2)]
    mx.eval(training.gradients)
    log = dispatches(training.step)
    for kernel in ("measure_chunks", "fused_step"):
        before, after = ([d for d in each if d["kernel"] == kernel] for each in (aligned, log))
        difference = bytes_of(after, "source")["accesses"] - bytes_of(before, "source")["accesses"]
        assert difference == 2 * 64 - 2 * 64 / 4
    training.slots[0] = [mx.random.normal((129,))[1:]]
    mx.eval(training.slots)
    log = dispatches(training.step)
    assert bytes_of(log, "velocities")["accesses"] == 2 * 128


@pytest.mark.parametrize("order", ["forward", "reverse", "shuffled"])
@pytest.mark.parametrize("threads", [1024, 96, 32])
def test_threads_change_no_bit_of_a_full_step(monkeypatch, order, threads):
    """Against plain MLX operations, with sizes around blocks of every threadgroup."""
    block = 16 * min(threads, THREADS)
    shapes = [(block - 1,), (block,), (block + 1,), (block // 16, 40), (3, 5), (1,)]
    flags = ["momentum", "nesterov", "weight_decay", "clip_value", "stochastic", "ema", "groups"]

    def result():
        mx.random.seed(threads)
        place = lambda g: mx.contiguous(g.T).T  # noqa: E731
        training = FullTraining(shapes, flags, mx.bfloat16, mx.float32, place)
        own = FLAGS["momentum"] | FLAGS["weight_decay"]
        training.groups = _ext.Groups([i % 2 for i in range(len(shapes))], [own, 0])
        training.group_numbers = mx.random.uniform(0.5, 1.5, (2, _ext.GROUP_NUMBERS))
        for _ in range(2):
            training.step()
        return training.everything()

    with monkeypatch.context() as composed:
        composed.setenv("MLX_FUSED_OPTIM_COMPOSED", "1")
        expected = result()
    monkeypatch.setenv("METAL_ON_CPU_ORDER", order)
    monkeypatch.setenv("METAL_ON_CPU_MAX_THREADS", str(threads))
    for ours, theirs in zip(result(), expected, strict=True):
        np.testing.assert_array_equal(ours, theirs)


def test_variants_are_compiled_for_options_and_dtypes_and_for_nothing_else():
    """One for each pair of dtypes, however many steps, tensors, groups and values."""
    pipelines = []
    for dtype in DTYPES.values():
        training = FullTraining([(9,)] * 40, ["momentum", "weight_decay", "groups"], dtype)
        training.group_numbers = mx.ones((2, _ext.GROUP_NUMBERS))
        for step in range(6):
            flags = [FLAGS["momentum"], FLAGS["weight_decay"] * (step % 2)]
            training.groups = _ext.Groups([i % 2 for i in range(40)], flags)
            gradient = list(DTYPES.values())[step % 3]
            training.gradients = [mx.random.normal((9,)).astype(gradient) for _ in range(40)]
            mx.eval(training.gradients)
            pipelines += [d["pipeline"] for d in dispatches(training.step) if d["pipeline"]]
    flags = sum(FLAGS[name] for name in ("momentum", "weight_decay", "groups"))
    # The rule, its flags, and the formats of parameter, gradient and state.
    formats = [(p, g) for p in range(3) for g in range(3)]
    assert set(pipelines) == {f"fused_step_0_{flags}_{p}_{g}_{p}_{TILE}" for p, g in formats}


def test_a_state_that_is_not_there_makes_no_variants():
    """SGD without momentum keeps nothing, in whatever dtype."""
    pipelines = []
    for state in DTYPES.values():
        training = FullTraining([(9,)], [], state_dtype=state)
        pipelines += [d["pipeline"] for d in dispatches(training.step) if d["pipeline"]]
    assert set(pipelines) == {f"fused_step_0_0_0_0_0_{TILE}"}


@pytest.mark.parametrize(("held", "at"), [(False, 0), (True, 5), (False, 14)])
def test_a_skipped_step_leaves_everything_as_it_was(held, at):
    flags = ["momentum", "skip_nonfinite", "compensated", "ema"]
    training = FullTraining([(70,), (3, 5)], flags, mx.bfloat16)
    training.step()
    assert [training.step_number.item(), training.skipped.item()] == [4, 0]
    before = training.everything()
    kept = [training.parameters, training.slots] if held else None
    gradient = np.array(training.gradients[1].astype(mx.float32))
    gradient.flat[at] = math.nan  # each time another thread of its chunk sees it
    training.gradients[1] = mx.array(gradient)
    log = dispatches(training.step)
    written = bytes_of(log, "parameters_out", *SLOTS)
    assert written["written"] > 0 and (bytes_of(log, "parameters_out")["read"] == 0) == held
    assert [training.step_number.item(), training.skipped.item()] == [4, 1]
    after = training.everything()
    assert all((a == b).all() for a, b in zip(before[:-1], after[:-1], strict=True))
    del kept


def test_the_memory_between_tensors_is_zero_in_every_slot():
    mx.set_cache_limit(1 << 20)
    shapes = [(3,), (129,), (1,)]
    flags = ["momentum", "master_weights", "ema", "weight_decay"]
    for other in ("master_weights", "compensated"):
        training = FullTraining(shapes, [*flags[:1], other, *flags[2:]], mx.float16)
        training.step()
        held = list(training.slots), list(training.parameters)  # so the next takes fresh memory
        junk = [mx.full((512,), math.nan, dtype) for dtype in DTYPES.values() for _ in range(9)]
        mx.eval(junk)
        del junk  # which is not zero
        training.step()
        del held
        (_, _, _, offsets, _) = training.layout.arenas[0]
        used = np.zeros(512, bool)
        for offset, (size,) in zip(offsets, shapes, strict=True):
            used[offset : offset + size] = True
        arenas = [np.array(a) for a in training.slot_arrays()]
        assert len(arenas) == 3
        for arena in arenas:
            gaps = ~used[: arena.size]
            assert (arena[gaps] == 0).all() and (arena[~gaps] != 0).any()


def test_gradients_in_pieces_are_packed_for_their_norm_and_for_their_step():
    shapes = [(6, 8), (3, 4, 5), (7,)]

    def every_second(g):
        return mx.repeat(g, 2, axis=-1)[..., ::2]

    training = FullTraining(shapes, ["clip_norm"], place=every_second)
    log = dispatches(training.step)
    kernels = [d["kernel"] for d in log]
    # A norm wants neighbours; a step reads any matrix as it is.
    packs = kernels.index("measure_chunks")
    assert kernels == (
        ["pack_4"] * packs + ["measure_chunks", "measure_arrays", "measure_finish", "fused_step"]
    )
    assert packs == 3
    exact = math.sqrt(sum(float(mx.square(g).sum()) for g in training.gradients))
    assert training.measured[0].item() == pytest.approx(exact, rel=1e-6)


def test_nothing_to_measure_counts_the_step():
    training = FullTraining([(0,)], ["clip_norm", "skip_nonfinite"])
    log = dispatches(training.step)
    assert [d["kernel"] for d in log] == ["measure_arrays", "measure_finish", "step_finish"]
    assert training.measured.tolist() == [0, 1]
    assert [training.step_number.item(), training.skipped.item()] == [4, 0]


@pytest.mark.parametrize("flags", [["momentum", "maximize"], ["clip_norm"]])
@pytest.mark.parametrize("setting", ["METAL_ON_CPU_COMPILER_ERROR", "METAL_ON_CPU_MAX_THREADS"])
def test_a_full_step_that_cannot_run_changes_nothing(monkeypatch, flags, setting):
    training = FullTraining([(5,), (70,)], flags)
    training.step()
    arrays = [*training.parameters, *training.slot_arrays()]
    before = [np.array(a) for a in arrays]
    monkeypatch.setenv(setting, "16")
    with pytest.raises(RuntimeError, match="MLX_FUSED_OPTIM_COMPOSED=1"):
        training.step()
    assert all((np.array(a) == b).all() for a, b in zip(arrays, before, strict=True))


# ---- Layouts -----------------------------------------------------------------------


def test_transposed_gradients_need_no_copy_and_no_more_bytes():
    """The gradient of nn.Linear's weight is a transposed view."""
    shapes = [(48, 64), (33, 17), (1, 5), (5, 1), (300, 16)]
    training = Training(shapes, place=lambda g: mx.contiguous(g.T).T)
    training.step()
    log = dispatches(training.step)
    assert [d["kernel"] for d in log] == ["fused_step", "step_finish"]
    size = 4 * sum(math.prod(s) for s in shapes)
    everything = bytes_of(log, "source", "velocities", "parameters_out")
    assert (everything["read"], everything["read_again"]) == (3 * size, 0)
    assert everything["written"] == 2 * size


def test_other_strides_are_packed_first_and_side_by_side():
    shapes = [(3, 4, 5), (2, 6, 4), (6,)]
    training = Training(shapes, place=lambda g: mx.contiguous(g.T).T)
    training.step()
    log = dispatches(training.step)
    kernels = [d["kernel"] for d in log]
    assert kernels == ["pack_4", "pack_4", "fused_step", "step_finish"]
    assert [d["barrier"] for d in log] == [False, False, True, False]


def test_more_elements_are_packed_than_there_are_threads():
    (shape,) = shapes = [(3, 5, 70001)]
    training = Training(shapes, momentum=0, place=lambda g: mx.contiguous(g.T).T)
    expected = training.parameters[0] - mx.array(0.1) * training.gradients[0]
    mx.eval(expected)
    log = dispatches(training.step)
    assert log[0]["kernel"] == "pack_4" and log[0]["threads"] == 2**20 < math.prod(shape)
    assert same(training.parameters[0], expected)


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_unaligned_memory_is_read_element_by_element(dtype):
    """One element into a buffer: the harness refuses a wide access there."""
    training = Training([(64,), (64,)], dtype)
    training.step()
    aligned = bytes_of(dispatches(training.step), "source")["accesses"]
    training.gradients = [mx.random.normal((65,)).astype(dtype)[1:] for _ in range(2)]
    mx.eval(training.gradients)
    log = dispatches(training.step)
    # Parameters in and out stay wide; each gradient now takes one access an element.
    assert bytes_of(log, "source")["accesses"] == aligned - 2 * 64 / 4 + 2 * 64


def test_rows_that_begin_unaligned_are_read_element_by_element():
    """The left part of a matrix whose rows are 9 long: aligned in the first row only."""
    training = Training([(16, 8)], place=lambda g: mx.pad(g, [(0, 0), (0, 1)])[:, :8])
    training.step()
    log = dispatches(training.step)
    assert [d["kernel"] for d in log] == ["fused_step", "step_finish"]
    gradient = bytes_of(log, "source1")
    assert (gradient["read"], gradient["accesses"]) == (4 * 16 * 8, 16 * 8)
    assert bytes_of(log, "velocities")["accesses"] == 2 * 16 * 8 / 4


def test_the_memory_between_tensors_is_zero():
    """Fresh arenas are cleared where no tensor is, because states are saved whole."""
    mx.set_cache_limit(1 << 20)
    shapes = [(3,), (65,), (1,)]
    training = Training(shapes)
    training.step()
    held = training.optimizer.unpacked_state()  # so the next step takes fresh memory
    junk = [mx.full((256,), math.nan) for _ in range(9)]
    mx.eval(junk)
    del junk  # which is not zero
    training.step()
    del held
    (entry,) = training.optimizer.state["arenas"].values()
    momentum = np.array(entry["momentum"][0])
    used = np.zeros(momentum.size, bool)
    for offset, (size,) in zip((0, 64, 192), shapes, strict=True):
        used[offset : offset + size] = True
    assert momentum.size == 256 and (momentum[~used] == 0).all() and (momentum[used] != 0).all()


def test_empty_tensors_and_empty_trees_count_the_step():
    training = Training([(0,), (3, 0)])
    log = dispatches(training.step)
    assert [d["kernel"] for d in log] == ["step_finish"]
    assert training.optimizer.step.item() == 1
    optimizer = optim.SGD(optim.exponential_decay(0.5, 0.5))
    for _ in range(2):
        optimizer.apply_gradients({}, {})
    assert optimizer.step.item() == 2 and optimizer.learning_rate.item() == 0.25


def test_schedules_at_more_steps_than_threads():
    steps = mx.arange(2**20 + 3, dtype=mx.uint64) % 50
    schedule = optim.exponential_decay(1.0, 0.5)
    log = dispatches(lambda: mx.eval(schedule(steps)))
    assert [d["threads"] for d in log] == [2**20]
    assert same(schedule(steps), mx.power(mx.array(2.0), -steps.astype(mx.float32)))


# ---- Errors ------------------------------------------------------------------------


def test_a_compiler_error_is_shown_with_the_way_on(monkeypatch):
    training = Training([(5,)])
    parameters = list(training.parameters)
    before = [mx.array(p) for p in parameters]
    mx.eval(before)
    monkeypatch.setenv("METAL_ON_CPU_COMPILER_ERROR", "metal/step.metal:7:1: error: no such thing")
    with pytest.raises(RuntimeError) as error:
        training.step()
    message = str(error.value)
    assert message.startswith("[fused_step] the Metal kernels do not build on this machine")
    assert "metal/step.metal:7:1: error: no such thing" in message
    assert "MLX_FUSED_OPTIM_COMPOSED=1" in message
    assert all(same(a, b) for a, b in zip(parameters, before, strict=True))


def test_a_gpu_with_tiny_threadgroups_is_refused(monkeypatch):
    training = Training([(5,)])
    parameters = list(training.parameters)
    before = [mx.array(p) for p in parameters]
    mx.eval(before)
    monkeypatch.setenv("METAL_ON_CPU_MAX_THREADS", "16")
    with pytest.raises(RuntimeError) as error:
        training.step()
    assert "got threadgroups of at most 16 threads, needed 32" in str(error.value)
    assert "MLX_FUSED_OPTIM_COMPOSED=1" in str(error.value)
    assert all(same(a, b) for a, b in zip(parameters, before, strict=True))


@pytest.mark.parametrize(
    "rate", [0.1, optim.exponential_decay(0.1, 0.9)], ids=["constant", "schedule"]
)
def test_the_way_on_uses_no_kernel_and_has_the_same_bits(monkeypatch, rate):
    mx.random.seed(1)
    fused = Training([(5,), (3, 4)], nesterov=True, weight_decay=0.01, rate=rate)
    mx.random.seed(1)
    composed = Training([(5,), (3, 4)], nesterov=True, weight_decay=0.01, rate=rate)
    for _ in range(3):
        fused.step()
    monkeypatch.setenv("MLX_FUSED_OPTIM_COMPOSED", "1")
    log = dispatches(lambda: [composed.step() for _ in range(3)])
    assert {d["kernel"] for d in log} <= {"schedule_values"}  # on a Mac, the CPU's
    assert all(same(a, b) for a, b in zip(fused.parameters, composed.parameters, strict=True))
    assert composed.optimizer.step.item() == 3
    assert same(fused.optimizer.learning_rate, composed.optimizer.learning_rate)


def test_the_way_on_is_a_switch(monkeypatch):
    monkeypatch.setenv("MLX_FUSED_OPTIM_COMPOSED", "yes")
    with pytest.raises(ValueError, match="MLX_FUSED_OPTIM_COMPOSED is not a switch: got 'yes'"):
        Training([(5,)]).step()


# ---- The table, without the table's program ------------------------------------------


@pytest.mark.parametrize("order", ["forward", "reverse", "shuffled"])
@pytest.mark.parametrize("threads", [1024, 96, 32])
def test_order_and_size_of_threadgroups_change_no_bit(monkeypatch, order, threads):
    """Against mlx.optimizers, with sizes around blocks of every size of threadgroup."""
    monkeypatch.setenv("METAL_ON_CPU_ORDER", order)
    monkeypatch.setenv("METAL_ON_CPU_MAX_THREADS", str(threads))
    block = 16 * min(threads, THREADS)
    shapes = [(block - 1,), (block,), (block + 1,), (block // 16, 40), (3, 5), (1,)]
    mx.random.seed(threads)
    ours = Training(shapes, weight_decay=0.01, place=lambda g: mx.contiguous(g.T).T)
    theirs = mlx.optimizers.SGD(0.1, momentum=0.9, weight_decay=0.01)
    tree = {"w": list(ours.parameters)}
    for _ in range(2):
        ours.step()
        tree = theirs.apply_gradients({"w": ours.gradients}, tree)
    assert all(same(a, b) for a, b in zip(ours.parameters, tree["w"], strict=True))
