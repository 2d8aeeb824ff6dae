"""Eight-step runs of mlx.optimizers, optax and torch, recorded, against ours: of SGD, and of
each rule where a peer has the same formula."""

import json
from pathlib import Path

import mlx.core as mx
import mlx_fused_optim as optim
import numpy as np
import pytest
from bits import of_mlx, to_mlx, widened
from conformance import Options
from full_references import Bounded
from mlx_fused_optim import reference
from references import step_float64
from rules import RULES, Numbers, corrections, slots_of

DATA = Path(__file__).parent / "data" / "optimizers"
INDEX = json.loads((DATA / "index.json").read_text())
STEPS = INDEX["steps"]
CUTS = INDEX["offsets"][1:-1]
CONFIGURATIONS = {c["id"]: c for c in INDEX["configurations"]}


def load(name: str) -> dict[str, np.ndarray]:
    with np.load(DATA / name) as file:
        return dict(file)


INPUTS, MLX, OPTAX, TORCH = map(load, ("data.npz", "mlx_sgd.npz", "optax_sgd.npz", "torch_sgd.npz"))


class Trace:
    """One recorded run: the options, and the state before and after each step."""

    def __init__(self, name: str, kind: str, arrays: dict[str, np.ndarray]):
        options = CONFIGURATIONS[name]["options"]
        rates = options["lr"]
        self.rates = rates if isinstance(rates, list) else [rates] * STEPS
        self.sign = np.float32(-1 if options["maximize"] else 1)
        self.options = Options(
            options["momentum"], options["weight_decay"], options["dampening"], options["nesterov"]
        )
        self.parameters = arrays[f"{name}.{kind}.p"]
        self.velocities = arrays.get(f"{name}.{kind}.m")

    def gradient(self, step: int) -> np.ndarray:
        return self.sign * INPUTS["g"][step].view(np.float32)


def tree(flat: np.ndarray, dtype: str = "float32") -> dict[str, mx.array]:
    """The three tensors of a flat record."""
    bits = flat if flat.dtype != np.float32 else flat.view(np.uint32)
    return {f"t{i}": to_mlx(part.copy(), dtype) for i, part in enumerate(np.split(bits, CUTS))}


def flat(arrays: dict[str, mx.array]) -> np.ndarray:
    return np.concatenate([of_mlx(a) for a in arrays.values()])


def run(trace: Trace, options: Options, parameters, dtype="float32"):
    """(parameters, velocities) after each step, as bits."""
    optimizer = optim.SGD(lambda step: mx.array(trace.rates, mx.float32)[step], *options)
    for step in range(STEPS):
        parameters = optimizer.apply_gradients({"t": tree(trace.gradient(step))}, {"t": parameters})
        parameters = parameters["t"]
        velocities = optimizer.unpacked_state().get("t")
        yield (
            flat(parameters),
            flat({k: v["v"] for k, v in velocities.items()}) if velocities else None,
        )


def traces(peer: str, *kinds: str, where=lambda options: True):
    cases = [
        (c["id"], k)
        for c in CONFIGURATIONS.values()
        for k in kinds
        if k in c[peer] and where(c["options"])
    ]
    assert cases
    return pytest.mark.parametrize(("name", "kind"), cases, ids=[f"{a}-{b}" for a, b in cases])


@traces("mlx", "f32")
def test_mlx_bit_for_bit(name, kind):
    trace = Trace(name, kind, MLX)
    for step, (p, v) in enumerate(run(trace, trace.options, tree(INPUTS["w0"]))):
        assert np.array_equal(p, trace.parameters[step])
        if v is not None:
            assert np.array_equal(v, trace.velocities[step])


@traces("optax", "sgd.f32", "ema.f32")
def test_optax_bit_for_bit(name, kind):
    """optax.sgd has no dampening; optax.ema is momentum with dampening 1 - (1 - momentum)."""
    trace = Trace(name, kind, OPTAX)
    options = trace.options._replace(dampening=0.0)
    if kind == "ema.f32":
        options = options._replace(dampening=options.momentum)
    for step, (p, v) in enumerate(run(trace, options, tree(INPUTS["w0"]))):
        assert np.array_equal(p, trace.parameters[step])
        if v is not None:
            assert np.array_equal(v, trace.velocities[step])


def one_step(trace: Trace, step: int, options: Options, dtype: str):
    """Our step, and the float64 step with its bound, both from the recorded state."""
    start = INPUTS["w0"] if step == 0 else trace.parameters[step - 1]
    if step == 0 and dtype != "float32":
        raise ValueError("the first parameters are recorded in float32 only")
    gradient = trace.gradient(step)
    optimizer = optim.SGD(trace.rates[step], *options)
    velocity = np.zeros_like(start)
    if options.momentum:
        if step > 0:
            velocity = trace.velocities[step - 1]
        parts = tree(velocity, dtype)
        optimizer.state = {
            "step": mx.array(step, mx.uint64),
            "learning_rate": mx.array(trace.rates[step]),
            "t": {k: {"v": v} for k, v in parts.items()},
        }
    new = optimizer.apply_gradients({"t": tree(gradient)}, {"t": tree(start, dtype)})
    exact = step_float64(
        start, gradient.view(np.uint32), velocity, dtype, "float32",
        np.float32(trace.rates[step]), options,
    )  # fmt: skip
    return flat(new["t"]), exact


@traces("torch", "f32.single", "f32.fused")
def test_torch_within_the_roundings_of_one_step(name, kind):
    """torch contracts to fused multiply-adds: fewer roundings than the bound allows.

    Each step starts from torch's own state. torch's first velocity is the gradient
    itself, undampened; from the second step on the rules are ours.
    """
    trace = Trace(name, kind, TORCH)
    for step in range(STEPS):
        options = trace.options._replace(dampening=0.0) if step == 0 else trace.options
        ours, ((_, bound), _) = one_step(trace, step, options, "float32")
        torch = trace.parameters[step].view(np.float32).astype(np.float64)
        error = np.abs(ours.view(np.float32) - torch)
        # torch also keeps hyperparameters in float64: one more relative 2^-24 of each term.
        assert (error <= 3 * bound).all()
        # A control: the bound is no wider than a few units in the last place of the terms.
        assert bound.max() < 1e-5


# torch does not dampen the first step.
@traces("torch", "f64.single", where=lambda o: not (o["dampening"] and o["momentum"]))
def test_eight_steps_stay_close_to_torch_in_float64(name, kind):
    """The whole run. The error of a step is handed on: dw' <= dw + lr * dv', and so on."""
    trace = Trace(name, kind, TORCH)
    mu, decay = trace.options.momentum, trace.options.weight_decay
    u = 2.0**-24
    w_error, v_error = np.zeros(41), np.zeros(41)
    start = INPUTS["w0"].view(np.float32).astype(np.float64)
    velocity = np.zeros(41)
    for step, (p, _) in enumerate(run(trace, trace.options, tree(INPUTS["w0"]))):
        g = trace.gradient(step) + decay * start
        # Every term: its own rounding, its sum's, and that of its float32 hyperparameter.
        g_error = decay * w_error + 3 * u * (abs(decay * start) + abs(g))
        velocity = mu * velocity + g
        v_error = mu * v_error + g_error + 3 * u * (abs(mu * velocity) + abs(velocity) + abs(g))
        update, error = velocity, v_error
        if trace.options.nesterov:
            update = g + mu * velocity
            error = g_error + mu * v_error + 3 * u * (abs(mu * velocity) + abs(update))
        if not mu:
            update, error = g, g_error
        rate = trace.rates[step]
        exact = trace.parameters[step].view(np.float64)
        w_error = w_error + rate * error + 3 * u * (abs(rate * update) + abs(exact))
        assert (abs(p.view(np.float32).astype(np.float64) - exact) <= w_error).all()
        assert w_error.max() < 1e-4  # the control: a bound, not a blank cheque
        start = exact


@traces("mlx", "f16", "bf16")
def test_half_types_are_no_less_exact_than_mlx(name, kind):
    """MLX rounds after every operation, we once: one step from MLX's own state."""
    dtype = {"f16": "float16", "bf16": "bfloat16"}[kind]
    trace = Trace(name, kind, MLX)
    our_error = their_error = 0.0
    for step in range(1, STEPS):
        # MLX's gradients were rounded to the narrow type.
        ours, ((exact, bound), _) = one_step(trace, step, trace.options, dtype)
        error = np.abs(widened(ours, dtype) - exact)
        assert (error <= bound).all()
        our_error += error.sum()
        their_error += np.abs(widened(trace.parameters[step], dtype) - exact).sum()
    assert our_error <= their_error


# ---- The other rules: float64 runs of torch and optax -----------------------------------

ROWS = {f"{row['peer']} {row['call']}": row for row in INDEX["rules"]}
RECORDED = {peer: load(f"{peer}_rules.npz") for peer in ("torch", "optax")}
USUAL = {"beta1": 0.9, "beta2": 0.999, "alpha": 0.99, "rho": 0.9, "eps": 1e-8}
USUAL_OF = {"AdaDelta": {"eps": 1e-6}, "Lion": {"beta2": 0.99}, "AdamW": {"weight_decay": 0.01}}


def single(x: float) -> Bounded:
    """A number that float32 holds to half an ulp."""
    return Bounded(x, abs(x) * 2.0**-24)


def by_the_rule(row):
    """(parameters, slots) after each step: in float64, and how far float32 may be from it after
    all the steps so far."""
    arguments = {"weight_decay": 0.0} | USUAL | USUAL_OF.get(row["class"], {}) | row["arguments"]
    arguments |= dict(zip(("beta1", "beta2"), arguments.get("betas", ()), strict=False))
    flags = {name for name in ("bias_correction", "amsgrad") if arguments.get(name)}
    rule, decay = RULES[row["rule"]], arguments["weight_decay"]
    scalars = {name: arguments[name] for name in rule.scalars}
    rest = {name: single(1 - x) for name, x in scalars.items()}
    w = Bounded(INPUTS["w0"].view(np.float32))
    slots = {name: Bounded(np.zeros(41)) for name in slots_of(row["rule"], flags)}
    for step in range(STEPS):
        rate = row["lr"][step] if isinstance(row["lr"], list) else row["lr"]
        g = Bounded((-1 if arguments.get("maximize") else 1) * INPUTS["g"][step].view(np.float32))
        decoupled = row["class"] in ("AdamW", "Lion")
        if decay and not decoupled:
            g = g + single(decay) * w
        rates = [Bounded(1.0)] * 2
        if flags:
            betas = [scalars["beta1"], scalars["beta2"]]
            # To an ulp, of a rate that is rounded itself.
            rates = [Bounded(x, x * 2.0**-22) for x in corrections(rate, betas, step + 1)]
        named = {name: single(x) for name, x in scalars.items()}
        change, slots = rule.change(g, slots, Numbers(single(rate), named, rest, *rates, flags))
        if decay and decoupled:
            w = w * (Bounded(1.0) - single(rate) * single(decay))
        w = w - change
        yield w, slots


def by_the_optimizer(row, rates):
    """(parameters, what is kept of each tensor) after each step."""
    optimizer = getattr(optim, row["class"])(
        lambda step: mx.array(rates, mx.float32)[step], **row["arguments"]
    )
    parameters = tree(INPUTS["w0"])
    for gradient in INPUTS["g"][:STEPS]:
        gradients = tree(gradient.view(np.float32))
        parameters = optimizer.apply_gradients({"t": gradients}, {"t": parameters})["t"]
        yield parameters, optimizer.unpacked_state()["t"]


def by_mlx_operations(row, rates):
    """Likewise, by the package's own reference."""
    usual = {"AdamW": {"weight_decay": 0.01}}.get(row["class"], {})
    arguments = usual | row["arguments"] | {"decoupled": row["class"] in ("AdamW", "Lion")}
    parameters = tree(INPUTS["w0"])
    state = reference.init(parameters)
    for rate, gradient in zip(rates, INPUTS["g"], strict=False):
        gradients = tree(gradient.view(np.float32))
        rule = getattr(reference, row["rule"])
        parameters, state = reference.step(
            rule, parameters, gradients, state, learning_rate=rate, **arguments
        )
        yield parameters, dict(zip(parameters, state["tensors"], strict=True))


@pytest.mark.parametrize("by", [by_the_optimizer, by_mlx_operations], ids=["kernel", "reference"])
@pytest.mark.parametrize("name", ROWS)
def test_every_rule_stays_close_to_its_peers(name, by):
    row = ROWS[name]
    recorded = RECORDED[row["peer"]]
    rates = row["lr"] if isinstance(row["lr"], list) else [row["lr"]] * STEPS
    runs = zip(by(row, rates), by_the_rule(row), strict=True)
    for step, ((parameters, kept), (w, slots)) in enumerate(runs):
        ours = {"p": flat(parameters)}
        ours |= {k: flat({t: of[k] for t, of in kept.items()}) for k in slots}
        for key, want in {"p": w, **slots}.items():
            peer = recorded.get(f"{row['id']}.{key}")
            if peer is None:  # a peer need not show all that it keeps
                assert key != "p"
                continue
            exact = peer[step].view(np.float64)
            # The rule of these tests is the peer's ...
            assert np.allclose(want.value, exact, rtol=1e-12, atol=1e-13), key
            # ... and ours is as close as float32 allows.
            error = np.abs(ours[key].view(np.float32).astype(np.float64) - exact)
            assert (error <= want.error + 1e-12).all(), (key, step)
            # A control: a bound, not a blank cheque.
            assert (want.error <= 1e-4 * np.maximum(1, np.abs(exact))).all(), (key, step)
