"""`runs`, `result` and `costs`: what records mean, resolving what is uncertain, pruning what is old."""

import asyncio
import uuid
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from typing import Any

import httpx
import pytest

from prefect_crew.cli.runs import Condition, RunLine, condition_of, short_name, todo
from prefect_crew.client.inputs import Inputs
from prefect_crew.client.models import TokenUsage
from prefect_crew.devserver import CrewServer
from prefect_crew.records.model import RecordPhase, RunRecord, StoredResult, utcnow
from prefect_crew.states import CrewState
from support.commands import TOKEN, Command
from support.prefect_server import PrefectServer
from support.records import let_pass, new_record, put
from support.waiting import wait_until

Write = Callable[..., RunRecord]
DIGEST = Inputs.of({"who": "Ada"}).digest
UNCERTAIN = {"phase": RecordPhase.UNCERTAIN, "reason": "the connection broke", "inputs_digest": DIGEST}


@pytest.fixture
def write(prefect_api: PrefectServer, crews: CrewServer) -> Write:
    """Write a record as it would stand after something; its key is a new one."""

    def write(**facts: Any) -> RunRecord:
        past = utcnow() - timedelta(minutes=5)
        run = {"crew": "greeting", "crew_url": f"{crews.url}/greet", "claimed_at": past, "kicked_off_at": past}
        return asyncio.run(put(new_record(**run | facts)))

    return write


@pytest.fixture
def greet(crews: CrewServer) -> tuple[str, str]:
    """Return the option that names the crew, which is not stored."""
    return "--crew", f"{crews.url}/greet"


@pytest.fixture
def run(here: Command, crews: CrewServer, instant_polling: None) -> Callable[..., Any]:
    """`run(key)`: the crew with that key and the inputs of `DIGEST`."""
    return lambda key, *options: here("run", f"{crews.url}/greet", "-i", "who=Ada", "--key", key, *options)


def kicked_off(crews: CrewServer, crew: str = "greet") -> str:
    answer = httpx.post(f"{crews.url}/{crew}/kickoff", headers=crews.headers, json={"inputs": {"who": "Ada"}})
    return answer.json()["kickoff_id"]


def test_what_needs_a_person_is_listed_first_and_inspect_says_what_to_do(here: Command, write: Write):
    uncertain = write(**UNCERTAIN)
    started = write(phase=RecordPhase.STARTED, kickoff_id=f"k-{uuid.uuid4()}")
    ended = write(phase=RecordPhase.ENDED, state="failed", error="no idea", kickoff_id="k", ended_at=utcnow())
    listed = here("runs", "ls").ok
    assert listed.splitlines()[0] == "State\tRun\tCrew\tSince"
    assert f"uncertain\t{uncertain.idempotency_key}\tgreeting\t5 min" in listed
    assert listed.index(uncertain.idempotency_key) < listed.index(started.idempotency_key)
    assert ended.idempotency_key not in listed
    assert f"failed\t{ended.idempotency_key}" in here("runs", "ls", "--all").out
    assert ended.idempotency_key in here("runs", "ls", "--only", "ended").out
    documents = here("runs", "ls", "--only", "uncertain", "-o", "json").json
    assert {line["condition"] for line in documents} == {"uncertain"}
    for record, parts in (
        (uncertain, ("the connection broke", f"runs resolve '{uncertain.idempotency_key}' --kickoff-id ID")),
        (started, ("No flow run started it. A call with its key waits for the latest attempt.",)),
        (ended, ("FAILED  key", "Error: no idea", f"Inputs: digest {ended.inputs_digest}")),
    ):
        page = here("runs", "inspect", record.idempotency_key).out
        assert [part for part in parts if part not in page] == []


def test_a_run_is_found_by_its_kickoff_id_and_the_crew_asked(
    here: Command, write: Write, crews: CrewServer, greet: tuple[str, str]
):
    record = write(phase=RecordPhase.STARTED, kickoff_id=(kickoff_id := kicked_off(crews)))
    document = here("runs", "inspect", kickoff_id, *greet, "-o", "json").json[-1]
    assert document["idempotency_key"] == record.idempotency_key
    assert document["status"]["kickoff_id"] == kickoff_id
    assert "raw" not in document["status"]
    assert not {"owner", "process", "version"} & set(document), "what is of no use to anybody"
    assert "The crew's server: " in here("runs", "inspect", kickoff_id, *greet).out
    assert "The crew's server was not asked." in here("runs", "inspect", kickoff_id).err
    # A start that was refused does not hide the run before it.
    write(idempotency_key=record.idempotency_key, attempt=2, phase=RecordPhase.NOT_STARTED)
    started, refused = here("runs", "inspect", record.idempotency_key, *greet, "-o", "json").json
    assert started["status"]["kickoff_id"] == kickoff_id
    assert "status" not in refused


def test_a_run_is_cancelled_by_its_key_and_its_crew(here: Command, write: Write, crews: CrewServer):
    slow = {"phase": RecordPhase.STARTED, "crew_url": f"{crews.url}/slow"}
    record = write(**slow, kickoff_id=(kickoff_id := kicked_off(crews, "slow")))
    key, crew = record.idempotency_key, ("--crew", f"{crews.url}/slow")
    assert "Give --crew" in here("runs", "cancel", key).error(2)
    assert here("runs", "cancel", key, *crew).ok == f"Run {key}: stopped.\n"
    assert here("runs", "inspect", kickoff_id).out.startswith("STOPPED")
    again = here("runs", "cancel", kickoff_id, *crew)
    assert again.code == 1
    assert "had already ended" in again.out
    with CrewServer("echo", token=TOKEN, stop=False) as server:
        for address in (f"{crews.url}/slow", server.url):
            unknown = write(**slow | {"crew_url": address}, kickoff_id=f"gone-{uuid.uuid4()}")
            assert "was not stopped" in here("runs", "cancel", unknown.idempotency_key, "--crew", address).error(1)


def test_of_two_runs_of_a_key_the_one_that_is_named_is_cancelled(here: Command, write: Write, crews: CrewServer):
    key, url = f"key {uuid.uuid4()}", f"{crews.url}/slow"
    runs = [kicked_off(crews, "slow") for _ in range(2)]
    for attempt, kickoff_id in enumerate(runs, 1):
        write(idempotency_key=key, crew_url=url, attempt=attempt, phase=RecordPhase.STARTED, kickoff_id=kickoff_id)
    write(idempotency_key=key, crew_url=url, attempt=3, phase=RecordPhase.NOT_STARTED)
    for name, states in ((runs[0], ["stopped", "running"]), (key, ["stopped", "stopped"])):
        assert here("runs", "cancel", name, "--crew", url).code == 0
        assert [str(crews.run(kickoff_id).state) for kickoff_id in runs] == states


def test_a_resolved_run_goes_on(here: Command, write: Write, crews: CrewServer, greet: tuple[str, str], run: Any):
    key = write(**UNCERTAIN).idempotency_key
    assert "prefect-crew runs resolve" in run(key).error(4)
    for kickoff_id, problem in (("made up", "does not know run made up"), ("", "is not a valid id")):
        assert problem in here("runs", "resolve", key, "--kickoff-id", kickoff_id, *greet).error(2)
    outcome = ("--kickoff-id", (kickoff_id := kicked_off(crews)))
    assert f"is run {kickoff_id}" in here("runs", "resolve", key, *outcome, *greet).ok
    kickoffs, after = crews.kickoffs, run(key, "-o", "json").json
    assert after["kickoff_id"] == kickoff_id
    assert after["output"] == "**Hello** Ada"
    assert crews.kickoffs == kickoffs
    assert "There is nothing to resolve" in here("runs", "resolve", key, "--never-started", "--yes").error(1)
    other = write(**UNCERTAIN, crew="not-stored").idempotency_key
    taken = here("runs", "resolve", other, *outcome, *greet).error(2)
    assert f"is attempt 1 at the idempotency key '{key}'" in taken
    unknown = here("runs", "resolve", other, "--kickoff-id", f"k-{uuid.uuid4()}")
    assert unknown.code == 0
    assert "was not asked" in unknown.err


def test_a_run_resolved_as_never_started_is_started(here: Command, write: Write, crews: CrewServer, run: Any):
    key = write(**UNCERTAIN).idempotency_key
    assert "Without a terminal this needs --yes" in here("runs", "resolve", key, "--never-started").error(2)
    assert here("runs", "resolve", key, "--never-started", "-y").code == 0
    kickoffs = crews.kickoffs
    assert run(key).code == 0
    assert crews.kickoffs == kickoffs + 1


def test_a_forgotten_run_can_be_given_up(
    here: Command, write: Write, crews: CrewServer, greet: tuple[str, str], run: Any
):
    started = {"phase": RecordPhase.STARTED, "inputs_digest": DIGEST}
    key = write(**started, kickoff_id=(gone := f"gone-{uuid.uuid4()}")).idempotency_key
    assert f"prefect-crew runs resolve {gone} --lost" in here("runs", "inspect", key).out
    known = write(**started, kickoff_id=kicked_off(crews)).idempotency_key
    assert "Nothing was changed" in here("runs", "resolve", known, "--lost", *greet, "--yes").error(2)
    assert here("runs", "resolve", gone, "--lost", *greet, "--yes").code == 0
    assert here("runs", "resolve", key, "--lost", "--yes").code == 1
    kickoffs = crews.kickoffs
    assert run(key).code == 0
    assert crews.kickoffs == kickoffs + 1
    assert "ORPHANED" not in here("runs", "inspect", key).out


def test_a_completed_run_that_nobody_waits_for_leads_to_its_result(
    here: Command, write: Write, crews: CrewServer, greet: tuple[str, str]
):
    kickoff_id = kicked_off(crews)
    wait_until(lambda: crews.run(kickoff_id).state is CrewState.COMPLETED)
    write(phase=RecordPhase.STARTED, kickoff_id=kickoff_id)
    page = here("runs", "inspect", kickoff_id, *greet).out
    assert f"prefect-crew result {kickoff_id}" in page
    assert "--lost" not in page
    assert here("result", kickoff_id, *greet).ok == "**Hello** Ada\n"


def test_a_large_result_is_written_without_the_crews_server(here: Command, write: Write):
    result = StoredResult(output="x" * 9000)
    record = write(phase=RecordPhase.ENDED, state=CrewState.COMPLETED, kickoff_id=f"k-{uuid.uuid4()}", result=result)
    assert here("result", record.idempotency_key).ok == f"{'x' * 9000}\n"


def test_prune(here: Command, write: Write, monkeypatch: pytest.MonkeyPatch):
    long_ago = utcnow() - timedelta(days=100)
    old = write(phase=RecordPhase.ENDED, state="completed", kickoff_id="k", claimed_at=long_ago, ended_at=long_ago)
    let_pass(monkeypatch, old.idempotency_key, 100)
    counted = here("runs", "prune", "--dry-run", "-o", "json").json
    assert counted["runs"] >= 1
    assert counted["dry_run"] is True
    assert here("runs", "inspect", old.idempotency_key).code == 0
    assert here("runs", "prune").code == 2, "nobody confirmed"
    assert here("runs", "prune", "--yes").out.startswith(f"{counted['runs']} records removed.")
    assert here("runs", "inspect", old.idempotency_key).code == 2


PERIOD = ("--from", "2001-05-01", "--to", "2001-05-02")
"""Years ago, when no other test's runs ended."""


def test_costs_of_the_days_that_are_asked_for_are_added_up(here: Command, write: Write):
    for day, crew, cost in (
        ("2001-05-01", "travel", 0.25),
        ("2001-05-02", "travel", None),
        ("2001-05-02", "news", 2.5),
        ("2001-06-01", "news", 100.0),
    ):
        ended_at = datetime.fromisoformat(f"{day}T23:59:59").replace(tzinfo=UTC)
        usage = cost and TokenUsage(total_tokens=12, prompt_tokens=10)
        facts: dict[str, Any] = {"phase": RecordPhase.ENDED, "ended_at": ended_at, "usage": usage, "cost": cost}
        write(crew=crew, kickoff_id=str(uuid.uuid4()), **facts)
    table = here("costs", *PERIOD)
    assert table.ok == (
        "Crew\tRuns\tTokens\tCost\tWithout tokens\n"
        "news\t1\t12\t2.50\t0\n"
        "travel\t2\t12\t0.250\t1\n"
        "together\t3\t24\t2.75\t1\n"
    )
    assert "1 of 3 runs reported no tokens; the cost of 1 of 3 runs is unknown." in table.err
    assert "Records are kept for 30 days" in table.err
    days = here("costs", "--by", "day", *PERIOD, "-o", "json").json
    rows = [(day["name"], day["cost"], day["runs"], day["reported"]) for day in days["groups"]]
    assert rows == [("2001-05-01", 0.25, 1, 1), ("2001-05-02", 2.5, 2, 1)]
    usage = {"total_tokens": 24, "prompt_tokens": 20}
    assert days["total"] == {"runs": 3, "reported": 2, "priced": 2, "usage": usage, "cost": 2.75}
    assert here("costs", "--from", "1999-01-01", "--to", "1999-01-02").out == "No run has ended in this time.\n"


# The condition of a record


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
    assert condition_of(record(**facts), owner_ended=owner_ended) is condition
    needs_a_person = (Condition.UNCERTAIN, Condition.ORPHANED, Condition.WAITING, Condition.ENDED)
    assert bool(todo(record(**facts), condition)) is (condition in needs_a_person)


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
