"""The time as aware values, and as the seconds since 1970 that the crew database has."""

from __future__ import annotations

from datetime import UTC, datetime


def utcnow() -> datetime:
    """Return the time, UTC, aware."""
    return datetime.now(UTC)


def moment(seconds: float) -> datetime:
    """Return a time of the crew database, UTC, aware."""
    return datetime.fromtimestamp(seconds, UTC)
