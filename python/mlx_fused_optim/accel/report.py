"""What is said at the end of a program that ran with ``accel``: what was replaced and how often it
stepped, what was not and why, and the optimizer's share of the time."""

from __future__ import annotations

import atexit
import math
import statistics
import sys
import time
from collections.abc import Iterator
from typing import Any
from weakref import WeakKeyDictionary, finalize

import mlx.core as mx
from mlx.utils import tree_flatten, tree_unflatten

from .. import _ext
from ..schedules import Schedule
from . import _STAND_INS, _hand_over, _StandIn, uninstall

# A step is timed after the program, with parameters of so many bytes, for so many seconds.
LARGEST, LONGEST = 2**28, 0.5
RATE = 1e-3


class Report:
    """Of this process, written to stderr at its end."""

    def __init__(self) -> None:
        self.reasons: WeakKeyDictionary[Any, str] = WeakKeyDictionary()  # why it is MLX's
        self._of: WeakKeyDictionary[Any, Run] = WeakKeyDictionary()
        self._runs: list[Run] = []
        self._began, self._ended = time.perf_counter(), False
        atexit.register(self.write)

    def stepped(self, optimizer: Any, updated: Any) -> None:
        if self._ended:
            return
        run = self._of.get(optimizer)
        if run is None:
            run = self._of[optimizer] = Run(optimizer, updated)
            self._runs.append(run)
        run.stepped(optimizer, self.reasons.get(optimizer))

    def write(self) -> None:
        seconds = time.perf_counter() - self._began
        self._ended = True
        uninstall()
        for run in self._runs:
            run.end()
        sys.stdout.flush()
        print(f"[accel] {seconds:.3g} s on {mx.default_device()}", file=sys.stderr)
        if not self._runs:
            print("  no optimizer of mlx.optimizers has taken a step", file=sys.stderr)
        for run in self._runs:
            for number, line in enumerate(run.lines()):
                print(" " * (4 if number else 2) + line, file=sys.stderr)


class Run:
    """The steps of one optimizer; it keeps neither the optimizer nor its state."""

    def __init__(self, optimizer: Any, updated: Any):
        leaves: list[tuple[str, Any]] = tree_flatten(updated)  # type: ignore[assignment]
        self._tensors = [(path, x.shape, x.dtype) for path, x in leaves if isinstance(x, mx.array)]
        self._calls, self._compiled = 0, False
        self._began = time.perf_counter()
        # When the optimizer goes, its attributes are still there.
        self.end = finalize(optimizer, self._end, vars(optimizer))

    def stepped(self, optimizer: Any, why: str | None) -> None:
        self._kind, self._why = type(optimizer), why
        self._calls += 1
        self._compiled = self._compiled or _ext.is_tracing()

    def _end(self, attributes: dict[str, Any]) -> None:
        self._seconds = time.perf_counter() - self._began
        state = attributes.get("_state", {})
        self._steps: int | None = self._calls
        self._rate = mx.array(RATE)
        try:
            if "learning_rate" in state:
                mx.eval(state["learning_rate"])
                self._rate = state["learning_rate"]
            if self._compiled:  # Python has seen the traces only
                self._steps = state["step"].item()
        except (KeyError, RuntimeError, ValueError):  # a function did not capture the state
            self._steps = None
        self._attributes = {**attributes, "_state": {}}
        self._name = self._kind.__name__
        if issubclass(self._kind, _StandIn):
            self._name = repr(self._again(self._kind))
        # The program's functions have been called for the last time.
        schedulers = self._attributes["_schedulers"] = {**attributes.get("_schedulers", {})}
        rate = schedulers.get("learning_rate")
        if callable(rate) and not isinstance(rate, Schedule):
            schedulers["learning_rate"] = lambda step: mx.array(RATE)

    def lines(self) -> Iterator[str]:
        is_ours = issubclass(self._kind, _StandIn)
        if is_ours:
            yield f"ours: {self._name}"
        elif self._kind.__module__.startswith("mlx.optimizers"):
            why = self._why or "there is no kernel for it"
            yield f"MLX's own: {self._name}, because {why}"
        else:
            why = self._why or "it is a class of the program's"
            yield f"not replaced: {self._name}, because {why}"
        size = sum(math.prod(shape) for _, shape, _ in self._tensors)
        steps = "steps, not counted," if self._steps is None else f"{self._steps:,} steps"
        how = ", compiled" if self._compiled else ""
        yield f"{steps} of {len(self._tensors):,} tensors, {size:,} parameters{how}"
        try:
            yield from self._times(is_ours)
        except Exception as error:  # of a class of the program's
            yield f"its time is not known ({type(error).__name__}: {error})"

    def _times(self, is_ours: bool) -> Iterator[str]:
        if not is_ours:
            ms, beside = self._timed(self._again(self._kind)), ""
        else:
            stand_in = _STAND_INS[self._kind._mlx]
            ms, theirs = self._timed(self._again(stand_in)), self._again(stand_in)
            try:
                _hand_over(theirs, ValueError())
                beside = f", with mlx.optimizers {self._timed(theirs):.3g} ms"
            except ValueError:  # it has no such options
                beside = ""
        yield f"a step alone, timed after the program: {ms:.3g} ms{beside}"
        if self._steps is not None:
            share = 1e-3 * ms * self._steps / self._seconds
            yield f"its share of the {self._seconds:.3g} s from the first step on: {share:.1%}"

    def _again(self, kind: type[Any]) -> Any:
        """The optimizer before its first step."""
        optimizer = object.__new__(kind)
        vars(optimizer).update(self._attributes)
        optimizer.state = {"step": mx.array(0, mx.uint64), "learning_rate": self._rate}
        return optimizer

    def _timed(self, optimizer: Any) -> float:
        """Median milliseconds of a step of these tensors, or of as many of them as are cheap."""
        parameters, gradients, size, whole = [], [], 0, 0
        for path, shape, dtype in sorted(self._tensors, key=lambda x: math.prod(x[1])):
            whole += math.prod(shape)
            if not size or whole * dtype.size <= LARGEST:
                size = whole
                parameters.append((path, mx.full(shape, 0.5, dtype)))
                gradients.append((path, mx.full(shape, 1e-3, dtype)))
        trees = tree_unflatten(gradients), tree_unflatten(parameters)
        step = optimizer.apply_gradients
        if self._compiled:
            optimizer.init(trees[1])
            step = mx.compile(step, inputs=optimizer.state, outputs=optimizer.state)
        mx.eval(trees)
        times: list[float] = []
        while len(times) < 4 or (sum(times) < 1e3 * LONGEST and len(times) < 50):
            start = time.perf_counter()
            trees = trees[0], step(*trees)
            mx.eval(trees[1], optimizer.state)
            times.append(1e3 * (time.perf_counter() - start))
        # The first two compile kernels and pack arenas.
        return statistics.median(times[2:]) * whole / size
