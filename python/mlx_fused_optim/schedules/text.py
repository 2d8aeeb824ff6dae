"""Schedules written as text, as on a command line."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ._schedule import Schedule

if TYPE_CHECKING:
    import ast

_OP = "parse_schedule"
_NAMES = (
    "constant",
    "cosine_decay",
    "cosine_restarts",
    "exponential_decay",
    "inverse_sqrt",
    "join_schedules",
    "linear_schedule",
    "multi_step",
    "one_cycle",
    "polynomial_decay",
    "scaled",
    "step_decay",
    "triangular",
    "warmup",
    "warmup_stable_decay",
)
# Longer or deeper text is no schedule, and could exhaust the parser.
_LONGEST = 10_000
_DEEPEST = 50


def parse_schedule(text: str) -> Schedule:
    """A schedule from the text of its call, without running any code.

    Args:
        text (str): Calls of this module's functions, whose arguments are numbers, strings,
            ``None``, lists, or such calls. A number alone is ``constant(number)``.

    Returns:
        Schedule: What the call returns.

    Raises:
        ValueError: The text is anything else, or a function refuses its arguments.

    Example:
        >>> parse_schedule("warmup(cosine_decay(1e-1, 1000), 100)")
        warmup(cosine_decay(0.1, 1000), 100)
        >>> parse_schedule("0.5")
        constant(0.5)
    """
    import ast

    if not isinstance(text, str):
        raise TypeError(f"[{_OP}] text must be a string: got {type(text).__name__}, allowed a str.")
    if len(text) > _LONGEST:
        raise ValueError(
            f"[{_OP}] the text is too long: got {len(text)} characters, allowed {_LONGEST}."
        )
    try:
        tree = ast.parse(text.strip(), mode="eval")
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        raise ValueError(
            f"[{_OP}] the text cannot be read: got {_shortened(text)} ({error}), allowed a call "
            "such as cosine_decay(0.1, 1000)."
        ) from None
    value = _value(tree.body, 0)
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        from .decays import constant

        return constant(value)
    if not isinstance(value, Schedule):
        raise ValueError(
            f"[{_OP}] the text is no schedule: got {_shortened(text)}, allowed a call such as "
            "cosine_decay(0.1, 1000), or a number."
        )
    return value


def _value(node: ast.expr, depth: int) -> Any:
    """The value of a node; whatever is not listed here is refused."""
    import ast

    if depth > _DEEPEST:
        raise ValueError(f"[{_OP}] the text is nested too deep: allowed {_DEEPEST} levels.")
    if isinstance(node, ast.Constant) and isinstance(node.value, (int, float, str, type(None))):
        return node.value
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, (ast.USub, ast.UAdd)):
        number = _value(node.operand, depth + 1)
        if isinstance(number, (int, float)):
            return -number if isinstance(node.op, ast.USub) else number
    if isinstance(node, (ast.List, ast.Tuple)):
        return [_value(item, depth + 1) for item in node.elts]
    if isinstance(node, ast.Call):
        return _called(node, depth)
    raise ValueError(
        f"[{_OP}] an expression is not allowed: got {_shortened(ast.unparse(node))}, allowed "
        "calls of schedules, numbers, strings, None and lists."
    )


def _called(node: ast.Call, depth: int) -> Schedule:
    import ast

    from .. import schedules

    if not isinstance(node.func, ast.Name) or node.func.id not in _NAMES:
        raise ValueError(
            f"[{_OP}] a function is unknown: got {_shortened(ast.unparse(node.func))}, allowed "
            f"{', '.join(_NAMES)}."
        )
    positional = [_value(argument, depth + 1) for argument in node.args]
    named: dict[str, Any] = {}
    for keyword in node.keywords:
        if keyword.arg is None:
            raise ValueError(f"[{_OP}] ** is not allowed: write the arguments one by one.")
        named[keyword.arg] = _value(keyword.value, depth + 1)
    try:
        schedule: Schedule = getattr(schedules, node.func.id)(*positional, **named)
    except TypeError as error:
        raise ValueError(f"[{_OP}] {node.func.id} cannot be called so: {error}") from None
    return schedule


def _shortened(text: str) -> str:
    return repr(text if len(text) <= 60 else text[:57] + "...")
