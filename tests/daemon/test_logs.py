"""Log lines in both formats, in the journal, and one job followed through the death of its worker by its name alone."""
from __future__ import annotations

import json
import logging
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from blendmaskd import protocol
from blendmaskd.client.blocking import JobFailed
from blendmaskd.core.jobs import Step
from blendmaskd.logs import JsonFormatter, TextFormatter, about
from blendmaskd.protocol import Cancel, Image, Submit
from blendmaskd.shell.job_log import FAILURES_PER_S, JobLog
from checkout import ROOT

TIME = r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z"


def record(message: str, level: int = logging.INFO, exc_info: Any = None, **what: Any) -> logging.LogRecord:
    made = logging.LogRecord("blendmaskd", level, "", 0, message, (), exc_info)
    made.__dict__.update(about(**what))
    return made


def test_text_is_a_line_with_what_it_is_about() -> None:
    line = TextFormatter({"slot": "npu:0.1"}, journal=False).format(record("ready", job="7", seconds=0.25, code=""))
    assert re.fullmatch(rf"{TIME} INFO ready slot=npu:0\.1 job=7 seconds=0\.250", line)


def test_a_client_cannot_forge_a_line_or_a_key() -> None:
    line = TextFormatter({}, journal=True).format(record("failed: a\nINFO b\x1b[2J", job="1 code=ok\n2"))
    assert line == r'<6>INFO failed: a\nINFO b\x1b[2J job="1 code=ok\n2"'


def test_json_is_an_object_in_a_line() -> None:
    made = record("a\nb", logging.ERROR, job='"', seconds=0.25)
    line = JsonFormatter({"slot": "npu:0.1"}, journal=False).format(made)
    assert "\n" not in line
    tree = json.loads(line)
    assert re.fullmatch(TIME, tree.pop("time"))
    assert tree == {"level": "error", "message": "a\nb", "slot": "npu:0.1", "job": '"', "seconds": 0.25}


def test_an_exception_goes_with_its_line() -> None:
    try:
        raise ValueError("why")
    except ValueError:
        made = record("failed", logging.ERROR, sys.exc_info(), lease=3)
    text = TextFormatter({}, journal=True).format(made).splitlines()
    assert text[0] == "<3>ERROR failed lease=3"
    assert text[-1] == "<3>ValueError: why"
    assert all(line.startswith("<3>") for line in text)
    assert json.loads(JsonFormatter({}, journal=False).format(made))["exception"].endswith("ValueError: why")


@pytest.mark.parametrize("same_file", [True, False])
def test_priorities_are_for_the_journal_alone(same_file: bool, tmp_path: Path) -> None:
    program = ("import logging; from blendmaskd import logs, settings; logs.configure(settings.Log()); "
               "logging.getLogger('blendmaskd').warning('so'); logging.getLogger('PIL').info('not so')")  # fmt: skip
    with (tmp_path / "err").open("w") as err:
        status = os.fstat(err.fileno())
        stream = f"{status.st_dev}:{status.st_ino if same_file else status.st_ino + 1}"
        subprocess.run([sys.executable, "-c", program], cwd=ROOT, env={**os.environ, "JOURNAL_STREAM": stream},
                       stderr=err, check=True)  # fmt: skip
    text = (tmp_path / "err").read_text()
    assert text == "<4>WARNING so\n" if same_file else re.fullmatch(f"{TIME} WARNING so\n", text)


# -- jobs -----------------------------------------------------------------------------------------------------------


def failed(code: str, job: str = "1") -> Step:
    return Step("failed", job, b"\xab\xcd\xef\x01\x02", accepted=10.0, code=code, reason="because")


def test_failures_are_told_unless_they_are_the_clients_fault(caplog: pytest.LogCaptureFixture) -> None:
    log = JobLog(tracing=False)
    log.tell([failed("worker-lost"), failed("bad-image"), failed("busy"), Step("leased", "1", b"c", 10.0)], now=10.5)
    [line] = caplog.records
    assert (line.levelname, line.getMessage()) == ("WARNING", "failed: because")
    digest = line.about.pop("client")
    assert re.fullmatch("[0-9a-f]{8}", digest)
    assert not b"\xab\xcd\xef\x01\x02".hex().startswith(digest)  # whoever knows an identity can take its place
    assert line.about == {"job": "1", "code": "worker-lost", "seconds": 0.5}


def test_a_storm_of_failures_is_told_in_a_few_lines(caplog: pytest.LogCaptureFixture) -> None:
    log = JobLog(tracing=False)
    for name in range(300):
        log.tell([failed("timeout", str(name))], now=11.0)
    log.tick()
    assert len(caplog.records) == FAILURES_PER_S + 1
    assert caplog.records[-1].getMessage() == f"{300 - FAILURES_PER_S} more jobs failed within a second"
    log.tick()
    assert len(caplog.records) == FAILURES_PER_S + 1
    log.tell([failed("timeout")], now=12.0)
    assert len(caplog.records) == FAILURES_PER_S + 2


def submit(dealer: Any, *names: str) -> None:
    for name in names:
        message = Submit(job=name, image=Image(kind="raw", shape=(4, 6, 3)))
        dealer.send_multipart(protocol.encode(message, [bytes(72)]))


def lines_about(server: Any, job: str, as_json: bool) -> list[dict[str, str]]:
    """As `grep job=NAME` or `jq 'select(.job == NAME)'` find them."""
    lines = server.log.splitlines()
    if as_json:
        return [tree for line in lines if line.startswith("{") and (tree := json.loads(line)).get("job") == job]
    found = [line for line in lines if f" job={job} " in f"{line} "]
    parsed = [re.match(rf"{TIME} (\w+) (.*?)((?: \w+=\S+)*)$", line) for line in found]
    return [{"level": match[1].lower(), "message": match[2], **dict(pair.split("=") for pair in match[3].split())}
            for match in parsed if match]  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("form", ["text", "json"])
def test_a_job_is_followed_by_its_name_through_the_death_of_its_worker(form: str, daemon: Any, wait_until: Any) -> None:
    server = daemon(devices=["cpu:0"], timed={"latency_ms": {1: 2000}}, log={"format": form, "jobs": True})
    dealer, name = server.dealer(), "img/7.jpg"
    pid = server.pids()["cpu:0"]
    submit(dealer, name, "other")
    wait_until(lambda: any(line["message"] == "started" for line in lines_about(server, name, form == "json")))
    os.kill(pid, 9)
    dealer.send_multipart(protocol.encode(Cancel(job="other")))
    answers = [protocol.decode(dealer.recv_multipart(), protocol.TO_CLIENT)[0] for _ in range(2)]
    assert [answer.job for answer in answers if isinstance(answer, protocol.Result)] == [name]
    wait_until(lambda: any(line["message"] == "answered" for line in lines_about(server, name, form == "json")))
    lines = lines_about(server, name, form == "json")
    assert [line["message"].partition(":")[0] for line in lines] == [
        "accepted", "leased", "started", "suspected", "leased", "answered"]  # fmt: skip
    assert [line.get("slot") for line in lines] == [None, *["cpu:0.1"] * 3, *["cpu:0.2"] * 2]
    assert "killed by SIGKILL" in lines[3]["message"]
    assert lines[1]["lease"] == lines[2]["lease"] != lines[4]["lease"]
    assert (lines[-1]["code"], float(lines[-1]["seconds"]) > 2) == ("ok", True)
    assert len({line["client"] for line in lines}) == 1


def test_jobs_are_not_told_unless_asked_and_a_reload_asks(daemon: Any, wait_until: Any) -> None:
    server = daemon(devices=["cpu:0"])
    dealer = server.dealer()
    submit(dealer, "quiet")
    dealer.recv_multipart()
    server.rewrite(log={"jobs": True})
    server.process.send_signal(1)
    wait_until(lambda: "replacing the workers" in server.log, 30)
    submit(dealer, "told")
    dealer.recv_multipart()
    wait_until(lambda: lines_about(server, "told", False))
    assert lines_about(server, "quiet", False) == []


def test_a_failure_names_its_job_in_any_case(daemon: Any, wait_until: Any) -> None:
    server = daemon(devices=["cpu:0"], timed={"latency_ms": {1: 2000}})
    dealer = server.dealer()
    message = Submit(job="late", image=Image(kind="raw", shape=(4, 6, 3)), deadline_s=0.2)
    dealer.send_multipart(protocol.encode(message, [bytes(72)]))
    dealer.recv_multipart()
    [line] = wait_until(lambda: lines_about(server, "late", False))
    assert (line["level"], line["code"], line["slot"]) == ("warning", "timeout", "cpu:0.1")


def test_answers_have_the_names_that_the_log_has(daemon: Any, wait_until: Any) -> None:
    server = daemon(devices=["cpu:0"], log={"jobs": True})
    job = server.client.segment(np.zeros((4, 6, 3), np.uint8)).job
    lines = wait_until(lambda: [line for line in lines_about(server, job, False) if line["message"] == "answered"])
    assert lines[0]["code"] == "ok"
    with pytest.raises(JobFailed) as failed:
        server.client.segment(b"no image")
    [line] = wait_until(lambda: [x for x in lines_about(server, failed.value.job, False) if "code" in x])
    assert line["code"] == "bad-image"


def test_a_worker_speaks_as_the_daemon_does(daemon: Any, wait_until: Any) -> None:
    server = daemon(wait=False, devices=["cpu:0"], engine="native", log={"format": "json"})
    wait_until(lambda: server.process.poll() is not None, 30)
    lines = [json.loads(line) for line in server.log.splitlines()]
    [line] = [line for line in lines if "model.weights is not set" in line["message"]]
    assert (line["level"], line["slot"]) == ("error", "cpu:0.1")
