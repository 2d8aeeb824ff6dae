"""What every optimizer takes beyond mlx.optimizers. One truth for names, types, checks and
words, for the optimizers and the functions."""

from __future__ import annotations

import math
from functools import cached_property
from typing import Any, Literal, NamedTuple, TypedDict

import mlx.core as mx

from . import _ext
from ._bytes import BYTES, LEAST_SIZE
from ._checks import (
    LearningRate,
    checked_flag,
    checked_number,
    checked_positive,
    checked_scalar,
)
from ._dtypes import DTYPES, dtype_name
from ._groups import NO_GROUPS, GroupList, Groups, checked_groups
from ._masters import MASTER24
from ._rules import Rule
from .schedules._checks import LARGEST_UINT64, as_choice, as_integer
from .schedules._of_mlx import as_ours

# Below it the reciprocal is beyond float32.
SMALLEST_SCALE = 2.0**-126


class StepOptions(TypedDict, total=False):
    """The keyword arguments that every optimizer and every function takes."""

    state_dtype: mx.Dtype | Literal["8bit"] | None
    min_8bit_size: int
    master_weights: bool | Literal["24bit"]
    rounding: str
    compensated: bool
    seed: int
    clip_norm: float | None
    clip_value: float | None
    grad_scale: LearningRate
    skip_nonfinite: bool
    decoupled: bool
    maximize: bool
    groups: GroupList
    trust_coefficient: float | None
    ema_decay: float | None


# Their part of every docstring: what the frame does around the rule, and the arguments.
FRAME = r"""Arithmetic is float32 and is rounded once, to the parameter's dtype (float32, float16
    or bfloat16), which a parameter always keeps.

    The keyword arguments add what training needs around that, in the same kernel. Before
    the rule sees it, and before a coupled :math:`\lambda w` is added, the gradient is

    .. math::

        g \leftarrow c \, \mathrm{clip}(\pm g / s, -b, b), \quad
        c = \min\left(1, \frac{C}{\lVert g \rVert + 10^{-6}}\right)

    with ``maximize`` (:math:`-g`), ``grad_scale`` :math:`s`, ``clip_value`` :math:`b` and
    ``clip_norm`` :math:`C`, where :math:`\lVert g \rVert` is the norm of all unscaled and by
    value clipped gradients together. After it, ``trust_coefficient`` :math:`\kappa` multiplies
    the gradient of each tensor by :math:`\kappa \lVert w \rVert / (\lVert g \rVert + \lambda
    \lVert w \rVert)` of that tensor (LARS; without :math:`\lambda \lVert w \rVert` where the weight
    decay is ``decoupled``), or by 1 where a norm is 0 or the ratio beyond float32. A norm is
    infinite only where it is beyond float32, whatever its squares are; its relative error is
    below :math:`7.5 \cdot 10^{-7}`.

    ``state`` is a tree of arrays for ``mx.compile`` and ``mx.save_safetensors``; a state
    of the class in ``mlx.optimizers`` can be assigned to it or put into it with ``update``,
    and :meth:`unpacked_state` gives that layout back; :func:`describe` says what a state has.
    Every number may be a :class:`Schedule`, which the kernel evaluates, or any other callable,
    which gets the step and returns a scalar; ``state["weight_decay"]`` and the like are there
    when they are scheduled, with the value that the last step used.

    **Compiled steps.** A function that ``mx.compile`` traces keeps every option as it was
    at the trace: numbers, truth values, groups and arrays that an option is given. It sees
    what is in the captured ``state``, such as ``learning_rate``, which may be set between
    two steps. Setting another option after a trace warns: define and compile the function
    anew then (MLX knows a function that it has compiled once), or let the option be a
    function of the step that returns an array among the captured inputs. ``state`` has to be
    among the captured inputs and outputs of a step, unless no number depends on the step and
    nothing is kept: then, as with ``mlx.optimizers``, the model's is enough."""
PARTS = {
    "{frame}": FRAME,
    "{learning_rate}": r"""learning_rate (float, array, Schedule or callable): The learning rate
            :math:`\eta_t`. A :class:`Schedule` is evaluated in the kernel; any other
            callable gets the step and returns a scalar.""",
    "{betas}": r"""betas (pair): The factors :math:`(\beta_1, \beta_2)` of the moving averages, each
            from 0 to below 1; each may be scheduled.""",
    "{raises}": """Raises:
        ValueError, TypeError: An option makes no sense; at a step: trees, shapes, dtypes,
            groups or state do not fit. Nothing has been changed then.""",
}
WORDS = """state_dtype (Dtype or str): float32, float16 or bfloat16, of what the rule keeps.
            Default: {state_dtype}. Not float16 for a second moment: with ``beta2`` 0.999
            one of gradients below 5e-3 stays 0, and steps are up to 30 times too large.
            ``"8bit"``: a byte each, and a float32 scale for 64 neighbours; steps are computed
            in float32, and what they keep is, to nearest, within 1/127 of its group's
            largest magnitude, mostly far closer.
        min_8bit_size (int): Tensors of fewer elements keep float32 with ``"8bit"``.
            Default: ``4096``.
        master_weights (bool or str): Keep a float32 copy of every parameter of a half type and
            update that; the parameter is its rounding. 4 bytes a parameter. A parameter that
            is set from outside replaces its master. With ``"24bit"`` a bfloat16 parameter
            is the upper part of its master, and 1 byte keeps the next eight bits: updates
            count from :math:`2^{{-16}}` of the parameter on, and with stochastic rounding
            smaller ones in the mean. Not for float16. Default: ``False``.
        rounding (str): ``"nearest"``, or ``"stochastic"``: up or down at random, with the
            right mean. It rounds what half types have no other record of: what the rule
            keeps, and the parameter unless it has a compensation or a master, of which
            it rounds one of 24 bits.
            Default: ``"nearest"``.
        compensated (bool): Keep what each rounding of a parameter of a half type has lost
            and add it to the next update (Kahan). 2 bytes a parameter. Default: ``False``.
        seed (int): Of the stochastic rounding, with the step and the place; 0 to
            :math:`2^{{64}} - 1`. Default: ``0``.
        clip_norm (float): The largest global norm :math:`C`, over the gradients of one call:
            in a ``MultiOptimizer``, each optimizer has the norm of its own. ``inf`` measures
            the norm and clips nothing. Not for parts of tensors, as ``mlx.nn.fully_shard``
            makes them: every process would clip by its own. Default: ``None``.
        clip_value (float): The largest magnitude :math:`b` of an element. Default: ``None``.
        grad_scale (float, array, Schedule or callable): What the loss, and so the gradients,
            were multiplied with: :math:`s`. An array that changes goes to ``update``.
            Gradients of a scale that cannot be inverted (an array of less than
            :math:`2^{{-126}}`, infinite or NaN) are NaN. Default: ``1.0``.
        skip_nonfinite (bool): Leave the parameters and all that is kept of them as they are
            where a gradient, as given or unscaled, or the norm to be clipped, is infinite or
            NaN, also one that is then clipped by value; ``step`` does not count then,
            ``skipped`` does. ``grad_norm`` and scheduled values in the state are
            those of the step that was skipped. Default: ``False``.
        decoupled (bool): Weight decay apart from the gradient and from what is kept of it:
            :math:`w \\leftarrow (1 - \\eta_t \\lambda) w` before the update.
            Default: ``{decoupled}``.
        maximize (bool): Climb instead of descending. Default: ``False``.
        groups (list): ``[(predicate, overrides), ...]``: tensors with other numbers. The
            first group whose ``predicate(path, array)`` is true for a parameter takes it.
            ``overrides`` is a dict of ``learning_rate`` (in place of the optimizer's),
            ``learning_rate_factor`` (times the optimizer's), {scalars}
            ``weight_decay`` (each a number or scheduled), ``trust_coefficient`` (a float or
            ``None``). A constant 0 of momentum or weight decay, or ``None``, leaves the term
            out. Predicates are called once for a set of tensors; each must take a tensor of the
            first tree of parameters. Default: ``()``.
        trust_coefficient (float): LARS's :math:`\\kappa`, for SGD only; needs a weight decay of 0
            or more. Default: ``None``, no ratio.
        ema_decay (float): Keep a moving average of the parameters in float32,
            :math:`a \\leftarrow a + (1 - d)(w - a)`, from 0 to below 1;
            see :meth:`ema_parameters`. 4 bytes a parameter. Default: ``None``."""


class _Fields(NamedTuple):
    state_dtype: mx.Dtype | Literal["8bit"] | None = None
    min_8bit_size: int = LEAST_SIZE
    master_weights: bool | Literal["24bit"] = False
    rounding: str = "nearest"
    compensated: bool = False
    seed: int = 0
    clip_norm: float | None = None
    clip_value: float | None = None
    grad_scale: LearningRate = 1.0
    skip_nonfinite: bool = False
    decoupled: bool = False
    maximize: bool = False
    groups: Groups = NO_GROUPS
    trust_coefficient: float | None = None
    ema_decay: float | None = None


class Options(_Fields):
    """Checked options; without arguments nothing beyond mlx.optimizers."""

    def __reduce__(self) -> tuple[Any, ...]:
        """Copied and pickled with the name of a dtype, which itself cannot be."""
        dtype, *others = self
        name = dtype_name(dtype) if isinstance(dtype, mx.Dtype) else dtype
        return _copied, (name, *others)

    @cached_property
    def flags(self) -> int:
        """Bits of _ext.FLAGS, but for grad_scale, which a step may be given, and for the terms
        that only groups have."""
        present = {
            "maximize": self.maximize,
            "clip_value": self.clip_value is not None,
            # Infinite: told, and nothing is clipped.
            "clip_norm": self.clip_norm not in (None, math.inf),
            "measure_norm": self.clip_norm == math.inf,
            "skip_nonfinite": self.skip_nonfinite,
            "trust_ratio": self.trust_coefficient is not None,
            "groups": bool(self.groups.members),
            "decoupled": self.decoupled,
            "master_weights": bool(self.master_weights),
            "compensated": self.compensated or self.has_master24,  # both: the kernel's word for it
            "stochastic": self.rounding == "stochastic",
            "ema": self.ema_decay is not None,
        }
        return sum(_ext.FLAGS[name] for name, is_on in present.items() if is_on)

    @property
    def least_of_bytes(self) -> int:
        """Tensors of fewer elements have arenas of their own; 0 where nothing is in bytes."""
        return self.min_8bit_size if self.state_dtype == BYTES else 0

    @property
    def has_master24(self) -> bool:
        return self.master_weights == MASTER24

    @cached_property
    def is_measured(self) -> bool:
        """Whether a step needs the norms of the gradients first."""
        names = ("clip_norm", "measure_norm", "skip_nonfinite", "trust_ratio")
        flags = self.flags | self.groups.added_flags
        return bool(flags & sum(_ext.FLAGS[name] for name in names))

    @cached_property
    def slots(self) -> tuple[str, ...]:
        """What the state keeps besides the rule's own, in the order of FRAME_SLOTS."""
        kept = {
            "master": bool(self.master_weights),
            "compensation": self.compensated,
            "ema": self.ema_decay is not None,
        }
        return tuple(name for name, is_on in kept.items() if is_on)


def _copied(dtype: Any, *others: Any) -> Options:
    return Options(DTYPES.get(dtype, dtype), *others)


def checked_options(op: str, rule: Rule, **options: Any) -> Options:
    """Options that make sense, or ValueError or TypeError."""
    given = Options(**options)
    dtype = given.state_dtype
    if dtype is not None and (
        dtype != BYTES if isinstance(dtype, str) else dtype not in DTYPES.values()
    ):
        raise ValueError(
            f"[{op}] state_dtype is unknown: got {dtype!r}, allowed None, "
            f"{', '.join('mlx.core.' + name for name in DTYPES)}, '{BYTES}'."
        )
    master_weights = _checked_masters(op, given.master_weights)
    compensated = checked_flag(op, "compensated", given.compensated)
    if master_weights and compensated:
        raise ValueError(
            f"[{op}] master_weights and compensated both keep what rounding loses: got both, "
            "allowed one of them."
        )
    clip_norm = given.clip_norm
    if clip_norm is not None:
        clip_norm = checked_positive(op, "clip_norm", clip_norm, infinite=True)
    clip_value = given.clip_value
    if clip_value is not None:
        clip_value = checked_positive(op, "clip_value", clip_value, infinite=True)
    trust_coefficient = given.trust_coefficient
    if trust_coefficient is not None:
        if rule.name != "sgd":
            raise ValueError(
                f"[{op}] trust_coefficient is LARS's, which is of SGD: got {trust_coefficient}, "
                "allowed None."
            )
        trust_coefficient = checked_positive(op, "trust_coefficient", trust_coefficient)
    return Options(
        state_dtype=dtype,
        min_8bit_size=as_integer(
            op, "min_8bit_size", given.min_8bit_size, at_least=0, at_most=2**63 - 1
        ),
        master_weights=master_weights,
        rounding=as_choice(op, "rounding", given.rounding, ("nearest", "stochastic")),
        compensated=compensated,
        seed=as_integer(op, "seed", given.seed, at_least=0, at_most=LARGEST_UINT64),
        clip_norm=clip_norm,
        clip_value=clip_value,
        grad_scale=checked_scale(op, given.grad_scale),
        skip_nonfinite=checked_flag(op, "skip_nonfinite", given.skip_nonfinite),
        decoupled=checked_flag(op, "decoupled", given.decoupled),
        maximize=checked_flag(op, "maximize", given.maximize),
        groups=checked_groups(op, rule, given.groups),
        trust_coefficient=trust_coefficient,
        ema_decay=_checked_decay(op, given.ema_decay),
    )


def checked_scale(op: str, value: Any) -> LearningRate:
    """What gradients were multiplied with: a float, a scalar array or a callable."""
    if callable(value):
        return as_ours(value)
    if isinstance(value, mx.array):
        return checked_scalar(op, "grad_scale", value)
    checked_number(op, "grad_scale", value, "a float, a scalar array, a schedule or a callable")
    return checked_positive(op, "grad_scale", value, at_least=SMALLEST_SCALE)


def _checked_masters(op: str, value: Any) -> Any:
    if isinstance(value, str):
        if value != MASTER24:
            raise ValueError(
                f"[{op}] master_weights is unknown: got {value!r}, allowed True, False, "
                f"'{MASTER24}'."
            )
        return value
    return checked_flag(op, "master_weights", value)


def _checked_decay(op: str, value: Any) -> float | None:
    if value is None:
        return None
    number = checked_number(op, "ema_decay", value, "a float or None")
    if not 0 <= number < 1:
        stays = ", at which an average never moves" if number == 1 else ""
        raise ValueError(f"[{op}] ema_decay is out of range: got {number}{stays}, allowed 0 to <1.")
    return number
