"""What becomes of rows: crews that fail, servers that fail, tokens that are refused, kickoffs of which nobody knows."""

import asyncio
import uuid
from typing import Any

import pytest

import prefect_crew as pc
from prefect_crew.batches import hold, throttle
from prefect_crew.batches.batch import find_batch
from prefect_crew.batches.report import BatchArtifact
from prefect_crew.devserver import CrewServer
from prefect_crew.runs import start
from prefect_crew.runs.database import find_store
from prefect_crew.store.batches import hold_batch
from prefect_crew.testing import CrewServerFactory
from support.batches import Batches, topics
from support.crash import CrashingServer
from support.held import Held
from support.scripts import FAILS, PICKY, script, slow
from support.waiting import soon, until


async def test_an_appended_file_ends_the_batch(batch: Batches, echo: CrewServer):
    path = batch.folder / "rows.csv"
    path.write_text("topic\n" + "tea\n" * 3000)

    def append(progress: pc.BatchReport) -> None:
        if progress.phase == "running":
            with path.open("a") as file:
                file.write("late\n" * 3000)

    with pytest.raises(
        pc.DatasetError, match=r"changed during the read.*The rows that were started are in the crew database"
    ):
        await batch(echo.crew(), path, name="appended to", max_in_flight=10, on_progress=append)
    assert 0 < echo.kickoffs < 3000


def most(kickoffs: int) -> pc.Budget:
    """Return a budget of so many kickoffs for all calls of a batch."""
    return pc.Budget(name="kickoffs", per="batch", max_kickoffs=kickoffs)


async def test_a_batch_that_another_process_has_taken_writes_nothing(
    batch: Batches, crew_server: CrewServerFactory, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(hold, "RENEW_EVERY", 0.3)
    server = crew_server(Held())
    running = asyncio.ensure_future(batch(server.crew(), topics(2000), name="lost", max_in_flight=5))
    await until(lambda: server.kickoffs >= 5, "5 kickoffs")
    mine = (await find_batch("lost")).entry
    assert await find_store().run(hold_batch, "lost", "another", dead_process=mine.process) is not None
    with pytest.raises(pc.BatchBusyError):
        await soon(running)
    assert (await find_batch("lost")).entry.owner == "another", "it keeps its hold"
    assert batch.output.exists() is False
    assert server.kickoffs <= 6


async def test_a_batch_of_another_machine_is_taken_over_once_its_hold_is_over(
    batch: Batches, echo: CrewServer, monkeypatch: pytest.MonkeyPatch
):
    await batch(echo.crew(), topics(2), name="elsewhere", budgets=[most(1)])
    store = find_store()
    assert await store.run(hold_batch, "elsewhere", "dead", process="host/boot/pid:[1] 1") is not None
    monkeypatch.setattr("prefect_crew.store.batches.HELD_FOR", 3.0)
    assert (await batch(echo.crew(), topics(2), name="elsewhere")).ok
    assert echo.kickoffs == 2


async def test_a_share_of_failures_stops_a_batch(batch: Batches, crew_server: CrewServerFactory):
    server = crew_server(PICKY)
    bad = {5, 10, 15, 20, 25}
    report = await batch(server.crew(), topics(30, bad), max_in_flight=1, on_failure=0.1, name="share")
    assert report.stopped is not None
    assert report.kickoffs == 20
    assert report.skipped == 10
    assert server.kickoffs == 20
    again = await batch(server.crew(max_attempts=1), topics(30, bad), name="share")
    assert again.completed == 25
    assert again.failed == 5
    assert again.skipped == 0
    assert server.kickoffs == 30, "no attempt is left for rows that failed"
    assert len(batch.lines()) == 30


async def test_a_long_look_does_not_hold_up_the_end(
    batch: Batches, crew_server: CrewServerFactory, monkeypatch: pytest.MonkeyPatch
):
    looks = list[bool]()

    async def update(self: BatchArtifact, report: pc.BatchReport, failures: Any) -> None:
        if report.phase != "done":
            looks.append(True)
            await asyncio.sleep(3600)

    monkeypatch.setattr(BatchArtifact, "update", update)
    monkeypatch.setattr("prefect_crew.batches.runner.TICK", 0.05)
    report = await soon(batch(crew_server(slow(1.0)).crew(), topics(1), name="looked-at", inputs={"text": "topic"}))
    assert report.completed == 1
    assert len(looks) == 1


async def test_a_budget_of_kickoffs_holds_for_all_calls_together(batch: Batches, echo: CrewServer):
    for limit in (7, 7, 12):
        report = await batch(echo.crew(), topics(20), budgets=[most(limit)], name="limited", max_in_flight=4)
        assert report.completed == echo.kickoffs == limit
        assert f"of {limit} kickoffs are used" in (report.stopped or "")
    assert (await batch(echo.crew(), topics(20), name="limited")).ok
    assert len(batch.lines()) == 20


async def test_failures_in_a_row_stop_a_batch(batch: Batches, crew_server: CrewServerFactory):
    server = crew_server(FAILS)
    report = await batch(server.crew(), topics(200), name="down", max_in_flight=20, breaker=5)
    assert report.stopped == "5 rows failed in a row. Last error: the search engine is down"
    assert server.kickoffs <= 5 + 20, "the five, and those in flight with them"
    assert report.failed + report.skipped == 200
    assert len(batch.lines()) == report.failed


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
    monkeypatch.setattr(start, "LIMITED_FOR", 0.1)
    held = Held()
    server = crew_server(held, faults=[f"kickoff:429=0.05@{number}" for number in range(2, 100)])
    running = asyncio.ensure_future(batch(server.crew(), topics(4), max_in_flight=2))
    await until(lambda: server.requests["kickoff"] >= 5, "refused for longer than a batch tries")
    server.faults.clear()
    held.release()
    report = await soon(running)
    assert report.completed == 4
    assert report.stopped is None
    assert server.kickoffs == 4
    assert caplog.text.count("The batch pauses and tries again.") == 1, "it is said once a minute"


async def test_a_row_waits_for_the_room_of_another(
    batch: Batches, crew_server: CrewServerFactory, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(throttle, "REFUSED_PAUSE", 0.05)
    spec = script({"seconds": 0.2, "output": "x"}, inputs=["topic"], usage={"total_tokens": 10})
    server = crew_server(spec, response_format="live")
    budget = pc.Budget(max_tokens=100, estimate_tokens=60)
    report = await batch(server.crew(), topics(5), budgets=[budget], name="room")
    assert (report.completed, report.stopped) == (5, None), "the estimates of two rows have no room together"
    report = await batch(server.crew(), topics(6), budgets=[budget], name="room")
    assert (report.completed, report.skipped, server.kickoffs) == (5, 1, 5)
    assert "max_tokens" in str(report.stopped) or "tokens" in str(report.stopped)


async def test_a_server_of_uncertain_kickoffs_stops_the_batch(batch: Batches, echo: CrewServer):
    echo.faults.add("kickoff:500")
    report = await batch(echo.crew(), topics(300), breaker=5, max_in_flight=100)
    assert "5 rows failed in a row" in str(report.stopped)
    assert report.uncertain == 5


@pytest.mark.parametrize("show", ["full", "none"])
async def test_a_refused_row_has_its_reason_and_is_tried_again(batch: Batches, echo: CrewServer, show: Any):
    echo.faults.add("kickoff:422@1")
    report = await batch(echo.crew(show=show), topics(3), name="refused")
    assert (report.completed, report.failed, report.unfinished, report.skipped) == (2, 1, 1, 0)
    [line] = [line for line in batch.lines().values() if line["state"] != "completed"]
    assert line["state"] == "not-started"
    assert ("422" in line["error"]) is (show == "full")
    assert [row.error for row in await (await find_batch("refused")).failures()] == [line["error"]]
    assert (await batch(echo.crew(), topics(3), name="refused")).ok
    assert echo.kickoffs == 3


ASKS = script({"name": "draft", "output": "a draft", "human": True}, {"output": "printed"}, inputs=["topic"])


async def test_a_row_over_its_time_is_left_or_stopped(batch: Batches, crew_server: CrewServerFactory):
    server, rows = crew_server(slow(30)), topics(3)
    policy = pc.WaitPolicy(initial=0.05, timeout=0.3)
    report = await batch(server.crew(), rows, name="late", wait=policy)
    assert report.failed == 3
    assert dict(report.errors) == {"CrewTimeoutError": 3}
    assert report.unfinished == 3
    assert batch.lines() == {}, "they are in flight"
    assert {str(run.state) for run in server.runs} == {"running"}
    strict = pc.WaitPolicy(initial=0.05, timeout=0.3, on_timeout="stop")
    report = await batch(server.crew(), rows, name="late", wait=strict)
    assert server.kickoffs == 3, "they were in flight"
    assert {str(run.state) for run in server.runs} == {"stopped"}
    report = await batch(server.crew(max_attempts=1), rows, name="late")
    assert report.failed == 3
    assert {line["state"] for line in batch.lines().values()} == {"stopped"}


async def test_a_lost_run_is_not_started_again(batch: Batches, crew_server: CrewServerFactory):
    server, rows = crew_server(slow(0.2), faults=["status:forgotten@2"]), topics(3)
    quick = pc.WaitPolicy(initial=0.05, factor=1, grace=0.1, lost_after=0.5)
    for _ in range(2):
        report = await batch(server.crew(), rows, name="lost", wait=quick, max_in_flight=1)
        assert (report.completed, report.unfinished) == (2, 1)
        assert dict(report.errors) == {"CrewLostError": 1}
    assert server.kickoffs == 3
