"""The suite itself: that it can be split over processes, and that planted bugs still apply."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]


def test_cases_have_the_same_names_in_every_process(request):
    """In the order of the suite: xdist numbers them. Addresses and sets have another order or
    spelling in each process."""
    mine = [item.nodeid for item in request.session.items if item.nodeid.startswith("tests/")]
    files = dict.fromkeys(name.partition("::")[0] for name in mine)
    command = [sys.executable, "-m", "pytest", "--collect-only", "-q", "-p", "no:cacheprovider"]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    said = subprocess.run(
        [*command, *files],
        cwd=ROOT,
        env={k: v for k, v in environment.items() if not k.startswith("PYTEST_")},
        check=True,
        capture_output=True,
        text=True,
    ).stdout.splitlines()
    assert len(set(mine)) == len(mine)
    chosen = set(mine)  # -k leaves some out here
    assert [name for name in said if name in chosen] == mine


def test_every_planted_bug_applies_exactly_once(monkeypatch):
    """`make mutants` plants them; here the code may have moved away from under them."""
    monkeypatch.syspath_prepend(str(ROOT / "tests/mutation"))
    import host_bugs
    import metal_bugs

    mutants = [*host_bugs.MUTANTS, *metal_bugs.MUTANTS]
    wrong = [m.name for m in mutants if (ROOT / m.file).read_text().count(m.old) != 1]
    assert not wrong
    assert all(m.old != m.new for m in mutants)
    assert len({m.name for m in mutants}) == len(mutants)
    files = {name for m in mutants for name in m.tests.split()}
    assert [name for name in files if not (ROOT / f"tests/test_{name}.py").exists()] == []
    assert all(m.tests or m.same for m in host_bugs.MUTANTS)
