"""Notebooks 03 and 05 in JupyterLab, in a real browser.

Needs Chromium (Debian's package `chromium`, or any on the PATH). Screenshots of the last run are
kept in `work/screenshots`.
"""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time

import papermill
import pytest
from checkout import ROOT, copy_checkout
from playwright.sync_api import Page, expect, sync_playwright

NAMES = ("chromium", "chromium-browser", "google-chrome")
CHROMIUM = next((path for name in NAMES if (path := shutil.which(name))), None)
SCREENSHOTS = ROOT / "work" / "screenshots"
TOKEN = "explore"
QUIET = ["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--no-first-run"]
PICTURE, OUTPUT = ".widget-output img", ".jp-RenderedText"

IN_A_BROWSER = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine")
pytestmark = [pytest.mark.slow, IN_A_BROWSER]


@pytest.fixture(scope="module")
def checkout(tmp_path_factory):
    """A copy of this checkout with the smoke runs that 03 and 05 read."""
    folder = copy_checkout(tmp_path_factory.mktemp("checkout"), results=True)
    notebooks, made = folder / "notebooks", {"04_finetuning": {"methods": "uniform,lsgs"}}
    for name in ("01_data_preparation", "02_pretraining_check", "03_scenario_scoring", *made):
        papermill.execute_notebook(
            notebooks / f"{name}.ipynb", folder / "work" / f"{name}.ipynb", made.get(name),
            cwd=notebooks, progress_bar=False,
        )  # fmt: skip
    return folder


@pytest.fixture(scope="module")
def address(checkout):
    """Where `make lab` serves, set up by a configuration file as a user's own would be."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    server_settings = {"port": port, "open_browser": False, "allow_root": True}
    settings = {"ServerApp": server_settings, "IdentityProvider": {"token": TOKEN}}
    (checkout / "settings").mkdir()
    (checkout / "settings" / "jupyter_server_config.json").write_text(json.dumps(settings))
    (checkout / ".venv").symlink_to(sys.prefix)
    environment = os.environ | {"JUPYTER_CONFIG_DIR": str(checkout / "settings")}
    log = (checkout / "lab.txt").open("w")
    server = subprocess.Popen(
        ["make", "--old-file=.venv/installed", "lab"],  # which would install what is here already
        cwd=checkout, env=environment, stdout=log, stderr=log, process_group=0,
    )  # fmt: skip
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and server.poll() is None:
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                break
        time.sleep(0.2)
    assert server.poll() is None, (checkout / "lab.txt").read_text()
    yield f"http://127.0.0.1:{port}"
    os.killpg(server.pid, signal.SIGTERM)
    server.wait(timeout=30)
    log.close()


@pytest.fixture(scope="module")
def page():
    SCREENSHOTS.mkdir(parents=True, exist_ok=True)
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=QUIET)
        page = browser.new_page(viewport={"width": 1500, "height": 1000})
        page.set_default_timeout(60_000)
        yield page
        browser.close()


def run_all(page: Page, address: str, notebook: str) -> None:
    """Open a notebook and run all its cells, until the last picture is there."""
    page.goto(f"{address}/lab/tree/{notebook}.ipynb?token={TOKEN}&reset")
    page.locator(".jp-Notebook .jp-Cell").first.wait_for()
    page.get_by_text("| Idle").wait_for()  # the kernel has started
    page.get_by_role("menuitem", name="Run", exact=True).click()
    page.get_by_role("menuitem", name="Run All Cells", exact=True).click()
    try:
        page.locator(PICTURE).first.wait_for(state="attached", timeout=120_000)
    finally:
        page.screenshot(path=SCREENSHOTS / f"{notebook[:2]}_run.png")
    page.locator(".jp-Notebook-ExecutionIndicator[data-status='idle']").wait_for()
    assert page.locator(f"{OUTPUT}[data-mime-type='application/vnd.jupyter.error']").count() == 0
    if (no := page.get_by_role("button", name="No", exact=True)).is_visible():
        no.click()  # to news from Jupyter
    page.keyboard.press("Control+b")  # hides the list of files
    show_picture(page)


def show_picture(page: Page) -> None:
    """Scroll so that the picture ends near the lower edge of the window."""
    scroll = "picture.style.scrollMarginBottom = '40px'; picture.scrollIntoView({block: 'end'})"
    page.locator(PICTURE).first.evaluate(f"picture => {{ {scroll} }}")
    page.wait_for_timeout(1000)


def redrawn(page: Page, act) -> None:
    """Do something to a control, and wait until the picture is another one."""
    picture = page.locator(PICTURE).first
    before = picture.get_attribute("src")
    act()
    expect(picture).not_to_have_attribute("src", before, timeout=20_000)


def choose_committed(page: Page) -> None:
    """Take what lies under `results` instead of this checkout's own runs."""
    choice = page.locator(".widget-dropdown select").first
    committed = [text for text in choice.locator("option").all_inner_texts() if "committed" in text]
    redrawn(page, lambda: choice.select_option(label=committed[0]))


def test_settings_of_the_method_are_explored(page, address):
    run_all(page, address, "03_scenario_scoring")
    choose_committed(page)
    handle = page.get_by_role("slider").first

    def push():
        handle.focus()
        for _ in range(5):
            handle.press("PageUp")

    redrawn(page, push)
    show_picture(page)
    page.screenshot(path=SCREENSHOTS / "03_explored.png")


def test_sensors_are_switched_off(page, address):
    run_all(page, address, "05_evaluation")
    choose_committed(page)
    redrawn(page, page.get_by_label("NIR is there").uncheck)
    show_picture(page)
    page.screenshot(path=SCREENSHOTS / "05_explored.png")
