"""`runs`, `result` and `costs`: the words for attempts, resolving what is uncertain, pruning what is old."""

import asyncio
import re
import uuid
from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import Any

import httpx
import pytest

from prefect_crew._internal.clock import utcnow
from prefect_crew.cli.runs import Word, short_name, todo, word_of
from prefect_crew.client.inputs import Inputs
from prefect_crew.devserver import CrewServer
from prefect_crew.runs.database import find_store
from prefect_crew.states import CrewState
from prefect_crew.store import questions
from prefect_crew.store.decision import Attempt, AttemptState
from support.commands import TOKEN, Command
from support.past import new_attempt, put, stored
from support.prefect_server import PrefectServer
from support.servers import adding
from support.waiting import wait_until

S = AttemptState
Write = Callable[..., Attempt]
DIGEST = Inputs.of({"who": "Ada"}).digest
UNCERTAIN: dict[str, Any] = {"state": S.UNCERTAIN, "error": "the connection broke", "inputs_digest": DIGEST}
STARTED: dict[str, Any] = {"state": S.STARTED, "inputs_digest": DIGEST}


@pytest.fixture
def write(prefect_api: PrefectServer, crews: CrewServer) -> Write:
    """Write an attempt as it would stand after something; its key is a new one."""

    def write(key: str | None = None, *, result: Any = None, **facts: Any) -> Attempt:
        past = (utcnow() - timedelta(minutes=5)).timestamp()
        run = {"crew": "greeting", "crew_url": f"{crews.url}/greet", "begun_at": past}
        run |= {"started_at": past if facts.get("kickoff_id") else None}
        return put(new_attempt(key, **run | facts), result)

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
    started = write(**STARTED, kickoff_id=f"k-{uuid.uuid4()}")
    ended = write(state=S.FAILED, error="no idea", kickoff_id="k", ended_at=utcnow().timestamp())
    row = write("batch/leads/7", **UNCERTAIN, batch="leads", row_key="7")
    write("batch/leads/8", **STARTED, batch="leads", row_key="8", kickoff_id="of a row")
    listed = here("runs", "ls").ok
    assert listed.splitlines()[0] == "State\tRun\tCrew\tSince"
    assert f"uncertain\t{uncertain.key}\tgreeting\t5 min" in listed
    assert listed.index(uncertain.key) < listed.index(started.key)
    assert "batch/leads/" not in listed
    assert ended.key not in listed
    assert f"failed\t{ended.key}" in here("runs", "ls", "--all").out
    assert here("runs", "ls", "--state", "failed", "-o", "json").json[0]["idempotency_key"] == ended.key
    assert here("runs", "ls", "--crew", "nobody").out.startswith("No run is open.")
    documents = here("runs", "ls", "--state", "uncertain", "--crew", ended.crew_url, "-o", "json").json
    assert {line["state"] for line in documents} == {"uncertain"}
    for attempt, parts in (
        (uncertain, ("the connection broke", f"runs resolve '{uncertain.key}' --kickoff-id ID")),
        (started, ("No flow run started it. A call with its key waits for it.",)),
        (ended, ("FAILED  key", "Error: no idea", f"Inputs digest: {ended.inputs_digest}", "starts another run")),
        (
            row,
            (
                "Batch: leads",
                "Row key: 7",
            ),
        ),
    ):
        page = here("runs", "inspect", attempt.key).out
        assert [part for part in parts if part not in page] == []


def test_a_run_is_found_by_its_kickoff_id_and_the_crew_asked(
    here: Command, write: Write, crews: CrewServer, greet: tuple[str, str]
):
    record = write(**STARTED, kickoff_id=(kickoff_id := kicked_off(crews)))
    document = here("runs", "inspect", kickoff_id, *greet, "-o", "json").json[-1]
    assert document["idempotency_key"] == record.key
    assert document["status"]["kickoff_id"] == kickoff_id
    assert "raw" not in document["status"]
    assert not {"owner", "process", "id"} & set(document), "what is of no use to anybody"
    assert "The crew's server: " in here("runs", "inspect", kickoff_id, *greet).out
    assert "The crew's server was not asked." in here("runs", "inspect", kickoff_id).err
    # A start that was refused does not hide the run before it.
    write(record.key, number=2, state=S.NOT_STARTED)
    started, refused = here("runs", "inspect", record.key, *greet, "-o", "json").json
    assert started["status"]["kickoff_id"] == kickoff_id
    assert "status" not in refused


def test_inspect_shows_what_a_hosted_crew_says_of_its_run(here: Command, write: Write, monkeypatch: pytest.MonkeyPatch):
    facts: dict[str, Any] = {
        "execution_origin": "schedule",
        "source": "memory",
        "triggered_by": {"type": "user", "id": "u-1"},
        "last_event": {"type": "task_started", "note": f"\x1b[2J with {TOKEN}", "more": "x" * 10_000},
        "events": None,
    }
    slow = "name: slow\ntasks: [{name: wait, seconds: 600, output: late}]"
    with adding(CrewServer(slow, token=TOKEN), **facts) as server:
        for secret_names in ((), ("pin",)):
            kickoff_id = httpx.post(f"{server.url}/kickoff", headers=server.headers, json={"inputs": {}}).json()
            record = write(**STARTED, **kickoff_id, crew_url=server.url, secret_names=secret_names)
            page = here("runs", "inspect", record.key, "--crew", server.url).out
            status = here("runs", "inspect", record.key, "--crew", server.url, "-o", "json").json[-1]["status"]
            assert TOKEN not in f"{page}{status}"
            assert "\x1b" not in page
            assert len(page) < 5_000
            if secret_names:  # a text of the crew cannot be masked
                assert "schedule" not in f"{page}{status}"
                continue
            assert "  Execution origin: schedule\n  Source: memory\n" in page
            assert '  Triggered by: {"type":"user","id":"u-1"}\n  Last event: {"type":"task_started",' in page
            assert status["triggered_by"] == facts["triggered_by"]
            assert "events" not in status


def test_a_run_is_cancelled_by_its_key_and_its_crew(here: Command, write: Write, crews: CrewServer):
    slow = {"state": S.STARTED, "crew_url": f"{crews.url}/slow"}
    record = write(**slow, kickoff_id=(kickoff_id := kicked_off(crews, "slow")))
    key, crew = record.key, ("--crew", f"{crews.url}/slow")
    assert "Give --crew" in here("runs", "cancel", key).error(2)
    assert here("runs", "cancel", key, *crew).ok == f"Run {key}: stopped.\n"
    assert here("runs", "inspect", kickoff_id).out.startswith("STOPPED")
    again = here("runs", "cancel", kickoff_id, *crew)
    assert again.code == 1
    assert "had already ended" in again.out
    with CrewServer("echo", token=TOKEN, faults=["stop:404"]) as server:
        for address in (f"{crews.url}/slow", server.url):
            unknown = write(**slow | {"crew_url": address}, kickoff_id=f"gone-{uuid.uuid4()}")
            assert "was not stopped" in here("runs", "cancel", unknown.key, "--crew", address).error(1)


def test_of_two_runs_of_a_key_the_one_that_is_named_is_cancelled(here: Command, write: Write, crews: CrewServer):
    key, url = f"key {uuid.uuid4()}", f"{crews.url}/slow"
    runs = [kicked_off(crews, "slow") for _ in range(2)]
    for attempt, kickoff_id in enumerate(runs, 1):
        write(key, crew_url=url, number=attempt, state=S.STARTED, kickoff_id=kickoff_id)
    write(key, crew_url=url, number=3, state=S.NOT_STARTED)
    for name, states in ((runs[0], ["stopped", "running"]), (key, ["stopped", "stopped"])):
        assert here("runs", "cancel", name, "--crew", url).code == 0
        assert [str(crews.run(kickoff_id).state) for kickoff_id in runs] == states


def test_a_resolved_run_goes_on(here: Command, write: Write, crews: CrewServer, greet: tuple[str, str], run: Any):
    key = write(**UNCERTAIN).key
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
    other = write(**UNCERTAIN, crew="not-stored").key
    taken = here("runs", "resolve", other, *outcome, *greet).error(2)
    assert f"belongs to the idempotency key '{key}'" in taken
    unknown = here("runs", "resolve", other, "--kickoff-id", f"k-{uuid.uuid4()}")
    assert unknown.code == 0
    assert "was not asked" in unknown.err


def test_a_run_resolved_as_never_started_is_started(here: Command, write: Write, crews: CrewServer, run: Any):
    key = write(**UNCERTAIN).key
    assert "Without a terminal this needs --yes" in here("runs", "resolve", key, "--never-started").error(2)
    assert here("runs", "resolve", key, "--never-started", "-y").code == 0
    kickoffs = crews.kickoffs
    assert run(key).code == 0
    assert crews.kickoffs == kickoffs + 1


def test_a_forgotten_run_can_be_given_up(
    here: Command, write: Write, crews: CrewServer, greet: tuple[str, str], run: Any
):
    key = write(**STARTED, kickoff_id=(gone := f"gone-{uuid.uuid4()}")).key
    page = here("runs", "inspect", key, *greet).out
    assert "The crew's server does not know it." in page
    assert f"prefect-crew runs resolve {gone} --lost" in page
    known = write(**STARTED, kickoff_id=kicked_off(crews)).key
    assert "Nothing was changed" in here("runs", "resolve", known, "--lost", *greet, "--yes").error(2)
    assert here("runs", "resolve", gone, "--lost", *greet, "--yes").code == 0
    assert here("runs", "resolve", key, "--lost", "--yes").code == 1
    assert f"lost\t{key}" in here("runs", "ls", "--all").out
    assert "A call with its key starts another run" in here("runs", "inspect", key).out
    kickoffs = crews.kickoffs
    assert run(key).code == 0
    assert crews.kickoffs == kickoffs + 1
    assert [attempt.state for attempt in stored(key)] == [S.LOST, S.COMPLETED]


def test_the_server_is_asked_plainly_under_which_id_a_run_goes_on(
    here: Command, write: Write, crews: CrewServer, greet: tuple[str, str]
):
    attempt = write(**STARTED, kickoff_id=f"gone-{uuid.uuid4()}")
    asyncio.run(answered_without_a_reply(attempt))
    unknown = here("runs", "resolve", attempt.key, "--kickoff-id", str(attempt.first_id), *greet).error(2)
    assert f"does not know run {attempt.first_id}" in unknown
    new_id = kicked_off(crews)
    resolved = here("runs", "resolve", attempt.key, "--kickoff-id", new_id, *greet).ok
    assert f"was {attempt.first_id} and goes on as run {new_id}" in resolved


async def answered_without_a_reply(attempt: Attempt) -> None:
    """Write a question whose answer was sent, and nobody knows whether it arrived."""
    store = find_store()
    question = await store.run(questions.ask, attempt, 1, marks={}, task="draft")
    await store.run(questions.answer, question.id, {"approve": True}, "Ada")
    await store.run(questions.send, question.id, "sender", 30.0)
    await store.run(questions.uncertain, question.id, "sender")


def test_a_completed_run_that_nobody_waits_for_leads_to_its_result(
    here: Command, write: Write, crews: CrewServer, greet: tuple[str, str]
):
    kickoff_id = kicked_off(crews)
    wait_until(lambda: crews.run(kickoff_id).state is CrewState.COMPLETED)
    write(**STARTED, kickoff_id=kickoff_id)
    page = here("runs", "inspect", kickoff_id, *greet).out
    assert f"prefect-crew result {kickoff_id}" in page
    assert "--lost" not in page
    assert here("result", kickoff_id, *greet).ok == "**Hello** Ada\n"


def test_the_crew_database_is_shown_and_chosen(here: Command, write: Write, monkeypatch: pytest.MonkeyPatch):
    write(**STARTED, kickoff_id="k")
    page = here("database").ok
    assert page.startswith("Runs are recorded in ")
    assert "  Id: " in page
    assert re.search(r"  Size: \d", page)
    assert "  Attempts: 1\n" in page
    assert here("database", "use", "--yes").code == 0
    assert "  The Prefect server knows: this one\n" in here("database").ok


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
        facts: dict[str, Any] = {"state": S.COMPLETED, "ended_at": ended_at.timestamp(), "cost": cost}
        facts["tokens"] = None if cost is None else 12
        write(crew=crew, kickoff_id=str(uuid.uuid4()), **facts)
    table = here("costs", *PERIOD)
    assert table.ok == (
        "Crew\tRuns\tTokens\tCost\tWithout tokens\n"
        "news\t1\t12\t2.50\t0\n"
        "travel\t2\t12\t0.250\t1\n"
        "together\t3\t24\t2.75\t1\n"
    )
    assert "1 of 3 runs reported no tokens; the cost of 1 of 3 runs is unknown." in table.err
    assert "Runs are kept for 30 days" in table.err
    days = here("costs", "--by", "day", *PERIOD, "-o", "json").json
    rows = [(day["name"], day["cost"], day["runs"], day["reported"]) for day in days["groups"]]
    assert rows == [("2001-05-01", 0.25, 1, 1), ("2001-05-02", 2.5, 2, 1)]
    usage = {"total_tokens": 24}
    assert days["total"] == {"runs": 3, "reported": 2, "priced": 2, "usage": usage, "cost": 2.75}
    assert here("costs", "--from", "1999-01-01", "--to", "1999-01-02").out == "No run has ended in this time.\n"


# The words for an attempt


NOW = datetime(2026, 5, 1, 12, tzinfo=UTC).timestamp()
IN_FLIGHT = {"state": S.STARTED, "kickoff_id": "k1", "flow_run_id": "f1", "started_at": NOW - 19}
ASKED = {**IN_FLIGHT, "human_since": NOW - 5}


def daily(**facts: Any) -> Attempt:
    return new_attempt("daily", begun_at=NOW - 20, **facts)


@pytest.mark.parametrize(
    ("facts", "ended", "word"),
    [
        pytest.param({"deadline": NOW + 20}, False, Word.POSTING, id="being-sent"),
        pytest.param({"deadline": NOW - 20}, False, Word.UNCERTAIN, id="sent-too-long-ago"),
        pytest.param({"state": S.BACKING_OFF, "deadline": NOW + 20}, False, Word.BACKING_OFF, id="backing-off"),
        pytest.param({"state": S.BACKING_OFF, "deadline": NOW - 20}, False, Word.NOT_STARTED, id="given-up"),
        pytest.param({"state": S.UNCERTAIN}, False, Word.UNCERTAIN, id="uncertain"),
        pytest.param(IN_FLIGHT, False, Word.STARTED, id="in-flight"),
        pytest.param(ASKED, True, Word.WAITING, id="waiting"),
        pytest.param(IN_FLIGHT, True, Word.UNATTENDED, id="of-an-ended-flow-run"),
        pytest.param({**IN_FLIGHT, "flow_run_id": None}, False, Word.UNATTENDED, id="of-no-flow-run"),
        pytest.param({"state": S.FAILED}, False, Word.FAILED, id="failed"),
        pytest.param({"state": S.LOST}, False, Word.LOST, id="lost"),
        pytest.param({"state": S.NOT_STARTED}, True, Word.NOT_STARTED, id="not-started"),
    ],
)
def test_word(facts: dict[str, Any], ended: bool, word: Word):
    attempt = daily(**facts)
    assert word_of(attempt, {None, "f1"} if ended else {None}, NOW) is word
    needs_a_person = (Word.UNCERTAIN, Word.UNATTENDED, Word.WAITING, Word.FAILED, Word.LOST)
    assert bool(todo(attempt, word, NOW)) is (word in needs_a_person)
    assert todo(replace(attempt, replaced=True), word, NOW) == ""


def test_a_run_with_a_derived_key_is_listed_by_its_kickoff_id():
    derived = "8f0e5c1d-9d47-4a6b-8f0e-5c1d2a7b9e64/travel/a66405200addd68f388066aeebf9825d/1"
    assert short_name(replace(daily(**IN_FLIGHT), key=derived)) == "k1"
    assert short_name(replace(daily(), key=derived)) == derived
    assert short_name(daily(**IN_FLIGHT)) == "daily"
