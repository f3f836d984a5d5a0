"""What ends the pauses of a wait early, and what happens where webhooks do not come."""

from __future__ import annotations

import asyncio
import time
import uuid
from contextlib import nullcontext, suppress
from dataclasses import replace
from typing import Any

import httpx
import pytest
import respx

from prefect_crew import Price, ReviewRequest, Webhooks, arun_crew
from prefect_crew.blocks import crew_of
from prefect_crew.client.models import CrewResult, CrewStatus, TokenUsage
from prefect_crew.crew import WaitPolicy
from prefect_crew.devserver import CrewScript, CrewServer
from prefect_crew.exceptions import CrewFailedError
from prefect_crew.receiver.app import create_receiver
from prefect_crew.records.store import PrefectRecords
from prefect_crew.runs import listener as listener_module
from prefect_crew.runs.listener import Waker, _Hub
from prefect_crew.states import CrewState
from support.asking import judging
from support.flow_runs import acall_in_flow
from support.waiting import until
from support.webhooks import SECRET, served

TASK: dict[str, Any] = {"name": "work", "agent": "A", "seconds": 1.5, "output": "done"}
# Polling alone would not look again before this is over.
RARELY = WaitPolicy(initial=60, max_interval=60, timeout=120)
OFTEN = WaitPolicy(initial=0.2, max_interval=0.2)
DONE = CrewState.COMPLETED
COMPLETED = "stream.crew_kickoff_completed"


def script_of(task: dict[str, Any] | None = None, **values: Any) -> CrewScript:
    return CrewScript.model_validate({"name": "slow", "inputs": [], "tasks": [{**TASK, **(task or {})}], **values})


async def run(server: CrewServer, wait: WaitPolicy = RARELY, times: int = 1, **options: Any) -> list[CrewResult]:
    """Run a crew in a flow, so many times at once, in less time than polling alone would need."""
    crew = server.crew(wait=wait, price=options.pop("price", None))
    several = acall_in_flow(lambda: asyncio.gather(*(arun_crew(crew, {}, **options) for _ in range(times))))
    return (await asyncio.wait_for(several, 40))[1]


@pytest.mark.parametrize(("ends", "times"), [("completed", 5), ("failed", 1), ("flow", 1)])
async def test_a_webhook_ends_the_pause(receiver: str, ends: str, times: int) -> None:
    script = script_of({"fail": "no idea" if ends == "failed" else None}, flow=ends == "flow")
    # Of a Flow, the stream alone tells the end.
    with CrewServer(script, faults=["webhook-crew:lose"] if ends == "flow" else []) as server:
        with pytest.raises(CrewFailedError, match="no idea") if ends == "failed" else nullcontext():
            await run(server, times=times)
        assert server.requests["status"] <= (2 * times if times > 1 else 3)


async def test_every_waiter_of_a_run_is_woken(receiver: str) -> None:
    with CrewServer(script_of()) as server:

        async def one(after: float) -> str:
            await asyncio.sleep(after)
            return (await run(server, idempotency_key=f"shared-{server.url}"))[0].kickoff_id

        assert len(set(await asyncio.gather(one(0), one(0.5)))) == 1
        assert server.kickoffs == 1


@pytest.mark.parametrize("webhooks", [None, Webhooks(crew="http://127.0.0.1:9/nobody")], ids=["lost", "own"])
async def test_runs_without_news_are_polled(receiver: str, webhooks: Webhooks | None) -> None:
    with CrewServer(script_of(), faults=[] if webhooks else ["webhook:lose"]) as server:
        await run(server, OFTEN, webhooks=webhooks)
        assert server.requests["status"] > 3


async def test_progress_is_seen_with_webhooks_as_without(receiver: str) -> None:
    names, seen = ["one", "two", "three"], set[str | None]()
    tasks = [{**TASK, "name": name, "seconds": 0.7} for name in names]
    with CrewServer(CrewScript.model_validate({"name": "steps", "inputs": [], "tasks": tasks})) as server:
        watched = crew_of(server.crew(wait=OFTEN))
        crew = replace(watched, on_status=lambda _, status: seen.add(status and status.current_task))
        await acall_in_flow(lambda: arun_crew(crew, {}))
    assert {*names} <= seen


async def test_an_absent_receiver_is_warned_of_once(prefect_api: object, monkeypatch: Any, caplog: Any) -> None:
    """A crew of 20 s once took 44.9 s where the receiver was stopped, and nothing said why."""
    async with served(create_receiver(SECRET)) as url:
        monkeypatch.setenv("PREFECT_INTEGRATIONS_CREW_WEBHOOK_URL", url)
        monkeypatch.setenv("PREFECT_INTEGRATIONS_CREW_WEBHOOK_SECRET", SECRET)
        monkeypatch.setattr(listener_module, "_hub", _Hub())
    policy = WaitPolicy(initial=0.3, factor=1, max_interval=0.3, jitter=0)
    with CrewServer(script_of({"seconds": 6})) as server:
        began = time.monotonic()
        await run(server, policy, times=3)
        assert time.monotonic() - began < 15
        assert server.requests["status"] > 3 * 8
    warnings = [one.getMessage() for one in caplog.records if "receiver" in one.getMessage()]
    assert len(warnings) == 1, "one flow run, one warning"
    assert f"does not answer at {url}/recent" in warnings[0]
    assert "polled as without webhooks" in warnings[0]


# What the receiver answers


@pytest.mark.parametrize(
    ("status", "body"),
    [
        (404, "{}"),
        (500, "{}"),
        (200, "not JSON"),
        (200, '{"cursor": 1, "webhooks": {}}'),
        (200, '{"cursor": "another-start", "webhooks": [], "missed": true}'),
        pytest.param(200, "[" * 100_000, id="nested"),
    ],
)
async def test_an_odd_receiver_is_asked_again(status: int, body: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(listener_module, "AWAY", (0.01,))
    hub, said = _Hub(), {"cursor": "a-1", "webhooks": [], "missed": False}
    asked: list[tuple[str, bool]] = []

    def answer(request: httpx.Request) -> httpx.Response:
        asked.append((request.url.params["after"], hub._trouble is not None))
        return httpx.Response(200, json=said) if len(asked) in (1, 4) else httpx.Response(status, text=body)

    with respx.mock(assert_all_mocked=False) as mock:  # a listener of an earlier test may still ask its receiver
        mock.get("http://receiver.example/recent").mock(side_effect=answer)
        asking = asyncio.create_task(hub._ask_receiver("http://receiver.example/recent", "token"))
        await until(lambda: len(asked) >= 7)
        assert not asking.done()
        asking.cancel()
    is_away = "missed" not in body
    assert [trouble for _, trouble in asked[:7]] == [False, False, False, is_away, False, False, is_away]


# Tokens


@pytest.mark.parametrize("lost", ["webhook-crew:lose", "webhook-stream:lose"], ids=["stream-alone", "webhook-alone"])
async def test_usage_comes_from_webhooks(receiver: str, lost: str) -> None:
    script = script_of(usage=TokenUsage(total_tokens=1234))
    with CrewServer(script, faults=[lost], generation="later") as server:
        (result,) = await run(server)
        assert "token_usage" not in result.raw, "the status does not tell it"
        assert result.usage == TokenUsage(total_tokens=1234)
        assert server.requests["status"] <= 2


@pytest.mark.parametrize("fails", [False, True], ids=["completed", "failed"])
async def test_calls_of_models_tell_their_tokens(receiver: str, monkeypatch: pytest.MonkeyPatch, fails: bool) -> None:
    monkeypatch.setenv("PREFECT_INTEGRATIONS_CREW_WEBHOOK_LLM_CALLS", "true")
    calls = {
        "openai/gpt-4o": {"prompt_tokens": 900, "completion_tokens": 100},
        "small": {"prompt_tokens": 140, "completion_tokens": 60, "total_tokens": 200},
    }
    script = script_of({"fail": "no idea" if fails else None}, calls=calls, usage=TokenUsage(total_tokens=1200))
    key = f"calls {uuid.uuid4()}"
    with CrewServer(script) as server, suppress(CrewFailedError):
        await run(server, idempotency_key=key, price=Price(per_1k_input=1, per_1k_output=10))
    (record,) = await PrefectRecords().attempts(key)
    assert record.state is (CrewState.FAILED if fails else DONE)
    assert record.usage == TokenUsage(prompt_tokens=1040, completion_tokens=160, total_tokens=1200)
    assert record.cost == pytest.approx(1.04 + 1.6)


def ending(
    type_: str, tokens: int | None, *, kickoff_id: str = "k-1", key: str = "key", **more: object
) -> dict[str, object]:
    """Return what the receiver makes of a webhook about the end of a run."""
    said = {"kickoff_id": kickoff_id, **more, **({} if tokens is None else {"total_tokens": tokens})}
    return {"id": str(uuid.uuid4()), "event": f"crew.webhook.{type_}", "idempotency_key": key, "said": said}


async def test_the_end_waits_a_moment_for_tokens() -> None:
    hub, done = _Hub(), CrewStatus(kickoff_id="k-1", state=DONE)
    hub._has_receiver = True

    async def seconds(*events: dict[str, object], crew: str = "", calls: bool = False) -> Any:
        waker, started = Waker(hub, "key", crew, calls=calls), time.monotonic()
        hub.add("key", waker)
        for event in events:
            asyncio.get_running_loop().call_later(0.2, hub._hear, event)
        status = await waker.with_usage(done)
        hub.remove("key", waker)
        return time.monotonic() - started, status.usage

    took, usage = await seconds(crew="https://silent.example")
    assert (took >= 0.5, usage) == (True, None)
    assert (await seconds(crew="https://silent.example"))[0] < 0.2, "it is known to be silent"
    took, usage = await seconds(ending("crew", 9))
    assert (0.1 < took < 0.5, usage) == (True, TokenUsage(total_tokens=9))
    took, usage = await seconds(ending("crew", None), ending(COMPLETED, None))
    assert (0.1 < took < 0.5, usage) == (True, None), "nothing is to come any more"
    took, usage = await seconds(ending("stream.llm_call_completed", 9, model="small"), calls=True)
    assert (0.1 < took < 0.5, usage) == (True, TokenUsage(total_tokens=9)), "a call ends the wait for it"
    hub._has_receiver = False
    assert (await seconds())[0] < 0.2, "no webhook would reach this process"


@pytest.mark.parametrize(
    ("events", "total"),
    [
        pytest.param([ending(COMPLETED, 7), ending(COMPLETED, 5)], 12, id="crews-of-a-flow"),
        pytest.param([ending(COMPLETED, 7), ending("crew", 9), ending(COMPLETED, 5)], 9, id="the-crew-webhook-has-all"),
        pytest.param([ending(COMPLETED, 7), ending(COMPLETED, 5, kickoff_id="k-0")], 7, id="another-attempt"),
        pytest.param([ending(COMPLETED, 7, key="other")], None, id="another-run"),
        pytest.param([ending(COMPLETED, None), ending("crew", None)], None, id="none-is-not-0"),
    ],
)
async def test_tokens_are_counted_once_for_each_event(events: list[dict[str, object]], total: int | None) -> None:
    hub = _Hub()
    waker = Waker(hub, "key", "")
    hub.add("key", waker)
    for event in [*events, *events]:
        hub._hear(event)
    ended = await waker.with_usage(CrewStatus(kickoff_id="k-1", state=DONE))
    assert ended.usage == (None if total is None else TokenUsage(total_tokens=total))
    assert (await waker.with_usage(CrewStatus(kickoff_id="k-1", state=CrewState.RUNNING))).usage is None
    reported = CrewStatus(kickoff_id="k-1", state=DONE, usage=TokenUsage(total_tokens=1))
    assert (await waker.with_usage(reported)).usage == TokenUsage(total_tokens=1)


# Questions


async def test_a_repeated_question_is_known_by_its_webhook(receiver: str) -> None:
    """Neither the status nor the clock tells it from the one before: only the number of answers in its URL."""
    script = script_of({"seconds": 0, "human": True, "output": "always the same"})
    asked: list[ReviewRequest] = []
    with CrewServer(script) as server:
        await run(server, review=judging(asked, approves_at=3, feedback="again"))
        assert [one.round for one in asked] == [1, 2, 3]
        assert server.requests["resume"] == 3


async def test_a_question_of_another_attempt_is_another() -> None:
    waker = Waker(_Hub(), "key", "")
    waker.wake((1, 2))
    asked = [(1, 2), (2, 2), (1, 1), (1, 258)]
    assert [waker.has_question_after(*one) for one in asked] == [True, False, False, True]
