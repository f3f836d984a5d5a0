"""`save`, and commands that take the stored block by its name."""

from __future__ import annotations

import uuid

import pytest

from prefect_crew import DeployedCrew
from prefect_crew.server import CrewServer
from support.commands import TOKEN
from support.prefect_server import PrefectServer


@pytest.fixture
def name() -> str:
    return f"crew-{uuid.uuid4()}"


def test_a_saved_crew_is_used_by_its_name(here, prefect_api: PrefectServer, crews: CrewServer, name: str):
    url = f"{crews.url}/greet"
    saved = here("save", name, "--url", url, "--timeout", "77", "--max-kickoffs", "5", "--secret-input", "who")
    assert saved.code == 0
    assert saved.out.endswith(f"prefect-crew run {name} -i who=…\n")
    block = DeployedCrew.load(name)
    assert (block.url, block.token.get_secret_value()) == (url, TOKEN)
    assert (block.wait.timeout, block.max_kickoffs, block.secret_inputs) == (77, 5, ["who"])
    assert here("inputs", name).out == "Input\tNeeded\nwho\trequired\n"
    assert here("status", name, "no-such-run").code == 18


def test_a_name_is_not_taken_over_by_chance(here, prefect_api: PrefectServer, crews: CrewServer, name: str):
    here("save", name, "--url", f"{crews.url}/greet")
    again = here("save", name, "--url", f"{crews.url}/broken")
    assert again.code == 25
    assert "--overwrite" in again.err
    assert here("save", name, "--url", f"{crews.url}/broken", "--overwrite").code == 0
    assert DeployedCrew.load(name).url.endswith("/broken")


def test_a_wrong_token_is_stored_and_said(here, prefect_api: PrefectServer, crews: CrewServer, name: str):
    saved = here("save", name, "--url", f"{crews.url}/greet", "--token", "wrong-token")
    assert saved.code == 0
    assert "answered 401" in saved.err
    assert "wrong-token" not in saved.out + saved.err


@pytest.mark.parametrize(
    ("line", "said"),
    [
        pytest.param(["Not A Name", "--url", "http://127.0.0.1:1"], "not stored", id="name"),
        pytest.param(["fine", "--url", "http://x.example.com"], "plain text", id="plain-http"),
        pytest.param(["fine", "--url", "http://127.0.0.1:1", "--max-kickoffs", "0"], "max_kickoffs", id="field"),
        pytest.param(["fine", "--url", "http://127.0.0.1:1", "--timeout", "-1"], "timeout", id="wait"),
    ],
)
def test_what_cannot_be_stored(here, prefect_api: PrefectServer, line: list[str], said: str):
    done = here("save", *line)
    assert done.code == 25
    assert said in done.err
    assert TOKEN not in done.err


def test_a_block_that_is_not_stored(here, prefect_api: PrefectServer):
    done = here("inputs", "never-stored")
    assert done.code == 25
    assert "prefect-crew save never-stored --url URL" in done.err
