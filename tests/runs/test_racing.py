"""Many callers of one idempotency key at once: one purchase, equal results."""

from __future__ import annotations

import asyncio
import json
import sys
import threading
import uuid
from concurrent.futures import ThreadPoolExecutor
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


def told_once(seen: Seen, kickoff_id: str, event: str) -> bool:
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
    assert told_once(seen, kickoff_id, "crew.completed")
    assert len(seen.records(idempotency_key)) == 1


def test_twenty_threads_with_loops_of_their_own(crew_server: CrewServerFactory, seen: Seen):
    server, idempotency_key, start = crew_server(slow(0.3)), f"race {uuid.uuid4()}", threading.Barrier(20)

    def race(_: int) -> Any:
        start.wait()
        return asyncio.run(result(server, idempotency_key))

    with ThreadPoolExecutor(20) as pool:
        results = [*pool.map(race, range(20))]
    assert server.kickoffs == 1
    assert {one.output for one in results} == {"done"}
    (kickoff_id,) = {one.kickoff_id for one in results}
    assert told_once(seen, kickoff_id, "crew.completed")


def test_twenty_callers_of_a_failing_crew_get_one_failure(crew_server: CrewServerFactory, seen: Seen):
    server, idempotency_key = crew_server(FAILS), f"race {uuid.uuid4()}"

    async def race() -> list[Any]:
        return [*await asyncio.gather(*(result(server, idempotency_key) for _ in range(20)), return_exceptions=True)]

    errors = asyncio.run(race())
    assert {type(error) for error in errors} == {CrewFailedError}
    assert server.kickoffs == 1
    (kickoff_id,) = {error.kickoff_id for error in errors}
    assert told_once(seen, kickoff_id, "crew.failed")


RACER = """
import asyncio, json, os, sys, time
from prefect_crew import DeployedCrew, arun_crew

async def main():
    crew = DeployedCrew(url=os.environ["CREW_URL"], token=os.environ["CREW_TOKEN"])
    print("ready", flush=True)
    sys.stdin.readline()
    results = await asyncio.gather(*(arun_crew(crew, {}, idempotency_key=os.environ["KEY"]) for _ in range(3)))
    print("RESULTS", json.dumps([[one.output, one.kickoff_id] for one in results]), flush=True)

asyncio.run(main())
"""


def test_processes_race_as_well(
    crew_server: CrewServerFactory, prefect_server: PrefectServer, seen: Seen, tmp_path: Path
):
    server, idempotency_key = crew_server(slow(0.5), port=True), f"race {uuid.uuid4()}"
    script = tmp_path / "racer.py"
    script.write_text(RACER)
    env = prefect_server.env(home=tmp_path / "home", CREW_URL=server.url, CREW_TOKEN=server.token, KEY=idempotency_key)
    racers = [Process([sys.executable, script], log=tmp_path / f"{n}.log", env=env, stdin=True) for n in range(3)]
    try:
        for racer in racers:
            racer.wait_for("ready")
        for racer in racers:
            assert racer.popen.stdin is not None
            racer.popen.stdin.write(b"go\n")
            racer.popen.stdin.flush()
        results: list[Any] = []
        for racer in racers:
            assert racer.wait(90) == 0, racer.tail()
            (line,) = [line for line in racer.output.splitlines() if line.startswith("RESULTS")]
            results += json.loads(line.partition(" ")[2])
    finally:
        for racer in racers:
            racer.stop()
    assert server.kickoffs == 1
    assert len(results) == 9
    assert {output for output, _ in results} == {"done"}
    (kickoff_id,) = {one for _, one in results}
    assert told_once(seen, kickoff_id, "crew.completed")
