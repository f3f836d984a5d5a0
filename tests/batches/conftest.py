"""What the tests of batches share."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from prefect_crew.batches.ledger import Ledger
from support.batches import Batches, postgres_ledger
from support.postgres import Postgres


@pytest.fixture(params=["sqlite", pytest.param("postgresql", marks=pytest.mark.postgres)])
def ledger_address(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """Give the address of an empty ledger, in SQLite and in PostgreSQL."""
    if request.param == "sqlite":
        return str(tmp_path / "ledger.db")
    return postgres_ledger(request.getfixturevalue("postgres"))


@pytest.fixture
async def ledger(ledger_address: str) -> AsyncIterator[Ledger]:
    """Give the open ledger of a batch "b", in SQLite and in PostgreSQL."""
    async with Ledger(ledger_address, "b") as ledger:
        yield ledger


@pytest.fixture
async def other(ledger_address: str) -> AsyncIterator[Ledger]:
    """Give the same one as another process has it open."""
    async with Ledger(ledger_address, "b") as ledger:
        yield ledger


@pytest.fixture
def postgres_address(postgres: Postgres) -> str:
    """Give the address of an empty ledger in PostgreSQL."""
    return postgres_ledger(postgres)


@pytest.fixture
def batch(prefect_api: object, tmp_path: Path) -> Batches:
    """Give what runs batches, on a real Prefect server."""
    return Batches(tmp_path)
