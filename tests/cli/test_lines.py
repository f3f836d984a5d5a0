"""Command lines as such: help, versions, mistakes, and how errors are told."""

from __future__ import annotations

import subprocess
import sys

import pytest

from prefect_crew.cli.app import app
from prefect_crew.devserver import CrewServer

COMMANDS = [name for name in app if not name.startswith("-")]
RUNS = ["list", "show", "resolve", "prune"]


def test_the_commands_of_the_contract_are_there():
    expected = {
        "demo",
        "serve",
        "inputs",
        "run",
        "status",
        "result",
        "resume",
        "stop",
        "save",
        "deploy",
        "doctor",
        "runs",
    }
    assert expected <= set(COMMANDS)


@pytest.mark.parametrize("line", [*([name] for name in COMMANDS), *(["runs", name] for name in RUNS)], ids=" ".join)
def test_every_command_has_help(here, line: list[str]):
    helped = here(*line, "--help")
    assert helped.code == 0
    assert helped.out.startswith(f"Usage: prefect-crew {' '.join(line)}")
    about = helped.out.split("\n\n")[1]
    assert about.strip().endswith((".", "!")), "no sentence says what the command does"


def test_help_and_version_do_without_prefect():
    script = (
        "import sys; from prefect_crew.cli import main; codes = main(['--help']), main(['--version']); "
        "print(codes, 'prefect' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "(0, 0) False"


def test_version(here):
    from importlib.metadata import version

    assert here("--version").out.strip() == version("prefect-crew")


@pytest.mark.parametrize(
    "line",
    [
        pytest.param(["bogus"], id="no-such-command"),
        pytest.param(["status", "http://127.0.0.1:1"], id="argument-missing"),
        pytest.param(["inputs", "http://127.0.0.1:1", "--bogus"], id="no-such-option"),
        pytest.param(["serve", "--port", "many"], id="no-number"),
        pytest.param(["resume", "http://127.0.0.1:1", "k"], id="neither-approve-nor-reject"),
        pytest.param(["resume", "http://127.0.0.1:1", "k", "--approve", "--reject"], id="both"),
        pytest.param(["run", "http://127.0.0.1:1", "-i", "topic"], id="pair-without-a-sign"),
        pytest.param(["runs", "resolve", "key"], id="resolved-as-what"),
        pytest.param(["runs", "--phase", "odd"], id="no-such-phase"),
        pytest.param(["runs", "prune", "--older-than", "long"], id="no-age"),
        pytest.param(["deploy", "x", "--serve", "--pool", "p"], id="served-on-a-pool"),
        pytest.param(["deploy", "x", "--timezone", "UTC"], id="time-zone-of-no-schedule"),
        pytest.param(["inputs", "block", "--token", "t-1234"], id="token-for-a-block"),
    ],
)
def test_mistakes_on_the_line_are_usage_errors(here, line: list[str], prefect_api):
    done = here(*line)
    assert done.code == 2
    assert done.out == ""
    assert "Traceback" not in done.err
    assert done.err.strip().endswith("prefect-crew COMMAND --help their options.")


@pytest.mark.parametrize(
    ("line", "code"),
    [
        pytest.param(["inputs", "ftp://x.test"], 25, id="no-http"),
        pytest.param(["inputs", "http://crew.example.com"], 25, id="plain-http-over-a-network"),
        pytest.param(["inputs", "http://me:secret-word@127.0.0.1:1"], 25, id="credentials-in-the-url"),
        pytest.param(["inputs", "http://127.0.0.1:1"], 21, id="nobody-there"),
        pytest.param(["serve", "no-such-crew"], 25, id="no-such-script"),
        pytest.param(["serve", "echo", "--fault", "kickoff:odd"], 25, id="no-such-fault"),
        pytest.param(["serve", "echo", "--host", "192.0.2.1", "--port", "0"], 26, id="not-our-address"),
        pytest.param(["deploy", "http://127.0.0.1:1"], 25, id="deployment-of-a-url"),
    ],
)
def test_errors_are_a_paragraph_with_a_code(here, line: list[str], code: int):
    done = here(*line)
    assert done.code == code
    assert done.out == ""
    assert len(done.err.strip().splitlines()) == 1
    assert "Traceback" not in done.err
    assert "secret-word" not in done.err


def test_debug_shows_the_traceback_wherever_it_stands(here):
    for line in (["--debug", "inputs", "http://127.0.0.1:1"], ["inputs", "http://127.0.0.1:1", "--debug"]):
        done = here(*line)
        assert done.code == 21
        assert "Traceback (most recent call last)" in done.err
        assert "CrewConnectionError" in done.err


def test_a_token_never_appears_even_with_debug(here, crews: CrewServer):
    for given in (["--token", "wrong-token-9"], ["--token=wrong-token-9"]):
        done = here("inputs", f"{crews.url}/greet", *given, "--debug")
        assert done.code == 17
        assert "wrong-token-9" not in done.out + done.err
    assert "prefect-crew save" in done.err


def test_without_a_token_it_says_where_one_stands(here, crews: CrewServer, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("CREW_TOKEN")
    done = here("inputs", f"{crews.url}/greet")
    assert done.code == 25
    assert "CREW_TOKEN" in done.err
    assert "Status tab" in done.err


def test_json_tells_errors_as_one_document(here):
    done = here("inputs", "http://127.0.0.1:1", "--json")
    assert done.code == 21
    assert done.json["error"]["type"] == "CrewConnectionError"
    assert done.json["error"]["exit_code"] == 21
    assert done.json["error"]["message"] in done.err
    assert here("inputs", "--json").json["error"]["exit_code"] == 2
