"""The CUDA backend on a real GPU: against MLX on the same GPU, and our own CPU backend.

float32 with a constant rate has the bits of mlx.optimizers.SGD run eagerly; everything
has the bits of the CPU backend, which has its own tests.
"""

import contextlib
import ctypes
import itertools
import os
import re
import subprocess
import sys

import mlx.core as mx
import mlx.optimizers
import mlx_fused_optim as optim
import numpy as np
import pytest
from mlx.utils import tree_flatten
from mlx_fused_optim import _ext

if not mx.is_available(mx.gpu) or mx.metal.is_available():
    pytest.skip("needs MLX with CUDA and a GPU", allow_module_level=True)

# See conftest.py.
GPU, GPU_NUMBER = mx.default_device(), int(os.environ.get("MLX_FUSED_OPTIM_TEST_GPU", 0))

# Vector, tile and arena boundaries, and one more or less.
SIZES = [0, 1, 3, 4, 5, 63, 64, 65, 127, 129, 1023, 1025, 4095, 4096, 4097, 8191, 8193, 65543]
DTYPES = [mx.float32, mx.float16, mx.bfloat16]
OPTIONS = {
    "plain": dict(),
    "decay": dict(weight_decay=0.01),
    "momentum": dict(momentum=0.9),
    "dampened": dict(momentum=0.9, dampening=0.25, weight_decay=0.01),
    "nesterov": dict(momentum=0.9, nesterov=True, weight_decay=0.01),
}


def bits(array):
    """A numpy array of the very bits."""
    unsigned = {1: mx.uint8, 2: mx.uint16, 4: mx.uint32, 8: mx.uint64}[array.dtype.size]
    return np.array(mx.contiguous(array).view(unsigned)) if array.size else np.zeros(0)


def assert_same(got, want):
    assert len(got) == len(want)
    for number, (a, b) in enumerate(zip(got, want, strict=True)):
        assert a.dtype == b.dtype and a.shape == b.shape
        np.testing.assert_array_equal(bits(a), bits(b), err_msg=f"tensor {number} {a.shape}")


def random(shape, dtype=mx.float32, seed=0):
    with mx.stream(mx.cpu):
        value = mx.random.normal(shape, key=mx.random.key(seed)).astype(dtype)
        mx.eval(value)
    return value


def copied(arrays):
    """Arrays of their own, so that steps on two devices share nothing."""
    return [mx.array(np.array(a.astype(mx.float32))).astype(a.dtype) for a in arrays]


def lazy(arrays):
    """To be evaluated with what is made of them."""
    return [mx.stop_gradient(a) for a in arrays]


def run(device, parameters, gradients, options, rate, steps=3, evaluate_each=True):
    """The parameters, the momentum arenas and the counters after some steps."""
    previous = mx.default_device()
    mx.set_default_device(device)
    try:
        parameters = copied(parameters)
        mx.eval(parameters)
        momentum = options.get("momentum", 0.0)
        state = optim.fused_sgd_init(parameters, momentum=momentum)
        for _ in range(steps):
            parameters, state = optim.fused_sgd_step(
                parameters, gradients(), state, learning_rate=rate, **options
            )
            if evaluate_each:
                mx.eval(parameters, state)
        mx.eval(parameters, state)
        arenas = [a for entry in state.get("arenas", {}).values() for a in entry["momentum"]]
        return [*parameters, *arenas, state["step"], state["learning_rate"]]
    finally:
        mx.set_default_device(previous)


def assert_devices_agree(parameters, gradients, options=OPTIONS["nesterov"], rate=0.1, **more):
    got = run(GPU, parameters, gradients, options, rate, **more)
    want = run(mx.cpu, parameters, gradients, options, rate, **more)
    assert_same(got, want)


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_float32_has_the_bits_of_mlx_on_the_same_gpu(options):
    parameters = {f"p{n}": random((n,), seed=n) for n in SIZES}
    gradients = {f"p{n}": random((n,), seed=1000 + n) for n in SIZES}
    mine = optim.SGD(0.1, **options)
    theirs = mlx.optimizers.SGD(0.1, **options)
    a = {k: v + 0 for k, v in parameters.items()}
    b = {k: v + 0 for k, v in parameters.items()}
    for _ in range(3):
        a = mine.apply_gradients(gradients, a)
        b = theirs.apply_gradients(gradients, b)
        mx.eval(a, mine.state, b, theirs.state)
    assert_same([a[k] for k in parameters], [b[k] for k in parameters])
    if "momentum" in options:
        v = mine.unpacked_state()
        assert_same([v[k]["v"] for k in parameters], [theirs.state[k]["v"] for k in parameters])
    assert mine.step.item() == theirs.step.item() == 3


@pytest.mark.parametrize("dtype, gradient_dtype", list(itertools.product(DTYPES, DTYPES)), ids=str)
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_every_dtype_has_the_bits_of_the_cpu(dtype, gradient_dtype, options):
    parameters = [random((n,), dtype, n) for n in SIZES]
    gradients = [random((n,), gradient_dtype, 1000 + n) for n in SIZES]
    assert_devices_agree(parameters, lambda: gradients, options)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_scheduled_rates_have_the_bits_of_the_cpu(dtype):
    rate = optim.exponential_decay(0.1, 0.999)
    parameters = [random((n,), dtype, n) for n in SIZES]
    gradients = [random((n,), dtype, 1000 + n) for n in SIZES]
    assert_devices_agree(parameters, lambda: gradients, rate=rate)


def test_schedule_evaluated_alone():
    schedule = optim.exponential_decay(0.1, 0.999999)
    steps = mx.array(np.arange(0, 2**32, 2**32 // 3001).astype(np.uint64))
    with mx.stream(mx.cpu):
        want = schedule(steps)
        mx.eval(want)
    with mx.stream(GPU):
        got = schedule(steps)
        mx.eval(got)
    assert_same([got], [want])
    assert schedule(mx.zeros((0,), mx.uint64)).shape == (0,)


def strided_cases(dtype, gradient_dtype):
    """(parameter, gradient) in all ways to lie in memory."""

    def gradient(*shape):
        return random(shape, gradient_dtype, sum(shape))

    for rows, columns in [(64, 64), (65, 63), (1, 70), (70, 1), (3, 4099), (130, 257), (512, 8)]:
        yield random((rows, columns), dtype, rows), gradient(columns, rows).T
    yield random((7, 129), dtype), gradient(140, 20)[5:134, 3:10].T  # with a longer stride
    yield random((6, 5, 7), dtype), gradient(7, 5, 6).transpose(2, 1, 0)
    yield random((6, 5, 7), dtype), gradient(5, 6, 7).transpose(1, 0, 2)
    yield random((4, 33, 2), dtype), gradient(8, 33, 4)[::4].transpose(2, 1, 0)
    yield random((300, 40), dtype), mx.broadcast_to(gradient(40), (300, 40))
    yield random((300, 40), dtype), mx.broadcast_to(gradient(300, 1), (300, 40))
    yield random((65, 66), dtype), mx.broadcast_to(gradient(1, 1), (65, 66))
    yield random((4097,), dtype), gradient(3 * 4097)[::3]
    yield random((4097,), dtype), gradient(4097)[::-1]
    for shift in (1, 2, 3, 5, 7):  # contiguous, at any alignment
        yield random((4096 + shift,), dtype), gradient(4096 + 2 * shift)[shift:]
    yield random((40, 300), dtype).T, gradient(300, 40)
    yield random((5000,), dtype)[1:4500], gradient(4499)


@pytest.mark.parametrize("dtype, gradient_dtype", list(itertools.product(DTYPES, DTYPES)), ids=str)
def test_arrays_that_are_not_contiguous(dtype, gradient_dtype):
    """All at once, in one arena; the gradients are made on the device that steps."""

    def on_device():
        return [g for _, g in strided_cases(dtype, gradient_dtype)]

    parameters = [p for p, _ in strided_cases(dtype, gradient_dtype)]
    assert_devices_agree(parameters, on_device, steps=2)
    assert_devices_agree(parameters, on_device, OPTIONS["plain"], steps=1)


def test_more_tensors_than_a_launch_holds():
    rng = np.random.default_rng(0)
    shapes = [(int(n),) for n in rng.integers(0, 300, 2500)] + [(70000,), (17, 9)]
    parameters = [random(s, seed=i) for i, s in enumerate(shapes)]
    gradients = [random(s, seed=5000 + i) for i, s in enumerate(shapes)]
    gradients[-1] = random((9, 17)).T
    assert_devices_agree(parameters, lambda: gradients, steps=2)


def test_several_arenas_count_one_step():
    """19 of float32, of two tensors each or one, and one of each half type."""
    shapes = [(1 << 20,)] * 40
    parameters = [
        random(s, DTYPES[i % 3] if i > 34 else mx.float32, i) for i, s in enumerate(shapes)
    ]
    gradients = [random(s, seed=100 + i) for i, s in enumerate(shapes)]
    layout = _ext.Layout(_ext.Tree(parameters, parameters, "test"))
    assert len(layout.arenas) == 19 + 2
    assert_devices_agree(parameters, lambda: gradients, rate=optim.exponential_decay(0.1, 0.9))


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_arenas_that_share_a_launch(dtype, options):
    """Gradients that are there, lazy ones (a launch an arena), and the CPU; of all kinds of
    launches."""
    shapes = [(1024, 2000), (2100, 1000), (1 << 22,), (128, 128, 128), (7, 5), (4100, 1000)]
    parameters = [random(shape, dtype, i) for i, shape in enumerate(shapes)] * 2
    gradients = [random(shape, dtype, 10 + i) for i, shape in enumerate(shapes)] * 2
    gradients[1] = random(shapes[1][::-1], dtype, 20).T
    gradients[3] = random(shapes[3], dtype, 21).transpose(2, 1, 0)
    gradients[8] = gradients[8][::-1]
    mx.eval(gradients)
    layout = _ext.Layout(_ext.Tree(parameters, parameters, "test"))
    assert len(layout.arenas) > 4
    assert_devices_agree(parameters, lambda: gradients, options)
    there = run(GPU, parameters, lambda: gradients, options, 0.1)
    assert_same(there, run(GPU, parameters, lambda: lazy(gradients), options, 0.1))
    some = [*gradients[:3], *lazy(gradients[3:5]), *gradients[5:]]
    assert_same(there, run(GPU, parameters, lambda: some, options, 0.1, steps=3))


# As many as kernels declare, and one more: see capacity_for in csrc/cuda/launch.h.
@pytest.mark.parametrize("count", [32, 33, 64, 65, 128, 129, 256, 257, 463])
def test_launches_of_every_size(count):
    """The last tensor of each, of tiles, squares and strided ones, and what is measured of them."""
    ways = {
        "tiled": (lambda seed: random((5, 3), seed=seed), lambda g: g),
        "turned": (lambda seed: random((8, 12), seed=seed), lambda g: mx.contiguous(g.T).T),
        "strided": (lambda seed: random((3, 2, 5), seed=seed), lambda g: mx.contiguous(g.T).T),
    }
    for make, turned in ways.values():
        parameters = [make(seed) for seed in range(count)]
        gradients = [turned(make(1000 + seed)) for seed in range(count)]
        mx.eval(gradients)
        for options in ({"momentum": 0.9}, {"clip_norm": 0.5}):
            assert_devices_agree(parameters, lambda gradients=gradients: gradients, options)


def test_a_momentum_arena_that_is_not_contiguous():
    parameters = [random((n,), seed=n) for n in (5, 70, 4097)]
    gradients = [random((n,), seed=n + 1) for n in (5, 70, 4097)]

    def step(device):
        with mx.stream(device):
            state = optim.fused_sgd_init(copied(parameters), momentum=0.9)
            (entry,) = state["arenas"].values()
            (arena,) = entry["momentum"]
            wide = mx.array(np.arange(2 * arena.size, dtype=np.float32) % 13)
            entry["momentum"] = [wide[::2]]
            new, state = optim.fused_sgd_step(
                copied(parameters), gradients, state, learning_rate=0.1, momentum=0.9
            )
            (entry,) = state["arenas"].values()
            # What is between the tensors is not zero here, and becomes so.
            mx.eval(new, state)
            return [*new, *[entry["momentum"][0][a:b] for a, b in ((0, 5), (64, 134), (192, 4289))]]

    assert_same(step(GPU), step(mx.cpu))


def test_gaps_of_fresh_memory_are_zero():
    trash = [mx.full((1 << 18,), 7.0) for _ in range(8)]
    mx.eval(trash)
    del trash  # the step's memory comes from what these leave in the cache
    for infinite in (False, True):
        parameters = [random((n,)) for n in (1, 65, 4097, 70001)] + [random((9, 7))]
        gradients = [p * 1 for p in parameters[:-1]] + [random((7, 9)).T]
        state = optim.fused_sgd_init(parameters, momentum=0.9)
        held = state  # no donation: momentum is fresh as well
        rate = mx.array(np.inf if infinite else 0.1)
        new, state = optim.fused_sgd_step(
            parameters, gradients, state, learning_rate=rate, momentum=0.9
        )
        mx.eval(new, state, held)
        (entry,) = state["arenas"].values()
        (layout,) = [_ext.Layout(_ext.Tree(parameters, parameters, "test"))]
        ((_, shape, _, offsets, _),) = layout.arenas
        arena = np.array(entry["momentum"][0])
        for offset, p in zip(offsets, parameters, strict=True):
            end = -(-(offset + p.size) // 64) * 64
            assert (arena[offset + p.size : end] == 0).all()
        assert (arena[shape[0] - 1 :] == 0).all() or parameters[-1].size % 64 == 0


def test_steps_in_place_need_no_memory():
    parameters = [random((1 << 20,), seed=i) + 0 for i in range(8)]
    gradients = [random((1 << 20,), seed=100 + i) + 0 for i in range(8)]
    state = optim.fused_sgd_init(parameters, momentum=0.9)
    for step in range(6):
        parameters, state = optim.fused_sgd_step(
            parameters, gradients, state, learning_rate=0.1, momentum=0.9
        )
        mx.eval(parameters, state)
        mx.synchronize()
        if step == 2:
            mx.reset_peak_memory()
            active = mx.get_active_memory()
    # Counters only; an arena is 32 MiB.
    assert mx.get_peak_memory() - active < 1 << 20
    assert mx.get_active_memory() - active < 1 << 20


GRAPHS = """
import os, sys
import mlx.core as mx
import mlx_fused_optim as optim

folder, count = os.path.dirname(os.environ["MLX_SAVE_CUDA_GRAPHS_DOT_FILE"]), int(sys.argv[3])
parameters = [mx.ones((900_000,)) for _ in range(count)]  # two an arena
gradients = [mx.ones((900_000,)) for _ in range(count)]
optimizer = optim.SGD(optim.exponential_decay(0.1, 0.9), momentum=0.9)
optimizer.init(parameters)
mx.eval(parameters, gradients, optimizer.state)
def step(gradients, parameters):
    if sys.argv[2] == "lazy":
        gradients = [mx.abs(g) for g in gradients]
    return optimizer.apply_gradients(gradients, parameters)
if sys.argv[1] == "compiled":
    step = mx.compile(step, inputs=optimizer.state, outputs=optimizer.state)
for i in range(6):
    parameters = step(gradients, parameters)
    mx.eval(parameters, optimizer.state)
    if i == 2:  # parameters lie in arenas, and are written in place
        mx.synchronize()
        before = set(os.listdir(folder))
made = sorted(set(os.listdir(folder)) - before)
assert all(mx.array_equal(p, parameters[0]) and p[0] < 1 for p in parameters)
print(*made)
"""


def graphs_of_steps(folder, *how):
    """What MLX's encoder has launched, as text; the words behind each number are a node's."""
    environment = dict(
        os.environ,
        MLX_SAVE_CUDA_GRAPHS_DOT_FILE=str(folder / "graph"),
        MLX_MAX_OPS_PER_BUFFER="1000",
        MLX_MAX_MB_PER_BUFFER="100000",
    )
    made = subprocess.run(
        [sys.executable, "-c", GRAPHS, *how],
        env=environment,
        check=True,
        capture_output=True,
        text=True,
    ).stdout.split()
    return [re.findall(r'label="\d+\n(\w*)', (folder / name).read_text()) for name in made]


@pytest.mark.parametrize("tensors", [4, 12])
@pytest.mark.parametrize("compiled", ["eager", "compiled"])
def test_a_graph_has_kernels_and_nothing_else(compiled, tensors, tmp_path):
    """MLX finds the graph to be updated by its kernels and edges, and takes one with other nodes
    between them for the same: that fails, and a graph is instantiated with each step. Of 12 tensors
    it begins when two of the six launches are in it, and the others go straight to the stream."""
    graphs = graphs_of_steps(tmp_path, compiled, "lazy", str(tensors))
    assert len(graphs) == 3
    for nodes in graphs:
        assert nodes.count("step_tiled") == 2
        assert sum("Abs" in node for node in nodes) == len(nodes) - 2 == tensors


@pytest.mark.parametrize("compiled", ["eager", "compiled"])
def test_a_step_for_which_nothing_has_to_wait_makes_no_graph(compiled, tmp_path):
    assert graphs_of_steps(tmp_path, compiled, "there", "12") == []


@pytest.mark.parametrize("every", [1, 2, 3, 5, 100])
def test_launches_to_the_stream_and_in_graphs_keep_their_order(every):
    """One evaluation has steps alone, which go to the stream; every few steps operations of MLX
    read and replace what was stepped, and those and the next steps share a graph."""

    def run(settle):
        parameters = [random((1 << 22,), seed=i) + 0 for i in range(6)]
        gradients = [random((1 << 22,), seed=10 + i) + 0 for i in range(6)]
        state = optim.fused_sgd_init(parameters, momentum=0.9)
        mx.eval(parameters, gradients, state)
        seen = []
        for step in range(1, 16):
            parameters, state = optim.fused_sgd_step(
                parameters, gradients, state, learning_rate=0.1, momentum=0.9, clip_norm=step
            )
            if step % every == 0:
                seen.append([mx.sum(mx.abs(p)) for p in parameters])
                parameters = [0.5 * p for p in parameters]
            settle(parameters, state, seen)
        mx.eval(parameters, state, seen)
        return [value for _, value in tree_flatten((parameters, state, seen))]

    def one_by_one(*arrays):
        mx.eval(*arrays)
        mx.synchronize()

    assert_same(run(lambda *_: None), run(one_by_one))


LET_GO = """
import mlx.core as mx
import mlx_fused_optim as optim

half, tree = (1 << 20) - 64, 1 << 23  # elements of a tensor, bytes of the two in an arena
trees = [[mx.full((half,), float(i)) for _ in range(2)] for i in range(60)]
gradients = [mx.ones((half,)) for _ in range(2)]
state = optim.fused_sgd_init(trees[0])
mx.eval(trees, gradients, state)
mx.synchronize()
mx.reset_peak_memory()
before = mx.get_active_memory()
new = []
while trees:  # nobody else has the old parameters, but they lie in no arena
    new.append(optim.fused_sgd_step(trees.pop(), gradients, state, learning_rate=0.5)[0])
mx.eval(new)
mx.synchronize()
assert [p[-1].item() for p, _ in new] == [i - 0.5 for i in reversed(range(60))]
print((mx.get_peak_memory() - before) / tree)
"""


def test_an_evaluation_lets_go_of_what_its_steps_have_read():
    """Also where no graph is launched: launches count, and MLX commits behind so many elements."""
    environment = dict(os.environ, MLX_MAX_MB_PER_BUFFER="4")
    made = subprocess.run(
        [sys.executable, "-c", LET_GO], env=environment, check=True, capture_output=True, text=True
    )
    assert float(made.stdout) < 40  # of 60 trees; some ten commits may be under way


def test_memory_is_mlx_s_own():
    """Counted, cached and given back by MLX."""
    mx.synchronize()
    mx.clear_cache()
    before = mx.get_active_memory()
    parameters = [random((1 << 22,))]
    state = optim.fused_sgd_init(parameters, momentum=0.9)
    new, state = optim.fused_sgd_step(
        parameters, [random((1 << 22,), seed=1)], state, learning_rate=0.1, momentum=0.9
    )
    mx.eval(new, state)
    assert mx.get_active_memory() - before >= 2 << 24
    del new, state, parameters
    mx.synchronize()
    assert mx.get_active_memory() - before < 1 << 20
    mx.clear_cache()
    assert mx.get_cache_memory() == 0


def test_a_chain_of_steps_evaluated_at_once():
    parameters = [random((n,), seed=n) for n in SIZES]
    gradients = [random((n,), seed=1000 + n) for n in SIZES]
    assert_devices_agree(parameters, lambda: gradients, steps=20, evaluate_each=False)


def test_streams_of_their_own():
    parameters = [random((n,), seed=n) for n in SIZES]
    gradients = [random((n,), seed=1000 + n) for n in SIZES]
    want = run(GPU, parameters, lambda: gradients, OPTIONS["momentum"], 0.1, steps=6)
    streams = [mx.new_stream(GPU) for _ in range(3)]
    for evaluate_each in (True, False):
        new = copied(parameters)
        state = optim.fused_sgd_init(new, momentum=0.9)
        for i in range(6):
            new, state = optim.fused_sgd_step(
                new, gradients, state, learning_rate=0.1, momentum=0.9, stream=streams[i % 3]
            )
            if evaluate_each:
                mx.eval(new, state)
        (entry,) = state["arenas"].values()
        got = [*new, *entry["momentum"], state["step"], state["learning_rate"]]
        mx.eval(got)
        assert_same(got, want)


def test_compiled():
    parameters = [random((n,), seed=n) for n in SIZES]
    gradients = [random((n,), seed=1000 + n) for n in SIZES]
    want = run(GPU, parameters, lambda: gradients, OPTIONS["nesterov"], 0.1, steps=4)

    @mx.compile
    def step(parameters, gradients, state):
        return optim.fused_sgd_step(
            parameters, gradients, state, learning_rate=0.1, **OPTIONS["nesterov"]
        )

    new, state = copied(parameters), optim.fused_sgd_init(parameters, momentum=0.9)
    for _ in range(4):
        new, state = step(new, gradients, state)
        mx.eval(new, state)
    (entry,) = state["arenas"].values()
    assert_same([*new, *entry["momentum"], state["step"], state["learning_rate"]], want)


def test_a_training_loop_learns_what_mlx_learns():
    import mlx.nn as nn

    def losses(sgd):
        mx.random.seed(0)
        model = nn.Sequential(nn.Linear(33, 65), nn.ReLU(), nn.Linear(65, 10))
        x, y = mx.random.normal((128, 33)), mx.random.randint(0, 10, (128,))
        optimizer = sgd(0.1, momentum=0.9, weight_decay=1e-3)
        loss = nn.value_and_grad(model, lambda m: nn.losses.cross_entropy(m(x), y).mean())
        values = []
        for _ in range(20):
            value, gradients = loss(model)
            optimizer.update(model, gradients)
            mx.eval(value, model.state, optimizer.state)
            values.append(value.item())
        return values

    assert losses(optim.SGD) == losses(mlx.optimizers.SGD)


def test_an_array_of_no_tensors_counts_steps():
    state = optim.fused_sgd_init({})
    for _ in range(3):
        _, state = optim.fused_sgd_step({}, {}, state, learning_rate=0.5)
    mx.eval(state)
    assert (state["step"].item(), state["learning_rate"].item()) == (3, 0.5)


def test_more_than_int32_elements():
    rows = ((1 << 31) + 4100) // 2
    parameters = mx.ones((2, rows), mx.bfloat16)
    gradients = mx.full((2, rows), 0.5, mx.bfloat16)
    state = optim.fused_sgd_init(parameters)
    for want in (0.75, 0.5):
        parameters, state = optim.fused_sgd_step(parameters, gradients, state, learning_rate=0.5)
        assert (parameters == want).all().item()


@contextlib.contextmanager
def driver_of_gpu():
    """The driver's interface, with the context of the GPU under test."""
    driver, context = ctypes.CDLL("libcuda.so.1"), ctypes.c_void_p()
    assert driver.cuDevicePrimaryCtxRetain(ctypes.byref(context), GPU_NUMBER) == 0
    assert driver.cuCtxPushCurrent_v2(context) == 0
    try:
        yield driver
    finally:
        assert driver.cuCtxPopCurrent_v2(ctypes.byref(context)) == 0
        assert driver.cuDevicePrimaryCtxRelease_v2(GPU_NUMBER) == 0


@contextlib.contextmanager
def little_memory(left=512 << 20):
    """The GPU has this much left (bytes)."""
    mx.synchronize()
    mx.clear_cache()
    free, total, hog = ctypes.c_size_t(), ctypes.c_size_t(), ctypes.c_void_p()
    with driver_of_gpu() as driver:
        assert driver.cuCtxSynchronize() == 0  # only then has the driver taken it back
        assert driver.cuMemGetInfo_v2(ctypes.byref(free), ctypes.byref(total)) == 0
        assert driver.cuMemAlloc_v2(ctypes.byref(hog), ctypes.c_size_t(free.value - left)) == 0
    try:
        yield
    finally:
        with driver_of_gpu() as driver:
            assert driver.cuMemFree_v2(hog) == 0


@pytest.mark.fills_gpu
def test_out_of_memory_changes_nothing():
    parameters = [mx.random.normal((1 << 24,)) for _ in range(16)]  # 64 MiB, an arena each
    gradients = [p * 0.5 for p in parameters]
    state = optim.fused_sgd_init(parameters, momentum=0.9)
    before = [p * 1 for p in parameters]
    mx.eval(parameters, gradients, state, before)
    new, after = optim.fused_sgd_step(parameters, gradients, state, learning_rate=0.1, momentum=0.9)
    # The step wants 2 GiB, as all its inputs are held.
    with (
        little_memory(),
        pytest.raises(RuntimeError, match=r"\[fused_step\] out of device memory: needed 64"),
    ):
        mx.eval(new, after)
    assert_same(parameters, before)
    assert state["step"].item() == 0
    # The very same graph succeeds once there is room, as does a fresh one.
    mx.eval(new, after)
    again, _ = optim.fused_sgd_step(parameters, gradients, state, learning_rate=0.1, momentum=0.9)
    assert after["step"].item() == 1
    assert_same(new, again)


def test_too_many_dimensions():
    shape = (2,) * 12
    parameter = mx.zeros(shape)
    gradient = random((3,) * 12).transpose(*range(11, -1, -1))[(slice(0, 2),) * 12]
    new, _ = optim.fused_sgd_step(
        parameter, gradient, optim.fused_sgd_init(parameter), learning_rate=0.1
    )
    with pytest.raises(ValueError, match=r"too many dimensions: got more than 10"):
        mx.eval(new)
