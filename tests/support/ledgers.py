"""Ledgers of batches, as time passes for them."""

from __future__ import annotations

import sqlite3
from contextlib import closing


def let_an_hour_pass(path: str) -> None:
    """Let no kickoff of a ledger in SQLite be on its way any more: the ledger's own clock says until when it may be."""
    with closing(sqlite3.connect(path)) as database, database:
        database.execute("UPDATE crew_attempts SET posts_until = posts_until - 3600")
