"""What each response format says of each state, and that our own client reads all of it."""

from __future__ import annotations

from typing import Any

import pytest

from prefect_crew.client._client import CrewClient
from prefect_crew.client.models import StopOutcome
from prefect_crew.states import CrewState
from support.servers import Serve
from support.waiting import until

SCRIPT = """
name: speaking
inputs: [kind, {name: tone, required: false, type: text, description: How it sounds., default: dry}]
tasks:
  - {name: one, agent: A, description: the first, output: "out: 1"}
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
AT_TWO = {"current_task": "two", "progress": {"completed_tasks": 1, "total_tasks": 3}}
TOOK = {"execution_time": "seconds"}
RESULT = {
    "output": "three",
    "tasks": [
        {"task_id": "one", "output": "out: 1", "agent": "A", **TOOK},
        {"task_id": "two", "output": "two", "agent": "B", **TOOK},
        {"task_id": "three", "output": "three", "agent": "C", **TOOK},
    ],
}
ONE = {"name": "one", "agent": "A", "description": "the first", "output": "out: 1"}
THREE = {"name": "three", "agent": "C", "description": None, "output": "three"}
MORE = {"result_json": {"answer": "42"}, "token_usage": {"total_tokens": 5}}
BODIES: dict[str, dict[str, dict[str, Any]]] = {
    "documented": {
        "slow": {"status": "running", **AT_TWO},
        "waiting": {"status": "Pending Human Input", **AT_TWO},
        "good": {"status": "completed", "result": RESULT, **TOOK},
        "bad": {"status": "error", "error": "it broke", **TOOK},
        "stop": {"status": "stopped", **TOOK},
    },
    "live": {
        "slow": {"state": "STARTED", "last_executed_task": ONE},
        "waiting": {"state": "PENDING_HUMAN_INPUT", "last_executed_task": ONE},
        "good": {"state": "SUCCESS", "result": "three", "result_json": {"answer": "42"}, "last_executed_task": THREE},
        "bad": {"state": "FAILED", "status": "it broke", "result": None},
        "stop": {"state": "REVOKED", "last_executed_task": ONE},
    },
    "union": {
        "slow": {"state": "STARTED", "status": "running", "last_executed_task": ONE, **AT_TWO},
        "waiting": {"state": "PENDING_HUMAN_INPUT", "task_id": "two", "task_output": "two", **AT_TWO},
        "good": {"state": "SUCCESS", "status": "completed", "result": "three", "output": "three", **MORE},
        "bad": {"state": "FAILED", "status": "error", "result": "it broke", "error": "it broke", **TOOK},
        "stop": {"state": "REVOKED", "status": "stopped", "error": None, **TOOK},
    },
}
"""Of "union", the parts that strict clients look for. tests/devserver/test_crewai.py has the rest of it."""


def timed(body: Any) -> Any:
    """Return a body with a word for each time that is one."""
    if isinstance(body, list):
        return [timed(item) for item in body]
    if not isinstance(body, dict):
        return body
    times = TOOK if body.get("execution_time", -1) >= 0 else {}
    return {name: timed(value) for name, value in body.items()} | times


@pytest.mark.parametrize("kind", STATES)
@pytest.mark.parametrize("response_format", BODIES)
async def test_our_client_reads_every_state(serve: Serve, response_format: str, kind: str) -> None:
    server, _ = serve(SCRIPT, response_format=response_format)
    before = CrewState.RUNNING if kind == "slow" else CrewState.WAITING
    async with CrewClient(server.url, server.token) as client:
        run = server.run(await client.kickoff({"kind": kind}))
        await until(lambda: run.state is before and len(run.tasks) == 1)
        if kind in ("good", "bad"):
            await client.resume(run.id, "two", "", True)
        if kind == "stop":
            await client.stop(run.id)
        await until(lambda: run.state is STATES[kind])
        status = await client.status(run.id)
    body, expected = timed(status.raw), BODIES[response_format][kind]
    assert body == (body | expected if response_format == "union" else expected)
    assert (status.state, status.known_state) == (STATES[kind], True)
    assert status.output == ("three" if kind == "good" else None)
    assert status.error == ("it broke" if kind == "bad" else None)
    assert status.human_task_id == ("two" if (kind, response_format) == ("waiting", "union") else None)


@pytest.mark.parametrize("response_format", BODIES)
async def test_our_client_reads_inputs_and_refusals(serve: Serve, response_format: str) -> None:
    server, _ = serve("echo", response_format=response_format)
    async with CrewClient(server.url, server.token) as client:
        ended = server.run(await client.kickoff({"text": "a"}))
        await until(lambda: ended.state is CrewState.COMPLETED)
        inputs = await client.inputs()
        unknown, nobody, late = await client.status("nobody"), await client.stop("nobody"), await client.stop(ended.id)
    assert unknown.state is CrewState.UNKNOWN
    assert nobody.outcome is StopOutcome.UNKNOWN_RUN
    assert (late.outcome, late.state) == (StopOutcome.NOT_STOPPABLE, CrewState.COMPLETED)
    assert [(item.name, item.required) for item in inputs] == [("text", True)]


def test_live_inputs_and_refusals(serve: Serve) -> None:
    _, client = serve(SCRIPT, response_format="live")
    tone = {"type": "text", "description": "How it sounds.", "default": "dry"}
    kind, *others = client.get("/inputs").json()["inputs"]
    assert kind["name"] == "kind"
    assert others == [{"name": "tone", "required": False, **tone}]
    refused = client.post("/kickoff", json={"inputs": {}})
    assert refused.json() == {"detail": "Missing required inputs: kind", "missing_inputs": ["kind"]}


async def test_a_queue_is_pending(serve: Serve) -> None:
    server, _ = serve("name: q\ntasks: [{name: t, seconds: 60}]", response_format="union", max_runs=1)
    async with CrewClient(server.url, server.token) as client:
        first, second = await client.kickoff({}), await client.kickoff({})
        await until(lambda: server.run(first).state is CrewState.RUNNING)
        assert (await client.status(second)).state is CrewState.PENDING
        await client.stop(first)
        await until(lambda: server.run(second).state is CrewState.RUNNING)
