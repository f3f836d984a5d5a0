"""What the dialects say of each state, and that our own client reads all of it."""

from __future__ import annotations

import asyncio
from typing import Any

import httpx
import pytest

from prefect_crew.client._client import CrewClient
from prefect_crew.client.models import CrewStatus
from prefect_crew.devserver import CrewServer, InProcessCrewServer
from prefect_crew.devserver.response_formats import dialect_named
from prefect_crew.states import CrewState

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
DIALECTS = ["documented", "union", "live"]


async def reach(server: InProcessCrewServer, kind: str) -> tuple[CrewStatus, dict[str, Any]]:
    """Bring a run into the state that `kind` is about; return what the client makes of the body, and the body."""
    async with CrewClient(server.url, server.token) as client:
        id_ = await client.kickoff({"kind": kind})
        status = await client.status(id_)
        if kind in ("good", "bad"):
            while status.state is not CrewState.WAITING:
                await asyncio.sleep(0.01)
                status = await client.status(id_)
            await client.resume(id_, "two", "", True)
        if kind == "stop":
            await client.stop(id_)
        wanted = {"slow": 1, "waiting": 1}.get(kind, 0)
        while not (status.state.ended or (wanted and len(server.run(id_).tasks) == wanted)):
            await asyncio.sleep(0.01)
            status = await client.status(id_)
        if kind == "waiting":
            while server.run(id_).state is not CrewState.WAITING:
                await asyncio.sleep(0.01)
        status = await client.status(id_)
        return status, status.raw


async def test_union() -> None:
    with InProcessCrewServer(SCRIPT, dialect="union") as server:
        status, body = await reach(server, "slow")
        assert (body["state"], body["status"], body["current_task"]) == ("STARTED", "running", "two")
        assert body["progress"] == {"completed_tasks": 1, "total_tasks": 3}
        assert body["last_executed_task"]["output"] == "out: slow"
        assert (status.state, status.current_task) == (CrewState.RUNNING, "two")

        status, body = await reach(server, "waiting")
        assert (body["state"], body["task_id"]) == ("PENDING_HUMAN_INPUT", "two")
        assert (status.state, status.human_task_id) == (CrewState.WAITING, "two")

        status, body = await reach(server, "good")
        assert (body["state"], body["status"], body["result"]) == ("SUCCESS", "completed", "three")
        assert body["result_json"] == {"answer": "42"}
        assert body["output"] == "three"
        assert [task["name"] for task in body["tasks"]] == ["one", "two", "three"]
        assert body["token_usage"] == {"total_tokens": 5}
        assert body["last_step"]
        assert body["execution_time"] >= 0
        result = status.result()
        assert (result.output, result.data, result.usage and result.usage.total_tokens) == (
            "three",
            {"answer": "42"},
            5,
        )
        assert [task.agent for task in result.tasks] == ["A", "B", "C"]

        status, body = await reach(server, "bad")
        assert (body["state"], body["result"], body["error"]) == ("FAILED", "it broke", "it broke")
        assert (status.state, status.error) == (CrewState.FAILED, "it broke")

        status, body = await reach(server, "stop")
        assert body["state"] == "REVOKED"
        assert status.state is CrewState.STOPPED


async def test_live() -> None:
    with InProcessCrewServer(SCRIPT, dialect="live") as server:
        _, body = await reach(server, "slow")
        assert body.keys() == {"state", "last_executed_task"}
        assert body["state"] == "STARTED"

        status, body = await reach(server, "good")
        assert body == {"state": "SUCCESS", "result": "three", "result_json": {"answer": "42"}}
        assert status.result().data == {"answer": "42"}

        status, body = await reach(server, "bad")
        assert body == {"state": "FAILED", "status": "it broke", "result": None}
        assert (status.state, status.error) == (CrewState.FAILED, "it broke")

        async with CrewClient(server.url, server.token) as client:
            assert (await client.status("nobody")).state is CrewState.UNKNOWN


@pytest.mark.parametrize("dialect", DIALECTS)
@pytest.mark.parametrize(
    ("kind", "state"),
    [
        ("slow", CrewState.RUNNING),
        ("waiting", CrewState.WAITING),
        ("good", CrewState.COMPLETED),
        ("bad", CrewState.FAILED),
        ("stop", CrewState.STOPPED),
    ],
)
async def test_our_client_reads_every_state(dialect: str, kind: str, state: CrewState) -> None:
    with InProcessCrewServer(SCRIPT, dialect=dialect) as server:
        status, _ = await reach(server, kind)
    assert status.state is state
    assert status.known_state
    if state is CrewState.COMPLETED:
        assert status.output == "three"
    if state is CrewState.FAILED:
        assert status.error == "it broke"


@pytest.mark.parametrize("dialect", DIALECTS)
async def test_inputs(dialect: str) -> None:
    with InProcessCrewServer(SCRIPT, dialect=dialect) as server:
        async with CrewClient(server.url, server.token) as client:
            inputs = await client.inputs()
    assert [(item.name, item.required) for item in inputs] == [("kind", True), ("tone", False)]
    if dialect == "live":
        assert inputs[1].model_dump() == {
            "name": "tone",
            "type": "text",
            "description": "How it sounds.",
            "required": False,
            "default": "dry",
        }


@pytest.mark.parametrize("dialect", ["documented", "union"])
def test_inputs_are_answered_as_names(dialect: str) -> None:
    with CrewServer(SCRIPT, dialect=dialect) as server:
        answer = httpx.get(f"{server.url}/inputs", headers=server.headers)
    assert answer.json() == {"inputs": ["kind", "tone"], "required_inputs": ["kind"]}


async def test_a_queue_is_pending() -> None:
    script = "name: q\ntasks: [{name: t, seconds: 60}]"
    with InProcessCrewServer(script, dialect="union", max_runs=1) as server:
        async with CrewClient(server.url, server.token) as client:
            first, second = await client.kickoff({}), await client.kickoff({})
            while (await client.status(first)).state is not CrewState.RUNNING:
                await asyncio.sleep(0.01)
            assert (await client.status(second)).state is CrewState.PENDING
            await client.stop(first)
            while (await client.status(second)).state is not CrewState.RUNNING:
                await asyncio.sleep(0.01)


def test_an_unknown_dialect() -> None:
    with pytest.raises(ValueError, match=r"There is no dialect 'x'\. Dialects: documented, union, live\."):
        dialect_named("x")
