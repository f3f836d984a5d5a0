"""What each response format says of each state, and that our own client reads all of it."""

from __future__ import annotations

from typing import Any

import pytest

from prefect_crew.client._client import CrewClient
from prefect_crew.client.models import CrewStatus, StopOutcome
from prefect_crew.devserver import CrewServer
from prefect_crew.states import CrewState
from support.servers import Serve
from support.waiting import until

SCRIPT = """
name: speaking
inputs: [kind, {name: tone, required: false, type: text, description: How it sounds., default: dry}]
tasks:
  - {name: one, agent: A, description: the first, output: "out: {{ kind }}"}
  - {name: two, agent: B, seconds: "{{ 60 if kind == 'slow' else 0 }}", output: two, data: {n: 1}, human: true}
  - {name: three, agent: C, output: "three", fail: "{% if kind == 'bad' %}it broke{% endif %}"}
data: {answer: "42"}
usage: {total_tokens: 5}
"""
STATES = {
    "slow": CrewState.RUNNING,
    "waiting": CrewState.WAITING,
    "good": CrewState.COMPLETED,
    "bad": CrewState.FAILED,
    "stop": CrewState.STOPPED,
}


async def reach(server: CrewServer, kind: str) -> tuple[CrewStatus, dict[str, Any]]:
    """Bring a run into the state that `kind` is about; return what the client makes of the body, and the body."""
    async with CrewClient(server.url, server.token) as client:
        id_ = await client.kickoff({"kind": kind})
        run = server.run(id_)
        before = CrewState.RUNNING if kind == "slow" else CrewState.WAITING
        await until(lambda: run.state is before and len(run.tasks) == 1)
        if kind in ("good", "bad"):
            await client.resume(id_, "two", "", True)
        if kind == "stop":
            await client.stop(id_)
        await until(lambda: run.state is STATES[kind])
        status = await client.status(id_)
        return status, status.raw


async def test_union(serve: Serve) -> None:
    """tests/devserver/test_crewai.py has the rest of it."""
    server, _ = serve(SCRIPT, response_format="union")
    _, body = await reach(server, "slow")
    assert (body["state"], body["status"], body["current_task"]) == ("STARTED", "running", "two")
    assert body["last_executed_task"]["output"] == "out: slow"
    _, body = await reach(server, "good")
    assert (body["state"], body["status"], body["result"], body["output"]) == ("SUCCESS", "completed", *["three"] * 2)
    assert (body["result_json"], body["token_usage"]) == ({"answer": "42"}, {"total_tokens": 5})
    _, body = await reach(server, "bad")
    assert (body["state"], body["result"], body["error"]) == ("FAILED", "it broke", "it broke")


async def test_live(serve: Serve) -> None:
    server, client = serve(SCRIPT, response_format="live")
    _, body = await reach(server, "slow")
    assert (body.keys(), body["state"]) == ({"state", "last_executed_task"}, "STARTED")
    _, body = await reach(server, "good")
    last = {"name": "three", "agent": "C", "description": None, "output": "three"}
    assert body == {"state": "SUCCESS", "result": "three", "result_json": {"answer": "42"}, "last_executed_task": last}
    _, body = await reach(server, "bad")
    assert body == {"state": "FAILED", "status": "it broke", "result": None}
    refused = client.post("/kickoff", json={"inputs": {}})
    assert refused.json() == {"detail": "Missing required inputs: kind", "missing_inputs": ["kind"]}


@pytest.mark.parametrize("response_format", ["documented", "union", "live"])
async def test_our_client_reads_every_state(serve: Serve, response_format: str) -> None:
    server, _ = serve(SCRIPT, response_format=response_format)
    for kind, state in STATES.items():
        status, _ = await reach(server, kind)
        assert (status.state, status.known_state) == (state, True)
        assert status.output == ("three" if kind == "good" else None)
        assert status.error == ("it broke" if kind == "bad" else None)
        assert status.human_task_id == ("two" if (kind, response_format) == ("waiting", "union") else None)
    async with CrewClient(server.url, server.token) as client:
        inputs = await client.inputs()
        unknown, nobody = await client.status("nobody"), await client.stop("nobody")
        late = await client.stop(server.runs[-1].id)
    assert (unknown.state, nobody.outcome) == (CrewState.UNKNOWN, StopOutcome.UNKNOWN_RUN)
    assert (late.outcome, late.state) == (StopOutcome.NOT_STOPPABLE, CrewState.STOPPED)
    assert [(item.name, item.required) for item in inputs] == [("kind", True), ("tone", False)]
    if response_format == "live":
        tone = {"type": "text", "description": "How it sounds.", "default": "dry"}
        assert inputs[1].model_dump() == {"name": "tone", "required": False, **tone}


async def test_a_queue_is_pending(serve: Serve) -> None:
    server, _ = serve("name: q\ntasks: [{name: t, seconds: 60}]", response_format="union", max_runs=1)
    async with CrewClient(server.url, server.token) as client:
        first, second = await client.kickoff({}), await client.kickoff({})
        await until(lambda: server.run(first).state is CrewState.RUNNING)
        assert (await client.status(second)).state is CrewState.PENDING
        await client.stop(first)
        await until(lambda: server.run(second).state is CrewState.RUNNING)
