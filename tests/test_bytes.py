"""Moments in one byte each, csrc/math/bytes.h: what a state of them promises. The bits of each
step are in tests/full_cases.py."""

import copy
import itertools
import pickle
import random

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers
import mlx_fused_optim as optim
import numpy as np
import pytest
from bits import of_mlx, same
from byte_references import GROUP, ROW, SQUARES, as_rows, of_rows
from hypothesis import given
from hypothesis import strategies as st
from mlx.utils import tree_flatten, tree_unflatten
from mlx_fused_optim import _ext, _layout, _packing
from waiting import let_go

RULES = {
    "SGD": dict(momentum=0.9),
    "Adam": dict(bias_correction=True),
    "AdamW": dict(amsgrad=True, bias_correction=True),
    "Adamax": {},
    "Lion": {},
    "RMSprop": {},
    "Adagrad": {},
    "AdaDelta": {},
}
every_rule = pytest.mark.parametrize("rule", RULES)
every_dtype = pytest.mark.parametrize("dtype", [mx.float32, mx.float16, mx.bfloat16], ids=str)
EDGES = (1, 63, 64, 65, 127, 128, 129)


def make(rule="AdamW", rate=0.01, **options):
    return getattr(optim, rule)(rate, **{**RULES[rule], "state_dtype": "8bit", **options})


def tree(seed, dtype=mx.float32, scale=1.0):
    """Two tensors of 4096 elements and more, one with a group that is not whole, and small ones."""
    values = np.random.default_rng(seed).standard_normal

    def draw(*shape):
        return mx.array(scale * values(shape), mx.float32).astype(dtype)

    return {"w": draw(65, 70), "b": draw(33), "layers": [{"w": draw(4096)}, {"s": draw()}]}


def stepped(optimizer, steps, parameters=None, dtype=mx.float32, first=1):
    parameters = tree(0, dtype) if parameters is None else parameters
    for i in range(steps):
        parameters = optimizer.apply_gradients(tree(first + i, dtype), parameters)
        mx.eval(parameters, optimizer.state)
    return parameters


def kept_of(optimizer):
    """By path, the rows of what is in bytes, and what is not, as a state has it."""
    kept = _packing.everything(optimizer.state, optimizer._rule.slots, "test")
    return {
        (path, name): getattr(value, "rows", value)
        for path, slots in kept.items()
        for name, value in slots.items()
    }


def bits_of(optimizer):
    return {key: (value.dtype, of_mlx(value)) for key, value in kept_of(optimizer).items()}


def assert_same_bits(got, want):
    assert got.keys() == want.keys()
    for key, (dtype, bits) in want.items():
        assert got[key][0] == dtype and np.array_equal(got[key][1], bits), key


def assert_same(got, want):
    got, want = dict(tree_flatten(got)), dict(tree_flatten(want))  # loaded in another order
    assert got.keys() == want.keys()
    for path in want:
        assert same(got[path], want[path]), path


def form_of(optimizer, slot):
    return SQUARES if optimizer._rule.slots[slot].is_unsigned else "bytes"


def saved_and_loaded(state, path):
    mx.save_safetensors(str(path), dict(tree_flatten(state)))
    _layout._layouts.clear()  # as in another process
    return tree_unflatten(list(mx.load(str(path)).items()))


# ---- States ------------------------------------------------------------------------------


@every_dtype
@every_rule
def test_a_saved_state_is_as_small_and_goes_on(rule, dtype, tmp_path):
    one = make(rule, rounding="stochastic", seed=3)
    parameters = stepped(one, 2, dtype=dtype)
    path = tmp_path / "state.safetensors"
    two = make(rule, rounding="stochastic", seed=3)
    two.state = saved_and_loaded(one.state, path)
    arrays = [a for _, a in tree_flatten(one.state)]
    assert path.stat().st_size <= sum(a.nbytes for a in arrays) + 2048  # names and tables
    moments = sum(dtype == mx.uint8 for dtype, _ in bits_of(one).values()) / 2  # tensors each
    assert moments >= 1
    elements = sum(a.size for _, a in tree_flatten(parameters))
    assert sum(a.nbytes for a in arrays) < moments * (elements * ROW / GROUP + 4 * 2048) + 2048
    got, want = stepped(two, 2, parameters, dtype, 7), stepped(one, 2, parameters, dtype, 7)
    assert_same(got, want)
    assert_same(two.state, one.state)


@every_rule
def test_small_tensors_keep_float32(rule):
    optimizer = make(rule)
    stepped(optimizer, 1)
    for (path, _), (dtype, bits) in bits_of(optimizer).items():
        is_large = path in (("w",), ("layers", 0, "w"))
        assert dtype == (mx.uint8 if is_large else mx.float32), path
        assert not is_large or bits.shape == (-(-(4550 if path == ("w",) else 4096) // 64), ROW)


@pytest.mark.parametrize("least", [0, 1, 33, 34, 4096, 4097, 4550, 4551, 2**63 - 1])
def test_the_bound_of_small_tensors(least):
    optimizer = make(min_8bit_size=least)
    stepped(optimizer, 2)
    sizes = {("w",): 4550, ("b",): 33, ("layers", 0, "w"): 4096, ("layers", 1, "s"): 1}
    for (path, _), (dtype, _) in bits_of(optimizer).items():
        assert dtype == (mx.uint8 if sizes[path] >= least else mx.float32), path


@every_rule
def test_from_float32_and_back_mid_run(rule):
    """Of ours: the rows are those of the float32 moments, and float32 moments those of the rows."""
    wide = make(rule, state_dtype=mx.float32)
    parameters = stepped(wide, 3)
    numbers = kept_of(wide)
    narrow = make(rule)
    narrow.state = wide.state
    narrow.init(parameters)
    for (path, slot), rows in kept_of(narrow).items():
        if rows.dtype != mx.uint8:
            assert same(rows, numbers[path, slot])
            continue
        form = form_of(narrow, slot)
        want = as_rows(np.array(numbers[path, slot]), form)
        assert np.array_equal(of_mlx(rows), want), (path, slot)
    stepped(narrow, 2, parameters, first=5)
    rows = kept_of(narrow)
    for back, state in ((make(rule, state_dtype=mx.float32), narrow.state),
                        (make(rule, state_dtype=mx.float32), narrow.unpacked_state())):  # fmt: skip
        back.state = state
        back.init(parameters)
        for (path, slot), value in kept_of(back).items():
            assert value.dtype == mx.float32
            if rows[path, slot].dtype == mx.uint8:
                flat = of_rows(of_mlx(rows[path, slot]), form_of(narrow, slot))
                want = flat[: value.size].reshape(value.shape)
                assert np.array_equal(np.array(value), want), (path, slot)
        stepped(back, 1, parameters)


@pytest.mark.parametrize("rule", ["SGD", "Adam", "AdamW", "Lion", "RMSprop", "AdaDelta"])
def test_from_mlx_and_back_mid_run(rule):
    """A state of ``mlx.optimizers`` goes on in bytes, with the parameters that float32 gives in
    the first step but for the coding of the moments; and MLX's goes on with what bytes have."""
    options = {k: v for k, v in RULES[rule].items() if k in ("momentum", "bias_correction")}
    theirs = getattr(mlx.optimizers, rule)(0.01, **options)
    parameters = stepped(theirs, 3)
    ours = getattr(optim, rule)(0.01, state_dtype="8bit", **options)
    ours.state = theirs.state
    ours.init(parameters)
    for (path, slot), rows in kept_of(ours).items():
        theirs_at = theirs.state
        for key in path:
            theirs_at = theirs_at[key]
        number = theirs_at[ours._rule.slots[slot].key]
        want = as_rows(np.array(number), form_of(ours, slot))
        assert rows.dtype != mx.uint8 or np.array_equal(of_mlx(rows), want)
    parameters = stepped(ours, 2, parameters)
    assert ours.step.item() == 5
    unpacked = ours.unpacked_state()
    assert all(a.dtype != mx.uint8 for _, a in tree_flatten(unpacked))
    again = getattr(mlx.optimizers, rule)(0.01, **options)
    again.state = unpacked
    wide = getattr(optim, rule)(0.01, state_dtype=mx.float32, **options)
    wide.state = ours.state
    got, want = stepped(again, 2, parameters), stepped(wide, 2, parameters)
    for (path, a), (_, b) in zip(tree_flatten(got), tree_flatten(want), strict=True):
        # MLX rounds a step otherwise: a few ulps of changes of up to a few hundredths.
        assert mx.allclose(a, b, rtol=1e-6, atol=1e-6), path


NUMBERS = st.one_of(
    st.floats(width=32, allow_nan=True, allow_infinity=True),
    st.sampled_from([0.0, -0.0, 1.0, 2.0**-110, 2.0**-111, 2.0**-126, 1e-40, 3.4e38, 1e-30, 1e30]),
    st.floats(-1.0, 1.0, width=32),
)


@given(st.lists(NUMBERS, min_size=1, max_size=130), st.booleans())
def test_coding_twice_changes_nothing(values, is_unsigned):
    x = np.array(values, np.float32)
    x = np.abs(x) if is_unsigned else x
    rows = _ext.as_bytes(mx.array(x), is_unsigned)
    form = SQUARES if is_unsigned else "bytes"
    assert np.array_equal(of_mlx(rows), as_rows(x, form))
    numbers = _ext.of_bytes(rows, [x.size], is_unsigned)
    assert np.array_equal(np.array(numbers), of_rows(of_mlx(rows), form)[: x.size], equal_nan=True)
    assert same(_ext.as_bytes(numbers, is_unsigned), rows)
    finite = np.isfinite(x)
    assert np.array_equal(np.isfinite(np.array(numbers)), finite)  # and that of the largest group


@every_rule
def test_unpacked_moments_are_packed_to_the_same_rows(rule):
    one = make(rule, min_8bit_size=0)
    parameters = stepped(one, 3)
    two = make(rule, min_8bit_size=0)
    two.state = one.unpacked_state()
    two.init(parameters)
    assert_same_bits(bits_of(two), bits_of(one))


@pytest.mark.parametrize("sizes", list(itertools.permutations([0, 100, 4097, 2**40], 2)), ids=str)
def test_another_bound_mid_run(sizes):
    """What is in bytes and stays so keeps its rows; the rest is converted."""
    optimizer = make(min_8bit_size=sizes[0])
    parameters = stepped(optimizer, 2)
    before = kept_of(optimizer)
    other = make(min_8bit_size=sizes[1])
    other.state = optimizer.state
    other.init(parameters)
    for (path, slot), value in kept_of(other).items():
        old, form = before[path, slot], form_of(other, slot)
        if old.dtype == value.dtype:
            assert same(old, value), (path, slot)
        elif value.dtype == mx.uint8:
            assert np.array_equal(of_mlx(value), as_rows(np.array(old), form))
        else:
            flat = of_rows(of_mlx(old), form)[: value.size]
            assert np.array_equal(np.array(value).reshape(-1), flat)
    stepped(other, 1, parameters)


@every_rule
@pytest.mark.parametrize("least", [0, 4096])
def test_tensors_that_come_and_go_keep_their_rows(rule, least):
    optimizer = make(rule, min_8bit_size=least)
    parameters = stepped(optimizer, 2)
    before = bits_of(optimizer)
    gradients = tree(9)
    only_w = {"w": gradients["w"]}
    optimizer.apply_gradients(only_w, parameters)  # all others are frozen
    frozen = {key: value for key, value in bits_of(optimizer).items() if key[0] != ("w",)}
    assert_same_bits(frozen, {key: before[key] for key in frozen})
    assert len(frozen) == len(before) * 3 // 4
    optimizer.init(parameters)  # thawed
    thawed = {key: value for key, value in bits_of(optimizer).items() if key[0] != ("w",)}
    assert_same_bits(thawed, frozen)
    before = bits_of(optimizer)
    more = {**parameters, "new": mx.ones(200)}
    optimizer.init(more)
    grown = bits_of(optimizer)
    assert_same_bits({key: grown[key] for key in before}, before)
    assert all((bits == 0).all() for (path, _), (_, bits) in grown.items() if path == ("new",))
    optimizer.keep_only({"w": parameters["w"]})
    assert_same_bits(bits_of(optimizer), {k: v for k, v in before.items() if k[0] == ("w",)})


def test_forgotten_moments():
    optimizer = make("AdamW")
    parameters = stepped(optimizer, 2)
    before = bits_of(optimizer)
    optimizer.forget("largest_v" if "largest_v" in optimizer._rule.slots else "v")
    optimizer.init(parameters)
    after = bits_of(optimizer)
    for key, (_, bits) in after.items():
        assert key in before
        if key[1] != "m" and (bits != before[key][1]).any():
            assert (bits == 0).all(), key
    assert any((bits == 0).all() for key, (_, bits) in after.items() if key[0] == ("w",))
    assert_same_bits(
        {k: v for k, v in after.items() if k[1] == "m"},
        {k: v for k, v in before.items() if k[1] == "m"},
    )
    stepped(optimizer, 1, parameters)


def test_a_slot_that_is_put_in():
    optimizer = make("AdamW", amsgrad=False)
    parameters = stepped(optimizer, 2)
    before = bits_of(optimizer)
    value = tree(5)["w"]
    optimizer.state["w"] = {"m": value}
    optimizer.init(parameters)
    after = bits_of(optimizer)
    assert np.array_equal(after.pop((("w",), "m"))[1], as_rows(np.array(value), "bytes"))
    before.pop((("w",), "m"))
    assert_same_bits(after, before)


def test_views_and_words_of_a_state():
    optimizer = make()
    stepped(optimizer, 1)
    view = optimizer.state["w"]["m"]
    assert view.dtype == mx.float32 and view.shape == (65, 70)
    assert same(view, optimizer.unpacked_state()["w"]["m"])
    lines = optim.describe(optimizer.state).splitlines()
    assert next(line for line in lines if line.startswith("w ")).split()[-3:] == ["8bit"] * 3
    assert next(line for line in lines if line.startswith("b ")).split()[-3:] == ["float32"] * 3
    bytes_of = next(line for line in lines if "tensors" in line).split()[-1]
    # Rows of 64 elements and a scale, and 34 of float32.
    assert int(bytes_of.replace(",", "")) == (72 + 64) * ROW + 4 * 34
    assert "8bit" in repr(optimizer)


@pytest.mark.parametrize(
    "again", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))], ids=["copied", "pickled"]
)
def test_copies_go_on(again):
    one = make(min_8bit_size=100, rounding="stochastic", seed=4)
    parameters = stepped(one, 2)
    two = again(one)
    assert_same_bits(bits_of(two), bits_of(one))
    before = bits_of(two)
    want = stepped(one, 2, parameters)
    assert_same_bits(bits_of(two), before)  # nobody writes into a copy
    assert_same(stepped(two, 2, parameters), want)
    assert_same(two.state, one.state)


# ---- Ways to run ---------------------------------------------------------------------------


@every_rule
def test_functions_are_the_optimizer(rule):
    name = rule.lower()
    init, step = getattr(optim, f"fused_{name}_init"), getattr(optim, f"fused_{name}_step")
    options = {**RULES[rule], "state_dtype": "8bit", "min_8bit_size": 64}
    optimizer = make(rule, min_8bit_size=64)
    parameters = want = tree(0)
    state = init(parameters, **options)
    for i in range(4):
        want = optimizer.apply_gradients(tree(1 + i), want)
        parameters, state = step(parameters, tree(1 + i), state, learning_rate=0.01, **options)
    assert_same(parameters, want)
    assert_same({"arenas": state["arenas"]}, {"arenas": optimizer.state["arenas"]})


@pytest.mark.parametrize("shapeless", [False, True])
@pytest.mark.parametrize("options", [{}, dict(rounding="stochastic", seed=2), dict(clip_norm=0.5)],
                         ids=str)  # fmt: skip
def test_compiled(options, shapeless):
    """With a captured state."""
    want_optimizer, optimizer = make(**options), make(**options)
    want = stepped(want_optimizer, 4)
    parameters = tree(0)
    optimizer.init(parameters)
    state = [parameters, optimizer.state]

    def step(gradients):
        parameters.update(optimizer.apply_gradients(gradients, parameters))

    compiled = mx.compile(step, inputs=state, outputs=state, shapeless=shapeless)
    for i in range(4):
        compiled(tree(1 + i))
        mx.eval(state)
    assert_same(parameters, want)
    assert_same(optimizer.state, want_optimizer.state)


def test_lazy_steps():
    one, two = make(), make()
    want = stepped(one, 5)
    parameters = tree(0)
    for i in range(5):
        parameters = two.apply_gradients(tree(1 + i), parameters)
    assert_same(parameters, want)
    assert_same(two.state, one.state)


def test_a_multi_optimizer():
    def multi():
        return mlx.optimizers.MultiOptimizer(
            [make("AdamW"), make("SGD", min_8bit_size=0)], [lambda path, _: path.endswith("w")]
        )

    one, parameters = multi(), tree(0)
    apart = [make("AdamW"), make("SGD", min_8bit_size=0)]
    want = tree(0)
    for i in range(3):
        gradients = tree(1 + i)
        parameters = one.apply_gradients(gradients, parameters)
        for optimizer, is_first in zip(apart, (True, False), strict=True):
            part = tree_unflatten(
                [(p, g) for p, g in tree_flatten(gradients) if p.endswith("w") == is_first]
            )
            new = optimizer.apply_gradients(part, want)
            merged = {**dict(tree_flatten(want)), **dict(tree_flatten(new))}
            want = tree_unflatten(list(merged.items()))
    assert_same(parameters, want)
    two = multi()
    two.state = one.state
    assert_same(two.apply_gradients(tree(8), want), one.apply_gradients(tree(8), want))


def test_a_grad_scaler_skips_to_the_bit():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.w = tree(0)["w"].astype(mx.float16)

    model, scaler = Model(), optim.GradScaler(4.0)
    optimizer = make(skip_nonfinite=True, master_weights=True)
    plain, want = make(master_weights=True), {"w": model.w}
    for i in range(4):
        gradient = tree(1 + i)["w"].astype(mx.float16)
        is_bad, before = i == 3, bits_of(optimizer)
        if is_bad:
            gradient = mx.where(mx.arange(70) == 3, mx.array(np.nan, mx.float16), gradient)
        scaler.step(optimizer, model, {"w": scaler.scale(gradient)})
        scaler.update()
        mx.eval(model, optimizer.state)
        if not is_bad:
            want = plain.apply_gradients({"w": gradient}, want)
            before = bits_of(plain)
        assert same(model.w, want["w"])
        assert_same_bits(bits_of(optimizer), before)
    assert optimizer.skipped.item() == 1


@pytest.mark.parametrize("at", [random.Random(seed).sample(range(1, 2000), 20) for seed in (1,)])
def test_a_run_that_is_interrupted_twenty_times(at, tmp_path):
    """AdamW with masters of 24 bits and rounding at random: 2000 steps, each way the same bits."""

    def optimizer():
        return optim.AdamW(
            optim.cosine_decay(0.01, 2000),
            weight_decay=0.01,
            state_dtype="8bit",
            min_8bit_size=100,
            master_weights="24bit",
            rounding="stochastic",
            seed=7,
        )

    x = mx.array(np.random.default_rng(0).standard_normal((16, 12)), mx.bfloat16)
    y = mx.sin(x.astype(mx.float32).sum(axis=1, keepdims=True)).astype(mx.bfloat16)

    def loss(w):
        return mx.square(mx.tanh(x @ w["a"] + w["b"]) @ w["c"] - y).mean().astype(mx.float32)

    gradient = mx.grad(loss)
    draw = np.random.default_rng(1).standard_normal
    first = {
        name: mx.array(0.3 * draw(shape), mx.bfloat16)
        for name, shape in {"a": (12, 24), "b": (24,), "c": (24, 1)}.items()
    }

    def run(stops):
        parameters, current = dict(first), optimizer()
        for step in range(2000):
            if step in stops:
                both = {"parameters": parameters, "optimizer": current.state}
                loaded = saved_and_loaded(both, tmp_path / "both.safetensors")
                current = optimizer()
                # In the order of the model, as its own load_weights has them.
                parameters = {name: loaded["parameters"][name] for name in first}
                current.state = loaded["optimizer"]
            parameters = current.apply_gradients(gradient(parameters), parameters)
            mx.eval(parameters, current.state)
        return parameters, current

    parameters, whole = run(())
    assert loss(parameters).item() < 0.2 * loss(first).item()
    again, parts = run(set(at))
    assert_same(again, parameters)
    assert_same(parts.state, whole.state)
    assert sorted({str(d) for d, _ in bits_of(whole).values()}) == [
        "mlx.core.float32", "mlx.core.int8", "mlx.core.uint8",
    ]  # fmt: skip


# ---- Numbers -------------------------------------------------------------------------------


def coded(x, rule, **options):
    """float32 numbers as a step keeps them: SGD's momentum of the first step is the gradient,
    and Adamax's v its magnitude."""
    options = {"state_dtype": "8bit", "min_8bit_size": 0, **RULES[rule], **options}
    optimizer = getattr(optim, rule)(0.0, **options)
    optimizer.apply_gradients({"w": mx.array(x)}, {"w": mx.zeros(x.shape)})
    return np.array(optimizer.unpacked_state()["w"]["v"])


@pytest.mark.parametrize("rule", ["SGD", "Adamax"])
@pytest.mark.parametrize("exponent", [-80, -30, 0, 30, 120])
def test_errors_by_the_place_in_a_group(rule, exponent):
    """Against float64, with the largest at each place. An element of r^2 times its group's
    largest is off by at most half a step of its code, whose square it is; and a number without a
    sign that is not 0 is at least the square of a step."""
    draw = np.random.default_rng(abs(exponent))
    groups = np.arange(8 * GROUP)
    x = np.exp2(draw.uniform(-24, 0, (groups.size, GROUP)))
    x *= draw.choice([-1, 1], x.shape)
    x[groups, groups % GROUP] = 2.0 ** draw.uniform(0, 1, groups.size)  # the largest, anywhere
    x = np.ldexp(x, exponent).astype(np.float32)
    exact = x.astype(np.float64) if rule == "SGD" else np.abs(x.astype(np.float64))
    largest = np.abs(exact).max(axis=1, keepdims=True)
    error = np.abs(coded(x, rule) - exact) / largest
    r = np.sqrt(np.abs(exact) / largest)
    half = 0.5 / (127 if rule == "SGD" else 254)
    bound = (r + half) ** 2 - r**2
    if rule == "Adamax":
        bound = np.where(r < 2 * half, np.maximum(bound, (2 * half) ** 2), bound)
    # A few roundings of float32 before the code, which is up to 254, and behind it.
    bound = bound * (1 + 2.0**-13) + r**2 * 2.0**-21
    assert (error <= bound).all()
    assert (error[r < 1] > 0.98 * bound[r < 1]).any()  # it is no wider than it must be
    assert (error[groups, groups % GROUP] <= 2.0**-22).all()  # the largest is as good as exact


@pytest.mark.parametrize("rule", ["SGD", "Adamax"])
def test_at_random_the_right_mean(rule):
    """The code is one of two neighbours, the upper as often as the fraction says, within five
    standard deviations of the binomial distribution: of many elements and of many seeds."""
    n, top = 2016, 127 if rule == "SGD" else 254
    codes = np.array([0.25, 0.5, 3.125, 17.75, 60.0, 100.5, 126.25])
    x = np.repeat(codes, n).reshape(-1, GROUP - 1)
    x = np.concatenate([np.full((len(x), 1), top), x], axis=1)
    numbers = ((x / top) ** 2).astype(np.float32)
    of_elements = coded(numbers, rule, rounding="stochastic", seed=5)
    of_seeds = np.stack(
        [coded(numbers[::32], rule, rounding="stochastic", seed=s) for s in range(n // 63)]
    )
    for got, of in ((of_elements, x), (of_seeds, np.broadcast_to(x[::32], of_seeds.shape))):
        got = np.sqrt(got) * top
        assert np.isfinite(got).all() and np.abs(got - np.rint(got)).max() < 1e-4
        assert (np.rint(got[of == top]) == top).all()
        for code in codes:
            rounded, low = np.rint(got[of == code]), np.floor(code)
            assert len(rounded) >= n and set(rounded) <= {low, low + 1}
            fraction = code - low
            if rule == "Adamax" and low == 0:
                assert (rounded == 1).all()  # never 0
            elif fraction == 0:
                assert (rounded == low).mean() > 0.99  # a step's fraction is known within 2^-15
            else:
                deviation = np.sqrt(fraction * (1 - fraction) / len(rounded))
                assert abs((rounded - low).mean() - fraction) < 5 * deviation


@pytest.mark.parametrize("rule", ["SGD", "Adamax"])
@pytest.mark.parametrize("sign", [1, -1])
def test_the_largest_stays_the_largest_at_random(rule, sign):
    """Its code may come out a float32 too large; with the largest random number too, it would
    be rounded up to the code of NaN."""
    x = np.random.default_rng(0).uniform(1, 4, 4096).astype(np.float32)
    top = np.float32(127 if rule == "SGD" else 254)
    root = np.sqrt(x)
    above = x[root * (top / root) > top][:4]
    assert len(above) == 4
    values = np.repeat(sign * above, 2**18)
    got = coded(values, rule, rounding="stochastic")
    expected = values if rule == "SGD" else np.abs(values)
    assert np.allclose(got, expected, rtol=1e-6, atol=0)


def test_seeds():
    runs = {seed: make(rounding="stochastic", seed=seed) for seed in (1, 2, 2**63)}
    for optimizer in runs.values():
        stepped(optimizer, 2)
    again = make(rounding="stochastic", seed=2)
    stepped(again, 2)
    assert_same_bits(bits_of(again), bits_of(runs[2]))
    key = (("w",), "m")
    for a, b in itertools.combinations(runs, 2):
        different = bits_of(runs[a])[key][1] != bits_of(runs[b])[key][1]
        assert 0.1 < different.mean() < 0.9


@pytest.mark.parametrize("rounding", ["nearest", "stochastic"])
@pytest.mark.parametrize("beta2", [0.9, 0.999])
def test_no_drift_in_ten_thousand_steps(beta2, rounding):
    """Of a constant gradient, another one of each element: m and v are those of float64 within
    half a step of the code; at random within a whole one, as what lies between two codes goes
    to one of them."""
    n, beta1 = 3 * GROUP, 0.9
    g = np.random.default_rng(3).standard_normal(n).astype(np.float32)
    optimizer = optim.Adam(
        0.0, betas=[beta1, beta2], state_dtype="8bit", min_8bit_size=0, rounding=rounding
    )
    w, gradient = {"w": mx.zeros(n)}, {"w": mx.array(g)}
    for step in range(1, 10_001):
        w = optimizer.apply_gradients(gradient, w)
        mx.eval(w, optimizer.state)
        if step not in (1, 10, 100, 1000, 10_000):
            continue
        kept = optimizer.unpacked_state()["w"]
        for name, beta, x, top in (("m", beta1, g, 127), ("v", beta2, np.square(g), 254)):
            exact = (x.astype(np.float64) * (1 - beta**step)).reshape(-1, GROUP)
            largest = np.abs(exact).max(axis=1, keepdims=True)
            r = np.sqrt(np.abs(exact) / largest)
            part = 1 / top if rounding == "stochastic" else 0.5 / top
            bound = np.maximum((r + part) ** 2 - r**2, np.where(top * r < 1, top**-2.0, 0))
            error = np.abs(np.array(kept[name], np.float64).reshape(-1, GROUP) - exact) / largest
            # And what float32 sums up, forgotten as the moment is: five roundings a step, of
            # which the scale's, a root, counts twice.
            ulps = 6 * min(step, 1 / (1 - beta)) * r**2 * 2.0**-24
            assert (error <= bound * (1 + 2.0**-10) + ulps).all(), (name, step)
            assert (error[r == 1] <= ulps[r == 1]).all(), (name, step)


@pytest.mark.parametrize("rounding", ["nearest", "stochastic"])
def test_second_moments_that_change(rounding):
    """A step of beta2 0.999 moves v by less than half a step of its code, unless v is the
    largest of its group: rounded to nearest, the others follow only their scale. At random they
    follow float32's. (docs/precision.md tells what comes of it.)"""
    draw = np.random.default_rng(0)
    first, then = np.exp(draw.standard_normal((2, 16 * GROUP))).astype(np.float32)
    found = []
    for form in ("8bit", mx.float32):
        optimizer = optim.Adam(0.0, state_dtype=form, min_8bit_size=0, rounding=rounding)
        w = {"w": mx.zeros(first.size)}
        for step in range(8000):
            gradient = {"w": mx.array(first if step < 4000 else then)}
            w = optimizer.apply_gradients(gradient, w)
            mx.eval(w, optimizer.state)
        found.append(np.sqrt(np.array(optimizer.unpacked_state()["w"]["v"])))
    ratio = np.exp(np.abs(np.log(found[0] / found[1])))  # of what a step divides by
    if rounding == "stochastic":
        assert np.median(ratio) < 1.05 and np.quantile(ratio, 0.95) < 1.5 and ratio.max() < 5
    else:
        assert np.median(ratio) > 1.1


@pytest.mark.parametrize("rule", ["SGD", "Lion"])
@pytest.mark.parametrize("together", [False, True])
@pytest.mark.parametrize("rounding", ["nearest", "stochastic"])
def test_tiny_and_huge_gradients_of_one_tensor(rule, together, rounding):
    x = np.full(4 * GROUP, 1e-30, np.float32)
    x[0 if together else slice(0, GROUP)] = 1e30
    optimizer = make(rule, 0.01, min_8bit_size=0, rounding=rounding)
    w = {"w": mx.ones(x.size)}
    for _ in range(20):
        w = optimizer.apply_gradients({"w": mx.array(x)}, w)
        ((kept,),) = [slots.values() for slots in optimizer.unpacked_state().values()
                      if isinstance(slots, dict)]  # fmt: skip
        kept = np.array(kept)
        assert np.isfinite(kept).all() and np.isfinite(np.array(w["w"])).all()
    assert (kept[GROUP:] > 1e-31).all() and (kept[GROUP:] < 2e-29).all()
    assert kept[0] > 1e29
    if together:
        assert (kept[1:GROUP] == 0).all()  # less than a step of its group


def test_groups_of_zeros_and_of_almost_nothing():
    x = np.zeros(6 * GROUP, np.float32)
    x[GROUP] = 2.0**-110  # the least that has a scale
    x[GROUP + 1] = 1e-38  # a subnormal number
    x[2 * GROUP : 3 * GROUP] = np.nextafter(np.float32(2.0**-110), np.float32(0))
    x[3 * GROUP : 4 * GROUP] = 1e-40
    x[4 * GROUP : 5 * GROUP] = -0.0
    for rule in ("SGD", "Adamax"):
        got = coded(x, rule)
        assert (got == np.where(x >= 2.0**-110, x, 0)).all() and not np.signbit(got).any()
        optimizer = make(rule, min_8bit_size=0)
        optimizer.apply_gradients({"w": mx.array(x)}, {"w": mx.zeros(x.size)})
        rows = of_mlx(kept_of(optimizer)[("w",), "momentum" if rule == "SGD" else "v"])
        assert np.array_equal(
            rows, as_rows(x, form_of(optimizer, "momentum" if rule == "SGD" else "v"))
        )


@pytest.mark.parametrize("rule", ["Adam", "AdamW", "Adamax", "RMSprop", "Adagrad", "AdaDelta"])
def test_a_second_moment_that_is_not_zero_stays_so(rule):
    """Also below the smallest float16, and beside the largest: no step divides by 0."""
    magnitudes = np.geomspace(1e-12, 1e12, 8 * GROUP).astype(np.float32)  # their squares too
    x = np.random.default_rng(0).permutation(magnitudes)
    optimizer = make(rule, 1e-3, min_8bit_size=0)
    w = {"w": mx.zeros(x.size)}
    for _ in range(3):
        w = optimizer.apply_gradients({"w": mx.array(x)}, w)
    v = np.array(optimizer.unpacked_state()["w"]["v"])
    assert (v > 0).all() and np.isfinite(v).all()
    assert np.isfinite(np.array(w["w"])).all()
    # In groups of their own they are what they are.
    x = np.repeat(np.float32([1e-12, 1e-8, 1e-4, 1e12]), GROUP)
    found = []
    for form in ("8bit", mx.float32):
        optimizer = make(rule, 1e-3, min_8bit_size=0, state_dtype=form)
        optimizer.apply_gradients({"w": mx.array(x)}, {"w": mx.zeros(x.size)})
        found.append(np.array(optimizer.unpacked_state()["w"]["v"]))
    assert np.allclose(*found, rtol=2.0**-20, atol=0)


@every_rule
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf], ids=str)
def test_what_is_not_finite_spoils_itself(rule, bad):
    """As with float32 moments; all other elements have the bits of a step without it."""
    n, at = 130, [5, 129]
    good = np.random.default_rng(1).standard_normal(n).astype(np.float32)
    good[at] = 0
    spoiled = good.copy()
    spoiled[at] = bad
    others = np.delete(np.arange(n), at)

    def run(gradient, form="8bit"):
        optimizer = make(rule, min_8bit_size=0, state_dtype=form)
        w = {"w": mx.ones(n)}
        for x in (good, gradient, good, good):
            w = optimizer.apply_gradients({"w": mx.array(x)}, w)
        return np.array(w["w"]), kept_of(optimizer), optimizer.unpacked_state()["w"]

    w, rows, _ = run(good)
    w_bad, rows_bad, numbers = run(spoiled)
    w_wide, _, numbers_wide = run(spoiled, mx.float32)
    assert np.array_equal(w[others], w_bad[others])
    assert np.array_equal(np.isfinite(w_bad), np.isfinite(w_wide))
    for key in rows:
        a, b = of_mlx(rows[key]), of_mlx(rows_bad[key])
        assert np.array_equal(a[:, :4], b[:, :4])
        assert np.array_equal(a[:, 4:].reshape(-1)[others], b[:, 4:].reshape(-1)[others])
    for key, wide in numbers_wide.items():
        # An infinity is NaN.
        assert np.array_equal(np.isfinite(numbers[key]), np.isfinite(wide))
        assert not np.isinf(numbers[key]).any()


def coded_by_somebody_else(optimizer):
    """With a scale that is too large for any code, which ours never is: coding anew would show."""
    for entry in optimizer.state["arenas"].values():
        for slot in entry.keys() - {"table"}:
            for number, arena in enumerate(entry[slot]):
                if arena.dtype == mx.uint8:
                    rows = np.array(arena)
                    rows[:, 4:] &= 63
                    entry[slot][number] = mx.array(rows)


@every_rule
def test_a_skipped_step_leaves_every_byte(rule):
    optimizer = make(rule, min_8bit_size=0, skip_nonfinite=True, rounding="stochastic")
    parameters = stepped(optimizer, 2)
    coded_by_somebody_else(optimizer)
    before = bits_of(optimizer)
    gradients = tree(5)
    gradients["b"] = mx.where(mx.arange(33) == 4, mx.inf, gradients["b"])
    after = optimizer.apply_gradients(gradients, parameters)
    assert optimizer.skipped.item() == 1
    assert_same(after, parameters)
    assert_same_bits(bits_of(optimizer), before)


# ---- Memory ------------------------------------------------------------------------------


def address(array):
    return np.asarray(memoryview(array)).__array_interface__["data"][0]


def arenas_of(optimizer):
    """Those in bytes, by name; nobody else may hold them for a step to be in place."""
    return {
        f"{slot}.{number}": arena
        for entry in optimizer.state["arenas"].values()
        for slot, arrays in entry.items()
        if slot != "table"
        for number, arena in enumerate(arrays)
        if arena.dtype == mx.uint8
    }


def addresses_of(optimizer):
    return {name: address(arena) for name, arena in arenas_of(optimizer).items()}


class Run:
    """Steps between which nobody holds anything."""

    def __init__(self):
        self.optimizer, self.parameters = make("AdamW", amsgrad=False), tree(0)
        self.step(2)

    def step(self, times=1):
        for _ in range(times):
            let_go()
            self.parameters = self.optimizer.apply_gradients(tree(3), self.parameters)
            mx.eval(self.parameters, self.optimizer.state)


def test_rows_that_nobody_holds_are_written_in_place():
    run = Run()
    before = addresses_of(run.optimizer)
    assert before.keys() == {"m.0", "v.0"}
    run.step(3)
    assert addresses_of(run.optimizer) == before


HOLDERS = {
    "variable": lambda o: arenas_of(o)["m.0"],
    "slice of rows": lambda o: arenas_of(o)["m.0"][3:5],
    "the scales": lambda o: arenas_of(o)["m.0"][:, :4],
    "the codes": lambda o: arenas_of(o)["m.0"][:, 4:],
    "view of bits": lambda o: arenas_of(o)["m.0"].view(mx.int8),
    "words": lambda o: arenas_of(o)["m.0"].view(mx.float32),
    "memoryview": lambda o: memoryview(arenas_of(o)["m.0"]),
    "numpy": lambda o: np.array(arenas_of(o)["m.0"], copy=False),
    "dlpack": lambda o: np.from_dlpack(arenas_of(o)["m.0"]),
    "unpacked state": lambda o: o.unpacked_state(),
    "a view of the state": lambda o: o.state["w"]["m"],
    "a view of the state, transposed": lambda o: o.state["w"]["m"].T,
    "lazy": lambda o: arenas_of(o)["m.0"] + 1,
    "state": lambda o: {"arenas": o.state["arenas"]},
    "another optimizer": lambda o: copy.copy(o).state["arenas"],
}


def snapshot(holder):
    if isinstance(holder, mx.array):
        return [of_mlx(holder).copy()]
    if isinstance(holder, (np.ndarray, memoryview)):
        return [np.array(holder, copy=True)]
    return [of_mlx(leaf).copy() for _, leaf in tree_flatten(holder)]


@pytest.mark.parametrize("name", HOLDERS)
def test_rows_that_are_held_stay(name):
    held, alone = Run(), Run()
    holder = HOLDERS[name](held.optimizer)
    # Before the step what is lazy would be a holder no longer, so of an equal run.
    before = snapshot(HOLDERS[name](alone.optimizer))
    held.step(2)
    alone.step(2)
    after = snapshot(holder)
    assert all(np.array_equal(a, b) for a, b in zip(after, before, strict=True))
    assert_same(held.parameters, alone.parameters)
    assert_same_bits(bits_of(held.optimizer), bits_of(alone.optimizer))


def test_rows_that_a_tracer_holds_stay():
    options = dict(momentum=0.5, state_dtype="8bit", min_8bit_size=0)
    w, g = {"w": tree(0)["w"]}, {"w": tree(1)["w"]}
    state = optim.fused_sgd_init(w, **options)
    _, state = optim.fused_sgd_step(w, g, state, learning_rate=0.1, **options)
    mx.eval(state)
    before = [of_mlx(a).copy() for _, a in tree_flatten(state["arenas"])]

    def loss(w):
        new, _ = optim.fused_sgd_step(w, g, state, learning_rate=0.1, **options)
        return mx.square(new["w"]).sum()

    value, gradient = mx.value_and_grad(loss)(w)
    mx.eval(value, gradient)
    for a, (_, b) in zip(before, tree_flatten(state["arenas"]), strict=True):
        assert np.array_equal(a, of_mlx(b))
    new, _ = optim.fused_sgd_step(w, g, state, learning_rate=0.1, **options)
    assert mx.allclose(gradient["w"], 2 * new["w"], rtol=1e-6, atol=0)


def test_rows_that_another_stream_reads_stay():
    run, alone = Run(), Run()
    stream = mx.new_stream(mx.cpu)
    (name,) = [n for n in arenas_of(run.optimizer) if n.startswith("m")]
    sums = [
        mx.sum(arenas_of(run.optimizer)[name].astype(mx.int32), stream=stream) for _ in range(3)
    ]
    want = mx.sum(arenas_of(alone.optimizer)[name].astype(mx.int32)).item()
    mx.async_eval(sums)
    run.parameters = run.optimizer.apply_gradients(tree(3), run.parameters)
    mx.async_eval(run.parameters, run.optimizer.state)
    alone.step()
    assert [s.item() for s in sums] == [want] * 3
    assert_same_bits(bits_of(run.optimizer), bits_of(alone.optimizer))


# ---- What does not fit ---------------------------------------------------------------------


def with_arena(change, slot="m"):
    def changed(state):
        ((key, entry),) = state["arenas"].items()
        arrays = [change(a) if a.dtype == mx.uint8 else a for a in entry[slot]]
        return {**state, "arenas": {key: {**entry, slot: arrays}}}

    return changed


BAD = {
    "a row too few": (with_arena(lambda a: a[:-1]), ("m", "(135, 68)", "(136, 68)")),
    "a row too many": (with_arena(lambda a: mx.concatenate([a, a[:1]])), ("m", "(137, 68)")),
    "no rows": (with_arena(lambda a: a[:0]), ("m", "(0, 68)")),
    "67 columns": (with_arena(lambda a: a[:, :67]), ("m", "(136, 67)", "(136, 68)")),
    "64 columns": (with_arena(lambda a: a[:, 4:], "v"), ("v", "(136, 64)", "(136, 68)")),
    "flat": (with_arena(lambda a: a.reshape(-1)), ("m", "(9248,)", "(136, 68)")),
    "int8": (with_arena(lambda a: a.view(mx.int8)), ("m", "int8", "uint8", "(136, 68)")),
    "words": (with_arena(lambda a: a.view(mx.float32)), ("m", "float32", "(136, 17)")),
    "numbers of rows": (with_arena(lambda a: a.astype(mx.float32)), ("m", "float32")),
    "loose rows": (
        lambda s: {**s, "w": {slot: mx.zeros((72, 68), mx.uint8) for slot in "mv"}},
        ("'w.m'", "uint8"),
    ),
    "the name of another bound": (
        lambda s: {**s, "arenas": {k[:-4] + "4097": e for k, e in s["arenas"].items()}},
        ("m", "uint8", "float32"),
    ),
    "a bound that is none": (
        lambda s: {**s, "arenas": {k[:-4] + "x": e for k, e in s["arenas"].items()}}, ("table",),
    ),
    "a bound beyond all": (
        lambda s: {**s, "arenas": {k[:-4] + "9" * 30: e for k, e in s["arenas"].items()}},
        ("table",),
    ),
    "a negative bound": (
        lambda s: {**s, "arenas": {k[:-4] + "-1": e for k, e in s["arenas"].items()}}, ("table",),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
@pytest.mark.parametrize("form", ["8bit", mx.float32], ids=str)
def test_rows_that_do_not_fit(name, form):
    """Named with what they are of, before anything has changed."""
    change, words = BAD[name]
    good = make("AdamW", amsgrad=False)
    parameters = stepped(good, 1)
    before = [(path, of_mlx(a).tobytes()) for path, a in tree_flatten((good.state, parameters))]
    bad = change(good.state)
    optimizer = make("AdamW", amsgrad=False, state_dtype=form)
    optimizer.state = bad
    leaves = dict(tree_flatten(optimizer.state))
    for call in (
        lambda: optimizer.apply_gradients(tree(5), parameters),
        lambda: optimizer.init(parameters),
        lambda: optim.fused_adamw_init(parameters, state=bad, state_dtype=form),
    ):
        with pytest.raises(ValueError, match=r"^\[\w+\] ") as caught:
            call()
        assert all(word in str(caught.value) for word in words), caught.value
        now = dict(tree_flatten(optimizer.state))
        assert now.keys() == leaves.keys() and all(now[k] is leaves[k] for k in now)
    after = [(path, of_mlx(a).tobytes()) for path, a in tree_flatten((good.state, parameters))]
    assert after == before
    assert caught.value  # all three have raised
    optimizer.state = good.state  # which mends it
    stepped(optimizer, 1, parameters)


# ---- Places and sizes ------------------------------------------------------------------------


@every_rule
@every_dtype
@pytest.mark.parametrize("size", [0, *EDGES])
def test_every_size(rule, dtype, size):
    """Alone, and between others: the same rows, with zeros behind the last element."""
    draw = np.random.default_rng(size).standard_normal
    x = mx.array(draw(size), mx.float32).astype(dtype)
    g = [mx.array(draw(size), mx.float32).astype(dtype) for _ in range(3)]
    around = {"a": mx.ones(65, dtype), "z": mx.ones((7, 0), dtype), "zz": mx.ones(1, dtype)}
    alone, among = (make(rule, min_8bit_size=0) for _ in range(2))
    w, all_w = {"m": x}, {"a": around["a"], "m": x, "z": around["z"], "zz": around["zz"]}
    for gradient in g:
        w = alone.apply_gradients({"m": gradient}, w)
        all_w = among.apply_gradients({**all_w, "m": gradient}, all_w)
    assert same(w["m"], all_w["m"])
    got, want = kept_of(among), kept_of(alone)
    for key, rows in want.items():
        assert rows.dtype == mx.uint8 and same(got[key], rows)
        assert rows.shape == (-(-size // GROUP), ROW)
        assert (of_mlx(rows)[:, 4:].reshape(-1)[size:] == 0).all()
    view = alone.unpacked_state()["m"]
    assert all(v.shape == (size,) for v in view.values())
    # Zeros between tensors are saved.
    for arena in arenas_of(among).values():
        bits = of_mlx(arena)
        used = np.zeros(len(bits), bool)
        for offset, length in places_of(among):
            used[offset // GROUP : -(-(offset + length) // GROUP)] = True
        assert (bits[~used] == 0).all()


def places_of(optimizer):
    """Where each tensor begins in the one arena, and its size."""
    ((key, entry),) = optimizer.state["arenas"].items()
    layout = _layout.layout_of_table(key, entry["table"], "test")
    (row,) = layout.arenas
    for tensor, offset in zip(row.tensors, row.offsets, strict=True):
        yield offset, int(np.prod(layout.tensors[tensor][1]))


@pytest.mark.parametrize("size", [65537, 100_003, 300_007])
def test_tensors_that_threads_share(size):
    """No group is coded by two of them, nor by none."""
    draw = np.random.default_rng(size).standard_normal
    tensors = {"a": draw(33), "b": draw(size), "c": draw(40_001), "d": draw(1)}
    optimizer = make("SGD", min_8bit_size=0)
    gradients = {name: mx.array(x, mx.float32) for name, x in tensors.items()}
    for _ in range(3):  # in fresh memory and in place, of a state that is zeros again
        optimizer.forget("momentum")
        optimizer.apply_gradients(gradients, gradients)
        for (path, _), rows in kept_of(optimizer).items():
            want = as_rows(np.array(gradients[path[0]]), "bytes")
            assert np.array_equal(of_mlx(rows), want), path


LAID = {
    "every other row": lambda a: mx.stack([a, a], axis=1).reshape(-1, ROW)[::2],
    "some columns": lambda a: mx.concatenate([a, a], axis=1)[:, ROW:],
    "transposed": lambda a: mx.contiguous(a.T).T,
    "reversed": lambda a: mx.contiguous(a[::-1])[::-1],
    "an odd offset": lambda a: mx.concatenate([mx.zeros(1, mx.uint8), a.reshape(-1)])[1:].reshape(
        -1, ROW
    ),
    "an offset of four": lambda a: mx.concatenate([a[:1], a])[1:],
    "broadcast": lambda a: mx.broadcast_to(mx.contiguous(a[:1]), a.shape),
}


@pytest.mark.parametrize("name", LAID)
@pytest.mark.parametrize("lazy", [False, True])
@pytest.mark.parametrize("rule", ["SGD", "AdamW"])
def test_rows_that_are_laid_out_otherwise(rule, lazy, name):
    one = make(rule)
    parameters = stepped(one, 2)

    def laid(place):
        def of_arenas(value):
            return value if value.dtype != mx.uint8 or value.ndim == 1 else place(value)

        state = tree_unflatten([(k, of_arenas(a)) for k, a in tree_flatten(one.state)])
        if not lazy:
            mx.eval(state)
        optimizer = make(rule)
        optimizer.state = state
        return optimizer

    def plain(a):
        return mx.contiguous(mx.array(of_mlx(LAID[name](a))))

    got, want = laid(LAID[name]), laid(plain)
    before = of_mlx(kept_of(got)[("w",), next(iter(one._rule.slots))])
    assert_same(stepped(got, 3, parameters), stepped(want, 3, parameters))
    assert_same_bits(bits_of(got), bits_of(want))
    assert before.shape == (72, ROW)


def test_groups_that_keep_their_rows():
    """Without a term, what is kept for it is left to the bit, also at random."""
    groups = [(lambda path, _: path == "w", dict(momentum=0.0))]
    first = make("SGD", rounding="stochastic")
    parameters = stepped(first, 2)
    optimizer = make("SGD", rounding="stochastic", groups=groups)
    optimizer.state = first.state
    coded_by_somebody_else(optimizer)
    before = bits_of(optimizer)
    stepped(optimizer, 3, parameters)
    after = bits_of(optimizer)
    for key, (_, bits) in after.items():
        assert np.array_equal(bits, before[key][1]) == (key[0] == ("w",)), key


@every_rule
@pytest.mark.parametrize(
    "options",
    [dict(ema_decay=0.9, master_weights=True), dict(clip_norm=0.1, weight_decay=0.1),
     dict(skip_nonfinite=True, rounding="stochastic", compensated=True), dict(maximize=True)],
    ids=str,
)  # fmt: skip
def test_with_other_options(rule, options):
    """A step computes in float32: the first one is that of float32 moments, in every option."""
    eight, wide = (make(rule, state_dtype=form, **options) for form in ("8bit", mx.float32))
    dtype = mx.bfloat16
    assert_same(stepped(eight, 1, dtype=dtype), stepped(wide, 1, dtype=dtype))
    for (path, name), value in kept_of(eight).items():
        other = kept_of(wide)[path, name]
        if value.dtype != mx.uint8:
            assert same(value, other)
        elif "stochastic" not in options.values():
            assert np.array_equal(of_mlx(value), as_rows(np.array(other), form_of(eight, name)))


@every_rule
@pytest.mark.parametrize("rate", [1e-30, 1e10, 1e30])
def test_learning_rates_at_the_edge(rule, rate):
    """Parameters may overflow, as with float32 moments; what is kept of the gradients stays."""
    optimizer = make(rule, rate)
    stepped(optimizer, 5)
    for path, value in tree_flatten(optimizer.unpacked_state()):
        assert np.isfinite(np.array(value)).all(), path


def test_trust_ratios():
    eight, wide = (
        make("SGD", state_dtype=form, trust_coefficient=0.1, weight_decay=0.01)
        for form in ("8bit", mx.float32)
    )
    assert_same(stepped(eight, 1), stepped(wide, 1))
    stepped(eight, 3)


def test_all_dtypes_in_one_model():
    def mixed(seed):
        return {str(dtype): tree(seed, dtype) for dtype in (mx.float32, mx.float16, mx.bfloat16)}

    one = make("AdamW", rounding="stochastic")
    parameters = mixed(0)
    for i in range(3):
        parameters = one.apply_gradients(mixed(1 + i), parameters)
        mx.eval(parameters, one.state)
    assert all(
        np.isfinite(np.array(a.astype(mx.float32))).all() for _, a in tree_flatten(parameters)
    )
    again = make("AdamW", rounding="stochastic")
    again.state = one.unpacked_state()
    again.init(parameters)
    for (key, a), (other, b) in zip(
        sorted(bits_of(again).items(), key=str), sorted(bits_of(one).items(), key=str), strict=True
    ):
        assert key == other and a[0] == b[0] and np.array_equal(a[1], b[1]), key
