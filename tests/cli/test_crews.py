"""`crews`, and commands that take the stored block by its name."""

from __future__ import annotations

import uuid

import pytest

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


def test_a_name_is_not_taken_over_by_chance(here, prefect_api: PrefectServer, crews: CrewServer, name: str):
    here("crews", "save", name, "--url", f"{crews.url}/greet")
    again = here("crews", "save", name, "--url", f"{crews.url}/broken")
    assert again.code == 2
    assert "--overwrite" in again.err
    assert here("crews", "save", name, "--url", f"{crews.url}/broken", "--overwrite").code == 0
    assert DeployedCrew.load(name).url.endswith("/broken")


def test_a_refused_token_is_not_stored(here, prefect_api: PrefectServer, crews: CrewServer, name: str):
    url = f"{crews.url}/greet"
    assert here("crews", "save", name, "--url", url).code == 0
    for line in ((name, "--overwrite"), (f"{name}-new",)):
        saved = here("crews", "save", *line, "--url", url, "--token", "wrong-token")
        assert saved.code == 1
        assert "answered 401" in saved.err
        assert f"The crew {line[0]} was not stored" in saved.err
        assert "wrong-token" not in saved.out + saved.err
        assert saved.out == ""
    assert DeployedCrew.load(name).token.get_secret_value() == TOKEN
    assert here("inputs", f"{name}-new").code == 2


def test_a_crew_that_does_not_answer_is_stored(here, prefect_api: PrefectServer, name: str):
    saved = here("crews", "save", name, "--url", "http://127.0.0.1:1")
    assert saved.code == 0
    assert "could not be asked for its inputs, and is stored all the same" in saved.err
    assert f"prefect-crew doctor {name}" in saved.out
    assert DeployedCrew.load(name).url == "http://127.0.0.1:1"


@pytest.mark.parametrize(
    ("line", "said"),
    [
        pytest.param(["Not A Name", "--url", "http://127.0.0.1:1"], "not stored", id="name"),
        pytest.param(["fine", "--url", "http://x.example.com"], "plain text", id="plain-http"),
        pytest.param(["fine", "--url", "http://127.0.0.1:1", "--max-kickoffs", "0"], "max_kickoffs", id="field"),
        pytest.param(["fine", "--url", "http://127.0.0.1:1", "--timeout", "-1"], "timeout", id="wait"),
        pytest.param(
            ["fine", "--url", "http://127.0.0.1:1", "--concurrency-limit", "no-limit"],
            "prefect gcl create no-limit --limit N",
            id="limit",
        ),
    ],
)
def test_what_cannot_be_stored(here, prefect_api: PrefectServer, line: list[str], said: str):
    done = here("crews", "save", *line)
    assert done.code == 2
    assert said in done.err
    assert TOKEN not in done.err


def test_a_block_that_is_not_stored(here, prefect_api: PrefectServer):
    done = here("inputs", "never-stored")
    assert done.code == 2
    assert "prefect-crew crews save never-stored --url URL" in done.err
