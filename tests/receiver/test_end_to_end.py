"""Real webhooks of a real crew server, to a receiver on a port, as events on a real Prefect server."""

from __future__ import annotations

import asyncio
import json
import uuid
from collections.abc import AsyncIterator
from typing import Any

import pytest

from prefect_crew import WaitPolicy, arun_crew
from prefect_crew.blocks import crew_of
from prefect_crew.devserver import CrewServer
from prefect_crew.receiver.app import create_receiver
from prefect_crew.runs.reviews.answer import resume_run
from prefect_crew.runs.run import LiveRun
from support.scripts import script
from support.webhooks import SECRET, events_of, served

pytestmark = pytest.mark.usefixtures("prefect_api")

THINK = [{"content": "think of {{ customer }}"}, {"tool": "search", "content": "x"}]
RESEARCH = {"agent": "Researcher", "seconds": 0.2, "output": "what was found about {{ customer }}", "steps": THINK}
WRITE = {"name": "write", "agent": "Writer", "seconds": 0.2, "output": "what was written for {{ customer }}"}
QUICK = WaitPolicy(initial=0.2, max_interval=0.5)


@pytest.fixture
def key() -> str:
    return f"end-to-end/{uuid.uuid4()}"


@pytest.fixture
async def receiver(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[str]:
    async with served(create_receiver(SECRET)) as url:
        monkeypatch.setenv("PREFECT_INTEGRATIONS_CREW_WEBHOOK_URL", url)
        monkeypatch.setenv("PREFECT_INTEGRATIONS_CREW_WEBHOOK_SECRET", SECRET)
        yield url


async def webhooks_of(key: str, *, at_least: int, named: str = "crew.webhook.") -> list[dict[str, Any]]:
    """Return the events about webhooks of a run, once there are so many."""
    wanted = at_least
    while True:
        events = await events_of(key, at_least=wanted)
        found = [dict(event) for event in events if event["event"].startswith(named)]
        if len(found) >= at_least:
            return found
        wanted = len(events) + 1


@pytest.mark.parametrize(("generation", "faults"), [("first", []), ("later", ["webhook:double"])])
async def test_a_run_tells_of_itself_once(generation: Any, faults: list[str], receiver: str, key: str):
    spec = script(RESEARCH, WRITE, inputs=["customer"])
    with CrewServer(spec, generation=generation, faults=faults) as server:
        result = await arun_crew(server.crew(wait=QUICK), {"customer": "ACME"}, idempotency_key=key)
        await asyncio.sleep(2 * len(faults))
        (event,) = await webhooks_of(key, at_least=1)
    assert event["event"] == "crew.webhook.crew"
    assert event["resource"]["prefect-crew.idempotency-key"] == key
    assert event["payload"]["said"]["kickoff_id"] == result.kickoff_id
    roles = {related["prefect.resource.role"] for related in event["related"]}
    assert {"crew", "flow-run"} <= roles
    assert "ACME" not in json.dumps(event)


async def test_a_repeated_question_is_reported_again_without_secrets(receiver: str, key: str):
    async def question(number: int) -> dict[str, Any]:
        """Return a question, counted from 1, once it is reported."""
        return (await webhooks_of(key, at_least=number, named="crew.webhook.human_input"))[-1]["payload"]

    with CrewServer(script(RESEARCH, {**WRITE, "human": True}, inputs=["customer"])) as server:
        crew = server.crew(wait=QUICK, secret_inputs=["customer"])
        running = asyncio.create_task(arun_crew(crew, {"customer": "ACME"}, idempotency_key=key))
        first = await question(1)
        await resume_run(LiveRun(crew_of(crew), first["said"]["kickoff_id"]), feedback="again", approve=False)
        second = await question(2)
        await resume_run(LiveRun(crew_of(crew), first["said"]["kickoff_id"]), feedback="", approve=True)
        assert (await running).output == "what was written for ACME"
        events = await webhooks_of(key, at_least=3)
    assert (first["round"], second["round"]) == (0, 1)
    assert first["said"] == second["said"] != {}
    assert [event["event"].rpartition(".")[2] for event in events] == ["human_input", "human_input", "crew"]
    assert "ACME" not in json.dumps(events)
