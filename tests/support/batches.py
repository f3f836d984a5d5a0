"""What tests of batches make: records of rows, ledgers in PostgreSQL."""

from __future__ import annotations

import uuid
from typing import Any

from prefect_crew.batches.ledger import Ledger
from prefect_crew.records import RunRecord, known_by, utcnow
from support.postgres import Postgres

__all__ = ["postgres_ledger", "record_of"]


def record_of(ledger: Ledger, key: str, *, attempt: int = 1, **facts: Any) -> RunRecord:
    """Return the claim of a row; `facts` are more fields of the record."""
    now = utcnow()
    given = {"run_key": ledger.run_key(key), "attempt": attempt, "owner": uuid.uuid4().hex, **facts}
    return RunRecord(
        crew="c",
        crew_url="https://crew.example",
        inputs_digest="d",
        claimed_at=now,
        known_by=known_by(now, 30),
        **given,
    )


def postgres_ledger(postgres: Postgres) -> str:
    """Return the address of an empty ledger in PostgreSQL."""
    return postgres.create_database(f"ledger_{uuid.uuid4().hex[:12]}").replace("postgresql+asyncpg", "postgresql")
