"""`runs`: what records mean, resolving what is uncertain, pruning what is old."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from typing import Any

import httpx
import pytest

from prefect_crew.cli.runs import Condition, RunLine, condition_of, short_name, todo
from prefect_crew.client.inputs import Inputs
from prefect_crew.devserver import CrewServer
from prefect_crew.records.model import RecordPhase, RunRecord, StoredResult, utcnow
from prefect_crew.states import CrewState
from support.commands import TOKEN
from support.prefect_server import PrefectServer
from support.records import let_pass, new_record, put
from support.waiting import wait_until

Write = Callable[..., RunRecord]


@pytest.fixture
def write(prefect_api: PrefectServer, crews: CrewServer) -> Write:
    """Write a record as it would stand after something; its key is a new one."""

    def write(**facts: Any) -> RunRecord:
        known = {"crew": "greeting", "crew_url": f"{crews.url}/greet", "claimed_at": utcnow() - timedelta(minutes=5)}
        return asyncio.run(put(new_record(**known | facts)))

    return write


def uncertain(**facts: Any) -> dict[str, Any]:
    return {"phase": RecordPhase.UNCERTAIN, "reason": "the connection broke", **facts}


def kicked_off(crews: CrewServer, crew: str = "greet") -> str:
    answer = httpx.post(f"{crews.url}/{crew}/kickoff", headers=crews.headers, json={"inputs": {"who": "Ada"}})
    return answer.json()["kickoff_id"]


def test_what_needs_a_person_is_listed_first_and_inspect_says_what_to_do(here, write: Write):
    record = write(**uncertain())
    started = write(phase=RecordPhase.STARTED, kickoff_id=f"k-{uuid.uuid4()}", kicked_off_at=utcnow())
    ended = write(phase=RecordPhase.ENDED, state="failed", error="no idea", kickoff_id="k", ended_at=utcnow())
    listed = here("runs", "ls")
    assert (listed.code, listed.out.splitlines()[0]) == (0, "State\tRun\tCrew\tSince")
    assert f"uncertain\t{record.idempotency_key}\tgreeting\t5 min" in listed.out
    assert listed.out.index(record.idempotency_key) < listed.out.index(started.idempotency_key)
    assert ended.idempotency_key not in listed.out
    assert f"failed\t{ended.idempotency_key}" in here("runs", "ls", "--all").out
    assert ended.idempotency_key in here("runs", "ls", "--only", "ended").out
    only = here("runs", "ls", "--only", "uncertain", "-o", "json").json
    assert {line["condition"] for line in only} == {"uncertain"}
    for one, parts in (
        (record, ("the connection broke", f"runs resolve '{record.idempotency_key}' --kickoff-id ID")),
        (started, ("No flow run started it. A call with its key waits for the latest attempt.",)),
        (ended, ("FAILED  key", "Error: no idea", f"Inputs: digest {ended.inputs_digest}")),
    ):
        about = here("runs", "inspect", one.idempotency_key).out
        assert [part for part in parts if part not in about] == []


def test_a_run_is_found_by_its_kickoff_id_and_the_crew_asked(here, write: Write, crews: CrewServer):
    record = write(phase=RecordPhase.STARTED, kickoff_id=kicked_off(crews), kicked_off_at=utcnow())
    kickoff_id, crew = str(record.kickoff_id), ("--crew", f"{crews.url}/greet")
    document = here("runs", "inspect", kickoff_id, *crew, "-o", "json").json[-1]
    assert (document["idempotency_key"], document["status"]["kickoff_id"]) == (record.idempotency_key, kickoff_id)
    assert "raw" not in document["status"]
    assert not {"owner", "process", "version"} & set(document), "what is of no use to anybody"
    assert "The crew's server: " in here("runs", "inspect", kickoff_id, *crew).out
    assert "The crew's server was not asked." in here("runs", "inspect", kickoff_id).err
    assert here("runs", "inspect", "nobody used this").code == 2
    # A start that was refused does not hide the run before it.
    write(idempotency_key=record.idempotency_key, attempt=2, phase=RecordPhase.NOT_STARTED)
    started, refused = here("runs", "inspect", record.idempotency_key, *crew, "-o", "json").json
    assert (started["status"]["kickoff_id"], "status" in refused) == (kickoff_id, False)


def test_a_run_is_cancelled_by_its_key_and_its_crew(here, write: Write, crews: CrewServer):
    url = f"{crews.url}/slow"
    started = {"phase": RecordPhase.STARTED, "crew_url": url, "kicked_off_at": utcnow()}
    record = write(**started, kickoff_id=(kickoff_id := kicked_off(crews, "slow")))
    assert "Give --crew" in here("runs", "cancel", record.idempotency_key).err
    stopped = here("runs", "cancel", record.idempotency_key, "--crew", url)
    assert (stopped.code, stopped.out) == (0, f"Run {record.idempotency_key}: stopped.\n")
    assert here("runs", "inspect", kickoff_id).out.startswith("STOPPED")
    again = here("runs", "cancel", kickoff_id, "--crew", url)
    assert (again.code, "had already ended" in again.out) == (1, True)
    assert "No run has the key" in here("runs", "cancel", "no-such-run", "--crew", url).err
    with CrewServer("echo", token=TOKEN, stop=False) as server:
        for address in (url, server.url):
            unknown = write(**{**started, "crew_url": address}, kickoff_id=f"gone-{uuid.uuid4()}")
            assert "was not stopped" in here("runs", "cancel", unknown.idempotency_key, "--crew", address).error(1)


DIGEST = Inputs.of({"who": "Ada"}).digest


def test_a_resolved_run_goes_on(here, write: Write, crews: CrewServer, instant_polling: None):
    record, crew = write(**uncertain(inputs_digest=DIGEST)), ("--crew", f"{crews.url}/greet")
    ran = ("run", f"{crews.url}/greet", "-i", "who=Ada", "--key", record.idempotency_key)
    assert "prefect-crew runs resolve" in here(*ran).error(4)
    for id_, problem in (("made up", "does not know run made up"), ("", "is not a valid id")):
        unknown = here("runs", "resolve", record.idempotency_key, "--kickoff-id", id_, *crew)
        assert (unknown.code, problem in unknown.err) == (2, True)
    resolved = here("runs", "resolve", record.idempotency_key, "--kickoff-id", (id_ := kicked_off(crews)), *crew)
    assert (resolved.code, f"is run {id_}" in resolved.out) == (0, True), resolved.err
    kickoffs = crews.kickoffs
    after = here(*ran, "-o", "json").json
    assert (after["kickoff_id"], after["output"], crews.kickoffs) == (id_, "**Hello** Ada", kickoffs)
    again = here("runs", "resolve", record.idempotency_key, "--never-started", "--yes")
    assert (again.code, "There is nothing to resolve" in again.err) == (1, True)
    other = here("runs", "resolve", write(**uncertain()).idempotency_key, "--kickoff-id", id_, *crew)
    assert other.code == 2
    assert f"is attempt 1 at the idempotency key '{record.idempotency_key}'" in other.err


def test_a_run_resolved_as_never_started_is_started(here, write: Write, crews: CrewServer, instant_polling: None):
    record = write(**uncertain(inputs_digest=DIGEST))
    refused = here("runs", "resolve", record.idempotency_key, "--never-started")
    assert (refused.code, "Without a terminal this needs --yes" in refused.err) == (2, True)
    assert here("runs", "resolve", record.idempotency_key, "--never-started", "-y").code == 0
    kickoffs = crews.kickoffs
    assert here("run", f"{crews.url}/greet", "-i", "who=Ada", "--key", record.idempotency_key).code == 0
    assert crews.kickoffs == kickoffs + 1


def test_of_two_runs_of_a_key_the_one_that_is_named_is_cancelled(here, write: Write, crews: CrewServer):
    crew: dict[str, Any] = {"idempotency_key": str(uuid.uuid4()), "crew": "slow", "crew_url": f"{crews.url}/slow"}
    runs = [kicked_off(crews, "slow") for _ in range(2)]
    first, _ = (
        write(**crew, attempt=attempt, phase=RecordPhase.STARTED, kickoff_id=run, kicked_off_at=utcnow())
        for attempt, run in enumerate(runs, 1)
    )
    write(**crew, attempt=3, phase=RecordPhase.NOT_STARTED)
    for name, states in ((runs[0], ["stopped", "running"]), (first.idempotency_key, ["stopped", "stopped"])):
        assert here("runs", "cancel", name, "--crew", f"{crews.url}/slow").code == 0
        assert [str(crews.run(run).state) for run in runs] == states


def test_a_forgotten_run_can_be_given_up(here, write: Write, crews: CrewServer, instant_polling: None):
    facts = {"phase": RecordPhase.STARTED, "inputs_digest": DIGEST, "kicked_off_at": utcnow() - timedelta(minutes=5)}
    record, crew = write(**facts, kickoff_id=f"gone-{uuid.uuid4()}"), ("--crew", f"{crews.url}/greet")
    ran = ("run", f"{crews.url}/greet", "-i", "who=Ada", "--key", record.idempotency_key)
    lost, advice = here(*ran), "prefect-crew runs resolve {} --lost"
    assert (lost.code, advice.format(f"'{record.idempotency_key}'") in lost.err) == (3, True)
    assert advice.format(record.kickoff_id) in here("runs", "inspect", record.idempotency_key).out
    known = write(**facts, kickoff_id=kicked_off(crews))
    assert "Nothing was changed" in here("runs", "resolve", known.idempotency_key, "--lost", *crew, "--yes").error(2)
    assert here("runs", "resolve", str(record.kickoff_id), "--lost", *crew, "--yes").code == 0
    assert here("runs", "resolve", record.idempotency_key, "--lost", "--yes").code == 1
    kickoffs = crews.kickoffs
    assert (here(*ran).code, crews.kickoffs) == (0, kickoffs + 1)
    assert "ORPHANED" not in here("runs", "inspect", record.idempotency_key).out


def test_a_run_that_has_completed_with_nobody_waiting_leads_to_its_result(here, write: Write, crews: CrewServer):
    url, kickoff_id = f"{crews.url}/greet", kicked_off(crews)
    wait_until(lambda: crews.run(kickoff_id).state is CrewState.COMPLETED)
    write(phase=RecordPhase.STARTED, kickoff_id=kickoff_id, kicked_off_at=utcnow(), crew="greet", crew_url=url)
    shown = here("runs", "inspect", kickoff_id, "--crew", url).out
    assert f"prefect-crew result {kickoff_id}" in shown
    assert "--lost" not in shown
    done = here("result", kickoff_id, "--crew", url)
    assert (done.code, done.out) == (0, "**Hello** Ada\n")


def test_a_large_result_is_written_without_the_crews_server(here, write: Write):
    facts: dict[str, Any] = {"phase": RecordPhase.ENDED, "state": CrewState.COMPLETED, "crew": "not-stored"}
    record = write(**facts, kickoff_id=f"k-{uuid.uuid4()}", result=StoredResult(output="x" * 9000))
    done = here("result", record.idempotency_key)
    assert (done.code, done.out) == (0, f"{'x' * 9000}\n")


def test_without_its_crew_a_resolution_says_that_nobody_was_asked(here, write: Write):
    record = write(**uncertain(crew="not-stored"))
    done = here("runs", "resolve", record.idempotency_key, "--kickoff-id", f"k-{uuid.uuid4()}")
    assert done.code == 0
    assert "was not asked" in done.err


def test_prune(here, write: Write, monkeypatch: pytest.MonkeyPatch):
    long_ago = utcnow() - timedelta(days=100)
    old = write(phase=RecordPhase.ENDED, state="completed", kickoff_id="k", claimed_at=long_ago, ended_at=long_ago)
    open_ = write(phase=RecordPhase.STARTED, kickoff_id="k2", claimed_at=long_ago, kicked_off_at=long_ago)
    for one in (old, open_):
        let_pass(monkeypatch, one.idempotency_key, 100)
    counted = here("runs", "prune", "--dry-run", "-o", "json").json
    assert (counted["runs"] >= 1, counted["dry_run"]) == (True, True)
    assert here("runs", "inspect", old.idempotency_key).code == 0
    assert here("runs", "prune").code == 2, "nobody confirmed"
    assert here("runs", "prune", "--yes").out.startswith(f"{counted['runs']} records removed.")
    assert here("runs", "inspect", old.idempotency_key).code == 2
    assert here("runs", "inspect", open_.idempotency_key).code == 0


def record(**facts: Any) -> RunRecord:
    return new_record(**{"idempotency_key": "daily", "claimed_at": NOW - timedelta(seconds=20), **facts})


NOW = datetime(2026, 5, 1, 12, tzinfo=UTC)
STARTED = {"phase": RecordPhase.STARTED, "kickoff_id": "k1", "flow_run_id": "f1"}
STARTED |= {"kicked_off_at": NOW - timedelta(seconds=19)}
ASKED = {**STARTED, "human_since": NOW - timedelta(seconds=5), "human_task": "draft"}


@pytest.mark.parametrize(
    ("facts", "owner_ended", "condition"),
    [
        pytest.param({"open_for": 20.0}, False, Condition.CLAIMED, id="being-sent"),
        pytest.param({"open_for": 20.0}, True, Condition.NOT_STARTED, id="claimed-by-a-dead-flow-run"),
        pytest.param({"open_for": 0.0}, False, Condition.NOT_STARTED, id="claimed-too-long-ago"),
        pytest.param({"entries": 1, "open_for": 20.0}, True, Condition.UNCERTAIN, id="sent-by-a-dead-flow-run"),
        pytest.param({"entries": 1, "open_for": 0.0}, False, Condition.UNCERTAIN, id="sent-too-long-ago"),
        pytest.param({"phase": RecordPhase.UNCERTAIN}, False, Condition.UNCERTAIN, id="uncertain"),
        pytest.param(STARTED, False, Condition.IN_FLIGHT, id="in-flight"),
        pytest.param(ASKED, False, Condition.WAITING, id="waiting"),
        pytest.param(STARTED, True, Condition.ORPHANED, id="orphaned"),
        pytest.param(ASKED, True, Condition.ORPHANED, id="orphaned-while-waiting"),
        pytest.param({**STARTED, "flow_run_id": None}, False, Condition.ORPHANED, id="of-no-flow-run"),
        pytest.param({"phase": RecordPhase.ENDED, "state": "failed"}, False, Condition.ENDED, id="ended"),
        pytest.param({"phase": RecordPhase.NOT_STARTED}, True, Condition.NOT_STARTED, id="not-started"),
    ],
)
def test_condition(facts: dict[str, Any], owner_ended: bool, condition: Condition):
    found = record(**facts)
    assert condition_of(found, owner_ended=owner_ended) is condition
    needs_a_person = (Condition.UNCERTAIN, Condition.ORPHANED, Condition.WAITING, Condition.ENDED)
    assert bool(todo(found, condition)) is (condition in needs_a_person)


def test_since_when_and_what_to_do():
    assert RunLine(record(), Condition.CLAIMED).since == NOW - timedelta(seconds=20)
    assert RunLine(record(**STARTED), Condition.IN_FLIGHT).since == STARTED["kicked_off_at"]
    assert RunLine(record(**ASKED), Condition.WAITING).since == ASKED["human_since"]
    assert todo(record(phase=RecordPhase.ENDED, state="completed"), Condition.ENDED) == ""
    assert "reviews inspect k1." in todo(record(**ASKED), Condition.WAITING)
    of_url = record(**ASKED, crew="travel.test")
    assert "reviews inspect k1 --crew https://travel.test." in todo(of_url, Condition.WAITING)


def test_a_run_with_a_derived_key_is_listed_by_its_kickoff_id():
    derived = "8f0e5c1d-9d47-4a6b-8f0e-5c1d2a7b9e64/travel/a66405200addd68f388066aeebf9825d/1"
    assert short_name(record(**STARTED, idempotency_key=derived)) == "k1"
    assert short_name(record(idempotency_key=derived)) == derived
    assert short_name(record(**STARTED)) == "daily"
