"""Every error says what happened, to which run and what to do; survives pickling; and stands in the tree."""

from __future__ import annotations

import copy
import inspect
import pickle
import re
from typing import Any

import pytest

from prefect_crew import exceptions
from prefect_crew.batches.rows import BadRow
from prefect_crew.exceptions import CrewAPIError, CrewError, excerpt

ANSWER: dict[str, Any] = {"method": "POST", "path": "/kickoff", "title": "Short", "message": "Long", "body": "{}"}
# Each error, what its text must name, and what it must say to do.
ERRORS: dict[str, tuple[CrewError, list[str], str]] = {
    "configuration": (exceptions.ConfigurationError("The URL is odd. Use https."), ["URL"], "Use https"),
    "api": (
        exceptions.CrewAPIError(status_code=409, **ANSWER, kickoff_id="k1"),
        ["POST /kickoff", "409", "k1", "Short: Long"],
        "Look at the crew's page",
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
        "mend the type",
    ),
    "uncertain": (
        exceptions.KickoffUncertainError(idempotency_key="daily", reason="timeout. Look.", sent={"crew": "travel"}),
        ["'daily'", "timeout", "crew travel"],
        "prefect-crew runs resolve daily",
    ),
    "conflict": (
        exceptions.IdempotencyConflictError(idempotency_key="daily", difference="other inputs", kickoff_id="k1"),
        ["'daily'", "other inputs", "Nothing was started"],
        "prefect-crew runs show",
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
    "lost-at-once": (exceptions.CrewLostError(kickoff_id="k1"), ["k1", "has never seen it"], "Check the URL"),
    "timeout": (
        exceptions.CrewTimeoutError(
            kickoff_id="k1", phase="running", budget=60, last_state="running", idempotency_key="daily"
        ),
        ["k1", "running time of 60 s", "left running"],
        "run again with idempotency key 'daily'",
    ),
    "timeout-stopped": (
        exceptions.CrewTimeoutError(kickoff_id="k1", phase="pending", budget=60, last_state=None, stopped=True),
        ["k1", "unseen", "It was stopped"],
        "prefect-crew status CREW k1",
    ),
    "timeout-stopped-with-a-key": (
        exceptions.CrewTimeoutError(
            kickoff_id="k1", phase="running", budget=60, last_state="running", idempotency_key="daily", stopped=True
        ),
        ["k1", "It was stopped"],
        "'daily' buys another",
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
        "The same call goes on",
    ),
    "batch-cancelled": (exceptions.BatchCancelledError(name="b"), ["'b'"], "The same call goes on"),
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
    "ledger": (exceptions.LedgerError("cannot be read.", ledger="l.db"), ["l.db cannot be read"], "mend it"),
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
def test_text_says_what_and_to_which_run_and_what_to_do(case: str):
    error, facts, advice = ERRORS[case]
    for part in (*facts, advice):
        assert part in str(error)
    assert ".." not in str(error)


@pytest.mark.parametrize("again", [lambda error: pickle.loads(pickle.dumps(error)), copy.copy], ids=["pickle", "copy"])
@pytest.mark.parametrize("case", ERRORS)
def test_error_survives(case: str, again: Any):
    error = ERRORS[case][0]
    found = again(error)
    assert (type(found), str(found)) == (type(error), str(error))
    assert {name: repr(value) for name, value in vars(found).items()} == {
        name: repr(value) for name, value in vars(error).items()
    }


def public() -> dict[str, type[CrewError]]:
    return {name: getattr(exceptions, name) for name in exceptions.__all__}


def test_every_public_error_is_tried_here():
    assert {type(error) for error, _, _ in ERRORS.values()} == set(public().values()) - {CrewError}


def test_all_is_sorted_and_complete():
    defined = {
        name
        for name, value in vars(exceptions).items()
        if inspect.isclass(value) and issubclass(value, CrewError) and not name.startswith("_")
    }
    assert exceptions.__all__ == sorted(defined)


def test_the_tree_in_the_docstring_is_the_tree():
    lines = (re.match(r"( {4}[│├└─ ]*)([A-Z]\w+)", line) for line in (exceptions.__doc__ or "").splitlines())
    drawn = [(len(found.group(1)), found.group(2)) for found in lines if found]
    assert {name for _, name in drawn} == set(exceptions.__all__)
    parents: dict[int, str] = {}
    for depth, name in drawn:
        parents[depth] = name
        above = [parents[other] for other in sorted(parents) if other < depth]
        if above:
            assert issubclass(public()[name], public()[above[-1]])


def test_an_error_keeps_an_excerpt_of_the_body():
    error = CrewAPIError(status_code=500, method="GET", path="/", body="a \n" * 10_000)
    assert len(error.body) < 600
    assert "more characters" in str(error)
    assert excerpt("a\n  b") == "a b"
