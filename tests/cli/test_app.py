"""The program itself: its help, its signals, and how errors become words and exit codes."""

import json
import os
import re
import subprocess
import sys
import time
from importlib.metadata import version
from pathlib import Path

import cyclopts
import pytest
from pydantic import BaseModel, SecretStr

from prefect_crew.cli import _output, _prefect, run
from prefect_crew.cli import app as module
from prefect_crew.cli._errors import CODES, OTHER, TERMINATED, message, reason
from prefect_crew.cli.app import app
from prefect_crew.devserver import CrewServer
from prefect_crew.exceptions import PrefectAwayError
from support.commands import Command, environment
from support.environment import program


def commands(group: cyclopts.App, *words: str) -> list[str]:
    """Return the commands of a group, such as `runs ls`."""
    lines: list[str] = []
    for name in group:
        if not name.startswith("-"):
            lines += commands(group[name], *words, name) or [" ".join((*words, name))]
    return lines


COMMANDS = commands(app)


def test_every_command_has_help(here: Command):
    listed = here("--help").ok
    assert here().ok == here("--debug").ok == listed
    assert listed.startswith("Usage: prefect-crew COMMAND")
    for line in COMMANDS:
        assert f"│ {line.split()[0]} " in listed
        summary = here(*line.split(), "--help").ok
        assert summary.startswith(f"Usage: prefect-crew {line}")
        assert summary.split("\n\n")[1].strip().endswith((".", "!")), "a sentence says what the command does"


def test_help_and_version_do_without_prefect():
    code = "import sys; from prefect_crew.cli import main; print(main(['--help']), main(['--version'])"
    script = [sys.executable, "-c", f"{code}, 'prefect' in sys.modules)"]
    done = subprocess.run(script, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-2:] == [version("prefect-crew"), "0 0 False"]


@pytest.mark.programs
@pytest.mark.parametrize("line", [["--help"], ["serve", "--help"], ["inputs", "URL"]])
def test_a_reader_that_has_gone(tmp_path: Path, crews: CrewServer, line: list[str]):
    """As behind `prefect-crew … | head -1`: the convention is 128 + SIGPIPE, and nothing on standard error."""
    reading, writing = os.pipe()
    os.close(reading)
    command = [program("prefect-crew"), *(f"{crews.url}/greet" if word == "URL" else word for word in line)]
    done = subprocess.run(command, stdout=writing, stderr=subprocess.PIPE, env=environment(tmp_path), timeout=60)
    os.close(writing)
    assert done.returncode == 141
    assert done.stderr == b""


def test_a_token_never_appears_even_with_debug(here, crews: CrewServer, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("CREW_TOKEN", "wrong-token-9")
    done = here("inputs", f"{crews.url}/greet", "--debug")
    assert "Traceback (most recent call last)" in done.error(1)
    assert "prefect-crew crews save" in done.err
    assert "wrong-token-9" not in done.out + done.err


def test_json_tells_errors_as_one_document(here):
    error = here("inputs", "http://127.0.0.1:1", "-o", "json").json["error"]
    assert error["type"] == "CrewConnectionError"
    assert error["exit_code"] == 1
    assert here("inputs", "-o", "json").json["error"]["exit_code"] == 2


@pytest.mark.usefixtures("instant_polling", "prefect_api")
def test_an_error_after_the_kickoff_names_the_run(here, crews: CrewServer, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(run, "put_result", lambda *_, **__: json.loads("{"))
    before = crews.kickoffs
    done = here("run", f"{crews.url}/greet", "-i", "who=Ada", "-o", "json")
    assert crews.kickoffs == before + 1
    kickoff_id = [*crews.accepted][-1]
    assert f"Run {kickoff_id} was started: prefect-crew result" in done.error(1)
    assert "Add --debug" in done.err
    assert done.json["error"].items() >= {"kickoff_id": kickoff_id, "exit_code": 1}.items()
    monkeypatch.setattr(module, "run", lambda _: json.loads("{"))
    assert kickoff_id not in here("doctor").err, "the run of an earlier command"


def test_an_embedded_server_that_does_not_start_ends_the_command(monkeypatch: pytest.MonkeyPatch):
    """Prefect starts one whose database is broken again and again."""
    _output.begin(debug=True)
    monkeypatch.setattr(_prefect, "START_WITHIN", -9)
    monkeypatch.setattr("prefect.client.orchestration.get_client", lambda **_: time.sleep(2))
    with pytest.raises(PrefectAwayError, match="did not start: it gave no answer"):
        _prefect._start_embedded()


def test_the_documentation_lists_all_codes():
    page = (Path(__file__).parents[2] / "docs" / "reference" / "cli.md").read_text(encoding="utf-8")
    listed = re.findall(r"^\| (\d+) \| .+ \|$", page, re.MULTILINE)
    assert [*map(int, listed)] == sorted({0, OTHER, *CODES, TERMINATED})


def test_a_message_about_wrong_fields_shows_no_value():
    class Model(BaseModel):
        number: int
        token: SecretStr

    with pytest.raises(ValueError, match="number") as caught:
        Model(token="hush-hush", number="price-99")  # type: ignore[arg-type]
    assert reason(caught.value).startswith("number: ")
    assert reason(caught.value) in message(caught.value)
    assert not re.search("hush-hush|price-99", message(caught.value))


WITHOUT_PREFECT = {"demo", "init", "serve", "docs", "doctor", "receiver start"}
"""Commands that start a server of their own, need none, or say themselves that it is away."""
ARGUMENTS = {
    "run": "travel -i text=a",
    "result": "daily",
    "inputs": "travel",
    "runs inspect": "daily",
    "runs cancel": "daily",
    "runs resolve": "daily --never-started --yes",
    "reviews inspect": "daily",
    "reviews approve": "daily",
    "reviews reject": "daily --feedback no",
    "batch run": "travel rows.csv --name b --export b.jsonl",
    "batch plan": "travel rows.csv",
    **{f"batch {verb}": "b" for verb in ("inspect", "failures", "resume", "cancel", "export")},
    "crews save": "travel --url http://127.0.0.1:1",
    "deploy": "travel --pool crews",
    "automations apply": "--pool crews",
}


@pytest.mark.parametrize("command", sorted({*COMMANDS} - WITHOUT_PREFECT))
def test_a_command_says_that_prefect_does_not_answer(
    here: Command, command: str, away: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "rows.csv").write_text("text\na\n")
    done = here(*command.split(), *ARGUMENTS.get(command, "").split())
    assert f"The Prefect API {away} does not answer" in done.error(OTHER)
    assert done.out == ""
