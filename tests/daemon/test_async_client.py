"""Many tasks that share an `AsyncClient`, and those that are cancelled."""
import asyncio
from typing import Any

import pytest
from clients import Peer, answered, checksum, gather, outcomes, pixels, with_client

from blendmaskd import protocol
from blendmaskd.client.blocking import AsyncClient, Segmentation


def test_many_tasks_share_an_async_client(shared_daemon: Any) -> None:
    images = [pixels(number) for number in range(30)]
    results = asyncio.run(gather(shared_daemon.endpoint, images))
    assert [answered(result) for result in results] == [checksum(image) for image in images]


def test_cancelling_a_task_cancels_its_job(slow_daemon: Any, wait_until: Any) -> None:
    before = outcomes(slow_daemon).get("cancelled", 0)

    async def work(client: AsyncClient) -> None:
        tasks = [asyncio.create_task(client.segment(pixels(number))) for number in range(5)]
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        for task in tasks[3:]:
            task.cancel()
        done = await asyncio.gather(*tasks, return_exceptions=True)
        assert [answered(result) for result in done[:3]] == [checksum(pixels(number)) for number in range(3)]
        assert [type(result) for result in done[3:]] == [asyncio.CancelledError] * 2
        # While the client lives: closing it would cancel them too.
        await asyncio.to_thread(
            wait_until, lambda: outcomes(slow_daemon).get("cancelled", 0) == before + 2
        )

    with_client(slow_daemon.endpoint, work)


def test_an_answer_to_a_task_that_was_cancelled_in_the_same_turn_is_dropped(peer: Peer) -> None:
    async def work(client: AsyncClient) -> None:
        task = asyncio.create_task(client.segment(b"x"))
        submitted = await asyncio.to_thread(peer.receive)
        task.cancel()  # its future is cancelled now, the task runs later
        client._tell(client._exchange.jobs[submitted.job])  # what the reading task does with an answer
        with pytest.raises(asyncio.CancelledError):
            await task
        assert await asyncio.to_thread(peer.receive) == protocol.Cancel(job=submitted.job)

    with_client(peer.endpoint, work)


def test_a_closed_async_client_tells_those_who_wait(slow_daemon: Any, wait_until: Any) -> None:
    before = outcomes(slow_daemon).get("cancelled", 0)

    async def run() -> list[Any]:
        async with AsyncClient(slow_daemon.endpoint) as client:
            tasks = [asyncio.create_task(client.segment(pixels(number))) for number in range(6)]
            await tasks[0]
        async with asyncio.timeout(5):
            return await asyncio.gather(*tasks, return_exceptions=True)

    failed = [result for result in asyncio.run(run()) if not isinstance(result, Segmentation)]
    assert {str(failure) for failure in failed} == {"cancelled: the client was closed"}
    wait_until(lambda: outcomes(slow_daemon).get("cancelled", 0) == before + len(failed))
