"""Events about runs, as a real server has them."""

import asyncio
import uuid

import pytest

from prefect_crew import KickoffUncertainError
from prefect_crew.artifacts.events import emit
from prefect_crew.testing import CrewServerFactory
from support.past import new_attempt
from support.prefect_server import PrefectServer
from support.proxy import through
from support.scripts import ASKS
from support.seen import Seen
from support.waiting import until

pytestmark = pytest.mark.usefixtures("prefect_api", "instant_polling")


def test_an_event_names_its_run_and_is_kept_once(seen: Seen):
    run = new_attempt("k", kickoff_id=str(uuid.uuid4()), step="research", flow_run_id=str(uuid.uuid4()))
    for _ in range(2):
        emit("completed", run, once=True, state="completed")
        emit("timed_out", run, phase="running")
    events = sorted(seen.events(str(run.kickoff_id)), key=lambda event: event["event"])
    assert [event["event"] for event in events] == ["crew.completed", "crew.timed_out", "crew.timed_out"]
    assert events[0]["resource"] == {
        "prefect.resource.id": f"prefect-crew.run.{run.kickoff_id}",
        "prefect.resource.name": f"travel run {run.kickoff_id}",
        "prefect-crew.idempotency-key": "k",
        "prefect-crew.crew": "travel",
    }
    related = {resource["prefect.resource.id"] for resource in events[0]["related"]}
    assert related >= {"prefect-crew.crew.travel", "prefect-crew.step.research", f"prefect.flow-run.{run.flow_run_id}"}


def test_the_events_of_a_run_come_in_order(crew_server: CrewServerFactory, seen: Seen):
    server = crew_server(ASKS)

    async def answered() -> str:
        run = await server.crew().atrigger({})
        waiting = asyncio.ensure_future(run.await_for_completion())
        await until(lambda: str(server.run(run.kickoff_id).state) == "waiting")
        polls = server.requests["status"]
        await until(lambda: server.requests["status"] > polls + 1, "a poll has shown the question")
        await run.aresume("fine", approve=True)
        await waiting
        return run.kickoff_id

    emitted = [event["event"] for event in seen.events(asyncio.run(answered()))]
    ours = [name for name in emitted if name != "crew.reviewed"]
    assert ours == ["crew.waiting", "crew.resumed", "crew.completed"]


def test_an_uncertain_kickoff_is_one_event(crew_server: CrewServerFactory, seen: Seen):
    server, idempotency_key = crew_server("echo", faults=["kickoff:500@1"]), f"doubt {uuid.uuid4()}"
    for _ in range(2):
        with pytest.raises(KickoffUncertainError):
            server.crew().trigger({"text": "a"}, idempotency_key=idempotency_key)
    (emitted,) = seen.events(f"{idempotency_key}/1")
    assert emitted["event"] == "crew.uncertain"
    assert "CrewAPIError" in emitted["payload"]["reason"]


def test_emitting_fails_nothing_without_the_api(prefect_server: PrefectServer):
    with through(prefect_server) as proxy:
        proxy.cut()
        emit("completed", new_attempt(kickoff_id="k1"), once=True)
