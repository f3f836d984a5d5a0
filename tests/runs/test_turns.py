"""Sessions of a Flow on the dev server: what each turn remembers, who waits for whom, and what blocks a session."""

import asyncio
import uuid
from typing import Any

import pytest
from prefect import flow
from prefect.client.orchestration import get_client
from prefect.runtime import flow_run
from prefect.states import Cancelling

import prefect_crew as pc
from prefect_crew.client._retry_safety import KickoffFate, kickoff_fate
from prefect_crew.devserver import CrewServer
from prefect_crew.exceptions import FlowRunCancelledError, SessionBlockedError
from prefect_crew.records import sessions
from prefect_crew.records.model import Lease, RecordPhase, RunRecord
from prefect_crew.records.resolve import in_flight, resolve_lost, resolve_never_started, unresolved
from prefect_crew.records.store import PrefectRecords
from prefect_crew.testing import CrewServerFactory
from support.flow_runs import acall_in_flow
from support.records import LONG_AGO, attempts, new_record, put
from support.scripts import JOURNAL, script
from support.seen import Seen
from support.waiting import until

pytestmark = pytest.mark.usefixtures("prefect_api", "instant_polling", "all_logged")
SESSION = ""
RECORDS = PrefectRecords()


@pytest.fixture(autouse=True)
def _session(monkeypatch: pytest.MonkeyPatch) -> None:
    """Name the session, as no other test does: its crew server may get the port of an earlier one."""
    monkeypatch.setitem(globals(), "SESSION", f"customer-{uuid.uuid4().hex[:8]}")


@pytest.fixture
def journal(crew_server: CrewServerFactory) -> CrewServer:
    return crew_server(JOURNAL)


async def note(server: CrewServer, text: str, *, id_: str | None = None, **options: Any) -> pc.CrewResult[Any]:
    inputs = {"note": text} if id_ is None else {"note": text, "id": id_}
    return await pc.arun_crew(server.crew(), inputs, **{"session": SESSION, **options})


def states(server: CrewServer) -> dict[str, dict[str, Any]]:
    return server.crew_runs.program.states  # pyright: ignore[reportAttributeAccessIssue]


async def turns(server: CrewServer, session: str | None = None) -> list[sessions.Turn]:
    last = await sessions.last_turn(server.url, session or SESSION)
    return [] if last is None else await sessions._read_turns(server.url, last.session, range(1, last.number + 1))


# What a turn remembers


async def test_a_turn_starts_from_the_turn_before(journal: CrewServer) -> None:
    outputs = [(await note(journal, text)).output for text in ("tea", "rain", "bread")]
    assert outputs == ["1 tea", "2 rain after 1 tea", "3 bread after 2 rain after 1 tea"]
    runs = journal.runs
    assert [run.restore_from for run in runs] == [None, runs[0].id, runs[1].id]
    assert [run.id for run in runs] == [*states(journal)]
    (record,) = await attempts((await turns(journal))[2].idempotency_key)
    assert record.session == SESSION
    assert record.turn == 3


@pytest.mark.parametrize("name", ["Zoë", "客户 42", "x" * 200, "a/b (c) %", "🦊"])
async def test_sessions_of_any_name_do_not_meet(journal: CrewServer, name: str) -> None:
    session = f"{SESSION}{name}"[:200]
    await note(journal, "tea", session=session)
    assert (await note(journal, "rain")).output == "1 rain"
    assert (await pc.arun_crew(journal.crew(), {"note": "none"})).output == "1 none"
    assert (await note(journal, "bread", session=f" {session}\n")).output == "2 bread after 1 tea"


async def test_a_key_finds_its_turn(journal: CrewServer, key: str) -> None:
    first = await note(journal, "tea", idempotency_key=key)
    await note(journal, "rain")
    again = await note(journal, "tea", idempotency_key=key)
    assert again.kickoff_id == first.kickoff_id
    assert journal.kickoffs == 2
    for other in ("other", None):
        with pytest.raises(pc.IdempotencyConflictError):
            await note(journal, "tea", idempotency_key=key, session=other)
    forced = await note(journal, "tea", idempotency_key=key, force_new=True)
    assert forced.output == "3 tea after 2 rain after 1 tea"


async def test_a_refused_start_takes_no_turn(journal: CrewServer) -> None:
    with pytest.raises(pc.InvalidInputsError):
        await pc.arun_crew(journal.crew(), {"note": "tea", "more": "x"}, session=SESSION)
    assert await turns(journal) == []
    assert journal.kickoffs == 0


# What is in the way


async def own(server: CrewServer, phase: RecordPhase, **facts: Any) -> RunRecord:
    """Write the first turn of a session down as its caller has left it."""
    facts = {"crew_url": server.url, "session": SESSION, "good_for": LONG_AGO, "post_deadline": 0.0, **facts}
    record = await put(new_record(**facts))
    turn = await sessions.take_turn(record, RECORDS)
    assert turn is not None
    record.turn = turn.number
    if phase is not RecordPhase.CLAIMED:
        assert await RECORDS.permit(record, LONG_AGO, before=Lease(60.0))
        record.phase = phase
        await RECORDS.save(record)
    return record


async def test_an_uncertain_turn_blocks_its_session(journal: CrewServer, key: str) -> None:
    first = (await own(journal, RecordPhase.UNCERTAIN)).idempotency_key
    with pytest.raises(SessionBlockedError) as caught:
        await note(journal, "tea", idempotency_key=key)
    assert caught.value.turn == 1
    assert caught.value.run == first
    assert caught.value.idempotency_key == key
    assert f"the kickoff of run '{first}' is uncertain. Nothing was started." in str(caught.value)
    assert f"prefect-crew runs resolve '{first}' --kickoff-id ID, or --never-started" in str(caught.value)
    assert journal.kickoffs == 0
    assert await attempts(key) == []
    assert (await note(journal, "rain", session="other")).output == "1 rain"
    await resolve_never_started(await unresolved(first, RECORDS), RECORDS)
    assert (await note(journal, "tea", idempotency_key=key)).output == "1 tea"


async def test_a_claim_of_a_dead_caller_is_voided(journal: CrewServer) -> None:
    record = await own(journal, RecordPhase.CLAIMED)
    assert (await note(journal, "tea")).output == "1 tea"
    assert [turn.number for turn in await turns(journal)] == [1, 2]
    (voided,) = await attempts(record.idempotency_key)
    assert voided.phase is RecordPhase.NOT_STARTED


async def test_a_lost_turn_blocks_its_session(journal: CrewServer, key: str) -> None:
    journal.faults.add("status:forgotten@1")
    wait = pc.WaitPolicy(grace=0.1, lost_after=1)
    with pytest.raises(pc.CrewLostError):
        await note(journal, "slow", idempotency_key=key, wait=wait)
    with pytest.raises(SessionBlockedError, match=r"is not known to the server.*--lost") as caught:
        await note(journal, "tea", wait=wait)
    assert caught.value.run == key
    await resolve_lost(await in_flight(key, RECORDS), RECORDS)
    assert (await note(journal, "tea")).output == "1 tea"


# What a caller that waits does to the run of another: nothing


@pytest.fixture
def long(crew_server: CrewServerFactory) -> CrewServer:
    return crew_server(script({"seconds": 60, "output": "done"}, inputs=["note"], flow=True))


@pytest.mark.parametrize("before", ["runs", "is over as it is cancelled", "is claimed"])
async def test_a_cancelled_waiter_changes_nothing(long: CrewServer, key: str, quick_look: None, before: str) -> None:
    ids, errors = list[Any](), list[Any]()

    @flow
    async def waits() -> None:
        ids.append(flow_run.id)
        errors.extend(await asyncio.gather(note(long, "rain"), return_exceptions=True))

    if before == "is claimed":
        await own(long, RecordPhase.CLAIMED, good_for=60.0)
    else:
        await long.crew().atrigger({"note": "a"}, session=SESSION, idempotency_key=key)
    kickoffs, waiting = long.kickoffs, asyncio.ensure_future(waits())
    await until(lambda: ids, "the flow run begins")
    await asyncio.sleep(1.5)
    if before == "is over as it is cancelled":
        await resolve_lost(await in_flight(key, RECORDS), RECORDS)
    async with get_client() as client:
        await client.set_flow_run_state(ids[0], Cancelling(), force=True)
    await asyncio.wait({waiting}, timeout=15)
    assert waiting.done(), "it still waits"
    assert isinstance(errors[0], FlowRunCancelledError)
    assert long.kickoffs == kickoffs
    assert long.requests["stop"] == 0


@pytest.mark.parametrize(
    ("task", "message"),
    [({"seconds": 60}, "is still running, and this call has waited for 1 s"), ({"human": True}, "is still waiting")],
    ids=["time", "people's time"],
)
async def test_limits_of_a_waiting_caller_are_its_own(crew_server: Any, key: str, task: Any, message: str) -> None:
    server = crew_server(script({**task, "output": "draft"}, inputs=["note"], flow=True))
    run = await server.crew().atrigger({"note": "a"}, session=SESSION, idempotency_key=key)
    policy = pc.WaitPolicy(timeout=1, on_timeout="stop", human_timeout=0.3, on_human_timeout="reject", max_rounds=1)
    with pytest.raises(SessionBlockedError, match=message):
        await asyncio.wait_for(note(server, "b", wait=policy), 20)
    assert server.kickoffs == 1
    assert server.requests["resume"] == server.requests["stop"] == 0
    (record,) = await attempts(key)
    assert record.kickoff_id == run.kickoff_id
    assert record.human_since is None


@pytest.mark.parametrize(("fault", "expected"), [("401", pc.AuthenticationError), ("drop", pc.CrewConnectionError)])
async def test_a_fault_of_the_status_call_blocks_no_session(long: CrewServer, fault: str, expected: Any) -> None:
    await long.crew().atrigger({"note": "a"}, session=SESSION)
    long.faults.add(f"status:{fault}")
    with pytest.raises(expected) as caught:
        await note(long, "b", wait=pc.WaitPolicy(error_timeout=0.3), kickoff_options={"retries": 0})
    assert (kickoff_fate(caught.value) is KickoffFate.RETRY) is (fault == "drop")
    assert long.kickoffs == 1


async def test_the_time_of_a_turn_does_not_count_for_the_next(crew_server: CrewServerFactory) -> None:
    server = crew_server(script({"seconds": 2.5, "output": "done"}, inputs=["note"], flow=True))
    await server.crew().atrigger({"note": "a"}, session=SESSION)
    await asyncio.sleep(1.5)
    again = await note(server, "b", wait=pc.WaitPolicy(timeout=3))
    assert again.output == "done"
    assert server.kickoffs == 2


async def test_a_waiting_caller_writes_nothing(journal: CrewServer, key: str, monkeypatch: pytest.MonkeyPatch) -> None:
    claims, claim = list[str](), PrefectRecords.claim

    async def counted(self: PrefectRecords, record: RunRecord, *rest: Any) -> bool:
        claims.append(record.idempotency_key)
        return await claim(self, record, *rest)

    await journal.crew().atrigger({"note": "slow"}, session=SESSION)
    monkeypatch.setattr(PrefectRecords, "claim", counted)
    await note(journal, "rain", idempotency_key=key)
    assert claims == [key]


async def test_a_turn_whose_run_is_of_another_key_is_uncertain(journal: CrewServer) -> None:
    record = await own(journal, RecordPhase.STARTED, kickoff_id=(run := f"run {uuid.uuid4()}"))
    other = await put(new_record(phase=RecordPhase.STARTED, kickoff_id=run, crew_url=journal.url))
    assert await RECORDS.other_holder(other) is None
    with pytest.raises(SessionBlockedError, match="--never-started"):
        await note(journal, "tea")
    assert (await unresolved(record.idempotency_key, RECORDS)).phase is RecordPhase.UNCERTAIN


async def test_a_turn_below_a_forced_run_can_be_resolved(journal: CrewServer) -> None:
    first = (await own(journal, RecordPhase.UNCERTAIN)).idempotency_key
    await pc.arun_crew(journal.crew(), {"note": "tea"}, idempotency_key=first, force_new=True)
    with pytest.raises(SessionBlockedError):
        await note(journal, "tea")
    await resolve_never_started(await unresolved(first, RECORDS), RECORDS)
    assert (await note(journal, "tea")).output == "1 tea"


async def test_a_secret_of_an_earlier_turn_is_not_shown(crew_server: Any, seen: Seen, key: str) -> None:
    says = "{{ pin }}{% if state.output %} after {{ state.output }}{% endif %}"
    server = crew_server(script({"output": says}, inputs=["pin"], flow=True))
    crew = server.crew(secret_inputs=["pin"])
    await pc.arun_crew(crew, {"pin": "first-4711"}, session=SESSION)
    second = await pc.arun_crew(crew, {"pin": "second-0815"}, session=SESSION, idempotency_key=key)
    assert second.output == "second-0815 after first-4711"
    shown = seen.post("/artifacts/filter", {}) + seen.post("/variables/filter", {})
    assert "first-4711" not in repr(shown)
    assert (await attempts(key))[0].result is None


# Bad options


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"session": ""}, "session is ''; it has to be a name of 1 to 200 characters"),
        ({"session": " \n"}, "it has to be a name of 1 to 200 characters"),
        ({"session": "x" * 201}, "it has to be a name of 1 to 200 characters"),
        ({"session": "c-{{ note }}"}, "200 characters, without braces or"),
        ({"session": "a\nb"}, r"session is 'a\\nb'; it has to be .*, without braces or control characters"),
        ({"session": "\ud800"}, "holds half a character"),
        ({"session": 42}, "session is a value of type int"),
        ({"restore_from": str(uuid.uuid4())}, "A session chooses the state to restore itself"),
        ({"id_": str(uuid.uuid4())}, r"The input 'id' names the state of a Flow, .*Leave the input"),
    ],
)
async def test_bad_options_start_nothing(journal: CrewServer, options: dict[str, Any], message: str) -> None:
    with pytest.raises(pc.ConfigurationError, match=message) as caught:
        await note(journal, "tea", **options)
    assert "Nothing was started." in str(caught.value)
    assert journal.requests.total() == 0


# Other ways in


async def test_tasks_and_deployed_flows_have_sessions(journal: CrewServer) -> None:
    block = f"journal-{uuid.uuid4().hex[:8]}"
    await journal.crew().save(block)

    async def in_pieces() -> str:
        kickoff_id = await pc.kickoff_crew(block, {"note": "tea"}, session=SESSION)
        return (await pc.wait_for_crew(block, kickoff_id)).output

    assert (await acall_in_flow(in_pieces))[1] == "1 tea"
    deployed: Any = pc.crew_flow(block)
    assert (await deployed({"note": "rain"}, session=SESSION)).output == "2 rain after 1 tea"
    form = await asyncio.to_thread(lambda: deployed.to_deployment("x"))
    assert form._parameter_openapi_schema.properties["session"]["title"] == "Session"
    assert (await pc.run_deployed_crew(block, {"note": "bread"}, session=SESSION)).output.startswith("3 bread")
