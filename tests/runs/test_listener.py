"""What ends the pauses of a wait early, and what happens where webhooks do not come."""

import asyncio
import time
import uuid
from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

import httpx
import pytest
import respx

from prefect_crew import DeployedCrew, ReviewRequest, arun_crew
from prefect_crew.client.models import CrewResult, CrewStatus, TokenUsage
from prefect_crew.crew import WaitPolicy
from prefect_crew.exceptions import CrewFailedError
from prefect_crew.runs import listener as listener_module
from prefect_crew.runs.listener import Waker, _Hub
from prefect_crew.states import CrewState
from prefect_crew.testing import CrewServerFactory
from support.asking import judging
from support.flow_runs import acall_in_flow
from support.prefect_server import free_port
from support.scripts import script, slow
from support.waiting import until
from support.webhooks import SECRET

# Polling alone would not look again before this is over.
RARELY = WaitPolicy(initial=60, max_interval=60, timeout=120)
OFTEN = WaitPolicy(initial=0.2, factor=1, max_interval=0.2, jitter=0)
COMPLETED = "stream.crew_kickoff_completed"
USAGE: dict[str, Any] = {"total_tokens": 1200}


async def run(crew: DeployedCrew, *, keys: Sequence[str | None] = (None,), **options: Any) -> list[CrewResult]:
    """Run a crew in a flow, once for each key at the same time, in less time than polling alone would need."""
    together = acall_in_flow(lambda: asyncio.gather(*(arun_crew(crew, idempotency_key=key, **options) for key in keys)))
    return (await asyncio.wait_for(together, 40))[1]


@pytest.mark.parametrize("ends", ["completed", "failed", "flow"])
async def test_a_webhook_ends_the_pause(receiver: str, crew_server: CrewServerFactory, key: str, ends: str) -> None:
    task = {"seconds": 1.5, "fail": "no idea" if ends == "failed" else ""}
    # Of a Flow, the stream alone tells the end.
    server = crew_server(script(task, flow=ends == "flow"), faults=["webhook-crew:lose"] if ends == "flow" else [])
    keys = [key, key, f"another {key}"] if ends == "completed" else [key]
    with pytest.raises(CrewFailedError, match="no idea") if ends == "failed" else nullcontext():
        await run(server.crew(wait=RARELY), keys=keys)
    assert server.requests["status"] <= 1 + 2 * len(keys)
    assert server.kickoffs == len({*keys})


async def test_a_run_without_news_is_polled(receiver: str, crew_server: CrewServerFactory) -> None:
    server = crew_server(slow(1.5), faults=["webhook:lose"])
    await run(server.crew(wait=OFTEN))
    assert server.requests["status"] > 3


@pytest.mark.usefixtures("prefect_api")
async def test_an_absent_receiver_is_warned_of_once(crew_server: Any, monkeypatch: Any, caplog: Any) -> None:
    """A crew of 20 s once took 44.9 s where the receiver was stopped, and nothing said why."""
    url, server = f"http://127.0.0.1:{free_port()}", crew_server(slow(6))
    monkeypatch.setenv("PREFECT_INTEGRATIONS_CREW_WEBHOOK_URL", url)
    monkeypatch.setenv("PREFECT_INTEGRATIONS_CREW_WEBHOOK_SECRET", SECRET)
    monkeypatch.setattr(listener_module, "_hub", _Hub())
    began = time.monotonic()
    await run(server.crew(wait=OFTEN), keys=[None, None, None])
    assert time.monotonic() - began < 15
    assert server.requests["status"] > 3 * 8
    warnings = [record.getMessage() for record in caplog.records if "receiver" in record.getMessage()]
    assert len(warnings) == 1, "one flow run, one warning"
    assert f"does not answer at {url}/recent" in warnings[0]
    assert "polled as without webhooks" in warnings[0]


@pytest.mark.parametrize(
    ("status", "body"),
    [
        (404, "{}"),
        (200, "not JSON"),
        (200, '{"cursor": 1, "webhooks": {}}'),
        (200, '{"cursor": "another-start", "webhooks": [], "missed": true}'),
        pytest.param(200, "[" * 100_000, id="nested"),
    ],
)
async def test_an_odd_receiver_is_asked_again(status: int, body: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(listener_module, "AWAY", (0.01,))
    hub, good, troubles = _Hub(), {"cursor": "a-1", "webhooks": [], "missed": False}, list[bool]()

    def answer(_: httpx.Request) -> httpx.Response:
        troubles.append(hub._trouble is not None)
        return httpx.Response(200, json=good) if len(troubles) in (1, 4) else httpx.Response(status, text=body)

    with respx.mock(assert_all_mocked=False) as mock:  # a listener of an earlier test may still ask its receiver
        mock.get("http://receiver.example/recent").mock(side_effect=answer)
        asking = asyncio.create_task(hub._ask_receiver("http://receiver.example/recent", "token"))
        await until(lambda: len(troubles) >= 7)
        assert not asking.done()
        asking.cancel()
    is_away = "missed" not in body
    assert troubles[:7] == [False, False, False, is_away, False, False, is_away]


# Tokens


@pytest.mark.parametrize("lost", ["webhook-crew:lose", "webhook-stream:lose"], ids=["stream-alone", "webhook-alone"])
async def test_usage_comes_from_webhooks(receiver: str, crew_server: CrewServerFactory, lost: str) -> None:
    server = crew_server(script({"seconds": 1.5}, usage=USAGE), faults=[lost])
    (result,) = await run(server.crew(wait=RARELY))
    assert "token_usage" not in result.raw, "the status does not tell it"
    assert result.usage == TokenUsage(**USAGE)
    assert server.requests["status"] <= 2


Event = dict[str, object]


def ending(type_: str, tokens: int | None, *, kickoff_id: str = "k-1", key: str = "key", **more: object) -> Event:
    """Return what the receiver makes of a webhook about the end of a run."""
    facts = {"kickoff_id": kickoff_id, **more, **({} if tokens is None else {"total_tokens": tokens})}
    return {"id": str(uuid.uuid4()), "event": f"crew.webhook.{type_}", "idempotency_key": key, "said": facts}


async def tokens_at_the_end(hub: _Hub, *events: Event, **options: Any) -> int | None:
    """Return the tokens of a run whose webhooks come 0.2 seconds after its end."""
    waker = Waker(hub, "key", options.pop("crew", ""), **options)
    hub.add("key", waker)
    for event in events:
        asyncio.get_running_loop().call_later(0.2, hub._hear, event)
    status = await waker.with_usage(CrewStatus(kickoff_id="k-1", state=CrewState.COMPLETED), "k-1")
    hub.remove("key", waker)
    return status.usage and status.usage.total_tokens


@pytest.mark.parametrize(
    ("events", "options", "tokens", "least", "most"),
    [
        pytest.param([], {}, None, 0.5, 5, id="nothing-comes"),
        pytest.param([], {"crew": "https://silent.example"}, None, 0, 0.2, id="nothing-came-before"),
        pytest.param([ending("crew", 9)], {}, 9, 0.1, 0.5, id="tokens"),
        pytest.param([ending("crew", None), ending(COMPLETED, None)], {}, None, 0.1, 0.5, id="nothing-more-can-come"),
    ],
)
async def test_the_end_waits_a_moment_for_tokens(
    events: list[Event], options: dict[str, Any], tokens: int | None, least: float, most: float
) -> None:
    hub = _Hub()
    assert await asyncio.wait_for(tokens_at_the_end(hub), 0.2) is None, "no webhook would reach this process"
    hub._has_receiver = True
    if "crew" in options:
        await tokens_at_the_end(hub, **options)
    began = time.monotonic()
    assert await tokens_at_the_end(hub, *events, **options) == tokens
    assert least <= time.monotonic() - began < most


@pytest.mark.parametrize(
    ("events", "tokens"),
    [
        pytest.param([ending(COMPLETED, 7), ending(COMPLETED, 5)], 12, id="crews-of-a-flow"),
        pytest.param([ending(COMPLETED, 7), ending("crew", 9), ending(COMPLETED, 5)], 9, id="the-crew-webhook-has-all"),
        pytest.param([ending(COMPLETED, 7), ending(COMPLETED, 5, kickoff_id="k-0")], 7, id="another-attempt"),
        pytest.param([ending(COMPLETED, 7, key="other")], None, id="another-run"),
        pytest.param([ending(COMPLETED, None), ending("crew", None)], None, id="none-is-not-0"),
    ],
)
async def test_tokens_are_counted_once_for_each_event(events: list[Event], tokens: int | None) -> None:
    hub = _Hub()
    waker = Waker(hub, "key", "")
    hub.add("key", waker)
    for event in [*events, *events]:
        hub._hear(event)
    status = CrewStatus(kickoff_id="k-1", state=CrewState.COMPLETED)
    assert (await waker.with_usage(status, "k-1")).usage == (
        None if tokens is None else TokenUsage(total_tokens=tokens)
    )
    running = status.model_copy(update={"state": CrewState.RUNNING})
    assert (await waker.with_usage(running, "k-1")).usage is None
    reported = TokenUsage(total_tokens=1)
    assert (await waker.with_usage(status.model_copy(update={"usage": reported}), "k-1")).usage == reported


# Questions


async def test_a_repeated_question_is_known_by_its_webhook(receiver: str, crew_server: CrewServerFactory) -> None:
    """Neither the status nor the clock tells it from the one before: only the number of answers in its URL."""
    server, requests = crew_server(script({"human": True, "output": "always the same"})), list[ReviewRequest]()
    await run(server.crew(wait=RARELY), review=judging(requests, approves_at=3, feedback="again"))
    assert [request.round for request in requests] == [1, 2, 3]
    assert server.requests["resume"] == 3


async def test_a_question_of_another_attempt_is_another() -> None:
    waker = Waker(_Hub(), "key", "")
    waker.wake((1, 2))
    questions = [(1, 2), (2, 2), (1, 1), (1, 258)]
    assert [waker.has_question_after(*question) for question in questions] == [True, False, False, True]
