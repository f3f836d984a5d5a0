"""Sessions of a Flow on the dev server. tests/outcomes has what the turns see of each other, and what blocks them."""

import asyncio
import time
import uuid
from typing import Any

import pytest

import prefect_crew as pc
from prefect_crew.runs.database import find_store, in_store
from prefect_crew.store import attempts
from prefect_crew.testing import CrewServerFactory
from support.flow_runs import acall_in_flow
from support.scripts import JOURNAL, script
from support.seen import Seen
from support.waiting import soon, until

pytestmark = pytest.mark.usefixtures("prefect_api", "instant_polling")


@pytest.mark.parametrize("name", ["客户 42", "x" * 200, "a/b (c) %"])
async def test_sessions_of_any_name_do_not_meet(crew_server: CrewServerFactory, name: str) -> None:
    crew = crew_server(JOURNAL).crew()

    async def note(text: str, session: str | None) -> str:
        return (await pc.arun_crew(crew, {"note": text}, session=session)).output

    assert await note("tea", name) == "1 tea"
    assert await note("rain", "other") == "1 rain"
    assert await note("none", None) == "1 none"
    assert await note("bread", f" {name}\n") == "2 bread after 1 tea"


@pytest.mark.parametrize(("task", "state"), [({"seconds": 60}, "started"), ({"human": True}, "started")], ids=str)
async def test_limits_of_a_waiting_caller_are_its_own(crew_server: Any, key: str, task: Any, state: str) -> None:
    server = crew_server(script({**task, "output": "draft"}, inputs=["note"], flow=True))
    run = await server.crew().atrigger({"note": "a"}, session="s", idempotency_key=key)
    policy = pc.WaitPolicy(timeout=1, on_timeout="stop", human_timeout=0.3, on_human_timeout="reject", max_rounds=1)
    with pytest.raises(pc.SessionBlockedError, match=f"is still {state}, and this call has waited for 1 s") as caught:
        await soon(pc.arun_crew(server.crew(), {"note": "b"}, session="s", wait=policy))
    assert "after turn 1" in str(caught.value)
    assert f"prefect-crew runs cancel {run.kickoff_id}" in str(caught.value)
    assert server.kickoffs == 1
    assert server.requests["resume"] == server.requests["stop"] == 0


async def test_a_turn_waits_for_a_kickoff_under_way_by_the_clock_of_the_crew_database(
    crew_server: CrewServerFactory, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(find_store(), "clock", lambda: time.time() - 7200)
    caplog.set_level("INFO", "prefect_crew")
    server = crew_server(JOURNAL, faults=["kickoff:hold@1"])
    first = asyncio.create_task(pc.arun_crew(server.crew(), {"note": "tea"}, session="s"))
    await until(lambda: server.held, "the first kickoff is under way")
    second = asyncio.create_task(pc.arun_crew(server.crew(), {"note": "rain"}, session="s"))
    await until(lambda: second.done() or "is not over. This call waits." in caplog.text, "the second turn waits")
    server.release()
    assert [(await soon(turn)).output for turn in (first, second)] == ["1 tea", "2 rain after 1 tea"]


async def test_a_secret_of_an_earlier_turn_is_not_shown(crew_server: Any, seen: Seen, key: str) -> None:
    says = "{{ pin }}{% if state.output %} after {{ state.output }}{% endif %}"
    crew = crew_server(script({"output": says}, inputs=["pin"], flow=True)).crew(secret_inputs=["pin"])
    await pc.arun_crew(crew, {"pin": "first-4711"}, session="s")
    second = await pc.arun_crew(crew, {"pin": "second-0815"}, session="s", idempotency_key=key)
    assert second.output == "second-0815 after first-4711"
    assert "first-4711" not in repr(await asyncio.to_thread(seen.post, "/artifacts/filter", {}))
    (attempt,) = await in_store(attempts.of_key, key)
    assert await in_store(attempts.result_of, attempt.id) is None


async def test_tasks_and_deployed_flows_have_sessions(crew_server: CrewServerFactory) -> None:
    block = f"journal-{uuid.uuid4().hex[:8]}"
    await crew_server(JOURNAL).crew().save(block)

    async def in_pieces() -> str:
        kickoff_id = await pc.kickoff_crew(block, {"note": "tea"}, session="s")
        return (await pc.wait_for_crew(block, kickoff_id)).output

    assert (await acall_in_flow(in_pieces))[1] == "1 tea"
    deployed: Any = pc.crew_flow(block)
    assert (await deployed({"note": "rain"}, session="s")).output == "2 rain after 1 tea"
    form = await asyncio.to_thread(lambda: deployed.to_deployment("x"))
    assert form._parameter_openapi_schema.properties["session"]["title"] == "Session"
    assert (await pc.run_deployed_crew(block, {"note": "bread"}, session="s")).output.startswith("3 bread")
