"""An endpoint's path among the files of others: what is there stays, what is taken away is told."""
from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from blendmaskd.shell.endpoint_files import EndpointFiles, EndpointTaken, obstacle
from checkout import ROOT

PRECIOUS = "the only copy"


@pytest.fixture
def folder() -> Iterator[Path]:
    """A short one: the path of a socket has at most 107 bytes."""
    with tempfile.TemporaryDirectory(prefix="bmd-") as made:
        yield Path(made)


def _file(path: Path) -> None:
    path.write_text(PRECIOUS)


def _link(path: Path) -> None:
    path.with_name("target").write_text(PRECIOUS)
    path.symlink_to("target")


def _folder(path: Path) -> None:
    path.mkdir()
    (path / "inside").write_text(PRECIOUS)


KINDS: dict[str, Callable[[Path], None]] = {
    "file": _file, "folder": _folder, "link": _link, "dangling link": lambda path: path.symlink_to("nowhere"),
    "pipe": os.mkfifo,
}  # fmt: skip


def _contents(folder: Path) -> dict[str, Any]:
    return {
        str(path): (path.lstat().st_ino, path.read_text() if path.is_file() else None) for path in folder.rglob("*")
    }


@pytest.mark.parametrize("suffix", ["", ".fd", ".lock"])
@pytest.mark.parametrize("make", KINDS.values(), ids=KINDS)
def test_what_is_at_an_endpoint_s_path_stays(folder: Path, make: Callable[[Path], None], suffix: str) -> None:
    make(folder / f"socket{suffix}")
    before = _contents(folder)
    with pytest.raises(EndpointTaken, match=rf"{folder}/socket{suffix} is "):
        EndpointFiles(f"{folder}/socket")
    assert _contents(folder) == before


def _listen(path: Path, kind: socket.SocketKind) -> socket.socket:
    listener = socket.socket(socket.AF_UNIX, kind)
    listener.bind(str(path))
    if kind is not socket.SOCK_DGRAM:
        listener.listen()
    return listener


@pytest.mark.parametrize("kind", [socket.SOCK_STREAM, socket.SOCK_SEQPACKET, socket.SOCK_DGRAM])
@pytest.mark.parametrize("suffix", ["", ".fd"])
def test_a_socket_that_lives_stays_and_a_dead_one_makes_room(
    folder: Path, suffix: str, kind: socket.SocketKind
) -> None:
    path = folder / f"socket{suffix}"
    with _listen(path, kind):
        with pytest.raises(EndpointTaken, match=f"{path}: another process listens there"):
            EndpointFiles(f"{folder}/socket")
        assert [each.name for each in folder.iterdir()] == [path.name]
    EndpointFiles(f"{folder}/socket").close()
    assert [each.name for each in folder.iterdir()] == ["socket.lock"]


def test_a_listener_whose_socket_was_removed_is_still_known(folder: Path) -> None:
    with _listen(folder / "socket", socket.SOCK_STREAM):
        shutil.rmtree(folder)
        assert "although its socket was removed" in obstacle(f"{folder}/socket")
        folder.mkdir()
        assert "although its socket was removed" in obstacle(f"{folder}/socket")
        assert not obstacle(f"{folder}/other")
    assert not obstacle(f"{folder}/socket")


def test_only_its_own_files_are_removed_at_the_end(folder: Path) -> None:
    files = EndpointFiles(f"{folder}/socket")
    with _listen(folder / "socket", socket.SOCK_STREAM):
        files.made(f"{folder}/socket")
    assert files.missing() == []
    (folder / "socket").unlink()
    assert files.missing() == [f"{folder}/socket"]
    (folder / "socket").write_text(PRECIOUS)
    assert files.missing() == [f"{folder}/socket"]
    files.close()
    assert (folder / "socket").read_text() == PRECIOUS


def _run(endpoint: str, *words: str) -> subprocess.CompletedProcess[str]:
    argv = [sys.executable, "-m", "blendmaskd", *words, "--devices", "cpu:0", "--set", "engine=timed"]
    argv += ["--set", f"endpoints.clients=[{endpoint}]", "--set", "endpoints.metrics=null"]
    return subprocess.run(argv, cwd=ROOT, capture_output=True, text=True, timeout=60, check=False)


def test_the_daemon_and_check_refuse_by_name_what_is_there(folder: Path) -> None:
    weights = folder / "model.pth"
    weights.write_text(PRECIOUS)
    daemon, check = _run(f"ipc://{weights}"), _run(f"ipc://{weights}", "check")
    assert (daemon.returncode, check.returncode) == (78, 1)
    assert daemon.stderr.count("\n") == 1
    for text in (daemon.stderr, check.stdout):
        assert f"endpoints.clients: {weights} is a file, which is not the daemon's" in text
    assert _contents(folder) == {str(weights): (weights.stat().st_ino, PRECIOUS)}


def test_a_folder_that_cannot_be_entered_is_told_by_the_daemon_and_by_check(folder: Path) -> None:
    (folder / "file").write_text(PRECIOUS)
    unreachable = folder / "file" / "socket"  # as one is in a folder that is shut to this user
    daemon, check = _run(f"ipc://{unreachable}"), _run(f"ipc://{unreachable}", "check")
    assert (daemon.returncode, check.returncode) == (78, 1)
    assert daemon.stderr.startswith(f"blendmaskd: cannot use {unreachable}: ")
    assert f"endpoints.clients: this user cannot create {unreachable}" in check.stdout


def test_check_does_not_wait_at_a_pipe_in_the_place_of_the_lock(folder: Path) -> None:
    os.mkfifo(folder / "socket.lock")
    check = _run(f"ipc://{folder}/socket", "check")
    assert f"endpoints.clients: {folder}/socket.lock is a pipe, which is not the daemon's lock" in check.stdout


@pytest.mark.parametrize("removed", ["client.sock", "client.sock.fd", "client.sock.lock", "*"])
def test_what_is_removed_while_it_runs_is_told_and_lets_no_second_daemon_in(
    daemon: Any, wait_until: Any, removed: str
) -> None:
    running = daemon(devices=["cpu:0"])
    client = running.client
    gone = [str(path) for path in running.folder.glob(removed) if path.name.startswith("client.sock")]
    for path in gone:
        os.unlink(path)
    missing = wait_until(lambda: client.stats()["missing"])
    assert sorted(missing) == sorted(gone)
    assert all(f"ERROR {path} was removed or replaced" in running.log for path in gone)
    status, body = running.get("/readyz")
    assert (status, gone[0] in body) == (503, True)
    assert running.get("/healthz")[0] == 200
    second = _run(running.endpoint)
    assert second.returncode == 78, second.stderr
    assert client.stats()["serving"] == 1


def test_a_spool_that_is_removed_takes_no_more_jobs_and_says_so(daemon: Any, wait_until: Any, folder: Path) -> None:
    running = daemon(devices=["cpu:0"], spool=str(folder / "spool"))
    client = running.client
    image = bytes(300)
    client.forget(client.submit(_raw(image)))
    kept = folder / "kept"
    (folder / "spool").rename(kept)
    trouble = wait_until(lambda: client.stats()["spool"]["trouble"])
    assert f"{folder}/spool was removed or replaced" in trouble
    impatient = running.connect(timeout_s=0.5, retries=0)
    with pytest.raises(Exception, match=r"unavailable.*was removed or replaced"):
        impatient.submit(_raw(image))
    kept.rename(folder / "spool")
    wait_until(lambda: not client.stats()["spool"]["trouble"])
    client.forget(client.submit(_raw(image)))


def _raw(image: bytes) -> Any:
    import numpy as np

    return np.frombuffer(image, np.uint8).reshape(10, 10, 3)
