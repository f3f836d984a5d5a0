"""Errors about one call of the crew API."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from prefect_crew.api._error import CrewError, excerpt, listed_names, with_guesses

__all__ = [
    "AuthenticationError",
    "CrewAPIError",
    "CrewConnectionError",
    "InvalidInputsError",
    "NotFoundError",
    "PrefectAwayError",
    "RateLimitedError",
    "ResponseFormatError",
    "ServerError",
]


class CrewAPIError(CrewError):
    """The crew's server answered with an error.

    Attributes:
        status_code: The HTTP status.
        title: The short error of the body, if it had one.
        message: The long one, if it had one.
        body: An excerpt of the body, at most 500 characters.
        method, path: The request, without the host's credentials or a query.
        kickoff_id: The run that the request was about, if any.
    """

    advice = "Look at the crew's page, and at the body above."

    def __init__(
        self,
        *,
        status_code: int,
        method: str,
        path: str,
        title: str | None = None,
        message: str | None = None,
        body: str = "",
        kickoff_id: str | None = None,
    ) -> None:
        self.status_code = status_code
        self.method = method
        self.path = path
        self.title = title
        self.message = message
        self.body = excerpt(body)
        self.kickoff_id = kickoff_id
        super().__init__(self._text())

    def _text(self) -> str:
        said = ": ".join(part for part in (self.title, self.message) if part) or self.body or "an empty body"
        run = f" (run {self.kickoff_id})" if self.kickoff_id else ""
        return f"{self.method} {self.path} answered {self.status_code}{run}: {excerpt(said).rstrip('.')}. {self.advice}"


class AuthenticationError(CrewAPIError):
    """401 or 403: the token is missing, wrong or not allowed. Nothing was started by that request."""

    advice = (
        "Check the bearer token: it stands on the Status tab of the crew's page, and every crew has its own. A User "
        "Bearer Token may do less than the organisation's Bearer Token. Then store it: prefect-crew save NAME --url "
        "URL."
    )


class NotFoundError(CrewAPIError):
    """404: no crew at this URL, or no run with this id."""

    advice = "Check the crew's URL and the id of the run."


class InvalidInputsError(CrewAPIError):
    """The inputs do not fit the crew. Nothing was started.

    Attributes:
        missing_inputs: Names of the required inputs that were not given; empty if the server did not say.
        unknown_inputs: Names that were given and that the crew does not name in `known_inputs`. Only ever found before
            the kickoff.
        before_kickoff: Whether no kickoff was sent.
    """

    advice = "Nothing was started. prefect-crew inputs CREW lists what the crew takes."

    def __init__(
        self,
        *,
        missing_inputs: Sequence[str] = (),
        unknown_inputs: Sequence[str] = (),
        known_inputs: Sequence[str] = (),
        status_code: int = 422,
        method: str = "POST",
        path: str = "/kickoff",
        title: str | None = None,
        message: str | None = None,
        body: str = "",
        kickoff_id: str | None = None,
        before_kickoff: bool = False,
    ) -> None:
        self.missing_inputs = list(missing_inputs)
        self.unknown_inputs = list(unknown_inputs)
        self.known_inputs = list(known_inputs)
        self.before_kickoff = before_kickoff
        super().__init__(
            status_code=status_code,
            method=method,
            path=path,
            title=title,
            message=message,
            body=body,
            kickoff_id=kickoff_id,
        )

    def _text(self) -> str:
        missing = listed_names(self.missing_inputs)
        if not self.before_kickoff:
            return f"{super()._text()}{f' Missing: {missing}.' if missing else ''}"
        text = f"Missing inputs: {missing}. " if missing else ""
        if self.unknown_inputs:
            unknown = with_guesses(self.unknown_inputs, self.known_inputs)
            text += f"Unknown inputs: {unknown}. The crew takes: {listed_names(self.known_inputs)}. "
        extra = " To send them all the same: allow_extra_inputs=True on the block, or --allow-extra."
        return f"{text}{self.advice}{extra if self.unknown_inputs else ''}"


class RateLimitedError(CrewAPIError):
    """429: too many requests.

    Attributes:
        retry_after: Seconds that the server asks to wait, or None.
    """

    advice = "Nothing was started by it; try again later, or lower the rate."

    def __init__(self, *, retry_after: float | None = None, **facts: Any) -> None:
        self.retry_after = retry_after
        super().__init__(**facts)


class ServerError(CrewAPIError):
    """5xx: the crew's server is at fault.

    Attributes:
        retry_after: Seconds that the server asks to wait, or None.
    """

    advice = "Ask the crew's operators (CrewAI's support for a hosted crew), and give them this whole message."

    def __init__(self, *, retry_after: float | None = None, **facts: Any) -> None:
        self.retry_after = retry_after
        super().__init__(**facts)


class PrefectAwayError(CrewError):
    """The Prefect API does not answer, or there is none."""


class CrewConnectionError(CrewError):
    """No answer came: refused, reset, timed out, or a name or certificate that did not check out.

    Attributes:
        sent: Whether the request may have reached the server. False only where it surely did not.
    """

    def __init__(
        self,
        *,
        method: str,
        url: str,
        reason: str,
        sent: bool,
        kickoff_id: str | None = None,
        advice: str | None = None,
    ) -> None:
        self.method = method
        self.url = url
        self.reason = reason
        self.sent = sent
        self.kickoff_id = kickoff_id
        run = f" (run {kickoff_id})" if kickoff_id else ""
        advice = advice or "Check that the crew's server is up and reachable from here: prefect-crew doctor CREW."
        super().__init__(f"{method} {url} got no answer{run}: {reason.rstrip('.')}. {advice}")


class ResponseFormatError(CrewError):
    """The server answered with something that is none of the known shapes.

    Attributes:
        body: An excerpt of the answer, at most 500 characters.
        status_code: The HTTP status of the answer, None if the parser was given only a body.
    """

    def __init__(
        self, *, expected: str, body: str, status_code: int | None = None, kickoff_id: str | None = None
    ) -> None:
        self.expected = expected
        self.body = excerpt(body)
        self.status_code = status_code
        self.kickoff_id = kickoff_id
        run = f" for run {kickoff_id}" if kickoff_id else ""
        super().__init__(
            f"Expected {expected}{run}, got: {self.body or 'an empty body'}. "
            "Check that the URL is the crew's own, not that of a page or a proxy before it."
        )
