"""The stub of the compiled extension says what the extension has, no more and no less.

nanobind keeps each function's signature as Python source. Signatures are compared as
syntax trees; a stub may say more than the extension only where that says just
``object``, ``list`` or ``tuple``.
"""

import ast
import re
from pathlib import Path

import mlx_fused_optim
import pytest
from mlx_fused_optim import _ext

STUB = ast.parse((Path(mlx_fused_optim.__file__).parent / "_ext.pyi").read_text())
VAGUE = ("list", "tuple")


def functions_of(body):
    """Name -> definitions (more than one where overloaded)."""
    found = {}
    for node in body:
        if isinstance(node, ast.FunctionDef):
            found.setdefault(node.name, []).append(node)
    return found


CLASSES = {node.name: functions_of(node.body) for node in STUB.body if type(node) is ast.ClassDef}
FUNCTIONS = functions_of(STUB.body)
CONSTANTS = {
    node.target.id: ast.unparse(node.annotation).partition("[")[0]
    for node in STUB.body
    if isinstance(node, ast.AnnAssign)
}
# Those of every nanobind type, which are not ours to declare.
GENERIC = set(dir(type("Plain", (), {}))) - {"__init__"}


def runtime_definitions(function):
    if isinstance(function, property):
        function = function.fget
    for signature, *_ in function.__nb_signature__:
        # A property's getter has no name; \0 stands for the first default value, and so on.
        source = re.sub(r"\\\d+", "DEFAULT", signature.replace("def (", "def getter("))
        yield ast.parse(source + ": ...").body[0]


def spelled(annotation):
    if annotation is None:
        return "None"
    text = ast.unparse(annotation)
    for prefix, short in (("mlx.core.", "mx."), ("mlx_fused_optim._ext.", "")):
        text = text.replace(prefix, short)
    return text.replace("collections.abc.", "")


def parameters(definition):
    """[(name, kind, has a default, annotation), ...]"""
    args = definition.args
    positional = [(a, "positional only") for a in args.posonlyargs]
    positional += [(a, "positional") for a in args.args]
    defaults = [False] * (len(positional) - len(args.defaults)) + [True] * len(args.defaults)
    rows = [(*row, default) for row, default in zip(positional, defaults, strict=True)]
    keyword_defaults = zip(args.kwonlyargs, args.kw_defaults, strict=True)
    rows += [(a, "keyword only", default is not None) for a, default in keyword_defaults]
    # Python counts a method's self as positional only where the next one is.
    return [
        (a.arg, "positional" if a.arg == "self" else kind, default, a.annotation)
        for a, kind, default in rows
    ]


def same_type(stub, runtime):
    stub, runtime = spelled(stub), spelled(runtime)
    return stub == runtime or (
        runtime in VAGUE and (runtime == "object" or stub.startswith(runtime))
    )


def check(stubs, function):
    runtimes = list(runtime_definitions(function))
    assert len(stubs) == len(runtimes), "number of overloads"
    for stub, runtime in zip(stubs, runtimes, strict=True):
        got, expected = parameters(stub), parameters(runtime)
        assert [row[:3] for row in got] == [row[:3] for row in expected]
        for (name, _, _, a), (_, _, _, b) in zip(got, expected, strict=True):
            if name != "self":
                assert same_type(a, b), f"{name}: {spelled(a)} instead of {spelled(b)}"
        assert same_type(stub.returns, runtime.returns), ast.unparse(runtime)


def public(module):
    return {name for name in dir(module) if not name.startswith("__")}


def test_the_same_names():
    assert set(CLASSES) | set(FUNCTIONS) | set(CONSTANTS) == public(_ext)


@pytest.mark.parametrize("name", sorted(CONSTANTS))
def test_constant(name):
    assert type(getattr(_ext, name)).__name__ == CONSTANTS[name]


@pytest.mark.parametrize("name", sorted(FUNCTIONS))
def test_function(name):
    check(FUNCTIONS[name], getattr(_ext, name))


@pytest.mark.parametrize("name", sorted(CLASSES))
def test_class(name):
    cls = getattr(_ext, name)
    members = {
        member
        for member in set(dir(cls)) - GENERIC
        # A class that only the extension makes has no __init__ of its own.
        if hasattr(getattr(cls, member), "__nb_signature__")
        or isinstance(getattr(cls, member), property)
    }
    assert set(CLASSES[name]) == members
    for member in members:
        check(CLASSES[name][member], getattr(cls, member))
