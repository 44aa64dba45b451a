"""`blendmaskd check`: asks this host whether the daemon can serve with these settings, and says what to mend.

    blendmaskd check --settings configs/daemon.yaml
    blendmaskd check --devices cpu:0 cpu:1 --set model.weights=model_final.pth
    blendmaskd check --settings /etc/blendmaskd/daemon.yaml --json

Run it as the user that the daemon will run as, in the same environment: rights, limits and CANN's variables are looked
at as they are here. Each line is ok, warning (it will serve, not as it could) or error, with the remedy below it.
Nothing is changed. Each device is opened as its worker would, for a moment, unless a daemon of ours has it; weights are
loaded on the CPU. Exit code: 0 when there is no error (warnings do not count), 1 otherwise.
"""
from __future__ import annotations

import json
import os
import shutil
import traceback
from collections.abc import Callable, Mapping, Sequence

from rich.console import Console
from rich.text import Text

from blendmaskd.check import cpus, devices, endpoints, front, resources, software, trials
from blendmaskd.check.finding import Finding, as_tree
from blendmaskd.check.host import devices_of, own_user
from blendmaskd.check.trials import WEIGHTS, Trial
from blendmaskd.settings import Settings, SettingsError

STYLES = {"ok": "green", "warning": "yellow", "error": "bold red"}
EXIT_ERRORS = 1


def main(load: Callable[[], Settings], as_json: bool) -> int:
    """Check with the settings that `load` gives. Returns the exit code."""
    try:
        settings = load()
    except SettingsError as error:
        found = [Finding("settings", "error", str(error), "docs/settings.md")]
    else:
        summary = f"{' '.join(settings.devices)}, engine {settings.engine}"
        found = [Finding("settings", "ok", summary), *_examined(settings)]
    if as_json:
        print(json.dumps(as_tree(found), indent=1))
    else:
        _show(found)
    return EXIT_ERRORS if any(finding.level == "error" for finding in found) else 0


def _examined(settings: Settings) -> list[Finding]:
    try:
        return examine(settings, os.environ)
    except Exception as error:  # some host is always other than those that were thought of: a report all the same
        frame = traceback.extract_tb(error.__traceback__)[-1]
        text = f"the check failed in {frame.name}, line {frame.lineno}: {type(error).__name__}: {error}"
        return [Finding("check", "error", text, "report this line; the daemon may serve all the same")]


def examine(settings: Settings, environment: Mapping[str, str]) -> list[Finding]:
    """Every check, in the order of the report. Takes seconds: devices are opened and weights loaded."""
    user, _ = own_user()
    wanted = list(endpoints.ask(settings))
    serving = next((each.holder for each in wanted if each.holder and each.holder.ours), None)
    preload, preload_complaint = software.ask_preload(settings)
    plan, near, cpus_complaint = cpus.places(settings, environment)
    held = devices_of(serving.pid, settings.devices) if serving else frozenset()
    tried = trials.start(settings, plan, preload, held, environment)
    npus = [device for device in settings.devices if device.startswith("npu") and settings.engine != "timed"]
    cards = devices.Npus(environment) if npus else None
    versions = software.ask_versions(environment)
    probes = {device: trials.probe(trial) for device, trial in tried.items() if device != WEIGHTS}
    configured = [
        devices.ask(name, settings, cards, environment, probes.get(name), serving if name in held else None)
        for name in settings.devices
    ]
    opened = all((probe := probes.get(device)) is not None and not probe.error for device in npus)

    found = devices.judge_identity(os.geteuid() == 0, devices.service_groups() is not None)
    model = settings.model
    found += [line for each in configured for line in devices.judge(each, model.precision, model.exact)]
    launched = [trial.plan for trial in tried.values() if trial.plan]
    found += devices.judge_plans(dict.fromkeys(warning for each in launched for warning in each.warnings))
    if npus and held.isdisjoint(npus):
        found += devices.judge_nodes(devices.ask_nodes(npus, environment), opened, user)
    found += software.judge_versions(versions, bool(npus))
    found += software.judge_kernels(versions, dict.fromkeys(each.chip for each in configured if each.tool == "npu-smi"))
    found += cpus.judge_complaint(cpus_complaint)
    found += cpus.judge(plan, near, settings.runtime.placed, cards is not None and cards.answers)
    found += cpus.judge_governors([cpu for own in plan.values() for cpu in own if cpus.may_be_slow(cpu)])
    found += software.judge_allocator(
        settings.runtime.preload, launched[-1].preload if launched and preload else preload, preload_complaint,
        apt=shutil.which("apt-get") is not None, dnf=shutil.which("dnf") is not None,
    )  # fmt: skip
    found += [line for each in wanted for line in endpoints.judge(each)]
    http = front.ask(settings)
    found += front.judge_front(http) if http else []
    found += endpoints.judge_private_folder(endpoints.ask_private_folder())
    found += [line for each in endpoints.ask_keys(settings) for line in endpoints.judge_keys(each)]
    for root in settings.paths.roots:
        found += resources.judge_root(root, os.path.isdir(root), os.access(root, os.R_OK | os.X_OK))
    found += [line for each in resources.ask_spool(settings) for line in resources.judge_spool(each)]
    found += _weights(settings, tried.get(WEIGHTS))
    return found + resources.judge_limits(resources.ask_limits(settings))


def _weights(settings: Settings, trial: Trial | None) -> list[Finding]:
    if trial is None:
        return resources.judge_weights(settings.engine, None, None, 0.0) if settings.engine == "timed" else []
    trial.end()
    return resources.judge_weights(settings.engine, settings.model.weights, trial.complaint, trial.took_s)


def _show(found: Sequence[Finding]) -> None:
    console = Console(soft_wrap=True, highlight=False)
    for finding in found:
        console.print(Text(f"{finding.level:8}", STYLES[finding.level]), Text(f"{finding.area:12} {finding.text}"))
        if finding.remedy:
            console.print(Text(f"{'':22}-> {finding.remedy}", "dim"))
    counts = as_tree(found)
    console.print(f"{counts['ok']} ok, {counts['warning']} warnings, {counts['error']} errors")
