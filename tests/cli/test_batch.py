"""`batch`: a crew for every row, how it stands, what failed, and going on by the name alone."""

from __future__ import annotations

import asyncio
import json
import signal
import sqlite3
import sys
import uuid
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any
from unittest.mock import AsyncMock
from uuid import UUID

import pytest
from prefect.client.orchestration import PrefectClient, get_client
from prefect.client.schemas import OrchestrationResult
from prefect.client.schemas.responses import SetStateStatus, StateAbortDetails
from prefect.states import Running

from prefect_crew.batches.database import Database
from prefect_crew.batches.ledger import Ledger
from prefect_crew.batches.ownership import BatchLock
from prefect_crew.client import CrewClient
from prefect_crew.client.models import StopAnswer
from prefect_crew.devserver import CrewServer
from prefect_crew.records.model import RecordPhase
from prefect_crew.records.sessions import last_turn
from prefect_crew.testing import CrewServerFactory
from support.batches import enter, let_an_hour_pass, record_of
from support.commands import TOKEN, environment
from support.deployed import wait_until
from support.environment import program
from support.prefect_server import PrefectServer
from support.processes import Process
from support.records import new_record, put
from support.scripts import PICKY, script
from support.terminals import Terminal

pytestmark = pytest.mark.usefixtures("prefect_api", "instant_polling")


@pytest.fixture
def name() -> str:
    return f"leads {uuid.uuid4().hex[:8]}"


@pytest.fixture
def leads(tmp_path: Path) -> str:
    path = tmp_path / "leads.csv"
    path.write_text("id,topic\na,tea\nb,bad milk\nc,cake\n")
    return str(path)


@pytest.fixture
def output(tmp_path: Path) -> str:
    return str(tmp_path / "out.jsonl")


@pytest.fixture
def picky(crew_server: CrewServerFactory) -> Callable[..., tuple[CrewServer, str]]:
    """Serve a crew that fails for what is bad, and store its block."""

    def serve(**options: Any) -> tuple[CrewServer, str]:
        server, block = crew_server(PICKY, **options), f"picky-{uuid.uuid4().hex[:8]}"
        server.crew(max_attempts=2).save(block, _sync=True)  # pyright: ignore
        return server, block

    return serve


def lines(output: str) -> dict[str, str]:
    found = [json.loads(line) for line in Path(output).read_text().splitlines()]
    assert len({line["key"] for line in found}) == len(found)
    return {line["key"]: line["state"] for line in found}


@pytest.fixture
def call(name: str, output: str) -> Callable[..., tuple[str, ...]]:
    """`call(crew, data set, *options)`: the words of `batch run` with that name and export."""
    return lambda *given: ("batch", "run", *given, "--name", name, "--export", output)


def test_a_batch_from_its_plan_to_the_rows_that_failed(here, picky, call, name: str, leads: str, output: str):
    server, crew = picky()
    planned = here("batch", "plan", crew, leads, "--key-column", "id", "--seconds-per-run", "90", "-o", "json")
    assert (planned.code, planned.json["rows"], planned.json["seconds"], server.kickoffs) == (0, 3, 90, 0)
    ran = here(*call(crew, leads, "--key-column", "id", "-o", "json"))
    assert (ran.code, ran.json["completed"], ran.json["failed"], ran.json["kickoffs"]) == (6, 2, 1, 3)
    assert ran.json["flow_run_url"].endswith(ran.json["flow_run_id"])
    assert f"Batch {name}: checking every row" in ran.err
    assert lines(output) == {"a": "completed", "b": "failed", "c": "completed"}
    inspected = here("batch", "inspect", name)
    assert (inspected.code, output in inspected.out) == (0, True)
    assert "2 of 3 rows completed\n  1 failed\n  3 kickoffs" in inspected.out
    assert here("batch", "inspect", name, "-o", "json").json["states"] == {"completed": 2, "failed": 1}
    (failed,) = here("batch", "failures", name, "-o", "json").json
    assert (failed["key"], failed["state"], failed["error"]) == ("b", "failed", "no bad milk")
    assert here("batch", "failures", name).out.splitlines()[1].startswith("b\t")
    cancelled = here("batch", "cancel", name)
    assert (cancelled.code, cancelled.out) == (1, f"Batch {name}: no run is in flight.\n"), "and nothing to go on with"


def test_an_export_replaces_no_file_of_something_else(here, picky, call, name: str, tmp_path: Path, output: str):
    _, crew = picky()
    leads = tmp_path / "leads.jsonl"
    leads.write_text(before := '{"topic": "tea"}\n')
    here(*call(crew, str(leads)))
    refused = here("batch", "export", name, str(leads))
    assert (refused.code, leads.read_text()) == (1, before)
    assert "leads.jsonl exists already and is not from this batch" in refused.err
    assert "or replace it with --overwrite. Nothing was written." in refused.err
    csv = here("batch", "export", name, str(tmp_path / "out.csv"))
    assert (csv.code, "has the ending '.csv'" in csv.err, (tmp_path / "out.csv").exists()) == (2, True, False)
    assert here("batch", "export", name, str(leads), "--overwrite").out == f"1 lines of batch {name} are in {leads}.\n"
    assert lines(str(leads)).keys() == lines(output).keys()
    for file in (str(leads), output):
        assert here("batch", "export", name, file).code == 0, "it is from this batch by now"


def test_batches_over_ranges_of_rows_are_listed_and_added_up(here, picky, name: str, leads: str, tmp_path: Path):
    _, block = picky()
    for part, rows in (("1", "0:2"), ("2", "2:")):
        given = ("--name", f"{name}/{part}", "--export", str(tmp_path / f"{part}.jsonl"), "--rows", rows)
        here("batch", "run", block, leads, "--key-column", "id", *given)
    none = here("batch", "inspect", f"{name}/x*")
    assert (none.code, f"There is no batch '{name}/x*'" in none.err) == (2, True)
    assert [one["name"] for one in here("batch", "ls", f"{name}/*", "-o", "json").json] == [f"{name}/1", f"{name}/2"]
    found = here("batch", "inspect", f"{name}/*", "-o", "json").json
    assert (found["total"], found["completed"], found["failed"], len(found["batches"])) == (3, 2, 1, 2)
    assert here("batch", "inspect", f"{name}/*").out.splitlines()[-1].split()[:4] == ["together", "3", "2", "1"]
    # A name may have the signs of a pattern in it.
    eu = ("--name", f"{name} [eu]", "--export", f"{tmp_path}/eu.jsonl")
    here("batch", "run", block, leads, "--key-column", "id", *eu)
    assert here("batch", "inspect", f"{name} [eu]", "-o", "json").json["name"] == f"{name} [eu]"
    assert [one["name"] for one in here("batch", "ls", f"{name} [eu]", "-o", "json").json] == [f"{name} [eu]"]
    # A ledger that is elsewhere is not counted.
    Path(f"{tmp_path}/1.jsonl.ledger.db").rename(tmp_path / "elsewhere.db")
    found = here("batch", "inspect", f"{name}/*", "-o", "json")
    assert (found.code, found.json["failed"], len(found.json["batches"]), len(found.json["missing"])) == (0, 0, 1, 1)
    assert f"Batch '{name}/1' is not counted: " in found.err
    Path(f"{tmp_path}/2.jsonl.ledger.db").rename(tmp_path / "also elsewhere.db")
    assert here("batch", "inspect", f"{name}/*").code == 1, "none was counted"


def test_bad_rows_are_refused_or_skipped(here, picky, call, name: str, tmp_path: Path, output: str):
    server, crew = picky()
    path = tmp_path / "dirty.csv"
    path.write_text("id,topic\na,tea\nb\nc,\n")
    given = call(crew, str(path), "--key-column", "id")
    assert here("batch", "plan", crew, str(path)).code == 6
    planned = here("batch", "plan", crew, str(path), "--key-column", "id", "--on-bad-row", "skip")
    assert planned.code == 0
    for part in ("1 rows, 1 to run", "Line 3 cannot be run: has 1 fi", "Line 4 cannot be run: has no value for topic"):
        assert part in planned.out
    refused = here(*given)
    assert (refused.code, server.kickoffs) == (6, 0)
    assert "--on-bad-row skip" in refused.err
    ran = here(*given, "--on-bad-row", "skip")
    assert (ran.code, server.kickoffs, "batch failures" in ran.err) == (6, 1, True)
    assert "1 of 3 rows completed, 2 bad in" in ran.out
    inspected = here("batch", "inspect", name).out
    assert "1 of 3 rows completed\n  2 bad\n  Bad rows: line 3: has 1 fields" in inspected
    assert f"{output}.rejected.jsonl" in inspected
    assert "line 4\t\tbad\thas no value for topic" in here("batch", "failures", name).out
    assert [row["line"] for row in here("batch", "failures", name, "-o", "json").json] == [3, 4]


def test_another_delimiter_is_said_and_given(here, picky, tmp_path: Path):
    _, crew = picky()
    path = tmp_path / "rows.csv"
    path.write_text("id\ttopic\na\ttea\n")
    said = here("batch", "plan", crew, str(path))
    assert (said.code, "If its fields are separated by '\\t', give --delimiter '\\t'" in said.err) == (2, True)
    assert here("batch", "plan", crew, str(path), "--delimiter", "\\t", "--key-column", "id").code == 0


def test_a_corrected_row_is_retried_and_a_conflict_not(here, picky, call, name: str, leads: str, output: str):
    server, crew = picky()
    here(*call(crew, leads, "--key-column", "id"))
    Path(leads).write_text("id,topic\na,coffee\nb,good milk\nc,cake\n")
    changed = here("batch", "retry", name, "--yes")
    assert (changed.code, "--on-change continue" in changed.err, server.kickoffs) == (1, True, 3)
    again = here("batch", "retry", name, "--yes", "--on-change", "continue")
    assert (again.code, server.kickoffs) == (6, 4)
    assert lines(output) == {"a": "conflict", "b": "completed", "c": "completed"}
    assert "batch failures" in again.err
    assert "To start them again" not in again.err, "a row with a result stays as it is"


def test_an_input_of_a_column_that_is_not_there_is_said_once(here, picky, call, tmp_path: Path):
    _, crew = picky()
    path = tmp_path / "rows.jsonl"
    path.write_text('{"topic": "tea"}\n' * 20)
    said = here(*call(crew, str(path), "--map", "topic=topci"))
    assert said.code == 6
    assert "none of its 20 rows can be run: input 'topic' needs column topci (did you mean topic?)" in said.err
    assert "(for a constant text, write it as a template, with both pairs of braces: {{ 'text' }})" in said.err


def started(output: str) -> int:
    """Return how many runs of a batch the ledger beside its output calls started."""
    with closing(sqlite3.connect(f"{output}.ledger.db")) as ledger:
        return ledger.execute("SELECT count(*) FROM crew_attempts WHERE phase = 'started'").fetchone()[0]


@pytest.fixture
def running(
    prefect_api: PrefectServer, crew_server: CrewServerFactory, name: str, tmp_path: Path, output: str
) -> Iterator[tuple[CrewServer, Process]]:
    """A process with a batch of 30 rows, of which 5 are in flight for a minute. Each is a session of its own."""
    server = crew_server(script({"seconds": 60, "output": "late"}, inputs=["topic"], flow=True), token=TOKEN)
    block = f"late-{uuid.uuid4().hex[:8]}"
    server.crew().save(block, _sync=True)  # pyright: ignore
    path = tmp_path / "rows.csv"
    path.write_text("topic\n" + "".join(f"topic {number}\n" for number in range(30)))
    command = ["batch", "run", block, str(path), "--name", name, "--export", output, "--max-in-flight", "5"]
    command += ["--session-column", "topic"]
    env = environment(tmp_path / "home", {"PREFECT_API_URL": prefect_api.api_url})
    with Process([program("prefect-crew"), *command], log=tmp_path / "log", env=env) as process:
        wait_until(lambda: server.kickoffs == 5, seconds=60, what="its rows in flight")
        # An id that the ledger does not have yet is lost with the process.
        wait_until(lambda: started(output) == 5, seconds=60, what="its rows in flight, in the ledger")
        yield server, process


@pytest.mark.programs
def test_ctrl_c_leaves_the_runs_in_flight_and_says_how_to_go_on(running: tuple[CrewServer, Process], name: str):
    server, process = running
    process.send(signal.SIGINT)
    assert process.wait(60) == 130, process.output
    assert server.requests["stop"] == 0
    said = process.output.replace("\n", " ")
    assert f"To go on where it stopped: prefect-crew batch resume '{name}'" in said
    assert f"To stop the runs in flight: prefect-crew batch cancel '{name}'" in said
    assert "Traceback" not in process.output


@pytest.mark.programs
@pytest.mark.skipif(sys.platform == "win32", reason="it needs a terminal of Unix")
def test_ctrl_c_on_a_terminal_asks_whether_to_stop(
    prefect_api: PrefectServer, crew_server: CrewServerFactory, name: str, tmp_path: Path, output: str
):
    server = crew_server(script({"seconds": 60, "output": "late"}, inputs=["topic"]), token=TOKEN)
    (tmp_path / "rows.csv").write_text("topic\ntea\ncocoa\n")
    env = environment(tmp_path / "home", {"PREFECT_API_URL": prefect_api.api_url})
    env.pop("CREW_TOKEN", None)  # a person types it
    template = f"{name}-{{scheduled_start:%Y}}"
    line = ["batch", "run", server.url, str(tmp_path / "rows.csv"), "--name", template, "--export", output]
    with Terminal([program("prefect-crew"), *line], env=env) as terminal:
        terminal.wait_for("Token of")
        terminal.press(f"{TOKEN}\r")
        wait_until(lambda: server.kickoffs == 2, seconds=60, what="its rows in flight")
        terminal.press("\x03")
        terminal.wait_for("Stop its runs in flight as well?")
        terminal.press("y\r")
        assert terminal.wait(30) == 130
    assert "2 of 2 runs in flight were asked to stop." in terminal.output.replace("\r\n", " ")
    assert (server.requests["stop"], terminal.output.count("Token of")) == (2, 1)


@pytest.mark.programs
def test_a_batch_is_cancelled_in_the_process_that_runs_it(here, running: tuple[CrewServer, Process], name: str):
    _, process = running
    assert "A process runs it now" in here("batch", "inspect", name).out
    assert "is being cancelled." in here("batch", "cancel", name).ok
    assert process.wait(60) == 1, process.output
    assert here("batch", "inspect", name, "-o", "json").json["states"] == {"pending": 25, "stopped": 5}


@pytest.mark.programs
def test_of_a_batch_that_was_killed_the_runs_are_stopped(here, running: tuple[CrewServer, Process], name: str):
    server, process = running
    process.kill()
    again = f"To go on where it stopped: prefect-crew batch resume '{name}'"
    assert f"No process runs it. {again}" in here("batch", "inspect", name).out
    cancelled = here("batch", "cancel", name)
    assert f"5 of 5 runs in flight were asked to stop. {again}" in cancelled.out, cancelled.err
    assert {str(run.state) for run in server.runs} == {"stopped"}
    assert asyncio.run(last_turn(server.url, "topic 0")).outcome == "stopped"
    found = here("batch", "inspect", name, "-o", "json").json
    assert (found["in_flight"], found["failed"], found["stopped"], found["owed"]) == (0, 5, 5, 5)


async def in_flight(path: str, name: str, count: int, **crew: str) -> None:
    """Write into a ledger that so many rows of its batch are in flight, and nobody waits for them."""
    async with Ledger(path, name) as ledger:
        await enter(ledger, *(f"late {number}" for number in range(count)))
        for number in range(count):
            record = record_of(ledger, f"late {number}", **crew)
            assert await ledger.claim(record)
            record.phase, record.kickoff_id = RecordPhase.STARTED, f"run {uuid.uuid4()}"
            await ledger.save(record)


def test_a_row_whose_run_is_forgotten_is_resolved_as_lost(here, picky, call, name: str, leads: str, output: str):
    server, crew = picky()
    here(*call(crew, leads, "--key-column", "id"))
    asyncio.run(in_flight(f"{output}.ledger.db", name, 1, crew=crew, crew_url=server.url))
    resolved = here("runs", "resolve", f"batch/{name}/late 0", "--lost", "--yes")
    assert f"prefect-crew batch retry '{name}' --row 'late 0' starts another." in resolved.out, resolved.err
    states = here("batch", "inspect", name, "-o", "json").json["states"]
    assert (states["lost"], "started" in states) == (1, False)


def test_a_cancel_without_a_stop_says_so(here, picky, call, name: str, leads: str, output: str, monkeypatch):
    server, crew = picky(faults=["stop:500"])
    here(*call(crew, leads, "--key-column", "id"))
    asyncio.run(in_flight(f"{output}.ledger.db", name, 40, crew=crew, crew_url=server.url))
    with closing(sqlite3.connect(f"{output}.ledger.db")) as ledger, ledger:  # some rows leave the data set
        ledger.execute("UPDATE crew_rows SET number = NULL WHERE row_key LIKE 'late %5' OR row_key < 'late 2'")
    stop, at_once = CrewClient.stop, [0, 0]

    async def counted(self: CrewClient, kickoff_id: str) -> StopAnswer:
        at_once[0] += 1
        at_once[1] = max(at_once)
        try:
            return await stop(self, kickoff_id)
        finally:
            at_once[0] -= 1

    monkeypatch.setattr(CrewClient, "stop", counted)
    cancelled = here("batch", "cancel", name)
    assert (cancelled.code, "0 of 40 runs in flight were asked to stop." in cancelled.out) == (1, True), cancelled.err
    assert server.requests["stop"] == 40
    assert at_once[1] > 10, "many at a time"


def test_a_refused_cancel_is_told(here, picky, call, name: str, leads: str, output: str, monkeypatch):
    _, crew = picky()
    flow_run_id = UUID(here(*call(crew, leads, "--key-column", "id", "-o", "json")).json["flow_run_id"])

    with get_client(sync_client=True) as client:
        client.set_flow_run_state(flow_run_id, Running(), force=True)
    details = StateAbortDetails(reason="its deployment is paused")
    aborted = AsyncMock(return_value=OrchestrationResult(state=None, status=SetStateStatus.ABORT, details=details))
    monkeypatch.setattr(PrefectClient, "set_flow_run_state", aborted)
    refused = asyncio.run(while_owned(f"{output}.ledger.db", name, lambda: here("batch", "cancel", name)))
    assert (refused.code, "is being cancelled" in refused.out + refused.err) == (1, False)
    assert "Prefect does not cancel flow run" in refused.err
    assert "its deployment is paused" in refused.err


def test_a_password_in_an_option_is_warned_of_and_not_shown(here, name: str):
    said = here("batch", "inspect", name, "--ledger", "postgresql://me:hunter2@127.0.0.1:1/x")
    assert "Other users of this machine can see the password in --ledger" in said.err
    assert "hunter2" not in said.out + said.err


def test_failed_rows_are_retried_by_name(here, picky, name: str, leads: str, output: str, monkeypatch, tmp_path: Path):
    server, crew = picky()
    monkeypatch.chdir(tmp_path)
    here("batch", "run", crew, "leads.csv", "--name", name, "--export", "out.jsonl", "--key-column", "id")
    monkeypatch.chdir("/")
    resumed = here("batch", "resume", name)
    assert (resumed.code, server.kickoffs, "prefect-crew batch retry" in resumed.err) == (6, 3, True)
    assert (here("batch", "retry", name).code, server.kickoffs) == (2, 3), "nobody confirmed"
    again = here("batch", "retry", name, "--yes", "--row", "b", "-o", "json")
    assert (again.code, again.json["kickoffs"], server.kickoffs) == (6, 1, 4)
    more = here("batch", "retry", name, "--yes")
    assert (server.kickoffs, "max_attempts" in more.err) == (4, True)
    assert lines(output) == {"a": "completed", "b": "failed", "c": "completed"}
    for row, why in (("a", "has completed"), ("z", "has no run of a row 'z'")):
        refused = here("batch", "retry", name, "--yes", "--row", row)
        assert (refused.code, why in refused.err) == (2, True)


def test_inputs_come_from_columns_and_templates(here, picky, call, name: str, tmp_path: Path, output: str):
    _, crew = picky()
    path = tmp_path / "rows.csv"
    path.write_text("what,how\ntea,hot\n", encoding="utf-16")
    options = ("--encoding", "utf-16", "--on-failure", "stop", "--max-in-flight", "3", "--timeout", "30")
    ran = here(*call(crew, str(path), "--map", "topic={{ how }} {{ what }}", *options))
    assert ran.code == 0, ran.err
    assert ran.out.startswith(f"Batch {name}: 1 of 1 rows completed in ")
    assert json.loads(Path(output).read_text())["output"] == "on hot tea"


def test_a_local_model_goes_with_the_name(here, picky, call, leads: str, name: str, output: str, monkeypatch):
    _, crew = picky()
    module, tmp_path = f"models_{uuid.uuid4().hex[:8]}", Path(output).parent
    (tmp_path / f"{module}.py").write_text("import pydantic\nclass Tea(pydantic.BaseModel):\n    cups: int\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.path", [entry for entry in sys.path if entry])
    assert here(*call(crew, leads, "--key-column", "id", "--output-type", f"{module}:Tea")).code == 6
    assert here("batch", "retry", name, "--yes", "--row", "a", "-o", "json").json["kickoffs"] == 1
    assert lines(output) == {"a": "invalid-output", "b": "failed", "c": "invalid-output"}


def test_a_crew_of_an_address_needs_the_same_call_again(here, crews: CrewServer, call, name: str, tmp_path: Path):
    path = tmp_path / "rows.csv"
    path.write_text("who\nAda\n")
    given = call(f"{crews.url}/broken", str(path))
    assert "To start them again: make the same call with --retry-failed" in here(*given).error(6)
    assert "its crew is not a stored block. Make the same call again" in here("batch", "resume", name).error(2)
    again = here(*given, "-o", "json")
    assert (again.code, again.json["kickoffs"], TOKEN in again.out + again.err) == (6, 0, False)


def test_a_ledger_that_is_not_here_is_missed_and_not_made_anew(here, picky, call, name: str, leads: str, output: str):
    server, crew = picky()
    here(*call(crew, leads))
    ledger = Path(f"{output}.ledger.db")
    ledger.rename(elsewhere := ledger.with_name("elsewhere.db"))
    for command in (("inspect", name), ("failures", name), ("retry", name, "--yes")):
        missed = here("batch", *command)
        assert (missed.code, str(ledger) in missed.err, ledger.exists()) == (1, True, False)
    Path(output).unlink()
    assert (here(*call(crew, leads)).code, server.kickoffs) == (1, 3)
    assert here("batch", "inspect", name, "--ledger", str(elsewhere)).code == 0
    assert here("batch", "inspect", "nobody's").code == 2


@pytest.mark.parametrize("started", [pytest.param(True, id="it-started"), pytest.param(False, id="it-never-did")])
def test_an_uncertain_row_is_resolved(here, picky, call, name: str, leads: str, output: str, started: bool):
    server, crew = picky(faults=["kickoff:drop-after-accept@1"])
    ran = here(*call(crew, leads, "--key-column", "id", "-o", "json"))
    (row,) = ran.json["uncertain_keys"]
    key = f"batch/{name}/{row}"
    assert (ran.code, server.kickoffs) == (6, 3)
    listed = here("batch", "failures", name)
    assert f"{row}\t\tuncertain\t" in listed.out
    assert "prefect-crew runs resolve" in listed.err
    assert here("batch", "retry", name, "--yes", "--row", row).code == 2
    assert here("runs", "resolve", f"batch/{name}/z", "--never-started", "--yes").code == 2
    if started:
        assert here("runs", "resolve", key, "--kickoff-id", "made up").code == 2
        other = new_record(phase=RecordPhase.STARTED, kickoff_id=(kickoff_id := f"k-{uuid.uuid4()}"))
        asyncio.run(put(other))
        taken = here("runs", "resolve", key, "--kickoff-id", kickoff_id)
        assert f"is attempt 1 at the idempotency key '{other.idempotency_key}'" in taken.err
        known = {line["kickoff_id"] for line in map(json.loads, Path(output).read_text().splitlines())}
        (run,) = {run.id for run in server.runs} - known
        resolved = here("runs", "resolve", key, "--kickoff-id", run)
    else:
        line = ("runs", "resolve", key, "--never-started", "--yes")
        assert "may still be sent, or on its way. Nothing was changed." in here(*line).error(1)
        let_an_hour_pass(f"{output}.ledger.db")
        busy = asyncio.run(while_owned(f"{output}.ledger.db", name, lambda: here(*line)))
        assert (busy.code, f"Batch '{name}' is being run by another process" in busy.err) == (1, True)
        resolved = here(*line)
    assert resolved.code == 0, resolved.err
    assert f"batch resume '{name}'" in resolved.out
    here("batch", "resume", name)
    assert lines(output).keys() == {"a", "b", "c"}
    assert server.kickoffs == (3 if started else 4)


async def while_owned(path: str, name: str, call: Callable[[], Any]) -> Any:
    """Return what a command does while another process runs the batch."""
    async with Database(path) as database, BatchLock(database, name) as lock:
        assert await lock.take()
        return await asyncio.to_thread(call)
