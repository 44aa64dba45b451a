"""A file is there whole or not at all, and nothing else is left beside it."""
from __future__ import annotations

import os
import re
import ssl
from collections.abc import Callable
from pathlib import Path

import pytest

from blendmaskd import files, keys
from blendmaskd.client.exchange import describe
from blendmaskd.http import certificate, tokens
from blendmaskd.settings import SettingsError, load
from blendmaskd.shell import launch
from checkout import ROOT


def test_a_file_takes_its_place_when_it_is_whole(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    with files.whole(path) as beside:
        beside.write_text("half")
        assert not path.exists()
        beside.write_text("whole")
    with files.whole(path) as beside:
        beside.write_text("new")
        assert path.read_text() == "whole"
    assert [(file.name, file.read_text()) for file in tmp_path.iterdir()] == [("a.json", "new")]


def test_a_pipe_keeps_nobody_waiting(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe, 0o600)
    readers: list[Callable[[], object]] = [
        lambda: files.open_file(pipe), lambda: describe(pipe),
        lambda: certificate.load(ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER), str(pipe), str(pipe)),
    ]  # fmt: skip
    for read in readers:
        with pytest.raises(OSError, match="not a file"):
            read()
    with pytest.raises(keys.KeyFileError, match="pipe: not a file"):
        keys.read_pair(pipe)
    with pytest.raises(tokens.TokensError, match="pipe: not a file"):
        tokens.Tokens(str(pipe))
    with pytest.raises(SettingsError, match="a pipe with nothing in it"):
        load(pipe)
    assert not launch._loadable(pipe)


def test_settings_come_by_a_pipe_once(tmp_path: Path) -> None:
    reader, writer = os.pipe()
    os.write(writer, b"drain_s: 7\n")
    os.close(writer)
    assert load(f"/dev/fd/{reader}").drain_s == 7
    with pytest.raises(SettingsError, match="it is read once"):
        load(f"/dev/fd/{reader}")
    os.close(reader)


def test_what_fails_leaves_what_was_there(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_text("old")
    with pytest.raises(TypeError), files.whole(path) as beside, beside.open("w") as file:
        file.writelines(["half", None])  # type: ignore[list-item]
    with pytest.raises(FileExistsError), files.whole(path, over=False) as beside:
        beside.write_text("other")
    assert [(file.name, file.read_text()) for file in tmp_path.iterdir()] == [("a.json", "old")]


def test_a_fixed_mark_takes_over_what_a_killed_run_left(tmp_path: Path) -> None:
    (tmp_path / ".a.jpg.part").write_text("left behind")
    with files.whole(tmp_path / "a.jpg", mark="part") as beside:
        beside.write_text("whole")
    assert [file.name for file in tmp_path.iterdir()] == ["a.jpg"]


@pytest.mark.parametrize("name", ["a" * 255, "\u00e9" * 127, "\udcff" * 255], ids=["ascii", "two bytes", "no text"])
def test_a_name_may_be_as_long_as_the_disk_takes(tmp_path: Path, name: str) -> None:
    others = [tmp_path / f"{name[:-1]}{last}" for last in ("b", "c")]  # as long, or shorter by a byte
    with files.whole(tmp_path / name) as beside, files.whole(others[0]) as second, files.whole(others[1]) as third:
        for number, path in enumerate((beside, second, third)):
            path.write_text(str(number))
    assert [path.read_text() for path in (tmp_path / name, *others)] == ["0", "1", "2"]
    assert len(list(tmp_path.iterdir())) == 3


def test_nobody_else_writes_files_beside_files() -> None:
    sources = [path for folder in ("daemon", "workers") for path in (ROOT / folder).rglob("*.py")]
    own = [str(path.relative_to(ROOT)) for path in sources if re.search(r"with_name\(f\"\.\{", path.read_text("utf-8"))]
    assert own == ["daemon/blendmaskd/files.py"]


@pytest.mark.parametrize("over", [True, False])
def test_what_is_no_file_is_not_replaced_by_one(tmp_path: Path, over: bool) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    with pytest.raises(FileExistsError, match="is no regular file"), files.whole(pipe, over=over):
        raise AssertionError
    assert [path.name for path in tmp_path.iterdir()] == ["pipe"]
    assert pipe.is_fifo()
