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


FATES = {
    "refused-connection": (unanswered(sent=False), "retry"),
    "429": (answered(RateLimitedError, 429), "retry"),
    "429-with-retry-after": (answered(RateLimitedError, 429, retry_after=3.0), "retry"),
    "503-with-retry-after": (answered(ServerError, 503, retry_after=3.0), "retry"),
    "503-with-retry-after-0": (answered(ServerError, 503, retry_after=0.0), "retry"),
    "400": (answered(InvalidInputsError, 400), "refused"),
    "401": (answered(AuthenticationError, 401), "refused"),
    "403": (answered(AuthenticationError, 403), "refused"),
    "404": (answered(NotFoundError, 404), "refused"),
    "402": (answered(CrewAPIError, 402), "refused"),
    "409": (answered(CrewAPIError, 409), "refused"),
    "413": (answered(CrewAPIError, 413), "refused"),
    "422": (answered(InvalidInputsError, 422), "refused"),
    "499": (answered(CrewAPIError, 499), "refused"),
    "inputs-before-kickoff": (InvalidInputsError(missing_inputs=["a"], before_kickoff=True, status_code=0), "refused"),
    "configuration": (ConfigurationError("no token"), "refused"),
    "reset-or-timeout": (unanswered(sent=True), "uncertain"),
    "301": (answered(CrewAPIError, 301), "uncertain"),
    "307": (answered(CrewAPIError, 307), "uncertain"),
    "408": (answered(CrewAPIError, 408), "uncertain"),
    "500": (answered(ServerError, 500), "uncertain"),
    "500-with-retry-after": (answered(ServerError, 500, retry_after=3.0), "uncertain"),
    "502": (answered(ServerError, 502), "uncertain"),
    "503": (answered(ServerError, 503), "uncertain"),
    "504-with-retry-after": (answered(ServerError, 504, retry_after=3.0), "uncertain"),
    "600": (answered(CrewAPIError, 600), "uncertain"),
    "no-id": (ResponseFormatError(expected="an id", body="{}", status_code=200), "uncertain"),
    "already-uncertain": (KickoffUncertainError(idempotency_key="k", reason="x"), "uncertain"),
    "unknown": (RuntimeError("?"), "uncertain"),
    "cancelled": (asyncio.CancelledError(), "uncertain"),
    "interrupted": (KeyboardInterrupt(), "uncertain"),
}


@pytest.mark.parametrize("case", FATES)
def test_fate_of_a_failed_kickoff(case: str):
    error, fate = FATES[case]
    assert kickoff_fate(error) is KickoffFate(fate)
    assert str(kickoff_fate(error)) == fate
