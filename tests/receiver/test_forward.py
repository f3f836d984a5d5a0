"""What the receiver hands on, on a real Prefect server; at the end from the webhooks of a real crew server."""

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

from prefect_crew import WaitPolicy, arun_crew
from prefect_crew.blocks import crew_of
from prefect_crew.client.models import ReviewRequest
from prefect_crew.devserver import CrewServer
from prefect_crew.receiver import forward as module
from prefect_crew.receiver.app import create_receiver
from prefect_crew.receiver.events import WebhookEvent, read_events
from prefect_crew.receiver.forward import Forwarder
from prefect_crew.records.model import RecordPhase, claim_of, utcnow
from prefect_crew.records.notes import kept_note, kept_questions
from prefect_crew.records.store import PrefectRecords
from prefect_crew.runs.reviews.answer import resume_run
from prefect_crew.runs.run import LiveRun
from prefect_crew.webhooks import Hook
from support.prefect_server import PrefectServer, drain, environment, free_port
from support.proxy import Proxy
from support.records import new_record
from support.scripts import script
from support.webhooks import BODIES, SECRET, events_of, served, until

pytestmark = pytest.mark.usefixtures("prefect_api")


CLAIM = claim_of("owner")


def event_about(key: str, which: str = "crew-first", *, claim: str | None = None, **changes: Any) -> WebhookEvent:
    """Return a webhook about the first attempt at a key; `changes` are fields of its body."""
    kind: Any = which.partition("-")[0]
    hook = Hook(kind, key, utcnow() + timedelta(days=1), 1, claim=claim)
    return read_events(hook, json.dumps({**BODIES[which], **changes}).encode())[0]


def streamed(key: str, type_: str) -> WebhookEvent:
    return event_about(key, "stream", events=[{"type": type_, "id": str(uuid.uuid4()), "kickoff_id": "k-1"}])


def question_of(flow: str) -> ReviewRequest:
    return ReviewRequest(id=flow, kickoff_id=flow, task_id="t", callback_url=SecretStr("https://x.example/r"))


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


def woken_by(forwarder: Forwarder) -> list[str]:
    """Return the events of which the waiting processes hear, oldest first."""
    return [webhook["event"].removeprefix("crew.webhook.") for webhook in forwarder.recent._kept]


async def test_a_webhook_becomes_an_event_about_its_run(key: str, forwarder: Forwarder):
    event = event_about(key, "crew-later")
    own = str(uuid.uuid4())
    forwarder.put(replace(event, hook=replace(event.hook, crew="travel", step="research", flow_run_id=own)))
    (stored,) = await events_of(key)
    assert stored["event"] == "crew.webhook.crew"
    assert stored["resource"] == {
        "prefect.resource.id": f"prefect-crew.run.{key}/1",
        "prefect.resource.name": f"travel run {key}",
        "prefect-crew.idempotency-key": key,
        "prefect-crew.crew": "travel",
    }
    assert {related["prefect.resource.role"]: related["prefect.resource.id"] for related in stored["related"]} == {
        "crew": "prefect-crew.crew.travel",
        "step": "prefect-crew.step.research",
        "flow-run": f"prefect.flow-run.{own}",
    }
    assert stored["payload"]["said"]["kickoff_id"] == "k-1"
    assert stored["payload"].items() >= {"idempotency_key": key, "attempt": 1, "round": 0}.items()


async def test_ends_and_questions_are_one_event_each(key: str, forwarder: Forwarder):
    """However often they come, and to however many receivers."""
    question = event_about(key, "human_input-first", task_output=None)
    webhooks = [
        event_about(key, "task-first"),
        event_about(key, "step-first"),
        streamed(key, "crew_kickoff_completed"),
        streamed(key, "llm_call_completed"),
        *(event_about(key, execution_time=number) for number in range(5)),
        *(streamed(key, type_) for type_ in ("crew_kickoff_failed", "crew_kickoff_failed", "flow_finished")),
        question,
        question,
        replace(question, hook=replace(question.hook, round=1)),
    ]
    other = Forwarder()
    for webhook in webhooks:
        forwarder.put(webhook)
        other.put(webhook)
    await events_of(key, at_least=5)
    await asyncio.sleep(1.5)  # the server writes events down each second
    names = sorted(event["event"].removeprefix("crew.webhook.") for event in await events_of(key, at_least=5))
    assert names == ["crew", "human_input", "human_input", "stream.crew_kickoff_failed", "stream.flow_finished"]
    assert woken_by(forwarder).count("crew") == 5, "each wakes, and tells its tokens"
    assert "stream.crew_kickoff_completed" in woken_by(forwarder)
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
        assert woken_by(forwarder) == ["crew"] * 4, "who waits hears of it all the same"
        await asyncio.sleep(1)
        proxy.restore()
        for number in range(3):
            await events_of(f"{key}/{number}")
    assert not forwarder.has_unsent_events


async def test_memory_is_bounded_whatever_the_webhooks_hold(key: str, monkeypatch: pytest.MonkeyPatch, caplog: Any):
    monkeypatch.setattr(module, "REPORTS", 100)
    monkeypatch.setattr(module, "NOTES", 3)
    monkeypatch.setattr(module, "CLOSE_WITHIN", 0.1)
    emitted = list[str]()
    monkeypatch.setattr(module, "emit_event", lambda **fields: emitted.append(fields["payload"]["idempotency_key"]))
    with environment({"PREFECT_API_URL": f"http://127.0.0.1:{free_port()}/api"}):
        forwarder = Forwarder()
        for number in range(300):
            output = "x" * (module.MAX_OUTPUT + number % 2)  # each second one is too long
            forwarder.put(event_about(f"{key}/{number}", "human_input-first", task_output=output))
            forwarder.put(event_about(key, execution_time=number))
        forwarder.put(question_of(f"{key}/flow"))
        report = forwarder.report()
        assert report["waiting"] == 3
        assert report["dropped"] == 298
        assert not forwarder.is_ready
        assert len(forwarder._reported) <= 100
        assert emitted.count(key) < 10, "one URL, one event"
        assert all(event.output is None for event in forwarder._unseen.values()), "a note has it"
        questions = [f"{key}/{number}" for number in range(300)]
        assert {*questions} - {*emitted} == {f"{key}/298", f"{key}/299"}, "the others have no room, and are reported"
        await forwarder.aclose()
        assert {*questions} <= {*emitted}, "Prefect did not come back"
    assert "3 questions. Answer them" in caplog.text


async def test_a_question_is_reported_once_its_latest_text_is_stored(
    key: str, forwarder: Forwarder, monkeypatch: pytest.MonkeyPatch
):
    genuine, attempts = module.keep_note, list[tuple[str, int]]()

    async def keep_slowly(*facts: Any) -> None:
        await asyncio.sleep(0.2)
        attempts.append((facts[-1].output, len(forwarder.recent._kept)))
        if len(attempts) == 2:
            raise TimeoutError  # it is tried again
        await genuine(*facts)

    monkeypatch.setattr(module, "keep_note", keep_slowly)
    for text in ("first", "second", "third", "third"):
        forwarder.put(event_about(key, "human_input-first", task_output=text, claim=CLAIM))
        await asyncio.sleep(0.01)
    await until(lambda: len(forwarder.recent._kept) == 2, "both are reported")
    assert (await kept_note(new_record(key, owner="owner"), 0)).output == "third"
    forwarder.put(event_about(key, "human_input-first", task_output="third", claim=CLAIM))
    await until(lambda: len(forwarder.recent._kept) == 3, "it is seen to")
    assert attempts == [("first", 0), ("third", 1), ("third", 1)]


async def test_a_question_while_prefect_is_away_is_kept(key: str, prefect_api: PrefectServer):
    async with behind_a_proxy(prefect_api) as (proxy, forwarder):
        proxy.cut()
        forwarder.put(question_of(key))
        forwarder.put(event_about(key, "human_input-first", task_output="a draft", claim=CLAIM))
        await asyncio.sleep(1)
        assert forwarder.report()["waiting"] == 2
        assert woken_by(forwarder) == []
        proxy.restore()
        await until(lambda: forwarder.report()["waiting"] == 0, "both are stored")
        assert woken_by(forwarder) == ["human_input"]
    assert (await kept_questions(key))[key].task_id == "t"
    assert (await kept_note(new_record(key, owner="owner"), 0)).output == "a draft"


async def test_a_forbidden_text_holds_up_nothing(key: str, forwarder: Forwarder, monkeypatch: Any, caplog: Any):
    """The key of the receiver may write events, and no blocks."""
    error = httpx.HTTPStatusError("", request=httpx.Request("POST", "http://x"), response=httpx.Response(403))
    for keep in ("keep_note", "keep_question"):
        monkeypatch.setattr(module, keep, AsyncMock(side_effect=error))
    forwarder.put(event_about(key, "human_input-first", claim=CLAIM))
    forwarder.put(question_of(key))
    forwarder.put(event_about(key))
    await events_of(key, at_least=2)
    await until(lambda: forwarder.report()["waiting"] == 0, "both are given up")
    assert caplog.text.count("could not be stored: HTTP 403") == 2


async def test_an_unresolved_kickoff_needs_a_person(key: str, forwarder: Forwarder, caplog: Any, monkeypatch: Any):
    monkeypatch.setattr(module, "LOOK_AFTER", 0.1)
    await PrefectRecords().claim(new_record(key, phase=RecordPhase.UNCERTAIN, crew="no-such-block"))
    forwarder.put(event_about(key, meta={"idempotency_key": key}))
    await events_of(key)
    await until(lambda: "prefect-crew runs resolve" in caplog.text, "it is logged")
    assert "no crew" in caplog.text
    assert forwarder.report()["resolved"] == 0


# Of a run of a crew server

THINK = [{"content": "think of {{ customer }}"}, {"tool": "search", "content": "x"}]
RESEARCH = {"agent": "Researcher", "seconds": 0.2, "output": "what was found about {{ customer }}", "steps": THINK}
WRITE = {"name": "write", "agent": "Writer", "seconds": 0.2, "output": "written for {{ customer }}", "human": True}
QUICK = WaitPolicy(initial=0.2, max_interval=0.5)


@pytest.mark.parametrize("faults", [[], ["webhook:double"]], ids=["once", "twice"])
async def test_a_run_reports_each_question_and_its_end_once(
    faults: list[str], key: str, monkeypatch: pytest.MonkeyPatch
):
    spec = script(RESEARCH, WRITE, inputs=["customer"])
    monkeypatch.setenv("PREFECT_INTEGRATIONS_CREW_WEBHOOK_SECRET", SECRET)
    async with served(create_receiver(SECRET)) as url:
        monkeypatch.setenv("PREFECT_INTEGRATIONS_CREW_WEBHOOK_URL", url)
        with CrewServer(spec, faults=faults) as server:
            crew = server.crew(wait=QUICK, secret_inputs=["customer"])
            running = asyncio.create_task(arun_crew(crew, {"customer": "ACME"}, idempotency_key=key))
            for questions in (1, 2):
                events = await events_of(key, at_least=questions, prefix="crew.webhook.")
                run = LiveRun(crew_of(crew), events[-1]["payload"]["said"]["kickoff_id"])
                await resume_run(run, feedback="again", approve=questions == 2)
            result = await running
            assert result.output == "written for ACME"
            await asyncio.sleep(2 * len(faults))
            events = await events_of(key, at_least=3, prefix="crew.webhook.")
    assert [event["event"].rpartition(".")[2] for event in events] == ["human_input", "human_input", "crew"]
    assert [event["payload"]["round"] for event in events[:2]] == [0, 1]
    for event in events:
        assert event["resource"]["prefect-crew.idempotency-key"] == key
        assert event["payload"]["said"]["kickoff_id"] == result.kickoff_id
        assert {"crew", "flow-run"} <= {related["prefect.resource.role"] for related in event["related"]}
    assert "ACME" not in json.dumps(events)
