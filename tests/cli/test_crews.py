"""`crews`: what is stored, and what an overwritten crew keeps. test_mistakes.py has what is refused."""

import uuid
from collections.abc import Callable
from typing import Any

import pytest
from prefect.client.orchestration import get_client
from prefect.client.schemas.actions import BlockDocumentUpdate
from pydantic import SecretStr

from prefect_crew import Budget, DeployedCrew, WaitPolicy
from prefect_crew.devserver import CrewServer
from support.commands import TOKEN, Command
from support.servers import Crews

BUDGET = Budget(max_cost=0.5, per="day")


@pytest.fixture
def name(prefect_api: object) -> str:
    return f"crew-{uuid.uuid4()}"


@pytest.fixture
def stored(store: Callable[..., str]) -> str:
    """The name of a stored crew with fields that are not the defaults, among them some that no option can set."""
    return store("greet", price=0.25, budgets=[BUDGET], wait=WaitPolicy(timeout=77, factor=2))


def test_a_saved_crew_is_used_by_its_name(here: Command, crews: CrewServer, name: str):
    url = f"{crews.url}/greet"
    saved = here("crews", "save", name, "--url", url, "--max-attempts", "5", "--secret-input", "who")
    assert saved.ok.endswith(f"prefect-crew run {name} -i who=…\n")
    block = DeployedCrew.load(name)
    assert block.url == url
    assert block.token.get_secret_value() == TOKEN
    assert block.max_attempts == 5
    assert block.secret_inputs == ["who"]
    assert here("inputs", name).out == "Input\tNeeded\nwho\trequired\n"
    assert TOKEN not in saved.out + saved.err


@pytest.mark.parametrize("is_stored", [False, True])
def test_a_crew_whose_token_is_refused_is_not_stored(
    here: Command, crews: CrewServer, name: str, is_stored: bool, monkeypatch: pytest.MonkeyPatch
):
    line = ("crews", "save", name, "--url", f"{crews.url}/greet")
    if is_stored:
        assert here(*line).code == 0
    monkeypatch.setenv("CREW_TOKEN", "wrong-token-9")
    error = here(*line, "--overwrite").error(1)
    assert f"The crew {name} was not stored" in error
    assert "answered 401" in error
    assert "wrong-token-9" not in error
    if is_stored:
        assert DeployedCrew.load(name).token.get_secret_value() == TOKEN
    else:
        with pytest.raises(ValueError, match="Unable to find"):
            DeployedCrew.load(name)


def test_an_overwritten_crew_keeps_what_is_not_given(here: Command, crews: CrewServer, stored: str):
    url = f"{crews.url}/broken"
    saved = here("crews", "save", stored, "--url", url, "--show", "none", "--overwrite")
    assert saved.code == 0
    assert saved.err == ""
    block = DeployedCrew.load(stored)
    assert block.url == url
    assert block.show == "none"
    assert block.price == 0.25
    assert block.budgets == [BUDGET]
    assert block.wait.timeout == 77
    assert block.wait.factor == 2


def test_a_token_is_renewed_alone(here: Command, crews: Crews, stored: str, monkeypatch: pytest.MonkeyPatch):
    for server in (crews, *crews.crews.values()):
        monkeypatch.setattr(server, "token", "renewed-token")
    assert "prefect-crew crews save NAME --overwrite" in here("run", stored, "-i", "who=Ada").error(1)
    monkeypatch.setenv("CREW_TOKEN", "renewed-token")
    assert here("crews", "save", stored, "--overwrite").code == 0
    block = DeployedCrew.load(stored)
    assert block.token.get_secret_value() == "renewed-token"
    assert block.url == f"{crews.url}/greet"
    assert block.price == 0.25


def test_a_token_is_kept_with_its_url(here: Command, crews: CrewServer, stored: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("CREW_TOKEN")
    assert here("crews", "save", stored, "--price", "0.5", "--overwrite").code == 0
    for options in ((), ("--url", f"{crews.url}/broken")):  # a new token is meant, or is for another crew
        assert "set CREW_TOKEN" in here("crews", "save", stored, *options, "--overwrite").error(2)
    block = DeployedCrew.load(stored)
    assert block.token.get_secret_value() == TOKEN
    assert block.url == f"{crews.url}/greet"
    assert block.price == 0.5


@pytest.mark.parametrize("options", [(), ("--overwrite",)])
def test_a_crew_that_does_not_answer_is_stored(here: Command, name: str, options: tuple[str, ...]):
    saved = here("crews", "save", name, "--url", "http://127.0.0.1:1", *options)
    assert f"prefect-crew doctor {name}" in saved.ok
    assert "could not be asked for its inputs, and is stored anyway" in saved.err
    assert DeployedCrew.load(name).url == "http://127.0.0.1:1"


def test_a_block_that_is_not_valid_is_named_with_its_field(here: Command, name: str):
    block: Any = DeployedCrew(url="http://127.0.0.1:1", token=SecretStr(TOKEN))
    with get_client(sync_client=True) as prefect:
        wrong = BlockDocumentUpdate(data={"max_attempts": 0}, merge_existing_data=True)
        prefect.update_block_document(block.save(name, _sync=True), wrong)
    error = here("run", name).error(2)
    assert f"The block deployed-crew/{name} is not valid: max_attempts: " in error
    assert f"prefect-crew crews save {name} --overwrite" in error
    assert TOKEN not in error
    error = here("crews", "save", name, "--overwrite").error(2)
    assert "max_attempts" in error
    assert TOKEN not in error
    assert here("crews", "save", name, "--max-attempts", "2", "--overwrite").code == 0
    assert DeployedCrew.load(name).max_attempts == 2
