"""Every error this package raises.

    CrewError
    ├── ConfigurationError           a URL, token, id or input that cannot be sent; also a ValueError
    ├── CrewAPIError                 the crew's server answered with an error
    │   ├── AuthenticationError      401, 403
    │   ├── NotFoundError            404
    │   ├── InvalidInputsError       400, 422, and before any kickoff
    │   ├── RateLimitedError         429
    │   └── ServerError              5xx
    ├── CrewConnectionError          no answer: refused, reset, timed out, DNS, TLS
    ├── ResponseFormatError          an answer that is none of the known shapes
    ├── OutputTypeError              a completed run whose result does not fit the `output_type`
    ├── KickoffUncertainError        the kickoff may or may not have started a run
    ├── RunKeyConflictError          the run key belongs to another crew or other inputs
    ├── CrewFailedError              the crew ran and failed
    ├── CrewStoppedError             the run was stopped
    ├── CrewLostError                the server no longer knows the run
    ├── CrewTimeoutError             our patience ended; the crew may run on
    └── PipelineFailedError          at least one step of a pipeline failed

Each message says what happened, to which run, and what to do next. The facts are attributes too, so that code never
has to parse a message. All of them survive pickling, since Prefect stores exceptions that way.
"""

from __future__ import annotations

import copyreg
from collections.abc import Mapping, Sequence
from typing import Any

__all__ = [
    "AuthenticationError",
    "ConfigurationError",
    "CrewAPIError",
    "CrewConnectionError",
    "CrewError",
    "CrewFailedError",
    "CrewLostError",
    "CrewStoppedError",
    "CrewTimeoutError",
    "InvalidInputsError",
    "KickoffUncertainError",
    "NotFoundError",
    "OutputTypeError",
    "PipelineFailedError",
    "RateLimitedError",
    "ResponseFormatError",
    "RunKeyConflictError",
    "ServerError",
]

EXCERPT = 500
"""Characters of an error body that an error keeps."""


def excerpt(text: str, limit: int = EXCERPT) -> str:
    """Return `text` on one line, cut to `limit` characters with a note of how much is missing."""
    flat = " ".join(text.split())
    return flat if len(flat) <= limit else f"{flat[:limit]}… ({len(flat) - limit} more characters)"


class CrewError(Exception):
    """Root of all errors of this package. Catch it to catch everything that can go wrong with a crew."""

    def __reduce__(self) -> Any:
        # The subclasses take keyword arguments only, which BaseException's own reduce cannot replay.
        return copyreg.__newobj__, (type(self), *self.args), self.__dict__  # type: ignore[attr-defined]


class ConfigurationError(CrewError, ValueError):
    """What was given cannot be used: a URL, a token, an id, inputs that cannot be sent. Nothing was sent."""


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
        return f"{self.method} {self.path} answered {self.status_code}{run}: {excerpt(said)}. {self.advice}"


class AuthenticationError(CrewAPIError):
    """401 or 403: the token is missing, wrong or not allowed. Nothing was started by that request."""

    advice = (
        "Check the bearer token: it stands on the Status tab of the crew's page, and every crew has its own. "
        "Then store it: prefect-crew save NAME --url URL."
    )


class NotFoundError(CrewAPIError):
    """404: no crew at this URL, or no run with this id."""

    advice = "Check the crew's URL and the id of the run."


class InvalidInputsError(CrewAPIError):
    """The inputs do not fit the crew. Nothing was started.

    Attributes:
        missing_inputs: Names of the required inputs that were not given; empty if the server did not say.
    """

    advice = "Give every required input: prefect-crew inputs CREW lists them."

    def __init__(
        self,
        *,
        missing_inputs: Sequence[str] = (),
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
        names = ", ".join(self.missing_inputs)
        if self.before_kickoff:
            return f"Missing inputs: {names}. Nothing was started. {self.advice}"
        missing = f" Missing: {names}." if names else ""
        return f"{super()._text()}{missing}"


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
        super().__init__(f"{method} {url} got no answer{run}: {reason}. {advice}")


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


class OutputTypeError(CrewError):
    """The run completed, and its result does not fit the type that was asked for. The result is paid for and kept.

    Attributes:
        kickoff_id: The run.
        output: Its whole text.
        problems: What did not fit, a line each.
    """

    def __init__(self, *, kickoff_id: str, output_type: str, output: str, problems: Sequence[str]) -> None:
        self.kickoff_id = kickoff_id
        self.output_type = output_type
        self.output = output
        self.problems = list(problems)
        super().__init__(
            f"The result of run {kickoff_id} does not fit {output_type}: {'; '.join(self.problems)}. "
            f"The text: {excerpt(output) or 'empty'}. Nothing has to be bought again: mend the type, or leave "
            "output_type out, and run again with the same key."
        )


class KickoffUncertainError(CrewError):
    """A kickoff was sent and nobody knows whether it started a run. It is not sent again on a guess.

    Attributes:
        run_key: The run that it was for.
        reason: Why nobody knows.
        sent: What was sent: crew, time, digest of the inputs.
    """

    def __init__(self, *, run_key: str, reason: str, sent: Mapping[str, str] | None = None) -> None:
        self.run_key = run_key
        self.reason = reason
        self.sent = dict(sent or {})
        facts = ", ".join(f"{key} {value}" for key, value in self.sent.items())
        super().__init__(
            f"The kickoff of run {run_key!r} is uncertain: {reason}.{f' Sent: {facts}.' if facts else ''} "
            "It may be running and is not started again. Look at the crew's page, then say which it was: "
            f"prefect-crew runs settle {run_key!r} --kickoff-id ID, or --never-started; "
            "then run again with the same key."
        )


class RunKeyConflictError(CrewError):
    """The run key belongs to a run of another crew or with other inputs. Nothing was started."""

    def __init__(self, *, run_key: str, difference: str, kickoff_id: str | None = None) -> None:
        self.run_key = run_key
        self.difference = difference
        self.kickoff_id = kickoff_id
        super().__init__(
            f"Run key {run_key!r} belongs to another run: {difference}. Nothing was started. "
            f"Use another key, or look at that run: prefect-crew runs show {run_key!r}."
        )


class _EndedError(CrewError):
    """What the errors about one run share."""

    def __init__(self, text: str, *, kickoff_id: str, crew: str | None = None, run_key: str | None = None) -> None:
        self.kickoff_id = kickoff_id
        self.crew = crew
        self.run_key = run_key
        super().__init__(text)


def _of(kickoff_id: str, crew: str | None) -> str:
    return f"Run {kickoff_id} of crew {crew}" if crew else f"Crew run {kickoff_id}"


class CrewFailedError(_EndedError):
    """The crew ran and failed. Attributes: kickoff_id, crew, run_key, error (the crew's own)."""

    advice = "It is not bought again by itself: retry the flow run, or run again with the same key, once it is mended."

    def __init__(
        self,
        *,
        kickoff_id: str,
        error: str,
        crew: str | None = None,
        run_key: str | None = None,
        advice: str | None = None,
    ) -> None:
        self.error = error
        super().__init__(
            f"{_of(kickoff_id, crew)} failed: {excerpt(error).rstrip('.') or 'the crew gave no reason'}. "
            f"{advice or self.advice}",
            kickoff_id=kickoff_id,
            crew=crew,
            run_key=run_key,
        )


class CrewStoppedError(_EndedError):
    """The run was stopped, by us or by someone else. Attributes: kickoff_id, crew, run_key."""

    def __init__(self, *, kickoff_id: str, crew: str | None = None, run_key: str | None = None) -> None:
        super().__init__(
            f"{_of(kickoff_id, crew)} was stopped before it had a result. Run again to buy a new one.",
            kickoff_id=kickoff_id,
            crew=crew,
            run_key=run_key,
        )


class CrewLostError(_EndedError):
    """The server does not know the run (any more). Attributes: kickoff_id, crew, run_key, last_state."""

    def __init__(
        self, *, kickoff_id: str, crew: str | None = None, run_key: str | None = None, last_state: str | None = None
    ) -> None:
        self.last_state = last_state
        seen = f"it was last seen {last_state}" if last_state else "it never became visible after its kickoff"
        super().__init__(
            f"{_of(kickoff_id, crew)} is not known to the server: {seen}. "
            "Check the URL, then the crew's page. It is not bought again on a guess: force_new=True buys another.",
            kickoff_id=kickoff_id,
            crew=crew,
            run_key=run_key,
        )


class CrewTimeoutError(_EndedError):
    """A time budget ended while the crew had not. The crew may run on.

    Attributes:
        phase: "pending", "running" or "human": which budget ended.
        budget: That budget, in seconds.
        last_state: The state last seen.
        stopped: Whether the crew was stopped (`on_timeout="stop"`).
    """

    def __init__(
        self,
        *,
        kickoff_id: str,
        phase: str,
        budget: float,
        last_state: str | None,
        crew: str | None = None,
        run_key: str | None = None,
        stopped: bool = False,
    ) -> None:
        self.phase = phase
        self.budget = budget
        self.last_state = last_state
        self.stopped = stopped
        after = "It was stopped." if stopped else "It was left running."
        go_on = f" To go on waiting, run again with run key {run_key!r} and a larger timeout" if run_key else ""
        super().__init__(
            f"{_of(kickoff_id, crew)} was still {last_state or 'unseen'} "
            f"when its {phase} time of {budget:g} s was over. {after}"
            f"{go_on}{', or look' if go_on else ' Look'}: prefect-crew status CREW {kickoff_id}.",
            kickoff_id=kickoff_id,
            crew=crew,
            run_key=run_key,
        )


class PipelineFailedError(CrewError):
    """At least one step of a pipeline failed; the independent ones were finished.

    Attributes:
        failed: Names of the steps that failed.
        skipped: Names of the steps that did not run because they needed one that failed.
        results: Results so far, by step name.
        errors: The error of each failed step, by step name.
    """

    def __init__(
        self,
        *,
        failed: Sequence[str],
        results: Mapping[str, Any],
        errors: Mapping[str, BaseException],
        skipped: Sequence[str] = (),
        run_key: str | None = None,
    ) -> None:
        self.failed = list(failed)
        self.skipped = list(skipped)
        self.results = dict(results)
        self.errors = dict(errors)
        self.run_key = run_key
        why = "; ".join(
            f"{name}: {excerpt(str(errors[name]), 200).rstrip('.')}" for name in self.failed if name in errors
        )
        not_run = f" Not run because of it: {', '.join(self.skipped)}." if self.skipped else ""
        again = f" with run key {run_key!r}" if run_key else ""
        super().__init__(
            f"{'A step' if len(self.failed) == 1 else f'{len(self.failed)} steps'} failed: {why}.{not_run} "
            f"{len(self.results)} finished and are kept: retry the flow run, or run again{again}, "
            "to start with what failed."
        )
