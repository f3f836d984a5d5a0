"""Flow runs that died over a run: set to Crashed by whoever goes on with it, where that they are dead is known."""

import subprocess
import sys
import uuid
from datetime import timedelta
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from prefect import flow, get_client, runtime
from prefect.client.schemas.objects import FlowRun
from prefect.flows import Flow
from prefect.states import Paused, Pending, Running, Scheduled, Suspended

from prefect_crew import arun_batch, arun_crew
from prefect_crew._internal.clock import utcnow
from prefect_crew.runs.database import in_store
from prefect_crew.runs.owners import crash_dead_owner, this_process
from prefect_crew.store.attempts import of_key
from prefect_crew.store.batches import get_batch
from prefect_crew.testing import CrewServerFactory
from support.prefect_server import PrefectServer
from support.processes import Process
from support.scripts import slow
from support.waiting import until

pytestmark = pytest.mark.usefixtures("prefect_api", "instant_polling")

SCRIPT = """
import sys
from prefect_crew import DeployedCrew, run_crew

run_crew(DeployedCrew(url=sys.argv[1], token=sys.argv[2]), {"n": 1}, idempotency_key=sys.argv[3])
"""


async def flow_run(run_id: str | None) -> FlowRun:
    assert run_id is not None
    async with get_client() as client:
        return await client.read_flow_run(uuid.UUID(run_id))


async def begun(state: Any = None) -> FlowRun:
    """Make a flow run that is in its first attempt."""
    async with get_client() as client:
        made = await client.create_flow_run(Flow(fn=begun, name="somebody"))
        await client.set_flow_run_state(made.id, Running())
        if state is not None:
            await client.set_flow_run_state(made.id, state)
        return await client.read_flow_run(made.id)


@cache
def gone() -> str:
    """Return the name of a process that was here and is gone."""
    with subprocess.Popen(["true"]) as process:
        process.wait()
    return f"{str(this_process()).rpartition(' ')[0]} {process.pid}"


async def crash(owner: FlowRun, **facts: Any) -> None:
    """Do what a call does that finds a run which this flow run began just now, with a process that has ended."""
    known = {"flow_run_count": owner.run_count, "process": gone(), "since": utcnow().timestamp()}
    await crash_dead_owner(str(owner.id), **known | facts)


@pytest.mark.programs
async def test_a_killed_scripts_flow_run_crashes(
    crew_server: CrewServerFactory, prefect_api: PrefectServer, tmp_path: Path
):
    server, idempotency_key = crew_server(slow(8)), str(uuid.uuid4())
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    command = [sys.executable, script, server.url, server.token, idempotency_key]

    async def kicked_off() -> bool:
        return any(attempt.kickoff_id for attempt in await in_store(of_key, idempotency_key))

    with Process(command, log=tmp_path / "log", env=prefect_api.env(home=tmp_path)) as process:
        await until(kicked_off)
        process.kill()
    (before,) = await in_store(of_key, idempotency_key)
    assert (await flow_run(before.flow_run_id)).state_name == "Running"
    await arun_crew(server.crew(), {"n": 1}, idempotency_key=idempotency_key)
    state = (await flow_run(before.flow_run_id)).state
    assert state is not None
    assert state.is_crashed()
    assert "Its process ended. Its crew's run continues with flow run" in str(state.message)
    assert server.kickoffs == 1


BATCH = """
import sys
from prefect_crew import DeployedCrew, run_batch

url, token, name, export = sys.argv[1:]
run_batch(DeployedCrew(url=url, token=token), [{"n": 1}], name=name, export=export)
"""


@pytest.mark.programs
async def test_a_killed_batchs_flow_run_crashes(
    crew_server: CrewServerFactory, prefect_api: PrefectServer, tmp_path: Path
):
    server, name, export = crew_server(slow(5)), str(uuid.uuid4()), str(tmp_path / "out.jsonl")
    command = [sys.executable, "-c", BATCH, server.url, server.token, name, export]
    with Process(command, log=tmp_path / "log", env=prefect_api.env(home=tmp_path)) as process:
        await until(lambda: server.requests["status"], "the row is waited for")
        process.kill()
    batch = await in_store(get_batch, name)
    assert batch is not None
    before = batch.flow_run_id
    assert (await flow_run(before)).state_name == "Running"
    report = await arun_batch(server.crew(), [{"n": 1}], name=name, export=export)
    assert report.completed == 1
    state = (await flow_run(before)).state
    assert state is not None
    assert state.is_crashed()
    assert "Its process ended. Its batch continues with flow run" in str(state.message)


async def test_a_flow_run_that_may_live_is_left_alone():
    running, paused = await begun(), await begun(Paused())
    cases = {
        "its process runs": (running, {"process": this_process()}),
        "its process is on another machine": (running, {"process": "elsewhere/boot/pid:[1] 7 7"}),
        "its process is not known": (running, {"process": None}),
        "it was begun again since": (running, {"flow_run_count": running.run_count - 1}),
        "it is paused": (paused, dict[str, Any]()),
    }
    for case, (owner, facts) in cases.items():
        await crash(owner, **facts)
        state = (await flow_run(str(owner.id))).state
        assert state is not None
        assert not state.is_final(), case


async def test_a_resumed_flow_run_is_left_alone():
    """Another process goes on with it, and the suspension before says nothing about that process."""
    first = await begun()
    async with get_client() as client:
        for state in (Suspended(timeout_seconds=300), Scheduled(name="Resuming"), Pending(), Running()):
            # The server suspends none that has no deployment.
            await client.set_flow_run_state(first.id, state, force=True)
    now = await flow_run(str(first.id))
    for count in (first.run_count, now.run_count):
        assert first.start_time is not None
        await crash(first, flow_run_count=count, since=first.start_time.timestamp())
        assert (await flow_run(str(first.id))).state_name == "Running", count
    await crash(now, since=(utcnow() + timedelta(hours=1)).timestamp())
    assert (await flow_run(str(now.id))).state_name == "Crashed"


async def test_ones_own_flow_run_never_crashes():
    @flow
    async def trip() -> None:
        await crash(await flow_run(str(runtime.flow_run.id)))

    state = await trip(return_state=True)
    assert state.is_completed()
