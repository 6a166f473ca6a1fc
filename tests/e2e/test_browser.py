"""The dashboard in a real browser: what its pages show is what the database holds."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from made_studies import searched

COMMAND = str(Path(sys.executable).with_name("caltech-hpo"))
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
QUIET = [
    "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync",
]  # fmt: skip


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    """A served home with a study of eight trials: its records and the dashboard's address."""
    home = tmp_path_factory.mktemp("home")
    curve = lambda trial, epoch: 0.05 * trial + 0.01 * epoch  # noqa: E731
    _, records = searched(home, curve, name="alexnet-scratch", trials=8, diverging={6})
    command = [COMMAND, "dashboard", "--home", str(home), "--port", "0"]
    environment = {k: v for k, v in os.environ.items() if not k.startswith("CALTECH_HPO_")}
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment) as process:
        url = next(line for line in process.stderr if "dashboard: http" in line).split()[1]
        yield records, url
        process.terminate()


@pytest.fixture(scope="module")
def page():
    """A page of a headless browser; what goes wrong on it is a failure."""
    if CHROMIUM is None:
        pytest.skip("needs Chromium (Debian: apt-get install chromium)")
    playwright = pytest.importorskip("playwright.sync_api")
    with playwright.sync_playwright() as running, contextlib.ExitStack() as stack:
        browser = running.chromium.launch(executable_path=CHROMIUM, args=QUIET)
        stack.callback(browser.close)
        page = browser.new_page(viewport={"width": 1400, "height": 1000})
        page.set_default_timeout(30_000)
        page.errors = []
        page.on("pageerror", lambda error: page.errors.append(str(error)))
        page.on("response", lambda r: r.status >= 400 and page.errors.append(f"{r.status} {r.url}"))
        yield page


def test_from_the_list_to_a_study_and_a_trial_with_its_picture(served, page):
    records, url = served
    page.goto(url)
    page.get_by_text("alexnet-scratch").first.click()
    page.get_by_text("The ten best trials").wait_for()
    for title in ("Accuracy over training time", "Ours against published", "Best Trial (number="):
        page.get_by_text(title).first.wait_for()
    best = max((r for r in records if r.state == "complete"), key=lambda r: r.value)
    assert page.get_by_text(f"Best Trial (number={best.number})").count() == 1
    assert page.get_by_text(str(best.value), exact=True).count() >= 1
    page.goto(f"{url}dashboard/studies/1/note")
    page.get_by_text("caltech-hpo search --study alexnet-scratch --trials 28").wait_for()
    assert page.get_by_text(f"{best.value:.4f}").count() >= 1
    for record in (best, records[6]):
        page.goto(f"{url}dashboard/studies/1/trials?numbers={record.number}")
        page.get_by_text(f"Trial {record.number} (trial_id=").wait_for()
        page.get_by_text(f"{record.value:.4f}", exact=True).first.wait_for()
        if record.stop_reason != "finished":
            page.get_by_text(record.stop_reason).first.wait_for()
        picture = page.locator(f"img[alt='trial-{record.number}-curves.png'], img[src*='/artifacts/']").first
        picture.wait_for()
        page.wait_for_function(
            "image => image.complete && image.naturalWidth > 800", arg=picture.element_handle()
        )
    assert not page.errors
