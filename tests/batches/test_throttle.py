"""The pace of a batch: kickoffs a second, few claims at a time, rest while the server takes none."""

from __future__ import annotations

import asyncio
import contextlib
import re
import time

import pytest
from pydantic import SecretStr

from prefect_crew import DeployedCrew
from prefect_crew.batches import throttle
from prefect_crew.batches.throttle import BatchClient, Pace, Rhythm
from prefect_crew.client._client import CrewClient
from prefect_crew.crew import Crew
from prefect_crew.exceptions import CrewConnectionError, RateLimitedError


def refused() -> CrewConnectionError:
    return CrewConnectionError(method="POST", url="http://crew/kickoff", reason="refused", sent=False)


def limited(seconds: float) -> RateLimitedError:
    return RateLimitedError(
        status_code=429, method="POST", path="/kickoff", title=None, message=None, body="", retry_after=seconds
    )


async def entered(pace: Pace, count: int, seconds: float = 0.1) -> int:
    """Return how many of so many are let in within some time."""
    waiting = [asyncio.ensure_future(pace.enter()) for _ in range(count)]
    await asyncio.wait(waiting, timeout=seconds)
    there = sum(one.done() for one in waiting)
    for one in waiting:
        one.cancel()
    await asyncio.gather(*waiting, return_exceptions=True)
    return there


async def test_until_one_kickoff_was_taken_they_go_one_by_one():
    pace = Pace(kickoffs_at_once=8)
    assert await entered(pace, 10) == 1
    pace.taken()
    assert await entered(pace, 10) == 7  # of eight, one is still there
    for _ in range(8):
        pace.leave()
    await asyncio.wait_for(pace.idle(), 5)


async def test_a_kickoff_that_leaves_makes_room():
    pace = Pace(kickoffs_at_once=2)
    pace.taken()
    assert await entered(pace, 5) == 2
    waiting = asyncio.ensure_future(pace.enter())
    await asyncio.sleep(0.01)
    assert not waiting.done()
    pace.leave()
    await asyncio.wait_for(waiting, 5)


class Far:
    """A crew server that answers a request only once so many of its kind are there; on a port of its own."""

    def __init__(self, **together: int) -> None:
        self.together = together
        self.most = dict.fromkeys(together, 0)
        self._there = dict.fromkeys(together, 0)
        self._ready = {method: asyncio.Event() for method in together}

    async def __aenter__(self) -> Far:
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        return self

    async def __aexit__(self, *_: object) -> None:
        self._server.close()
        for ready in self._ready.values():
            ready.set()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._server.sockets[0].getsockname()[1]}"

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(asyncio.IncompleteReadError, ConnectionError):
            while True:
                head = (await reader.readuntil(b"\r\n\r\n")).decode().lower()
                size = re.search(r"content-length: (\d+)", head)
                await reader.readexactly(int(size[1]) if size else 0)
                method = head.split()[0].upper()
                self._there[method] += 1
                self.most[method] = max(self.most[method], self._there[method])
                if self._there[method] >= self.together[method]:
                    self._ready[method].set()
                await self._ready[method].wait()
                self._there[method] -= 1
                answer = b'{"kickoff_id": "run"}' if method == "POST" else b'{"status": "running"}'
                writer.write(b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: ")
                writer.write(b"%d\r\n\r\n%s" % (len(answer), answer))
        writer.close()


def crew_of(server: Far) -> DeployedCrew:
    return DeployedCrew(url=server.url, token=SecretStr("token-of-8"))


async def test_many_more_polls_than_kickoffs_are_on_their_way_at_once():
    async with Far(GET=64, POST=16) as server:
        pace = Pace()
        async with BatchClient(crew_of(server).crew, pace) as client:
            polls = [asyncio.ensure_future(client.status("run")) for _ in range(200)]
            kickoffs = [asyncio.ensure_future(client.kickoff({"topic": "tea"})) for _ in range(50)]
            await asyncio.wait_for(asyncio.gather(*polls, *kickoffs), 20)
    assert server.most == {"GET": 64, "POST": 16}


async def test_a_connection_is_made_only_when_it_is_needed(monkeypatch: pytest.MonkeyPatch):
    made: list[CrewClient] = []
    make = Crew.client

    def counted(crew: Crew) -> CrewClient:
        made.append(make(crew))
        return made[-1]

    monkeypatch.setattr(Crew, "client", counted)
    async with Far(GET=1) as server, BatchClient(crew_of(server).crew, Pace()) as client:
        for _ in range(5):
            await client.status("run")
        assert len(made) == 1


async def test_kickoffs_keep_their_rate():
    pace = Pace(kickoffs_per_second=50)
    pace.taken()
    began = time.monotonic()
    for _ in range(11):
        await pace.enter()
        pace.leave()
    assert time.monotonic() - began >= 0.19


async def test_what_the_server_asks_of_one_holds_for_all():
    pace = Pace()
    pace.taken()
    pace.heed(limited(0.4))
    pace.heed(limited(0.1))
    began = time.monotonic()
    await pace.enter()
    assert time.monotonic() - began >= 0.35
    assert pace.held_for <= 0


async def test_while_kickoffs_are_refused_it_rests_longer_and_longer_and_tries_one_by_one(
    monkeypatch: pytest.MonkeyPatch,
):
    pace = Pace()
    pace.taken()
    rests: list[float] = []
    for _ in range(4):
        assert pace.refused(refused()) is None
        assert pace.refused(refused()) is None, "those that were under way at the same time count once"
        rests.append(pace.held_for)
        pace._not_before = 0.0  # instead of waiting
    assert [round(rest) for rest in rests] == [1, 2, 4, 8]
    assert await entered(pace, 10) == 1
    monkeypatch.setattr(throttle, "PATIENCE", 0.0)
    assert "no kickoff was taken" in (pace.refused(refused()) or "")
    pace.taken()
    assert pace.refused(refused()) is None, "one that is taken gives new patience"


async def test_a_batch_that_is_over_lets_everybody_pass():
    pace = Pace(kickoffs_per_second=0.001)
    pace.heed(limited(200))
    waiting = [asyncio.ensure_future(pace.enter()) for _ in range(3)]
    await asyncio.sleep(0.01)
    pace.close()
    await asyncio.wait_for(asyncio.gather(*waiting), 5)


def test_the_rhythm_is_that_of_the_fastest_tenth():
    rhythm = Rhythm()
    assert rhythm.first_look == 0
    for seconds in range(100, 120):
        rhythm.take(float(seconds))
    assert 100 <= rhythm.first_look <= 102
    for _ in range(200):
        rhythm.take(5.0)
    assert rhythm.first_look == 5.0
