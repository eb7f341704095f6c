"""The book shows what was run: one notebook of each kind, without noise and paths of a machine."""

import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output
from playwright.sync_api import sync_playwright
from study.workflow.book import LARGEST, executed_notebooks, write_notebooks, write_site
from test_browser import CHROMIUM, IN_A_BROWSER, QUIET

from lsgs_core import InputError

HEAD = "# 04 Fine-tuning\n\n**Purpose.** Fine-tune **one** backbone, v0.2 of it. More follows."
DOTS = "application/vnd.jupyter.widget-view+json"


def write(folder, name, *outputs):
    text = "## Test\n\nLeft, $D_k$, `${D}`.\n\nRight, `p`."
    code = new_code_cell("draw()", outputs=list(outputs), metadata={"papermill": {"a": 1}})
    notebook = new_notebook(cells=[new_markdown_cell(HEAD), new_markdown_cell(text), code])
    notebook.metadata.kernelspec = {"name": "python3", "display_name": "Python"}
    notebook.metadata.language_info = {"name": "python"}
    nbformat.write(notebook, folder / f"{name}.ipynb")


def test_one_backbone_is_shown_without_noise(tmp_path):
    figure = new_output("display_data", {"image/png": "aGk=", "text/plain": "<Figure>"})
    bar = new_output("display_data", {DOTS: {}, "text/plain": "  0%|"})
    warning = new_output("stream", name="stderr", text="/usr/b.py: 99%|")
    said = new_output("stream", name="stdout", text="../work/a/b, 3/4 m/s, https://a.org/b/c")
    for name in ("04_finetuning-demo-cbc-fold0", "04_finetuning-demo-cmx-fold0-seed1"):
        write(tmp_path, name)
    write(tmp_path, "04_finetuning-demo-cmx-fold0-seed0", bar, warning, said, figure)
    book = executed_notebooks(tmp_path)
    assert list(book) == ["04_finetuning"]
    assert book["04_finetuning"].metadata.purpose == "Fine-tune one backbone, v0.2 of it."
    cell = book["04_finetuning"].cells[-1]
    assert [output.output_type for output in cell.outputs] == ["stream", "display_data"]
    assert cell.outputs[1].metadata.alt == "Figure 1: Test Left, $D_k$, ${D}."
    assert "papermill" not in cell.metadata
    (tmp_path / "book").mkdir()
    write(tmp_path / "book", "09_gone")
    write_notebooks(book, tmp_path / "book")
    assert [path.name for path in (tmp_path / "book").iterdir()] == ["04_finetuning.ipynb"]
    nbformat.validate(nbformat.read(tmp_path / "book" / "04_finetuning.ipynb", as_version=4))


@pytest.mark.parametrize("text", ["in /" + "home/ann/lsgs/work", "'C:\\Users'", "(~/lsgs/a)"])
def test_a_path_of_the_machine_is_refused(tmp_path, text):
    write(tmp_path, "01_a-demo", new_output("stream", name="stdout", text=text))
    with pytest.raises(InputError, match="path of this machine"):
        executed_notebooks(tmp_path)


def test_what_is_no_book_is_refused(tmp_path):
    with pytest.raises(InputError, match="make study"):
        executed_notebooks(tmp_path)
    write(tmp_path, "01_a", new_output("stream", name="stdout", text="a" * LARGEST))
    with pytest.raises(InputError, match="at most"):
        write_notebooks(executed_notebooks(tmp_path), tmp_path)
    write(tmp_path, "01_a", new_output("error", ename="E", evalue="it broke", traceback=[]))
    with pytest.raises(InputError, match="it broke"):
        executed_notebooks(tmp_path)


@pytest.mark.slow
@IN_A_BROWSER
@pytest.mark.parametrize("width", [1300, 390])
def test_the_site_is_read_offline(tmp_path, width):
    picture = "R0lGODlhAQABAAAAACwAAAAAAQABAAA="
    write(tmp_path, "04_a", new_output("display_data", {"image/png": picture}))
    write_site(executed_notebooks(tmp_path), tmp_path / "site")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=QUIET)
        page = browser.new_page(viewport={"width": width, "height": 844})
        asked: list[str] = []
        errors: list[str] = []
        page.on("pageerror", lambda error: errors.append(str(error)))
        page.on("console", lambda said: said.type == "error" and errors.append(said.text))
        page.on("request", lambda request: asked.append(request.url))
        for name in ("index", "04_a", "api/lsgs_core"):
            page.goto((tmp_path / "site" / f"{name}.html").as_uri())
            if name == "04_a":
                assert page.locator("math msub").count() == 1
                assert page.get_by_text("${D}", exact=True).is_visible()
            assert page.evaluate("document.documentElement.scrollWidth") <= width
            assert page.evaluate("[...document.images].every(i => i.naturalWidth && i.alt)")
            for link in page.evaluate("[...document.links].map(link => link.href)"):
                target = link.partition("#")[0].removeprefix("file://")
                assert target.startswith("http") or (tmp_path / "site" / target).is_file(), link
        assert not [address for address in asked if address.startswith("http")]
        assert not errors
        browser.close()
