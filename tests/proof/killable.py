"""Flows that die where they have to, as a worker or a served deployment runs them. Served when run as a script."""

from __future__ import annotations

import os
import sys
from pathlib import Path

from prefect import flow

from prefect_crew import run_crew
from proof.kills import arm_from


@flow(log_prints=True)
def killable(crew: str, kill_file: str) -> str:
    """Run a stored crew, with an idempotency key that this flow run's retries find again."""
    arm_from(Path(kill_file))
    return run_crew(crew, {"text": "tea"}).output


@flow
def step(crew: str) -> str:
    """Run a crew as a subflow does: a retry of its parent makes it anew, under another id."""
    return run_crew(crew, {"text": "tea"}).output


@flow
def parent(crew: str, kill_file: str) -> str:
    """Run a crew twice in subflows: the same call, and yet two runs."""
    first = step(crew)
    arm_from(Path(kill_file))
    return f"{first}; {step(crew)}"


if __name__ == "__main__":
    killable.serve(name=sys.argv[1], pause_on_shutdown=False, limit=int(os.environ.get("PROOF_LIMIT", "4")))
