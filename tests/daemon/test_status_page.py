"""The status page in a real browser, before a real daemon."""
from __future__ import annotations

import contextlib
import itertools
import os
import shutil
import signal
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgpack
import numpy as np
import psutil
import pytest
from PIL import Image

from blendmaskd.client.blocking import Client, JobFailed
from blendmaskd.shell.pages import Pages

playwright = pytest.importorskip("playwright.sync_api", reason="needs playwright (extra test)")

CHROMIUM = shutil.which("chromium-headless-shell") or shutil.which("chromium")
pytestmark = pytest.mark.skipif(not CHROMIUM, reason="needs Chromium (Debian: chromium-headless-shell)")

IMAGE = np.zeros((480, 640, 3), np.uint8)
EVIL = "<img src=x onerror=alert(1)>"

# All that the page shows at one moment: scripts run between two updates, never in one.
READ = """() => {
    const text = (id) => document.getElementById(id)?.textContent;
    return {
        seq: Number(document.body.dataset.seq ?? 0), stale: document.body.classList.contains("stale"),
        lines: document.querySelectorAll("#plot .line").length, title: document.title, state: text("state"),
        alarm: document.getElementById("alarm").hidden ? "" : text("alarm"),
        fps: text("fps"), waiting: text("queue"), p50: text("p50"), p99: text("p99"), answered: text("answered"),
        devices: Object.fromEntries([...document.querySelectorAll(".device")].map((device) => [device.dataset.device, {
            state: device.dataset.state, why: device.querySelector(".why").textContent,
            fps: device.querySelector(".rate b").textContent, lines: device.querySelectorAll(".plot .line").length,
            facts: Object.fromEntries([...device.querySelectorAll(".facts > div")].map(
                (fact) => [fact.firstChild.textContent, fact.lastChild.textContent])),
        }])),
        failures: [...document.querySelectorAll("#failures tbody tr")].map(
            (row) => [...row.cells].slice(1).map((cell) => cell.textContent)),
    };
}"""

# Texts whose colour is too near to that of what is behind them (WCAG 2 AA), and what a screen reader would not name.
COMPLAINTS = """() => {
    const numbers = (colour) => colour.match(/[\\d.]+/g).map(Number);
    const light = (colour) => numbers(colour).slice(0, 3).map((value) => value / 255).map(
        (value) => value <= 0.04045 ? value / 12.92 : ((value + 0.055) / 1.055) ** 2.4
    ).reduce((sum, value, place) => sum + value * [0.2126, 0.7152, 0.0722][place], 0);
    const paper = (element) => {
        for (let at = element; at; at = at.parentElement) {
            const colour = getComputedStyle(at).backgroundColor;
            if ((numbers(colour)[3] ?? 1) > 0) return colour;
        }
        return "rgb(255, 255, 255)";
    };
    const found = [];
    for (const element of document.querySelectorAll("body *")) {
        if (!element.checkVisibility() || ["SCRIPT", "STYLE"].includes(element.tagName)) continue;
        const style = getComputedStyle(element), inside = element.namespaceURI.endsWith("svg");
        const says = [...element.childNodes].some((node) => node.nodeType === 3 && node.textContent.trim());
        if (says) {
            const ink = light(inside ? style.fill : style.color), under = light(paper(element));
            const contrast = (Math.max(ink, under) + 0.05) / (Math.min(ink, under) + 0.05);
            if (contrast < 4.5) found.push(`${element.textContent}: contrast ${contrast.toFixed(2)}`);
        }
        if (element.tagName === "svg" && !element.hasAttribute("aria-hidden") && !element.getAttribute("aria-label"))
            found.push(`${element.id}: svg without a name`);
        if (element.tagName === "IMG" && !element.alt) found.push("img without alt");
    }
    return found;
}"""


class Watched:
    """A page, and what it complained of, asked for and wanted to tell."""

    def __init__(self, context: Any, url: str) -> None:
        self.url = url
        self.complaints: list[str] = []
        self.requests: list[str] = []
        self.tab = context.new_page()
        self.tab.on("console", lambda message: self.complaints.append(f"{message.type}: {message.text}"))
        self.tab.on("pageerror", lambda error: self.complaints.append(str(error)))
        self.tab.on("dialog", lambda dialog: (self.complaints.append(dialog.message), dialog.dismiss()))
        self.tab.on("request", lambda request: self.requests.append(request.url))
        self.tab.goto(url)

    def read(self) -> dict[str, Any]:
        found: dict[str, Any] = self.tab.evaluate(READ)
        return found

    def check(self) -> None:
        """No complaint, and nobody else was asked for anything."""
        assert self.complaints == []
        assert {url for url in self.requests if not url.startswith((self.url + "/", "data:"))} == set()


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    flags = ["--no-sandbox"] if os.geteuid() == 0 else []  # Chromium's own refuses to work for root
    with playwright.sync_playwright() as running:
        opened = running.chromium.launch(executable_path=CHROMIUM, args=flags)
        yield opened
        opened.close()


@pytest.fixture
def visit(browser: Any) -> Iterator[Callable[..., Watched]]:
    """``visit(url, width=1280, color_scheme="light")``"""
    with contextlib.ExitStack() as contexts:

        def open_page(url: str, width: int = 1280, height: int = 900, **options: Any) -> Watched:
            context = browser.new_context(viewport={"width": width, "height": height}, **options)
            contexts.callback(context.close)
            return Watched(context, url)

        yield open_page


@contextlib.contextmanager
def load(endpoint: str, window: int = 8) -> Iterator[None]:
    """Keep the daemon busy."""
    stop = threading.Event()

    def work() -> None:
        with Client(endpoint) as client:
            images = itertools.takewhile(lambda _: not stop.is_set(), itertools.repeat(IMAGE))
            for _ in client.map(images, window=window):
                pass

    thread = threading.Thread(target=work)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()


def duration(seconds: float | None) -> str:
    if seconds is None:
        return "–"
    if seconds >= 1:
        return f"{seconds:.2f} s"
    milliseconds = seconds * 1000
    return f"{milliseconds:.{2 if milliseconds < 10 else 1 if milliseconds < 100 else 0}f} ms"


@pytest.mark.slow
def test_the_page_shows_the_figures_of_metrics_and_stats(daemon: Any, visit: Any, wait_until: Any) -> None:
    running = daemon()
    page = visit(running.metrics_url)
    shown: dict[int, dict[str, Any]] = {}
    metrics: dict[int, dict[str, str]] = {}
    stats: dict[int, dict[str, Any]] = {}

    def collect() -> bool:
        found = page.read()
        shown[found["seq"]] = found
        lines = running.get("/metrics")[1].splitlines()
        values = dict(line.replace('"', "").rsplit(" ", 1) for line in lines if not line.startswith("#"))
        metrics[int(float(values.get("blendmaskd_snapshot_seq", 0)))] = values
        snapshot = running.client.stats()
        stats[snapshot["seq"]] = snapshot
        common = shown.keys() & metrics.keys() & stats.keys()
        return sum(stats[seq]["combined_fps"] > 0 for seq in common) >= 3

    with load(running.endpoint):
        wait_until(collect, 60)
    for seq in shown.keys() & metrics.keys() & stats.keys():
        found, values, snapshot = shown[seq], metrics[seq], stats[seq]
        assert found["fps"] == f"{float(values['blendmaskd_combined_fps']):.2f}"
        assert found["waiting"] == f"{float(values['blendmaskd_queue_jobs']):.0f}"
        assert found["answered"] == f"{float(values['blendmaskd_jobs_total{outcome=answered}']):,.0f}"
        assert (found["p50"], found["p99"]) == tuple(duration(snapshot["latency"][name]) for name in ("p50", "p99"))
        assert found["devices"].keys() == {"cpu:0", "cpu:1"}
        for name, device in found["devices"].items():
            assert device["fps"] == f"{float(values[f'blendmaskd_device_fps{{device={name}}}']):.2f}"
            assert device["lines"] >= 1
        assert found["lines"] >= 1
        for device in snapshot["devices"]:
            facts = found["devices"][device["device"]]["facts"]
            assert facts["generation, pid"] == f"{device['generation']}, {device['pid']}"
            assert facts["CPUs"] == device["actual"]["cpus"]
    assert (found["state"], found["alarm"]) == ("ok", "")
    assert "FPS" in found["title"]
    page.check()


@pytest.mark.slow
def test_a_killed_worker_and_a_failed_job_show_up(daemon: Any, visit: Any, wait_until: Any) -> None:
    running = daemon()
    page = visit(running.metrics_url)
    wait_until(lambda: page.read()["state"] == "ok", 30)
    pid = running.pids()["cpu:0"]
    psutil.Process(pid).kill()

    def restarted() -> bool:
        device = page.read()["devices"]["cpu:0"]
        generation, _, now = device["facts"]["generation, pid"].partition(", ")
        return (device["state"], device["facts"]["restarts"], generation) == ("ready", "1", "2") and now != str(pid)

    wait_until(restarted, 30)
    with pytest.raises(JobFailed):
        running.client.segment(b"no image")
    header = {"type": "submit", "job": EVIL, "image": {"kind": "encoded"}}
    running.dealer().send_multipart([b"BMD1", msgpack.packb(header), b"no image either"])
    wait_until(lambda: any(job == EVIL for *_, job in page.read()["failures"]), 30)
    codes = [code for code, _, _ in page.read()["failures"]]
    assert codes == ["bad-image", "bad-image"]
    assert page.tab.locator("#failures img").count() == 0
    page.check()


def test_a_device_that_is_gone_for_good_is_said_loudly(daemon: Any, visit: Any, wait_until: Any) -> None:
    running = daemon(restarts={"give_up_after": 1, "stop_s": 2})
    page = visit(running.metrics_url)
    wait_until(lambda: page.read()["state"] == "ok", 30)
    psutil.Process(running.pids()["cpu:1"]).kill()
    wait_until(lambda: page.read()["devices"]["cpu:1"]["state"] == "failed", 30)
    found = page.read()
    assert found["state"] == "degraded"
    assert found["alarm"].startswith("Degraded: 1 of 2 devices can serve.cpu:1 failed: ")
    assert "SIGKILL" in found["alarm"]
    assert "SIGKILL" in found["devices"]["cpu:1"]["why"]
    psutil.Process(running.pids()["cpu:0"]).kill()
    wait_until(lambda: page.read()["state"] == "not serving", 30)
    page.check()


@pytest.mark.slow
def test_a_daemon_that_drains_stops_and_comes_back(daemon: Any, visit: Any, wait_until: Any) -> None:
    running = daemon(devices=["cpu:0"], timed={"latency_ms": {1: 1500}}, drain_s=30)
    page = visit(running.metrics_url)
    wait_until(lambda: page.read()["state"] == "ok", 30)
    endpoints = {**running.settings["endpoints"], "metrics": running.metrics_url.removeprefix("http://")}
    with load(running.endpoint, window=2):
        wait_until(lambda: running.client.stats()["leased"], 30)
        running.process.send_signal(signal.SIGTERM)
        wait_until(lambda: page.read()["state"] == "draining", 30)
        assert "new ones are refused" in page.read()["alarm"]
        page.check()
        running.process.wait(60)
        wait_until(lambda: page.read()["state"] == "no answer", 30)
        found = page.read()
        assert found["stale"]
        assert found["alarm"].startswith("The daemon does not answer.")
        assert "no answer" in found["title"]
        page.complaints.clear()  # the browser's own, of connections refused
        running.rewrite(endpoints=endpoints)
        running.start()
        wait_until(lambda: page.read()["state"] == "ok", 60)
    assert not page.read()["stale"]


@pytest.mark.slow
def test_a_loop_that_hangs_is_told_from_one_that_works(visit: Any, wait_until: Any, shared_daemon: Any) -> None:
    server = Pages("127.0.0.1:0")
    try:
        page = visit(f"http://127.0.0.1:{server.port}")
        wait_until(lambda: page.read()["state"] == "starting", 30)
        server.publish(shared_daemon.client.stats())  # the last one for ever
        wait_until(lambda: page.read()["state"] == "ok", 30)
        wait_until(lambda: page.read()["state"] == "hangs", 30)
        assert page.read()["stale"]
        page.check()
    finally:
        server.close()


def test_the_last_image_is_off_by_default(shared_daemon: Any, visit: Any, wait_until: Any) -> None:
    page = visit(shared_daemon.metrics_url)
    for _ in shared_daemon.client.map([IMAGE] * 3):
        pass
    seq = shared_daemon.client.stats()["seq"]
    wait_until(lambda: page.read()["seq"] > seq + 1, 30)
    assert page.tab.locator("#last").is_hidden()
    assert shared_daemon.get("/last.jpg")[0] == 404
    assert not any("last.jpg" in url for url in page.requests)
    page.check()


@pytest.mark.slow
def test_the_last_image_is_shown_where_settings_allow_it(daemon: Any, visit: Any, wait_until: Any) -> None:
    running = daemon(show_last_image=True)
    page = visit(running.metrics_url)

    def width() -> int:
        running.client.segment(IMAGE)
        return int(page.tab.evaluate("() => document.querySelector('#last img').naturalWidth"))

    assert wait_until(width, 30) == IMAGE.shape[1]
    assert page.tab.locator("#last").is_visible()
    running.rewrite(show_last_image=False)
    running.process.send_signal(signal.SIGHUP)
    wait_until(lambda: page.tab.locator("#last").is_hidden(), 60)
    assert running.get("/last.jpg")[0] == 404
    page.check()


@pytest.mark.slow
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_it_can_be_read_on_every_width(
    scheme: str, daemon: Any, visit: Any, wait_until: Any, tmp_path: Path
) -> None:
    """The pictures, too: two devices under load, one killed, one job that failed."""
    running = daemon(devices=["npu:0", "npu:1"], timed={"latency_ms": {1: 20, 2: 38}}, restarts={"first_delay_s": 600})
    page = visit(running.metrics_url, color_scheme=scheme)
    with load(running.endpoint), pytest.raises(JobFailed):
        running.client.segment(b"no image")
    psutil.Process(running.pids()["npu:1"]).kill()
    wait_until(lambda: page.read()["devices"]["npu:1"]["state"] == "backoff" and page.read()["failures"], 30)
    for width in (1280, 768, 390, 320):
        page.tab.set_viewport_size({"width": width, "height": 800})
        assert page.tab.evaluate("() => document.documentElement.scrollWidth") <= width
        assert page.tab.evaluate(COMPLAINTS) == []
        picture = tmp_path / f"{scheme}-{width}.png"
        page.tab.screenshot(path=picture, full_page=True)
        with Image.open(picture) as drawn:
            assert drawn.width == width
            assert len(drawn.convert("RGB").getcolors(1 << 20)) > 50
    page.check()
