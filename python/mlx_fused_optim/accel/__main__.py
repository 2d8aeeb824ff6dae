"""``python -m mlx_fused_optim.accel [--report] script.py args...`` or ``... -m module args...``:
run a program as ``python`` does, with the optimizers of this package in place of MLX's."""

from __future__ import annotations

import builtins
import os
import runpy
import sys
import zipfile
from importlib.machinery import SourceFileLoader
from types import ModuleType, TracebackType

from . import install

USAGE = """\
usage: python -m mlx_fused_optim.accel [--report] (script.py | -m module) [argument ...]

Run a program that uses mlx.optimizers with the fused optimizers in their place, unchanged.

  --report  at the end, say on stderr what was replaced, how often it stepped and its
            share of the time, and what was not replaced and why
"""


def main(arguments: list[str]) -> int:
    """Run the program that is named; its SystemExit and its last exception are raised. What is
    returned is the exit code of a command line that names none."""
    report = arguments[:1] == ["--report"]
    given = arguments[report:]
    if given[:1] in (["-h"], ["--help"]):
        print(USAGE, end="")
        return 0
    is_module = given[:1] == ["-m"]
    given = given[is_module:]
    wrong = None
    if not given:
        wrong = "nothing to run: got no name"
    elif given[0].startswith("-"):
        wrong = f"an unknown option: got {given[0]}"
    elif not is_module and not os.path.exists(given[0]):
        wrong = f"the script does not exist: got {given[0]}"
    if wrong:
        allowed = "allowed [--report] script.py or [--report] -m module, and its arguments"
        print(f"[accel] {wrong}, {allowed}.", file=sys.stderr)
        return 2
    install(report=report)
    # The program's names are not among ours.
    sys.modules["__main__"] = module = ModuleType("__main__")
    sys.argv[:] = given
    try:
        if is_module:
            run_module(given[0])
        else:
            run_script(given[0], module)
    except SystemExit:
        raise
    except BaseException as error:
        # Shown without our frames. Python then ends as it does after any exception.
        traceback = error.__traceback__
        while traceback is not None and traceback.tb_frame.f_code.co_filename == __file__:
            traceback = traceback.tb_next
        show(error, traceback)
        sys.excepthook = lambda *_: None
        raise
    return 0


def show(error: BaseException, traceback: TracebackType | None) -> None:
    sys.excepthook(type(error), error.with_traceback(traceback), traceback)


def run_module(name: str, found_in_path: bool = True) -> None:
    """As ``python -m`` does, by what that calls."""
    runpy._run_module_as_main(name, alter_argv=found_in_path)  # type: ignore[attr-defined]


def run_script(path: str, module: ModuleType) -> None:
    """As ``python path`` does: its folder comes first in sys.path."""
    full = os.path.join(os.getcwd(), path)
    is_package = os.path.isdir(path) or zipfile.is_zipfile(path)
    is_safe = getattr(sys.flags, "safe_path", sys.flags.isolated)  # python -P
    if not is_safe:
        del sys.path[0]  # where `python -m` looks
    if is_package or not is_safe:
        sys.path.insert(0, full if is_package else os.path.dirname(os.path.realpath(path)))
    if is_package:
        return run_module("__main__", found_in_path=False)
    loader = SourceFileLoader("__main__", full)
    code = compile(loader.get_data(full), full, "exec", dont_inherit=True)
    vars(module).update(__builtins__=builtins, __cached__=None, __file__=full, __loader__=loader)
    exec(code, vars(module))
    return None


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
