"""Programs written for ``mlx.optimizers``, with the optimizers of this package, unchanged::

    python -m mlx_fused_optim.accel --report train.py --epochs 3

or, within a program, ``mlx_fused_optim.install()``. Nothing is renamed and no module is
searched: the classes of ``mlx.optimizers`` stay what they are, under every name that a
program has for them, and what they construct is an optimizer of ours. That is an instance of the
class that was called, too.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Iterator
from types import CodeType
from typing import TYPE_CHECKING, Any

import mlx.optimizers

from .. import optimizers
from ..optimizers import FusedOptimizer

if TYPE_CHECKING:
    from .report import Report

__all__ = ["install", "uninstall"]

_installed = False
_report: Report | None = None


class _StandIn(FusedOptimizer):
    # Mixed into a class of ours. A step that ours refuses, MLX's class takes.

    _mlx: type[mlx.optimizers.Optimizer]
    _named: type[mlx.optimizers.Optimizer]  # what the program has called: that, or its subclass

    def init(self, parameters: Any) -> None:
        try:
            super().init(parameters)
        except (TypeError, ValueError) as error:
            _hand_over(self, error).init(self, parameters)

    def apply_gradients(self, gradients: Any, parameters: Any, **options: Any) -> Any:
        try:
            updated = super().apply_gradients(gradients, parameters, **options)
        except (TypeError, ValueError) as error:
            if options:
                raise
            return _hand_over(self, error).apply_gradients(self, gradients, parameters)
        if _report is not None:
            _report.stepped(self, updated)
        return updated

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        # Python's own would look for the class by its name, and find the program's.
        return _blank, (self._named,), vars(self)


def _blank(named: type[Any]) -> Any:
    kind = _kind_for(named)
    return object.__new__(kind if isinstance(kind, type) else named)


def _hand_over(optimizer: _StandIn, error: Exception) -> type[mlx.optimizers.Optimizer]:
    """Make it an optimizer of the class of MLX that it stands for, which is returned, with its
    numbers and its state; or raise the error, if that has no such options. The dict of the
    state stays: mx.compile may have captured it."""
    try:
        optimizer._check_single()
    except ValueError:
        raise error from None
    kind, own = optimizer._mlx, vars(optimizer)
    theirs = object.__new__(kind)
    _INITS[kind](theirs, **{name: optimizer._given(name) for name in _ARGUMENTS[kind]})
    kept = {name: own[name] for name in ("_state", "_schedulers")}
    values = optimizer.unpacked_state()
    optimizer.__class__ = optimizer._named  # type: ignore[assignment]
    own.update(vars(theirs) | kept)
    kept["_state"].clear()
    kept["_state"].update(values)
    _explain(optimizer, str(error))
    return kind


def _explain(optimizer: Any, why: str) -> None:
    if _report is not None:
        _report.reasons[optimizer] = why


def _watched(self: Any, gradients: Any, parameters: Any) -> Any:
    """In place of MLX's apply_gradients, where there is a report."""
    updated = _APPLY(self, gradients, parameters)
    if _report is not None:
        _report.stepped(self, updated)
    return updated


# ---- Which class for which --------------------------------------------------------------


def _stand_in(ours: type[FusedOptimizer]) -> tuple[type[Any], type[_StandIn]]:
    theirs = getattr(mlx.optimizers, ours.__name__)
    names = {"_mlx": theirs, "_named": theirs, "__module__": __name__}
    return theirs, type(ours.__name__, (_StandIn, ours), names)


def _step_of(theirs: type) -> list[Any]:
    """The functions that take a step of a class of MLX."""
    names = ("init", "init_single", "apply_single", "apply_gradients", "update")
    functions = [getattr(theirs, name) for name in names]
    return [_APPLY if function is _watched else function for function in functions]


_BASE: Any = mlx.optimizers.Optimizer
_APPLY = _BASE.apply_gradients
_STAND_INS: dict[Any, type[_StandIn]] = dict(
    _stand_in(ours)
    for ours in map(vars(optimizers).__getitem__, optimizers.__all__)
    if isinstance(ours, type) and "_op" in vars(ours)
)
_INITS = {theirs: theirs.__init__ for theirs in _STAND_INS}
_ARGUMENTS = {theirs: tuple(inspect.signature(theirs).parameters) for theirs in _STAND_INS}
_STEPS = {theirs: _step_of(theirs) for theirs in _STAND_INS}
_hooks: dict[Any, Any] = {}


def _kind_for(named: type) -> type[_StandIn] | str:
    """The class of ours for a class that derives from one of MLX's; or why there is none."""
    theirs = next(base for base in named.__mro__ if base in _STAND_INS)
    if _step_of(theirs) != _STEPS[theirs]:
        return f"the program has changed mlx.optimizers.{theirs.__name__} itself"
    return _STAND_INS[theirs] if named is theirs else _derived(named, theirs)


@functools.cache
def _derived(named: Any, theirs: Any) -> type[_StandIn] | str:
    """For a subclass of the program's own, unless it has to do with how a step is taken."""
    stand_in = _STAND_INS[theirs]
    arguments = set(_ARGUMENTS[theirs])
    # Names that a step of MLX calls for each tensor, and those that ours have beside MLX's.
    special = {"init_single", "apply_single"} | set(dir(stand_in)).difference(dir(theirs))
    bases = [base for base in named.__mro__ if base not in theirs.__mro__]
    defined = {name for base in bases for name in vars(base) if name[:2] != "__"}
    used = {name for base in bases for code in _codes(base) for name in _names(code)}
    clash = defined & (special | arguments | {"state", "step"}) | used & (special - arguments)
    if clash:
        return f"{named.__name__} has a part in how a step is taken ({', '.join(sorted(clash))})"
    names = {"_named": named, "__module__": named.__module__, "__qualname__": named.__qualname__}
    try:
        return type(named.__name__, (named, stand_in), names)
    except Exception as error:  # of a metaclass, or of its own __init_subclass__
        return f"no class can be derived from {named.__name__} ({error})"


def _codes(base: type) -> Iterator[CodeType]:
    for value in vars(base).values():
        inner = (getattr(value, name, None) for name in ("__func__", "__wrapped__", "fget", "fset"))
        for function in (value, *inner):
            if isinstance(code := getattr(function, "__code__", None), CodeType):
                yield code


def _names(code: CodeType) -> Iterator[str]:
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _names(constant)


# ---- Installed --------------------------------------------------------------------------


def _hook(theirs: Any, stand_in: Any) -> Any:
    """The constructor of a class of MLX, which makes ours of the object that it is given."""
    init = theirs.__init__

    @functools.wraps(init)
    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:
        named, make = type(self), init
        if isinstance(self, stand_in):  # called once more
            make = stand_in.__init__
        is_first = theirs is next((base for base in named.__mro__ if base in _STAND_INS), None)
        if not _installed or not is_first or isinstance(self, FusedOptimizer):
            make(self, *args, **kwargs)
            return
        kind = _kind_for(named)
        if isinstance(kind, type):
            before = dict(vars(self))
            try:
                self.__class__ = kind
                stand_in.__init__(self, *args, **kwargs)
                return
            except (TypeError, ValueError) as error:
                self.__class__ = named
                vars(self).clear()
                vars(self).update(before)
                if not kwargs.keys() <= set(_ARGUMENTS[theirs]):
                    raise  # an option of ours, which MLX's class knows nothing about
                kind = str(error)
        init(self, *args, **kwargs)
        _explain(self, kind)

    return __init__


def install(*, report: bool = False) -> None:
    """From now on, construct ours where a program constructs an optimizer of ``mlx.optimizers``.

    All references to the classes count, also those from before. What is constructed is an
    instance of the class of ``mlx.optimizers`` (or of the subclass) that was called. Its
    schedules are evaluated in the kernel where the functions of ``mlx.optimizers.schedulers``
    made them. MLX's own is constructed

    - where there is no kernel (``Adafactor``),
    - for a subclass that overrides ``apply_single`` or ``init_single``, or has attributes with
      names of our options,
    - with arguments that ours refuses; and an optimizer becomes MLX's own, with its state, at a
      step that ours refuses.

    Calling it again changes nothing. Optimizers that are there already stay what they are.

    Args:
        report (bool): At the end of the process, say on stderr what was replaced, how
            often it stepped and its share of the time, and what was not replaced and why.
            Default: ``False``.

    Example:
        >>> import mlx.optimizers
        >>> import mlx_fused_optim
        >>> mlx_fused_optim.install()
        >>> optimizer = mlx.optimizers.SGD(learning_rate=0.1)
        >>> isinstance(optimizer, mlx_fused_optim.SGD), isinstance(optimizer, mlx.optimizers.SGD)
        (True, True)
        >>> mlx_fused_optim.uninstall()
        >>> isinstance(mlx.optimizers.SGD(learning_rate=0.1), mlx_fused_optim.SGD)
        False
    """
    global _installed, _report
    if not _installed:
        for theirs, stand_in in _STAND_INS.items():
            theirs.__init__ = _hooks[theirs] = _hook(theirs, stand_in)
        _installed = True
    if report:
        from .report import Report

        _report = _report or Report()
        _BASE.apply_gradients = _watched


def uninstall() -> None:
    """Undo :func:`install`: the classes of ``mlx.optimizers`` construct what they did before.

    Optimizers of ours that are there already stay what they are, and are reported on if that was
    asked for. Without :func:`install` nothing is changed.
    """
    global _installed
    _installed = False
    for theirs, hook in _hooks.items():
        if theirs.__init__ is hook:  # and nothing that the program has put around it
            theirs.__init__ = hook.__wrapped__
    if _BASE.apply_gradients is _watched:
        _BASE.apply_gradients = _APPLY
    _hooks.clear()
