"""The console in a real headless Chromium: by mouse, by keyboard alone, on a phone. Screenshots go to $SCREENSHOTS."""

import os
import re
import shutil
from pathlib import Path

import pytest

pytest.importorskip("uvicorn")
playwright = pytest.importorskip("playwright.sync_api")
from onnx_refit.serve.client import RefitClient  # noqa: E402
from tests.serve.conftest import TOKEN  # noqa: E402

playwright.expect.set_options(timeout=60_000)  # it returns as soon as it is so
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
pytestmark = [pytest.mark.serve, pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here")]


@pytest.fixture(scope="module")
def browser():
    with playwright.sync_playwright() as started:
        chromium = started.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield chromium
        chromium.close()


@pytest.fixture
def running(start, plan):
    return start(plan, "--keep", "4", "--no-access-log")


@pytest.fixture
def opened(browser, running):
    """Open the page with the token given; every request to elsewhere and every error on the page fails the test."""
    problems, contexts, here = [], [], (running.url, "data:")

    def opened(**options):
        context = browser.new_context(**options)
        contexts.append(context)
        page = context.new_page()
        page.on("pageerror", lambda error: problems.append(str(error)))
        page.on("console", lambda line: problems.extend([line.text] if "Content Security Policy" in line.text else []))
        page.on("request", lambda asked: problems.extend([] if asked.url.startswith(here) else [asked.url]))
        page.goto(running.url + "/")
        page.get_by_label("Token", exact=True).fill(TOKEN)
        page.get_by_role("button", name="Use").click()
        playwright.expect(page.locator("#state")).to_contain_text("answers")
        return page

    yield opened
    for context in contexts:
        context.close()
    assert not problems


def shot(page, name):
    directory = os.environ.get("SCREENSHOTS")
    if directory:
        page.screenshot(path=Path(directory) / f"{name}.png", full_page=True)


def test_the_whole_way_by_mouse(running, opened, weights):
    page = opened(viewport={"width": 1280, "height": 900})
    page.locator("#file").set_input_files(weights(2))
    page.get_by_role("button", name="Upload and stage").click()
    playwright.expect(page.locator("#message")).to_contain_text("Staged")
    page.get_by_text("Check report").click()
    playwright.expect(page.locator("#staged td").first).to_have_text("w")
    for _ in range(30):
        running.infer()
    shot(page, "staged")
    page.get_by_role("button", name="Commit").click()
    playwright.expect(page.get_by_role("dialog")).to_contain_text("scale2.safetensors")
    shot(page, "confirm")
    page.get_by_role("dialog").get_by_role("button", name="Cancel").click()
    assert running.infer() == (1.0, 1), "cancelled must mean not done"
    page.get_by_role("button", name="Commit").click()
    page.get_by_role("dialog").get_by_role("button", name="Commit").click()
    playwright.expect(page.locator("#message")).to_contain_text("Version 2 answers now (it was 1)")
    assert running.infer() == (2.0, 2)
    page.get_by_role("button", name="Compare").click()
    playwright.expect(page.locator("#layers li")).to_have_count(2)
    playwright.expect(page.locator("#layers")).to_contain_text("1.00")
    playwright.expect(page.locator("#events")).to_contain_text("committed: version 2")
    playwright.expect(page.locator("#figures")).to_contain_text("requests/s")
    shot(page, "committed")
    page.get_by_role("button", name="Roll back to version 1").click()
    page.get_by_role("dialog").get_by_role("button", name="Roll back").click()
    playwright.expect(page.locator("li.now")).to_contain_text("v1")
    assert running.infer() == (1.0, 1)


def test_rejected_weights_show_their_report(running, opened, weights, tmp_path):
    import numpy as np
    from safetensors.numpy import save_file

    save_file({"w": np.zeros((3, 4), np.float32), "bias": np.zeros(4, np.float32)}, tmp_path / "bad.safetensors")
    page = opened()
    page.locator("#file").set_input_files(tmp_path / "bad.safetensors")
    page.get_by_role("button", name="Upload and stage").click()
    playwright.expect(page.locator("#message")).to_have_class("bad")
    playwright.expect(page.locator("#staged")).to_contain_text("rejected")
    playwright.expect(page.locator("#staged")).to_contain_text("nearest: bias")
    shot(page, "rejected")
    RefitClient(running.url, TOKEN).stage("affine", weights(2))
    playwright.expect(page.locator("#staged .card")).to_have_count(1)
    assert "nearest: bias" in page.locator("#staged").inner_text(), "news from others must not take the report away"
    page.locator("#file").set_input_files(weights(3))
    page.get_by_role("button", name="Upload and stage").click()
    playwright.expect(page.locator("#staged .card")).to_have_count(2)
    playwright.expect(page.locator("#staged")).not_to_contain_text("nearest: bias")


def test_by_keyboard_alone_on_a_phone(running, opened, weights):
    RefitClient(running.url, TOKEN).stage("affine", weights(3), label="epoch 3")
    page = opened(viewport={"width": 375, "height": 740}, is_mobile=True, has_touch=True, device_scale_factor=2)
    playwright.expect(page.get_by_role("button", name="Commit")).to_be_visible()
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth"), "the page scrolls sideways"
    small = page.evaluate(
        "[...document.querySelectorAll('button, select')].filter(b => b.offsetParent && b.offsetHeight < 38).length"
    )
    assert small == 0, "a finger needs more room"
    shot(page, "phone")
    for _ in range(40):
        page.keyboard.press("Tab")
        if page.evaluate("document.activeElement.textContent") == "Commit":
            break
    else:
        raise AssertionError("the keyboard does not reach the commit")
    page.keyboard.press("Enter")
    playwright.expect(page.get_by_role("dialog")).to_be_visible()
    page.keyboard.press("Escape")
    playwright.expect(page.get_by_role("dialog")).to_be_hidden()
    assert running.infer() == (1.0, 1)
    page.keyboard.press("Enter")
    playwright.expect(page.get_by_role("dialog")).to_be_visible()
    page.keyboard.press("Tab")
    page.keyboard.press("Enter")
    playwright.expect(page.locator("#message")).to_contain_text("Version 2 answers now")
    assert running.infer() == (3.0, 2)
    page.get_by_role("button", name="Compare").press("Enter")
    bar = page.locator("#layers meter").first
    playwright.expect(bar).to_be_visible()
    assert bar.evaluate("bar => bar.clientWidth") > 80, "the plot of changes must be seen on a phone too"
    shot(page, "phone-compared")


def test_what_is_said_can_be_seen(running, opened, weights):
    """Whoever reads that a version answers may compare it at once, however slow the server is."""
    RefitClient(running.url, TOKEN).stage("affine", weights(2))
    page = opened()
    page.evaluate("""() => { const real = window.fetch; window.fetch = async (path, options) => {
        if (path.endsWith("/refit")) await new Promise(done => setTimeout(done, 500));
        return real(path, options); }; }""")
    page.get_by_role("button", name="Commit").click()
    page.get_by_role("dialog").get_by_role("button", name="Commit").click()
    playwright.expect(page.locator("#message")).to_contain_text("Version 2 answers now")
    assert page.get_by_role("button", name="Compare").is_enabled()
    assert page.locator("#versions li").count() == 2


def test_a_question_asked_again_at_once_is_answered_once(running, opened, weights):
    """A dialog's close event comes after the closing: it must not answer the next question."""
    RefitClient(running.url, TOKEN).stage("affine", weights(2))
    page = opened()
    page.get_by_role("button", name="Commit").click()
    page.evaluate("document.getElementById('confirm').close(); document.querySelector('#staged button.main').click()")
    page.evaluate("new Promise(done => setTimeout(done))")  # the event is queued before this
    page.get_by_role("dialog").get_by_role("button", name="Commit").click()
    playwright.expect(page.locator("#message")).to_contain_text("Version 2 answers now")
    assert running.infer() == (2.0, 2)


def test_the_keyboard_s_place_outlives_news(running, opened, weights):
    client = RefitClient(running.url, TOKEN)
    client.stage("affine", weights(2))
    page = opened()
    page.get_by_role("button", name="Commit").focus()
    client.stage("affine", weights(3))
    playwright.expect(page.locator("#staged .card")).to_have_count(2)
    assert page.evaluate("document.activeElement.closest('.card').textContent").startswith("scale2.safetensors")
    page.keyboard.press("Enter")
    client.stage("affine", weights(4))
    playwright.expect(page.locator("#events")).to_contain_text("staged: scale4.safetensors")
    page.keyboard.press("Escape")
    playwright.expect(page.locator("#staged .card")).to_have_count(3)
    assert page.evaluate("document.activeElement.textContent") == "Commit"


def test_without_a_token_nothing_of_the_weights_shows(browser, running):
    page = browser.new_page()
    page.goto(running.url + "/")
    playwright.expect(page.get_by_role("dialog")).to_be_visible()
    page.keyboard.press("Escape")
    playwright.expect(page.locator("#state")).to_contain_text("token")
    assert page.locator("#versions li").count() == 0
    page.close()


def test_the_page_may_run_nothing_else(running):
    status, headers, content = running.ask("GET", "/", token=None, raw=True)
    assert status == 200
    assert "default-src 'none'" in headers["content-security-policy"]
    assert "unsafe" not in headers["content-security-policy"]
    assert not re.search(rb"(src|href)=\"?https?:", content)
