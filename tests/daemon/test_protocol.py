import math
from typing import Any

import msgpack
import msgspec
import pytest
import zmq
from hypothesis import example, given
from hypothesis import strategies as st

from blendmaskd import protocol
from blendmaskd.protocol import (
    FROM_CLIENT,
    FROM_WORKER,
    MAGIC,
    MAX_HEADER_BYTES,
    TO_CLIENT,
    TO_WORKER,
    Cancel,
    CloseRegion,
    Code,
    Failed,
    FailedLease,
    Fetch,
    Finished,
    GetStats,
    Image,
    Lease,
    OpenRegion,
    Options,
    Place,
    ProtocolError,
    Ready,
    Report,
    Result,
    Revoke,
    Started,
    Stats,
    Stop,
    Submit,
    decode,
    encode,
)
from blendmaskd.wanted import Actual

ENCODED = {"kind": "encoded"}
PLACE = {"region": "r", "offset": 0, "bytes": 1}
SUBMIT = {"type": "submit", "job": "a", "image": ENCODED}

SUBMIT_BYTES = [
    b"BMD1",
    (b"\x86"
    b"\xa4type\xa6submit"
    b"\xa3job\xa3a-1"
    b"\xa5image\x86\xa4kind\xa3raw\xa5shape\x93\x01\x02\x03\xa5dtype\xa5uint8\xa5order\xa3bgr\xa4path\xc0\xa5place\xc0"
    b"\xa7options\x83\xafscore_threshold\xcb\x3f\xe0\x00\x00\x00\x00\x00\x00\xaemax_detections\x64"
    b"\xabmask_format\xa3rle"
    b"\xaadeadline_s\xcb\x40\x24\x00\x00\x00\x00\x00\x00"
    b"\xa8priority\xff"),
    b"\x01\x02\x03\x04\x05\x06",
]
RESULT_BYTES = [
    b"BMD1",
    (b"\x86"
    b"\xa4type\xa6result"
    b"\xa3job\xa3a-1"
    b"\xa5width\x02\xa6height\x01"
    b"\xa6device\xa5npu:0"
    b"\xa7timings\x81\xa5total\xcb\x3f\xa0\x00\x00\x00\x00\x00\x00"),
    b"\x90",
]

PLACED_BYTES = [
    b"BMD1",
    (b"\x83"
    b"\xa3job\xa3a-1"
    b"\xa5image\x82\xa4kind\xa7encoded\xa5place\x83\xa6region\xa40a1b\xa6offset\xcd\x10\x00\xa5bytes\x03"
    b"\xa4type\xa6submit"),
]

# Each optional field is null, as a client writes it whose language has no absent ones.
NULLS_BYTES = [
    b"BMD1",
    (b"\x87"
    b"\xa4type\xa6submit"
    b"\xa3job\xa3a-1"
    b"\xa5image\x86\xa4kind\xa3raw\xa5shape\x93\x01\x02\x03\xa5dtype\xc0\xa5order\xc0\xa4path\xc0\xa5place\xc0"
    b"\xa7options\x83\xafscore_threshold\xc0\xaemax_detections\xc0\xabmask_format\xc0"
    b"\xaadeadline_s\xc0"
    b"\xa8priority\xc0"
    b"\xa7durable\xc0"),
    b"\x01\x02\x03\x04\x05\x06",
]

ACTUAL = Actual(cpus="0-3", threads=4, task_queue=None, preload="/t.so", env={"A": "b"}, thread_cpus={"a/7": "1"})
MESSAGES: list[tuple[Any, protocol.Kinds[Any]]] = [
    (Submit(job="a", image=Image(kind="path", path="/data/a.jpg")), FROM_CLIENT),
    (Cancel(job="a"), FROM_CLIENT),
    (GetStats(), FROM_CLIENT),
    (Submit(job="a", image=Image(kind="encoded", place=Place(region="r", offset=4096, bytes=3))), FROM_CLIENT),
    (Result(job="a", width=2, height=1, device="npu:0", timings={"total": 0.5}), TO_CLIENT),
    (Failed(job="a", code=Code.BUSY, reason="full", retry_after_s=0.5), TO_CLIENT),
    (Stats(stats={"seq": 1, "devices": [{"fps": 0.25}]}), TO_CLIENT),
    (Ready(token="t", pid=7, window=2, actual=ACTUAL), FROM_WORKER),
    (Started(leases=[1, 2]), FROM_WORKER),
    (Finished(lease=1, width=2, height=1, timings={}), FROM_WORKER),
    (FailedLease(lease=1, code=Code.BAD_IMAGE, reason="empty"), FROM_WORKER),
    (Report(start=1.0, end=2.0, images=3, busy_s=0.5, memory_bytes=4, device_memory_bytes=0,
            shapes=[(1, 2, 3, 0.5), (2, 2, 3, None)], window=4),
     FROM_WORKER),
    (Lease(lease=1, image=Image(kind="raw", shape=(1, 2, 3)), options=Options(), deadline=5.5, alone=True), TO_WORKER),
    (Revoke(lease=1), TO_WORKER),
    (OpenRegion(region="r", descriptor=7, inode=1 << 40, bytes=4096), TO_WORKER),
    (CloseRegion(region="r"), TO_WORKER),
    (Stop(), TO_WORKER),
]  # fmt: skip


def header(**fields: Any) -> bytes:
    packed: bytes = msgpack.packb(fields)
    return packed


def submit(**changes: Any) -> list[bytes]:
    """Frames of a submit with some fields changed."""
    return [MAGIC, header(**{**SUBMIT, **changes}), b"x"]


# -- by bytes ---------------------------------------------------------------------------------------------------------


def test_a_submit_is_these_bytes() -> None:
    message = Submit(
        job="a-1", image=Image(kind="raw", shape=(1, 2, 3)), options=Options(score_threshold=0.5, max_detections=100),
        deadline_s=10.0, priority=-1,
    )  # fmt: skip
    assert decode(encode(message, SUBMIT_BYTES[2:]), FROM_CLIENT) == (message, SUBMIT_BYTES[2:])
    assert decode(SUBMIT_BYTES, FROM_CLIENT) == (message, SUBMIT_BYTES[2:])


def test_a_result_is_these_bytes() -> None:
    message = Result(job="a-1", width=2, height=1, device="npu:0", timings={"total": 0.03125})
    assert encode(message, [b"\x90"]) == RESULT_BYTES
    assert decode(RESULT_BYTES, TO_CLIENT) == (message, [b"\x90"])


def test_an_image_in_shared_memory_is_these_bytes() -> None:
    placed = Submit(job="a-1", image=Image(kind="encoded", place=Place(region="0a1b", offset=4096, bytes=3)))
    assert decode(PLACED_BYTES, FROM_CLIENT) == (placed, [])
    assert decode(encode(placed), FROM_CLIENT) == (placed, [])


def test_an_optional_field_that_is_null_has_its_default() -> None:
    message = Submit(job="a-1", image=Image(kind="raw", shape=(1, 2, 3)))
    assert decode(NULLS_BYTES, FROM_CLIENT) == (message, NULLS_BYTES[2:])
    for name in ("deadline_s", "priority", "durable", "options"):
        assert decode(submit(**{name: None}), FROM_CLIENT)[0] == Submit(job="a", image=Image(kind="encoded")), name
    assert decode([MAGIC, header(type="fetch", job="a", wait=None)], FROM_CLIENT) == (Fetch(job="a"), [])


def test_a_running_daemon_takes_nulls_and_says_them(shared_daemon: Any) -> None:
    socket = shared_daemon.dealer()
    socket.send_multipart(NULLS_BYTES)
    assert msgpack.unpackb(socket.recv_multipart()[1])["type"] == "result"
    socket.send_multipart(submit(image={"kind": None}))
    _, head = socket.recv_multipart()
    reason = "submit: Object missing required field `kind` - at `$.image`"
    answer = {"type": "failed", "job": "a", "code": "bad-request", "reason": reason, "retry_after_s": None}
    assert msgpack.unpackb(head) == answer


def test_a_number_without_a_fraction_is_a_float_but_no_float_is_an_integer() -> None:
    message, _ = decode(submit(deadline_s=4, options={"score_threshold": 1}), FROM_CLIENT)
    assert message == Submit(job="a", image=Image(kind="encoded"), options=Options(score_threshold=1.0), deadline_s=4.0)
    with pytest.raises(ProtocolError, match="Expected `int"):
        decode(submit(options={"max_detections": 5.0}), FROM_CLIENT)


def test_a_running_daemon_speaks_these_bytes(shared_daemon: Any) -> None:
    socket = shared_daemon.dealer()
    socket.send_multipart(SUBMIT_BYTES)
    magic, head, detections = socket.recv_multipart()
    assert magic == b"BMD1"
    answer = msgpack.unpackb(head)
    timings = answer.pop("timings")
    assert answer == {"type": "result", "job": "a-1", "width": 2, "height": 1, "device": answer["device"]}
    assert answer["device"] in ("cpu:0", "cpu:1")
    assert set(timings) == {"queue", "decode", "wait", "device", "finish", "send", "total"}
    assert 0.005 <= timings["device"] <= timings["total"]
    assert detections == (
        b"\x91\x87"
        b"\xa4bbox\x94\xcb\x00\x00\x00\x00\x00\x00\x00\x00\xcb\x00\x00\x00\x00\x00\x00\x00\x00"
        b"\xcb\x40\x00\x00\x00\x00\x00\x00\x00\xcb\x3f\xf0\x00\x00\x00\x00\x00\x00"
        b"\xa5score\xcb\x3f\xf0\x00\x00\x00\x00\x00\x00"
        b"\xabclass_index\x00\xabcategory_id\x01\xadcategory_name\xa5image"
        b"\xacsegmentation\x82\xa4size\x92\x01\x02\xa6counts\xa202"
        b"\xa8checksum\xce\x81\xf6\x77\x24"  # crc32 of 01 02 03 04 05 06
    )


@pytest.mark.parametrize(("message", "kinds"), MESSAGES)
def test_every_message_comes_back_as_it_was(message: Any, kinds: protocol.Kinds[Any]) -> None:
    payload = [b"pixels"] if isinstance(message, Result | Finished | Lease) else []
    assert decode(encode(message, payload), kinds) == (message, payload)


def test_each_side_may_say_its_own_messages_only() -> None:
    tables = [FROM_CLIENT, TO_CLIENT, FROM_WORKER, TO_WORKER]
    assert sorted(name for table in tables for name in table) == sorted({name for table in tables for name in table})
    for message, kinds in MESSAGES:
        for other in tables:
            if other is not kinds:
                with pytest.raises(ProtocolError, match="expected one of"):
                    decode(encode(message), other)


def test_a_word_that_is_unknown_is_refused_with_those_that_are_not() -> None:
    header = {"type": "submit", "job": "a", "image": {"kind": "encoded"}, "options": {"mask_format": "png"}}
    with pytest.raises(ProtocolError, match=r"Invalid enum value 'png'.*; expected rle, polygon, none"):
        decode([b"BMD1", msgspec.msgpack.encode(header), b"x"], FROM_CLIENT)


def test_payload_frames_are_passed_on_and_not_copied() -> None:
    pixels = bytearray(100)
    frames = encode(Submit(job="a", image=Image(kind="encoded")), [pixels])
    assert frames[2] is pixels
    _, payload = decode(frames, FROM_CLIENT)
    assert payload[0] is pixels


def test_what_a_submit_leaves_out_has_defaults_and_unknown_keys_are_ignored() -> None:
    message, _ = decode(submit(colour="red", image={**ENCODED, "dpi": 72}, options={"softness": 1}), FROM_CLIENT)
    assert message == Submit(job="a", image=Image(kind="encoded"), options=Options(), deadline_s=None, priority=0)
    assert message.options == Options(score_threshold=0.0, max_detections=None, mask_format="rle")


STRANGE: dict[str, bytes] = {  # values that nobody here understands, of keys that nobody here knows
    "a map with numbers as keys": b"\x81\x01\x02",
    "a map with a list as key": b"\x81\x91\x01\x02",
    "no UTF-8": b"\xa2\xff\xfe",
    "an extension": b"\xd4\x05\x00",
    "a timestamp of one byte": b"\xd4\xff\x00",
    "a NaN": b"\xca\x7f\xc0\x00\x00",
}


@pytest.mark.parametrize("value", STRANGE.values(), ids=STRANGE)
def test_an_unknown_key_is_ignored_whatever_its_value_and_whatever_else_is_there(value: bytes) -> None:
    strange = msgspec.Raw(value)
    for known in ({}, {"options": None}, {"options": {"max_detections": None, "x": strange}}):
        frames = [MAGIC, msgspec.msgpack.encode({**SUBMIT, **known, "x": strange}), b"x"]
        assert decode(frames, FROM_CLIENT)[0] == Submit(job="a", image=Image(kind="encoded")), known
    frames[1] = msgspec.msgpack.encode({**SUBMIT, "priority": 99, "x": strange})
    with pytest.raises(ProtocolError, match="priority") as refused:
        decode(frames, FROM_CLIENT)
    assert refused.value.job == "a"


def test_the_codes_are_a_closed_table() -> None:
    assert {code.value: code.retryable for code in Code} == {
        "bad-request": False, "unknown-job": False, "bad-image": False, "too-large": False, "busy": True,
        "timeout": True, "cancelled": False, "worker-lost": False, "engine-failed": False, "unavailable": True,
        "draining": True, "unauthorised": False,
    }  # fmt: skip


def test_only_a_client_s_header_is_bounded() -> None:
    """Of many devices with many sizes a snapshot is longer."""
    long = Stats(stats={"shapes": [0.123456789] * 20_000})
    assert decode(encode(long), TO_CLIENT) == (long, [])


# -- what breaks the rules --------------------------------------------------------------------------------------------

MALFORMED: dict[str, tuple[list[bytes], str, str]] = {  # frames, the job that can be named, a part of the reason
    "no frame": ([b""], "", "expected frames"),
    "one frame": ([MAGIC], "", "expected frames"),
    "other magic": ([b"BMD2", header(**SUBMIT), b"x"], "", "expected frames"),
    "HTTP": ([b"GET / HTTP/1.1\r\n", b"Host: x"], "", "expected frames"),
    "empty header": ([MAGIC, b""], "", "not a msgpack map"),
    "JSON": ([MAGIC, b'{"type": "submit"}'], "", "not a msgpack map"),
    "half a header": ([MAGIC, header(**SUBMIT)[:-3]], "", "not a msgpack map"),
    "more behind it": ([MAGIC, header(**SUBMIT) + b"\xc0"], "", "not a msgpack map"),
    "not UTF-8": ([MAGIC, b"\x81\xa4type\xa2\xff\xfe"], "", "not a msgpack map"),
    "nested too deep": ([MAGIC, b"\x91" * 5000 + b"\xc0"], "", "not a msgpack map"),
    "a map as key": ([MAGIC, b"\x81\x80\xc0"], "", "not a msgpack map"),
    "a list": ([MAGIC, msgpack.packb([1])], "", "not a msgpack map"),
    "huge header": ([MAGIC, header(**SUBMIT, filler="x" * MAX_HEADER_BYTES)], "", "at most 65536"),
    "no type": ([MAGIC, header(job="a")], "", "no type"),
    "type of a number": ([MAGIC, header(type=1, job="a")], "", "no type"),
    "unknown type": ([MAGIC, header(type="hello", job="a")], "a", "'hello'"),
    "a worker's type": ([MAGIC, header(type="started", leases=[])], "", "'started'"),
    "no job": ([MAGIC, header(type="submit", image=ENCODED), b"x"], "", "job"),
    "empty job": (submit(job=""), "", "length >= 1"),
    "long job": (submit(job="j" * 129), "", "length <= 128"),
    "job of bytes": (submit(job=b"a"), "", "job"),
    "no image": ([MAGIC, header(type="submit", job="a"), b"x"], "a", "image"),
    "image of a string": (submit(image="a.jpg"), "a", "image"),
    "unknown kind": (submit(image={"kind": "url"}), "a", "kind"),
    "long dtype": (submit(image={"kind": "raw", "shape": [1, 1, 3], "dtype": "x" * 33}), "a", "length <= 32"),
    "long path": ([MAGIC, header(**{**SUBMIT, "image": {"kind": "path", "path": "/" * 4097}})], "a", "length <= 4096"),
    "unknown order": (submit(image={"kind": "raw", "shape": [1, 1, 3], "order": "gbr"}), "a", "order"),
    "no shape": (submit(image={"kind": "raw"}), "a", "shape"),
    "two numbers of shape": (submit(image={"kind": "raw", "shape": [1, 1]}), "a", "shape"),
    "shape of fractions": (submit(image={"kind": "raw", "shape": [1.5, 1, 3]}), "a", "shape"),
    "no path": ([MAGIC, header(**{**SUBMIT, "image": {"kind": "path"}})], "a", "image.path: missing"),
    "path and payload": (submit(image={"kind": "path", "path": "/a"}), "a", "1 payload frames: kind path takes 0"),
    "path in a place": (submit(image={"kind": "path", "path": "/a", "place": PLACE})[:2], "a", "kind path takes none"),
    "place and payload": (submit(image={**ENCODED, "place": PLACE}), "a", "an image in shared memory takes 0"),
    "place without bytes": (submit(image={**ENCODED, "place": {"region": "r", "offset": 0}})[:2], "a", "bytes"),
    "place without region": (submit(image={**ENCODED, "place": {"offset": 0, "bytes": 1}})[:2], "a", "region"),
    "place before the region": (submit(image={**ENCODED, "place": {**PLACE, "offset": -1}})[:2], "a", "offset"),
    "place of less than nothing": (submit(image={**ENCODED, "place": {**PLACE, "bytes": -1}})[:2], "a", "bytes"),
    "place in a long name": (submit(image={**ENCODED, "place": {**PLACE, "region": "r" * 65}})[:2], "a", "region"),
    "no payload": (submit()[:2], "a", "0 payload frames"),
    "two payloads": ([*submit(), b"x"], "a", "2 payload frames"),
    "threshold above 1": (submit(options={"score_threshold": 1.01}), "a", "score_threshold"),
    "threshold below 0": (submit(options={"score_threshold": -0.01}), "a", "score_threshold"),
    "threshold of nothing": (submit(options={"score_threshold": math.nan}), "a", "score_threshold"),
    "threshold without end": (submit(options={"score_threshold": math.inf}), "a", "score_threshold"),
    "detections below 0": (submit(options={"max_detections": -1}), "a", "max_detections"),
    "unknown mask format": (submit(options={"mask_format": "png"}), "a", "mask_format"),
    "deadline 0": (submit(deadline_s=0), "a", "deadline_s"),
    "deadline of nothing": (submit(deadline_s=math.nan), "a", "deadline_s"),
    "deadline without end": (submit(deadline_s=math.inf), "a", "deadline_s"),
    "priority 10": (submit(priority=10), "a", "priority"),
    "priority -10": (submit(priority=-10), "a", "priority"),
    "priority true": (submit(priority=True), "a", "priority"),
    "priority of nothing": (submit(priority=math.nan), "a", "priority"),
    "cancel without job": ([MAGIC, header(type="cancel")], "", "job"),
}
malformed = pytest.mark.parametrize(("frames", "job", "reason"), MALFORMED.values(), ids=MALFORMED)


@malformed
def test_a_malformed_message_is_refused_with_its_job_and_a_reason(frames: list[bytes], job: str, reason: str) -> None:
    with pytest.raises(ProtocolError) as refused:
        decode(frames, FROM_CLIENT)
    assert reason in str(refused.value)
    assert refused.value.job == job


@malformed
def test_a_running_daemon_answers_it_with_bad_request_and_lives_on(
    shared_daemon: Any, frames: list[bytes], job: str, reason: str
) -> None:
    socket = shared_daemon.dealer()
    socket.send_multipart(frames)
    magic, head = socket.recv_multipart()
    answer = msgpack.unpackb(head)
    assert (magic, answer["type"], answer["job"], answer["code"]) == (b"BMD1", "failed", job, "bad-request")
    assert reason in answer["reason"]
    socket.send_multipart(SUBMIT_BYTES)
    assert msgpack.unpackb(socket.recv_multipart()[1])["type"] == "result"


def test_a_running_daemon_ignores_a_cancel_of_an_unknown_job(shared_daemon: Any) -> None:
    socket = shared_daemon.dealer()
    socket.send_multipart(encode(Cancel(job="never heard of")))
    socket.send_multipart(encode(GetStats()))
    stats, _ = decode(socket.recv_multipart(), TO_CLIENT)
    assert isinstance(stats, Stats)
    with pytest.raises(zmq.Again):
        socket.recv_multipart(zmq.NOBLOCK)


plain = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**64 - 1) | st.floats() | st.text(max_size=20)
    | st.binary(max_size=20) | st.builds(msgpack.ExtType, st.integers(0, 127), st.binary(max_size=8))
    | st.just(msgpack.Timestamp(0)),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=12), inner, max_size=4),
    max_leaves=12,
)  # fmt: skip
tables = st.sampled_from([FROM_CLIENT, TO_CLIENT, FROM_WORKER, TO_WORKER])


def check(frames: list[bytes], kinds: protocol.Kinds[Any]) -> None:
    """Either a message of the table, or a ProtocolError; nothing else is raised."""
    try:
        message, _ = decode(frames, kinds)
    except ProtocolError:
        return
    assert type(message) in kinds.values()
    numbers = [getattr(message, name, None) for name in ("deadline_s", "priority")]
    if isinstance(message, Submit):
        numbers.append(message.options.score_threshold)
    assert all(math.isfinite(number) for number in numbers if number is not None)


@given(st.lists(st.binary(max_size=40) | st.just(MAGIC), max_size=5), tables)
@example([MAGIC, b"\xd6\xff\xff\xff\xff\xff"], FROM_CLIENT)  # a timestamp
@example([MAGIC, b"\x81\xa4type\xc7\x0c\xff" + b"\xff" * 12], FROM_CLIENT)  # one with too many nanoseconds
@example([MAGIC, b"\xdd\xff\xff\xff\xff"], FROM_CLIENT)  # a list of four billion
def test_no_bytes_raise_anything_but_protocol_error(frames: list[bytes], kinds: protocol.Kinds[Any]) -> None:
    check(frames, kinds)
    check([MAGIC, *frames], kinds)


@given(st.sampled_from(MESSAGES), st.data())
def test_no_value_of_a_field_raises_anything_but_protocol_error(message: tuple[Any, Any], data: st.DataObject) -> None:
    frames = encode(message[0])
    fields = msgpack.unpackb(frames[1])
    inner = [fields, *(value for value in fields.values() if isinstance(value, dict))]
    changed = data.draw(st.sampled_from(inner))
    key = data.draw(st.sampled_from([*changed, "job"]) if changed else st.text(max_size=5))
    changed[key] = data.draw(plain)
    payload = data.draw(st.lists(st.binary(max_size=4), max_size=2))
    check([MAGIC, msgpack.packb(fields), *payload], message[1])
