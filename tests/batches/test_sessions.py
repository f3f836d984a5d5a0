"""Rows of a batch that are turns of sessions: their order, the states they start from, and the turns of other calls."""

import asyncio
import re
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from pydantic import SecretStr

import prefect_crew as pc
from prefect_crew.batches import runner
from prefect_crew.client.models import CrewInput
from prefect_crew.devserver import CrewServer
from prefect_crew.runs.database import find_store
from prefect_crew.runs.keys import escape_name
from prefect_crew.store import attempts
from prefect_crew.store.decision import AttemptState
from prefect_crew.testing import CrewServerFactory
from support.batches import Batches, let_an_hour_pass, row_plan
from support.scripts import JOURNAL
from support.waiting import until

pytestmark = pytest.mark.usefixtures("prefect_api", "instant_polling")
ANN, BOB = "customer-ann", "customer-bob"


@pytest.fixture
def journal(crew_server: CrewServerFactory) -> CrewServer:
    return crew_server(JOURNAL)


def days(*notes: str, who: str = ANN) -> list[dict[str, Any]]:
    return [{"day": f"{who} {number}", "note": note, "who": who} for number, note in enumerate(notes, 1)]


async def run(batch: Batches, server: CrewServer, rows: list[dict[str, Any]], **options: Any) -> pc.BatchReport:
    """Run a batch of days; a second call of a test goes on with it."""
    crew = options.pop("crew", None) or server.crew()
    return await batch(crew, rows, key="day", session="who", name=f"journal {batch.folder.name}", **options)


def outputs(batch: Batches) -> list[str]:
    return [line["output"] for line in batch.lines().values()]


async def test_rows_of_a_session_are_turns_in_their_order(batch: Batches, journal: CrewServer):
    rows = [*days("slow", "bad", "rain", "bread"), *days("milk", "sun", who=BOB)]
    report = await run(batch, journal, [*rows, {"day": "none", "note": "alone", "who": ""}])
    assert report.completed == 6
    assert report.failed == 1
    assert journal.kickoffs == 7
    ann = ("1 slow", None, "2 rain after 1 slow", "3 bread after 2 rain after 1 slow")
    assert outputs(batch) == [*ann, "1 milk", "2 sun after 1 milk", "1 alone"], "a failed row is not built on"
    own = await find_store().run(attempts.list_attempts, session=ANN)
    assert sorted(attempt.turn or 0 for attempt in own) == [1, 2, 3, 4]


async def test_waiting_rows_leave_room_for_others(batch: Batches, journal: CrewServer, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(runner, "READ_AHEAD", 3)
    rows = [*days("slow", "slow", "slow", "slow"), *days("milk", "slow", who=BOB), *days("sun", who="customer-carl")]
    assert (await run(batch, journal, rows, max_in_flight=2)).ok
    began = [run.inputs["note"] for run in sorted(journal.runs, key=lambda run: run.created_at)]
    assert began[:2] == ["slow", "milk"], "the second place is not for a row that waits"
    spans = [(run.created_at, run.created_at + timedelta(seconds=run.execution_time)) for run in journal.runs]
    assert max(sum(start <= at < end for start, end in spans) for at, _ in spans) == 2


async def test_rows_and_single_runs_wait_for_each_other(batch: Batches, journal: CrewServer, tmp_path: Path):
    first = asyncio.ensure_future(pc.arun_crew(journal.crew(), {"note": "slow"}, session=ANN))
    await until(lambda: journal.kickoffs == 1, "the first run is in flight")
    other = Batches(tmp_path / "other")
    other.folder.mkdir()
    slow = pc.arun_crew(journal.crew(), {"note": "slow"}, session=ANN)
    *_, last = await asyncio.gather(run(batch, journal, days("slow")), run(other, journal, days("slow")), slow)
    texts = [(await first).output, *outputs(batch), *outputs(other), last.output]
    assert texts[0] == "1 slow"
    assert sorted(text[0] for text in texts) == ["1", "2", "3", "4"]
    assert max(texts, key=len).count("after") == 3
    runs = sorted(journal.runs, key=lambda run: run.created_at)
    assert [run.restore_from for run in runs] == [None, *(run.id for run in runs[:-1])]


async def test_an_uncertain_row_blocks_the_rows_after_it(batch: Batches, crew_server: CrewServerFactory):
    server, rows = crew_server(JOURNAL, faults=["kickoff:500@1"]), [*days("tea", "rain"), *days("sun", who=BOB)]
    report = await run(batch, server, rows)
    assert report.uncertain == 1
    assert report.completed == 1
    assert server.kickoffs == 1, "the first kickoff is answered with 500"
    assert report.errors == {"SessionBlockedError": 1}
    with pytest.raises(pc.SessionBlockedError, match="nobody knows whether its kickoff started a run"):
        await pc.arun_crew(server.crew(), {"note": "x"}, session=ANN)
    await let_an_hour_pass()
    store = find_store()
    [attempt] = await store.run(attempts.of_key, f"batch/{escape_name(report.name)}/{ANN} 1")
    await store.run(attempts.resolve, attempt, AttemptState.NOT_STARTED, "a test")
    assert (await run(batch, server, rows)).ok
    assert outputs(batch)[:2] == ["1 tea", "2 rain after 1 tea"]


async def test_rows_wait_for_a_run_whose_row_runs_no_more(batch: Batches, journal: CrewServer):
    """Ann's first row has left the data set when the batch goes on, and Bob's has other inputs."""
    soon = pc.WaitPolicy(initial=0.02, factor=1.0, jitter=0, timeout=0.3)
    report = await run(batch, journal, [*days("slow"), *days("slow", who=BOB)], wait=soon)
    assert report.errors == {"CrewTimeoutError": 2}
    again = await run(batch, journal, [*days("tea", "rain")[1:], *days("tea", "sun", who=BOB)])
    assert again.completed == 2
    assert again.conflicts == 1
    assert journal.kickoffs == 4
    assert outputs(batch) == ["2 rain after 1 slow", None, "2 sun after 1 slow"]


TOPIC = [CrewInput(name="note")]


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        pytest.param({"who": SecretStr("b")}, "its session holds a secret, but logs show", id="secret"),
        pytest.param({}, "there is no column 'who', which is the session; the columns are note", id="none"),
        pytest.param({"who": "x" * 201}, "its session is not a name of 1 to", id="long"),
        pytest.param({"who": "b\tc"}, "its session is not a name of 1 to", id="control"),
        pytest.param({"who": "b", "id": "c"}, "The input 'id' names the state of a Flow", id="with-id"),
    ],
)
def test_a_row_whose_session_makes_no_sense_is_bad(row: dict[str, Any], reason: str):
    inputs = {name: name for name in ("note", "id") if name in {"note": "a", **row}}
    expected = [CrewInput(name=name) for name in inputs]
    [bad] = row_plan([{"note": "a", **row}], session="who", inputs=inputs, expected=expected).check()[1].rows
    assert re.search(reason, bad.reason)


def test_the_session_is_part_of_a_row():
    plans = [row_plan([{"note": "a", "who": who}], session="who", expected=TOPIC) for who in ("", "b", "c")]
    assert len({job.inputs.digest for plan in plans for job in plan.jobs()}) == 3
    [job] = row_plan([{"note": "a", "who": 7}], session=lambda row: f"n-{row['who']}", expected=TOPIC).jobs()
    assert job.inputs.session == "n-7"
    assert dict(job.inputs.encoded) == {"note": "a"}
