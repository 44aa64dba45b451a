"""The unit's keys are known to systemd 249, which Ubuntu 22.04 has: by the versions in which they came."""
from __future__ import annotations

import re
from pathlib import Path

UNIT = Path(__file__).parents[2] / "configs/blendmaskd.service"
OLD = """
    AmbientCapabilities CapabilityBoundingSet Description DeviceAllow DevicePolicy Documentation After Environment 
    EnvironmentFile ExecReload ExecStart Group KeyringMode KillMode LimitCORE LimitNOFILE LockPersonality 
    LogsDirectory LogsDirectoryMode MemoryHigh MemoryMax NoNewPrivileges NotifyAccess PrivateDevices PrivateMounts 
    PrivateTmp ProtectControlGroups ProtectHome ProtectKernelModules ProtectKernelTunables ProtectSystem RemoveIPC 
    Restart RestartPreventExitStatus RestartSec RestrictAddressFamilies RestrictNamespaces RestrictRealtime 
    RuntimeDirectory RuntimeDirectoryMode StartLimitBurst StartLimitIntervalSec StateDirectory StateDirectoryMode 
    SystemCallArchitectures SystemCallErrorNumber SystemCallFilter TimeoutStartSec TimeoutStopSec Type UMask User 
    WantedBy WatchdogSec WorkingDirectory
"""  # all before 240
SINCE = {"ProtectHostname": 242, "RestrictSUIDSGID": 242, "OOMPolicy": 243, "ProtectKernelLogs": 244,
         "ProtectClock": 245, "ProtectProc": 247}  # fmt: skip


def test_no_key_is_newer_than_systemd_249() -> None:
    keys = set(re.findall(r"^([A-Za-z]+)=", UNIT.read_text(), re.MULTILINE))
    assert keys == set(OLD.split()) | SINCE.keys()
    assert max(SINCE.values()) <= 249
