"""Images that kill workers, submitted as users do: what they cost is `max_attempts` workers, however they come.

With the defaults of clients and settings, beside a load whose every job must be answered. See conftest.py.
"""
from __future__ import annotations

import asyncio
import contextlib
import secrets
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import PIL.Image
import pytest
from raw_load import answer, picture, submission

from blendmaskd import protocol
from blendmaskd.client.blocking import AsyncClient, Client, JobFailed, ServerPath
from blendmaskd.protocol import Code, Failed
from chaos.poison import Poison, worker_env
from checkout import ROOT

FAULTY = {"worker_env": worker_env()}
LONG_S = 60.0
MAX_ATTEMPTS = 2  # the default


def deaths(server: Any) -> int:
    """Of workers, since the start. Once all devices are ready, that is whenever what is done is over."""
    server.wait_ready()
    return sum(device["generation"] - 1 for device in server.devices().values())


def code_of(call: Callable[[], Any]) -> Code:
    with pytest.raises(JobFailed) as failed:
        call()
    return failed.value.code


@pytest.mark.parametrize("poison", [Poison.KILLS, Poison.CRASHES_DECODING, Poison.EXITS])
def test_one_image_costs_two_workers_and_then_none(scene, poison) -> None:
    with scene(**FAULTY) as here, Client(here.server.endpoint) as client:
        assert code_of(lambda: client.segment(picture(poison))) is Code.WORKER_LOST
        assert deaths(here.server) == MAX_ATTEMPTS
        with pytest.raises(JobFailed, match=r"was given up: .* it may be retried in \d+ s"):
            client.segment(picture(poison), score_threshold=0.5, mask_format="none", priority=-1)
        assert deaths(here.server) == MAX_ATTEMPTS
    assert here.load.failures == []


@pytest.mark.slow
def test_an_image_that_hangs_a_device_costs_no_more_when_nobody_waits_for_it(scene) -> None:
    """Its jobs are answered `timeout` before their worker is aborted: what that died of is known all the same."""
    restarts = {"first_delay_s": 0.05, "stop_s": 2, "stall_s": 3}
    with scene(**FAULTY, restarts=restarts) as here, Client(here.server.endpoint) as client:
        seen = set()
        while Code.WORKER_LOST not in seen:
            seen.add(code_of(lambda: client.segment(picture(Poison.HANGS), deadline_s=0.5)))
            assert deaths(here.server) <= MAX_ATTEMPTS
        assert seen == {Code.TIMEOUT, Code.WORKER_LOST}
    assert here.load.failures == []


@pytest.mark.slow
@pytest.mark.parametrize("images", [2, 8])
def test_several_at_once_on_devices_that_boot_slowly_leave_both_serving(scene, images) -> None:
    restarts = {"first_delay_s": 0.05, "stop_s": 2}
    settings = {"worker_env": worker_env(boot_s=5.0 if images == 2 else 0.5), "restarts": restarts}
    with scene(**settings) as here, ThreadPoolExecutor(images) as pool:

        def submit(seed: int) -> Code:
            with Client(here.server.endpoint, timeout_s=2 * LONG_S) as client:
                return code_of(lambda: client.segment(picture(Poison.KILLS, seed)))

        assert set(pool.map(submit, range(images))) == {Code.WORKER_LOST}
        assert deaths(here.server) <= images * MAX_ATTEMPTS, "fewer where two of them were on the same worker"
        assert "times in a row" not in here.server.log, "a device was given up"
    assert here.load.failures == []


def test_the_same_image_of_many_clients_at_once_costs_as_much_as_of_one(scene) -> None:
    with scene(**FAULTY) as here:

        async def submit_all() -> list[Any]:
            async with AsyncClient(here.server.endpoint) as client:
                jobs = [client.segment(picture(Poison.KILLS)) for _ in range(16)]
                jobs += [client.segment(picture(seed=seed)) for seed in range(16)]
                return await asyncio.gather(*jobs, return_exceptions=True)

        answers = asyncio.run(submit_all())
        assert [each.code for each in answers[:16]] == [Code.WORKER_LOST] * 16
        assert all(each.detections for each in answers[16:])
        assert deaths(here.server) <= MAX_ATTEMPTS
    assert here.load.failures == []


def test_a_bare_client_that_insists_costs_no_more(scene, tmp_path) -> None:
    """Under another name each time, by another way, and without waiting for the answer."""
    with scene(**FAULTY, paths={"roots": [str(tmp_path)]}, spool=str(tmp_path / "spool.db")) as here:
        pixels = picture(Poison.KILLS)
        for number in range(6):
            with contextlib.closing(here.server.dealer()) as leaving:
                leaving.send_multipart(submission(f"left {number}", pixels))
                leaving.send_multipart(protocol.encode(protocol.GetStats()))
                leaving.recv_multipart()  # so the job has come, too
            assert deaths(here.server) <= MAX_ATTEMPTS
        with contextlib.closing(here.server.dealer()) as dealer:
            for number in range(50):
                dealer.send_multipart(submission(f"again {number}", pixels))
                found = answer(dealer.recv_multipart())
                assert isinstance(found, Failed)
                assert (found.code, found.retry_after_s) == (Code.WORKER_LOST, None)
        for transport in ("shared", "socket"):
            with Client(here.server.endpoint, transport=transport) as client:
                assert code_of(lambda client=client: client.segment(pixels)) is Code.WORKER_LOST
                assert code_of(lambda client=client: client.submit(pixels)) is Code.WORKER_LOST
        assert deaths(here.server) <= MAX_ATTEMPTS
    assert here.load.failures == []


@pytest.mark.slow
@pytest.mark.parametrize("way", ["shared memory", "path", "durable", "durable from shared memory"])
def test_by_whatever_way_it_comes(scene, tmp_path, way) -> None:
    file = tmp_path / "poison.png"
    PIL.Image.fromarray(picture(Poison.KILLS)).save(file)
    settings = {**FAULTY, "paths": {"roots": [str(tmp_path)]}, "spool": str(tmp_path / "spool.db")}
    with scene(**settings) as here, Client(here.server.endpoint) as client:

        def once() -> Any:
            match way:
                case "shared memory":
                    with Client(here.server.endpoint, transport="shared") as shared:
                        return shared.segment(picture(Poison.KILLS))
                case "path":
                    return client.segment(ServerPath(str(file)))
                case "durable":
                    return client.fetch(client.submit(picture(Poison.KILLS)))
                case _:
                    return _durable_from_shared_memory(here.server)

        assert code_of(once) is Code.WORKER_LOST
        assert deaths(here.server) == MAX_ATTEMPTS
        for _ in range(3):
            assert code_of(once) is Code.WORKER_LOST
        assert deaths(here.server) == MAX_ATTEMPTS
    assert here.load.failures == []


def _durable_from_shared_memory(server: Any) -> None:
    """As no client of ours does: the wire lets a durable job's image lie in shared memory."""
    from blendmaskd.client.places import Region

    pixels = picture(Poison.KILLS)
    region = Region(1 << 16, 1)
    region.offer(server.endpoint.removeprefix("ipc://"))
    region.socket.setblocking(True)
    region.answer()
    name = secrets.token_hex(16)
    image = protocol.Image(kind="raw", shape=pixels.shape, place=region.put(memoryview(pixels).cast("B")))
    try:
        with contextlib.closing(server.dealer()) as dealer:
            dealer.rcvtimeo = int(LONG_S * 1000)
            dealer.send_multipart(protocol.encode(protocol.Submit(job=name, image=image, durable=True)))
            found, _ = protocol.decode(dealer.recv_multipart(), protocol.TO_CLIENT)
            if isinstance(found, protocol.Accepted):
                dealer.send_multipart(protocol.encode(protocol.Fetch(job=name)))
                found, _ = protocol.decode(dealer.recv_multipart(), protocol.TO_CLIENT)
    finally:
        region.close()
    assert isinstance(found, Failed)
    raise JobFailed(found.code, found.reason)


@pytest.mark.slow
def test_a_submit_run_lists_it_and_resuming_leaves_it(scene, tmp_path) -> None:
    folder = tmp_path / "in"
    folder.mkdir()
    for number in range(10):
        width = Poison.KILLS if number == 3 else 64
        PIL.Image.fromarray(picture(width, number)).save(folder / f"{number}.png")

    def submit(*more: str) -> tuple[int, str]:
        script = ROOT / "scripts" / "submit.py"
        argv = [sys.executable, script, here.server.endpoint, folder, "--out", tmp_path / "o", *more]
        done = subprocess.run(argv, capture_output=True, text=True, timeout=2 * LONG_S)
        return done.returncode, done.stdout + done.stderr

    with scene(**FAULTY) as here:
        code, told = submit()
        assert (code, "worker-lost" in told, "9 images" in told) == (1, True, True), told
        assert deaths(here.server) == MAX_ATTEMPTS
        before = here.server.client.stats()["failures"]["worker-lost"]
        code, told = submit("--resume")
        assert (code, "3.png" in told, "worker-lost is final" in told) == (1, True, True), told
        assert here.server.client.stats()["failures"]["worker-lost"] == before
        code, told = submit("--resume", "--retry-lost")
        assert (code, "was given up" in told) == (1, True), told
        assert deaths(here.server) == MAX_ATTEMPTS
    assert here.load.failures == []
