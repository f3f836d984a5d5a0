"""The crew's limit on runs in flight: it holds for every way to start a run, and each end gives its room back."""

import asyncio
import itertools
from datetime import timedelta

import pytest
from prefect import flow

import prefect_crew as pc
from prefect_crew.devserver import CrewServer
from prefect_crew.runs import start
from prefect_crew.tasks import stop_crew
from prefect_crew.testing import CrewServerFactory
from support.scripts import script, slow
from support.waiting import soon
from support.ways import WAYS

pytestmark = pytest.mark.usefixtures("prefect_api", "instant_polling")


@pytest.fixture(autouse=True)
def looks_soon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(start, "FULL_AGAIN", (0.02, 0.05))


def started_one_after_the_other(server: CrewServer) -> bool:
    """Whether each run was started after the one before it had ended."""
    spans = sorted((run.created_at, run.created_at + timedelta(seconds=run.execution_time)) for run in server.runs)
    return all(ended <= started for (_, ended), (started, _) in itertools.pairwise(spans))


@pytest.mark.parametrize(("way", "inside"), [*((way, True) for way in WAYS), ("run_crew", False), ("batch", False)])
async def test_a_limit_holds_for_every_way_to_start(crew_server: CrewServerFactory, way: str, inside: bool):
    server = crew_server(slow(0.1))

    async def both() -> None:
        await asyncio.gather(*(WAYS[way](server.crew(concurrency_limit=1), text) for text in "ab"))

    await soon(flow(both)() if inside else both())
    assert server.kickoffs == (4 if way == "batch" else 2)
    assert started_one_after_the_other(server)


async def test_every_end_gives_its_room_back(crew_server: CrewServerFactory):
    spec = script({"seconds": "{{ seconds }}", "output": "done", "fail": "{{ fail }}"}, inputs=["seconds", "fail"])
    crew = crew_server(spec, faults=["kickoff:422@1"]).crew(concurrency_limit=1)
    quick = {"seconds": 0, "fail": ""}
    for inputs in ({}, quick):  # refused before the kickoff, and at it
        with pytest.raises(pc.CrewAPIError):
            await pc.arun_crew(crew, inputs)
    run = await crew.atrigger({"seconds": 60, "fail": ""})
    waiting = asyncio.create_task(pc.arun_crew(crew, quick))
    done, _ = await asyncio.wait({waiting}, timeout=1)
    assert not done, "it waits for room"
    await stop_crew(crew, run.kickoff_id)
    assert (await soon(waiting)).output == "done"
    with pytest.raises(pc.CrewFailedError):
        await pc.arun_crew(crew, {"seconds": 0, "fail": "no"})
    with pytest.raises(pc.CrewTimeoutError):
        await pc.arun_crew(crew, {"seconds": 60, "fail": ""}, wait=pc.WaitPolicy(timeout=0.2))
    # Nobody waits for that one, and its time is over.
    assert (await soon(pc.arun_crew(crew, quick))).output == "done"
