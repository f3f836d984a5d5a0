"""Many callers of one idempotency key at once: one run, equal results."""

from __future__ import annotations

import asyncio
import contextlib
import re
import sys
import uuid
from pathlib import Path
from typing import Any

import pytest

from prefect_crew import CrewFailedError, CrewRun
from prefect_crew.testing import CrewServerFactory
from support.prefect_server import PrefectServer
from support.processes import Process
from support.scripts import FAILS, slow
from support.seen import Seen

pytestmark = pytest.mark.usefixtures("prefect_api", "instant_polling")


async def result(server: Any, idempotency_key: str) -> Any:
    run: CrewRun = await server.crew().trigger({}, idempotency_key=idempotency_key)
    await run.wait_for_completion()
    return await run.fetch_result()


def emitted_once(seen: Seen, kickoff_id: str, event: str) -> bool:
    return [one["event"] for one in seen.events(kickoff_id)].count(event) == 1


@pytest.mark.parametrize("seconds", [0, 0.5], ids=["instant", "slow"])
def test_twenty_callers_in_one_loop(crew_server: CrewServerFactory, seen: Seen, seconds: float):
    server, idempotency_key = crew_server(slow(seconds)), f"race {uuid.uuid4()}"

    async def race() -> list[Any]:
        return [*await asyncio.gather(*(result(server, idempotency_key) for _ in range(20)))]

    results = asyncio.run(race())
    assert server.kickoffs == 1
    assert {one.output for one in results} == {"done"}
    (kickoff_id,) = {one.kickoff_id for one in results}
    assert emitted_once(seen, kickoff_id, "crew.completed")
    assert len(seen.records(idempotency_key)) == 1


def test_twenty_callers_of_a_failing_crew_get_one_failure(crew_server: CrewServerFactory, seen: Seen):
    server, idempotency_key = crew_server(FAILS), f"race {uuid.uuid4()}"

    async def race() -> list[Any]:
        return [*await asyncio.gather(*(result(server, idempotency_key) for _ in range(20)), return_exceptions=True)]

    errors = asyncio.run(race())
    assert {type(error) for error in errors} == {CrewFailedError}
    assert server.kickoffs == 1
    (kickoff_id,) = {error.kickoff_id for error in errors}
    assert emitted_once(seen, kickoff_id, "crew.failed")


RACER = """
import sys
from prefect_crew import DeployedCrew, run_crew
url, token, idempotency_key = sys.argv[1:]
crew = DeployedCrew(url=url, token=token)
print("ready", flush=True)
input()
result = run_crew(crew, idempotency_key=idempotency_key)
print("RESULT", result.output, result.kickoff_id, flush=True)
"""


@pytest.mark.slow
def test_three_processes(crew_server: CrewServerFactory, prefect_server: PrefectServer, seen: Seen, tmp_path: Path):
    server, idempotency_key = crew_server(slow(0.5)), f"race {uuid.uuid4()}"
    command = [sys.executable, "-c", RACER, server.url, server.token, idempotency_key]
    with contextlib.ExitStack() as started:
        racers = [
            started.enter_context(Process(command, log=tmp_path / f"{n}.log", env=prefect_server.env(), stdin=True))
            for n in range(3)
        ]
        for racer in racers:
            racer.wait_for("ready")
        for racer in racers:
            assert racer.popen.stdin
            racer.popen.stdin.write(b"\n")
            racer.popen.stdin.flush()
        results = [found for racer in racers for found in re.findall("RESULT (.*)", racer.wait_for("RESULT"))]
    (run,) = server.runs
    assert results == [f"done {run.id}"] * 3
    assert emitted_once(seen, run.id, "crew.completed")
    assert len(seen.records(idempotency_key)) == 1
