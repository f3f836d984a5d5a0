"""The simulated part of the Prefect API answers as a real Prefect server does, and the simulation can see a mistake."""

from __future__ import annotations

import asyncio
import logging
import math
import re
import uuid
from datetime import datetime
from email.utils import parsedate_to_datetime
from types import SimpleNamespace
from typing import Any
from unittest import mock

import httpx
import pytest
from prefect.exceptions import PrefectHTTPStatusError

from prefect_crew.client._retry_safety import KickoffFate
from prefect_crew.client.models import Review
from prefect_crew.records import decision, model, prune
from prefect_crew.records import notes as notes_module
from prefect_crew.records import store as store_module
from prefect_crew.records import variables as variables_module
from prefect_crew.records.decision import Decision
from prefect_crew.records.model import RecordPhase, RunRecord, utcnow
from prefect_crew.records.store import PrefectRecords
from prefect_crew.runs import claims, kickoff
from proof.sim.loop import Process, SimLoop, StuckError
from proof.sim.oracle import broken_promises
from proof.sim.prefect_api import SimPrefect
from proof.sim.scenario import Call, CrewRun, Prune, Root, Scenario
from proof.sim.shrink import shrunk
from proof.sim.world import World
from support.prefect_server import PrefectServer

KEY = uuid.uuid4().hex
ANSWER = Review(task_id="draft", round=1, approve=True, by="ada", at=utcnow(), nonce="ada")
IDS = re.compile(r"[0-9a-f]{8}-[0-9a-f-]{27}")


def record(attempt: int, owner: str, **fields: Any) -> RunRecord:
    now = utcnow()
    return RunRecord(
        idempotency_key=KEY,
        attempt=attempt,
        crew="c",
        crew_url="https://c.test",
        inputs_digest="d",
        owner=owner,
        claimed_at=now,
        **fields,
    )


async def tour() -> list[Any]:
    """Use everything that records use, and return what was seen of it."""
    store, seen = PrefectRecords(), list[Any]()
    first, second = record(1, "one", flow_run_id=str(uuid.UUID(int=7))), record(2, "two")
    seen.append([await store.claim(first), await store.claim(first), await store.claim(record(1, "other"))])
    seen.append(await store.owner_ended(first))
    try:
        await store.save(second)
    except Exception as error:
        seen.append(type(error).__name__)
    seen.append(await store.claim(second))
    first.phase, first.kickoff_id = RecordPhase.STARTED, f"run-of-{KEY}"
    await store.save(first)
    seen.append(await store.claim(first.model_copy(update={"phase": RecordPhase.CLAIMED})))
    seen.append([(one.attempt, one.owner, one.phase) for one in await store.attempts(KEY)])
    found = await store.of_kickoff(f"run-of-{KEY}")
    seen += [found and found.attempt, await store.of_kickoff("nobody's")]
    seen.append([one.attempt async for one in store.all(RecordPhase.CLAIMED) if one.idempotency_key == KEY])
    for number in (1, 2, 2):
        await store.add_review(first, number, ANSWER)
    await store.remove_review(first, 2, ANSWER)
    await store.remove_review(first, 2, ANSWER)
    seen.append([one.by for one in await store.reviews(first)])
    # What was changed last comes first, and the count is that of all.
    changed = [one.id for one in await variables_module.read_by_change(0)]
    seen += [
        changed.index(first.ref) < changed.index(second.ref),
        await variables_module.count_variables() >= len(changed),
    ]
    for one in (first, second, second):
        await store.delete(one)
    seen.append(await store.attempts(KEY))
    return seen


async def by_id() -> list[Any]:
    """Use what the API itself offers around a Variable, and return what was seen of it."""
    name, seen = f"by_id_{KEY}", list[Any]()
    async with store_module.get_client() as client:

        async def ask(method: str, path: str, **json: Any) -> httpx.Response:
            try:
                response = await client.request(method, f"/variables/{path}", json=json or None)
            except PrefectHTTPStatusError as error:
                response = error.response
            age = parsedate_to_datetime(response.headers["Date"]).timestamp() - utcnow().timestamp()
            seen.append((method, response.status_code, -3 < age <= 0))
            return response

        made = (await ask("POST", "", name=name, value={"n": 1}, tags=["one", "two"])).json()
        await ask("POST", "", name=name, value={"n": 2}, tags=[])
        seen.append(sorted(made))
        created = datetime.fromisoformat(made["created"])
        seen.append(abs((utcnow() - created).total_seconds()) < 60)
        await ask("PATCH", made["id"], value={"n": 3})
        seen.append((await ask("GET", made["id"])).json()["value"])
        seen.append((await ask("GET", f"name/{name}")).json()["created"] == made["created"])
        for wanted in (
            {"name": {"any_": [name, "other"]}},
            {"name": {"like_": f"BY_ID_{KEY[:20]}"}},
            {"name": {"like_": f"d_{KEY[:20]}%"}, "tags": {"all_": ["one"]}},
            {"operator": "or_", "name": {"any_": ["other"]}, "tags": {"all_": ["one", "two"]}},
            {"id": {"any_": [made["id"]]}, "tags": {"all_": ["three"]}},
        ):
            found = (await ask("POST", "filter", variables=wanted, limit=10, offset=0)).json()
            seen.append([one["value"] for one in found])
        await ask("DELETE", made["id"])
        await asyncio.sleep(0.1)
        again = (await ask("POST", "", name=name, value={"n": 4}, tags=[])).json()
        for method in ("PATCH", "GET", "DELETE"):
            await ask(method, made["id"], **({"value": {"n": 5}} if method == "PATCH" else {}))
        seen.append((await ask("GET", f"name/{name}")).json()["value"])
        await ask("PATCH", f"name/{name}", value={"n": 6})
        seen.append((await ask("GET", again["id"])).json()["value"])
        await ask("DELETE", f"name/{name}")
        await asyncio.sleep(0.1)
        for method in ("PATCH", "GET", "DELETE"):
            await ask(method, f"name/{name}", **({"value": {"n": 7}} if method == "PATCH" else {}))
    return seen


def test_the_simulated_api_answers_as_a_real_server(prefect_api: PrefectServer) -> None:
    real, real_by_id = asyncio.run(tour()), asyncio.run(by_id())
    loop, simulated = SimLoop(), SimPrefect(latency=lambda: 0.01)
    with (
        mock.patch.object(store_module, "get_client", simulated.client),
        mock.patch.object(variables_module, "get_client", simulated.client),
        mock.patch.object(notes_module, "get_client", simulated.client),
    ):
        assert loop.run_until_complete(tour()) == real
        assert loop.run_until_complete(by_id()) == real_by_id
    loop.close()
    assert real[0] == [True, True, False], "and the answers are those that the design needs"


async def seen_owners(**flow_runs: str) -> dict[str, Any]:
    """Return what pruning sees of flow runs that have ended two seconds ago, or run, by names for them."""
    await asyncio.sleep(2.0)
    owners = await prune.read_owners([record(1, "one", flow_run_id=run_id) for run_id in flow_runs.values()])
    return {
        name: "gone" if owners[run_id] == prune.GONE else owners[run_id] > 0.0 for name, run_id in flow_runs.items()
    }


def test_the_simulated_flow_runs_are_seen_as_those_of_a_real_server(prefect_api: PrefectServer) -> None:
    gone = str(uuid.uuid4())

    async def real() -> dict[str, Any]:
        async with store_module.get_client() as client:

            async def make(path: Any, **json: Any) -> str:
                return str((await client.request("POST", path, json=json)).json()["id"])

            flow = await make("/flows/", name="simulated")

            async def run(state: str, parent: str | None = None) -> str:
                more: dict[str, Any] = {"flow_id": flow, "state": {"type": state}}
                if parent is not None:
                    task: dict[str, Any] = {"flow_run_id": parent, "task_key": "sub", "dynamic_key": str(uuid.uuid4())}
                    more["parent_task_run_id"] = await make("/task_runs/", **task)
                return await make("/flow_runs/", **more)

            roots = {one: await run(one) for one in ("RUNNING", "COMPLETED", "FAILED")}
            made = {f"below {state}": await run("COMPLETED", root) for state, root in roots.items()}
            made |= {"deep below": await run("COMPLETED", made["below RUNNING"]), "retried": await run("COMPLETED")}
            made |= {"lone": await run("CRASHED"), "paused": await run("PAUSED", roots["COMPLETED"]), "gone": gone}
            await asyncio.sleep(2.0)
            await client.request("DELETE", "/flow_runs/{id}", path_params={"id": roots["FAILED"]})
            state = {"state": {"type": "SCHEDULED"}, "force": True}
            path = "/flow_runs/{id}/set_state"
            await client.request("POST", path, path_params={"id": made["retried"]}, json=state)
        return await seen_owners(**made)

    loop, simulated = SimLoop(), SimPrefect(latency=lambda: 0.01)
    simulated.wall = simulated.flow_runs.wall = loop.wall

    def run(state: str, parent: str | None = None) -> str:
        run_id = str(uuid.uuid4())
        simulated.flow_runs[run_id] = state
        if parent is not None:
            simulated.parents[run_id] = parent
        return run_id

    roots = {one: run(one) for one in ("RUNNING", "COMPLETED", "FAILED")}
    made = {f"below {state}": run("COMPLETED", root) for state, root in roots.items()}
    made |= {"deep below": run("COMPLETED", made["below RUNNING"]), "retried": run("COMPLETED"), "lone": run("CRASHED")}
    made |= {"paused": run("PAUSED", roots["COMPLETED"]), "gone": gone}
    del simulated.flow_runs[roots["FAILED"]]
    simulated.flow_runs[made["retried"]] = "SCHEDULED"
    seen = asyncio.run(real())
    with mock.patch.object(prune, "get_client", simulated.client):
        assert loop.run_until_complete(seen_owners(**made)) == seen
    loop.close()
    assert seen.pop("gone") == "gone"
    assert [name for name, has_ended in seen.items() if has_ended] == ["below COMPLETED", "below FAILED", "lone"]


def test_a_killed_process_does_nothing_any_more() -> None:
    loop, said = SimLoop(), list[str]()

    async def careful() -> None:
        try:
            await asyncio.sleep(1)
            said.append("went on")
            await asyncio.sleep(1)
        finally:
            said.append("cleaned up")

    async def course() -> None:
        process = Process("careful", kill_at=3)
        process.start(careful())
        await process.died.wait()
        await asyncio.sleep(10)
        assert said == ["went on"]
        process.bury()
        for task in process.tasks:
            task.cancel()
        await asyncio.wait(process.tasks)

    loop.run_until_complete(course())
    loop.close()
    assert said == ["went on", "cleaned up"]


def test_a_world_without_a_future_says_so() -> None:
    loop = SimLoop()
    with pytest.raises(StuckError):
        loop.run_until_complete(loop.create_future())
    loop.close()


# What would be wrong with the core is seen. These are the mistakes that other clients make.


def _claims_nothing() -> Any:
    async def claim(self: PrefectRecords, record: RunRecord, lease: Any = None) -> bool:
        try:
            await self.save(record)
        except Exception:
            async with store_module.get_client() as client:
                name = store_module.record_name(record.idempotency_key, record.attempt)
                await client.request(
                    "POST", "/variables/", json={"name": name, "value": record.model_dump(mode="json")}
                )
        return True

    return mock.patch.object(PrefectRecords, "claim", claim)


def _sends_again() -> Any:
    return mock.patch.object(kickoff, "kickoff_fate", return_value=KickoffFate.RETRY)


def _never_pauses() -> Any:
    async def at_once(seconds: float) -> None:
        # What waits for another caller's kickoff; the pause that a server asks for is longer.
        await asyncio.sleep(0 if seconds < 5 else seconds)

    return mock.patch.object(claims, "asyncio", SimpleNamespace(**{**vars(asyncio), "sleep": at_once}))


def _starts_a_failed_run_again() -> Any:
    def decide(record: RunRecord | None, **known: Any) -> Decision:
        return decision.decide(record, **{**known, "asked_at": None})

    return mock.patch.object(kickoff, "decide", decide)


def _is_never_sure() -> Any:
    return mock.patch.object(kickoff, "kickoff_fate", return_value=KickoffFate.UNCERTAIN)


def _closes_anyway() -> Any:
    end = PrefectRecords.end

    async def end_anyway(self: PrefectRecords, record: RunRecord, **facts: Any) -> bool:
        await end(self, record, **facts)
        return True

    return mock.patch.object(PrefectRecords, "end", end_anyway)


def _adds_an_end() -> Any:
    async def current(self: PrefectRecords, record: RunRecord) -> RunRecord:
        return record.model_copy(update={"entries": record.entries + 1})  # as if somebody had said something else

    return mock.patch.object(PrefectRecords, "_current", current)


def _takes_an_end_back() -> Any:
    return mock.patch.dict(model.RANK, {RecordPhase.ENDED: -1})


def _forgets_the_id() -> Any:
    async def save(self: PrefectRecords, record: RunRecord) -> None:
        return None

    return mock.patch.object(PrefectRecords, "save_started", save)


def _looks_at_no_flow_run() -> Any:
    return mock.patch.object(prune, "_owners_ended", return_value=True)


def _looks_at_no_root() -> Any:
    read = prune.read_by_id

    async def read_no_tasks(path: Any, ids: Any) -> dict[Any, Any]:
        return {} if path == "/task_runs/filter" else await read(path, ids)

    return mock.patch.object(prune, "read_by_id", read_no_tasks)


def _takes_completed_for_over() -> Any:
    async def read_owners(records: Any) -> dict[str, float]:
        return {owner: math.copysign(math.inf, ended_for) for owner, ended_for in (await read(records)).items()}

    read = prune.read_owners
    return mock.patch.object(prune, "read_owners", read_owners)


TWO = Scenario(calls=(Call(), Call()), runs=(CrewRun(seconds=3),))
KILLED = Scenario(calls=(Call(kill_at=20, crashed_after=0.5, again=(1.0,)),), runs=(CrewRun(seconds=15),))
SLOW = Scenario(calls=(Call(), Call(at=0.2)), faults=("kickoff:429-before-accept=15@1",))
FAILING = Scenario(calls=(Call(), Call(at=0.03, freeze_at=6, freeze_for=30.0)), runs=(CrewRun(end="fails"),))
REFUSED = Scenario(calls=(Call(again=(1.0,)),), faults=("kickoff:400-before-accept@1",))
MISCONFIGURED = Scenario(calls=(Call(misconfigured=True, again=(1.0,)),))
DENIED = Scenario(calls=(Call(again=(1.0,)),), faults=("kickoff:500-after-accept@1",))
SUBFLOWS = (Call(root=0), Call(at=100.0, root=0))
ROOT_RUNS_ON = Scenario(calls=SUBFLOWS, roots=(Root(((0.0, 110.0),)),), prunes=(Prune(at=64.0, older_than=20.0),))
ROOT_ENDED_NOW = Scenario(
    calls=SUBFLOWS, roots=(Root(((0.0, 60.0), (95.0, 110.0))),), prunes=(Prune(at=64.0, older_than=20.0),)
)
MISTAKES = {
    "a claim that anybody may overwrite": (_claims_nothing, TWO),
    "a kickoff that is sent again after a 500": (_sends_again, DENIED),
    "a wait without pauses": (_never_pauses, SLOW),
    "a failed run that is started again by who waited for it": (_starts_a_failed_run_again, FAILING),
    "a refused kickoff that is made uncertain": (_is_never_sure, REFUSED),
    "a mistake of the user that is made uncertain": (_is_never_sure, MISCONFIGURED),
    "an id that is not written down": (_forgets_the_id, KILLED),
    "a run that two callers close": (_closes_anyway, TWO),
    "a log with two ends": (_adds_an_end, TWO),
    "an end that counts less than what came before it": (_takes_an_end_back, TWO),
    "a record that is pruned whatever its flow run does": (_looks_at_no_flow_run, ROOT_RUNS_ON),
    "a record that is pruned while its root runs": (_looks_at_no_root, ROOT_RUNS_ON),
    "a record that is pruned while its root can be retried": (_looks_at_no_root, ROOT_ENDED_NOW),
    "a record that is pruned as soon as its root has ended": (_takes_completed_for_over, ROOT_ENDED_NOW),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_seen(mistake: str) -> None:
    make, scenario = MISTAKES[mistake]
    assert not broken_promises(World(scenario).play())
    with make():
        assert broken_promises(World(scenario).play())


def test_the_order_of_what_is_ready_is_drawn_by_the_seed() -> None:
    def course(order: int) -> list[str]:
        return World(Scenario(calls=(Call(), Call(), Call()), order=order)).play().trace

    assert len({tuple(course(order)[:2]) for order in range(8)}) > 1
    assert [re.sub(IDS, "", line) for line in course(5)] == [re.sub(IDS, "", line) for line in course(5)]


def test_a_failing_world_is_made_small() -> None:
    large = Scenario(
        calls=(Call(at=3.0, flow=False, again=(1.0, 3.0)), Call(kill_at=4)),
        runs=(CrewRun("fails", 15), CrewRun()),
        faults=("kickoff:500-after-accept@1", "status:500@1"),
        max_attempts=1,
    )
    small = shrunk(large, lambda one: "kickoff:500-after-accept@1" in one.faults and any(c.again for c in one.calls))
    assert small == Scenario(calls=(Call(again=(3.0,)),), faults=("kickoff:500-after-accept@1",))


def test_a_world_hears_a_logger_that_was_off():
    log = logging.getLogger("prefect_crew")
    before = log.level
    log.setLevel(logging.WARNING)
    try:
        assert not log.isEnabledFor(logging.INFO)  # which the logger remembers
        assert any("a run is being started" in line for line in World(Scenario(calls=(Call(),))).play().trace)
        assert log.level == logging.WARNING
    finally:
        log.setLevel(before)
