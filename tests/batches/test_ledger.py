"""The ledger: one claim a place whoever races, commits in groups, trouble with its database, what it knows of rows."""

import asyncio
import json
import logging
import shutil
import sqlite3
import time
import uuid
from contextlib import AsyncExitStack
from dataclasses import asdict, replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
from sqlalchemy import make_url
from sqlalchemy.dialects.sqlite import dialect as sqlite_dialect
from sqlalchemy.util import await_only

import prefect_crew as pc
from prefect_crew.batches import database
from prefect_crew.batches.database import default_ledger, open_url
from prefect_crew.batches.database import ledger_address as ledger_address_of
from prefect_crew.batches.ledger import Ledger
from prefect_crew.batches.options import BatchOptions
from prefect_crew.batches.outcomes import RowState
from prefect_crew.batches.rows import BadRow, BadRows, RowJob
from prefect_crew.batches.stored import StoredBatch
from prefect_crew.client.inputs import Inputs
from prefect_crew.records.model import RecordPhase, RunRecord, StoredResult
from prefect_crew.records.resolve import resolve_started, unresolved
from support.batches import CREW, enter, postgres_ledger, record_of
from support.postgres import Postgres, find_postgres
from support.proxy import Proxy
from support.records import CLAIMED, ENDED, LONG_AGO, NOT_STARTED, STARTED, UNCERTAIN, put
from support.waiting import until


async def write(ledger: Ledger, *rows: tuple[str, RecordPhase, pc.CrewState | None], **facts: Any) -> None:
    for key, phase, state in rows:
        record = await put(record_of(ledger, key, **facts), ledger)
        record.phase, record.state = phase, state
        await ledger.save(record)


async def test_no_two_rows_of_any_batches_have_one_idempotency_key(tmp_path: Path):
    path = str(tmp_path / "ledger.db")
    names = ("a", "a/b", "a%2Fb", "a%2fb", "a/", "/a", "%", "%25", "2026/7")
    ledgers = [Ledger(path, name) for name in names]
    keys = [(ledger, key) for ledger in ledgers for key in ("c", "b/c", "2Fb/c", "/c", "%2Fc", "7/c")]
    assert len({ledger.idempotency_key(key) for ledger, key in keys}) == len(keys)
    assert all(ledger.row_key(ledger.idempotency_key(key)) == key for ledger, key in keys)
    assert Ledger(path, "leads 2026").idempotency_key("a/b") == "batch/leads 2026/a/b"
    async with Ledger(path, "a") as one, Ledger(path, "a/b") as two:
        assert await two.claim(record_of(two, "c"))
        assert await one.attempts(two.idempotency_key("c")) == []


async def test_processes_that_write_the_same_rows_at_once_wait_for_each_other(ledger: Ledger, other: Ledger):
    """A row follows the attempt that counts, also where another process has just created it. No order deadlocks."""
    keys = [f"k{number}" for number in range(60)]
    await enter(ledger, *keys)
    firsts, seconds = ([record_of(ledger, key, attempt=attempt) for key in keys] for attempt in (1, 2))
    await asyncio.gather(*(ledger.claim(record) for record in firsts))
    jobs = [RowJob(number, key, Inputs.of({"topic": key})) for number, key in enumerate(keys)]
    await asyncio.gather(
        *(ledger.save(at(record, STARTED, kickoff_id=record.owner)) for record in firsts),
        *(other.claim(record) for record in reversed(seconds)),
        *(one.enter_rows(jobs[::-1], CREW, anew=True) for one in (other, ledger) * 3),
    )
    assert await ledger.counts() == {"claimed": 60}
    assert ledger.writer.commits < 10, "writes of one moment go into one commit"


@pytest.mark.parametrize("batch", ["a", "b"], ids=["one batch", "two batches"])
async def test_nobody_writes_while_a_commit_decides(ledger_address: str, monkeypatch: pytest.MonkeyPatch, batch: str):
    """Neither a claim in the same batch nor an id in another one: an id belongs to one attempt of all batches."""
    decide, log, tasks = database.decide_writes, list[str](), list[asyncio.Task[Any]]()
    loop = asyncio.get_running_loop()
    async with Ledger(ledger_address, "a") as ledger, Ledger(ledger_address, batch) as other:
        first, second = record_of(ledger, "k"), record_of(other, "k", attempt=2)
        assert await ledger.claim(first)
        write, answer = other.claim(second), True
        if batch == "b":
            assert await write
            write, answer = other.save_started(at(second, STARTED)), first.idempotency_key

        def decide_slowly(*arguments: Any, **options: Any) -> Any:
            log.append("begins")
            if not tasks:
                loop.call_soon_threadsafe(lambda: tasks.append(loop.create_task(write)))
                # SQLite decides in a thread, PostgreSQL on the event loop.
                time.sleep(0.5) if ledger.database.path is not None else await_only(asyncio.sleep(0.5))
            log.append("ends")
            return decide(*arguments, **options)

        monkeypatch.setattr(database, "decide_writes", decide_slowly)
        assert await ledger.save_started(at(first, STARTED)) is None
        assert await tasks[0] == answer
    assert log == ["begins", "ends"] * 2


async def test_a_cancelled_writer_writes_all_the_same(ledger: Ledger, other: Ledger, monkeypatch: pytest.MonkeyPatch):
    record = await put(record_of(ledger, "k"), ledger)
    run, go_on = ledger.database.run, asyncio.Event()

    async def slowly(work: Any) -> Any:
        await go_on.wait()
        return await run(work)

    monkeypatch.setattr(ledger.database, "run", slowly)
    record.phase, record.kickoff_id = STARTED, "run 1"
    save = asyncio.ensure_future(ledger.save(record))
    await asyncio.sleep(0.01)
    # As asyncio.run does at the end of a process.
    assert ledger.writer._task is not None
    ledger.writer._task.cancel()
    await asyncio.sleep(0.01)
    go_on.set()
    await asyncio.wait_for(save, 20)
    record.human_task = "draft"
    await asyncio.wait_for(ledger.save(record), 20)
    assert (await other.attempts(record.idempotency_key))[0].human_task == "draft"


async def test_each_row_hears_why_its_commit_failed(ledger: Ledger, monkeypatch: pytest.MonkeyPatch):
    with monkeypatch.context() as patch:
        patch.setattr(database, "decide_writes", Mock(side_effect=RuntimeError("no thread is left")))
        claims = (ledger.claim(record_of(ledger, key)) for key in ("a", "b"))
        errors = await asyncio.wait_for(asyncio.gather(*claims, return_exceptions=True), 20)
    reason = "cannot be written: RuntimeError: no thread is left."
    assert [str(error) for error in errors] == [str(pc.LedgerError(reason, ledger=ledger.address))] * 2
    assert await asyncio.wait_for(ledger.claim(record_of(ledger, "c")), 20), "the writer goes on"


async def test_a_row_stands_as_the_attempt_that_counts(ledger_address: str):
    async with Ledger(ledger_address, "b") as ledger, Ledger(ledger_address, "c") as another:
        keys = ("done", "failed", "refused", "open", "misfit", "waits", "uncertain")
        await enter(ledger, *keys)
        await enter(another, "done")
        await write(ledger, ("done", ENDED, pc.CrewState.COMPLETED), ("failed", ENDED, pc.CrewState.FAILED))
        await write(ledger, ("done", NOT_STARTED, None), attempt=2)
        await write(ledger, ("failed", ENDED, pc.CrewState.COMPLETED), attempt=2)
        await write(ledger, ("refused", NOT_STARTED, None), error="the server said no")
        await write(ledger, ("refused", NOT_STARTED, None), ("open", STARTED, None), attempt=2)
        await write(ledger, ("misfit", ENDED, pc.CrewState.COMPLETED), error="does not fit")
        await write(ledger, ("uncertain", UNCERTAIN, None), reason="the answer never came")
        states = {"completed": 2, "pending": 2, "started": 1, "invalid-output": 1, "uncertain": 1}
        assert await ledger.counts() == states
        assert await another.counts() == {"pending": 1}
        assert await ledger.kickoffs() == 6
        rows = [row async for row in ledger.rows_in([RowState.UNCERTAIN, RowState.INVALID_OUTPUT, RowState.PENDING])]
        reasons = {"uncertain": "the answer never came", "misfit": "does not fit", "refused": None, "waits": None}
        assert [(row.key, row.error) for row in rows] == [*reasons.items()]
        assert rows[0].inputs == {"topic": "uncertain"}
        assert rows[3].record is None
        lines = [line async for page in ledger.lines() for line in page]
        assert [line[0] for line in lines] == list(keys)


async def test_secret_inputs_are_masked_where_repeated(ledger: Ledger):
    job = RowJob(0, "k", Inputs.of({"topic": "pay with hunter22", "pin": "hunter22"}))
    await ledger.enter_rows([job], CREW)
    await ledger.enter_rows([replace(job, inputs=job.inputs.keep_secret(["pin"]))], CREW, anew=True)
    ((line, *_),) = [page async for page in ledger.lines()]
    assert json.loads(line[1]) == {"topic": "pay with ********", "pin": "********"}


async def test_a_half_entered_batch_is_not_new(ledger: Ledger):
    assert await ledger.is_empty()
    await ledger.enter_rows([RowJob(0, "k", Inputs.of({"topic": "tea"}))], CREW)
    await ledger.enter_changed(iter(()), CREW)
    assert await ledger.counts() == {}
    assert await ledger.is_empty() is False


async def test_a_claim_whose_process_has_died_is_uncertain(ledger: Ledger, other: Ledger):
    await enter(ledger, "theirs", "ours")
    assert await other.claim(record_of(other, "theirs", good_for=30.0))
    ours = await put(record_of(ledger, "ours"), ledger)
    await ledger.note_orphaned()
    assert await ledger.counts() == {"claimed": 2}, "others may work on the batch"
    ledger.is_exclusive = True
    await ledger.note_orphaned()
    assert await ledger.counts() == {"uncertain": 1, "claimed": 1}
    (record,) = await ledger.attempts(ledger.idempotency_key("theirs"))
    assert record.open_for > 0, "its kickoff may still be on its way"
    # Its owner lives after all, and knows the id.
    record.phase, record.kickoff_id = STARTED, "run 1"
    await other.save(record)
    await ledger.save(at(ours, UNCERTAIN))
    assert await ledger.counts() == {"started": 1, "uncertain": 1}


async def test_rows_of_a_state_are_found_by_index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    async with Ledger(str(tmp_path / "ledger.db"), "b") as ledger:

        async def explain(query: Any) -> list[Any]:
            text = query.compile(dialect=sqlite_dialect(), compile_kwargs={"literal_binds": True})
            plan = await ledger.database.run(lambda one: list(one.exec_driver_sql(f"EXPLAIN QUERY PLAN {text}")))
            assert "crew_rows_state (batch=? AND state=? AND number>?)" in plan[0][3]
            assert not any("TEMP B-TREE" in step[3] for step in plan)
            return []

        monkeypatch.setattr(ledger, "_rows", explain)
        assert [row async for row in ledger.rows_in([RowState.FAILED])] == []


async def test_time_and_use_of_runs_are_added_up(ledger: Ledger):
    first, second = str(uuid.uuid4()), str(uuid.uuid4())
    assert await ledger.spending_by_day() == []
    await enter(ledger, *"abcde")
    records = [record_of(ledger, key) for key in "abcde"]
    for number, record in enumerate(records[:4]):
        assert await ledger.claim(record)
        record.phase, record.state = ENDED, pc.CrewState.COMPLETED
        record.flow_run_id = (first, first, second, None)[number]
        record.kickoff_id = f'"ended_at":"{number}"\0'
        record.ended_at = datetime(2026, 5, 1 if number < 3 else 2, 23, 59, tzinfo=UTC)
        record.kicked_off_at = record.ended_at - timedelta(seconds=(1, 2, 3, 10)[number])
        record.result = StoredResult(output='"flow_run_id":"x\0', data={"ended_at": "never"})
    records[0].usage, records[0].cost = pc.TokenUsage(total_tokens=15, prompt_tokens=10), 0.00001
    records[1].usage = pc.TokenUsage(total_tokens=5)
    records[3].cost = 1.5
    await asyncio.gather(*(ledger.save(record) for record in records[:4]))
    assert await ledger.claim(records[4])
    both = pc.TokenUsage(total_tokens=20, prompt_tokens=10)
    spent = {first: pc.Spending(2, 2, 1, both, 1e-5), second: pc.Spending(1), None: pc.Spending(1, 0, 1, None, 1.5)}
    days = [("2026-05-01", first), ("2026-05-01", second), ("2026-05-02", None)]
    assert {(day, by): of for day, by, of in await ledger.spending_by_day()} == {day: spent[day[1]] for day in days}
    assert await ledger.spending() == pc.Spending(4, 2, 2, both, 1.50001)
    assert await ledger.run_times() == (4.0, 2.0, 10.0)


async def test_what_is_known_of_the_batch(ledger: Ledger, other: Ledger):
    bad = BadRows(2, [BadRow(3, "lacks topic")], "out.jsonl.rejected.jsonl")
    assert await ledger.entry() is None
    first = await ledger.enter(crew_url="u", fingerprint="f", total=3, call={"crew": "x"})
    again = await ledger.enter(crew_url="v", fingerprint="g", total=4)
    assert again.ledger_id == first.ledger_id
    assert again.crew_url == "v"
    assert again.total == 4
    await ledger.note(bad=asdict(bad), exported={"output": "out.jsonl"})
    assert [await ledger.advance() for _ in range(2)] == [1, 2]
    assert await ledger.run_times() == (None, None, None)
    assert await ledger.spending() == pc.Spending()
    entry = await other.entry()
    assert entry is not None
    assert entry.bad == bad
    assert entry.exported == {"output": "out.jsonl"}
    assert entry.generation == 2


async def test_several_processes_may_make_the_tables_at_once(ledger_address: str):
    ledgers = [Ledger(ledger_address, f"b{number}") for number in range(6)]
    await asyncio.gather(*(ledger.__aenter__() for ledger in ledgers))
    await asyncio.gather(*(ledger.__aexit__() for ledger in ledgers))


async def test_a_ledger_of_a_later_version_is_not_touched(tmp_path: Path):
    async with Ledger(str(tmp_path / "ledger.db"), "b") as ledger:
        await ledger.enter(crew_url="u", fingerprint="f", total=3)
        later = "UPDATE crew_batches SET version = 99"
        await ledger.database.run(lambda connection: connection.exec_driver_sql(later).close())
        with pytest.raises(pc.LedgerError, match=r"later version of prefect-crew\..*Upgrade prefect-crew here"):
            await ledger.entry()


async def test_a_missing_database_shows_no_password():
    with pytest.raises(pc.LedgerError, match=r"postgresql://me:\*\*\*@127\.0\.0\.1:9/leads cannot be opened") as caught:
        async with Ledger("postgresql://me:sesame@127.0.0.1:9/leads", "b"):
            pass
    assert "sesame" not in str(caught.value) + repr(caught.value)


async def test_a_locked_database_is_written_once_it_is_free(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    path = str(tmp_path / "ledger.db")
    async with Ledger(path, "b") as ledger:
        await ledger.database.run(lambda connection: connection.exec_driver_sql("PRAGMA busy_timeout=10").close())
        other = sqlite3.connect(path, isolation_level=None)
        other.execute("BEGIN IMMEDIATE")
        with caplog.at_level(logging.WARNING):
            claims = [asyncio.ensure_future(ledger.claim(record_of(ledger, f"k{key}"))) for key in range(20)]
            await asyncio.wait(claims, timeout=1.2)
        assert not any(claim.done() for claim in claims)
        other.execute("COMMIT")
        other.close()
        assert all(await asyncio.wait_for(asyncio.gather(*claims), 20))
    logged = [line for line in caplog.messages if "cannot be written" in line]
    assert len(logged) == 1
    assert "database is locked" in logged[0]


async def test_a_database_that_is_back_is_read(
    ledger: Ledger, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
):
    await enter(ledger, "k")
    run, refusals = ledger.database.run, 2

    async def refuse(work: Any) -> Any:
        nonlocal refusals
        refusals -= 1
        if refusals >= 0:
            raise ConnectionRefusedError("connection refused")
        return await run(work)

    monkeypatch.setattr(ledger.database, "run", refuse)
    with caplog.at_level(logging.WARNING):
        assert await asyncio.wait_for(ledger.counts(), 20) == {"pending": 1}
    assert "cannot be read (connection refused). The batch waits" in caplog.text
    refusals, ledger.writer.retry_for = 1000, 0.1
    with pytest.raises(pc.LedgerError, match="cannot be read: connection refused"):
        await ledger.counts()


@pytest.mark.postgres
async def test_connections_that_hang_end_no_read(postgres_address: str, caplog: pytest.LogCaptureFixture):
    async with Ledger(postgres_address, "b") as ledger, AsyncExitStack() as stack:
        await enter(ledger, "k")
        server = ledger.database.server
        server.pool._timeout = 0.1  # seconds, instead of 30
        for _ in range(4):
            await stack.enter_async_context(server.connect())
        reading = asyncio.ensure_future(ledger.counts())
        await until(lambda: "The batch waits" in caplog.text, "the first try has failed")
        assert not reading.done()
        await stack.aclose()
        assert await reading


@pytest.mark.postgres
async def test_a_server_that_vanishes_is_tried_again(
    postgres_address: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    url = make_url(postgres_address)
    with Proxy(url.port or 0) as proxy:
        address = url.set(host="127.0.0.1", port=proxy.port).render_as_string(hide_password=False)
        async with Ledger(address, "b") as ledger:
            await enter(ledger, "k")
            monkeypatch.setattr(database, "ANSWER_WITHIN", 0.5)
            proxy.is_silent = True
            claiming = asyncio.ensure_future(ledger.claim(record_of(ledger, "k")))
            await until(lambda: "cannot be written " in caplog.text, "the first try has failed")
            assert not claiming.done()
            monkeypatch.setattr(database, "ANSWER_WITHIN", 60.0)
            proxy.is_silent = False
            assert await asyncio.wait_for(claiming, 60)
            assert ledger.database.server.pool.checkedout() == 0


@pytest.mark.slow
@pytest.mark.postgres
async def test_a_restart_of_postgresql_ends_neither_reads_nor_writes():
    programs = find_postgres()
    assert programs is not None
    server = Postgres(programs)
    try:
        await asyncio.to_thread(server.start)
        address = await asyncio.to_thread(postgres_ledger, server)
        async with Ledger(address, "b") as ledger:
            await enter(ledger, "k1")
            assert await ledger.claim(record_of(ledger, "k1"))
            await asyncio.to_thread(server.process.kill)
            reading = asyncio.ensure_future(ledger.counts())
            writing = asyncio.ensure_future(ledger.claim(record_of(ledger, "k2")))
            await asyncio.wait({reading, writing}, timeout=2)
            assert not reading.done()
            assert not writing.done()
            await asyncio.to_thread(server.serve)
            assert await asyncio.wait_for(reading, 60) == {"claimed": 1}
            assert await asyncio.wait_for(writing, 60)
    finally:
        await asyncio.to_thread(server.stop)


async def test_a_claim_is_on_disk_whatever_postgresql_is_set_to(postgres_address: str):
    def turn_off_sync(connection: Any) -> None:
        name = connection.exec_driver_sql("SELECT current_database()").scalar()
        connection.exec_driver_sql(f"ALTER DATABASE {name} SET synchronous_commit = off").close()

    async with Ledger(postgres_address, "b") as ledger:
        await ledger.database.run(turn_off_sync)
    async with Ledger(postgres_address, "b") as ledger:
        for _ in range(2):
            setting = await ledger.database.run(lambda one: one.exec_driver_sql("SHOW synchronous_commit").scalar())
            assert setting == "on"


def test_the_default_ledger_is_next_to_a_local_output(tmp_path: Path):
    assert default_ledger(str(tmp_path / "out.jsonl")) == str(tmp_path / "out.jsonl.ledger.db")
    for output, problem in (("s3://bucket/out.jsonl", "is no file of this machine"), (".", "names no file")):
        with pytest.raises(pc.ConfigurationError, match=problem):
            default_ledger(output)


@pytest.mark.parametrize(
    ("address", "driver"),
    [
        ("ledger.db", "sqlite"),
        ("sqlite:///ledger.db", "sqlite"),
        ("sqlite+aiosqlite:///ledger.db", "sqlite"),
        ("postgres://host/db?sslmode=require", "postgresql+asyncpg"),
        ("postgresql+psycopg2://host/db", "postgresql+asyncpg"),
        ("mysql://u:pa55word@h/db", None),
        ("sqlite://", None),
        ("postgresql://host:port/db", None),
        ("postgresql://u%40org:pw%40@h/d%40b", "postgresql+asyncpg"),
        ("postgresql://u:p@ss@pa55word/db", None),
        ("postgresql://u:p@ss/pa55word@h/db", None),
    ],
)
def test_the_address_of_a_ledger(address: str, driver: str | None):
    if driver is None:
        with pytest.raises(pc.ConfigurationError) as caught:
            open_url(address)
        assert "pa55word" not in str(caught.value)
    else:
        assert open_url(address).drivername == driver
        assert "sslmode" not in open_url(address).query


@pytest.mark.parametrize(
    "secret",
    ["", "password=pa55word", "sslpassword=pa55word&sslmode=require", "passfile=pa55word", "Password=pa55word",
     "options=-c%20my.secret%3Dpa55word"],
)  # fmt: skip
async def test_the_password_of_a_ledger_is_shown_nowhere(secret: str):
    place = await ledger_address_of(f"postgresql://u{'' if secret else ':pa55word'}@h/db?{secret}", "out.jsonl")
    assert place.public in ("postgresql://u@h/db", "postgresql://u:***@h/db")
    assert "pa55word" not in repr(place)
    kept = "postgresql://u@h/db?sslmode=require"
    assert (await ledger_address_of(kept, "out.jsonl")).public == kept


async def test_a_ledger_of_version_2_is_read(tmp_path: Path):
    path = shutil.copy(Path(__file__).parent / "golden" / "ledger-v2.sqlite", tmp_path / "ledger.db")
    async with Ledger(str(path), "leads") as ledger:
        entry = await ledger.entry()
        assert entry is not None
        assert entry.version == 2
        assert entry.total == 13
        assert entry.generation == 1
        assert entry.bad.rows == [BadRow(3, "lacks topic")]
        assert entry.exported == {"output": "/data/leads.jsonl"}
        stored = StoredBatch("leads", await ledger_address_of(str(path), ""), ledger, entry)
        assert BatchOptions(**stored.entry.call["options"]).max_in_flight == 7  # type: ignore[index]
        assert await ledger.counts() == dict.fromkeys(RowState, 1), "a row of each state, by its name"
        rows = {row.key: row async for row in ledger.rows_in(list(RowState))}
        assert {key: str(row.state) for key, row in rows.items()} == {str(state): str(state) for state in RowState}
        assert rows["lost"].error == "the server does not know it"
        assert rows["completed"].inputs == {"topic": "completed", "pin": "********"}
        failed = await ledger.attempts(ledger.idempotency_key("failed"))
        assert [attempt.phase for attempt in failed] == ["ended", "not-started"]
        status = await stored.status()
        assert status.completed == 1
        assert status.failed == 8
        assert status.uncertain == 2
        assert status.in_flight == 1
        assert status.left == 1
        assert status.waiting == 1
        assert status.kickoffs == 11
        assert status.longest == 2.0
        assert [row.key async for row in stored.failures(3)] == ["uncertain", "claimed", "failed"]
        (asks,) = [record async for record in ledger.may_ask()]
        assert [review.feedback for review in await ledger.reviews(asks)] == ["warmer"]
        assert await stored.export(str(tmp_path / "out.jsonl")) == (str(tmp_path / "out.jsonl"), 9)
    lines = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert [line["key"] for line in lines] == [str(state) for state in RowState if state.is_failed or state.is_final]
    assert lines[0]["data"] == {"city": "Lisbon"}


# What it says of an attempt never goes backwards, however late a write lands and whoever makes it


def at(record: RunRecord, phase: RecordPhase, **facts: Any) -> RunRecord:
    """Return what is known of an attempt at a later time."""
    if phase is STARTED:
        facts.setdefault("kickoff_id", "run 1")
    return record.model_copy(update={"phase": phase, **facts})


async def stored(ledger: Ledger, record: RunRecord) -> RunRecord:
    (attempt,) = await ledger.attempts(record.idempotency_key)
    return attempt


async def test_another_caller_hears_what_the_ledger_says(ledger: Ledger, other: Ledger):
    record = await put(record_of(ledger, "k"), ledger)
    with pytest.raises(pc.CrewError):
        await other.save(at(record, CLAIMED, reason="theirs"))
    assert (await stored(ledger, record)).reason is None
    await ledger.save(at(record, STARTED))
    with pytest.raises(pc.CrewError, match=r"Row 'k' of batch 'b' is started, run run 1 in the ledger\. Nothing was"):
        await other.save(at(record, UNCERTAIN))
    assert (await stored(ledger, record)).phase is STARTED


async def test_a_late_id_beside_a_resolved_one_is_logged(
    ledger: Ledger, other: Ledger, caplog: pytest.LogCaptureFixture
):
    record = await put(record_of(ledger, "k", good_for=LONG_AGO), ledger)
    await resolve_started(await unresolved(record.idempotency_key, other), "seen", other)
    with caplog.at_level(logging.WARNING):
        await ledger.save(at(record, STARTED, kickoff_id="answered"))
    assert (await stored(other, record)).kickoff_id == "seen"
    assert "answered" in caplog.text, "nobody else knows the id"
