"""The program that makes keys, and how key files are read."""
from __future__ import annotations

import os
import resource
import stat
import subprocess
import sys
from pathlib import Path

import pytest
import zmq.auth

from blendmaskd import keys
from blendmaskd.keys import KeyFileError
from blendmaskd.shell.admission.access import LOCAL, AllowedKeys, Identities, Verdict
from checkout import ROOT


def _mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


@pytest.fixture(params=[0o000, 0o022, 0o077], ids="umask {:03o}".format)
def _umask(request):
    before = os.umask(request.param)
    yield
    os.umask(before)


@pytest.mark.usefixtures("_umask")
def test_modes_are_the_same_under_every_umask(tmp_path, capsys) -> None:
    folder = tmp_path / "etc" / "keys"
    assert keys.main(["server", str(folder)]) == 0
    assert keys.main(["client", "alice", "--allow", str(folder / "clients"), "--to", str(tmp_path / "alice")]) == 0
    assert {path.name: _mode(path) for path in [folder, *folder.rglob("*"), *tmp_path.glob("alice/*")]} == {
        "keys": 0o700, "server.key": 0o644, "server.key_secret": 0o600, "clients": 0o700,
        "alice.key": 0o644, "alice.key_secret": 0o600,
    }  # fmt: skip
    assert "next" in capsys.readouterr().out.lower()


def test_other_programs_of_zeromq_read_them(tmp_path) -> None:
    pair = keys.write_pair(tmp_path, "alice")
    assert zmq.auth.load_certificate(tmp_path / "alice.key_secret") == (pair.public, pair.secret)
    assert zmq.auth.load_certificate(tmp_path / "alice.key") == (pair.public, None)
    assert zmq.auth.load_certificates(tmp_path) == {pair.public: True}
    _, theirs = zmq.auth.create_certificates(tmp_path, "theirs")
    Path(theirs).chmod(0o600)
    assert keys.read_pair(theirs).public == keys.read_public(tmp_path / "theirs.key")


@pytest.mark.parametrize("again", [["server", "{0}/keys"], ["client", "alice", "--to", "{0}/alice"],
                                   ["client", "alice", "--to", "{0}/new", "--allow", "{0}/keys/clients"]])  # fmt: skip
def test_nothing_is_replaced_without_being_told(tmp_path, capsys, again) -> None:
    keys.main(["server", str(tmp_path / "keys")])
    keys.main(["client", "alice", "--to", str(tmp_path / "alice"), "--allow", str(tmp_path / "keys" / "clients")])
    before = {path: path.read_bytes() for path in tmp_path.rglob("*.key*")}
    arguments = [argument.format(tmp_path) for argument in again]
    capsys.readouterr()
    assert keys.main(arguments) == 1
    assert "exists; --force replaces it" in capsys.readouterr().err
    assert {path: path.read_bytes() for path in tmp_path.rglob("*.key*")} == before
    assert keys.main([*arguments, "--force"]) == 0
    assert any(path.read_bytes() != text for path, text in before.items())


def test_half_a_pair_is_not_completed(tmp_path, capsys) -> None:
    keys.write_pair(tmp_path, "alice")
    (tmp_path / "alice.key_secret").unlink()
    assert keys.main(["client", "alice", "--to", str(tmp_path)]) == 1
    assert not (tmp_path / "alice.key_secret").exists()


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["client", "../alice", "--to", "{0}"], "'../alice': expected a name"),
        (["client", "", "--to", "{0}"], "expected a name"),
        (["client", "alice", "--to", "{0}", "--allow", "{0}/none"], "none: no such folder: create it with"),
        (["client", "alice", "--to", "{0}", "--owner", "nobody-has-this-name"], "nobody-has-this-name: no such user"),
        (["client", "alice", "--to", "{0}/file/x"], "Not a directory"),
        (["list", "{0}/none"], "none: no such folder"),
    ],
)
def test_mistakes_are_named(tmp_path, capsys, arguments, reason) -> None:
    (tmp_path / "file").touch()
    assert keys.main([argument.format(tmp_path) for argument in arguments]) == 1
    assert reason in capsys.readouterr().err
    assert not list(tmp_path.rglob("*alice*")), "half of it was done"


def test_list_shows_who_is_allowed_and_what_is_no_key(tmp_path, capsys) -> None:
    pair = keys.write_pair(tmp_path, "alice")
    assert keys.main(["list", str(tmp_path)]) == 0
    assert capsys.readouterr().out == f"{pair.public.decode()}  alice\n"
    (tmp_path / "bob.key").write_text("curve\n    public-key = \"short\"\n")
    assert keys.main(["list", str(tmp_path)]) == 1
    assert "bob.key: 'short' is not a key" in capsys.readouterr().err


def test_the_script_and_its_help(tmp_path) -> None:
    done = subprocess.run(
        [sys.executable, ROOT / "scripts" / "keys.py", "client", "--help"], capture_output=True, text=True, timeout=30
    )
    assert done.returncode == 0
    assert {"--allow", "--owner", "--force", "--to"} <= set(done.stdout.replace(",", " ").split())


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o660, 0o666, 0o700 | 0o010])
def test_a_secret_that_others_may_read_is_refused(tmp_path, mode) -> None:
    keys.write_pair(tmp_path, "server")
    path = tmp_path / "server.key_secret"
    path.chmod(mode)
    with pytest.raises(KeyFileError, match=f"has mode {mode:04o}, so others can read it: chmod 600"):
        keys.read_pair(path)


@pytest.mark.parametrize(("mode", "owner", "user", "is_open"), [
    (0o600, 1000, 1000, False), (0o640, 1000, 1000, True), (0o440, 0, 1000, False), (0o640, 0, 1000, False),
    (0o660, 0, 1000, True), (0o444, 0, 1000, True), (0o440, 0, 0, True), (0o400, 0, 0, False),
    (0o440, 1001, 1000, True),
])  # fmt: skip
def test_only_root_may_let_a_group_read(mode, owner, user, is_open) -> None:
    assert keys.is_open_to_others(mode, owner, user) is is_open


def test_what_is_no_key_file_is_named(tmp_path) -> None:
    alice, bob = (keys.write_pair(tmp_path, name) for name in ("alice", "bob"))
    with pytest.raises(KeyFileError, match=r"none.key: No such file"):
        keys.read_public(tmp_path / "none.key")
    with pytest.raises(KeyFileError, match=r"alice.key: has no secret key: name the file that ends in .key_secret"):
        keys.read_pair(tmp_path / "alice.key")
    mixed = tmp_path / "mixed.key_secret"
    mixed.write_text((tmp_path / "alice.key_secret").read_text().replace(alice.secret.decode(), bob.secret.decode()))
    mixed.chmod(0o600)
    with pytest.raises(KeyFileError, match="do not match"):
        keys.read_pair(mixed)
    (tmp_path / "noise.key").write_bytes(os.urandom(300))
    with pytest.raises(KeyFileError, match="contains no public key"):
        keys.read_public(tmp_path / "noise.key")


# -- who is allowed ----------------------------------------------------------------------------------------------------


def test_keys_come_and_go(tmp_path) -> None:
    allowed = AllowedKeys(tmp_path)
    assert allowed.refresh() == ({}, {}, [])
    pair = keys.write_pair(tmp_path, "alice")
    key = pair.public.decode()
    assert allowed.refresh() == ({key: "alice"}, {}, [])
    assert allowed.refresh() == ({}, {}, [])
    (tmp_path / "alice.key").rename(tmp_path / "alice-laptop.key")
    assert allowed.refresh() == ({}, {}, [])
    assert allowed.names == {key: "alice-laptop"}
    (tmp_path / "alice-laptop.key").unlink()
    assert allowed.refresh() == ({}, {key: "alice-laptop"}, [])
    assert allowed.names == {}


def test_a_replaced_key_shuts_the_old_one_out(tmp_path) -> None:
    allowed = AllowedKeys(tmp_path)
    old = keys.write_pair(tmp_path, "alice").public.decode()
    allowed.refresh()
    new = keys.write_pair(tmp_path, "alice", force=True).public.decode()
    assert allowed.refresh() == ({new: "alice"}, {old: "alice"}, [])


def test_a_file_that_is_no_key_is_told_once_and_harms_no_other(tmp_path) -> None:
    allowed = AllowedKeys(tmp_path)
    keys.write_pair(tmp_path, "alice")
    (tmp_path / "bob.key").write_text("what is this")
    (tmp_path / "carol.key").symlink_to(tmp_path / "nowhere")
    change = allowed.refresh()
    assert list(change.added.values()) == ["alice"]
    carol, bob = change.complaints
    assert "carol.key: No such file" in carol
    assert "bob.key: contains no public key" in bob
    assert allowed.refresh() == ({}, {}, [])


def test_a_pipe_or_a_file_without_end_among_the_keys_is_told_and_not_read(tmp_path) -> None:
    alice = keys.write_pair(tmp_path, "alice").public.decode()
    os.mkfifo(tmp_path / "pipe.key")
    (tmp_path / "zero.key").symlink_to("/dev/zero")
    with (tmp_path / "large.key").open("wb") as large:
        large.truncate(1 << 40)
    program = [sys.executable, "-m", "blendmaskd.keys", "list", tmp_path]  # a process, because a test that waits stays
    listed = subprocess.run(program, cwd=ROOT, capture_output=True, text=True, timeout=30)
    assert (listed.returncode, listed.stdout) == (1, f"{alice}  alice\n")
    others = {f"{tmp_path}/{name}.key: is not a key file" for name in ("pipe", "zero", "large")}
    assert {line.removeprefix("blendmaskd-keys: ").partition(";")[0] for line in listed.stderr.splitlines()} == others
    change = AllowedKeys(tmp_path).refresh()
    assert (change.added, len(change.complaints)) == ({alice: "alice"}, 3)


def test_a_folder_that_cannot_be_read_lets_nobody_in(tmp_path) -> None:
    folder = tmp_path / "clients"
    key = keys.write_pair(folder, "alice").public.decode()
    allowed = AllowedKeys(folder)
    allowed.refresh()
    folder.rename(tmp_path / "elsewhere")
    change = allowed.refresh()
    assert change.removed == {key: "alice"}
    assert "no client key is allowed" in change.complaints[0]
    assert allowed.refresh() == ({}, {}, [])
    (tmp_path / "elsewhere").rename(folder)
    assert allowed.refresh().added == {key: "alice"}


def test_being_short_of_descriptors_shuts_nobody_out(tmp_path) -> None:
    allowed = AllowedKeys(tmp_path)
    alice = keys.write_pair(tmp_path, "alice").public.decode()
    allowed.refresh()
    bob = keys.write_pair(tmp_path, "bob").public.decode()
    ours = resource.getrlimit(resource.RLIMIT_NOFILE)
    for left in (0, 1):  # not even for the folder; for it, but for no file in it
        with open(os.devnull) as probe:
            resource.setrlimit(resource.RLIMIT_NOFILE, (probe.fileno() + left, ours[1]))
            try:
                assert allowed.refresh() == ({}, {}, [])
            finally:
                resource.setrlimit(resource.RLIMIT_NOFILE, ours)
    assert allowed.names == {alice: "alice"}
    assert allowed.refresh() == ({bob: "bob"}, {}, [])


# -- whose an identity is ----------------------------------------------------------------------------------------------


@pytest.fixture
def alice_and_bob(tmp_path):
    """The keys of two clients, the identities that have jobs, and who judges."""
    pairs = [keys.write_pair(tmp_path, name).public.decode() for name in ("alice", "bob")]
    allowed = AllowedKeys(tmp_path)
    allowed.refresh()
    busy: set[bytes] = set()
    return (*pairs, busy, Identities(allowed, busy.__contains__))


def test_an_identity_belongs_to_a_key_while_it_has_jobs(alice_and_bob) -> None:
    alice, bob, busy, identities = alice_and_bob
    name = b"i" * 16
    assert identities.judge(name, alice) is Verdict.WELCOME
    assert identities.judge(name, bob) is Verdict.WELCOME, "alice had no jobs"
    busy.add(name)
    assert identities.judge(name, alice) is Verdict.TAKEN
    assert identities.judge(name, LOCAL) is Verdict.TAKEN
    identities.forget_idle()
    assert identities.judge(name, alice) is Verdict.TAKEN
    assert identities.of([bob]) == [name]
    busy.clear()
    identities.forget_idle()
    assert identities.of([alice, bob]) == []
    assert identities.judge(name, alice) is Verdict.WELCOME


def test_a_local_client_s_identity_is_its_own_too(alice_and_bob) -> None:
    alice, _, busy, identities = alice_and_bob
    assert identities.judge(b"\0\1\2\3\4", LOCAL) is Verdict.WELCOME, "ZeroMQ's own do for local clients"
    name = b"i" * 16
    identities.judge(name, LOCAL)
    busy.add(name)
    assert identities.judge(name, alice) is Verdict.TAKEN


@pytest.mark.parametrize("name", [b"\0\1\2\3\4", b"alice", b"i" * 15])
def test_an_identity_that_can_be_guessed_is_refused(alice_and_bob, name) -> None:
    assert alice_and_bob[3].judge(name, alice_and_bob[0]) is Verdict.SHORT


def test_who_is_not_allowed_any_more_has_no_say(alice_and_bob, tmp_path) -> None:
    assert alice_and_bob[3].judge(b"i" * 16, "x" * 40) is Verdict.UNKNOWN
    assert alice_and_bob[3].judge(b"i" * 16, "None") is Verdict.UNKNOWN
