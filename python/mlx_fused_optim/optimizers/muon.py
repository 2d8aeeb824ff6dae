"""Muon: momentum, orthogonalised matrix by matrix."""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

import mlx.core as mx
import mlx.optimizers

from .. import _ext
from .._checks import Hyperparameter, LearningRate, checked_scalar
from .._dtypes import DTYPES
from .._layout import Layout, layout_of, layout_of_rows
from .._newton_schulz import NewtonSchulz, Triple, checked_dtype, checked_newton_schulz
from .._options import Options, StepOptions, checked_scale
from .._packing import OTHERS, check_scalars
from .._paths import name_of
from .._recent import Recent
from .._rules import UNIT, Rule, Slots
from .._step import Hyper, measured_step, never_changes
from .base import FusedOptimizer, Number

if TYPE_CHECKING:
    from typing_extensions import Unpack

# Options that all tensors share: those of gradients are about all of them together, and the
# others would otherwise have to be said twice.
OWN_OF_OTHERS = ("state_dtype", "decoupled", "groups")
SHARED = tuple(name for name in Options._fields if name not in OWN_OF_OTHERS)


class _Parts(NamedTuple):
    """Which tensors of a tree are whose: numbers in it, and their layouts."""

    takes: Callable[[str, mx.array], Any]  # that was asked
    own: list[int]
    own_layout: Layout
    others: list[int]
    others_layout: Layout


class Muon(FusedOptimizer, mlx.optimizers.Muon):
    r"""Muon: the momentum of a matrix, orthogonalised; matrices of one shape at once.

    Takes the place of ``mlx.optimizers.Muon``: the same arguments, the same methods and, with
    ``ns_dtype=mx.float32``, its steps up to the rounding of a matrix product.

    .. math::

        g &\leftarrow g + \lambda w \\
        v &\leftarrow \mu v + (1 - \mu) g \\
        u &= \mu v + (1 - \mu) g \text{ if nesterov else } v \\
        w &\leftarrow w - \eta_t \, s \, \mathrm{NS}(u)

    for matrices, with more than two dimensions flattened to two (a row for each of the first);
    what has fewer moves by :math:`\eta_t u`. With :math:`u = U \Sigma V^\top`,
    :math:`\mathrm{NS}(u) = U \, p(\Sigma / \lVert u \rVert) \, V^\top` for the Frobenius
    norm and :math:`p` the polynomials :math:`x \mapsto a x + b x^3 + c x^5`, applied ``ns_steps``
    times, which bring singular values near 1. A matrix of zeros stays one; any other direction
    counts, however small or large, where MLX adds :math:`10^{-7}` to the norm, as long as the
    norm is a normal number of float32 (of less than 1.2e-38, the update is about zero; of
    more than 3.4e38, it is).

    {frame}

    Args:
        {learning_rate}
        momentum (float, Schedule or callable): The factor :math:`\mu` of the moving average, 0
            to 1. Default: ``0.95``.
        weight_decay (float, Schedule or callable): The weight decay :math:`\lambda`. Coupled (L2),
            as in ``mlx.optimizers``, unless ``decoupled``, as in ``torch.optim``.
            Default: ``0.01``.
        nesterov (bool): Nesterov momentum. Default: ``True``.
        ns_steps (int): How often the polynomial is applied, 0 to 100. Default: ``5``.
        ns_coefficients (str or list): ``"original"``: (3.4445, -4.7750, 2.0315) each time, after
            five of which singular values of 0.003 and more of the norm are within 0.68 to 1.21.
            ``"polar_express"``: another triple each time; those from 0.001 on are within 0.85 to
            1.12 after five, and 0.99 to 1.01 after six, and then converge. Or a list of triples
            :math:`(a, b, c)`, of which the last goes on. Default: ``"original"``.
        ns_dtype (Dtype): float32, float16 or bfloat16, of the matrix products. Default: bfloat16
            on a GPU, as in ``torch.optim``, and float32 on a CPU.
        scale (str): :math:`s`. ``"original"``:
            :math:`\sqrt{\max(1, \text{rows} / \text{columns})}`, of the last two dimensions;
            ``"match_rms_adamw"``: :math:`0.2 \sqrt{\max(\text{rows}, \text{columns})}`, with
            which learning rates of AdamW fit. Default: ``"original"``.
        others (FusedOptimizer): Steps other tensors, as ``optim.AdamW(1e-3)`` the embeddings and
            norms: with its own numbers, ``groups``, ``decoupled`` and ``state_dtype``, and all
            other options from here. It is ``optimizer.others`` from then on, and its state a
            part of this one. Default: ``None``.
        others_filter (callable): Which tensors these are: ``others_filter(path, array)`` is called
            once for a set of tensors. Default: those of fewer than two dimensions.
        {options}

    {raises}

    References:
        ``mlx.optimizers.Muon``, ``torch.optim.Muon``. Jordan et al., 2024,
        https://kellerjordan.github.io/posts/muon/. ``"match_rms_adamw"``: Liu et al., 2025,
        https://arxiv.org/abs/2502.16982. ``"polar_express"``: Amsel et al., 2025,
        https://arxiv.org/abs/2505.16932.

    Example:
        >>> import mlx.core as mx
        >>> from mlx_fused_optim import AdamW, Muon
        >>> optimizer = Muon(learning_rate=0.5, weight_decay=0.0, ns_coefficients="polar_express")
        >>> gradients = {"w": mx.array([[3.0, 0.0], [0.0, -4.0]])}
        >>> parameters = optimizer.apply_gradients(gradients, {"w": mx.zeros((2, 2))})
        >>> mx.round(parameters["w"], 1)
        array([[-0.5, 0],
               [0, 0.5]], dtype=float32)

        One optimizer for the whole model, embeddings with AdamW as well as all vectors:

        >>> optimizer = Muon(
        ...     learning_rate=2e-2,
        ...     clip_norm=1.0,
        ...     others=AdamW(learning_rate=1e-3),
        ...     others_filter=lambda path, array: array.ndim < 2 or "embedding" in path,
        ... )
        >>> parameters = {"embedding": mx.ones((4, 2)), "w": mx.ones((2, 2)), "b": mx.ones(2)}
        >>> parameters = optimizer.apply_gradients(parameters, parameters)
        >>> sorted(optimizer.unpacked_state()), sorted(optimizer.others.unpacked_state())[:2]
        (['grad_norm', 'learning_rate', 'others_state', 'step', 'w'], ['b', 'embedding'])
    """

    _op = "Muon"
    _rule = Rule("muon", momentum=UNIT)
    _of_mlx = frozenset({"momentum", "weight_decay", "nesterov", "ns_steps"})
    _needs_whole: ClassVar[bool] = True

    momentum = Number()
    ns_coefficients: str | Sequence[Triple]
    scale: str
    others_filter: Callable[[str, mx.array], Any] | None
    others: FusedOptimizer | None = None
    _between: tuple[tuple[Any, ...], NewtonSchulz] | None = None
    _of_others: tuple[Options, Options, Options] | None = None

    def __init__(
        self,
        learning_rate: LearningRate,
        momentum: Hyperparameter = 0.95,
        weight_decay: Hyperparameter = 0.01,
        nesterov: bool = True,
        ns_steps: int = 5,
        ns_coefficients: str | Sequence[Triple] = "original",
        ns_dtype: mx.Dtype | None = None,
        scale: str = "original",
        others: FusedOptimizer | None = None,
        others_filter: Callable[[str, mx.array], Any] | None = None,
        **options: Unpack[StepOptions],
    ):
        _check_others(self._op, others, others_filter)
        self._parts: Recent[_Parts] = Recent(16)
        self._begin(
            learning_rate,
            options,
            momentum=momentum,
            weight_decay=weight_decay,
            nesterov=nesterov,
            ns_steps=ns_steps,
            ns_coefficients=ns_coefficients,
            ns_dtype=ns_dtype,
            scale=scale,
            others=others,
            others_filter=others_filter,
        )
        self._joined()

    @property
    def ns_dtype(self) -> mx.Dtype | None:
        """The dtype of the matrix products; None is that of the device."""
        return DTYPES.get(self._ns_dtype or "")

    @ns_dtype.setter
    def ns_dtype(self, dtype: mx.Dtype | None) -> None:
        self._ns_dtype = checked_dtype(self._op, dtype)  # by its name: pickled, too

    @classmethod
    def _parsed(cls, op: str, numbers: dict[str, Any], flags: dict[str, bool]) -> Hyper:
        hyper = super()._parsed(op, numbers, flags)
        hyper = hyper._replace(flags=hyper.flags | cls._rule.flags["momentum"])
        if "ns_steps" not in numbers:  # of an optimizer, whose attributes _hyper reads
            return hyper
        if op != cls._op and numbers["others"] is not None:
            raise ValueError(
                f"[{op}] another optimizer needs a state of its own: got others, allowed None."
            )
        dtype = checked_dtype(op, numbers["ns_dtype"])
        own = numbers["ns_steps"], numbers["ns_coefficients"], dtype, numbers["scale"]
        return hyper._replace(between=checked_newton_schulz(op, *own))

    def _hyper(self) -> Hyper:
        given = (self.ns_steps, self.ns_coefficients, self._ns_dtype, self.scale)
        if self._between is None or not all(map(operator.is_, given, self._between[0])):
            between = checked_newton_schulz(self._op, *given)
            # A list of coefficients is looked at each time.
            self._between = (given, between) if all(map(never_changes, given)) else None
        else:
            between = self._between[1]
        return super()._hyper()._replace(between=between)

    def _take_step(
        self,
        tree: _ext.Tree,
        parameters: Any,
        options: Options,
        grad_scale: LearningRate | None,
        measured: list[mx.array] | None = None,
    ) -> Any:
        others = self._joined()
        if others is None:
            return super()._take_step(tree, parameters, options, grad_scale, measured)
        parts, of_others = self._parts_of(tree), self._options_of(others)
        scale = options.grad_scale if grad_scale is None else checked_scale(self._op, grad_scale)
        if callable(scale):  # once for all
            grad_scale = scale = checked_scalar(self._op, "grad_scale", scale(self.step))
        if options.is_measured:
            measured = measured_step(self._op, tree, self.state, self._hyper(), options, scale)
        check_scalars(others.state, others._op)
        before = dict(others.state)
        part = tree.part(parts.others, parts.others_layout.made)
        updated = others._take_step(part, parameters, of_others, grad_scale, measured)
        leaves = dict(zip(parts.others, updated, strict=True))
        try:
            part = tree.part(parts.own, parts.own_layout.made)
            updated = super()._take_step(part, parameters, options, grad_scale, measured)
        except BaseException:  # then nothing has been changed
            others._replace_state(before)
            raise
        leaves.update(zip(parts.own, updated, strict=True))
        return tree.unflatten([leaves[number] for number in range(len(tree))])

    def _parts_of(self, tree: _ext.Tree) -> _Parts:
        layout, takes = layout_of(tree), self.others_filter or _is_no_matrix
        found = self._parts.find(layout.key)
        if found is not None and found.takes is takes:
            return found
        rows, own, others = layout.tensors, list[int](), list[int]()
        for number, (row, array) in enumerate(zip(rows, tree.parameters, strict=True)):
            (others if takes(name_of(row[0]), array) else own).append(number)
        layouts = [layout_of_rows([rows[i] for i in numbers]) for numbers in (own, others)]
        return self._parts.keep(layout.key, _Parts(takes, own, layouts[0], others, layouts[1]))

    def _options_of(self, others: FusedOptimizer) -> Options:
        """Its own, and those that all tensors share."""
        known = self._of_others
        if known is None or known[0] is not self._options or known[1] is not others._options:
            shared = {name: getattr(self._options, name) for name in SHARED}
            known = self._options, others._options, others._options._replace(**shared)
            self._of_others = known
        return known[2]

    def _joined(self) -> FusedOptimizer | None:
        """The other optimizer, whose state is a part of this one: the one that somebody has put
        in, if there is one."""
        others = self.others
        _check_others(self._op, others, self.others_filter)
        state: dict[str, Any] = self._state
        if not isinstance(state, dict):  # which every step refuses
            return others
        given = state.get(OTHERS)
        if others is None:
            if given is not None:
                raise ValueError(
                    f"[{self._op}] the state is of an optimizer with others: got {OTHERS!r}, "
                    "allowed a state without, or others=... as it was."
                )
        elif given is not others._state:
            if given is not None:
                others.state = given
            state[OTHERS] = others._state
        return others

    def _replace_state(self, state: dict[str, Any]) -> None:
        super()._replace_state(state)
        if self.others is not None:
            own: dict[str, Any] = self._state
            own[OTHERS] = self.others._state

    # ---- What every optimizer has, of all tensors ---------------------------------

    def init(self, parameters: Any) -> None:
        others = self._joined()
        if others is None or self._is_single:
            super().init(parameters)
            return
        tree, options = _ext.Tree(parameters, parameters, self._op), self._options_of(others)
        parts = self._parts_of(tree)
        part = tree.part(parts.others, parts.others_layout.made)
        others._begin_state(part, parameters, options)
        part = tree.part(parts.own, parts.own_layout.made)
        self._begin_state(part, parameters, self._options)

    def unpacked_state(self) -> dict[str, Any]:
        others, state = self._joined(), super().unpacked_state()
        return state if others is None else {**state, OTHERS: others.unpacked_state()}

    def forget(self, *slots: str) -> None:
        others = self._joined()
        theirs = [] if others is None else [name for name in slots if name in others._rule.slots]
        super().forget(*(s for s in slots if s in self._rule.slots or s not in theirs))
        if others is not None:
            others.forget(*theirs)

    def keep_only(self, parameters: Any) -> None:
        others = self._joined()
        super().keep_only(parameters)
        if others is not None:
            others.keep_only(parameters)

    def _states(self) -> list[tuple[dict[str, Any], Slots]]:
        others = self._joined()
        return [*super()._states(), *([] if others is None else others._states())]

    def _beyond_mlx(self) -> dict[str, Any]:
        own = {
            name: value
            for name, default in self._defaults.items()
            if name not in self._of_mlx
            for value in (getattr(self, name),)
            if type(value) is not type(default) or value != default
        }
        return {**own, **super()._beyond_mlx()}

    def _changes(self, name: str, value: Any) -> bool:
        own = name in self._defaults and name not in self._names()
        return getattr(self, name) is not value if own else super()._changes(name, value)

    def __setstate__(self, attributes: dict[str, Any]) -> None:
        import copy  # here: nobody else needs it

        super().__setstate__(attributes)
        self.others = copy.copy(self.others)  # of copy.copy: not both of one


def _is_no_matrix(path: str, array: mx.array) -> bool:
    return array.ndim < 2


def _check_others(op: str, others: Any, takes: Any) -> None:
    """Raise unless it is an optimizer that can step tensors of another one."""
    if takes is not None and not callable(takes):
        raise TypeError(
            f"[{op}] others_filter cannot be called: got {type(takes).__name__}, allowed a "
            "function of path and array, or None."
        )
    if others is None:
        if takes is not None:
            raise ValueError(
                f"[{op}] others_filter chooses tensors for another optimizer: got none, allowed "
                "others=..., such as AdamW(learning_rate=1e-3)."
            )
        return
    if not isinstance(others, FusedOptimizer) or isinstance(others, Muon) or others._is_single:
        raise TypeError(
            f"[{op}] others is of the wrong type: got {type(others).__name__}, allowed None or an "
            "optimizer of mlx_fused_optim, no second Muon and none that steps tensor by tensor."
        )
    beyond = [name for name in others._beyond_mlx() if name in SHARED]
    if others._options.groups.added_flags & _ext.FLAGS["trust_ratio"]:
        beyond.append("trust_coefficient")
    if beyond:
        raise ValueError(
            f"[{op}] others has options that all tensors share: got {', '.join(beyond)}, allowed "
            f"{', '.join(OWN_OF_OTHERS)}; and the others of {op} itself."
        )
