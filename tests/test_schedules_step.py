"""Scheduled hyperparameters in a step: the learning rate, the momentum, the weight decay."""

import mlx.core as mx
import pytest
from ids import spelled
from mlx.utils import tree_flatten, tree_map, tree_unflatten
from mlx_fused_optim import (
    SGD,
    constant,
    cosine_decay,
    cosine_restarts,
    exponential_decay,
    fused_sgd_init,
    fused_sgd_step,
    inverse_sqrt,
    join_schedules,
    linear_schedule,
    multi_step,
    one_cycle,
    polynomial_decay,
    scaled,
    step_decay,
    triangular,
    warmup,
    warmup_stable_decay,
)

# One of each, with something happening in twelve steps.
SCHEDULES = [
    constant(0.1),
    cosine_decay(0.1, 9, 0.01),
    cosine_restarts(0.1, 2, cycle_multiplier=2),
    exponential_decay(0.1, 0.9),
    inverse_sqrt(0.1, 3),
    join_schedules([linear_schedule(0, 0.1, 3), cosine_decay(0.1, 5), constant(0.05)], [3, 8]),
    linear_schedule(0.1, 0.0, 7),
    multi_step(0.1, [3, 6, 9], 0.5),
    one_cycle(10, 0.1),
    polynomial_decay(0.1, 0.01, 1.5, 8, 2),
    scaled(cosine_decay(1.0, 9), 0.1),
    step_decay(0.1, 0.5, 4),
    triangular(0.01, 0.1, 2, 3, decay_rate=0.9),
    warmup(cosine_decay(0.1, 6), 4),
    warmup_stable_decay(0.1, 3, 4, 5, decay_type="1-sqrt"),
]


def in_python(step):
    return 0.1 / (1.0 + step.astype(mx.float32))


def of_int(schedule):
    return lambda t: schedule(mx.array(t, mx.uint64))


def tensors(seed):
    mx.random.seed(seed)
    return {"a": mx.random.normal((7,)), "b": [mx.random.normal((3, 5))]}


def same(a, b):
    return mx.array_equal(a["a"], b["a"]) and mx.array_equal(a["b"][0], b["b"][0])


def expected(rate, momentum, weight_decay, steps, nesterov=False):
    """The step in MLX operations, with each schedule's value as a number.

    Nothing is left out where a value is 0, as nothing is in the kernel: a momentum of 0
    still remembers the gradient.
    """
    w = tensors(0)
    v = tree_map(mx.zeros_like, w)
    for t in range(steps):
        eta, mu, decay = (float(schedule(t)) for schedule in (rate, momentum, weight_decay))
        g = tree_map(lambda g, w, decay=decay: g + decay * w, tensors(t + 1), w)
        v = tree_map(lambda v, g, mu=mu: mu * v + g, v, g)
        used = tree_map(lambda v, g, mu=mu: g + mu * v, v, g) if nesterov else v
        w = tree_map(lambda w, u, eta=eta: w - eta * u, w, used)
        yield w, {"learning_rate": eta, "momentum": mu, "weight_decay": decay}


@pytest.mark.parametrize("schedule", [*SCHEDULES, in_python], ids=spelled)
def test_any_schedule_for_any_hyperparameter(schedule):
    """Bit for bit the composed step with the schedule's values."""
    value = of_int(schedule) if schedule is in_python else schedule
    momentum = scaled(schedule, 9)
    optimizer = SGD(schedule, momentum=momentum, weight_decay=schedule, nesterov=True)
    w = tensors(0)
    for t, (want, now) in enumerate(expected(value, momentum, value, 12, nesterov=True)):
        w = optimizer.apply_gradients(tensors(t + 1), w)
        assert same(w, want), t
        assert optimizer.learning_rate.item() == now["learning_rate"]
        assert optimizer.momentum.item() == optimizer.state["momentum"].item() == now["momentum"]
        assert optimizer.weight_decay.item() == now["weight_decay"]


def test_one_scheduled_beside_numbers():
    rate, momentum, decay = cosine_decay(0.1, 9), linear_schedule(0.5, 0.9, 9), 0.01
    optimizer = SGD(0.1, momentum=momentum, weight_decay=decay)
    w = tensors(0)
    steps = expected(constant(0.1), momentum, constant(decay), 6)
    for t, (want, _) in enumerate(steps):
        w = optimizer.apply_gradients(tensors(t + 1), w)
        assert same(w, want)
    assert optimizer.weight_decay == decay
    assert set(optimizer.state) == {"step", "learning_rate", "momentum", "arenas"}

    optimizer = SGD(rate, momentum=0.5, weight_decay=in_python)
    w = tensors(0)
    steps = expected(rate, constant(0.5), of_int(in_python), 6)
    for t, (want, _) in enumerate(steps):
        w = optimizer.apply_gradients(tensors(t + 1), w)
        assert same(w, want)
    assert set(optimizer.state) == {"step", "learning_rate", "weight_decay", "arenas"}


def test_the_function_too():
    rate, momentum, decay = cosine_decay(0.1, 9), linear_schedule(0.0, 0.9, 9), in_python
    w = tensors(0)
    state = fused_sgd_init(w, momentum=momentum)
    keys = set(state)
    for t, (want, now) in enumerate(expected(rate, momentum, of_int(decay), 12)):
        w, state = fused_sgd_step(
            w, tensors(t + 1), state, learning_rate=rate, momentum=momentum, weight_decay=decay
        )
        assert same(w, want)
        assert state["learning_rate"].item() == now["learning_rate"]
        assert set(state) == keys


def test_momentum_may_pass_through_zero():
    """What is remembered at 0 is the gradient, as anywhere else."""
    momentum = join_schedules([constant(0.0), constant(0.5), constant(0.0)], [2, 4])
    optimizer = SGD(1.0, momentum=momentum)
    w = mx.array([0.0])
    seen = []
    for _ in range(6):
        w = optimizer.apply_gradients({"w": mx.array([-1.0])}, {"w": w})["w"]
        seen.append(w.item())
    assert seen == [1.0, 2.0, 3.5, 5.25, 6.25, 7.25]


@pytest.mark.parametrize("momentum", [linear_schedule(0.0, 0.9, 9), in_python], ids=spelled)
def test_compiled_steps_follow_the_schedule(momentum):
    plain = SGD(cosine_decay(0.1, 9), momentum=momentum, weight_decay=linear_schedule(0, 0.1, 5))
    traced = SGD(cosine_decay(0.1, 9), momentum=momentum, weight_decay=linear_schedule(0, 0.1, 5))
    w, z = tensors(0), tensors(0)
    plain.init(w)
    traced.init(z)

    def step(gradients, z):
        return traced.apply_gradients(gradients, z)

    step = mx.compile(step, inputs=traced.state, outputs=traced.state)
    for t in range(12):
        w = plain.apply_gradients(tensors(t + 1), w)
        z = step(tensors(t + 1), z)
        mx.eval(w, z, plain.state, traced.state)
        assert mx.allclose(w["a"], z["a"], rtol=1e-6, atol=1e-7)
        assert traced.state["step"].item() == t + 1
        assert traced.state["weight_decay"].item() == plain.state["weight_decay"].item()
        assert traced.state["momentum"].item() == pytest.approx(plain.momentum.item(), rel=2e-7)


def test_setting_a_hyperparameter():
    optimizer = SGD(0.1)
    w = {"w": mx.array([1.0])}
    gradients = {"w": mx.array([1.0])}
    w = optimizer.apply_gradients(gradients, w)
    optimizer.momentum = linear_schedule(0.5, 0.0, 4)
    assert optimizer.state["momentum"].item() == 0.375  # at step 1
    w = optimizer.apply_gradients(gradients, w)
    w = optimizer.apply_gradients(gradients, w)
    assert optimizer.momentum.item() == 0.25
    optimizer.momentum = 0.9
    assert optimizer.momentum == 0.9
    assert "momentum" not in optimizer.state
    w = optimizer.apply_gradients(gradients, w)
    v = [1.0, 1.25]  # after steps 1 and 2
    v.append(0.9 * v[-1] + 1.0)
    assert w["w"].item() == pytest.approx(1.0 - 0.1 - 0.1 * sum(v), rel=1e-6)


def test_a_saved_state_goes_on(tmp_path):
    def make():
        return SGD(cosine_decay(0.1, 9), momentum=linear_schedule(0.9, 0.5, 9))

    optimizer, w = make(), tensors(0)
    for t in range(4):
        w = optimizer.apply_gradients(tensors(t + 1), w)
    flat = dict(tree_flatten(optimizer.state))
    mx.save_safetensors(str(tmp_path / "state.safetensors"), flat)
    loaded = make()
    loaded.state = tree_unflatten(list(mx.load(str(tmp_path / "state.safetensors")).items()))
    assert loaded.momentum.item() == optimizer.momentum.item()
    z = w
    for t in range(4, 8):
        w = optimizer.apply_gradients(tensors(t + 1), w)
        z = loaded.apply_gradients(tensors(t + 1), z)
        assert same(w, z)
        assert loaded.momentum.item() == optimizer.momentum.item()


def test_modules_may_be_called_momentum():
    """Their momentum is in arenas; only unpacked there is no place for it."""
    optimizer = SGD(0.1, momentum=linear_schedule(0.5, 0.9, 4))
    w = {"momentum": {"w": mx.ones(2)}, "rest": mx.ones(2)}
    for _ in range(3):
        w = optimizer.apply_gradients(w, w)
    assert optimizer.momentum.item() == pytest.approx(0.7)
    message = r"^\[SGD\] a module has the name of an entry of the state: got .*, allowed"
    with pytest.raises(ValueError, match=message):
        optimizer.unpacked_state()
    optimizer.apply_gradients({"rest": mx.ones(2)}, w)  # frozen, it has arenas of its own
    w = optimizer.apply_gradients(w, w)
    assert optimizer.state["step"].item() == 5

    unscheduled = SGD(0.1, momentum=0.5)
    w = {"momentum": {"w": mx.ones(2)}, "rest": mx.ones(2)}
    unscheduled.apply_gradients(w, w)
    assert unscheduled.unpacked_state()["momentum"]["w"]["v"].tolist() == [1, 1]


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"momentum": lambda step: mx.ones(2)}, ValueError, r"momentum must be a scalar"),
        ({"weight_decay": lambda step: "x"}, TypeError, r"weight_decay must be a scalar"),
        ({"weight_decay": lambda step: -1e39}, ValueError, r"weight_decay is out of range"),
        ({"momentum": "0.9"}, TypeError, r"momentum must be a number"),
        ({"dampening": "0.5", "momentum": 0.9}, TypeError, r"dampening must be a number"),
        (
            {"nesterov": True, "weight_decay": constant(0.5)},
            ValueError,
            r"nesterov requires a momentum",
        ),
    ],
)
def test_errors(options, error, message):
    w = {"w": mx.ones(2)}
    with pytest.raises(error, match=rf"^\[SGD\] {message}.*: got .*, allowed"):
        SGD(0.1, **options)
    if "nesterov" in options:
        return
    state = fused_sgd_init(w, momentum=0.9)
    with pytest.raises(error, match=rf"^\[fused_sgd_step\] {message}.*: got .*, allowed"):
        fused_sgd_step(w, w, state, learning_rate=0.1, **options)
    assert state["step"].item() == 0
