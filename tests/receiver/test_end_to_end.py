"""Real webhooks of a real crew server, to a receiver on a port, as events on a real Prefect server."""

from __future__ import annotations

import asyncio
import json
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

THINK = [{"content": "think of {{ customer }}"}, {"tool": "search", "content": "x"}]
RESEARCH = {"agent": "Researcher", "seconds": 0.2, "output": "what was found about {{ customer }}", "steps": THINK}
WRITE = {"name": "write", "agent": "Writer", "seconds": 0.2, "output": "written for {{ customer }}", "human": True}
QUICK = WaitPolicy(initial=0.2, max_interval=0.5)


@pytest.mark.usefixtures("prefect_api")
@pytest.mark.parametrize(("generation", "faults"), [("first", []), ("later", ["webhook:double"])])
async def test_a_run_reports_each_question_and_its_end_once(
    generation: Any, faults: list[str], key: str, monkeypatch: pytest.MonkeyPatch
):
    spec = script(RESEARCH, WRITE, inputs=["customer"])
    monkeypatch.setenv("PREFECT_INTEGRATIONS_CREW_WEBHOOK_SECRET", SECRET)
    async with served(create_receiver(SECRET)) as url:
        monkeypatch.setenv("PREFECT_INTEGRATIONS_CREW_WEBHOOK_URL", url)
        with CrewServer(spec, generation=generation, faults=faults) as server:
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
