"""The six scenes on our own server: what no other one combined (BENCHMARKS.md), whatever the machine's load."""
from __future__ import annotations

import json

import pytest

from chaos import fault_scenes as scenes


@pytest.mark.slow
def test_the_six_scenes(tmp_path, capsys) -> None:
    file = tmp_path / "row.json"
    assert scenes.main(["--seconds", "1", "--json", str(file)]) == 0
    figures = json.loads(file.read_text())
    assert figures["kill"]["failures"] == {}
    assert figures["kill"]["wrong"] == 0
    assert any("degraded" in page for page in figures["kill"]["health"])
    assert figures["leave"]["ran"] < figures["leave"]["clients"]
    assert sum(figures["flood"]["codes"].values()) == figures["flood"]["jobs"]
    assert figures["flood"]["codes"].keys() == {"busy", "result"}
    assert figures["sigterm"]["answers"].keys() <= {"result", "draining"}
    assert sum(figures["sigterm"]["answers"].values()) == figures["sigterm"]["jobs"]
    assert (figures["sigterm"]["exit"], figures["sigterm"]["left"]) == (0, 0)
    head, rule, row = capsys.readouterr().out.strip().splitlines()
    assert head.count("|") == rule.count("|") == row.count("|") == 8
