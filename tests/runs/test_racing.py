"""Many callers of one idempotency key at once: one run, equal results."""

from __future__ import annotations

import asyncio
import uuid
from typing import Any

import pytest

from prefect_crew import CrewFailedError, CrewResult, CrewRun
from prefect_crew.testing import CrewServerFactory
from support.scripts import FAILS, slow
from support.seen import Seen

pytestmark = pytest.mark.usefixtures("prefect_api", "instant_polling")


async def result(server: Any, idempotency_key: str) -> Any:
    run: CrewRun = await server.crew().trigger({}, idempotency_key=idempotency_key)
    await run.wait_for_completion()
    return await run.fetch_result()


def emitted_once(seen: Seen, kickoff_id: str, event: str) -> bool:
    return [one["event"] for one in seen.events(kickoff_id)].count(event) == 1


@pytest.mark.parametrize("script", [slow(0), slow(0.5), FAILS], ids=["instant", "slow", "failing"])
def test_twenty_callers_in_one_loop(crew_server: CrewServerFactory, seen: Seen, script: str):
    server, idempotency_key = crew_server(script), f"race {uuid.uuid4()}"

    async def race() -> list[Any]:
        return [*await asyncio.gather(*(result(server, idempotency_key) for _ in range(20)), return_exceptions=True)]

    results = asyncio.run(race())
    assert server.kickoffs == 1
    assert {type(one) for one in results} == {CrewFailedError if script == FAILS else CrewResult}
    (kickoff_id,) = {one.kickoff_id for one in results}
    assert emitted_once(seen, kickoff_id, "crew.failed" if script == FAILS else "crew.completed")
    assert len(seen.records(idempotency_key)) == 1
