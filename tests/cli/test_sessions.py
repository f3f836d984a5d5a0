"""`run --session`, `sessions ls` and `sessions inspect`: what a person sees of a session, and the next step."""

import asyncio
import json
import shlex
import uuid
from typing import Any

import pytest

from prefect_crew.devserver import CrewServer
from prefect_crew.records.model import RecordPhase
from prefect_crew.records.sessions import TAG, take_turn
from prefect_crew.records.store import PrefectRecords
from prefect_crew.records.variables import create_variable, delete_variable
from support.commands import Command
from support.prefect_server import PrefectServer
from support.records import LONG_AGO, new_record, put

pytestmark = pytest.mark.usefixtures("instant_polling")


@pytest.fixture
def session() -> str:
    return f"customer {uuid.uuid4().hex[:8]}"


@pytest.fixture
def journal(prefect_api: PrefectServer, crews: CrewServer) -> str:
    return f"{crews.url}/journal"


def test_a_session_is_run_listed_and_inspected(here: Command, journal: str, session: str) -> None:
    for note in ("tea", "bad", "rain"):
        done = here("run", journal, "-i", f"note={note}", "--session", session)
        assert (done.code == 0) == (note != "bad")
    assert done.out == "2 rain after 1 tea\n"
    (listed,) = [line for line in here("sessions", "ls").out.splitlines() if line.startswith(session)]
    _, crew, turns, state, since = listed.split("\t")
    assert crew == journal.partition("://")[2]
    assert turns == "3"
    assert state == "completed"
    assert since.endswith(" s")
    shown = here("sessions", "inspect", f" {session} ").out.splitlines()
    assert shown[0] == f"{session}: 3 turns of crew {crew}"
    rows = [line.split("\t") for line in shown[3:]]
    assert [row[:2] for row in rows] == [["1", "completed"], ["2", "failed"], ["3", "completed"]]
    assert shown[1] == f"  The last completed state: {rows[2][3]}"
    (document,) = here("sessions", "inspect", session, "-o", "json").json
    assert [turn["restored"] for turn in document["turns"]] == [None, rows[0][3], rows[0][3]]
    assert document["turns"][2]["completed_state"] == rows[2][3]
    key = document["turns"][2]["idempotency_key"]
    run = here("runs", "inspect", key, "-o", "json").json
    assert session in json.dumps(run)


def test_an_uncertain_turn_is_named_with_its_command(here: Command, journal: str, session: str) -> None:
    async def write() -> str:
        facts: dict[str, Any] = {"crew_url": journal, "session": session, "good_for": LONG_AGO}
        record = await put(new_record(**facts))
        turn = await take_turn(record, PrefectRecords())
        assert turn is not None
        record.turn = turn.number
        assert await PrefectRecords().permit(record, LONG_AGO)
        record.phase = RecordPhase.UNCERTAIN
        await PrefectRecords().save(record)
        return record.idempotency_key

    key = shlex.quote(asyncio.run(write()))
    command = f"prefect-crew runs resolve {key} --kickoff-id ID, or --never-started"
    assert command in here("sessions", "inspect", session).out
    refused = here("run", journal, "-i", "note=tea", "--session", session).error(4)
    assert command in " ".join(refused.split())
    assert here("runs", "resolve", shlex.split(key)[0], "--never-started", "--yes").code == 0
    assert here("run", journal, "-i", "note=tea", "--session", session).out == "1 tea\n"


def test_a_turn_of_a_later_version_is_left_out(here: Command, journal: str, session: str) -> None:
    assert here("run", journal, "-i", "note=tea", "--session", session).code == 0
    name = f"crew_turn_{uuid.uuid4().hex}_1"
    ref = asyncio.run(create_variable({"name": name, "value": {"version": 99}, "tags": [TAG]}))
    assert ref is not None
    try:
        listed, shown = here("sessions", "ls"), here("sessions", "inspect", session)
    finally:
        asyncio.run(delete_variable(ref))
    assert session in listed.ok
    assert name in listed.err
    assert session in shown.ok
