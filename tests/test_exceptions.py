"""Every error says what happened, to which run and what to do; survives pickling; and the tree of them is true."""

from __future__ import annotations

import copy
import pickle
import re
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

import prefect_crew
from prefect_crew import exceptions
from prefect_crew.batches.rows import BadRow
from prefect_crew.exceptions import CrewError

GOLDEN = Path(__file__).parent / "golden" / "messages.txt"
"""What the error classes make of their facts, a case a line: read the list when you change a class. The texts that a
`raise` gives to a class are in no list."""
E = exceptions
ANSWER: dict[str, Any] = {"method": "POST", "path": "/kickoff", "message": "Short: Long", "body": "{}"}
RUN: dict[str, Any] = {"kickoff_id": "k1", "crew": "travel"}
TIMEOUT: dict[str, Any] = {"kickoff_id": "k1", "phase": "running", "limit": 60, "last_state": "running"}
BUDGET: dict[str, Any] = {"budget": "travel", "counter": "prefect-crew.budget.travel", "used": 9.8, "limit": 12_345}
FAILED_STEP: dict[str, Any] = {"failed": ["write"], "results": {"research": 1}, "errors": {"write": ValueError("b")}}
WITH_FACTS: list[CrewError] = [
    E.CrewAPIError(status_code=409, **ANSWER, kickoff_id="k1"),
    E.AuthenticationError(status_code=401, **ANSWER),
    E.NotFoundError(status_code=404, **ANSWER),
    E.InvalidInputsError(**ANSWER, missing_inputs=["budget", "age"]),
    E.InvalidInputsError(missing_inputs=["budget"], before_kickoff=True),
    E.InvalidInputsError(unknown_inputs=["topics", "x"], known_inputs=["topic"], before_kickoff=True),
    E.RateLimitedError(status_code=429, **ANSWER, retry_after=3.0),
    E.ServerError(status_code=503, **ANSWER, retry_after=3.0),
    E.ServerError(status_code=500, method="GET", path="/"),
    E.ServerError(status_code=500, method="GET", path="/", body="a \n" * 10_000),
    E.CrewConnectionError(method="GET", url="https://c/status", reason="reset", sent=True, kickoff_id="k1"),
    E.ResponseFormatError(expected="a status", body="<html>", status_code=200, kickoff_id="k1"),
    E.OutputTypeError(kickoff_id="k1", output_type="Trip", output="Lisbon", problems=["city: missing"]),
    E.KickoffUncertainError(idempotency_key="daily", reason="timeout. Look.", sent={"crew": "travel"}),
    E.IdempotencyConflictError(idempotency_key="daily", difference="other inputs", kickoff_id="k1"),
    E.TooManyAttemptsError(idempotency_key="daily", attempts=64),
    E.SessionBlockedError(session="c-42", turn=3, run="daily", reason="it is odd.", advice="Look."),
    E.BudgetExceededError(**BUDGET, measure="cost", estimate=0.4, resets_at=datetime(2026, 11, 27, tzinfo=UTC)),
    E.BudgetExceededError(**BUDGET, measure="kickoffs", estimate=1),
    E.BudgetExceededError(**BUDGET, measure="tokens", estimate=800.0, on_limit="warn"),
    E.CrewFailedError(**RUN, error="No credits"),
    E.CrewFailedError(kickoff_id="k1", error=""),
    E.CrewStoppedError(**RUN),
    E.CrewLostError(**RUN, last_state="running", idempotency_key="daily"),
    E.CrewLostError(kickoff_id="k1"),
    E.CrewLostError(kickoff_id="k1", last_state="completed"),
    E.CrewTimeoutError(**TIMEOUT, idempotency_key="daily"),
    E.CrewTimeoutError(**{**TIMEOUT, "last_state": None}, stopped=True),
    E.CrewTimeoutError(**TIMEOUT, idempotency_key="daily", stopped=True),
    E.ReviewLimitError(**RUN, task_id="t1", max_rounds=3),
    E.ReviewLimitError(**RUN, task_id="t1", max_rounds=3, stopped=True),
    E.RunNotFoundError(name="daily"),
    E.RunNotFoundError(name="k1", advice="The run may be a row of batch 'b', so nothing was sent."),
    E.PipelineFailedError(**FAILED_STEP, skipped=["post"], idempotency_key="r"),
    E.BatchFailedError("batch b: 3 of 4 rows completed, 1 failed."),
    E.BatchCancelledError(name="b"),
    E.BatchBusyError(name="b"),
    E.BatchChangedError(name="b", difference="row 3"),
    E.DatasetError("It is odd.", source="a.csv", line=3),
    E.DatasetError("It is odd.", source="a.csv", begun=True),
    E.BadRowsError([BadRow(3, "lacks name")], 1, source="a.csv"),
    E.LedgerError("cannot be read.", ledger="l.db"),
    E.LedgerMissingError(name="b", ledger="l.db"),
]


PUBLIC: dict[str, type[CrewError]] = {name: getattr(exceptions, name) for name in exceptions.__all__}
ERRORS = [
    *WITH_FACTS,
    *(kind("It is odd. Do this.") for kind in PUBLIC.values() if kind.__init__ is CrewError.__init__),
]


def test_the_text_of_every_error_with_facts_is_golden():
    texts = [f"{type(error).__name__}: {error}" for error in WITH_FACTS]
    assert texts == GOLDEN.read_text(encoding="utf-8").splitlines()
    assert not any(".." in str(error) or len(str(error)) > 800 for error in WITH_FACTS)


@pytest.mark.parametrize("again", [lambda error: pickle.loads(pickle.dumps(error)), copy.copy], ids=["pickle", "copy"])
@pytest.mark.parametrize("error", ERRORS, ids=lambda error: type(error).__name__)
def test_an_error_survives(error: CrewError, again: Any):
    found = again(error)
    assert (type(found), str(found)) == (type(error), str(error))
    assert repr(vars(found)) == repr(vars(error))


# The tree


def test_every_error_is_tried_and_exported():
    assert {type(error) for error in ERRORS} == set(PUBLIC.values())
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
