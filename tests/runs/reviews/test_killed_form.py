"""A process that dies with its form up, in a script that nobody begins again by himself: the answer is found."""

from __future__ import annotations

import asyncio
import os
import sys
from pathlib import Path
from typing import Any

import pytest
from prefect import flow, get_client
from prefect.client.schemas.objects import FlowRun
from prefect.flow_engine import run_flow_async
from prefect.states import Scheduled

from prefect_crew import arun_crew
from prefect_crew.devserver import CrewServer
from support.deployed import wait_until
from support.prefect_server import PrefectServer
from support.processes import Process
from support.scripts import ASKS

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("prefect_api", "instant_polling")]

SCRIPT = """
import asyncio, sys, uuid
from prefect import get_client
from prefect.flow_engine import run_flow_async
from test_killed_form import reviewed

async def main():
    async with get_client() as client:
        flow_run = await client.read_flow_run(uuid.UUID(sys.argv[1]))
    await run_flow_async(reviewed, flow_run=flow_run, parameters=flow_run.parameters)

asyncio.run(main())
"""


@flow
async def reviewed(crew: str) -> str:
    return (await arun_crew(crew, review="form")).output


async def planned(crew: str) -> FlowRun:
    async with get_client() as client:
        return await client.create_flow_run(reviewed, parameters={"crew": crew})


async def begun_again(flow_run_id: Any) -> Any:
    """Begin a flow run again as docs/guides/recover.md has it for scripts."""
    async with get_client() as client:
        await client.set_flow_run_state(flow_run_id, Scheduled(), force=True)
        flow_run = await client.read_flow_run(flow_run_id)
    return await run_flow_async(reviewed, flow_run=flow_run, parameters=flow_run.parameters)


def form_of(flow_run_id: Any) -> dict[str, Any] | None:
    """Return the state's details of a flow run whose form is up, and can be filled in."""
    with get_client(sync_client=True) as client:
        state = client.read_flow_run(flow_run_id).state
        if state is None or not state.is_paused():
            return None
        body = {"prefix": "crew-review-", "limit": 20, "exclude_keys": []}
        found = client.request(
            "POST", "/flow_runs/{id}/input/filter", path_params={"id": flow_run_id}, json=body
        ).json()
    return dict(state.state_details) if any("description" in one["key"] for one in found) else None


def fill_in(flow_run_id: Any, **fields: str) -> str:
    with get_client(sync_client=True) as client:
        return client.request(
            "POST", "/flow_runs/{id}/resume", path_params={"id": flow_run_id}, json={"run_input": fields}
        ).json()["status"]


@pytest.mark.parametrize("answered", [True, False], ids=["answered while nobody was there", "not answered"])
def test_a_process_is_killed_with_its_form_up(
    answered: bool, prefect_api: PrefectServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("prefect_crew.runs.reviews.form.LOOK_EVERY", 0.2)
    with CrewServer(ASKS, response_format="union") as server:
        server.crew().save(f"killed-{answered}".lower(), overwrite=True)
        flow_run_id = asyncio.run(planned(f"killed-{answered}".lower())).id
        here = Path(__file__)
        env = {**prefect_api.env(), "PYTHONPATH": os.pathsep.join(map(str, (here.parent, here.parents[2])))}
        with Process([sys.executable, "-c", SCRIPT, str(flow_run_id)], log=tmp_path / "log", env=env) as process:
            first = wait_until(lambda: form_of(flow_run_id), seconds=60, what="a form")
            process.kill()
        assert form_of(flow_run_id) == first, "it stays Paused"
        if answered:
            assert fill_in(flow_run_id, decision="reject", feedback="Warmer.") == "ACCEPT"
        assert server.requests["resume"] == 0
        outcome: list[Any] = []

        async def again() -> None:
            outcome.append(await begun_again(flow_run_id))

        async def fill_in_again() -> None:
            run = asyncio.create_task(again())

            def up() -> dict[str, Any] | None:
                form = form_of(flow_run_id)
                return form if form and form["pause_key"] != first["pause_key"] else None

            await asyncio.to_thread(wait_until, up, seconds=60, what="a form")
            second = await asyncio.to_thread(form_of, flow_run_id)
            assert second is not None
            same = second["run_input_keyset"] == first["run_input_keyset"]
            assert same is not answered, "the form of the same question is the same one"
            assert server.requests["resume"] == int(answered), "what was filled in was sent, once"
            assert await asyncio.to_thread(fill_in, flow_run_id, decision="approve") == "ACCEPT"
            await asyncio.wait_for(run, 60)

        asyncio.run(fill_in_again())
        assert outcome == ["printed"]
        assert server.requests["resume"] == 1 + answered
        assert server.kickoffs == 1
