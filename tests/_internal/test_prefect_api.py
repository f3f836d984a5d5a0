"""Requests to the Prefect API that are repeated soon, and changes that go one after the other on SQLite."""

from __future__ import annotations

import asyncio
from typing import Any

import httpx
import pytest
from prefect.exceptions import PrefectHTTPStatusError

from prefect_crew._internal import prefect_api
from prefect_crew._internal.prefect_api import Urgency, is_busy, request_soon


class Server:
    """Answers each request with the next status, 200 once there is none left; counts those at the same time."""

    def __init__(self, *statuses: int, seconds: float = 0.0) -> None:
        self.statuses, self.seconds = [*statuses], seconds
        self.requests = self.now = self.most = 0

    async def answer(self, client: Any, method: str, path: str, *, json: Any) -> httpx.Response:
        self.requests += 1
        self.now += 1
        self.most = max(self.most, self.now)
        await asyncio.sleep(self.seconds)
        self.now -= 1
        request, status = httpx.Request(method, "http://p"), self.statuses.pop(0) if self.statuses else 200
        response = httpx.Response(status, request=request)
        if response.is_error:
            raise PrefectHTTPStatusError("no", request=request, response=response)
        return response


async def ask(**options: Any) -> httpx.Response:
    return await request_soon(None, "PATCH", "/x", json={}, **{"give_up_after": 5.0, **options})  # type: ignore[arg-type]


@pytest.fixture
def serve(monkeypatch: pytest.MonkeyPatch) -> Any:
    def made(*statuses: int, **options: Any) -> Server:
        server = Server(*statuses, **options)
        monkeypatch.setattr(prefect_api, "_request_once", server.answer)
        return server

    return made


async def test_a_refused_request_is_repeated_soon(serve: Any):
    server, began = serve(503, 500, 429), asyncio.get_running_loop().time()
    assert (await ask()).is_success
    assert server.requests == 4
    assert asyncio.get_running_loop().time() - began < 1.0, "Prefect's own client sleeps two seconds after a 503"


@pytest.mark.parametrize(
    ("statuses", "options"),
    [
        ([404], {}),
        ([500], {"again": is_busy}),  # it is not known to have done nothing
        ([503] * 99, {"give_up_after": 0.05}),
    ],
)
async def test_the_last_error_is_raised(serve: Any, statuses: list[int], options: dict[str, Any]):
    serve(*statuses)
    with pytest.raises(PrefectHTTPStatusError):
        await ask(**options)


async def test_changes_go_in_turn_after_a_refusal(serve: Any):
    server = serve(seconds=0.01)
    await asyncio.gather(*(ask() for _ in range(50)))
    assert server.most == prefect_api.AT_ONCE
    server.statuses, server.most = [503], 0
    await ask()
    await asyncio.gather(*(ask() for _ in range(5)))
    assert server.most == 1
    await asyncio.gather(*(ask(alone=False) for _ in range(50)))
    assert server.most == prefect_api.CROWDED, "a change that is never refused goes beside others of its kind"


async def test_a_change_alone_waits_for_no_stream(serve: Any):
    server = serve(503, seconds=0.01)
    await ask()
    others = [asyncio.create_task(ask(alone=False, urgency=Urgency.BEGIN)) for _ in range(100)]
    await asyncio.sleep(0.015)
    waiting = [asyncio.create_task(ask()) for _ in range(3)]
    waiting[0].cancel()  # while it is next
    await asyncio.wait({waiting[2]})
    assert not all(one.done() for one in others), "it does not wait until all of them are over"
    await asyncio.gather(*others, *waiting[1:])
    assert server.requests == 104


async def ask_in(order: list[Urgency], urgency: Urgency) -> None:
    await ask(urgency=urgency)
    order.append(urgency)


async def test_turns_go_by_urgency(serve: Any):
    server, order = serve(seconds=0.01), list[Urgency]()
    first = [asyncio.create_task(ask_in(order, Urgency.SHOW)) for _ in range(prefect_api.AT_ONCE)]
    await asyncio.sleep(0)
    await asyncio.gather(*first, *(ask_in(order, urgency) for urgency in reversed(Urgency) for _ in range(3)))
    assert order[len(first) :] == sorted(order[len(first) :])
    assert server.requests == len(order)


async def test_an_old_end_goes_before_later_claims(serve: Any, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(prefect_api, "AT_ONCE", 1)
    monkeypatch.setattr(prefect_api, "PATIENCE", 0.3)
    server, order = serve(seconds=0.75), list[Urgency]()
    asking = [asyncio.create_task(ask_in(order, urgency)) for urgency in (Urgency.CONTINUE, Urgency.FINISH)]
    await asyncio.sleep(0.45)
    asking += [asyncio.create_task(ask_in(order, urgency)) for urgency in (Urgency.BEGIN, Urgency.CONTINUE)]
    await asyncio.gather(*asking)
    assert order == [Urgency.CONTINUE, Urgency.CONTINUE, Urgency.FINISH, Urgency.BEGIN]
    assert server.requests == 4


async def test_waiting_for_a_turn_costs_no_attempt(serve: Any):
    before = 5 * prefect_api.AT_ONCE
    serve(*[200] * before, 503, seconds=0.1)
    answers = await asyncio.gather(*(ask(give_up_after=0.3) for _ in range(before + 1)))
    assert all(answer.is_success for answer in answers)


async def test_a_hanging_request_holds_nobody_for_long(serve: Any, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(prefect_api, "LONGEST", 0.05)
    serve(503)
    await ask()
    slow = serve(seconds=30.0)
    hanging = [asyncio.ensure_future(ask()) for _ in range(2 * prefect_api.AT_ONCE)]
    await asyncio.sleep(0.01)
    assert slow.requests == 1
    serve()
    assert (await asyncio.wait_for(ask(), 5)).is_success
    for one in hanging:
        one.cancel()
    await asyncio.wait(hanging)
    slow = serve(seconds=0.01)
    await asyncio.gather(*(ask() for _ in range(3)))
    assert slow.most == 1, "whoever had a turn for too long gives none back for a second time"


async def test_whoever_is_cancelled_passes_the_turn_on(serve: Any):
    serve(seconds=0.02)
    asking = [asyncio.create_task(ask()) for _ in range(40)]
    await asyncio.sleep(0.03)
    for one in asking[::2]:
        one.cancel()
    await asyncio.wait(asking)
    server = serve(seconds=0.01)
    await asyncio.gather(*(ask() for _ in range(20)))
    assert server.most == prefect_api.AT_ONCE
