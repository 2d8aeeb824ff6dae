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
from mlx_fused_optim import _ext

double = ctypes.CDLL(_ext.__file__)
if not hasattr(double, "metal_on_cpu_log"):
    pytest.skip("the extension is not built on the double of Metal", allow_module_level=True)
double.metal_on_cpu_log.restype = ctypes.c_char_p

SOURCES = 24  # buffers for parameters and gradients in a dispatch
THREADS = 256


@pytest.fixture(autouse=True)
def exact_buffers():
    """No buffer is longer than its array, so that the harness sees every overrun."""
    before = mx.set_cache_limit(0)
    yield
    mx.set_cache_limit(before)


def dispatches(evaluate) -> list[dict]:
    """What ``evaluate`` sends to the device, of inputs that are ready."""
    mx.synchronize()
    double.metal_on_cpu_clear()
    evaluate()
    mx.synchronize()
    return json.loads(double.metal_on_cpu_log())


def bytes_of(log: list[dict], *names: str) -> dict[str, int]:
    """The sum over all dispatches, of the buffers bound under any of these names."""
    total = {"read": 0, "read_again": 0, "written": 0, "accesses": 0}
    for dispatch in log:
        for bound, traffic in dispatch["traffic"].items():
            if any(part.startswith(names) for part in bound.split(",")):
                for key in total:
                    total[key] += traffic[key]
    return total


class Training:
    """An optimizer, and parameters that nobody else holds."""

    def __init__(self, shapes, dtype=mx.float32, momentum=0.9, place=lambda g: g, **options):
        self.optimizer = optim.SGD(options.pop("rate", 0.1), momentum=momentum, **options)
        self.parameters = [mx.random.normal(s).astype(dtype) for s in shapes]
        self.gradients = [place(mx.random.normal(s).astype(dtype)) for s in shapes]
        mx.eval(self.parameters, self.gradients)

    def step(self) -> None:
        tree = self.optimizer.apply_gradients({"w": self.gradients}, {"w": self.parameters})
        self.parameters = tree["w"]
        del tree
        mx.eval(self.parameters, self.optimizer.state)


# ---- Dispatches and bytes ----------------------------------------------------------


def test_448_tensors_take_few_dispatches_and_exactly_the_bytes():
    """As many tensors as a LoRA of a 7B model has, but shorter."""
    training = Training([(16, 12)] * 448)
    training.step()
    log = dispatches(training.step)
    kernels = [d["kernel"] for d in log]
    # The arena takes one source, the gradients the others.
    assert kernels.count("sgd_step_float32_float32") == math.ceil(448 / (SOURCES - 1)) == 20
    assert kernels.count("sgd_counters") == 1
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
    assert (counters["read"], counters["written"]) == (0, 8 + 12)


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
    assert [d["kernel"] for d in log].count("sgd_counters") == 2
    barriers = [i for i, d in enumerate(log) if d["barrier"]]
    # The first step had a buffer for each parameter, the second one for all.
    assert len(barriers) == 1 and log[barriers[0] - 1]["kernel"] == "sgd_counters", each


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
    assert [d["kernel"] for d in log].count("sgd_step_float32_float32") == math.ceil(100 / 48)
    assert all(same(a, b) for a, b in zip(training.parameters, tree["w"], strict=True))


def test_gradients_of_three_dtypes():
    training = Training([(9,)] * 9)
    training.step()
    training.gradients = [
        g.astype(list(DTYPES.values())[i % 3]) for i, g in enumerate(training.gradients)
    ]
    mx.eval(training.gradients)
    log = dispatches(training.step)
    assert sorted(d["kernel"] for d in log) == sorted(
        ["sgd_counters", *(f"sgd_step_float32_{name}" for name in DTYPES)]
    )


def test_every_kernel_is_asked_for_by_its_name():
    """All instances in metal/sgd.metal, and no others: see kernel_names below."""

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

    asked = {d["kernel"] for d in dispatches(everything)}
    steps = {f"sgd_step_{p}_{g}" for p in DTYPES for g in DTYPES}
    assert asked == steps | {"sgd_counters", "schedule_values", "pack_2", "pack_4"}


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
        bits = f"{int(momentum > 0)}{nesterov}{int(decay > 0)}"
        assert log[0]["pipeline"] == f"sgd_step_float32_float32_{bits}"
        pipelines.add(log[0]["pipeline"])
        assert ("velocities" in str(log[0]["traffic"])) == (momentum > 0)
    assert len(pipelines) == 5


# ---- Layouts -----------------------------------------------------------------------


def test_transposed_gradients_need_no_copy_and_no_more_bytes():
    """The gradient of nn.Linear's weight is a transposed view."""
    shapes = [(48, 64), (33, 17), (1, 5), (5, 1), (300, 16)]
    training = Training(shapes, place=lambda g: mx.contiguous(g.T).T)
    training.step()
    log = dispatches(training.step)
    assert [d["kernel"] for d in log] == ["sgd_step_float32_float32", "sgd_counters"]
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
    assert kernels == ["pack_4", "pack_4", "sgd_step_float32_float32", "sgd_counters"]
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
    assert [d["kernel"] for d in log] == ["sgd_step_float32_float32", "sgd_counters"]
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
    assert [d["kernel"] for d in log] == ["sgd_counters"]
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
    monkeypatch.setenv("METAL_ON_CPU_COMPILER_ERROR", "metal/sgd.metal:7:1: error: no such thing")
    with pytest.raises(RuntimeError) as error:
        training.step()
    message = str(error.value)
    assert message.startswith("[fused_sgd_step] the Metal kernels do not build on this machine")
    assert "metal/sgd.metal:7:1: error: no such thing" in message
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
