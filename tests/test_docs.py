"""What the documentation shows works, and what it points at exists."""

import json
import re
import zlib
from pathlib import Path

import mlx.core as mx
import mlx_fused_optim
import pytest

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = sorted([*ROOT.glob("*.md"), *DOCS.rglob("*.md")])
INVENTORY = ROOT / "build/docs/objects.inv"


def name_of(page):
    return str(page.relative_to(ROOT))


def python_blocks(page):
    """The blocks marked as Python, padded so that a traceback shows the page's line."""
    text = page.read_text(encoding="utf-8")
    for block in re.finditer(r"^```python\n(.*?)^```$", text, re.MULTILINE | re.DOTALL):
        line = text.count("\n", 0, block.start(1))
        yield compile("\n" * line + block[1], str(page), "exec")


@pytest.mark.parametrize("page", [p for p in PAGES if list(python_blocks(p))], ids=name_of)
def test_examples_run(page, tmp_path, monkeypatch):
    """All blocks of a page are one program: later ones use what earlier ones made."""
    monkeypatch.chdir(tmp_path)
    names = {}
    for block in python_blocks(page):
        exec(block, names)


def test_the_readme_has_examples():
    assert len(list(python_blocks(ROOT / "README.md"))) >= 3


def test_the_readme_is_a_screen_and_a_half():
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 120


def test_the_state_that_a_page_shows_is_its_own(tmp_path, monkeypatch, capsys):
    """docs/states.md prints a table and shows it below."""
    page = DOCS / "states.md"
    test_examples_run(page, tmp_path, monkeypatch)
    (shown,) = re.findall(r"^```text\n(.*?)^```$", page.read_text(), re.MULTILINE | re.DOTALL)
    assert shown in capsys.readouterr().out


def anchors(page):
    headings = re.findall(r"^#+ (.*)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading).lower().replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_links_inside_the_repository_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8")):
        if "://" in target:
            continue
        path, _, anchor = target.partition("#")
        found = page.parent / path if path else page
        assert found.exists(), target
        if anchor:
            assert anchor in anchors(found), target


@pytest.mark.skipif(not INVENTORY.exists(), reason="make docs has not built the site")
def test_every_public_name_is_in_the_reference():
    """In the site's inventory, and where that says."""
    lines = zlib.decompress(INVENTORY.read_bytes().split(b"\n", 4)[4]).decode().splitlines()
    places = {}
    for line in lines:  # name, domain:role, priority, place, title
        name, role, _, place, _ = line.split(" ", 4)
        if role.startswith("py:"):
            places[name] = place.replace("$", name).split("#")
    public = [f"mlx_fused_optim.{name}" for name in mlx_fused_optim.__all__]
    assert [name for name in public if name not in places] == []
    for page, anchor in map(places.get, public):
        assert page.startswith(("optimizers/", "reference/"))
        assert f'id="{anchor}"' in (INVENTORY.parent / page).read_text(encoding="utf-8")


# What docs/migration.md calls the arguments: numbers of a rule, each another; of schedules; steps.
OWN = dict(momentum=0.25, dampening=0.0, weight_decay=0.125, eps=2**-9, alpha=0.75, rho=0.875)
NUMBERS = (
    "lr b1 b2 gamma eta_min start_factor end_factor base_lr max_lr a v s rate start peak end "
    "power exponent"
)
STEPS = "step_size T_max T_0 T_mult total_iters W begin b step_size_up step_size_down"
ARGUMENTS = {
    **OWN,
    **dict.fromkeys(NUMBERS.split(), 0.5),
    **dict.fromkeys(STEPS.split(), 4),
    **dict(N=8, milestones=[4], boundaries=[4], schedules=[mlx_fused_optim.constant(0.5)] * 2),
    **dict(betas=(0.5, 0.5), d=0.125, nesterov=True, staircase=True),
    "parameters": {"w": mx.ones(2)},
}


def calls_of_tables(page):
    """What stands first in the second column, where it is a call of a public name."""
    for call in re.findall(r"^\|[^|]+\| `((\w+)\([^`]*\))`", page.read_text(), re.MULTILINE):
        if call[1] in mlx_fused_optim.__all__ and "..." not in call[0]:
            yield call[0]


def test_what_the_tables_of_migration_call_can_be_called():
    """And what is named like a number of an optimizer is that."""
    calls = list(calls_of_tables(DOCS / "migration.md"))
    assert len(calls) >= 30
    for call in calls:
        made = eval(call, {**vars(mlx_fused_optim), **ARGUMENTS})
        if isinstance(made, mlx_fused_optim.FusedOptimizer):
            named = {name for name in OWN if re.search(rf"\b{name}\b", call)}
            assert {name: getattr(made, name) for name in named} == {n: OWN[n] for n in named}
            assert not {"b1", "betas"} & set(re.findall(r"\w+", call)) or made.betas == (0.5, 0.5)


@pytest.fixture
def facts(monkeypatch):
    monkeypatch.syspath_prepend(str(DOCS))
    import facts

    return facts


def test_the_optimizers_pages_are_of_all_that_have_a_kernel(facts):
    public = {name: getattr(mlx_fused_optim, name) for name in mlx_fused_optim.__all__}
    ours = {
        name
        for name, thing in public.items()
        if isinstance(thing, type) and issubclass(thing, mlx_fused_optim.FusedOptimizer)
    }
    assert set(facts.OPTIMIZERS) == ours
    pages = {page.stem for page in (DOCS / "optimizers").glob("*.md")} - {"index"}
    assert pages == {name.lower() for name in ours}


def test_the_pages_bytes_are_those_of_the_precision_page(facts):
    """That one was measured with MLX's own count, and has the parameter's bytes in it."""
    text = (DOCS / "precision.md").read_text()
    for name in ("SGD", "AdamW"):
        part = re.search(rf"<!-- {name.lower()}: begin -->(.*)<!-- {name.lower()}: end", text, re.S)
        recorded = dict(re.findall(r"^\| ([\w,=. ]+) \| ([\d.]+) \|", part[1], re.MULTILINE))
        rows = {what: (whole, half) for what, whole, half in facts.rows_of_memory(name)}
        usual = "`momentum=0.9`" if name == "SGD" else "as it is"
        and_ = f"{usual} and " if name == "SGD" else ""
        assert rows[usual] == (float(recorded["float32"]) - 4, float(recorded["bfloat16"]) - 2)
        for option, mode in {
            "compensated=True": "bfloat16, compensated",
            "master_weights=True": "bfloat16, master",
        }.items():
            assert rows[f"{and_}`{option}`"][1] == float(recorded[mode]) - 2
        assert rows[f"{and_}`ema_decay=0.999`"][0] == float(recorded["ema_decay=0.999"]) - 4


def test_the_pages_bits_are_those_that_are_promised(facts):
    """With a constant rate those of mlx.optimizers; else up to a rounding apart in each step, of
    parameters below 8, since the gradients do not depend on the parameters."""
    for name in facts.OPTIMIZERS:
        (_, count, _), *others = facts.rows_of_distance(name)
        assert count == 0, name
        assert all(0 < most < facts.STEPS * 2**-21 for _, _, most in others), name


def test_the_pages_speed_is_that_of_the_recorded_runs(facts, tmp_path, monkeypatch):
    """A row for each machine's work, of what has that optimizer."""
    records = sorted(facts.RUNS.glob("*.json"))
    assert records
    for name in facts.OPTIMIZERS:
        medians = [
            tuple(
                result["candidates"][title]["median_ms"]
                for title in ("ours", "mlx compiled", "mlx")
            )
            for record in records
            for result in json.loads(record.read_text())["results"]
            if result["optimizer"] == name
        ]
        assert [times for _, *times in facts.rows_of_speed(name)] == list(map(list, medians))
    run = json.loads(records[0].read_text())
    run["machine"] = {"processor": "Abacus", "cores": 3, "load": 0.25}
    lion = next(result for result in run["results"] if result["optimizer"] == "Lion")
    lion["title"] = "ten beads"
    for number, time in enumerate(lion["candidates"].values(), start=1):
        time["median_ms"] = number + 0.125
    monkeypatch.setattr(facts, "RUNS", tmp_path)
    (tmp_path / "abacus.json").write_text(json.dumps({**run, "results": [lion]}))
    page = facts.of("Lion")
    assert "| Abacus, 3 cores: ten beads | 1.12 | 2.12 | 3.12 |\n" in page
    assert "load average before it 0.25 on 3 cores" in page
