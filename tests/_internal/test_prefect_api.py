"""Requests to the Prefect API: repeated soon, in turn on SQLite, shared where they read by name; and its logger."""

import asyncio
import logging
from typing import Any

import httpx
import pytest
from prefect.exceptions import PrefectHTTPStatusError

from prefect_crew._internal import prefect_api
from prefect_crew._internal.prefect_api import (
    NAMES_AT_ONCE,
    NamedReads,
    OneLine,
    Urgency,
    is_busy,
    request_soon,
    run_logger,
)


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


# Changes, in turn


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
    assert not all(request.done() for request in others), "it does not wait until all of them are over"
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
    for request in hanging:
        request.cancel()
    await asyncio.wait(hanging)
    slow = serve(seconds=0.01)
    await asyncio.gather(*(ask() for _ in range(3)))
    assert slow.most == 1, "whoever had a turn for too long gives none back for a second time"


async def test_whoever_is_cancelled_passes_the_turn_on(serve: Any):
    serve(seconds=0.02)
    asking = [asyncio.create_task(ask()) for _ in range(40)]
    await asyncio.sleep(0.03)
    for request in asking[::2]:
        request.cancel()
    await asyncio.wait(asking)
    server = serve(seconds=0.01)
    await asyncio.gather(*(ask() for _ in range(20)))
    assert server.most == prefect_api.AT_ONCE


# Reads by name, which share requests


class Names:
    """Answers each request once it is let go, with a row for each name; with `error`, or with at most `most` rows."""

    def __init__(self, most: int | None = None, error: str = "") -> None:
        self.requests: list[list[str]] = []
        self.go = asyncio.Event()
        self.most, self.error = most, error

    async def ask(self, names: list[str]) -> list[Any]:
        self.requests.append(names)
        await self.go.wait()
        if self.error:
            raise ValueError(self.error, *names)
        return names[: self.most]

    async def begin(self, reads: NamedReads, *names: list[str]) -> list[asyncio.Task[Any]]:
        """Begin a read for each list of names, the first of which is under way then."""
        tasks = [asyncio.create_task(reads.read(some, self.ask, self.most or 10_000)) for some in names]
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        return tasks


async def test_reads_during_a_request_share_the_next_one():
    server = Names()
    tasks = await server.begin(NamedReads(), ["a"], ["b"], ["c", "b"])
    server.go.set()
    first, second, third = await asyncio.gather(*tasks)
    assert server.requests == [["a"], ["b", "c"]]
    assert first == ["a"]
    assert "b" in second
    assert {*third} == {"b", "c"}


async def test_a_request_has_a_bounded_number_of_names():
    server = Names()
    many = [[f"{caller} {number}" for number in range(NAMES_AT_ONCE // 2)] for caller in range(5)]
    tasks = await server.begin(NamedReads(), ["a"], *many)
    server.go.set()
    await asyncio.gather(*tasks)
    assert [len(names) for names in server.requests] == [1, NAMES_AT_ONCE, NAMES_AT_ONCE, NAMES_AT_ONCE // 2]


async def test_an_answer_that_may_be_cut_is_asked_again():
    server = Names(most=2)
    tasks = await server.begin(NamedReads(), ["a"], ["b"], ["c", "d"])
    server.go.set()
    assert await asyncio.gather(*tasks) == [["a"], ["b"], ["c", "d"]]
    assert await NamedReads().read(["a", "b"], server.ask, 2) == ["a", "b"]
    assert server.requests[2:] == [["b"], ["c", "d"], ["a", "b"]], "who asks alone asks once"


async def test_an_error_reaches_all_who_share_a_request():
    server, reads = Names(error="away"), NamedReads()
    tasks = await server.begin(reads, ["a"], ["b"], ["c"])
    server.go.set()
    errors = await asyncio.gather(*tasks, return_exceptions=True)
    assert [error.args for error in errors] == [("away", "a"), ("away", "b", "c"), ("away", "b", "c")]
    server.error = ""
    assert await reads.read(["d"], server.ask, 200) == ["d"]


@pytest.mark.parametrize(("cancelled", "is_next"), [(0, False), (1, False), (2, False), (1, True)])
async def test_a_cancelled_caller_leaves_others_their_answers(cancelled: int, is_next: bool):
    server, reads = Names(), NamedReads()
    tasks = await server.begin(reads, ["a"], ["b"], ["c"])
    if is_next:
        server.go.set()
        while not tasks[0].done():
            await asyncio.sleep(0)
    tasks[cancelled].cancel()
    server.go.set()
    answers = await asyncio.wait_for(asyncio.gather(*tasks, return_exceptions=True), 5)
    assert isinstance(answers[cancelled], asyncio.CancelledError)
    assert all(name in answers[number] for number, name in enumerate("abc") if number != cancelled)
    assert await reads.read(["d"], server.ask, 200) == ["d"]


# The logger

HOSTILE = "run 1\n12:00:00 | ERROR | forged\r\x1b]0;title\x07\x1b[2J\x9b2J\u202egpj.exe\u2028next\x85line"


class Costly:
    def __str__(self) -> str:
        raise AssertionError("formatted for nothing")


def test_a_message_is_one_line_whatever_is_in_it(caplog: pytest.LogCaptureFixture):
    logger = OneLine(logging.getLogger("prefect_crew.test"), {})
    with caplog.at_level(logging.INFO):
        logger.warning("Crew %s waits: %s (100%%)", HOSTILE, ValueError(HOSTILE))
        logger.info(f"{HOSTILE} 100%")
        logger.error("%r and %d", HOSTILE, 3)
        run_logger().info("plain")
        logger.debug("%s", Costly())
    texts = [record.getMessage() for record in caplog.records]
    assert [text.isprintable() for text in texts] == [True] * 4
    assert [record.levelname for record in caplog.records] == ["WARNING", "INFO", "ERROR", "INFO"]
    assert texts[0].startswith("Crew run 1 12:00:00 | ERROR | forged")
    assert texts[0].endswith("(100%)")
    assert texts[1].endswith("100%")
    assert {record.filename for record in caplog.records} == {"test_prefect_api.py"}
