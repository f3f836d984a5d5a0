"""`batch`: a crew for every row, how it stands, what failed, and going on by the name alone."""

import asyncio
import json
import signal
import sys
import uuid
from pathlib import Path
from typing import Any
from unittest.mock import AsyncMock
from uuid import UUID

import pytest
from prefect.client.orchestration import PrefectClient, get_client
from prefect.client.schemas import OrchestrationResult
from prefect.client.schemas.responses import SetStateStatus, StateAbortDetails
from prefect.states import Running

from prefect_crew import WaitPolicy, run_batch
from prefect_crew.client import CrewClient
from prefect_crew.devserver import CrewServer
from prefect_crew.exceptions import CrewError
from prefect_crew.runs.database import URL_SETTING, database_url, find_store
from prefect_crew.store.batches import count_rows, hold_batch, let_go
from prefect_crew.store.decision import AttemptState
from prefect_crew.testing import CrewServerFactory
from support.batches import let_an_hour_pass
from support.commands import TOKEN, Command, Finished, environment
from support.environment import program
from support.prefect_server import PrefectServer
from support.processes import Process
from support.scripts import PICKY, script
from support.terminals import Terminal
from support.waiting import soon, wait_until

pytestmark = pytest.mark.usefixtures("prefect_api", "instant_polling")
KEY = ("--key-column", "id")
JSON = ("-o", "json")


class Leads:
    """A crew, stored as a block, and a batch for it of the rows of `leads.csv`, whose ids are a, b and c."""

    def __init__(self, here: Command, server: CrewServer, folder: Path) -> None:
        self.here, self.server, self.folder = here, server, folder
        self.name, self.crew = f"leads {uuid.uuid4().hex[:8]}", f"picky-{uuid.uuid4().hex[:8]}"
        self.output = folder / "out.jsonl"
        self.flow_run_id: str | None = None
        block: Any = server.crew(max_attempts=2)
        block.save(self.crew, _sync=True)
        self.write("id,topic\na,tea\nb,bad milk\nc,cake\n")

    def write(self, text: str, name: str = "leads.csv", encoding: str = "utf-8") -> Path:
        path = self.folder / name
        path.write_text(text, encoding=encoding)
        return path

    def line(self, *options: str, name: str = "leads.csv", crew: str | None = None) -> list[str]:
        rows = str(self.folder / name)
        return ["batch", "run", crew or self.crew, rows, "--name", self.name, "--export", str(self.output), *options]

    def run(self, *options: str, **call: Any) -> Finished:
        return self.here(*self.line(*options, **call))

    def __call__(self, verb: str, *options: str) -> Finished:
        """Run another command, which is given the name of the batch."""
        return self.here("batch", verb, self.name, *options)

    def states(self) -> dict[str, str]:
        """Return the state of each row in the export, which has each once."""
        lines = [json.loads(line) for line in self.output.read_text().splitlines()]
        assert len({line["key"] for line in lines}) == len(lines)
        return {line["key"]: line["state"] for line in lines}

    def while_owned(self, *line: str) -> Finished:
        """Return what a command does while another process runs the batch."""
        store = find_store()
        held = asyncio.run(store.run(hold_batch, self.name, "another", flow_run_id=self.flow_run_id))
        assert held is not None
        try:
            return self.here(*line)
        finally:
            assert asyncio.run(store.run(let_go, self.name, "another"))


@pytest.fixture
def leads(here: Command, crew_server: CrewServerFactory, tmp_path: Path) -> Leads:
    return Leads(here, crew_server(PICKY), tmp_path)


def test_a_batch_from_its_plan_to_the_rows_that_failed(here: Command, leads: Leads):
    rows = str(leads.folder / "leads.csv")
    plan = here("batch", "plan", leads.crew, rows, *KEY, "--seconds-per-run", "90", *JSON).json
    assert plan["rows"] == 3
    assert plan["seconds"] == 90
    assert leads.server.kickoffs == 0
    ran = leads.run(*KEY, *JSON)
    assert ran.code == 6
    assert ran.json["completed"] == 2
    assert ran.json["failed"] == 1
    assert ran.json["kickoffs"] == 3
    assert ran.json["flow_run_url"].endswith(ran.json["flow_run_id"])
    assert f"Batch {leads.name}: checking every row" in ran.err
    assert leads.states() == {"a": "completed", "b": "failed", "c": "completed"}
    page = leads("inspect").ok
    again = f"To go on where it stopped: prefect-crew batch resume '{leads.name}'"
    head = f"Batch {leads.name}: 2 of 3 rows completed\n  No process runs it. {again}\n"
    assert page == f"{head}  Failed: 1\n  Kickoffs: 3\n  Export: {leads.output}\n"
    status = leads("inspect", *JSON).json
    assert (status["completed"], status["failed"], status["skipped"]) == (2, 1, 0)
    (failed,) = leads("failures", *JSON).json
    assert failed["key"] == "b"
    assert failed["state"] == "failed"
    assert failed["error"] == "no bad milk"
    assert leads("failures").out.splitlines()[1].startswith("b\t")
    cancelled = leads("cancel")
    assert cancelled.code == 1
    assert cancelled.out == f"Batch {leads.name}: no run is in flight. {again}\n"


def test_an_export_replaces_no_file_of_something_else(leads: Leads):
    rows = leads.write(text := '{"topic": "tea"}\n', "leads.jsonl")
    leads.run(name="leads.jsonl")
    refused = leads("export", str(rows)).error(1)
    assert "leads.jsonl exists already and is not from this batch" in refused
    assert "or replace it with overwrite=True (--overwrite). Nothing was written." in refused
    assert rows.read_text() == text
    assert leads("export", str(rows), "--overwrite").out == f"1 lines of batch {leads.name} are in {rows}.\n"
    assert rows.read_text() == leads.output.read_text()
    for file in (rows, leads.output):
        assert leads("export", str(file)).code == 0, "it is from this batch by now"


def test_batches_over_ranges_of_rows_are_listed(here: Command, leads: Leads):
    name, folder = leads.name, leads.folder
    for part, rows in (("1", "0:2"), ("2", "2:")):
        leads.name, leads.output = f"{name}/{part}", folder / f"{part}.jsonl"
        leads.run(*KEY, "--rows", rows)
    listed = [batch["name"] for batch in here("batch", "ls", *JSON).json if batch["name"].startswith(name)]
    assert listed == [f"{name}/2", f"{name}/1"], "the one that ran last first"
    first, second = (here("batch", "inspect", f"{name}/{part}", *JSON).json for part in "12")
    assert (first["total"], first["completed"], first["failed"]) == (2, 1, 1)
    assert (second["total"], second["completed"], second["failed"]) == (1, 1, 0)


def test_bad_rows_are_refused_or_skipped(here: Command, leads: Leads):
    rows = str(leads.write("id,topic\na,tea\nb\nc,\n"))
    assert here("batch", "plan", leads.crew, rows).code == 6
    plan = here("batch", "plan", leads.crew, rows, *KEY, "--on-bad-row", "skip").ok
    for part in ("1 rows, 1 to run", "Line 3 cannot be run: has 1 fi", "Line 4 cannot be run: has no value for topic"):
        assert part in plan
    assert "--on-bad-row skip" in leads.run(*KEY).error(6)
    assert leads.server.kickoffs == 0
    ran = leads.run(*KEY, "--on-bad-row", "skip")
    assert "1 of 3 rows completed, 2 bad in" in ran.out
    assert "batch failures" in ran.error(6)
    assert leads.server.kickoffs == 1
    page = leads("inspect").out
    assert "1 of 3 rows completed\n" in page
    assert "  Bad rows: line 3: has 1 fields" in page
    assert "line 4\t\tbad\thas no value for topic" in leads("failures").out
    assert [row["line"] for row in leads("failures", *JSON).json] == [3, 4]


def test_failed_rows_are_started_again_by_name_up_to_max_attempts(leads: Leads, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(leads.folder)
    leads.here("batch", "run", leads.crew, "leads.csv", "--name", leads.name, "--export", "out.jsonl", *KEY)
    monkeypatch.chdir("/")
    for kickoffs in (4, 4):  # max_attempts is 2
        assert "prefect-crew batch resume" in leads("resume").error(6)
        assert leads.server.kickoffs == kickoffs
    assert leads.states() == {"a": "completed", "b": "failed", "c": "completed"}


def test_inputs_come_from_columns_and_templates(leads: Leads):
    leads.write("what;how\ntea;hot\n", encoding="utf-8-sig")  # as Excel writes it
    options = ("--on-failure", "stop", "--max-in-flight", "3")
    ran = leads.run("--map", "topic={{ how }} {{ what }}", *options).ok
    assert ran.startswith(f"Batch {leads.name}: 1 of 1 rows completed in ")
    assert json.loads(leads.output.read_text())["output"] == "on hot tea"


def test_a_local_model_goes_with_the_name(leads: Leads, monkeypatch: pytest.MonkeyPatch):
    module = f"models_{uuid.uuid4().hex[:8]}"
    leads.write("import pydantic\nclass Tea(pydantic.BaseModel):\n    cups: int\n", f"{module}.py")
    with monkeypatch.context() as of_script:
        of_script.syspath_prepend(leads.folder)
        rows, model = leads.folder / "leads.csv", f"{module}:Tea"
        run_batch(leads.crew, rows, name=leads.name, export=leads.output, key="id", output_type=model)
    del sys.modules[module]
    monkeypatch.chdir(leads.folder)
    monkeypatch.setattr("sys.path", [entry for entry in sys.path if entry])
    assert leads("resume", *JSON).json["failed"] == 3
    assert leads.states() == {"a": "invalid-output", "b": "failed", "c": "invalid-output"}


def test_a_crew_of_an_address_needs_the_same_call_again(crews: CrewServer, leads: Leads):
    leads.write("who\nAda\n")
    broken = f"{crews.url}/broken"
    assert "To start failed rows again, up to max_attempts of the crew: make the same call" in leads.run(
        crew=broken
    ).error(6)
    assert "its crew is not stored, its data set has no path" in leads("resume").error(2)
    again = leads.run(*JSON, crew=broken)
    assert again.code == 6
    assert TOKEN not in again.out + again.err


@pytest.mark.parametrize("started", [pytest.param(True, id="it-started"), pytest.param(False, id="it-never-did")])
def test_an_uncertain_row_is_resolved(here: Command, leads: Leads, started: bool):
    leads.server.faults.add("kickoff:drop-after-accept@1")
    ran = leads.run(*KEY, *JSON)
    (row,) = ran.json["uncertain_keys"]
    key = f"batch/{leads.name}/{row}"
    assert ran.code == 6
    assert leads.server.kickoffs == 3
    listed = leads("failures")
    assert f"{row}\t\tuncertain\t" in listed.out
    assert "prefect-crew runs resolve" in listed.err
    if started:
        exported = {line["kickoff_id"] for line in map(json.loads, leads.output.read_text().splitlines())}
        (run,) = {run.id for run in leads.server.runs} - exported
        line = ("runs", "resolve", key, "--kickoff-id", run)
    else:
        line = ("runs", "resolve", key, "--never-started", "--yes")
    asyncio.run(let_an_hour_pass())
    assert f"batch resume '{leads.name}'" in here(*line).ok
    leads("resume")
    assert leads.states().keys() == {"a", "b", "c"}
    assert leads.server.kickoffs == (3 if started else 4) + (leads.states()["b"] == "failed")


# What is in flight


def test_a_cancel_that_stops_nothing_tells_it(
    here: Command, crew_server: CrewServerFactory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    leads = Leads(here, crew_server(script({"seconds": 60, "output": "late"}, inputs=["topic"])), tmp_path)
    leads.write("topic\n" + "".join(f"topic {number}\n" for number in range(40)))
    wait = WaitPolicy(timeout=0.5)
    run_batch(leads.crew, leads.folder / "leads.csv", name=leads.name, export=leads.output, wait=wait)
    assert leads("inspect", *JSON).json["in_flight"] == 40
    many, asked = asyncio.Barrier(10), list[str]()

    async def stop(_: CrewClient, kickoff_id: str) -> None:
        asked.append(kickoff_id)
        await soon(many.wait())
        raise CrewError("The server is away.")

    monkeypatch.setattr(CrewClient, "stop", stop)
    cancelled = leads("cancel")
    assert cancelled.code == 1, cancelled.err
    assert "0 of 40 runs in flight were asked to stop." in cancelled.out
    assert len(set(asked)) == 40


def test_a_batch_that_a_process_runs_is_cancelled_or_prefect_refuses(leads: Leads, monkeypatch: pytest.MonkeyPatch):
    leads.flow_run_id = leads.run(*KEY, *JSON).json["flow_run_id"]
    flow_run_id = UUID(leads.flow_run_id)
    with get_client(sync_client=True) as client:
        client.set_flow_run_state(flow_run_id, Running(), force=True)
    assert "  A process runs it now\n" in leads.while_owned("batch", "inspect", leads.name).ok
    assert "is being cancelled." in leads.while_owned("batch", "cancel", leads.name).ok
    with get_client(sync_client=True) as client:
        assert client.read_flow_run(flow_run_id).state_name == "Cancelling"
    details = StateAbortDetails(reason="its deployment is paused")
    aborted = AsyncMock(return_value=OrchestrationResult(state=None, status=SetStateStatus.ABORT, details=details))
    monkeypatch.setattr(PrefectClient, "set_flow_run_state", aborted)
    refused = leads.while_owned("batch", "cancel", leads.name).error(1)
    assert "Prefect does not cancel flow run" in refused
    assert "its deployment is paused" in refused
    assert "is being cancelled" not in refused


@pytest.mark.programs
@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143)])
def test_a_batch_that_a_signal_ended_is_cancelled(
    here: Command, crew_server: CrewServerFactory, prefect_api: PrefectServer, tmp_path: Path, number: int, code: int
):
    server = crew_server(script({"seconds": 60, "output": "late"}, inputs=["topic"], flow=True), token=TOKEN)
    leads = Leads(here, server, tmp_path)
    leads.write("topic\n" + "".join(f"topic {number}\n" for number in range(30)))
    line = leads.line("--max-in-flight", "5")

    def started() -> int:
        # An id that the crew database does not have yet is lost with the process.
        return asyncio.run(find_store().run(count_rows, leads.name)).get(AttemptState.STARTED, 0)

    env = environment(tmp_path / "home", {"PREFECT_API_URL": prefect_api.api_url, URL_SETTING: database_url()[0]})
    with Process([program("prefect-crew"), *line], log=tmp_path / "log", env=env) as process:
        wait_until(lambda: server.kickoffs == 5 and started() == 5, "its rows in flight, in the crew database")
        process.send(number)
        assert process.wait() == code, process.output
    assert server.requests["stop"] == 0
    output, again = process.output.replace("\n", " "), f"prefect-crew batch resume '{leads.name}'"
    assert f"To go on where it stopped: {again}. To stop the runs in flight: prefect-crew batch cancel" in output
    assert "Traceback" not in output
    assert f"No process runs it. To go on where it stopped: {again}" in leads("inspect").out
    cancelled = leads("cancel").ok
    assert f"5 of 5 runs in flight were asked to stop. To go on where it stopped: {again}" in cancelled
    assert {str(run.state) for run in server.runs} == {"stopped"}
    counts = leads("inspect", *JSON).json
    assert counts["in_flight"] == 0
    assert counts["failed"] == 5


@pytest.mark.programs
@pytest.mark.skipif(sys.platform == "win32", reason="it needs a terminal of Unix")
def test_a_token_is_typed_and_ctrl_c_leaves_the_runs(
    leads: Leads, crew_server: CrewServerFactory, prefect_api: PrefectServer, tmp_path: Path
):
    server = crew_server(script({"seconds": 60, "output": "late"}, inputs=["topic"]), token=TOKEN)
    leads.write("topic\ntea\ncocoa\n")
    leads.name += "-{scheduled_start:%Y}"
    env = environment(tmp_path / "home", {"PREFECT_API_URL": prefect_api.api_url, URL_SETTING: database_url()[0]})
    env.pop("CREW_TOKEN", None)  # a person types it
    with Terminal([program("prefect-crew"), *leads.line(crew=server.url)], env=env) as terminal:
        terminal.wait_for("Token of")
        terminal.press(f"{TOKEN}\r")
        wait_until(lambda: server.kickoffs == 2, "its rows in flight")
        terminal.press("\x03")
        assert terminal.wait() == 130
    assert "To stop the runs in flight: prefect-crew batch cancel" in terminal.output.replace("\r\n", " ")
    assert server.requests["stop"] == 0
