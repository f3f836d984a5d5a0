from __future__ import annotations

import asyncio

import pytest

from prefect_crew.client._retry_safety import KickoffFate, kickoff_fate
from prefect_crew.exceptions import (
    AuthenticationError,
    ConfigurationError,
    CrewAPIError,
    CrewConnectionError,
    InvalidInputsError,
    KickoffUncertainError,
    NotFoundError,
    RateLimitedError,
    ResponseFormatError,
    ServerError,
)

KICKOFF = {"method": "POST", "path": "/kickoff"}


def answered(kind: type[CrewAPIError], status: int, **facts: object) -> CrewAPIError:
    return kind(status_code=status, **KICKOFF, **facts)  # type: ignore[arg-type]


def unanswered(*, sent: bool) -> CrewConnectionError:
    return CrewConnectionError(method="POST", url="https://crew.example.com/kickoff", reason="x", sent=sent)


FATES: dict[KickoffFate, list[BaseException]] = {
    KickoffFate.RETRY: [
        unanswered(sent=False),
        answered(RateLimitedError, 429),
        answered(RateLimitedError, 429, retry_after=3.0),
        answered(ServerError, 503, retry_after=3.0),
        answered(ServerError, 503, retry_after=0.0),
    ],
    KickoffFate.REFUSED: [
        answered(InvalidInputsError, 400),
        answered(AuthenticationError, 401),
        answered(AuthenticationError, 403),
        answered(NotFoundError, 404),
        *(answered(CrewAPIError, status) for status in (402, 409, 413, 499)),
        answered(InvalidInputsError, 422),
        InvalidInputsError(missing_inputs=["a"], before_kickoff=True, status_code=0),
        ConfigurationError("no token"),
    ],
    KickoffFate.UNCERTAIN: [
        unanswered(sent=True),
        *(answered(CrewAPIError, status) for status in (301, 307, 408, 600)),
        *(answered(ServerError, status) for status in (500, 502, 503)),
        *(answered(ServerError, status, retry_after=3.0) for status in (500, 504)),
        ResponseFormatError(expected="an id", body="{}", status_code=200),
        KickoffUncertainError(idempotency_key="k", reason="x"),
        RuntimeError("?"),
        asyncio.CancelledError(),
        KeyboardInterrupt(),
    ],
}
CASES = [(fate, error) for fate, errors in FATES.items() for error in errors]


@pytest.mark.parametrize(("fate", "error"), CASES, ids=lambda one: str(one)[:40])
def test_fate_of_a_failed_kickoff(fate: KickoffFate, error: BaseException):
    assert kickoff_fate(error) is fate
