"""CURVE keys of the daemon and its clients: creating, writing and reading them.

    blendmaskd-keys server /etc/blendmaskd/keys --owner blendmaskd            # once, on the daemon's host
    blendmaskd-keys client alice --allow /etc/blendmaskd/keys/clients         # for each client
    blendmaskd-keys list /etc/blendmaskd/keys/clients                         # who is allowed

A pair consists of two files: NAME.key holds the public key and may be given to anyone; NAME.key_secret holds both keys
and must stay with its owner. They have the form of pyzmq's certificates (`zmq.auth.load_certificate` reads them). The
daemon admits clients whose public key is in the folder of allowed keys, and notices added and removed files within a
second: to shut a client out, remove its file. Existing files are never replaced without --force.
"""
from __future__ import annotations

import argparse
import contextlib
import os
import re
import stat
import sys
from dataclasses import dataclass
from pathlib import Path

import zmq
import zmq.auth

from blendmaskd import files, output

PUBLIC, SECRET = ".key", ".key_secret"
MOST_BYTES = 1 << 16  # of a key file in a folder, comments included
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._@-]{0,63}")
KEY = re.compile(r"[0-9A-Za-z.\-:+=^!/*?&<>()\[\]{}@%$#]{40}")  # Z85, of 32 bytes


class KeyFileError(ValueError):
    """A key file that cannot be used; the text names it and says what to do."""


@dataclass(frozen=True, slots=True)
class Pair:
    """A key pair, as Z85 text of 40 characters each."""

    public: bytes
    secret: bytes


def read_public(path: str | Path) -> bytes:
    """The public key in a file, as Z85 text. Raises `KeyFileError`."""
    return _load(Path(path))[0]


def read_listed(path: str | Path) -> bytes:
    """As `read_public`, of a file in a folder, where one may be that has no end, or that nobody writes to."""
    with contextlib.suppress(OSError):  # `read_public` names it
        found = Path(path).stat()
        if not stat.S_ISREG(found.st_mode) or found.st_size > MOST_BYTES:
            raise KeyFileError(f"{path}: is not a key file; create key files with blendmaskd-keys")
    return read_public(path)


def read_pair(path: str | Path) -> Pair:
    """The pair in a secret key file. Raises `KeyFileError`, also when someone else than its owner may read it."""
    path = Path(path)
    public, secret = _load(path)
    if not secret:
        raise KeyFileError(f"{path}: has no secret key: name the file that ends in {SECRET}")
    found = path.stat()
    mode = stat.S_IMODE(found.st_mode)
    if hasattr(os, "geteuid") and is_open_to_others(mode, found.st_uid, os.geteuid()):  # else modes mean nothing
        raise KeyFileError(f"{path}: has mode {mode:04o}, so others can read it: chmod 600 {path}")
    if zmq.curve_public(secret) != public:
        raise KeyFileError(f"{path}: its two keys do not match: create a new pair with blendmaskd-keys")
    return Pair(public, secret)


def is_open_to_others(mode: int, owner: int, user: int) -> bool:
    """Whether more than `user` and root can get at a file. Root may give another user its file to read by a group.

    So come the files of a Kubernetes Secret: root's, and readable to the pod's fsGroup. PostgreSQL has the same rule.
    """
    allowed = 0o740 if owner == 0 != user else 0o700
    return bool(mode & ~allowed & 0o777)


def _load(path: Path) -> tuple[bytes, bytes | None]:
    try:
        os.close(files.open_file(path))  # says why not, where `load_certificate` says only that it cannot
        public, secret = zmq.auth.load_certificate(path)
    except OSError as error:
        raise KeyFileError(f"{path}: {error.strerror}; create key files with blendmaskd-keys") from error
    except ValueError:
        raise KeyFileError(f"{path}: contains no public key; create key files with blendmaskd-keys") from None
    for key in (public, secret):
        if key and not KEY.fullmatch(key.decode("latin-1")):
            raise KeyFileError(f"{path}: {key.decode('latin-1')!r:.60} is not a key: expected 40 characters of Z85")
    return public, secret


def write_pair(folder: Path, name: str, force: bool = False, owner: str | None = None) -> Pair:
    """A new pair as NAME.key (mode 0644) and NAME.key_secret (0600) in a folder that is made (0700) if it is missing.

    Raises `KeyFileError` for a name that is none, FileExistsError unless `force`, OSError.
    """
    if not NAME.fullmatch(name):
        raise KeyFileError(f"{name!r}: expected a name of letters, digits and ._@-, at most 64")
    make_folder(folder, owner)
    paths = [folder / f"{name}{SECRET}", folder / f"{name}{PUBLIC}"]
    for path in paths:
        if path.exists() and not force:
            raise _exists(path)
    pair = Pair(*zmq.curve_keypair())
    for path, mode, secret in zip(paths, (0o600, 0o644), (pair.secret, None)):
        write(path, _text(name, pair.public, secret), mode, force, owner)
    return pair


def write_public(folder: Path, name: str, public: bytes, force: bool = False) -> Path:
    """Put a public key where the daemon looks for allowed ones: it never sees half a file."""
    path = folder / f"{name}{PUBLIC}"
    write(path, _text(name, public, None), 0o644, force, None)
    return path


def make_folder(folder: Path, owner: str | None = None) -> None:
    """Nobody but its owner looks into it. One that is there stays as it is."""
    with contextlib.suppress(FileExistsError):
        folder.mkdir(mode=0o700, parents=True)
        _give(folder, owner)


def write(path: Path, text: str, mode: int, force: bool, owner: str | None) -> None:
    """Write a file whole or not at all, never wider open than `mode`, over another only with `force`."""
    try:
        with files.whole(path, over=force) as beside:
            descriptor = os.open(beside, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode)
            with open(descriptor, "w", encoding="utf-8") as file:
                beside.chmod(mode)  # whatever the umask took away
                file.write(text)
            _give(beside, owner)
    except FileExistsError:
        raise _exists(path) from None


def _exists(path: Path) -> FileExistsError:
    return FileExistsError(f"{path} exists; --force replaces it, which locks out anyone who has the old key")


def _give(path: Path, owner: str | None) -> None:
    if owner is None:
        return
    try:
        import pwd  # where files have owners
    except ModuleNotFoundError:
        raise KeyFileError(f"--owner {owner}: files have no selectable owner on {sys.platform}: leave it out") from None
    try:
        entry = pwd.getpwnam(owner)
    except KeyError:
        raise KeyFileError(f"--owner {owner}: no such user") from None
    os.chown(path, entry.pw_uid, entry.pw_gid)


def _text(name: str, public: bytes, secret: bytes | None) -> str:
    """In the form of pyzmq's certificates, which is ZeroMQ's own (ZPL)."""
    head = "#   CURVE secret key of blendmaskd: its owner's alone.\n" if secret else "#   CURVE public key.\n"
    body = f'metadata\n    name = "{name}"\ncurve\n    public-key = "{public.decode()}"\n'
    return head + body + (f'    secret-key = "{secret.decode()}"\n' if secret else "")


# -- the program ------------------------------------------------------------------------------------------------------


def main(argv: list[str] | None = None) -> int:
    arguments = _parse(argv)
    try:
        code: int = arguments.run(arguments)
    except (OSError, KeyFileError) as error:
        if isinstance(error, OSError) and error.errno and not error.filename:  # what it printed
            return output.lost("blendmaskd-keys", error)
        reason = f"{error.filename}: {error.strerror}" if isinstance(error, OSError) and error.strerror else error
        print(f"blendmaskd-keys: {reason}", file=sys.stderr)
        return 1
    return code


def _server(arguments: argparse.Namespace) -> int:
    folder = Path(arguments.folder).absolute()
    write_pair(folder, "server", arguments.force, arguments.owner)
    make_folder(folder / "clients", arguments.owner)
    print(f"""\
{folder}/server{SECRET}  for the daemon only (mode 0600)
{folder}/server{PUBLIC}         for all clients
{folder}/clients/           public keys of allowed clients

Next, in the daemon's settings, then restart it:

endpoints:
  clients: [ipc:///run/blendmaskd/client.sock, tcp://0.0.0.0:9465]
curve:
  server_key: {folder}/server{SECRET}
  client_keys: {folder}/clients

Then a key for each client: blendmaskd-keys client NAME --allow {folder}/clients""")
    return 0


def _client(arguments: argparse.Namespace) -> int:
    folder, name = Path(arguments.to).absolute(), arguments.name
    allow = Path(arguments.allow).absolute() if arguments.allow else None
    if allow and not allow.is_dir():
        raise KeyFileError(f"--allow {allow}: no such folder: create it with blendmaskd-keys server")
    if allow and (allow / f"{name}{PUBLIC}").exists() and not arguments.force:
        raise _exists(allow / f"{name}{PUBLIC}")
    pair = write_pair(folder, name, arguments.force, arguments.owner)
    print(f"{folder}/{name}{SECRET}  {name}'s alone (mode 0600)\n{folder}/{name}{PUBLIC}         for the daemon\n")
    if allow and allow != folder:
        write_public(allow, name, pair.public, arguments.force)
    if allow:
        print(f"{name} may connect; to shut {name} out: rm {allow}/{name}{PUBLIC}\n")
    else:
        print(f"Next, on the daemon's host: copy {name}{PUBLIC} into its folder curve.client_keys.\n")
    print(f"""\
The client needs {name}{SECRET} and the daemon's server{PUBLIC}; transfer both over a trusted channel:

blendmaskd-stats tcp://HOST:9465 --server-key server{PUBLIC} --key {name}{SECRET}""")
    return 0


def _list(arguments: argparse.Namespace) -> int:
    """Exit code 1 when one of the files cannot be used."""
    folder, code = Path(arguments.folder), 0
    if not os.path.isdir(folder):
        raise KeyFileError(f"{folder}: no such folder")
    if not os.access(folder, os.R_OK | os.X_OK):
        raise KeyFileError(f"{folder}: this user may not read it")
    for path in sorted(folder.glob(f"*{PUBLIC}")):
        try:
            print(f"{read_listed(path).decode()}  {path.stem}")
        except KeyFileError as error:
            print(f"blendmaskd-keys: {error}", file=sys.stderr)
            code = 1
    return code


def _parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="blendmaskd-keys", description=__doc__, formatter_class=output.Help)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    server = commands.add_parser("server", help="create the daemon's key pair and the folder of allowed clients")
    server.add_argument("folder", metavar="FOLDER", help="created with mode 0700 if missing")
    server.set_defaults(run=_server)
    client = commands.add_parser("client", help="create a client's key pair")
    client.add_argument("name", metavar="NAME", help="the client's, for files and logs: letters, digits and ._@-")
    client.add_argument("--to", metavar="FOLDER", default=".", help="folder for the pair, default: the current one")
    client.add_argument("--allow", metavar="FOLDER", help="the daemon's curve.client_keys: also allow this client")
    client.set_defaults(run=_client)
    for command in (server, client):
        command.add_argument("--owner", metavar="USER", help="user to own the pair, such as blendmaskd; needs root")
        command.add_argument("--force", action="store_true", help="replace existing files")
    listing = commands.add_parser("list", help="show the public keys in a folder, and name files that are not keys")
    listing.add_argument("folder", metavar="FOLDER")
    listing.set_defaults(run=_list)
    return parser.parse_args(argv)


if __name__ == "__main__":
    sys.exit(main())
