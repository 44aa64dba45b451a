"""Runs a pod as its manifest says, in Linux namespaces of its own, where no cluster and no container engine is at hand.

What a kubelet and its runtime would do for the fields that our manifests use: volumes with the owners and modes that
Kubernetes gives them, a read-only root, user, groups and capabilities, the environment from nothing, probes over the
network, and at the end preStop, SIGTERM and, after the grace period, SIGKILL. An unknown kind of volume is an error.
The image is this machine's root with the repository at /opt/blendmaskd and this interpreter.

Not done: cgroup limits, seccomp's RuntimeDefault, network policies, devices.
"""
from __future__ import annotations

import base64
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

from kubelet import IMAGE_ENVIRONMENT
from manifests import ROOT, Object, port_of

ADDRESS = "127.0.0.2"  # of the pod: what listens on 127.0.0.1 alone does not hear it
KUBELET = Path(__file__).with_name("kubelet.py")
PROGRAMS = ("unshare", "nsenter", "setpriv", "mount", "bash", "install")
NAMESPACES = ("--fork", "--pid", "--mount", "--net", "--ipc", "--uts")


def missing() -> str:
    """What this machine lacks for a pod; empty: nothing."""
    if os.geteuid() != 0:
        return "root"
    programs = [program for program in PROGRAMS if not shutil.which(program)]
    if programs:
        return " and ".join(programs)
    mount = ["unshare", *NAMESPACES, "mount", "-t", "tmpfs", "tmpfs", "/mnt"]
    if subprocess.run(mount, capture_output=True).returncode:
        return "the right to make namespaces and to mount (CAP_SYS_ADMIN)"
    return ""


class Pod:
    """A pod that is started. `objects` are the ConfigMaps and Secrets that it mounts; `environment` is added."""

    def __init__(self, folder: Path, spec: Object, objects: list[Object], **environment: str) -> None:
        self.folder = folder
        self.spec = spec
        files = {each["metadata"]["name"]: _files(each) for each in objects}
        (folder / "pod.json").write_text(json.dumps({"spec": spec, "files": files, "environment": environment}))
        with (folder / "log").open("w") as log:
            argv = ["setpriv", "--pdeathsig", "KILL", "unshare", "--kill-child=KILL", *NAMESPACES]
            argv += [sys.executable, KUBELET, folder]
            self.process = subprocess.Popen(argv, stdout=log, stderr=subprocess.STDOUT, cwd="/")

    @property
    def log(self) -> str:
        return (self.folder / "log").read_text()

    @property
    def pause_pid(self) -> int:
        return int((self.folder / "pid").read_text())

    @property
    def main_pid(self) -> int:
        """Of the main container's process, as this process numbers it."""
        [container] = self.spec["containers"]
        for child in _children(self.pause_pid):
            command = Path(f"/proc/{child}/cmdline").read_text().split("\0")[:-1]
            if command == container["command"]:
                return child
        raise LookupError(f"{container['command']} does not run: {self.log}")

    def started(self) -> bool:
        """Whether its network is there. Raises when it has ended."""
        assert self.process.poll() is None, self.log
        return (self.folder / "pid").exists()

    def inside(self, *command: str | Path, **options: Any) -> subprocess.Popen[str]:
        """A program of this machine in the pod's network, as another pod might run it."""
        argv = ["nsenter", f"--net=/proc/{self.pause_pid}/ns/net", *command]
        return subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=ROOT, **options)

    def beside(self, *command: str) -> subprocess.Popen[str]:
        """A program in a container of the same pod and image that has the same volumes."""
        enter = ["nsenter", f"--target={self.main_pid}", "--mount", "--pid", "--net", "--wd=/"]
        user = self.spec["securityContext"]
        rights = ["setpriv", f"--reuid={user['runAsUser']}", f"--regid={user['runAsGroup']}", "--clear-groups"]
        rights += ["--bounding-set=-all", "--inh-caps=-all", "--no-new-privs"]
        variables = [f"{name}={value}" for name, value in IMAGE_ENVIRONMENT.items()]
        argv = [*enter, *rights, "env", "-i", *variables, *command]
        return subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)

    def get(self, page: Object) -> tuple[int, str]:
        """Status and body of a probe's httpGet. 0: nobody answers."""
        url = f"http://{ADDRESS}:{port_of(self.spec, page['port'])}{page['path']}"
        asks = self.inside(sys.executable, "-I", "-S", "-c", ASK, url)
        output, _ = asks.communicate(timeout=60)
        status, _, body = output.partition("\n")
        return int(status), body

    def terminate(self) -> None:
        """As `kubectl delete pod`."""
        os.kill(self.pause_pid, signal.SIGTERM)

    def close(self) -> None:
        self.process.kill()
        self.process.wait(timeout=10)


ASK = """
import sys, urllib.error, urllib.request
try:
    with urllib.request.urlopen(sys.argv[1], timeout=10) as page:
        print(page.status, page.read().decode(), sep="\\n")
except urllib.error.HTTPError as error:
    print(error.code, error.read().decode(), sep="\\n")
except OSError:
    print(0)
"""


def _files(each: Object) -> dict[str, str]:
    if each["kind"] == "Secret":
        return {name: base64.b64decode(text).decode() for name, text in each["data"].items()}
    return dict(each["data"])


def _children(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
