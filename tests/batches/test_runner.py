"""What becomes of rows: crews that fail, servers that fail, tokens that are refused, kickoffs of which nobody knows."""

import asyncio
import logging
import uuid
from collections.abc import AsyncIterator
from typing import Any

import pytest
from pydantic import SecretStr, create_model
from sqlalchemy.exc import OperationalError

import prefect_crew as pc
from prefect_crew.batches import throttle
from prefect_crew.batches.ledger import PAGE, Ledger
from prefect_crew.batches.options import BatchOptions
from prefect_crew.batches.outcomes import RowState
from prefect_crew.batches.report import BatchArtifact, BatchProgress
from prefect_crew.batches.runner import Runner
from prefect_crew.batches.stored import batches_waiting_for_people
from prefect_crew.batches.throttle import FirstPoll
from prefect_crew.blocks import crew_of
from prefect_crew.client.inputs import Inputs
from prefect_crew.crew import CrewSession
from prefect_crew.devserver import CrewServer
from prefect_crew.records.decision import Caller
from prefect_crew.records.keys import RunIdentity
from prefect_crew.records.model import Lease, RecordPhase, RunRecord, StoredResult
from prefect_crew.records.notes import keep_question, kept_questions
from prefect_crew.runs import kickoff
from prefect_crew.runs.kickoff import start_run
from prefect_crew.runs.options import RunRequest
from prefect_crew.runs.reviews.answer import resume_run
from prefect_crew.runs.run import LiveRun
from prefect_crew.testing import CrewServerFactory
from support.batches import Batches, row_plan, topics
from support.crash import CrashingServer
from support.held import Held
from support.records import CLAIMED, NOT_STARTED, STARTED
from support.scripts import FAILS, PICKY, script, slow
from support.waiting import until


@pytest.fixture
async def session(echo: CrewServer) -> AsyncIterator[CrewSession]:
    async with CrewSession(crew_of(echo.crew())) as session:
        yield session


def ledger_of(batch: Batches, name: str) -> Ledger:
    return Ledger(f"{batch.output}.ledger.db", name)


async def test_an_appended_file_ends_the_batch(batch: Batches, echo: CrewServer):
    path = batch.folder / "rows.csv"
    path.write_text("topic\n" + "tea\n" * 3000)

    def append(progress: BatchProgress) -> None:
        if progress.phase == "running":
            with path.open("a") as file:
                file.write("late\n" * 3000)

    with pytest.raises(pc.DatasetError, match=r"changed during the read.*The rows that were started are in"):
        await batch(echo.crew(), path, name="appended to", max_in_flight=10, on_progress=append)
    assert 0 < echo.kickoffs < 3000


async def test_a_batch_without_its_lock_writes_nothing(
    batch: Batches, crew_server: CrewServerFactory, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("prefect_crew.batches.runner.TICK", 0.05)
    server = crew_server(Held())
    running = asyncio.ensure_future(batch(server.crew(), topics(2000), name="lock lost", max_in_flight=5))
    await until(lambda: server.kickoffs >= 5, "5 kickoffs")
    (file,) = batch.folder.glob("*.lock")
    file.unlink()
    report = await asyncio.wait_for(running, 60)
    assert str(report.stopped).startswith("its lock was lost: another process has taken the batch over")
    async with ledger_of(batch, "lock lost") as ledger:
        assert sum((await ledger.counts()).values()) <= 2 * PAGE, "it reads no further"
        entry = await ledger.entry()
    assert entry is not None
    assert entry.exported is None
    assert entry.generation == 1
    assert batch.output.exists() is False


async def test_a_share_of_failures_stops_a_batch(batch: Batches, crew_server: CrewServerFactory):
    server = crew_server(PICKY)
    bad = {5, 10, 15, 20, 25}
    report = await batch(server.crew(), topics(30, bad), max_in_flight=1, on_failure=0.1, name="share")
    assert report.stopped is not None
    assert report.kickoffs == 20
    assert report.skipped == 10
    assert server.kickoffs == 20
    again = await batch(server.crew(), topics(30, bad), name="share")
    assert again.completed == 25
    assert again.failed == 5
    assert again.skipped == 0
    assert server.kickoffs == 30, "rows that failed are not started again"
    assert len(batch.lines()) == 30


async def test_a_long_look_does_not_hold_up_the_end(
    batch: Batches, crew_server: CrewServerFactory, monkeypatch: pytest.MonkeyPatch
):
    looks = list[bool]()

    async def update(self: BatchArtifact, progress: BatchProgress, report: pc.BatchReport | None = None) -> None:
        if report is None:
            looks.append(True)
            await asyncio.sleep(60)

    monkeypatch.setattr(BatchArtifact, "update", update)
    monkeypatch.setattr("prefect_crew.batches.runner.TICK", 0.05)
    async with asyncio.timeout(30):
        report = await batch(crew_server(slow(1.0)).crew(), topics(1), name="looked-at", inputs={"text": "topic"})
    assert report.completed == 1
    assert len(looks) == 1


async def test_a_limit_on_kickoffs_holds_for_all_calls_together(batch: Batches, echo: CrewServer):
    for limit in (7, 7, 12):
        report = await batch(echo.crew(), topics(20), max_kickoffs=limit, name="limited", max_in_flight=4)
        assert report.completed == echo.kickoffs == limit
        assert f"limit of {limit} kickoffs" in (report.stopped or "")
    assert (await batch(echo.crew(), topics(20), name="limited")).ok
    assert len(batch.lines()) == 20


async def test_failed_retries_count_for_the_breaker(batch: Batches, crew_server: CrewServerFactory):
    server = crew_server(FAILS)
    about: dict[str, Any] = {"name": "down", "max_in_flight": 20, "breaker": 5}
    report = await batch(server.crew(max_attempts=3), topics(200), retries=2, **about)
    assert report.stopped == "5 rows failed in a row. Last error: the search engine is down"
    assert server.kickoffs <= 5 + 20, "the five, and those in flight with them"
    assert report.failed + report.skipped == 200
    assert len(batch.lines()) == report.failed, "a row whose retry was not sent any more has failed"


async def test_earlier_failures_do_not_count_for_the_breaker(batch: Batches, crew_server: CrewServerFactory):
    crew = Held(until=lambda _: True)
    server, options = crew_server(crew), {"name": "misfits", "output_type": create_model("Score", score=(int, ...))}
    report = await batch(server.crew(), topics(30), breaker=None, **options)
    assert report.errors == {"OutputTypeError": 30}
    crew.output = '{"score": 1}'
    report = await batch(server.crew(), topics(30), breaker=5, retry_failed=True, **options)
    assert report.completed == 30
    assert report.kickoffs == 30
    assert report.stopped is None


async def test_a_wrong_token_fails_one_row_and_stops_the_batch(batch: Batches, echo: CrewServer):
    echo.faults.add("kickoff:401")  # it tells its inputs to anybody, so the first to meet the token is a kickoff
    report = await batch(echo.crew(), topics(200), name="token")
    assert report.completed == 0
    assert report.failed == 1
    assert report.skipped == 199
    assert "401" in (report.stopped or "")
    assert echo.requests["kickoff"] == 1
    echo.faults.clear()
    report = await batch(echo.crew(), topics(200), name="token", max_in_flight=50)
    assert report.completed == 200
    assert echo.kickoffs == 200


async def test_a_token_that_is_revoked_on_the_way_loses_nothing(batch: Batches, crew_server: CrewServerFactory):
    held = Held()
    server = crew_server(held)
    good, crew = server.token, server.crew()
    running = asyncio.ensure_future(batch(crew, topics(100), name="revoked", max_in_flight=30))
    await until(lambda: server.kickoffs >= 30, "30 kickoffs")
    server.token = "another"
    report = await running
    assert report.stopped is not None
    assert report.failed == 0
    assert report.skipped == 100, "what is in flight is left there"
    assert server.unauthorized < 60, "not one for each row in flight again and again"
    server.token = good
    held.release()
    report = await batch(crew, topics(100), name="revoked")
    assert report.completed == 100
    assert server.kickoffs == 100
    assert len(batch.lines()) == 100


async def test_a_rotated_token_is_taken_up_by_all_rows(batch: Batches, crew_server: CrewServerFactory):
    server = crew_server(slow(0.5))
    name: Any = f"rotated-{uuid.uuid4().hex[:8]}"
    await server.crew().save(name)
    running = asyncio.ensure_future(batch(name, topics(60), max_in_flight=20))
    await until(lambda: server.kickoffs >= 20, "20 kickoffs")
    await server.crew(token="fresh-token").save(name, overwrite=True)
    server.token = "fresh-token"
    report = await running
    assert report.completed == 60
    assert report.stopped is None
    assert server.kickoffs == 60


async def test_a_server_that_is_away_for_a_while_fails_no_row(batch: Batches):
    quick = pc.WaitPolicy(initial=0.05, factor=1)
    with CrashingServer(slow(0.1)) as server:
        running = asyncio.ensure_future(batch(server.crew(), topics(40), max_in_flight=2, wait=quick))
        await until(lambda: server.kickoffs >= 10, "10 kickoffs")
        server.stop()
        await asyncio.sleep(1.5)
        server.restart()  # the runs that were in flight begin again
        report = await running
    assert report.stopped is None
    # A kickoff that was cut off is uncertain.
    assert report.completed >= 38
    assert report.completed + report.uncertain == 40


async def test_a_full_server_does_not_end_a_batch(
    batch: Batches, crew_server: CrewServerFactory, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    monkeypatch.setattr(throttle, "GIVE_UP_AFTER", 0.2)
    monkeypatch.setattr(kickoff, "LIMITED_FOR", 0.1)
    held = Held()
    server = crew_server(held, faults=[f"kickoff:429=0.05@{number}" for number in range(2, 100)])
    running = asyncio.ensure_future(batch(server.crew(), topics(4), max_in_flight=2))
    await until(lambda: server.requests["kickoff"] >= 5, "refused for longer than a batch tries", seconds=60)
    server.faults.clear()
    held.release()
    report = await asyncio.wait_for(running, 60)
    assert report.completed == 4
    assert report.stopped is None
    assert server.kickoffs == 4
    assert caplog.text.count("The batch pauses and tries again.") == 1, "it is said once a minute"


NO_ROOM = pc.BudgetExceededError(budget="b", counter="b.cost", measure="cost", used=1, limit=1, estimate=1)


@pytest.mark.parametrize("other_row", ["starts meanwhile", "ends meanwhile"])
async def test_a_row_waits_for_the_room_of_another(
    ledger: Ledger, session: CrewSession, echo: CrewServer, monkeypatch: pytest.MonkeyPatch, other_row: str
):
    """A budget refuses a row, but another row takes the last room, or gives room back, before the refusal arrives."""
    monkeypatch.setattr(throttle, "REFUSED_PAUSE", 0.05)
    pace, calls, second = throttle.Throttle(BatchOptions()), list[RunIdentity](), asyncio.Event()
    runner = Runner(session, pace, ledger, BatchOptions(), max_in_flight=50, on_end=lambda _: None)
    if other_row == "starts meanwhile":
        pace.accepted()  # so that two rows are let in at once

    async def race(request: Any, identity: RunIdentity, *rest: Any) -> Any:
        calls.append(identity)
        if len(calls) == 1 and other_row == "starts meanwhile":
            await second.wait()
            raise NO_ROOM
        if len(calls) == 2 and other_row == "ends meanwhile":
            assert runner.waiting
            await until(lambda: not runner.waiting, "the other row has ended")
            raise NO_ROOM
        second.set()
        return await start_run(request, identity, *rest)

    monkeypatch.setattr("prefect_crew.batches.runner.start_run", race)
    await asyncio.wait_for(runner.run(row_plan(topics(2), crew=session.crew).jobs()), 60)
    assert len(calls) == 3
    assert pace.stopped is None
    assert len(set(echo.kickoffs_by_key)) == 2


async def test_a_server_of_uncertain_kickoffs_stops_the_batch(batch: Batches, echo: CrewServer):
    echo.faults.add("kickoff:500")
    report = await batch(echo.crew(), topics(300), breaker=5, max_in_flight=100)
    assert "5 rows failed in a row" in str(report.stopped)
    assert report.uncertain == 5


async def start(ledger: Ledger, session: CrewSession) -> None:
    """Start the row "k", as a batch does."""
    identity = RunIdentity(ledger.idempotency_key("k"), "place", Caller(owner=uuid.uuid4().hex))
    request = RunRequest(session.crew, Inputs.of({"topic": "a"}), is_row=True)
    await start_run(request, identity, ledger, session)


async def phases(ledger: Ledger) -> list[RecordPhase]:
    return [attempt.phase for attempt in await ledger.attempts(ledger.idempotency_key("k"))]


async def test_a_row_is_not_sent_after_its_claim(
    ledger: Ledger, session: CrewSession, echo: CrewServer, monkeypatch: pytest.MonkeyPatch
):
    leases = list[Lease]()  # the ledger tells others by the age of the claim alone when it may be resolved

    def lease(seconds: float) -> Lease:
        leases.append(Lease(seconds))
        return leases[-1]

    def sleeping(*_: Any, **__: Any) -> None:
        if len(leases) == 1:
            leases[0].end()

    monkeypatch.setattr(kickoff, "Lease", lease)
    monkeypatch.setattr(kickoff, "webhooks_for", sleeping)
    await start(ledger, session)
    assert await phases(ledger) == [NOT_STARTED, STARTED]
    assert echo.requests["kickoff"] == 1


async def test_a_late_refusal_did_not_start(
    ledger: Ledger, session: CrewSession, echo: CrewServer, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(kickoff, "FINISH", 0.05)
    echo.faults.add("kickoff:latency=1.0@1", "kickoff:404@1")
    starting = asyncio.ensure_future(start(ledger, session))
    await until(lambda: echo.requests["kickoff"], "the kickoff")
    starting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await starting
    assert await phases(ledger) == [CLAIMED]

    async def is_refused() -> bool:
        return await phases(ledger) == [NOT_STARTED]

    await until(is_refused, "the refusal")


async def test_a_row_cancelled_in_its_claim_is_none(
    ledger: Ledger, session: CrewSession, echo: CrewServer, monkeypatch: pytest.MonkeyPatch
):
    run, committing, go_on = ledger.database.run, asyncio.Event(), asyncio.Event()

    async def slowly(work: Any) -> Any:
        committing.set()
        await go_on.wait()
        return await run(work)

    monkeypatch.setattr(ledger.database, "run", slowly)
    starting = asyncio.ensure_future(start(ledger, session))
    await committing.wait()
    starting.cancel()
    await asyncio.wait({starting}, timeout=0.1)
    go_on.set()
    with pytest.raises(asyncio.CancelledError):
        await starting
    assert await phases(ledger) == [NOT_STARTED]
    await start(ledger, session)
    assert await phases(ledger) == [NOT_STARTED, STARTED]
    assert echo.requests["kickoff"] == 1


async def test_an_id_that_cannot_be_stored_is_logged(
    ledger: Ledger,
    session: CrewSession,
    echo: CrewServer,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
):
    run = ledger.database.run

    async def away_once_started(work: Any) -> Any:
        if echo.runs:
            raise OperationalError("", {}, Exception("disk I/O error"))
        return await run(work)

    monkeypatch.setattr(ledger.database, "run", away_once_started)
    ledger.writer.retry_for = 0.1
    with caplog.at_level(logging.ERROR, "prefect_crew"), pytest.raises(pc.LedgerError, match="disk I/O error"):
        await start(ledger, session)
    monkeypatch.undo()
    assert await phases(ledger) == [CLAIMED]
    assert f"prefect-crew runs resolve batch/b/k --kickoff-id {echo.runs[0].id}" in caplog.text


ASKS = script({"name": "draft", "output": "a draft", "human": True}, {"output": "printed"}, inputs=["topic"])


async def test_without_the_ledger_the_message_says_how_to_answer_a_row(batch: Batches, crew_server: CrewServerFactory):
    server, another = crew_server(ASKS), crew_server(ASKS)
    crew = server.crew()

    async def is_listed() -> bool:
        async with batches_waiting_for_people() as (batches, _):
            return "asks" in [stored.name for stored in batches]

    running = asyncio.ensure_future(batch(crew, [{"topic": "tea"}], name="asks"))
    await until(is_listed, "its row asks")
    run = LiveRun(crew_of(crew), server.runs[0].id)
    with pytest.raises(pc.CrewError, match=r"nothing was sent\. Answer a row with prefect-crew reviews approve"):
        await resume_run(run, feedback="", approve=True)
    assert server.requests["resume"] == 0
    async with crew.client() as client:
        await client.resume(run.kickoff_id, "draft", "fine", True)
    assert (await running).ok
    single = await another.crew().atrigger({"topic": "tea"})
    await until(lambda: str(another.runs[0].state) == "waiting", "it asks")
    await resume_run(LiveRun(crew_of(another.crew()), single.kickoff_id), feedback="", approve=True)
    assert another.requests["resume"] == 1, "a batch of another crew is not an obstacle"


async def test_a_row_over_its_time_is_left_or_stopped(batch: Batches, crew_server: CrewServerFactory):
    server, rows = crew_server(slow(30)), topics(3)
    policy = pc.WaitPolicy(initial=0.05, timeout=0.3)
    report = await batch(server.crew(), rows, name="late", wait=policy)
    assert report.failed == 3
    assert dict(report.errors) == {"CrewTimeoutError": 3}
    assert {line["state"] for line in batch.lines().values()} == {"timed-out"}
    assert {str(run.state) for run in server.runs} == {"running"}
    strict = pc.WaitPolicy(initial=0.05, timeout=0.3, on_timeout="stop")
    report = await batch(server.crew(), rows, name="late", wait=strict)
    assert server.kickoffs == 3, "they were in flight"
    assert {str(run.state) for run in server.runs} == {"stopped"}
    report = await batch(server.crew(), rows, name="late")
    assert report.failed == 3
    assert {line["state"] for line in batch.lines().values()} == {"stopped"}


async def test_a_lost_run_is_started_only_by_its_key(batch: Batches, crew_server: CrewServerFactory):
    server, rows = crew_server(slow(0.2), faults=["status:forgotten@2"]), topics(3)
    quick = pc.WaitPolicy(initial=0.05, factor=1, grace=0.1, lost_after=0.5)
    report = await batch(server.crew(), rows, name="lost", wait=quick, max_in_flight=1)
    assert report.completed == 2
    assert dict(report.errors) == {"CrewLostError": 1}
    [key] = [key for key, line in batch.lines().items() if line["state"] == "lost"]
    for retry_failed, completed in ((True, 2), ([key], 3)):
        report = await batch(server.crew(), rows, name="lost", wait=quick, retry_failed=retry_failed)
        assert report.completed == completed
        assert server.kickoffs == completed + 1


async def test_a_person_that_a_row_waits_for_is_not_timed_out(batch: Batches, crew_server: CrewServerFactory):
    server = crew_server(ASKS)
    crew, wait = server.crew(), pc.WaitPolicy(initial=0.05, factor=1, timeout=0.5)
    running = asyncio.ensure_future(batch(crew, topics(1), name="people", wait=wait))
    await until(lambda: [str(run.state) for run in server.runs] == ["waiting"], "it asks")
    await asyncio.sleep(0.8)
    url, kickoff_id = SecretStr("https://x.example/r"), server.runs[0].id
    await keep_question(pc.ReviewRequest(id="r", kickoff_id=kickoff_id, task_id="draft", callback_url=url))
    async with crew.client() as client:
        await client.resume(kickoff_id, "draft", "fine", True)
    assert (await running).ok
    assert await kept_questions(kickoff_id) == {}, "the question is forgotten"
    async with ledger_of(batch, "people") as ledger:
        [row] = [row async for row in ledger.rows_in([RowState.COMPLETED])]
    assert row.record is not None
    assert row.record.human_seconds > 0.5
    assert row.record.state is pc.CrewState.COMPLETED


async def test_the_first_poll_comes_when_the_fastest_tenth_of_runs_has_ended():
    times = FirstPoll()

    def add(seconds: float) -> None:
        times.add(RunRecord.model_construct(result=StoredResult(output="", execution_time=seconds)))

    assert times.seconds == 0
    for seconds in range(100, 120):
        add(float(seconds))
    assert 100 <= times.seconds <= 102
    for _ in range(200):
        add(5.0)
    assert times.seconds == 5.0
