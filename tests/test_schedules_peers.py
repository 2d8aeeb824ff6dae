"""The table of peers: schedules of MLX, optax, torch and transformers, as they ran.

Each record in data/schedules is one call of a peer: its arguments, the values that it gave
(``values``), and its documented formula evaluated to 60 digits (``exact``). Here each call
is written with our schedules, and must have those values to 2 ulp of float32. Where we
depart from a peer on purpose, the reason is in ``DEPARTURES``, and docs/schedules.md says it
too; a departure that is not one fails.
"""

import json
import math
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from mlx_fused_optim import (
    Schedule,
    constant,
    cosine_decay,
    cosine_restarts,
    exponential_decay,
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

HERE = Path(__file__).parent
RECORDS = [
    record
    for path in sorted((HERE / "data/schedules").glob("*.json"))
    for record in json.loads(path.read_text())["records"]
]

# ---- A peer's call, written with our schedules ---------------------------------


def warm(schedule: Schedule, steps: int, start: float = 0.0) -> Schedule:
    """Peers' warm-ups may have no step; ours says so."""
    return warmup(schedule, steps, start) if steps > 0 else schedule


def joined(schedules, boundaries):
    return join_schedules(schedules, boundaries) if boundaries else schedules[0]


class Mlx:
    exponential_decay = staticmethod(exponential_decay)
    step_decay = staticmethod(step_decay)
    cosine_decay = staticmethod(cosine_decay)
    linear_schedule = staticmethod(linear_schedule)
    constant = staticmethod(constant)

    def join_schedules(schedules, boundaries):
        members = [getattr(Mlx, member["fn"])(**member["args"]) for member in schedules]
        return join_schedules(members, boundaries)


class Optax:
    def constant_schedule(value):
        return constant(value)

    def warmup_constant_schedule(init_value, peak_value, warmup_steps):
        return warmup(constant(peak_value), warmup_steps, init_value)

    def exponential_decay(init_value, transition_steps, decay_rate, end_value=None, **keywords):
        return exponential_decay(
            init_value, decay_rate, transition_steps=transition_steps, end=end_value, **keywords
        )

    def warmup_exponential_decay_schedule(init_value, peak_value, warmup_steps, **keywords):
        decay = Optax.exponential_decay(peak_value, **keywords)
        return warm(decay, warmup_steps, init_value)

    def linear_schedule(init_value, end_value, transition_steps, transition_begin=0):
        if transition_begin:
            return polynomial_decay(init_value, end_value, 1, transition_steps, transition_begin)
        return linear_schedule(init_value, end_value, transition_steps)

    polynomial_schedule = staticmethod(polynomial_decay)

    def cosine_decay_schedule(init_value, decay_steps, alpha=0.0, exponent=1.0):
        return cosine_decay(init_value, decay_steps, alpha * init_value, exponent=exponent)

    def warmup_cosine_decay_schedule(
        init_value, peak_value, warmup_steps, decay_steps, end_value, exponent
    ):
        decay = cosine_decay(peak_value, decay_steps - warmup_steps, end_value, exponent=exponent)
        return warm(decay, warmup_steps, init_value)

    def sgdr_schedule(cosine_kwargs):
        cycles = [Optax.warmup_cosine_decay_schedule(**keywords) for keywords in cosine_kwargs]
        lengths = [keywords["decay_steps"] for keywords in cosine_kwargs]
        return join_schedules(cycles, [int(b) for b in np.cumsum(lengths[:-1])])

    def piecewise_constant_schedule(init_value, boundaries_and_scales):
        if not boundaries_and_scales:
            return constant(init_value)
        boundaries, scales = zip(*boundaries_and_scales, strict=True)
        return multi_step(init_value, boundaries, scales)

    def piecewise_interpolate_schedule(interpolate_type, init_value, boundaries_and_scales):
        make = {"linear": linear_schedule, "cosine": lambda a, b, n: cosine_decay(a, n, b)}
        parts, begin, value = [], 0, init_value
        for boundary, scale in boundaries_and_scales:
            parts.append(make[interpolate_type](value, value * scale, boundary - begin))
            begin, value = boundary, value * scale
        return join_schedules(parts, [boundary for boundary, _ in boundaries_and_scales[:-1]])

    cosine_onecycle_schedule = staticmethod(one_cycle)

    def linear_onecycle_schedule(**keywords):
        return one_cycle(**keywords, anneal="linear")

    def join_schedules(schedules, boundaries):
        members = [getattr(Optax, member["fn"])(**member["args"]) for member in schedules]
        return join_schedules(members, boundaries)


class Torch:
    def ConstantLR(lr, factor, total_iters):
        return join_schedules([constant(lr * factor), constant(lr)], [total_iters])

    def LinearLR(lr, start_factor, end_factor, total_iters):
        return scaled(linear_schedule(start_factor, end_factor, total_iters), lr)

    def ExponentialLR(lr, gamma):
        return exponential_decay(lr, gamma)

    def StepLR(lr, step_size, gamma):
        return step_decay(lr, gamma, step_size)

    def MultiStepLR(lr, milestones, gamma):
        return multi_step(lr, milestones, gamma)

    def PolynomialLR(lr, total_iters, power):
        return polynomial_decay(lr, 0, power, total_iters)

    def CosineAnnealingLR(lr, T_max, eta_min=0.0):
        return cosine_decay(lr, T_max, eta_min)

    def CosineAnnealingWarmRestarts(lr, T_0, T_mult=1, eta_min=0.0):
        return cosine_restarts(lr, T_0, eta_min, cycle_multiplier=T_mult)

    def OneCycleLR(
        max_lr, total_steps, pct_start, anneal_strategy, div_factor, final_div_factor, three_phase
    ):
        last = total_steps - 1
        return one_cycle(
            last,
            max_lr,
            (pct_start * total_steps - 1) / last,
            (2 * pct_start * total_steps - 2) / last if three_phase else None,
            div_factor,
            final_div_factor,
            anneal={"cos": "cosine", "linear": "linear"}[anneal_strategy],
        )

    def CyclicLR(base_lr, max_lr, step_size_up, step_size_down, mode, gamma):
        decay = {
            "triangular": {},
            "triangular2": {"decay_rate": 0.5},
            "exp_range": {"decay_rate": gamma, "decay_every": "step"},
        }
        return triangular(base_lr, max_lr, step_size_up, step_size_down, **decay[mode])

    def SequentialLR(lr, schedulers, milestones):
        members = [getattr(Torch, member["fn"])(lr, **member["args"]) for member in schedulers]
        return join_schedules(members, milestones)


class Transformers:
    def get_constant_schedule(lr):
        return constant(lr)

    def get_constant_schedule_with_warmup(lr, num_warmup_steps):
        return warm(constant(lr), num_warmup_steps)

    def get_linear_schedule_with_warmup(lr, num_warmup_steps, num_training_steps):
        steps = num_training_steps - num_warmup_steps
        if steps <= 0:  # a rise, and then nothing is left
            rise = linear_schedule(0, lr, num_warmup_steps)
            return join_schedules([rise, constant(0)], [num_warmup_steps])
        return warm(linear_schedule(lr, 0, steps), num_warmup_steps)

    def get_polynomial_decay_schedule_with_warmup(
        lr, num_warmup_steps, num_training_steps, lr_end, power
    ):
        steps = num_training_steps - num_warmup_steps
        return warm(polynomial_decay(lr, lr_end, power, steps), num_warmup_steps)

    def get_cosine_schedule_with_warmup(
        lr, num_warmup_steps, num_training_steps, num_cycles=0.5, min_lr=None, min_lr_rate=None
    ):
        end = min_lr if min_lr is not None else lr * (min_lr_rate or 0.0)
        steps = num_training_steps - num_warmup_steps
        if num_cycles == 1.0:  # down and up again
            half = steps // 2
            wave = join_schedules(
                [cosine_decay(lr, half, end), cosine_decay(end, half, lr)], [half]
            )
        elif num_cycles == 0.25:  # half the way down
            wave = cosine_decay(lr, 2 * steps, end)
        else:
            wave = cosine_decay(lr, steps, end)
        return warm(wave, num_warmup_steps)

    get_cosine_with_min_lr_schedule_with_warmup = get_cosine_schedule_with_warmup

    def get_cosine_with_min_lr_schedule_with_warmup_lr_rate(
        lr, num_warmup_steps, num_training_steps, num_cycles, min_lr, min_lr_rate, warmup_lr_rate
    ):
        end = min_lr if min_lr is not None else lr * min_lr_rate
        wave = cosine_decay(lr, num_training_steps - num_warmup_steps, end)
        start = lr * (warmup_lr_rate or 1 / max(num_warmup_steps, 1))
        return warmup(wave, num_warmup_steps - 1, start)

    def get_cosine_with_hard_restarts_schedule_with_warmup(
        lr, num_warmup_steps, num_training_steps, num_cycles
    ):
        steps = num_training_steps - num_warmup_steps
        waves = cosine_restarts(lr, steps / num_cycles)
        return warm(join_schedules([waves, constant(0)], [steps]), num_warmup_steps)

    def get_inverse_sqrt_schedule(lr, num_warmup_steps, timescale):
        return inverse_sqrt(lr, num_warmup_steps, timescale)

    def get_wsd_schedule(
        lr,
        num_warmup_steps,
        num_decay_steps,
        num_training_steps,
        num_stable_steps,
        warmup_type,
        decay_type,
        min_lr_ratio,
        num_cycles,
    ):
        if num_stable_steps is None:
            num_stable_steps = num_training_steps - num_warmup_steps - num_decay_steps
        return warmup_stable_decay(
            lr,
            num_warmup_steps,
            num_stable_steps,
            num_decay_steps,
            init_value=lr * min_lr_ratio,
            end_value=lr * min_lr_ratio,
            warmup_type=warmup_type,
            decay_type=decay_type,
        )


PEERS = {"mlx": Mlx, "optax": Optax, "torch": Torch, "transformers": Transformers}


def ours(record) -> Schedule:
    return getattr(PEERS[record["peer"]], record["name"])(**record["arguments"])


# ---- Where we depart --------------------------------------------------------------

RAISES = -1

# Reason: {record: the first step that differs, or RAISES where the call is refused here}.
DEPARTURES = {
    "A cosine stays at its end; torch's and transformers' rise again.": {
        "cosine-s11": 1001,
        "cosine-s12": 11,
        "cosine-s13": 2,
        "cosine-s14": 8,
        "cosine-s15": 100001,
        "cosine-s16": 1001,
        "cosine-s17": 101,
        "cosine-s18": 101,
        "join-s12": 101,
        "warmup_cosine-s05": 1001,
        "warmup_cosine-s06": 101,
        "warmup_cosine-s07": 10001,
        "warmup_cosine-s09": 101,
        "warmup_cosine-s10": 1001,
        "warmup_cosine-s11": 51,
        "warmup_cosine-s12": 100,
        "warmup_cosine-s13": 1000,
    },
    "One cycle stays at its end; torch's goes on for a step, below zero when linear.": {
        "onecycle-s09": 100,
        "onecycle-s10": 100,
        "onecycle-s11": 100,
        "onecycle-s12": 100,
        "onecycle-s14": 1000,
        "onecycle-s16": 100,
        "onecycle-s18": 100000,
    },
    "The peak of one cycle is on a whole step; torch's may lie between two, or before the first.": {
        "onecycle-s13": 1,
        "onecycle-s15": RAISES,
    },
    "A one-cycle peak at 29 % of 100 steps is at step 29; optax rounds 0.29 * 100 down to 28.": {
        "onecycle-s03": 1,
    },
    "A phase of one cycle without a step is an error; optax leaves the phase out.": {
        "onecycle-s07": RAISES,
        "onecycle-s08": RAISES,
    },
    "A length of zero is an error; peers skip the part, stay at its start for ever, or divide "
    "by zero.": {
        "constant_warmup-s06": RAISES,
        "exponential_decay-s15": RAISES,
        "linear-s11": RAISES,
        "polynomial-s15": RAISES,
        "warmup_cosine-s08": RAISES,
        "wsd-s07": RAISES,
    },
    "A warm-up without a step is none; optax stays at its start for ever.": {
        "constant_warmup-s02": 0,
    },
    "A negative begin is an error; optax takes it for 0.": {
        "exponential_decay-s19": RAISES,
        "polynomial-s06": RAISES,
    },
    "A decay rate of zero is an error; optax takes it for a constant.": {
        "exponential_decay-s16": RAISES,
    },
    "A power that is not positive is an error; optax never reaches the end with 0, and is "
    "infinite there with less.": {
        "polynomial-s05": RAISES,
        "polynomial-s07": RAISES,
    },
    "A boundary of zero, or one given twice, is an error; peers leave a part unseen, or "
    "multiply twice.": {
        "join-s09": RAISES,
        "join-s18": RAISES,
        "step_decay-s07": RAISES,
        "step_decay-s12": RAISES,
        "step_decay-s14": RAISES,
    },
    "Cycles are whole steps; transformers' hard restarts may have parts of one.": {
        "cosine_restarts-s14": RAISES,
    },
    "The fall of warmup_stable_decay is half a wave; transformers' may have more "
    "(num_cycles), which join_schedules writes.": {
        "wsd-s08": 61,
        "wsd-s10": 61,
    },
    "A cosine starts at its first step; transformers' warmup_lr_rate variant with at most one "
    "step of warm-up starts one step in.": {
        "warmup_cosine-s14": RAISES,
        "warmup_cosine-s15": 0,
    },
}


# ---- The test -------------------------------------------------------------------


def ulp(value: float) -> float:
    """The distance of float32 numbers around a value."""
    if value == 0:
        return 2.0**-149
    return 2.0 ** max(math.frexp(value)[1] - 24, -149)


def differing_steps(record, schedule) -> list[int]:
    """The steps at which we are more than 2 ulp off the peer's formula, and, for a peer
    that computes in float64 and keeps to its formula, off its own value."""
    faithful = record["dtype"] == "float64" and record["max_difference"] < 1e-12
    steps = mx.array([step for step, _ in record["exact"]], mx.uint64)
    differing = []
    theirs = dict(record["values"]) if faithful else {}
    for value, (step, exact) in zip(schedule(steps).tolist(), record["exact"], strict=True):
        for other in (float(exact), float(theirs.get(step, exact))):
            if value == other or (abs(other) > 3.4e38 and math.isinf(value)):
                continue
            if not abs(value - other) <= 2 * ulp(other):
                differing.append(step)
                break
    return differing


EXPECTED = {
    name: (first, reason) for reason, names in DEPARTURES.items() for name, first in names.items()
}


def test_the_table_is_whole():
    assert len(RECORDS) == 208
    assert len({record["id"] for record in RECORDS}) == 208
    assert {record["id"] for record in RECORDS} >= EXPECTED.keys()


@pytest.mark.parametrize("record", RECORDS, ids=[record["id"] for record in RECORDS])
def test_a_record_of_a_peer(record):
    first, reason = EXPECTED.get(record["id"], (None, None))
    if first == RAISES:
        with pytest.raises(ValueError, match=r"^\["):
            ours(record)
        return
    assert record["exact"] or record["errors"], "nothing to compare with"
    differing = differing_steps(record, ours(record))
    if first is None:
        assert differing == []
    else:
        assert differing, f"no departure: {reason}"
        assert min(differing) >= first, reason


def test_a_wrong_formula_is_noticed():
    """A control: the table tells schedules from their near relations."""
    record = next(record for record in RECORDS if record["id"] == "cosine-s00")
    init, steps = record["arguments"]["init"], record["arguments"]["decay_steps"]
    assert differing_steps(record, cosine_decay(init, steps)) == []
    assert differing_steps(record, cosine_decay(init, steps + 1))
    assert differing_steps(record, cosine_decay(init * (1 + 2**-20), steps))


@pytest.mark.parametrize("reason", DEPARTURES)
def test_docs_list_the_departure(reason):
    text = (HERE.parent / "docs/schedules.md").read_text()
    assert reason in " ".join(text.split())
