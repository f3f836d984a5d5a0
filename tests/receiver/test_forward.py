"""What the receiver hands on, on a real Prefect server."""

from __future__ import annotations

import asyncio
import json
import logging
import uuid
from collections.abc import AsyncIterator
from dataclasses import replace
from datetime import timedelta
from typing import Any

import httpx
import pytest
from pydantic import SecretStr

from prefect_crew.client.models import ReviewRequest
from prefect_crew.receiver import forward as module
from prefect_crew.receiver.events import WebhookEvent, read_events
from prefect_crew.receiver.forward import Forwarder
from prefect_crew.records.model import RecordPhase, RunRecord, utcnow
from prefect_crew.records.store import PrefectRecords
from prefect_crew.webhooks import Hook, WebhookKind
from support.prefect_server import PrefectServer, environment, free_port
from support.proxy import Proxy
from support.webhooks import BODIES, events_of, until

pytestmark = pytest.mark.usefixtures("prefect_api")


def event_about(
    idempotency_key: str, which: str = "crew-first", *, attempt: int | None = 1, **changes: Any
) -> WebhookEvent:
    kind: WebhookKind = which.partition("-")[0]  # pyright: ignore[reportAssignmentType]
    hook = Hook(kind, idempotency_key, utcnow() + timedelta(days=1), attempt)
    body = json.dumps({**BODIES[which], **changes}).encode()
    return read_events(hook, body)[0]


def record(idempotency_key: str, **fields: Any) -> RunRecord:
    known = {"attempt": 1, "phase": RecordPhase.STARTED, "kickoff_id": f"id-of-{idempotency_key}", "crew": "travel"}
    known |= {"crew_url": "https://travel.example.com", "inputs_digest": "d", "owner": "o", "claimed_at": utcnow()}
    known |= {"idempotency_key": idempotency_key, "step": "research", "flow_run_id": str(uuid.uuid4())}
    return RunRecord.model_validate(known | fields)


@pytest.fixture
def key() -> str:
    return f"forward/{uuid.uuid4()}"


@pytest.fixture
async def forwarder() -> AsyncIterator[Forwarder]:
    forwarder = Forwarder(limit=20)
    yield forwarder
    await forwarder.aclose()


@pytest.mark.parametrize("which", ["step-later", "human_input-first"])
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


async def test_no_webhook_costs_a_request_to_prefect_and_the_records_of_a_hundred_runs_are_read_at_once(
    key: str, prefect_api: PrefectServer, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(module, "LOOK_AFTER", 1.0)
    with Proxy(prefect_api.port) as proxy, environment({"PREFECT_API_URL": f"{proxy.url}/api"}):
        forwarder = Forwarder()
        for number in range(100):
            for which in ("task-first", "crew-first"):
                forwarder.put(event_about(f"{key}/{number}", which))
        await until(lambda: forwarder.report()["forwarded"] == 200, "all are forwarded")
        await until(lambda: proxy.count("/variables/filter"), "the records are read")
        await asyncio.sleep(1.5)
        assert proxy.count("/variables/filter") == 1
        assert proxy.count("POST /api/events") < 20
        await forwarder.aclose()


async def test_what_comes_while_prefect_is_away_waits_and_the_oldest_is_dropped(
    key: str, prefect_api: PrefectServer, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    monkeypatch.setattr(module, "ATTEMPT", 0.5)
    with Proxy(prefect_api.port) as proxy, environment({"PREFECT_API_URL": f"{proxy.url}/api"}):
        forwarder = Forwarder(limit=20)
        forwarder.put(event_about(key, "task-first"))
        await events_of(key)
        proxy.cut()
        with caplog.at_level(logging.INFO, "prefect_crew.receiver"):
            for number in range(30):
                forwarder.put(event_about(key, "crew-first", execution_time=number))
            await until(lambda: forwarder.report()["prefect"] == "away", "it is noticed that Prefect is away")
            report = forwarder.report()
            assert not forwarder.is_ready, "it is away, and the queue is full"
            assert (report["waiting"], report["dropped"]) == (20, 10)
            assert "webhooks wait" in caplog.text
            proxy.restore()
            events = await events_of(key, at_least=21)
        assert "takes events again" in caplog.text
        times = {event["payload"]["said"]["execution_time"] for event in events}
        assert times == {2.5, *range(10, 30)}, "the oldest went"
        assert forwarder.is_ready
        await forwarder.aclose()


async def test_memory_is_bounded_whatever_the_webhooks_hold(key: str):
    with environment({"PREFECT_API_URL": f"http://127.0.0.1:{free_port()}/api"}):
        forwarder = Forwarder(limit=10)
        for number in range(1000):
            output = "x" * (module.MAX_OUTPUT + number % 2)
            forwarder.put(event_about(f"{key}/{number}", "human_input-first", task_output=output))
        assert (len(forwarder._events), len(forwarder._notes)) == (10, module.NOTES)
        assert all(event.output is None for event in forwarder._events), "a note has it"
        await forwarder.aclose()


async def test_a_question_is_reported_when_what_it_asks_can_be_read(
    key: str, forwarder: Forwarder, monkeypatch: pytest.MonkeyPatch
):
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


def question_of(flow: str) -> ReviewRequest:
    return ReviewRequest(id=flow, kickoff_id=flow, task_id="t", callback_url=SecretStr("https://x.example/r"))


async def test_a_text_that_may_not_be_stored_holds_up_no_events(
    key: str, forwarder: Forwarder, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    """The key of the receiver may write events, and no blocks."""

    async def refuse(*_: Any) -> None:
        raise httpx.HTTPStatusError("", request=httpx.Request("POST", "http://x"), response=httpx.Response(403))

    monkeypatch.setattr(module, "keep_output", refuse)
    monkeypatch.setattr(module, "keep_question", refuse)
    forwarder.put(event_about(key, "human_input-first"))
    forwarder.put(question_of(key))
    forwarder.put(event_about(key, "crew-first"))
    await events_of(key, at_least=2)
    assert caplog.text.count("could not be stored: HTTP 403") == 2
    assert forwarder.report()["waiting"] == 0


async def test_what_flows_ask_is_counted_as_webhooks_are(
    key: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    with environment({"PREFECT_API_URL": f"http://127.0.0.1:{free_port()}/api"}):
        forwarder = Forwarder()
        for number in range(module.NOTES + 2):
            forwarder.put(question_of(f"{key}/{number}"))
        await until(lambda: forwarder.report()["prefect"] == "away", "it is noticed that Prefect is away")
        report = forwarder.report()
        assert (report["waiting"], report["dropped"], forwarder.is_ready) == (module.NOTES, 2, False)
        await forwarder.aclose()
    assert f"{module.NOTES} questions of Flows were not kept" in caplog.text


async def test_texts_that_keep_coming_hold_up_no_events_and_the_same_text_is_stored_once(
    key: str, monkeypatch: pytest.MonkeyPatch
):
    forwarder, stored = Forwarder(), list[str]()

    async def keep_slowly(key: str, *_: Any) -> None:
        stored.append(key)
        await asyncio.sleep(0.5)

    monkeypatch.setattr(module, "keep_output", keep_slowly)
    for number in range(2 * module.BATCH):
        forwarder.put(event_about(f"{key}/{number}", "human_input-first", task_output="a draft"))
    await until(lambda: forwarder.report()["forwarded"] >= module.BATCH, "a batch is forwarded")
    assert len(stored) < module.BATCH, "not after all the texts"
    await until(lambda: not forwarder._notes, "all texts are stored")
    forwarder.put(event_about(f"{key}/0", "human_input-first", task_output="a draft"))
    await until(lambda: not forwarder._notes, "it is seen to")
    assert stored.count(f"{key}/0") == 1
    await forwarder.aclose()


async def test_one_that_prefect_refuses_holds_up_no_other_and_fills_no_log(
    key: str, forwarder: Forwarder, caplog: pytest.LogCaptureFixture
):
    batch = [event_about(key, "step-first", content=str(number)) for number in range(5)]
    for number, event in enumerate(batch):
        forwarder.put(replace(event, said={"odd": object()}) if 0 < number < 4 else event)
    await events_of(key, at_least=2)
    await until(lambda: forwarder.report()["refused"] == 3, "they are counted")
    assert key in caplog.text
    assert caplog.text.count("Prefect refuses") == 1


async def test_what_nobody_expected_of_prefect_is_said_and_tried_again(
    key: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    genuine, asked = module.get_client, list[int]()

    def odd() -> Any:
        asked.append(1)
        if len(asked) == 1:
            raise RuntimeError("nobody expected this")
        return genuine()

    monkeypatch.setattr(module, "get_client", odd)
    forwarder = Forwarder()
    forwarder.put(event_about(key))
    await events_of(key)
    assert "nobody expected this" in caplog.text
    await forwarder.aclose()


async def test_a_kickoff_that_cannot_be_resolved_is_left_to_a_person(
    key: str, forwarder: Forwarder, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(module, "LOOK_AFTER", 0.1)
    await PrefectRecords().claim(record(key, phase=RecordPhase.UNCERTAIN, kickoff_id=None, crew="no-such-block"))
    forwarder.put(event_about(key, meta={"idempotency_key": key}))
    await events_of(key)
    await until(lambda: "prefect-crew runs resolve" in caplog.text, "it is said")
    assert "no crew" in caplog.text
    assert forwarder.report()["resolved"] == 0


async def test_the_end_waits_for_no_prefect_that_is_away(key: str, caplog: pytest.LogCaptureFixture):
    with environment({"PREFECT_API_URL": f"http://127.0.0.1:{free_port()}/api"}):
        forwarder = Forwarder()
        forwarder.put(event_about(key))
        await until(lambda: forwarder.report()["prefect"] == "away", "it is noticed that Prefect is away")
        await asyncio.wait_for(forwarder.aclose(), 20)
    assert "1 webhooks were not forwarded" in caplog.text
