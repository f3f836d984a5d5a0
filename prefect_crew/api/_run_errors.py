"""Errors about a run: how its purchase, its wait or its pipeline ended."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from typing import Any

from prefect_crew.api._error import CrewError, excerpt
from prefect_crew.api.models import CrewState

__all__ = [
    "AnsweredError",
    "CrewFailedError",
    "CrewLostError",
    "CrewStoppedError",
    "CrewTimeoutError",
    "KickoffUncertainError",
    "OutputTypeError",
    "PipelineFailedError",
    "ReviewLimitError",
    "RunKeyConflictError",
]


class OutputTypeError(CrewError):
    """The run completed, and its result does not fit the type that was asked for. The result is paid for and kept.

    Attributes:
        kickoff_id: The run.
        output: Its whole text.
        problems: What did not fit, a line each.
    """

    def __init__(
        self, *, kickoff_id: str, output_type: str, output: str, problems: Sequence[str], shown: str | None = None
    ) -> None:
        # `shown` is the text as the message may hold it; that becomes the state of a flow run, for all to read.
        self.kickoff_id = kickoff_id
        self.output_type = output_type
        self.output = output
        self.problems = list(problems)
        super().__init__(
            f"The result of run {kickoff_id} does not fit {output_type}: {'; '.join(self.problems)}. "
            f"The text: {excerpt(output if shown is None else shown) or 'empty'}. Nothing has to be bought again: mend "
            "the type, or leave output_type out, and run again with the same key."
        )


class AnsweredError(CrewError):
    """A question has its answer already, or is being answered at this moment. Nothing was sent."""


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
            f"The kickoff of run {run_key!r} is uncertain: {reason.rstrip('.')}.{f' Sent: {facts}.' if facts else ''} "
            "It may be running and is not started again. Look at the crew's page, then say which it was: "
            f"prefect-crew runs settle {shlex.quote(run_key)} --kickoff-id ID, or --never-started; "
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
            f"Use another key, or look at that run: prefect-crew runs show {shlex.quote(run_key)}."
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

    advice = "Correct the crew, then run again with the same key, which starts another."

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

    def __init__(
        self, *, kickoff_id: str, crew: str | None = None, run_key: str | None = None, advice: str | None = None
    ) -> None:
        super().__init__(
            f"{_of(kickoff_id, crew)} was stopped before it had a result. {advice or 'Run again to buy a new one.'}",
            kickoff_id=kickoff_id,
            crew=crew,
            run_key=run_key,
        )


class CrewLostError(_EndedError):
    """The server does not know the run (any more).

    Attributes: kickoff_id, crew, run_key, last_state. `last_state` is "completed" where only the result is lost.
    """

    def __init__(
        self, *, kickoff_id: str, crew: str | None = None, run_key: str | None = None, last_state: str | None = None
    ) -> None:
        self.last_state = last_state
        seen = f"it was last seen {last_state}" if last_state else "this wait for it has never seen it"
        again = "force_new=True (--force-new) buys another"
        if last_state == CrewState.COMPLETED:
            seen = "it has completed, but its record does not hold the result, which the server has forgotten"
        elif run_key:
            again += f", and so does the key after prefect-crew runs settle {shlex.quote(run_key)} --lost"
        super().__init__(
            f"{_of(kickoff_id, crew)} is not known to the server: {seen}. "
            f"Check the URL, then the crew's page. It is not bought again on a guess: {again}.",
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
        if run_key is None:
            go_on = "Look"
        elif stopped:
            go_on = f"Run key {run_key!r} buys another, which may want a larger timeout; or look"
        else:
            go_on = f"To go on waiting, run again with run key {run_key!r} and a larger timeout, or look"
        super().__init__(
            f"{_of(kickoff_id, crew)} was still {last_state or 'unseen'} "
            f"when its {phase} time of {budget:g} s was over. {after} {go_on}: "
            f"prefect-crew status CREW {shlex.quote(kickoff_id)}.",
            kickoff_id=kickoff_id,
            crew=crew,
            run_key=run_key,
        )


class ReviewLimitError(_EndedError):
    """A task asked for a person's answer more often than the policy's `max_rounds`. The crew may wait on.

    Attributes:
        task_id: The task.
        max_rounds: How often it may ask.
        stopped: Whether the crew was stopped (`on_human_timeout="stop"`).
    """

    def __init__(
        self,
        *,
        kickoff_id: str,
        task_id: str,
        max_rounds: int,
        crew: str | None = None,
        run_key: str | None = None,
        stopped: bool = False,
    ) -> None:
        self.task_id = task_id
        self.max_rounds = max_rounds
        self.stopped = stopped
        after = "It was stopped." if stopped else "It still waits: answer it on the crew's page, or stop it there."
        super().__init__(
            f"{_of(kickoff_id, crew)} asks once more for a person's answer to task {excerpt(task_id, 100)}, "
            f"beyond its limit of {max_rounds} rounds. {after}",
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
        why = "; ".join(f"{name}: {excerpt(str(errors[name])).rstrip('.')}" for name in self.failed if name in errors)
        not_run = f" Not run because of it: {', '.join(self.skipped)}." if self.skipped else ""
        again = f" with run key {run_key!r}" if run_key else ""
        super().__init__(
            f"{'A step' if len(self.failed) == 1 else f'{len(self.failed)} steps'} failed: {why}.{not_run} "
            f"{len(self.results)} finished and are kept: retry the flow run, or run again{again}, "
            "to start with what failed."
        )
