"""`run --session` and `runs ls --session`: what a person sees of a session, and the next step."""

import uuid

import pytest

from prefect_crew.devserver import CrewServer
from support.commands import Command
from support.prefect_server import PrefectServer

pytestmark = pytest.mark.usefixtures("instant_polling")


@pytest.fixture
def session() -> str:
    return f"customer {uuid.uuid4().hex[:8]}"


@pytest.fixture
def journal(prefect_api: PrefectServer, crews: CrewServer) -> str:
    return f"{crews.url}/journal"


@pytest.fixture
def saved(here: Command, journal: str) -> str:
    name = f"journal-{uuid.uuid4().hex[:8]}"
    assert here("crews", "save", name, "--url", journal, "--flow").code == 0
    return name


def test_a_session_is_run_and_its_turns_are_listed(here: Command, journal: str, saved: str, session: str) -> None:
    for note in ("tea", "bad", "rain"):
        done = here("run", saved, "-i", f"note={note}", "--session", session)
        assert (done.code == 0) == (note != "bad")
    assert done.out == "2 rain after 1 tea\n"
    titles, *rows = [line.split("\t") for line in here("runs", "ls", "--session", f" {session} ").out.splitlines()]
    assert titles == ["State", "Run", "Crew", "Since", "Turn"]
    assert [(row[0], row[-1]) for row in rows] == [("completed", "1"), ("failed", "2"), ("completed", "3")]
    assert {row[2] for row in rows} == {saved}
    turns = here("runs", "ls", "--session", session, "-o", "json").json
    assert [(turn["session"], turn["turn"]) for turn in turns] == [(session, number) for number in (1, 2, 3)]
    assert here("runs", "ls", "--session", f"not {session}").out.startswith("There is no such run.")
