"""When a call counts as made: a run that fails after that is this call's failure."""

import asyncio
from typing import Any

import pytest

from prefect_crew import CrewFailedError, arun_crew
from prefect_crew.runs import start
from prefect_crew.testing import CrewServerFactory
from support.scripts import FAILS
from support.waiting import until

pytestmark = pytest.mark.usefixtures("prefect_api", "instant_polling")


async def test_a_run_that_fails_before_the_first_look_of_a_call_is_that_calls_failure(
    crew_server: CrewServerFactory, key: str, monkeypatch: pytest.MonkeyPatch
):
    server, may_look, identify, is_held = crew_server(FAILS), asyncio.Event(), start.identify, False

    async def held(*args: Any, **options: Any) -> Any:
        nonlocal is_held
        is_held = True
        await may_look.wait()
        return await identify(*args, **options)

    async def fail() -> Any:
        with pytest.raises(CrewFailedError) as raised:
            await arun_crew(server.crew(), {}, idempotency_key=key)
        return raised.value.kickoff_id

    monkeypatch.setattr(start, "identify", held)
    late = asyncio.create_task(fail())
    await until(lambda: is_held, "the late call")
    monkeypatch.setattr(start, "identify", identify)
    first = await fail()
    may_look.set()
    assert await late == first
    assert server.kickoffs == 1
    assert await fail() != first, "a call that is made now starts another"
