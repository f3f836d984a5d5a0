"""Every error says what happened, to which run and what to do; survives pickling; and the tree of them is true."""

from __future__ import annotations

import ast
import copy
import pickle
import re
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

import prefect_crew
from prefect_crew import exceptions
from prefect_crew.batches.rows import BadRow
from prefect_crew.exceptions import CrewAPIError, CrewError

ANSWER: dict[str, Any] = {"method": "POST", "path": "/kickoff", "message": "Short: Long", "body": "{}"}
# Each error, what its message must name, and what it must say to do.
ERRORS: dict[str, tuple[CrewError, list[str], str]] = {
    "configuration": (exceptions.ConfigurationError("The URL is odd. Use https."), ["URL"], "Use https"),
    "api": (
        exceptions.CrewAPIError(status_code=409, **ANSWER, kickoff_id="k1"),
        ["POST /kickoff", "409", "k1", "Short: Long"],
        "See the crew's page",
    ),
    "authentication": (exceptions.AuthenticationError(status_code=401, **ANSWER), ["401"], "Check the bearer token"),
    "not-found": (exceptions.NotFoundError(status_code=404, **ANSWER), ["404"], "Check the crew's URL"),
    "invalid-inputs": (
        exceptions.InvalidInputsError(**ANSWER, missing_inputs=["budget", "age"]),
        ["422", "Missing: budget, age"],
        "prefect-crew inputs",
    ),
    "invalid-inputs-before": (
        exceptions.InvalidInputsError(missing_inputs=["budget"], before_kickoff=True),
        ["Missing inputs: budget", "Nothing was started"],
        "prefect-crew inputs",
    ),
    "rate-limited": (
        exceptions.RateLimitedError(status_code=429, **ANSWER, retry_after=3.0),
        ["429"],
        "try again later",
    ),
    "server": (exceptions.ServerError(status_code=503, **ANSWER, retry_after=3.0), ["503"], "Ask the crew's operators"),
    "server-empty": (exceptions.ServerError(status_code=500, method="GET", path="/"), ["an empty body"], "Ask"),
    "budget": (
        exceptions.BudgetExceededError(
            budget="travel",
            counter="prefect-crew.budget.travel.2026-11-26.cost",
            measure="cost",
            used=9.8,
            limit=10.0,
            needed=0.4,
            resets_at=datetime(2026, 11, 27, tzinfo=UTC),
        ),
        ["'travel'", "9.8 of 10 cost", "takes about 0.4", "begins anew at 2026-11-27 00:00 UTC", "Nothing was started"],
        "run again then with the same key, or raise max_cost",
    ),
    "budget-of-a-batch": (
        exceptions.BudgetExceededError(budget="b", counter="c", measure="kickoffs", used=2, limit=2, needed=1),
        ["2 of 2 kickoffs are used or reserved by runs in flight. Nothing was started"],
        "raise max_kickoffs and make the same call again.",
    ),
    "budget-that-warns": (
        exceptions.BudgetExceededError(
            budget="travel", counter="c", measure="tokens", used=12_000, limit=12_345, needed=800.0, on_limit="warn"
        ),
        ["12,000 of 12,345 tokens are used or reserved by runs in flight. The run"],
        "starts all the same",
    ),
    "connection": (
        exceptions.CrewConnectionError(
            method="GET", url="https://c/status", reason="reset", sent=True, kickoff_id="k1"
        ),
        ["GET https://c/status", "k1", "reset"],
        "prefect-crew doctor",
    ),
    "format": (
        exceptions.ResponseFormatError(expected="a status", body="<html>", status_code=200, kickoff_id="k1"),
        ["a status", "k1", "<html>"],
        "Check that the URL",
    ),
    "output-type": (
        exceptions.OutputTypeError(kickoff_id="k1", output_type="Trip", output="Lisbon", problems=["city: missing"]),
        ["k1", "Trip", "city: missing", "Lisbon"],
        "correct the type",
    ),
    "uncertain": (
        exceptions.KickoffUncertainError(idempotency_key="daily", reason="timeout. Look.", sent={"crew": "travel"}),
        ["'daily'", "timeout", "crew travel"],
        "prefect-crew runs resolve daily",
    ),
    "conflict": (
        exceptions.IdempotencyConflictError(idempotency_key="daily", difference="other inputs", kickoff_id="k1"),
        ["'daily'", "other inputs", "Nothing was started"],
        "prefect-crew runs inspect",
    ),
    "failed": (
        exceptions.CrewFailedError(kickoff_id="k1", error="No credits", crew="travel"),
        ["k1", "travel", "No credits"],
        "run again",
    ),
    "failed-without-a-reason": (
        exceptions.CrewFailedError(kickoff_id="k1", error=""),
        ["k1", "no reason"],
        "run again",
    ),
    "stopped": (exceptions.CrewStoppedError(kickoff_id="k1", crew="travel"), ["k1", "travel"], "Run again"),
    "lost": (exceptions.CrewLostError(kickoff_id="k1", last_state="running"), ["k1", "running"], "Check the URL"),
    "lost-at-once": (exceptions.CrewLostError(kickoff_id="k1"), ["k1", "this wait never saw it"], "Check the URL"),
    "timeout": (
        exceptions.CrewTimeoutError(
            kickoff_id="k1", phase="running", budget=60, last_state="running", idempotency_key="daily"
        ),
        ["k1", "running time limit of 60 s", "left running"],
        "run again with idempotency key 'daily'",
    ),
    "timeout-stopped": (
        exceptions.CrewTimeoutError(kickoff_id="k1", phase="pending", budget=60, last_state=None, stopped=True),
        ["k1", "unseen", "It was stopped"],
        "prefect-crew runs inspect k1",
    ),
    "timeout-stopped-with-a-key": (
        exceptions.CrewTimeoutError(
            kickoff_id="k1", phase="running", budget=60, last_state="running", idempotency_key="daily", stopped=True
        ),
        ["k1", "It was stopped"],
        "'daily' starts another",
    ),
    "too-many-rounds": (
        exceptions.ReviewLimitError(kickoff_id="k1", task_id="t1", max_rounds=3, crew="travel"),
        ["k1", "travel", "task t1", "3 rounds"],
        "answer it on the crew's page",
    ),
    "too-many-rounds-stopped": (
        exceptions.ReviewLimitError(kickoff_id="k1", task_id="t1", max_rounds=3, stopped=True),
        ["k1", "3 rounds"],
        "It was stopped",
    ),
    "answered": (exceptions.AnsweredError("Run k1 has its answer. Nothing was sent. Wait for it."), ["k1"], "Wait"),
    "call": (exceptions.InvalidCallError("f() would block: use `await af()`."), ["f()"], "use `await"),
    "prefect-away": (exceptions.PrefectAwayError("No Prefect API at x. Start a server."), ["at x"], "Start"),
    "batch-failed": (
        exceptions.BatchFailedError("batch b: 3 of 4 rows completed, 1 failed."),
        ["3 of 4"],
        "The same call continues",
    ),
    "batch-cancelled": (exceptions.BatchCancelledError(name="b"), ["'b'"], "The same call continues"),
    "batch-busy": (exceptions.BatchBusyError(name="b"), ["'b'", "Nothing was started"], "Wait for it"),
    "batch-changed": (
        exceptions.BatchChangedError(name="b", difference="row 3"),
        ["'b'", "row 3"],
        "on_change='continue'",
    ),
    "dataset": (
        exceptions.DatasetError("It is odd.", source="a.csv", line=3),
        ["a.csv, line 3"],
        "Nothing of this data set",
    ),
    "bad-rows": (
        exceptions.BadRowsError([BadRow(3, "lacks name")], 1, source="a.csv"),
        ["a row", "line 3: lacks name"],
        "set-aside",
    ),
    "ledger": (exceptions.LedgerError("cannot be read.", ledger="l.db"), ["l.db cannot be read"], "repair it"),
    "ledger-missing": (exceptions.LedgerMissingError(name="b", ledger="l.db"), ["'b'", "l.db"], "Give that ledger"),
    "output": (exceptions.OutputError("o.jsonl cannot be written. Free some space."), ["o.jsonl"], "Free"),
    "pipeline": (
        exceptions.PipelineFailedError(
            failed=["write"],
            skipped=["post"],
            results={"research": 1},
            errors={"write": ValueError("b")},
            idempotency_key="r",
        ),
        ["write: b", "post", "1 finished"],
        "with idempotency key 'r'",
    ),
}


@pytest.mark.parametrize("case", ERRORS)
def test_a_message_says_what_and_to_which_run_and_what_to_do(case: str):
    error, facts, advice = ERRORS[case]
    for part in (*facts, advice):
        assert part in str(error)
    assert ".." not in str(error)


@pytest.mark.parametrize("again", [lambda error: pickle.loads(pickle.dumps(error)), copy.copy], ids=["pickle", "copy"])
@pytest.mark.parametrize("case", ERRORS)
def test_an_error_survives(case: str, again: Any):
    error = ERRORS[case][0]
    found = again(error)
    assert (type(found), str(found)) == (type(error), str(error))
    assert {name: repr(value) for name, value in vars(found).items()} == {
        name: repr(value) for name, value in vars(error).items()
    }


def test_an_error_keeps_an_excerpt_of_the_body():
    error = CrewAPIError(status_code=500, method="GET", path="/", body="a \n" * 10_000)
    assert len(error.body) < 600
    assert "more characters" in str(error)


# The tree

PUBLIC: dict[str, type[CrewError]] = {name: getattr(exceptions, name) for name in exceptions.__all__}


def test_every_public_error_is_tried_here_and_is_exported():
    assert {type(error) for error, _, _ in ERRORS.values()} == set(PUBLIC.values()) - {CrewError}
    assert exceptions.__all__ == sorted(PUBLIC)
    assert all(getattr(prefect_crew, name) is kind for name, kind in PUBLIC.items())


def test_the_tree_in_the_docstring_is_the_tree():
    lines = (re.match(r"( {4}[│├└─ ]*)([A-Z]\w+)", line) for line in (exceptions.__doc__ or "").splitlines())
    drawn = [(len(found.group(1)), found.group(2)) for found in lines if found]
    assert {name for _, name in drawn} == set(PUBLIC)
    parents: dict[int, str] = {}
    for depth, name in drawn:
        parents[depth] = name
        above = [parents[other] for other in sorted(parents) if other < depth]
        assert not above or issubclass(PUBLIC[name], PUBLIC[above[-1]])


# What this package raises, read from its source

PACKAGE = Path(prefect_crew.__file__).parent
# The local crew server is a program of its own, whose errors are answers; pytest's fixtures have pytest's.
ELSEWHERE = ("devserver", "testing")
OTHERS = {
    # Validators of pydantic, hooks of json, a module's __getattr__, a keyword that a function does not have.
    "ValueError": "batches.dataset batches.options blocks budgets client._parsing client.webhooks prices",
    "AttributeError": "_internal.lazy",
    "TypeError": "batches.run",
    # Caught: the client, the ledger and the command line make errors or exit codes of them, a kickoff decides again.
    "ReadTimeout": "client._transport",
    "ClaimLostError": "batches.ledger runs.kickoff",
    "OSError": "_internal.files batches.database cli.run cli.serve",
    "RuntimeError": "_internal.web_server",
    "UsageError": "cli._options cli._output cli.batch cli.deploy cli.reviews cli.runs",
    "TerminatedError": "cli.app",
    # Prefect's signals, and methods that a subclass has.
    "CancelledError": "_internal.flow_engine",
    "InfrastructureNotAvailable": "worker",
    "NotImplementedError": "deployments exceptions",
}
"""Other classes that are raised on purpose, and by which modules."""


def raised() -> Iterator[str]:
    """Yield each class that a `raise` names, after its module."""
    for path in sorted(PACKAGE.rglob("*.py")):
        module = ".".join(path.relative_to(PACKAGE).with_suffix("").parts)
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Raise) and node.exc is not None and not module.startswith(ELSEWHERE):
                name = ast.unparse(node.exc.func if isinstance(node.exc, ast.Call) else node.exc).rpartition(".")[2]
                if name[0].isupper():
                    yield f"{module} {name}"


def test_everything_that_is_raised_is_in_the_tree_or_has_a_reason():
    found = set(raised())
    assert len(found) > 100, "the walk sees them"
    known = {f"{module} {name}" for name, listed in OTHERS.items() for module in listed.split()}
    assert {one for one in found if one.rpartition(" ")[2] not in PUBLIC} <= known
