"""One exit code for each kind of error: in the table, in the help, and in the documentation."""

from __future__ import annotations

import inspect
import json
import re
from pathlib import Path

import cyclopts
import httpx
import pytest
from prefect.exceptions import ObjectNotFound, PrefectHTTPStatusError
from pydantic import BaseModel, SecretStr

from prefect_crew import exceptions
from prefect_crew.cli._errors import EXITS, UsageError, by_options, exit_code, paragraph, reason
from prefect_crew.exceptions import (
    BadRowsError,
    BatchBusyError,
    BatchCancelledError,
    BatchChangedError,
    DatasetError,
    LedgerError,
    LedgerMissingError,
    OutputError,
    PrefectAwayError,
)

TABLE = {line.code: line.meaning for line in EXITS}
DOCS = Path(__file__).parents[2] / "docs" / "cli.md"


def test_no_code_and_no_error_stands_twice():
    assert len(TABLE) == len(EXITS)
    kinds = [kind for line in EXITS for kind in line.errors]
    assert len(kinds) == len(set(kinds))


@pytest.mark.parametrize("name", exceptions.__all__)
def test_every_error_of_the_package_has_a_code_of_its_own(name: str):
    kind = getattr(exceptions, name)
    assert [line.code for line in EXITS if kind in line.errors], f"{name} has no exit code"


def test_the_help_lists_all_codes(here):
    listed = dict(re.findall(r"^ +(\d+)  (.+)$", here("--help").out.partition("Exit codes:")[2], re.MULTILINE))
    assert {int(code): meaning for code, meaning in listed.items()} == TABLE


def test_the_documentation_lists_all_codes():
    listed = dict(re.findall(r"^\| (\d+) \| (.+?) \|$", DOCS.read_text(encoding="utf-8"), re.MULTILINE))
    assert {int(code): meaning for code, meaning in listed.items()} == TABLE


def _answer(status: int, body: dict[str, str] | None = None) -> PrefectHTTPStatusError:
    request = httpx.Request("POST", "http://prefect.test/api/variables/")
    response = httpx.Response(status, request=request, json=body or {})
    return PrefectHTTPStatusError(f"Client error {status}", request=request, response=response)


@pytest.mark.parametrize(
    ("error", "code"),
    [
        pytest.param(UsageError("no"), 2, id="our-usage"),
        pytest.param(cyclopts.UnknownOptionError(token=None, argument_collection=None), 2, id="cyclopts"),  # type: ignore[call-arg, arg-type]
        pytest.param(exceptions.CrewFailedError(kickoff_id="k", error="no"), 10, id="failed"),
        pytest.param(exceptions.CrewError("no"), 27, id="any-crew-error"),
        pytest.param(exceptions.NotFoundError(status_code=404, method="GET", path="/"), 18, id="not-found"),
        pytest.param(exceptions.CrewAPIError(status_code=418, method="GET", path="/"), 24, id="any-answer"),
        pytest.param(exceptions.ConfigurationError("no"), 25, id="configuration"),
        pytest.param(ValueError("no"), 1, id="value"),
        pytest.param(json.JSONDecodeError("no", "", 0), 1, id="json"),
        pytest.param(BrokenPipeError(), 141, id="closed-pipe"),
        pytest.param(FileNotFoundError(2, "no such file", "x"), 26, id="file"),
        pytest.param(PrefectAwayError("no"), 30, id="away"),
        pytest.param(httpx.ConnectError("refused"), 30, id="prefect-refuses-connections"),
        pytest.param(_answer(503), 30, id="prefect-unavailable"),
        pytest.param(RuntimeError("Failed to reach API at http://x."), 30, id="prefect-says-so"),
        pytest.param(_answer(409, {"detail": "taken"}), 31, id="prefect-conflict"),
        pytest.param(ObjectNotFound(_answer(404)), 31, id="prefect-not-found"),
        pytest.param(DatasetError("is empty.", source="x"), 34, id="data-set"),
        pytest.param(BadRowsError([], 1, source="x"), 34, id="bad-rows"),
        pytest.param(BatchBusyError(name="x"), 35, id="busy"),
        pytest.param(BatchChangedError(name="x", difference="y"), 35, id="changed"),
        pytest.param(LedgerMissingError(name="x", ledger="y"), 35, id="other-ledger"),
        pytest.param(LedgerError("is gone.", ledger="x"), 36, id="ledger"),
        pytest.param(OutputError("no"), 36, id="output"),
        pytest.param(BatchCancelledError(name="x"), 11, id="batch-cancelled"),
        pytest.param(KeyboardInterrupt(), 130, id="interrupted"),
        pytest.param(KeyError("x"), 1, id="unexpected"),
    ],
)
def test_code_of(error: BaseException, code: int):
    assert exit_code(error) == code


def test_a_paragraph_is_one_line_that_says_what_prefect_refused():
    said = paragraph(_answer(409, {"detail": "taken\nalready"}))
    assert "POST /api/variables/ was answered with 409, taken already" in said
    assert "developer.mozilla" not in said


def test_a_paragraph_about_wrong_fields_shows_no_value():
    class Crew(BaseModel):
        token: SecretStr
        price: float

    with pytest.raises(ValueError, match="price") as caught:
        Crew(token="hush-hush", price="dear")  # type: ignore[arg-type]
    said = reason(caught.value)
    assert said.startswith("price: ")
    assert said in paragraph(caught.value)
    assert "hush-hush" not in said
    assert "dear" not in said


def test_what_is_only_prefects_is_known_without_importing_prefect():
    from prefect_crew.cli import _errors

    assert not re.search(
        r"^(from|import) (prefect|httpx|cyclopts|pydantic)\b", inspect.getsource(_errors), re.MULTILINE
    )


@pytest.mark.parametrize(
    ("said", "shown"),
    [
        pytest.param("say on_change='continue'; x", "say --on-change continue; x", id="a choice"),
        pytest.param("Give max_in_flight=3 or less.", "Give --max-in-flight 3 or less.", id="a number"),
        pytest.param("Give that ledger (ledger=…).", "Give that ledger (--ledger …).", id="a blank"),
        pytest.param("Give the file's encoding=….", "Give the file's --encoding ….", id="an encoding"),
        pytest.param("again with retry_failed=True.", "again with --retry-failed.", id="a switch"),
        pytest.param("and on_failure is 'stop'.", "and --on-failure is 'stop'.", id="an option that is told"),
        pytest.param("ledger='secret://batch-ledger'.", "--ledger secret://batch-ledger.", id="an address"),
        pytest.param("Give schedule=…, one of: a.", "Give --schedule …, one of: a.", id="of-a-backfill"),
        pytest.param(
            "allow it with allow_http=True (--allow-http) where", "allow it with --allow-http where", id="both"
        ),
        pytest.param("Choose one (option=…, --option). No", "Choose one (--option). No", id="both in brackets"),
        pytest.param("The ledger is away; my_key='x'", "The ledger is away; my_key='x'", id="nothing of the kind"),
    ],
)
def test_arguments_are_named_as_the_command_line_has_them(said: str, shown: str):
    assert by_options(said) == shown
    assert paragraph(exceptions.ConfigurationError(said)) == shown
