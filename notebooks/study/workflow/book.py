"""The executed notebooks of a tier as a book: for GitHub, and as a site that is read offline.

`python -m study.workflow.book demo results/book`, which `make book` calls, writes the notebooks
with their figures to `results/book`, and the site, with the API of the core, to `work/book`.
"""

import html
import os
import re
import shutil
import sys
from collections.abc import Mapping
from pathlib import Path

import nbformat
import pdoc
from jinja2 import DictLoader
from latex2mathml.converter import convert as latex
from nbconvert import HTMLExporter
from nbconvert.filters.markdown_mistune import IPythonRenderer, MarkdownWithMath
from nbformat import NotebookNode

import lsgs_core
from lsgs_core.errors import InputError
from study.provenance.files import make_folder, written_beside
from study.workflow.commands import ROOT

BACKBONE = "cmx"  # whose notebooks are shown where there is one for each backbone
LARGEST = 10_000_000  # bytes of all notebooks together
# From the root of a file system, as in /a/b or C:\a; neither a relative path nor an address.
MACHINE_PATH = re.compile(r"(?<![\w.:/<~)])(?:~|/\w[\w.-]*)/[\w./-]+|\b[A-Z]:\\\w+")
PROGRESS = "application/vnd.jupyter.widget-view+json"
STYLE = """<style>
main { max-width: 62rem; margin: auto; padding: 1rem; }
body.plain { font: 16px/1.6 sans-serif; }
.jp-OutputArea-output, .highlight, math[display='block'] { overflow-x: auto; }
.jp-RenderedHTMLCommon code { overflow-wrap: anywhere; }
img { max-width: 100%; }
@media (max-width: 50rem) { .jp-InputPrompt, .jp-OutputPrompt { display: none !important; } }
</style>"""
TEMPLATE = (
    "{% extends 'lab/index.html.j2' %}{% block html_head_js_requirejs %}{% endblock %}"
    "{% block html_head_js_mathjax %}{% endblock %}"
    "{% block html_head_js_mermaidjs %}{% endblock %}"
    "{% block html_head_css %}" + STYLE + "{% endblock %}{% block body_header %}{{ super() }}"
    "<nav><a href='index.html'>All notebooks</a></nav>{% endblock %}{% block data_png scoped %}"
    "<img src='data:image/png;base64,{{ output.data['image/png'] | escape_html }}'"
    " alt='{{ output.metadata.alt | escape_html_keep_quotes }}'>{% endblock %}"
)
INDEX = """<!DOCTYPE html><html lang="en"><head><meta charset="utf-8"><title>{title}</title>
<meta name="viewport" content="width=device-width, initial-scale=1">{style}</head>
<body class="plain"><main><h1>{title}</h1><ul>{entries}</ul></main></body></html>
"""


def executed_notebooks(folder: Path) -> dict[str, NotebookNode]:
    """Read the first executed copy of every notebook, without progress bars, by its name.

    Figures get a text that stands for them. Raises `InputError` where a notebook is missing or
    failed, or shows a path of the machine.
    """
    paths: dict[str, Path] = {}
    for path in sorted(folder.glob("[0-9A]*.ipynb")):
        if "-fold" not in path.stem or f"-{BACKBONE}-" in path.stem:
            paths.setdefault(path.stem.partition("-")[0], path)
    if not paths:
        raise InputError(f"{folder}: expected executed notebooks, found none; run make study first")
    return {name: _cleaned(path) for name, path in paths.items()}


def write_notebooks(notebooks: Mapping[str, NotebookNode], folder: Path) -> None:
    """Write `<name>.ipynb` for every notebook, and remove other notebooks from the folder."""
    texts = {f"{name}.ipynb": nbformat.writes(one) + "\n" for name, one in notebooks.items()}
    if (size := sum(len(text.encode()) for text in texts.values())) > LARGEST:
        raise InputError(f"{folder}: expected at most {LARGEST} bytes of notebooks, found {size}")
    for other in set(make_folder(folder).glob("*.ipynb")) - {folder / name for name in texts}:
        other.unlink()
    for name, text in texts.items():
        with written_beside(folder / name) as temporary:
            temporary.write_text(text)


def write_site(notebooks: Mapping[str, NotebookNode], folder: Path) -> None:
    """Write the site: a page for every notebook, the API of the core, and an index."""
    loader, new = DictLoader({"book.html.j2": TEMPLATE}), folder.with_name(f".book.{os.getpid()}")
    exporter = HTMLExporter(extra_loaders=[loader], template_file="book.html.j2")
    pages = _Markdown(escape=False)
    exporter.register_filter("markdown2html", MarkdownWithMath(renderer=pages).render)
    new.mkdir(parents=True)
    entries = "<li><a href='api/lsgs_core.html'>API of lsgs_core</a>: its modules and functions."
    for name, notebook in reversed([*notebooks.items()]):
        (new / f"{name}.html").write_text(exporter.from_notebook_node(notebook)[0])
        title, purpose = (html.escape(notebook.metadata[key]) for key in ("title", "purpose"))
        entries = f"<li><a href='{name}.html'>{title}</a>: {purpose}\n{entries}"
    title = "Latent-space guided scenario sampling: the notebooks, with what they gave"
    (new / "index.html").write_text(INDEX.format(title=title, style=STYLE, entries=entries))
    for public in lsgs_core.__all__:  # pdoc reads what is imported, not what would be
        setattr(lsgs_core, public, getattr(lsgs_core, public))
    pdoc.render.configure(docformat="google")
    pdoc.pdoc("lsgs_core", output_directory=new / "api")
    shutil.rmtree(folder, ignore_errors=True)
    new.rename(folder)


class _Markdown(IPythonRenderer):
    """Markdown whose formulas become MathML, which browsers draw without a script or a font."""

    def inline_math(self, body: str) -> str:
        return latex(body)

    def block_math(self, body: str) -> str:
        return latex(body, display="block")


def _cleaned(path: Path) -> NotebookNode:
    """Read an executed notebook: no progress bars, dates, or paths of this machine."""
    notebook = nbformat.read(path, as_version=4)
    head = notebook.cells[0].source
    purpose = re.search(r"\*\*Purpose\.\*\*\s+(.+?[.?])(?:\s|$)", head, re.DOTALL)
    if not purpose:
        raise InputError(f"{path}: expected a first cell that says its **Purpose.** in a sentence")
    kept = {key: notebook.metadata[key] for key in ("kernelspec", "language_info")}
    words = {"title": head.partition("\n")[0].strip("# "), "purpose": _plain(purpose[1])}
    notebook.metadata = NotebookNode(kept | words)
    above, number = "", 0
    for cell in notebook.cells:
        cell.metadata = NotebookNode({"tags": cell.metadata.get("tags", [])})
        if cell.cell_type != "code":
            above = _plain("\n\n".join(cell.source.split("\n\n")[:2]))
            continue
        said = [output for output in cell.outputs if output.get("name") != "stderr"]
        cell.outputs = [output for output in said if PROGRESS not in output.get("data", {})]
        for output in cell.outputs:
            data = output.get("data", {})
            if output.output_type == "error":
                why = output.evalue
                raise InputError(f"{path}: expected a notebook that ran to its end: {why}")
            if "image/png" in data:
                number += 1
                output.metadata = NotebookNode(alt=f"Figure {number}: {above}")
            texts = [text for kind, text in data.items() if kind.startswith("text/")]
            for text in (output.get("text", ""), *texts):
                if found := MACHINE_PATH.search(text):
                    raise InputError(f"{path}: expected no path of this machine, found {found[0]}")
    return notebook


def _plain(markdown: str) -> str:
    """Return the words of Markdown without its marks."""
    return " ".join(re.sub(r"[*`#|]", "", markdown).split())


if __name__ == "__main__":
    try:
        executed = executed_notebooks(ROOT / "work" / sys.argv[1] / "notebooks")
        write_notebooks(executed, ROOT / sys.argv[2])
        write_site(executed, ROOT / "work" / "book")
    except InputError as error:
        sys.exit(str(error))
    print(f"notebooks: {sys.argv[2]}\nto read: work/book/index.html")
