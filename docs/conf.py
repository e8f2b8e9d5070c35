"""Sphinx configuration: the site is the Markdown of this folder, written so that it also reads well without Sphinx.

Index pages are plain lists of links, from which the navigation is made, and some pages lie elsewhere in the checkout.
"""

import html
import io
import os
import re
from pathlib import Path

import matplotlib as mpl
from docutils import nodes
from matplotlib.mathtext import math_to_image
from sphinx.application import Sphinx
from sphinx.util.typing import ExtensionMetadata
from sphinx.writers.html5 import HTML5Translator

DOCS = Path(__file__).parent
ELSEWHERE = {
    DOCS / "benchmarks.md": DOCS.parent / "benchmarks" / "README.md",
    DOCS / "examples.md": DOCS.parent / "examples" / "README.md",
    DOCS / "how-to" / "docker-and-kubernetes.md": DOCS.parent / "infra" / "README.md",
}
"""Pages that show a file from outside of this folder."""
LINK = re.compile(r"(?<=\]\()(?!\w+:|#)([^)#\s]+)(#[^)\s]*)?(?=\))")
LISTED = re.compile(r"^- \[[^]]+\]\((?!\w+:)([^)#]+\.md)\)", re.MULTILINE)

project = "Darkroom"
html_title = "Darkroom"
html_theme = "furo"
extensions = ["myst_parser"]
myst_enable_extensions = ["dollarmath"]
myst_heading_anchors = 4
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_math_renderer = "svg"
highlight_language = "none"
exclude_patterns = ["generate.py"]
html_copy_source = False
html_show_copyright = False
suppress_warnings = ["myst.header"]  # the command line's page has one heading level less where there is no group


def read_page(app: Sphinx, name: str, source: list[str]) -> None:
    """Show a file from elsewhere, relate all links to this folder, and make the navigation of an index page."""
    page = DOCS / f"{name}.md"
    file = ELSEWHERE.get(page, page)
    pages = {there: here for here, there in ELSEWHERE.items()}

    def rebased(match: re.Match[str]) -> str:
        target = Path(os.path.normpath(file.parent / match[1]))
        target = pages.get(target, target)
        if target.is_dir() and (target / "index.md").exists():
            target /= "index.md"
        return os.path.relpath(target, page.parent) + (match[2] or "")

    source[0] = LINK.sub(rebased, source[0] if file == page else file.read_text())
    if page.name == "index.md" and (listed := LISTED.findall(source[0])):
        source[0] += "\n".join(["", "```{toctree}", ":hidden:", "", *listed, "```", ""])


def formula_svg(tex: str, size: int) -> str:
    """Render a formula as SVG of ``size`` points in the colour of the text, which needs no script and no network."""
    file = io.StringIO()
    with mpl.rc_context({"mathtext.fontset": "stix", "font.size": size, "svg.hashsalt": tex}):
        depth = math_to_image(f"${' '.join(tex.split())}$", file, format="svg")
    svg = re.sub(r"<metadata>.*?</metadata>", "", file.getvalue()[file.getvalue().index("<svg") :], flags=re.DOTALL)
    style = f'role="img" aria-label="{html.escape(tex)}" style="vertical-align: -{depth:.1f}pt" fill="currentColor"'
    return svg.strip().replace("<svg", f"<svg {style}", 1)


def visit_inline_math(writer: HTML5Translator, node: nodes.math) -> None:
    """Write a formula within a line."""
    writer.body.append(f'<span class="math">{formula_svg(node.astext(), 13)}</span>')
    raise nodes.SkipNode


def visit_block_math(writer: HTML5Translator, node: nodes.math_block) -> None:
    """Write a formula on its own line."""
    writer.body.append(f'<div class="math">{formula_svg(node.astext(), 16)}</div>')
    raise nodes.SkipNode


def setup(app: Sphinx) -> ExtensionMetadata:
    """Register what this file defines."""
    app.connect("source-read", read_page)
    app.add_html_math_renderer("svg", (visit_inline_math, None), (visit_block_math, None))
    return {"parallel_read_safe": True, "parallel_write_safe": True}
