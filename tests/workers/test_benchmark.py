"""The benchmark program: each of its modes once, briefly, on real daemons; what it refuses."""
from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import psutil
import pytest

from blendmaskd import settings as settings_module
from blendmaskd_workers.benchmark import device, pictures, program, servers

BRIEF = ["--seconds", "0.4", "--warm-up", "0.1", "--rounds", "1", "--limit-seconds", "0.1", "--size", "64x64",
         "--set", "timed.latency_ms={1: 4, 2: 6}"]  # fmt: skip
ROW_KEYS = {
    "round", "variant", "load", "images", "fps", "jobs", "p50_ms", "p90_ms", "p99_ms", "max_ms", "failures", "wrong",
    "late_sends", "latest_send_ms", "checked", "answer_bytes", "shared_memory", "cpu_s_per_1000", "generator_share",
    "memory_mb",
}  # fmt: skip
STATS_KEYS = {"devices", "stages_ms"}
# where the daemon reported anew during the measurement
BUSY_KEYS = {"of_device_time", "busy_ms_per_image", "idle_share"}
LIMIT_KEYS = {"limit_devices", "limit_fps", "limit_ms_per_image", "limit_batch", "utilisation"}


def run(*arguments: str) -> int:
    return program.main([*BRIEF, *arguments])


def test_a_variant_may_be_the_daemon_of_another_checkout(tmp_path: Path, capsys: Any) -> None:
    package, started = tmp_path / "before/daemon/blendmaskd", tmp_path / "started"
    package.mkdir(parents=True)
    package.joinpath("__init__.py").touch()
    package.joinpath("__main__.py").write_text(f"open({str(started)!r}, 'w').write(__file__)\nraise SystemExit(9)")
    variants = [f"before: checkout={tmp_path / 'before'}", f"after: checkout={Path(__file__).parents[2]}"]
    assert program.main(["--limit-seconds", "0", "--compare", *variants]) == 3
    assert "the daemon ended with 9" in capsys.readouterr().err
    assert started.read_text() == str(package / "__main__.py")


def saved(file: Path) -> Any:
    return json.loads(file.read_text())


@pytest.mark.slow
def test_a_daemon_of_its_own_is_measured_beside_its_devices_and_the_plain_path(tmp_path: Path, capsys: Any) -> None:
    file = tmp_path / "run.json"
    assert run("--compare", "batch=1", "batch=auto", "--bare", "--json", str(file)) == 0
    tree = saved(file)
    plain = ["bare ZeroMQ, batch=1", "bare ZeroMQ, batch=auto"]
    assert [row["variant"] for row in tree["rows"]] == ["batch=1", "batch=auto", *plain]
    one, two, bare, _ = tree["rows"]
    assert set(one) - BUSY_KEYS == set(two) - BUSY_KEYS == ROW_KEYS | STATS_KEYS | LIMIT_KEYS
    assert set(bare) == ROW_KEYS | LIMIT_KEYS
    for row in tree["rows"]:
        assert row["failures"] == {}
        assert set(row["cpu_s_per_1000"]) == {"broker", "workers", "generator"}
        assert set(row["memory_mb"]) == {"kind", "broker", "workers"}
        assert row["utilisation"] == row["fps"] / row["limit_fps"]
    assert one["checked"] >= one["images"]
    assert (one["limit_batch"], two["limit_batch"]) == (1, 2)
    assert bare["answer_bytes"] >= one["answer_bytes"]
    pairs = {(ratio["above"], ratio["below"]) for ratio in tree["ratios"]}
    assert pairs == {("batch=auto", "batch=1"), ("batch=1", plain[0]), ("batch=auto", plain[1])}
    assert set(tree) == {"machine", "variants", "rows", "medians", "ratios"}
    said = capsys.readouterr()
    assert "what clients saw" in said.out
    assert "round 1, batch=1, 8 clients: " in said.err


@pytest.mark.slow
def test_one_that_runs_is_measured_in_an_open_loop(shared_daemon: Any, tmp_path: Path, capsys: Any) -> None:
    file = tmp_path / "run.json"
    arguments = ["--seconds", "0.4", "--warm-up", "0.1", "--rounds", "2", "--size", "64x64", "--json", str(file)]
    shared_daemon.wait_ready()
    assert program.main(["--endpoint", shared_daemon.endpoint, "--rate", "40", "80", "--markdown", *arguments]) == 0
    rows = saved(file)["rows"]
    assert [row["load"] for row in rows] == [{"rate": 40}, {"rate": 80}] * 2
    assert all(set(row) - BUSY_KEYS == ROW_KEYS | STATS_KEYS for row in rows)  # no limit: whose settings?
    assert all(row["jobs"] > 5 for row in rows)
    assert {row["devices"] for row in rows} == {2}
    table = capsys.readouterr().out.splitlines()
    assert len(table) == 2 + 4 + 2
    assert table[0].startswith("| load | round | images/s | p50 ms | p99 |")


@pytest.mark.slow
def test_a_device_is_busy_for_at_least_what_it_sleeps(daemon: Any, tmp_path: Path, wait_until: Any) -> None:
    file = tmp_path / "run.json"
    running = daemon()  # that answered nobody else
    assert program.main(["--endpoint", running.endpoint, "--clients", "4", "--size", "64x64", "--rounds", "1",
                         "--seconds", "2.2", "--json", str(file)]) == 0  # fmt: skip
    [row] = saved(file)["rows"]
    assert set(row) == ROW_KEYS | STATS_KEYS | BUSY_KEYS
    # the device may be done with four images that the first of the snapshots, a second apart at least, counts not yet
    assert row["busy_ms_per_image"] >= 5 * (1 - 4 / row["fps"])
    assert {"queue", "decode", "wait", "device", "finish", "total"} <= set(row["stages_ms"])
    assert round(row["stages_ms"]["device"], 6) >= 5  # a mean of differences of clocks

    def sums() -> tuple[int, float]:
        images, busy_s = zip(*((each["images"], each["busy_seconds"]) for each in running.devices().values()))
        return sum(images), sum(busy_s)

    wait_until(lambda: sums()[0] == running.client.stats()["answered"])  # the workers have told of all
    images, busy_s = sums()
    assert round(1000 * busy_s / images, 6) >= 5


def test_transports_of_a_running_daemon_are_compared(shared_daemon: Any, tmp_path: Path) -> None:
    file = tmp_path / "run.json"
    arguments = ["--seconds", "0.3", "--warm-up", "0.1", "--rounds", "1", "--json", str(file)]
    shared_daemon.wait_ready()
    assert program.main(["--endpoint", shared_daemon.endpoint, *arguments, "--compare", "transport=socket",
                         "transport=shared"]) == 0  # fmt: skip
    assert [row["shared_memory"] for row in saved(file)["rows"]] == [False, True]


@pytest.mark.slow
def test_files_are_read_by_the_daemon_and_shown_in_a_picture(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="the picture needs matplotlib")
    for number, size in enumerate([(40, 60), (60, 40)]):
        made = pictures.synthetic(size, "png")
        assert made.payload is not None
        (tmp_path / f"{number}.png").write_bytes(made.payload)
    file, picture = tmp_path / "run.json", tmp_path / "run.svg"
    assert run("--images", str(tmp_path), "--clients", "1", "3", "--json", str(file), "--plot", str(picture)) == 0
    for row in saved(file)["rows"]:
        assert row["checked"] >= row["images"]
        assert row["checked"] > 0
        assert (row["failures"], row["wrong"], row["shared_memory"]) == ({}, 0, False)
    text = picture.read_text()
    for words in ("1 client", "images per second", "2 devices alone, batch 1"):
        assert words in text


@pytest.mark.slow
def test_the_hosts_work_is_real_with_a_networks_outputs(tmp_path: Path) -> None:
    file, photo = tmp_path / "run.json", tmp_path / "photo.jpg"
    photo.write_bytes(pictures.synthetic((64, 64), "jpeg").payload or b"")
    assert run("--devices", "cpu:0", "--encoding", "jpeg", "--clients", "2", "--warm-up", "1", "--json", str(file),
               "--replay", str(photo), "--set", "model.config=tests/golden/small_R18.yaml") == 0  # fmt: skip
    [row] = saved(file)["rows"]
    assert row["failures"] == {}
    assert row["checked"] == 0  # given outputs are no checksums
    assert row["answer_bytes"] > 1000


@pytest.mark.slow
def test_however_it_ends_its_daemon_ends_too(wait_until: Any) -> None:
    program_argv = [sys.executable, "scripts/benchmark.py", *BRIEF, "--seconds", "60"]
    with subprocess.Popen(program_argv, cwd=Path(__file__).parents[2]) as running:
        program_process = psutil.Process(running.pid)
        its_own = wait_until(lambda: len(found := program_process.children(recursive=True)) >= 3 and found, 60)
        running.kill()
        wait_until(lambda: not any(map(lives, its_own)), 20)


def lives(process: psutil.Process) -> bool:
    """Those that nobody waits for may stay as zombies."""
    try:
        return bool(process.status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False


@pytest.mark.slow
def test_a_kill_under_load_costs_no_job(tmp_path: Path, capsys: Any) -> None:
    file = tmp_path / "run.json"
    assert run("--kill", "--clients", "4", "--set", "restarts.first_delay_s=0.05", "--json", str(file)) == 0
    [kill] = saved(file)["kills"]
    assert (kill["failures"], kill["wrong"]) == ({}, 0)
    assert kill["jobs"] > 0
    assert kill["ready_s"] > 0
    assert "none failed, 0 answers wrong" in capsys.readouterr().out


@pytest.mark.slow
def test_beside_a_flood_no_job_of_a_polite_client_fails(tmp_path: Path, capsys: Any) -> None:
    file = tmp_path / "run.json"
    assert run("--flood", "--size", "64x64", "--json", str(file)) == 0
    [flood] = saved(file)["floods"]
    for figures in (flood["lonely"], flood["flooded"]):
        assert figures["jobs"] > 0
        assert (figures["failures"], figures["wrong"]) == ({}, 0)
    assert flood["flood_fps"] > 0
    assert flood["refused_per_s"] > 0
    assert "0 failed; the flood got" in capsys.readouterr().out


@pytest.mark.slow
def test_no_limit_of_devices_that_take_no_time(tmp_path: Path) -> None:
    file = tmp_path / "run.json"
    assert run("--clients", "1", "--mask-format", "none", "--set", "timed.latency_ms={1: 0}", "--bare", "--json",
               str(file)) == 0  # fmt: skip
    daemon, bare = saved(file)["rows"]
    assert set(bare) == ROW_KEYS
    assert set(daemon) - BUSY_KEYS == ROW_KEYS | STATS_KEYS
    assert saved(file)["ratios"][0]["p50_ms"]["median"] > 0


def test_the_limit_of_a_device_is_what_its_engine_does_alone() -> None:
    settings = settings_module.load(None, None, ["engine=timed", "batch=2", "timed.latency_ms={1: 5, 2: 8}"], ["cpu:0"])
    found = device.limit(settings, pictures.synthetic((32, 32), "raw").pixels(), seconds=0.2)
    assert found.batch == 2
    assert found.fps <= 2 / 0.008


@pytest.mark.slow
def test_an_engine_that_cannot_load_is_told_of(capfd: Any) -> None:
    assert run("--engine", "native", "--devices", "cpu:0") == 1
    assert re.search(r"model\.weights is not set[\s\S]*the bare loop of engine native ended", capfd.readouterr().err)


def test_variants_that_differ_only_in_their_transport_share_a_plain_path() -> None:
    arguments = program.parse(["--compare", "transport=socket", "transport=shared", "--bare"], "")
    assert [variant.name for variant in program.plan(arguments)] == [
        "transport=socket", "transport=shared", "bare ZeroMQ",
    ]  # fmt: skip


def test_a_variant_may_have_a_name_several_settings_and_options_of_the_load() -> None:
    one = 'one: devices=[cpu:0];runtime.cpus={"cpu:0": "0"};clients=2,3'
    first, second = program.plan(program.parse(["--compare", one, "batch=2"], ""))
    assert (first.name, second.name) == ("one", "batch=2")
    assert first.settings is not None
    assert first.settings.runtime.cpus == {"cpu:0": "0"}
    assert [point.clients for point in first.points] == [2, 3]
    assert [point.clients for point in second.points] == [8]


def test_the_plain_path_takes_as_long_as_the_timed_engine() -> None:
    settings = settings_module.load(None, None, ["engine=timed", "batch=4", "timed.latency_ms={1: 10, 4: 40}"])
    assert servers.seconds_by_batch(settings) == pytest.approx([0.01, 0.02, 0.03, 0.04])


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["--encoding", "path"], "--images"),
        (["--images", "/nowhere/x.jpg"], "/nowhere/x.jpg"),
        (["--endpoint", "nonsense"], "expected ipc:///PATH"),
        (["--endpoint", "ipc:///tmp/e", "--set", "a=1"], "--set"),
        (["--endpoint", "ipc:///tmp/e", "--bare"], "--bare"),
        (["--server-key", "server.key"], "--endpoint"),
        (["--endpoint", "tcp://127.0.0.1:9", "--key", "alice.key_secret"], "server_key"),
        (["--endpoint", "ipc:///tmp/e", "--compare", "batch=1", "batch=2"], "batch is a setting"),
        (["--compare", "batch", "batch=2"], "expected KEY=VALUE"),
        (["--compare", "nonsense=1", "batch=2"], "nonsense: unknown key"),
        (["--compare", "checkout=/nowhere", "batch=2"], "checkout=/nowhere: expected a checkout"),
        (["--set", "queue.max_jobs=-1"], "queue.max_jobs"),
        (["--engine", "native", "--bare"], "--bare sleeps"),
        (["--rate", "5", "--clients", "1", "2"], "--rate is an open loop"),
        (["--kill", "--bare"], "--kill"),
        (["--flood", "--rate", "5"], "--flood is a load of its own"),
        (["--replay", "photo.jpg", "--engine", "native"], "--replay"),
        (["--plot", "run.gif"], "--plot run.gif: expected a name in .svg, .png, .pdf"),
    ],
)
def test_contradictions_are_refused(arguments: list[str], complaint: str, capsys: Any) -> None:
    assert program.main(arguments) == 2
    assert complaint in capsys.readouterr().err


@pytest.mark.parametrize(
    "arguments",
    [["--clients", "0"], ["--clients", "501"], ["--rate", "0"], ["--rate", "fast"], ["--size", "800"],
     ["--size", "0x800"], ["--seconds", "-1"], ["--rounds", "0"], ["--transport", "pigeon"], ["--compare", "batch=1"]],
)  # fmt: skip
def test_bad_values_are_refused(arguments: list[str], capsys: Any) -> None:
    with pytest.raises(SystemExit) as left:
        program.main(arguments)
    assert left.value.code == 2
    assert arguments[0] in capsys.readouterr().err


@pytest.mark.parametrize(
    ("file", "complaint"),
    [
        ("/nowhere/run.json", "the folder /nowhere does not exist"), ("/", "exists, and is no regular file"),
        ("/dev/full", "exists, and is no regular file"), ("/proc/run.json", "nothing can be written there"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("flag", ["--json", "--plot"])
def test_a_file_that_cannot_be_written_is_refused_before_the_first_measurement(
    flag: str, file: str, complaint: str, capsys: Any
) -> None:
    with pytest.raises(SystemExit) as left:
        program.main([flag, file])
    assert (left.value.code, complaint in capsys.readouterr().err) == (2, True)


def test_nobody_at_the_endpoint_is_said(tmp_path: Path, capsys: Any) -> None:
    assert program.main(["--endpoint", f"ipc://{tmp_path}/none", "--wait", "0.1"]) == 3
    assert "no daemon answers" in capsys.readouterr().err


def test_a_plot_without_matplotlib_names_the_extra(monkeypatch: Any, capsys: Any) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert program.main(["--plot", "run.svg"]) == 2
    assert "pip install 'blendmaskd[plots]'" in capsys.readouterr().err
