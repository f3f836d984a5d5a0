from __future__ import annotations

import asyncio
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import suppress
from typing import Any

import pytest
import respx
import uvicorn
from prefect import flow

from prefect_crew import (
    CrewFailedError,
    DeployedCrew,
    Price,
    Review,
    ReviewRequest,
    Webhooks,
    arun_crew,
    kickoff_crew,
    wait_for_crew,
)
from prefect_crew._internal.web_server import open_listener
from prefect_crew.client.models import CrewResult, CrewStatus, TokenUsage
from prefect_crew.crew import WaitPolicy
from prefect_crew.devserver import CrewScript, CrewServer
from prefect_crew.receiver import recent
from prefect_crew.receiver.app import create_receiver
from prefect_crew.records.store import PrefectRecords
from prefect_crew.runs import listener as listener_module
from prefect_crew.states import CrewState

SECRET = "a secret that is long enough for anybody"
SCRIPT = CrewScript.model_validate(
    {"name": "slow", "inputs": [], "tasks": [{"name": "work", "agent": "A", "seconds": 1.5, "output": "done"}]}
)
# Polling alone would not look again before this is over.
RARELY = WaitPolicy(initial=60, max_interval=60, timeout=120)


@pytest.fixture
def receiver(prefect_api: Any, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A receiver on a port, switched on for this test."""
    socket = open_listener("127.0.0.1", 0)
    url = f"http://127.0.0.1:{socket.getsockname()[1]}"
    server = uvicorn.Server(uvicorn.Config(create_receiver(SECRET), log_level="warning"))
    thread = threading.Thread(target=lambda: asyncio.run(server.serve([socket])), daemon=True)
    thread.start()
    monkeypatch.setenv("PREFECT_INTEGRATIONS_CREW_WEBHOOK_URL", url)
    monkeypatch.setenv("PREFECT_INTEGRATIONS_CREW_WEBHOOK_SECRET", SECRET)
    monkeypatch.setattr(listener_module, "_hub", listener_module._Hub())
    yield url
    server.should_exit = True
    thread.join(20)


def crew_of(server: CrewServer) -> DeployedCrew:
    return DeployedCrew(url=server.url, token=server.token, wait=RARELY)


async def test_a_webhook_ends_the_pause(receiver: str) -> None:
    with CrewServer(SCRIPT) as server:

        @flow
        async def once() -> float:
            started = time.monotonic()
            await arun_crew(crew_of(server), {})
            return time.monotonic() - started

        assert await once() < 30, "polling alone takes a minute"
        assert server.requests["status"] <= 2


async def test_the_receiver_itself_ends_pauses_where_prefects_events_do_not_come(
    receiver: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    away = Subscriber(OSError("no events"))
    monkeypatch.setattr(listener_module, "get_events_subscriber", away)
    with CrewServer(SCRIPT) as server:

        @flow
        async def several() -> float:
            started = time.monotonic()
            await asyncio.gather(*(arun_crew(crew_of(server), {}, name=str(number)) for number in range(5)))
            return time.monotonic() - started

        assert await several() < 30, "polling alone takes a minute"
        assert server.requests["status"] <= 2 * 5
    assert away.times
    assert listener_module._hub.trusted


async def test_a_receiver_that_has_started_anew_is_not_trusted_until_the_next_answer(
    receiver: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(listener_module, "get_events_subscriber", Subscriber(OSError("no events")))
    monkeypatch.setattr(recent, "HOLD", 0.2)
    trusted: list[bool] = []
    hub = listener_module._Hub()
    asking = asyncio.create_task(hub._ask_receiver())
    while not hub.trusted:
        await asyncio.sleep(0.02)
    first = recent.RecentWebhooks()
    assert (await first.after("another-7")) == {"cursor": f"{first._start}-0", "missed": True, "webhooks": []}
    monkeypatch.setattr(recent.RecentWebhooks, "after", first.after)
    async with asyncio.timeout(20):
        while not trusted or not hub.trusted:
            await asyncio.sleep(0.02)
            trusted += [] if hub.trusted else [False]
    asking.cancel()


@pytest.mark.parametrize(
    ("status", "body"),
    [
        (404, "{}"),
        (500, "{}"),
        (200, '["what", "is", "this"]'),
        (200, "not JSON"),
        (200, '{"cursor": 1, "webhooks": {}}'),
        pytest.param(200, "[" * 100_000, id="nested"),
    ],
)
async def test_a_receiver_that_does_not_know_the_latest_webhooks_is_asked_again_and_not_trusted(
    status: int, body: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(listener_module, "NO_RECENT", 0.01)
    monkeypatch.setattr(listener_module, "RECONNECT", 0.01)
    monkeypatch.setenv("PREFECT_INTEGRATIONS_CREW_WEBHOOK_URL", "http://receiver.example")
    monkeypatch.setenv("PREFECT_INTEGRATIONS_CREW_WEBHOOK_SECRET", SECRET)
    hub = listener_module._Hub()
    with respx.mock:
        route = respx.get("http://receiver.example/recent").respond(status, text=body)
        asking = asyncio.create_task(hub._ask_receiver())
        async with asyncio.timeout(20):
            while route.call_count < 3:
                await asyncio.sleep(0.01)
        assert not asking.done()
        assert not hub.trusted
        asking.cancel()


async def test_a_webhook_that_comes_before_the_status_shows_its_end_costs_no_long_pause() -> None:
    hub = listener_module._Hub()
    hub._has_receiver = True
    waker = listener_module.Waker(hub, "key", "https://crew.example")
    hub.add("key", waker)
    assert waker.stretch(1.0) == listener_module.SAFETY[0]
    hub._hear(ending("crew", 1))
    await waker.pause(60)
    pauses = []
    for _ in range(6):
        pauses.append(waker.stretch(1.0))
        await waker.pause(0)
        waker.note_missed()  # the end was seen without another webhook: this one has told of it
    assert pauses[:4] == [0.5, 1.0, 2.0, 4.0]
    assert pauses[-1] >= listener_module.SAFETY[1]


async def test_a_listener_that_has_ended_is_not_trusted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(listener_module, "get_events_subscriber", Subscriber(KeyError("a mistake")))
    hub = listener_module._Hub()
    hub._has_receiver = hub._has_events = True
    with pytest.raises(KeyError):
        await asyncio.wait_for(hub._listen(), 30)
    assert not hub.trusted


async def test_every_waiter_of_a_run_is_woken(receiver: str) -> None:
    with CrewServer(SCRIPT) as server:

        @flow
        async def first() -> str:
            return (await arun_crew(crew_of(server), {}, idempotency_key=f"shared-{server.url}")).kickoff_id

        @flow
        async def second() -> str:
            await asyncio.sleep(0.5)
            return (await arun_crew(crew_of(server), {}, idempotency_key=f"shared-{server.url}")).kickoff_id

        started = time.monotonic()
        ids = await asyncio.gather(first(), second())
        assert len(set(ids)) == 1
        assert time.monotonic() - started < 30
        assert server.kickoffs == 1


async def test_a_lost_webhook_costs_time_and_then_trust(receiver: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(listener_module, "SAFETY", (3.0, 3.0))
    often = WaitPolicy(initial=0.2, max_interval=0.2)
    with CrewServer(SCRIPT, faults=["webhook:lose"]) as server:
        crew = DeployedCrew(url=server.url, token=server.token, wait=often)

        @flow
        async def once() -> str:
            return (await arun_crew(crew, {})).output

        assert await once() == "done"
        few = server.requests["status"]
        assert not listener_module._hub.trusted, "the receiver was found not to answer"
        assert await once() == "done"
        assert server.requests["status"] - few > few, "polling is as often as without webhooks again"


async def test_a_failed_crew_ends_the_pause_too(receiver: str) -> None:
    failing = CrewScript.model_validate(
        {"name": "failing", "inputs": [], "tasks": [{"name": "work", "seconds": 1.5, "fail": "no idea"}]}
    )
    with CrewServer(failing) as server:

        @flow
        async def once() -> None:
            await arun_crew(crew_of(server), {})

        started = time.monotonic()
        with pytest.raises(CrewFailedError, match="no idea"):
            await once()
        assert time.monotonic() - started < 30, "polling alone takes a minute"


@pytest.mark.parametrize("lost", ["webhook-crew:lose", "webhook-stream:lose"], ids=["stream-alone", "webhook-alone"])
async def test_tokens_that_only_a_webhook_tells_are_the_usage_of_the_result(receiver: str, lost: str) -> None:
    counting = SCRIPT.model_copy(update={"usage": TokenUsage(total_tokens=1234)})
    with CrewServer(counting, faults=[lost], generation="later") as server:

        @flow
        async def once() -> CrewResult:
            return await arun_crew(crew_of(server), {})

        result = await once()
        assert "token_usage" not in result.raw, "the status does not tell it"
        assert result.usage == TokenUsage(total_tokens=1234)
        assert server.requests["status"] <= 2


CALLS = {
    "openai/gpt-4o": {"prompt_tokens": 900, "completion_tokens": 100},
    "small": {"prompt_tokens": 140, "completion_tokens": 60, "total_tokens": 200},
}
ALL = TokenUsage(prompt_tokens=1040, completion_tokens=160, total_tokens=1200)


@pytest.mark.parametrize("fails", [False, True], ids=["completed", "failed"])
async def test_calls_of_models_tell_what_went_in_and_out(
    receiver: str, monkeypatch: pytest.MonkeyPatch, fails: bool
) -> None:
    monkeypatch.setenv("PREFECT_INTEGRATIONS_CREW_WEBHOOK_LLM_CALLS", "true")
    values = SCRIPT.model_dump() | {"calls": CALLS, "usage": TokenUsage(total_tokens=1200)}
    values["tasks"][0]["fail"] = "no idea" if fails else None
    key = f"calls {uuid.uuid4()}"
    with CrewServer(CrewScript.model_validate(values)) as server:
        crew = crew_of(server).model_copy(update={"price": Price(per_1k_input=1, per_1k_output=10)})

        @flow
        async def once() -> None:
            with suppress(CrewFailedError):
                await arun_crew(crew, {}, idempotency_key=key)

        await once()
    (record,) = await PrefectRecords().attempts(key)
    assert record.state is (CrewState.FAILED if fails else CrewState.COMPLETED)
    assert record.usage == ALL
    assert record.cost == pytest.approx(1.04 + 1.6)


async def test_the_end_waits_a_moment_for_tokens_and_not_again_where_none_came() -> None:
    hub, done = listener_module._Hub(), CrewStatus(kickoff_id="k-1", state=DONE)
    hub._has_receiver = True

    async def seconds(crew: str, event: dict[str, object] | None = None) -> tuple[float, TokenUsage | None]:
        waker, started = listener_module.Waker(hub, "key", crew), time.monotonic()
        hub.add("key", waker)
        if event is not None:
            asyncio.get_running_loop().call_later(0.2, hub._hear, event)
        status = await waker.with_usage(done)
        hub.remove("key", waker)
        return time.monotonic() - started, status.usage

    took, usage = await seconds("https://silent.example")
    assert (took >= 0.9, usage) == (True, None)
    assert (await seconds("https://silent.example"))[0] < 0.2, "it is known to be silent"
    took, usage = await seconds("https://telling.example", ending("crew", 9))
    assert (0.1 < took < 0.9, usage) == (True, TokenUsage(total_tokens=9))
    hub._has_receiver = False
    assert (await seconds("https://another.example"))[0] < 0.2, "no webhook would reach this process"


async def test_the_end_of_a_flow_ends_the_pause(receiver: str) -> None:
    a_flow = SCRIPT.model_copy(update={"flow": True})
    with CrewServer(a_flow, faults=["webhook-crew:lose"]) as server:

        @flow
        async def once() -> float:
            started = time.monotonic()
            await arun_crew(crew_of(server), {})
            return time.monotonic() - started

        assert await once() < 30, "polling alone takes a minute"


def ending(
    type_: str, tokens: int | None, *, kickoff_id: str = "k-1", idempotency_key: str = "key"
) -> dict[str, object]:
    """Return what the receiver makes of a webhook about the end of a run."""
    said = {"kickoff_id": kickoff_id, **({} if tokens is None else {"total_tokens": tokens})}
    name = f"crew.webhook.{type_}"
    return {"id": str(uuid.uuid4()), "event": name, "idempotency_key": idempotency_key, "said": said}


COMPLETED = "stream.crew_kickoff_completed"


@pytest.mark.parametrize(
    ("events", "total"),
    [
        pytest.param([ending(COMPLETED, 7)], 7, id="one-crew"),
        pytest.param([ending(COMPLETED, 7), ending(COMPLETED, 5)], 12, id="crews-of-a-flow"),
        pytest.param([ending(COMPLETED, 7), ending("crew", 9), ending(COMPLETED, 5)], 9, id="the-crew-webhook-has-all"),
        pytest.param([ending(COMPLETED, 7), ending(COMPLETED, 5, kickoff_id="k-0")], 7, id="another-attempt"),
        pytest.param([ending(COMPLETED, 7, idempotency_key="other")], None, id="another-run"),
        pytest.param([ending(COMPLETED, None), ending("crew", None)], None, id="none-is-not-0"),
    ],
)
def test_tokens_are_counted_once_for_each_event(events: list[dict[str, object]], total: int | None) -> None:
    async def count() -> list[CrewStatus]:
        hub = listener_module._Hub()
        waker = listener_module.Waker(hub, "key", "https://crew.example")
        hub.add("key", waker)
        for event in [*events, *events]:
            hub._hear(event)
        counted = [
            await waker.with_usage(CrewStatus(kickoff_id="k-1", state=state)) for state in (DONE, CrewState.RUNNING)
        ]
        reported = CrewStatus(kickoff_id="k-1", state=DONE, usage=TokenUsage(total_tokens=1))
        return [*counted, await waker.with_usage(reported)]

    done, running, reported = asyncio.run(count())
    assert done.usage == (None if total is None else TokenUsage(total_tokens=total))
    assert running.usage is None
    assert reported.usage == TokenUsage(total_tokens=1)


DONE = CrewState.COMPLETED


async def test_the_same_question_asked_again_is_known_by_its_webhook(
    receiver: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither the status nor the clock tells it from the one before: only the number of answers in its URL."""
    asking = CrewScript.model_validate(
        {"name": "asking", "inputs": [], "tasks": [{"name": "draft", "human": True, "output": "always the same"}]}
    )
    asked: list[int] = []

    def judge(request: ReviewRequest) -> Review:
        asked.append(request.round)
        return Review(approve=request.round == 3, feedback="again")

    with CrewServer(asking) as server:

        @flow
        async def once() -> None:
            await arun_crew(crew_of(server), {}, review=judge)

        await once()
        assert asked == [1, 2, 3]
        assert server.requests["resume"] == 3


def test_a_question_of_another_attempt_is_another() -> None:
    async def ask() -> list[bool]:
        waker = listener_module.Waker(listener_module._Hub(), "key", "https://crew.example")
        waker.wake((1, 2))
        return [
            waker.has_question_after(1, 2),
            waker.has_question_after(2, 2),
            waker.has_question_after(1, 1),
            waker.has_question_after(1, 258),
        ]

    assert asyncio.run(ask()) == [True, False, False, True]


async def test_own_targets_and_a_run_without_hooks_are_polled_for(receiver: str) -> None:
    often = WaitPolicy(initial=0.2, max_interval=0.2)
    with CrewServer(SCRIPT) as server:
        crew = DeployedCrew(url=server.url, token=server.token, wait=often)

        @flow
        async def own() -> str:
            kickoff_id = await kickoff_crew(crew, {}, webhooks=Webhooks(crew="http://127.0.0.1:9/nobody"))
            return (await wait_for_crew(crew, kickoff_id)).output

        assert await own() == "done"
        assert server.requests["status"] > 3


class Subscriber:
    """What Prefect gives, as far as it fails: a plain Exception for credentials that its server refuses."""

    def __init__(self, error: Exception) -> None:
        self.error = error
        self.times = 0

    def __call__(self, **_: Any) -> Subscriber:
        return self

    async def __aenter__(self) -> Subscriber:
        self.times += 1
        raise self.error

    async def __aexit__(self, *_: object) -> None:
        return None


async def test_refused_credentials_do_not_end_the_listener(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    refused = Subscriber(Exception("Unable to authenticate to the event stream.\nReason: no"))
    monkeypatch.setattr(listener_module, "get_events_subscriber", refused)
    monkeypatch.setattr(listener_module, "RECONNECT", 0.0)
    hub = listener_module._Hub()
    listening = asyncio.create_task(hub._listen())
    while refused.times < 5 and not listening.done():
        await asyncio.sleep(0)
    assert not listening.done()
    assert not hub.trusted
    listening.cancel()
    said = [record.getMessage() for record in caplog.records if "Unable to authenticate" in record.getMessage()]
    assert len(said) == 1, "once, not at each attempt"
    assert "\n" not in said[0]


async def test_any_other_error_is_not_hidden(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(listener_module, "get_events_subscriber", Subscriber(KeyError("a mistake")))
    with pytest.raises(KeyError, match="a mistake"):
        await asyncio.wait_for(listener_module._Hub()._listen(), 30)
