"""configs/kubernetes holds what Kubernetes takes, and agrees with itself and with the daemon."""
from __future__ import annotations

import copy
import json
import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate
import pytest
from manifests import ROOT, Manifests, Object, made_by_hand

from blendmaskd import keys
from blendmaskd.core import launch_plan
from blendmaskd.core.launch_plan import Basis, Preload

OLDEST, NEWEST = "1.25", str(kubernetes_validate.latest_version())
WRITABLE = ("/run/blendmaskd", "/var/lib/blendmaskd", "/var/log/blendmaskd", "/tmp")


# -- schemas ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("version", [OLDEST, NEWEST])
def test_objects_are_as_kubernetes_specifies_them(manifests: Manifests, version: str) -> None:
    kinds = {each["kind"] for each in manifests.all}
    assert kinds == {"Namespace", "ConfigMap", "DaemonSet", "Service", "NetworkPolicy", "PodMonitor"}
    for each in manifests.all:
        validate(each, version)


def test_an_unknown_field_anywhere_is_an_error(cpu_manifests: Manifests) -> None:
    """Of each mapping whose keys are not the user's own."""
    for each in cpu_manifests.all:
        for place in places(each):
            if (each["kind"], place) == ("Service", ("spec", "selector")):
                continue
            broken = copy.deepcopy(each)
            node: Any = broken
            for key in place:
                node = node[key]
            node["unknownField"] = "x"
            with pytest.raises((kubernetes_validate.ValidationError, jsonschema.ValidationError), match="unknownField"):
                validate(broken, NEWEST)


def validate(each: Object, version: str) -> None:
    """Raises ValidationError, of kubernetes_validate or of jsonschema, for an unknown field too."""
    if each["kind"] != "PodMonitor":
        kubernetes_validate.validate(each, version, strict=True)
        return
    assert each["apiVersion"] == "monitoring.coreos.com/v1"
    assert each["metadata"].keys() <= {"name", "namespace", "labels"}  # which the schema leaves open
    pod_monitor_schema().validate(each)


OWN_KEYS = {"labels", "matchLabels", "data", "limits", "requests", "nodeSelector"}


def places(node: Any, path: tuple[str | int, ...] = ()) -> Iterator[tuple[str | int, ...]]:
    """Where mappings of fields are. `metadata` of a custom resource is not in its schema."""
    if isinstance(node, dict):
        if path and path != ("metadata",):
            yield path
        for key, value in node.items():
            if key not in OWN_KEYS:
                yield from places(value, (*path, key))
    elif isinstance(node, list):
        for number, value in enumerate(node):
            yield from places(value, (*path, number))


def pod_monitor_schema() -> jsonschema.Draft202012Validator:
    """The published schema; fields that it does not list, which a cluster would drop without a word, are errors."""
    schema = json.loads(Path(__file__).with_name("podmonitor.json").read_text())
    return jsonschema.Draft202012Validator(_closed(schema))


def _closed(schema: Any) -> Any:
    if isinstance(schema, list):
        return [_closed(each) for each in schema]
    if not isinstance(schema, dict):
        return schema
    closed = {key: _closed(value) for key, value in schema.items()}
    if isinstance(closed.get("properties"), dict) and closed.get("type") == "object":
        closed.setdefault("additionalProperties", False)
    return closed


# -- settings ---------------------------------------------------------------------------------------------------------


def test_the_settings_are_the_daemons(manifests: Manifests) -> None:
    settings = manifests.settings  # raises for what it does not know
    assert {device.split(":")[0] for device in settings.devices} == {manifests.variant}
    assert not settings.insecure_tcp
    assert settings.curve.server_key
    assert not settings.show_last_image


def test_the_daemon_gets_the_settings_and_keys_where_it_looks_for_them(manifests: Manifests) -> None:
    mounts = {mount["name"]: mount["mountPath"] for mount in manifests.container["volumeMounts"]}
    command = manifests.container["command"]
    assert command[:3] == ["python", "-m", "blendmaskd"]
    assert command[command.index("--settings") + 1] == f"{mounts['settings']}/daemon.yaml"
    assert manifests.settings.curve.client_keys == mounts["client-keys"]
    assert Path(manifests.settings.curve.server_key).parent == Path(mounts["server-key"])
    volumes = {volume["name"]: volume for volume in manifests.pod["volumes"]}
    assert volumes["settings"]["configMap"]["name"] == manifests.one("ConfigMap")["metadata"]["name"]


def test_the_networks_configuration_is_in_the_image(manifests: Manifests) -> None:
    model = manifests.settings.model
    assert (ROOT / model.config).is_file()
    assert model.weights
    assert not Path(model.weights).is_absolute()
    assert manifests.variant != "cpu" or (ROOT / model.weights).is_file()
    assert manifests.container["workingDir"] == "/opt/blendmaskd"


def test_every_volume_is_mounted_and_every_mount_has_a_volume(manifests: Manifests) -> None:
    mounted = {mount["name"] for container in manifests.pod["containers"] for mount in container["volumeMounts"]}
    assert mounted == {volume["name"] for volume in manifests.pod["volumes"]}


def test_what_the_daemon_writes_to_can_be_written_to(manifests: Manifests) -> None:
    empty = {volume["name"] for volume in manifests.pod["volumes"] if "emptyDir" in volume}
    mounts = [mount for mount in manifests.container["volumeMounts"] if not mount.get("readOnly")]
    assert {mount["name"] for mount in mounts} <= empty
    writable = {mount["mountPath"] for mount in mounts}
    assert writable == set(WRITABLE)
    variables = {variable["name"]: variable["value"] for variable in manifests.container["env"]}
    folders = [variables[name] for name in ("HOME", "RUNTIME_DIRECTORY", "STATE_DIRECTORY", "LOGS_DIRECTORY")]
    assert set(folders) <= writable
    assert manifests.container["workingDir"] not in writable
    for device in filter(lambda device: device.startswith("npu"), manifests.settings.devices):
        basis = Basis(manifests.settings, {}, Preload(None, "off"), (0,), math.inf)
        planned = launch_plan.plan(device, basis, variables).environment
        for name in ("ASCEND_WORK_PATH", "ACL_OP_COMPILER_CACHE_DIR", "ASCEND_PROCESS_LOG_PATH"):
            assert any(planned[name].startswith(f"{folder}/") for folder in writable), name
    assert [endpoint for endpoint in manifests.settings.endpoints.clients if endpoint.startswith("ipc://")] == [
        "ipc:///run/blendmaskd/client.sock"  # where programs look by default
    ]


# -- ports, probes, time ----------------------------------------------------------------------------------------------


def test_ports_are_those_that_the_daemon_listens_on(manifests: Manifests) -> None:
    endpoints = manifests.settings.endpoints
    assert f"tcp://0.0.0.0:{manifests.port('clients')}" in endpoints.clients
    assert endpoints.metrics == f"0.0.0.0:{manifests.port('metrics')}"  # probes come to the pod's address
    [service] = manifests.one("Service")["spec"]["ports"]
    assert (service["port"], service["targetPort"]) == (manifests.port("clients"), "clients")
    [endpoint] = manifests.one("PodMonitor")["spec"]["podMetricsEndpoints"]
    assert endpoint["port"] == "metrics"
    rules = manifests.one("NetworkPolicy")["spec"]["ingress"]
    assert [port["port"] for rule in rules for port in rule["ports"]] == ["clients", "metrics"]
    assert all(rule["from"] for rule in rules)  # none is open to everybody


def test_probes_are_at_pages_that_say_what_they_ask(manifests: Manifests) -> None:
    pages = {name: manifests.container[f"{name}Probe"]["httpGet"] for name in ("startup", "readiness", "liveness")}
    assert {name: page["path"] for name, page in pages.items()} == {
        "startup": "/readyz", "readiness": "/readyz", "liveness": "/healthz"
    }  # fmt: skip
    assert {page["port"] for page in pages.values()} == {"metrics"}


def test_a_start_may_take_two_tries(manifests: Manifests) -> None:
    probe, restarts = manifests.container["startupProbe"], manifests.settings.restarts
    waits_s = probe["periodSeconds"] * probe["failureThreshold"]
    assert waits_s > 2 * (restarts.start_timeout_s + restarts.stop_s)


def test_a_drain_ends_before_the_pod_is_killed(manifests: Manifests) -> None:
    """The daemon waits `drain_s` for jobs, `drain_s` for workers to end, `stop_s` before it kills one that hangs."""
    settings = manifests.settings
    command, seconds = manifests.container["lifecycle"]["preStop"]["exec"]["command"]
    assert command == "sleep"
    needs_s = int(seconds) + 2 * settings.drain_s + settings.restarts.stop_s
    assert manifests.pod["terminationGracePeriodSeconds"] >= needs_s + 10


def test_selectors_find_the_pods_and_only_them(manifests: Manifests) -> None:
    labels = manifests.one("DaemonSet")["spec"]["template"]["metadata"]["labels"]
    policy, monitor = manifests.one("NetworkPolicy")["spec"], manifests.one("PodMonitor")["spec"]
    selectors = [
        manifests.one("DaemonSet")["spec"]["selector"]["matchLabels"],
        manifests.one("Service")["spec"]["selector"],
        policy["podSelector"]["matchLabels"],
        monitor["selector"]["matchLabels"],
    ]
    assert selectors == [labels] * 4
    namespaces = {each["metadata"].get("namespace", "blendmaskd") for each in manifests.all}
    assert namespaces == {manifests.one("Namespace")["metadata"]["name"]}


# -- resources, rights ------------------------------------------------------------------------------------------------

RESOURCES = {"npu": "huawei.com/Ascend910", "cuda": "nvidia.com/gpu"}
UNITS = {"Mi": 1 << 20, "Gi": 1 << 30}


def test_each_slot_has_its_device(manifests: Manifests) -> None:
    limits = manifests.container["resources"]["limits"]
    assert {name: number for name, number in limits.items() if "/" in name} == (
        {RESOURCES[manifests.variant]: len(manifests.settings.devices)} if manifests.variant in RESOURCES else {}
    )
    assert manifests.pod["nodeSelector"] == {"blendmaskd": manifests.variant}


def test_the_pod_is_guaranteed_whole_cpus_which_its_workers_share(manifests: Manifests) -> None:
    resources = manifests.container["resources"]
    assert resources["requests"] == resources["limits"]
    assert resources["limits"]["cpu"].isdigit()
    settings = manifests.settings
    assert settings.runtime.threads == "auto"  # the limit, shared out
    assert int(resources["limits"]["cpu"]) % len(settings.devices) == 0


def test_the_queue_and_the_workers_fit_into_the_memory(manifests: Manifests) -> None:
    """A worker is granted 1 GiB: two of R_50_1x on CPUs take 1284 MB, of the demo model 619 (BENCHMARKS.md, 5)."""
    number, unit = re.fullmatch(r"(\d+)(Mi|Gi)", manifests.container["resources"]["limits"]["memory"]).groups()
    settings = manifests.settings
    assert int(number) * UNITS[unit] >= settings.queue.max_bytes + len(settings.devices) * UNITS["Gi"]


def test_the_pod_meets_the_restricted_pod_security_standard(manifests: Manifests) -> None:
    """https://kubernetes.io/docs/concepts/security/pod-security-standards: what its namespace enforces."""
    labels = manifests.one("Namespace")["metadata"]["labels"]
    assert labels["pod-security.kubernetes.io/enforce"] == "restricted"
    pod = manifests.pod
    assert not {"hostNetwork", "hostPID", "hostIPC"} & pod.keys()
    assert pod["securityContext"]["runAsNonRoot"] is True
    assert pod["securityContext"]["runAsUser"] != 0
    assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
    assert {kind for volume in pod["volumes"] for kind in volume.keys() - {"name"}} <= {
        "configMap", "secret", "emptyDir", "persistentVolumeClaim", "projected", "csi", "ephemeral", "downwardAPI"
    }  # fmt: skip
    for container in pod["containers"]:
        assert container["securityContext"] == {
            "allowPrivilegeEscalation": False,
            "capabilities": {"drop": ["ALL"]},
            "readOnlyRootFilesystem": True,
        }
        assert not [port for port in container.get("ports", ()) if "hostPort" in port]
    assert pod["automountServiceAccountToken"] is False


# -- what people make by hand -----------------------------------------------------------------------------------------


def test_the_keys_that_the_page_makes_are_those_that_the_pod_waits_for(manifests: Manifests, tmp_path: Path) -> None:
    keys.write_pair(tmp_path, "server")
    keys.write_pair(tmp_path, "alice")
    keys.make_folder(tmp_path / "clients")
    keys.write_public(tmp_path / "clients", "alice", keys.read_public(tmp_path / "alice.key"))
    secret, public = made_by_hand(tmp_path)
    for each in (secret, public):
        kubernetes_validate.validate(each, NEWEST, strict=True)
        assert each["metadata"]["namespace"] == manifests.one("Namespace")["metadata"]["name"]
    volumes = {volume["name"]: volume for volume in manifests.pod["volumes"]}
    assert secret["metadata"]["name"] == volumes["server-key"]["secret"]["secretName"]
    assert public["metadata"]["name"] == volumes["client-keys"]["configMap"]["name"]
    assert list(secret["data"]) == [Path(manifests.settings.curve.server_key).name]
    assert list(public["data"]) == ["alice.key"]
    assert "secret-key" not in public["data"]["alice.key"]
