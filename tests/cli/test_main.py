"""The program itself, whatever the command: no command, a reader that has gone, and errors that nobody expected."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import pytest
from pydantic import BaseModel

from prefect_crew.cli import app, main, run
from prefect_crew.devserver import CrewServer
from support.commands import environment
from support.environment import program
from support.prefect_server import PrefectServer


@pytest.mark.parametrize("line", [[], ["--debug"]])
def test_without_a_command_it_shows_its_help(line: list[str], capsys: pytest.CaptureFixture[str]):
    assert main(line) == 0
    assert capsys.readouterr().out.startswith("Usage: prefect-crew COMMAND")


@pytest.mark.parametrize("line", [["--help"], ["serve", "--help"], ["inputs", "URL"]])
def test_a_reader_that_has_gone(tmp_path: Path, crews: CrewServer, line: list[str]):
    """As behind `prefect-crew … | head -1`: the convention is 128 + SIGPIPE, and nothing on standard error."""
    reading, writing = os.pipe()
    os.close(reading)
    command = [program("prefect-crew"), *(f"{crews.url}/greet" if word == "URL" else word for word in line)]
    try:
        done = subprocess.run(
            command, stdout=writing, stderr=subprocess.PIPE, env=environment(tmp_path), timeout=60, check=False
        )
    finally:
        os.close(writing)
    assert (done.returncode, done.stderr) == (141, b"")


class _Model(BaseModel):
    number: int


def _json() -> None:
    json.loads("{")


def _validation() -> None:
    _Model.model_validate({"number": "x"})


def _unicode() -> None:
    b"\xff".decode()


@pytest.mark.parametrize("breaks", [_json, _validation, _unicode])
@pytest.mark.usefixtures("instant_polling")
def test_an_error_after_the_kickoff_never_says_that_nothing_was_sent(
    here, prefect_api: PrefectServer, crews: CrewServer, monkeypatch: pytest.MonkeyPatch, breaks
):
    monkeypatch.setattr(run, "put_result", lambda *_, **__: breaks())
    before = crews.kickoffs
    done = here("run", f"{crews.url}/greet", "-i", "who=Ada", "--json")
    assert crews.kickoffs == before + 1
    assert done.code == 1
    kickoff_id = [*crews.runtime.crews["greet"]][-1].id
    assert f"Run {kickoff_id}" in done.err
    assert "prefect-crew result" in done.err
    assert "--debug shows where" in done.err
    assert done.json["error"].items() >= {"kickoff_id": kickoff_id, "exit_code": 1}.items()
    assert "nothing was" not in done.err.lower()


def test_an_error_that_nobody_expected_names_no_run_of_an_earlier_command(here, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(app, "run", lambda _: _json())
    assert "Run " not in here("doctor").err
