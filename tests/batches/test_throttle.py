"""When the next run of a batch is kicked off: how many at once, rate, refusals, failures. Clocks are real and short."""

import asyncio
import time
from typing import Any

import pytest
from pydantic import SecretStr

from prefect_crew import DeployedCrew
from prefect_crew._internal.asyncio_tasks import cancel_and_wait
from prefect_crew.batches import throttle as module
from prefect_crew.batches.options import BatchOptions
from prefect_crew.batches.throttle import BatchClient, Throttle
from prefect_crew.blocks import crew_of
from prefect_crew.client import _transport
from prefect_crew.exceptions import CrewAPIError, CrewConnectionError
from support.raw import answer, raw_server, read_request
from support.waiting import soon

REFUSED = CrewConnectionError("refused", reason="refused", sent=False)


def limited(seconds: float) -> CrewAPIError:
    return CrewAPIError("429", status_code=429, retry_after=seconds)


def throttle(**options: Any) -> Throttle:
    return Throttle(BatchOptions(**options))


async def admitted(throttle: Throttle, count: int, seconds: float = 0.1) -> int:
    """Return how many of so many rows are let in within some time; they stay."""
    rows = [asyncio.ensure_future(throttle.admit()) for number in range(count)]
    done, _ = await asyncio.wait(rows, timeout=seconds)
    await cancel_and_wait(*rows)
    return len(done)


@pytest.mark.parametrize(("chosen", "at_once"), [({}, 64), ({"kickoffs_at_once": 8}, 8)], ids=["left out", "chosen"])
async def test_so_many_kickoffs_are_under_way_at_once(chosen: dict[str, int], at_once: int):
    gate = throttle(**chosen)
    for _ in range(10):
        gate.accepted()
    assert await admitted(gate, 100) == at_once
    for _ in range(at_once):
        gate.leave()
    await soon(gate.idle())


async def test_one_kickoff_is_tried_first_and_each_accepted_one_lets_twice_as_many_go():
    gate, counts = throttle(), list[int]()
    for _ in range(4):
        count = await admitted(gate, 100)
        counts.append(count)
        for _ in range(count):
            gate.leave()
        gate.accepted()
    assert counts == [1, 2, 4, 8]


async def test_rows_are_admitted_in_their_order_as_others_leave():
    full, order = throttle(kickoffs_at_once=1), list[int]()
    assert await full.admit()

    async def row(number: int) -> None:
        assert await full.admit()
        order.append(number)
        full.leave()

    waiting = [asyncio.ensure_future(row(number)) for number in range(5)]
    await asyncio.sleep(0.01)
    assert order == []
    full.leave()
    await soon(asyncio.gather(*waiting))
    assert order == [0, 1, 2, 3, 4]


async def test_a_batch_that_has_stopped_admits_nobody():
    slow = throttle()
    slow.refused(limited(200))
    waiting = [asyncio.ensure_future(slow.admit()) for _ in range(3)]
    await asyncio.sleep(0.01)
    slow.stop("enough")
    slow.stop("more than enough")
    assert await soon(asyncio.gather(*waiting)) == [False] * 3
    assert slow.stopped == "enough"


async def test_what_the_server_asks_of_one_kickoff_holds_for_all_and_longer_than_a_run(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(module, "REFUSED_PAUSE", 0.0)
    asked = throttle()
    asked.wait_for(2)
    asked.refused(limited(0.4))
    asked.refused(limited(0.1))
    began = time.monotonic()
    asked.wait_for(1)  # a run has ended
    await asked.admit()
    assert time.monotonic() - began >= 0.35


async def test_while_kickoffs_are_refused_one_row_at_a_time_is_tried_after_a_pause(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(module, "REFUSED_PAUSE", 0.2)
    away = throttle()
    away.refused(REFUSED)
    away.refused(REFUSED)  # it was under way at the same time
    assert await admitted(away, 10, 0.1) == 0
    assert await admitted(away, 10, 1.0) == 1
    away.accepted()
    assert await admitted(away, 10) == 1  # and the one that is under way


@pytest.mark.parametrize(
    ("events", "stopped"),
    [
        pytest.param("refused", None, id="a refusal"),
        pytest.param("refused refused", "no kickoff was accepted", id="refusals"),
        pytest.param("refused accepted refused", None, id="minutes begin anew"),
        pytest.param("in_flight refused refused refused", None, id="runs in flight"),
        pytest.param("in_flight refused refused idle refused", "no kickoff was accepted", id="nothing in flight"),
        pytest.param("failed completed failed", None, id="a row completed in between"),
        pytest.param("failed failed", "2 rows failed in a row. Last error: the model is down", id="failures in a row"),
    ],
)
async def test_when_a_batch_stops(monkeypatch: pytest.MonkeyPatch, events: str, stopped: str | None):
    monkeypatch.setattr(module, "GIVE_UP_AFTER", 0.0)
    gate = throttle(breaker=2)
    acts = {"refused": lambda: gate.refused(REFUSED), "failed": lambda: gate.failed("the model is down")}
    acts |= {"in_flight": lambda: gate.wait_for(2), "idle": lambda: gate.wait_for(0)}
    acts |= {"accepted": gate.accepted, "completed": gate.completed}
    for event in events.split():
        acts[event]()
    assert (gate.stopped or "").startswith(stopped or "")
    assert (gate.stopped is None) is (stopped is None)


async def test_without_a_breaker_failures_stop_nothing():
    endless = throttle(breaker=None)
    for _ in range(100):
        endless.failed("the model is down")
    assert await endless.admit()


async def test_the_end_of_a_run_ends_a_pause(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(module, "REFUSED_PAUSE", 60.0)
    full = throttle()
    full.wait_for(2)
    full.refused(REFUSED)
    waiting = asyncio.ensure_future(full.admit())
    await asyncio.wait({waiting}, timeout=0.05)
    assert not waiting.done()
    full.wait_for(1)
    assert await soon(waiting)


async def test_a_connection_is_used_again_however_many_kickoffs_are_under_way(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(_transport, "POST_KEEPALIVE", 60.0)  # on a busy machine a round takes more than a second
    opened, answered = 0, 0

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal opened, answered
        opened += 1
        while await read_request(reader):
            answered += 1
            await asyncio.sleep(0.1)
            writer.write(answer('{"kickoff_id": "run"}'))

    async with raw_server(serve) as url:
        crew = crew_of(DeployedCrew(url=url, token=SecretStr("token-of-8\n")))  # pasted, with a line break at its end
        async with BatchClient(crew, 70) as client:
            for _ in range(3):
                await asyncio.gather(*(client.kickoff({}) for _ in range(70)))
    assert answered == 210
    assert opened == 70
