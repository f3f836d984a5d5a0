"""The meaning of a failed kickoff: the run surely did not start, or nobody knows. Pure."""

from __future__ import annotations

from enum import StrEnum

from prefect_crew.exceptions import (
    BudgetExceededError,
    ConfigurationError,
    CrewAPIError,
    CrewConnectionError,
    InvalidInputsError,
    NotStartedError,
    SessionBlockedError,
)

DELAY_CAP = 120.0
BARE_DELAY = 5.0
"""Seconds to wait after a 429 without `Retry-After`."""
POST_DEADLINE = 2
"""A POST has surely ended after this many times the request timeout: half is for the answer, the rest for connecting
and for large inputs."""


class KickoffFate(StrEnum):
    """The meaning of a kickoff that returned no id, and so the next step."""

    RETRY = "retry"
    """The kickoff surely did not start a run, and may be sent again."""
    REFUSED = "refused"
    """The kickoff surely did not start a run, and would fail again in the same way: raise at once."""
    UNCERTAIN = "uncertain"
    """The kickoff may have started a run. It is never sent again on a guess."""


def kickoff_fate(error: BaseException) -> KickoffFate:
    """Return the meaning of an error of a kickoff. tests/proof/faults.md has the table.

    A 5xx often comes from a proxy that has passed the request on. Only a 503 with `Retry-After` surely started nothing:
    its server chose not to take the request. An error of an unknown kind is uncertain.
    """
    match error:
        case NotStartedError() | CrewConnectionError(sent=False) | CrewAPIError(status_code=429):
            return KickoffFate.RETRY
        case CrewAPIError(status_code=503, retry_after=float()):
            return KickoffFate.RETRY
        case ConfigurationError() | BudgetExceededError() | SessionBlockedError():
            return KickoffFate.REFUSED
        case InvalidInputsError(before_kickoff=True):
            return KickoffFate.REFUSED
        case CrewAPIError(status_code=status) if 400 <= status < 500 and status != 408:
            return KickoffFate.REFUSED
        case _:
            return KickoffFate.UNCERTAIN


def kickoff_delay(error: BaseException) -> float | None:
    """Return the seconds after which the server allows to send a kickoff again, None if the error says nothing."""
    if not isinstance(error, CrewAPIError) or kickoff_fate(error) is not KickoffFate.RETRY:
        return None
    return min(BARE_DELAY if error.retry_after is None else error.retry_after, DELAY_CAP)
