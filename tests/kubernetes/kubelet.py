"""PID 1 of a pod's namespaces, where it stands for the kubelet, the runtime and the pause process: see `pod`."""
from __future__ import annotations

import fcntl
import json
import os
import shlex
import signal
import socket
import struct
import subprocess
import sys
import sysconfig
import time
from pathlib import Path
from typing import Any

Object = dict[str, Any]

ROOT = Path(__file__).resolve().parents[2]
VOLUMES = Path("/mnt/volumes")
OWN_FOLDERS = ("/etc", "/opt", "/run", "/var")  # of the pod; what is written there is gone with it
PYTHON = f"python{sys.version_info[0]}.{sys.version_info[1]}"
IMAGE_ENVIRONMENT = {  # what an image's ENV would hold
    "PATH": "/opt/image:/usr/local/bin:/usr/bin:/bin:/usr/sbin:/sbin",
    "LD_LIBRARY_PATH": "/opt/python/lib",
    "PYTHONPATH": "/opt/blendmaskd/daemon:/opt/blendmaskd/workers:/opt/site",
}


def main(folder: Path) -> int:
    told = json.loads((folder / "pod.json").read_text())
    outer_pid = os.readlink("/proc/self")  # by the outer /proc
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM, signal.SIGCHLD})
    _make_root()
    for volume in told["spec"]["volumes"]:
        _make_volume(volume, told["files"], told["spec"]["securityContext"]["fsGroup"])
    _raise_loopback()
    return Kubelet(told["spec"], told["environment"]).run(lambda: (folder / "pid").write_text(outer_pid))


class Kubelet:
    """Runs the containers; `run` returns the main one's exit code, negative for the signal that killed it."""

    def __init__(self, spec: Object, environment: dict[str, str]) -> None:
        self._spec = spec
        self._environment = environment
        self._ended: dict[int, int] = {}

    def run(self, tell_started: Any) -> int:
        [container] = self._spec["containers"]
        main_pid = self._start(container, container["command"])
        tell_started()
        while main_pid not in self._ended:
            if self._next_signal(None) == signal.SIGTERM:
                self._terminate(container, main_pid)
        return self._ended[main_pid]

    def _terminate(self, container: Object, main_pid: int) -> None:
        deadline = time.monotonic() + self._spec["terminationGracePeriodSeconds"]
        self._wait(self._start(container, container["lifecycle"]["preStop"]["exec"]["command"]))
        os.kill(main_pid, signal.SIGTERM)
        while main_pid not in self._ended and time.monotonic() < deadline:
            self._next_signal(deadline - time.monotonic())
        if main_pid not in self._ended:
            os.kill(main_pid, signal.SIGKILL)
            self._wait(main_pid)

    def _start(self, container: Object, command: list[str]) -> int:
        script = _container_script(container, command, self._spec["securityContext"], self._environment)
        unblock = lambda: signal.pthread_sigmask(signal.SIG_SETMASK, set())  # noqa: E731
        return subprocess.Popen(["unshare", "--mount", "bash", "-c", script], preexec_fn=unblock).pid

    def _wait(self, pid: int) -> int:
        while pid not in self._ended:
            self._next_signal(None)
        return self._ended[pid]

    def _next_signal(self, timeout_s: float | None) -> int:
        """Waits for one, and reaps whoever has ended."""
        signals = {signal.SIGTERM, signal.SIGCHLD}
        got = signal.sigwait(signals) if timeout_s is None else signal.sigtimedwait(signals, max(0.0, timeout_s))
        while True:
            try:
                pid, status = os.waitpid(-1, os.WNOHANG)
            except ChildProcessError:
                break
            if not pid:
                break
            self._ended[pid] = os.waitstatus_to_exitcode(status)
        return got if isinstance(got, int) else got.si_signo if got else 0


def _container_script(container: Object, command: list[str], pod: Object, environment: dict[str, str]) -> str:
    """Mounts of its own, then its user, nobody's environment but its own, then its command in place of the shell."""
    lines = ["set -euo pipefail"]
    for mount in container["volumeMounts"]:
        path = shlex.quote(mount["mountPath"])
        lines.append(f"mount --bind {VOLUMES / mount['name']} {path}")
        if mount.get("readOnly"):
            lines.append(f"mount -o remount,bind,ro {path}")
    if container["securityContext"]["readOnlyRootFilesystem"]:
        lines += [f"mount -o remount,bind,ro {folder}" for folder in ("/", *OWN_FOLDERS)]
    lines += ["mount -t tmpfs -o mode=755 tmpfs /mnt", f"cd {container.get('workingDir', '/')}"]
    groups = [pod["fsGroup"], *pod.get("supplementalGroups", ())]
    rights = ["setpriv", f"--reuid={pod['runAsUser']}", f"--regid={pod['runAsGroup']}"]
    rights += [f"--groups={','.join(map(str, groups))}"]
    if container["securityContext"]["capabilities"]["drop"] == ["ALL"]:
        rights += ["--bounding-set=-all", "--inh-caps=-all"]
    if not container["securityContext"]["allowPrivilegeEscalation"]:
        rights += ["--no-new-privs"]
    own = {variable["name"]: variable["value"] for variable in container.get("env", ())}
    variables = [f"{name}={value}" for name, value in {**IMAGE_ENVIRONMENT, **own, **environment}.items()]
    lines.append(shlex.join(["exec", *rights, "env", "-i", *variables, *command]))
    return "\n".join(lines)


def _make_root() -> None:
    """Folders of its own over this machine's root; the image's files in /opt."""
    _mount("--make-rprivate", "/")
    _mount("-t", "proc", "proc", "/proc")
    _mount("-t", "tmpfs", "-o", "mode=755", "tmpfs", "/mnt")
    sources = {"blendmaskd": ROOT, "python": sys.base_prefix, "site": sysconfig.get_path("purelib")}
    for name, source in sources.items():
        Path("/mnt/opt", name).mkdir(parents=True)
        _mount("--bind", str(source), f"/mnt/opt/{name}")
    Path("/mnt/opt/image").mkdir()
    Path("/mnt/opt/image/python").symlink_to(f"/opt/python/bin/{PYTHON}")
    for folder in ("/etc", "/var"):
        upper, work = Path(f"/mnt/upper{folder}"), Path(f"/mnt/work{folder}")
        upper.mkdir(parents=True)
        work.mkdir(parents=True)
        _mount("-t", "overlay", "overlay", folder, "-o", f"lowerdir={folder},upperdir={upper},workdir={work}")
    _mount("--rbind", "/mnt/opt", "/opt")
    _mount("-t", "tmpfs", "-o", "mode=755", "tmpfs", "/run")


def _make_volume(volume: Object, files: dict[str, dict[str, str]], group: int) -> None:
    folder = VOLUMES / volume["name"]
    folder.mkdir(parents=True)
    VOLUMES.chmod(0o700)
    for mount_path in _mount_paths(volume["name"]):
        Path(mount_path).mkdir(parents=True, exist_ok=True)
    match volume:
        case {"emptyDir": _}:
            os.chown(folder, 0, group)
            folder.chmod(0o2777)
        case {"configMap": {"name": name}}:
            _write(folder, files[name], 0o644, group)
        case {"secret": {"secretName": name, "defaultMode": mode}}:
            _write(folder, files[name], mode | 0o040, group)  # fsGroup may read
        case _:
            raise NotImplementedError(f"volume {volume}")


def _mount_paths(name: str) -> list[str]:
    spec = json.loads((Path(sys.argv[1]) / "pod.json").read_text())["spec"]
    [container] = spec["containers"]
    return [mount["mountPath"] for mount in container["volumeMounts"] if mount["name"] == name]


def _write(folder: Path, files: dict[str, str], mode: int, group: int) -> None:
    """As a kubelet does: links to a link to a folder, so that an update is one rename."""
    data = folder / "..2026_01_01"
    data.mkdir()
    (folder / "..data").symlink_to(data.name)
    for name, text in files.items():
        path = data / name
        path.write_text(text)
        os.chown(path, 0, group)
        path.chmod(mode)
        (folder / name).symlink_to(f"..data/{name}")


def _mount(*arguments: str) -> None:
    subprocess.run(["mount", *arguments], check=True)


def _raise_loopback() -> None:
    up, get_flags, set_flags = 1, 0x8913, 0x8914  # IFF_UP, SIOCGIFFLAGS, SIOCSIFFLAGS
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as any_socket:
        request = struct.pack("16sh14x", b"lo", 0)
        flags = struct.unpack("16sh14x", fcntl.ioctl(any_socket, get_flags, request))[1]
        fcntl.ioctl(any_socket, set_flags, struct.pack("16sh14x", b"lo", flags | up))


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
