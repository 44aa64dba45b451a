import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from blendmaskd.settings import Settings, SettingsError, from_tree, load, to_tree
from checkout import ROOT


def write(folder: Path, text: str) -> Path:
    path = folder / "daemon.yaml"
    path.write_text(text)
    return path


# -- where values come from -------------------------------------------------------------------------------------------


def test_without_anything_the_documented_defaults_hold() -> None:
    found = load()
    assert found.devices == ["npu:0", "npu:1"]
    assert found.engine == "native"
    assert found.endpoints.clients == ["ipc:///run/blendmaskd/client.sock"]
    assert found.endpoints.metrics == "127.0.0.1:9464"
    assert found.timed.latency_ms == {1: 21.79, 2: 38.90, 4: 122.43, 8: 226.38}
    assert (found.batch, found.window_s, found.runtime.preload, found.runtime.task_queue) == ("auto", 10.0, "auto", 2)
    assert found.paths.roots == []
    assert found.runtime.cpu_affinity_conf is None


def test_the_shipped_file_is_the_defaults_and_an_empty_one_too(tmp_path: Path) -> None:
    assert load(ROOT / "configs/daemon.yaml") == load()
    assert load(write(tmp_path, "# nothing yet\n")) == load()


def test_environment_wins_over_the_file_and_flags_over_both(tmp_path: Path) -> None:
    path = write(tmp_path, "queue: {max_jobs: 1, max_bytes: 11}\nbatch: 1\nmax_attempts: 5\n")
    environment = {"BLENDMASKD__QUEUE__MAX_JOBS": "2", "BLENDMASKD__BATCH": "2", "BLENDMASKD__DRAIN_S": "2", "X": "1"}
    found = load(path, environment, ["queue.max_jobs=3", "drain_s=3"])
    assert (found.queue.max_jobs, found.drain_s) == (3, 3.0)
    assert found.batch == 2
    assert (found.queue.max_bytes, found.max_attempts) == (11, 5)
    assert load(path).batch == 1


def test_values_of_environment_and_flags_are_yaml() -> None:
    environment = {"BLENDMASKD__DEVICES": "[cpu:0, cpu:1]", "BLENDMASKD__ENDPOINTS__METRICS": "null"}
    found = load(None, environment, ["timed.latency_ms={1: 5, 2: 8.5}", "model.weights=a", "runtime.cpus.cpu:0=0-3"])
    assert found.devices == ["cpu:0", "cpu:1"]
    assert found.endpoints.metrics is None
    assert found.timed.latency_ms == {1: 5.0, 2: 8.5}
    assert found.model.weights == "a"
    assert found.runtime.cpus == {"cpu:0": "0-3"}


def test_below_a_free_map_keys_of_the_environment_stay_as_they_are() -> None:
    environment = {
        "BLENDMASKD__WORKER_ENV__TORCH_NPU_Fallback": "'1'", "BLENDMASKD__WORKER_ENV__A__B": "x",
        "BLENDMASKD__TIMED__LATENCY_MS__1": "5", "BLENDMASKD__Queue__max_JOBS": "7",
    }  # fmt: skip
    found = load(None, environment, ["batch_latency_ms.2=8.5", "worker_env.a.b=y"])
    assert found.worker_env == {"TORCH_NPU_Fallback": "1", "A__B": "x", "a.b": "y"}
    assert (found.timed.latency_ms[1], found.batch_latency_ms, found.queue.max_jobs) == (5.0, {2: 8.5}, 7)


@pytest.mark.parametrize(
    ("text", "name", "lines"),
    [
        ("drain_s: 1\nbatch: 1\ndrain_s: 2\n", "drain_s", "1 and 3"),
        ("queue: {max_jobs: 1}\nqueue: {max_bytes: 9}\n", "queue", "1 and 2"),
        ("queue:\n  max_jobs: 1\n  max_jobs: 1\n", "queue.max_jobs", "2 and 3"),
        ("worker_env: {A: x, 'A': y}\n", "worker_env.A", "1 and 1"),
        ("timed:\n  latency_ms:\n    1: 5\n    1: 6\n", "timed.latency_ms.1", "3 and 4"),
    ],
)
def test_a_key_that_is_given_twice_is_refused_by_name(tmp_path: Path, text: str, name: str, lines: str) -> None:
    path = write(tmp_path, text)
    with pytest.raises(SettingsError, match=re.escape(f"{path}: {name} is given twice, in lines {lines}")):
        load(path)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"a: [1\nb: 2", "line 2, column 2: expected ',' or ']'"),
        (b"\xff\xd8\xff", "not UTF-8 text"),
        (b"\0", "unacceptable character"),
    ],
)
def test_a_file_that_is_no_yaml_is_refused_in_one_line(tmp_path: Path, content: bytes, reason: str) -> None:
    (tmp_path / "daemon.yaml").write_bytes(content)
    with pytest.raises(SettingsError, match=re.escape(reason)) as refused:
        load(tmp_path / "daemon.yaml")
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("name", "wanted"),
    [("QUEUE__MAX_JOBS", "QUEUE__MAX_JOBS"), ("QUEUE_MAX_JOBS", "QUEUE__MAX_JOBS"), ("BATCH", "BATCH"),
     ("endpoints_clients", "ENDPOINTS__CLIENTS"), ("worker_env__A", "worker_env__A")],
)  # fmt: skip
def test_a_variable_with_one_underscore_is_refused_not_ignored(name: str, wanted: str) -> None:
    with pytest.raises(SettingsError, match=f"BLENDMASKD_{name}: .*BLENDMASKD__{wanted}$"):
        load(None, {f"BLENDMASKD_{name}": "7"})
    load(None, {"BLENDMASKD_KEY": "k", "BLENDMASKD_PORT": "tcp://1:1", "BLENDMASKD_HTTP_SERVICE_HOST": "1"})  # others'


def test_two_variables_of_one_setting_are_refused() -> None:
    environment = {"BLENDMASKD__QUEUE__MAX_JOBS": "7", "BLENDMASKD__queue__max_jobs": "5"}
    with pytest.raises(SettingsError, match=r"__QUEUE__MAX_JOBS and BLENDMASKD__queue__max_jobs are one"):
        load(None, environment)
    both = {"BLENDMASKD__WORKER_ENV__a": "'1'", "BLENDMASKD__WORKER_ENV__A": "'2'"}
    assert load(None, both).worker_env == {"a": "1", "A": "2"}


@pytest.mark.parametrize("override", [
    r'model.weights="a\0b"', r'paths.roots=["/tmp", "/\0"]', r'worker_env={A: "x\0"}', r'worker_env={"A\0": x}',
    r'worker_env.A="\ud800"', "worker_env={A=B: x}", "worker_env={'': x}", r'curve={server_key: "\0"}',
    f"worker_env={'[' * 3000}{']' * 3000}",
])  # fmt: skip
def test_what_no_path_and_no_environment_can_hold_is_refused_where_it_is_written(override: str) -> None:
    with pytest.raises(SettingsError, match=override.partition("=")[0].partition(".")[0]):
        load(None, {}, [override])


def test_what_yaml_would_take_for_a_comment_is_refused_in_flags_and_environment() -> None:
    for sources in ((None, {"BLENDMASKD__SPOOL": "/data/run #3/spool"}), (None, {}, ["spool=/data/run #3/spool"])):
        with pytest.raises(SettingsError, match="takes what follows ' #' for a comment"):
            load(*sources)
    assert load(None, {}, ["spool='/data/run #3/spool'"]).spool == "/data/run #3/spool"


def test_devices_have_a_flag_of_their_own_that_wins() -> None:
    assert load(None, {}, ["devices=[cpu:7]"], ["cuda:0", "cpu:0"]).devices == ["cuda:0", "cpu:0"]


WRITABLE = st.characters(codec="utf-8", exclude_characters="\0=")


@given(st.fixed_dictionaries({}, optional={
    "devices": st.lists(st.from_regex(r"(npu|cuda|cpu):[1-9]", fullmatch=True), min_size=1, unique=True),
    "batch": st.integers(1, 64) | st.just("auto"),
    "drain_s": st.floats(0.001, 1e6),
    "queue": st.fixed_dictionaries({"max_jobs": st.integers(1, 10**6)}),
    "worker_env": st.dictionaries(st.text(WRITABLE, min_size=1, max_size=5), st.text(WRITABLE, max_size=5)),
}))  # fmt: skip
def test_settings_survive_the_way_through_plain_values(tree: dict[str, Any]) -> None:
    found = from_tree(tree)
    assert from_tree(to_tree(found)) == found
    assert from_tree(yaml.safe_load(yaml.safe_dump(to_tree(found)))) == found
    assert set(to_tree(found)) == set(Settings.__struct_fields__)


def test_exact_goes_with_the_defaults_and_with_what_it_means() -> None:
    assert not Settings().model.exact
    assert from_tree({"model": {"exact": True}}).model.exact
    assert from_tree({"model": {"exact": True, "precision": "fp32", "graphs": False}, "batch": 1}).model.exact


# -- refusals: key, value, reason -------------------------------------------------------------------------------------

REFUSED = {
    "unknown key": ({"device": ["npu:0"]}, "device: unknown key; did you mean devices?"),
    "unknown key inside": ({"queue": {"max_job": 1}}, "queue.max_job: unknown key; did you mean max_jobs?"),
    "section as value": ({"queue": 5}, "queue = 5: Expected `object`, got `int`"),
    "value as section": ({"drain_s": {}}, "drain_s = {}: Expected `float`"),
    "text for number": ({"queue": {"max_jobs": "many"}}, "queue.max_jobs = 'many': Expected `int`, got `str`"),
    "too small": ({"queue": {"max_jobs": 0}}, "queue.max_jobs = 0: Expected `int` >= 1"),
    "negative bytes": ({"limits": {"max_image_bytes": -1}}, "limits.max_image_bytes = -1: Expected `int` >= 1"),
    "zero seconds": ({"deadline_s": 0}, "deadline_s = 0: Expected `float` > 0.0"),
    "no number": ({"drain_s": float("nan")}, "drain_s = nan: Expected `float` > 0.0"),
    "negative wait": ({"max_wait_ms": -0.5}, "max_wait_ms = -0.5: Expected `float` >= 0.0"),
    "batch too large": ({"batch": 65}, "batch = 65: Expected `int` <= 64"),
    "batch of a word": ({"batch": "best"}, "batch = 'best': Invalid enum value 'best'; expected auto, a number"),
    "unknown engine": ({"engine": "tensorrt"}, "enum value 'tensorrt'; expected native, onnx, adelaidet, timed"),
    "unknown precision": ({"model": {"precision": "fp8"}}, "model.precision = 'fp8': Invalid enum value 'fp8'"),
    "providers that no engine reads": (
        {"model": {"providers": ["OpenVINOExecutionProvider"]}},
        "model.providers = ['OpenVINOExecutionProvider']: only the engine onnx has any",
    ),
    "no providers": (
        {"engine": "onnx", "devices": ["cpu:0"], "model": {"providers": []}}, "model.providers = []: name at least one",
    ),
    "a provider twice": (
        {"engine": "onnx", "devices": ["cpu:0"], "model": {"providers": ["CPUExecutionProvider"] * 2}},
        "and none twice",
    ),
    "no name of a provider": (
        {"engine": "onnx", "devices": ["cpu:0"], "model": {"providers": ["cpu"]}},
        "model.providers: 'cpu': expected a name such as CPUExecutionProvider",
    ),
    "onnx on an NPU": ({"engine": "onnx"}, "devices: 'npu:0': the engine onnx serves on cpu:N"),
    "onnx with graphs": (
        {"engine": "onnx", "devices": ["cpu:0"], "model": {"graphs": True}},
        "model.graphs = True: the engine onnx has none",
    ),
    "onnx in half precision": (
        {"engine": "onnx", "devices": ["cpu:0"], "model": {"precision": "bf16"}},
        "model.precision = 'bf16': the engine onnx computes in fp32",
    ),
    "exact, onnx": (
        {"engine": "onnx", "devices": ["cpu:0"], "model": {"exact": True}},
        "model.exact = True: the engine onnx runs the network that is made for inference; remove one",
    ),
    "a precision that the engine has not": (
        {"engine": "adelaidet", "model": {"precision": "bf16"}},
        "model.precision = 'bf16': the engine adelaidet computes in fp32, hf32 or native",
    ),
    "graphs that the engine has not": (
        {"engine": "adelaidet", "model": {"graphs": True}},
        "model.graphs = True: the engine adelaidet does not support graphs",
    ),
    "graphs on a CPU": (
        {"devices": ["npu:0", "cpu:0"], "model": {"graphs": True}},
        "model.graphs = True: cpu:0 is a CPU, which does not support graphs",
    ),
    "exactly what AdelaiDet says, of AdelaiDet": (
        {"engine": "adelaidet", "model": {"exact": True}},
        "model.exact = True: the engine adelaidet is AdelaiDet itself; remove one of the two",
    ),
    "exactness of nothing": ({"engine": "timed", "model": {"exact": True}}, "the engine timed has no network"),
    "exactly, in half": ({"model": {"exact": True, "precision": "bf16"}}, "exact = True: model.precision = 'bf16' may"),
    "exactly, in HF32": ({"model": {"exact": True, "precision": "hf32"}}, "exact = True: model.precision = 'hf32' may"),
    "exactly, as it comes": ({"model": {"exact": True, "precision": "auto"}}, "model.precision = 'auto' may round"),
    "exactly, recorded": ({"model": {"exact": True, "graphs": True}}, "exact = True: model.graphs = True has never"),
    "exactly, resized fast": ({"model": {"exact": True, "resize": "fast"}}, "model.resize = 'fast' resizes inexactly"),
    "AdelaiDet, fast": ({"engine": "adelaidet", "model": {"resize": "fast"}}, "model.resize = 'fast': the engine"),
    "another resizing": ({"model": {"resize": "lanczos"}}, "model.resize = 'lanczos': Invalid enum value"),
    "exactly, in batches": ({"model": {"exact": True}, "batch": 4}, "exact = True: batch = 4: images are run one"),
    "exactness of a word": ({"model": {"exact": "yes"}}, "model.exact = 'yes': Expected `bool`, got `str`"),
    "task queue 3": ({"runtime": {"task_queue": 3}}, "runtime.task_queue = 3: Invalid enum value 3"),
    "no host threads": ({"runtime": {"host_threads": 0}}, "runtime.host_threads = 0: Expected `int` >= 1"),
    "65 host threads": ({"runtime": {"host_threads": 65}}, "runtime.host_threads = 65: Expected `int` <= 64"),
    "host threads of a word": ({"runtime": {"host_threads": "all"}}, "runtime.host_threads = 'all': Invalid enum"),
    "more bytes than ZeroMQ takes": ({"limits": {"max_image_bytes": 2**62}}, "max_image_bytes = 4611686018427387904: "),
    "more jobs than 64 bits": ({"queue": {"max_jobs": 10**30}}, f"queue.max_jobs = {10**30}: Expected `int` <="),
    "a million threads": ({"runtime": {"threads": 10**6}}, "runtime.threads = 1000000: Expected `int` <= 1024"),
    "warm-up of no image": ({"warm_up": [[1, 10**9]]}, "Expected `int` <= 65535"),
    "a window below a report": ({"window_s": 0.5}, "window_s = 0.5: Expected `float` >= 1"),
    "a window that is never full": ({"window_s": 1e9}, "window_s = 1000000000.0: Expected `float` <= 3600"),
    "a batch size beyond all": ({"timed": {"latency_ms": {99: 5}}}, "timed.latency_ms: one of its keys [99]: Expected"),
    "a key that is no text": ({"batch": 1, True: 5}, "settings: one of its keys ['batch', True]: Expected `str`"),
    "a key without letters": ({"": 5}, "'': unknown key"),
    "no devices": ({"devices": []}, "devices = []: name at least one"),
    "unknown device": ({"devices": ["npu:0", "gpu:0"]}, "devices: 'gpu:0': expected npu:N, cuda:N or cpu:N"),
    "device without number": ({"devices": ["npu"]}, "devices: 'npu': expected npu:N"),
    "device 01": ({"devices": ["npu:01"]}, "devices: 'npu:01': expected npu:N"),
    "device twice": ({"devices": ["cpu:0", "cpu:0"]}, "devices = ['cpu:0', 'cpu:0']: a device is named twice"),
    "device of a number": ({"devices": ["cpu:0", 5]}, "devices[1] = 5: Expected `str`"),
    "no endpoint": ({"endpoints": {"clients": []}}, "endpoints.clients = []: name at least one"),
    "endpoint of a path": ({"endpoints": {"clients": ["/x"]}}, "endpoints.clients: '/x': expected ipc:///PATH or tcp://"),
    **{f"endpoint {endpoint}": ({"endpoints": {"clients": [endpoint]}}, f"endpoints.clients: {endpoint!r}: {reason}")
       for endpoint, reason in {
        "ipc://tmp/x": "expected ipc:///PATH", "ipc://~/x": "expected ipc:///PATH", "ipc://@x": "expected ipc:///PATH",
        "ipc://*": "expected ipc:///PATH", "ipc:///tmp/": "expected ipc:///PATH", "ipc:/tmp/x": "expected ipc:///PATH",
        "tcp://host": "expected HOST:PORT", "tcp://:1": "expected HOST:PORT", "tcp://::1:9465": "expected HOST:PORT",
        "tcp://a b:1": "expected HOST:PORT", "tcp://host:9465/": "expected HOST:PORT", "tcp://host:-1": "expected",
        "tcp://host:70000": "port 70000: expected at most 65535", "tcp://1.2.3:1": "Expected 4 octets in '1.2.3'",
        "tcp://1.2.3.256:1": "Octet 256", "tcp://[1.2.3.4]:1": "At least 3 parts", "tcp://[g::1]:1": "Only hex digits",
        "tcp://host:9465-9470": "expected HOST:PORT",
    }.items()},
    "metrics as an address": ({"endpoints": {"metrics": "http://127.0.0.1:9464"}}, "expected HOST:PORT, an IPv6"),
    "metrics beyond ports": ({"endpoints": {"metrics": "127.0.0.1:99999"}}, "port 99999: expected at most 65535"),
    "one endpoint twice": ({"endpoints": {"clients": ["ipc:///a", "ipc:///a"]}}, "one is named twice"),
    "two names of one endpoint": ({"endpoints": {"clients": ["ipc:///a/b", "ipc:///a/./b"]}}, "/a/b is also a file of"),
    "an endpoint at another's lock": ({"endpoints": {"clients": ["ipc:///a", "ipc:///a.lock"]}}, "is also a file of"),
    "a spool at an endpoint": ({"endpoints": {"clients": ["ipc:///a"]}, "spool": "/a"}, "/a is also a file of"),
    "a spool at an endpoint's lock": ({"endpoints": {"clients": ["ipc:///a"]}, "spool": "/a.lock"}, "also a file of"),
    **{f"{key} of nothing": ({section: {key: ""}}, f"{section}.{key} = '': leave it out, or say null")
       for section, key in (("endpoints", "metrics"), ("model", "weights"), ("model", "config"),
                            ("curve", "server_key"), ("curve", "client_keys"),
                             ("http", "tokens"), ("http", "certificate"))},
    "metrics without port": ({"endpoints": {"metrics": "localhost"}}, "endpoints.metrics = 'localhost': expected HOST"),
    "CPUs of another device": (
        {"devices": ["cpu:0"], "runtime": {"cpus": {"cpu:1": "0"}}}, "runtime.cpus.cpu:1: not among devices ['cpu:0']"
    ),
    "CPUs of words": (
        {"devices": ["cpu:0"], "runtime": {"cpus": {"cpu:0": "all"}}}, "runtime.cpus.cpu:0 = 'all': expected a CPU list"
    ),
    "CPUs downwards": (
        {"devices": ["cpu:0"], "runtime": {"cpus": {"cpu:0": "5-2"}}}, "runtime.cpus.cpu:0 = '5-2': expected a CPU list"
    ),
    "preload of a name": ({"runtime": {"preload": "jemalloc"}}, "runtime.preload = 'jemalloc': expected auto, re"),
    "no latency for one": ({"timed": {"latency_ms": {2: 5}}}, "timed.latency_ms: needs an entry for batch size 1"),
    "negative latency": ({"timed": {"latency_ms": {1: -5}}}, "latency_ms[...] = {1: -5}: Expected `float` >= 0.0"),
    "no latency for batch": (
        {"engine": "timed", "batch": 3}, "batch = 3: timed.latency_ms has no entry for it"
    ),
    "environment of numbers": (
        {"worker_env": {"N": 4}}, "worker_env[...] = {'N': '(hidden)'}: Expected `str`, got `int`"
    ),
    "warm-up of one side": ({"warm_up": [[800]]}, "warm_up[0] = [800]: Expected `array` of length 2"),
}  # fmt: skip


@pytest.mark.parametrize(("tree", "text"), REFUSED.values(), ids=REFUSED)
def test_a_bad_value_is_refused_with_key_value_and_reason(tree: dict[str, Any], text: str) -> None:
    with pytest.raises(SettingsError) as refused:
        from_tree(tree)
    assert text in str(refused.value)


@pytest.mark.parametrize(
    ("environment", "overrides", "text"),
    [
        ({"BLENDMASKD__QUEUE__MAX_JOBS": "0"}, [], "queue.max_jobs = 0: Expected"),
        ({"BLENDMASKD__QUEUES__MAX_JOBS": "1"}, [], "queues: unknown key"),
        ({"BLENDMASKD__BATCH": "[1"}, [], "BLENDMASKD__BATCH=[1: not a YAML value"),
        ({}, ["batch"], "--set batch: expected KEY=VALUE"),
        ({}, ["batch={"], "batch={: not a YAML value"),
        ({}, ["batch=1", "batch.size=2"], "batch.size: batch is not a section"),
        ({}, ["queue.max_jobs="], "queue.max_jobs = None: Expected `int`, got `null`"),
    ],
)
def test_so_is_one_of_the_environment_and_of_a_flag(
    environment: dict[str, str], overrides: list[str], text: str
) -> None:
    with pytest.raises(SettingsError) as refused:
        load(None, environment, overrides)
    assert text in str(refused.value)


@pytest.mark.parametrize(
    ("environment", "overrides"),
    [
        ({"BLENDMASKD__": "1"}, ["worker_env.TOKEN=s3cret"]),
        ({"BLENDMASKD__WORKER_ENV__TOKEN": "[s3cret"}, []),
        ({"BLENDMASKD__WORKER_ENV__TOKEN": "s3cret #1"}, []),
        ({"BLENDMASKD__WORKER_ENV": "s3cret"}, []),
        ({}, ["worker_env={TOKEN: s3cret, 5: x}"]),
        ({}, ["worker_env.TOKEN=s3cret", "timed.latency_ms={99: 5}"]),
    ],
)
def test_no_error_shows_what_workers_get_as_environment(environment: dict[str, str], overrides: list[str]) -> None:
    with pytest.raises(SettingsError) as refused:
        load(None, environment, overrides)
    assert "s3cret" not in str(refused.value)


@pytest.mark.parametrize(
    ("text", "reason"),
    [("[1, 2]", "expected a mapping of settings, found list"), ("a: [", "daemon.yaml"), ("\x00", "daemon.yaml")],
)
def test_a_bad_file_is_refused_by_name(tmp_path: Path, text: str, reason: str) -> None:
    path = write(tmp_path, text)
    with pytest.raises(SettingsError) as refused:
        load(path)
    assert str(path) in str(refused.value)
    assert reason in str(refused.value)


def test_a_missing_file_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match=r"nowhere\.yaml.*No such file"):
        load(tmp_path / "nowhere.yaml")


def test_the_daemon_does_not_start_with_a_bad_value(daemon: Any, wait_until: Any) -> None:
    running = daemon(wait=False, queue={"max_jobs": "many"})
    assert wait_until(lambda: running.process.poll()) == 78
    assert running.log == "blendmaskd: queue.max_jobs = 'many': Expected `int`, got `str`\n"


def test_a_bare_off_is_off() -> None:
    assert load(None, None, ["runtime.preload=off"]).runtime.preload == "off"


@pytest.mark.parametrize("key", ["timed.latency_ms", "batch_latency_ms"])
def test_a_latency_table_ends_where_batches_do(key: str) -> None:
    with pytest.raises(SettingsError, match=key):
        load(None, None, [f"{key}={{1: 10, 65: 20}}"])
