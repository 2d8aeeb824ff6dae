"""What holds on every process of a group: tests/test_distributed.py runs these."""

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten, tree_map
from mlx_fused_optim import average_gradients

SHAPES = [(), (3,), (33, 8), (64,), (700,), (0, 4), (128, 64), (5, 2, 3)]


def drawn(seed, *dtypes, shapes=SHAPES):
    random = np.random.default_rng(seed)
    leaves = [
        mx.array(random.standard_normal(shape).astype(np.float32)).astype(dtypes[i % len(dtypes)])
        for i, shape in enumerate(shapes)
    ]
    return {"a": leaves[:3], "b": {"c.d": tuple(leaves[3:])}}


def integers(seed, *dtypes):
    """Below 8, whose sums have no roundings in any dtype."""
    return tree_map(lambda a: mx.round(mx.clip(2 * a, -7, 7)), drawn(seed, *dtypes))


def same(one, other):
    mx.eval(one)  # collectives of two streams must not be under way at once
    mx.eval(other)
    one, other = (dict(tree_flatten(tree)) for tree in (one, other))
    assert one.keys() == other.keys()
    for path, a in one.items():
        b = other[path]
        assert (a.dtype, a.shape) == (b.dtype, b.shape), path
        assert mx.array_equal(a, b), path


DTYPES = [(mx.float32,), (mx.float16,), (mx.bfloat16, mx.float32, mx.float16)]


def bits_are_those_of_mlx(group):
    """Of two processes for any numbers; of more for those whose sums have no order."""
    draw = drawn if group.size() == 2 else integers
    for dtypes in DTYPES:
        for size in (32 << 20, 2048, 1, 0, -1):
            gradients = draw(group.rank(), *dtypes)
            same(average_gradients(gradients, group, size), nn.average_gradients(gradients, group))


def sums_are_right_to_the_last_bits(group):
    """float64's, within a rounding of each of size - 1 sums and of the division."""
    ranks = range(group.size())
    averaged = dict(tree_flatten(average_gradients(drawn(group.rank(), mx.float32), group)))
    all_of_them = [dict(tree_flatten(drawn(rank, mx.float32))) for rank in ranks]
    for path, got in averaged.items():
        values = np.array([np.array(tree[path], np.float64) for tree in all_of_them])
        error = np.abs(np.array(got, np.float64) - values.mean(0))
        assert (error <= len(ranks) * 2.0**-24 * np.abs(values).sum(0)).all(), path


def every_process_has_the_same(group):
    averaged = average_gradients(drawn(group.rank(), mx.float32, mx.bfloat16), group)
    for _, a in tree_flatten(averaged):
        flat = a.reshape(1, -1).astype(mx.float32)
        if a.size:
            rows = mx.distributed.all_gather(flat, group=group)
            assert mx.array_equal(rows, mx.broadcast_to(flat, rows.shape))


def gradients_as_backward_passes_leave_them(group):
    """Transposed, broadcast, sliced and lazy."""
    base = mx.random.randint(-7, 7, (24, 40), key=mx.random.key(group.rank())).astype(mx.float32)
    gradients = {
        "t": base.T,
        "b": mx.broadcast_to(base[0, 0], (9, 9)),
        "s": base[::2, 3:7],
        "n": mx.sum(base, axis=0),
    }
    for size in (32 << 20, 1):
        same(average_gradients(gradients, group, size), nn.average_gradients(gradients, group, 0))


def integers_are_left_as_they_are(group):
    tree = {"codes": mx.array([1, 2], mx.uint32), "w": mx.full(3, float(group.rank()))}
    averaged = average_gradients(tree, group)
    assert averaged["codes"].tolist() == [1, 2] and averaged["codes"].dtype == mx.uint32
    assert averaged["w"].tolist() == [(group.size() - 1) / 2] * 3
    assert average_gradients({}, group) == {}


def in_a_compiled_step(group):
    step = mx.compile(lambda g: average_gradients(g, group))
    for seed in range(3):
        gradients = integers(group.rank() + 8 * seed, mx.float32, mx.bfloat16)
        same(step(gradients), nn.average_gradients(gradients, group))


def a_stream_of_ones_own(group):
    stream = mx.new_stream(mx.cpu)
    gradients = integers(group.rank(), mx.float32, mx.bfloat16)
    averaged = average_gradients(gradients, group, communication_stream=stream)
    same(averaged, nn.average_gradients(gradients, group))


def what_is_held_does_not_change(group):
    gradients = drawn(group.rank(), mx.float32)
    mx.eval(gradients)
    averaged = average_gradients(gradients, group)
    mx.eval(averaged)
    again = average_gradients(averaged, group)
    mx.eval(again)
    same(gradients, drawn(group.rank(), mx.float32))
    same(averaged, average_gradients(gradients, group))
