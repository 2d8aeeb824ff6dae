"""What holds on every process of a group: tests/test_distributed.py runs these."""

from unittest import mock

import mlx.core as mx
import mlx.nn as nn
import mlx_fused_optim as optim
import numpy as np
import pytest
from mlx.utils import tree_flatten, tree_map
from mlx_fused_optim import _shards, average_gradients
from waiting import comes_true

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
        for size in (32 << 20, 2048, 0):
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
    stream = mx.new_stream(mx.default_device())
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


# ---- Sharded ---------------------------------------------------------------------------


def _matrix(path, _):
    return path.startswith("b")


OPTIMIZERS = {
    "momentum": lambda: optim.SGD(0.1, momentum=0.9, nesterov=True),
    "nothing kept": lambda: optim.SGD(0.1, weight_decay=0.01),
    "adamw": lambda: optim.AdamW(optim.cosine_decay(0.1, 10), bias_correction=True),
    "clipped": lambda: optim.Adam(0.1, clip_norm=1.0, ema_decay=0.9),
    "at random": lambda: optim.AdamW(
        0.1, rounding="stochastic", state_dtype=mx.bfloat16, seed=3, master_weights="24bit"
    ),
    "parameters at random": lambda: optim.Adam(0.1, rounding="stochastic", seed=5),
    "bytes": lambda: optim.AdamW(
        0.1, state_dtype="8bit", min_8bit_size=256, rounding="stochastic", master_weights=True
    ),
    "trust": lambda: optim.SGD(0.1, momentum=0.9, trust_coefficient=0.01, clip_norm=2.0),
    "groups": lambda: optim.Lion(0.1, groups=[(_matrix, {"learning_rate": 0.5, "beta1": 0.5})]),
    "skipping": lambda: optim.RMSprop(0.1, skip_nonfinite=True, clip_value=1.0),
    "compensated": lambda: optim.Adagrad(0.1, compensated=True, grad_scale=4.0),
    "muon": lambda: optim.Muon(0.1, momentum=0.9, weight_decay=0.1, clip_norm=1.0),
    "a rate of its own": lambda: optim.AdaDelta(lambda step: 0.1 / (step + 1), maximize=True),
}
MIXED = (mx.float32, mx.bfloat16, mx.float32)


def parameters_of(dtypes=MIXED):
    return drawn(77, *dtypes)


def gradients_of(rank, step, dtypes=MIXED):
    """Integers, so that means have no order; with an infinity on one process at one step."""
    tree = integers(8 * step + rank, *dtypes)
    if (rank, step) == (1, 2):
        tree["a"][2] = mx.where(mx.arange(8) == 3, mx.inf, tree["a"][2]).astype(dtypes[2])
    return tree


def mean_of(group, step, dtypes=MIXED):
    trees = [gradients_of(rank, step, dtypes) for rank in range(group.size())]
    return tree_map(lambda *leaves: sum(leaves[1:], leaves[0]) / group.size(), *trees)


def stepped(optimizer, parameters, gradients, steps):
    for step in steps:
        parameters = optimizer.apply_gradients(gradients(step), parameters)
        mx.eval(parameters, optimizer.state)
    return parameters


def both(group, make, steps=range(4), dtypes=MIXED):
    """Alone on means, and sharded on what each process has."""
    alone, sharded = make(), optim.Sharded(make(), group)
    expected = stepped(alone, parameters_of(), lambda t: mean_of(group, t, dtypes), steps)
    own = lambda t: gradients_of(group.rank(), t, dtypes)  # noqa: E731
    got = stepped(sharded, parameters_of(), own, steps)
    return alone, expected, sharded, got


def some(group):
    """Of the optimizers: all of them with two processes, and others with three than with four."""
    size = group.size()
    return [*OPTIMIZERS.items()][max(size - 3, 0) :: 1 if size == 2 else 2]


def bits_are_those_of_one_process(group):
    for name, make in some(group):
        alone, expected, sharded, got = both(group, make)
        try:
            same_to_nan(got, expected)
            for key in ("step", "learning_rate", "grad_norm", "skipped"):
                assert (key in alone.state) == (key in sharded.state), key
                if key in alone.state:
                    same_to_nan({key: sharded.state[key]}, {key: alone.state[key]})
        except AssertionError as error:
            raise AssertionError(f"{name}: {error}") from error


def same_to_nan(one, other):
    plain = lambda a: mx.nan_to_num(a.astype(mx.float32), nan=1e30) if a.dtype.size > 1 else a  # noqa: E731
    same(*(tree_map(plain, tree) for tree in (one, other)))


def two_optimizers_each_of_some_tensors(group):
    """As a Muon with others is, where each is sharded."""
    is_matrix = lambda path, array: array.ndim == 2  # noqa: E731
    make = lambda of: optim.MultiOptimizer(  # noqa: E731
        [of(optim.Muon(0.1)), of(optim.AdamW(0.01))], [is_matrix]
    )
    alone, sharded = make(lambda o: o), make(lambda o: optim.Sharded(o, group))
    named = lambda tree: {f"w{i}": a for i, (_, a) in enumerate(tree_flatten(tree))}  # noqa: E731
    expected = got = named(parameters_of((mx.float32,)))
    for step in range(2):
        mean, own = (
            named(tree) for tree in (mean_of(group, step), gradients_of(group.rank(), step))
        )
        expected = alone.apply_gradients(mean, expected)
        got = sharded.apply_gradients(own, got)
        same(got, expected)
        mx.eval(alone.state, sharded.state)


def a_step_waits_for_that_of_one_that_is_gone(group):
    parameters = parameters_of((mx.float32,))

    def stepped(step):
        own = gradients_of(group.rank(), step, (mx.float32,))
        return optim.Sharded(optim.SGD(0.5), group).apply_gradients(own, parameters)

    new = [stepped(0), stepped(1)]
    mx.eval(*new if group.rank() else new[::-1])
    for step, got in enumerate(new):
        mean = mean_of(group, step, (mx.float32,))
        same(got, tree_map(lambda p, g: p - 0.5 * g, parameters, mean))


def one_that_is_gone_holds_no_memory(group):
    """Parameters are views of what the next step waits for, so that goes with them."""

    def step_of(size):
        sharded = optim.Sharded(optim.SGD(0.5), group)
        mx.eval(sharded.apply_gradients(*[{"w": mx.ones(size)}] * 2))

    step_of(1)  # in the place of what others may have left
    before = mx.get_active_memory()
    step_of(1 << 18)
    assert comes_true(lambda: mx.get_active_memory() < before + (1 << 18))


def gradients_may_have_other_dtypes(group):
    make = OPTIMIZERS["adamw"]
    for dtypes in ((mx.float32,), (mx.bfloat16, mx.float16)):
        _, expected, _, got = both(group, make, range(2), dtypes)
        same(got, expected)


def every_process_keeps_its_part(group):
    """By what is there: together as much as one process, and none more than a part and a tensor."""
    shapes = [(64, 64)] * 23 + [(64,)] * 10
    parameters = drawn(0, mx.float32, shapes=shapes)
    alone = optim.AdamW(0.1)
    alone.init(parameters)
    sharded = optim.Sharded(optim.AdamW(0.1), group)
    before = mx.get_active_memory()
    sharded.init(parameters)
    mx.eval(sharded.state)
    used = mx.get_active_memory() - before

    def slots(state):
        entries = state["arenas"].values()
        return [array.nbytes for entry in entries for name in "mv" for array in entry[name]]

    whole, own = sum(slots(alone.state)), sum(slots(sharded.state))
    total = mx.distributed.all_sum(mx.array(own), group=group).item()
    assert total == whole
    assert own <= whole / group.size() + 2 * 64 * 64 * 4
    assert used <= own + 2**16


@mock.patch.object(_shards, "collective_size", mock.Mock(return_value=8 << 20))
def several_arenas_and_rounds(group):
    shapes = [(300, 1024)] * 12 + [(7,)] * 20 + [(300, 1024)] * 12
    parameters = drawn(0, mx.float32, shapes=shapes)
    alone = optim.AdamW(0.1, rounding="stochastic", state_dtype=mx.bfloat16)
    sharded = optim.Sharded(optim.AdamW(0.1, rounding="stochastic", state_dtype=mx.bfloat16), group)
    gradients = tree_map(lambda p: mx.round(4 * p), parameters)
    expected = got = parameters
    for _ in range(2):
        expected = alone.apply_gradients(gradients, expected)
        got = sharded.apply_gradients(gradients, got)
        same(got, expected)
    shards = sharded._shards
    assert len(shards.whole.arenas) > 2 and len(shards.parameters.arenas.arenas) > 2
    same(sharded.gathered_state(), alone.state)


def the_gathered_state_is_that_of_one_process(group):
    for name, make in some(group):
        alone, _, sharded, _ = both(group, make, range(1))
        last = group.size() - 1
        whole = sharded.gathered_state(to=None if name == "adamw" else last)
        try:
            if name == "adamw" or group.rank() == last:
                same_to_nan(whole, dict(alone.state))
            else:
                assert whole == {}
        except AssertionError as error:
            raise AssertionError(f"{name}: {error}") from error


def a_whole_state_is_shared_out(group):
    """One of this run, of a run of one process, and one as mlx.optimizers has it."""
    for name in ("adamw", "at random", "bytes") if group.size() == 2 else ("adamw",):
        make = OPTIMIZERS[name]
        alone, expected, sharded, got = both(group, make, range(2))
        states = [sharded.gathered_state(), dict(alone.state)]
        if name == "adamw":
            states.append(alone.unpacked_state())
        mean, own = lambda t: mean_of(group, t), lambda t: gradients_of(group.rank(), t)
        after = stepped(alone, expected, mean, [3, 4])
        for state in states:
            again = optim.Sharded(make(), group)
            again.state = state
            same(stepped(again, got, own, [3, 4]), after)
            again.init(got)
            assert again.state.get("arenas", {}).keys() == sharded.state.get("arenas", {}).keys()


def an_optimizer_that_has_a_state_is_shared_out(group):
    alone, expected, _, got = both(group, OPTIMIZERS["adamw"], range(2))
    used = OPTIMIZERS["adamw"]()
    used.state = dict(alone.state)
    used.init(expected)
    sharded = optim.Sharded(used, group)
    own = lambda t: gradients_of(group.rank(), t)  # noqa: E731
    same(
        stepped(sharded, got, own, [3]),
        stepped(alone, expected, lambda t: mean_of(group, t), [3]),
    )
    assert len(used.state.get("arenas", {})) <= 1  # nothing is left of the others' tensors


def an_option_that_is_set_counts_from_the_next_step(group):
    alone, expected, sharded, got = both(group, OPTIMIZERS["momentum"], range(2))
    alone.ema_decay = sharded.optimizer.ema_decay = 0.9
    before = sharded.gathered_state()
    own = lambda t: gradients_of(group.rank(), t)  # noqa: E731
    got = stepped(sharded, got, own, [3])
    same(got, stepped(alone, expected, lambda t: mean_of(group, t), [3]))
    same(sharded.gathered_state(), dict(alone.state))
    assert before["arenas"].keys() == alone.state["arenas"].keys()


def a_part_goes_on_where_it_was(group):
    import io

    for name in ("adamw", "bytes"):
        _, _, sharded, got = both(group, OPTIMIZERS[name], range(2))
        own = lambda t: gradients_of(group.rank(), t)  # noqa: E731
        file = io.BytesIO()
        mx.savez(file, **dict(tree_flatten(sharded.state)))
        file.seek(0)
        from mlx.utils import tree_unflatten
        from mlx_fused_optim import _layout

        state = tree_unflatten(list(mx.load(file, format="npz").items()))
        expected = stepped(sharded, got, own, [3])
        _layout._layouts.clear()  # as in another process
        again = optim.Sharded(OPTIMIZERS[name](), group)
        again.state = state
        same(stepped(again, got, own, [3]), expected)


def a_part_of_another_process_is_an_error(group):
    _, _, sharded, got = both(group, OPTIMIZERS["adamw"], range(1))
    rank, size = group.rank(), group.size()
    for place in ([(rank + 1) % size, size], [rank, size + 1]):
        mark = mx.concatenate([mx.array(place, mx.uint32), sharded.state["shard"][2:]])
        state = {**sharded.state, "shard": mark}
        with pytest.raises(
            ValueError, match=rf"got part {place[0]} of {place[1]}, allowed part {rank} of"
        ):
            optim.Sharded(OPTIMIZERS["adamw"](), group).state = state
    again = optim.Sharded(OPTIMIZERS["adamw"](), group)
    again.state = dict(sharded.state)
    with pytest.raises(ValueError, match="a part of another model"):
        again.apply_gradients({"a": [mx.ones(())]}, got)


def processes_that_differ_are_told_so(group):
    """Each of them; and then they can go on together."""
    odd = group.rank() == group.size() - 1
    plain = parameters_of((mx.float32,))
    other = {**plain, "a": plain["a"][:2]}
    half = tree_map(lambda p: p.astype(mx.float16), plain)
    wrong = {**plain, "a": [1.0]}
    cases = [
        (plain, lambda: optim.AdamW(0.1, clip_norm=1.0 if odd else 2.0)),
        (plain, lambda: optim.AdamW(0.1, weight_decay=0.1 if odd else 0.2)),
        (plain, lambda: optim.AdamW(0.1) if odd else optim.Adam(0.1)),
        (plain, lambda: optim.AdamW(optim.cosine_decay(0.1, 9 if odd else 8))),
        (other if odd else plain, lambda: optim.AdamW(0.1)),
        (half if odd else plain, lambda: optim.AdamW(0.1)),
        (wrong if odd else plain, lambda: optim.AdamW(0.1)),
    ]
    for parameters, make in cases:
        sharded = optim.Sharded(make(), group)
        with pytest.raises(ValueError, match=r"\[Sharded\] the .*(differ|not an array)"):
            sharded.apply_gradients(parameters, parameters)
    steps = optim.Sharded(optim.AdamW(0.1), group)
    steps.state["step"] = mx.array(3 + odd, mx.uint64)
    with pytest.raises(ValueError, match="steps on process"):
        steps.apply_gradients(plain, plain)
    sharded = optim.Sharded(optim.AdamW(0.1, groups=[(lambda p, _: True, {"eps": 1e-3})]), group)
    mx.eval(sharded.apply_gradients(plain, plain))


def what_somebody_holds_does_not_change(group):
    sharded = optim.Sharded(OPTIMIZERS["momentum"](), group)
    parameters, kept = parameters_of(), []
    for step in range(4):
        parameters = sharded.apply_gradients(gradients_of(group.rank(), step), parameters)
        mx.eval(parameters, sharded.state)
        arrays = [parameters, dict(sharded.state)]
        kept.append((arrays, tree_map(lambda a: np.array(a.astype(mx.float32)), arrays)))
    for arrays, numbers in kept:
        for (path, a), (_, b) in zip(tree_flatten(arrays), tree_flatten(numbers), strict=True):
            assert np.array_equal(np.array(a.astype(mx.float32)), b, equal_nan=True), path


def in_a_compiled_training_step(group):
    def make(compiled):
        mx.random.seed(0)
        model = nn.Sequential(nn.Linear(8, 16), nn.Linear(16, 4))
        optimizer = optim.Sharded(optim.AdamW(optim.cosine_decay(0.1, 9), clip_norm=1.0), group)
        optimizer.init(model.trainable_parameters())
        state = [model.state, optimizer.state]
        gradient = nn.value_and_grad(model, lambda m, x: m(x).square().sum())

        def step(x):
            optimizer.update(model, gradient(model, x)[1])

        step = mx.compile(step, inputs=state, outputs=state) if compiled else step
        for i in range(3):
            key = mx.random.key(group.rank() + 10 * i)
            step(mx.random.normal((4, 8), key=key))
            mx.eval(state)
        return model.parameters()

    plain, compiled = make(False), make(True)
    for path, a in tree_flatten(plain):  # a compiled backward pass may round otherwise
        assert mx.abs(a - dict(tree_flatten(compiled))[path]).max() < 1e-4, path


def a_loss_scaler_goes_down_on_every_process(group):
    sharded = optim.Sharded(optim.SGD(0.5, skip_nonfinite=True), group)
    scaler, model = optim.GradScaler(init_scale=4.0), nn.Linear(3, 2)
    model.update(tree_map(mx.zeros_like, model.parameters()))
    for bad in (True, False):
        value = mx.inf if bad and group.rank() == group.size() - 1 else 1.0
        scale = scaler.state["scale"]
        scaled = tree_map(lambda p, s=scale, v=value: s * mx.full(p.shape, v), model.parameters())
        scaler.step(sharded, model, scaled)
        scaler.update()
        assert scaler.state["scale"].item() == 2.0
        assert model.bias.tolist() == [0.0 if bad else -0.5] * 2
    assert sharded.optimizer.skipped.item() == 1


def other_tensors_are_trained(group):
    """Some are frozen, then trained again: what they had begins anew, the others go on."""
    alone, sharded = (
        optim.SGD(0.1, momentum=0.9),
        optim.Sharded(optim.SGD(0.1, momentum=0.9), group),
    )
    expected = got = drawn(1, mx.float32)
    gradients = integers(2, mx.float32)
    part = {"b": gradients["b"]}
    for tree in (gradients, part, part):
        expected = {**expected, **alone.apply_gradients(tree, expected)}
        got = {**got, **sharded.apply_gradients(tree, got)}
        same(got, expected)
    alone.keep_only(part)
    expected = alone.apply_gradients(gradients, expected)
    same(sharded.apply_gradients(gradients, got), expected)


def fully_sharded_models(group):
    """Our optimizers step its parts; Sharded has nothing to do there and says so."""
    mx.random.seed(0)
    model = nn.fully_shard(nn.Linear(8 * group.size(), 4 * group.size()), group=group)
    gradients = tree_map(mx.ones_like, model.trainable_parameters())
    with pytest.raises(ValueError, match="spread over processes already"):
        optim.Sharded(optim.AdamW(0.1), group).update(model, gradients)
    before = tree_map(lambda p: p + 0, model.trainable_parameters())
    optim.SGD(0.5).update(model, gradients)
    same(model.trainable_parameters(), tree_map(lambda p: p - 0.5, before))
