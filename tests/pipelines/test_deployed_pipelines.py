"""A pipeline as a deployment: plain values, loaded by their import path and run as a crew worker runs them."""

from __future__ import annotations

import asyncio
import importlib
import sqlite3
import uuid
from collections.abc import Callable
from contextlib import closing
from typing import Any, cast

import pytest
from prefect.blocks.system import Secret
from prefect.client.orchestration import get_client
from prefect.flow_engine import run_flow_async

from prefect_crew import ConfigurationError, PipelineFailedError, run_deployed_pipeline
from prefect_crew.devserver import CrewServer
from prefect_crew.testing import CrewServerFactory
from support.prefect_server import PrefectServer, drain
from support.scripts import script
from support.seen import Seen

pytestmark = pytest.mark.usefixtures("prefect_api", "instant_polling")

ECHO = script({"output": "on {{ text }}"}, inputs=["text"])
LOGIN = script({"name": "log in", "output": "logged in with {{ password }}"}, inputs=["password"])
FAILS = script({"fail": "no idea"}, inputs=["text"])
SaveCrew = Callable[..., tuple[str, CrewServer]]


@pytest.fixture
def save(crew_server: CrewServerFactory) -> SaveCrew:
    def saved(spec: Any = ECHO, **fields: Any) -> tuple[str, CrewServer]:
        server, name = crew_server(spec), f"crew-{uuid.uuid4().hex[:8]}"
        block: Any = server.crew(**fields)
        block.save(name, _sync=True)
        return name, server

    return saved


def pipeline_of(crew: str, **more: Any) -> dict[str, Any]:
    steps = [
        {"name": "research", "crew": crew, "inputs": {"text": "{{ topic }}"}},
        {"name": "write", "crew": crew, "inputs": {"text": "{{ research.output }} for {{ audience }}"}},
    ]
    inputs = {"topic": None, "audience": {"default": "everyone"}}
    return {"name": f"report-{uuid.uuid4().hex[:8]}", "inputs": inputs, "steps": steps, **more}


async def run_as_a_worker(entrypoint: str, parameters: dict[str, Any]) -> Any:
    """Run a flow run in this process, by the import path of its flow, as a worker of a pool of the type `crew` does."""
    module, _, name = entrypoint.rpartition(".")
    flow = getattr(importlib.import_module(module), name)
    async with get_client() as client:
        flow_run = await client.create_flow_run(flow, parameters=parameters)
        flow_run = await client.read_flow_run(flow_run.id)  # with its parameters as they are stored
    state = await run_flow_async(flow, flow_run=flow_run, parameters=flow_run.parameters, return_type="state")
    return flow_run.id, state


async def test_a_pipeline_runs_from_plain_values(save: SaveCrew, seen: Seen):
    crew, server = save()
    pipeline = pipeline_of(crew)
    run_id, state = await run_as_a_worker(
        "prefect_crew.run_deployed_pipeline", {"pipeline": pipeline, "inputs": {"topic": "tea"}}
    )
    result = await state.result()
    assert result["write"].output == "on on tea for everyone"
    assert server.kickoffs == 2
    run = seen.flow_run(run_id)
    assert (run["name"], run["state_type"]) == (f"{pipeline['name']} · tea", "COMPLETED")


async def test_steps_take_what_a_crew_step_takes(save: SaveCrew):
    crew, _ = save()
    slow, server = save(script({"seconds": 60, "output": "late"}, inputs=["text"]))
    steps = [
        {"name": "first", "crew": crew, "inputs": {"text": "x"}},
        {"name": "second", "crew": slow, "inputs": {"text": "y"}, "after": ["first"], "wait": {"timeout": 0.3}},
    ]
    with pytest.raises(PipelineFailedError) as caught:
        await run_deployed_pipeline({"name": "p", "steps": steps})
    assert list(caught.value.results) == ["first"]
    assert "0.3" in str(caught.value.errors["second"])
    assert server.kickoffs == 1


async def test_all_mistakes_are_reported_and_nothing_is_started(save: SaveCrew):
    crew, server = save()
    steps = [
        {"name": "a", "crew": crew, "inputs": {"text": "{{ topik }}"}},
        {"name": "b", "crew": "never-stored", "inputs": {"text": "{{ a.outptu }}"}},
    ]
    with pytest.raises(ConfigurationError) as caught:
        await run_deployed_pipeline({"name": "p", "inputs": {"topic": None}, "steps": steps}, {"topic": "tea"})
    for said in ("'topik' is neither an input", "a step has no 'outptu'", "under the name 'never-stored'"):
        assert said in str(caught.value)
    with pytest.raises(ConfigurationError, match="lacks the inputs topic"):
        await run_deployed_pipeline(pipeline_of(crew), {"audience": "me"})
    assert server.kickoffs == 0


async def texts_of(server: PrefectServer) -> str:
    """Return all that the Prefect database holds."""
    await asyncio.to_thread(drain)
    assert server.database is not None
    with closing(sqlite3.connect(server.database)) as database:
        tables = [name for (name,) in database.execute("SELECT name FROM sqlite_master WHERE type = 'table'")]
        return "\n".join(str(row) for table in tables for row in database.execute(f'SELECT * FROM "{table}"'))


@pytest.mark.parametrize("declared", [True, False], ids=["declared", "secret-to-the-crew"])
async def test_a_secret_input_is_the_name_of_a_block_and_stored_nowhere(
    prefect_api: PrefectServer, save: SaveCrew, declared: bool
):
    secret, block = f"hunter-{uuid.uuid4().hex}", f"login-{uuid.uuid4().hex[:8]}"
    await cast("Any", Secret)(value=secret).save(block)
    login, server = save(LOGIN, secret_inputs=[] if declared else ["password"])
    echo, second = save()
    pipeline = {
        "name": "p",
        "inputs": {"login": {"secret": declared}},
        "steps": [
            {"name": "a", "crew": login, "inputs": {"password": "{{ login }}"}},
            {"name": "b", "crew": echo, "inputs": {"text": "{{ a.output }}"}},
        ],
    }
    _, state = await run_as_a_worker(
        "prefect_crew.run_deployed_pipeline", {"pipeline": pipeline, "inputs": {"login": block}}
    )
    assert state.is_completed(), state
    assert [run.inputs for run in server.runs] == [{"password": secret}]
    assert [run.inputs for run in second.runs] == [{"text": f"logged in with {secret}"}]
    kept = await texts_of(prefect_api)
    assert block in kept
    assert secret not in kept


async def test_what_is_no_name_of_a_secret_block_is_refused_and_not_shown(save: SaveCrew):
    login, server = save(LOGIN, secret_inputs=["password"])
    secret = f"hunter-{uuid.uuid4().hex}"
    steps = [{"name": "a", "crew": login, "inputs": {"password": "{{ login }}"}}]
    with pytest.raises(ConfigurationError, match=r"'login' is secret.*Nothing was started") as caught:
        await run_deployed_pipeline({"name": "p", "inputs": {"login": None}, "steps": steps}, {"login": secret})
    assert secret not in str(caught.value)
    with pytest.raises(ConfigurationError, match="step 'a', input 'password': it is secret"):
        await run_deployed_pipeline({"name": "p", "steps": [{**steps[0], "inputs": {"password": "abc"}}]})
    assert server.kickoffs == 0
