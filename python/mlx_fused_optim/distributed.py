"""Gradients of several batches, and of several processes."""

from __future__ import annotations

import math
import weakref
from contextlib import suppress
from typing import Any, ClassVar

import mlx.core as mx
from mlx.nn.layers.base import Module
from mlx.nn.layers.distributed import FullyShardedModule

from . import _ext, _packing
from ._bytes import rows_shape
from ._checks import LearningRate, checked_scalar
from ._dtypes import DTYPES
from ._groups import Groups
from ._layout import (
    Layout,
    described,
    encoded,
    kept,
    layout_of,
    layout_of_gradients,
    layout_of_rows,
)
from ._options import checked_scale
from ._paths import built
from ._recent import Recent
from ._rules import ANY, FRAME_SLOTS, RULE_PLACES
from ._shards import Shards, broadcast, collective_size
from ._step import Arranged, arranged, measured_step, wanted_slots
from .optimizers import FusedOptimizer, Muon
from .schedules import Schedule

__all__ = ["Sharded", "accumulate_gradients", "average_gradients"]

_SGD = next(number for number, row in enumerate(_ext.RULES) if row["name"] == "sgd")
_NOTHING_KEPT: list[list[mx.array]] = [[] for _ in range(RULE_PLACES + len(FRAME_SLOTS))]


def accumulate_gradients(
    total: Any,
    gradients: Any,
    scale: float | mx.array = 1.0,
    *,
    dtype: mx.Dtype | None = None,
) -> Any:
    r"""Add the gradients of one more batch, the whole tree in one launch.

    .. math:: T \leftarrow T + c \, G

    The first call gives the gradients as they are. What comes of the following ones lies in a few
    flat arrays, and is written in place where nobody else holds the total: in a loop like the
    example's the sum of any number of batches takes the memory of one. An array that somebody
    holds keeps its values.

    The sum is computed in float32 and rounded to the total's dtype: with a ``scale`` of 1 it has
    the bits of ``tree_map(mx.add, total, gradients)``. It is for any optimizer, also in a
    function that ``mx.compile`` traces.

    Args:
        total (tree): What was accumulated before, or None to begin.
        gradients (tree): A tree of arrays: float32, float16 or bfloat16, of the total's shapes.
        scale (float or array): The factor :math:`c` of these gradients, for instance one over the
            number of batches. Default: ``1.0``.
        dtype (Dtype, optional): That of a total that begins; float32 to sum half gradients
            without their roundings. Default: each gradient's own.

    Returns:
        The new total, a tree of the structure of ``gradients``.

    Raises:
        ValueError, TypeError: The trees differ, an array is none of the three dtypes, or the
            scale is no finite number of float32.

    Example:
        >>> from mlx_fused_optim import SGD, accumulate_gradients
        >>> optimizer, parameters = SGD(learning_rate=1.0), {"w": mx.zeros(2)}
        >>> total = None
        >>> for batch in range(4):
        ...     gradients = {"w": mx.array([1.0, 2.0]) * batch}
        ...     total = accumulate_gradients(total, gradients, scale=1 / 4)
        ...     mx.eval(total)
        >>> optimizer.apply_gradients(total, parameters)["w"]
        array([-1.5, -3], dtype=float32)
    """
    op = "accumulate_gradients"
    if isinstance(scale, mx.array):
        scale = checked_scalar(op, "scale", scale)
    else:
        scale = ANY.checked(op, "scale", scale, "a float or a scalar array")
    if dtype is not None and dtype not in DTYPES.values():
        raise ValueError(
            f"[{op}] the dtype of a total is unknown: got {dtype}, allowed None, "
            f"{', '.join('mlx.core.' + name for name in DTYPES)}."
        )
    tree = _ext.Tree(gradients, gradients if total is None else total, op, exact=True)
    if total is None:
        is_kept = dtype is None or all(a.dtype == dtype for a in tree.parameters)
        if is_kept and isinstance(scale, float) and scale == 1:
            return tree.unflatten(tree.parameters)
        tree = _ext.Tree(gradients, tree.unflatten(_beginning(layout_of(tree), dtype)), op)
    # An SGD step with the rate -c, for which nothing reads the counter.
    options = _ext.Options(rule=_SGD, scalars=[-scale, *_NO_NUMBERS], flags=0, op=op)
    counter = mx.array(0, mx.uint64)
    return _ext.fused_step(tree, layout_of(tree).made, _NOTHING_KEPT, counter, options)[0]


def average_gradients(
    gradients: Any,
    group: mx.distributed.Group | None = None,
    all_reduce_size: int | None = None,
    communication_stream: mx.Stream | None = None,
) -> Any:
    r"""The mean of the gradients of all processes, as ``mlx.nn.average_gradients`` gives it.

    .. math:: G_i \leftarrow \frac{1}{N} \sum_{j=1}^{N} G_j

    Gradients are packed into flat arrays by one launch for each, which is one communication; what
    comes back are views of them. Gradients of several dtypes are an array a dtype, where MLX
    communicates each tensor alone. The sums are those of MLX's backend and the bits those of
    ``mlx.nn.average_gradients``, wherever the order of the sum does not depend on where a number
    lies: with two processes always; with more, the ring adds each part of an array in an order
    of its own, so that the last bit may differ.

    Every process must call it with a tree of the same structure, shapes and dtypes.

    Args:
        gradients (tree): A tree of arrays: float32, float16 or bfloat16. Arrays of integers
            are left as they are.
        group (mlx.core.distributed.Group, optional): The processes. Default: all of them.
        all_reduce_size (int, optional): At most so many bytes are communicated at once, if several
            tensors are. At 0 or less each tensor is communicated alone. Default: 32 MiB, as MLX's;
            where MLX runs on CUDA 256 MiB, as each communication costs the host's time there.
        communication_stream (Stream, optional): Where to communicate. Default: the backend's.

    Returns:
        The mean, a tree of the structure of ``gradients``; of a single process the gradients.

    Raises:
        ValueError: An array is complex or float64.

    Example:
        >>> from mlx_fused_optim import average_gradients
        >>> average_gradients({"w": mx.array([1.0, 2.0])})  # of one process
        {'w': array([1, 2], dtype=float32)}
    """
    group = group or mx.distributed.init()
    if group.size() == 1:
        return gradients
    tree = _ext.Tree(gradients, gradients, "average_gradients")
    if all_reduce_size is None:
        all_reduce_size = collective_size(32 << 20)
    layout = layout_of_gradients(tree, max(all_reduce_size, 1)).made
    averages = [
        mx.distributed.all_sum(packed, group=group, stream=communication_stream) / group.size()
        for packed in _ext.pack_arrays(tree.gradients, layout, True)
    ]
    return tree.unflatten(_ext.tensors_of(averages, layout))


_NO_NUMBERS = [0.0, 1.0, *[0.0] * len(_ext.RULES[_SGD]["scalars"])]  # weight decay, scale, SGD's


def _beginning(layout: Layout, dtype: mx.Dtype | None) -> list[mx.array]:
    """What any number can be added to without a change: -0.0."""
    rows = [(path, shape, dtype or own) for path, shape, own in layout.tensors]
    layout = layout_of_rows(rows)
    begun = [mx.full(arena.shape, -0.0, arena.dtype) for arena in layout.arenas]
    return _ext.tensors_of(begun, layout.made)


# Where a state says which part of a whole it is.
SHARD = "shard"


class Sharded:
    r"""An optimizer whose state is spread over processes (ZeRO-1): each keeps, and steps, about
    one part in :math:`N` of the tensors, and gathers the others' new parameters.

    It takes the gradients of each process as they are, averages them as
    :func:`average_gradients` does, and gives every process the same parameters, to the bit: those
    of a step of ``optimizer`` on the averages, where each sum of gradients has the same order.
    Norms, found infinities and trust ratios are those of all gradients, and a step is skipped by
    all or by none. Rounding at random takes the random bits of one process.

    A tensor is one process': where one is larger than the :math:`N`-th part of a model, its process
    keeps more. At the first step the processes compare their trees, dtypes, options and steps.

    Args:
        optimizer (FusedOptimizer): Any, but no :class:`Muon` with ``others``; the same on every
            process. Its options and numbers may be changed between steps, on all processes alike.
        group (mlx.core.distributed.Group, optional): The processes. Default: all of them.
        communication_stream (Stream, optional): Where to communicate. Default: the backend's.

    Raises:
        TypeError: The optimizer is another one.
        ValueError: At the first step, on every process: one has other tensors, options or steps.
            At a step: the state is another process' part.

    Reference: Rajbhandari et al., 2020, https://arxiv.org/abs/1910.02054 (the first stage).

    Example:
        >>> from mlx_fused_optim import AdamW, Sharded
        >>> optimizer = Sharded(AdamW(learning_rate=0.5, weight_decay=0.0))
        >>> optimizer.apply_gradients({"w": mx.array([1.0, -2.0])}, {"w": mx.zeros(2)})["w"]
        array([-1.58114, 1.58114], dtype=float32)
    """

    def __init__(
        self,
        optimizer: FusedOptimizer,
        group: mx.distributed.Group | None = None,
        communication_stream: mx.Stream | None = None,
    ):
        _check_optimizer(optimizer)
        self.optimizer = optimizer
        self._group = group or mx.distributed.init()
        self._stream = communication_stream
        self._known: Recent[Shards] = Recent(4)
        self._shards: Shards | None = None  # of the state, and what that has
        self._wanted: _packing.Wanted | None = None
        self._agreed = False
        self._scatters = False
        self._outline: _ext.Outline | None = None
        weakref.finalize(self, _let_go).atexit = False

    @property
    def state(self) -> dict[str, Any]:
        """What this process keeps, to be saved and assigned on the same process of as many. One of
        :meth:`gathered_state`, or of the optimizer alone, is assigned on every process, of any
        number: each takes its part at the next step."""
        return self.optimizer.state

    @state.setter
    def state(self, state: dict[str, Any]) -> None:
        self._check_shard(state)
        self.optimizer.state = state
        self._shards = None

    @property
    def learning_rate(self) -> Any:
        """The optimizer's."""
        return self.optimizer.learning_rate

    @learning_rate.setter
    def learning_rate(self, learning_rate: LearningRate) -> None:
        self.optimizer.learning_rate = learning_rate

    @property
    def step(self) -> mx.array:
        """The optimizer's."""
        step: mx.array = self.optimizer.step
        return step

    def init(self, parameters: Any) -> None:
        """Make this process' part of the state, as the optimizer's ``init`` does; every process
        calls it.

        Args:
            parameters (tree): A tree of the arrays that will be trained.
        """
        inner = self.optimizer
        if self._group.size() == 1:
            inner.init(parameters)
            return
        _, order, shards = self._begun(parameters, parameters)
        part = order.tree.part(shards.own, shards.layout.made)
        inner._begin_state(part, parameters, inner._options)
        self._mark(shards)

    def update(self, model: Any, gradients: Any, *, grad_scale: LearningRate | None = None) -> None:
        """One step, of the model in place.

        Args:
            model (mlx.nn.Module): The model, the same on every process.
            gradients (tree): Those of this process.
            grad_scale (float, array, Schedule or callable): What these gradients were
                multiplied with, in place of the optimizer's ``grad_scale``.
        """
        model.update(self.apply_gradients(gradients, model, grad_scale=grad_scale))

    def apply_gradients(
        self, gradients: Any, parameters: Any, *, grad_scale: LearningRate | None = None
    ) -> Any:
        """One step: the updated parameters, in the structure of ``gradients``.

        Args:
            gradients (tree): Those of this process. It may have a part of the parameters only,
                the same on every process.
            parameters (tree): A tree of parameters, or the model, the same on every process.
            grad_scale (float, array, Schedule or callable): What these gradients were
                multiplied with, in place of the optimizer's ``grad_scale``.

        Returns:
            The updated parameters; each keeps its shape and dtype.
        """
        inner = self.optimizer
        if self._group.size() == 1:
            return inner.apply_gradients(gradients, parameters, grad_scale=grad_scale)
        whole, order, shards = self._begun(gradients, parameters)
        tree = order.tree
        options, hyper = inner._options, inner._hyper()
        scale = options.grad_scale if grad_scale is None else checked_scale(_OP, grad_scale)
        if callable(scale):  # once for all
            grad_scale = scale = checked_scalar(_OP, "grad_scale", scale(inner.step))
        averages, last = self._averaged(tree, shards, options.is_measured)
        measured = None
        if options.is_measured:
            averaged = tree.with_gradients(averages)
            measured = measured_step(_OP, averaged, inner.state, hyper, options, scale)
            if measured[0].size > 2:  # norms of each tensor, for trust ratios
                norms = [i for number in shards.own for i in (2 + 2 * number, 3 + 2 * number)]
                measured[0] = mx.take(measured[0], mx.array([0, 1, *norms]))
            averages = [averages[number] for number in shards.own]
        part = tree.part(shards.own, shards.layout.made).with_gradients(averages)
        updated = inner._take_step(part, parameters, options, grad_scale, measured)
        self._mark(shards)
        return whole.unflatten(order.leaves(self._gathered(updated, shards, last)))

    # The last collective of any, for which the next one waits: several may step parts of a model.
    # Parameters are views of it, so it is seldom memory of its own.
    _last: ClassVar[mx.array | None] = None

    def gathered_state(self, to: int | None = None) -> dict[str, Any]:
        """The whole state, as the optimizer alone has it: to be saved, and to go on with any
        number of processes. Every process calls it.

        Args:
            to (int, optional): The process that gets it; the others get ``{}``, and hold no more
                than one array of it at once. Default: each gets it.

        Returns:
            dict: The state of the tensors of the last step.

        Raises:
            ValueError: There is no state yet: neither a step nor :meth:`init`.
        """
        inner, shards, wanted = self.optimizer, self._shards, self._wanted
        if self._group.size() == 1:
            return dict(inner.state)
        if shards is None or wanted is None:
            raise ValueError(
                "[Sharded] nothing to gather: got no state, allowed after a step or init()."
            )
        is_kept = to is None or to == self._group.rank()
        rule = inner._rule.slots
        own = inner.state.get("arenas", {}).get(shards.layout.key, {})
        entry: dict[str, Any] = {"table": encoded(shards.whole)}
        for name in wanted.slots:
            slot = rule[name]
            pieces: dict[int, list[mx.array]] = {}
            for rank, layout in enumerate(shards.layouts):
                is_mine = rank == self._group.rank()
                for i, number in enumerate(_packing.arena_numbers(slot, layout)):
                    row = layout.arenas[number]
                    dtype = wanted.dtype(slot, row)
                    shape = rows_shape(row.elements) if dtype == mx.uint8 else row.shape
                    mine = own[name][i] if is_mine else mx.zeros(shape, dtype)
                    piece = broadcast(mine, is_mine, self._group)
                    if is_kept:
                        pieces.setdefault(shards.origins[rank][number], []).append(piece)
            entry[name] = []
            for number in _packing.arena_numbers(slot, shards.whole) if is_kept else ():
                row, parts = shards.whole.arenas[number], pieces.pop(number)
                entry[name].append(parts[0] if len(parts) == 1 else mx.concatenate(parts))
            mx.eval(entry[name])
        if not is_kept:
            return {}
        state = {k: v for k, v in _packing.scalars(inner.state, rule).items() if k != SHARD}
        return {**state, "arenas": {shards.whole.key: entry}} if len(entry) > 1 else state

    # ---- Parts ---------------------------------------------------------------------

    def _begun(self, gradients: Any, parameters: Any) -> tuple[_ext.Tree, Arranged, Shards]:
        """The tensors, their order and whose they are, and a state that is of this process' own. At
        the first step all processes find out together whether they may begin."""
        try:
            _check_optimizer(self.optimizer)
            tree = _ext.Tree(gradients, parameters, _OP, like=self._outline)
            self._outline = tree.outline
            told = [] if self._agreed else self._told(tree, parameters)
        except Exception:
            if not self._agreed:
                with suppress(ValueError):  # the others' error, which is about this one
                    self._agree([0] * 5)
            raise
        if not self._agreed:
            self._agree(told)
        order = arranged(tree, self.optimizer._hyper())
        whole = layout_of(order.tree, self.optimizer._options.least_of_bytes)
        shards = self._known.find(whole.key)
        if shards is None:
            shards = Shards(whole, self._group.rank(), self._group.size())
            self._known.keep(whole.key, shards)
        kept(shards.layout)
        if self._shards is not None and self._shards is not shards:  # other tensors are trained
            kept(self._shards.layout)
            self.state = self.gathered_state()
        self._take_in(order.tree, parameters, shards)
        return tree, order, shards

    def _take_in(self, tree: _ext.Tree, parameters: Any, shards: Shards) -> None:
        """Of a whole state that was assigned keep this process' own."""
        inner = self.optimizer
        slots, state = inner._rule.slots, inner.state
        _packing.check_scalars(state, _OP)
        is_as_left = not _packing.is_edited(state, inner._known, slots)
        if inner._initialized and SHARD in state and is_as_left:
            return
        self._check_shard(state)
        if SHARD in state:
            mark = _mark_of(state)
            if self._shards is None and mark and mark[2:] != [*_words(tree.fingerprint)]:
                raise ValueError(
                    "[Sharded] the state is a part of another model: got that of other tensors, "
                    "allowed the part that was saved, or a whole state of gathered_state()."
                )
            return
        _packing.check_state(state, parameters, slots, _OP)
        arrays, rows = tree.parameters, shards.whole.tensors
        own = built([(rows[number][0], arrays[number]) for number in shards.own], _OP)
        inner._replace_state(_packing.of_parameters(state, own, slots, _OP))

    def _mark(self, shards: Shards) -> None:
        if self._shards is not shards or SHARD not in self.optimizer.state:
            mark = [*self._place, *_words(shards.whole.made.fingerprint)]
            self.optimizer.state[SHARD] = mx.array(mark, mx.uint32)
        self._shards = shards
        self._wanted = wanted_slots(self.optimizer._hyper(), self.optimizer._options)

    @property
    def _place(self) -> list[int]:
        return [self._group.rank(), self._group.size()]

    def _check_shard(self, state: Any) -> None:
        mark = _mark_of(state)
        if mark and mark[:2] != self._place:
            raise ValueError(
                f"[Sharded] the state is another process': got part {mark[0]} of {mark[1]}, "
                "allowed part {} of {}, ".format(*self._place)
                + "counted from 0, or a whole state of gathered_state()."
            )

    def _told(self, tree: _ext.Tree, parameters: Any) -> list[int]:
        """What this process is about to do, for the others; its tensors, options and step."""
        if isinstance(parameters, Module):
            for path, module in parameters.named_modules():  # type: ignore[no-untyped-call]
                if isinstance(module, FullyShardedModule):
                    raise ValueError(
                        f"[{_OP}] the parameters are spread over processes already: got those of "
                        f"mlx.nn.fully_shard in '{path}', allowed a model that every process has "
                        "whole; or the optimizer alone."
                    )
        step = self.optimizer.state.get("step", 0)
        is_known = not (isinstance(step, mx.array) and _ext.has_placeholders([step]))
        number = int(step) % 2**32 if is_known else 0
        return [1, *_words(tree.fingerprint), _crc(_described(self.optimizer)), number]

    def _agree(self, told: list[int]) -> None:
        """Raise ValueError, on every process, where one has told something else."""
        mine = mx.array([told], mx.uint32)
        told_by_all = mx.distributed.all_gather(mine, group=self._group, stream=self._stream)
        everything: list[Any] = told_by_all.tolist()  # type: ignore[assignment]
        for rank, other in enumerate(everything):
            if other != everything[0] or not other[0]:
                raise ValueError(f"[Sharded] the processes differ: got {_difference(other, rank)}.")
        try:
            ones = mx.ones(self._group.size())
            mx.eval(mx.distributed.sum_scatter(ones, group=self._group, stream=self._stream))
            self._scatters = True
        except RuntimeError:  # of MLX's backends the ring and MPI have none
            self._scatters = False
        self._agreed = True

    def _averaged(
        self, tree: _ext.Tree, shards: Shards, of_all: bool
    ) -> tuple[list[mx.array], mx.array | None]:
        """The mean gradients, of this process' own tensors or of all; and the last collective. Each
        waits for the one before: every process is to take them in the same order, and has another
        graph."""
        size, rank, gradients = self._group.size(), self._group.rank(), tree.gradients
        rounds = shards.gradients([gradient.dtype for gradient in gradients])
        how: Any = {"group": self._group, "stream": self._stream}
        averages, last = [], None if _ext.is_tracing() else Sharded._last
        for x, row in zip(
            _ext.pack_arrays(gradients, rounds.arenas), rounds.slices.arenas, strict=True
        ):
            x = x if last is None else _ext.after(x, last)
            if of_all or not self._scatters:
                last = total = mx.distributed.all_sum(x, **how)
                if not of_all:
                    total = _ext.arena_view(last, row[1], rank * math.prod(row[1]))
            else:
                last = total = mx.distributed.sum_scatter(x, **how)
            averages.append(total / size)
        layout = rounds.arenas if of_all else rounds.slices
        return _ext.tensors_of(averages, layout), last

    def _gathered(
        self, own: list[mx.array], shards: Shards, last: mx.array | None
    ) -> list[mx.array]:
        """The parameters of all processes."""
        rounds = shards.parameters
        gathered = []
        for x, row in zip(_ext.pack_arrays(own, rounds.slices), rounds.arenas.arenas, strict=True):
            x = x.reshape(-1, *row[1][1:])
            x = x if last is None else _ext.after(x, last)
            last = mx.distributed.all_gather(x, group=self._group, stream=self._stream)
            gathered.append(last)
        if not _ext.is_tracing():
            Sharded._last = last
        return _ext.tensors_of(gathered, rounds.arenas)


_OP = "Sharded"


def _let_go() -> None:
    if Sharded._last is not None and _ext.is_available(Sharded._last):
        Sharded._last = None


def _check_optimizer(optimizer: FusedOptimizer) -> None:
    """With each step: it may have been changed since the last."""
    if not isinstance(optimizer, FusedOptimizer) or optimizer._is_single:
        raise TypeError(
            f"[{_OP}] the optimizer is of the wrong type: got {type(optimizer).__name__}, "
            "allowed an optimizer of mlx_fused_optim that does not step tensor by tensor."
        )
    if isinstance(optimizer, Muon) and optimizer.others is not None:
        raise TypeError(
            f"[{_OP}] the optimizer is two: got a Muon with {type(optimizer.others).__name__} as "
            "others, allowed one without; and MultiOptimizer, of a Sharded for each."
        )


def _mark_of(state: Any) -> list[int] | None:
    """Process, processes and tensors of a part; None of a whole, or of a state that is traced."""
    mark = state.get(SHARD) if isinstance(state, dict) else None
    if not isinstance(mark, mx.array) or _ext.has_placeholders([mark]):
        return None
    numbers: Any = mark.tolist()
    if mark.dtype != mx.uint32 or mark.shape != (4,):
        raise ValueError(
            f"[Sharded] state['{SHARD}'] is of the wrong type: got {described(mark)}, allowed "
            "it as it was saved."
        )
    return list(numbers)


def _words(fingerprint: str) -> tuple[int, int]:
    return int(fingerprint[:8], 16), int(fingerprint[8:], 16)


def _crc(text: str) -> int:
    import zlib  # here: nobody else needs it

    return zlib.crc32(text.encode())


def _described(optimizer: FusedOptimizer) -> str:
    """What a step of it consists of, in words that are the same in every process."""
    hyper, options = optimizer._hyper(), optimizer._options
    rate = optimizer._schedulers.get("learning_rate", optimizer.state.get("learning_rate"))
    if isinstance(rate, mx.array) and not _ext.has_placeholders([rate]):
        rate = rate.tolist()
    parts = [type(optimizer).__name__, hyper.flags, rate, *hyper.scalars, *options]
    parts.append(collective_size(0))  # another where a process has CUDA and this one has not
    return repr([_told(part) for part in parts])


def _told(value: Any) -> Any:
    if isinstance(value, Groups):
        overrides = [sorted(member.overrides.items()) for member in value.members]
        return [[(name, _told(number)) for name, number in group] for group in overrides]
    if callable(value) and not isinstance(value, Schedule):
        return getattr(value, "__qualname__", type(value).__qualname__)
    return "array" if isinstance(value, mx.array) else repr(value)


def _difference(told: list[int], rank: int) -> str:
    if not told[0]:
        return f"an error on process {rank}, allowed none on any"
    return f"other tensors, options or steps on process {rank} than on 0, allowed the same on all"
