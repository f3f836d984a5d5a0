"""A command that people are told to paste stays one command, whatever the id or the key in it."""

from __future__ import annotations

import shlex
import sys
from datetime import UTC, datetime
from pathlib import Path

import jinja2
import pytest
from pydantic import SecretStr

from prefect_crew.batches import outcomes
from prefect_crew.batches.rows import RowJob
from prefect_crew.blocks import DeployedCrew
from prefect_crew.cli.runs import Condition, todo
from prefect_crew.exceptions import (
    CrewLostError,
    CrewTimeoutError,
    IdempotencyConflictError,
    KickoffUncertainError,
    ReviewLimitError,
)
from prefect_crew.records.model import RecordPhase, RunRecord
from prefect_crew.runs.reviews.questions import how_to_answer
from prefect_crew.runs.run import OpenRun

sys.path.insert(0, str(Path(__file__).parents[2] / "deployments"))
from automations import ALERTS

HOSTILE = "r1;touch 'pwned' $(touch x) `y` \"z\" \\"
NOW = datetime(2026, 1, 1, tzinfo=UTC)


def record(**fields: object) -> RunRecord:
    return RunRecord.model_validate(
        {
            "idempotency_key": HOSTILE, "attempt": 1, "crew": HOSTILE, "crew_url": "https://x", "inputs_digest": "0" *
            32,
            "owner": "o", "claimed_at": NOW, "phase": RecordPhase.STARTED, "kickoff_id": HOSTILE,
        } | fields
    )  # fmt: skip


CREW = DeployedCrew(url="https://x.test", token=SecretStr("a-token-of-tests"))
TEXTS = {
    "uncertain": str(KickoffUncertainError(idempotency_key=HOSTILE, reason="x")),
    "conflict": str(IdempotencyConflictError(idempotency_key=HOSTILE, difference="x")),
    "lost": str(CrewLostError(kickoff_id="k", idempotency_key=HOSTILE)),
    "timed out": str(CrewTimeoutError(kickoff_id=HOSTILE, phase="running", budget=1, last_state="running")),
    "answer": how_to_answer(OpenRun(crew=CREW.crew, kickoff_id=HOSTILE)),
    "overview uncertain": todo(record(), Condition.UNCERTAIN),
    "overview orphaned": todo(record(), Condition.ORPHANED),
    "overview waiting": todo(record(), Condition.WAITING),
    "row uncertain": outcomes._uncertain(RowJob(0, 2, HOSTILE, {}, "d"), "x", HOSTILE),
    "row lost": outcomes._lost(RowJob(0, 2, HOSTILE, {}, "d"), CrewLostError(kickoff_id="k"), HOSTILE),
    "alert": jinja2.Template(ALERTS["uncertain"]).render(
        event={"payload": {"idempotency_key": HOSTILE, "reason": "x"}}
    ),
}


@pytest.mark.parametrize("which", TEXTS)
def test_a_shell_takes_an_id_for_one_word(which: str):
    commands = TEXTS[which].split("prefect-crew ")[1:]
    assert commands
    for command in commands:
        # What stands after the quoted word is our own text, whose apostrophes are no quotes.
        quoted = shlex.quote(HOSTILE)
        assert quoted in command
        assert shlex.split(quoted) == [HOSTILE]
        assert HOSTILE not in command.replace(quoted, "")


def test_a_task_of_many_lines_makes_no_line_of_an_error():
    error = ReviewLimitError(kickoff_id="k", task_id="draft\n\x1b[2JERROR forged", max_rounds=1)
    assert str(error).isprintable()
