"""Prometheus and Grafana: their own tools read metrics, rules and dashboard; a real Prometheus scrapes a daemon."""
from __future__ import annotations

import json
import re
import shutil
import signal
import socket
import subprocess
import urllib.parse
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import yaml

from checkout import ROOT

CONFIGS = ROOT / "configs"
RULES = yaml.safe_load((CONFIGS / "prometheus-rules.yml").read_text())
DASHBOARD = json.loads((CONFIGS / "grafana-dashboard.json").read_text())
ALERTS = [rule for group in RULES["groups"] for rule in group["rules"] if "alert" in rule]

IMAGE = np.zeros((8, 8, 3), np.uint8)

needs_promtool = pytest.mark.skipif(not shutil.which("promtool"), reason="needs promtool (Debian: prometheus)")
needs_prometheus = pytest.mark.skipif(not shutil.which("prometheus"), reason="needs prometheus (Debian: prometheus)")


def promtool(*arguments: str, text: str | None = None) -> subprocess.CompletedProcess[str]:
    return subprocess.run(["promtool", *arguments], input=text, capture_output=True, text=True, check=False)


def recorded() -> set[str]:
    return {rule["record"] for group in RULES["groups"] for rule in group["rules"] if "record" in rule}


def expressions() -> list[str]:
    """Of the dashboard, with Grafana's variables filled in."""
    found = [target["expr"] for panel in DASHBOARD["panels"] for target in panel["targets"]]
    found += [annotation["expr"] for annotation in DASHBOARD["annotations"]["list"]]
    return [text.replace("$__rate_interval", "5m").replace("$instance", ".*") for text in found]


@pytest.fixture(scope="module")
def page(start_daemons: Any, wait_until: Any, tmp_path_factory: pytest.TempPathFactory) -> str:
    """All that a daemon shows, of its spool too."""
    running = start_daemons(spool=str(tmp_path_factory.mktemp("metrics") / "spool.db"))
    wait_until(lambda: running.get("/metrics")[0] == 200)
    return str(running.get("/metrics")[1])


@pytest.fixture
def exported(page: str) -> set[str]:
    """The names of its series."""
    return set(re.findall(r"^(\w+)[{ ]", page, re.MULTILINE))


# -- metrics, rules ---------------------------------------------------------------------------------------------------


@needs_promtool
def test_promtool_has_no_complaint_about_metrics(page: str, exported: set[str]) -> None:
    checked = promtool("check", "metrics", text=page)
    assert (checked.returncode, checked.stdout, checked.stderr) == (0, "", "")
    assert len(exported) > 20


@needs_promtool
def test_promtool_has_no_complaint_about_config_and_rules() -> None:
    checked = promtool("check", "config", "--lint=all", "--lint-fatal", str(CONFIGS / "prometheus.yml"))
    assert checked.returncode == 0, checked.stdout + checked.stderr
    assert f"{len(ALERTS) + len(recorded())} rules found" in checked.stdout


@needs_promtool
def test_rules_fire_in_their_histories_and_not_before() -> None:
    checked = promtool("test", "rules", str(ROOT / "tests" / "prometheus" / "rules_test.yml"))
    assert checked.returncode == 0, checked.stdout + checked.stderr
    tested = (ROOT / "tests" / "prometheus" / "rules_test.yml").read_text()
    assert [alert["alert"] for alert in ALERTS if alert["alert"] not in tested] == []


@pytest.mark.parametrize("alert", ALERTS, ids=lambda alert: str(alert["alert"]))
def test_every_alert_names_its_remedy(alert: dict[str, Any]) -> None:
    name = alert["alert"]
    assert alert["labels"]["severity"] in ("critical", "warning")
    assert alert["annotations"]["summary"]
    assert alert["annotations"]["description"].endswith(f"docs/troubleshooting.md, {name}.")
    assert f"| `{name}`" in (ROOT / "docs" / "troubleshooting.md").read_text()


def test_rules_name_only_what_there_is(exported: set[str]) -> None:
    there = exported | recorded() | {"up"}
    texts = [rule["expr"] for group in RULES["groups"] for rule in group["rules"]]
    assert {name for text in texts for name in series(text)} <= there


# -- dashboard --------------------------------------------------------------------------------------------------------


def series(text: str) -> set[str]:
    """The series that an expression names: recorded ones have colons, others our prefix; and `up`."""
    return set(re.findall(r"\b(?:instance:)?blendmaskd_[\w:]+|\bup\b", text))


def test_the_dashboard_names_only_what_there_is(exported: set[str]) -> None:
    assert {name for text in expressions() for name in series(text)} <= exported | recorded()
    assert all(series(text) for text in expressions())


@needs_promtool
def test_the_dashboard_s_expressions_are_promql(tmp_path: Path) -> None:
    rules = [{"record": f"panel:{number}", "expr": text} for number, text in enumerate(expressions())]
    file = tmp_path / "rules.yml"
    file.write_text(yaml.safe_dump({"groups": [{"name": "dashboard", "rules": rules}]}))
    checked = promtool("check", "rules", str(file))
    assert checked.returncode == 0, checked.stdout + checked.stderr
    assert f"{len(expressions())} rules found" in checked.stdout


def test_the_dashboard_is_one_by_grafana_s_own_schema() -> None:
    """Grafana Labs' generated types read all of it: what they do not know would be lost on the way back."""
    dashboard = pytest.importorskip("grafana_foundation_sdk.models.dashboard", reason="needs grafana-foundation-sdk")
    from grafana_foundation_sdk.cog.encoder import JSONEncoder
    from grafana_foundation_sdk.cog.plugins import register_default_plugins

    register_default_plugins()
    read = dashboard.Dashboard.from_json(DASHBOARD)
    assert list(lost(DASHBOARD, json.loads(JSONEncoder().encode(read)), "")) == []


def lost(before: Any, after: Any, where: str) -> Iterator[str]:
    """What of `before` is not in `after`."""
    if isinstance(before, dict) and isinstance(after, dict):
        for key, value in before.items():
            yield from lost(value, after[key], f"{where}.{key}") if key in after else [f"{where}.{key}"]
    elif isinstance(before, list) and isinstance(after, list) and len(before) == len(after):
        for place, (one, other) in enumerate(zip(before, after)):
            yield from lost(one, other, f"{where}[{place}]")
    elif before != after:
        yield where


def test_no_panel_covers_another() -> None:
    taken = set()
    for panel in DASHBOARD["panels"]:
        x, y, width, height = (panel["gridPos"][name] for name in "xywh")
        cells = {(column, row) for column in range(x, x + width) for row in range(y, y + height)}
        assert x + width <= 24
        assert not taken & cells, panel["title"]
        taken |= cells
        assert len({target["refId"] for target in panel["targets"]}) == len(panel["targets"])
    assert len({panel["id"] for panel in DASHBOARD["panels"]}) == len(DASHBOARD["panels"])


# -- a real Prometheus ------------------------------------------------------------------------------------------------


class Prometheus:
    """A server of our configuration, with its intervals and delays cut to a second."""

    def __init__(self, folder: Path, target: str) -> None:
        config = yaml.safe_load((CONFIGS / "prometheus.yml").read_text())
        config["global"] = {"scrape_interval": "1s", "evaluation_interval": "1s"}
        config["scrape_configs"][0]["static_configs"][0]["targets"] = [target]
        rules = yaml.safe_load((CONFIGS / "prometheus-rules.yml").read_text())
        for group in rules["groups"]:
            for rule in group["rules"]:
                rule.update({"for": "1s"} if "for" in rule else {})
        (folder / "prometheus.yml").write_text(yaml.safe_dump(config))
        (folder / "prometheus-rules.yml").write_text(yaml.safe_dump(rules))
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.address = f"127.0.0.1:{free.getsockname()[1]}"
        self.log = folder / "log"
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                ["prometheus", f"--config.file={folder}/prometheus.yml", f"--storage.tsdb.path={folder}/data",
                 f"--web.listen-address={self.address}", "--log.level=warn"],
                stdout=log, stderr=log,
            )  # fmt: skip

    def get(self, path: str, **query: str) -> Any:
        """What its API answers; None while it does not."""
        assert self.process.poll() is None, self.log.read_text()
        url = f"http://{self.address}/api/v1/{path}?{urllib.parse.urlencode(query)}"
        try:
            with urllib.request.urlopen(url, timeout=10) as response:
                return json.load(response)["data"]
        except OSError:
            return None

    def history(self, expression: str) -> list[float]:
        """All values that a series had in the last minute."""
        found = self.get("query", query=f"{expression}[1m]")
        return [float(value) for _, value in found["result"][0]["values"]] if found and found["result"] else []

    def firing(self) -> set[tuple[str, str]]:
        """Names of the alerts that fire, and their devices."""
        found = self.get("alerts") or {"alerts": []}
        return {(alert["labels"]["alertname"], alert["labels"].get("device", ""))
                for alert in found["alerts"] if alert["state"] == "firing"}  # fmt: skip

    def end(self) -> None:
        self.process.send_signal(signal.SIGTERM)
        try:
            self.process.wait(20)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()


@pytest.mark.slow
@needs_prometheus
def test_a_real_prometheus_records_the_combined_fps_and_alerts(
    daemon: Any, wait_until: Any, tmp_path: Path
) -> None:
    running = daemon(restarts={"give_up_after": 1, "stop_s": 2})
    prometheus = Prometheus(tmp_path, running.metrics_url.removeprefix("http://"))
    told: set[float] = set()

    def recorded_what_the_daemon_told() -> bool:
        running.client.segment(IMAGE)
        told.add(running.client.stats()["combined_fps"])
        seen = {round(value, 2) for value in prometheus.history("instance:blendmaskd_device_fps:sum")}
        return len((seen & told) - {0.0}) >= 3

    try:
        wait_until(recorded_what_the_daemon_told, 60)
        assert prometheus.firing() == set()
        psutil.Process(running.pids()["cpu:1"]).kill()
        wait_until(lambda: ("BlendmaskdDeviceDown", "cpu:1") in prometheus.firing(), 60)
        running.kill()
        wait_until(lambda: ("BlendmaskdDown", "") in prometheus.firing(), 60)
    finally:
        prometheus.end()
