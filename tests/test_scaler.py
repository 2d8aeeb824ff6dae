"""GradScaler beside the rules of torch.amp.GradScaler, written down in Python."""

import math
import random

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers
import mlx_fused_optim as optim
import numpy as np
import pytest
from bits import of_mlx, same
from mlx.utils import tree_flatten, tree_unflatten
from test_bad_input import assert_refused

SETTINGS = [
    {"growth_interval": 3},
    {"init_scale": 2.0**100, "growth_factor": 2.0**10, "growth_interval": 1},
    {"init_scale": 8.0, "growth_factor": 4.0, "backoff_factor": 0.25, "growth_interval": 2},
    {"init_scale": 1.0, "growth_factor": 1.5, "backoff_factor": 0.75, "growth_interval": 4},
]


class Torch:
    """torch.amp.GradScaler, of _amp_update_scale_ in ATen/native/cuda/AmpKernels.cu; its first
    scale is 65536."""

    def __init__(
        self, init_scale=32768.0, growth_factor=2.0, backoff_factor=0.5, growth_interval=2000
    ):
        self.scale, self.tracker = np.float32(init_scale), 0
        self.growth_factor, self.backoff_factor = growth_factor, backoff_factor
        self.growth_interval = growth_interval

    def update(self, found_inf: bool):
        if found_inf:
            self.scale = np.float32(self.scale * self.backoff_factor)
            self.tracker = 0
            return
        self.tracker += 1
        if self.tracker == self.growth_interval:
            with np.errstate(over="ignore"):
                larger = np.float32(np.float64(self.scale) * self.growth_factor)
            if np.isfinite(larger):
                self.scale = larger
            self.tracker = 0


class Weights(nn.Module):
    def __init__(self, dtype=mx.float16):
        super().__init__()
        self.w = mx.arange(1, 8, dtype=mx.float32).astype(dtype)
        self.b = mx.array(0.5, mx.float32)


def make(settings, **options):
    options = {"momentum": 0.9, "skip_nonfinite": True, **options}
    return Weights(), optim.SGD(0.01, **options), optim.GradScaler(**settings)


def events(seed, count=60):
    generator = random.Random(seed)
    return [generator.random() < 0.25 for _ in range(count)]


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_the_scale_follows_torch(settings, compiled):
    model, optimizer, scaler = make(settings)
    twin, alone = Weights(), optim.SGD(0.01, momentum=0.9)
    torch = Torch(**settings)
    optimizer.init(model.trainable_parameters())
    state = [model.state, optimizer.state, scaler.state]
    bad = mx.array([1.0, 2.0, math.inf, 4.0, 5.0, 6.0, 7.0])

    def step(found_inf):
        gradients = {"w": mx.ones(7), "b": mx.array(0.25)}
        gradients["w"] = mx.where(found_inf, bad, gradients["w"])
        gradients = {k: scaler.scale(g) for k, g in gradients.items()}
        scaler.step(optimizer, model, gradients)
        scaler.update()

    if compiled:
        step = mx.compile(step, inputs=state, outputs=state)
    skipped = 0
    for found_inf in events(len(str(settings))):
        step(mx.array(found_inf))
        mx.eval(state)
        torch.update(found_inf)
        assert scaler.state["scale"].item() == torch.scale
        assert scaler.state["growth_tracker"].item() == torch.tracker
        if found_inf:
            skipped += 1
        else:
            alone.update(twin, {"w": mx.ones(7), "b": mx.array(0.25)})
    assert optimizer.skipped.item() == skipped > 5
    assert optimizer.step.item() == alone.step.item() == 60 - skipped
    powers = all(math.log2(v).is_integer() for k, v in settings.items() if k != "growth_interval")
    for (_, a), (_, b) in zip(
        tree_flatten(model.parameters()), tree_flatten(twin.parameters()), strict=True
    ):
        # A scale that is a power of two changes no bit.
        assert same(a, b) if powers else mx.allclose(a, b, rtol=2e-3)


def test_torch_itself():
    """Where torch is installed: the model above is its behaviour."""
    torch = pytest.importorskip("torch")
    for settings in SETTINGS:
        ours = Torch(**{"init_scale": 65536.0, **settings})
        theirs = torch.amp.GradScaler("cpu", **settings)
        parameter = torch.nn.Parameter(torch.ones(3))
        optimizer = torch.optim.SGD([parameter], lr=0.0)
        for found_inf in events(len(str(settings))):
            optimizer.zero_grad()
            theirs.scale((parameter * (math.inf if found_inf else 1.0)).sum()).backward()
            theirs.step(optimizer)
            theirs.update()
            ours.update(found_inf)
            assert theirs.get_scale() == ours.scale
            assert theirs.state_dict()["_growth_tracker"] == ours.tracker


def test_a_training_step_in_float16():
    """Gradients that float16 would lose, and the first scale too large for it."""
    model = Weights()
    optimizer = optim.SGD(2.0**13, skip_nonfinite=True, master_weights=True)
    scaler = optim.GradScaler(init_scale=2.0**40, growth_interval=1000)
    before = of_mlx(model.w)

    def loss_fn(model):
        # d loss / dw = 2^-26, which is 0 in float16.
        return scaler.scale(mx.sum((model.w * mx.array(2.0**-13, mx.float16)) * 2.0**-13))

    unscaled = mx.grad(lambda w: mx.sum(w * mx.array(2.0**-13, mx.float16)) * 2.0**-13)(model.w)
    assert not unscaled.any()
    for _ in range(40):
        _, gradients = nn.value_and_grad(model, loss_fn)(model)
        assert gradients["w"].dtype == mx.float16
        scaler.step(optimizer, model, gradients)
        scaler.update()
    steps = optimizer.step.item()
    assert 1 < steps == 40 - optimizer.skipped.item() < 40
    moved = np.array(optimizer.unpacked_state()["w"]["master"], np.float64)
    np.testing.assert_allclose(moved, np.arange(1, 8) - steps * 2.0**-13, rtol=0, atol=2e-6)
    assert scaler.state["scale"].item() == 2.0 ** (40 - (40 - steps))
    assert not np.array_equal(of_mlx(model.w), before)


def test_clipping_sees_unscaled_gradients():
    model, optimizer, scaler = make({"init_scale": 1024.0}, clip_norm=1.0, momentum=0.0)
    gradients = {"w": mx.full((7,), 3.0), "b": mx.array(4.0)}
    scaler.step(optimizer, model, {k: scaler.scale(g) for k, g in gradients.items()})
    assert optimizer.grad_norm.item() == pytest.approx(math.sqrt(7 * 9 + 16), rel=1e-6)
    other = Weights()
    clipped, _ = mlx.optimizers.clip_grad_norm(gradients, 1.0)
    mlx.optimizers.SGD(0.01).update(other, clipped)
    assert model.b.item() == pytest.approx(other.b.item(), rel=1e-6)


def test_two_optimizers_of_one_scaler():
    """One that is not finite makes the scale smaller, whichever it is; the other steps."""
    for bad in (0, 1):
        models, optimizers = [Weights(), Weights()], [make({})[1] for _ in range(2)]
        scaler = optim.GradScaler(8.0)
        for number, (model, optimizer) in enumerate(zip(models, optimizers, strict=True)):
            value = math.nan if number == bad else 8.0
            scaler.step(optimizer, model, {"w": mx.full((7,), value), "b": mx.array(8.0)})
        scaler.update()
        assert scaler.state["scale"].item() == 4.0
        assert [o.skipped.item() for o in optimizers] == [1 - bad, bad]
        assert models[1 - bad].b.item() == pytest.approx(0.5 - 0.01)
        assert models[bad].b.item() == 0.5


def test_an_update_without_a_step_changes_nothing():
    scaler = optim.GradScaler(8.0, growth_interval=1)
    for _ in range(3):
        scaler.update()
    assert scaler.state["scale"].item() == 8.0
    assert scaler.state["growth_tracker"].item() == 0


def test_an_update_without_a_step_keeps_the_count():
    """Two good steps, and updates between and behind them: the third one grows."""
    model, optimizer, scaler = make({"init_scale": 8.0, "growth_interval": 3})
    gradients = {"w": mx.ones(7), "b": mx.array(1.0)}
    for count in (1, 2, 0):
        scaler.step(optimizer, model, gradients)
        for _ in range(3):
            scaler.update()
            assert scaler.state["growth_tracker"].item() == count
    assert scaler.state["scale"].item() == 16.0


# ---- The floor -----------------------------------------------------------------------------


def sunk(scaler, optimizer, model, times):
    bad = {"w": mx.full((7,), math.nan), "b": mx.array(1.0)}
    for _ in range(times):
        scaler.step(optimizer, model, bad)
        scaler.update()
        mx.eval(scaler.state, optimizer.state)
    return scaler.state["scale"].item()


@pytest.mark.parametrize(
    ("settings", "floor"),
    [
        ({}, 2.0**-24),
        ({"min_scale": 1.0}, 1.0),
        ({"min_scale": 3.0, "init_scale": 3.0}, 3.0),
        ({"init_scale": 2.0**-30}, 2.0**-30),
        ({"min_scale": 2.0**-126}, 2.0**-126),
        ({"backoff_factor": 0.3}, 2.0**-24),
    ],
    ids=str,
)
def test_no_series_of_bad_batches_takes_the_scale_below_its_floor(settings, floor):
    model, optimizer, scaler = make({"growth_interval": 2, **settings}, momentum=0.0)
    assert sunk(scaler, optimizer, model, 220) == floor
    assert optimizer.skipped.item() == 220
    # The first good one trains again, and the scale recovers.
    for _ in range(2):
        gradients = {"w": scaler.scale(mx.ones(7)), "b": scaler.scale(mx.array(0.25))}
        scaler.step(optimizer, model, gradients)
        scaler.update()
    assert optimizer.skipped.item() == 220
    assert model.b.item() == pytest.approx(0.5 - 2 * 0.01 * 0.25, rel=1e-6)
    assert scaler.state["scale"].item() == 2 * floor


@pytest.mark.parametrize("scale", [0.0, -8.0, math.inf, math.nan, 1e-40])
def test_a_state_with_a_scale_that_is_none(scale):
    """Loaded, or made by hand: its step is skipped, and the next one has a scale."""
    model, optimizer, scaler = make({})
    scaler.state = {**scaler.state, "scale": mx.array(np.float32(scale))}
    gradients = {"w": mx.ones(7), "b": mx.array(1.0)}
    scaler.step(optimizer, model, gradients)
    scaler.update()
    assert same(model.w, Weights().w) and same(model.b, Weights().b)
    assert optimizer.skipped.item() == 1
    assert scaler.state["scale"].item() == 2.0**-24
    scaler.step(optimizer, model, gradients)
    assert optimizer.skipped.item() == 1


# ---- A loss in float16 -----------------------------------------------------------------------


def test_the_first_scale_is_one_that_a_float16_loss_can_have():
    """The backward pass of a float16 loss begins with the scale as a float16 number."""

    def gradients(scaler):
        def loss_fn(w):
            return scaler.scale(mx.mean(w))  # of float16

        return mx.grad(loss_fn)(mx.ones(8, mx.float16))

    assert mx.array_equal(gradients(optim.GradScaler()), mx.full(8, 4096.0))
    assert mx.isinf(gradients(optim.GradScaler(65536.0))).all()


# ---- Several optimizers in one ------------------------------------------------------------------


def multi(**options):
    options = {"skip_nonfinite": True, **options}
    parts = [optim.SGD(0.5, momentum=0.9, **options), optim.SGD(0.25, **options)]
    return optim.MultiOptimizer(parts, [lambda path, _: path == "w"]), parts


def test_a_multi_optimizer_steps_as_its_optimizers():
    (optimizer, _), model, twin = multi(), Weights(mx.float32), Weights(mx.float32)
    scaler, alone = optim.GradScaler(8.0), multi()[0]
    gradients = {"w": mx.arange(7.0), "b": mx.array(3.0)}
    for _ in range(3):
        scaler.step(optimizer, model, {k: scaler.scale(g) for k, g in gradients.items()})
        scaler.update()
        alone.update(twin, gradients)
    assert same(model.w, twin.w) and same(model.b, twin.b)
    assert scaler.state["growth_tracker"].item() == 3


@pytest.mark.parametrize("bad", ["w", "b", "both"])
def test_each_of_a_multi_optimizer_skips_by_its_own_gradients(bad):
    (optimizer, parts), model, scaler = multi(), Weights(mx.float32), optim.GradScaler(8.0)
    before = {"w": mx.array(model.w), "b": mx.array(model.b)}
    gradients = {
        "w": mx.full(7, math.nan if bad in ("w", "both") else 8.0),
        "b": mx.array(math.inf if bad in ("b", "both") else 8.0),
    }
    scaler.step(optimizer, model, gradients)
    scaler.update()
    for name, part in zip("wb", parts, strict=True):
        is_bad = bad in (name, "both")
        assert part.skipped.item() == is_bad
        assert same(before[name], model[name]) == is_bad
    assert scaler.state["scale"].item() == 4.0


def test_a_multi_optimizer_of_which_one_has_nothing():
    (optimizer, parts), model, scaler = multi(), Weights(mx.float32), optim.GradScaler(8.0)
    scaler.step(optimizer, model, {"b": mx.array(8.0)})
    scaler.update()
    assert model.b.item() == 0.25
    assert [p.skipped.item() for p in parts] == [0, 0]
    assert scaler.state["growth_tracker"].item() == 1


def test_multi_optimizers_that_cannot():
    model, scaler = Weights(), optim.GradScaler()
    gradients = {"w": mx.ones(7), "b": mx.array(1.0)}
    with_another = optim.MultiOptimizer([optim.SGD(0.1, skip_nonfinite=True), optim.Adafactor(0.1)],
                                     [lambda path, _: path == "w"])  # fmt: skip
    assert_refused(
        lambda: scaler.step(with_another, model, gradients),
        "GradScaler", "Adafactor", "MultiOptimizer", error=TypeError,
    )  # fmt: skip
    assert_refused(
        lambda: scaler.step(multi(skip_nonfinite=False)[0], model, gradients),
        "GradScaler", "skip_nonfinite", "MultiOptimizer",
    )  # fmt: skip
    assert of_mlx(model.w).tobytes() == of_mlx(Weights().w).tobytes()
    assert scaler.state["found_inf"].item() == -1


def test_scale_of_a_tree():
    scaler = optim.GradScaler(4.0)
    one, (two, three) = scaler.scale([mx.array(1.5), (mx.array([2.0]), mx.array(3.0, mx.float16))])
    assert [one.item(), two.item(), three.item()] == [6.0, 8.0, 12.0]
    assert three.dtype == mx.float32
    large = optim.GradScaler(65536.0).scale(mx.array(2.0, mx.float16))
    assert large.item() == 2.0**17  # beyond float16


def test_the_state_is_saved_and_goes_on(tmp_path):
    runs = []
    for interrupted in (False, True):
        model, optimizer, scaler = make({"growth_interval": 4})
        for number, found_inf in enumerate(events(5, 20)):
            if interrupted and number == 9:
                path = str(tmp_path / "state.safetensors")
                tree = [model.parameters(), optimizer.state, scaler.state]
                mx.save_safetensors(path, dict(tree_flatten(tree)))
                model, optimizer, scaler = make({"growth_interval": 4})
                loaded = tree_unflatten(list(mx.load(path).items()))
                model.update(loaded[0])
                optimizer.state, scaler.state = loaded[1:]
            w = mx.full((7,), math.inf if found_inf else 2.0**15 * 0.25)
            scaler.step(optimizer, model, {"w": w, "b": mx.array(1.0)})
            scaler.update()
        runs.append(dict(tree_flatten([model.parameters(), optimizer.state, scaler.state])))
    assert runs[0].keys() == runs[1].keys()
    assert [name for name in runs[0] if not same(runs[0][name], runs[1][name])] == []


def test_a_state_stays_its_owners():
    one, two = optim.GradScaler(8.0), optim.GradScaler()
    two.state = one.state
    model, optimizer, _ = make({})
    two.step(optimizer, model, {"w": mx.full((7,), math.nan), "b": mx.array(1.0)})
    two.update()
    assert (one.state["scale"].item(), two.state["scale"].item()) == (8.0, 4.0)


def test_nothing_waits_for_the_device():
    """Outside of a transform an .item() would pass; inside one it raises."""

    def body(w):
        model, optimizer, scaler = make({"growth_interval": 1})
        model.w = w
        scaler.step(optimizer, model, {"w": w, "b": mx.array(1.0)})
        scaler.update()
        return scaler.state["scale"], optimizer.skipped

    scale, skipped = mx.compile(body)(mx.ones(7, mx.float16))
    assert (scale.item(), skipped.item()) == (2.0**16, 0)


@pytest.mark.parametrize(
    ("arguments", "words", "error"),
    [
        ({"init_scale": 0.0}, ("init_scale", "0.0"), ValueError),
        ({"init_scale": -1.0}, ("init_scale", "-1.0"), ValueError),
        ({"init_scale": math.inf}, ("init_scale", "inf"), ValueError),
        ({"init_scale": math.nan}, ("init_scale", "nan"), ValueError),
        ({"init_scale": "2"}, ("init_scale", "str"), TypeError),
        ({"growth_factor": 1.0}, ("growth_factor", "1.0"), ValueError),
        ({"growth_factor": math.inf}, ("growth_factor", "inf"), ValueError),
        # What float32, in which it multiplies, makes of it:
        ({"growth_factor": 1 + 1e-12}, ("growth_factor", "1.000000000001"), ValueError),
        ({"growth_factor": 1e60}, ("growth_factor", "1e+60"), ValueError),
        ({"backoff_factor": 1 - 1e-12}, ("backoff_factor", "0.999999999999"), ValueError),
        ({"backoff_factor": 1e-60}, ("backoff_factor", "1e-60"), ValueError),
        ({"growth_factor": None}, ("growth_factor", "NoneType"), TypeError),
        ({"backoff_factor": 1.0}, ("backoff_factor", "1.0"), ValueError),
        ({"backoff_factor": 0.0}, ("backoff_factor", "0.0"), ValueError),
        ({"backoff_factor": math.nan}, ("backoff_factor", "nan"), ValueError),
        ({"growth_interval": 0}, ("growth_interval", "0"), ValueError),
        ({"growth_interval": 1.5}, ("growth_interval", "1.5"), ValueError),
        ({"growth_interval": "3"}, ("growth_interval", "str"), TypeError),
        ({"min_scale": 0.0}, ("min_scale", "0.0"), ValueError),
        ({"min_scale": 1e-40}, ("min_scale", "1e-40"), ValueError),
        ({"min_scale": math.nan}, ("min_scale", "nan"), ValueError),
        ({"min_scale": 4.0, "init_scale": 2.0}, ("min_scale", "4.0", "2.0"), ValueError),
        ({"min_scale": "1"}, ("min_scale", "str"), TypeError),
    ],
    ids=str,
)
def test_settings_that_make_no_sense(arguments, words, error):
    assert_refused(lambda: optim.GradScaler(**arguments), "GradScaler", *words, error=error)


def test_optimizers_that_cannot():
    model, optimizer, scaler = make({})
    gradients = {"w": mx.ones(7), "b": mx.array(1.0)}
    for other in (mlx.optimizers.SGD(0.1), mlx.optimizers.Adam(0.1), optim.Adafactor(0.1), None):
        name = type(other).__name__
        assert_refused(
            lambda o=other: scaler.step(o, model, gradients), "GradScaler", name, error=TypeError
        )
    optimizer.skip_nonfinite = False
    assert_refused(lambda: scaler.step(optimizer, model, gradients), "GradScaler", "skip_nonfinite")
    assert of_mlx(model.w).tobytes() == of_mlx(Weights().w).tobytes()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda s: None, ("scale", "nothing")),
        (lambda s: {}, ("scale", "nothing")),
        (lambda s: {**s, "scale": 2.0}, ("scale", "float")),
        (lambda s: {**s, "scale": mx.ones(2)}, ("scale", "(2,)")),
        (lambda s: {**s, "growth_tracker": mx.array(1.0)}, ("growth_tracker", "float32")),
        (lambda s: {k: v for k, v in s.items() if k != "found_inf"}, ("found_inf", "nothing")),
    ],
)
def test_states_that_do_not_fit(change, words):
    scaler = optim.GradScaler()
    before = dict(scaler.state)

    def assign():
        scaler.state = change(before)

    assert_refused(assign, "GradScaler", *words)
    assert scaler.state == before


@pytest.mark.parametrize("loss", ["1", None, [mx.array(1.0), "1"]])
def test_a_loss_that_is_no_array(loss):
    with pytest.raises(TypeError, match=r"^\[GradScaler.scale\] .* got \w+, allowed an array"):
        optim.GradScaler().scale(loss)
