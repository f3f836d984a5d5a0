"""`crews`, and commands that take the stored block by its name."""

from __future__ import annotations

import uuid
from typing import Any

import pytest
from prefect.client.orchestration import get_client
from prefect.client.schemas.actions import BlockDocumentUpdate
from pydantic import SecretStr

from prefect_crew import DeployedCrew
from prefect_crew.devserver import CrewServer
from support.commands import TOKEN
from support.prefect_server import PrefectServer


@pytest.fixture
def name() -> str:
    return f"crew-{uuid.uuid4()}"


def test_a_saved_crew_is_used_by_its_name(here, prefect_api: PrefectServer, crews: CrewServer, name: str):
    url = f"{crews.url}/greet"
    saved = here("crews", "save", name, "--url", url, "--timeout", "77", "--max-kickoffs", "5", "--secret-input", "who")
    assert saved.code == 0
    assert saved.out.endswith(f"prefect-crew run {name} -i who=…\n")
    block = DeployedCrew.load(name)
    assert (block.url, block.token.get_secret_value()) == (url, TOKEN)
    assert (block.wait.timeout, block.max_kickoffs, block.secret_inputs) == (77, 5, ["who"])
    assert here("inputs", name).out == "Input\tNeeded\nwho\trequired\n"
    assert f"{name}\t{url}\n" in here("crews", "ls").out
    shown = here("crews", "inspect", name)
    assert f"url\t{url}\n" in shown.out
    assert "wait.timeout\t77.0\n" in shown.out
    assert TOKEN not in shown.out
    as_json = here("crews", "inspect", name, "-o", "json").json
    assert (as_json["secret_inputs"], "token" in as_json) == (["who"], False)
    assert here("crews", "inspect", f"{name}-not").code == 2


def test_a_name_is_not_taken_over_by_chance_nor_with_a_refused_token(
    here, prefect_api: PrefectServer, crews: CrewServer, name: str
):
    url = f"{crews.url}/greet"
    here("crews", "save", name, "--url", url)
    again = here("crews", "save", name, "--url", f"{crews.url}/broken")
    assert (again.code, "--overwrite" in again.err) == (2, True)
    for line in ((name, "--overwrite"), (f"{name}-new",)):
        saved = here("crews", "save", *line, "--url", url, "--token", "wrong-token")
        assert (saved.code, saved.out) == (1, "")
        assert "answered 401" in saved.err
        assert f"The crew {line[0]} was not stored" in saved.err
        assert "wrong-token" not in saved.err
    assert DeployedCrew.load(name).token.get_secret_value() == TOKEN
    assert here("crews", "save", name, "--url", f"{crews.url}/broken", "--overwrite").code == 0
    assert DeployedCrew.load(name).url.endswith("/broken")
    missed = here("inputs", f"{name}-new")
    assert (missed.code, f"prefect-crew crews save {name}-new --url URL" in missed.err) == (2, True)


def test_a_crew_that_does_not_answer_is_stored(here, prefect_api: PrefectServer, name: str):
    saved = here("crews", "save", name, "--url", "http://127.0.0.1:1")
    assert (saved.code, f"prefect-crew doctor {name}" in saved.out) == (0, True)
    assert "could not be asked for its inputs, and is stored all the same" in saved.err
    assert DeployedCrew.load(name).url == "http://127.0.0.1:1"


def test_a_block_that_is_not_valid_is_named_with_its_field(here, prefect_api: PrefectServer, name: str):
    block: Any = DeployedCrew(url="http://127.0.0.1:1", token=SecretStr(TOKEN))
    with get_client(sync_client=True) as prefect:
        wrong = BlockDocumentUpdate(data={"max_kickoffs": 0}, merge_existing_data=True)
        prefect.update_block_document(block.save(name, _sync=True), wrong)
    listed = here("crews", "ls")
    assert (listed.code, f"{name}\tmax_kickoffs: " in listed.out) == (0, True)
    for line in (("crews", "inspect", name), ("run", name)):
        refused = here(*line)
        assert refused.code == 2
        assert f"The block deployed-crew/{name} is not valid: max_kickoffs: " in refused.err
        assert f"prefect-crew crews save {name} --url URL --overwrite" in refused.err
        assert TOKEN not in refused.err


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("--url http://x.example.com", "plain text"),
        ("--url http://127.0.0.1:1 --max-kickoffs 0", "max_kickoffs"),
        ("--url http://127.0.0.1:1 --timeout -1", "timeout"),
    ],
)
def test_wrong_fields_are_refused_before_prefect_is_reached(here, line: str, said: str):
    done = here("crews", "save", "fine", *line.split())
    assert (done.code, TOKEN in done.err) == (2, False)
    assert said in done.err


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("Not-A-Name", "not stored"),
        ("fine --concurrency-limit no-limit", "prefect gcl create no-limit --limit N"),
    ],
)
def test_what_cannot_be_stored(here, prefect_api: PrefectServer, line: str, said: str):
    done = here("crews", "save", *line.split(), "--url", "http://127.0.0.1:1")
    assert (done.code, TOKEN in done.err) == (2, False)
    assert said in done.err
