"""Load a daemon and report what its clients see, as a share of what the devices can do.

It loads a daemon of its own (--devices, --engine, --batch, --set) or a running one (--endpoint). The devices'
limit is measured in the same run, before and after: the same engine in a bare loop, by the device's own clock, without
daemon, transport, decoding and masks. Ratios can be compared between machines, absolute figures cannot.

  python scripts/benchmark.py                                       # two timed devices, 8 clients, 800x800 raw
  python scripts/benchmark.py --clients 1 2 4 8 16 --plot load.svg  # closed loop: throughput against latency
  python scripts/benchmark.py --rate 40 60 80 90 --plot load.svg    # open loop: latency at a mean rate
  python scripts/benchmark.py --endpoint ipc:///run/blendmaskd/client.sock --images photos/ --encoding jpeg
  python scripts/benchmark.py --kill                                # kill -9 a worker under load
  python scripts/benchmark.py --flood --size 224x224                # a polite client beside one that floods
  python scripts/benchmark.py --encoding jpeg --replay photo.jpg    # real decoding, resizing and mask encoding
  python scripts/benchmark.py --encoding jpeg --http http://127.0.0.1:9466/v1/segment   # what serves there, by HTTP

two settings against each other, and against the plain ZeroMQ path, in turns in one run:

  python scripts/benchmark.py --compare batch=1 batch=auto --bare
  python scripts/benchmark.py --compare transport=socket transport=shared
  python scripts/benchmark.py --compare 'before: checkout=../before' 'after: checkout=.'   # two versions of the daemon
  python scripts/benchmark.py --clients 1 --devices cpu:0 --size 224x224 --mask-format none --bare \\
    --transport socket --set 'timed.latency_ms={1: 0}'              # latency for a lone client
  python scripts/benchmark.py --devices cpu:{0..15} --clients 48    # many devices
  python scripts/benchmark.py --engine native --images configs/demo/images --set model.config=configs/demo/demo.yaml \\
    --set model.weights=configs/demo/model_final.pth \\
    --compare 'one: devices=[cpu:0];runtime.cpus={"cpu:0": "0"}' 'two: devices=[cpu:0, cpu:1]'

Exit codes: 0 measured · 1 a wrong answer, more work of a device than it has time for, or no limit to be measured ·
2 wrong arguments · 3 no daemon · 130 Ctrl-C. BENCHMARKS.md explains how to read the figures.
"""
from __future__ import annotations

import argparse
import contextlib
import copy
import dataclasses
import importlib.util
import os
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from blendmaskd import files
from blendmaskd import settings as settings_module
from blendmaskd.client import places
from blendmaskd.client.connection import Transport
from blendmaskd.programs import input_images
from blendmaskd.programs.connecting import make_client
from blendmaskd.programs.errors import UsageError, guarded
from blendmaskd.protocol import Options
from blendmaskd.settings import Settings, SettingsError
from blendmaskd.topology import HostError
from blendmaskd_workers.benchmark import device, flood, http_load, kill, pictures, replay, report, servers
from blendmaskd_workers.benchmark.arguments import LOAD_OPTIONS, PLOTS, load_parser, parse
from blendmaskd_workers.benchmark.generator import Generator
from blendmaskd_workers.benchmark.load_socket import Sending
from blendmaskd_workers.benchmark.measure import Point, Row, measure
from blendmaskd_workers.benchmark.pictures import Picture
from blendmaskd_workers.benchmark.servers import Server

EXIT_WRONG = 1
ANSWER_BYTES = 20_000  # of the plain path, where no daemon was asked before
DAEMON, BARE = "daemon", {"proxy": "bare ZeroMQ", "poller": "bare poller"}


@dataclass(frozen=True, slots=True)
class Variant:
    """What is measured in turns with others."""

    name: str
    arguments: argparse.Namespace  # the load's
    overrides: tuple[str, ...] = ()
    settings: Settings | None = None  # None: of a daemon that runs already
    bare: str | None = None  # the kind of plain path, see `blendmaskd_workers.benchmark.bare`
    checkout: Path | None = None  # of the daemon; None: this one

    @property
    def points(self) -> list[Point]:
        clients = self.arguments.clients
        if not self.arguments.rate:
            return [Point(each) for each in clients]
        return [Point(max(clients), rate) for rate in self.arguments.rate]


def main(argv: Sequence[str] | None = None) -> int:
    return guarded("benchmark", lambda: _main(parse(argv, __doc__ or "")))


def _main(arguments: argparse.Namespace) -> int:
    console = Console(highlight=False, soft_wrap=True)
    _refuse_contradictions(arguments)
    try:
        with tempfile.TemporaryDirectory(prefix="blendmaskd-benchmark-") as folder:
            if arguments.http:
                return _http(arguments, console)
            variants = plan(_replayed(arguments, Path(folder) / "outputs.npz"))
            if arguments.kill:
                return _kill(variants[0], console)
            if arguments.flood:
                return _flood(variants[0], console)
            rows = _measure_all(variants, arguments)
    except (SettingsError, HostError) as error:
        raise UsageError(str(error)) from None
    _tell(rows, variants, arguments, console)
    return EXIT_WRONG if any(row["wrong"] or report.visits_overlapped(row) for row in rows) else 0


def _replayed(arguments: argparse.Namespace, file: Path) -> argparse.Namespace:
    """The arguments, with outputs for the timed engine where --replay asks for them."""
    if not arguments.replay:
        return arguments
    settings = settings_module.load(None, None, arguments.set)
    replay.write(arguments.replay, file, settings.model.config, arguments.size)
    return argparse.Namespace(**{**vars(arguments), "set": [*arguments.set, f"timed.outputs={file}"]})


def plan(arguments: argparse.Namespace) -> list[Variant]:
    """The variants. Raises `UsageError`, `SettingsError`."""
    first = Variant(arguments.endpoint, arguments) if arguments.endpoint else _variant("", arguments)
    variants = [_variant(text, arguments) for text in arguments.compare or ()] or [first]
    if arguments.bare:
        if first.settings is None or first.settings.engine != "timed":
            raise UsageError("--bare sleeps the latency table of engine timed: it needs a daemon of its own with that")
        variants += _bare(variants, arguments.bare)
    return variants


def _bare(variants: Sequence[Variant], kind: str) -> list[Variant]:
    """The plain path for each of these; one where it would be the same for all."""
    name = BARE[kind]
    paths = {_path(variant): variant for variant in reversed(variants)}
    return [
        dataclasses.replace(variant, name=name if len(paths) == 1 else f"{name}, {variant.name}", bare=kind)
        for variant in reversed(paths.values())
    ]


def _path(variant: Variant) -> str:
    """What the plain path makes of a variant: devices and their latencies, and what is sent to them."""
    settings, arguments = variant.settings, variant.arguments
    assert settings is not None
    load = (arguments.clients, arguments.rate, arguments.size, _encoding(arguments), arguments.images)
    return repr((settings.devices, servers.seconds_by_batch(settings), *load))


def _variant(text: str, arguments: argparse.Namespace) -> Variant:
    """What [NAME: ]KEY=VALUE[;KEY=VALUE…] makes of the arguments: of the load, or else settings of the daemon."""
    arguments = copy.copy(arguments)
    name, colon, pairs = text.partition(": ")
    if not colon or "=" in name:
        name = pairs = text
    overrides = [f"devices=[{', '.join(arguments.devices)}]", f"engine={arguments.engine}", f"batch={arguments.batch}",
                 *arguments.set]  # fmt: skip
    checkout: Path | None = None
    for pair in filter(None, pairs.split(";")):
        key, equals, value = pair.strip().partition("=")
        if not equals:
            raise UsageError(f"--compare {text}: expected KEY=VALUE, several of them with ; between")
        if key.replace("-", "_") in LOAD_OPTIONS:
            option = load_parser().parse_args([f"--{key.replace('_', '-')}", *value.split(",")])
            setattr(arguments, key.replace("-", "_"), getattr(option, key.replace("-", "_")))
        elif key == "checkout" and not arguments.endpoint:
            checkout = _checkout(value)
        elif arguments.endpoint:
            raise UsageError(f"--compare {text}: {key} is a setting of the daemon; with --endpoint only the load can "
                             f"differ: {', '.join(LOAD_OPTIONS)}")  # fmt: skip
        else:
            overrides.append(pair.strip())
    if arguments.images and _encoding(arguments) == "path":
        folders = sorted({os.path.dirname(os.path.abspath(path)) for path in input_images.find(arguments.images)})
        overrides.insert(0, f"paths.roots={folders}")
    settings = settings_module.load(None, None, overrides)
    return Variant(
        name or DAEMON, arguments, tuple(overrides), None if arguments.endpoint else settings, checkout=checkout
    )


def _checkout(folder: str) -> Path:
    checkout = Path(folder).resolve()
    if not (checkout / "daemon" / "blendmaskd").is_dir():
        raise UsageError(f"--compare checkout={folder}: expected a checkout of this project, with daemon/blendmaskd; "
                         "`git worktree add FOLDER COMMIT` makes one")  # fmt: skip
    return checkout


def _refuse_contradictions(arguments: argparse.Namespace) -> None:
    if arguments.encoding == "path" and not arguments.images:
        raise UsageError("--encoding path sends the names of files: name them by --images")
    if arguments.endpoint and (arguments.set or arguments.kill or arguments.flood):
        raise UsageError("--set, --kill and --flood need a daemon of our own: leave --endpoint out")
    if (arguments.server_key or arguments.key) and not arguments.endpoint:
        raise UsageError("--server-key and --key are for a daemon that runs already: name its --endpoint")
    if arguments.replay and (arguments.engine != "timed" or arguments.endpoint):
        raise UsageError("--replay gives outputs to engine timed: it needs a daemon of its own with that")
    if arguments.rate and len(arguments.clients) > 1:
        raise UsageError("--rate is an open loop: --clients is then the number of connections, one value")
    if arguments.kill and (arguments.bare or arguments.compare or len(arguments.rate or arguments.clients) > 1):
        raise UsageError("--kill looks at one load of one daemon: leave --bare and --compare out, name one load")
    if arguments.flood and (arguments.bare or arguments.compare or arguments.rate or arguments.kill):
        raise UsageError("--flood is a load of its own: leave --bare, --compare, --rate and --kill out")
    if arguments.plot and importlib.util.find_spec("matplotlib") is None:
        raise UsageError("--plot needs matplotlib: pip install 'blendmaskd[plots]'")
    if arguments.plot and arguments.plot.suffix not in PLOTS:
        raise UsageError(f"--plot {arguments.plot}: expected a name in {', '.join(PLOTS)}")


def _http(arguments: argparse.Namespace, console: Console) -> int:
    sent = _pictures(arguments)[0]
    if sent.image.kind != "encoded" or sent.payload is None:
        raise UsageError("--http sends encoded images: --encoding jpeg or png")
    points = [(url, clients) for clients in arguments.clients for url in arguments.http]
    rows = []
    for number in range(1, arguments.rounds + 1):
        for url, clients in points:
            load = clients, arguments.warm_up, arguments.seconds
            found = http_load.measure(url, sent.payload, arguments.http_form, *load)
            rows.append({"round": number, "image_bytes": len(sent.payload), **found})
            console.print(escape(f"{number}  {_http_line(url, clients, found)}  {found['failures'] or ''}"))
    console.print(f"median of {arguments.rounds} rounds, images of {len(sent.payload)} bytes:")
    for url, clients in points:
        middle = http_load.medians([row for row in rows if (row["url"], row["clients"]) == (url, clients)])
        console.print(escape(f"   {_http_line(url, clients, middle)}"))
    if arguments.json:
        files.write_json(arguments.json, rows)
    return 0


def _http_line(url: str, clients: int, found: dict[str, Any]) -> str:
    return (f"{url}, {clients} clients: {found['fps']:.1f} images/s, p50 {found['p50_ms']:.1f} ms, "
            f"p99 {found['p99_ms']:.1f} ms, {found['cpu_s_per_1000']:.2f} s of CPU per 1000")  # fmt: skip


# ---- rounds -----------------------------------------------------------------------------------------------------

def _measure_all(variants: Sequence[Variant], arguments: argparse.Namespace) -> list[Row]:
    rows: list[Row] = []
    with _progress(variants, arguments) as progress:
        for number in range(1, arguments.rounds + 1):
            for variant in variants:
                known = (row["answer_bytes"] for row in reversed(rows) if row["answer_bytes"])
                for row in _round(variant, number, next(known, ANSWER_BYTES), progress):
                    rows.append(row)
                    progress.console.print(escape(report.line(row)))
    return rows


def _round(variant: Variant, number: int, answer_bytes: int, progress: Progress) -> Iterator[Row]:
    """A row for each load, with the devices' limit before and after."""
    arguments = variant.arguments
    sent = _pictures(arguments)
    rows = []
    limits = [_limit(variant, sent[0], progress)]
    with _server(variant, answer_bytes) as server:
        for point in variant.points:
            _show(progress, f"round {number}: {variant.name}, {report.load_text({'load': point.as_dict()})}")
            with Generator(server.endpoint, sent, point.clients, _sending(variant, point), server.keys) as generator:
                tick = partial(_show, progress, seconds=1.0)
                row = measure(server, generator, point, arguments.warm_up, arguments.seconds, tick)
            rows.append({"round": number, "variant": variant.name, **row})
    limits.append(_limit(variant, sent[0], progress))
    for row in rows:
        yield row | _share(row, [limit for limit in limits if limit], variant)


def _limit(variant: Variant, picture: Picture, progress: Progress) -> device.Limit | None:
    settings, seconds = variant.settings, variant.arguments.limit_seconds
    if settings is None or not seconds:
        return None
    if settings.engine == "timed" and not max(servers.seconds_by_batch(settings)):
        return None  # it takes no time
    _show(progress, "the devices' limit")
    found = device.limit(settings, picture.pixels(), seconds)
    _show(progress, seconds=seconds)
    return found


def _share(row: Row, limits: Sequence[device.Limit], variant: Variant) -> Row:
    if not limits or variant.settings is None:
        return {}
    fps = sum(limit.fps for limit in limits) / len(limits)
    devices = len(variant.settings.devices)
    return {
        "limit_devices": devices,
        "limit_fps": devices * fps,
        "limit_ms_per_image": 1000 / fps,
        "limit_batch": limits[0].batch,
        "utilisation": row["fps"] / (devices * fps),
    }


@contextlib.contextmanager
def _server(variant: Variant, answer_bytes: int) -> Iterator[Server]:
    if variant.settings is None:
        client = make_client(variant.arguments, variant.arguments.wait)
        yield servers.running_daemon(client, variant.arguments.wait)
    elif variant.bare:
        with servers.bare_path(variant.settings, answer_bytes, variant.bare) as server:
            yield server
    else:
        with servers.own_daemon(variant.overrides, variant.settings, variant.checkout) as server:
            yield server


def _sending(variant: Variant, point: Point) -> Sending:
    """The plain path knows no shared memory."""
    arguments = variant.arguments
    transport: Transport = "socket" if variant.bare else arguments.transport
    held = 1 if point.rate is None else places.PLACES
    return Sending(transport, Options(mask_format=arguments.mask_format), arguments.timeout, held)


def _pictures(arguments: argparse.Namespace) -> list[Picture]:
    if not arguments.images:
        return [pictures.synthetic(arguments.size, _encoding(arguments))]
    return [pictures.from_file(path, _encoding(arguments)) for path in input_images.find(arguments.images)]


def _encoding(arguments: argparse.Namespace) -> pictures.Encoding:
    chosen: pictures.Encoding = arguments.encoding or ("path" if arguments.images else "raw")
    return chosen


def _kill(variant: Variant, console: Console) -> int:
    """Each round with a daemon of its own."""
    arguments, [point] = variant.arguments, variant.points
    rows = []
    for number in range(1, arguments.rounds + 1):
        with _server(variant, ANSWER_BYTES) as server, Generator(
            server.endpoint, _pictures(arguments), point.clients, _sending(variant, point)
        ) as generator:
            rows.append({"round": number, **kill.kill_one(generator, point, arguments.warm_up, arguments.seconds)})
        console.print(kill.line(rows[-1]))
    if arguments.json:
        files.write_json(arguments.json, report.plain({"machine": report.machine(), "kills": rows}))
    return EXIT_WRONG if any(row["wrong"] for row in rows) else 0


def _flood(variant: Variant, console: Console) -> int:
    """Each round with a daemon of its own."""
    arguments, rows = variant.arguments, []
    for number in range(1, arguments.rounds + 1):
        with _server(variant, ANSWER_BYTES) as server, Generator(
            server.endpoint, _pictures(arguments), flood.POLITE.clients, _sending(variant, flood.POLITE)
        ) as generator:
            row = flood.flood_one(generator, server.endpoint, arguments.size, arguments.warm_up, arguments.seconds)
        rows.append({"round": number, **row})
        console.print(flood.line(rows[-1]))
    if arguments.json:
        files.write_json(arguments.json, report.plain({"machine": report.machine(), "floods": rows}))
    return EXIT_WRONG if any(row[each]["wrong"] for row in rows for each in ("lonely", "flooded")) else 0


# ---- telling ----------------------------------------------------------------------------------------------------

def _tell(rows: Sequence[Row], variants: Sequence[Variant], arguments: argparse.Namespace, console: Console) -> None:
    found = [ratio for above, below in _pairs(variants) for ratio in report.ratios(rows, above, below)]
    middle = report.medians(rows)
    if arguments.markdown:
        print(report.markdown(rows, found))
    else:
        console.print(*report.tables(middle), *(escape(report.ratio_text(each)) for each in found), sep="\n")
    tree = {
        "machine": report.machine(),
        "variants": {each.name: _as_dict(each) for each in variants},
        "rows": rows,
        "medians": middle,
        "ratios": found,
    }
    if arguments.json:
        files.write_json(arguments.json, report.plain(tree))
    if arguments.plot:
        from blendmaskd_workers.benchmark import plot

        plot.save(arguments.plot, tree)


def _pairs(variants: Sequence[Variant]) -> Iterator[tuple[str, str]]:
    """Which variant is said as a multiple of which: the second of the first, each of the plain path."""
    served = [variant for variant in variants if not variant.bare]
    if len(served) == 2:
        yield served[1].name, served[0].name
    for bare in variants:
        if bare.bare:
            yield from ((variant.name, bare.name) for variant in served if _path(variant) == _path(bare))


def _as_dict(variant: Variant) -> dict[str, Any]:
    options = {name: getattr(variant.arguments, name) for name in (*LOAD_OPTIONS, "images", "seconds", "warm_up")}
    return {"load": options, "settings": list(variant.overrides), "bare": variant.bare}


def _progress(variants: Sequence[Variant], arguments: argparse.Namespace) -> Progress:
    """A bar on a terminal, redrawn by us alone, because a thread would disturb the load."""
    total_s = arguments.rounds * sum(
        len(variant.points) * (arguments.warm_up + arguments.seconds) + 2 * arguments.limit_seconds
        for variant in variants
    )
    columns = (TextColumn("{task.description}"), BarColumn(), TimeRemainingColumn())
    console = Console(stderr=True, highlight=False, soft_wrap=True)
    progress = Progress(*columns, console=console, auto_refresh=False, transient=True, disable=not console.is_terminal)
    progress.add_task("starting", total=total_s)
    return progress


def _show(progress: Progress, text: str | None = None, seconds: float | None = None) -> None:
    """What is being done, or how much more has been."""
    [bar] = progress.task_ids
    progress.update(bar, description=text and escape(text), advance=seconds, refresh=True)
