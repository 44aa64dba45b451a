"""docs/wire.md is written by hand: what it says of messages, fields, bounds and defaults is what the code has."""
from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import msgspec
import pytest

from blendmaskd import protocol
from blendmaskd.client.blocking import JobFailed
from blendmaskd.core.stats import SHOWN, SHOWN_OF_A_DEVICE
from blendmaskd.protocol import FROM_CLIENT, FROM_WORKER, TO_CLIENT, TO_WORKER, Kinds
from blendmaskd.shell.sockets import MOST_FRAMES
from checkout import ROOT

PAGE = (ROOT / "docs" / "wire.md").read_text(encoding="utf-8")
WORDS = " ".join(PAGE.split())
SECTIONS = dict(re.findall(r"^## (.+?)\n\n(.+?)(?=\n## |\Z)", PAGE, re.DOTALL | re.MULTILINE))
FREE = {"failures", "idle_seconds", "wanted", "actual"}  # maps in a snapshot whose keys are data


def described(section: str) -> dict[str, str]:
    """By message, the list item about it."""
    items = re.findall(r"^- (`.+?`): (.+?)(?=\n- |\n\n|\Z)", SECTIONS[section], re.DOTALL | re.MULTILINE)
    return {name: " ".join(text.split()) for names, text in items for name in re.findall(r"`(.+?)`", names)}


def properties(kind: type) -> dict[str, Any]:
    """The JSON schema of each field."""
    fields: dict[str, Any] = msgspec.json.schema(kind)["$defs"][kind.__name__]["properties"]
    return {name: field for name, field in fields.items() if name != "type"}


@pytest.mark.parametrize(
    ("section", "kinds"), [("What a client sends", FROM_CLIENT), ("What the broker answers", TO_CLIENT)]
)
def test_each_message_is_there_with_its_fields(section: str, kinds: Kinds[Any]) -> None:
    items = described(section)
    assert items.keys() == kinds.keys()
    for name, message in kinds.items():
        assert [field for field in properties(message) if f"`{field}`" not in items[name]] == [], name


def test_the_workers_messages_are_there() -> None:
    named = re.findall(r"`([\w-]+)`", SECTIONS["Workers"].partition(". Each lease")[0])
    assert named == [*FROM_WORKER, *TO_WORKER]


@pytest.mark.parametrize("kind", [protocol.Image, protocol.Options, protocol.Place])
def test_each_field_of_a_map_is_there_with_its_choices(kind: type) -> None:
    [text] = re.findall(r"^\*\*image\*\*: .+?^\*\*options\*\*: .+?\n\n", PAGE, re.DOTALL | re.MULTILINE)
    wanted = [each for name, field in properties(kind).items() for each in (name, *field.get("enum", ()))]
    assert [word for word in wanted if f"`{word}`" not in text] == []


def test_bounds_and_defaults_are_those_of_the_code() -> None:
    submit, image, options = map(properties, (protocol.Submit, protocol.Image, protocol.Options))
    seconds, name, rank = submit["deadline_s"]["anyOf"][0], submit["job"], submit["priority"]
    score = options["score_threshold"]
    for sentence in (
        f'`[b"{protocol.MAGIC.decode()}", header, payload…]`',
        f"`job` (str of {name['minLength']} to {name['maxLength']} characters",
        f"more than {seconds['exclusiveMinimum']} and at most {seconds['maximum']};",
        f"`priority` (integer from {rank['minimum']} to {rank['maximum']}, default {rank['default']}",
        f"`durable` (default {str(submit['durable']['default']).lower()}",
        f"`wait` (default {str(properties(protocol.Fetch)['wait']['default']).lower()})",
        f"`dtype` `{image['dtype']['default']}`, which is the default",
        f"`order` `{image['order']['default']}` (default)",
        f"`score_threshold` ({score['minimum']} to {score['maximum']}; default {score['default']:g}",
        f"`none`; default `{options['mask_format']['default']}`",
        f"A header has at most {protocol.MAX_HEADER_BYTES >> 10} KiB",
        f"A frame of up to {protocol.SURE_BYTES >> 20} MiB is always read",
        f"more than {MOST_FRAMES - 1} frames, or with more than {protocol.SURE_BYTES >> 20} MiB before the image",
        f"has at least {protocol.LEAST_DURABLE_NAME} characters",
        f"with `{protocol.MEMORY_SUFFIX}` appended",
        ", ".join(f"{bound:g}" for bound in protocol.STAGE_BOUNDS_S) + " s; one more bucket",
        "(seconds by stage: " + ", ".join(f"`{stage}`" for stage in protocol.STAGES) + ")",
    ):
        assert sentence in WORDS, sentence


def keys(value: Any) -> Iterator[str]:
    """Of all maps in it whose keys are its form."""
    for each in value if isinstance(value, list) else ():
        yield from keys(each)
    for key, inner in value.items() if isinstance(value, dict) else ():
        yield key
        if key not in FREE:
            yield from keys(list(inner.values()) if key == "stages" else inner)


def test_the_form_of_a_snapshot_is_that_of_a_snapshot(daemon: Any, tmp_path: Any, wait_until: Any) -> None:
    running = daemon(devices=["cpu:0"], spool=str(tmp_path / "spool"), show_last_image=True)
    running.client.segment((ROOT / "tests" / "golden" / "images" / "chelsea.png").read_bytes())
    with pytest.raises(JobFailed):
        running.client.segment(b"no image")
    wait_until(lambda: running.client.stats()["last_image"])
    snapshot = wait_until(lambda: (found := running.client.stats())["recent_failures"] and found)
    [form] = re.findall(r"(?:^ {4}.+\n)+", SECTIONS["Statistics"], re.MULTILINE)
    written = set(re.findall(r'"(\w+)"', form))
    assert written == set(keys(snapshot))
    assert {*SHOWN, *SHOWN_OF_A_DEVICE} <= written
