"""The site, by Sphinx: `make docs` builds it into build/docs. Its pages read on GitHub too."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import mlx_fused_optim
from docutils import nodes
from sphinx.application import Sphinx
from sphinx.util import logging
from sphinx.util.docutils import SphinxDirective

sys.path.insert(0, str(Path(__file__).parent))
import facts

PACKAGE = "mlx_fused_optim"
log = logging.getLogger(__name__)

project = "mlx-fused-optim"
author = copyright = "The mlx-fused-optim authors"
version = release = mlx_fused_optim.__version__
extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.autosummary",
    "sphinx.ext.mathjax",
    "sphinx.ext.napoleon",
]
html_theme = "furo"
html_title = project
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_copy_source = False  # the pages are in the repository

# GitHub's anchors, which the pages' links name.
myst_heading_anchors = 4
autosummary_generate = False
# The signature has names and defaults, "Args" the types in words.
autodoc_typehints = "none"
autodoc_preserve_defaults = True
autodoc_member_order = "bysource"
add_module_names = False

# Every name that a page or a docstring refers to has to be here, but for words that stand
# where a type does, and for what is of MLX.
nitpicky = True
nitpick_ignore_regex = [
    ("py:class", r"(a |an )?(array|arrays|callable|tree|pair|optional|model|any|inf)"),
    ("py:class", r"(mlx|matplotlib)\..*|Dtype|Stream|Device"),
]


class Facts(SphinxDirective):
    """What docs/facts.py says of an optimizer, or, without a name, of all."""

    optional_arguments = 1

    def run(self) -> list[nodes.Node]:
        text = facts.of(self.arguments[0]) if self.arguments else facts.of_all()
        return self.parse_text_to_nodes(text)


def before_napoleon(
    app: Sphinx, kind: str, name: str, thing: Any, options: Any, lines: list[str]
) -> None:
    if getattr(thing, "__module__", "").startswith("mlx.optimizers"):
        # MLX's own classes and functions are documented by MLX: here is where.
        lines[:] = [
            f"MLX's own, as it is: ``mlx.optimizers.{thing.__qualname__}`` in "
            "`MLX's documentation <https://ml-explore.github.io/mlx/build/html/python/"
            "optimizers.html>`__."
        ]


def after_napoleon(
    app: Sphinx, kind: str, name: str, thing: Any, options: Any, lines: list[str]
) -> None:
    if kind == "property" and any(line.startswith(":type:") for line in lines):
        log.warning("%s: what is before a colon in its first line is taken for a type", name)


def of_the_package(app: Sphinx, env: Any, node: Any, content: nodes.Node) -> nodes.Node | None:
    """Docstrings name what is public as users do; and what all optimizers share, ``forget`` of
    ``SGD``, is on the page of their base."""
    domain, kind = env.get_domain("py"), node.get("reftype")
    for place in (PACKAGE, f"{PACKAGE}.FusedOptimizer"):
        target = f"{place}.{node['reftarget']}"
        if node.get("refdomain") == "py" and target in domain.objects:
            return domain.resolve_xref(
                env, node["refdoc"], app.builder, kind, target, node, content
            )
    return None


def every_public_name_has_its_place(app: Sphinx, env: Any) -> None:
    known = env.get_domain("py").objects
    for name in mlx_fused_optim.__all__:
        if f"{PACKAGE}.{name}" not in known:
            log.warning("%s is public, and on no page", name)


def setup(app: Sphinx) -> dict[str, Any]:
    app.add_directive("facts", Facts)
    app.connect("autodoc-process-docstring", before_napoleon, priority=0)
    app.connect("autodoc-process-docstring", after_napoleon, priority=900)
    app.connect("missing-reference", of_the_package)
    app.connect("env-check-consistency", every_public_name_has_its_place)
    return {"parallel_read_safe": True}
