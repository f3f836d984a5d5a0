"""What the receiver hands on, on a real Prefect server."""

from __future__ import annotations

import asyncio
import json
import uuid
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from datetime import timedelta
from typing import Any
from unittest.mock import AsyncMock

import httpx
import pytest
from pydantic import SecretStr

from prefect_crew.client.models import ReviewRequest
from prefect_crew.receiver import forward as module
from prefect_crew.receiver.events import WebhookEvent, read_events
from prefect_crew.receiver.forward import Forwarder
from prefect_crew.records.model import RecordPhase, utcnow
from prefect_crew.records.notes import kept_output, kept_questions
from prefect_crew.records.store import PrefectRecords
from prefect_crew.webhooks import Hook, WebhookKind
from support.prefect_server import PrefectServer, drain, environment, free_port
from support.proxy import Proxy
from support.records import new_record
from support.webhooks import BODIES, events_of, until

pytestmark = pytest.mark.usefixtures("prefect_api")


def event_about(
    idempotency_key: str, which: str = "crew-first", *, attempt: int | None = 1, **changes: Any
) -> WebhookEvent:
    kind: WebhookKind = which.partition("-")[0]  # pyright: ignore[reportAssignmentType]
    hook = Hook(kind, idempotency_key, utcnow() + timedelta(days=1), attempt)
    body = json.dumps({**BODIES[which], **changes}).encode()
    return read_events(hook, body)[0]


@pytest.fixture
def key() -> str:
    return f"forward/{uuid.uuid4()}"


@pytest.fixture
async def forwarder() -> AsyncIterator[Forwarder]:
    forwarder = Forwarder()
    yield forwarder
    await forwarder.aclose()


@asynccontextmanager
async def behind_a_proxy(prefect_api: PrefectServer) -> AsyncIterator[tuple[Proxy, Forwarder]]:
    """Give a forwarder whose way to Prefect can be cut."""
    await asyncio.to_thread(drain)
    with Proxy(prefect_api.port) as proxy, environment({"PREFECT_API_URL": f"{proxy.url}/api"}):
        forwarder = Forwarder()
        yield proxy, forwarder
        await forwarder.aclose()


@pytest.mark.parametrize("which", ["crew-later", "human_input-first"])
async def test_a_webhook_becomes_an_event_about_its_run(which: str, key: str, forwarder: Forwarder):
    own = str(uuid.uuid4())
    event = event_about(key, which)
    named = replace(event.hook, crew="travel", step="research", flow_run_id=own)
    forwarder.put(replace(event, hook=named))
    (found,) = await events_of(key)
    assert found["event"] == f"crew.webhook.{which.partition('-')[0]}"
    assert found["resource"] == {
        "prefect.resource.id": f"prefect-crew.run.{key}/1",
        "prefect.resource.name": f"travel run {key}",
        "prefect-crew.idempotency-key": key,
        "prefect-crew.crew": "travel",
    }
    assert {one["prefect.resource.role"]: one["prefect.resource.id"] for one in found["related"]} == {
        "crew": "prefect-crew.crew.travel",
        "step": "prefect-crew.step.research",
        "flow-run": f"prefect.flow-run.{own}",
    }
    payload = found["payload"]
    assert payload["said"]["kickoff_id"] == "k-1"
    assert (payload["idempotency_key"], payload["attempt"], payload["round"]) == (key, 1, 0)


def streamed(idempotency_key: str, type_: str, **more: Any) -> WebhookEvent:
    hook = Hook("stream", idempotency_key, utcnow() + timedelta(days=1), 1)
    event = {"type": type_, "id": str(uuid.uuid4()), "kickoff_id": "k-1", **more}
    return read_events(hook, json.dumps({"events": [event]}).encode())[0]


async def test_ends_and_questions_are_one_event_each(key: str, forwarder: Forwarder):
    question = event_about(key, "human_input-first", task_output=None)
    webhooks = [
        event_about(key, "task-first"),
        event_about(key, "step-first"),
        streamed(key, "crew_kickoff_completed"),
        streamed(key, "llm_call_completed"),
        *(event_about(key, "crew-first", execution_time=number) for number in range(5)),
        *(streamed(key, type_) for type_ in ("crew_kickoff_failed", "crew_kickoff_failed", "flow_finished")),
        question,
        question,
        replace(question, hook=replace(question.hook, round=1)),
    ]
    for webhook in webhooks:
        forwarder.put(webhook)
    await events_of(key, at_least=5)
    await asyncio.sleep(1.5)  # the server writes events down each second
    ids = sorted(event["event"].removeprefix("crew.webhook.") for event in await events_of(key, at_least=5))
    assert ids == [*("crew", "human_input", "human_input", "stream.crew_kickoff_failed", "stream.flow_finished")]
    woken = [webhook["event"] for webhook in forwarder.recent._kept]
    assert woken.count("crew.webhook.crew") == 5, "each wakes, and tells its tokens"
    assert "crew.webhook.stream.crew_kickoff_completed" in woken


async def test_two_receivers_report_an_end_once(key: str, forwarder: Forwarder):
    other = Forwarder()
    for each in (forwarder, other):
        each.put(event_about(key, "crew-first"))
    await events_of(key)
    await asyncio.sleep(1.5)
    assert len(await events_of(key)) == 1
    await other.aclose()


async def test_no_webhook_costs_a_request(key: str, prefect_api: PrefectServer, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(module, "LOOK_AFTER", 1.0)
    async with behind_a_proxy(prefect_api) as (proxy, forwarder):
        forwarder.start()
        for number in range(100):
            for which in ("task-first", "crew-first"):
                forwarder.put(event_about(f"{key}/{number}", which))
        await events_of(f"{key}/99")
        await until(lambda: proxy.count("/variables/filter"), "the records are read")
        await asyncio.sleep(1.5)
        posts = [request for request in proxy.requests if "POST" in request and "/events/filter" not in request]
        assert posts == ["POST /api/variables/filter"], "one look at all records, and this test's look at events"
        assert proxy.count("/events/in") == 1, "one connection"


async def test_an_end_while_prefect_is_away_is_reported(key: str, prefect_api: PrefectServer):
    async with behind_a_proxy(prefect_api) as (proxy, forwarder):
        forwarder.start()
        forwarder.put(event_about(f"{key}/before"))
        await events_of(f"{key}/before")
        proxy.cut()
        for number in range(3):
            forwarder.put(event_about(f"{key}/{number}"))
        assert len(forwarder.recent._kept) == 4, "who waits hears of it all the same"
        await asyncio.sleep(1)
        proxy.restore()
        for number in range(3):
            await events_of(f"{key}/{number}")
    assert not forwarder.has_unsent_events


async def test_memory_is_bounded_whatever_the_webhooks_hold(key: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(module, "REPORTS", 100)
    emitted = list[Any]()
    monkeypatch.setattr(module, "emit_event", lambda **fields: emitted.append(fields))
    with environment({"PREFECT_API_URL": f"http://127.0.0.1:{free_port()}/api"}):
        forwarder = Forwarder()
        for number in range(1000):
            output = "x" * (module.MAX_OUTPUT + number % 2)
            forwarder.put(event_about(f"{key}/{number}", "human_input-first", task_output=output))
            forwarder.put(event_about(key, "crew-first", execution_time=number))
        assert len(forwarder._notes) == module.NOTES
        assert len(forwarder._reported) <= 100
        assert len([fields for fields in emitted if fields["event"].endswith(".crew")]) < 20, "one URL, one event"
        assert all(event.output is None for event in forwarder._unseen.values()), "a note has it"
        await forwarder.aclose()


async def test_a_question_without_its_text_is_reported(key: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(module, "NOTES", 2)
    monkeypatch.setattr(module, "CLOSE_WITHIN", 0.1)
    emitted = list[str]()
    monkeypatch.setattr(module, "emit_event", lambda **fields: emitted.append(fields["payload"]["idempotency_key"]))
    with environment({"PREFECT_API_URL": f"http://127.0.0.1:{free_port()}/api"}):
        forwarder = Forwarder()
        for number in range(3):
            forwarder.put(event_about(f"{key}/{number}", "human_input-first"))
        woken = [webhook["idempotency_key"] for webhook in forwarder.recent._kept]
        assert (woken, emitted) == ([f"{key}/0"], [f"{key}/0"]), "there was no room for the first one"
        await forwarder.aclose()
        assert emitted == [f"{key}/{number}" for number in range(3)], "Prefect did not come back"


async def test_a_question_is_reported_once_readable(key: str, forwarder: Forwarder, monkeypatch: pytest.MonkeyPatch):
    genuine, kept = module.keep_output, list[int]()

    async def keep_slowly(*given: Any) -> None:
        await asyncio.sleep(0.3)
        kept.append(len(forwarder.recent._kept))
        if len(kept) == 1:
            raise TimeoutError  # it is tried again
        await genuine(*given)

    monkeypatch.setattr(module, "keep_output", keep_slowly)
    forwarder.put(event_about(key, "human_input-first"))
    await until(lambda: forwarder.recent._kept, "the question is reported")
    assert kept == [0, 0], "what is to be judged was kept before"
    await events_of(key)


async def test_a_question_while_prefect_is_away_is_kept(key: str, prefect_api: PrefectServer):
    async with behind_a_proxy(prefect_api) as (proxy, forwarder):
        proxy.cut()
        forwarder.put(question_of(key))
        forwarder.put(event_about(key, "human_input-first", task_output="a draft"))
        await asyncio.sleep(1)
        assert forwarder.report()["waiting"] == 2
        assert not forwarder.recent._kept
        proxy.restore()
        await until(lambda: forwarder.report()["waiting"] == 0, "both are stored")
        assert forwarder.recent._kept
    assert (await kept_questions(key))[key].task_id == "t"
    assert await kept_output(new_record(key), 0) == "a draft"


def question_of(flow: str) -> ReviewRequest:
    return ReviewRequest(id=flow, kickoff_id=flow, task_id="t", callback_url=SecretStr("https://x.example/r"))


async def test_a_forbidden_text_holds_up_nothing(
    key: str, forwarder: Forwarder, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    """The key of the receiver may write events, and no blocks."""

    error = httpx.HTTPStatusError("", request=httpx.Request("POST", "http://x"), response=httpx.Response(403))
    for keep in ("keep_output", "keep_question"):
        monkeypatch.setattr(module, keep, AsyncMock(side_effect=error))
    forwarder.put(event_about(key, "human_input-first"))
    forwarder.put(question_of(key))
    forwarder.put(event_about(key, "crew-first"))
    await events_of(key, at_least=2)
    await until(lambda: forwarder.report()["waiting"] == 0, "both are given up")
    assert caplog.text.count("could not be stored: HTTP 403") == 2


async def test_what_flows_ask_is_counted_as_webhooks_are(key: str, caplog: pytest.LogCaptureFixture):
    with environment({"PREFECT_API_URL": f"http://127.0.0.1:{free_port()}/api"}):
        forwarder = Forwarder()
        for number in range(module.NOTES + 2):
            forwarder.put(question_of(f"{key}/{number}"))
        report = forwarder.report()
        assert (report["waiting"], report["dropped"], forwarder.is_ready) == (module.NOTES, 2, False)
        await forwarder.aclose()
    assert f"{module.NOTES} questions. Answer them" in caplog.text


async def test_of_texts_the_latest_is_stored_once(key: str, forwarder: Forwarder, monkeypatch: pytest.MonkeyPatch):
    stored = list[str]()

    async def keep_slowly(_key: str, _attempt: int, _answers: int, text: str) -> None:
        await asyncio.sleep(0.2)
        stored.append(text)

    monkeypatch.setattr(module, "keep_output", keep_slowly)
    for text in ("first", "second", "third", "third"):
        forwarder.put(event_about(key, "human_input-first", task_output=text))
        await asyncio.sleep(0.01)
    await until(lambda: not forwarder._notes, "all texts are stored")
    forwarder.put(event_about(key, "human_input-first", task_output="third"))
    await until(lambda: not forwarder._notes, "it is seen to")
    assert stored == ["first", "third"]


async def test_an_unresolved_kickoff_needs_a_person(
    key: str, forwarder: Forwarder, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(module, "LOOK_AFTER", 0.1)
    await PrefectRecords().claim(new_record(key, phase=RecordPhase.UNCERTAIN, crew="no-such-block"))
    forwarder.put(event_about(key, meta={"idempotency_key": key}))
    await events_of(key)
    await until(lambda: "prefect-crew runs resolve" in caplog.text, "it is said")
    assert "no crew" in caplog.text
    assert forwarder.report()["resolved"] == 0


async def test_the_end_waits_for_no_prefect(
    key: str, prefect_api: PrefectServer, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(module, "CLOSE_WITHIN", 0.5)
    async with asyncio.timeout(30), behind_a_proxy(prefect_api) as (proxy, forwarder):
        forwarder.put(event_about(f"{key}/before"))
        await events_of(f"{key}/before")
        proxy.cut()
        forwarder.put(event_about(key))
        forwarder.put(question_of(key))
        await asyncio.wait_for(forwarder.aclose(), 10)
        assert forwarder.has_unsent_events
    assert "did not take all events" in caplog.text
    assert "1 questions. Answer them" in caplog.text
