"""Memory of a full step: every slot is updated in place when nobody holds it, and what
somebody holds never changes.

Not here: parameters of a step with trust ratios. Their norms are measured first, and MLX
holds what that reads until it is done; the step may come sooner, and then takes fresh
memory."""

from dataclasses import replace

import mlx.core as mx
import numpy as np
import pytest
from bits import DTYPES, of_mlx
from full_step import FRAME_SLOTS, Full, State, first_state, full_step
from waiting import let_go

SIZES = (700, 33, 1)
OPTIONS = {
    "masters": Full(
        momentum=0.9, state_dtype="float32", master_weights=True, ema_decay=0.9, clip_norm=1.0,
        skip_nonfinite=True,
    ),
    "compensated": Full(momentum=0.9, compensated=True, stochastic=True, ema_decay=0.9),
    "adam": Full("adam", bias_correction=True, amsgrad=True, compensated=True),
    "bytes": Full("adam", state_dtype="8bit", master_weights="24bit", skip_nonfinite=True),
    "adadelta": Full("adadelta", state_dtype="float32", master_weights=True, clip_norm=1.0),
}  # fmt: skip
every_option = pytest.mark.parametrize("name", OPTIONS)


def address(array: mx.array) -> int:
    # NumPy has no bfloat16, and a view of other bits is the same memory.
    return np.asarray(memoryview(array.view(mx.uint8))).__array_interface__["data"][0]


class Run:
    """Parameters that are views of an arena, and slots that may be written in place."""

    def __init__(self, name: str):
        self.options = OPTIONS[name]
        random = np.random.default_rng(1)
        self.parameters = [
            mx.array(random.standard_normal(n).astype(np.float32)).astype(mx.bfloat16)
            for n in SIZES
        ]
        mx.eval(self.parameters)
        self.state: State = first_state(self.options, self.parameters)
        self.step()

    def step(self, bad: bool = False) -> None:
        let_go()  # of the step before, and of the views whose addresses were asked for
        gradients = [mx.full(n, np.nan if bad else 0.3) for n in SIZES]
        # No local variable, here or in a caller, may hold the old arrays.
        self.parameters, self.state = full_step(
            self.options, self.parameters, gradients, self.state, 0.1
        )
        mx.eval(self.parameters, [x for x in self.state if x is not None])

    def arrays(self) -> dict[str, mx.array]:
        pairs = zip(self.options.places, self.state.slots, strict=True)
        return {"parameter": self.parameters[0]} | {name: slot[0] for name, slot in pairs if slot}

    def addresses(self) -> dict[str, int]:
        return {name: address(array) for name, array in self.arrays().items()}

    def bits(self) -> dict[str, np.ndarray]:
        rest = {f"parameter {i}": of_mlx(p) for i, p in enumerate(self.parameters)}
        return {name: of_mlx(array) for name, array in self.arrays().items()} | rest


def assert_same_bits(a: Run, b: Run) -> None:
    left, right = a.bits(), b.bits()
    assert left.keys() == right.keys()
    for name in left:
        assert np.array_equal(left[name], right[name]), name


@every_option
def test_in_place_when_nobody_holds(name):
    run = Run(name)
    before = run.addresses()
    assert len(before) == 1 + sum(map(len, run.state.slots))  # the parameters and the slots
    assert len(before) >= 4
    run.step()
    run.step()
    assert run.addresses() == before


@every_option
@pytest.mark.parametrize(
    "held", ["parameter", "velocity", "m", "v", "largest_v", "u", *FRAME_SLOTS]
)
def test_what_is_held_stays(name, held):
    """And only that: all else is still in place. The results are those without a holder."""
    run, alone = Run(name), Run(name)
    kept = run.arrays().get(held)
    if kept is None:
        pytest.skip("this step has no such slot")
    bits, before = of_mlx(kept), run.addresses()
    run.step()
    after = run.addresses()
    assert {k for k in after if after[k] != before[k]} == {held}
    assert np.array_equal(of_mlx(kept), bits)
    alone.step()
    assert_same_bits(run, alone)


def test_slots_with_trust_ratios(monkeypatch):
    """Are in place in any case, and the numbers do not depend on where they are."""
    trust = replace(OPTIONS["masters"], trust_coefficient=0.1)
    monkeypatch.setitem(OPTIONS, "trust", trust)
    run, alone = Run("trust"), Run("trust")
    before = run.addresses()
    kept = list(run.parameters)
    for _ in range(3):
        run.step()
        alone.step()
    after = run.addresses()
    assert {k for k in after if after[k] != before[k]} <= {"parameter"}
    assert_same_bits(run, alone)
    del kept


@pytest.mark.parametrize("hold", [False, True])
def test_a_skipped_step_in_place_and_in_fresh_memory(hold):
    run = Run("masters")
    bits = run.bits()
    kept = (list(run.parameters), run.state) if hold else None
    run.step(bad=True)
    assert run.state.skipped.item() == 1
    assert run.state.step.item() == 1
    after = run.bits()
    for name, before in bits.items():
        assert np.array_equal(before, after[name]), name
    del kept


def test_one_array_as_two_slots():
    """As zeros that were made once would be: neither is written into the other."""
    options = OPTIONS["masters"]
    parameters = [mx.ones(SIZES[0], DTYPES["bfloat16"])]
    state = first_state(options, parameters)
    one = state.slots[3][0]  # the master; float32, as the velocity and the average are
    shared = state._replace(slots=[[one] if slot else [] for slot in state.slots])
    apart = state._replace(slots=[[one + 0] if slot else [] for slot in state.slots])
    mx.eval(apart.slots)
    del one, state
    gradients = [mx.full(SIZES[0], 0.3)]
    results = [full_step(options, parameters, gradients, s, 0.1) for s in (shared, apart)]
    for a, b in zip(results[0][1].slots, results[1][1].slots, strict=True):
        for left, right in zip(a, b, strict=True):
            assert np.array_equal(of_mlx(left), of_mlx(right))
