"""When the next run of a batch is kicked off: rate, refusals, the circuit breaker. Clocks are real and short."""

from __future__ import annotations

import asyncio
import contextlib
import math
import time
from typing import Any, cast

import httpx
import pytest
import respx
from pydantic import SecretStr

from prefect_crew import DeployedCrew
from prefect_crew.batches import throttle as module
from prefect_crew.batches.options import BatchOptions
from prefect_crew.batches.throttle import BatchClient, Throttle
from prefect_crew.exceptions import CrewConnectionError, RateLimitedError, ServerError

REFUSED = CrewConnectionError(method="POST", url="http://crew/kickoff", reason="refused", sent=False)


def limited(seconds: float) -> RateLimitedError:
    return RateLimitedError(status_code=429, method="POST", path="/kickoff", message=None, body="", retry_after=seconds)


def throttle(*, accepted: bool = True, **options: Any) -> Throttle:
    """Return a throttle whose first kickoff was accepted."""
    made = Throttle(BatchOptions(**options))
    if accepted:
        made.accepted()
    return made


async def admitted(throttle: Throttle, count: int, seconds: float = 0.1) -> int:
    """Return how many of so many rows are let in within some time; they stay."""
    waiting = [asyncio.ensure_future(throttle.admit(f"row {number}")) for number in range(count)]
    await asyncio.wait(waiting, timeout=seconds)
    there = sum(one.done() for one in waiting)
    for one in waiting:
        one.cancel()
    await asyncio.gather(*waiting, return_exceptions=True)
    return there


# How many, how fast


async def test_until_one_kickoff_was_accepted_they_go_one_by_one():
    first = throttle(accepted=False, kickoffs_at_once=8)
    assert await admitted(first, 10) == 1
    first.accepted()
    assert await admitted(first, 10) == 7
    for _ in range(8):
        first.leave()
    await asyncio.wait_for(first.idle(), 5)


@pytest.mark.parametrize(
    ("chosen", "answers", "at_once"),
    [
        pytest.param(None, [], 16, id="nothing-known"),
        pytest.param(None, [0.004, 3.0], 16, id="a-fast-server-that-is-busy-now"),
        pytest.param(None, [0.3, 0.2], 225, id="far-away"),
        pytest.param(None, [5.0], 256, id="very-far-away"),
        pytest.param(4, [0.2], 4, id="chosen"),
    ],
)
async def test_more_are_under_way_where_answers_take_long(chosen: int | None, answers: list[float], at_once: int):
    far = throttle(kickoffs_at_once=chosen)
    for seconds in answers:
        far.answered(seconds)
    assert await admitted(far, 300) == at_once


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


# What the server says


async def test_what_the_server_asks_of_one_holds_for_all():
    asked = throttle()
    asked.heed(limited(0.4))
    asked.heed(limited(0.1))
    began = time.monotonic()
    await asked.admit("row")
    assert time.monotonic() - began >= 0.35
    assert asked.held_for <= 0


async def test_while_kickoffs_are_refused_pauses_double_and_they_go_one_by_one(monkeypatch: pytest.MonkeyPatch):
    away, pauses = throttle(), list[float]()
    for _ in range(4):
        away.refused(REFUSED)
        away.refused(REFUSED)  # those that were under way at the same time count once
        pauses.append(away._refusals.seconds)
        away._refusals.until = 0.0  # instead of waiting
    assert pauses == [1, 2, 4, 8]
    assert await admitted(away, 10) == 1
    monkeypatch.setattr(module, "GIVE_UP_AFTER", 0.0)
    away.accepted()
    away.refused(REFUSED)
    assert away.stopped is None, "one that is accepted begins it anew"
    away.refused(REFUSED)
    assert "no kickoff was accepted" in str(away.stopped)


async def test_refusals_do_not_stop_a_batch_whose_runs_are_in_flight(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(module, "GIVE_UP_AFTER", 0.0)
    full = throttle()
    full.wait_for(2)
    for _ in range(3):
        full.refused(REFUSED)
    assert full.stopped is None
    # The end of a run makes room: the next kickoff does not wait for the end of its pause.
    full._refusals = module.Backoff(60.0)
    full.refused(REFUSED)
    waiting = asyncio.ensure_future(full.admit("row"))
    await asyncio.wait({waiting}, timeout=0.05)
    assert not waiting.done()
    full.wait_for(1)
    assert await asyncio.wait_for(waiting, 5)
    full.leave()
    full.wait_for(0)
    full.refused(REFUSED)
    assert "no kickoff was accepted" in str(full.stopped), "nothing is in flight any more"


# The circuit breaker


async def test_it_tries_one_row_at_a_time_with_longer_and_longer_pauses_and_gives_up():
    breaker = throttle(breaker=2, breaker_pause=0.1)
    breaker.failed("a", "x")
    began = time.monotonic()
    breaker.failed("b", "x")
    for pause in (0.1, 0.2, 0.4):
        assert await breaker.admit("tried")
        assert time.monotonic() - began > pause * 0.9
        breaker.leave()
        assert await admitted(breaker, 1, 0.05) == 0, "only one row is tried"
        breaker.failed("in flight before", "x")
        assert breaker.stopped is None
        began = time.monotonic()
        breaker.failed("tried", "the model is down")
    assert str(breaker.stopped).endswith("rows failed in a row. Last error: the model is down")


@pytest.mark.parametrize("tried", [True, False], ids=["the row that is tried", "another row"])
async def test_a_row_that_completes_closes_it_for_all_who_wait(tried: bool):
    breaker = throttle(breaker=1, breaker_pause=0.01 if tried else 60)
    breaker.failed("a", "x")
    if tried:
        await breaker.admit("tried")
    waiting = [asyncio.ensure_future(breaker.admit(str(number))) for number in range(5)]
    await asyncio.sleep(0.05)
    breaker.completed()
    assert await asyncio.wait_for(asyncio.gather(*waiting), 5) == [True] * 5


async def test_a_row_that_is_left_makes_room_for_another_trial():
    breaker = throttle(breaker=1, breaker_pause=0.01)
    breaker.failed("a", "x")
    assert await breaker.admit("tried")
    assert await admitted(breaker, 1) == 0
    breaker.left("another")
    assert await admitted(breaker, 1) == 0
    breaker.left("tried")
    assert await asyncio.wait_for(breaker.admit("b"), 5)


# Requests


async def test_a_connection_is_used_again_however_many_kickoffs_are_under_way():
    """Of a pool that all share, httpx closes each connection after an answer once there are more than it keeps."""
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
        crew = DeployedCrew(url=url, token=SecretStr("token-of-8\n")).crew
        async with BatchClient(crew, throttle(kickoffs_at_once=70)) as client:
            for _ in range(3):
                await asyncio.gather(*(client.kickoff({}) for _ in range(70)))
    assert answered == 210
    assert opened == 70


async def test_only_an_accepted_kickoff_tells_how_far_the_server_is(respx_mock: respx.MockRouter):
    respx_mock.post("http://127.0.0.1:1/kickoff").mock(
        side_effect=[httpx.Response(503), httpx.Response(200, json={"kickoff_id": "run"})]
    )
    mine = throttle()
    crew = DeployedCrew(url="http://127.0.0.1:1", token=SecretStr("token-of-8")).crew
    async with BatchClient(crew, mine) as client:
        with pytest.raises(ServerError):
            await client.kickoff({})
        assert mine._fastest == math.inf
        await client.kickoff({})
    assert mine._fastest < math.inf
