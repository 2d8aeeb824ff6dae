"""Several processes: 2, 3 and 4 on this machine, over the ring; and what one can tell."""

import fcntl
import functools
import inspect
import json
import os
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import mlx_fused_optim as optim
import numpy as np
import pytest
import ring_checks
from ring import GPUS, launched

FILE = str(Path(ring_checks.__file__))
CHECKS = tuple(
    name
    for name, check in vars(ring_checks).items()
    if inspect.isfunction(check) and list(inspect.signature(check).parameters) == ["group"]
)


# With four processes, which share the cores of small machines, those that count processes.
OF_MANY = (
    ring_checks.sums_are_right_to_the_last_bits,
    ring_checks.every_process_has_the_same,
    ring_checks.bits_are_those_of_one_process,
    ring_checks.every_process_keeps_its_part,
    ring_checks.the_gathered_state_is_that_of_one_process,
    ring_checks.a_part_of_another_process_is_an_error,
    ring_checks.processes_that_differ_are_told_so,
    ring_checks.other_tensors_are_trained,
)
SIZES = {2: CHECKS, 3: CHECKS, 4: tuple(check.__name__ for check in OF_MANY)}


@functools.cache
def outcomes(size):
    """Of the processes that share a suite, one launches; and no two at once."""
    folder = os.environ.get("MLX_FUSED_OPTIM_TEST_SHARED")
    if not folder:
        return launched(size, FILE, SIZES[size])
    found = Path(folder, f"ring_{size}.json")
    with Path(folder, "ring.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not found.exists():
            found.write_text(json.dumps(launched(size, FILE, SIZES[size])))
    return json.loads(found.read_text())


@pytest.mark.parametrize(
    "size, check",
    [(size, check) for size in SIZES if size <= (GPUS or 4) for check in SIZES[size]],
)
def test_on_a_ring(size, check):
    for rank, outcome in enumerate(outcomes(size)):
        assert not outcome[check], f"rank {rank}: {outcome[check]}"


def test_a_check_that_fails_is_seen():
    """One that does not exist, and so on every process."""
    for outcome in launched(2, FILE, ["no_such_check"]):
        assert "no_such_check" in outcome["no_such_check"]


class Two:
    """What a group is asked for."""

    def size(self):
        return 2

    def rank(self):
        return 0


def test_one_collective_for_each_flat_array(monkeypatch):
    """Of mixed dtypes too, on the stream that is asked for; a large tensor is not copied."""
    calls = []

    def all_sum(x, *, group, stream):
        calls.append((x.dtype, x.size, stream))
        return x + x

    monkeypatch.setattr(mx.distributed, "all_sum", all_sum)
    stream = mx.new_stream(mx.default_device())
    gradients = {str(i): mx.ones(64, [mx.float32, mx.bfloat16][i % 2]) for i in range(40)}
    gradients["large"] = mx.ones(5000)
    averaged = optim.average_gradients(gradients, Two(), 8192, stream)
    assert all(mx.array_equal(averaged[key], g) for key, g in gradients.items())
    assert {s for _, _, s in calls} == {stream}
    # 20 x 256 bytes of each dtype, which is what the narrow ones take with their gaps.
    assert [(dtype, size) for dtype, size, _ in calls] == [
        (mx.float32, 20 * 64),
        (mx.bfloat16, 20 * 128),
        (mx.float32, 5000),
    ]


def test_of_one_process_it_is_what_was_given():
    gradients = {"w": mx.ones(3)}
    assert optim.average_gradients(gradients) is gradients
    given = inspect.signature(optim.average_gradients).parameters
    mlx = inspect.signature(nn.average_gradients).parameters
    assert [*given] == [*mlx]
    for name in {*mlx} - {"all_reduce_size"}:  # None, for that of MLX or what suits CUDA
        assert given[name].default == mlx[name].default


@pytest.mark.parametrize("has_cuda", [False, True])
def test_as_much_is_communicated_at_once_as_suits_the_device(monkeypatch, has_cuda):
    """By default; what is given counts."""
    shapes, sizes = [(1 << 23,)] * 12, []  # 32 MiB each
    device = mx.Device(mx.gpu if has_cuda else mx.cpu)
    monkeypatch.setattr(mx.cuda, "is_available", lambda: has_cuda)
    monkeypatch.setattr(mx, "default_device", lambda: device)
    monkeypatch.setattr(mx.distributed, "all_sum", lambda x, **_: sizes.append(x.nbytes >> 20) or x)
    gradients = {f"w{i}": mx.broadcast_to(mx.array(0.0), shape) for i, shape in enumerate(shapes)}
    optim.average_gradients(gradients, Two())
    assert sizes == ([256, 128] if has_cuda else [32] * 12)
    sizes.clear()
    optim.average_gradients(gradients, Two(), 64 << 20)
    assert sizes == [64] * 6


def test_what_cannot_be_averaged():
    for leaf, words in ((mx.ones(2, mx.complex64), "complex64"), (1.0, "float")):
        with pytest.raises(ValueError, match=rf"\[average_gradients\] .*'w'.*{words}"):
            optim.average_gradients({"w": leaf}, Two())


def test_an_optimizer_that_cannot_be_sharded():
    class Own(optim.SGD):
        def apply_single(self, gradient, parameter, state):
            return parameter

    import mlx.optimizers

    for optimizer in (Own(0.1), mlx.optimizers.SGD(0.1), None):
        with pytest.raises(
            TypeError, match=r"\[Sharded\] the optimizer is of the wrong type: got "
        ):
            optim.Sharded(optimizer)
    two = optim.Muon(0.1, others=optim.AdamW(0.1))
    with pytest.raises(
        TypeError, match=r"\[Sharded\] the optimizer is two: got a Muon with AdamW as oth"
    ):
        optim.Sharded(two)
    later, parameters = optim.Sharded(optim.Muon(0.1), Two()), {"w": mx.zeros((2, 2))}
    later._agreed = True  # without another process
    later.optimizer.others = optim.AdamW(0.1)
    with pytest.raises(TypeError, match=r"\[Sharded\] the optimizer is two"):
        later.init(parameters)
    later.optimizer.others = None
    later.optimizer.apply_single = lambda gradient, parameter, state: parameter
    with pytest.raises(
        TypeError, match=r"\[Sharded\] the optimizer is of the wrong type: got Muon"
    ):
        later.init(parameters)


def test_nothing_to_gather():
    with pytest.raises(ValueError, match=r"\[Sharded\] nothing to gather: got no state"):
        optim.Sharded(optim.SGD(0.1), Two()).gathered_state()


def test_a_mark_that_is_none():
    sharded = optim.Sharded(optim.SGD(0.1), Two())
    for mark in (mx.zeros(4), mx.zeros(2, mx.uint32)):
        with pytest.raises(ValueError, match=r"\[Sharded\] state\['shard'\] is of the wrong type"):
            sharded.state = {**sharded.state, "shard": mark}


def test_of_one_process_it_is_the_optimizer():
    alone, sharded = optim.AdamW(0.1), optim.Sharded(optim.AdamW(0.1))
    parameters = {"w": mx.ones(3)}
    sharded.init(parameters)
    expected = alone.apply_gradients(parameters, parameters)
    got = sharded.apply_gradients(parameters, parameters)
    assert mx.array_equal(got["w"], expected["w"])
    assert sharded.gathered_state().keys() == alone.state.keys()
    assert sharded.step == 1 and sharded.learning_rate == alone.learning_rate
    sharded.learning_rate = 0.5
    assert sharded.optimizer.learning_rate == 0.5


@pytest.mark.parametrize("size", [1, 2, 3, 7, 40])
def test_every_tensor_is_one_process_and_none_has_much_more(size):
    """Also of more processes than tensors."""
    from mlx_fused_optim import _ext
    from mlx_fused_optim._layout import layout_of
    from mlx_fused_optim._shards import Shards

    shapes = [(64, i) for i in range(1, 30)] + [(0,), (4096,)]
    dtypes = [mx.float32, mx.bfloat16]
    tree = [mx.zeros(shape, dtypes[i % 2]) for i, shape in enumerate(shapes)]
    whole = layout_of(_ext.Tree(tree, tree, "test"))
    shards = [Shards(whole, rank, size) for rank in range(size)]
    assert [number for one in shards for number in one.own] == [*range(len(shapes))]
    weights = [sum(tree[number].nbytes for number in one.own) for one in shards]
    largest = max(a.nbytes for a in tree) + 256 * len(shapes)
    assert max(weights) <= sum(weights) / size + largest
    for one in shards:
        for rounds in (one.parameters, one.gradients([mx.float16] * len(shapes))):
            seen = [t for _, _, tensors, *_ in rounds.arenas.arenas for t in tensors]
            assert sorted(seen) == [*range(len(shapes))]
            for whole_arena, slice_ in zip(rounds.arenas.arenas, rounds.slices.arenas, strict=True):
                assert whole_arena[1] == (size * slice_[1][0],)
                # A kernel zeroes from the end of a tensor to the next multiple of 256 bytes.
                dtype, (elements,), tensors, offsets, *_ = whole_arena
                unit, rest = 256 // dtype.size, [*offsets[1:], elements]
                for number, begin, end in zip(tensors, offsets, rest, strict=True):
                    cleared = -(-tree[number].size // unit) * unit
                    assert begin % unit == 0 and begin + cleared <= end


@pytest.mark.parametrize("dtype", [mx.float16, mx.bfloat16, mx.float32], ids=str)
def test_gradients_of_another_dtype_are_packed_whole(dtype):
    """On whatever device this runs."""
    from mlx_fused_optim import _ext
    from mlx_fused_optim._layout import layout_of
    from mlx_fused_optim._shards import Shards

    shapes = [(3,), (33, 8), (64,), (700,), (5, 2, 3), (0, 4), (129,)]
    parameters = [mx.zeros(shape) for shape in shapes]
    gradients = [mx.random.normal(shape).astype(dtype) for shape in shapes]
    shards = Shards(layout_of(_ext.Tree(gradients, parameters, "test")), 0, 2)
    rounds = shards.gradients([dtype] * len(shapes))
    packed = _ext.pack_arrays(gradients, rounds.arenas)
    found = _ext.tensors_of(packed, rounds.arenas)
    assert all(map(mx.array_equal, found, gradients))


@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16, mx.float16], ids=str)
@pytest.mark.parametrize("state", [mx.bfloat16, "8bit"], ids=str)
def test_a_part_has_the_random_bits_of_the_whole(state, dtype):
    """On whatever device this runs: parts of an arena that begin in its middle."""
    from mlx_fused_optim import _ext
    from mlx_fused_optim._layout import kept, layout_of
    from mlx_fused_optim._shards import Shards

    def make():
        return optim.AdamW(0.1, state_dtype=state, min_8bit_size=0, rounding="stochastic", seed=1)

    random = np.random.default_rng(0)
    shapes = [(700,), (33, 8), (64,), (5, 130), (2000,)]
    parameters, gradients = (
        [mx.array(random.standard_normal(s).astype(np.float32)).astype(dtype) for s in shapes]
        for _ in range(2)
    )
    alone = make()
    expected = alone.apply_gradients(gradients, parameters)
    (entry,) = alone.state["arenas"].values()
    tree = _ext.Tree(gradients, parameters, "test")
    found, arenas = [], {"m": [], "v": []}
    for rank in range(3):
        shards = Shards(layout_of(tree), rank, 3)
        part = tree.part(shards.own, kept(shards.layout).made)
        own = make()
        found += own._take_step(part, parameters, own._options, None)
        for own_entry in own.state["arenas"].values():
            for name, parts in arenas.items():
                parts += own_entry[name]
    assert all(mx.array_equal(a, b) for a, b in zip(found, expected, strict=True))
    for name, parts in arenas.items():
        assert len(parts) > 1 and mx.array_equal(mx.concatenate(parts), entry[name][0])
