"""Draw a schedule: python -m mlx_fused_optim.schedules "cosine_decay(0.1, 1000)"."""

from __future__ import annotations

import argparse
import os
import shutil
import sys
from collections.abc import Sequence

from . import parse_schedule
from ._checks import as_length
from .drawing import as_text, plot


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m mlx_fused_optim.schedules",
        description="Draw a schedule in the terminal, or into a PNG file.",
        epilog="Example: %(prog)s 'warmup(cosine_decay(1e-1, 1000), 100)'",
    )
    parser.add_argument("schedule", help="a call such as cosine_decay(0.1, 1000), or a number")
    parser.add_argument(
        "--steps", type=int, help="how many steps to draw; default: until its shape has shown"
    )
    parser.add_argument("--png", metavar="FILE", help="write a PNG file (needs matplotlib)")
    options = parser.parse_args(arguments)
    try:
        schedule = parse_schedule(options.schedule)
        steps = schedule._natural_length() if options.steps is None else options.steps
        steps = as_length("schedules", "--steps", steps)
        if options.png:
            os.environ.setdefault("MPLBACKEND", "agg")  # needs no screen
            plot(schedule, steps).figure.savefig(options.png, dpi=150)
            print(f"wrote {options.png}")
        else:
            width = min(shutil.get_terminal_size((92, 24)).columns - 16, 100)
            print(schedule)
            print(as_text(schedule, steps, width=max(width, 10)))
    except (ImportError, OSError, TypeError, ValueError) as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
