"""The program itself: its help, mistakes on its line, and how errors become words and exit codes."""

from __future__ import annotations

import json
import logging
import os
import re
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import cyclopts
import httpx
import pytest
from prefect.exceptions import PrefectHTTPStatusError
from prefect.logging.handlers import PrefectConsoleHandler
from prefect.settings import PREFECT_API_URL, temporary_settings
from pydantic import BaseModel, SecretStr, SerializerFunctionWrapHandler, model_serializer

from prefect_crew import exceptions
from prefect_crew.cli import _output, _prefect, main, run
from prefect_crew.cli import app as module
from prefect_crew.cli._errors import CODES, OTHER, TERMINATED, by_options, exit_code, message, own_error, reason
from prefect_crew.cli.app import app
from prefect_crew.devserver import CrewServer
from support.commands import environment
from support.environment import program
from support.prefect_server import free_port

COMMANDS = {
    "": ["demo", "init", "serve", "doctor", "run", "result", "inputs", "costs", "deploy", "backfill", "docs"],
    "runs": ["ls", "inspect", "cancel", "resolve", "prune"],
    "reviews": ["ls", "inspect", "approve", "reject"],
    "sessions": ["inspect", "ls"],
    "batch": ["run", "plan", "ls", "inspect", "failures", "retry", "resume", "cancel", "export"],
    "crews": ["save", "ls", "inspect"],
    "automations": ["apply", "ls", "delete"],
    "receiver": ["start"],
}


def names(of: cyclopts.App) -> set[str]:
    return {name for name in of if not name.startswith("-")}


def test_every_command_has_help(here):
    assert names(app) == {*COMMANDS[""], *COMMANDS} - {""}
    for noun, verbs in COMMANDS.items():
        assert not noun or names(app[noun]) == set(verbs)
    listed = here("--help").out
    for line in [[*filter(None, [noun]), verb] for noun, verbs in COMMANDS.items() for verb in verbs]:
        assert f"│ {line[0]} " in listed
        helped = here(*line, "--help")
        assert (helped.code, helped.err) == (0, "")
        assert helped.out.startswith(f"Usage: prefect-crew {' '.join(line)}")
        assert helped.out.split("\n\n")[1].strip().endswith((".", "!")), "a sentence says what the command does"


@pytest.mark.parametrize("line", [[], ["--debug"]])
def test_without_a_command_it_shows_its_help(line: list[str], capsys: pytest.CaptureFixture[str]):
    assert main(line) == 0
    assert capsys.readouterr().out.startswith("Usage: prefect-crew COMMAND")


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
    assert (done.returncode, done.stderr) == (141, b"")


NO_COMMAND = "prefect-crew --help lists the commands; prefect-crew COMMAND --help lists their options."


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("bogus", ""),
        ("result", "prefect-crew result: KEY is missing or has no value."),
        ("inputs http://127.0.0.1:1 --bogus", ""),
        ("inputs block --token t-1234", "--token is for a URL"),
        ("serve --port 99999", ""),
        ("run", "prefect-crew run: CREW is missing or has no value."),
        ("run http://127.0.0.1:1 -i topic", "does not have the form name=value"),
        ("run travel --ouput x", "Did you mean --output?"),
        ("runs resolve key", ""),
        ("runs resolve key --lost --never-started", ""),
        ("runs prune --older-than long", "into a time such as 90m, 4h or 30d"),
        ("automations apply --waiting 4hours", "into a time such as 90m, 4h or 30d"),
        ("deploy x --timezone UTC", "Give --cron or --interval too"),
        ("deploy", "Received 0 arguments. Exactly 1 of {CREW, --pipeline} must be specified."),
        ("deploy x --pipeline a.yaml", ""),
        ("deploy travel --cron x --interval 5", "Mutually exclusive arguments: {--cron, --interval}"),
        ("backfill x/y --from yesterday --to 2024-03-01", ""),
        ("batch run travel rows.csv --name x", "prefect-crew batch run: --export is missing or has no value."),
        (
            "batch run travel rows.csv --name x --export y --on-failure maybe",
            'Invalid value for --on-failure: unable to convert "maybe" into a number, continue or stop.',
        ),
    ],
)
def test_mistakes_on_the_line_are_usage_errors(here, line: str, said: str, prefect_api):
    done = here(*line.split())
    assert (done.code, done.out) == (2, "")
    assert (said or NO_COMMAND) in done.err
    assert not re.search("Traceback|timedelta|Invalid values for group|Did you mean --yes", done.err)


@pytest.mark.parametrize(
    ("line", "code", "said"),
    [
        ("inputs ftp://x.test", 2, "ftp"),
        ("inputs http://crew.example.com", 2, "--allow-http"),
        ("inputs http://me:secret-word@127.0.0.1:1", 2, ""),
        ("inputs http://127.0.0.1:1", 1, "no answer"),
        ("serve no-such-crew", 2, "no-such-crew"),
        ("serve echo --fault kickoff:odd", 2, "odd"),
        ("serve echo --host 192.0.2.1", 1, "Cannot listen on"),
        ("deploy http://127.0.0.1:1", 2, "prefect-crew crews save NAME"),
    ],
)
def test_errors_are_a_paragraph_with_a_code(here, line: str, code: int, said: str):
    done = here(*line.split())
    assert (done.code, done.out, len(done.err.strip().splitlines())) == (code, "", 1)
    assert said in done.err
    assert "secret-word" not in done.err


@pytest.mark.usefixtures("prefect_api")
def test_what_prefect_counts_while_a_process_ends_is_not_shown(here):
    assert here("crews", "ls").code == 0
    assert not logging.getLogger("EventsWorker").isEnabledFor(logging.WARNING)


def test_a_token_never_appears_even_with_debug(here, crews: CrewServer):
    for given in (["--token", "wrong-token-9"], ["--token=wrong-token-9"]):
        done = here("inputs", f"{crews.url}/greet", *given, "--debug")
        assert done.code == 1
        assert "wrong-token-9" not in done.out + done.err
        assert "Traceback (most recent call last)" in done.err
    assert "prefect-crew crews save" in done.err


def test_json_tells_errors_as_one_document(here):
    error = here("inputs", "http://127.0.0.1:1", "-o", "json").json["error"]
    assert (error["type"], error["exit_code"]) == ("CrewConnectionError", 1)
    assert here("inputs", "-o", "json").json["error"]["exit_code"] == 2


class _Model(BaseModel):
    number: int
    token: SecretStr = SecretStr("")


@pytest.mark.parametrize(
    ("signal", "code", "said"),
    [(KeyboardInterrupt, 130, "Interrupted.\n"), (module.TerminatedError, TERMINATED, "Ended by a signal.\n")],
)
def test_a_signal_within_pydantic_is_that_signal(
    signal: type[BaseException], code: int, said: str, monkeypatch: pytest.MonkeyPatch, capsys: Any
):
    class Part(BaseModel):
        @model_serializer
        def write(self) -> dict[str, str]:
            raise signal

    class Settings(BaseModel):  # as Prefect's are: nested, so that the error of the inner one has no cause
        part: Part = Part()

        @model_serializer(mode="wrap")
        def write(self, handler: SerializerFunctionWrapHandler) -> dict[str, str]:
            return handler(self)

    monkeypatch.setattr(module, "run", lambda _: Settings().model_dump())
    assert main(["runs", "ls"]) == code
    assert capsys.readouterr().err == said


@pytest.mark.usefixtures("instant_polling", "prefect_api")
def test_an_error_after_the_kickoff_names_the_run(here, crews: CrewServer, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(run, "put_result", lambda *_, **__: json.loads("{"))
    before = crews.kickoffs
    done = here("run", f"{crews.url}/greet", "-i", "who=Ada", "-o", "json")
    assert (crews.kickoffs, done.code) == (before + 1, 1)
    kickoff_id = [*crews.crews["greet"].runs.values()][-1].id
    assert f"Run {kickoff_id} was started and is on record: prefect-crew result" in done.err
    assert "Add --debug" in done.err
    assert done.json["error"].items() >= {"kickoff_id": kickoff_id, "exit_code": 1}.items()
    monkeypatch.setattr(module, "run", lambda _: json.loads("{"))
    assert kickoff_id not in here("doctor").err, "the run of an earlier command"


def test_a_log_call_of_others_that_is_wrong_does_not_raise():
    handler = PrefectConsoleHandler()
    logging.getLogger().addHandler(handler)
    try:
        with _output.begin().at_end:
            _prefect._quiet_logs()
            assert handler.filters
            assert not handler.filter(logging.makeLogRecord({"msg": "after %d", "args": ("x",)}))
    finally:
        logging.getLogger().removeHandler(handler)


def test_the_documentation_lists_all_codes():
    page = (Path(__file__).parents[2] / "docs" / "reference" / "cli.md").read_text(encoding="utf-8")
    listed = re.findall(r"^\| (\d+) \| .+ \|$", page, re.MULTILINE)
    assert [*map(int, listed)] == sorted({0, OTHER, *CODES, TERMINATED})


def _answer(status: int, body: dict[str, str] | None = None) -> PrefectHTTPStatusError:
    request = httpx.Request("POST", "http://prefect.test/api/variables/")
    response = httpx.Response(status, request=request, json=body or {})
    return PrefectHTTPStatusError(f"Client error {status}", request=request, response=response)


def test_code_of_what_no_other_test_exits_with():
    errors = (exceptions.DatasetError("no", source="x"), exceptions.BadRowsError([], 1, source="x"), _answer(503))
    assert [exit_code(error) for error in errors] == [2, 6, 1]


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (_answer(409, {"detail": "taken\nalready"}), "answered with 409, taken already."),
        (_answer(503), "does not answer (HTTP 503)"),
        (_answer(403), "Check PREFECT_API_KEY"),
        (httpx.ConnectError("refused"), "prefect server start"),
        (RuntimeError("Failed to reach API at http://x."), "prefect server start"),
        (KeyError("x"), "KeyError: 'x'. This is unexpected. Add --debug to see more."),
    ],
)
def test_a_message_is_one_line_that_says_what_to_do(error: Exception, said: str):
    text = message(own_error(error))
    assert said in text
    assert text.isprintable()
    assert "developer.mozilla" not in text


def test_a_message_about_wrong_fields_shows_no_value():
    with pytest.raises(ValueError, match="number") as caught:
        _Model(token="hush-hush", number="price-99")  # type: ignore[arg-type]
    assert reason(caught.value).startswith("number: ")
    assert reason(caught.value) in message(caught.value)
    assert not re.search("hush-hush|price-99", message(caught.value))


@pytest.mark.parametrize(
    ("said", "shown"),
    [
        ("give on_change='continue'; x", "give --on-change continue; x"),
        ("Give max_in_flight=3 or less.", "Give --max-in-flight 3 or less."),
        ("Give that ledger (ledger=…).", "Give that ledger (--ledger …)."),
        ("again with retry_failed=True.", "again with --retry-failed."),
        ("The ledger is away; my_key='x'", "The ledger is away; my_key='x'"),
        ("in Python force_new=True; or --force-new.", "in Python force_new=True; or --force-new."),
    ],
)
def test_arguments_are_named_as_the_command_line_has_them(said: str, shown: str):
    assert by_options(said) == shown


WITHOUT_PREFECT = {"demo", "init", "serve", "docs", "doctor", "receiver start"}
"""Commands that start a server of their own, need none, or say themselves that it is away."""
ARGUMENTS = {
    "run": "travel -i text=a",
    "result": "daily",
    "inputs": "travel",
    "runs inspect": "daily",
    "runs cancel": "daily",
    "runs resolve": "daily --never-started --yes",
    "runs prune": "--older-than 30d --yes",
    "sessions inspect": "s",
    "reviews inspect": "daily",
    "reviews approve": "daily",
    "reviews reject": "daily --feedback no",
    "batch run": "travel rows.csv --name b --export b.jsonl",
    "batch plan": "travel rows.csv",
    **{f"batch {verb}": "b" for verb in ("inspect", "failures", "retry", "resume", "cancel", "export")},
    "crews save": "travel --url http://127.0.0.1:1",
    "crews inspect": "travel",
    "deploy": "travel --pool crews",
    "backfill": "trip/daily --from 2026-01-01 --to 2026-01-02",
    "automations apply": "--pool crews",
}
ALL = [f"{group} {name}".strip() for group, listed in COMMANDS.items() for name in listed]


@pytest.mark.parametrize("line", [f"{name} {ARGUMENTS.get(name, '')}" for name in ALL if name not in WITHOUT_PREFECT])
def test_a_command_says_that_prefect_does_not_answer(here, line: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "rows.csv").write_text("text\na\n")
    url = f"http://127.0.0.1:{free_port()}/api"
    with temporary_settings({PREFECT_API_URL: url}):
        done = here(*line.split())
    assert (done.code, done.out) == (OTHER, ""), done.err
    assert f"The Prefect API at {url} does not answer" in done.err
