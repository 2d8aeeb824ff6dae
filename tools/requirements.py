"""Print what pip must install before this project can be built and run from its tree.

That is, from pyproject.toml: the build requirements, the dependencies and the extras
named on the command line. A build without isolation, with these installed, finds MLX's
headers at the same paths every time, so that only changed files are compiled.
"""

import sys
from pathlib import Path

try:
    import tomllib
except ModuleNotFoundError:  # Python 3.10
    from pip._vendor import tomli as tomllib


def requirements(pyproject: dict, extras: list[str]) -> list[str]:
    project = pyproject["project"]
    # The backend of MLX to build with is the one to run with, which an extra names.
    wanted = [r for r in pyproject["build-system"]["requires"] if not r.startswith("mlx[")]
    wanted += project["dependencies"]
    for extra in extras:
        wanted += project["optional-dependencies"][extra]
    return wanted


if __name__ == "__main__":
    pyproject = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text())
    print(*requirements(pyproject, sys.argv[1:]), sep="\n")
