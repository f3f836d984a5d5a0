"""What the receiver hands on, on a real Prefect server."""

from __future__ import annotations

import asyncio
import json
import logging
import uuid
from collections.abc import AsyncIterator, Sequence
from datetime import timedelta
from typing import Any

import pytest

from prefect_crew.client._parsing import WebhookKind, parse_webhook
from prefect_crew.receiver import events as events_module
from prefect_crew.receiver import forward as module
from prefect_crew.receiver.events import News, RecordCache, digest_of, news_of
from prefect_crew.receiver.forward import Handover
from prefect_crew.records.model import RecordPhase, RunRecord, utcnow
from prefect_crew.records.store import PrefectRecords
from prefect_crew.webhooks import Hook
from support.prefect_server import PrefectServer, environment, free_port
from support.proxy import Proxy
from support.webhooks import BODIES, events_of, until

pytestmark = pytest.mark.usefixtures("prefect_api")


def news_about(idempotency_key: str, which: str = "crew-first", *, attempt: int | None = 1, **changes: Any) -> News:
    kind: WebhookKind = which.partition("-")[0]  # pyright: ignore[reportAssignmentType]
    hook = Hook(kind, idempotency_key, utcnow() + timedelta(days=1), attempt)
    body = json.dumps({**BODIES[which], **changes}).encode()
    return news_of(hook, parse_webhook(kind, body), digest=digest_of(hook, body), received=utcnow())[0]


def record(idempotency_key: str, **fields: Any) -> RunRecord:
    now = utcnow()
    known = {
        "idempotency_key": idempotency_key,
        "attempt": 1,
        "phase": RecordPhase.STARTED,
        "kickoff_id": f"id-of-{idempotency_key}",
        "crew": "travel",
        "crew_url": "https://travel.example.com",
        "inputs_digest": "d",
        "owner": "o",
        "claimed_at": now,
        "step": "research",
        "flow_run_id": str(uuid.uuid4()),
    }
    return RunRecord.model_validate(known | fields)


@pytest.fixture
def key() -> str:
    return f"handover/{uuid.uuid4()}"


@pytest.fixture
async def hand_on() -> AsyncIterator[Handover]:
    handover = Handover(limit=20)
    yield handover
    await handover.aclose()


@pytest.mark.parametrize("which", ["task-first", "step-later", "crew-later", "human_input-first"])
async def test_a_webhook_becomes_an_event_about_its_run(which: str, key: str, hand_on: Handover):
    known = record(key)
    assert await PrefectRecords().claim(known)
    hand_on.put(news_about(key, which))
    (event,) = await events_of(key)
    assert event["event"] == f"crew.webhook.{which.partition('-')[0]}"
    assert event["resource"] == {
        "prefect.resource.id": f"prefect-crew.run.id-of-{key}",
        "prefect.resource.name": f"travel run id-of-{key}",
        "prefect-crew.run-key": key,
        "prefect-crew.crew": "travel",
    }
    related = {one["prefect.resource.role"]: one["prefect.resource.id"] for one in event["related"]}
    assert related == {
        "crew": "prefect-crew.crew.travel",
        "step": "prefect-crew.step.research",
        "flow-run": f"prefect.flow-run.{known.flow_run_id}",
    }
    payload = event["payload"]
    assert payload["said"]["kickoff_id"] == "k-1"
    assert (payload["idempotency_key"], payload["kickoff_id"], payload["attempt"]) == (key, f"id-of-{key}", 1)


async def test_without_a_record_the_event_is_about_the_idempotency_key(key: str, hand_on: Handover):
    hand_on.put(news_about(key, attempt=None))
    (event,) = await events_of(key)
    assert event["resource"]["prefect.resource.id"] == f"prefect-crew.run.{key}"
    assert event["payload"]["kickoff_id"] is None
    assert event["related"] == []


async def test_the_attempt_of_the_url_chooses_among_records(key: str, hand_on: Handover):
    for attempt in (1, 2):
        assert await PrefectRecords().claim(record(key, attempt=attempt, kickoff_id=f"{key}-{attempt}"))
    for attempt in (1, 2, None):
        hand_on.put(news_about(key, "task-first", attempt=attempt, task_id=str(attempt)))
    events = await events_of(key, at_least=3)
    found = {event["payload"]["said"]["task_id"]: event["payload"]["kickoff_id"] for event in events}
    assert found == {"1": f"{key}-1", "2": f"{key}-2", "None": f"{key}-2"}


async def test_the_same_news_twice_is_one_event(key: str, hand_on: Handover):
    news = news_about(key)
    hand_on.put(news)
    await events_of(key)
    hand_on.put(news)
    hand_on.put(news_about(key, "task-first"))
    await events_of(key, at_least=2)
    await until(lambda: hand_on.report()["handed_on"] == 3, "all are handed on")
    await asyncio.sleep(2)  # the server writes events down once a second
    assert len(await events_of(key, at_least=2)) == 2


async def test_what_comes_while_prefect_is_away_waits_and_steps_go_first(
    key: str, prefect_api: PrefectServer, caplog: pytest.LogCaptureFixture
):
    with environment({"PREFECT_API_URL": f"http://127.0.0.1:{free_port()}/api"}):
        handover = Handover(limit=20)
        with caplog.at_level(logging.INFO, "prefect_crew.receiver"):
            for number in range(30):
                handover.put(news_about(key, "step-first", content=str(number)))
                if number < 15:
                    handover.put(news_about(key, "crew-first", execution_time=number))
            await until(lambda: handover.report()["prefect"] == "away", "it is noticed that Prefect is away")
            report = handover.report()
            assert not handover.ready, "it is away, and the queue is full"
            assert (report["waiting"], report["shed"]) == (20, {"step": 25})
        assert "webhooks wait" in caplog.text
    # Prefect is back: its settings are read anew.
    await until(lambda: handover.report()["waiting"] == 0, "all is handed on")
    events = await events_of(key, at_least=20)
    assert sum(event["event"] == "crew.webhook.crew" for event in events) == 15
    assert handover.ready
    await handover.aclose()


async def test_what_comes_while_the_connection_is_cut_waits(
    key: str, prefect_api: PrefectServer, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(module, "ATTEMPT", 0.5)
    with Proxy(prefect_api.port) as proxy, environment({"PREFECT_API_URL": f"{proxy.url}/api"}):
        handover = Handover()
        handover.put(news_about(key, "task-first"))
        await events_of(key)
        proxy.cut()
        for number in range(5):
            handover.put(news_about(key, "crew-first", execution_time=number))
        await until(lambda: handover.report()["prefect"] == "away", "it is noticed that Prefect is away")
        assert handover.report()["waiting"] == 5
        proxy.restore()
        assert len(await events_of(key, at_least=6)) == 6
        await handover.aclose()


async def test_what_is_to_be_judged_is_kept_once_also_if_the_rest_is_tried_again(
    key: str, monkeypatch: pytest.MonkeyPatch
):
    genuine, begun, kept = module.keep_output, list[str](), list[str]()

    async def keep(idempotency_key: str, attempt: int, answers: int, output: str) -> None:
        begun.append(idempotency_key)
        if len(begun) == 5:
            await asyncio.Event().wait()
        await genuine(idempotency_key, attempt, answers, output)
        kept.append(idempotency_key)

    monkeypatch.setattr(module, "keep_output", keep)
    monkeypatch.setattr(module, "ATTEMPT", 5.0)
    handover = Handover()
    for number in range(10):
        for task in ("one", "two"):
            handover._queue.put(news_about(f"{key}/{number}", "human_input-first", task_id=task))
    handover.start()
    await until(lambda: handover.report()["handed_on"] == 20, "all are handed on", seconds=60)
    assert sorted(kept) == [f"{key}/{number}" for number in range(10)]
    await handover.aclose()


async def test_one_that_prefect_refuses_holds_up_no_other(
    key: str, hand_on: Handover, caplog: pytest.LogCaptureFixture
):
    batch = [news_about(key, "step-first", content=str(number)) for number in range(3)]
    odd = News(**{**vars(batch[0]), "said": {"odd": object()}})
    for news in (batch[0], odd, batch[2]):
        hand_on.put(news)
    await events_of(key, at_least=2)
    await until(lambda: hand_on.report()["refused"] == 1, "it is counted")
    assert key in caplog.text


async def test_refusals_fill_no_log(key: str, hand_on: Handover, caplog: pytest.LogCaptureFixture):
    plain = news_about(key)
    for number in range(15):
        hand_on.put(News(**{**vars(plain), "id": uuid.uuid4(), "said": {"odd": object(), "number": number}}))
    await until(lambda: hand_on.report()["refused"] == 15, "all are refused")
    assert caplog.text.count("is no event") == module.LOGGED


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
    handover = Handover()
    handover.put(news_about(key))
    await events_of(key)
    assert "nobody expected this" in caplog.text
    await handover.aclose()


async def test_a_kickoff_that_cannot_be_resolved_is_left_to_a_person(
    key: str, hand_on: Handover, caplog: pytest.LogCaptureFixture
):
    await PrefectRecords().claim(record(key, phase=RecordPhase.UNCERTAIN, kickoff_id=None, crew="no-such-block"))
    hand_on.put(news_about(key, meta={"idempotency_key": key}))
    await events_of(key)
    await until(lambda: "prefect-crew runs resolve" in caplog.text, "it is said")
    assert "no crew" in caplog.text
    assert hand_on.report()["resolved"] == 0


async def test_the_end_hands_on_what_is_left(key: str):
    handover = Handover()
    for number in range(5):
        handover.put(news_about(key, "task-first", task_id=str(number)))
    await handover.aclose()
    assert not handover.ready
    assert handover.report()["waiting"] == 0
    assert len(await events_of(key, at_least=5)) == 5


async def test_the_end_waits_for_no_prefect_that_is_away(key: str, caplog: pytest.LogCaptureFixture):
    with environment({"PREFECT_API_URL": f"http://127.0.0.1:{free_port()}/api"}):
        handover = Handover()
        handover.put(news_about(key))
        await until(lambda: handover.report()["prefect"] == "away", "it is noticed that Prefect is away")
        await asyncio.wait_for(handover.aclose(), 20)
    assert "1 webhooks were not handed on" in caplog.text


async def test_one_that_was_never_used_ends(caplog: pytest.LogCaptureFixture):
    handover = Handover()
    assert handover.report()["prefect"] == "not asked yet"
    await handover.aclose()
    handover.start()
    assert not handover.ready


class Counted(PrefectRecords):
    def __init__(self) -> None:
        self.asked: list[str] = []

    async def attempts(self, idempotency_key: str) -> Sequence[RunRecord]:
        self.asked.append(idempotency_key)
        return await super().attempts(idempotency_key)


async def test_a_record_is_asked_for_once_until_something_may_have_changed(key: str, monkeypatch: pytest.MonkeyPatch):
    records, now = Counted(), [0.0]
    monkeypatch.setattr(events_module, "monotonic", lambda: now[0])
    cache = RecordCache(records)

    async def phase() -> RecordPhase | None:
        found = (await cache.find([news_about(key)]))[key, 1]
        return found.phase if found else None

    assert await phase() is await phase() is None
    assert len(records.asked) == 1
    claimed = record(key, phase=RecordPhase.CLAIMED, kickoff_id=None)
    await records.claim(claimed)
    now[0] += 50
    assert await phase() is None
    now[0] += 20
    assert await phase() is await phase() is RecordPhase.CLAIMED
    assert len(records.asked) == 2
    claimed.phase, claimed.kickoff_id = RecordPhase.STARTED, "k"
    await records.save(claimed)
    now[0] += 2
    assert await phase() is RecordPhase.STARTED
    now[0] += 500
    assert await phase() is RecordPhase.STARTED
    assert len(records.asked) == 3
    cache.forget(key, 1)
    await phase()
    assert len(records.asked) == 4


async def test_what_is_remembered_of_records_is_bounded(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(events_module, "HELD", 3)
    cache = RecordCache(PrefectRecords())
    await cache.find([news_about(f"none/{number}") for number in range(10)])
    assert len(cache) == 3
