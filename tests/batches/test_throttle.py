"""When the next run of a batch is kicked off: how many at once, rate, refusals, failures. Clocks are real and short."""

from __future__ import annotations

import asyncio
import contextlib
import time
from typing import Any, cast

import pytest
from pydantic import SecretStr

from prefect_crew import DeployedCrew
from prefect_crew.batches import throttle as module
from prefect_crew.batches.options import BatchOptions
from prefect_crew.batches.throttle import BatchClient, Throttle
from prefect_crew.blocks import crew_of
from prefect_crew.client import _transport
from prefect_crew.exceptions import CrewConnectionError, RateLimitedError

REFUSED = CrewConnectionError(method="POST", url="http://crew/kickoff", reason="refused", sent=False)


def limited(seconds: float) -> RateLimitedError:
    return RateLimitedError(status_code=429, method="POST", path="/kickoff", message=None, body="", retry_after=seconds)


def throttle(**options: Any) -> Throttle:
    return Throttle(BatchOptions(**options))


async def admitted(throttle: Throttle, count: int, seconds: float = 0.1) -> int:
    """Return how many of so many rows are let in within some time; they stay."""
    waiting = [asyncio.ensure_future(throttle.admit(f"row {number}")) for number in range(count)]
    await asyncio.wait(waiting, timeout=seconds)
    there = sum(one.done() for one in waiting)
    for one in waiting:
        one.cancel()
    await asyncio.gather(*waiting, return_exceptions=True)
    return there


@pytest.mark.parametrize(("chosen", "at_once"), [({}, 64), ({"kickoffs_at_once": 8}, 8)], ids=["left out", "chosen"])
async def test_so_many_kickoffs_are_under_way_at_once(chosen: dict[str, int], at_once: int):
    gate = throttle(**chosen)
    for _ in range(10):
        gate.accepted()
    assert await admitted(gate, 100) == at_once
    for _ in range(at_once):
        gate.leave()
    await asyncio.wait_for(gate.idle(), 5)


async def test_one_kickoff_is_tried_first_and_each_accepted_one_lets_twice_as_many_go():
    gate, counts = throttle(), list[int]()
    for _ in range(4):
        count = await admitted(gate, 100)
        counts.append(count)
        for _ in range(count):
            gate.leave()
        gate.accepted()
    assert counts == [1, 2, 4, 8]


async def test_a_row_that_has_to_wait_after_all_gives_its_slot_back():
    pausing, held = throttle(), set[str]()

    class Slots:
        async def take(self, row: str) -> bool:
            held.add(row)
            pausing.refused(REFUSED)  # meanwhile the server refuses the kickoff of another row
            return True

        def give_back(self, row: str) -> None:
            held.discard(row)

    pausing.slots = cast("Any", Slots())
    assert await admitted(pausing, 1) == 0
    assert held == set()


async def test_rows_are_admitted_in_their_order_as_others_leave():
    full, order = throttle(kickoffs_at_once=1), list[int]()
    assert await full.admit("row")

    async def row(number: int) -> None:
        assert await full.admit(f"row {number}")
        order.append(number)
        full.leave()

    waiting = [asyncio.ensure_future(row(number)) for number in range(5)]
    await asyncio.sleep(0.01)
    assert order == []
    full.leave()
    await asyncio.wait_for(asyncio.gather(*waiting), 5)
    assert order == [0, 1, 2, 3, 4]


async def test_kickoffs_keep_their_rate():
    steady = throttle(kickoffs_per_second=50)
    began = time.monotonic()
    for _ in range(11):
        await steady.admit("row")
        steady.leave()
    assert 0.19 <= time.monotonic() - began < 2


async def test_a_batch_that_has_stopped_admits_nobody():
    slow = throttle(kickoffs_per_second=0.001)
    slow.heed(limited(200))
    waiting = [asyncio.ensure_future(slow.admit("row")) for _ in range(3)]
    await asyncio.sleep(0.01)
    slow.stop("enough")
    slow.stop("more than enough")
    assert await asyncio.wait_for(asyncio.gather(*waiting), 5) == [False] * 3
    assert slow.stopped == "enough"


async def test_what_the_server_asks_of_one_holds_for_all():
    asked = throttle()
    asked.heed(limited(0.4))
    asked.heed(limited(0.1))
    began = time.monotonic()
    await asked.admit("row")
    assert time.monotonic() - began >= 0.35
    assert asked.held_for <= 0


async def test_while_kickoffs_are_refused_one_row_at_a_time_is_tried_after_a_pause(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(module, "REFUSED_PAUSE", 0.2)
    away = throttle()
    away.refused(REFUSED)
    away.refused(REFUSED)  # it was under way at the same time
    assert await admitted(away, 10, 0.1) == 0
    assert await admitted(away, 10, 1.0) == 1
    away.accepted()
    assert await admitted(away, 10) == 1  # and the one that is under way


async def test_a_batch_stops_after_minutes_without_a_kickoff(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(module, "GIVE_UP_AFTER", 0.0)
    away = throttle()
    away.refused(REFUSED)
    away.accepted()
    away.refused(REFUSED)
    assert away.stopped is None, "the minutes begin anew after an accepted kickoff"
    away.refused(REFUSED)
    assert "no kickoff was accepted" in str(away.stopped)


async def test_refusals_do_not_stop_a_batch_whose_runs_are_in_flight(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(module, "GIVE_UP_AFTER", 0.0)
    monkeypatch.setattr(module, "REFUSED_PAUSE", 60.0)
    full = throttle()
    full.wait_for(2)
    for _ in range(3):
        full.refused(REFUSED)
    assert full.stopped is None
    # The end of a run makes room: the next kickoff does not wait for the end of its pause.
    waiting = asyncio.ensure_future(full.admit("row"))
    await asyncio.wait({waiting}, timeout=0.05)
    assert not waiting.done()
    full.wait_for(1)
    assert await asyncio.wait_for(waiting, 5)
    full.leave()
    full.wait_for(0)
    full.refused(REFUSED)
    assert "no kickoff was accepted" in str(full.stopped), "nothing is in flight any more"


@pytest.mark.parametrize("breaker", [2, None])
async def test_a_batch_stops_after_so_many_failed_rows_in_a_row(breaker: int | None):
    failing = throttle(breaker=breaker)
    failing.failed("the model is down")
    failing.completed()
    failing.failed("the model is down")
    assert failing.stopped is None, "a row has completed in between"
    failing.failed("the model is down")
    assert failing.stopped == (None if breaker is None else "2 rows failed in a row. Last error: the model is down")
    assert await failing.admit("row") is (breaker is None)


async def test_a_connection_is_used_again_however_many_kickoffs_are_under_way(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(_transport, "POST_KEEPALIVE", 60.0)  # on a busy machine a round takes more than a second
    opened, answered = 0, 0

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal opened, answered
        opened += 1
        with contextlib.suppress(asyncio.IncompleteReadError):
            while True:
                head = await reader.readuntil(b"\r\n\r\n")
                await reader.readexactly(int(head.lower().partition(b"content-length: ")[2].split(b"\r")[0]))
                answered += 1
                body = b'{"kickoff_id": "run-%d"}' % answered
                await asyncio.sleep(0.1)
                writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%s" % (len(body), body))
        writer.close()

    async with await asyncio.start_server(serve, "127.0.0.1", 0) as server:
        url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
        # A pasted token has a line break at its end.
        crew = crew_of(DeployedCrew(url=url, token=SecretStr("token-of-8\n")))
        async with BatchClient(crew, throttle(kickoffs_at_once=70)) as client:
            for _ in range(3):
                await asyncio.gather(*(client.kickoff({}) for _ in range(70)))
    assert answered == 210
    assert opened == 70
