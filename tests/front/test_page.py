"""The page to try an image, in a real browser."""
from __future__ import annotations

import shutil
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from running_front import PHOTO, Front, MakeFront, fronts

from blendmaskd.coco.bitmaps import decode

playwright = pytest.importorskip("playwright.sync_api", reason="needs playwright (extra test)")

CHROMIUM = shutil.which("chromium-headless-shell") or shutil.which("chromium")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not CHROMIUM, reason="needs Chromium (Debian: chromium-headless-shell)"),
]
TOKEN = "0123456789abcdef0123456789abcdef"

# The columns of a mask that the page has decoded, as rows of [x, from, to].
SPANS = """() => last.detections.map((detection) =>
    detection.columns.flatMap((spans, x) => spans.map(([from, to]) => [x, from, to])))"""


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with playwright.sync_playwright() as running:
        yield running.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])


@pytest.fixture
def page(browser: Any) -> Iterator[Any]:
    """Fails for what the browser complains of, except a refused request."""
    context = browser.new_context(viewport={"width": 1200, "height": 800})
    opened = context.new_page()
    complaints: list[str] = []
    opened.on("pageerror", lambda error: complaints.append(str(error)))
    opened.on("console", lambda line: complaints.append(line.text) if line.type == "error" else None)
    opened.on("request", lambda request: complaints.append(request.url) if "127.0.0.1" not in request.url else None)
    yield opened
    context.close()
    assert [line for line in complaints if "status of 4" not in line and "blob:" not in line] == []


def choose(page: Any, path: Path | str, state: str = "done") -> None:
    page.evaluate("delete document.body.dataset.state")
    page.set_input_files("#file", path)
    page.wait_for_selector(f"body[data-state={state}]", timeout=60_000)


@pytest.fixture(scope="module")
def demo(start_daemons: Any, wait_until: Any) -> Iterator[Front]:
    """A front before the demo's model, on the CPU."""
    model = {"config": "configs/demo/demo.yaml", "weights": "configs/demo/model_final.pth"}
    with fronts(wait_until) as make:
        yield make(start_daemons(engine="native", model=model, devices=["cpu:0"], warm_up=[[259, 383]]))


def test_an_image_of_the_demo_is_seen_with_its_masks(demo: Front, page: Any, photo: bytes) -> None:
    page.goto(demo.url)
    choose(page, PHOTO)
    answer = demo.ask("POST", "/v1/segment", photo).tree
    good = [found for found in answer["detections"] if found["score"] >= 0.5]
    assert len(good) >= 1
    assert page.locator("#found li").count() == len(good)
    assert page.inner_text("#found li:first-child button").split() == [
        good[0]["category_name"], f"{good[0]['score']:.2f}"
    ]  # fmt: skip
    spans = page.evaluate(SPANS)
    assert len(spans) == len(answer["detections"])
    for drawn, found in zip(spans, answer["detections"]):
        mask = np.zeros((answer["height"], answer["width"]), bool)
        for x, start, end in drawn:
            mask[start:end, x] = True
        assert np.array_equal(mask, decode(found["segmentation"], answer["height"], answer["width"]))
    before = page.evaluate("by('canvas').toDataURL()")
    page.fill("#threshold", "1")
    assert page.locator("#found li").count() == 0
    assert page.evaluate("by('canvas').toDataURL()") != before
    assert {"device", "total", "with the network"} <= set(page.locator("#timings dt").all_inner_texts())


def test_a_file_that_is_no_image_says_why(shared_front: Front, page: Any, tmp_path: Path) -> None:
    page.goto(shared_front.url)
    (tmp_path / "a.jpg").write_bytes(b"no image")
    choose(page, tmp_path / "a.jpg", "failed")
    assert page.inner_text("#problem").startswith("bad-image: not a JPEG")
    choose(page, PHOTO)
    assert page.locator("#problem").is_hidden()


def test_what_the_browser_cannot_show_has_masks_all_the_same(shared_front: Front, page: Any, tmp_path: Path) -> None:
    page.goto(shared_front.url)
    Image.new("RGB", (40, 30), (9, 200, 9)).save(tmp_path / "a.tif")
    choose(page, tmp_path / "a.tif")
    assert page.evaluate("[by('canvas').width, by('canvas').height, image]") == [40, 30, None]
    assert page.locator("#found li").count() == 1


def test_it_is_used_by_keyboard_and_on_small_screens(shared_front: Front, page: Any) -> None:
    page.set_viewport_size({"width": 340, "height": 600})
    page.on("filechooser", lambda chooser: chooser.set_files(PHOTO))
    page.goto(shared_front.url)
    page.keyboard.press("Tab")
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.id") == "drop"
    page.keyboard.press("Enter")
    page.wait_for_selector("body[data-state=done]")
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
    page.focus("#threshold")
    page.keyboard.press("ArrowRight")
    assert page.inner_text("#shown") == "0.51"
    page.keyboard.press("Tab")
    page.keyboard.press("Enter")
    assert page.get_attribute("#found button", "aria-pressed") == "true"


def test_a_token_is_asked_for(shared_daemon: Any, front: MakeFront, page: Any, tmp_path: Path) -> None:
    (tmp_path / "tokens").write_text(f"alice {TOKEN}\n")
    (tmp_path / "tokens").chmod(0o600)
    page.goto(front(shared_daemon, tokens=str(tmp_path / "tokens")).url)
    assert page.locator("#access").is_hidden()
    choose(page, PHOTO, "failed")
    page.fill("#token", TOKEN)
    choose(page, PHOTO)
    assert page.locator("#found li").count() == 1


def test_the_status_page_leads_here(daemon: Any, front: MakeFront, page: Any, wait_until: Any) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        place = f"127.0.0.1:{free.getsockname()[1]}"
    server = daemon(http={"endpoint": place})
    assert "Try an image" not in server.get("/")[1]
    front(server, endpoint=place)
    page.goto(server.metrics_url)
    page.click("text=Try an image")
    page.wait_for_selector("#drop")
    assert page.url == f"http://{place}/"
