"""`crews`, and commands that take the stored block by its name."""

from __future__ import annotations

import uuid
from typing import Any

import pytest
from prefect.client.orchestration import get_client
from prefect.client.schemas.actions import BlockDocumentUpdate
from pydantic import SecretStr

from prefect_crew import Budget, DeployedCrew, WaitPolicy
from prefect_crew.devserver import CrewServer
from support.commands import TOKEN


@pytest.fixture
def name(prefect_api: object) -> str:
    return f"crew-{uuid.uuid4()}"


def test_a_saved_crew_is_used_by_its_name(here, crews: CrewServer, name: str):
    url = f"{crews.url}/greet"
    saved = here("crews", "save", name, "--url", url, "--timeout", "77", "--max-attempts", "5", "--secret-input", "who")
    assert saved.code == 0
    assert saved.out.endswith(f"prefect-crew run {name} -i who=…\n")
    block = DeployedCrew.load(name)
    assert (block.url, block.token.get_secret_value()) == (url, TOKEN)
    assert (block.wait.timeout, block.max_attempts, block.secret_inputs) == (77, 5, ["who"])
    assert here("inputs", name).out == "Input\tNeeded\nwho\trequired\n"
    assert f"{name}\t{url}\n" in here("crews", "ls").out
    shown = here("crews", "inspect", name)
    assert f"url\t{url}\n" in shown.out
    assert "wait.timeout\t77.0\n" in shown.out
    assert TOKEN not in shown.out
    as_json = here("crews", "inspect", name, "-o", "json").json
    assert (as_json["secret_inputs"], "token" in as_json) == (["who"], False)
    assert here("crews", "inspect", f"{name}-not").code == 2


def test_a_name_is_taken_over_only_if_asked(here, crews: CrewServer, name: str):
    url = f"{crews.url}/greet"
    here("crews", "save", name, "--url", url)
    assert "--overwrite" in here("crews", "save", name, "--url", f"{crews.url}/broken").error(2)
    for line in ((name, "--overwrite"), (f"{name}-new",)):
        saved = here("crews", "save", *line, "--url", url, "--token", "wrong-token")
        assert (saved.code, saved.out) == (1, "")
        assert "answered 401" in saved.err
        assert f"The crew {line[0]} was not stored" in saved.err
        assert "wrong-token" not in saved.err
    assert DeployedCrew.load(name).token.get_secret_value() == TOKEN
    assert here("crews", "save", name, "--url", f"{crews.url}/broken", "--overwrite").code == 0
    assert DeployedCrew.load(name).url.endswith("/broken")
    assert f"prefect-crew crews save {name}-new --url URL" in here("inputs", f"{name}-new").error(2)
    for options in ((), ("--overwrite",)):
        assert "--url" in here("crews", "save", f"{name}-new", *options).error(2)
    assert here("crews", "save", f"{name}-new", "--url", url, "--overwrite").code == 0


BUDGET = Budget(max_cost=0.5, per="day")


@pytest.fixture
def stored(crews: CrewServer, name: str) -> str:
    """The name of a stored crew with fields that are not the defaults, among them some that no option can set."""
    fields: dict[str, Any] = {"price": 0.25, "budgets": [BUDGET], "wait": WaitPolicy(timeout=77, factor=2)}
    crews.crew(url=f"{crews.url}/greet", **fields).save(name, _sync=True)
    return name


def test_an_overwritten_crew_keeps_what_is_not_given(here, crews: CrewServer, stored: str):
    url = f"{crews.url}/broken"
    saved = here("crews", "save", stored, "--url", url, "--human-timeout", "5", "--show", "none", "--overwrite")
    assert (saved.code, saved.err) == (0, "")
    block = DeployedCrew.load(stored)
    assert (block.url, block.show, block.wait.human_timeout) == (url, "none", 5)
    assert (block.price, block.budgets, block.wait.timeout, block.wait.factor) == (0.25, [BUDGET], 77, 2)
    assert "Kept as they were: price, budgets, wait.\n" in saved.out


def test_a_token_is_renewed_alone(here, crews: CrewServer, stored: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(crews, "token", "renewed-token")
    assert "prefect-crew crews save NAME --overwrite" in here("run", stored, "-i", "who=Ada").error(1)
    monkeypatch.setenv("CREW_TOKEN", "renewed-token")
    saved = here("crews", "save", stored, "--overwrite")
    assert (saved.code, saved.err) == (0, "")
    block = DeployedCrew.load(stored)
    assert (block.token.get_secret_value(), block.url, block.price) == ("renewed-token", f"{crews.url}/greet", 0.25)
    assert here("inputs", stored).code == 0


def test_a_token_is_kept_with_its_url(here, crews: CrewServer, stored: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("CREW_TOKEN")
    assert here("crews", "save", stored, "--price", "0.5", "--overwrite").code == 0
    assert DeployedCrew.load(stored).token.get_secret_value() == TOKEN
    for options in ((), ("--url", f"{crews.url}/broken")):  # a new token is meant, or is for another crew
        assert "set CREW_TOKEN" in here("crews", "save", stored, *options, "--overwrite").error(2)
    block = DeployedCrew.load(stored)
    assert (block.price, block.url) == (0.5, f"{crews.url}/greet")


def test_a_crew_that_does_not_answer_is_stored(here, name: str):
    saved = here("crews", "save", name, "--url", "http://127.0.0.1:1")
    assert (saved.code, f"prefect-crew doctor {name}" in saved.out) == (0, True)
    assert "could not be asked for its inputs, and is stored anyway" in saved.err
    assert DeployedCrew.load(name).url == "http://127.0.0.1:1"


def test_a_block_that_is_not_valid_is_named_with_its_field(here, name: str):
    block: Any = DeployedCrew(url="http://127.0.0.1:1", token=SecretStr(TOKEN))
    with get_client(sync_client=True) as prefect:
        wrong = BlockDocumentUpdate(data={"max_attempts": 0}, merge_existing_data=True)
        prefect.update_block_document(block.save(name, _sync=True), wrong)
    assert f"{name}\tmax_attempts: " in here("crews", "ls").ok
    for line in (("crews", "inspect", name), ("run", name)):
        refused = here(*line)
        assert refused.code == 2
        assert f"The block deployed-crew/{name} is not valid: max_attempts: " in refused.err
        assert f"prefect-crew crews save {name} --overwrite" in refused.err
        assert TOKEN not in refused.err
    unmended = here("crews", "save", name, "--overwrite")
    assert (unmended.code, "max_attempts" in unmended.err, TOKEN in unmended.err) == (2, True, False)
    assert here("crews", "save", name, "--max-attempts", "2", "--overwrite").code == 0
    assert DeployedCrew.load(name).max_attempts == 2


@pytest.mark.parametrize(
    ("line", "said", "asks_prefect"),
    [
        ("fine --url http://x.example.com", "plain text", False),
        ("fine --url http://127.0.0.1:1 --max-attempts 0", "max_attempts", False),
        ("fine --url http://127.0.0.1:1 --timeout -1", "timeout", False),
        ("Not-A-Name --url http://127.0.0.1:1", "not stored", True),
        ("fine --url http://127.0.0.1:1 --concurrency-limit no-limit", "gcl create no-limit --limit N", True),
    ],
)
def test_what_cannot_be_stored(request: pytest.FixtureRequest, here, line: str, said: str, asks_prefect: bool):
    if asks_prefect:
        request.getfixturevalue("prefect_api")
    done = here("crews", "save", *line.split())
    assert (done.code, TOKEN in done.err) == (2, False)
    assert said in done.err
