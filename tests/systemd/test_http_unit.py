"""`blendmaskd-http.service` as it is shipped: installed, started before its daemon, asked, stopped."""
from __future__ import annotations

import json
import shutil
from collections.abc import Iterator

import pytest
from sandbox import FIRST_SETTINGS, REPOSITORY, SETTINGS, UNITS, Sandbox, Service, exposure_is_low, wait_for

pytestmark = [pytest.mark.slow, pytest.mark.systemd]

UNIT = REPOSITORY / "configs/blendmaskd-http.service"
TOKENS = "/etc/blendmaskd/tokens"
TOKEN = "0123456789abcdef0123456789abcdef"
URL = "http://127.0.0.1:9466"
PHOTO = "/opt/source/configs/demo/images/0003.jpg"


def test_exposure_is_low() -> None:
    exposure_is_low(UNIT)


def test_verify_has_nothing_to_say(installed: Service) -> None:
    verified = installed.sandbox.run("systemd-analyze", "verify", f"{UNITS}/blendmaskd-http.service")
    assert (verified.stdout, verified.stderr) == ("", "")


@pytest.fixture
def guarded(installed: Service) -> Iterator[Sandbox]:
    """The front with tokens and two processes, started while the daemon is not up."""
    sandbox = installed.sandbox
    installed.systemctl("stop")
    sandbox.path(TOKENS).write_text(f"alice {TOKEN}\n")
    sandbox.path(TOKENS).chmod(0o600)
    sandbox.run("chown", "blendmaskd-http", TOKENS)
    before = sandbox.path(SETTINGS).read_text()
    plain = FIRST_SETTINGS.replace("npu", "cpu").replace("500", "5")
    installed.settings(f"{plain}\nhttp: {{tokens: {TOKENS}, processes: 2}}\n")
    try:
        sandbox.run("systemctl", "start", "blendmaskd-http")
        yield sandbox
    finally:
        sandbox.run("systemctl", "stop", "blendmaskd-http", "blendmaskd")
        installed.settings(before)


def ask(sandbox: Sandbox, *arguments: str) -> tuple[int, str]:
    """Status and body."""
    done = sandbox.run("curl", "--silent", "--write-out", "\n%{http_code}", *arguments, check=False)
    body, _, status = done.stdout.rpartition("\n")
    return int(status), body


def test_it_serves_what_the_daemon_answers(guarded: Sandbox, installed: Service) -> None:
    if not shutil.which("curl"):
        pytest.skip("needs curl")
    assert ask(guarded, f"{URL}/healthz") == (200, "ok\n")
    assert ask(guarded, f"{URL}/readyz")[0] == 503
    installed.start()
    token = f"Authorization: Bearer {TOKEN}"
    status, body = ask(guarded, "--header", token, "--data-binary", f"@{PHOTO}", f"{URL}/v1/segment")
    assert (status, json.loads(body)["width"]) == (200, 383)
    assert ask(guarded, "--data-binary", f"@{PHOTO}", f"{URL}/v1/segment")[0] == 401
    assert "shared memory" not in guarded.journal("--lines=20")
    installed.systemctl("restart")
    assert ask(guarded, "--header", token, "--data-binary", f"@{PHOTO}", f"{URL}/v1/segment")[0] == 200

    def show(name: str) -> str:
        return guarded.run("systemctl", "show", "--value", f"--property={name}", "blendmaskd-http").stdout.strip()

    assert (show("ActiveState"), show("NRestarts")) == ("active", "0")
    guarded.run("systemctl", "stop", "blendmaskd-http")
    wait_for(lambda: show("ActiveState") == "inactive")
    assert show("ExecMainStatus") == "0"
