"""What the documentation shows works, and what it points at exists."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")])


def python_blocks(page):
    """The blocks marked as Python, padded so that a traceback shows the page's line."""
    text = page.read_text(encoding="utf-8")
    for block in re.finditer(r"^```python\n(.*?)^```$", text, re.MULTILINE | re.DOTALL):
        line = text.count("\n", 0, block.start(1))
        yield compile("\n" * line + block[1], str(page), "exec")


@pytest.mark.parametrize("page", [p for p in PAGES if list(python_blocks(p))], ids=lambda p: p.name)
def test_examples_run(page, tmp_path, monkeypatch):
    """All blocks of a page are one program: later ones use what earlier ones made."""
    monkeypatch.chdir(tmp_path)
    names = {}
    for block in python_blocks(page):
        exec(block, names)


def test_the_readme_has_examples():
    assert len(list(python_blocks(ROOT / "README.md"))) >= 6


def anchors(page):
    headings = re.findall(r"^#+ (.*)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading).lower().replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_links_inside_the_repository_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8")):
        if "://" in target:
            continue
        path, _, anchor = target.partition("#")
        found = page.parent / path if path else page
        assert found.exists(), target
        if anchor:
            assert anchor in anchors(found), target
