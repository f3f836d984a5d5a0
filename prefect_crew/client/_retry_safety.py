"""What a failed kickoff says about the run: surely not started, or nobody knows. Pure."""

from __future__ import annotations

from enum import StrEnum

from prefect_crew.exceptions import (
    BudgetExceededError,
    ConfigurationError,
    CrewAPIError,
    CrewConnectionError,
    InvalidInputsError,
    RateLimitedError,
    ServerError,
    TooManyAttemptsError,
)

DELAY_CAP = 120.0
BARE_DELAY = 5.0
"""Seconds after a 429 that names no time to come back."""


class KickoffFate(StrEnum):
    """What may be done after a kickoff that brought no id."""

    RETRY = "retry"
    """It surely did not start a run, and may be sent again."""
    REFUSED = "refused"
    """It surely did not start a run, and would fail the same way again: raise at once."""
    UNCERTAIN = "uncertain"
    """It may have started a run. It is never sent again on a guess."""


def kickoff_fate(error: BaseException) -> KickoffFate:
    """Return what `error`, raised by a kickoff, says about the run. docs/reference/faults.md has the table.

    A 5xx often comes from a proxy that had passed the request on, so only a 503 that names a time to come back is a
    refusal: the server that sends it chose not to take the request. What is not known here is uncertain.
    """
    if isinstance(error, ConfigurationError | BudgetExceededError | TooManyAttemptsError):
        return KickoffFate.REFUSED
    if isinstance(error, InvalidInputsError) and error.before_kickoff:
        return KickoffFate.REFUSED
    if isinstance(error, CrewConnectionError):
        return KickoffFate.UNCERTAIN if error.sent else KickoffFate.RETRY
    if not isinstance(error, CrewAPIError):
        return KickoffFate.UNCERTAIN
    status = error.status_code
    if status == 429 or (status == 503 and getattr(error, "retry_after", None) is not None):
        return KickoffFate.RETRY
    if 400 <= status < 500 and status != 408:
        return KickoffFate.REFUSED
    return KickoffFate.UNCERTAIN


def post_deadline(request_timeout: float) -> float:
    """Return the seconds after which a POST of a client with this `request_timeout` has ended, one way or the other.

    Half of it suffices for a server that answers at all; the rest is for connecting and for large inputs.
    """
    return 2 * request_timeout


def kickoff_delay(error: BaseException) -> float | None:
    """Return the seconds that the server itself asks a refused kickoff to wait, None if it does not ask."""
    if not isinstance(error, (RateLimitedError, ServerError)) or kickoff_fate(error) is not KickoffFate.RETRY:
        return None
    return min(BARE_DELAY if error.retry_after is None else error.retry_after, DELAY_CAP)
